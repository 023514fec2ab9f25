"""From the configuration to tokenized data: read once, cached, accounted for row by row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from mtfast.data.records import is_one_file
from mtfast.data.reviews import ReviewSamples, build_samples, read_reviews
from mtfast.data.tasks import Split, read_task
from mtfast.data.tokenized import TokenizedTask, tokenize_task

from . import ranks
from .config import TASK_NAMES, ConfigError, RunConfig
from .progress import say_once

EVALUATION_TOKENS = 16384


def cache_directory(config: RunConfig) -> Path:
    given = config.data.cache_dir
    return Path(given).expanduser() if given else config.path / "cache"


def load_tasks(config: RunConfig, tokenizer: Any, split: Split) -> dict[str, TokenizedTask]:
    """The three tasks' examples of one split, tokenized. Says what was read, skipped and cut."""
    return {task: load_task(config, tokenizer, task, split) for task in TASK_NAMES}


def load_task(config: RunConfig, tokenizer: Any, task: str, split: Split) -> TokenizedTask:
    """One task's examples of one split, tokenized. Says what was read, skipped and cut.

    Raises:
        ConfigError: there is no such directory, or the source is one file, which would serve as train, dev
            and test data alike.
    """
    source = config.data.source(task)
    if source == config.data.tasks and not Path(source).expanduser().is_dir():
        raise ConfigError(
            f"data.tasks is {source}, which is no directory here; it should hold the CS 224N files, or "
            f"data.{task} name another source of {task}"
        )
    if is_one_file(source):
        raise ConfigError(
            f"data.{task} is one file, {source}, which would be training and dev data at once; name a "
            "directory, or write {split} where the names of the train, dev and test files differ"
        )

    def make() -> TokenizedTask:
        return tokenize_task(
            read_task(task, source, split, strict=config.data.strict),
            tokenizer,
            max_length=config.data.max_length,
            pair_input=config.model.pair_input,
            cache_dir=cache_directory(config),
        )

    table = ranks.main_first(make)
    say_once(f"{task} {split}: {_summary(table)}")
    return table


def load_reviews(config: RunConfig, tokenizer: Any) -> ReviewSamples:
    """The pre-training samples. Says what was read, skipped and cut."""
    data = config.data

    def make() -> ReviewSamples:
        return build_samples(
            read_reviews(data.reviews, limit=data.max_reviews, strict=data.strict),
            tokenizer,
            max_length=data.review_max_length,
            seed=config.seed,
            cache_dir=cache_directory(config),
            strict=data.strict,
        )

    samples = ranks.main_first(make)
    say_once(f"reviews: {_summary(samples)}")
    return samples


def _summary(table: TokenizedTask | ReviewSamples) -> str:
    cut = f"{table.truncated:,} sequences cut to {table.max_length} word pieces"
    return table.account.summary(*([cut] if table.truncated else []))


def account_of(table: TokenizedTask | ReviewSamples) -> dict[str, Any]:
    """What became of the rows, as plain values for the run's summary."""
    return {**asdict(table.account), "truncated": table.truncated}


def labels_of(tables: Mapping[str, TokenizedTask]) -> dict[str, np.ndarray]:
    """Labels by task, for the tasks that have them."""
    return {task: table.labels for task, table in tables.items() if table.labels is not None}
