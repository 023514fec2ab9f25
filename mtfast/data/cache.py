"""Named arrays in Arrow files, keyed by what they were made from, written atomically, memory-mapped."""

import hashlib
import json
import logging
import os
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import pyarrow
import pyarrow.ipc

logger = logging.getLogger(__name__)

FORMAT = 2
KEPT = 4  # a run needs one; runs with other data or settings may share the directory
Arrays = dict[str, np.ndarray]
Notes = dict[str, Any]


def cache_key(tokenizer: Any, columns: Iterable[list[str]], settings: Notes) -> str:
    """A hex digest of the fast tokenizer (its whole definition), the texts and the settings."""
    definition = json.loads(tokenizer.backend_tokenizer.to_str())
    # These two are left over from the tokenizer's last call; they do not matter here.
    del definition["truncation"], definition["padding"]
    digest = hashlib.sha256(json.dumps([FORMAT, settings, definition], sort_keys=True).encode())
    for texts in columns:
        digest.update(b"%d\n" % len(texts))
        for text in texts:
            encoded = text.encode()
            digest.update(b"%d\n" % len(encoded))
            digest.update(encoded)
    return digest.hexdigest()[:32]


def cached(
    directory: Path, name: str, key: str, build: Callable[[], tuple[Arrays, Notes]]
) -> tuple[Arrays, Notes]:
    """The arrays and notes (JSON values) kept under ``name`` and ``key``, built if missing, stale or torn.

    The arrays are read-only, memory-mapped and one-dimensional. A file is written under another name and
    renamed; a lock makes one process build while others wait. A file that cannot be used is rebuilt with a
    warning in the log. Of the files of one name the `KEPT` that were used last stay; a process that has a
    removed one mapped keeps its contents.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{name}-{key[:16]}.arrow"
    with filelock.FileLock(directory / f"{name}.lock"):
        if path.exists():
            try:
                found = _load(path, key)
                os.utime(path)
                return found
            except (OSError, ValueError, KeyError, TypeError, pyarrow.ArrowException) as error:
                logger.warning("cache file %s is rebuilt: %s", path, error)
        arrays, notes = build()
        temporary = directory / f"{name}.tmp"
        try:
            _store(temporary, key, arrays, notes)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        # Not the newest of them all: this one may be the oldest by a clock that was set back.
        others = set(directory.glob(f"{name}-{'[0-9a-f]' * 16}.arrow")) - {path}
        for old in sorted(others, key=lambda file: file.stat().st_mtime_ns)[: -(KEPT - 1)]:
            old.unlink()
        return _load(path, key)


def checksum(arrays: Arrays) -> int:
    """A 32-bit checksum of names and contents."""
    value = 0
    for name in sorted(arrays):
        value = zlib.crc32(np.ascontiguousarray(arrays[name]).data, zlib.crc32(name.encode(), value))
    return value


def _store(path: Path, key: str, arrays: Arrays, notes: Notes) -> None:
    """One row; every array is one list in it."""
    batch = pyarrow.record_batch(
        {
            name: pyarrow.LargeListArray.from_arrays(
                pyarrow.array([0, len(array)], pyarrow.int64()), pyarrow.array(array)
            )
            for name, array in arrays.items()
        }
    )
    metadata = {
        "key": key,
        "lengths": {name: len(array) for name, array in arrays.items()},
        "checksum": checksum(arrays),
        "notes": notes,
    }
    batch = batch.replace_schema_metadata({"mtfast": json.dumps(metadata)})
    with (
        pyarrow.OSFile(str(path), "wb") as sink,
        pyarrow.ipc.new_file(sink, batch.schema) as writer,
    ):
        writer.write_batch(batch)


def _load(path: Path, key: str) -> tuple[Arrays, Notes]:
    """The arrays and notes of a file; ValueError or an Arrow error if it is not what was asked for."""
    reader = pyarrow.ipc.open_file(pyarrow.memory_map(str(path)))
    metadata = json.loads(reader.schema.metadata[b"mtfast"])
    if metadata["key"] != key:
        raise ValueError("it was made from other data, other settings or with another tokenizer")
    batch = reader.get_batch(0)
    arrays = {name: batch.column(name).values.to_numpy(zero_copy_only=True) for name in batch.schema.names}
    if {name: len(array) for name, array in arrays.items()} != metadata["lengths"]:
        raise ValueError("its lengths are not the recorded ones")
    if checksum(arrays) != metadata["checksum"]:
        raise ValueError("its checksum is not the recorded one")
    return arrays, metadata["notes"]
