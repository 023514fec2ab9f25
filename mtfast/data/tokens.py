"""From texts to token sequences: word pieces, special tokens, truncation, all in flat arrays."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

_CHUNK = 8192


@dataclass(frozen=True)
class SpecialTokens:
    """The tokenizer's ids that packing needs, all ids that are special (sorted), and the id of unknown words,
    where it has one."""

    cls: int
    sep: int
    pad: int
    all: tuple[int, ...]
    unk: int | None = None

    @classmethod
    def of(cls, tokenizer: Any) -> "SpecialTokens":
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
class Pieces:
    """Runs of word pieces without special tokens: run i is tokens[starts[i] : starts[i] + counts[i]].

    tokens int32 [any], starts and counts int64 [runs].
    """

    tokens: np.ndarray
    starts: np.ndarray
    counts: np.ndarray


@dataclass(frozen=True)
class Sequences:
    """Token sequences back to back, each `[CLS] A [SEP]` or `[CLS] A [SEP] B [SEP]`.

    tokens int32 [sum], offsets int64 [sequences + 1], segment_b_start int32 [sequences]: where token type 1
    begins, or the length of the sequence if there is no second segment. ``truncated`` counts the sequences
    that were cut to the maximum length.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    segment_b_start: np.ndarray
    truncated: int

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each sequence, int64 [sequences]."""
        return np.diff(self.offsets)

    def select(self, rows: np.ndarray) -> "Sequences":
        """The sequences at ``rows`` (integer indices, in that order)."""
        offsets = offsets_of(self.lengths[rows])
        tokens = self.tokens[gather_indices(self.offsets[rows], offsets)]
        return Sequences(tokens, offsets, self.segment_b_start[rows], self.truncated)


@dataclass(frozen=True)
class Tokenized:
    """Examples as token sequences, with what packing and reports need to know of them."""

    sequences: Sequences
    max_length: int
    special: SpecialTokens

    @property
    def tokens(self) -> np.ndarray:
        """int32 [sum of lengths]"""
        return self.sequences.tokens

    @property
    def offsets(self) -> np.ndarray:
        """int64 [sequences + 1]"""
        return self.sequences.offsets

    @property
    def segment_b_start(self) -> np.ndarray:
        """int32 [sequences]: where token type 1 begins; the length of the sequence where it does not."""
        return self.sequences.segment_b_start

    @property
    def truncated(self) -> int:
        """Sequences that were cut to ``max_length``."""
        return self.sequences.truncated

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


def offsets_of(lengths: np.ndarray) -> np.ndarray:
    """0 and the running sums of ``lengths`` [n]: int64 [n + 1]."""
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def gather_indices(starts: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Indices that copy runs beginning at ``starts`` [n] to the places ``offsets`` [n + 1], int64."""
    return np.repeat(starts - offsets[:-1], np.diff(offsets)) + np.arange(offsets[-1])


def tokenize_texts(tokenizer: Any, texts: list[str]) -> Pieces:
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
    return Pieces(np.concatenate(tokens), offsets_of(counts)[:-1], counts)


def assemble_singles(pieces: Pieces, max_length: int, special: SpecialTokens) -> Sequences:
    """`[CLS] A [SEP]` of each text, cut to ``max_length`` tokens."""
    kept = np.minimum(pieces.counts, max_length - 2)
    offsets = offsets_of(kept + 2)
    tokens = np.empty(offsets[-1], np.int32)
    tokens[offsets[:-1]] = special.cls
    tokens[offsets[1:] - 1] = special.sep
    _copy_runs(pieces, kept, tokens, offsets[:-1] + 1)
    truncated = int(np.count_nonzero(kept < pieces.counts))
    return Sequences(tokens, offsets, (kept + 2).astype(np.int32), truncated)


def assemble_pairs(first: Pieces, second: Pieces, max_length: int, special: SpecialTokens) -> Sequences:
    """`[CLS] A [SEP] B [SEP]` of each pair, cut to ``max_length`` tokens, the longer text first."""
    kept_a, kept_b = longest_first(first.counts, second.counts, max_length - 3)
    offsets = offsets_of(kept_a + kept_b + 3)
    tokens = np.empty(offsets[-1], np.int32)
    tokens[offsets[:-1]] = special.cls
    tokens[offsets[:-1] + 1 + kept_a] = special.sep
    tokens[offsets[1:] - 1] = special.sep
    _copy_runs(first, kept_a, tokens, offsets[:-1] + 1)
    _copy_runs(second, kept_b, tokens, offsets[:-1] + 2 + kept_a)
    truncated = int(np.count_nonzero(kept_a + kept_b < first.counts + second.counts))
    return Sequences(tokens, offsets, (kept_a + 2).astype(np.int32), truncated)


def longest_first(count_a: np.ndarray, count_b: np.ndarray, room: int) -> tuple[np.ndarray, np.ndarray]:
    """How many pieces of A and B remain when both must fit in ``room``, cutting the longer one first.

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
    everything = Sequences(
        np.concatenate([part.tokens for part in parts]),
        offsets_of(np.concatenate([part.lengths for part in parts])),
        np.concatenate([part.segment_b_start for part in parts]),
        sum(part.truncated for part in parts),
    )
    return everything.select(np.arange(len(everything)).reshape(len(parts), -1).T.ravel())


def _copy_runs(pieces: Pieces, kept: np.ndarray, tokens: np.ndarray, places: np.ndarray) -> None:
    """Copies the first ``kept`` pieces of each run to ``places`` in ``tokens``."""
    offsets = offsets_of(kept)
    tokens[gather_indices(places, offsets)] = pieces.tokens[gather_indices(pieces.starts, offsets)]
