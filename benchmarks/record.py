"""Records a finished training run as a results file: benchmarks/results/run-NAME.json.

    python -m benchmarks record RUN_DIR NAME

To be run where the run was made, with the Python that made it and the sources as they were: the file names
the commit, and nothing but results may differ from it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.common import RESULTS, changes, default_device, environment, git
from mtfast.machine import device_name

CODE = ("mtfast", "csrc", "setup.py", "pyproject.toml")
# What says what runs have found; none of it takes part in one.
PAGES = (
    *("comparison", "comparison_report", "doctor", "markdown", "model_card"),
    *("page", "plots", "push", "report", "results", "run_record"),
)
CODE_PATHS = (*(f":/{path}" for path in CODE), *(f":(top,exclude)mtfast/{page}.py" for page in PAGES))


class RecordError(Exception):
    """Why a run cannot be recorded, and what would be right."""


def main(argv: list[str]) -> int:
    """Write the file, or say why not."""
    options = parser_of("record", __doc__, "RUN_DIR").parse_args(argv)
    try:
        result = record(options.directory)
    except RecordError as error:
        print(f"not recorded: {error}")
        return 1
    path = RESULTS / f"run-{options.name}.json"
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"written to {path}")
    return 0


def parser_of(name: str, description: str | None, directory: str) -> argparse.ArgumentParser:
    """A parser that takes a directory, under this name, and the name of what is recorded."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks {name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("directory", type=Path, metavar=directory)
    parser.add_argument("name", metavar="NAME")
    return parser


def record(run_dir: Path) -> dict[str, Any]:
    """What the results file says of the run: checkpoint, environment, configuration, stages, dev metrics,
    commit and date. Raises RecordError unless all of it is known to be so."""
    for name in ("config.yaml", "summary.json"):
        if not (run_dir / name).is_file():
            raise RecordError(f"{run_dir / name} does not exist; RUN_DIR is a run's directory")
    config = yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8"))
    summary = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
    check_finished(run_dir, config, summary)
    check_sources(run_dir)
    here = environment(default_device())
    commit, date = here.pop("commit"), here.pop("date")
    check_environment(summary["environment"])
    return {
        "checkpoint": shortened(config["model"]["checkpoint"]),
        "environment": {**here, **summary["environment"], "device": here["device"]},
        "config": settings_of(config),
        "stages": summary["stages"],
        "dev": summary["dev"],
        "commit": commit,
        "date": date,
    }


def settings_of(config: dict[str, Any]) -> dict[str, Any]:
    """What of a configuration results follow from, without paths of the machine."""
    settings = {name: config[name] for name in ("seed", "engine", *config["stages"])}
    settings["model"] = {**config["model"], "checkpoint": shortened(config["model"]["checkpoint"])}
    if given := config["engine"].get("deepspeed_config"):
        settings["engine"] = {**config["engine"], "deepspeed_config": shortened(given)}
    settings["tasks"] = {
        name: {**task, "source": task["source"] and shortened(task["source"])}
        for name, task in config["tasks"].items()
    }
    return settings


def shortened(path: str) -> str:
    """The last two parts of a path, which say nothing of the machine; a Hugging Face name as it is."""
    return "/".join(Path(path).parts[-2:])


def check_finished(run_dir: Path, config: dict[str, Any], summary: dict[str, Any]) -> None:
    """RecordError unless every stage has its result and the run was evaluated."""
    missing = [stage for stage in config["stages"] if stage not in summary.get("stages", {})]
    if missing:
        raise RecordError(
            f"{run_dir} has no result of {', '.join(missing)}; continue it with its own command"
        )
    if "dev" not in summary:
        raise RecordError(f"{run_dir} has no dev metrics; run mtfast evaluate on it")


def check_sources(run_dir: Path) -> None:
    """RecordError unless the sources here are a commit's, and those that a run follows from were when it
    began."""
    if not git("rev-parse", "HEAD"):
        raise RecordError("the sources are no git repository, so no commit can be named")
    if changed := changes():
        raise RecordError(f"the sources differ from the commit; commit or undo these:\n{changed}")
    newest = git("log", "-1", "--format=%ct %h", "--", *CODE_PATHS)
    seconds, commit = newest.split()
    if int(seconds) > (run_dir / "config.yaml").stat().st_mtime:
        raise RecordError(
            f"the run began before commit {commit} changed the code; check out the one it ran with"
        )


def check_environment(recorded: dict[str, Any]) -> None:
    """RecordError unless the run was made on this device with this torch."""
    for what, then, now in (
        ("torch", recorded["torch"], torch.__version__),
        ("device", recorded["device"], device_name()),
    ):
        if then != now:
            raise RecordError(f"the run's {what} was {then}, here it is {now}; record it where it ran")
