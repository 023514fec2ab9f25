"""What each part of the recipe `best` is worth: fine-tuning with all of them, and without one at a time.

    python -m benchmarks ablation --data data/cs224n --checkpoint $CHECKPOINT [--runs runs/ablation]
        [--seeds 0 1 2] [--only NAME ...]

Every variant is trained with every seed; runs that are finished are left as they are, so the same command
goes on, and several processes can share the work by --seeds or --only. Written is
benchmarks/results/ablation.json, from all runs that are finished by then: their dev metrics, times, machines
and commits.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import mtfast
from benchmarks.common import RESULTS
from benchmarks.record import settings_of, shortened
from benchmarks.record_experiment import commit_of
from mtfast.config import RunConfig, to_dict
from mtfast.recipes import best
from mtfast.run_record import read_run

Change = Callable[[RunConfig], RunConfig]
RESULT = RESULTS / "ablation.json"


def _pairs(**fields: Any) -> Change:
    """Other settings of the tasks on pairs."""

    def change(config: RunConfig) -> RunConfig:
        tasks = {
            name: replace(task, **fields) if len(task.texts) == 2 else task
            for name, task in config.tasks.items()
        }
        return replace(config, tasks=tasks)

    return change


def _finetune(**fields: Any) -> Change:
    return lambda config: replace(config, finetune=replace(config.finetune, **fields))


def _all(*changes: Change) -> Change:
    def change(config: RunConfig) -> RunConfig:
        for one in changes:
            config = one(config)
        return config

    return change


VARIANTS: dict[str, Change] = {
    "best": lambda config: config,
    "pairs encoded separately": _pairs(pair_input="separate"),
    "pairs in one order": _pairs(symmetric=False),
    "without R-Drop": _finetune(rdrop_alpha=0.0),
    "without the average": _finetune(ema_decay=0.0),
    "batch of 64": _finetune(batch_size=64),
    "without all of these but joint pairs": _all(
        _pairs(symmetric=False), _finetune(rdrop_alpha=0.0, ema_decay=0.0, batch_size=64)
    ),
}


def main(argv: list[str]) -> int:
    """Train what is missing, and write the results file."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks ablation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", required=True, help="directory with the CS 224N files")
    parser.add_argument("--checkpoint", required=True, help="BERT to start from")
    parser.add_argument("--runs", type=Path, default=Path("runs/ablation"), help="directory of the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), metavar="NAME")
    options = parser.parse_args(argv)
    common = best()
    common = replace(
        common,
        model=replace(common.model, checkpoint=options.checkpoint),
        data=replace(common.data, tasks=options.data, cache_dir=str(options.runs / "cache")),
    )
    for seed in options.seeds:
        for name in options.only:
            mtfast.train(
                replace(VARIANTS[name](common), seed=seed, run_dir=str(run_of(options.runs, name, seed)))
            )
    RESULT.write_text(json.dumps(results_of(options.runs), indent=2) + "\n", encoding="utf-8")
    print(f"written to {RESULT}")
    return 0


def run_of(runs: Path, name: str, seed: int) -> Path:
    """Directory of a variant's run."""
    return runs / name.replace(" ", "-").lower() / f"seed-{seed}"


def results_of(runs: Path) -> dict[str, Any]:
    """What the results file says of the runs that are finished."""
    variants = {}
    for name in VARIANTS:
        paths = sorted(run_of(runs, name, 0).parent.glob("seed-*"))
        variants[name] = [_run(path) for path in paths if read_run(path).summary.get("dev")]
    every = [read_run(run_of(runs, name, of["seed"])) for name, found in variants.items() for of in found]
    assert every and every[0].config is not None
    return {
        "checkpoint": shortened(every[0].config.model.checkpoint),
        "config": settings_of(to_dict(best())),
        "rows": {name: data["used"] for name, data in sorted(every[0].summary["data"].items())},
        "variants": variants,
        "date": date.today().isoformat(),
    }


def _run(path: Path) -> dict[str, Any]:
    run = read_run(path)
    choice = run.choice()
    assert run.config is not None and choice is not None
    return {
        "seed": run.config.seed,
        "dev": run.metrics("dev"),
        "epoch": choice.epoch,
        "seconds": {name: stage["seconds"] for name, stage in run.summary["stages"].items()},
        "environment": run.summary["environment"],
        "commit": commit_of(path),
    }
