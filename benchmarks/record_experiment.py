"""Records a finished experiment: benchmarks/results/experiment-NAME.json, and its plot as docs/NAME.png.

    python -m benchmarks record_experiment runs/experiments/exp1 NAME --command "mtfast run ..."

The runs of an experiment may have been made on several machines and with several commits: of each, the file
names its own machine, and the newest commit of the code before it began, whose sources it must have run with.
"""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import yaml

from benchmarks.common import DOCS, RESULTS, git
from benchmarks.record import CODE_PATHS, RecordError, check_finished, parser_of, settings_of, shortened
from mtfast.comparison import compared
from mtfast.config import CONFIG_FILE, ConfigError, to_dict
from mtfast.config_file import read_config_file
from mtfast.experiments import ALL_RECIPES, EXPERIMENTS, runs_of
from mtfast.plots import metrics_of, plot_comparison
from mtfast.run_record import RunRecord, read_run


def main(argv: list[str]) -> int:
    """Write the file and the plot, or say why not."""
    parser = parser_of("record_experiment", __doc__, "DIRECTORY")
    parser.add_argument("--command", required=True, help="what the experiment was started with")
    options = parser.parse_args(argv)
    try:
        result = record(options.directory, options.command)
    except (RecordError, ConfigError) as error:
        print(f"not recorded: {error}")
        return 1
    path = RESULTS / f"experiment-{options.name}.json"
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"written to {path}")
    plot = DOCS / f"{options.name}.png"
    draw(result, plot)
    print(f"written to {plot}")
    return 0


def record(directory: Path, command: str) -> dict[str, Any]:
    """What the results file says of an experiment: what was found, by which runs, made where, of which data.

    Raises:
        RecordError: a run is missing or unfinished, or began before there was a commit.
    """
    if not (directory / CONFIG_FILE).is_file():
        raise RecordError(f"{directory / CONFIG_FILE} does not exist; DIRECTORY is that of an experiment")
    file = read_config_file(directory / CONFIG_FILE, ALL_RECIPES)
    if file.recipe not in EXPERIMENTS:
        raise RecordError(f"{directory} is a run; python -m benchmarks record records it")
    runs = runs_of(file.recipe, replace(file.config, run_dir=str(directory.parent)))
    records = {}
    for variant, of_variant in runs.items():
        for run in of_variant:
            if not (run.path / CONFIG_FILE).is_file():
                raise RecordError(f"{run.path} holds no run; continue the experiment with its own command")
            config = yaml.safe_load((run.path / CONFIG_FILE).read_text(encoding="utf-8"))
            check_finished(run.path, config, read_run(run.path).summary)
        records[variant] = [read_run(run.path) for run in of_variant]
    config = to_dict(file.config)
    every = [run for of_variant in records.values() for run in of_variant]
    data = {name: account for run in every for name, account in run.summary["data"].items()}
    return {
        "experiment": file.recipe,
        "command": command,
        "checkpoint": shortened(file.config.model.checkpoint),
        "config": {
            **settings_of(config),
            "seeds": file.config.seeds,
            "max_length": file.config.data.max_length,
            **{name: config["data"][name] for name in ("max_reviews", "review_max_length", "samples")},
        },
        "rows": {name: data[name]["used"] for name in sorted(data)},
        "runs": {variant: [_run(run) for run in of_variant] for variant, of_variant in records.items()},
        "comparison": compared(EXPERIMENTS[file.recipe], records),
        "date": date.today().isoformat(),
    }


def _run(run: RunRecord) -> dict[str, Any]:
    assert run.config is not None
    stages = {
        name: {key: of[key] for key in ("steps", "seconds")} for name, of in run.summary["stages"].items()
    }
    return {
        "seed": run.config.seed,
        "stages": stages,
        "environment": run.summary["environment"],
        "commit": commit_of(run.directory),
    }


def commit_of(run_dir: Path) -> str:
    """The newest commit of what a run follows from before this one began."""
    begun = int((run_dir / CONFIG_FILE).stat().st_mtime)
    found = git("log", "-1", f"--before=@{begun} +0000", "--format=%h", "--", *CODE_PATHS)
    if not found:
        raise RecordError(f"{run_dir} began before there was a commit of these sources")
    return found


def draw(result: dict[str, Any], path: Path) -> None:
    """Plot what a results file says, beside the paper's figures."""
    experiment = EXPERIMENTS[result["experiment"]]
    found = next(iter(result["comparison"]["splits"].values()))
    ours = {name: of["result"] for name, of in found["variants"].items()}
    tasks = ALL_RECIPES[result["experiment"]]().tasks
    figure = plot_comparison(metrics_of(tasks), ours, {v.name: v.figures for v in experiment.variants})
    assert figure is not None
    figure.savefig(path)
