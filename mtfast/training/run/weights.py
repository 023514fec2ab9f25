"""What a stage's model is made of: the weights the stage before it left, or the run's checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import BertConfig

from mtfast.config import STAGES, ConfigError, DataConfig, ModelConfig, StageName
from mtfast.data.cache import checksum
from mtfast.models.checkpoint import (
    LoadReport,
    checksum_of_weights,
    load_bert_config,
    load_pretrained,
    load_tokenizer,
)
from mtfast.models.multitask import MultiTaskModel, build_multitask_model
from mtfast.models.pretraining import PretrainModel, build_pretrain_model
from mtfast.tasks import MlpConfig, Task
from mtfast.training.engine import ranks
from mtfast.training.seeds import seed_for

from .directory import RunDirectory, check_checkpoint
from .progress import say_once

Finished = Callable[[StageName], bool]


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


@dataclass(frozen=True)
class WeightFiles:
    """Where the weights of a run are.

    described: checkpoint with the encoder's config and the tokenizer.
    encoder, heads: as in `Weights`.
    """

    described: str
    encoder: str | None
    heads: str | None


def newest_files(model: ModelConfig, run: Path, finished: Finished) -> WeightFiles:
    """A run's newest weights before fine-tuning: pre-trained encoder and trained heads, if any.

    Args:
        run: the run's directory.
        finished: whether a stage of the run has.
    """
    heads = str(run / "heads" / "best-mean") if finished("heads") else None
    if finished("pretrain"):
        encoder = str(run / "pretrain" / "last")
        return WeightFiles(encoder, encoder, heads)
    return WeightFiles(model.checkpoint, None if model.from_scratch else model.checkpoint, heads)


def best_files(model: ModelConfig, run: Path, finished: Finished) -> WeightFiles:
    """A run's best weights: fine-tuned if that stage has finished, else with trained heads.

    Arguments are those of `newest_files`.

    Raises:
        ConfigError: neither stage has finished.
    """
    if finished("finetune"):
        best = str(run / "finetune" / "best-mean")
        return WeightFiles(best, best, None)
    if finished("heads"):
        return newest_files(model, run, finished)
    raise ConfigError(
        f"{run} holds no finished heads or finetune stage; train one first "
        "(mtfast heads, mtfast finetune or mtfast run)"
    )


def check_files(files: WeightFiles, run: Path) -> None:
    """Raises CheckpointError where what a stage of the run in `run` has left is damaged."""
    for name in {files.encoder, files.heads} - {None}:
        if Path(str(name)).parent.parent == run:
            check_checkpoint(Path(str(name)))


def read_weights(files: WeightFiles, model: ModelConfig, seed: int) -> Weights:
    """What a model of these files is made of, without the tensors.

    Raises:
        CheckpointError: one of the files cannot be used.
    """
    bert = load_bert_config(files.described)
    bert.hidden_dropout_prob = bert.attention_probs_dropout_prob = model.dropout_p
    tokenizer = load_tokenizer(files.described)
    return Weights(bert, tokenizer, files.encoder, files.heads, model.mlp, seed)


def find_weights(model: ModelConfig, run: RunDirectory, seed: int) -> Weights:
    """The run's newest weights before fine-tuning, the same on every rank."""
    return _agreed(newest_files(model, run.path, _finished_in(run)), model, run, seed)


def confirm_checkpoint(weights: Weights, model: ModelConfig, run: RunDirectory) -> None:
    """Raises ConfigError where the run's checkpoint is about to be read, and is not what the run has begun
    with."""
    name = model.checkpoint
    if weights.encoder == name:
        found = ranks.seen_by_main(lambda: checksum_of_weights(name))
        run.confirm("checkpoint", found, STAGES, f"the checkpoint {name}", "model.checkpoint")


def best_weights(model: ModelConfig, run: RunDirectory, seed: int) -> Weights:
    """The run's best weights, the same on every rank. Raises ConfigError as `best_files`."""
    return _agreed(best_files(model, run.path, _finished_in(run)), model, run, seed)


def _finished_in(run: RunDirectory) -> Finished:
    return lambda name: run.result(name) is not None


def _agreed(files: WeightFiles, model: ModelConfig, run: RunDirectory, seed: int) -> Weights:
    ranks.on_main(check_files, files, run.path)
    weights = read_weights(files, model, seed)
    kept = weights.config.to_dict() | {"transformers_version": None, "_name_or_path": None}
    ranks.agree(f"the config of {files.described}", kept)
    return weights


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

    Heads that the checkpoint lacks are fresh. Says what was loaded.
    """
    _seed(weights)
    model = build_pretrain_model(weights.config)
    return model, _announced(weights, model, _fill(weights, model))


def build_multitask(weights: Weights, tasks: Mapping[str, Task]) -> tuple[MultiTaskModel, dict[str, Tensor]]:
    """`new_multitask`, the same on every rank, and the tensors of the checkpoint it has no place for.

    Says what was loaded.
    """
    model, report = new_multitask(weights, tasks)
    return model, _announced(weights, model, report)


def new_multitask(weights: Weights, tasks: Mapping[str, Task]) -> tuple[MultiTaskModel, LoadReport]:
    """BERT with the tasks' heads, and what was loaded into it; for this process alone, without a word.

    The heads are those that a finished stage left, else fresh. Their dropout is the encoder's.
    """
    _seed(weights)
    dropout_p = weights.config.hidden_dropout_prob
    model = build_multitask_model(weights.config, tasks, weights.mlp, dropout_p)
    return model, _fill(weights, model)


def _seed(weights: Weights) -> None:
    torch.default_generator.manual_seed(seed_for(weights.seed))  # models are made on the host


def _fill(weights: Weights, model: PretrainModel | MultiTaskModel) -> LoadReport:
    """Load the encoder's checkpoint and the heads into the model."""
    if weights.encoder is None:
        report = LoadReport("", (), {}, ())
    else:
        report = load_pretrained(weights.encoder, model)
    if weights.heads is not None and isinstance(model, MultiTaskModel):
        report = replace(report, initialised=load_pretrained(weights.heads, model.heads).initialised)
    return report


def _announced(
    weights: Weights, model: PretrainModel | MultiTaskModel, report: LoadReport
) -> dict[str, Tensor]:
    """Say what was loaded; raise ConfigError where ranks differ in it; the checkpoint's other tensors."""
    scratch = "the encoder starts from random weights"
    said = scratch if weights.encoder is None else report.summary()
    if weights.heads is not None:
        said += f"; heads from {weights.heads}"
    if ranks.world_size() > 1:
        arrays = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
        origin = " and ".join(filter(None, (weights.encoder, weights.heads))) or "a new model"
        ranks.agree(f"the weights of {origin}", checksum(arrays))
    say_once(said)
    return report.carried
