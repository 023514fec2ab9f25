"""Files of a checkpoint: read with errors that name them, and written as directories that appear whole."""

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

from mtfast.errors import Error


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
    """An empty directory to fill, which takes the place of `directory` where filling it raises nothing.

    Raises:
        CheckpointError: the disk is full, or may not be written to; nothing of the attempt stays.
    """
    target = Path(directory).absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    incoming = target.with_name(f".{target.name}.incoming")
    shutil.rmtree(incoming, ignore_errors=True)
    try:
        incoming.mkdir()
        yield incoming
    except BaseException as error:
        shutil.rmtree(incoming, ignore_errors=True)
        # The tokenizers library raises plain exceptions.
        if isinstance(error, OSError | SafetensorError) or "(os error " in str(error):
            raise CheckpointError(f"{target} cannot be written: {error}") from error
        raise
    restore(target)
    outgoing = _outgoing(target)
    shutil.rmtree(outgoing, ignore_errors=True)
    if target.exists():
        target.rename(outgoing)
    incoming.rename(target)
    shutil.rmtree(outgoing, ignore_errors=True)


def link_files(source: Path, directory: Path) -> None:
    """Give `directory`, which is there, the files of `source`: as links to them, so that they have no second
    place on disk, or copies where the file system has no links."""
    shutil.copytree(source, directory, copy_function=_link, dirs_exist_ok=True)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def save_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors on any device to a safetensors file."""
    # safetensors wants every tensor to own its storage: the parts of a fused projection do not.
    owned = {
        name: x.detach().cpu().clone(memory_format=torch.contiguous_format) for name, x in tensors.items()
    }
    save_file(owned, file, metadata={"format": "pt"})


def _outgoing(directory: Path) -> Path:
    return directory.with_name(f".{directory.name}.outgoing")


def restore(directory: Path) -> None:
    """Undo the first half of a replacement that was interrupted between its two renames."""
    if not directory.exists() and _outgoing(directory).exists():
        _outgoing(directory).rename(directory)
