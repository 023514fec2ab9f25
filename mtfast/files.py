"""Files of a run, written whole and read with errors that name the file and say what to do about it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from mtfast.config import ConfigError
from mtfast.durable import sealed, sync, unsealed


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give an OSError that names no file, as writing to a full disk raises it, the name of `path`."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error


def write_text(path: Path, text: str) -> None:
    """`write_bytes` of text, in UTF-8."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, contents: bytes) -> None:
    """Write a file whole: to a neighbour first, then renamed over it. It is on the disk on return."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        with naming(path):
            partial.write_bytes(contents)
            sync(partial)
            os.replace(partial, path)
            sync(path.parent)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def to_yaml(values: dict[str, Any]) -> str:
    """Plain values as YAML, in their order."""
    return yaml.safe_dump(values, sort_keys=False)


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write a JSON object, with a checksum that `read_json` looks at."""
    write_text(path, json.dumps(sealed(values), indent=2) + "\n")


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """The JSON object in a file that is there, as `write_json` was given it.

    Raises:
        ConfigError: it cannot be read, or holds anything else; the message ends in `remedy`.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(value, dict):
            return unsealed(value)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{path} cannot be read ({reason}); {remedy}") from error
    raise ConfigError(f"{path} does not hold a JSON object; {remedy}")
