"""Files of a checkpoint: read with errors that name them, and written as directories that appear whole."""

import errno
import json
import os
import pickle
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mtfast.durable import sync, sync_tree
from mtfast.errors import Error

# What a file system answers that has no links, or no more of one file, or not to another disk.
_NO_LINKS = (errno.EPERM, errno.EACCES, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EXDEV)


class CheckpointError(Error, ValueError):
    """A checkpoint that cannot be read, or that is not what the run needs."""


def read_json(file: Path, kind: type[dict] | type[list]) -> Any:
    """The value in a JSON file, a `kind` (dict or list).

    Raises:
        CheckpointError: it cannot be read, or holds something else.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(value, kind):
        wanted = "an object" if kind is dict else "a list"
        raise CheckpointError(f"{file} should hold {wanted}, not {value!r:.60}")
    return value


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors in a safetensors file or in one that torch.save wrote, by name.

    Raises:
        CheckpointError: it cannot be read, or holds something else.
    """
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        found = torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror or error}") from error
    except (SafetensorError, pickle.UnpicklingError, EOFError, RuntimeError) as error:
        raise CheckpointError(f"{file} is torn or not a file of tensors: {error}") from error
    if not isinstance(found, dict) or not all(isinstance(tensor, Tensor) for tensor in found.values()):
        raise CheckpointError(f"{file} should hold tensors by name; it holds something else")
    return found


@contextmanager
def replacing(directory: str | os.PathLike[str]) -> Iterator[Path]:
    """An empty directory to fill, which takes the place of `directory`, and is on the disk, where filling it
    raises nothing.

    Raises:
        CheckpointError: the disk is full, or may not be written to; nothing of the attempt stays.
    """
    target = Path(directory).absolute()
    incoming, outgoing = target.with_name(f".{target.name}.incoming"), _outgoing(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(incoming, ignore_errors=True)
        incoming.mkdir()
        yield incoming
        sync_tree(incoming)
        restore(target)
        shutil.rmtree(outgoing, ignore_errors=True)
        if target.exists():
            target.rename(outgoing)
        incoming.rename(target)
        sync(target.parent)
    except BaseException as error:
        shutil.rmtree(incoming, ignore_errors=True)
        # The tokenizers library raises plain exceptions.
        if isinstance(error, OSError | SafetensorError) or "(os error " in str(error):
            reason = getattr(error, "strerror", None) or error
            raise CheckpointError(f"{target} cannot be written: {reason}") from error
        raise
    shutil.rmtree(outgoing, ignore_errors=True)


def link_files(source: Path, directory: Path) -> None:
    """Give `directory`, which is there, the files of `source`: as links to them, so that they have no second
    place on disk, or copies where the file system has no links."""
    for file in sorted(source.rglob("*")):
        target = directory / file.relative_to(source)
        if file.is_dir():
            target.mkdir()
        else:
            _link(file, target)


def replace_by_links(directory: Path, source: Path) -> None:
    """Make `directory` one of links to the files of `source`, in place of what it was."""
    with replacing(directory) as incoming:
        link_files(source, incoming)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        shutil.copyfile(source, target)


def save_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors on any device to a safetensors file."""
    # safetensors wants every tensor to own its storage: the parts of a fused projection do not.
    owned: dict[str, Tensor] = {}
    storages = set()
    for name, tensor in tensors.items():
        x = tensor.detach().cpu()
        storage = x.untyped_storage()
        if not x.is_contiguous() or storage.nbytes() != x.nbytes or storage.data_ptr() in storages:
            x = x.clone(memory_format=torch.contiguous_format)
        storages.add(x.untyped_storage().data_ptr())
        owned[name] = x
    save_file(owned, file, metadata={"format": "pt"})


def _outgoing(directory: Path) -> Path:
    return directory.with_name(f".{directory.name}.outgoing")


def restore(directory: Path) -> None:
    """Undo the first half of a replacement that was interrupted between its two renames."""
    if not directory.exists() and _outgoing(directory).exists():
        _outgoing(directory).rename(directory)
