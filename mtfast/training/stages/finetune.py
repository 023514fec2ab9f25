"""Stage 3: encoder and heads trained together, one packed pass over all tasks in every step."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from torch import Tensor

from mtfast.config import EngineConfig, TaskStageConfig
from mtfast.data.packing import PackedBatch
from mtfast.models.bert import flops_per_token
from mtfast.models.checkpoint import save_pretrained
from mtfast.training.engine.deepspeed_json import checkpoints_activations
from mtfast.training.engine.engine import Engine
from mtfast.training.run.weights import Weights, build_multitask

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

    def losses(self, batch: PackedBatch) -> dict[str, Tensor]:
        return self.engine.model(**batch.model_inputs(), rows=batch.tasks)

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
