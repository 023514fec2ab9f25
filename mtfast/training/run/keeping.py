"""When a stage's weights and its resumable state are kept, and under which names."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from torch import Tensor

from mtfast.interval import parse_interval
from mtfast.models.files import replace_by_links
from mtfast.training.engine import ranks
from mtfast.training.engine.engine import Engine
from mtfast.training.engine.keeping import Due, Keeper
from mtfast.training.engine.state import Found, State, newest_state, read_state

from .directory import STATE
from .progress import say

LAST = "last"
Save = Callable[[Path, dict[str, Tensor]], None]


class Keeping:
    """What a stage leaves in its directory. Files are written while training goes on; all are when this is
    left, whatever ends the stage. All ranks call its methods alike."""

    def __init__(self, engine: Engine, save: Save, directory: Path, every: str, keep: int) -> None:
        """
        Args:
            save: writes a checkpoint's directory from every weight in float32; called on rank 0, in a thread.
            directory: of the stage.
            every: how often the state is due, as `parse_interval` takes it.
            keep: how many states stay.
        """
        self._keeper, self._save, self._directory = Keeper(engine), save, directory
        self._every, self._states = parse_interval(every), keep
        self._since, self._time_is_up = time.monotonic(), False
        self._last_step: int | None = None

    def __enter__(self) -> Keeping:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._keeper.wait()
        elif failure := self._keeper.leave():
            say(str(failure))

    def settle(self) -> None:
        """Before the process ends over an error: return when what was kept is written."""
        self._keeper.leave()

    @property
    def failed(self) -> bool:
        """Whether something could not be written; `wait` tells. For this rank, of which rank 0 writes."""
        return self._keeper.failed

    def wait(self) -> None:
        """Return when what was kept is written. Raises CheckpointError, on all ranks, if it could not be."""
        self._keeper.wait()

    def look(self) -> None:
        """See what the time is: rank 0's clock holds for all."""
        if (seconds := self._every.seconds) is not None and not self._time_is_up:
            self._time_is_up = ranks.broadcast(time.monotonic() - self._since >= seconds)

    def is_due(self, step: int, epoch: int | None = None) -> bool:
        """Whether the state is to be kept after so many steps and, at the end of an epoch, so many epochs."""
        if self._every.steps is not None:
            return step % self._every.steps == 0
        if self._every.epochs is not None:
            return epoch is not None and epoch % self._every.epochs == 0
        return self._time_is_up

    def keep(
        self, step: int, risen: Sequence[str], best: Iterable[str], last: bool, client: dict[str, Any] | None
    ) -> None:
        """Keep what there is after `step`.

        Args:
            risen: criteria by which these weights are the best so far. best: all criteria that have some.
            last: these are also the weights of the end.
            client: what the loop adds to the state, if that is to be kept too.

        Raises:
            CheckpointError: what was kept before could not be written.
        """
        names = [best_of(name) for name in risen] + [LAST] * last
        due = None
        if client is not None:
            checkpoints = [self._directory / best_of(name) for name in best]
            due = Due(self._directory / STATE, step, client, checkpoints, self._states)
            self._since, self._time_is_up = time.monotonic(), False
        if last:
            self._last_step = step
        if names or due:
            self._keeper.keep(self._writing([self._directory / name for name in names]), due)

    def finish(self, step: int) -> None:
        """Return when all is written, the weights after the last step too."""
        if self._last_step != step:  # another process has made that step
            self.keep(step, [], [], True, None)
        self._keeper.wait()

    def _writing(self, directories: list[Path]) -> Callable[[dict[str, Tensor]], None] | None:
        """What writes weights into directories, once: all but the first link to its files."""

        def write(weights: dict[str, Tensor]) -> None:
            first, *others = directories
            self._save(first, weights)
            for other in others:
                replace_by_links(other, first)

        return write if directories else None


class Newest(NamedTuple):
    """The state to go on from, and the names of the checkpoints that belong to it."""

    state: State
    best: tuple[str, ...]


def newest(directory: Path) -> Newest | None:
    """What a stage goes on from, the same on every rank; None where it has no state. The best checkpoints in
    its directory become again those of then. Says what is damaged.

    Raises:
        ConfigError: all states are damaged. CheckpointError: one cannot be read.
    """
    found = ranks.seen_by_main(lambda: _newest(directory))
    return None if found is None else Newest(ranks.main_first(lambda: read_state(found.path)), found.best)


def _newest(directory: Path) -> Found | None:
    found = newest_state(directory / STATE)
    if found is not None:
        for fault in found.faults:
            say(f"{fault}; going on from {found.path}")
        for name in found.best:
            replace_by_links(directory / name, found.path / name)
    return found


def best_of(criterion: str) -> str:
    """Name of the checkpoint that is the best by a criterion."""
    return f"best-{criterion}"


def note_best(
    best: dict[str, dict[str, Any]], criteria: Mapping[str, str], metrics: Mapping[str, float], epoch: int
) -> list[str]:
    """Note in `best` by which criteria (names of metrics by their own) this epoch is the best; those."""
    risen = [
        name for name, metric in criteria.items() if name not in best or metrics[metric] > best[name]["value"]
    ]
    best |= {name: {"value": metrics[criteria[name]], "epoch": epoch, "metrics": metrics} for name in risen}
    return risen
