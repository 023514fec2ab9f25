"""Sources of records: files, directories of files, saved data sets and data sets of the hub, by split."""

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from mtfast.data.files import FILE_SUFFIXES, from_table, read_file
from mtfast.data.rows import DataError, MissingDataError, Records, listed

_NOT_DATA = (".", "dataset_info")  # hidden files, and what `datasets` writes beside its data
SPLIT_NAMES = {
    "train": ("train",),
    "dev": ("dev", "validation", "valid", "val"),
    "test": ("test", "test-student"),
}


def read_split(source: str | Path, split: str) -> Records:
    """Reads one split ("train", "dev" or "test") of a source.

    A source is one file (whatever the split) or, with ``{split}`` in its name, one for each; a directory with
    `save_to_disk` output, or with files ``<split>*.<suffix>`` in it, its ``data`` folder or else its only
    folder; or the name of a Hugging Face data set, ``owner/name`` or ``owner/name:config``. The dev split may
    also be called validation, valid or val.
    """
    kind, path = _kind(source)
    names = SPLIT_NAMES[split]
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
    return replace(records, notes=_left_alone(found_splits[1:]))


def files_of(source: str | Path, split: str) -> list[Path]:
    """The files that `read_split` reads for a split; none for a data set, or where there is none."""
    kind, path = _kind(source)
    return _chosen(_files_by_name(kind, path, split))[0] if kind in ("file", "files") else []


def read_files(origin: str, files: list[Path], others: list[Path], delimiter: str | None = None) -> Records:
    """The rows of ``files``, which must be of one kind and have the same columns.

    ``others`` might have been meant too; that they were not read is noted, as is which files were joined.
    """
    if len({file.suffix.lower() for file in files}) > 1:
        names = listed([file.name for file in files])
        raise DataError(f"{origin}: files of several kinds, {names}; keep one kind, lest rows are read twice")
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
    notes += _left_alone([file.name for file in others])
    rows = [row for part in parts for row in part.rows]
    return Records(parts[0].origin if len(parts) == 1 else origin, parts[0].columns, rows, tuple(notes))


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
        _refuse_twice(str(path), files)
        parts = [read_file(file) for file in files]
        if len(files) > 1:
            joined = f"{len(files)} files read: {_names(files)}"
            parts[0] = replace(parts[0], notes=(joined, *parts[0].notes))
        return parts
    return [_from_data_set(source, split, data) for split, data in _load_splits(kind, source).items()]


def is_one_file(source: str | Path) -> bool:
    """True if `read_split` would read the same file for every split."""
    return _kind(source)[0] == "file" and "{split}" not in str(source)


def is_one_data_set(source: str | Path) -> bool:
    """True if `read_split` would read the same rows for every split: a saved data set that has no splits."""
    kind, path = _kind(source)
    return kind == "saved" and not (path / "dataset_dict.json").is_file()


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


def _files_by_name(kind: str, path: Path, split: str) -> dict[str, list[Path]]:
    """The files of a split under each of its names that has some, the name to be preferred first."""
    found = {}
    for name in SPLIT_NAMES[split]:
        if kind == "file":
            file = Path(str(path).replace("{split}", name))
            files = [file] if file.is_file() else []
        else:
            pattern = re.compile(rf"{name}([-._ \d]|$)")
            files = [file for file in _data_files(path) if pattern.match(file.stem.lower())]
        if files:
            found[name] = files
    return found


def _chosen(found: dict[str, list[Path]]) -> tuple[list[Path], list[Path]]:
    """The files under the first name, and the others."""
    chosen = next(iter(found.values()), [])
    return chosen, [file for files in found.values() for file in files if file not in chosen]


def _left_alone(names: list[Any]) -> tuple[str, ...]:
    return (f"also there, but not read: {listed(names)}",) if names else ()


def _names(files: list[Path]) -> str:
    """The files' names, below the folder that holds all of them."""
    folder = os.path.commonpath([file.parent for file in files])
    return listed([os.path.relpath(file, folder) for file in files])


def _refuse_twice(origin: str, files: list[Path]) -> None:
    """Raises DataError where rows would be read twice: from links to one file, or copies of several kinds."""
    by_place: dict[tuple[int, int], Path] = {}
    by_stem: dict[Path, Path] = {}
    for file in files:
        stat = file.stat()
        other = by_place.setdefault((stat.st_dev, stat.st_ino), file)
        if other is not file:
            raise DataError(f"{origin}: {other.name} and {file.name} are one file; keep one of the names")
        other = by_stem.setdefault(file.with_suffix(""), file)
        if other is not file and other.suffix != file.suffix:
            raise DataError(
                f"{origin}: {other.name} and {file.name} differ in kind only; "
                "keep one, lest rows are read twice"
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
    except Exception as error:  # the loaders raise many kinds, and all mean the same to the caller
        what = (
            "not a readable saved data set"
            if kind == "saved"
            else "neither a file or directory here nor a Hugging Face data set that could be loaded"
        )
        raise DataError(f"{source}: {what} ({type(error).__name__}: {error})") from error
    if isinstance(loaded, datasets.Dataset):
        return {None: loaded}
    return {str(split): data for split, data in loaded.items()}


def _from_data_set(source: str | Path, split: str | None, data: Any) -> Records:
    origin = str(source) if split is None else f"{source} ({split})"
    try:
        table = data.with_format("arrow")[:]
    except Exception as error:  # as above
        raise DataError(f"{origin}: not readable ({type(error).__name__}: {error})") from error
    return from_table(origin, table)
