"""The process that runs mtfast as its path has it: `python -m benchmarks.baseline_child SETUP`.

Its answers, one a line: the losses and where its mtfast is, then seconds of the step of each turn it is told.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any

import torch

import mtfast
from benchmarks.stage_setup import Clock, Setup, StageMaker, packed_batches
from mtfast.training.engine.engine import start, stop


def serve(
    step: Callable[[Any], Any],
    batches: list[Any],
    device: torch.device,
    turns: Iterable[str],
    answers: IO[str],
) -> None:
    """Make the step of each turn that comes, and answer its seconds."""
    for turn in turns:
        clock = Clock(device)
        step(batches[int(turn)])
        print(clock.lap(), file=answers, flush=True)


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what is printed is no answer
    setup = Setup(**json.loads(sys.argv[1]))
    torch.set_num_threads(setup.threads)
    device = start()
    maker = StageMaker(setup)
    said = {"losses": maker.losses(), "package": str(Path(mtfast.__file__).parent)}
    print(json.dumps(said), file=answers, flush=True)
    stage = maker.make()
    stage.engine.train()
    serve(stage.step, packed_batches(stage, setup.steps), device, sys.stdin, answers)
    stage.engine.close()
    stop()
