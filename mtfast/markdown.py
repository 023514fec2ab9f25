"""Markdown for people: tables, pictures, and numbers, times and names as text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from mtfast.plots import is_number

NOTHING = "—"  # in place of a number that there is not


def table(header: Sequence[str], rows: Iterable[Sequence[str]], text_columns: int = 1) -> str:
    """A table whose first `text_columns` columns are text; the others are flush right."""
    marks = ["---" if column < text_columns else "---:" for column in range(len(header))]
    lines = [header, marks, *([_cell(value) for value in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def picture(figure: Figure, path: Path, caption: str) -> str:
    """Save a figure as `path` and show it on a page in the directory above that of `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return f"![{caption}]({path.parent.name}/{path.name})"


def number(value: object, digits: int = 3) -> str:
    return f"{value:.{digits}f}" if is_number(value) else NOTHING


def count(value: object) -> str:
    return f"{value:,.0f}" if is_number(value) else NOTHING


def signed(value: object) -> str:
    return f"{value:+.3f}" if is_number(value) else NOTHING


def difference(first: object, second: object) -> str:
    """What has to be added to the first of two numbers to get the second."""
    return signed(second - first) if is_number(first) and is_number(second) else NOTHING  # type: ignore[operator]


def duration(seconds: object) -> str:
    if not is_number(seconds):
        return NOTHING
    whole = float(seconds)  # type: ignore[arg-type]
    if whole < 60:
        return f"{whole:.1f} s"
    minutes, rest = divmod(round(whole), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def gibibytes(size: object) -> str:
    """A number of bytes."""
    return f"{size / 2**30:.2f} GiB" if is_number(size) else NOTHING  # type: ignore[operator]


def plain(value: object) -> str:
    """A recorded value in words; names and numbers inside it separated by commas."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {plain(item)}" for key, item in value.items())
    return ", ".join(map(plain, value)) if isinstance(value, list | tuple) else str(value)


def sentence_case(text: str) -> str:
    return text[0].upper() + text[1:]


def escape(text: str) -> str:
    """Text whose letters are no markup."""
    return text.replace("\\", "\\\\").replace("*", "\\*").replace("_", "\\_").replace("<", "&lt;")
