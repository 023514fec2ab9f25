"""Runs that, however they are launched, follow one on one rank: their options, environment and losses."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from patience import PATIENCE
from processes import RENDEZVOUS, Ranks, command

import mtfast

BIN = Path(sys.executable).parent
STAGES = ("heads", "finetune")
STEPS = 12


def options(corpus: Path, run_dir: Path, **more: object) -> list[str]:
    values = {
        "run-dir": run_dir,
        "model.checkpoint": corpus / "bert",
        "model.dropout-p": 0,
        "data.tasks": corpus,
        "data.reviews": corpus / "imdb",
        "data.cache-dir": corpus / "cache",
        "heads.epochs": 1,
        "heads.batch-size": 64,
        "finetune.epochs": 1,
        "finetune.batch-size": 24,
        "finetune.max-steps": STEPS,
        **more,
    }
    return flags(values)


def flags(values: dict[str, object]) -> list[str]:
    return [part for name, value in values.items() for part in (f"--{name}", str(value))]


def environment() -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k not in RENDEZVOUS}
    paths = map(str, (Path(mtfast.__file__).parents[1], Path(__file__).parent))
    here = {"PYTHONPATH": os.pathsep.join(paths)}  # some runs start in another directory
    return {**kept, **here, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}


def run(line: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(line, env=environment(), capture_output=True, text=True, timeout=PATIENCE)


def launch(line: list[str]) -> subprocess.CompletedProcess[str]:
    done = run(line)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done


def losses(run_dir: Path, stage: str) -> list[dict[str, float]]:
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [r["losses"] for r in records if r["kind"] == "step" and r["stage"] == stage]


def assert_follow(run_dir: Path, one_rank: Path) -> None:
    for stage in STAGES:
        ours, expected = losses(run_dir, stage), losses(one_rank, stage)
        assert len(ours) == len(expected) > 5
        for step, (mine, wanted) in enumerate(zip(ours, expected, strict=True), start=1):
            assert mine == pytest.approx(wanted, rel=1e-3), (stage, step)


def train(run_dir: Path, *options: str) -> None:
    for stage in STAGES:
        Ranks(command, stage, "demo", *options, output=run_dir.parent).succeed()


# Every command of a list, in processes that start once for all of them; see imported.py.
IN_TURN = """
import json, sys
import imported
from mtfast import cli
for arguments in json.loads(sys.argv[-1]):
    cli.main(arguments)
"""
