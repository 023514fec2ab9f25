"""What errors for people have in common: a message that says what was wrong, where, and what is right."""

from __future__ import annotations

import reprlib
from typing import Any

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 60
_SHORT.maxlevel = 2


class Error(Exception):
    """What mtfast raises over a configuration, data, a checkpoint or a run; its message is for people."""


class FieldError(Error, ValueError):
    """An error that a field of the configuration may be at fault for.

    field: its dotted name, where there is one.
    """

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field

    def __reduce__(self) -> tuple[Any, ...]:  # it is sent between ranks
        return type(self), (str(self), self.field)


def shown(value: Any) -> str:
    """A value as messages have it: its beginning and end, where it is long, and however deep it is."""
    try:
        return _SHORT.repr(value)
    except ValueError:  # Python writes no longer ones
        return "a number of thousands of digits"
