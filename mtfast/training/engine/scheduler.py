"""The learning rate of each step by the scheduler of a DeepSpeed JSON."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from mtfast.config import StageConfig

from .deepspeed_keys import AUTO

SCHEDULE = {  # a scheduler's type: what a stage's schedule may say besides "constant", which all have
    "WarmupLR": "constant",
    "WarmupDecayLR": "linear",
    "WarmupCosineLR": "cosine",
}
_WARM_UP = ("warmup_num_steps", "warmup_type")
_PARAMS = {
    "WarmupLR": ("warmup_min_lr", "warmup_max_lr", *_WARM_UP),
    "WarmupDecayLR": ("total_num_steps", "warmup_min_lr", "warmup_max_lr", *_WARM_UP),
    "WarmupCosineLR": ("total_num_steps", "warmup_min_ratio", "cos_min_ratio", *_WARM_UP),
}


@dataclass(frozen=True)
class Scheduler:
    """One of DeepSpeed's schedulers, by the steps of a stage.

    params: as the JSON has them, "auto" among them.
    """

    type: str
    params: Mapping[str, Any]
    stage: StageConfig

    def learning_rate_at(self, step: int, total_steps: int) -> float:
        """Learning rate of the step with index `step`. DeepSpeed moves on after a step: the first two are
        where the warm-up begins."""
        scheduler = self._made(total_steps)
        if step == 0:
            return scheduler.min_lrs[0] if hasattr(scheduler, "min_lrs") else 0.0
        scheduler.last_batch_iteration = step - 1
        return scheduler.get_lr()[0]

    def _made(self, total_steps: int) -> Any:
        return _made(self.type, self.stage.learning_rate, tuple(self._filled(total_steps).items()))

    def _filled(self, total_steps: int) -> dict[str, Any]:
        own: dict[str, Any] = {
            "total_num_steps": total_steps,
            "warmup_min_lr": 0.0,
            "warmup_max_lr": self.stage.learning_rate,
            "warmup_num_steps": max(1, round(self.stage.warmup_fraction * total_steps)),
            "warmup_type": "linear",
        }
        names = [name for name in _PARAMS[self.type] if name in own]
        # What a JSON leaves out of these DeepSpeed would not know, or take for a rate of 0.001.
        auto = {name for name in names if self.params.get(name) == AUTO} | {
            "total_num_steps",
            "warmup_max_lr",
        }
        return {name: own[name] for name in names if name in auto} | {
            name: value for name, value in self.params.items() if value != AUTO
        }


@functools.lru_cache(maxsize=8)
def _made(kind: str, learning_rate: float, params: tuple[tuple[str, Any], ...]) -> Any:
    from deepspeed.runtime import lr_schedules

    optimizer = torch.optim.SGD([torch.zeros(1)], lr=learning_rate)
    # Not -1, from which it would compute, and warn of, a rate before the first.
    return getattr(lr_schedules, kind)(optimizer, last_batch_iteration=0, **dict(params))


def scheduler_of(given: Mapping[str, Any], stage: StageConfig) -> Scheduler | None:
    """The scheduler of a JSON without faults, if it has one."""
    block = given.get("scheduler", AUTO)
    return None if block == AUTO else Scheduler(block["type"], block.get("params", {}), stage)


def faults_of(block: Any, stage: StageConfig, stage_name: str) -> list[str]:
    """What is wrong with the "scheduler" of a JSON for a stage, or does not go with what that says."""
    if block == AUTO:
        return []
    kind = block.get("type") if isinstance(block, dict) else None
    if kind not in SCHEDULE:
        return [f"scheduler.type: {kind!r} is none of {', '.join(SCHEDULE)}"]
    params = block.get("params", {})
    if not isinstance(params, dict):
        return [f"scheduler.params: {params!r} must be an object"]
    found = [
        f"scheduler.params.{name}: {kind} has {', '.join(_PARAMS[kind])}"
        for name in params
        if name not in _PARAMS[kind]
    ]
    if stage.schedule not in ("constant", SCHEDULE[kind]):
        found.append(f"scheduler.type: the JSON says {kind}, {stage_name}.schedule {stage.schedule}")
    for name, value in params.items():
        if value == AUTO:
            continue
        where = f"scheduler.params.{name}"
        if name == "warmup_type":
            if value not in ("log", "linear"):
                found.append(f'{where}: {value!r} is none of log, linear and "auto"')
        elif name.endswith("num_steps") and (type(value) is not int or value < 1):
            found.append(f"{where}: {value!r} must be a number of steps, at least 1")
        elif isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0:
            found.append(f"{where}: {value!r} must be a number of at least 0")
        elif name == "warmup_max_lr" and value != stage.learning_rate:
            found.append(
                f"{where}: the JSON says {value!r}, {stage_name}.learning_rate {stage.learning_rate!r}"
            )
        elif name == "warmup_num_steps" and stage.warmup_fraction > 0:
            found.append(
                f"{where}: the JSON says {value!r}, {stage_name}.warmup_fraction {stage.warmup_fraction!r}"
            )
    return found
