"""Runs on disks that fail and in processes that are killed, and what they leave when they have gone on."""

import itertools
import json
import shutil
import signal
from pathlib import Path
from typing import Any

import faults
from poison import METRICS, STEPS, Small
from processes import command
from safetensors.torch import load_file
from torch import Tensor

from mtfast import commands, comparison, comparison_report
from mtfast.commands import open_directory
from mtfast.config import EngineConfig, RunConfig, TaskStageConfig
from mtfast.errors import Error
from mtfast.training.engine import alive, ranks
from mtfast.training.engine import engine as engine_module
from mtfast.training.loop import train_stage
from mtfast.training.run.lock import release
from mtfast.training.stage import Stage

EPOCHS = 4


def train_stages(config: RunConfig, number: int | None = None, stop: tuple[str, int] | None = None) -> None:
    """One rank of a run of all stages.

    number: of the change to the run's files in which rank 0 is killed; None counts them, and rank 0 writes
        how many there were to a file beside the run.
    stop: stage and step in which the last rank is sent SIGTERM.
    """
    engine_module.start()
    if stop is not None and ranks.rank() == ranks.world_size() - 1:
        _send_a_signal(*stop)
    if ranks.is_main():
        mode = faults.COUNT if number is None else faults.KILL
        faults.arm(config.path, number or 0, mode)
    for stage in config.stages:
        commands.train(config, stage)
    alive.finish()
    if ranks.is_main() and number is None:
        config.path.with_suffix(".changes").write_text(str(faults.disarm()))


def run_experiment(recipe: str, config: RunConfig, number: int | None = None) -> None:
    """All runs of an experiment, without their own reports; number as in `train_stages`."""
    commands.write_report = lambda path: path  # type: ignore[assignment]
    comparison_report.plot_comparison = comparison_report.plot_dev_metrics = lambda *_: None
    comparison.RESAMPLES = 300
    mode = faults.COUNT if number is None else faults.KILL
    faults.arm(config.path, number or 0, mode)
    commands.execute("run", recipe, config)
    alive.finish()
    if number is None:
        config.path.with_suffix(".changes").write_text(str(faults.disarm()))


class Wandering(Small):
    """Its best epochs are others by each criterion. stop: step in which this process is sent SIGTERM."""

    def __init__(self, config: RunConfig, stop: int | None = None) -> None:
        super().__init__(config)
        self.stop, self.made = stop, itertools.count(1)

    def step(self, batch: Any) -> Tensor:
        if next(self.made) == self.stop:
            signal.raise_signal(signal.SIGTERM)
        return super().step(batch)

    def evaluate(self) -> dict[str, float]:
        total = sum(x.double().abs().sum().item() for x in self.engine.state_dict().values())
        mean, sst, quora, sts = METRICS.values()
        return {mean: -total, sst: total, quora: total * 1e3 % 1, sts: 0.0}


def _send_a_signal(name: str, number: int) -> None:
    """Let this process be sent SIGTERM in this step of this stage."""

    def step(self: Stage, batch: Any) -> Any:
        if self.name == name and next(steps) == number:
            signal.raise_signal(signal.SIGTERM)
        return made(self, batch)

    made, Stage.step, steps = Stage.step, step, itertools.count(1)


def list_changes(run_dir: Path, changes: Path) -> None:
    """Lists what a run of a small model does to its files."""
    engine_module.start()
    faults.arm(run_dir, 0, faults.COUNT, changes=changes)
    train_small(run_dir)
    faults.disarm()


def impatient_command(*arguments: str) -> None:
    """A command whose ranks take one that is silent for a few seconds for dead."""
    alive.SILENT_SECONDS = 10.0
    command(*arguments)


def train_small(run_dir: Path, stop: int | None = None) -> None:
    """stop: step in which this process is sent SIGTERM."""
    config = RunConfig(
        run_dir=str(run_dir),
        engine=EngineConfig(precision="fp32", zero_stage=0),
        finetune=TaskStageConfig(epochs=EPOCHS, batch_size=4, learning_rate=0.02, checkpoint_every="3 steps"),
    )
    stage = Wandering(config, stop)
    try:
        train_stage(stage, open_directory(config), 1)
    finally:
        stage.engine.close()
        release()


def left_by(run_dir: Path) -> dict[str, Any]:
    """What a run is there for: the losses of every step, dev metrics, the best epochs and all weights."""
    left: dict[str, Any] = {}
    for line in (run_dir / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        key = record["kind"], record["stage"], record["step"]
        assert key not in left, f"{key} twice"
        left[key] = record.get("losses") or record["metrics"]
    for file in run_dir.glob("*/*/*.safetensors"):
        tensors = load_file(file)
        left[str(file.relative_to(run_dir))] = {name: x.double().tolist() for name, x in tensors.items()}
    for result in run_dir.glob("*/result.json"):
        left[result.parent.name] = json.loads(result.read_text())["best"]
    assert not list(run_dir.rglob("*.partial")) and not list(run_dir.rglob(".*coming"))
    return left


def at_every_change(directory: Path, numbers: range, mode: int, error: int) -> None:
    """Trains a small model once for each of these changes to the run's files, which fails, and then goes on:
    it must leave what it had left otherwise. errors.json then has what errors said, "" where there was none.
    """
    engine_module.start()
    whole = directory / "whole"
    faults.arm(whole, 0, faults.COUNT)
    train_small(whole)
    count, expected = faults.disarm(), left_by(whole)
    assert len([key for key in expected if key[0] == "step"]) == EPOCHS * STEPS
    said = {}
    for number in numbers[: len(range(numbers.start, count + 1, numbers.step))]:
        run_dir = directory / "broken"
        shutil.rmtree(run_dir, ignore_errors=True)
        faults.arm(run_dir, number, mode, error)
        try:
            train_small(run_dir)
            said[number] = ""
        except (Error, OSError) as failure:
            said[number] = str(failure)
        finally:
            faults.disarm()
        train_small(run_dir)
        found = left_by(run_dir)
        different = {key for key in found.keys() | expected.keys() if found.get(key) != expected.get(key)}
        assert not different, (number, said[number], different)
    (directory / "errors.json").write_text(json.dumps(said))
