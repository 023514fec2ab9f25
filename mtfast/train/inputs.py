"""From the configuration to tokenized data: read once, cached, accounted for row by row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from mtfast.data.cache import checksum
from mtfast.data.records import is_one_data_set, is_one_file
from mtfast.data.reviews import ReviewSamples, build_samples, read_reviews
from mtfast.data.rows import DataError
from mtfast.data.tasks import TASKS, Split, read_task, task_files
from mtfast.data.tokenized import TokenizedTask, tokenize_task

from . import ranks
from .config import TASK_NAMES, ConfigError, RunConfig
from .progress import say_once

EVALUATION_TOKENS = 16384
UNKNOWN_TOLD, UNKNOWN_REFUSED = 0.03, 0.8  # shares of the word pieces


def cache_directory(config: RunConfig) -> Path:
    given = config.data.cache_dir
    return Path(given).expanduser() if given else config.path / "cache"


def load_tasks(config: RunConfig, tokenizer: Any, split: Split) -> dict[str, TokenizedTask]:
    """The three tasks' examples of one split, tokenized. Says what was read, skipped and cut."""
    return {task: load_task(config, tokenizer, task, split) for task in TASK_NAMES}


def load_task(config: RunConfig, tokenizer: Any, task: str, split: Split) -> TokenizedTask:
    """One task's examples of one split, tokenized. Says what was read, skipped and cut.

    Raises:
        ConfigError: there is no such directory, or the source has the same rows as training and other data.
        DataError: the source cannot be used, or the tokenizer knows hardly a word of it.
    """
    source = config.data.source(task)
    _check_source(config, task, source, split)

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
    _check_same(f"{source} ({task} {split})", table, table.labels)
    _check_known(f"{source} ({task} {split})", table)
    return table


def _check_source(config: RunConfig, task: str, source: str, split: Split) -> None:
    if source == config.data.tasks:
        path, wanted = Path(source).expanduser(), f"{TASKS[task].file_prefix}-*.csv"
        found = path.is_dir() and next(path.glob(wanted), None)
        if not found:  # other files would serve as the data of every task
            lack = f"holds no {wanted}" if path.is_dir() else "is no directory here"
            raise ConfigError(
                f"data.tasks is {source}, which {lack}; it should hold the CS 224N files, or "
                f"data.{task} name another source of {task}"
            )
    if is_one_file(source):
        raise ConfigError(
            f"data.{task} is one file, {source}, which would be training and dev data at once; name a "
            "directory, or write {split} where the names of the train, dev and test files differ"
        )
    if is_one_data_set(source):
        raise ConfigError(
            f"data.{task} is one data set without splits, {source}, which would be training and dev data at "
            "once; save a DatasetDict with the splits train and dev"
        )
    others: tuple[Split, ...] = ("dev", "test") if split == "train" else ("train",)
    for other in others:
        for file in task_files(task, source, split):
            for same in task_files(task, source, other):
                if file.samefile(same):
                    raise ConfigError(
                        f"data.{task}: the {split} file {file} and the {other} file {same} are one file; "
                        "what is trained on must not be evaluated on"
                    )


def _check_same(what: str, table: TokenizedTask | ReviewSamples, labels: np.ndarray | None) -> None:
    if ranks.world_size() > 1:
        arrays = {"tokens": table.tokens, "offsets": table.offsets}
        ranks.agree(what, checksum(arrays if labels is None else arrays | {"labels": labels}))


def _check_known(what: str, table: TokenizedTask | ReviewSamples) -> None:
    if table.unknown > UNKNOWN_REFUSED * table.word_pieces:
        raise DataError(
            f"{what}: {_unknown(table)}; the tokenizer is not for such text, or its vocabulary is not whole"
        )


def _much_unknown(table: TokenizedTask | ReviewSamples) -> bool:
    return table.unknown > UNKNOWN_TOLD * table.word_pieces


def _unknown(table: TokenizedTask | ReviewSamples) -> str:
    share = table.unknown / table.word_pieces
    return f"{table.unknown:,} of {table.word_pieces:,} word pieces ({share:.0%}) are [UNK]"


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
    _check_same(f"{data.reviews} (reviews)", samples, samples.nsp_labels)
    _check_known(f"{data.reviews} (reviews)", samples)
    return samples


def _summary(table: TokenizedTask | ReviewSamples) -> str:
    facts = []
    if table.truncated:
        facts.append(f"{table.truncated:,} sequences cut to {table.max_length} word pieces")
    if _much_unknown(table):
        facts.append(_unknown(table))
    return table.account.summary(*facts)


def account_of(table: TokenizedTask | ReviewSamples) -> dict[str, Any]:
    """What became of the rows, as plain values for the run's summary.

    "notes" and "unknown" (of how many "word_pieces") are there where there is something to tell.
    """
    account = {**asdict(table.account), "truncated": table.truncated}
    if not account["notes"]:
        del account["notes"]
    if _much_unknown(table):
        account |= {"unknown": table.unknown, "word_pieces": table.word_pieces}
    return account


def labels_of(tables: Mapping[str, TokenizedTask]) -> dict[str, np.ndarray]:
    """Labels by task, for the tasks that have them."""
    return {task: table.labels for task, table in tables.items() if table.labels is not None}
