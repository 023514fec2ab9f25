"""What every reader returns: columns and rows, each with its file and line; and the account of skipped rows.

Readers know nothing of tasks: a row keeps its line (text files) or row number (Parquet, Hugging Face data
sets), so that a message about it can name both.
"""

import reprlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from mtfast.errors import FieldError

T = TypeVar("T")

_short = reprlib.Repr()
_short.maxstring = _short.maxother = 60


class DataError(FieldError):
    """Data that cannot be used. The message names the file and, where there is one, the line."""


class MissingDataError(DataError):
    """A file or split that is not there at all."""


class UnusableRowError(Exception):
    """Why a row is skipped; who iterates over the rows catches it and lists the row in the account."""


@dataclass(frozen=True)
class Record:
    """One row: its file or split, its line or row number (from 1), and its values by column, or why it could
    not be read."""

    file: str
    line: int
    values: dict[str, Any]
    problem: str | None = None

    def text(self, column: str) -> str:
        """The text in a column, stripped; UnusableRowError if there is none or the row was not read."""
        if self.problem is not None:
            raise UnusableRowError(self.problem)
        value = self.values.get(column)
        if value is None or value != value:  # NaN: an empty cell to pandas
            raise UnusableRowError(f"empty {column}")
        if not isinstance(value, str):
            raise UnusableRowError(f"{column} is {shown(value)}, not text")
        if not (text := encodable(value, column).strip()):
            raise UnusableRowError(f"empty {column}")
        return text


@dataclass(frozen=True)
class Records:
    """A file or split as columns and rows.

    origin: its name in messages.
    notes: remarks for the account on how it was read.
    left_out: rows it has besides these, which nobody asked for.
    """

    origin: str
    columns: list[str]
    rows: list[Record]
    notes: tuple[str, ...] = ()
    left_out: int = 0

    def find(self, names: tuple[str, ...]) -> str | None:
        """The column of the first of ``names`` that the table has, or None.

        A column with exactly that name comes before one that differs in case or surrounding spaces.
        """
        by_lower = {column.strip().lower(): column for column in self.columns}
        found = (name if name in self.columns else by_lower.get(name.strip().lower()) for name in names)
        return next((column for column in found if column is not None), None)

    def require(self, names: tuple[str, ...], field: str | None = None) -> str:
        """As `find`, but DataError names the file, the column wanted and the columns found.

        ``field`` is the configuration's field that names the column.
        """
        column = self.find(names)
        if column is None:
            others = f" (or {', '.join(names[1:])})" if names[1:] else ""
            found = ", ".join(repr(name) for name in self.columns) or "none"
            raise DataError(f"{self.origin}: no column {names[0]!r}{others}; columns found: {found}", field)
        return column


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
    """How many rows were read and used, every skipped row, and the reader's notes."""

    read: int
    used: int
    skipped: list[SkippedRow] = field(default_factory=list)
    notes: tuple[str, ...] = ()

    def summary(self, *facts: str, at_most: int = 10) -> str:
        """One line with the counts and ``facts``, then one for each note and each skipped row, up to
        ``at_most`` of these."""
        counts = f"{self.read:,} rows read, {self.used:,} used, {len(self.skipped):,} skipped"
        lines = [", ".join([counts, *facts]), *(f"  {note}" for note in self.notes)]
        lines += [f"  {row}" for row in self.skipped[:at_most]]
        if len(self.skipped) > at_most:
            lines.append(f"  and {len(self.skipped) - at_most:,} more")
        return "\n".join(lines)


def shown(value: Any) -> str:
    """A value as messages show it: its repr, shortened."""
    return _short.repr(value)


def encodable(text: str, column: str) -> str:
    """The text; UnusableRowError if it cannot be written as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can spell one out
        raise UnusableRowError(f"{column} holds half of a surrogate pair, which is no character") from None
    return text


def listed(names: Sequence[Any], at_most: int = 10) -> str:
    """The names with commas between them, the first ``at_most`` of them."""
    more = f" and {len(names) - at_most:,} more" if len(names) > at_most else ""
    return ", ".join(map(str, names[:at_most])) + more


def evenly(rows: Sequence[T], count: int) -> list[T]:
    """``count`` of the rows, evenly spaced, since many data sets come sorted by label."""
    return [rows[i * len(rows) // count] for i in range(count)]


def repeated(names: Iterable[str]) -> list[str]:
    """The names that appear more than once, sorted."""
    return sorted(name for name, count in Counter(names).items() if count > 1)
