"""The CS 224N default project: names of its data and prediction files, and the course's overall score."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mtfast.data.rows import MissingDataError
from mtfast.tasks import Split


@dataclass(frozen=True)
class CourseTask:
    """A task of the course.

    prefix, predictions: how the names of its data files and of its prediction files begin.
    column: of the predictions.
    metric: the one in the overall score.
    """

    prefix: str
    predictions: str
    column: str
    metric: str


COURSE_TASKS = {
    "sst": CourseTask("ids-sst", "sst", "Predicted_Sentiment", "accuracy"),
    "quora": CourseTask("quora", "para", "Predicted_Is_Paraphrase", "accuracy"),
    # The misspelling is the course's; its graders expect it.
    "sts": CourseTask("sts", "sts", "Predicted_Similiary", "pearson"),
}


def pattern_of(name: str) -> str | None:
    """Glob pattern of a task's data files; None for a task that is not the course's."""
    return f"{COURSE_TASKS[name].prefix}-*.csv" if name in COURSE_TASKS else None


def course_files(name: str, source: str | Path, split: str) -> list[Path] | None:
    """The files of a split in a directory of CS 224N files, the preferred one first; None for another source
    or task."""
    path, pattern = Path(source).expanduser(), pattern_of(name)
    if pattern is None or not path.is_dir() or next(path.glob(pattern), None) is None:
        return None
    return [file for wanted in _names(name, split) if (file := path / wanted).is_file()]


def missing_files(name: str, source: str | Path, split: str) -> MissingDataError:
    """What to raise where `course_files` finds none of a split."""
    path = Path(source).expanduser()
    found = ", ".join(sorted(file.name for file in path.glob(pattern_of(name) or "")))
    return MissingDataError(
        f"{path}: no {split} file of {name}: wanted {' or '.join(_names(name, split))}, found {found}"
    )


def _names(name: str, split: str) -> list[str]:
    stems = ["test-student", "test"] if split == "test" else [split]
    return [f"{COURSE_TASKS[name].prefix}-{stem}.csv" for stem in stems]


def prediction_file(name: str, split: Split, ids: list[str], predictions: np.ndarray) -> tuple[str, str]:
    """Name and contents of the course's file with a task's predictions [n]."""
    task = COURSE_TASKS[name]
    # The course's own files have these spaces, and paraphrase as 0.0 or 1.0.
    numbers = predictions if task.prefix == "ids-sst" else predictions.astype(float)
    rows = "".join(f"{row} , {value} \n" for row, value in zip(ids, numbers.tolist(), strict=True))
    return f"{task.predictions}-{split}-output.csv", f"id \t {task.column} \n{rows}"


def overall_score(metrics: Mapping[str, float]) -> float | None:
    """The course's overall score, mean(SST accuracy, Quora accuracy, (STS Pearson + 1) / 2); None without one
    of them."""
    keys = [f"{name}_{task.metric}" for name, task in COURSE_TASKS.items()]
    if not all(key in metrics for key in keys):
        return None
    sst, quora, sts = (metrics[key] for key in keys)
    return (sst + quora + (sts + 1) / 2) / 3
