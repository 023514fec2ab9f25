"""From texts to token sequences: word pieces, special tokens, truncation, all in flat arrays."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mtfast.data.cache import Arrays, Notes, cache_key, cached
from mtfast.data.rows import RowAccount
from mtfast.data.tables import TaskTable, read_task
from mtfast.tasks import Split, Task

_CHUNK = 8192


@dataclass(frozen=True)
class SpecialTokens:
    """The tokenizer's ids that packing needs, all its special ids (sorted), and the id of unknown words, if
    any."""

    cls: int
    sep: int
    pad: int
    all: tuple[int, ...]
    unk: int | None = None

    @classmethod
    def of(cls, tokenizer: Any) -> SpecialTokens:
        """Of a fast Hugging Face tokenizer; ValueError names what it lacks."""
        names = ("cls_token_id", "sep_token_id", "pad_token_id", "backend_tokenizer")
        missing = [name for name in names if getattr(tokenizer, name, None) is None]
        if missing:
            raise ValueError(f"tokenizer has no {', '.join(missing)}; a fast BERT tokenizer is needed")
        return cls(
            tokenizer.cls_token_id,
            tokenizer.sep_token_id,
            tokenizer.pad_token_id,
            tuple(sorted(set(tokenizer.all_special_ids))),
            tokenizer.unk_token_id,
        )


@dataclass(frozen=True)
class Sequences:
    """Token sequences back to back: bare word pieces, `[CLS] A [SEP]` or `[CLS] A [SEP] B [SEP]`.

    tokens: int32 [sum of lengths].
    offsets: int64 [sequences + 1], where each sequence begins and, last, the sum.
    segment_b_start: int32 [sequences], index in the sequence at which token type 1 begins; the sequence's
        length if it has one segment.
    special: the tokenizer's special tokens.
    max_length: upper bound of the lengths; None for bare word pieces, which were not cut.
    truncated: number of sequences that were cut to max_length.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    segment_b_start: np.ndarray
    special: SpecialTokens
    max_length: int | None = None
    truncated: int = 0

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each sequence, int64 [sequences]."""
        return np.diff(self.offsets)

    def arrays(self) -> tuple[Arrays, Notes]:
        """The sequences as the cache keeps them."""
        names = ("tokens", "offsets", "segment_b_start")
        return {name: getattr(self, name) for name in names}, {"truncated": self.truncated}

    @classmethod
    def of_arrays(cls, arrays: Arrays, notes: Notes, special: SpecialTokens, max_length: int) -> Sequences:
        """What `arrays` was made from."""
        kept = (arrays["tokens"], arrays["offsets"], arrays["segment_b_start"])
        return cls(*kept, special, max_length, notes["truncated"])

    def select(self, rows: np.ndarray) -> Sequences:
        """The sequences at ``rows`` (integer indices, in that order)."""
        offsets = offsets_of(self.lengths[rows])
        tokens = self.tokens[gather_indices(self.offsets[rows], offsets)]
        return replace(self, tokens=tokens, offsets=offsets, segment_b_start=self.segment_b_start[rows])

    def runs(self, begin: np.ndarray, end: np.ndarray) -> Sequences:
        """Joins the sequences ``begin[i]`` to ``end[i] - 1`` into one, for each i; for bare word pieces."""
        offsets = offsets_of(self.offsets[end] - self.offsets[begin])
        tokens = self.tokens[gather_indices(self.offsets[begin], offsets)]
        return replace(
            self, tokens=tokens, offsets=offsets, segment_b_start=np.diff(offsets).astype(np.int32)
        )

    @cached_property
    def word_pieces(self) -> int:
        """Tokens that are not [CLS], [SEP] or [PAD]."""
        frame = self.special.cls, self.special.sep, self.special.pad
        return len(self.tokens) - sum(int(np.count_nonzero(self.tokens == token)) for token in frame)

    @cached_property
    def unknown(self) -> int:
        """Word pieces that stand for words the tokenizer does not know."""
        unk = self.special.unk
        return 0 if unk is None else int(np.count_nonzero(self.tokens == unk))


@dataclass(frozen=True)
class TokenizedTask:
    """The examples of a task as token sequences: 2 of them for each separately encoded pair, else 1.

    Sequence ``i * task.sequences_per_example + j`` belongs to example i. ``labels`` is int64 (classification)
    or float32, or None without labels. ``account`` is that of the rows the examples were read from.
    """

    task: Task
    sequences: Sequences
    labels: np.ndarray | None
    ids: list[str]
    account: RowAccount

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each example over all its sequences, int64 [examples]."""
        return np.diff(self.sequences.offsets[:: self.task.sequences_per_example])

    def select(self, rows: np.ndarray) -> TokenizedTask:
        """The examples at ``rows`` (integer indices or a boolean mask), in that order."""
        rows = np.arange(len(self))[rows]
        per = self.task.sequences_per_example
        return replace(
            self,
            sequences=self.sequences.select((rows[:, None] * per + np.arange(per)).ravel()),
            labels=None if self.labels is None else self.labels[rows],
            ids=[self.ids[row] for row in rows],
        )


def read_tokenized(
    name: str,
    task: Task,
    source: str | Path,
    split: Split,
    tokenizer: Any,
    *,
    max_length: int,
    cache_dir: str | Path | None = None,
    strict: bool = False,
) -> TokenizedTask:
    """One split of one task: `read_task`, then `tokenize_task`."""
    table = read_task(name, task, source, split, strict=strict)
    return tokenize_task(table, tokenizer, max_length=max_length, cache_dir=cache_dir)


def tokenize_task(
    table: TaskTable, tokenizer: Any, *, max_length: int, cache_dir: str | Path | None = None
) -> TokenizedTask:
    """Tokenizes a task's texts with a fast Hugging Face tokenizer, in the tokenizer's own threads.

    With the task's ``pair_input`` "separate" a pair becomes two sequences, with "joint" one
    `[CLS] A [SEP] B [SEP]`. Sequences longer than ``max_length`` lose word pieces from their end (joint
    pairs: from the longer text first, as Hugging Face's ``longest_first``) and keep [CLS] and [SEP]. With
    ``cache_dir`` the result is stored there and loaded by the next call with the same tokenizer, texts and
    settings.
    """
    check_max_length(max_length)
    special = SpecialTokens.of(tokenizer)
    joint = table.task.pair_input == "joint"

    def build() -> tuple[Arrays, Notes]:
        parts = [tokenize_texts(tokenizer, texts) for texts in table.texts]
        if joint:
            return assemble_pairs(parts[0], parts[1], max_length).arrays()
        return interleave([assemble_singles(part, max_length) for part in parts]).arrays()

    if cache_dir is None:
        arrays, notes = build()
    else:
        settings = {"max_length": max_length, "joint": joint, "special": asdict(special)}
        key = cache_key(tokenizer, table.texts, settings)
        arrays, notes = cached(Path(cache_dir), f"{table.name}-{table.split}", key, build)
    sequences = Sequences.of_arrays(arrays, notes, special, max_length)
    return TokenizedTask(table.task, sequences, table.labels, table.ids, table.account)


def check_max_length(max_length: int) -> None:
    """ValueError unless there is room for the special tokens and some of each text."""
    if max_length < 8:
        raise ValueError(f"max_length must be at least 8, found {max_length}")


def offsets_of(lengths: np.ndarray) -> np.ndarray:
    """0 and the running sums of ``lengths`` [n]: int64 [n + 1]."""
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def gather_indices(starts: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Indices of runs that begin at ``starts`` [n] and, back to back, have ``offsets`` [n + 1]; int64."""
    return np.repeat(starts - offsets[:-1], np.diff(offsets)) + np.arange(offsets[-1])


def tokenize_texts(tokenizer: Any, texts: list[str]) -> Sequences:
    """Word pieces of each text, without special tokens or a length limit, in the tokenizer's own threads."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    tokens, lengths = [np.empty(0, np.int32)], []
    for begin in range(0, len(texts), _CHUNK):
        ids = [
            encoding.ids
            for encoding in backend.encode_batch_fast(texts[begin : begin + _CHUNK], add_special_tokens=False)
        ]
        lengths += [len(run) for run in ids]
        tokens.append(np.fromiter((token for run in ids for token in run), np.int32))
    counts = np.asarray(lengths, np.int64)
    return Sequences(
        np.concatenate(tokens), offsets_of(counts), counts.astype(np.int32), SpecialTokens.of(tokenizer)
    )


def assemble_singles(texts: Sequences, max_length: int) -> Sequences:
    """`[CLS] A [SEP]` of each text, cut to ``max_length`` tokens."""
    kept = np.minimum(texts.lengths, max_length - 2)
    offsets = offsets_of(kept + 2)
    tokens = np.empty(offsets[-1], np.int32)
    tokens[offsets[:-1]] = texts.special.cls
    tokens[offsets[1:] - 1] = texts.special.sep
    _copy_runs(texts, kept, tokens, offsets[:-1] + 1)
    truncated = int(np.count_nonzero(kept < texts.lengths))
    return Sequences(tokens, offsets, (kept + 2).astype(np.int32), texts.special, max_length, truncated)


def assemble_pairs(first: Sequences, second: Sequences, max_length: int) -> Sequences:
    """`[CLS] A [SEP] B [SEP]` of each pair, cut to ``max_length`` tokens, the longer text first."""
    special = first.special
    kept_a, kept_b = longest_first(first.lengths, second.lengths, max_length - 3)
    offsets = offsets_of(kept_a + kept_b + 3)
    tokens = np.empty(offsets[-1], np.int32)
    tokens[offsets[:-1]] = special.cls
    tokens[offsets[:-1] + 1 + kept_a] = special.sep
    tokens[offsets[1:] - 1] = special.sep
    _copy_runs(first, kept_a, tokens, offsets[:-1] + 1)
    _copy_runs(second, kept_b, tokens, offsets[:-1] + 2 + kept_a)
    truncated = int(np.count_nonzero(kept_a + kept_b < first.lengths + second.lengths))
    return Sequences(tokens, offsets, (kept_a + 2).astype(np.int32), special, max_length, truncated)


def longest_first(count_a: np.ndarray, count_b: np.ndarray, room: int) -> tuple[np.ndarray, np.ndarray]:
    """How many pieces of A and B are kept so that both fit in ``room``, cutting the longer one first.

    Of two texts that are both longer than half the room the longer gets the odd piece, on a tie B, as in
    Hugging Face's ``longest_first``.
    """
    shorter = np.minimum(np.minimum(count_a, count_b), room // 2)
    longer = np.minimum(np.maximum(count_a, count_b), room - shorter)
    fits, a_longer = count_a + count_b <= room, count_a > count_b
    return (
        np.where(fits, count_a, np.where(a_longer, longer, shorter)),
        np.where(fits, count_b, np.where(a_longer, shorter, longer)),
    )


def interleave(parts: list[Sequences]) -> Sequences:
    """a0 b0 a1 b1 ... from [a0 a1 ...] and [b0 b1 ...]."""
    everything = replace(
        parts[0],
        tokens=np.concatenate([part.tokens for part in parts]),
        offsets=offsets_of(np.concatenate([part.lengths for part in parts])),
        segment_b_start=np.concatenate([part.segment_b_start for part in parts]),
        truncated=sum(part.truncated for part in parts),
    )
    return everything.select(np.arange(len(everything)).reshape(len(parts), -1).T.ravel())


def _copy_runs(texts: Sequences, kept: np.ndarray, tokens: np.ndarray, begins: np.ndarray) -> None:
    """Copies the first ``kept`` pieces of each text to ``tokens``, beginning at ``begins``."""
    offsets = offsets_of(kept)
    tokens[gather_indices(begins, offsets)] = texts.tokens[gather_indices(texts.offsets[:-1], offsets)]
