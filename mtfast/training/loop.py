"""The one training loop: what is the same for every stage."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any, NoReturn

import torch
from torch import Tensor

from mtfast.config import STAGES
from mtfast.errors import Error
from mtfast.models.checkpoint import CheckpointError
from mtfast.training.engine import peak_memory, ranks
from mtfast.training.engine.state import states_in, unreadable
from mtfast.training.run.directory import STATE, RunDirectory
from mtfast.training.run.keeping import Keeping, best_of, newest, note_best
from mtfast.training.run.loggers import scalars
from mtfast.training.run.progress import StageProgress, peak_flops, say
from mtfast.training.seeds import seed_for
from mtfast.training.stage import Batch, Stage
from mtfast.training.stopping import Stopped, Stopping

LOOK_SECONDS = 5.0  # after which several ranks tell each other at the latest that they were asked to stop


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
    learning_rate: float


@dataclass
class Position:
    """Where a stage stands; saved with its state, so that a continued run repeats the uninterrupted one.

    to_evaluate: an epoch's steps are made, and what comes after them is not.
    """

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
    to_evaluate: bool = False


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
        self.steps_per_epoch = len(stage.plan(0))
        whole = self.steps_per_epoch * self.settings.epochs
        self.total_steps = min(whole, self.settings.max_steps or whole)
        self.at = self._position()
        self.keeping = Keeping(
            stage.engine, stage.save, self.directory, self.settings.checkpoint_every, self.settings.keep
        )
        self.stopping = Stopping()
        self.asked = 0  # the signal that some rank was sent
        self.look_at = self.at.step + 1
        self.allowed_in_a_row = self.settings.max_skipped if self.settings.non_finite == "skip" else 0
        self.pending: list[Trained] = []
        run.rewind(stage.name, self.at.step, evaluated=not self.at.to_evaluate)

    def _position(self) -> Position:
        """Where the newest state leaves off, which the engine goes on from."""
        found = newest(self.directory)
        if found is None:
            return Position()
        try:
            self.stage.engine.load(found.state)
            at = Position(**found.state.client)
        except (CheckpointError, TypeError) as error:
            raise unreadable(self.state_directory / f"step-{found.state.step}", error) from error
        at.best = {name: best for name, best in at.best.items() if best_of(name) in found.best}
        before, now = found.state.ranks, ranks.world_size()
        shared = f", on {now} rank{'s' * (now > 1)} instead of {before}" if before != now else ""
        say(f"{self.stage.name}: continuing after step {at.step} of {self.total_steps}{shared}")
        return at

    def run(self) -> dict[str, Any]:
        stage, at = self.stage, self.at
        if bad := stage.engine.first_non_finite():
            raise NonFinite(
                f"{stage.name}: weights are not finite before step {at.step + 1} is made, {bad} first; "
                + (f"remove {self.state_directory}" if at.step else "start from another checkpoint")
            )
        tensor_cores = stage.engine.device.type == "cuda" and stage.engine.precision == "bf16"
        peak = peak_flops(torch.cuda.get_device_name()) if tensor_cores else None
        progress = StageProgress(stage.name, self.total_steps, at.step, stage.flops_per_token, peak)
        with self.stopping, self.keeping:
            with progress as self.progress:
                while self.at.to_evaluate or not self._is_over():
                    self._epoch()
            result = self._finish()
        if self._tell_asked(self.stopping.signum):
            raise Stopped(self.asked, f"{stage.name} has finished; {self._left_off()}")
        return result

    def _is_over(self) -> bool:
        patience = getattr(self.settings, "patience", None)
        impatient = patience is not None and self.at.epochs_without_gain >= patience
        return impatient or self.at.step >= self.total_steps

    def _epoch(self) -> None:
        at, stage = self.at, self.stage
        stage.engine.train()
        self.mark = time.perf_counter()
        steps = stage.plan(at.epoch)[at.step_in_epoch :][: self.total_steps - at.step]
        end = at.step + len(steps)
        for micro_batches in stage.micro_batches(steps, at.epoch) if steps else ():
            self._step(micro_batches)
            if self._is_to_flush():
                self._flush()
                if at.step < end and self.asked:
                    self._stop()
                if at.step < end and self.keeping.is_due(at.step):
                    self._keep([], last=False, state=True)
        self._flush()
        at.to_evaluate = True
        if self.asked:
            self._stop()
        whole = at.step_in_epoch == self.steps_per_epoch
        epoch = at.epoch + 1 if whole else at.epoch
        risen = self._evaluate(epoch)
        at.to_evaluate = False
        if whole:
            at.epoch, at.step_in_epoch = epoch, 0
        over = self._is_over()
        self._keep(risen, last=over, state=over or self.keeping.is_due(at.step, at.epoch if whole else None))

    def _is_to_flush(self) -> bool:
        """Whether losses are to be read after this step; the same on every rank."""
        at, stage = self.at, self.stage
        alone = ranks.world_size() == 1
        return (
            at.step % self.log_every == 0
            or stage.engine.is_monitored  # some monitors take no step that is older than their last
            or self.keeping.is_due(at.step)
            or at.skipped_in_a_row > self.allowed_in_a_row
            or (self.stopping.signum is not None if alone else at.step >= self.look_at)
        )

    def _step(self, micro_batches: Sequence[Batch]) -> None:
        at, stage = self.at, self.stage
        rate = stage.set_learning_rate(at.step, self.total_steps)
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
        self.pending.append(Trained(at.step, values, examples, tokens, skipped, rate))

    def _flush(self) -> None:
        """Read the losses of the steps since the last flush and see to it that the weights are finite; only
        here does the host wait for the device. Nothing is saved without a flush after the last step."""
        if not self.pending:
            return
        self.keeping.look()
        at, stage = self.at, self.stage
        device = self.pending[0].losses.device
        pace = (time.perf_counter() - self.mark) / len(self.pending)
        told = [self.stopping.signum is not None, self.keeping.failed, pace]
        counts = torch.tensor(
            [[*told, p.examples, p.tokens] for p in self.pending], dtype=torch.float64, device=device
        )
        table = torch.cat([torch.stack([p.losses for p in self.pending]).double(), counts], dim=1)
        rows = ranks.mean_over_ranks(table).tolist()
        steps, self.pending = self.pending, []
        asked, failed, pace = rows[-1][-5:-2]
        if failed:
            self.keeping.wait()
        if asked:
            self.asked = self.stopping.signum or signal.SIGTERM
        self.look_at = at.step + max(1, int(LOOK_SECONDS / max(pace, 1e-6)))
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
        self._append(records)
        self._tell_skipped([trained.step for trained in steps if trained.skipped])
        self.progress.update(at.step, losses, examples, tokens)

    def _append(self, records: list[dict[str, Any]]) -> None:
        """Add lines to metrics.jsonl, and what they say to the monitors of a DeepSpeed JSON."""
        self.run_directory.append(records)
        for record in records:
            self.stage.engine.monitor(scalars(record), record["step"])

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
        rate = trained.learning_rate
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
        self.keeping.settle()
        kept = states_in(self.state_directory)
        left = f"the last good state is in {self.state_directory}" if kept else "no state had been saved yet"
        skip = f", or leave such steps out ({name}.non_finite skip)" if not self.allowed_in_a_row else ""
        return (
            f"{left}; start again in another --run-dir with a lower {name}.learning_rate or with "
            f"{name}.gradient_clipping{skip}"
        )

    def _stop(self) -> NoReturn:
        """Leave, as a signal asks for, with a state to go on from."""
        at = self.at
        self._keep([], last=False, state=True)
        self.keeping.wait()
        raise Stopped(
            self.asked,
            f"{self.stage.name}: stopped after step {at.step} of {self.total_steps}, which is saved; "
            + self._left_off(),
        )

    def _left_off(self) -> str:
        return f"{signal.Signals(self.asked).name} was received; the same command continues the run"

    def _tell_asked(self, signum: int | None) -> bool:
        """Whether any rank was asked to stop."""
        if ranks.mean_over_ranks(torch.tensor(float(signum is not None), device=self.stage.engine.device)):
            self.asked = signum or signal.SIGTERM
        return bool(self.asked)

    def _evaluate(self, epoch: int) -> list[str]:
        """Dev metrics after so many epochs, where the stage has some; the criteria that have risen.

        What evaluates has no state, so one rank leaves it at once; several cannot agree to.
        """
        at, stage = self.at, self.stage
        started = time.perf_counter()
        stage.engine.train(False)
        try:
            with self.stopping.at_once() if ranks.world_size() == 1 else nullcontext():
                metrics = stage.evaluate()
        except Stopped as stopped:
            self.asked = stopped.signum
            self._stop()
        risen = []
        if metrics is not None:
            for name, value in metrics.items():
                if not math.isfinite(value):
                    raise NonFinite(
                        f"{stage.name}: {name} is {value} after step {at.step}: predictions for the dev data "
                        f"are not finite; {self._advice()}"
                    )
            where = {"stage": stage.name, "step": at.step, "epoch": epoch}
            self._append([{"kind": "eval", **where, "metrics": metrics}])
            say(f"{stage.name} epoch {epoch}: " + "  ".join(f"{k} {v:.3f}" for k, v in metrics.items()))
            risen = note_best(at.best, stage.criteria, metrics, epoch)
            at.epochs_without_gain = 0 if "mean" in risen else at.epochs_without_gain + 1
        at.seconds += time.perf_counter() - started
        self.progress.rest()
        return risen

    def _keep(self, risen: list[str], *, last: bool, state: bool) -> None:
        started = time.perf_counter()
        if state:
            self.run_directory.sync_metrics()
        self.keeping.keep(self.at.step, risen, self.at.best, last, asdict(self.at) if state else None)
        self.mark = time.perf_counter()
        self.at.seconds += self.mark - started
        self.progress.rest()

    def _finish(self) -> dict[str, Any]:
        at, stage = self.at, self.stage
        started = time.perf_counter()
        self.keeping.finish(at.step)
        at.seconds += time.perf_counter() - started
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
                **peak_memory.measured(),
            },
            "best": at.best,
        }
        self.run_directory.finish_stage(stage.name, result)
        self.run_directory.summarize(stages={stage.name: result["summary"]})
        return result
