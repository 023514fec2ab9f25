"""Sources of records: files, directories of files, saved data sets and data sets of the hub, by split."""

import itertools
import os
import re
from collections.abc import Callable, Container
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from mtfast.data.delimited import read_delimited
from mtfast.data.files import count_parquet, from_batches, read_json_lines, read_parquet
from mtfast.data.rows import DataError, MissingDataError, Records, evenly, listed

FILE_SUFFIXES = (".parquet", ".csv", ".tsv", ".jsonl", ".json")
_NOT_DATA = (".", "dataset_info")  # hidden files, and the metadata that `datasets` writes beside its data
SPLIT_NAMES = {
    "train": ("train",),
    "dev": ("dev", "validation", "valid", "val"),
    "test": ("test", "test-student"),
}


def names_of_split(split: str) -> tuple[str, ...]:
    """The names that a split may have in a source, the preferred one first."""
    return SPLIT_NAMES.get(split, (split,))


def read_split(source: str | Path, split: str) -> Records:
    """Reads one split of a source: "train", "dev", "test", or another name that the source has.

    A source is one file (for any split) or, with ``{split}`` in its name, one for each; a directory with
    `save_to_disk` output, or with files ``<split>*.<suffix>`` in it, its ``data`` folder or else its only
    folder; or the name of a Hugging Face data set, ``owner/name`` or ``owner/name:config``. The dev split may
    also be called validation, valid or val.
    """
    kind, path = _kind(source)
    names = names_of_split(split)
    if kind == "file" or kind == "files":
        found = _files_by_name(kind, path, split)
        if found:
            return read_files(f"{path} ({split})", *_chosen(found))
        if kind == "file":
            return read_file(Path(str(path).replace("{split}", names[0])))
        raise MissingDataError(
            f"{path}: no file for the {split} split; wanted {' or '.join(f'{name}*' for name in names)} "
            f"with one of the suffixes {', '.join(FILE_SUFFIXES)}; the directory holds {_listing(path)}"
        )
    available = _load_splits(kind, source)
    found_splits = [name for name in (*names, None) if name in available]
    if not found_splits:
        raise MissingDataError(
            f"{source}: no {split} split; wanted {' or '.join(names)}, found {', '.join(map(str, available))}"
        )
    records = _from_data_set(source, found_splits[0], available[found_splits[0]])
    return replace(records, notes=_not_read(found_splits[1:]))


def files_of(source: str | Path, split: str) -> list[Path]:
    """The files that `read_split` reads for a split; empty for a data set and for a missing split."""
    kind, path = _kind(source)
    return _chosen(_files_by_name(kind, path, split))[0] if kind in ("file", "files") else []


def read_files(origin: str, files: list[Path], others: list[Path], delimiter: str | None = None) -> Records:
    """The rows of ``files``, which must be of one kind and have the same columns.

    ``others`` are files of the same split under its other names. The notes list them as not read, and list
    the files that were joined.
    """
    if len({file.suffix.lower() for file in files}) > 1:
        names = listed([file.name for file in files])
        raise DataError(
            f"{origin}: files of several kinds, {names}; keep one kind, so that no row is read twice"
        )
    _refuse_twice(origin, files)
    parts = [read_file(file, delimiter) for file in files]
    for part in parts[1:]:
        if part.columns != parts[0].columns:
            raise DataError(
                f"{part.origin}: columns {part.columns} differ from {parts[0].columns} in {parts[0].origin}"
            )
    notes = [note for part in parts for note in part.notes]
    if len(parts) > 1:
        notes.append(f"{len(parts)} files joined: {_names(files)}")
    notes += _not_read([file.name for file in others])
    rows = [row for part in parts for row in part.rows]
    return Records(parts[0].origin if len(parts) == 1 else origin, parts[0].columns, rows, tuple(notes))


def read_file(path: Path, delimiter: str | None = None, only: Container[int] | None = None) -> Records:
    """Reads one Parquet, CSV/TSV or JSON-lines file; the suffix decides which.

    ``delimiter`` is for delimited text; None means a tab if the header has one, else a comma. ``only`` has
    the numbers (from 0) of the rows to keep.
    Raises DataError if the file is missing, of an unknown kind, not UTF-8, or not valid for its kind.
    """
    if not path.is_file():
        raise MissingDataError(f"{path}: no such file")
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return read_parquet(path, only)
    if suffix in (".csv", ".tsv"):
        return read_delimited(path, "\t" if suffix == ".tsv" else delimiter, only)
    if suffix in (".jsonl", ".json"):
        return read_json_lines(path, only)
    raise DataError(f"{path}: unknown kind of file; known are {', '.join(FILE_SUFFIXES)}")


@dataclass(frozen=True)
class _Part:
    """A file or split that is yet to be read. read: takes the numbers (from 0) of the rows to keep."""

    count: Callable[[], int]
    read: Callable[[Container[int] | None], Records]


def read_every_split(source: str | Path, limit: int | None = None) -> list[Records]:
    """Reads all of a source of the kinds that `read_split` takes, one `Records` for each file or split.

    ``limit`` keeps that many rows, evenly spaced over all of them. These are counted first, so that no others
    are ever held; of a file of text the text is, while that file is read.
    """
    parts, notes = _parts(source)
    if limit is None:
        found = [part.read(None) for part in parts]
    else:
        ends = [0, *itertools.accumulate(part.count() for part in parts)]
        chosen = evenly(range(ends[-1]), min(limit, ends[-1]))
        found = [
            part.read({number - begin for number in chosen if begin <= number < end})
            for part, (begin, end) in zip(parts, itertools.pairwise(ends), strict=True)
        ]
    if notes:
        found[0] = replace(found[0], notes=(*notes, *found[0].notes))
    return found


def _parts(source: str | Path) -> tuple[list[_Part], tuple[str, ...]]:
    """What a source consists of, and a note if that is several files."""
    kind, path = _kind(source)
    if kind == "file":
        return [_file(path)], ()
    if kind == "files":
        files = _data_files(path)
        if not files:
            raise DataError(
                f"{path}: no file with one of the suffixes {', '.join(FILE_SUFFIXES)}; "
                f"the directory holds {_listing(path)}"
            )
        _refuse_twice(str(path), files)
        joined = (f"{len(files)} files read: {_names(files)}",) if len(files) > 1 else ()
        return [_file(file) for file in files], joined
    return [_split(source, split, data) for split, data in _load_splits(kind, source).items()], ()


def _file(path: Path) -> _Part:
    def count() -> int:
        is_parquet = path.suffix.lower() == ".parquet" and path.is_file()
        return count_parquet(path) if is_parquet else read_file(path, only=()).left_out

    return _Part(count, lambda only: read_file(path, only=only))


def _split(source: str | Path, split: str | None, data: Any) -> _Part:
    return _Part(lambda: len(data), lambda only: _from_data_set(source, split, data, only))


def is_one_file(source: str | Path) -> bool:
    """True if `read_split` would read the same file for every split."""
    return _kind(source)[0] == "file" and "{split}" not in str(source)


def is_one_data_set(source: str | Path) -> bool:
    """True if `read_split` would read the same rows for every split: a saved data set that has no splits."""
    kind, path = _kind(source)
    return kind == "saved" and not (path / "dataset_dict.json").is_file()


def _kind(source: str | Path) -> tuple[Literal["file", "files", "saved", "hub"], Path]:
    """The kind of a source, and its path (meaningless for a data set of the hub)."""
    path = Path(source).expanduser()
    if path.is_dir():
        saved = any((path / name).is_file() for name in ("dataset_dict.json", "state.json"))
        return ("saved" if saved else "files"), path
    looks_like_path = path.suffix.lower() in FILE_SUFFIXES or str(source).startswith(("/", ".", "~"))
    return ("file" if path.is_file() or looks_like_path else "hub"), path


def _data_files(directory: Path) -> list[Path]:
    """The data files in the directory and its `data` folder; else those in its only folder that has any: in a
    snapshot of the hub, the one named after the data set's configuration."""

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


def _files_by_name(kind: str, path: Path, split: str) -> dict[str, list[Path]]:
    """The files of a split by each of its names that has any, the preferred one first."""
    found = {}
    for name in names_of_split(split):
        if kind == "file":
            file = Path(str(path).replace("{split}", name))
            files = [file] if file.is_file() else []
        else:
            pattern = re.compile(rf"{re.escape(name.lower())}([-._ \d]|$)")
            files = [file for file in _data_files(path) if pattern.match(file.stem.lower())]
        if files:
            found[name] = files
    return found


def _chosen(found: dict[str, list[Path]]) -> tuple[list[Path], list[Path]]:
    """The files under the first name, and the others."""
    chosen = next(iter(found.values()), [])
    return chosen, [file for files in found.values() for file in files if file not in chosen]


def _not_read(names: list[Any]) -> tuple[str, ...]:
    return (f"also there, but not read: {listed(names)}",) if names else ()


def _names(files: list[Path]) -> str:
    """The files' names, below the folder that holds all of them."""
    folder = os.path.commonpath([file.parent for file in files])
    return listed([os.path.relpath(file, folder) for file in files])


def _refuse_twice(origin: str, files: list[Path]) -> None:
    """Raises DataError where rows would be read twice: from links to one file, or copies of several kinds."""
    by_inode: dict[tuple[int, int], Path] = {}
    by_stem: dict[Path, Path] = {}
    for file in files:
        stat = file.stat()
        other = by_inode.setdefault((stat.st_dev, stat.st_ino), file)
        if other is not file:
            raise DataError(f"{origin}: {other.name} and {file.name} are one file; keep one of the names")
        other = by_stem.setdefault(file.with_suffix(""), file)
        if other is not file and other.suffix != file.suffix:
            raise DataError(
                f"{origin}: {other.name} and {file.name} differ in kind only; "
                "keep one, so that no row is read twice"
            )


def _load_splits(kind: Literal["saved", "hub"], source: str | Path) -> dict[str | None, Any]:
    """Every split of a data set by name; a saved one without splits has the one name None."""
    import datasets

    name, _, config = str(source).partition(":")
    try:
        loaded = (
            datasets.load_from_disk(str(Path(source).expanduser()))
            if kind == "saved"
            else datasets.load_dataset(name, config or None)
        )
    except Exception as error:  # the loaders raise many kinds
        what = (
            "not a readable saved data set"
            if kind == "saved"
            else "neither a file or directory here nor a Hugging Face data set that could be loaded"
        )
        raise DataError(f"{source}: {what} ({type(error).__name__}: {error})") from error
    if isinstance(loaded, datasets.Dataset):
        return {None: loaded}
    return {str(split): data for split, data in loaded.items()}


def _from_data_set(
    source: str | Path, split: str | None, data: Any, only: Container[int] | None = None
) -> Records:
    origin = str(source) if split is None else f"{source} ({split})"
    try:
        table = data.with_format("arrow")[:]
    except Exception as error:  # as above
        raise DataError(f"{origin}: not readable ({type(error).__name__}: {error})") from error
    return from_batches(origin, table.column_names, table.to_batches(), only)
