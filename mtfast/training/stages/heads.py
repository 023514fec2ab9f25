"""Stage 2: the heads trained on the frozen encoder.

`features: cached` encodes every sentence once, without dropout, and trains on the table; `features: live`
runs the encoder in every step with its dropout on. The encoder stands outside the engine: nothing of it is
trained, sharded or saved here. The heads are small: they keep float32 weights, and in bf16 compute under
autocast, which leaves steps on cached features so plain that a GPU runs each as one captured graph.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mtfast.config import EngineConfig, HeadsConfig
from mtfast.data.packing import PackedBatch, TaskRows, filled_count
from mtfast.data.sampler import StepPlan
from mtfast.kinds import predictions_of, task_losses
from mtfast.models.bert import PackedBert, first_rows, flops_per_token
from mtfast.models.checkpoint import save_heads
from mtfast.training.engine.engine import Engine
from mtfast.training.run.weights import Weights, build_multitask
from mtfast.training.stage import Batch

from .features import Features, encode
from .task_stage import Load, TaskStage, predict_packed

PREDICTION_ROWS = 8192
PREDICTION_TOKENS = 131072  # of an LSTM head, each of whose sequences takes as much as the longest


@dataclass(frozen=True)
class CachedBatch:
    """Examples by their numbers, in place of packed sequences.

    numbers: int64 [n], of the examples of one task after another, where the feature table is.
    weights: float32 [n], of each example's loss, 0 of what fills up.
    counts: how many of them each task has.
    size, tokens: examples, and tokens of their sequences, without what fills up.
    """

    numbers: Tensor
    weights: Tensor
    counts: Mapping[str, int]
    size: int
    tokens: int

    @property
    def shape(self) -> Hashable:
        return tuple(self.counts.values())

    def clone(self) -> CachedBatch:
        return replace(self, numbers=self.numbers.clone(), weights=self.weights.clone())

    def copy_(self, other: CachedBatch) -> None:
        self.numbers.copy_(other.numbers)
        self.weights.copy_(other.weights)

    def by_task(self, x: Tensor) -> dict[str, Tensor]:
        """Each task's part of `numbers` or `weights`."""
        return dict(zip(self.counts, x.split(list(self.counts.values())), strict=True))


class Heads(TaskStage):
    """The heads alone, on cached or live features."""

    name = "heads"

    def __init__(
        self,
        load: Load,
        weights: Weights,
        settings: HeadsConfig,
        engine: EngineConfig,
        seed: int,
        directory: Path,
    ) -> None:
        """directory: of the stage's state, for features that are too many for memory."""
        super().__init__(load, settings, seed)
        self.weights = weights
        model, _ = build_multitask(weights, self.tasks)
        self.engine = Engine(model.heads, engine, settings, self.name, float32=True)
        dtype = torch.bfloat16 if engine.precision == "bf16" else torch.float32
        self.encoder: PackedBert = model.encoder.to(self.engine.device, dtype)
        self.encoder.requires_grad_(False).eval()
        self.cached = settings.features == "cached"
        self.flops_per_token = 0.0
        if self.cached:
            device = self.engine.device
            self.table, self.dev_table = (
                encode(
                    f"encoding {split}",
                    self.encoder,
                    tables,
                    device,
                    directory / f"features-{split}",
                    self.token_tasks,
                )
                for split, tables in (("train", self.train), ("dev", self.dev))
            )
            self.labels = {
                name: torch.from_numpy(table.labels).to(device)
                for name, table in self.train.items()
                if table.labels is not None
            }
        else:
            self.flops_per_token = flops_per_token(weights.config, self.mean_seqlen, training=False)

    def micro_batches(self, steps: list[StepPlan], epoch: int) -> Iterator[Sequence[Batch]]:
        return self._cached_batches(steps) if self.cached else super().micro_batches(steps, epoch)

    @property
    def capturable(self) -> bool:
        return super().capturable and (not self.cached or self.table.resident)

    def _cached_batches(self, steps: list[StepPlan]) -> Iterator[list[CachedBatch]]:
        """What all steps take goes to the device at once; a batch is a part of it."""
        weights = [step.weights(self.layout.shares) for step in steps]
        batches = [
            self._cached_batch(part, of_step)
            for step, of_step in zip(steps, weights, strict=True)
            for part in step.micro_batches
        ]
        sizes = [len(batch.numbers) for batch in batches]
        numbers = torch.cat([batch.numbers for batch in batches]).to(self.table.cls.device).split(sizes)
        of_each = torch.cat([batch.weights for batch in batches]).to(self.engine.device).split(sizes)
        moved = (
            replace(batch, numbers=mine, weights=theirs)
            for batch, mine, theirs in zip(batches, numbers, of_each, strict=True)
        )
        for step in steps:
            yield list(itertools.islice(moved, len(step.micro_batches)))

    def _cached_batch(self, part: Mapping[str, np.ndarray], weights: Mapping[str, float]) -> CachedBatch:
        """On the host, filled up if there is `room`."""
        counts, numbers, of_each = {}, [], []
        for task, rows in part.items():
            n = counts[task] = len(rows) if self.room is None else filled_count(len(rows), self.room[task])
            numbers.append(np.pad(rows, (0, n - len(rows))))
            of_each.append(np.pad(np.full(len(rows), weights[task], np.float32), (0, n - len(rows))))
        tokens = sum(int(self.lengths[task][rows].sum()) for task, rows in part.items())
        return CachedBatch(
            torch.from_numpy(np.concatenate(numbers)),
            torch.from_numpy(np.concatenate(of_each)),
            counts,
            sum(map(len, part.values())),
            tokens,
        )

    def losses(self, batch: CachedBatch | PackedBatch) -> dict[str, Tensor]:
        if isinstance(batch, CachedBatch):
            examples, weights = batch.by_task(batch.numbers), batch.by_task(batch.weights)
            features = self.table.select(examples)
            rows = {
                task: TaskRows(
                    features.sequences[task],
                    self.labels[task][numbers.to(self.engine.device)],
                    weights[task],
                )
                for task, numbers in examples.items()
            }
            return task_losses(self.tasks, self._heads(features), rows)
        self.encoder.train()
        outputs = self._on_packed(batch)
        self.encoder.eval()
        return task_losses(self.tasks, outputs, batch.tasks)

    def _heads(self, features: Features) -> dict[str, Tensor]:
        return self.engine.model(
            features.cls,
            features.sequences,
            tokens=features.tokens,
            token_bounds=features.token_bounds,
            max_seqlen=features.max_seqlen,
        )

    def _on_packed(self, batch: PackedBatch) -> dict[str, Tensor]:
        with torch.no_grad():
            states = self.encoder(**batch.encoder_inputs(), cls_only=not self.token_tasks)
        if not self.token_tasks:
            return self._heads(Features(states, batch.sequences, None, {}, 0))
        cls = states.index_select(0, first_rows(batch.cu_seqlens, states.size(0)))
        return self._heads(Features(cls, batch.sequences, states, batch.token_bounds, batch.token_max_seqlen))

    def predict_dev(self) -> dict[str, np.ndarray]:
        if not self.cached:
            return predict_packed("heads dev", self._on_packed, self.dev, self.engine.device)
        table = self.dev_table
        predictions: dict[str, list[np.ndarray]] = {task: [] for task in self.dev}
        longest = max(map(len, self.dev.values()))
        count = max(1, min(PREDICTION_ROWS, PREDICTION_TOKENS // table.max_seqlen))
        for begin in range(0, longest, count):
            examples = {
                task: torch.arange(min(begin, len(t)), min(begin + count, len(t)), device=table.cls.device)
                for task, t in self.dev.items()
            }
            with torch.no_grad():
                outputs = self._heads(table.select(examples))
            for task, output in outputs.items():
                predictions[task].append(predictions_of(self.tasks[task], output))
        return {task: np.concatenate(parts) for task, parts in predictions.items()}

    def save(self, directory: Path, state: dict[str, Tensor]) -> None:
        save_heads(directory, state, self.tasks, self.weights.mlp)
