"""What the stage benchmarks share: their options, the data, a stage of mtfast and its eager twin, a clock."""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import torch

from benchmarks.eager_twin import EagerTwin
from mtfast.config import EngineConfig, HeadsConfig, ModelConfig, RunConfig
from mtfast.data.tables import read_task
from mtfast.data.tokens import TokenizedTask, tokenize_task
from mtfast.models.checkpoint import load_bert_config, load_tokenizer
from mtfast.models.multitask import MultiTaskHeads
from mtfast.recipes import PAPER_TASKS
from mtfast.tasks import Split
from mtfast.training.run.weights import Weights

Tables = dict[str, TokenizedTask]


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


def weights_of(config: RunConfig) -> Weights:
    """The checkpoint's weights, with the recipe's dropout."""
    checkpoint = config.model.checkpoint
    bert = load_bert_config(checkpoint)
    bert.hidden_dropout_prob = bert.attention_probs_dropout_prob = config.model.dropout_p
    return Weights(bert, load_tokenizer(checkpoint), checkpoint, None, config.model.mlp, config.seed)


def twin_of(config: RunConfig, heads: MultiTaskHeads) -> EagerTwin:
    """The eager model with the checkpoint's weights and those of `heads`, in float32."""
    return EagerTwin(config.model.checkpoint, heads, config.model.dropout_p)


def total(losses: dict[str, torch.Tensor]) -> torch.Tensor:
    """The sum of the tasks' losses."""
    return torch.stack(list(losses.values())).sum()


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
