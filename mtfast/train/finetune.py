"""Stage 3: encoder and heads trained together, one packed pass over all three tasks in every step."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from torch import Tensor

from mtfast.data.packing import PackedBatch
from mtfast.data.tokenized import TokenizedTask
from mtfast.models.bert import flops_per_token
from mtfast.models.checkpoint import save_pretrained

from .config import RunConfig
from .engine import Engine
from .losses import task_losses
from .sources import Source, build_multitask, heads_config
from .task_stage import TaskStage, predict_packed


class Finetune(TaskStage):
    """The whole model on packed mixed-task steps."""

    name = "finetune"

    def __init__(
        self,
        config: RunConfig,
        train: dict[str, TokenizedTask],
        dev: dict[str, TokenizedTask],
        source: Source,
    ) -> None:
        super().__init__(config, train, dev)
        self.source = source
        model, self.carried = build_multitask(config, source)
        self.engine = Engine(model, config.engine, self.settings, self.name)
        lengths = np.concatenate([table.sequences.lengths for table in train.values()]).astype(np.float64)
        self.flops_per_token = flops_per_token(source.config, float((lengths**2).sum() / lengths.sum()))

    def losses(self, data: tuple[PackedBatch, Tensor | None]) -> dict[str, Tensor]:
        batch, _ = data
        return task_losses(self._forward(*data), batch.tasks, self.shares)

    def predict(self, tables: dict[str, TokenizedTask]) -> dict[str, np.ndarray]:
        return predict_packed(self._forward, tables, self.engine.device)

    def _forward(self, batch: PackedBatch, token_bounds: Tensor | None) -> dict[str, Tensor]:
        sequences = {task: rows.sequences for task, rows in batch.tasks.items()}
        return self.engine(**batch.encoder_inputs(), sequences=sequences, token_bounds=token_bounds)

    def save(self, directory: Path, state: dict[str, Tensor]) -> None:
        heads = heads_config(self.config)
        save_pretrained(
            directory, state, self.source.config, self.source.tokenizer, heads=heads, carried=self.carried
        )
