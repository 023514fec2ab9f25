"""A stage as the loop sees it: it brings its model, data, losses and evaluation."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from mtfast.config import StageConfig, StageName
from mtfast.training.engine.engine import Engine
from mtfast.training.engine.graphs import CudaRecorder, StepGraphs
from mtfast.training.schedule import learning_rate_at

if TYPE_CHECKING:
    from typing_extensions import Self


class Batch(Protocol):
    """A micro-batch as the loop sees it: what one forward pass of this rank takes, and how much of the data
    that is."""

    @property
    def size(self) -> int:
        """Examples."""

    @property
    def tokens(self) -> int:
        """Tokens of theirs."""

    @property
    def shape(self) -> Hashable:
        """Equal for batches that one CUDA graph serves."""

    def clone(self) -> Self:
        """The batch in memory of its own."""

    def copy_(self, other: Self) -> None:
        """Take over the contents of another batch of this shape."""


class Stage(ABC):
    """A stage as the loop sees it.

    name: of the stage. settings: what the loop does with it. seed: of the run.
    loss_names: of its losses. criteria: dev metrics whose best epoch is kept, by the name of the checkpoint.
    engine: the model that is trained. flops_per_token: of a step, 0 where no encoder runs in it.
    """

    name: StageName
    settings: StageConfig
    seed: int
    loss_names: tuple[str, ...]
    criteria: Mapping[str, str]
    engine: Engine
    flops_per_token: float

    @property
    def capturable(self) -> bool:
        """Whether a step is work of the device alone, which a CUDA graph can hold."""
        return self.engine.capturable

    @functools.cached_property
    def graphs(self) -> StepGraphs | None:
        """What runs the steps as CUDA graphs, where that can be."""
        return StepGraphs(self.train_on, CudaRecorder()) if self.capturable else None

    @abstractmethod
    def plan(self, epoch: int) -> list[Any]:
        """The epoch's optimizer steps, in order, as this rank sees them; equally many in every epoch."""

    @abstractmethod
    def micro_batches(self, steps: list[Any], epoch: int) -> Iterator[Sequence[Batch]]:
        """Each step's micro-batches, ready on this rank's device."""

    @abstractmethod
    def losses(self, batch: Any) -> dict[str, Tensor]:
        """Forward pass: the scalar losses by name, scaled as `task_losses` says."""

    @abstractmethod
    def total(self, losses: dict[str, Tensor]) -> Tensor:
        """The scalar to minimise."""

    def set_learning_rate(self, step: int, total_steps: int) -> float:
        """Set the rate of the step with index `step`, and return it."""
        rate = self.learning_rate_at(step, total_steps)
        self.engine.set_learning_rate(rate)
        return rate

    def learning_rate_at(self, step: int, total_steps: int) -> float:
        """The scheduled rate of the step with index `step` of so many."""
        if self.engine.scheduler is not None:
            return self.engine.scheduler.learning_rate_at(step, total_steps)
        return learning_rate_at(self.settings, step, total_steps)

    def step(self, batch: Any) -> Tensor:
        """`train_on` a micro-batch; the next call may write over the losses."""
        return self.train_on(batch) if self.graphs is None else self.graphs(batch)

    def train_on(self, batch: Any) -> Tensor:
        """Forward pass, backward pass and, after the step's last micro-batch, the update; the losses of this
        one, [len(loss_names)] on the device. The host reads nothing back."""
        losses = self.losses(batch)
        self.engine.step(self.total(losses))
        return torch.stack([losses[name].detach() for name in self.loss_names])

    @abstractmethod
    def evaluate(self) -> dict[str, float] | None:
        """Dev metrics, the same on every rank; None for a stage that has none."""

    @abstractmethod
    def save(self, directory: Path, state: dict[str, Tensor]) -> None:
        """Write the checkpoint of `state` (every weight in float32, on the host); called on rank 0 only, in a
        thread beside the one that trains."""
