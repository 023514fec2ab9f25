"""The batches of whole steps on real data: mtfast's as its stage makes them, the same examples padded, and
batches of examples grouped by length as Trainer's `group_by_length` groups them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from benchmarks.eager_twin import PaddedTask, pad_task
from benchmarks.stage_setup import MEGABATCH, packed_batches
from benchmarks.step_batches import HfReviews, hf_reviews
from mtfast.data.packing import pack_reviews
from mtfast.data.tokens import TokenizedTask
from mtfast.training.stages.finetune import Finetune
from mtfast.training.stages.pretrain import Pretrain


@dataclass(frozen=True)
class Layouts:
    """One step's examples. packed: mtfast's micro-batch, None where nobody packs these examples. padded: for
    Hugging Face's models. masking: of pre-training, keyword arguments of mask_tokens."""

    packed: Any
    padded: dict[str, PaddedTask] | HfReviews
    masking: Mapping[str, Any] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Examples."""
        if isinstance(self.padded, HfReviews):
            return len(self.padded.nsp_labels)
        return sum(len(task.labels) for task in self.padded.values())

    @property
    def padded_tokens(self) -> int:
        """Tokens and padding."""
        if isinstance(self.padded, HfReviews):
            return self.padded.special.numel()
        return sum(task.input_ids.numel() for task in self.padded.values())


def finetune_batches(stage: Finetune, turns: int, warm_up: int) -> tuple[list[Layouts], list[Layouts]]:
    """The first `turns` steps of an epoch, and as many of examples grouped by length within their task.

    Of each task a grouped step has as many examples as a step of the plan has. Those after the warm-up are
    from all heights of the sorted examples.
    """

    def padded(rows: Mapping[str, np.ndarray]) -> dict[str, PaddedTask]:
        return {task: pad_task(stage.train[task], rows[task]).to(stage.engine.device) for task in stage.tasks}

    steps = [step.micro_batches[0] for step in stage.plan(0)[: max(MEGABATCH, turns)]]
    by_task = {
        task: grouped_rows([step[task] for step in steps], longest_of(table))
        for task, table in stage.train.items()
    }
    return (
        [
            Layouts(packed, padded(rows))
            for packed, rows in zip(packed_batches(stage, turns), steps, strict=False)
        ],
        [
            Layouts(None, padded({task: rows[step] for task, rows in by_task.items()}))
            for step in spread(turns, len(steps), warm_up)
        ],
    )


def pretrain_batches(stage: Pretrain, turns: int, warm_up: int) -> tuple[list[Layouts], list[Layouts]]:
    """The first `turns` steps of an epoch, and as many of samples grouped by length, with words masked as the
    stage masks them. Grouped steps after the warm-up are from all heights of the sorted samples."""
    packed = packed_batches(stage, turns)
    masking = {
        "special_ids": list(stage.samples.sequences.special.all),
        "mask_token_id": stage.weights.tokenizer.mask_token_id,
        "vocab_size": stage.weights.config.vocab_size,
        "seed": int(packed[0].mask_seed),
        "mlm_probability": stage.settings.mlm_probability,
    }

    def padded(rows: np.ndarray) -> HfReviews:
        probability = stage.settings.mlm_probability
        # Nobody reads the weights.
        flat = pack_reviews(stage.samples, rows, mlm_probability=probability, mlm_weight=0.0, nsp_weight=0.0)
        return hf_reviews(flat.to(stage.engine.device), masking)[0]

    steps = [step.micro_batches[0] for step in stage.plan(0)[: max(MEGABATCH, turns)]]
    rows_of = grouped_rows(steps, stage.samples.lengths)
    return (
        [Layouts(batch, padded(rows), masking) for batch, rows in zip(packed, steps, strict=False)],
        [Layouts(None, padded(rows_of[step]), masking) for step in spread(turns, len(steps), warm_up)],
    )


def longest_of(table: TokenizedTask) -> np.ndarray:
    """Length of each example's longest sequence, to which a batch is padded, int64 [examples]."""
    return table.sequences.lengths.reshape(-1, table.task.sequences_per_example).max(axis=1)


def grouped_rows(
    steps: Sequence[np.ndarray], lengths: np.ndarray, megabatch: int = MEGABATCH
) -> list[np.ndarray]:
    """The same examples in other steps of the same sizes: those of `megabatch` steps at a time are sorted by
    length, the longest first.

    steps: the examples of each, int64 [n]. lengths: int64 [examples].
    """
    found: list[np.ndarray] = []
    for begin in range(0, len(steps), megabatch):
        part = steps[begin : begin + megabatch]
        examples = np.concatenate(part)
        ordered = examples[np.argsort(-lengths[examples], kind="stable")]
        found += np.split(ordered, np.cumsum([len(step) for step in part])[:-1])
    return found


def spread(turns: int, of: int, warm_up: int) -> list[int]:
    """The middles of equal parts of range(of), one for each turn after the warm-up, and the first of them for
    each turn of that."""
    measured = turns - warm_up
    middles = [(2 * index + 1) * of // (2 * measured) for index in range(measured)]
    return [middles[0]] * warm_up + middles
