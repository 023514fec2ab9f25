"""Runs killed while they write, on one rank and on two: what was the newest state before is gone on from."""

import json
import signal
import time
from pathlib import Path

import killed
import pytest
import torch
from poison import METRICS
from processes import Ranks
from test_keeping import losses, weights

from mtfast.config import RunConfig
from mtfast.training.engine.state import POINTER


@pytest.mark.parametrize("name", killed.CASES)
def test_a_run_killed_while_it_writes_goes_on_from_the_state_before(name, tmp_path):
    case, held = killed.CASES[name], tmp_path / "held"

    def started(directory: str, held: Path | None = None) -> Ranks:
        """The ranks of a run. held: they stand still when it is there."""
        return Ranks(
            killed.train, case, tmp_path / directory, held, output=tmp_path, world_size=case.world_size
        )

    started("whole").succeed()
    ranks = started("broken", held)
    while not held.exists():
        assert ranks.processes[-1].is_alive(), ranks.stderr(case.world_size - 1)
        time.sleep(0.02)
    ranks.kill()
    assert ranks.wait() == [-signal.SIGKILL] * case.world_size
    pointer = tmp_path / "broken" / "finetune" / "state" / POINTER
    newest = json.loads(pointer.read_text())["tag"] if pointer.exists() else None
    assert newest == (None if case.before is None else f"step-{case.before}")
    started("broken").succeed()
    whole, broken = (RunConfig(run_dir=str(tmp_path / run)) for run in ("whole", "broken"))
    assert losses(broken) == losses(whole) and [step for step, _ in losses(whole)] == list(range(1, 13))
    for directory in (*(f"best-{criterion}" for criterion in METRICS), "last"):
        ours, expected = (torch.load(weights(run, directory)) for run in (broken, whole))
        assert all(torch.equal(x, expected[parameter]) for parameter, x in ours.items())
    kept = [path.name for path in (tmp_path / "broken" / "finetune" / "state").iterdir()]
    assert sorted(kept) == sorted(path.name for path in (tmp_path / "whole" / "finetune" / "state").iterdir())
