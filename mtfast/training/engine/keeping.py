"""What training leaves on disk: copied in one moment, written by a thread while training goes on."""

from __future__ import annotations

import itertools
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.constants import default_pg_timeout

from mtfast.models.checkpoint import CheckpointError

from . import ranks
from .engine import Engine
from .snapshot import HostMemory, Snapshot
from .state import point_at, unwritable

Write = Callable[[dict[str, Tensor]], None]
PATIENCE_SECONDS = 30.0  # for the other ranks' files, in a process that is about to end
_moments = itertools.count()  # all ranks keep the same ones


@dataclass(frozen=True)
class State:
    """A resumable state: of which step, where it goes, what the loop adds to it."""

    directory: Path
    step: int
    client: dict[str, Any]

    @property
    def tag(self) -> str:
        return f"step-{self.step}"


class Keeper:
    """Keeps an engine's weights and resumable states, one moment's at a time. All ranks call its methods
    alike.

    A thread of each rank writes the files. No collective runs in it: that its files are there each rank tells
    through the store of the process group, and the thread of rank 0 then makes the state the newest.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._memory = HostMemory(engine.device)
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._leaving = False

    def keep(self, write: Write | None, state: State | None) -> None:
        """Copy what there is now, and return; what was kept before is written to its end first.

        Args:
            write: writes every weight in float32 on the host, by name; called on rank 0 alone.
            state: to be made the newest once it is whole, after `write` has returned.

        Raises:
            CheckpointError: the state cannot be written, or, as any error of `write`, what was kept before
                could not be.
        """
        self.wait()
        snapshot = Snapshot(self._memory)
        files = {} if state is None else self._files_of(state, snapshot)
        weights = None if write is None else self._engine.weights_in(snapshot)
        snapshot.end()
        key = f"mtfast/kept/{next(_moments)}"

        def work() -> None:
            try:
                snapshot.wait()
                if write is not None and weights is not None:
                    write(weights)
                if state is not None:
                    self._write(state, files, key)
            except Exception as error:  # raised again in the thread that trains
                self._error = error

        self._thread = threading.Thread(target=work, name="mtfast-keeping", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise what writing has raised; does not wait for it."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def wait(self) -> None:
        """Return when all that was kept is written, on this rank. Raises as `check`."""
        self._join()
        self.check()

    def leave(self) -> Exception | None:
        """`wait` of a process that is about to end over an error of its own; what writing has raised.

        Other ranks may have ended before they had written theirs: then the state before stays the newest.
        """
        self._leaving = True
        self._join()
        return self._error

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _files_of(self, state: State, snapshot: Snapshot) -> dict[Path, Any]:
        try:
            return self._engine.state_in(snapshot, state.directory, state.tag, state.client)
        except (OSError, RuntimeError) as error:
            raise _given_up(state, unwritable(state.directory, error)) from error

    def _write(self, state: State, files: dict[Path, Any], key: str) -> None:
        try:
            for path, value in files.items():
                torch.save(value, path)
        except (OSError, RuntimeError) as error:  # torch's writer of archives raises RuntimeError
            failure = unwritable(state.directory, error)
            if (store := ranks.store()) is not None:
                store.set(f"{key}/failed", str(failure))
            raise _given_up(state, failure) from error
        if not self._all_written(state, key):
            return
        try:
            point_at(state.directory, state.tag, self._engine.facts)
        except OSError as error:
            raise unwritable(state.directory, error) from error

    def _all_written(self, state: State, key: str) -> bool:
        """Tell that this rank's files are written; True on rank 0, once those of all are."""
        store = ranks.store()
        if store is None:
            return True
        store.add(key, 1)
        deadline = time.monotonic() + default_pg_timeout.total_seconds()
        while ranks.is_main() and store.add(key, 0) < ranks.world_size():
            if store.check([f"{key}/failed"]):
                raise _given_up(state, CheckpointError(store.get(f"{key}/failed").decode()))
            if self._leaving:
                deadline = min(deadline, time.monotonic() + PATIENCE_SECONDS)
            if time.monotonic() > deadline:
                raise _given_up(
                    state, unwritable(state.directory, TimeoutError("other ranks have not done so"))
                )
            time.sleep(0.02)
        return ranks.is_main()


def _given_up(state: State, failure: CheckpointError) -> CheckpointError:
    """What to raise, after nothing is left of a state that could not be written."""
    if ranks.is_main():
        shutil.rmtree(state.directory / state.tag, ignore_errors=True)
    return failure
