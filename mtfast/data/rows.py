"""What every reader gives: columns and rows with the place each came from, and why a row cannot be used.

Nothing here knows what a task is: every row keeps its line (text files) or row number (Parquet, Hugging Face
data sets), so that whoever rejects a row can say where it is.
"""

import reprlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

_short = reprlib.Repr()
_short.maxstring = _short.maxother = 60


class DataError(ValueError):
    """Data that cannot be used. The message names the file and, where there is one, the line."""


class MissingDataError(DataError):
    """A file or split that is not there at all."""


class UnusableRowError(Exception):
    """Why a row is left out; whoever goes through rows catches it and keeps the account."""


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
    """A file or split as columns and rows; ``origin`` is what messages call it.

    ``notes`` tell what one should know of how it was read.
    """

    origin: str
    columns: list[str]
    rows: list[Record]
    notes: tuple[str, ...] = ()

    def find(self, names: tuple[str, ...]) -> str | None:
        """The column that goes by the first of ``names`` there is, whatever its case and spaces, or None."""
        by_lower = {column.strip().lower(): column for column in self.columns}
        return next((by_lower[name] for name in names if name in by_lower), None)

    def require(self, names: tuple[str, ...]) -> str:
        """As `find`, but DataError names the file, the column wanted and the columns found."""
        column = self.find(names)
        if column is None:
            others = f" (or {', '.join(names[1:])})" if names[1:] else ""
            found = ", ".join(repr(name) for name in self.columns) or "none"
            raise DataError(f"{self.origin}: no column {names[0]!r}{others}; columns found: {found}")
        return column


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


def repeated(names: Iterable[str]) -> list[str]:
    """Those of the names that appear more than once, sorted."""
    return sorted(name for name, count in Counter(names).items() if count > 1)
