"""Checkpoints: Hugging Face BERT in, Hugging Face BERT out, with mtfast's heads beside it.

A saved directory holds `model.safetensors` and `config.json` as `BertModel.from_pretrained` and
`BertForPreTraining.from_pretrained` read them, the tokenizer's files, and, for a model with task heads,
`heads.safetensors` and `mtfast.json` with the heads' configuration.
"""

import copy
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from torch import Tensor
from transformers import AutoTokenizer, BertConfig, PreTrainedTokenizerBase

from mtfast.models.bert import PackedBert, check_config
from mtfast.models.files import CheckpointError, read_json, read_tensors, replacing, restore, save_tensors
from mtfast.models.multitask import HeadsConfig, MultiTaskHeads, MultiTaskModel, PretrainModel
from mtfast.models.names import from_hf_state_dict, hf_state_dict

__all__ = [
    "CheckpointError",
    "LoadReport",
    "from_hf_state_dict",
    "hf_state_dict",
    "load_bert_config",
    "load_heads_config",
    "load_pretrained",
    "load_tokenizer",
    "save_heads",
    "save_pretrained",
]

_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_HEADS_FILE = "heads.safetensors"
_HEADS_CONFIG_FILE = "mtfast.json"
_FORMAT = 1
_SUPPORTED = "mtfast reads BERT encoders (model_type 'bert') with absolute positions"


@dataclass(frozen=True)
class LoadReport:
    """What `load_pretrained` did.

    source: the name or path given.
    initialised: parameters of the model that the checkpoint lacks; they keep their fresh values.
    carried: tensors of the checkpoint (pooler, pre-training heads) that this model has no place for, under
        mtfast's names; `save_pretrained` writes them back.
    ignored: names in the checkpoint that mtfast has no use for.
    """

    source: str
    initialised: tuple[str, ...]
    carried: dict[str, Tensor]
    ignored: tuple[str, ...]

    def summary(self) -> str:
        """One line for people."""

        def parts(names: Any) -> str:
            split = (name.split(".") for name in names)
            short = (".".join(part[: 3 if part[0] == "encoder" else 2]) for part in split)
            return ", ".join(dict.fromkeys(short))

        text = f"loaded {self.source}"
        if self.initialised:
            text += f"; freshly initialised: {parts(self.initialised)}"
        if self.carried:
            text += f"; kept for saving: {parts(self.carried)}"
        if self.ignored:
            text += f"; ignored: {', '.join(self.ignored)}"
        return text


def load_bert_config(name_or_path: str | os.PathLike[str]) -> BertConfig:
    """The config of a BERT checkpoint: a directory (also a sentence-transformers one) or a Hugging Face name.

    Raises:
        CheckpointError: there is no such checkpoint, or it is of another architecture, which is named.
    """
    source, subfolder = _locate(name_or_path)
    file = _file(source, subfolder, "config.json")
    if file is None:
        raise CheckpointError(f"{name_or_path} has no config.json: it is not a Hugging Face checkpoint")
    fields = read_json(file, dict)
    model_type = fields.get("model_type")
    architectures = fields.get("architectures") or []
    named_bert = model_type == "bert" or (
        model_type is None and architectures and all(str(name).startswith("Bert") for name in architectures)
    )
    if not named_bert:
        raise CheckpointError(
            f"{name_or_path} is a checkpoint of another architecture: model_type {model_type!r}, "
            f"architectures {architectures}; {_SUPPORTED}"
        )
    try:
        config = BertConfig.from_dict(fields)
        position_type = fields.get("position_embedding_type", "absolute")
        if position_type != "absolute":
            raise ValueError(f"position_embedding_type is {position_type!r}; only 'absolute' is supported")
        check_config(config)
    except Exception as error:  # transformers' strict configs raise several kinds
        raise CheckpointError(f"{name_or_path}: {error}; {_SUPPORTED}") from error
    return config


def load_tokenizer(name_or_path: str | os.PathLike[str]) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint, with the special tokens that packing and masking need.

    Raises:
        CheckpointError: there is none, or it lacks [CLS], [SEP], [MASK] or [PAD], or has nothing else.
    """
    source, subfolder = _locate(name_or_path)
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


def load_heads_config(name_or_path: str | os.PathLike[str]) -> HeadsConfig | None:
    """The configuration of the task heads saved with a checkpoint; None where it has none."""
    file = _file(*_locate(name_or_path), _HEADS_CONFIG_FILE)
    if file is None:
        return None
    fields = read_json(file, dict)
    if fields.get("format") != _FORMAT:
        raise CheckpointError(f"{file} has format {fields.get('format')!r}; this mtfast reads {_FORMAT}")
    try:
        return HeadsConfig(**fields["heads"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file} does not describe task heads: {error}") from error


def load_pretrained(
    name_or_path: str | os.PathLike[str], model: PackedBert | PretrainModel | MultiTaskModel | MultiTaskHeads
) -> LoadReport:
    """Copies a checkpoint's weights into `model`, in the model's dtype and on its device.

    The encoder must be in the checkpoint, whole; pre-training and task heads that it lacks keep their fresh
    values and are reported. Task heads are loaded where the checkpoint has them.

    Raises:
        CheckpointError: another architecture, a missing or torn file, a tensor that is missing, differently
            shaped or not finite, or task heads configured otherwise than the model's; the message names it.
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
    heads = model if isinstance(model, MultiTaskHeads) else getattr(model, "heads", None)
    if heads is not None:
        found |= _read_heads(name_or_path, heads.config)
    missing = [name for name in wanted if name not in found and name != "mlm.decoder_weight"]
    lacking = [name for name in missing if name.startswith("encoder.")]
    if lacking:
        more = f" and {len(lacking) - 3} more" if len(lacking) > 3 else ""
        raise CheckpointError(
            f"{name_or_path} lacks weights of the encoder: {', '.join(lacking[:3])}{more}; "
            f"{len(ignored)} of its tensors have names that BERT does not"
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
    heads: HeadsConfig | None = None,
    carried: Mapping[str, Tensor] | None = None,
) -> None:
    """Writes a checkpoint that Hugging Face's BertModel and BertForPreTraining open.

    The directory appears whole or not at all; one that was there is replaced.

    Args:
        directory: where to; its parents are made.
        state_dict: of a PackedBert, PretrainModel or MultiTaskModel, on any device.
        config: the encoder's.
        tokenizer: saved beside the weights, or None.
        heads: configuration of the `heads.*` in state_dict; needed where it has any.
        carried: `LoadReport.carried` of the checkpoint the weights came from.

    Raises:
        ValueError: state_dict has task heads and `heads` is None, or the reverse.
    """
    if "embeddings.word" in state_dict:  # a bare PackedBert
        state_dict = {f"encoder.{name}": tensor for name, tensor in state_dict.items()}
    task_heads = {name: x for name, x in state_dict.items() if name.startswith("heads.")}
    if bool(task_heads) != (heads is not None):
        raise ValueError("heads must be given exactly when state_dict holds task heads (heads.*)")
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
        if heads is not None:
            _write_heads(incoming, task_heads, heads)


def save_heads(
    directory: str | os.PathLike[str], state_dict: Mapping[str, Tensor], config: HeadsConfig
) -> None:
    """Writes the state dict of a MultiTaskHeads alone, for `load_pretrained` into one.

    The directory appears whole or not at all; one that was there is replaced.
    """
    with replacing(directory) as incoming:
        _write_heads(incoming, {f"heads.{name}": tensor for name, tensor in state_dict.items()}, config)


def _write_heads(directory: Path, tensors: Mapping[str, Tensor], config: HeadsConfig) -> None:
    save_tensors(directory / _HEADS_FILE, tensors)
    text = json.dumps({"format": _FORMAT, "heads": asdict(config)}, indent=2)
    (directory / _HEADS_CONFIG_FILE).write_text(text + "\n", encoding="utf-8")


def _locate(name_or_path: str | os.PathLike[str]) -> tuple[str, str]:
    """(directory or hub name, subfolder of the transformer in a sentence-transformers checkpoint)."""
    name = os.path.expanduser(os.fspath(name_or_path))
    path = Path(name).absolute()
    restore(path)
    if not path.is_dir() and (name.startswith((".", os.sep)) or name.count("/") > 1 or path.is_file()):
        what = "is a file, not a checkpoint directory" if path.is_file() else "does not exist"
        raise CheckpointError(f"{name_or_path} {what}")
    if _file(name, "", "config.json") is None:
        modules = _file(name, "", "modules.json")
        for module in read_json(modules, list) if modules is not None else ():
            if not isinstance(module, dict) or not isinstance(module.get("path", ""), str):
                raise CheckpointError(
                    f"{modules} should list modules with a type and a path, found {module!r}"
                )
            if str(module.get("type", "")).endswith(".Transformer") and module.get("path"):
                return name, module["path"]
    return name, ""


def _file(source: str, subfolder: str, filename: str) -> Path | None:
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


def _read_weights(name_or_path: str | os.PathLike[str]) -> dict[str, Tensor]:
    source, subfolder = _locate(name_or_path)
    for filename in _WEIGHTS:
        if (file := _file(source, subfolder, filename)) is not None:
            return read_tensors(file)
        if (index := _file(source, subfolder, f"{filename}.index.json")) is not None:
            tensors: dict[str, Tensor] = {}
            shards = read_json(index, dict).get("weight_map")
            if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
                raise CheckpointError(f"{index} has no weight_map from names of weights to names of files")
            for shard in sorted(set(shards.values())):
                file = _file(source, subfolder, shard)
                if file is None:
                    raise CheckpointError(f"{index} names {shard}, which is not there")
                tensors |= read_tensors(file)
            return tensors
    raise CheckpointError(f"{name_or_path} has neither {' nor '.join(_WEIGHTS)}, whole or in shards")


def _read_heads(name_or_path: str | os.PathLike[str], config: HeadsConfig) -> dict[str, Tensor]:
    saved = load_heads_config(name_or_path)
    if saved is None:
        return {}
    for field in ("sentiment", "pair_input", "inner", "activation"):
        if getattr(saved, field) != getattr(config, field):
            raise CheckpointError(
                f"the task heads of {name_or_path} have {field} = {getattr(saved, field)!r}, "
                f"this run asks for {field} = {getattr(config, field)!r}"
            )
    file = _file(*_locate(name_or_path), _HEADS_FILE)
    if file is None:
        raise CheckpointError(f"{name_or_path} has {_HEADS_CONFIG_FILE} but no {_HEADS_FILE}")
    return read_tensors(file)
