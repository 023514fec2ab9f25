"""The examples of each optimizer step, and their division among ranks and micro-batches.

The steps of an epoch depend on the seed and the data alone. The number of ranks and of accumulated
micro-batches only decides how a step is divided, so 1 rank and 8 ranks see the same global batches.
"""

import itertools
import math
import zlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

try:
    from mtfast._planner import balance
except ImportError as error:
    raise ImportError(
        f"mtfast's planner is not built ({error}); build it with: pip install --no-build-isolation -e ."
    ) from error

Sampler = Literal["proportional", "temperature", "round_robin"]


@dataclass(frozen=True)
class Layout:
    """How a step is divided: this process is ``rank`` of ``world_size``, and each rank runs its part of a
    step in ``accumulation`` micro-batches.

    Raises ValueError for a rank outside [0, world_size), and for a world_size or accumulation below 1.
    """

    rank: int = 0
    world_size: int = 1
    accumulation: int = 1

    def __post_init__(self) -> None:
        if self.world_size < 1 or self.accumulation < 1 or not 0 <= self.rank < self.world_size:
            raise ValueError(
                f"rank {self.rank} of world_size {self.world_size} with accumulation {self.accumulation}: "
                "world_size and accumulation must be at least 1 and rank below world_size"
            )

    @property
    def shares(self) -> int:
        """Micro-batches of a step, over all ranks."""
        return self.world_size * self.accumulation


ALONE = Layout()


@dataclass(frozen=True)
class StepPlan:
    """One optimizer step of one rank: example indices by task for each micro-batch, and the number of
    examples of each task in the whole step over all ranks."""

    micro_batches: list[dict[str, np.ndarray]]
    step_counts: dict[str, int]

    def weights(self, shares: int) -> dict[str, float]:
        """Of the loss of an example of each task in a micro-batch, one of ``shares`` over which gradients are
        averaged: what the optimizer sees is the mean over the step's examples, however it is cut."""
        return {name: shares / max(count, 1) for name, count in self.step_counts.items()}


def twice(step: StepPlan, tasks: Collection[str]) -> StepPlan:
    """The step with every example of these tasks two times, one after the other, in its micro-batch."""
    times = {name: 2 if name in tasks else 1 for name in step.step_counts}
    parts = [
        {name: np.repeat(examples, times[name]) for name, examples in part.items()}
        for part in step.micro_batches
    ]
    return StepPlan(parts, {name: times[name] * count for name, count in step.step_counts.items()})


@dataclass(frozen=True)
class ReviewStepPlan:
    """One pre-training step of one rank: sample indices for each micro-batch, and the samples and masked
    tokens of the whole step over all ranks."""

    micro_batches: list[np.ndarray]
    step_samples: int
    step_masked: int


def plan_epoch(
    lengths: Mapping[str, np.ndarray],
    *,
    batch_size: int,
    sampler: Sampler = "proportional",
    temperature: float = 2.0,
    seed: int,
    epoch: int,
    layout: Layout = ALONE,
) -> list[StepPlan]:
    """This rank's part of every optimizer step of an epoch.

    lengths: tokens of each example by task (int64 [examples]). batch_size: examples of a global step, at
    most; the examples of all tasks are spread evenly over ceil(examples / batch_size) steps.
    "proportional" uses every example once, with the same mix of tasks in every step. "temperature" draws
    task k in proportion to size_k ** (1 / temperature), "round_robin" every task equally often; both take as
    many examples in all, shuffle a task again when it is used up, and continue in the next epoch where they
    stopped.
    Each step is divided among the layout's micro-batches with token totals that differ by at most its longest
    example; none is empty unless the step has fewer examples than micro-batches.
    Raises ValueError if batch_size is not divisible by the number of micro-batches.
    """
    _check(batch_size, layout, lengths)
    names = list(lengths)
    sizes = np.array([len(lengths[name]) for name in names])
    quota = _quota(sizes, sampler, temperature)
    if quota.sum() == 0:
        raise ValueError("lengths holds no example")
    examples = [
        _stream(len(lengths[name]), int(count), name, seed, epoch)
        for name, count in zip(names, quota, strict=True)
    ]
    # Example i of n of a task is due at (i + 1/2) / n of the epoch: every step has the same mix of tasks.
    due = np.concatenate([(np.arange(count) + 0.5) / max(count, 1) for count in quota])
    task = np.repeat(np.arange(len(names)), quota)
    name_rank = np.argsort(np.argsort(names))
    order = np.lexsort((name_rank[task], due))
    task, example = task[order], np.concatenate(examples)[order]
    tokens = np.concatenate([lengths[name][rows] for name, rows in zip(names, examples, strict=True)])[order]

    step_offsets = _step_offsets(len(order), batch_size)
    steps = len(step_offsets) - 1
    step = np.repeat(np.arange(steps), np.diff(step_offsets))
    counts = np.zeros((steps, len(names)), np.int64)
    np.add.at(counts, (step, task), 1)
    groups = iter(_divide(tokens, step_offsets, layout, task, len(names)))
    return [
        StepPlan(
            [{name: example[next(groups)] for name in names} for _ in range(layout.accumulation)],
            dict(zip(names, counts[s].tolist(), strict=True)),
        )
        for s in range(steps)
    ]


def plan_reviews(
    lengths: np.ndarray,
    masked: np.ndarray,
    *,
    batch_size: int,
    seed: int,
    epoch: int,
    layout: Layout = ALONE,
) -> list[ReviewStepPlan]:
    """This rank's part of every pre-training step of an epoch; every sample is used exactly once.

    lengths: tokens of each sample, masked: tokens that will be chosen in it (both int64 [samples]). Steps,
    balance and errors are those of `plan_epoch`.
    """
    _check(batch_size, layout, {"reviews": lengths})
    if len(lengths) == 0:
        raise ValueError("lengths holds no sample")
    order = _stream(len(lengths), len(lengths), "reviews", seed, epoch)
    step_offsets = _step_offsets(len(order), batch_size)
    task = np.zeros(len(order), np.int64)
    groups = iter(_divide(lengths[order], step_offsets, layout, task, 1))
    step_masked = np.add.reduceat(masked[order], step_offsets[:-1])
    return [
        ReviewStepPlan(
            [order[next(groups)] for _ in range(layout.accumulation)],
            int(step_offsets[s + 1] - step_offsets[s]),
            int(step_masked[s]),
        )
        for s in range(len(step_offsets) - 1)
    ]


def room_of(plan: Sequence[StepPlan]) -> dict[str, int]:
    """The most examples of each task in one of the plan's micro-batches."""
    parts = [part for step in plan for part in step.micro_batches]
    return {name: max(len(part[name]) for part in parts) for name in parts[0]}


def room_of_reviews(plan: Sequence[ReviewStepPlan]) -> int:
    """The most samples in one of the plan's micro-batches."""
    return max(len(part) for step in plan for part in step.micro_batches)


def plan_evaluation(
    lengths: Mapping[str, np.ndarray], *, tokens_per_batch: int, layout: Layout = ALONE
) -> list[dict[str, np.ndarray]]:
    """This rank's evaluation batches: examples of all tasks by descending length, each exactly once.

    A batch holds at most ``tokens_per_batch`` tokens (or one longer example). Every rank gets the same
    number of batches, some of them empty if necessary, because under ZeRO-3 all ranks must run forward
    equally often.
    """
    if tokens_per_batch < 1:
        raise ValueError(f"tokens_per_batch must be at least 1, found {tokens_per_batch}")
    if not lengths:
        raise ValueError("lengths is empty: there is no task to plan")
    names = list(lengths)
    task = np.repeat(np.arange(len(names)), [len(lengths[name]) for name in names])
    example = np.concatenate([np.arange(len(lengths[name])) for name in names])
    tokens = np.concatenate([np.asarray(lengths[name], np.int64) for name in names])
    order = np.argsort(-tokens, kind="stable")
    ends = np.cumsum(tokens[order])
    cuts = [0]
    while cuts[-1] < len(order):
        before = ends[cuts[-1] - 1] if cuts[-1] else 0
        cuts.append(max(int(np.searchsorted(ends, before + tokens_per_batch, "right")), cuts[-1] + 1))
    batches = [order[begin:end] for begin, end in itertools.pairwise(cuts)]
    mine = batches[layout.rank :: layout.world_size]
    mine += [order[:0]] * (math.ceil(len(batches) / layout.world_size) - len(mine))
    return [{name: example[rows[task[rows] == index]] for index, name in enumerate(names)} for rows in mine]


def _check(batch_size: int, layout: Layout, lengths: Mapping[str, np.ndarray]) -> None:
    if batch_size < 1 or batch_size % layout.shares:
        raise ValueError(
            f"batch_size {batch_size} is not divisible by world_size {layout.world_size} * accumulation "
            f"{layout.accumulation} = {layout.shares}"
        )
    if not lengths:
        raise ValueError("lengths is empty: there is no task to plan")


def _quota(sizes: np.ndarray, sampler: str, temperature: float) -> np.ndarray:
    """How many examples of each task an epoch takes; they add up to all examples of all tasks."""
    if sampler == "proportional":
        return sizes
    if sampler == "temperature":
        if not temperature >= 1:
            raise ValueError(f"temperature must be at least 1, found {temperature}")
        weights = np.where(sizes > 0, sizes ** (1 / temperature), 0.0)
    elif sampler == "round_robin":
        weights = (sizes > 0).astype(float)
    else:
        raise ValueError(f'sampler must be "proportional", "temperature" or "round_robin", found {sampler!r}')
    share = weights / max(weights.sum(), 1e-300) * sizes.sum()
    quota = np.floor(share).astype(np.int64)
    rest = int(sizes.sum() - quota.sum())
    quota[np.argsort(quota - share, kind="stable")[:rest]] += 1
    return quota


def _stream(size: int, count: int, name: str, seed: int, epoch: int) -> np.ndarray:
    """Examples epoch * count ... (epoch + 1) * count - 1 of an endless run of shuffles of a task."""
    begin, end = epoch * count, (epoch + 1) * count
    if count == 0:
        return np.empty(0, np.int64)
    passes = [
        np.random.default_rng([seed, zlib.crc32(name.encode()), shuffle]).permutation(size)
        for shuffle in range(begin // size, -(-end // size))
    ]
    skip = begin // size * size
    return np.concatenate(passes)[begin - skip : end - skip]


def _step_offsets(examples: int, batch_size: int) -> np.ndarray:
    """Offsets of ceil(examples / batch_size) steps whose sizes differ by at most one."""
    steps = -(-examples // batch_size)
    return np.arange(steps + 1) * examples // steps


def _divide(
    tokens: np.ndarray, step_offsets: np.ndarray, layout: Layout, task: np.ndarray, tasks: int
) -> list[np.ndarray]:
    """Indices in the epoch's order for each (step, micro-batch of this rank, task), in that order."""
    bins = balance(np.ascontiguousarray(tokens, np.int64), step_offsets, layout.shares)
    accumulation = layout.accumulation
    mine = np.flatnonzero(bins // accumulation == layout.rank)
    step = np.searchsorted(step_offsets, mine, "right") - 1
    group = (step * accumulation + bins[mine] % accumulation) * tasks + task[mine]
    order = np.argsort(group, kind="stable")
    edges = np.searchsorted(group[order], np.arange(1, (len(step_offsets) - 1) * accumulation * tasks))
    return np.split(mine[order], edges)
