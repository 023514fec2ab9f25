"""Tables of the paper's three tasks, read from a source or made of a few sentences."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mtfast.data.rows import RowAccount
from mtfast.data.tables import TaskTable, read_task
from mtfast.recipes import PAPER_TASKS
from mtfast.tasks import Split


def read_paper_task(
    name: str, source: str | Path, split: Split = "train", *, strict: bool = False, **changes: Any
) -> TaskTable:
    """`read_task` of one of the paper's tasks, with ``changes`` to its declaration."""
    return read_task(name, replace(PAPER_TASKS[name], **changes), source, split, strict=strict)


def table_of(name: str, *columns: list[str], labels: list[float] | None = None, **changes: Any) -> TaskTable:
    """A training table of these texts, with the ids x0, x1, ..."""
    rows = len(columns[0])
    values = None if labels is None else np.asarray(labels, np.int64 if name == "sst" else np.float32)
    ids = [f"x{row}" for row in range(rows)]
    task = replace(PAPER_TASKS[name], **changes)
    return TaskTable(name, task, "train", ids, list(columns), values, RowAccount(rows, rows))
