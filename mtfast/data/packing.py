"""From planned example indices to packed batches: every sequence back to back, nothing padded."""

import queue
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from mtfast.data.sampler import StepPlan
from mtfast.data.tokens import Sequences, TokenizedTask, gather_indices, offsets_of

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

    def sent_to(self: _B, device: torch.device) -> _B:
        """On ``device``, without waiting for the copy to a GPU."""
        return self.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else self

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
    """A task's examples in a packed batch.

    sequences: int64 [n], or [n, 2] for separately encoded pairs: indices of their sequences in the batch.
    labels: int64 [n] for classification, float32 [n] else; None where the data has none.
    examples: int64 [n], each example's index in its table.
    step_count: examples of this task in the whole optimizer step, over all ranks and micro-batches.
    token_bounds: int64 [n, 2], begin and end of each sequence in the packed tokens, without [CLS]; for tasks
    with an LSTM head alone, and an array since it stays on the host.
    """

    sequences: torch.Tensor
    labels: torch.Tensor | None
    examples: torch.Tensor
    step_count: int
    token_bounds: np.ndarray | None = None


@dataclass(frozen=True)
class _Packed(_Movable):
    """The packed tokens.

    input_ids, token_type_ids, position_ids: int32 [total].
    cu_seqlens: int32 [sequences + 1], where each sequence begins and, last, the total.
    max_seqlen: length of the longest sequence.
    tokens: their number without the filler at the end.
    """

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
    """A packed mixed-task batch; ``tasks`` has an entry for every task, even without examples here."""

    tasks: dict[str, TaskRows]

    @property
    def size(self) -> int:
        """Examples, of all tasks."""
        return sum(len(rows.examples) for rows in self.tasks.values())

    @property
    def sequences(self) -> dict[str, torch.Tensor]:
        """Each task's sequences, as in `TaskRows`."""
        return {name: rows.sequences for name, rows in self.tasks.items()}

    @property
    def token_bounds(self) -> dict[str, torch.Tensor]:
        """As in `TaskRows`, of the tasks that have any."""
        found = {name: rows.token_bounds for name, rows in self.tasks.items()}
        return {name: torch.from_numpy(bounds) for name, bounds in found.items() if bounds is not None}

    def model_inputs(self) -> dict[str, Any]:
        """The keyword arguments of `MultiTaskModel`, without labels."""
        return self.encoder_inputs() | {"sequences": self.sequences, "token_bounds": self.token_bounds}


@dataclass(frozen=True)
class ReviewBatch(_Packed):
    """A packed batch of pre-training samples; sample i is sequence i.

    positions: int64 [total], each token's index in the corpus (for mask_tokens).
    nsp_labels: int64 [samples], 0 where B follows A.
    masked: tokens that mask_tokens chooses here with its "exact" strategy.
    step_masked, step_samples: masked tokens and samples of the whole optimizer step, over all ranks and
    micro-batches.
    mask_seed: seed of the masking.
    """

    positions: torch.Tensor
    nsp_labels: torch.Tensor
    masked: int
    step_masked: int
    step_samples: int
    mask_seed: int

    @property
    def size(self) -> int:
        """Samples."""
        return len(self.nsp_labels)


def pack_tasks(
    tables: Mapping[str, TokenizedTask],
    micro_batch: Mapping[str, np.ndarray],
    step_counts: Mapping[str, int],
    *,
    bucket_tokens: int = 1,
) -> PackedBatch:
    """Packs the examples ``micro_batch[task]`` (indices) of every table, in the tables' order.

    The total is rounded up to a multiple of ``bucket_tokens`` with filler: sequences of [PAD] at the end that
    belong to no example and are no longer than the longest real one. A micro-batch without any example has
    filler only, so that every rank can always run a step.
    """
    if not tables:
        raise ValueError("tables is empty: there is no task to pack")
    parts, tasks, rows_of, begin = [], {}, {}, 0
    for name, table in tables.items():
        rows = np.asarray(micro_batch.get(name, ()), dtype=np.int64)
        per = table.task.sequences_per_example
        wanted = (rows[:, None] * per + np.arange(per)).ravel()
        parts.append((table.sequences, wanted))
        sequences = begin + np.arange(len(wanted))
        begin += len(wanted)
        rows_of[name] = sequences
        tasks[name] = TaskRows(
            torch.from_numpy(sequences if per == 1 else sequences.reshape(-1, per)),
            None if table.labels is None else torch.from_numpy(table.labels[rows]),
            torch.from_numpy(rows),
            int(step_counts.get(name, 0)),
        )
    encoder, cu_seqlens = _pack(parts, bucket_tokens)
    for name, table in tables.items():
        if table.task.head == "lstm":
            rows = rows_of[name]
            bounds = np.stack([cu_seqlens[rows] + 1, cu_seqlens[rows + 1]], axis=1)
            tasks[name] = replace(tasks[name], token_bounds=bounds)
    return PackedBatch(**encoder, tasks=tasks)


def packed_steps(
    tables: Mapping[str, TokenizedTask], steps: list[StepPlan], device: torch.device, bucket_tokens: int
) -> Iterator[list[PackedBatch]]:
    """Each step's micro-batches of this rank on ``device``, packed ahead in the background."""

    def pack(step: StepPlan) -> list[PackedBatch]:
        return [
            pack_tasks(tables, part, step.step_counts, bucket_tokens=bucket_tokens).sent_to(device)
            for part in step.micro_batches
        ]

    return prefetch(map(pack, steps))


def pack_reviews(
    samples: "ReviewSamples",
    micro_batch: np.ndarray,
    *,
    mlm_probability: float,
    step_masked: int,
    step_samples: int,
    mask_seed: int = 0,
    bucket_tokens: int = 1,
) -> ReviewBatch:
    """Packs the pre-training samples ``micro_batch`` (indices), with filler as in `pack_tasks`.

    A token's position is sample * max_length + its index in the sample, so that masking does not depend on
    the batch or rank; filler tokens have positions beyond the corpus.
    """
    rows = np.asarray(micro_batch, dtype=np.int64)
    encoder, cu_seqlens = _pack([(samples.sequences, rows)], bucket_tokens)
    filler = np.arange(len(samples), len(samples) + len(cu_seqlens) - 1 - len(rows))
    owner = np.concatenate([rows, filler]) * samples.sequences.max_length
    return ReviewBatch(
        **encoder,
        positions=torch.from_numpy(gather_indices(owner, cu_seqlens)),
        nsp_labels=torch.from_numpy(samples.nsp_labels[rows]),
        masked=int(samples.masked_counts(mlm_probability, rows).sum()),
        step_masked=step_masked,
        step_samples=step_samples,
        mask_seed=mask_seed,
    )


def _pack(parts: list[tuple[Sequences, np.ndarray]], bucket_tokens: int) -> tuple[dict[str, Any], np.ndarray]:
    """The fields of `_Packed`, and cu_seqlens as int64, from ``parts``: tables and the sequences of each."""
    if bucket_tokens < 1:
        raise ValueError(f"bucket_tokens must be at least 1, found {bucket_tokens}")
    lengths = np.concatenate([table.offsets[rows + 1] - table.offsets[rows] for table, rows in parts])
    real = int(lengths.sum())
    longest = int(lengths.max(initial=0))
    filler = max(-(-real // bucket_tokens), 1) * bucket_tokens - real
    chunk = longest or parts[0][0].max_length or bucket_tokens
    fillers = np.minimum(np.full(-(-filler // chunk), chunk), filler - chunk * np.arange(-(-filler // chunk)))
    lengths = np.concatenate([lengths, fillers])
    cu_seqlens = offsets_of(lengths)
    within = np.arange(cu_seqlens[-1]) - np.repeat(cu_seqlens[:-1], lengths)

    input_ids = np.full(cu_seqlens[-1], parts[0][0].special.pad, np.int32)
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
