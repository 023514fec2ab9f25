"""A run's data: read, tokenized, cached, and the same on every rank; what became of each row is said."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mtfast.config import ConfigError, DataConfig
from mtfast.data.cache import checksum
from mtfast.data.cs224n import pattern_of
from mtfast.data.records import is_one_data_set, is_one_file, names_of_split
from mtfast.data.reviews import ReviewSamples, build_samples, read_reviews
from mtfast.data.rows import DataError, RowAccount
from mtfast.data.tables import task_files
from mtfast.data.tokens import Sequences, TokenizedTask, read_tokenized
from mtfast.tasks import Split, Task
from mtfast.training.engine import ranks
from mtfast.training.run.directory import RunDirectory
from mtfast.training.run.progress import say_once

UNKNOWN_SAID, UNKNOWN_REFUSED = 0.03, 0.8  # shares of the word pieces


@dataclass(frozen=True)
class Inputs:
    """The data of a run, read when it is asked for; what became of the rows goes to the run's summary."""

    tasks: Mapping[str, Task]
    data: DataConfig
    tokenizer: Any
    run: RunDirectory

    def load(self, split: Split) -> dict[str, TokenizedTask]:
        """All tasks' examples of a split."""
        return {name: self.load_task(name, split) for name in self.tasks}

    def load_task(self, name: str, split: Split) -> TokenizedTask:
        """One task's examples of a split."""
        table = load_task(name, self.tasks[name], self.data, self.tokenizer, split)
        if split != "test":  # what training follows from
            source = self.tasks[name].source or self.data.tasks
            self.run.confirm(
                f"{name}-{split}",
                _checksum(table.sequences, table.labels),
                ("heads", "finetune"),
                f"the {split} data of {name} in {source}",
                f"tasks.{name}.source" if self.tasks[name].source else "data.tasks",
            )
        self.run.summarize(data={f"{name}-{split}": _account(table.sequences, table.account)})
        return table

    def load_reviews(self, seed: int) -> ReviewSamples:
        """The pre-training samples."""
        samples = load_reviews(self.data, self.tokenizer, seed)
        found = _checksum(samples.sequences, samples.nsp_labels)
        said = f"{self.data.reviews} (reviews)"
        self.run.confirm("reviews", found, ("pretrain",), said, "data.reviews")
        self.run.summarize(data={"reviews": _account(samples.sequences, samples.account)})
        return samples


def load_task(name: str, task: Task, data: DataConfig, tokenizer: Any, split: Split) -> TokenizedTask:
    """One task's examples of one split, tokenized. Says what was read, skipped and cut.

    Raises:
        ConfigError: there is no such directory, or the source has the same rows as training and other data.
        DataError: the source cannot be used, or the tokenizer knows hardly a word of it.
    """
    source = _source_of(name, task, data, split)

    def make() -> TokenizedTask:
        return read_tokenized(
            name,
            task,
            source,
            split,
            tokenizer,
            max_length=data.max_length,
            cache_dir=data.cache_dir,
            strict=data.strict,
        )

    table = ranks.main_first(make)
    _check(f"{name} {split}", f"{source} ({name} {split})", table.sequences, table.account, table.labels)
    return table


def load_reviews(data: DataConfig, tokenizer: Any, seed: int) -> ReviewSamples:
    """The pre-training samples. Says what was read, skipped and cut."""

    def make() -> ReviewSamples:
        return build_samples(
            read_reviews(data.reviews, limit=data.max_reviews, strict=data.strict),
            tokenizer,
            max_length=data.review_max_length,
            samples=data.samples,
            seed=seed,
            cache_dir=data.cache_dir,
            strict=data.strict,
        )

    samples = ranks.main_first(make)
    _check("reviews", f"{data.reviews} (reviews)", samples.sequences, samples.account, samples.nsp_labels)
    return samples


def _source_of(name: str, task: Task, data: DataConfig, split: Split) -> str:
    """Where a task's data is; ConfigError where there is none, or training data would be dev data too."""
    field = f"tasks.{name}.source"
    source = task.source or data.tasks
    path, pattern = Path(source).expanduser(), pattern_of(name)
    if task.source is None and pattern is None:
        raise ConfigError(
            f"{field} is not set, and {name} is no task of the CS 224N files in data.tasks; name a "
            "directory, a Hugging Face data set, or files with {split} in their name",
            f"tasks.{name}",
        )
    if source == data.tasks and pattern is not None:
        found = path.is_dir() and next(path.glob(pattern), None)
        if not found:  # other files would serve as the data of every task
            lack = f"holds no {pattern}" if path.is_dir() else "is no directory here"
            raise ConfigError(
                f"data.tasks is {source}, which {lack}; it should hold the CS 224N files, or {field} name "
                f"another source of {name}",
                "data.tasks",
            )
    if is_one_file(source):
        raise ConfigError(
            f"{field} is one file, {source}, which would be training and dev data at once; name a "
            "directory, or write {split} where the names of the train, dev and test files differ",
            field,
        )
    if is_one_data_set(source):
        raise ConfigError(
            f"{field} is one data set without splits, {source}, which would be training and dev data at "
            "once; save a DatasetDict with the splits train and dev",
            field,
        )
    others: tuple[Split, ...] = ("dev", "test") if split == "train" else ("train",)
    for other in others:
        mine, theirs = (names_of_split(task.splits.get(which, which)) for which in (split, other))
        if both := [called for called in mine if called in theirs]:
            raise ConfigError(
                f"tasks.{name}.splits: {both[0]!r} would be {split} and {other} data; what is trained on "
                "must not be evaluated on",
                f"tasks.{name}.splits",
            )
        for file in task_files(name, task, source, split):
            for same in task_files(name, task, source, other):
                if file.samefile(same):
                    raise ConfigError(
                        f"{field}: the {split} file {file} and the {other} file {same} are one file; "
                        "what is trained on must not be evaluated on",
                        field,
                    )
    return source


def _check(
    what: str, origin: str, sequences: Sequences, account: RowAccount, labels: np.ndarray | None
) -> None:
    """Say what was read; raise where ranks read different data, or the tokenizer does not know it."""
    say_once(f"{what}: {_summary(sequences, account)}")
    if ranks.world_size() > 1:
        ranks.agree(origin, _checksum(sequences, labels))
    if sequences.unknown > UNKNOWN_REFUSED * sequences.word_pieces:
        raise DataError(
            f"{origin}: {_unknown(sequences)}; the tokenizer is not for such text, or its vocabulary is not "
            "whole"
        )


def _checksum(sequences: Sequences, labels: np.ndarray | None) -> int:
    arrays = {"tokens": sequences.tokens, "offsets": sequences.offsets}
    return checksum(arrays if labels is None else arrays | {"labels": labels})


def _much_unknown(sequences: Sequences) -> bool:
    return sequences.unknown > UNKNOWN_SAID * sequences.word_pieces


def _unknown(sequences: Sequences) -> str:
    share = sequences.unknown / sequences.word_pieces
    return f"{sequences.unknown:,} of {sequences.word_pieces:,} word pieces ({share:.0%}) are [UNK]"


def _summary(sequences: Sequences, account: RowAccount) -> str:
    facts = []
    if sequences.truncated:
        facts.append(f"{sequences.truncated:,} sequences cut to {sequences.max_length} word pieces")
    if _much_unknown(sequences):
        facts.append(_unknown(sequences))
    return account.summary(*facts)


def _account(sequences: Sequences, account: RowAccount) -> dict[str, Any]:
    """What became of the rows, as plain values; "notes" where there are any, "unknown" (of how many
    "word_pieces") where they are many."""
    values = {**asdict(account), "truncated": sequences.truncated}
    if not values["notes"]:
        del values["notes"]
    if _much_unknown(sequences):
        values |= {"unknown": sequences.unknown, "word_pieces": sequences.word_pieces}
    return values
