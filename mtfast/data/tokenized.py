"""Tasks as token sequences, tokenized once and kept in the Arrow cache."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mtfast.data.cache import Arrays, Notes, cache_key, cached
from mtfast.data.tasks import RowAccount, Task, TaskTable
from mtfast.data.tokens import (
    Sequences,
    SpecialTokens,
    Tokenized,
    assemble_pairs,
    assemble_singles,
    interleave,
    tokenize_texts,
)


@dataclass(frozen=True)
class TokenizedTask(Tokenized):
    """The examples of a task as token sequences: 2 of them for each separately encoded pair, else 1.

    Sequence ``i * sequences_per_example + j`` belongs to example i. ``labels`` is int64 (sst) or float32, or
    None without labels. ``account`` is of the rows the examples were read from.
    """

    task: Task
    sequences_per_example: int
    labels: np.ndarray | None
    ids: list[str]
    account: RowAccount

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each example over all its sequences, int64 [examples]."""
        return np.diff(self.offsets[:: self.sequences_per_example])

    def select(self, rows: np.ndarray) -> "TokenizedTask":
        """The examples at ``rows`` (integer indices or a boolean mask), in that order."""
        rows = np.arange(len(self))[rows]
        per = self.sequences_per_example
        return replace(
            self,
            sequences=self.sequences.select((rows[:, None] * per + np.arange(per)).ravel()),
            labels=None if self.labels is None else self.labels[rows],
            ids=[self.ids[row] for row in rows],
        )


def tokenize_task(
    table: TaskTable,
    tokenizer: Any,
    *,
    max_length: int,
    pair_input: Literal["separate", "joint"] = "separate",
    cache_dir: str | Path | None = None,
) -> TokenizedTask:
    """Tokenizes a task's sentences with a fast Hugging Face tokenizer, in the tokenizer's own threads.

    ``pair_input`` "separate" makes two sequences of each pair, "joint" one `[CLS] A [SEP] B [SEP]`.
    Sequences longer than ``max_length`` lose word pieces from their end (joint pairs: from the longer
    sentence first, as Hugging Face's ``longest_first``) and keep [CLS] and [SEP]. With ``cache_dir`` the
    result is stored there and loaded by the next call with the same tokenizer, texts and settings.
    """
    if pair_input not in ("separate", "joint"):
        raise ValueError(f'pair_input must be "separate" or "joint", found {pair_input!r}')
    check_max_length(max_length)
    special = SpecialTokens.of(tokenizer)
    joint = pair_input == "joint" and len(table.texts) == 2

    def build() -> tuple[Arrays, Notes]:
        parts = [tokenize_texts(tokenizer, texts) for texts in table.texts]
        if joint:
            return to_arrays(assemble_pairs(parts[0], parts[1], max_length, special))
        return to_arrays(interleave([assemble_singles(part, max_length, special) for part in parts]))

    if cache_dir is None:
        arrays, notes = build()
    else:
        settings = {"max_length": max_length, "joint": joint, "special": asdict(special)}
        key = cache_key(tokenizer, table.texts, settings)
        arrays, notes = cached(Path(cache_dir), f"{table.task.name}-{table.split}", key, build)
    return TokenizedTask(
        sequences=from_arrays(arrays, notes),
        max_length=max_length,
        special=special,
        task=table.task,
        sequences_per_example=1 if joint else len(table.texts),
        labels=table.labels,
        ids=table.ids,
        account=table.account,
    )


def check_max_length(max_length: int) -> None:
    """ValueError unless there is room for the special tokens and some of each text."""
    if max_length < 8:
        raise ValueError(f"max_length must be at least 8, found {max_length}")


def to_arrays(sequences: Sequences) -> tuple[Arrays, Notes]:
    """Sequences as the cache keeps them."""
    arrays = {
        "tokens": sequences.tokens,
        "offsets": sequences.offsets,
        "segment_b_start": sequences.segment_b_start,
    }
    return arrays, {"truncated": sequences.truncated}


def from_arrays(arrays: Arrays, notes: Notes) -> Sequences:
    """The inverse of `to_arrays`."""
    return Sequences(arrays["tokens"], arrays["offsets"], arrays["segment_b_start"], notes["truncated"])
