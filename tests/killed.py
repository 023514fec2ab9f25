"""A rank of a run whose thread can be made to stand still in the middle of writing, to be killed there."""

import itertools
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from poison import METRICS, STEPS, Small
from torch import Tensor

from mtfast.commands import open_directory
from mtfast.config import EngineConfig, RunConfig, TaskStageConfig
from mtfast.training.engine import engine as engine_module
from mtfast.training.engine import ranks, state
from mtfast.training.loop import train_stage


class Case(NamedTuple):
    """What is run, on how many ranks, and where the thread of the last one is held: in the middle of this
    part of what is kept after that step. before: the step of the state that is the newest then."""

    precision: str
    zero_stage: int
    world_size: int
    part: str  # "weights", "state" or "pointer"
    step: int
    before: int | None
    every: str = "1 epoch"


CASES = {
    "fp32-0": Case("fp32", 0, 1, "state", 8, 4),
    "bf16-0": Case("bf16", 0, 1, "weights", 8, 4),
    "fp32-2": Case("fp32", 2, 1, "pointer", 8, 4),
    "bf16-1": Case("bf16", 1, 1, "state", 6, 3, "3 steps"),
    "bf16-3": Case("bf16", 3, 1, "state", 4, None),
    "fp32-1-two-ranks": Case("fp32", 1, 2, "state", 8, 4),
    "bf16-2-two-ranks": Case("bf16", 2, 2, "state", 6, 3, "3 steps"),
}


class Falling(Small):
    """Is the better the smaller its weights are."""

    def evaluate(self) -> dict[str, float]:
        total = sum(x.double().abs().sum().item() for x in self.engine.state_dict().values())
        return dict.fromkeys(METRICS.values(), -total)


def train(case: Case, run_dir: Path, held: Path | None) -> None:
    """One rank of a run. held: a file that tells that its thread stands still, training being further on."""
    engine_module.start()
    config = RunConfig(
        run_dir=str(run_dir),
        engine=EngineConfig(precision=case.precision, zero_stage=case.zero_stage),
        finetune=TaskStageConfig(epochs=3, batch_size=8, learning_rate=0.02, checkpoint_every=case.every),
    )
    stage = Falling(config)
    if held is not None and ranks.rank() == case.world_size - 1:
        hold(case, stage, held)
    train_stage(stage, open_directory(config), 1)
    ranks.finish()


def hold(case: Case, stage: Small, held: Path) -> None:
    own_save, own_json, made, steps = torch.save, state.write_json, stage.step, [0]
    epochs, tag = itertools.count(1), f"step-{case.step}"  # weights are written once an epoch

    def step(batch: Any) -> Tensor:
        steps[0] += 1
        return made(batch)

    def stand_still(file: Path) -> None:
        file.write_bytes(b"half")
        while steps[0] < case.step + 2:
            time.sleep(0.01)
        held.touch()
        time.sleep(1000)

    def save(value: Any, file: Path, **options: Any) -> None:
        if "state" in file.parts:
            is_here = case.part == "state" and tag in file.parts
        else:
            is_here = STEPS * next(epochs) == case.step and case.part == "weights"
        if is_here:
            stand_still(file)
        own_save(value, file, **options)

    def write_json(file: Path, value: Any) -> None:
        if case.part == "pointer" and value["tag"] == tag:
            stand_still(file.with_name(f"{file.name}.partial"))
        own_json(file, value)

    stage.step, torch.save, state.write_json = step, save, write_json
