"""Batches of whole training steps: the lengths are those of real data, the words are random.

A batch holds the same examples in each of the layouts that benchmarks/step_contenders.py takes.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.eager_twin import PaddedTask, pad_task
from benchmarks.lengths import MIXTURES, SEQUENCES, draw_examples, proportional
from benchmarks.mask_tokens import OPTIONS, SPECIAL
from mtfast.data.packing import PackedBatch, ReviewBatch, pack_reviews, pack_tasks
from mtfast.data.rows import RowAccount
from mtfast.data.tokens import Sequences, SpecialTokens, TokenizedTask, offsets_of
from mtfast.kinds import KINDS
from mtfast.ops import exact_count, mask_tokens
from mtfast.tasks import Task

# Those of mtfast.recipes, whose module needs more than is installed wherever steps are measured.
TASKS = {
    "sst": Task(kind="classification", text="sentence", label="sentiment", classes=5),
    "quora": Task(kind="binary", text=("sentence1", "sentence2"), label="is_duplicate", head="pair"),
    "sts": Task(
        kind="regression", text=("sentence1", "sentence2"), label="similarity", low=0, high=5, head="pair"
    ),
}
FULL_DATA = MIXTURES["mixture"]
LONGEST = 512
TOKENS = SpecialTokens(cls=101, sep=102, pad=0, all=tuple(SPECIAL))
FIRST_WORD = 1000
MLM_PROBABILITY = 0.15


@dataclass(frozen=True)
class HfReviews:
    """Pre-training samples for Hugging Face's models.

    inputs: their keyword arguments. special: bool, the shape of the input_ids, what is never masked. masked:
    input_ids and labels as mask_tokens masks them. nsp_labels: int64 [samples].
    """

    inputs: dict[str, Any]
    special: Tensor
    masked: tuple[Tensor, Tensor]
    nsp_labels: Tensor


@dataclass(frozen=True)
class PretrainBatch:
    """Samples packed as mtfast's trainer does, padded, and as one row without filler.

    cls_rows: int64 [samples], the row's [CLS] tokens. masking: keyword arguments of mask_tokens.
    """

    packed: ReviewBatch
    padded: HfReviews
    row: HfReviews
    cls_rows: Tensor
    masking: Mapping[str, Any]

    @property
    def padded_tokens(self) -> int:
        """Tokens and padding."""
        return self.padded.special.numel()


@dataclass(frozen=True)
class FinetuneBatch:
    """Examples packed as mtfast's trainer does, padded by task, and as one row without filler.

    row: keyword arguments of Hugging Face's models. cls_rows: int64 [sequences] by task, the row's [CLS]
    tokens; of pairs those of the first sentences, then those of the second ones.
    """

    packed: PackedBatch
    padded: dict[str, PaddedTask]
    row: dict[str, Any]
    cls_rows: dict[str, Tensor]

    @property
    def padded_tokens(self) -> int:
        """Tokens and padding."""
        return sum(task.input_ids.numel() for task in self.padded.values())


@dataclass(frozen=True)
class CachedFeatures:
    """[CLS] states bf16 [sequences of all tasks, hidden], task after task, and labels [examples] by task."""

    cls: Tensor
    first_row: dict[str, int]
    labels: dict[str, Tensor]

    def rows(self, task: str, examples: Tensor) -> Tensor:
        """Rows of `cls` for these examples: int64 [n], or [n, 2] for pairs."""
        per = SEQUENCES[task]
        first = self.first_row[task] + examples * per
        return first if per == 1 else first[:, None] + torch.arange(per, device=examples.device)


@dataclass(frozen=True)
class _Reviews:
    """What packing reads of `mtfast.data.reviews.ReviewSamples`, whose module needs more than is installed
    wherever steps are measured."""

    sequences: Sequences
    nsp_labels: np.ndarray

    def __len__(self) -> int:
        return len(self.nsp_labels)

    def masked_counts(self, mlm_probability: float, rows: np.ndarray) -> np.ndarray:
        words = self.sequences.lengths[rows] - 3  # without [CLS] and two [SEP]
        return exact_count(torch.from_numpy(words), mlm_probability).numpy()


def pretrain_batch(samples: int, seed: int, device: torch.device) -> PretrainBatch:
    """Pre-training samples as long as those of IMDb reviews."""
    random = np.random.default_rng(seed)
    sequences = sequences_of(draw_examples("imdb", samples, seed), random, pairs=True)
    reviews = _Reviews(sequences, random.integers(0, 2, samples))
    rows = np.arange(samples)
    packed, flat = (
        pack_reviews(
            reviews,  # type: ignore[arg-type]
            rows,
            mlm_probability=MLM_PROBABILITY,
            mlm_weight=1 / int(reviews.masked_counts(MLM_PROBABILITY, rows).sum()),
            nsp_weight=1 / samples,
            room=room,
        ).to(device)
        for room in (samples if device.type == "cuda" else None, None)
    )
    padded, row = hf_reviews(flat, OPTIONS)
    return PretrainBatch(packed, padded, row, flat.cu_seqlens[:-1].long(), OPTIONS)


def hf_reviews(flat: ReviewBatch, masking: Mapping[str, Any]) -> tuple[HfReviews, HfReviews]:
    """A batch packed without filler, padded to its longest sample and as one row.

    masking: keyword arguments of mask_tokens.
    """
    device = flat.input_ids.device
    ids = flat.input_ids.long()
    masked = mask_tokens(ids, positions=flat.positions, cu_seqlens=flat.cu_seqlens, **masking)
    special = torch.isin(ids, torch.tensor(masking["special_ids"], device=device))
    inside = torch.arange(flat.max_seqlen, device=device) < flat.cu_seqlens.diff()[:, None]

    def padded(values: Tensor, filler: int | bool) -> Tensor:
        return torch.full(inside.shape, filler, device=device).masked_scatter_(inside, values)

    inputs = {
        "input_ids": padded(ids, TOKENS.pad),
        "token_type_ids": padded(flat.token_type_ids.long(), 0),
        "attention_mask": inside.long(),
    }
    both = (padded(masked.input_ids, TOKENS.pad), padded(masked.labels, -100))
    return (
        HfReviews(inputs, padded(special, True), both, flat.nsp_labels),
        HfReviews(
            row_of(flat), special[None], (masked.input_ids[None], masked.labels[None]), flat.nsp_labels
        ),
    )


def finetune_batch(examples: int, seed: int, device: torch.device) -> FinetuneBatch:
    """Examples of the three tasks in the full data's proportions."""
    tables = random_tables(examples, seed)
    counts = {task: len(table) for task, table in tables.items()}
    rows = {task: np.arange(count) for task, count in counts.items()}
    packed, flat = (
        pack_tasks(tables, rows, {task: 1 / count for task, count in counts.items()}, room=room).to(device)
        for room in (counts if device.type == "cuda" else None, None)
    )
    begins = flat.cu_seqlens[:-1].long()
    return FinetuneBatch(
        packed,
        {task: pad_task(table, rows[task]).to(device) for task, table in tables.items()},
        row_of(flat),
        {task: begins[first_then_second(part.sequences)] for task, part in flat.tasks.items()},
    )


def random_tables(examples: int, seed: int) -> dict[str, TokenizedTask]:
    """So many examples of the three tasks, with random words and labels."""
    random = np.random.default_rng(seed)
    counts = task_counts(examples)
    labels = random_labels(counts, seed)
    return {
        task: TokenizedTask(
            task=TASKS[task],
            sequences=sequences_of(draw_examples(task, count, seed), random),
            labels=labels[task],
            ids=[str(row) for row in range(count)],
            account=RowAccount(count, count),
        )
        for task, count in counts.items()
    }


def row_of(flat: PackedBatch | ReviewBatch) -> dict[str, Any]:
    """A packed batch as keyword arguments of Hugging Face's models: int64 [1, total], and its bounds."""
    names = ("input_ids", "token_type_ids", "position_ids")
    bounds = {f"cu_seq_lens_{side}": flat.cu_seqlens for side in "qk"}
    longest = {f"max_length_{side}": flat.max_seqlen for side in "qk"}
    return {name: getattr(flat, name).long()[None] for name in names} | bounds | longest


def first_then_second(sequences: Tensor) -> Tensor:
    """[n] as it is; of pairs [n, 2] the first ones, then the second ones, [2 n]."""
    return sequences.t().reshape(-1)


def cached_features(hidden: int, device: torch.device) -> CachedFeatures:
    """Random states and labels, as many as the full data has."""
    first_row, size = {}, 0
    for task, examples in FULL_DATA.items():
        first_row[task] = size
        size += examples * SEQUENCES[task]
    labels = {task: torch.from_numpy(x).to(device) for task, x in random_labels(FULL_DATA, 0).items()}
    return CachedFeatures(torch.randn(size, hidden, dtype=torch.bfloat16, device=device), first_row, labels)


class HeadsBatch(dict[str, Tensor]):
    """The numbers of each task's examples in the full data, int64 [n].

    weights: float32 [n], of each one's loss.
    """

    @property
    def weights(self) -> dict[str, Tensor]:
        return {task: torch.full(x.shape, 1 / len(x), device=x.device) for task, x in self.items()}

    @property
    def shape(self) -> Hashable:
        """Equal for batches that one CUDA graph serves."""
        return tuple(map(len, self.values()))

    def clone(self) -> HeadsBatch:
        """In memory of its own."""
        return HeadsBatch({task: x.clone() for task, x in self.items()})

    def copy_(self, other: HeadsBatch) -> None:
        """Take over other numbers, as many."""
        for task, x in self.items():
            x.copy_(other[task])


def heads_batch(examples: int, seed: int, device: torch.device) -> HeadsBatch:
    """So many examples in the full data's proportions."""
    random = np.random.default_rng(seed)
    return HeadsBatch(
        {
            task: torch.from_numpy(random.integers(0, FULL_DATA[task], count)).to(device)
            for task, count in task_counts(examples).items()
        }
    )


def task_counts(examples: int) -> dict[str, int]:
    """Examples of each task in a step, in the full data's proportions, but at least one."""
    counts = {task: max(1, count) for task, count in proportional(FULL_DATA, examples).items()}
    counts["quora"] += examples - sum(counts.values())
    return counts


def random_labels(counts: Mapping[str, int], seed: int) -> dict[str, np.ndarray]:
    """Labels of so many examples of each task, whole numbers in the task's dtype."""
    random = np.random.default_rng(seed)
    highest = {"sst": 4, "quora": 1, "sts": 5}
    return {
        name: random.integers(0, highest[name] + 1, counts[name]).astype(KINDS[task.kind].label_dtype)
        for name, task in TASKS.items()
    }


def sequences_of(lengths: list[int], random: np.random.Generator, pairs: bool = False) -> Sequences:
    """Random words in sequences of these lengths: `[CLS] A [SEP]`, as pairs `[CLS] A [SEP] B [SEP]`."""
    sizes = np.array(lengths)
    offsets = offsets_of(sizes)
    tokens = random.integers(FIRST_WORD, OPTIONS["vocab_size"], offsets[-1], dtype=np.int32)
    tokens[offsets[:-1]], tokens[offsets[1:] - 1] = TOKENS.cls, TOKENS.sep
    segment_b_start = sizes // 2 + 1 if pairs else sizes
    if pairs:
        tokens[offsets[:-1] + segment_b_start - 1] = TOKENS.sep
    return Sequences(tokens, offsets, segment_b_start.astype(np.int32), TOKENS, LONGEST)
