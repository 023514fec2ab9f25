"""Stage 2: the heads trained on the frozen encoder.

`features: cached` encodes every sentence once, without dropout, and trains on the table; `features: live`
runs the encoder in every step with its dropout on. The encoder stands outside the engine: nothing of it is
trained, sharded or saved here. The heads are small: they keep float32 weights, and in bf16 compute under
autocast, which leaves steps on cached features so plain that a GPU runs each as one captured graph.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mtfast.config import EngineConfig, HeadsConfig
from mtfast.data.packing import PackedBatch, TaskRows
from mtfast.data.sampler import StepPlan
from mtfast.kinds import predictions_of, task_losses
from mtfast.models.bert import PackedBert, first_rows, flops_per_token
from mtfast.models.checkpoint import save_heads
from mtfast.training.engine.engine import Engine
from mtfast.training.engine.graphs import CudaRecorder, StepGraphs
from mtfast.training.loop import Batch
from mtfast.training.run.weights import Weights, build_multitask

from .features import Features, encode
from .task_stage import Load, TaskStage, predict_packed

PREDICTION_ROWS = 8192


@dataclass(frozen=True)
class CachedBatch:
    """Examples by their numbers, in place of packed sequences.

    examples: int64 [n] by task, where the feature table is. step_counts: examples of each task in the whole
    step. token_bounds: as in `Features`, for LSTM heads alone. tokens: of the examples' sequences.
    """

    examples: Mapping[str, Tensor]
    step_counts: Mapping[str, int]
    token_bounds: dict[str, Tensor]
    tokens: int

    @property
    def size(self) -> int:
        """Examples, of all tasks."""
        return sum(map(len, self.examples.values()))


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
        self.bf16 = engine.precision == "bf16"
        dtype = torch.bfloat16 if self.bf16 else torch.float32
        self.encoder: PackedBert = model.encoder.to(self.engine.device, dtype)
        self.encoder.requires_grad_(False).eval()
        self.cached = settings.features == "cached"
        self.flops_per_token = 0.0
        self.graphs: StepGraphs | None = None
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
            # An LSTM's packed layout follows from the sequences' lengths, on the host.
            if self.engine.capturable and self.table.resident and not self.token_tasks:
                self.graphs = StepGraphs(self._step_on, CudaRecorder())
        else:
            self.flops_per_token = flops_per_token(weights.config, self.mean_seqlen, training=False)

    def micro_batches(self, steps: list[StepPlan], epoch: int) -> Iterator[Sequence[Batch]]:
        return self._cached_batches(steps) if self.cached else super().micro_batches(steps, epoch)

    def _cached_batches(self, steps: list[StepPlan]) -> Iterator[list[CachedBatch]]:
        """The numbers of all steps' examples go to the device at once; a batch is a part of them."""
        parts = [part for step in steps for part in step.micro_batches]
        examples = {}
        for task in self.train:
            numbers = torch.from_numpy(np.concatenate([part[task] for part in parts]))
            examples[task] = numbers.to(self.table.cls.device).split([len(part[task]) for part in parts])
        index = 0
        for step in steps:
            batches = []
            for part in step.micro_batches:
                mine = {task: numbers[index] for task, numbers in examples.items()}
                tokens = sum(int(self.lengths[task][rows].sum()) for task, rows in part.items())
                batches.append(CachedBatch(mine, step.step_counts, self.table.bounds(mine), tokens))
                index += 1
            yield batches

    def step(self, batch: CachedBatch | PackedBatch) -> Tensor:
        if self.graphs is not None and isinstance(batch, CachedBatch):
            return self.graphs(batch.examples)
        return super().step(batch)

    def _step_on(self, examples: Mapping[str, Tensor]) -> Tensor:
        """A whole step of one rank."""
        return super().step(CachedBatch(examples, {task: len(x) for task, x in examples.items()}, {}, 0))

    def losses(self, batch: CachedBatch | PackedBatch) -> dict[str, Tensor]:
        if isinstance(batch, CachedBatch):
            features = self.table.select(batch.examples, batch.token_bounds)
            rows = {
                task: TaskRows(
                    features.sequences[task],
                    self.labels[task][examples.to(self.engine.device)],
                    batch.step_counts[task],
                )
                for task, examples in batch.examples.items()
            }
            return task_losses(self.tasks, self._heads(features), rows, self.layout.shares)
        self.encoder.train()
        outputs = self._on_packed(batch)
        self.encoder.eval()
        return task_losses(self.tasks, outputs, batch.tasks, self.layout.shares)

    def _heads(self, features: Features) -> dict[str, Tensor]:
        with torch.autocast(self.engine.device.type, torch.bfloat16, enabled=self.bf16):
            return self.engine.model(
                features.cls,
                features.sequences,
                tokens=features.tokens,
                token_bounds=features.token_bounds,
            )

    def _on_packed(self, batch: PackedBatch) -> dict[str, Tensor]:
        with torch.no_grad():
            states = self.encoder(**batch.encoder_inputs(), cls_only=not self.token_tasks)
        if not self.token_tasks:
            return self._heads(Features(states, batch.sequences, None, {}))
        cls = states.index_select(0, first_rows(batch.cu_seqlens, states.size(0)))
        return self._heads(Features(cls, batch.sequences, states, batch.token_bounds))

    def predict_dev(self) -> dict[str, np.ndarray]:
        if not self.cached:
            return predict_packed("heads dev", self._on_packed, self.dev, self.engine.device)
        table = self.dev_table
        predictions: dict[str, list[np.ndarray]] = {task: [] for task in self.dev}
        longest = max(map(len, self.dev.values()))
        for begin in range(0, longest, PREDICTION_ROWS):
            examples = {
                task: torch.arange(
                    min(begin, len(t)), min(begin + PREDICTION_ROWS, len(t)), device=table.cls.device
                )
                for task, t in self.dev.items()
            }
            with torch.no_grad():
                outputs = self._heads(table.select(examples, table.bounds(examples)))
            for task, output in outputs.items():
                predictions[task].append(predictions_of(self.tasks[task], output))
        return {task: np.concatenate(parts) for task, parts in predictions.items()}

    def save(self, directory: Path, state: dict[str, Tensor]) -> None:
        save_heads(directory, state, self.tasks, self.weights.mlp)
