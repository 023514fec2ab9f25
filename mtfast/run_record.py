"""What a run directory has recorded, read for people: nothing here takes part in a run or needs its lock."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from mtfast.config import CONFIG_FILE, ConfigError, RunConfig
from mtfast.config_file import read_config_file
from mtfast.plots import is_number
from mtfast.recipes import PAPER_TASKS, RECIPES
from mtfast.tasks import Task
from mtfast.training.run.directory import METRICS, read_summary


class Outcome(NamedTuple):
    """Predictions and labels of a task's examples, both [n], in the order of its data."""

    predictions: np.ndarray
    labels: np.ndarray


class Choice(NamedTuple):
    """The epoch whose weights a run's results are of.

    epoch: of the stage, from 1.
    looks: evaluations on dev that it was the best of.
    """

    stage: str
    epoch: int
    looks: int


@dataclass(frozen=True)
class RunRecord:
    """What a run directory holds, as far as it is there.

    summary: what summary.json holds.
    steps, evaluations: the records of metrics.jsonl by stage, in order.
    text: of config.yaml.
    config: what that says; None where it is of an earlier mtfast, which declared no tasks.
    torn_lines: lines of metrics.jsonl that could not be read.
    """

    directory: Path
    summary: dict[str, Any]
    steps: dict[str, list[dict[str, Any]]]
    evaluations: dict[str, list[dict[str, Any]]]
    text: str
    config: RunConfig | None
    torn_lines: int

    @property
    def title(self) -> str:
        return self.directory.resolve().name

    @property
    def tasks(self) -> Mapping[str, Task]:
        """The run's tasks; those of an earlier mtfast were the paper's."""
        return PAPER_TASKS if self.config is None else self.config.tasks

    @property
    def counting(self) -> list[str]:
        """The metric that counts of each task, by its name in an evaluation."""
        return [f"{name}_{task.main_metric}" for name, task in self.tasks.items()]

    def best_evaluation(self, stage: str) -> dict[str, Any] | None:
        """The stage's evaluation with the best mean, the first of equals."""
        rated = [e for e in self.evaluations.get(stage, []) if is_number(e["metrics"].get("mean"))]
        return max(rated, key=lambda e: e["metrics"]["mean"], default=None)

    def choice(self) -> Choice | None:
        """The epoch that the results are of: of fine-tuning if that has finished, else of head training; of
        the last stage with an evaluation where the run has not come to its results yet."""
        rated = [stage for stage in ("finetune", "heads") if self.best_evaluation(stage)]
        finished = [stage for stage in rated if stage in self.summary.get("stages", {})]
        for stage in finished if finished and self.summary.get("dev") else rated:
            best = self.best_evaluation(stage)
            assert best is not None
            return Choice(stage, best.get("epoch", 0), len(self.evaluations[stage]))
        return None

    def last_evaluation(self, stage: str) -> dict[str, Any] | None:
        """The stage's last evaluation, which nobody chose."""
        return next(reversed(self.evaluations.get(stage, [])), None)

    def outcomes(self, split: str) -> dict[str, Outcome]:
        """By task, the examples that the run's results on a split are of; empty where it has none, and while
        it goes on to others.

        Raises:
            ConfigError: their file cannot be read.
        """
        path = outcomes_file(self.directory, split)
        if not path.is_file() or not self.summary.get(split):
            return {}
        try:
            arrays = load_file(path)
            names = list(dict.fromkeys(name.split(".")[0] for name in arrays))
            return {name: Outcome(*(arrays[f"{name}.{part}"] for part in Outcome._fields)) for name in names}
        except (OSError, SafetensorError, KeyError) as error:
            raise ConfigError(f"{path} cannot be read ({error}); evaluate the run again") from error

    def metrics(self, split: str) -> dict[str, float]:
        """The run's results on dev or test, empty where it has none; on dev, of a run that has not come to
        its results, those of its best epoch so far.

        Means are left out where a task's metric is not there.
        """
        found = self.summary.get(split) or {}
        if not found and split == "dev" and (choice := self.choice()):
            best = self.best_evaluation(choice.stage)
            found = best["metrics"] if best else {}
        whole = all(is_number(found.get(key)) for key in self.counting)
        return {key: value for key, value in found.items() if whole or key not in ("mean", "cs224n_overall")}


def outcomes_file(directory: Path, split: str) -> Path:
    """Where an evaluation of a run leaves its outcomes."""
    return directory / "outcomes" / f"{split}.safetensors"


def read_run(run_dir: str | Path) -> RunRecord:
    """Read a run directory. Missing files count as empty; a directory that is not there is an error.

    A run that was continued may have recorded a step twice: the later record stands.

    Raises:
        ConfigError: summary.json or config.yaml cannot be read.
    """
    directory = Path(run_dir)
    if not directory.is_dir():
        raise FileNotFoundError(f"run_dir: {directory} is not a directory")
    latest: dict[str, dict[tuple[str, int], dict[str, Any]]] = {"step": {}, "eval": {}}
    torn = 0
    for line in _text(directory / METRICS).splitlines():
        try:
            record = json.loads(line)
            latest.get(record["kind"], {})[record["stage"], int(record["step"])] = record
        except (ValueError, KeyError, TypeError):
            torn += 1
    by_stage: dict[str, dict[str, list[dict[str, Any]]]] = {"step": {}, "eval": {}}
    for kind, records in latest.items():
        for (stage, _), record in sorted(records.items(), key=lambda item: item[0]):
            by_stage[kind].setdefault(stage, []).append(record)
    config, text = directory / CONFIG_FILE, _text(directory / CONFIG_FILE)
    declared = re.search("^tasks:", text, re.MULTILINE)
    return RunRecord(
        directory=directory,
        summary=read_summary(directory),
        steps=by_stage["step"],
        evaluations=by_stage["eval"],
        text=text,
        config=read_config_file(config, RECIPES).config if declared else None,
        torn_lines=torn,
    )


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
