"""Checkpoints: Hugging Face BERT in, Hugging Face BERT out, with mtfast's heads beside it.

A saved directory holds `model.safetensors` and `config.json` as `BertModel.from_pretrained` and
`BertForPreTraining.from_pretrained` read them, the tokenizer's files, and, for a model with task heads,
`heads.safetensors` and `mtfast.json` with what the tasks and their heads are, and the files that make
sentence-transformers give the [CLS] vectors which the heads are trained on.
"""

import copy
import json
import os
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, BertConfig, PreTrainedTokenizerBase

from mtfast.models.bert import PackedBert
from mtfast.models.bert_config import load_bert_config
from mtfast.models.files import CheckpointError, read_json, read_tensors, replacing, save_tensors
from mtfast.models.format_1 import read_format_1
from mtfast.models.locate import find_file, locate
from mtfast.models.multitask import MultiTaskHeads, MultiTaskModel, sharing
from mtfast.models.names import from_hf_state_dict, hf_state_dict
from mtfast.models.pretraining import PretrainModel
from mtfast.models.sentence_files import write_sentence_files
from mtfast.tasks import MlpConfig, Task

__all__ = [
    "CheckpointError",
    "LoadReport",
    "checksum_of_weights",
    "from_hf_state_dict",
    "hf_state_dict",
    "load_bert_config",
    "load_pretrained",
    "load_tasks",
    "load_tokenizer",
    "save_heads",
    "save_pretrained",
]

_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_HEADS_FILE = "heads.safetensors"
_TASKS_FILE = "mtfast.json"
_FORMAT = 2
# Fields of a Task that say nothing of the model.
_OF_DATA = ("aliases", "source", "splits", "max_rows", "weight")


@dataclass(frozen=True)
class LoadReport:
    """What `load_pretrained` did.

    checkpoint: the name or path given.
    initialised: parameters of the model that the checkpoint lacks; they keep their fresh values.
    carried: tensors of the checkpoint (pooler, pre-training heads) that this model has no place for, under
        mtfast's names; `save_pretrained` writes them back.
    ignored: names in the checkpoint that mtfast has no use for.
    """

    checkpoint: str
    initialised: tuple[str, ...]
    carried: dict[str, Tensor]
    ignored: tuple[str, ...]

    def summary(self) -> str:
        """One line for people."""

        def parts(names: Any) -> str:
            split = (name.split(".") for name in names)
            short = (".".join(part[: 3 if part[0] == "encoder" else 2]) for part in split)
            return ", ".join(dict.fromkeys(short))

        heads = [name for name in self.ignored if name.startswith("heads.")]
        others = [name for name in self.ignored if name not in heads]

        text = f"loaded {self.checkpoint}"
        if self.initialised:
            text += f"; freshly initialised: {parts(self.initialised)}"
        if self.carried:
            text += f"; kept for saving: {parts(self.carried)}"
        if self.ignored:
            text += f"; ignored: {', '.join(filter(None, (parts(heads), *others)))}"
        return text


def load_tokenizer(name_or_path: str | os.PathLike[str]) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint, with the special tokens that packing and masking need.

    Raises:
        CheckpointError: there is none, or it lacks [CLS], [SEP], [MASK] or [PAD], or has nothing else.
    """
    source, subfolder = locate(name_or_path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, subfolder=subfolder)
    except Exception as error:  # transformers raises several kinds, each with a text for people
        raise CheckpointError(
            f"{name_or_path} has no tokenizer that transformers can load: {error}"
        ) from error
    missing = [
        name
        for name in ("cls_token", "sep_token", "mask_token", "pad_token")
        if getattr(tokenizer, name) is None
    ]
    if missing:
        raise CheckpointError(f"the tokenizer of {name_or_path} has no {', '.join(missing)}")
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # what transformers 5 makes of missing files
        raise CheckpointError(
            f"{name_or_path} has no tokenizer: {len(tokenizer)} special tokens were found, no word pieces; "
            "its tokenizer.json or vocab.txt is missing or empty"
        )
    return tokenizer


def load_tasks(name_or_path: str | os.PathLike[str]) -> tuple[dict[str, Task], MlpConfig] | None:
    """The tasks whose heads were saved with a checkpoint, and what their MLPs are like; None if it has none.

    Raises:
        CheckpointError: the file that says so cannot be read, or is of another version.
    """
    file = find_file(*locate(name_or_path), _TASKS_FILE)
    if file is None:
        return None
    fields = read_json(file, dict)
    if fields.get("format") != _FORMAT:
        raise CheckpointError(f"{file} has format {fields.get('format')!r}; this mtfast reads {_FORMAT}")
    try:
        tasks = {name: Task(**_tuples(declared)) for name, declared in fields["tasks"].items()}
        return tasks, MlpConfig(**fields["mlp"])
    except (AttributeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file} does not describe tasks and their heads: {error}") from error


def _tuples(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}


def load_pretrained(
    name_or_path: str | os.PathLike[str], model: PackedBert | PretrainModel | MultiTaskModel | MultiTaskHeads
) -> LoadReport:
    """Copies a checkpoint's weights into `model`, in the model's dtype and on its device.

    The encoder must be in the checkpoint, whole; pre-training and task heads that it lacks keep their fresh
    values and are reported, as are heads of tasks that the model does not have.

    Raises:
        CheckpointError: another architecture, a missing or torn file, a tensor that is missing, differently
            shaped or not finite, or a task's head of another form than the model's; the message names it.
    """
    prefix = (
        "encoder." if isinstance(model, PackedBert) else "heads." if isinstance(model, MultiTaskHeads) else ""
    )
    wanted = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    found: dict[str, Tensor] = {}
    ignored: list[str] = []
    if not isinstance(model, MultiTaskHeads):
        load_bert_config(name_or_path)
        tensors = _read_weights(name_or_path)
        try:
            found, ignored = from_hf_state_dict(tensors)
        except ValueError as error:
            raise CheckpointError(f"{name_or_path}: {error}") from error
    unknown = len(ignored)
    heads = model if isinstance(model, MultiTaskHeads) else getattr(model, "heads", None)
    if heads is not None:
        of_heads = _read_heads(name_or_path, heads)
        found |= {name: tensor for name, tensor in of_heads.items() if name in wanted}
        ignored += [name for name in of_heads if name not in wanted]
    missing = [name for name in wanted if name not in found and name != "mlm.decoder_weight"]
    lacking = [name for name in missing if name.startswith("encoder.")]
    if lacking:
        more = f" and {len(lacking) - 3} more" if len(lacking) > 3 else ""
        raise CheckpointError(
            f"{name_or_path} lacks weights of the encoder: {', '.join(lacking[:3])}{more}; "
            f"{unknown} of its tensors have names that BERT does not"
        )
    for name, tensor in found.items():
        if name in wanted and tensor.shape != wanted[name].shape:
            raise CheckpointError(
                f"{name_or_path}: {name} is {list(tensor.shape)}, the model's is {list(wanted[name].shape)}"
            )
        if name in wanted and not (finite := tensor.isfinite()).all():
            bad = tensor.numel() - int(finite.sum())
            raise CheckpointError(
                f"{name_or_path}: {bad:,} of the {tensor.numel():,} values of {name} are not finite, so "
                "nothing can be computed with it; take another checkpoint"
            )
    state = {name.removeprefix(prefix): tensor for name, tensor in found.items() if name in wanted}
    model.load_state_dict(state, strict=False)
    carried = {name: tensor for name, tensor in found.items() if name not in wanted}
    return LoadReport(str(name_or_path), tuple(missing), carried, tuple(ignored))


def save_pretrained(
    directory: str | os.PathLike[str],
    state_dict: Mapping[str, Tensor],
    config: BertConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    tasks: Mapping[str, Task] | None = None,
    mlp: MlpConfig | None = None,
    max_length: int | None = None,
    carried: Mapping[str, Tensor] | None = None,
) -> None:
    """Writes a checkpoint that Hugging Face's BertModel and BertForPreTraining open, and with task heads also
    sentence-transformers, which then gives the [CLS] vectors.

    The directory appears whole or not at all; one that was there is replaced.

    Args:
        directory: where to; its parents are made.
        state_dict: of a PackedBert, PretrainModel or MultiTaskModel, on any device.
        config: the encoder's.
        tokenizer: saved beside the weights, or None.
        tasks, mlp: what the `heads.*` in state_dict are the heads of, as `MultiTaskHeads` takes them; needed
            where it has any.
        max_length: word pieces of the longest sequence that the heads are trained on; needed with them.
        carried: `LoadReport.carried` of the checkpoint the weights came from.

    Raises:
        ValueError: state_dict has task heads and `tasks`, `mlp` or `max_length` is None, or the reverse.
    """
    if "embeddings.word" in state_dict:  # a bare PackedBert
        state_dict = {f"encoder.{name}": tensor for name, tensor in state_dict.items()}
    task_heads = {name: x for name, x in state_dict.items() if name.startswith("heads.")}
    if not bool(task_heads) == (tasks is not None) == (mlp is not None) == (max_length is not None):
        raise ValueError(
            "tasks, mlp and max_length must be given exactly when state_dict holds task heads (heads.*)"
        )
    tensors = hf_state_dict({**(carried or {}), **state_dict})
    config = copy.deepcopy(config)
    prefixed = any(name.startswith("bert.") for name in tensors)
    config.architectures = ["BertForPreTraining" if prefixed else "BertModel"]
    config.dtype = state_dict["encoder.embeddings.word"].dtype
    with replacing(directory) as incoming:
        config.save_pretrained(incoming)
        if tokenizer is not None:
            tokenizer.save_pretrained(incoming)
        save_tensors(incoming / _WEIGHTS[0], tensors)
        if tasks is not None and mlp is not None and max_length is not None:
            _write_heads(incoming, task_heads, tasks, mlp)
            write_sentence_files(incoming, config.hidden_size, max_length)


def save_heads(
    directory: str | os.PathLike[str],
    state_dict: Mapping[str, Tensor],
    tasks: Mapping[str, Task],
    mlp: MlpConfig,
) -> None:
    """Writes the state dict of a MultiTaskHeads alone, for `load_pretrained` into one.

    The directory appears whole or not at all; one that was there is replaced.
    """
    with replacing(directory) as incoming:
        _write_heads(incoming, {f"heads.{name}": tensor for name, tensor in state_dict.items()}, tasks, mlp)


def _write_heads(
    directory: Path, tensors: Mapping[str, Tensor], tasks: Mapping[str, Task], mlp: MlpConfig
) -> None:
    save_tensors(directory / _HEADS_FILE, tensors)
    described = {
        name: {field: value for field, value in asdict(task).items() if field not in _OF_DATA}
        for name, task in tasks.items()
    }
    text = json.dumps({"format": _FORMAT, "tasks": described, "mlp": asdict(mlp)}, indent=2)
    (directory / _TASKS_FILE).write_text(text + "\n", encoding="utf-8")


def checksum_of_weights(name_or_path: str | os.PathLike[str]) -> int:
    """A 32-bit checksum of a checkpoint's tensors, their names and contents."""
    value = 0
    for name, tensor in sorted(_read_weights(name_or_path).items()):
        contents = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
        value = zlib.crc32(contents.data, zlib.crc32(name.encode(), value))
    return value


def _read_weights(name_or_path: str | os.PathLike[str]) -> dict[str, Tensor]:
    source, subfolder = locate(name_or_path)
    for filename in _WEIGHTS:
        if (file := find_file(source, subfolder, filename)) is not None:
            return read_tensors(file)
        if (index := find_file(source, subfolder, f"{filename}.index.json")) is not None:
            tensors: dict[str, Tensor] = {}
            shards = read_json(index, dict).get("weight_map")
            if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
                raise CheckpointError(f"{index} has no weight_map from names of weights to names of files")
            for shard in sorted(set(shards.values())):
                file = find_file(source, subfolder, shard)
                if file is None:
                    raise CheckpointError(f"{index} names {shard}, which is not there")
                tensors |= read_tensors(file)
            return tensors
    raise CheckpointError(f"{name_or_path} has neither {' nor '.join(_WEIGHTS)}, whole or in shards")


def _read_heads(name_or_path: str | os.PathLike[str], heads: MultiTaskHeads) -> dict[str, Tensor]:
    """The tensors of the task heads that a checkpoint has, by their names in `MultiTaskModel`."""
    described = find_file(*locate(name_or_path), _TASKS_FILE)
    if described is None:
        return {}
    fields = read_json(described, dict)
    saved = None if fields.get("format") == 1 else load_tasks(name_or_path)
    file = find_file(*locate(name_or_path), _HEADS_FILE)
    if file is None:
        raise CheckpointError(f"{name_or_path} has {_TASKS_FILE} but no {_HEADS_FILE}")
    if saved is None:
        difference, tensors = read_format_1(fields, read_tensors(file), heads.tasks, heads.mlp)
    else:
        difference, tensors = _difference(*saved, heads), read_tensors(file)
    if difference is not None:
        what, there, here = difference
        raise CheckpointError(
            f"the task heads of {name_or_path} have {what} = {there!r}, this run asks for {what} = {here!r}"
        )
    there = {name.split(".")[1] for name in tensors}
    for name in heads.state_dict():
        head, _, part = name.partition(".")
        if head in there and f"heads.{name}" not in tensors:
            raise CheckpointError(
                f"the head {head} of {name_or_path} has no {part}: it is of an earlier mtfast, or not whole; "
                "train the heads again"
            )
    return tensors


def _difference(
    tasks: Mapping[str, Task], mlp: MlpConfig, heads: MultiTaskHeads
) -> tuple[str, Any, Any] | None:
    """The first thing in which heads of one name differ: what it is, there and here."""
    theirs = sharing(tasks)
    for head, names in sharing(heads.tasks).items():
        if head not in theirs:
            continue
        if theirs[head] != names:
            return f"tasks of {head}", ", ".join(theirs[head]), ", ".join(names)
        for name in names:
            for field in ("kind", "outputs", "head", "pair_input"):
                there, here = getattr(tasks[name], field), getattr(heads.tasks[name], field)
                if there != here:
                    return f"{name}.{field}", there, here
            there, here = tasks[name].classes, heads.tasks[name].classes
            if there != here and isinstance(there, tuple) and isinstance(here, tuple):
                return f"{name}.classes", there, here
        for field in ("width", "activation") if heads.tasks[names[0]].head != "linear" else ():
            if getattr(mlp, field) != getattr(heads.mlp, field):
                return f"mlp.{field}", getattr(mlp, field), getattr(heads.mlp, field)
    return None
