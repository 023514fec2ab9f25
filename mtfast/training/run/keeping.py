"""When a stage's weights and its resumable state are kept, and under which names."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from mtfast.interval import parse_interval
from mtfast.models.files import link_files, replacing
from mtfast.training.engine import ranks
from mtfast.training.engine.engine import Engine
from mtfast.training.engine.keeping import Keeper, State

from .directory import STATE
from .progress import say

LAST = "last"
Save = Callable[[Path, dict[str, Tensor]], None]


class Keeping:
    """What a stage leaves in its directory. Files are written while training goes on; all are when this is
    left, whatever ends the stage. All ranks call its methods alike."""

    def __init__(self, engine: Engine, save: Save, directory: Path, every: str) -> None:
        """
        Args:
            save: writes a checkpoint's directory from every weight in float32; called on rank 0, in a thread.
            directory: of the stage.
            every: how often the state is due, as `parse_interval` takes it.
        """
        self._keeper, self._save, self._directory = Keeper(engine), save, directory
        self._every = parse_interval(every)
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

    def look(self) -> None:
        """See whether files could be written, and what the time is: rank 0's clock holds for all."""
        self._keeper.check()
        if (seconds := self._every.seconds) is not None and not self._time_is_up:
            self._time_is_up = ranks.broadcast(time.monotonic() - self._since >= seconds)

    def is_due(self, step: int, epoch: int | None = None) -> bool:
        """Whether the state is to be kept after so many steps and, at the end of an epoch, so many epochs."""
        if self._every.steps is not None:
            return step % self._every.steps == 0
        if self._every.epochs is not None:
            return epoch is not None and epoch % self._every.epochs == 0
        return self._time_is_up

    def keep(self, step: int, best: Sequence[str], last: bool, position: dict[str, Any] | None) -> None:
        """Keep what there is after `step`.

        Args:
            best: criteria by which these weights are the best so far. last: they are also those of the end.
            position: where the loop stands, if the state is to be kept too.

        Raises:
            CheckpointError: what was kept before could not be written.
        """
        names = [f"best-{name}" for name in best] + [LAST] * last
        state = None
        if position is not None:
            state = State(self._directory / STATE, step, {"position": position})
            self._since, self._time_is_up = time.monotonic(), False
        if last:
            self._last_step = step
        if names or state:
            self._keeper.keep(self._writing([self._directory / name for name in names]), state)

    def finish(self, step: int) -> None:
        """Return when all is written, the weights after the last step too."""
        if self._last_step != step:  # another process has made that step
            self.keep(step, [], True, None)
        self._keeper.wait()

    def _writing(self, directories: list[Path]) -> Callable[[dict[str, Tensor]], None] | None:
        """What writes weights into directories, once: all but the first link to its files."""

        def write(weights: dict[str, Tensor]) -> None:
            first, *others = directories
            self._save(first, weights)
            for other in others:
                with replacing(other) as incoming:
                    link_files(first, incoming)

        return write if directories else None


def note_best(
    best: dict[str, dict[str, Any]], criteria: Mapping[str, str], metrics: Mapping[str, float], epoch: int
) -> list[str]:
    """Note in `best` by which criteria (names of metrics by their own) this epoch is the best; those."""
    risen = [
        name for name, metric in criteria.items() if name not in best or metrics[metric] > best[name]["value"]
    ]
    best |= {name: {"value": metrics[criteria[name]], "epoch": epoch, "metrics": metrics} for name in risen}
    return risen
