"""Raw records from files and data sets, each with the place it came from.

Nothing here knows what a task is: a source becomes columns and rows, and every row keeps its line (text
files) or row number (Parquet, Hugging Face data sets), so that whoever rejects a row can say where it is.
"""

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILE_SUFFIXES = (".parquet", ".csv", ".tsv", ".jsonl", ".json")
SPLIT_NAMES = {
    "train": ("train",),
    "dev": ("dev", "validation", "valid", "val"),
    "test": ("test",),
}


class DataError(ValueError):
    """Data that cannot be used. The message names the file and, where there is one, the line."""


class MissingDataError(DataError):
    """A file or split that is not there at all."""


@dataclass(frozen=True)
class Record:
    """One row: its line or row number (from 1), and its values by column, or why it could not be read."""

    line: int
    values: dict[str, Any]
    problem: str | None = None


@dataclass(frozen=True)
class Records:
    """A file or split as columns and rows; ``origin`` is what messages call it."""

    origin: str
    columns: list[str]
    rows: list[Record]


def read_file(path: Path, delimiter: str | None = None) -> Records:
    """Reads one Parquet, CSV/TSV or JSON-lines file; the suffix decides which.

    ``delimiter`` is for delimited text; None means a tab if the header has one, else a comma.
    Raises DataError if the file is missing, of another kind, not UTF-8, or not readable as what it claims.
    """
    if not path.is_file():
        raise MissingDataError(f"{path}: no such file")
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return _read_parquet(path)
    if suffix in (".csv", ".tsv"):
        return _read_delimited(path, "\t" if suffix == ".tsv" else delimiter)
    if suffix in (".jsonl", ".json"):
        return _read_json_lines(path)
    raise DataError(f"{path}: unknown kind of file; known are {', '.join(FILE_SUFFIXES)}")


def read_directory(directory: Path, split: str) -> Records:
    """Reads one split of a local data set: `save_to_disk` output, or files named after their split.

    Files are ``<split>*.<suffix>`` in the directory or its ``data`` folder, where dev may also be called
    validation, valid or val; several shards of one split are read in the order of their names.
    """
    if any((directory / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return _read_saved(directory, split)
    names = SPLIT_NAMES[split]
    shards = [
        path
        for folder in (directory, directory / "data")
        if folder.is_dir()
        for path in sorted(folder.iterdir())
        if path.suffix.lower() in FILE_SUFFIXES and path.name.lower().startswith(names)
    ]
    if not shards:
        wanted = " or ".join(f"{name}*" for name in names)
        found = ", ".join(sorted(path.name for path in directory.iterdir())[:12]) or "nothing"
        raise MissingDataError(
            f"{directory}: no file for the {split} split; wanted {wanted} with one of the suffixes "
            f"{', '.join(FILE_SUFFIXES)}; the directory holds {found}"
        )
    parts = [read_file(path) for path in shards]
    if len(parts) == 1:
        return parts[0]
    for part in parts[1:]:
        if part.columns != parts[0].columns:
            raise DataError(f"{part.origin}: columns {part.columns} differ from {parts[0].columns}")
    rows = [row for part in parts for row in part.rows]
    numbered = [Record(number, row.values, row.problem) for number, row in enumerate(rows, start=1)]
    return Records(f"{directory} ({split}, {len(parts)} files)", parts[0].columns, numbered)


def read_hub(name: str, split: str) -> Records:
    """Reads one split of a Hugging Face data set, ``owner/name`` or ``owner/name:config``."""
    import datasets

    path, _, config = name.partition(":")
    try:
        available = datasets.load_dataset(path, config or None)
    except Exception as error:  # the loader raises many kinds, and all mean the same to the caller
        raise DataError(
            f"{name}: neither a file or directory here nor a Hugging Face data set that could be loaded "
            f"({type(error).__name__}: {error})"
        ) from error
    return _from_dataset(_pick_split(available, split, name), f"{name} ({split})")


def decode_utf8(path: Path) -> str:
    """The text of a UTF-8 file; DataError names file, line and byte offset of the first bad byte."""
    raw = path.read_bytes()
    try:
        return raw.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}:{line}: not UTF-8: byte 0x{raw[error.start]:02x} at byte offset {error.start}; "
            "save the file as UTF-8"
        ) from None


def _read_delimited(path: Path, delimiter: str | None) -> Records:
    text = decode_utf8(path)
    if delimiter is None:
        delimiter = "\t" if "\t" in text.partition("\n")[0] else ","
    reader = csv.reader(io.StringIO(text, newline="\n"), delimiter=delimiter, strict=True)
    records = _delimited_records(path, reader)
    header = next(records, None)
    if header is None or isinstance(header[1], str):
        raise DataError(f"{path}:1: no header row" if header is None else f"{path}:1: {header[1]}")
    columns = header[1]
    duplicated = sorted({name for name in columns if name and columns.count(name) > 1})
    if duplicated:
        raise DataError(f"{path}:{header[0]}: column names appear twice: {', '.join(duplicated)}")
    rows = []
    for line, fields in records:
        if isinstance(fields, str):
            rows.append(Record(line, {}, fields))
        elif len(fields) != len(columns):
            rows.append(Record(line, {}, f"{len(fields)} fields where the header has {len(columns)}"))
        else:
            rows.append(Record(line, dict(zip(columns, fields, strict=True))))
    return Records(str(path), columns, rows)


def _delimited_records(path: Path, reader: Any) -> Iterator[tuple[int, list[str] | str]]:
    """(line where the record starts, its fields or what is wrong with its quoting), without blank lines."""
    while True:
        line = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            # An unclosed quote swallows every row that follows, so it must not pass as one bad row.
            if "unexpected end of data" in str(error) or "field larger" in str(error):
                raise DataError(f"{path}:{line}: a quoted field begins here and is not closed") from None
            yield line, f"bad quoting: {error}"
            continue
        if fields:
            yield line, fields


def _read_json_lines(path: Path) -> Records:
    rows: list[Record] = []
    columns: dict[str, None] = {}
    for line, text in enumerate(decode_utf8(path).split("\n"), start=1):
        if not text.strip():
            continue
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            rows.append(Record(line, {}, f"not JSON: {error.msg} at column {error.colno}"))
            continue
        if not isinstance(values, dict):
            rows.append(Record(line, {}, "not a JSON object; one object on each line is expected"))
            continue
        columns.update(dict.fromkeys(values))
        rows.append(Record(line, values))
    return Records(str(path), list(columns), rows)


def _read_parquet(path: Path) -> Records:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file ({error})") from error
    return _from_columns(str(path), {name: table[name].to_pylist() for name in table.column_names})


def _read_saved(directory: Path, split: str) -> Records:
    import datasets

    try:
        saved = datasets.load_from_disk(str(directory))
    except Exception as error:
        raise DataError(f"{directory}: not a readable saved data set ({error})") from error
    return _from_dataset(_pick_split(saved, split, str(directory)), f"{directory} ({split})")


def _pick_split(available: Any, split: str, name: str) -> Any:
    import datasets

    if isinstance(available, datasets.Dataset):
        return available
    for candidate in SPLIT_NAMES[split]:
        if candidate in available:
            return available[candidate]
    raise DataError(
        f"{name}: no {split} split; wanted {' or '.join(SPLIT_NAMES[split])}, found {', '.join(available)}"
    )


def _from_dataset(dataset: Any, origin: str) -> Records:
    return _from_columns(origin, {name: list(dataset[name]) for name in dataset.column_names})


def _from_columns(origin: str, columns: dict[str, list[Any]]) -> Records:
    names = list(columns)
    rows = [
        Record(number, dict(zip(names, values, strict=True)))
        for number, values in enumerate(zip(*columns.values(), strict=True), start=1)
    ]
    return Records(origin, names, rows)
