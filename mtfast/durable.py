"""What outlives a loss of power: files that are on the disk before anything counts on them, and manifests by
which damage is seen."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
SEAL = "sha256"  # of an object's other entries
_CHUNK = 1 << 20


def sync(path: Path) -> None:
    """Return when a file's contents, or which names a directory holds, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some file systems cannot sync a directory; they keep no names back either.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise OSError(error.errno, os.strerror(error.errno or 0), str(path)) from error
    finally:
        os.close(descriptor)


def sync_tree(directory: Path) -> None:
    """`sync` all that is in a directory, and the directory last."""
    for path in sorted(directory.rglob("*"), reverse=True):
        sync(path)
    sync(directory)


def manifest_of(directory: Path) -> dict[str, dict[str, Any]]:
    """Size in bytes and SHA-256 of every file in a directory and below, by its path from there."""
    files = sorted(path for path in directory.rglob("*") if path.is_file() and path != directory / MANIFEST)
    digests: dict[tuple[int, int], str] = {}  # several names of one file are read once
    described = {}
    for path in files:
        status = path.stat()
        one = status.st_dev, status.st_ino
        if one not in digests:
            digests[one] = _sha256(path)
        described[path.relative_to(directory).as_posix()] = {"size": status.st_size, "sha256": digests[one]}
    return described


def write_manifest(directory: Path) -> None:
    """Describe in `manifest.json` what is in a directory."""
    text = json.dumps(sealed({"files": manifest_of(directory)}), indent=2) + "\n"
    (directory / MANIFEST).write_text(text, encoding="utf-8")


def read_manifest(directory: Path) -> dict[str, dict[str, Any]]:
    """What `write_manifest` has described. Raises ValueError, saying why, where that cannot be read."""
    path = directory / MANIFEST
    try:
        files = unsealed(json.loads(path.read_text(encoding="utf-8")))["files"]
        return {name: {"size": int(of["size"]), "sha256": str(of["sha256"])} for name, of in files.items()}
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged") from error


def damage(directory: Path, described: dict[str, dict[str, Any]]) -> str | None:
    """What is wrong with the first file that is not as described; None where all are. Others may be there."""
    for name, wanted in described.items():
        path = directory / name
        try:
            size = path.stat().st_size
            if size != wanted["size"]:
                return f"{path} has {size:,} bytes and should have {wanted['size']:,}"
            if _sha256(path) != wanted["sha256"]:
                return f"{path} is damaged: its checksum is not the recorded one"
        except FileNotFoundError:
            return f"{path} is missing"
        except OSError as error:
            return f"{path} cannot be read ({error.strerror})"
    return None


def sealed(values: dict[str, Any]) -> dict[str, Any]:
    """A JSON object with a checksum of what it holds."""
    return {**values, SEAL: _seal_of(values)}


def unsealed(values: dict[str, Any]) -> dict[str, Any]:
    """The object without its checksum; one that has none, as other programs write it, is not looked at.

    Raises:
        ValueError: the checksum is of something else.
    """
    rest = {name: value for name, value in values.items() if name != SEAL}
    if values.get(SEAL, seal := _seal_of(rest)) != seal:
        raise ValueError("its checksum is not the recorded one")
    return rest


def _seal_of(values: dict[str, Any]) -> str:
    read_again = json.loads(json.dumps(values))  # with keys that are text
    return hashlib.sha256(json.dumps(read_again, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
