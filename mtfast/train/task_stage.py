"""What head training and fine-tuning share: mixed-task steps, three losses, dev metrics."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mtfast.data.packing import PackedBatch, pack_tasks, prefetch
from mtfast.data.sampler import StepPlan, plan_epoch, plan_evaluation
from mtfast.data.tokenized import TokenizedTask

from . import ranks
from .config import TASK_NAMES, RunConfig, TaskStageConfig
from .inputs import EVALUATION_TOKENS, labels_of
from .loop import MicroBatch, Stage
from .losses import predictions_of, task_metrics
from .progress import say

Forward = Callable[[PackedBatch, Tensor | None], dict[str, Tensor]]


class TaskStage(Stage):
    """A stage over SST, Quora and STS."""

    loss_names = TASK_NAMES

    def __init__(
        self, config: RunConfig, train: dict[str, TokenizedTask], dev: dict[str, TokenizedTask]
    ) -> None:
        self.config, self.train, self.dev = config, train, dev
        self.settings: TaskStageConfig = getattr(config, self.name)
        self.shares = ranks.world_size() * self.settings.accumulation
        self.lengths = {task: table.lengths for task, table in train.items()}

    def plan(self, epoch: int) -> list[StepPlan]:
        return plan_epoch(
            self.lengths,
            batch_size=self.settings.batch_size,
            sampler=self.settings.sampler,
            temperature=self.settings.temperature,
            seed=self.config.seed,
            epoch=epoch,
            rank=ranks.rank(),
            world_size=ranks.world_size(),
            accumulation=self.settings.accumulation,
        )

    def micro_batches(self, steps: list[StepPlan], epoch: int) -> Iterator[list[MicroBatch]]:
        return prefetch([self._micro_batch(step, part) for part in step.micro_batches] for step in steps)

    def _micro_batch(self, step: StepPlan, examples: dict[str, np.ndarray]) -> MicroBatch:
        batch = pack_tasks(self.train, examples, step.step_counts, bucket_tokens=self.settings.bucket_tokens)
        count = sum(len(rows) for rows in examples.values())
        return MicroBatch(placed(batch, self), count, batch.tokens)

    def total(self, losses: dict[str, Tensor]) -> Tensor:
        weights = self.settings.loss_weights
        return torch.stack([losses[task] * getattr(weights, task) for task in TASK_NAMES]).sum()

    def evaluate(self) -> dict[str, float] | None:
        return dev_metrics(self.predict(self.dev), labels_of(self.dev))

    @abstractmethod
    def predict(self, tables: dict[str, TokenizedTask]) -> dict[str, np.ndarray]:
        """Predictions of every example in the tables' order, the same on every rank."""


def dev_metrics(predictions: dict[str, np.ndarray], labels: dict[str, np.ndarray]) -> dict[str, float]:
    """`task_metrics`; says so where a correlation is none."""
    for what, scores in (("predictions", predictions["sts"]), ("labels", labels["sts"])):
        if np.ptp(scores) == 0:
            say(f"sts: all {what} are equal, their correlation is undefined and counts as 0")
    return task_metrics(predictions, labels)


def placed(batch: PackedBatch, stage: Stage) -> tuple[PackedBatch, Tensor | None]:
    """The batch on the stage's device, and the bounds of its SST sentences, which stay on the host."""
    bounds = sentence_bounds(batch)
    device = stage.engine.device
    if device.type == "cuda":
        batch = batch.pin_memory().to(device, non_blocking=True)
    return batch, bounds


def sentence_bounds(batch: PackedBatch) -> Tensor | None:
    """Begin and end of each SST sentence in the packed tokens without its [CLS]: int64 [n, 2]."""
    if "sst" not in batch.tasks:
        return None
    rows = batch.tasks["sst"].sequences
    offsets = batch.cu_seqlens.long()
    return torch.stack([offsets[rows] + 1, offsets[rows + 1]], dim=1)


def predict_packed(
    forward: Forward, tables: Mapping[str, TokenizedTask], device: torch.device
) -> dict[str, np.ndarray]:
    """Run `forward` over every example once, sharded over the ranks; predictions in input order."""
    lengths = {task: table.lengths for task, table in tables.items()}
    parts: list[dict[str, tuple[np.ndarray, np.ndarray]]] = []
    plan = plan_evaluation(
        lengths, tokens_per_batch=EVALUATION_TOKENS, rank=ranks.rank(), world_size=ranks.world_size()
    )
    for examples in plan:
        batch = pack_tasks(tables, examples, {task: 0 for task in tables})
        bounds = sentence_bounds(batch)
        with torch.no_grad():
            outputs = forward(batch.to(device), bounds)
        parts.append({task: (rows, predictions_of(task, outputs[task])) for task, rows in examples.items()})
    return in_order(parts, lengths)


def in_order(
    parts: list[dict[str, tuple[np.ndarray, np.ndarray]]], lengths: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """Gather (example indices, predictions) from all ranks into one array per task."""
    gathered = [part for shard in ranks.gather(parts) for part in shard]
    ordered = {}
    for task, sizes in lengths.items():
        values = [part[task] for part in gathered if task in part and len(part[task][0])]
        result = np.empty(len(sizes), dtype=values[0][1].dtype if values else np.float32)
        for rows, predictions in values:
            result[rows] = predictions
        ordered[task] = result
    return ordered
