"""What each stage starts from: the weights the stage before it left, or the run's checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import BertConfig

from mtfast.data.cache import checksum
from mtfast.models.checkpoint import LoadReport, load_bert_config, load_pretrained, load_tokenizer
from mtfast.models.multitask import (
    HeadsConfig,
    MultiTaskModel,
    PretrainModel,
    build_multitask_model,
    build_pretrain_model,
)

from . import ranks
from .config import ConfigError, RunConfig, StageName
from .loop import seed_for
from .progress import say_once
from .rundir import RunDirectory


@dataclass(frozen=True)
class Source:
    """Where a model's weights come from.

    encoder: checkpoint to read, None for random weights. heads: directory with heads, None for those of the
    encoder's checkpoint, where it has some, or fresh ones.
    """

    config: BertConfig
    tokenizer: Any
    encoder: str | None
    heads: str | None = None


def find_source(config: RunConfig, run: RunDirectory) -> Source:
    """The run's newest weights before fine-tuning: pre-trained encoder and trained heads, if any."""
    name = config.model.checkpoint
    bert = load_bert_config(name)
    kept = bert.to_dict() | {"transformers_version": None, "_name_or_path": None}
    ranks.agree(f"the config of {name}", kept)
    bert.hidden_dropout_prob = bert.attention_probs_dropout_prob = config.model.dropout_p
    encoder: str | None = None if config.model.from_scratch else name
    if run.result("pretrain") is not None:
        encoder = str(run.stage("pretrain") / "last")
    heads = str(run.stage("heads") / "best-mean") if run.result("heads") is not None else None
    return Source(bert, load_tokenizer(name), encoder, heads)


def check_fit(config: RunConfig, source: Source, stages: tuple[StageName, ...]) -> None:
    """Raises ConfigError if the checkpoint is too small for what these stages feed it."""
    bert, name = source.config, config.model.checkpoint
    lengths = {"data.max_length": config.data.max_length}
    if "pretrain" in stages:
        lengths["data.review_max_length"] = config.data.review_max_length
    for field, length in lengths.items():
        if length > bert.max_position_embeddings:
            raise ConfigError(
                f"{field} is {length}, but {name} has positions for {bert.max_position_embeddings} tokens"
            )
    pieces = max(source.tokenizer.get_vocab().values()) + 1
    if pieces > bert.vocab_size:
        raise ConfigError(
            f"the tokenizer of {name} has {pieces} word pieces, its model embeds {bert.vocab_size}"
        )
    if 2 * pieces < bert.vocab_size:  # padded tables are usual, such ones are not
        raise ConfigError(
            f"the tokenizer of {name} has {pieces} word pieces, its model embeds {bert.vocab_size}: it is "
            f"another model's, or not whole; {name} should hold the model's own tokenizer.json or vocab.txt"
        )
    if bert.type_vocab_size < 2 and ("pretrain" in stages or config.model.pair_input == "joint"):
        raise ConfigError(
            f"{name} has {bert.type_vocab_size} token type; two sentences in one sequence need 2"
        )


def finished_source(config: RunConfig, directory: Path) -> Source:
    """The weights of a checkpoint that holds encoder and heads."""
    bert = load_bert_config(str(directory))
    return Source(bert, load_tokenizer(str(directory)), str(directory))


def heads_config(config: RunConfig) -> HeadsConfig:
    model = config.model
    return HeadsConfig(
        sentiment=model.sentiment_head,
        pair_input=model.pair_input,
        inner=model.pair_inner,
        activation=model.pair_activation,
        dropout_p=model.dropout_p,
    )


def build_pretrain(config: RunConfig, source: Source) -> tuple[PretrainModel, dict[str, Tensor]]:
    """BERT with its pre-training heads, and the tensors of the checkpoint it has no place for.

    Heads that the checkpoint lacks are fresh.
    """
    torch.manual_seed(seed_for(config.seed))
    model = build_pretrain_model(source.config)
    model.encoder.activation_checkpointing = config.engine.activation_checkpointing
    return model, _load(source.encoder, model)


def build_multitask(config: RunConfig, source: Source) -> tuple[MultiTaskModel, dict[str, Tensor]]:
    """BERT with the task heads, and the tensors of the checkpoint it has no place for.

    The heads are those that a finished stage left, else fresh.
    """
    torch.manual_seed(seed_for(config.seed))
    model = build_multitask_model(source.config, heads_config(config))
    model.encoder.activation_checkpointing = config.engine.activation_checkpointing
    return model, _load(source.encoder, model, source.heads)


def _load(
    checkpoint: str | None, model: PretrainModel | MultiTaskModel, heads: str | None = None
) -> dict[str, Tensor]:
    """Fill the model with what there is, say so, and return the checkpoint's other tensors."""
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
