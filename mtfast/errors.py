"""What errors for people have in common: a message that says what was wrong, where, and what is right."""

from __future__ import annotations

from typing import Any


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
