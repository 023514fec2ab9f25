"""One process at a time in a run directory: a lock that the system takes back from a holder that ends."""

from __future__ import annotations

import datetime
import json
import os
import shlex
import socket
import sys
from pathlib import Path

import filelock

from mtfast.config import ConfigError
from mtfast.files import write_json

LOCK = "run.lock"
HOLDER = "run.lock.json"

_held: dict[Path, filelock.BaseFileLock] = {}


def hold(directory: Path) -> None:
    """Keep other processes out of `directory`, which is made where it is not there, until `release` or until
    this one ends.

    The lock is the kernel's, on a shared file system the server's: it goes however its holder ends. The file
    beside it only tells who that is. A process that has the lock already goes on with it.

    Raises:
        ConfigError: another process holds the lock; the message says which.
    """
    directory.mkdir(parents=True, exist_ok=True)
    key = directory.resolve()
    if key in _held:
        return
    lock = filelock.FileLock(directory / LOCK)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise ConfigError(
            f"{directory} is in use by {_holder(directory)}; wait for it to end, stop it, or choose "
            "another --run-dir"
        ) from None
    holder = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": datetime.datetime.now().astimezone().isoformat(sep=" ", timespec="seconds"),
        "command": shlex.join(sys.orig_argv),
    }
    try:
        write_json(directory / HOLDER, holder)
    except BaseException:
        lock.release()
        raise
    _held[key] = lock


def release() -> None:
    """Let other processes into every directory that this one holds."""
    while _held:
        _held.popitem()[1].release()


def _holder(directory: Path) -> str:
    try:
        found = json.loads((directory / HOLDER).read_text(encoding="utf-8"))
        return "process {pid} on {host} since {since} ({command})".format_map(found)
    except (OSError, ValueError, KeyError, TypeError):
        return f"another process, of which {directory / HOLDER} should tell more"
