"""Stage 3: encoder and heads trained together, one packed pass over all tasks in every step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from torch import Tensor

from mtfast.config import EngineConfig, TaskStageConfig
from mtfast.data.packing import PackedBatch, packed_steps
from mtfast.data.sampler import StepPlan, twice
from mtfast.models.bert import flops_per_token
from mtfast.models.checkpoint import save_pretrained
from mtfast.training.engine.deepspeed_json import checkpoints_activations
from mtfast.training.engine.engine import Engine
from mtfast.training.run.weights import Weights, build_multitask
from mtfast.training.stage import Batch

from .task_stage import Load, TaskStage, predict_packed


class Finetune(TaskStage):
    """The whole model on packed mixed-task steps."""

    name = "finetune"

    def __init__(
        self,
        load: Load,
        weights: Weights,
        settings: TaskStageConfig,
        engine: EngineConfig,
        seed: int,
    ) -> None:
        super().__init__(load, settings, seed)
        self.weights = weights
        model, self.carried = build_multitask(weights, self.tasks)
        model.encoder.activation_checkpointing = checkpoints_activations(engine)
        self.engine = Engine(model, engine, settings, self.name)
        self.flops_per_token = flops_per_token(weights.config, self.mean_seqlen)

    @property
    def _twice(self) -> list[str]:
        """The tasks whose examples go through the model twice."""
        return [name for name, task in self.tasks.items() if task.rdrop_alpha]

    def plan(self, epoch: int) -> list[StepPlan]:
        """With R-Drop every example of a task is in its micro-batch twice, one after the other."""
        return [twice(step, self._twice) for step in super().plan(epoch)]

    def micro_batches(self, steps: list[StepPlan], epoch: int) -> Iterator[Sequence[Batch]]:
        packed = packed_steps(self.train, steps, self.engine.device, self.layout.shares, self.room)
        for step, batches in zip(steps, packed, strict=True):
            again = [sum(len(part[name]) // 2 for name in self._twice) for part in step.micro_batches]
            yield [replace(batch, size=batch.size - n) for batch, n in zip(batches, again, strict=True)]

    def losses(self, batch: PackedBatch) -> dict[str, Tensor]:
        return self.engine.model(**batch.model_inputs(), rows=batch.tasks, rdrop=True)

    def predict_dev(self) -> dict[str, np.ndarray]:
        return predict_packed(
            "finetune dev",
            lambda batch: self.engine.model(**batch.model_inputs()),
            self.dev,
            self.engine.device,
        )

    def save(self, directory: Path, state: dict[str, Tensor]) -> None:
        weights = self.weights
        save_pretrained(
            directory,
            state,
            weights.config,
            weights.tokenizer,
            tasks=self.tasks,
            mlp=weights.mlp,
            max_length=next(iter(self.train.values())).sequences.max_length,
            carried=self.carried,
        )
