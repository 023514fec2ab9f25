"""Runs that are killed while a thread of theirs is in the middle of writing, and gone on with.

    python tests/killed.py DIRECTORY CASE ...

leaves in DIRECTORY/CASE `whole`, a run without a break, `broken`, one that was killed and begun again, and
`newest.json`, which says from which state.
Every process of a run is a fork of this one, which has imported what takes long.
"""

import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from poison import METRICS, Small
from torch import Tensor

from mtfast.commands import open_directory
from mtfast.config import EngineConfig, RunConfig, TaskStageConfig
from mtfast.training.engine import engine as engine_module
from mtfast.training.engine import ranks, state
from mtfast.training.engine.state import POINTER
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
        part = "state" if "state" in file.parts else "weights"
        if part == case.part and steps[0] >= case.step:
            stand_still(file)
        own_save(value, file, **options)

    def write_json(file: Path, value: Any) -> None:
        if case.part == "pointer" and steps[0] >= case.step:
            stand_still(file.with_name(f"{file.name}.partial"))
        own_json(file, value)

    stage.step, torch.save, state.write_json = step, save, write_json


def run(case: Case, run_dir: Path, held: Path | None = None) -> None:
    """Run it to its end, or until the thread is held, and kill it then."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = [fork(case, run_dir, held, rank, port) for rank in range(case.world_size)]
    if held is not None:
        while not held.exists():
            assert os.waitpid(children[-1], os.WNOHANG) == (0, 0), "it ended before it was held"
            time.sleep(0.02)
        for child in children:
            os.kill(child, signal.SIGKILL)
    ends = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert ends == [0 if held is None else -signal.SIGKILL] * case.world_size, ends


def fork(case: Case, run_dir: Path, held: Path | None, rank: int, port: int) -> int:
    if child := os.fork():
        return child
    there = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": case.world_size,
        "LOCAL_WORLD_SIZE": case.world_size,
    }
    os.environ.update({name: str(value) for name, value in there.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    code = 1
    try:
        train(case, run_dir, held)
        code = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    sys.stdout.flush()
    os._exit(code)


if __name__ == "__main__":
    engine_module._deepspeed()
    torch.compile(torch.sin)  # as DeepSpeed has it in every process that shards: the imports take seconds
    for name in sys.argv[2:]:
        place = Path(sys.argv[1]) / name
        place.mkdir(parents=True)
        run(CASES[name], place / "whole")
        run(CASES[name], place / "broken", place / "held")
        pointer = place / "broken" / "finetune" / "state" / POINTER
        (place / "newest.json").write_text(pointer.read_text() if pointer.exists() else "{}")
        run(CASES[name], place / "broken")
