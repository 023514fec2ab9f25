"""Which settings may differ where a run goes on: those that leave its results alone."""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mtfast.config import STAGES, RunConfig, StageName, to_dict
from mtfast.tasks import Task

# Another place of the same data, or another way to find it: what is read there is compared by its checksum.
PLACES = (
    *("model.checkpoint", "data.tasks", "data.reviews", "engine.deepspeed_config"),
    *("tasks.*.source", "tasks.*.splits", "tasks.*.aliases"),
)
# What the losses do not follow from.
FREE = (
    *("run_dir", "seeds", "log_every", "log", "data.cache_dir", "data.strict", "tasks.*.title"),
    *("engine.activation_checkpointing", "*.checkpoint_every", "*.keep"),
)
# What the losses follow from no further than sums are rounded.
SHARING = ("engine.zero_stage",)
# How long a stage goes on.
LENGTHS = ("epochs", "max_steps", "patience")


@dataclass(frozen=True)
class Change:
    """A setting that a run had and has no more: its dotted name, and both values."""

    field: str
    was: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.field}: {self.was!r} there, {self.now!r} here"

    @property
    def stage(self) -> StageName | None:
        """The stage whose length it is; None for any other setting."""
        stage, _, name = self.field.partition(".")
        return next((known for known in STAGES if known == stage and name in LENGTHS), None)

    def is_one_of(self, patterns: tuple[str, ...]) -> bool:
        return any(fnmatch.fnmatchcase(self.field, pattern) for pattern in patterns)


@dataclass(frozen=True)
class Progress:
    """How far a stage of a run is.

    steps, epochs: made; an epoch that was begun counts.
    finished: it came to its end. resumable: there is a state to go on from.
    """

    steps: int
    epochs: int
    finished: bool
    resumable: bool


def located(config: RunConfig) -> RunConfig:
    """The config with every path that is there made absolute, so that it means the same from anywhere."""
    data, model, engine = config.data, config.model, config.engine
    return replace(
        config,
        run_dir=_absolute(config.run_dir),
        model=replace(model, checkpoint=_if_there(model.checkpoint)),
        data=replace(
            data,
            tasks=_if_there(data.tasks),
            reviews=_if_there(data.reviews),
            cache_dir=data.cache_dir and _absolute(data.cache_dir),
        ),
        engine=replace(
            engine, deepspeed_config=engine.deepspeed_config and _absolute(engine.deepspeed_config)
        ),
        tasks={
            name: replace(task, source=task.source and _if_there(task.source))
            for name, task in config.tasks.items()
        },
    )


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().absolute())


def _if_there(name: str) -> str:
    """What is no path here may be a name on the hub."""
    path = Path(name).expanduser()
    # Of os.path, to which a name that is too long for a file is no file.
    there = os.path.isdir(path.parent) if "{split}" in path.name else os.path.exists(path)
    return _absolute(name) if there else name


def changes(was: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Change]:
    """Every setting that differs between two configurations, as plain values.

    A setting that `was` lacks is newer than its run, which did as the default does.
    """
    tasks = was.get("tasks")
    task = Task(kind="binary", text="", label="")
    defaults = RunConfig(tasks=dict.fromkeys(tasks if isinstance(tasks, dict) else (), task))
    return _differences(was, now, to_dict(defaults), "")


def _differences(
    was: Mapping[str, Any], now: Mapping[str, Any], defaults: Mapping[str, Any], prefix: str
) -> Iterator[Change]:
    for key in sorted(set(was) | set(now), key=str):
        name, default = f"{prefix}{key}", defaults.get(key)
        there, here = was.get(key, default), now.get(key)
        if isinstance(there, dict) and isinstance(here, dict) and not _is_one_setting(name):
            if name == "tasks" and set(there) == set(here) and list(there) != list(here):
                # Parameters and outputs follow their order.
                yield Change("tasks", list(there), list(here))
            yield from _differences(there, here, default or {}, f"{name}.")
        elif there != here:
            yield Change(name, there, here)


def _is_one_setting(name: str) -> bool:
    """Whether the names in a mapping are of the data, not of settings."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in ("tasks.*.splits", "tasks.*.aliases"))


def refused(
    found: list[Change], progress: Callable[[StageName], Progress | None], now: Mapping[str, Any]
) -> list[str]:
    """Which of the changes a run cannot go on with, each in words.

    Args:
        progress: of a stage, None for one that has not begun.
        now: the configuration to go on with.
    """
    reasons = []
    begun = [name for name in STAGES if progress(name) is not None]
    stages = [name for name in STAGES if name in begun or name in now["stages"]]
    for change in found:
        if change.is_one_of(PLACES + FREE + SHARING):
            continue
        if (of := change.field.partition(".")[0]) in STAGES and of not in stages:
            continue  # of a stage that the run does not have
        if change.field == "stages":
            decided = STAGES[: STAGES.index(begun[-1]) + 1] if begun else ()
            if any((name in change.was) != (name in change.now) for name in decided):
                reasons.append(f"{change}, and {begun[-1]} has begun")
        elif change.stage is not None:
            if why := _refused_length(change.stage, progress, now[change.stage]):
                reasons.append(f"{change}{why}")
        else:
            reasons.append(str(change))
    return reasons


def _refused_length(
    stage: StageName, progress: Callable[[StageName], Progress | None], now: Mapping[str, Any]
) -> str | None:
    """Why a stage cannot be made that long; None where it can."""
    made = progress(stage)
    if made is None:
        return None
    for later in STAGES[STAGES.index(stage) + 1 :]:
        if progress(later) is not None:
            return f", and {later} has begun with what {stage} left"
    if made.finished and not made.resumable:
        return f", and {stage} has finished and kept no state to go on from"
    if now["epochs"] < made.epochs or (now["max_steps"] or made.steps) < made.steps:
        return f", and {stage} is in epoch {made.epochs}, after step {made.steps}"
    return None
