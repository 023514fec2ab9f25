"""The process that fine-tunes as mtfast in its path does: `python -m benchmarks.keeping_child FIT`.

It asks of mtfast no more than the command, and two methods of the stage: another commit's has them too.
"""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import torch

import mtfast
from benchmarks.stage_setup import recipe
from mtfast.commands import train
from mtfast.training.stages.finetune import Finetune

KEEP = "mtfast.training.engine.keeping.Keeper.keep"


@dataclass(frozen=True)
class Fit:
    """A run: where it is, what it reads, how long it is.

    rows: training rows of each task, None for all. precision: bf16 or fp32. kept: weights and states are
    written.
    """

    run_dir: str
    data: str
    checkpoint: str
    epochs: int
    rows: int | None
    precision: Literal["bf16", "fp32"]
    threads: int
    kept: bool


@dataclass(frozen=True)
class Epochs:
    """What was measured: steps and examples of an epoch; seconds of each after the first, and of waiting at
    their ends."""

    steps: int
    examples: int
    seconds: list[float]
    waits: list[float]


def measure(fit: Fit) -> Epochs:
    """Fine-tune, and measure all epochs but the first and the last."""
    begun: dict[int, float] = {}  # by epoch; the first, which warms up, is planned more than once
    evaluated: list[float] = []
    plans: list[list[Any]] = []

    def plan(stage: Finetune, epoch: int) -> list[Any]:
        steps = made(stage, epoch)
        begun[epoch] = time.perf_counter()
        plans.append(steps)
        return steps

    def evaluate(stage: Finetune) -> Any:
        metrics = measured(stage)
        evaluated.append(time.perf_counter())
        return metrics

    made, measured = Finetune.plan, Finetune.evaluate
    keeping: Any = nullcontext() if fit.kept else mock.patch(KEEP)
    with mock.patch.multiple(Finetune, plan=plan, evaluate=evaluate), keeping:
        train(config_of(fit), "finetune")
    begins = [begun[epoch] for epoch in range(fit.epochs)]
    (whole,) = {sum(sum(step.step_counts.values()) for step in steps) for steps in plans}
    return Epochs(
        len(plans[0]),
        whole,
        [end - begin for begin, end in pairwise(begins[1:])],
        [begin - end for end, begin in zip(evaluated[1:-1], begins[2:], strict=True)],
    )


def config_of(fit: Fit) -> Any:
    """The run's configuration."""
    config = recipe(fit.checkpoint)
    data = Path(fit.data)
    return replace(
        config,
        run_dir=fit.run_dir,
        tasks={name: replace(task, max_rows=fit.rows) for name, task in config.tasks.items()},
        data=replace(
            config.data,
            tasks=str(data / "cs224n" if (data / "cs224n").is_dir() else data),
            cache_dir=str(Path(fit.run_dir).parent / "cache"),
        ),
        engine=replace(config.engine, precision=fit.precision),
        finetune=replace(config.finetune, epochs=fit.epochs),
    )


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what is printed is no answer
    fit = Fit(**json.loads(sys.argv[1]))
    torch.set_num_threads(fit.threads)
    found = asdict(measure(fit)) | {"package": str(Path(mtfast.__file__).parent)}
    print(json.dumps(found), file=answers, flush=True)
