"""From planned example indices to packed batches: every sequence back to back, nothing padded."""

import queue
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from mtfast.data.tokenized import TokenizedTask
from mtfast.data.tokens import Sequences, SpecialTokens, gather_indices, offsets_of

if TYPE_CHECKING:
    from mtfast.data.reviews import ReviewSamples

T = TypeVar("T")
_B = TypeVar("_B", bound="_Movable")


class _Movable:
    """A frozen dataclass of tensors, and of dicts of such dataclasses, that moves as a whole."""

    def to(self: _B, device: torch.device | str, non_blocking: bool = False) -> _B:
        """A copy with every tensor on ``device``; sizes and counts stay on the host."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self: _B) -> _B:
        """A copy with every tensor in page-locked host memory."""
        return self._map(torch.Tensor.pin_memory)

    def _map(self: _B, function: Any) -> _B:
        def apply(value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                return function(value)
            if isinstance(value, dict):
                return {name: apply(item) for name, item in value.items()}
            return value._map(function) if isinstance(value, _Movable) else value

        return type(self)(**{f.name: apply(getattr(self, f.name)) for f in fields(self)})  # type: ignore[arg-type]


@dataclass(frozen=True)
class TaskRows(_Movable):
    """Where a task's examples are in a packed batch.

    sequences: int64 [n], or [n, 2] for separately encoded pairs: which sequences of the batch.
    labels: int64 [n] for sst, float32 [n] for quora and sts; None where the data has none.
    examples: int64 [n], each example's index in its table.
    step_count: examples of this task in the whole optimizer step, over all ranks and micro-batches.
    """

    sequences: torch.Tensor
    labels: torch.Tensor | None
    examples: torch.Tensor
    step_count: int


@dataclass(frozen=True)
class _Packed(_Movable):
    """The packed tokens: input_ids, token_type_ids and position_ids int32 [total], cu_seqlens int32
    [sequences + 1], the longest sequence, and the number of tokens without the filler at the end."""

    input_ids: torch.Tensor
    token_type_ids: torch.Tensor
    position_ids: torch.Tensor
    cu_seqlens: torch.Tensor
    max_seqlen: int
    tokens: int

    def encoder_inputs(self) -> dict[str, Any]:
        """The keyword arguments of the encoder."""
        names = ("input_ids", "token_type_ids", "position_ids", "cu_seqlens", "max_seqlen")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class PackedBatch(_Packed):
    """A packed mixed-task batch; ``tasks`` has an entry for every task, also for one without rows here."""

    tasks: dict[str, TaskRows]


@dataclass(frozen=True)
class ReviewBatch(_Packed):
    """A packed batch of pre-training samples; sample i is sequence i.

    positions: int64 [total], the identity of each token in the corpus (for mask_tokens).
    nsp_labels: int64 [samples], 0 where B follows A. samples: int64 [samples], indices in the table.
    masked: tokens that mask_tokens chooses here with its "exact" strategy. step_masked and step_samples are
    the sums of masked and of samples over the whole optimizer step, all ranks and micro-batches.
    """

    positions: torch.Tensor
    nsp_labels: torch.Tensor
    samples: torch.Tensor
    masked: int
    step_masked: int
    step_samples: int


def pack_tasks(
    tables: Mapping[str, TokenizedTask],
    micro_batch: Mapping[str, np.ndarray],
    step_counts: Mapping[str, int],
    *,
    bucket_tokens: int = 1,
) -> PackedBatch:
    """Packs the examples ``micro_batch[task]`` (indices) of every table, in the tables' order.

    The total is rounded up to a multiple of ``bucket_tokens`` with sequences of [PAD] at the end that no row
    refers to and that are no longer than the longest real one. A micro-batch without any example is one such
    sequence, so that every rank always has something to run.
    """
    parts, tasks, begin = [], {}, 0
    for name, table in tables.items():
        rows = np.asarray(micro_batch.get(name, ()), dtype=np.int64)
        per = table.sequences_per_example
        wanted = (rows[:, None] * per + np.arange(per)).ravel()
        parts.append((table.sequences, wanted))
        places = begin + np.arange(len(wanted))
        begin += len(wanted)
        tasks[name] = TaskRows(
            torch.from_numpy(places if per == 1 else places.reshape(-1, per)),
            None if table.labels is None else torch.from_numpy(table.labels[rows]),
            torch.from_numpy(rows),
            int(step_counts.get(name, 0)),
        )
    if not parts:
        raise ValueError("tables is empty: there is no task to pack")
    table = next(iter(tables.values()))
    encoder, _ = _pack(parts, table.special, table.max_length, bucket_tokens)
    return PackedBatch(**encoder, tasks=tasks)


def pack_reviews(
    samples: "ReviewSamples",
    micro_batch: np.ndarray,
    *,
    mlm_probability: float,
    step_masked: int,
    step_samples: int,
    bucket_tokens: int = 1,
) -> ReviewBatch:
    """Packs the pre-training samples ``micro_batch`` (indices), filled up as in `pack_tasks`.

    A token's position is sample * max_length + its place in the sample, whatever batch or rank it is in;
    filler tokens get positions beyond the corpus.
    """
    rows = np.asarray(micro_batch, dtype=np.int64)
    encoder, cu_seqlens = _pack(
        [(samples.sequences, rows)], samples.special, samples.max_length, bucket_tokens
    )
    filler = np.arange(len(samples), len(samples) + len(cu_seqlens) - 1 - len(rows))
    owner = np.concatenate([rows, filler]) * samples.max_length
    return ReviewBatch(
        **encoder,
        positions=torch.from_numpy(gather_indices(owner, cu_seqlens)),
        nsp_labels=torch.from_numpy(samples.nsp_labels[rows]),
        samples=torch.from_numpy(rows),
        masked=int(samples.masked_counts(mlm_probability, rows).sum()),
        step_masked=step_masked,
        step_samples=step_samples,
    )


def _pack(
    parts: list[tuple[Sequences, np.ndarray]], special: SpecialTokens, max_length: int, bucket_tokens: int
) -> tuple[dict[str, Any], np.ndarray]:
    """The fields of `_Packed`, and cu_seqlens as int64."""
    if bucket_tokens < 1:
        raise ValueError(f"bucket_tokens must be at least 1, found {bucket_tokens}")
    lengths = np.concatenate([table.offsets[rows + 1] - table.offsets[rows] for table, rows in parts])
    real = int(lengths.sum())
    longest = int(lengths.max(initial=0))
    filler = max(-(-real // bucket_tokens), 1) * bucket_tokens - real
    chunk = longest or max_length
    fillers = np.minimum(np.full(-(-filler // chunk), chunk), filler - chunk * np.arange(-(-filler // chunk)))
    lengths = np.concatenate([lengths, fillers])
    cu_seqlens = offsets_of(lengths)
    within = np.arange(cu_seqlens[-1]) - np.repeat(cu_seqlens[:-1], lengths)

    input_ids = np.full(cu_seqlens[-1], special.pad, np.int32)
    segment_b = np.concatenate([*(table.segment_b_start[rows] for table, rows in parts), fillers])
    begin = first = 0
    for table, rows in parts:
        local = cu_seqlens[first : first + len(rows) + 1] - begin
        input_ids[begin : begin + local[-1]] = table.tokens[gather_indices(table.offsets[rows], local)]
        begin, first = begin + int(local[-1]), first + len(rows)
    fields_ = {
        "input_ids": torch.from_numpy(input_ids),
        "token_type_ids": torch.from_numpy((within >= np.repeat(segment_b, lengths)).astype(np.int32)),
        "position_ids": torch.from_numpy(within.astype(np.int32)),
        "cu_seqlens": torch.from_numpy(cu_seqlens.astype(np.int32)),
        "max_seqlen": int(lengths.max()),
        "tokens": real,
    }
    return fields_, cu_seqlens


def prefetch(iterable: Iterable[T], depth: int = 2) -> Iterator[T]:
    """Yields the items of ``iterable``, up to ``depth`` of them made ahead in a background thread.

    An exception of the iterable is raised here, after the items before it; closing or dropping the
    iterator stops the thread.
    """
    if depth < 1:
        raise ValueError(f"depth must be at least 1, found {depth}")
    ready: queue.Queue[tuple[str, Any]] = queue.Queue(depth)
    stop = threading.Event()

    def put(item: tuple[str, Any]) -> bool:
        while not stop.is_set():
            try:
                ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def produce() -> None:
        try:
            for item in iterable:
                if not put(("item", item)):
                    return
            put(("end", None))
        except BaseException as error:
            put(("error", error))

    thread = threading.Thread(target=produce, name="mtfast-prefetch", daemon=True)
    thread.start()
    try:
        while True:
            kind, value = ready.get()
            if kind == "item":
                yield value
            elif kind == "error":
                raise value
            else:
                return
    finally:
        stop.set()
        thread.join(timeout=5)
