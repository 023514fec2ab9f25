"""Stage 2: the heads trained on the frozen encoder.

`features: cached` encodes every sentence once, without dropout, and trains on the table; `features: live`
runs the encoder in every step with its dropout on. The encoder stands outside the engine: nothing of it is
trained, sharded or saved here. The heads are small: they keep float32 weights, and in bf16 compute under
autocast, which leaves steps on cached features so plain that a GPU runs each as one captured graph.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mtfast.data.packing import PackedBatch, TaskRows
from mtfast.data.sampler import StepPlan
from mtfast.data.tokenized import TokenizedTask
from mtfast.models.bert import PackedBert, first_rows, flops_per_token
from mtfast.models.checkpoint import save_heads

from .config import RunConfig
from .engine import Engine
from .features import Features, FeatureTable, encode
from .graphs import CudaRecorder, StepGraphs
from .inputs import labels_of
from .loop import MicroBatch
from .losses import predictions_of, task_losses
from .sources import Source, build_multitask, heads_config
from .task_stage import TaskStage, predict_packed

PREDICTION_ROWS = 8192


@dataclass(frozen=True)
class CachedBatch:
    """Examples by their numbers, in place of packed sentences.

    examples: int64 [n] by task, where the feature table is. step_counts: examples of each task in the whole
    step. token_bounds: as in `Features`, for the LSTM head alone.
    """

    examples: Mapping[str, Tensor]
    step_counts: Mapping[str, int]
    token_bounds: Tensor | None = None


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
        self.token_task = "sst" if config.model.sentiment_head == "lstm" else None
        self.engine = Engine(model.heads, config.engine, self.settings, self.name, float32=True)
        self.bf16 = config.engine.precision == "bf16"
        dtype = torch.bfloat16 if self.bf16 else torch.float32
        self.encoder: PackedBert = model.encoder.to(self.engine.device, dtype)
        self.encoder.requires_grad_(False).eval()
        self.cached = config.heads.features == "cached"
        self.flops_per_token = 0.0
        self.graphs: StepGraphs | None = None
        if self.cached:
            self.table, self.dev_table = self._encode(train, "train"), self._encode(dev, "dev")
            device = self.engine.device
            self.labels = {task: torch.from_numpy(x).to(device) for task, x in labels_of(train).items()}
            # An LSTM's packed layout follows from the sentences' lengths, on the host.
            if self.engine.capturable and self.table.resident and self.token_task is None:
                self.graphs = StepGraphs(self._step_on, CudaRecorder())
        else:
            lengths = np.concatenate([table.sequences.lengths for table in train.values()]).astype(np.float64)
            mean = float((lengths**2).sum() / lengths.sum())
            self.flops_per_token = flops_per_token(source.config, mean, training=False)

    def _encode(self, tables: dict[str, TokenizedTask], name: str) -> FeatureTable:
        directory = self.config.path / self.name / "state" / f"features-{name}"
        return encode(self.encoder, tables, self.engine.device, directory, self.token_task)

    def micro_batches(self, steps: list[StepPlan], epoch: int) -> Iterator[list[MicroBatch]]:
        return self._cached_batches(steps) if self.cached else super().micro_batches(steps, epoch)

    def _cached_batches(self, steps: list[StepPlan]) -> Iterator[list[MicroBatch]]:
        """The numbers of all steps' examples go to the device at once; a batch is a part of them."""
        parts = [part for step in steps for part in step.micro_batches]
        examples = {}
        for task in self.train:
            numbers = torch.from_numpy(np.concatenate([part[task] for part in parts]))
            examples[task] = numbers.to(self.table.cls.device).split([len(part[task]) for part in parts])
        place = 0
        for step in steps:
            batches = []
            for part in step.micro_batches:
                mine = {task: numbers[place] for task, numbers in examples.items()}
                bounds = None if self.token_task is None else self.table.bounds(mine[self.token_task])
                tokens = sum(int(self.lengths[task][rows].sum()) for task, rows in part.items())
                batch = CachedBatch(mine, step.step_counts, bounds)
                batches.append(MicroBatch(batch, sum(map(len, part.values())), tokens))
                place += 1
            yield batches

    def step(self, data: CachedBatch | tuple[PackedBatch, Tensor | None]) -> Tensor:
        if self.graphs is not None and isinstance(data, CachedBatch):
            return self.graphs(data.examples)
        return super().step(data)

    def _step_on(self, examples: Mapping[str, Tensor]) -> Tensor:
        """A whole step of one rank."""
        return super().step(CachedBatch(examples, {task: len(x) for task, x in examples.items()}))

    def losses(self, data: CachedBatch | tuple[PackedBatch, Tensor | None]) -> dict[str, Tensor]:
        if isinstance(data, CachedBatch):
            features = self.table.select(data.examples, data.token_bounds)
            tasks = {
                task: TaskRows(
                    features.sequences[task],
                    self.labels[task][examples.to(self.engine.device)],
                    examples,
                    data.step_counts[task],
                )
                for task, examples in data.examples.items()
            }
            return task_losses(self._heads(features), tasks, self.shares)
        batch, bounds = data
        self.encoder.train()
        outputs = self._on_packed(batch, bounds)
        self.encoder.eval()
        return task_losses(outputs, batch.tasks, self.shares)

    def _heads(self, features: Features) -> dict[str, Tensor]:
        with torch.autocast(self.engine.device.type, torch.bfloat16, enabled=self.bf16):
            return self.engine(
                features.cls,
                features.sequences,
                tokens=features.tokens,
                token_bounds=features.token_bounds,
            )

    def _on_packed(self, batch: PackedBatch, bounds: Tensor | None) -> dict[str, Tensor]:
        sequences = {task: rows.sequences for task, rows in batch.tasks.items()}
        with torch.no_grad():
            states = self.encoder(**batch.encoder_inputs(), cls_only=self.token_task is None)
        if self.token_task is None:
            return self._heads(Features(states, sequences, None, None))
        cls = states.index_select(0, first_rows(batch.cu_seqlens, states.size(0)))
        return self._heads(Features(cls, sequences, states, bounds))

    def predict(self, tables: dict[str, TokenizedTask]) -> dict[str, np.ndarray]:
        if not self.cached:
            return predict_packed(self._on_packed, tables, self.engine.device)
        table = self.dev_table if tables is self.dev else self._encode(tables, "predicted")
        predictions: dict[str, list[np.ndarray]] = {task: [] for task in tables}
        longest = max(len(task_table) for task_table in tables.values())
        for begin in range(0, longest, PREDICTION_ROWS):
            examples = {
                task: torch.arange(
                    min(begin, len(t)), min(begin + PREDICTION_ROWS, len(t)), device=table.cls.device
                )
                for task, t in tables.items()
            }
            bounds = None if self.token_task is None else table.bounds(examples[self.token_task])
            with torch.no_grad():
                outputs = self._heads(table.select(examples, bounds))
            for task, output in outputs.items():
                predictions[task].append(predictions_of(task, output))
        return {task: np.concatenate(parts) for task, parts in predictions.items()}

    def save(self, directory: Path, state: dict[str, Tensor]) -> None:
        save_heads(directory, state, heads_config(self.config))
