"""What a field of the configuration takes: values of its type, said in words, and paths that can be."""

from __future__ import annotations

import dataclasses
import os
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PATH_WANTED = "be a path or a name, without null characters and with a user that is known after ~"
_LIMIT = 2**63  # what runs count with
_WORDS = {
    bool: "true or false",
    int: "an integer (of 64 bits)",
    float: "a number",
    str: "a text",
    dict: "names with values",
    types.NoneType: "null",
}


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a type: no bool for a number, no integer that runs cannot count with; a list may
    stand for a tuple."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return any(type(value) is type(part) and value == part for part in parts)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, part) for part in parts)
    if origin is tuple:
        if not isinstance(value, (tuple, list)):
            return False
        kinds = parts[:1] * len(value) if parts[-1] is ... else parts
        return len(value) == len(kinds) and all(map(fits, value, kinds))
    if origin is dict:
        return isinstance(value, dict) and all(
            fits(key, parts[0]) and fits(item, parts[1]) for key, item in value.items()
        )
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool) and -_LIMIT <= value < _LIMIT
    if hint is float:
        return isinstance(value, float) or fits(value, int)
    return isinstance(value, hint)


def in_words(hint: Any) -> str:
    """What a type wants: "a number", or "linear or lstm"."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        *others, last = map(str, parts)
        return f"{', '.join(others)} or {last}" if others else last
    if origin in (typing.Union, types.UnionType):
        return ", or ".join(in_words(part) for part in parts)
    if origin is tuple:
        return "a list" if parts[-1] is ... else f"a list of {len(parts)}"
    return _WORDS.get(origin or hint) or f"a {hint.__name__}"


def is_path(text: str) -> bool:
    """Whether a text may be a path, or a name that is looked for as one."""
    try:
        return b"\0" not in os.fsencode(Path(text).expanduser())
    except (RuntimeError, ValueError):  # the home of nobody; half a character
        return False


def settings(section: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Every field of a dataclass and of those within: its dotted name, its type and its value."""
    for name, hint in typing.get_type_hints(type(section)).items():
        value = getattr(section, name)
        if dataclasses.is_dataclass(hint) and isinstance(value, typing.cast(type, hint)):
            yield from settings(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", hint, value
