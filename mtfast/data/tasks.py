"""The three tasks and the reading of their examples, by column name, with an account of every row."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mtfast.data.records import SPLIT_NAMES, files_of, read_files, read_split
from mtfast.data.rows import DataError, MissingDataError, Records, UnusableRowError, encodable, shown

Split = Literal["train", "dev", "test"]


@dataclass(frozen=True)
class Task:
    """A task: its columns, the other names its columns go by, and what a label may be.

    ``label_low`` to ``label_high`` is the closed range of a label; whole numbers only unless ``kind`` is
    "similarity".
    """

    name: str
    kind: Literal["sentiment", "paraphrase", "similarity"]
    text_columns: tuple[str, ...]
    label_column: str
    label_low: float
    label_high: float
    file_prefix: str
    text_aliases: tuple[tuple[str, ...], ...]
    label_aliases: tuple[str, ...]

    @property
    def label_dtype(self) -> type:
        """int64 for the class of a sentiment, float32 for the other two."""
        return np.int64 if self.kind == "sentiment" else np.float32


_PAIR_ALIASES = (("question1", "text1", "sentence_1"), ("question2", "text2", "sentence_2"))
_SINGLE_ALIASES = (("text", "review", "phrase"),)

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("sst", "sentiment", ("sentence",), "sentiment", 0, 4, "ids-sst", _SINGLE_ALIASES, ("label",)),
        Task(
            "quora", "paraphrase", ("sentence1", "sentence2"), "is_duplicate", 0, 1, "quora",
            _PAIR_ALIASES, ("label",),
        ),
        Task(
            "sts", "similarity", ("sentence1", "sentence2"), "similarity", 0, 5, "sts",
            _PAIR_ALIASES, ("similarity_score", "score", "label"),
        ),
    )
}  # fmt: skip
_ID_ALIASES = ("id", "idx")


@dataclass(frozen=True)
class SkippedRow:
    """A row that could not be used: where it is (line, or row number for Parquet and data sets) and why."""

    file: str
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.reason}"


@dataclass(frozen=True)
class RowAccount:
    """How many rows were read and used, and each one that was not; and the notes of whoever read them."""

    read: int
    used: int
    skipped: list[SkippedRow] = field(default_factory=list)
    notes: tuple[str, ...] = ()

    def summary(self, *facts: str, at_most: int = 10) -> str:
        """One line, with ``facts`` at its end, one for each note and one more for each skipped row, up to
        ``at_most``."""
        counts = f"{self.read:,} rows read, {self.used:,} used, {len(self.skipped):,} skipped"
        lines = [", ".join([counts, *facts]), *(f"  {note}" for note in self.notes)]
        lines += [f"  {row}" for row in self.skipped[:at_most]]
        if len(self.skipped) > at_most:
            lines.append(f"  and {len(self.skipped) - at_most:,} more")
        return "\n".join(lines)


@dataclass(frozen=True)
class TaskTable:
    """The usable examples of one split of one task, in input order.

    ``texts`` has one list of sentences for sentiment, two of equal length for pairs. ``labels`` is int64
    (sentiment) or float32 (the others), or None where the source has no labels (test files).
    """

    task: Task
    split: str
    source: str
    ids: list[str]
    texts: list[list[str]]
    labels: np.ndarray | None
    account: RowAccount

    def __len__(self) -> int:
        return len(self.ids)


def read_task(
    task_name: str, source: str | Path, split: Split = "train", *, strict: bool = False
) -> TaskTable:
    """Reads one split of one task.

    ``source`` is a directory of CS 224N files, any other local data set directory (`save_to_disk`, or files
    named after their splits), one Parquet/CSV/TSV/JSON-lines file, or the name of a Hugging Face data set
    (``owner/name`` or ``owner/name:config``). Columns are found by name; a test split may lack the label
    column, and rows without an id go by their number, from 0. Rows that cannot be used (empty sentence, empty
    or impossible label, wrong number of fields) are left out and listed in ``account``; with ``strict`` the
    first one raises DataError instead.
    Raises DataError also for a missing file, split or column, for text that is not UTF-8, and when no row
    is left.
    """
    if task_name not in TASKS:
        raise DataError(f"unknown task {task_name!r}; known are {', '.join(TASKS)}")
    if split not in SPLIT_NAMES:
        raise DataError(f"unknown split {split!r}; known are {', '.join(SPLIT_NAMES)}")
    task = TASKS[task_name]
    return _build_table(task, split, _read_source(task, source, split), strict)


def task_files(task_name: str, source: str | Path, split: Split) -> list[Path]:
    """The files that `read_task` reads; none for a data set, or where there is none."""
    if (course := _course_files(TASKS[task_name], source, split)) is not None:
        return course[:1]
    return files_of(source, split)


def _course_files(task: Task, source: str | Path, split: str) -> list[Path] | None:
    """The files of a split in a directory of CS 224N files, the one to be read first; None for any other
    source."""
    path = Path(source).expanduser()
    if not path.is_dir() or next(path.glob(f"{task.file_prefix}-*.csv"), None) is None:
        return None
    return [file for name in _course_names(task, split) if (file := path / name).is_file()]


def _course_names(task: Task, split: str) -> list[str]:
    stems = ["test-student", "test"] if split == "test" else [split]
    return [f"{task.file_prefix}-{stem}.csv" for stem in stems]


def _read_source(task: Task, source: str | Path, split: str) -> Records:
    files = _course_files(task, source, split)
    if files is None:
        return read_split(source, split)
    if files:
        return read_files(str(files[0]), files[:1], files[1:], delimiter="\t")
    path = Path(source).expanduser()
    found = ", ".join(sorted(file.name for file in path.glob(f"{task.file_prefix}-*.csv")))
    raise MissingDataError(
        f"{path}: no {split} file of {task.name}: "
        f"wanted {' or '.join(_course_names(task, split))}, found {found}"
    )


def _build_table(task: Task, split: str, records: Records, strict: bool) -> TaskTable:
    if not records.rows:
        raise DataError(f"{records.origin}: no rows")
    text_columns = [
        records.require((wanted, *aliases))
        for wanted, aliases in zip(task.text_columns, task.text_aliases, strict=True)
    ]
    label_names = (task.label_column, *task.label_aliases)
    label_column = records.find(label_names)
    if split == "test" and (label_column is None or _labels_withheld(records, label_column)):
        label_column = None
    elif label_column is None:
        label_column = records.require(label_names)
    id_column = records.find(_ID_ALIASES)

    ids: list[str] = []
    texts: list[list[str]] = [[] for _ in text_columns]
    labels: list[float] = []
    skipped: list[SkippedRow] = []
    for number, row in enumerate(records.rows):
        try:
            sentences = [row.text(name) for name in text_columns]
            label = None if label_column is None else _label(row.values.get(label_column), label_column, task)
            name = _id(row.values.get(id_column), number) if id_column else str(number)
        except UnusableRowError as problem:
            skipped.append(SkippedRow(row.file, row.line, str(problem)))
            if strict:
                raise DataError(f"{skipped[-1]} (strict: rows are not skipped)") from None
            continue
        ids.append(name)
        for column, sentence in zip(texts, sentences, strict=True):
            column.append(sentence)
        if label is not None:
            labels.append(label)
    account = RowAccount(len(records.rows), len(ids), skipped, records.notes)
    if not ids:
        raise DataError(f"{records.origin}: no usable row for {task.name}; {account.summary(at_most=3)}")
    array: np.ndarray | None = None if label_column is None else np.asarray(labels, dtype=task.label_dtype)
    if array is not None:
        _check_scale(task, array, records.origin)
    return TaskTable(task, split, records.origin, ids, texts, array, account)


def _id(value: Any, number: int) -> str:
    """The id in one line, as prediction files need it; the row's number where there is none."""
    if value is None or value != value:  # NaN: an empty cell to pandas
        return str(number)
    text = shown(value) if isinstance(value, list | dict) else str(value)
    return encodable(" ".join(text.splitlines()).strip(), "id") or str(number)


def _label(value: Any, column: str, task: Task) -> float:
    if value is None or (isinstance(value, str) and not value.strip()):
        raise UnusableRowError(f"empty label in {column}")
    try:
        label = _number(value)
    except (TypeError, ValueError, OverflowError):
        raise UnusableRowError(f"{column} is {shown(value)}, not a number") from None
    whole = "" if task.kind == "similarity" else "whole "
    in_range = task.label_low <= label <= task.label_high  # false for NaN
    if not in_range or (whole and label != int(label)):
        raise UnusableRowError(
            f"{column} is {shown(value)}, out of range: {task.name} takes {whole}numbers from "
            f"{task.label_low} to {task.label_high}"
        )
    return label


def _number(value: Any) -> float:
    """ValueError, TypeError or OverflowError if it is none."""
    if isinstance(value, str) and "_" in value:  # 0_4 is 4 to Python
        raise ValueError(value)
    return float(value)


def _labels_withheld(records: Records, column: str) -> bool:
    """True if no row of a test split has a label: the hub marks withheld labels with -1."""
    return all(row.values.get(column) in (None, "", -1, -1.0, "-1") for row in records.rows)


def _check_scale(task: Task, labels: np.ndarray, origin: str) -> None:
    """Refuses similarities that were rescaled to 0..1, as some copies of STS-B on the hub are."""
    rescaled = labels.max() <= 1 and np.count_nonzero((labels > 0) & (labels < 1)) >= 20
    if task.kind == "similarity" and rescaled:
        raise DataError(
            f"{origin}: every similarity lies between 0 and 1, but {task.name} is on a scale from 0 to 5; "
            "multiply the column by 5"
        )
