"""What the stage benchmarks share: their options, the data, a stage of mtfast as its command has it, a clock.

A process that runs mtfast as another commit has it (benchmarks/baseline.py) imports this too: it asks of
mtfast no more than the stages' constructors, plans, micro-batches, losses and steps.
"""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import BertConfig

from mtfast.config import EngineConfig, HeadsConfig, ModelConfig, RunConfig
from mtfast.data.reviews import ReviewSamples, build_samples, read_reviews
from mtfast.data.tables import read_task
from mtfast.data.tokens import TokenizedTask, tokenize_task
from mtfast.models.checkpoint import load_bert_config, load_tokenizer
from mtfast.recipes import PAPER_TASKS
from mtfast.tasks import Split
from mtfast.training.run.weights import Weights
from mtfast.training.stages.finetune import Finetune
from mtfast.training.stages.pretrain import Pretrain

Tables = dict[str, TokenizedTask]
SHAPES = ("checkpoint", "bert-base")
MEGABATCH = 50  # batches whose examples Trainer's group_by_length sorts at a time


@dataclass(frozen=True)
class Setup:
    """All that makes two processes take the same steps.

    stage: "finetune" or "pretrain". shape: of SHAPES; "bert-base" has random weights. max_length: of
    pre-training samples. steps: so many of the epoch's first are made ready. threads: on the CPU.
    """

    stage: str
    data: str
    checkpoint: str
    shape: str
    max_length: int
    steps: int
    threads: int


def parser_of(name: str, description: str) -> argparse.ArgumentParser:
    """A parser with the options that name data and checkpoint, required unless the environment does."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks {name}", description=description)
    for option, variable, what in (
        ("--data", "MTFAST_TEST_DATA", "directory with the CS 224N files, or with cs224n/"),
        ("--checkpoint", "MTFAST_TEST_CHECKPOINT", "BERT checkpoint in Hugging Face layout"),
    ):
        default = os.environ.get(variable)
        text = f"{what}; default: the environment's {variable}"
        parser.add_argument(option, default=default, required=default is None, help=text)
    return parser


def recipe(checkpoint: str, *, features: str = "cached", dropout_p: float = 0.1) -> RunConfig:
    """The paper's recipe on another checkpoint; in one process, where ZeRO has nothing to shard."""
    return RunConfig(
        tasks=PAPER_TASKS,
        model=ModelConfig(checkpoint=checkpoint, dropout_p=dropout_p),
        engine=EngineConfig(precision="bf16", zero_stage=0),
        heads=HeadsConfig(features=features),  # type: ignore[arg-type]
    )


def load_tables(data: str, config: RunConfig, split: Split) -> Tables:
    """One split of the three tasks, tokenized."""
    tokenizer = load_tokenizer(config.model.checkpoint)
    source = Path(data) / "cs224n" if (Path(data) / "cs224n").is_dir() else Path(data)
    limit = config.data.max_length
    return {
        name: tokenize_task(read_task(name, task, source, split), tokenizer, max_length=limit)
        for name, task in config.tasks.items()
    }


def weights_of(config: RunConfig, shape: str = "checkpoint") -> Weights:
    """The checkpoint's weights, or random ones of BERT-base's shape for its vocabulary, with the recipe's
    dropout."""
    checkpoint = config.model.checkpoint
    bert = load_bert_config(checkpoint)
    if shape == "bert-base":
        bert = BertConfig(vocab_size=bert.vocab_size, pad_token_id=bert.pad_token_id)
    bert.hidden_dropout_prob = bert.attention_probs_dropout_prob = config.model.dropout_p
    encoder = checkpoint if shape == "checkpoint" else None
    return Weights(bert, load_tokenizer(checkpoint), encoder, None, config.model.mlp, config.seed)


def reviews_in(data: str) -> Path:
    """Where the reviews are in a directory of data."""
    return Path(data) / "imdb" if (Path(data) / "imdb").is_dir() else Path(data)


def load_samples(setup: Setup, config: RunConfig) -> ReviewSamples:
    """Pre-training samples of reviews from all over the data, at least as many as the steps take, and as
    grouping by length does."""
    limit = max(setup.steps, MEGABATCH) * config.pretrain.batch_size  # a review gives one sample or more
    tokenizer = load_tokenizer(setup.checkpoint)
    return build_samples(
        read_reviews(reviews_in(setup.data), limit), tokenizer, max_length=setup.max_length, seed=config.seed
    )


class StageMaker:
    """Makes the stage of a setup; reads its data once."""

    def __init__(self, setup: Setup) -> None:
        self.setup, self.config = setup, recipe(setup.checkpoint)
        self.weights = weights_of(self.config, setup.shape)
        self._data = (
            load_tables(setup.data, self.config, "train")
            if setup.stage == "finetune"
            else (load_samples(setup, self.config))
        )

    def make(self, precision: Literal["bf16", "fp32"] = "bf16") -> Finetune | Pretrain:
        """The stage under its engine, as mtfast's command has it."""
        config = self.config
        engine = replace(config.engine, precision=precision)
        if isinstance(self._data, ReviewSamples):
            return Pretrain(self._data, self.weights, config.pretrain, engine, config.seed)
        load = {"train": self._data, "dev": {}}.__getitem__
        return Finetune(load, self.weights, config.finetune, engine, config.seed)

    def epoch_steps(self, stage: Finetune | Pretrain) -> int:
        """Steps of an epoch of the whole data, of which pre-training has a part here."""
        steps = len(stage.plan(0))
        if isinstance(stage, Finetune):
            return steps
        return round(steps * len(read_reviews(reviews_in(self.setup.data))) / stage.samples.account.read)

    def losses(self) -> dict[str, float]:
        """mtfast's losses of the first step, in float32 and without dropout; of pre-training their sum, as
        Hugging Face's model has it."""
        stage = self.make("fp32")
        stage.engine.train(False)
        with torch.no_grad():
            losses = stage.losses(packed_batches(stage, 1)[0])
        if isinstance(stage, Pretrain):
            losses = {" + ".join(losses): stage.total(losses)}
        stage.engine.close()
        return {name: loss.item() for name, loss in losses.items()}


def packed_batches(stage: Finetune | Pretrain, count: int) -> list[Any]:
    """The micro-batches of the first steps of the first epoch, one of each, ready on the device."""
    plan: Any = stage.plan(0)[:count]
    if len(plan) < count:
        raise SystemExit(f"the data has {len(plan)} steps and {count} are wanted; ask for fewer with --steps")
    return [batch for (batch,) in stage.micro_batches(plan, 0)]


class Clock:
    """Wall-clock seconds; on a GPU until the work queued before is done."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.mark = self._now()

    def lap(self) -> float:
        """Seconds since the last lap or since the clock was made."""
        now = self._now()
        passed, self.mark = now - self.mark, now
        return passed

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def device_name(device: torch.device) -> str:
    """What the numbers were measured on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"
