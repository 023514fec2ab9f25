"""This process as a launcher starts it: its rank, how many there are, and its end."""

from __future__ import annotations

import atexit
import os
import socket
import sys
from typing import NoReturn


def rank() -> int:
    return _number("RANK", 0)


def world_size() -> int:
    return _number("WORLD_SIZE", 1)


def _number(name: str, without: int) -> int:
    value = os.environ.get(name, "")
    return int(value) if value.isdecimal() else without  # what is wrong with it, joining the others tells


def is_main() -> bool:
    return rank() == 0


def whereabouts() -> str:
    """This process among those of the run, for people."""
    return f"rank {rank()} on {socket.gethostname()}"


def answer(text: str) -> None:
    """Print it, once for all processes."""
    if is_main():
        print(text.rstrip("\n"))


def fail(message: str, code: int = 2) -> NoReturn:
    """Leave with status `code`, and say why once for all processes. Raises SystemExit."""
    if is_main():
        print(f"mtfast: {message}", file=sys.stderr)
    raise SystemExit(code)


def end_process(code: int) -> NoReturn:
    """End this process with status `code`, after what atexit has to do.

    At once, since torch's threads for collectives outlive what they use while an interpreter takes itself
    down: 2 of 120 processes that had done their work ended with SIGABRT.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
