"""Stage 2: the heads trained on the frozen encoder.

`features: cached` encodes every sentence once, without dropout, and trains on the table; `features: live`
runs the encoder in every step with its dropout on. The encoder stands outside the engine: nothing of it is
trained, sharded or saved here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mtfast.data.cache import TokenizedTask
from mtfast.data.packing import PackedBatch, TaskRows, prefetch
from mtfast.data.sampler import StepPlan
from mtfast.models.bert import PackedBert, first_rows, flops_per_token
from mtfast.models.checkpoint import save_heads

from .config import RunConfig
from .engine import Engine
from .features import FeatureTable, encode
from .loop import MicroBatch
from .losses import predictions_of, task_losses
from .sources import Source, build_multitask, heads_config
from .task_stage import TaskStage, predict_packed

PREDICTION_ROWS = 8192


@dataclass(frozen=True)
class CachedBatch:
    """Rows of the feature table, in place of packed sentences."""

    sequences: dict[str, Tensor]
    tasks: dict[str, TaskRows]
    token_bounds: Tensor | None


class Heads(TaskStage):
    """The heads alone, on cached or live features."""

    name = "heads"

    def __init__(
        self,
        config: RunConfig,
        train: dict[str, TokenizedTask],
        dev: dict[str, TokenizedTask],
        source: Source,
    ) -> None:
        super().__init__(config, train, dev)
        self.source = source
        model, _ = build_multitask(config, source)
        self.lstm = config.model.sentiment_head == "lstm"
        self.engine = Engine(model.heads, config.engine, self.settings, self.name)
        self.encoder: PackedBert = model.encoder.to(self.engine.device, self.engine.dtype)
        self.encoder.requires_grad_(False).eval()
        self.cached = config.heads.features == "cached"
        self.flops_per_token = 0.0
        if self.cached:
            self.table = encode(
                self.encoder, train, self.engine.device, token_task="sst" if self.lstm else None
            )
            self.dev_table = encode(
                self.encoder, dev, self.engine.device, token_task="sst" if self.lstm else None
            )
        else:
            lengths = np.concatenate([table.sequences.lengths for table in train.values()]).astype(np.float64)
            mean = float((lengths**2).sum() / lengths.sum())
            self.flops_per_token = flops_per_token(source.config, mean, training=False)

    def micro_batches(self, steps: list[StepPlan], epoch: int) -> Iterator[list[MicroBatch]]:
        if not self.cached:
            return super().micro_batches(steps, epoch)
        return prefetch([self._cached_batch(step, part) for part in step.micro_batches] for step in steps)

    def _cached_batch(self, step: StepPlan, examples: dict[str, np.ndarray]) -> MicroBatch:
        device = self.engine.device
        tasks, tokens = {}, 0
        for task, rows in examples.items():
            labels = self.train[task].labels
            assert labels is not None
            index = torch.from_numpy(rows)
            tasks[task] = TaskRows(
                sequences=self.table.rows(task, index).to(device),
                labels=torch.from_numpy(labels[rows]).to(device),
                examples=index,
                step_count=step.step_counts[task],
            )
            tokens += int(self.lengths[task][rows].sum())
        batch = CachedBatch(
            {task: rows.sequences for task, rows in tasks.items()},
            tasks,
            self.table.bounds(torch.from_numpy(examples["sst"])) if self.lstm else None,
        )
        return MicroBatch(batch, sum(len(rows) for rows in examples.values()), tokens)

    def losses(self, data: CachedBatch | tuple[PackedBatch, Tensor | None]) -> dict[str, Tensor]:
        if isinstance(data, CachedBatch):
            outputs = self._on_table(self.table, data.sequences, data.token_bounds)
            return task_losses(outputs, data.tasks, self.shares)
        batch, bounds = data
        self.encoder.train()
        outputs = self._on_packed(batch, bounds)
        self.encoder.eval()
        return task_losses(outputs, batch.tasks, self.shares)

    def _on_table(
        self, table: FeatureTable, sequences: Mapping[str, Tensor], bounds: Tensor | None
    ) -> dict[str, Tensor]:
        return self.engine(table.cls, sequences, tokens=table.tokens, token_bounds=bounds)

    def _on_packed(self, batch: PackedBatch, bounds: Tensor | None) -> dict[str, Tensor]:
        sequences = {task: rows.sequences for task, rows in batch.tasks.items()}
        with torch.no_grad():
            states = self.encoder(**batch.encoder_inputs(), cls_only=not self.lstm)
        if not self.lstm:
            return self.engine(states, sequences)
        cls = states.index_select(0, first_rows(batch.cu_seqlens, states.size(0)))
        return self.engine(cls, sequences, tokens=states, token_bounds=bounds)

    def predict(self, tables: dict[str, TokenizedTask]) -> dict[str, np.ndarray]:
        if not self.cached:
            return predict_packed(self._on_packed, tables, self.engine.device)
        table = (
            self.dev_table
            if tables is self.dev
            else encode(self.encoder, tables, self.engine.device, token_task="sst" if self.lstm else None)
        )
        predictions: dict[str, list[np.ndarray]] = {task: [] for task in tables}
        longest = max(len(task_table) for task_table in tables.values())
        for begin in range(0, longest, PREDICTION_ROWS):
            index = {
                task: torch.arange(min(begin, len(t)), min(begin + PREDICTION_ROWS, len(t)))
                for task, t in tables.items()
            }
            sequences = {task: table.rows(task, rows).to(self.engine.device) for task, rows in index.items()}
            with torch.no_grad():
                outputs = self._on_table(table, sequences, table.bounds(index["sst"]) if self.lstm else None)
            for task, output in outputs.items():
                predictions[task].append(predictions_of(task, output))
        return {task: np.concatenate(parts) for task, parts in predictions.items()}

    def save(self, directory: Path, state: dict[str, Tensor]) -> None:
        save_heads(directory, state, heads_config(self.config))
