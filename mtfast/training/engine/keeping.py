"""What training leaves on disk: copied in one moment, written by a thread while training goes on."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from . import ranks
from .engine import Engine
from .snapshot import HostMemory, Snapshot
from .state import write_state

Write = Callable[[dict[str, Tensor]], None]


@dataclass(frozen=True)
class Due:
    """A resumable state that is to be written.

    client: what the loop adds to it. best: directories of the checkpoints that belong to it.
    keep: how many states then stay.
    """

    directory: Path
    step: int
    client: dict[str, Any]
    best: Sequence[Path] = ()
    keep: int = 1


class Keeper:
    """Keeps an engine's weights and resumable states, one moment's at a time. All ranks call its methods
    alike; rank 0 writes, in a thread in which no collective runs."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._memory = HostMemory(engine.device)
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    @property
    def failed(self) -> bool:
        """Whether writing has raised, on this rank."""
        return self._error is not None

    def keep(self, write: Write | None, due: Due | None) -> None:
        """Copy what there is now, and return; what was kept before is written to its end first.

        Args:
            write: writes every weight in float32 on the host, by name; called on rank 0 alone.
            due: a state, written after `write` has returned.

        Raises:
            CheckpointError: or any error of `write`, on all ranks: what was kept before could not be written.
        """
        self.wait()
        snapshot = Snapshot(self._memory)
        if due is None:
            state, weights = None, self._engine.weights_in(snapshot)
        else:
            state = self._engine.state(snapshot, due.step, due.client)
            weights = None if state is None else state.weights
        snapshot.end()

        def work(weights: dict[str, Tensor]) -> None:
            try:
                snapshot.wait()
                if write is not None:
                    write(self._engine.named(weights))
                if due is not None and state is not None:
                    write_state(due.directory, state, due.best, due.keep)
            except Exception as error:  # raised again in the thread that trains
                self._error = error

        if weights is not None:
            self._thread = threading.Thread(target=work, args=(weights,), name="mtfast-keeping", daemon=True)
            self._thread.start()

    def wait(self) -> None:
        """Return when all that was kept is written. Raises what writing has raised, on all ranks."""
        ranks.on_main(self._wait)

    def _wait(self) -> None:
        self._join()
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def leave(self) -> Exception | None:
        """`wait` of a process that is about to end over an error of its own; what writing has raised."""
        self._join()
        return self._error

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None
