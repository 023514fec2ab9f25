"""What head training and fine-tuning share: mixed-task steps, the tasks' losses, dev metrics."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mtfast.config import TaskStageConfig
from mtfast.data.cs224n import overall_score
from mtfast.data.packing import PackedBatch, pack_tasks, packed_steps
from mtfast.data.sampler import Layout, StepPlan, plan_epoch, plan_evaluation
from mtfast.data.tokens import TokenizedTask
from mtfast.kinds import predictions_of, task_metrics
from mtfast.models.bert import mean_seqlen
from mtfast.models.multitask import token_tasks
from mtfast.tasks import Split, Task
from mtfast.training.engine import ranks
from mtfast.training.inputs import EVALUATION_TOKENS
from mtfast.training.loop import Batch, Stage
from mtfast.training.run.progress import say

Tables = dict[str, TokenizedTask]
Load = Callable[[Split], Tables]
Forward = Callable[[PackedBatch], dict[str, Tensor]]


class TaskStage(Stage):
    """A stage over the tasks of the run."""

    settings: TaskStageConfig

    def __init__(self, load: Load, settings: TaskStageConfig, seed: int) -> None:
        """load: gives the tables of a split."""
        self.train, self.dev = load("train"), load("dev")
        self.settings, self.seed = settings, seed
        self.tasks = {name: table.task for name, table in self.train.items()}
        self.token_tasks = token_tasks(self.tasks)
        self.loss_names = tuple(self.tasks)
        self.criteria = {"mean": "mean"} | {n: f"{n}_{task.main_metric}" for n, task in self.tasks.items()}
        self.layout = Layout(ranks.rank(), ranks.world_size(), settings.accumulation)
        self.lengths = {name: table.lengths for name, table in self.train.items()}

    @property
    def mean_seqlen(self) -> float:
        """Length of the sequence that the average token of the training data is in."""
        return mean_seqlen(np.concatenate([table.sequences.lengths for table in self.train.values()]))

    def plan(self, epoch: int) -> list[StepPlan]:
        return plan_epoch(
            self.lengths,
            batch_size=self.settings.batch_size,
            sampler=self.settings.sampler,
            temperature=self.settings.temperature,
            seed=self.seed,
            epoch=epoch,
            layout=self.layout,
        )

    def micro_batches(self, steps: list[StepPlan], epoch: int) -> Iterator[Sequence[Batch]]:
        return packed_steps(self.train, steps, self.engine.device, self.settings.bucket_tokens)

    def total(self, losses: dict[str, Tensor]) -> Tensor:
        return torch.stack([losses[name] * task.weight for name, task in self.tasks.items()]).sum()

    def evaluate(self) -> dict[str, float] | None:
        return dev_metrics(self.dev, self.predict_dev())

    @abstractmethod
    def predict_dev(self) -> dict[str, np.ndarray]:
        """Predictions of every dev example in the tables' order, the same on every rank."""


def dev_metrics(
    tables: Mapping[str, TokenizedTask], predictions: Mapping[str, np.ndarray]
) -> dict[str, float]:
    """`task_metrics`, and the CS 224N overall score where the tasks are the course's; says so where a
    correlation is undefined."""
    tasks: dict[str, Task] = {}
    labels: dict[str, np.ndarray] = {}
    for name, table in tables.items():
        assert table.labels is not None  # a dev split without labels is refused when it is read
        tasks[name], labels[name] = table.task, table.labels
        for what, scores in (("predictions", predictions[name]), ("labels", table.labels)):
            if table.task.kind == "regression" and np.ptp(scores) == 0:
                say(f"{name}: all {what} are equal, their correlation is undefined and counts as 0")
    metrics = task_metrics(tasks, predictions, labels)
    overall = overall_score(metrics)
    return metrics if overall is None else metrics | {"cs224n_overall": overall}


def predict_packed(
    forward: Forward, tables: Mapping[str, TokenizedTask], device: torch.device
) -> dict[str, np.ndarray]:
    """Run `forward` over every example once, sharded over the ranks; predictions in input order."""
    tasks = {name: table.task for name, table in tables.items()}
    lengths = {name: table.lengths for name, table in tables.items()}
    parts: list[dict[str, tuple[np.ndarray, np.ndarray]]] = []
    layout = Layout(ranks.rank(), ranks.world_size())
    for examples in plan_evaluation(lengths, tokens_per_batch=EVALUATION_TOKENS, layout=layout):
        batch = pack_tasks(tables, examples, {name: 0 for name in tables})
        with torch.no_grad():
            outputs = forward(batch.to(device))
        parts.append({n: (rows, predictions_of(tasks[n], outputs[n])) for n, rows in examples.items()})
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
