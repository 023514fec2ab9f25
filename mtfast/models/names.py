"""The names of weights: mtfast's on one side, Hugging Face BERT's on the other.

mtfast's are those of the models' state dicts: `encoder.*`, `mlm.*`, `nsp.*` (and `heads.*`, which Hugging
Face knows nothing of). Hugging Face's are those of `BertForPreTraining` (`bert.*`, `cls.*`) where a
pre-training head is among the tensors, else those of `BertModel`, which have no prefix.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

# Tensors outside the layers, and modules with a weight and a bias.
_TENSORS = {
    "encoder.embeddings.word": "embeddings.word_embeddings.weight",
    "encoder.embeddings.position": "embeddings.position_embeddings.weight",
    "encoder.embeddings.token_type": "embeddings.token_type_embeddings.weight",
    "encoder.embeddings.position_ids": "embeddings.position_ids",  # a buffer old checkpoints hold
    "mlm.bias": "cls.predictions.bias",
}
_MODULES = {
    "encoder.embeddings.norm": "embeddings.LayerNorm",
    "mlm.transform": "cls.predictions.transform.dense",
    "mlm.norm": "cls.predictions.transform.LayerNorm",
    "nsp.pooler": "pooler.dense",
    "nsp.classifier": "cls.seq_relationship",
}
_LAYER_MODULES = {
    "attention.out": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "mlp.up": "intermediate.dense",
    "mlp.down": "output.dense",
    "mlp_norm": "output.LayerNorm",
}
_QKV = ("query", "key", "value")
_LEAVES = ("weight", "bias")
_TIED = "mlm.decoder_weight"


def _table(layers: int) -> dict[str, tuple[str, ...]]:
    """mtfast's name -> Hugging Face's, three for a fused projection, without the `bert.` prefix."""
    table: dict[str, tuple[str, ...]] = {ours: (theirs,) for ours, theirs in _TENSORS.items()}
    modules = dict(_MODULES)
    for i in range(layers):
        ours, theirs = f"encoder.layers.{i}", f"encoder.layer.{i}"
        modules |= {f"{ours}.{a}": f"{theirs}.{b}" for a, b in _LAYER_MODULES.items()}
        for leaf in _LEAVES:
            parts = tuple(f"{theirs}.attention.self.{part}.{leaf}" for part in _QKV)
            table[f"{ours}.attention.qkv.{leaf}"] = parts
    for leaf in _LEAVES:
        table |= {f"{a}.{leaf}": (f"{b}.{leaf}",) for a, b in modules.items()}
    return table


def _layers(names: Mapping[str, Tensor], pattern: str) -> int:
    found = (re.match(pattern, name) for name in names)
    return 1 + max((int(match[1]) for match in found if match), default=-1)


def hf_state_dict(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Hugging Face's names for the weights of a PackedBert, PretrainModel or MultiTaskModel.

    The fused projections are split (views, no copies). `heads.*` and the tied decoder are left out: the first
    has no place there, the second is the word embedding table. With a pre-training head in `state` the names
    are those of BertForPreTraining, else those of BertModel.

    Raises:
        KeyError: a name in `state` that is none of these models'.
    """
    if "embeddings.word" in state:  # a bare PackedBert
        state = {f"encoder.{name}": tensor for name, tensor in state.items()}
    table = _table(_layers(state, r"encoder\.layers\.(\d+)\."))
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name.startswith("heads.") or name == _TIED:
            continue
        if name not in table:
            raise KeyError(f"{name} is no weight of PackedBert, PretrainModel or MultiTaskModel")
        theirs = table[name]
        out.update(zip(theirs, tensor.chunk(len(theirs)), strict=True))
    if any(name.startswith("cls.") for name in out):
        out = {name if name.startswith("cls.") else f"bert.{name}": x for name, x in out.items()}
    return out


def from_hf_state_dict(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """The inverse of `hf_state_dict`: (mtfast's state dict, names of `tensors` that were not used).

    Accepts names with and without the `bert.` prefix and the old `gamma` and `beta` of layer norms. A fused
    projection of which a part is missing is left out, its present parts counted as not used.

    Raises:
        ValueError: the decoder of the masked-word head is not the word embedding table.
    """
    theirs = {_modern(name): name for name in tensors}
    state: dict[str, Tensor] = {}
    used: set[str] = set()
    for ours, parts in _table(_layers(theirs, r"encoder\.layer\.(\d+)\.")).items():  # type: ignore[arg-type]
        if all(part in theirs for part in parts):
            found = [tensors[theirs[part]] for part in parts]
            state[ours] = found[0] if len(found) == 1 else torch.cat(found)
            used |= {theirs[part] for part in parts}
    decoder = {leaf: theirs.get(f"cls.predictions.decoder.{leaf}") for leaf in _LEAVES}
    if (name := decoder["bias"]) is not None:  # newer versions of transformers: the same tensor as the bias
        state.setdefault("mlm.bias", tensors[name])
        used.add(name)
    if (name := decoder["weight"]) is not None:
        word = state.get("encoder.embeddings.word")
        if word is not None and not torch.equal(tensors[name], word):
            raise ValueError(f"{name} is not the word embedding table; an untied decoder is not supported")
        used.add(name)
    return state, sorted(set(tensors) - used)


def _modern(name: str) -> str:
    name = name.removeprefix("bert.")
    return re.sub(r"LayerNorm\.(gamma|beta)$", _modern_leaf, name)


def _modern_leaf(match: re.Match[str]) -> str:
    return "LayerNorm.weight" if match[1] == "gamma" else "LayerNorm.bias"
