"""What each part of the recipe `best` is worth: with all of them, without one at a time, and with less data.

    python -m benchmarks ablation --data data/cs224n --checkpoint $CHECKPOINT [--runs runs/ablation]
        [--seeds 0 1 2] [--only NAME ...]

Every variant is trained with every seed; runs that are finished are left as they are, so the same command
goes on, and several processes can share the work by --seeds or --only. Written is
benchmarks/results/ablation.json, from all runs that are finished by then: their metrics on dev, and on test
where `mtfast evaluate RUN --split test` wrote them, times, machines and commits. What the file has of other
runs with the same settings, from another machine say, stays in it.
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


def _tasks(*names: str, **settings: Any) -> Change:
    """Other settings of the tasks with these names."""
    return lambda config: replace(
        config, tasks=config.tasks | {name: replace(config.tasks[name], **settings) for name in names}
    )


def _finetune(**settings: Any) -> Change:
    return lambda config: replace(config, finetune=replace(config.finetune, **settings))


PARTS: dict[str, Change] = {
    "best": lambda config: config,
    "pairs encoded separately": _tasks("quora", "sts", pair_input="separate"),
    "without R-Drop": _tasks("sst", "quora", "sts", rdrop_alpha=0.0),
    "batch of 64": _finetune(batch_size=64),
    "48 epochs of head training": lambda config: replace(config, heads=replace(config.heads, epochs=48)),
    "without head training": lambda config: replace(config, stages=("finetune",)),
}
LESS_DATA: dict[str, Change] = {
    f"{count:,} Quora pairs": _tasks("quora", max_rows=count) for count in (8000, 4000)
}
VARIANTS = PARTS | LESS_DATA


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
    record(options.runs)
    print(f"written to {RESULT}")
    return 0


def run_of(runs: Path, name: str, seed: int) -> Path:
    """Directory of a variant's run."""
    return runs / name.replace(" ", "-").replace(",", "").lower() / f"seed-{seed}"


def record(runs: Path) -> None:
    """Write the results file."""
    found = results_of(runs)
    if RESULT.exists():
        found = with_earlier(found, json.loads(RESULT.read_text(encoding="utf-8")))
    RESULT.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def with_earlier(found: dict[str, Any], earlier: dict[str, Any]) -> dict[str, Any]:
    """These results and what earlier ones have beside them, if those are of the same settings and data."""
    if any(found[key] != earlier[key] for key in ("checkpoint", "config", "rows")):
        return found
    variants = {}
    for name, runs in found["variants"].items():
        of_seed = {run["seed"]: run for run in [*earlier["variants"].get(name, []), *runs]}
        variants[name] = [of_seed[seed] for seed in sorted(of_seed)]
    return found | {"variants": variants}


def results_of(runs: Path) -> dict[str, Any]:
    """What the results file says of the runs that are finished."""
    finished = {
        name: [
            path
            for path in sorted(run_of(runs, name, 0).parent.glob("seed-*"))
            if read_run(path).summary.get("dev")
        ]
        for name in VARIANTS
    }
    with_all_data = [path for name in PARTS for path in finished[name]]
    if not with_all_data:
        raise FileNotFoundError(f"no run with all of the data has finished in {runs}")
    first = read_run(with_all_data[0])
    assert first.config is not None
    return {
        "checkpoint": shortened(first.config.model.checkpoint),
        "config": settings_of(to_dict(best())),
        "rows": {name: data["used"] for name, data in sorted(first.summary["data"].items())},
        "variants": {name: [_run(path) for path in paths] for name, paths in finished.items()},
        "date": date.today().isoformat(),
    }


def _run(path: Path) -> dict[str, Any]:
    run = read_run(path)
    choice = run.choice()
    assert run.config is not None and choice is not None
    return {
        "seed": run.config.seed,
        "dev": run.metrics("dev"),
        "test": run.metrics("test"),
        "epoch": choice.epoch,
        "seconds": {name: stage["seconds"] for name, stage in run.summary["stages"].items()},
        "environment": run.summary["environment"],
        "commit": commit_of(path),
    }
