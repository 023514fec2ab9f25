"""What a stage's model is made of: the weights the stage before it left, or the run's checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import BertConfig

from mtfast.config import ConfigError, DataConfig, ModelConfig
from mtfast.data.cache import checksum
from mtfast.models.checkpoint import LoadReport, load_bert_config, load_pretrained, load_tokenizer
from mtfast.models.multitask import MultiTaskModel, build_multitask_model
from mtfast.models.pretraining import PretrainModel, build_pretrain_model
from mtfast.tasks import MlpConfig, Task
from mtfast.training.engine import ranks
from mtfast.training.seeds import seed_for

from .directory import RunDirectory
from .progress import say_once


@dataclass(frozen=True)
class Weights:
    """What a model is made of.

    config, tokenizer: of the encoder.
    encoder: checkpoint to read it from, None for random weights.
    heads: directory with the tasks' heads, None for those of the encoder's checkpoint, where it has some, or
        fresh ones.
    mlp: what the heads that are MLPs are like.
    seed: of what is fresh.
    """

    config: BertConfig
    tokenizer: Any
    encoder: str | None
    heads: str | None
    mlp: MlpConfig
    seed: int


def find_weights(model: ModelConfig, run: RunDirectory, seed: int) -> Weights:
    """The run's newest weights before fine-tuning: pre-trained encoder and trained heads, if any."""
    name = model.checkpoint
    bert = load_bert_config(name)
    kept = bert.to_dict() | {"transformers_version": None, "_name_or_path": None}
    ranks.agree(f"the config of {name}", kept)
    bert.hidden_dropout_prob = bert.attention_probs_dropout_prob = model.dropout_p
    encoder: str | None = None if model.from_scratch else name
    if run.result("pretrain") is not None:
        encoder = str(run.stage("pretrain") / "last")
    heads = str(run.stage("heads") / "best-mean") if run.result("heads") is not None else None
    return Weights(bert, load_tokenizer(name), encoder, heads, model.mlp, seed)


def best_weights(model: ModelConfig, run: RunDirectory, seed: int) -> Weights:
    """The run's best weights: fine-tuned if that stage has finished, else with trained heads.

    Raises:
        ConfigError: neither stage has finished.
    """
    if run.result("finetune") is not None:
        name = str(run.stage("finetune") / "best-mean")
        return Weights(load_bert_config(name), load_tokenizer(name), name, None, model.mlp, seed)
    if run.result("heads") is not None:
        return find_weights(model, run, seed)
    raise ConfigError(
        f"{run.path} holds no finished heads or finetune stage; train one first "
        "(mtfast heads, mtfast finetune or mtfast run)"
    )


def check_fit(weights: Weights, name: str, data: DataConfig, *, pretrain: bool, joint: bool) -> None:
    """Raises ConfigError if a checkpoint is too small for what it is fed with.

    Args:
        name: of the checkpoint.
        pretrain: it is pre-trained on reviews, whose samples are two segments.
        joint: a task's pairs are one sequence.
    """
    bert = weights.config
    lengths = {"data.max_length": data.max_length}
    if pretrain:
        lengths["data.review_max_length"] = data.review_max_length
    for field, length in lengths.items():
        if length > bert.max_position_embeddings:
            raise ConfigError(
                f"{field} is {length}, but {name} has positions for {bert.max_position_embeddings} tokens",
                field,
            )
    pieces = max(weights.tokenizer.get_vocab().values()) + 1
    if pieces > bert.vocab_size:
        raise ConfigError(
            f"the tokenizer of {name} has {pieces} word pieces, its model embeds {bert.vocab_size}"
        )
    if 2 * pieces < bert.vocab_size:  # padded tables are usual, such ones are not
        raise ConfigError(
            f"the tokenizer of {name} has {pieces} word pieces, its model embeds {bert.vocab_size}: it is "
            f"another model's, or not whole; {name} should hold the model's own tokenizer.json or vocab.txt"
        )
    if bert.type_vocab_size < 2 and (pretrain or joint):
        raise ConfigError(
            f"{name} has {bert.type_vocab_size} token type; two sentences in one sequence need 2"
        )


def build_pretrain(weights: Weights) -> tuple[PretrainModel, dict[str, Tensor]]:
    """BERT with its pre-training heads, and the tensors of the checkpoint it has no place for.

    Heads that the checkpoint lacks are fresh.
    """
    torch.manual_seed(seed_for(weights.seed))
    model = build_pretrain_model(weights.config)
    return model, _load(weights.encoder, model)


def build_multitask(weights: Weights, tasks: Mapping[str, Task]) -> tuple[MultiTaskModel, dict[str, Tensor]]:
    """BERT with the tasks' heads, and the tensors of the checkpoint it has no place for.

    The heads are those that a finished stage left, else fresh. Their dropout is the encoder's.
    """
    torch.manual_seed(seed_for(weights.seed))
    dropout_p = weights.config.hidden_dropout_prob
    model = build_multitask_model(weights.config, tasks, weights.mlp, dropout_p)
    return model, _load(weights.encoder, model, weights.heads)


def _load(
    checkpoint: str | None, model: PretrainModel | MultiTaskModel, heads: str | None = None
) -> dict[str, Tensor]:
    """Fill the model from checkpoint and heads, say so, and return the checkpoint's other tensors."""
    report = LoadReport("", (), {}, ()) if checkpoint is None else load_pretrained(checkpoint, model)
    said = "the encoder starts from random weights" if checkpoint is None else report.summary()
    if heads is not None and isinstance(model, MultiTaskModel):
        load_pretrained(heads, model.heads)
        fresh = tuple(name for name in report.initialised if not name.startswith("heads."))
        said = f"{replace(report, initialised=fresh).summary() if checkpoint else said}; heads from {heads}"
    if ranks.world_size() > 1:
        weights = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
        ranks.agree(
            f"the weights of {' and '.join(filter(None, (checkpoint, heads))) or 'a new model'}",
            checksum(weights),
        )
    say_once(said)
    return report.carried
