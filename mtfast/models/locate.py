"""Where the files of a checkpoint are: in a directory or on the Hugging Face hub, also below modules.json."""

import os
from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from mtfast.models.files import CheckpointError, read_json, restore


def locate(name_or_path: str | os.PathLike[str]) -> tuple[str, str]:
    """(directory or hub name, subfolder of the transformer in a sentence-transformers checkpoint).

    Raises:
        CheckpointError: there is no such checkpoint.
    """
    name = os.path.expanduser(os.fspath(name_or_path))
    path = Path(name).absolute()
    restore(path)
    if not path.is_dir() and (name.startswith((".", os.sep)) or name.count("/") > 1 or path.is_file()):
        what = "is a file, not a checkpoint directory" if path.is_file() else "does not exist"
        raise CheckpointError(f"{name_or_path} {what}")
    if find_file(name, "", "config.json") is None:
        modules = find_file(name, "", "modules.json")
        for module in read_json(modules, list) if modules is not None else ():
            if not isinstance(module, dict) or not isinstance(module.get("path", ""), str):
                raise CheckpointError(
                    f"{modules} should list modules with a type and a path, found {module!r}"
                )
            if str(module.get("type", "")).endswith(".Transformer") and module.get("path"):
                return name, module["path"]
    return name, ""


def find_file(source: str, subfolder: str, filename: str) -> Path | None:
    """A file of a checkpoint, from its directory or through Hugging Face's cache; None if it has none."""
    if Path(source).is_dir():
        file = Path(source, subfolder, filename)
        if file.is_dir():
            raise CheckpointError(f"{file} is a directory; it should be a file")
        return file if file.is_file() else None
    try:
        return Path(hf_hub_download(source, filename, subfolder=subfolder or None))
    except (OSError, ValueError) as error:
        offline = isinstance(error, LocalEntryNotFoundError)
        # Without a connection an optional file counts as absent: the config tells that there is a checkpoint.
        if isinstance(error, EntryNotFoundError) and not (offline and filename == "config.json"):
            return None
        raise CheckpointError(
            f"{source} is neither a directory nor a checkpoint that Hugging Face can provide: {error}"
        ) from error
