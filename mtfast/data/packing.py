"""From planned example indices to packed batches: every sequence back to back, nothing padded."""

import queue
import threading
from collections.abc import Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from mtfast.data.sampler import StepPlan
from mtfast.data.tokens import Sequences, TokenizedTask, offsets_of

if TYPE_CHECKING:
    from mtfast.data.reviews import ReviewSamples

T = TypeVar("T")
_P = TypeVar("_P", bound="_Packed")

_ALIGNMENT = 16  # bytes: a kernel may load as many at once
_DTYPES = (torch.int32, torch.int64, torch.float32)

_Parts = list[tuple[Sequences, np.ndarray]]  # tables, and which sequences of each
_Shapes = dict[Any, tuple[Any, int]]  # dtype and length of arrays by name


@dataclass(frozen=True)
class TaskRows:
    """A task's examples in a packed batch.

    sequences: int64 [n], or [n, 2] for separately encoded pairs: indices of their sequences in the batch.
    labels: int64 [n] for classification, float32 [n] else; None where the data has none or they are not read.
    step_count: examples of this task in the whole optimizer step, over all ranks and micro-batches.
    token_bounds: int64 [n, 2], begin and end of each sequence in the packed tokens, without [CLS]; for tasks
    with an LSTM head alone, and an array since it stays on the host.
    """

    sequences: torch.Tensor
    labels: torch.Tensor | None
    step_count: int
    token_bounds: np.ndarray | None = None


@dataclass(frozen=True)
class _Packed:
    """The packed tokens.

    buffer: uint8 [bytes], of which all tensors of the batch are parts, so that it moves in one copy; each
    begins at a multiple of 16 bytes.
    input_ids, token_type_ids, position_ids: int32 [total].
    cu_seqlens: int32 [sequences + 1], where each sequence begins and, last, the total.
    max_seqlen: length of the longest sequence.
    tokens: their number without the filler at the end.
    """

    buffer: torch.Tensor
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

    def to(self: _P, device: torch.device | str, non_blocking: bool = False) -> _P:
        """The batch with every tensor on ``device``, in one copy; what is no tensor stays on the host."""
        return self._on(self.buffer.to(device, non_blocking=non_blocking))

    def sent_to(self: _P, device: torch.device) -> _P:
        """On ``device``, without waiting for the copy to a GPU."""
        # torch keeps page-locked memory for later batches and gives it away no sooner than its copy is done.
        return self if device.type == "cpu" else self._on(sent(self.buffer, device))

    def _on(self: _P, buffer: torch.Tensor) -> _P:
        """The batch with parts of ``buffer``, a copy of its own one, for tensors."""
        begin, whole = self.buffer.data_ptr(), {dtype: buffer.view(dtype) for dtype in _DTYPES}

        def moved(value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                first = (value.data_ptr() - begin) // value.itemsize if value.numel() else 0
                return whole[value.dtype].as_strided(value.shape, value.stride(), first)
            if isinstance(value, TaskRows):
                return replace(value, sequences=moved(value.sequences), labels=moved(value.labels))
            return {name: moved(item) for name, item in value.items()} if isinstance(value, dict) else value

        parts = {f.name: moved(getattr(self, f.name)) for f in fields(self) if f.name != "buffer"}
        return type(self)(buffer=buffer, **parts)


@dataclass(frozen=True)
class PackedBatch(_Packed):
    """A packed mixed-task batch; ``tasks`` has an entry for every task, even without examples here."""

    tasks: dict[str, TaskRows]

    @property
    def size(self) -> int:
        """Examples, of all tasks."""
        return sum(len(rows.sequences) for rows in self.tasks.values())

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


def sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the host on ``device``, without waiting for the copy to a GPU."""
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def pack_tasks(
    tables: Mapping[str, TokenizedTask],
    micro_batch: Mapping[str, np.ndarray],
    step_counts: Mapping[str, int] | None,
    *,
    bucket_tokens: int = 1,
) -> PackedBatch:
    """Packs the examples ``micro_batch[task]`` (indices) of every table, in the tables' order.

    ``step_counts`` is None where nothing is trained, and the labels then stay behind. The total is rounded up
    to a multiple of ``bucket_tokens`` with filler: sequences of [PAD] at the end that belong to no example
    and are no longer than the longest real one. A micro-batch without any example has filler only, so that
    every rank can always run a step.
    """
    if not tables:
        raise ValueError("tables is empty: there is no task to pack")
    rows: dict[str, np.ndarray] = {}
    parts: _Parts = []
    more: _Shapes = {}
    for name, table in tables.items():
        examples = rows[name] = np.asarray(micro_batch.get(name, ()), dtype=np.int64)
        per = table.task.sequences_per_example
        wanted = examples if per == 1 else (examples[:, None] * per + np.arange(per)).ravel()
        parts.append((table.sequences, wanted))
        more[name, "sequences"] = np.int64, len(wanted)
        if table.labels is not None and step_counts is not None:
            more[name, "labels"] = table.labels.dtype, len(examples)
    cu_seqlens = _cu_seqlens(parts, bucket_tokens)
    packed, arrays = _pack(parts, cu_seqlens, more)
    tasks, begin = {}, 0
    for name, table in tables.items():
        sequences, labels = arrays[name, "sequences"], arrays.get((name, "labels"))
        end = begin + len(sequences)
        sequences[:] = np.arange(begin, end)
        if labels is not None and table.labels is not None:
            labels[:] = table.labels[rows[name]]
        bounds = None
        if table.task.head == "lstm":
            bounds = np.stack([cu_seqlens[begin:end] + 1, cu_seqlens[begin + 1 : end + 1]], axis=1)
        per = table.task.sequences_per_example
        tasks[name] = TaskRows(
            torch.from_numpy(sequences if per == 1 else sequences.reshape(-1, per)),
            None if labels is None else torch.from_numpy(labels),
            int((step_counts or {}).get(name, 0)),
            bounds,
        )
        begin = end
    return PackedBatch(**packed, tasks=tasks)


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
    parts = [(samples.sequences, rows)]
    cu_seqlens = _cu_seqlens(parts, bucket_tokens)
    more = {"positions": (np.int64, int(cu_seqlens[-1])), "nsp_labels": (np.int64, len(rows))}
    packed, arrays = _pack(parts, cu_seqlens, more)
    filler = np.arange(len(samples), len(samples) + len(cu_seqlens) - 1 - len(rows))
    owner = np.concatenate([rows, filler]) * samples.sequences.max_length
    begins = np.repeat(owner, np.diff(cu_seqlens))
    np.add(begins, packed["position_ids"].numpy(), out=arrays["positions"])
    arrays["nsp_labels"][:] = samples.nsp_labels[rows]
    return ReviewBatch(
        **packed,
        positions=torch.from_numpy(arrays["positions"]),
        nsp_labels=torch.from_numpy(arrays["nsp_labels"]),
        masked=int(samples.masked_counts(mlm_probability, rows).sum()),
        step_masked=step_masked,
        step_samples=step_samples,
        mask_seed=mask_seed,
    )


def _cu_seqlens(parts: _Parts, bucket_tokens: int) -> np.ndarray:
    """Where each sequence of a batch begins, those of the filler too, and the total: int64."""
    if bucket_tokens < 1:
        raise ValueError(f"bucket_tokens must be at least 1, found {bucket_tokens}")
    lengths = np.concatenate([table.offsets[rows + 1] - table.offsets[rows] for table, rows in parts])
    real, longest = int(lengths.sum()), int(lengths.max(initial=0))
    total = max(-(-real // bucket_tokens), 1) * bucket_tokens
    fillers = np.arange(real, total, longest or parts[0][0].max_length or bucket_tokens)
    return np.concatenate([offsets_of(lengths)[:-1], fillers, [total]])


def _pack(
    parts: _Parts, cu_seqlens: np.ndarray, more: _Shapes
) -> tuple[dict[str, Any], dict[Any, np.ndarray]]:
    """The fields of `_Packed`, and unset arrays of the dtypes and lengths of ``more`` in the same buffer."""
    lengths, total = np.diff(cu_seqlens), int(cu_seqlens[-1])
    count = sum(len(rows) for _, rows in parts)
    real = int(cu_seqlens[count])
    per_token = dict.fromkeys(("input_ids", "token_type_ids", "position_ids"), (np.int32, total))
    shapes = per_token | {"cu_seqlens": (np.int32, len(cu_seqlens))}
    buffer, arrays = _reserve({**shapes, **more})
    mine = {name: arrays.pop(name) for name in shapes}
    input_ids, token_type_ids, position_ids, begins = mine.values()

    begins[:] = cu_seqlens
    np.subtract(np.arange(total, dtype=np.int32), np.repeat(begins[:-1], lengths), out=position_ids)
    segment_b = np.concatenate([*(table.segment_b_start[rows] for table, rows in parts), lengths[count:]])
    np.greater_equal(position_ids, np.repeat(segment_b, lengths), out=token_type_ids)
    source = np.repeat(np.concatenate([table.offsets[rows] for table, rows in parts]), lengths[:count])
    source += position_ids[:real]
    first = 0
    for table, rows in parts:
        tokens = slice(cu_seqlens[first], cu_seqlens[first + len(rows)])
        # "clip" writes where it should without a copy; no index is clipped.
        np.take(table.tokens, source[tokens], out=input_ids[tokens], mode="clip")
        first += len(rows)
    input_ids[real:] = parts[0][0].special.pad
    tensors = {name: torch.from_numpy(array) for name, array in mine.items()}
    return {"buffer": buffer, **tensors, "max_seqlen": int(lengths.max()), "tokens": real}, arrays


def _reserve(shapes: _Shapes) -> tuple[torch.Tensor, dict[Any, np.ndarray]]:
    """A buffer, and arrays of these dtypes and lengths that are parts of it, each aligned; nothing is set."""
    parts, end = {}, 0
    for name, (dtype, length) in shapes.items():
        begin, dtype = end, np.dtype(dtype)
        parts[name] = slice(begin, begin + length * dtype.itemsize), dtype
        end += -(-length * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
    buffer = torch.empty(end, dtype=torch.uint8, device="cpu")
    memory = buffer.numpy()
    return buffer, {name: memory[part].view(dtype) for name, (part, dtype) in parts.items()}


def prefetch(iterable: Iterable[T], depth: int = 2) -> Generator[T, None, None]:
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
