"""What head training and fine-tuning share: mixed-task steps, the tasks' losses, dev metrics."""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from mtfast.config import TaskStageConfig
from mtfast.data.cs224n import overall_score
from mtfast.data.packing import packed_steps
from mtfast.data.sampler import Layout, StepPlan, plan_epoch, room_of
from mtfast.data.tokens import TokenizedTask
from mtfast.kinds import predictions_of, task_metrics
from mtfast.models.bert import mean_seqlen
from mtfast.models.multitask import token_tasks
from mtfast.tasks import Split, Task
from mtfast.training.engine import ranks
from mtfast.training.prediction import Forward, in_order, packed_outputs
from mtfast.training.run.progress import say
from mtfast.training.stage import Batch, Stage

Tables = dict[str, TokenizedTask]
Load = Callable[[Split], Tables]


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
        return packed_steps(self.train, steps, self.engine.device, self.layout.shares, self.room)

    @functools.cached_property
    def room(self) -> dict[str, int] | None:
        """Examples of each task up to which micro-batches are filled, so that their shapes repeat; with None
        they are as they come."""
        return room_of(self.plan(0))

    def total(self, losses: dict[str, Tensor]) -> Tensor:
        return torch.stack([losses[name] * task.weight for name, task in self.tasks.items()]).sum()

    def evaluate(self) -> dict[str, float] | None:
        return labelled_metrics(self.dev, self.predict_dev())

    @abstractmethod
    def predict_dev(self) -> dict[str, np.ndarray]:
        """Predictions of every dev example in the tables' order, the same on every rank."""


def labelled_metrics(
    tables: Mapping[str, TokenizedTask], predictions: Mapping[str, np.ndarray]
) -> dict[str, float]:
    """`task_metrics` of tables with labels, and the CS 224N overall score where the tasks are the course's;
    says so where a correlation is undefined."""
    tasks: dict[str, Task] = {}
    labels: dict[str, np.ndarray] = {}
    for name, table in tables.items():
        assert table.labels is not None
        tasks[name], labels[name] = table.task, table.labels
        for what, scores in (("predictions", predictions[name]), ("labels", table.labels)):
            if table.task.kind == "regression" and np.ptp(scores) == 0:
                say(f"{name}: all {what} are equal, their correlation is undefined and counts as 0")
    metrics = task_metrics(tasks, predictions, labels)
    overall = overall_score(metrics)
    return metrics if overall is None else metrics | {"cs224n_overall": overall}


def predict_packed(
    what: str, forward: Forward, tables: Mapping[str, TokenizedTask], device: torch.device
) -> dict[str, np.ndarray]:
    """Run `forward` over every example once, sharded over the ranks; predictions in input order.

    what: the name under which progress is shown.
    """
    layout = Layout(ranks.rank(), ranks.world_size())
    parts = [
        {name: (rows, predictions_of(tables[name].task, outputs)) for name, (rows, outputs) in part.items()}
        for part in packed_outputs(what, forward, tables, device, layout)
    ]
    gathered = [part for shard in ranks.gather(parts) for part in shard]
    return {name: in_order(gathered, name, len(table)) for name, table in tables.items()}
