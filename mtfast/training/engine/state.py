"""A stage's resumable states on disk: which is the newest, whether it is whole, what to say if it is not."""

from __future__ import annotations

import shutil
from pathlib import Path

from mtfast.config import ConfigError
from mtfast.files import read_json, write_json
from mtfast.models.checkpoint import CheckpointError

POINTER = "latest.json"
# How torch's writer of archives complains where a write came short.
SHORT_WRITE = ("inline_container", "PytorchStreamWriter", "unexpected pos")


def point_at(directory: Path, tag: str, facts: dict[str, int]) -> None:
    """Make `tag` the newest state and remove the others.

    Args:
        facts: what a run that continues from it must have in common with this one.
    """
    files = {path.name: path.stat().st_size for path in (directory / tag).iterdir() if path.is_file()}
    write_json(directory / POINTER, {"tag": tag, **facts, "files": files})
    for old in directory.glob("step-*"):
        if old.name != tag:
            shutil.rmtree(old, ignore_errors=True)  # what stays is removed with the next


def newest(directory: Path, facts: dict[str, int]) -> str | None:
    """Name of the newest state; None where there is none.

    Raises:
        ConfigError: it was written by a run with other `facts`, or not all of it is there.
    """
    path = directory / POINTER
    if not path.exists():
        return None
    remedy = f"remove {directory} to start the stage again"
    pointer = read_json(path, remedy)
    tag, files = pointer.get("tag"), pointer.get("files")
    if not isinstance(tag, str) or not isinstance(files, dict) or not facts.keys() <= pointer.keys():
        raise ConfigError(f"{path} does not say which state is the newest; {remedy}")
    for name, value in facts.items():
        if pointer[name] != value:
            raise ConfigError(
                f"{directory} was written with {name} {pointer[name]}, this run has {value}; "
                f"continue it as it was started, or {remedy}"
            )
    for name, size in files.items():
        file = directory / tag / name
        found = file.stat().st_size if file.is_file() else None
        if found != size:
            what = "is missing" if found is None else f"has {found} bytes and should have {size}"
            raise ConfigError(f"{file} {what}, so the stage cannot continue from it; {remedy}")
    return tag


def unreadable(directory: Path, tag: str, error: Exception) -> CheckpointError:
    """What to raise for an error that reading raised."""
    return CheckpointError(
        f"the training state in {directory / tag} cannot be read ({_line(error)}); remove {directory} to "
        "start the stage again"
    )


def unwritable(directory: Path, error: Exception) -> CheckpointError:
    """What to raise for an error that writing raised; to be asked before anything of it is removed."""
    reason = _line(error)
    if any(part in reason for part in SHORT_WRITE):
        free = shutil.disk_usage(directory).free / 2**20
        reason = f"the disk is full or a limit is reached, {free:,.0f} MiB are free ({reason})"
    return CheckpointError(
        f"the training state could not be written to {directory}: {reason}; the one before it, if "
        "there is one, is kept, and the same command continues from there"
    )


def _line(error: Exception) -> str:
    """The first line of what an error says: torch appends a stack trace to some."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).splitlines() or [type(error).__name__])[0]
