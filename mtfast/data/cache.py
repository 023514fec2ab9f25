"""Tokenization, done once: Arrow files keyed by tokenizer, data and settings, memory-mapped on load."""

import hashlib
import json
import logging
import os
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import filelock
import numpy as np
import pyarrow
import pyarrow.ipc

from mtfast.data.tasks import Task, TaskTable

logger = logging.getLogger(__name__)

FORMAT = 1
_CHUNK = 8192


@dataclass(frozen=True)
class SpecialTokens:
    """The tokenizer's ids that packing needs, and all ids that are special (sorted)."""

    cls: int
    sep: int
    pad: int
    all: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: Any) -> "SpecialTokens":
        """Of a Hugging Face tokenizer; ValueError names a token that it lacks."""
        names = ("cls_token_id", "sep_token_id", "pad_token_id")
        missing = [name for name in names if getattr(tokenizer, name, None) is None]
        if missing:
            raise ValueError(f"tokenizer has no {', '.join(missing)}; a BERT tokenizer is needed")
        return cls(
            tokenizer.cls_token_id,
            tokenizer.sep_token_id,
            tokenizer.pad_token_id,
            tuple(sorted(set(tokenizer.all_special_ids))),
        )


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
        offsets = np.concatenate([[0], np.cumsum(self.lengths[rows])])
        source = gather_indices(self.offsets[rows], offsets)
        return Sequences(self.tokens[source], offsets, self.segment_b_start[rows], self.truncated)


@dataclass(frozen=True)
class TokenizedTask:
    """The examples of a task as token sequences: 2 of them for each separately encoded pair, else 1.

    Sequence ``i * sequences_per_example + j`` belongs to example i. ``labels`` is int64 (sst) or float32, or
    None without labels; ``truncated`` counts the sequences cut to ``max_length``.
    """

    task: Task
    sequences: Sequences
    sequences_per_example: int
    labels: np.ndarray | None
    ids: list[str]
    max_length: int
    special: SpecialTokens

    def __len__(self) -> int:
        return len(self.ids)

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
        """int32 [sequences]"""
        return self.sequences.segment_b_start

    @property
    def truncated(self) -> int:
        """Sequences that were cut to ``max_length``."""
        return self.sequences.truncated

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


def gather_indices(starts: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Indices that copy runs beginning at ``starts`` [n] to the places ``offsets`` [n + 1], int64."""
    return np.repeat(starts - offsets[:-1], np.diff(offsets)) + np.arange(offsets[-1])


def tokenize_task(
    table: TaskTable,
    tokenizer: Any,
    *,
    max_length: int,
    pair_input: Literal["separate", "joint"] = "separate",
    cache_dir: str | Path | None = None,
) -> TokenizedTask:
    """Tokenizes a task's sentences with a fast Hugging Face tokenizer, in its own threads.

    ``pair_input`` "separate" makes two sequences of each pair, "joint" one `[CLS] A [SEP] B [SEP]`.
    Sequences longer than ``max_length`` lose word pieces from their end (joint pairs: from the longer
    sentence first, as Hugging Face's ``longest_first``) and keep [CLS] and [SEP]. With ``cache_dir`` the
    result is stored there and loaded by the next call with the same tokenizer, texts and settings.
    """
    if pair_input not in ("separate", "joint"):
        raise ValueError(f'pair_input must be "separate" or "joint", found {pair_input!r}')
    if max_length < 8:
        raise ValueError(f"max_length must be at least 8, found {max_length}")
    special = SpecialTokens.of(tokenizer)
    joint = pair_input == "joint" and len(table.texts) == 2

    def build() -> Sequences:
        parts = [tokenize_texts(tokenizer, texts) for texts in table.texts]
        if joint:
            return assemble_pairs(parts[0], parts[1], max_length, special)
        singles = [assemble_singles(part, max_length, special) for part in parts]
        return singles[0] if len(singles) == 1 else _interleave(singles)

    if cache_dir is None:
        sequences = build()
    else:
        key = cache_key(tokenizer, table.texts, {"max_length": max_length, "joint": joint})
        sequences = cached_sequences(Path(cache_dir), f"{table.task.name}-{table.split}", key, build)
    return TokenizedTask(
        table.task,
        sequences,
        1 if joint else len(table.texts),
        table.labels,
        table.ids,
        max_length,
        special,
    )


@dataclass(frozen=True)
class Pieces:
    """Word pieces without special tokens: tokens int32 [sum], offsets int64 [texts + 1]."""

    tokens: np.ndarray
    offsets: np.ndarray


def tokenize_texts(tokenizer: Any, texts: list[str]) -> Pieces:
    """Word pieces of each text, without special tokens and without a length limit."""
    tokens, lengths = [], []
    for begin in range(0, len(texts), _CHUNK):
        encoded = tokenizer(
            texts[begin : begin + _CHUNK],
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )["input_ids"]
        lengths += [len(ids) for ids in encoded]
        tokens.append(np.fromiter((token for ids in encoded for token in ids), np.int32))
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    return Pieces(np.concatenate(tokens) if tokens else np.empty(0, np.int32), offsets)


def assemble_singles(pieces: Pieces, max_length: int, special: SpecialTokens) -> Sequences:
    """`[CLS] A [SEP]` of each text, cut to ``max_length`` tokens."""
    counts = np.diff(pieces.offsets)
    kept = np.minimum(counts, max_length - 2)
    offsets = np.concatenate([[0], np.cumsum(kept + 2)])
    tokens = np.empty(offsets[-1], np.int32)
    tokens[offsets[:-1]] = special.cls
    tokens[offsets[1:] - 1] = special.sep
    _copy_runs(pieces, kept, tokens, offsets[:-1] + 1)
    return Sequences(tokens, offsets, (kept + 2).astype(np.int32), int(np.count_nonzero(kept < counts)))


def assemble_pairs(first: Pieces, second: Pieces, max_length: int, special: SpecialTokens) -> Sequences:
    """`[CLS] A [SEP] B [SEP]` of each pair, cut to ``max_length`` tokens, the longer text first."""
    count_a, count_b = np.diff(first.offsets), np.diff(second.offsets)
    kept_a, kept_b = longest_first(count_a, count_b, max_length - 3)
    offsets = np.concatenate([[0], np.cumsum(kept_a + kept_b + 3)])
    tokens = np.empty(offsets[-1], np.int32)
    tokens[offsets[:-1]] = special.cls
    tokens[offsets[:-1] + 1 + kept_a] = special.sep
    tokens[offsets[1:] - 1] = special.sep
    _copy_runs(first, kept_a, tokens, offsets[:-1] + 1)
    _copy_runs(second, kept_b, tokens, offsets[:-1] + 2 + kept_a)
    truncated = int(np.count_nonzero(kept_a + kept_b < count_a + count_b))
    return Sequences(tokens, offsets, (kept_a + 2).astype(np.int32), truncated)


def longest_first(count_a: np.ndarray, count_b: np.ndarray, room: int) -> tuple[np.ndarray, np.ndarray]:
    """How many pieces of A and B remain when both must fit in ``room``, cutting the longer one first."""
    shorter = np.minimum(np.minimum(count_a, count_b), room // 2)
    fits = count_a + count_b <= room
    # The longer text gets what the shorter leaves; of two long ones the longer gets the odd piece.
    kept_a = np.where(count_a <= count_b, shorter, np.minimum(count_a, room - shorter))
    kept_b = np.where(count_a <= count_b, np.minimum(count_b, room - shorter), shorter)
    return np.where(fits, count_a, kept_a), np.where(fits, count_b, kept_b)


def _copy_runs(pieces: Pieces, kept: np.ndarray, tokens: np.ndarray, places: np.ndarray) -> None:
    """Copies the first ``kept`` pieces of each text to ``places`` in ``tokens``."""
    offsets = np.concatenate([[0], np.cumsum(kept)])
    tokens[gather_indices(places, offsets)] = pieces.tokens[gather_indices(pieces.offsets[:-1], offsets)]


def _interleave(parts: list[Sequences]) -> Sequences:
    """a0 b0 a1 b1 ... from [a0 a1 ...] and [b0 b1 ...]."""
    count = len(parts[0])
    both = Sequences(
        np.concatenate([part.tokens for part in parts]),
        np.concatenate([[0], np.cumsum(np.concatenate([part.lengths for part in parts]))]),
        np.concatenate([part.segment_b_start for part in parts]),
        sum(part.truncated for part in parts),
    )
    return both.select(np.arange(len(parts) * count).reshape(len(parts), count).T.ravel())


def cache_key(tokenizer: Any, columns: Iterable[list[str]], settings: dict[str, Any]) -> str:
    """A hex digest of the tokenizer (its whole definition), the texts and the settings."""
    digest = hashlib.sha256()
    digest.update(json.dumps({"format": FORMAT, **settings}, sort_keys=True).encode())
    definition = json.loads(tokenizer.backend_tokenizer.to_str())
    # These two are left over from the tokenizer's last call; they do not matter here.
    del definition["truncation"], definition["padding"]
    digest.update(json.dumps(definition, sort_keys=True).encode())
    for texts in columns:
        digest.update(b"%d\n" % len(texts))
        for text in texts:
            encoded = text.encode()
            digest.update(b"%d\n" % len(encoded))
            digest.update(encoded)
    return digest.hexdigest()[:32]


def cached_sequences(directory: Path, name: str, key: str, build: Callable[[], Sequences]) -> Sequences:
    """Loads ``name`` from the cache, or builds and stores it if it is missing, stale or torn.

    One file per (name, key), written to a temporary file and renamed, under a lock so that of several
    processes only one builds.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{name}-{key[:16]}.arrow"
    with filelock.FileLock(f"{path}.lock"):
        if path.exists():
            try:
                return _load(path, key)
            except (OSError, ValueError, KeyError, pyarrow.ArrowException) as error:
                logger.warning("cache file %s is rebuilt: %s", path, error)
        sequences = build()
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        try:
            _store(temporary, key, sequences)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        return _load(path, key)


def _checksum(tokens: np.ndarray, offsets: np.ndarray, segment_b_start: np.ndarray) -> int:
    value = 0
    for array in (tokens, offsets, segment_b_start):
        value = zlib.crc32(np.ascontiguousarray(array).data, value)
    return value


def _store(path: Path, key: str, sequences: Sequences) -> None:
    offsets = np.ascontiguousarray(sequences.offsets, np.int64)
    tokens = np.ascontiguousarray(sequences.tokens, np.int32)
    starts = np.ascontiguousarray(sequences.segment_b_start, np.int32)
    metadata = {
        "key": key,
        "sequences": len(sequences),
        "tokens": len(tokens),
        "truncated": sequences.truncated,
        "checksum": _checksum(tokens, offsets, starts),
    }
    column = pyarrow.LargeListArray.from_arrays(pyarrow.array(offsets), pyarrow.array(tokens))
    batch = pyarrow.record_batch({"input_ids": column, "segment_b_start": pyarrow.array(starts)})
    batch = batch.replace_schema_metadata({"mtfast": json.dumps(metadata)})
    with (
        pyarrow.OSFile(str(path), "wb") as sink,
        pyarrow.ipc.new_file(sink, batch.schema) as writer,
    ):
        writer.write_batch(batch)


def _load(path: Path, key: str) -> Sequences:
    """Memory-mapped views of a cache file; ValueError or an Arrow error if it is not the one asked for."""
    reader = pyarrow.ipc.open_file(pyarrow.memory_map(str(path)))
    metadata = json.loads(reader.schema.metadata[b"mtfast"])
    if metadata["key"] != key:
        raise ValueError("it was made from other data, settings or another tokenizer")
    batch = reader.get_batch(0)
    column = batch.column("input_ids")
    offsets = column.offsets.to_numpy(zero_copy_only=True)
    tokens = column.values.to_numpy(zero_copy_only=True)
    starts = batch.column("segment_b_start").to_numpy(zero_copy_only=True)
    if (len(offsets) - 1, len(tokens)) != (metadata["sequences"], metadata["tokens"]):
        raise ValueError("its row count is not the recorded one")
    if _checksum(tokens, offsets, starts) != metadata["checksum"]:
        raise ValueError("its checksum is not the recorded one")
    return Sequences(tokens, offsets, starts, metadata["truncated"])
