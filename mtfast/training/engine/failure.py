"""An error of a run's process is printed once, with rank and host, and all processes end with one status.

One that fails alone, over a file that only its host lacks, leaves the others in a collective which ends with
"connection closed", if at all. So each asks the process group's store, before it speaks, who failed first and
whether that has been printed.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any, NoReturn

import torch.distributed as dist

from mtfast.config import ConfigError

from . import alive, ranks
from .alive import BEAT_SECONDS, FAILED, PRINTED

LEFT = "mtfast/left"
PATIENCE_SECONDS = 3.0


def leave(error: Exception, reason: str, code: int, *, expected: bool) -> NoReturn:
    """End this process over `error`, with status `code`, once a reason has been printed: its own or that of
    another process which failed too.

    Args:
        expected: the error is this process's own. Any other may be what another's failure has led to: who
            failed first is then believed, and rank 0 where it failed of itself.
    """
    store = ranks.store()
    failed = _failed(error, expected, store)
    text = reason if ranks.is_main() else f"{ranks.whereabouts()}: {reason}"
    if store is None:
        if ranks.is_main() or failed != 0:
            print(text, file=sys.stderr)
        raise SystemExit(code)
    me = str(ranks.rank())
    try:
        first = failed in (None, ranks.rank()) and store.compare_set(FAILED, "", me) == me.encode()
        if not (ranks.is_main() and (first or failed == 0)):
            _wait(lambda: store.check([PRINTED]), PATIENCE_SECONDS if first else 2 * PATIENCE_SECONDS)
        if store.compare_set(PRINTED, "", me) == me.encode():
            print(_gone() or text if first and isinstance(error, RuntimeError) else text, file=sys.stderr)
        if ranks.is_main():  # with which the store ends: what waits for it is let go first
            if dist.get_backend() == "gloo":
                dist.destroy_process_group()
            _wait(lambda: store.add(LEFT, 0) >= ranks.world_size() - 1, PATIENCE_SECONDS)
        else:
            store.add(LEFT, 1)
    except RuntimeError:
        print(f"{ranks.whereabouts()}: lost the connection to rank 0", file=sys.stderr)
    raise SystemExit(code)


def _failed(error: Exception, expected: bool, store: Any) -> int | None:
    """The rank that failed; None where that is not known."""
    of_command_line = isinstance(error, ConfigError) and not isinstance(error, ranks.LaunchError)
    if getattr(error, "of_main", False) or (store is None and of_command_line):  # which all ranks have
        return 0
    return ranks.rank() if expected else None


def _gone() -> str | None:
    """What a collective has failed of where a process has ended that told nobody."""
    _wait(lambda: bool(alive.silent(3 * BEAT_SECONDS)), 5 * BEAT_SECONDS)
    gone = ", ".join(alive.silent(3 * BEAT_SECONDS))
    said = "has ended without a word, as one does that is killed; the same command continues the run"
    return f"mtfast: {gone} {said}" if gone else None


def _wait(until: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not until() and time.monotonic() < deadline:
        time.sleep(0.02)
