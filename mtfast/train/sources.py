"""What each stage starts from: the weights the stage before it left, or the run's checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig

from mtfast.models.checkpoint import load_bert_config, load_heads, load_pretrained, load_tokenizer
from mtfast.models.multitask import (
    HeadsConfig,
    MultiTaskModel,
    PretrainModel,
    build_multitask_model,
    build_pretrain_model,
)

from .config import RunConfig
from .loop import seed_for
from .progress import say
from .rundir import RunDirectory


@dataclass(frozen=True)
class Source:
    """Where a model's weights come from.

    encoder: checkpoint to read, None for random weights. heads: directory with heads, None for fresh ones.
    """

    config: BertConfig
    tokenizer: Any
    encoder: str | None
    heads: str | None = None


def find_source(config: RunConfig, run: RunDirectory) -> Source:
    """The newest weights of the run that are not fine-tuned: pre-trained encoder and trained heads, if any."""
    name = config.model.checkpoint
    bert = load_bert_config(name)
    bert.hidden_dropout_prob = bert.attention_probs_dropout_prob = config.model.dropout_p
    encoder: str | None = None if config.model.from_scratch else name
    if run.result("pretrain") is not None:
        encoder = str(run.stage("pretrain") / "last")
    heads = str(run.stage("heads") / "best-mean") if run.result("heads") is not None else None
    return Source(bert, load_tokenizer(name), encoder, heads)


def finished_source(config: RunConfig, directory: Path) -> Source:
    """The weights of a checkpoint that holds encoder and heads."""
    bert = load_bert_config(str(directory))
    return Source(bert, load_tokenizer(str(directory)), str(directory), str(directory))


def heads_config(config: RunConfig) -> HeadsConfig:
    model = config.model
    return HeadsConfig(
        sentiment=model.sentiment_head,
        pair_input=model.pair_input,
        inner=model.pair_inner,
        activation=model.pair_activation,
        dropout_p=model.dropout_p,
    )


def build_pretrain(config: RunConfig, source: Source) -> PretrainModel:
    """BERT with its pre-training heads; heads that the checkpoint lacks are fresh, and it says so."""
    torch.manual_seed(seed_for(config.seed))
    model = build_pretrain_model(source.config)
    if source.encoder is not None and (fresh := load_pretrained(source.encoder, model)):
        say(f"{source.encoder} has no {', '.join(fresh)}: freshly initialised")
    return model


def build_multitask(config: RunConfig, source: Source) -> MultiTaskModel:
    """BERT with the task heads; the heads are fresh unless a finished stage left some."""
    torch.manual_seed(seed_for(config.seed))
    model = build_multitask_model(source.config, heads_config(config))
    if source.encoder is not None:
        load_pretrained(source.encoder, model)
    if source.heads is not None:
        load_heads(source.heads, model.heads)
    return model
