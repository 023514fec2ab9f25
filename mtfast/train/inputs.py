"""From the configuration to tokenized data: read once, cached, accounted for row by row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from mtfast.data.cache import TokenizedTask, tokenize_task
from mtfast.data.reviews import ReviewSamples, build_samples, read_reviews
from mtfast.data.tasks import RowAccount, Split, read_task

from . import ranks
from .config import TASK_NAMES, RunConfig
from .progress import say_once

EVALUATION_TOKENS = 16384


def cache_directory(config: RunConfig) -> Path:
    return Path(config.data.cache_dir) if config.data.cache_dir else config.path / "cache"


def load_tasks(config: RunConfig, tokenizer: Any, split: Split) -> dict[str, TokenizedTask]:
    """The three tasks' examples of one split, tokenized. Says what was read, skipped and cut."""
    return {task: load_task(config, tokenizer, task, split)[0] for task in TASK_NAMES}


def load_task(
    config: RunConfig, tokenizer: Any, task: str, split: Split
) -> tuple[TokenizedTask, dict[str, Any]]:
    """One task's examples of one split, and the account of its rows as plain values."""

    def make() -> tuple[TokenizedTask, RowAccount]:
        table = read_task(task, config.data.source(task), split, strict=config.data.strict)
        tokens = tokenize_task(
            table,
            tokenizer,
            max_length=config.data.max_length,
            pair_input=config.model.pair_input,
            cache_dir=cache_directory(config),
        )
        return tokens, table.account

    tokens, account = ranks.main_first(make)
    cut = f", {tokens.truncated:,} cut to {config.data.max_length} pieces" if tokens.truncated else ""
    say_once(f"{task} {split}: {account.summary()}{cut}")
    return tokens, {**asdict(account), "truncated": tokens.truncated}


def load_reviews(config: RunConfig, tokenizer: Any) -> ReviewSamples:
    """The pre-training samples. Says what was read, skipped and cut."""

    def make() -> ReviewSamples:
        reviews = read_reviews(config.data.reviews, limit=config.data.max_reviews, strict=config.data.strict)
        return build_samples(
            reviews,
            tokenizer,
            max_length=config.data.review_max_length,
            seed=config.seed,
            cache_dir=cache_directory(config),
        )

    samples = ranks.main_first(make)
    say_once(f"reviews: {samples.summary()}")
    return samples


def labels_of(tables: Mapping[str, TokenizedTask]) -> dict[str, np.ndarray]:
    """Labels by task, for the tasks that have them."""
    return {task: table.labels for task, table in tables.items() if table.labels is not None}
