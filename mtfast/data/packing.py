"""From planned example indices to packed batches: every sequence back to back, nothing padded."""

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from mtfast.data.prefetch import prefetch
from mtfast.data.sampler import StepPlan
from mtfast.data.tokens import Sequences, TokenizedTask, offsets_of

if TYPE_CHECKING:
    from mtfast.data.reviews import ReviewSamples

_P = TypeVar("_P", bound="_Packed")

_ALIGNMENT = 16  # bytes: a kernel may load as many at once
_DTYPES = (torch.int32, torch.int64, torch.float32)
# Of a batch that is filled up: its tokens are a multiple of a power of two, at most a 32nd of them but no
# less than FILLER, which is also the longest sequence of filler; a count beyond its room is one of ROOM_STEP.
_BUCKETS, FILLER, ROOM_STEP = 32, 64, 16

_Parts = list[tuple[Sequences, np.ndarray]]  # tables, and which sequences of each
_Shapes = dict[Any, tuple[Any, int]]  # dtype and length of arrays by name


@dataclass(frozen=True)
class TaskRows:
    """A task's examples in a packed batch, and behind them those that fill it up.

    sequences: int64 [n], or [n, 2] for separately encoded pairs: indices of their sequences in the batch.
    labels: int64 [n] for classification, float32 [n] else; None where the data has none or they are not read.
    weights: float32 [n], of each example's loss, 0 of what fills up; None where there are no labels.
    token_bounds: int64 [n, 2], begin and end of each sequence in the packed tokens, without [CLS]; for tasks
    with an LSTM head alone.
    """

    sequences: torch.Tensor
    labels: torch.Tensor | None = None
    weights: torch.Tensor | None = None
    token_bounds: torch.Tensor | None = None


@dataclass(frozen=True)
class _Packed:
    """The packed tokens.

    buffer: uint8 [bytes], of which all tensors of the batch are parts, so that it moves in one copy; each
    begins at a multiple of 16 bytes.
    input_ids, token_type_ids, position_ids: int32 [total].
    cu_seqlens: int32 [sequences + 1], where each sequence begins and, last, the total.
    max_seqlen: length of the longest sequence; of a batch that is filled up, rounded up to a power of two.
    size: examples.
    tokens: of theirs, without what fills up.
    """

    buffer: torch.Tensor
    input_ids: torch.Tensor
    token_type_ids: torch.Tensor
    position_ids: torch.Tensor
    cu_seqlens: torch.Tensor
    max_seqlen: int
    size: int
    tokens: int

    @property
    def shape(self) -> Hashable:
        """What the work of a step depends on beside the buffer's contents; batches in which it is equal have
        every tensor at the same place of their buffers."""
        return _shape_of(self), self.max_seqlen

    def clone(self: _P) -> _P:
        """The batch in memory of its own."""
        return self._on(self.buffer.clone())

    def copy_(self: _P, other: _P) -> None:
        """Take over the contents of another batch of the same shape, on its device."""
        self.buffer.copy_(other.buffer)

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
                return TaskRows(*(moved(getattr(value, f.name)) for f in fields(value)))
            return {name: moved(item) for name, item in value.items()} if isinstance(value, dict) else value

        parts = {f.name: moved(getattr(self, f.name)) for f in fields(self) if f.name != "buffer"}
        return type(self)(buffer=buffer, **parts)


def _shape_of(part: Any) -> Hashable:
    if isinstance(part, torch.Tensor):
        return tuple(part.shape)
    if isinstance(part, _Packed | TaskRows):
        return tuple(_shape_of(getattr(part, f.name)) for f in fields(part))
    return tuple(map(_shape_of, part.values())) if isinstance(part, dict) else None


@dataclass(frozen=True)
class PackedBatch(_Packed):
    """A packed mixed-task batch.

    tasks: an entry for every task, even without examples here.
    token_max_seqlen: as max_seqlen, of what `token_bounds` bound; 0 where that is nothing.
    """

    tasks: dict[str, TaskRows]
    token_max_seqlen: int

    @property
    def shape(self) -> Hashable:
        """As of any packed batch; `token_max_seqlen` counts too."""
        return super().shape, self.token_max_seqlen

    @property
    def sequences(self) -> dict[str, torch.Tensor]:
        """Each task's sequences, as in `TaskRows`."""
        return {name: rows.sequences for name, rows in self.tasks.items()}

    @property
    def token_bounds(self) -> dict[str, torch.Tensor]:
        """As in `TaskRows`, of the tasks that have any."""
        found = {name: rows.token_bounds for name, rows in self.tasks.items()}
        return {name: bounds for name, bounds in found.items() if bounds is not None}

    def model_inputs(self) -> dict[str, Any]:
        """The keyword arguments of `MultiTaskModel`, without labels."""
        names = ("sequences", "token_bounds", "token_max_seqlen")
        return self.encoder_inputs() | {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class ReviewBatch(_Packed):
    """A packed batch of pre-training samples; sample i is sequence i.

    positions: int64 [total], each token's index in the corpus (for mask_tokens).
    nsp_labels: int64 [samples], 0 where B follows A.
    nsp_weights: float32 [samples], of each sample's loss, 0 of those that fill up.
    mlm_weight: float32 [1], of each masked token's loss.
    mask_seed: int64 [1], seed of the masking.
    masked: at least as many tokens as mask_tokens chooses here with its "exact" strategy; of a batch that is
    not filled up, as many.
    """

    positions: torch.Tensor
    nsp_labels: torch.Tensor
    nsp_weights: torch.Tensor
    mlm_weight: torch.Tensor
    mask_seed: torch.Tensor
    masked: int

    @property
    def shape(self) -> Hashable:
        """As of any packed batch; `masked` counts too."""
        return super().shape, self.masked


def sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the host on ``device``, without waiting for the copy to a GPU."""
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def pack_tasks(
    tables: Mapping[str, TokenizedTask],
    micro_batch: Mapping[str, np.ndarray],
    weights: Mapping[str, float] | None = None,
    *,
    room: Mapping[str, int] | None = None,
) -> PackedBatch:
    """Packs the examples ``micro_batch[task]`` (indices) of every table, in the tables' order.

    Args:
        weights: of the loss of an example of each task. None where nothing is trained; labels then stay
            behind.
        room: fill the batch up, so that shapes repeat: with so many examples of each task (a multiple of 16
            where that is too few), with sequences of [PAD] behind the real ones until its tokens are a
            multiple of a 64th to a 32nd of them, with empty sequences; and max_seqlen to 64, 128, 256 and so
            on. None packs what is there; a batch without any example has one token of [PAD], so that every
            rank can always run a step.
    """
    if not tables:
        raise ValueError("tables is empty: there is no task to pack")
    rows: dict[str, np.ndarray] = {}
    counts: dict[str, int] = {}
    parts: _Parts = []
    more: _Shapes = {}
    for name, table in tables.items():
        examples = rows[name] = np.asarray(micro_batch.get(name, ()), dtype=np.int64)
        n = counts[name] = len(examples) if room is None else filled_count(len(examples), room[name])
        per = table.task.sequences_per_example
        wanted = examples if per == 1 else (examples[:, None] * per + np.arange(per)).ravel()
        parts.append((table.sequences, wanted))
        more[name, "sequences"] = np.int64, n * per
        if table.labels is not None and weights is not None:
            more |= {(name, "labels"): (table.labels.dtype, n), (name, "weights"): (np.float32, n)}
        if table.task.head == "lstm":
            more[name, "token_bounds"] = np.int64, 2 * n
    sequences = sum(n * tables[name].task.sequences_per_example for name, n in counts.items())
    cu_seqlens, max_seqlen = _cu_seqlens(parts, None if room is None else sequences)
    packed, arrays = _pack(parts, cu_seqlens, more)
    tasks, begin, longest_of_tokens = {}, 0, 0
    for (name, table), (_, wanted) in zip(tables.items(), parts, strict=True):
        mine = {what: array for (task, what), array in arrays.items() if task == name}
        real, end = len(rows[name]), begin + len(wanted)
        # What fills up has the batch's first sequence, which is always there, and a weight of zero.
        mine["sequences"][: len(wanted)], mine["sequences"][len(wanted) :] = np.arange(begin, end), 0
        if weights is not None and table.labels is not None:
            mine["labels"][:real], mine["labels"][real:] = table.labels[rows[name]], 0
            mine["weights"][:real], mine["weights"][real:] = weights[name], 0
        if "token_bounds" in mine:
            bounds = mine["token_bounds"] = mine["token_bounds"].reshape(-1, 2)
            bounds[:real, 0], bounds[:real, 1] = cu_seqlens[begin:end] + 1, cu_seqlens[begin + 1 : end + 1]
            bounds[real:] = 0
            longest_of_tokens = max(longest_of_tokens, int((bounds[:, 1] - bounds[:, 0]).max(initial=0)))
        if (per := table.task.sequences_per_example) > 1:
            mine["sequences"] = mine["sequences"].reshape(-1, per)
        tasks[name] = TaskRows(**{what: torch.from_numpy(array) for what, array in mine.items()})
        begin = end
    if room is not None:
        longest_of_tokens = _filled_length(max(longest_of_tokens, 1), parts[0][0].max_length)
    return PackedBatch(
        **packed,
        max_seqlen=max_seqlen,
        size=sum(map(len, rows.values())),
        tasks=tasks,
        token_max_seqlen=longest_of_tokens,
    )


def packed_steps(
    tables: Mapping[str, TokenizedTask],
    steps: list[StepPlan],
    device: torch.device,
    shares: int,
    room: Mapping[str, int] | None,
) -> Iterator[list[PackedBatch]]:
    """Each step's micro-batches of this rank on ``device``, packed ahead in the background.

    shares: micro-batches of a step over all ranks. room: as in `pack_tasks`.
    """

    def pack(step: StepPlan) -> list[PackedBatch]:
        weights = step.weights(shares)
        return [pack_tasks(tables, part, weights, room=room).sent_to(device) for part in step.micro_batches]

    return prefetch(map(pack, steps))


def pack_reviews(
    samples: "ReviewSamples",
    micro_batch: np.ndarray,
    *,
    mlm_probability: float,
    mlm_weight: float,
    nsp_weight: float,
    mask_seed: int = 0,
    room: int | None = None,
) -> ReviewBatch:
    """Packs the pre-training samples ``micro_batch`` (indices).

    A token's position is sample * max_length + its index in the sample, so that masking does not depend on
    the batch or rank; filler tokens have positions beyond the corpus.

    Args:
        mlm_weight, nsp_weight: of the loss of a masked token and of a sample.
        mask_seed: of the masking, 64 bits.
        room: fill the batch up to so many samples, and as `pack_tasks` does.
    """
    rows = np.asarray(micro_batch, dtype=np.int64)
    n = len(rows) if room is None else filled_count(len(rows), room)
    parts = [(samples.sequences, rows)]
    cu_seqlens, max_seqlen = _cu_seqlens(parts, None if room is None else n)
    total = int(cu_seqlens[-1])
    more = {
        "positions": (np.int64, total),
        "nsp_labels": (np.int64, n),
        "nsp_weights": (np.float32, n),
        "mlm_weight": (np.float32, 1),
        "mask_seed": (np.int64, 1),
    }
    packed, arrays = _pack(parts, cu_seqlens, more)
    filler = np.arange(len(samples), len(samples) + len(cu_seqlens) - 1 - len(rows))
    owner = np.concatenate([rows, filler]) * samples.sequences.max_length
    begins = np.repeat(owner, np.diff(cu_seqlens))
    np.add(begins, packed["position_ids"].numpy(), out=arrays["positions"])
    for name, value in (("nsp_labels", samples.nsp_labels[rows]), ("nsp_weights", nsp_weight)):
        arrays[name][: len(rows)], arrays[name][len(rows) :] = value, 0
    arrays["mlm_weight"][:] = mlm_weight
    arrays["mask_seed"][:] = np.array(mask_seed & (2**64 - 1), np.uint64).view(np.int64)
    masked = int(samples.masked_counts(mlm_probability, rows).sum())
    if room is not None:  # a bound that follows from the shape: "exact" rounds up by less than one a sequence
        masked = int(mlm_probability * total) + n
    packed |= {name: torch.from_numpy(array) for name, array in arrays.items()}
    return ReviewBatch(**packed, max_seqlen=max_seqlen, size=len(rows), masked=masked)


def filled_count(count: int, room: int) -> int:
    """How many examples a batch with so many is filled up to, as `pack_tasks` says of its room."""
    return room if count <= room else -(-count // ROOM_STEP) * ROOM_STEP


def _filled_length(longest: int, limit: int | None) -> int:
    """What the longest length of a batch that is filled up is rounded up to, where sequences have a limit."""
    rounded = max(FILLER, 1 << (longest - 1).bit_length())
    return rounded if limit is None else max(longest, min(rounded, limit))


def _cu_seqlens(parts: _Parts, room: int | None) -> tuple[np.ndarray, int]:
    """Where each sequence of a batch begins, those that fill it up too, and the total: int64; and max_seqlen.

    room: sequences up to which it is filled up, before those with filler.
    """
    lengths = np.concatenate([table.offsets[rows + 1] - table.offsets[rows] for table, rows in parts])
    real, longest = int(lengths.sum()), max(int(lengths.max(initial=0)), 1)
    begins = offsets_of(lengths)[:-1]
    if room is None:
        return (np.append(begins, real) if real else np.array([0, 1])), longest
    bucket = max(FILLER, 1 << max(real // _BUCKETS, 1).bit_length() - 1)
    total = max(-(-real // bucket), 1) * bucket
    limit = parts[0][0].max_length
    max_seqlen = _filled_length(longest, limit)
    most = min(FILLER, limit or max_seqlen)
    fillers = np.arange(real, total, most)
    empty = room - len(lengths) + -(-bucket // most) - len(fillers)
    return np.concatenate([begins, fillers, np.full(empty + 1, total)]), max_seqlen


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
    return {"buffer": buffer, **tensors, "tokens": real}, arrays


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
