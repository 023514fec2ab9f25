"""Runs killed while they write, on one rank and on two: what was the newest state before is gone on from."""

import json
import os
import subprocess
import sys
from pathlib import Path

import killed
import pytest
import torch
from patience import PATIENCE
from poison import METRICS
from test_keeping import losses, weights

import mtfast
from mtfast.config import RunConfig


@pytest.fixture(scope="module")
def killed_runs(tmp_path_factory) -> Path:
    """What tests/killed.py leaves of all its cases."""
    directory, tests = tmp_path_factory.mktemp("killed"), Path(__file__).parent
    path = os.pathsep.join([str(Path(mtfast.__file__).parents[1]), str(tests)])
    here = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, str(tests / "killed.py"), str(directory), *killed.CASES],
        env=os.environ | here, capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return directory


@pytest.mark.parametrize("name", killed.CASES)
def test_a_run_killed_while_it_writes_goes_on_from_the_state_before(name, killed_runs):
    place, before = killed_runs / name, killed.CASES[name].before
    newest = json.loads((place / "newest.json").read_text())
    assert newest.get("tag") == (None if before is None else f"step-{before}")
    whole, broken = (RunConfig(run_dir=str(place / run)) for run in ("whole", "broken"))
    assert losses(broken) == losses(whole) and [step for step, _ in losses(whole)] == list(range(1, 13))
    for directory in (*(f"best-{criterion}" for criterion in METRICS), "last"):
        ours, expected = (torch.load(weights(run, directory)) for run in (broken, whole))
        assert all(torch.equal(x, expected[parameter]) for parameter, x in ours.items())
    kept = [path.name for path in (place / "broken" / "finetune" / "state").iterdir()]
    assert sorted(kept) == sorted(path.name for path in (place / "whole" / "finetune" / "state").iterdir())
