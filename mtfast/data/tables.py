"""A task's examples: read from its source by column name, with an account of every row."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mtfast.data.cs224n import course_files, missing_files
from mtfast.data.records import files_of, read_files, read_split
from mtfast.data.rows import (
    DataError,
    Record,
    Records,
    RowAccount,
    SkippedRow,
    UnusableRowError,
    encodable,
    evenly,
    listed,
    shown,
)
from mtfast.tasks import Split, Task

_ID_ALIASES = ("id", "idx")
# From so many labels beyond the declared range on, the declaration is at fault rather than the rows.
EXCEEDING_ROWS, EXCEEDING_SHARE = 20, 0.01


@dataclass(frozen=True)
class TaskTable:
    """The usable examples of one split of one task, in input order.

    texts: a list of sentences for each text column.
    labels: int64 (classification) or float32 (binary and regression), or None where the source has no labels
    (test files).
    """

    name: str
    task: Task
    split: Split
    ids: list[str]
    texts: list[list[str]]
    labels: np.ndarray | None
    account: RowAccount

    def __len__(self) -> int:
        return len(self.ids)


def read_task(
    name: str, task: Task, source: str | Path, split: Split = "train", *, strict: bool = False
) -> TaskTable:
    """Reads one split of one task.

    ``source`` is a directory of CS 224N files, any other local data set directory (`save_to_disk`, or files
    named after their splits), one Parquet/CSV/TSV/JSON-lines file, or the name of a Hugging Face data set
    (``owner/name`` or ``owner/name:config``). Columns are found by name; a test split may lack the label
    column, and the id of a row without one is its number in the source, from 0. Of train and dev at most
    ``task.max_rows`` rows are read, evenly spaced. Rows that cannot be used (empty sentence, empty or
    impossible label, wrong number of fields) are skipped and listed in ``account``; with ``strict`` the first
    one raises DataError instead.
    Raises DataError also for a missing file, split or column, for text that is not UTF-8, for many labels
    beyond those the task declares, and when no row is left.
    """
    source_split = task.splits.get(split, split)
    course = course_files(name, source, source_split)
    if course is None:
        records = read_split(source, source_split)
    elif course:
        records = read_files(str(course[0]), course[:1], course[1:], delimiter="\t")
    else:
        raise missing_files(name, source, source_split)
    if not records.rows:
        raise DataError(f"{records.origin}: no rows", f"tasks.{name}.source")
    numbers: Sequence[int] = range(len(records.rows))
    if task.max_rows is not None and split != "test" and task.max_rows < len(numbers):
        note = f"{task.max_rows:,} of {len(numbers):,} rows, evenly spaced (max_rows)"
        numbers = evenly(numbers, task.max_rows)
        rows = [records.rows[number] for number in numbers]
        records = replace(records, rows=rows, notes=(*records.notes, note))
    return _build_table(name, task, split, records, numbers, strict)


def task_files(name: str, task: Task, source: str | Path, split: Split) -> list[Path]:
    """The files that `read_task` reads; empty for a data set and for a missing split."""
    source_split = task.splits.get(split, split)
    if (course := course_files(name, source, source_split)) is not None:
        return course[:1]
    return files_of(source, source_split)


def table_of(name: str, task: Task, records: Records, *, strict: bool = False) -> TaskTable:
    """The table of rows whose labels are wanted: what is in the label column, if there is one, is not read.

    Columns, ids, rows that cannot be used and errors are those of `read_task`.
    """
    if not records.rows:
        raise DataError(f"{records.origin}: no rows")
    return _build_table(name, task, "test", records, range(len(records.rows)), strict, labelled=False)


def _build_table(
    name: str,
    task: Task,
    split: Split,
    records: Records,
    numbers: Sequence[int],
    strict: bool,
    *,
    labelled: bool = True,
) -> TaskTable:
    """The table of ``records``, whose rows have the ``numbers`` in their source."""
    text_columns = [records.require(task.names_of(column), f"tasks.{name}.text") for column in task.texts]
    label_column = records.find(task.names_of(task.label)) if labelled else None
    if split == "test" and (label_column is None or _labels_withheld(records, label_column)):
        label_column = None
    elif label_column is None:
        label_column = records.require(task.names_of(task.label), f"tasks.{name}.label")
    else:
        _refuse_exceeding(name, task, records, label_column)
    id_column = records.find(_ID_ALIASES)

    ids: list[str] = []
    texts: list[list[str]] = [[] for _ in text_columns]
    labels: list[float] = []
    skipped: list[SkippedRow] = []
    for number, row in zip(numbers, records.rows, strict=True):
        try:
            sentences = [row.text(column) for column in text_columns]
            label = None if label_column is None else _label(row, label_column, name, task)
            row_id = _id(row.values.get(id_column), number) if id_column else str(number)
        except UnusableRowError as problem:
            skipped.append(SkippedRow(row.file, row.line, str(problem)))
            if strict:
                raise DataError(f"{skipped[-1]} (strict: rows are not skipped)") from None
            continue
        ids.append(row_id)
        for column, sentence in zip(texts, sentences, strict=True):
            column.append(sentence)
        if label is not None:
            labels.append(label)
    account = RowAccount(len(records.rows), len(ids), skipped, records.notes)
    if not ids:
        raise DataError(f"{records.origin}: no usable row for {name}; {account.summary(at_most=3)}")
    array: np.ndarray | None = None
    if label_column is not None:
        array = np.asarray(labels, np.int64 if task.kind == "classification" else np.float32)
        _check_scale(name, task, array, records.origin)
        # Of labels -1 and 1 one is left.
        many = len(skipped) >= max(EXCEEDING_ROWS, EXCEEDING_SHARE * len(records.rows))
        if many and task.kind != "regression" and np.ptp(array) == 0:
            only = f"every usable row has the label {array[0]:g}"
            raise DataError(
                f"{records.origin}: {only}; {account.summary(at_most=3)}",
                f"tasks.{name}.label",
            )
    return TaskTable(name, task, split, ids, texts, array, account)


def _id(value: Any, number: int) -> str:
    """The id in one line, as prediction files need it; the row's number if it is empty."""
    if value is None or value != value:  # NaN: an empty cell to pandas
        return str(number)
    text = shown(value) if isinstance(value, list | dict) else str(value)
    return encodable(" ".join(text.splitlines()).strip(), "id") or str(number)


def _label(row: Record, column: str, name: str, task: Task) -> float:
    value = row.values.get(column)
    if value is None or (isinstance(value, str) and not value.strip()):
        raise UnusableRowError(f"empty label in {column}")
    names = _class_names(task)
    if (index := _class_index(value, names)) is not None:
        return index
    low, high = _range(task)
    try:
        if any(name.isdigit() for name in names):  # 2 then means the class "2", not the class with index 2
            raise ValueError(value)
        label = _number(value)
    except (TypeError, ValueError, OverflowError):
        wanted = f"one of {listed(names)}" if names else "a number"
        raise UnusableRowError(f"{column} is {shown(value)}, not {wanted}") from None
    whole = "" if task.kind == "regression" else "whole "
    in_range = low <= label <= high  # false for NaN
    if not in_range or (whole and label != int(label)):
        raise UnusableRowError(
            f"{column} is {shown(value)}, out of range: {name} takes {whole}numbers from {low:g} to {high:g}"
        )
    return label


def _class_names(task: Task) -> tuple[str, ...]:
    return task.classes if isinstance(task.classes, tuple) else ()


def _class_index(value: Any, names: tuple[str, ...]) -> int | None:
    """Index of the class that a label names, or None; 1, 1.0 and "1.0" name a class "1"."""
    if not names or isinstance(value, list | dict):
        return None
    text = str(value).strip()
    return next((names.index(name) for name in (text, text.removesuffix(".0")) if name in names), None)


def _range(task: Task) -> tuple[float, float]:
    """The lowest and the highest label."""
    if task.kind == "regression":
        assert task.low is not None and task.high is not None
        return task.low, task.high
    return 0, max(task.outputs - 1, 1)


def _number(value: Any) -> float:
    """Raises ValueError, TypeError or OverflowError if the value is no number."""
    if isinstance(value, str) and "_" in value:  # 0_4 is 4 to Python
        raise ValueError(value)
    return float(value)


def _refuse_exceeding(name: str, task: Task, records: Records, column: str) -> None:
    """Raises DataError if many rows have labels beyond those the task declares.

    Negative labels of classes do not count: some data sets mark rows without a label with -1.
    """
    low, high = _range(task)
    names = _class_names(task)
    beyond: Counter[Any] = Counter()
    for row in records.rows:
        value = row.values.get(column)
        if _class_index(value, names) is not None:
            continue
        try:
            number = _number(value)
        except (TypeError, ValueError, OverflowError):
            if names and isinstance(value, str) and value.strip():
                beyond[value.strip()] += 1
            continue
        if high < number or (task.kind == "regression" and number < low):
            beyond[number] += 1
    if beyond.total() < max(EXCEEDING_ROWS, EXCEEDING_SHARE * len(records.rows)):
        return
    below = sum(count for label, count in beyond.items() if isinstance(label, float) and label < low)
    high_or_low = "low" if 2 * below > beyond.total() else "high"
    field = {"classification": "classes", "binary": "kind", "regression": high_or_low}[task.kind]
    labels = [label for label, _ in beyond.most_common(4)]
    commonest = listed([f"{label:g}" if isinstance(label, float) else shown(label) for label in labels])
    allowed = {
        "classification": f"classes is {listed(names) if names else task.classes}",
        "binary": "a binary task takes 0 and 1",
        "regression": f"low is {low:g} and high is {high:g}",
    }[task.kind]
    raise DataError(
        f"{records.origin}: {beyond.total():,} of {len(records.rows):,} rows have a {column} of {commonest}; "
        f"{allowed}, so tasks.{name}.{field} should be another, or tasks.{name}.label another column",
        f"tasks.{name}.{field}",
    )


def _labels_withheld(records: Records, column: str) -> bool:
    """Whether no row of a test split has a label: the hub marks withheld labels with -1."""
    return all(row.values.get(column) in (None, "", -1, -1.0, "-1") for row in records.rows)


def _check_scale(name: str, task: Task, labels: np.ndarray, origin: str) -> None:
    """Raises DataError for scores rescaled to 0..1, as some copies of data sets on the hub are."""
    low, high = _range(task)
    rescaled = labels.max() <= 1 and np.count_nonzero((labels > 0) & (labels < 1)) >= 20
    if task.kind == "regression" and low == 0 and high > 1 and rescaled:
        raise DataError(
            f"{origin}: every score lies between 0 and 1, but {name} is on a scale from {low:g} to {high:g}; "
            f"multiply the column by {high:g}, or declare high: 1",
            f"tasks.{name}.high",
        )
