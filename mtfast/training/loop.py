"""The one training loop. A stage brings its model, data, losses and evaluation; the loop does the rest."""

from __future__ import annotations

import functools
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from mtfast.config import STAGES, StageConfig, StageName
from mtfast.errors import Error
from mtfast.models.checkpoint import CheckpointError
from mtfast.training.engine import ranks
from mtfast.training.engine.engine import Engine
from mtfast.training.engine.graphs import CudaRecorder, StepGraphs
from mtfast.training.engine.state import POINTER
from mtfast.training.run.directory import STATE, RunDirectory
from mtfast.training.run.progress import StageProgress, peak_flops, say
from mtfast.training.seeds import seed_for

if TYPE_CHECKING:
    from typing_extensions import Self


class NonFinite(Error, RuntimeError):
    """A loss, a gradient, a weight or a dev metric is infinite or not a number."""


@dataclass(frozen=True)
class Trained:
    """A step whose losses the device still has: [len(loss_names)] on the device; counts of this rank."""

    step: int
    losses: Tensor
    examples: int
    tokens: int
    skipped: bool


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
    def fills(self) -> bool:
        """Whether batches are filled up so that their shapes repeat, from which a CPU gains nothing."""
        return self.engine.device.type == "cuda"

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
        """Write the checkpoint of `state` (every weight in float32); called on rank 0 only."""


@dataclass
class Position:
    """Where a stage stands; saved with its state, so that a continued run repeats the uninterrupted one."""

    step: int = 0
    epoch: int = 0
    step_in_epoch: int = 0
    train_seconds: float = 0.0
    seconds: float = 0.0
    examples: float = 0.0
    tokens: float = 0.0
    first_loss: float | None = None
    last_loss: float | None = None
    best: dict[str, dict[str, Any]] = field(default_factory=dict)
    epochs_without_gain: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0


def learning_rate_at(stage: StageConfig, step: int, total_steps: int) -> float:
    """Learning rate of the step with index `step`: linear warm-up, then constant, linear or cosine decay."""
    warmup = round(stage.warmup_fraction * total_steps)
    if step < warmup:
        return stage.learning_rate * (step + 1) / warmup
    left = (total_steps - step) / max(total_steps - warmup, 1)
    if stage.schedule == "linear":
        return stage.learning_rate * left
    if stage.schedule == "cosine":
        return stage.learning_rate * 0.5 * (1 + math.cos(math.pi * (1 - left)))
    return stage.learning_rate


def train_stage(stage: Stage, run: RunDirectory, log_every: int) -> dict[str, Any]:
    """Train one stage to its end, from its newest saved state if there is one, and return its result.

    The losses are read from the device every `log_every` steps.
    """
    return _Loop(stage, run, log_every).run()


class _Loop:
    def __init__(self, stage: Stage, run: RunDirectory, log_every: int) -> None:
        self.stage, self.run_directory, self.log_every = stage, run, log_every
        self.settings = stage.settings
        self.directory = run.stage(stage.name)
        self.state_directory = self.directory / STATE
        client = stage.engine.load(self.state_directory)
        self.at = Position() if client is None else self._position(client)
        self.steps_per_epoch = len(stage.plan(0))
        whole = self.steps_per_epoch * self.settings.epochs
        self.total_steps = min(whole, self.settings.max_steps or whole)
        self.allowed_in_a_row = self.settings.max_skipped if self.settings.non_finite == "skip" else 0
        self.pending: list[Trained] = []
        if client:
            say(f"{stage.name}: continuing after step {self.at.step} of {self.total_steps}")
        run.rewind(stage.name, self.at.step)

    def _position(self, client: dict[str, Any]) -> Position:
        try:
            return Position(**client["position"])
        except (KeyError, TypeError) as error:
            raise CheckpointError(
                f"the state in {self.state_directory} is of another version of mtfast ({error}); remove that "
                "directory to start the stage again"
            ) from error

    def run(self) -> dict[str, Any]:
        stage, at = self.stage, self.at
        if bad := stage.engine.first_non_finite():
            raise NonFinite(
                f"{stage.name}: weights are not finite before step {at.step + 1} is made, {bad} first; "
                + (f"remove {self.state_directory}" if at.step else "start from another checkpoint")
            )
        tensor_cores = stage.engine.device.type == "cuda" and stage.engine.precision == "bf16"
        peak = peak_flops(torch.cuda.get_device_name()) if tensor_cores else None
        with StageProgress(stage.name, self.total_steps, at.step, stage.flops_per_token, peak) as progress:
            self.progress = progress
            while at.step < self.total_steps and not self._out_of_patience():
                self._epoch()
        return self._finish()

    def _epoch(self) -> None:
        at, stage = self.at, self.stage
        stage.engine.train()
        self.mark = time.perf_counter()
        steps = stage.plan(at.epoch)[at.step_in_epoch :][: self.total_steps - at.step]
        for micro_batches in stage.micro_batches(steps, at.epoch):
            self._step(micro_batches)
            if at.step % self.log_every == 0 or at.skipped_in_a_row > self.allowed_in_a_row:
                self._flush()
            every = self.settings.checkpoint_every
            if every and at.step % every == 0 and at.step_in_epoch < self.steps_per_epoch:
                self._flush()
                self._save_state()
        self._flush()
        if at.step_in_epoch == self.steps_per_epoch:
            at.epoch, at.step_in_epoch = at.epoch + 1, 0
        self._evaluate()
        self._save_state()

    def _step(self, micro_batches: Sequence[Batch]) -> None:
        at, stage = self.at, self.stage
        rate = learning_rate_at(self.settings, at.step, self.total_steps)
        stage.engine.set_learning_rate(rate)
        values = torch.zeros(len(stage.loss_names), device=stage.engine.device)
        examples = tokens = 0
        skipped_before = stage.engine.skipped
        for index, batch in enumerate(micro_batches):
            # Every draw of a forward pass follows from where it stands, so a continued run repeats it.
            number = STAGES.index(stage.name)
            torch.manual_seed(seed_for(stage.seed, number, at.step, index, ranks.rank()))
            values = values + stage.step(batch) / len(micro_batches)
            examples, tokens = examples + batch.size, tokens + batch.tokens
        at.step, at.step_in_epoch = at.step + 1, at.step_in_epoch + 1
        skipped = stage.engine.skipped > skipped_before
        at.skipped += skipped
        at.skipped_in_a_row = at.skipped_in_a_row + 1 if skipped else 0
        self.pending.append(Trained(at.step, values, examples, tokens, skipped))

    def _flush(self) -> None:
        """Read the losses of the steps since the last flush and see to it that the weights are finite; only
        here does the host wait for the device. Nothing is saved without a flush after the last step."""
        if not self.pending:
            return
        at, stage = self.at, self.stage
        device = self.pending[0].losses.device
        counts = torch.tensor(
            [[p.examples, p.tokens] for p in self.pending], dtype=torch.float64, device=device
        )
        table = torch.cat([torch.stack([p.losses for p in self.pending]).double(), counts], dim=1)
        rows = ranks.mean_over_ranks(table).tolist()
        steps, self.pending = self.pending, []
        bad = stage.engine.first_non_finite()
        now = time.perf_counter()
        seconds, self.mark = now - self.mark, now
        world = ranks.world_size()
        examples, tokens = (sum(row[i] for row in rows) * world for i in (-2, -1))
        rates = {"examples_per_s": examples / seconds, "tokens_per_s": tokens / seconds}
        records = []
        for trained, row in zip(steps, rows, strict=True):
            losses = dict(zip(stage.loss_names, row, strict=False))
            records.append(self._record(trained, losses) | ({} if trained.skipped else rates))
        if bad:
            since = (
                f"step {steps[0].step}" if len(steps) == 1 else f"steps {steps[0].step} to {steps[-1].step}"
            )
            raise NonFinite(
                f"{stage.name}: weights are not finite after {since}, {bad} first; {self._advice()}"
            )
        at.examples, at.tokens = at.examples + examples, at.tokens + tokens
        at.train_seconds, at.seconds = at.train_seconds + seconds, at.seconds + seconds
        self.run_directory.append(records)
        self._tell_skipped([trained.step for trained in steps if trained.skipped])
        self.progress.update(at.step, losses, examples, tokens)

    def _record(self, trained: Trained, losses: dict[str, float]) -> dict[str, Any]:
        """The step's line of metrics.jsonl. Raises NonFinite for the losses of a step that was made."""
        at, stage, step = self.at, self.stage, trained.step
        where = {"stage": stage.name, "step": step, "epoch": (step - 1) // self.steps_per_epoch}
        if trained.skipped and self.allowed_in_a_row:
            finite = {name: value if math.isfinite(value) else None for name, value in losses.items()}
            return {"kind": "skipped", **where, "losses": finite}
        for name, value in losses.items():
            if not math.isfinite(value):
                raise NonFinite(
                    f"{stage.name}: the {name} loss is {value} at step {step}; {self._advice(step)}"
                )
        loss = self._weighted(losses)
        if at.first_loss is None:
            at.first_loss = loss
        at.last_loss = loss
        rate = learning_rate_at(self.settings, step - 1, self.total_steps)
        return {"kind": "step", **where, "loss": loss, "losses": losses, "learning_rate": rate}

    def _tell_skipped(self, steps: list[int]) -> None:
        """Say which steps' updates were left out, and stop where that is not allowed or happens too often."""
        if not steps:
            return
        at, stage = self.at, self.stage
        which = f"step{'s' * (len(steps) > 1)} {', '.join(map(str, steps))}"
        what = f"{stage.name}: the gradients of {which} were not finite"
        if not self.allowed_in_a_row:
            raise NonFinite(f"{what}; {self._advice()}")
        say(f"{what}: left out, {at.skipped} of {at.step} so far")
        if at.skipped_in_a_row > self.allowed_in_a_row:
            raise NonFinite(
                f"{what}, {at.skipped_in_a_row} in a row, and {stage.name}.max_skipped is "
                f"{self.allowed_in_a_row}; {self._advice()}"
            )

    def _weighted(self, losses: dict[str, float]) -> float:
        values = {k: torch.tensor(v, dtype=torch.float64, device="cpu") for k, v in losses.items()}
        return float(self.stage.total(values))

    def _advice(self, step: int | None = None) -> str:
        """What is left and what to do about a value that is not finite, at `step` where that is known."""
        name = self.stage.name
        if step == 1:
            return (
                "no update had been made yet, so the learning rate is not the cause; look at the checkpoint "
                "and at the loss weights, or compute in engine.precision fp32"
            )
        kept = (self.state_directory / POINTER).exists()
        left = f"the last good state is in {self.state_directory}" if kept else "no state had been saved yet"
        skip = f", or leave such steps out ({name}.non_finite skip)" if not self.allowed_in_a_row else ""
        return (
            f"{left}; start again in another --run-dir with a lower {name}.learning_rate or with "
            f"{name}.gradient_clipping{skip}"
        )

    def _evaluate(self) -> None:
        at, stage = self.at, self.stage
        started = time.perf_counter()
        stage.engine.train(False)
        metrics = stage.evaluate()
        if metrics is not None:
            for name, value in metrics.items():
                if not math.isfinite(value):
                    raise NonFinite(
                        f"{stage.name}: {name} is {value} after step {at.step}: predictions for the dev data "
                        f"are not finite; {self._advice()}"
                    )
            record = {
                "kind": "eval",
                "stage": stage.name,
                "step": at.step,
                "epoch": at.epoch,
                "metrics": metrics,
            }
            self.run_directory.append([record])
            say(f"{stage.name} epoch {at.epoch}: " + "  ".join(f"{k} {v:.3f}" for k, v in metrics.items()))
            self._keep_best(metrics)
        at.seconds += time.perf_counter() - started
        self.progress.rest()

    def _keep_best(self, metrics: dict[str, float]) -> None:
        at = self.at
        risen = [
            name
            for name, metric in self.stage.criteria.items()
            if name not in at.best or metrics[metric] > at.best[name]["value"]
        ]
        at.epochs_without_gain = 0 if "mean" in risen else at.epochs_without_gain + 1
        if not risen:
            return
        state = self.stage.engine.state_dict()
        for name in risen:
            at.best[name] = {
                "value": metrics[self.stage.criteria[name]],
                "epoch": at.epoch,
                "metrics": metrics,
            }
            ranks.on_main(self.stage.save, self.directory / f"best-{name}", state)

    def _out_of_patience(self) -> bool:
        patience = getattr(self.settings, "patience", None)
        return patience is not None and self.at.epochs_without_gain >= patience

    def _save_state(self) -> None:
        started = time.perf_counter()
        self.stage.engine.save(self.state_directory, self.at.step, {"position": asdict(self.at)})
        self.at.seconds += time.perf_counter() - started
        self.mark = time.perf_counter()
        self.progress.rest()

    def _finish(self) -> dict[str, Any]:
        at, stage = self.at, self.stage
        state = stage.engine.state_dict()
        ranks.on_main(stage.save, self.directory / "last", state)
        seconds = max(at.train_seconds, 1e-9)
        result = {
            "summary": {
                "seconds": at.seconds,
                "steps": at.step,
                "examples_per_s": at.examples / seconds,
                "tokens_per_s": at.tokens / seconds,
                "first_loss": at.first_loss,
                "last_loss": at.last_loss,
                "skipped_steps": at.skipped,
            },
            "best": at.best,
        }
        self.run_directory.finish_stage(stage.name, result)
        self.run_directory.summarize(stages={stage.name: result["summary"]})
        return result
