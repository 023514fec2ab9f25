"""What each stage starts from: the weights the stage before it left, or the run's checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import BertConfig

from mtfast.models.checkpoint import load_bert_config, load_pretrained, load_tokenizer
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
    """The run's newest weights before fine-tuning: pre-trained encoder and trained heads, if any."""
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


def build_pretrain(config: RunConfig, source: Source) -> tuple[PretrainModel, dict[str, Tensor]]:
    """BERT with its pre-training heads, and the tensors of the checkpoint it has no place for.

    Heads that the checkpoint lacks are fresh, and it says so.
    """
    torch.manual_seed(seed_for(config.seed))
    model = build_pretrain_model(source.config)
    return model, _load(source.encoder, model)


def build_multitask(config: RunConfig, source: Source) -> tuple[MultiTaskModel, dict[str, Tensor]]:
    """BERT with the task heads, and the tensors of the checkpoint it has no place for.

    The heads are fresh unless a finished stage left some.
    """
    torch.manual_seed(seed_for(config.seed))
    model = build_multitask_model(source.config, heads_config(config))
    carried = _load(source.encoder, model)
    if source.heads is not None:
        load_pretrained(source.heads, model.heads)
    return model, carried


def _load(checkpoint: str | None, model: PretrainModel | MultiTaskModel) -> dict[str, Tensor]:
    if checkpoint is None:
        return {}
    report = load_pretrained(checkpoint, model)
    say(report.summary())
    return report.carried
