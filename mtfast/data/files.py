"""JSON lines, Parquet files and the tables of data sets as records, and the text of files."""

import json
from collections.abc import Container, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mtfast.data.rows import DataError, Record, Records, listed, repeated

_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_BATCH = 4096  # rows of a Parquet file that are decoded at once


def decode_utf8(path: Path) -> str:
    """The text of a UTF-8 file; DataError names file, line and byte offset of the first bad byte."""
    return decoded(path.read_bytes(), str(path))


def decoded(raw: bytes, origin: str) -> str:
    """As `decode_utf8`, of a file's bytes; ``origin`` is its name in messages."""
    try:
        return raw.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        if raw.startswith(_UTF16):
            raise DataError(f"{origin}: UTF-16, by its byte-order mark; save the file as UTF-8") from None
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{origin}:{line}: not UTF-8: byte 0x{raw[error.start]:02x} at byte offset {error.start}; "
            "save the file as UTF-8"
        ) from None


class _RepeatedKeyError(Exception):
    """A JSON object with a key that appears twice."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        names = map(repr, repeated(key for key, _ in pairs))
        raise _RepeatedKeyError(f"keys that appear twice: {listed(list(names))}")
    return values


def read_json_lines(path: Path, only: Container[int] | None = None) -> Records:
    """One object on each line; DataError for a file that is something else.

    ``only`` has the numbers (from 0) of the rows to keep.
    """
    text = decode_utf8(path)
    _refuse_one_json_value(path, text)
    rows: list[Record] = []
    columns: dict[str, None] = {}
    count = 0
    for line, part in enumerate(_lines(text), start=1):
        if not part.strip():
            continue
        values, problem = _json_object(part)
        columns.update(dict.fromkeys(values))
        if only is None or count in only:
            rows.append(Record(str(path), line, values, problem))
        count += 1
    return Records(str(path), list(columns), rows, left_out=count - len(rows))


def _lines(text: str) -> Iterator[str]:
    """`text.split("\\n")`, one line at a time."""
    begin = 0
    while (end := text.find("\n", begin)) >= 0:
        yield text[begin:end]
        begin = end + 1
    yield text[begin:]


def _json_object(text: str) -> tuple[dict[str, Any], str | None]:
    """The values of an object, or why there are none."""
    try:
        values = json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        return {}, f"not JSON: {error.msg} at column {error.colno}"
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; brackets within brackets
        return {}, f"JSON that cannot be read: {error}"
    except _RepeatedKeyError as error:
        return {}, str(error)
    if not isinstance(values, dict):
        return {}, "not a JSON object; one object on each line is expected"
    return values, None


def _refuse_one_json_value(path: Path, text: str) -> None:
    """Raises DataError for an array of rows, and for objects written over several lines."""
    begin = len(text) - len(text.lstrip())
    first, _, others = text[begin:].partition("\n")
    if first.startswith("[") and not (others.strip() and _is_json(first)):
        what = "a JSON array"
    elif first.startswith("{") and not _is_json(first) and _object_goes_on(text, begin):
        what = "a JSON object over several lines"
    else:
        return
    line = text.count("\n", 0, begin) + 1
    raise DataError(f"{path}:{line}: {what} begins here; JSON lines are expected, one object on each line")


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _object_goes_on(text: str, begin: int) -> bool:
    try:
        json.JSONDecoder().raw_decode(text, begin)
    except (ValueError, RecursionError):
        return False
    return True


def read_parquet(path: Path, only: Container[int] | None = None) -> Records:
    """DataError for a file that Arrow cannot read. ``only`` has the numbers (from 0) of the rows to keep."""
    file, names = _parquet(path)
    with file:
        return from_batches(str(path), names, _readable(path, file.iter_batches(_BATCH)), only)


def count_parquet(path: Path) -> int:
    """Rows of a file; DataError as `read_parquet`."""
    file, _ = _parquet(path)
    with file:
        return file.metadata.num_rows


def _parquet(path: Path) -> tuple[Any, list[str]]:
    """An open file and the names of its columns."""
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        return file, file.schema_arrow.names
    except Exception as error:  # Arrow raises many kinds for a damaged file
        raise _unreadable(path, error) from error


def _readable(path: Path, batches: Iterable[Any]) -> Iterator[Any]:
    try:
        yield from batches
    except Exception as error:  # as above
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> DataError:
    return DataError(f"{path}: not a readable Parquet file ({error})")


def from_batches(
    origin: str, names: list[str], batches: Iterable[Any], only: Container[int] | None = None
) -> Records:
    """The rows of Arrow's record batches; DataError names the column of a value that cannot be read, and its
    row. ``only`` has the numbers (from 0) of the rows to keep."""
    if duplicated := repeated(names):
        raise DataError(f"{origin}: column names appear twice: {listed(duplicated)}")
    rows: list[Record] = []
    count = 0
    for batch in batches:
        numbers = range(count, count + batch.num_rows)
        kept = numbers if only is None else [number for number in numbers if number in only]
        columns = [
            _values(origin, name, column, count, kept)
            for name, column in zip(names, batch.columns, strict=True)
        ]
        rows += [
            Record(origin, number + 1, dict(zip(names, values, strict=True)))
            for number, *values in zip(kept, *columns, strict=True)
        ]
        count += batch.num_rows
    return Records(origin, names, rows, left_out=count - len(rows))


def _values(origin: str, name: str, column: Any, first: int, kept: Sequence[int]) -> list[Any]:
    """Those values of a column, which begins with row ``first``, that are in the rows ``kept``."""
    try:
        column.validate(full=True)  # offsets of a damaged file may be out of bounds
    except Exception as error:
        raise DataError(f"{origin}: {name} cannot be read: {error}") from error
    try:
        if len(kept) < len(column):
            column = column.take(np.asarray(kept, np.int64) - first)
        return column.to_pylist()
    except Exception:  # a date beyond year 9999, say; find its row
        for number, value in enumerate(column, start=first + 1):
            try:
                value.as_py()
            except Exception as error:
                raise DataError(f"{origin}:{number}: {name} cannot be read: {error}") from error
        raise
