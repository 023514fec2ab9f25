"""Raw records from files and data sets, each with the place it came from.

Nothing here knows what a task is: a source becomes columns and rows, and every row keeps its line (text
files) or row number (Parquet, Hugging Face data sets), so that whoever rejects a row can say where it is.
"""

import csv
import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

FILE_SUFFIXES = (".parquet", ".csv", ".tsv", ".jsonl", ".json")
_NOT_DATA = (".", "dataset_info")  # hidden files, and what `datasets` writes beside its data
SPLIT_NAMES = {
    "train": ("train",),
    "dev": ("dev", "validation", "valid", "val"),
    "test": ("test", "test-student"),
}


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
            raise UnusableRowError(f"{column} is {value!r}, not text")
        try:
            value.encode()
        except UnicodeEncodeError:  # JSON can spell one out
            raise UnusableRowError(
                f"{column} holds half of a surrogate pair, which is no character"
            ) from None
        if not (text := value.strip()):
            raise UnusableRowError(f"empty {column}")
        return text


@dataclass(frozen=True)
class Records:
    """A file or split as columns and rows; ``origin`` is what messages call it."""

    origin: str
    columns: list[str]
    rows: list[Record]

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


def read_split(source: str | Path, split: str) -> Records:
    """Reads one split ("train", "dev" or "test") of a source.

    A source is one file (whatever the split) or, with ``{split}`` in its name, one for each; a directory with
    `save_to_disk` output, or with files ``<split>*.<suffix>`` in it, its ``data`` folder or else its only
    folder; or the name of a Hugging Face data set, ``owner/name`` or ``owner/name:config``. The dev split may
    also be called validation, valid or val.
    """
    kind, path = _kind(source)
    names = SPLIT_NAMES[split]
    if kind == "file":
        candidates = [Path(str(path).replace("{split}", name)) for name in names]
        return read_file(next((file for file in candidates if file.is_file()), candidates[0]))
    if kind == "files":
        for name in names:
            pattern = re.compile(rf"{name}([-._ \d]|$)")
            if shards := [file for file in _data_files(path) if pattern.match(file.stem.lower())]:
                return _joined(f"{path} ({split})", shards)
        raise MissingDataError(
            f"{path}: no file for the {split} split; wanted {' or '.join(f'{name}*' for name in names)} "
            f"with one of the suffixes {', '.join(FILE_SUFFIXES)}; the directory holds {_listing(path)}"
        )
    available = _load_splits(kind, source)
    for candidate in (*names, ""):
        if candidate in available:
            return _from_data_set(source, candidate, available[candidate])
    raise MissingDataError(
        f"{source}: no {split} split; wanted {' or '.join(names)}, found {', '.join(available)}"
    )


def read_every_split(source: str | Path) -> list[Records]:
    """Reads all of a source of the kinds that `read_split` takes, one `Records` for each file or split."""
    kind, path = _kind(source)
    if kind == "file":
        return [read_file(path)]
    if kind == "files":
        files = _data_files(path)
        if not files:
            raise DataError(
                f"{path}: no file with one of the suffixes {', '.join(FILE_SUFFIXES)}; "
                f"the directory holds {_listing(path)}"
            )
        return [read_file(file) for file in files]
    return [_from_data_set(source, split, data) for split, data in _load_splits(kind, source).items()]


def is_one_file(source: str | Path) -> bool:
    """True if `read_split` would read the same file for every split."""
    return _kind(source)[0] == "file" and "{split}" not in str(source)


def _kind(source: str | Path) -> tuple[Literal["file", "files", "saved", "hub"], Path]:
    """What a source is, and its path (meaningless for a data set of the hub)."""
    path = Path(source).expanduser()
    if path.is_dir():
        saved = any((path / name).is_file() for name in ("dataset_dict.json", "state.json"))
        return ("saved" if saved else "files"), path
    looks_like_path = path.suffix.lower() in FILE_SUFFIXES or str(source).startswith(("/", ".", "~"))
    return ("file" if path.is_file() or looks_like_path else "hub"), path


def _data_files(directory: Path) -> list[Path]:
    """Those in the directory and its `data` folder; else those in its only folder that has some, which in a
    snapshot of the hub is called like the data set's configuration."""

    def among(folder: Path) -> list[Path]:
        return [
            path
            for path in (sorted(folder.iterdir()) if folder.is_dir() else ())
            if path.suffix.lower() in FILE_SUFFIXES and path.is_file() and not path.name.startswith(_NOT_DATA)
        ]

    if usual := [*among(directory), *among(directory / "data")]:
        return usual
    others = {folder.name: files for folder in sorted(directory.iterdir()) if (files := among(folder))}
    if len(others) > 1:
        raise DataError(f"{directory}: several folders with data, {', '.join(others)}; name one of them")
    return next(iter(others.values()), [])


def _listing(directory: Path) -> str:
    return ", ".join(sorted(entry.name for entry in directory.iterdir())[:12]) or "nothing"


def _joined(origin: str, shards: list[Path]) -> Records:
    """The files of one split, which must be of one kind and have the same columns."""
    if len({shard.suffix.lower() for shard in shards}) > 1:
        names = ", ".join(shard.name for shard in shards)
        raise DataError(f"{origin}: files of several kinds, {names}; keep one kind, lest rows are read twice")
    parts = [read_file(shard) for shard in shards]
    for part in parts[1:]:
        if part.columns != parts[0].columns:
            raise DataError(
                f"{part.origin}: columns {part.columns} differ from {parts[0].columns} in {parts[0].origin}"
            )
    if len(parts) == 1:
        return parts[0]
    return Records(origin, parts[0].columns, [row for part in parts for row in part.rows])


def _load_splits(kind: Literal["saved", "hub"], source: str | Path) -> dict[str, Any]:
    """Every split of a data set by name; a saved one without splits has the one name ""."""
    import datasets

    name, _, config = str(source).partition(":")
    try:
        loaded = (
            datasets.load_from_disk(str(Path(source).expanduser()))
            if kind == "saved"
            else datasets.load_dataset(name, config or None)
        )
    except Exception as error:  # the loaders raise many kinds, and all mean the same to the caller
        what = (
            "not a readable saved data set"
            if kind == "saved"
            else "neither a file or directory here nor a Hugging Face data set that could be loaded"
        )
        raise DataError(f"{source}: {what} ({type(error).__name__}: {error})") from error
    if isinstance(loaded, datasets.Dataset):
        return {"": loaded}
    return {str(split): data for split, data in loaded.items()}


def _from_data_set(source: str | Path, split: str, data: Any) -> Records:
    return _from_columns(f"{source} ({split})" if split else str(source), data.to_dict())


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
            rows.append(Record(str(path), line, {}, fields))
        elif len(fields) != len(columns):
            rows.append(
                Record(str(path), line, {}, f"{len(fields)} fields where the header has {len(columns)}")
            )
        else:
            rows.append(Record(str(path), line, dict(zip(columns, fields, strict=True))))
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
                limit = f"within {csv.field_size_limit():,} characters"
                raise DataError(
                    f"{path}:{line}: a quoted field begins here and is not closed {limit}"
                ) from None
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
            rows.append(Record(str(path), line, {}, f"not JSON: {error.msg} at column {error.colno}"))
            continue
        if not isinstance(values, dict):
            rows.append(Record(str(path), line, {}, "not a JSON object; one object on each line is expected"))
            continue
        columns.update(dict.fromkeys(values))
        rows.append(Record(str(path), line, values))
    return Records(str(path), list(columns), rows)


def _read_parquet(path: Path) -> Records:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file ({error})") from error
    return _from_columns(str(path), {name: table[name].to_pylist() for name in table.column_names})


def _from_columns(origin: str, columns: dict[str, list[Any]]) -> Records:
    names = list(columns)
    rows = [
        Record(origin, number, dict(zip(names, values, strict=True)))
        for number, values in enumerate(zip(*columns.values(), strict=True), start=1)
    ]
    return Records(origin, names, rows)
