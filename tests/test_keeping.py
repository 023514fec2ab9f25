"""Weights and states written while training goes on: of one moment, once, in order, whole or not at all."""

import itertools
import json
import os
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import poison
import pytest
import torch
from poison import METRICS, STEPS, Small
from safetensors.torch import load_file
from states import load_state
from torch import Tensor

from mtfast.commands import open_directory
from mtfast.config import EngineConfig, RunConfig, TaskStageConfig
from mtfast.models.checkpoint import CheckpointError
from mtfast.training.engine import engine as engine_module
from mtfast.training.engine import keeping as engine_keeping
from mtfast.training.engine import state as engine_state
from mtfast.training.engine.keeping import Due, Keeper, Write
from mtfast.training.engine.state import State, states_in
from mtfast.training.loop import NonFinite, train_stage
from mtfast.training.run import keeping

KINDS = [("fp32", 0), ("bf16", 0), ("bf16", 1), ("fp32", 2), ("bf16", 3)]


@pytest.fixture
def config(tmp_path) -> RunConfig:
    engine_module.start()
    return RunConfig(
        run_dir=str(tmp_path / "run"),
        engine=EngineConfig(precision="fp32", zero_stage=0),
        finetune=TaskStageConfig(epochs=3, batch_size=4, learning_rate=0.1),
    )


@pytest.fixture
def newest(monkeypatch) -> list[str]:
    """The states that have been made the newest."""
    found = []

    def write_state(directory: Path, state: State, *arguments: Any) -> None:
        found.append(f"step-{state.step}")
        own(directory, state, *arguments)

    own = engine_keeping.write_state
    monkeypatch.setattr(engine_keeping, "write_state", write_state)
    return found


def change(config: RunConfig, **changes: Any) -> RunConfig:
    return replace(config, finetune=replace(config.finetune, **changes))


class Scored(Small):
    """Counts how often its weights are written, and has scores of its own in each epoch."""

    def __init__(self, config: RunConfig, *scores: dict[str, float], bad: tuple[int, ...] = ()) -> None:
        super().__init__(config, bad)
        self.epochs, self.written = iter(scores), []

    def evaluate(self) -> dict[str, float]:
        return dict.fromkeys(METRICS.values(), 0.0) | next(self.epochs, {})

    def save(self, directory: Path, state: dict[str, Tensor]) -> None:
        super().save(directory, state)
        self.written.append(directory.name)


def train(config: RunConfig, stage: Small, log_every: int = 1) -> dict[str, Any]:
    try:
        return train_stage(stage, open_directory(config), log_every)
    finally:
        stage.engine.close()


def weights(config: RunConfig, name: str) -> Path:
    return config.path / "finetune" / name / "weights.safetensors"


def states(config: RunConfig) -> list[str]:
    return [path.name for path in states_in(config.path / "finetune" / "state")]


def losses(config: RunConfig) -> list[tuple[int, Any]]:
    records = map(json.loads, (config.path / "metrics.jsonl").read_text().splitlines())
    return [(record["step"], record["losses"]) for record in records if record["kind"] == "step"]


def test_weights_are_written_once_for_all_criteria(config):
    all_, sst = dict.fromkeys(METRICS.values(), 1.0), {"sst_accuracy": 2.0}
    stage = Scored(config, all_, sst, {"sst_accuracy": 3.0, "mean": 4.0})
    train(config, stage)
    assert stage.written == ["best-mean", "best-sst", "best-mean"]
    first, last = ("best-quora", "best-sts"), ("best-mean", "best-sst", "last")
    state = config.path / "finetune" / "state" / f"step-{3 * STEPS}"
    for together in (first, last):
        in_state = [state / name / "weights.safetensors" for name in together if name != "last"]
        files = [weights(config, name) for name in together] + in_state
        assert len({file.stat().st_ino for file in files}) == 1
    early, late = (load_file(weights(config, name)) for name in ("best-quora", "last"))
    assert not any(torch.equal(early[name], late[name]) for name in early)


def test_the_last_weights_are_written_where_they_are_not_the_best(config):
    stage = Scored(config, dict.fromkeys(METRICS.values(), 1.0))
    train(config, stage)
    assert stage.written == ["best-mean", "last"]
    assert weights(config, "last").stat().st_nlink == 1


def test_where_there_are_no_links_weights_are_copied(config, monkeypatch):
    def refuse(*_: str) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    config = change(config, epochs=1)
    train(config, Small(config))
    names = [f"best-{name}" for name in METRICS] + ["last"]
    assert len({weights(config, name).read_bytes() for name in names}) == 1
    assert len({weights(config, name).stat().st_ino for name in names}) == len(names)


@pytest.mark.parametrize(
    ("every", "expected"),
    [
        ("1 epoch", [4, 8, 12]),
        ("2 epochs", [8, 12]),
        ("7 epochs", [12]),
        ("4 steps", [4, 8, 12]),
        ("3 steps", [3, 6, 9, 12]),
        ("5 steps", [5, 10, 12]),
        ("99 steps", [12]),
        # Every step takes a minute; the time is looked at after every other.
        ("3 minutes", [4, 8, 12]),
        ("300 seconds", [6, 12]),
        ("1 hour", [12]),
    ],
)
def test_states_are_as_often_as_asked_for(every, expected, config, newest, monkeypatch):
    config = change(config, checkpoint_every=every)
    stage, minutes = Small(config), itertools.count(1)
    now, made = [0.0], stage.step

    def step(batch: Any) -> Tensor:
        now[0] = 60.0 * next(minutes)
        return made(batch)

    stage.step = step
    monkeypatch.setattr(keeping, "time", SimpleNamespace(monotonic=lambda: now[0]))
    train(config, stage, log_every=2)
    assert newest == [f"step-{number}" for number in expected]


@pytest.mark.parametrize("every", ["1 epoch", "6 steps", "1 hour"])
def test_a_stage_that_ends_within_an_epoch_has_its_state(every, config, newest):
    config = change(config, max_steps=6, checkpoint_every=every)
    train(config, Small(config))
    assert newest[-1] == "step-6" and newest.count("step-6") == 1


@pytest.mark.parametrize(("precision", "zero_stage"), KINDS)
def test_what_is_written_is_of_the_moment(precision, zero_stage, config, tmp_path):
    config = replace(config, engine=EngineConfig(precision=precision, zero_stage=zero_stage))
    stage, held, kept = Small(config), threading.Event(), {}
    stage.engine.train()

    def steps(numbers: range) -> None:
        for (batch,) in stage.micro_batches(list(numbers), 0):
            stage.engine.set_learning_rate(0.1)
            stage.step(batch)

    def write(weights: dict[str, Tensor]) -> None:
        held.wait()
        kept.update({name: x.clone() for name, x in weights.items()})

    steps(range(3))
    moment = stage.engine.state_dict()
    keeper = Keeper(stage.engine)
    keeper.keep(write, Due(tmp_path, 3, {"position": 3}))
    steps(range(3, 6))
    later = stage.engine.state_dict()
    held.set()
    keeper.wait()
    assert kept.keys() == moment.keys()
    assert all(torch.equal(x, moment[name]) and not torch.equal(x, later[name]) for name, x in kept.items())
    # What is read again goes on as this did from that moment: the optimizer's state is of it too.
    assert load_state(stage.engine, tmp_path) == {"position": 3}
    assert all(torch.equal(x, moment[name]) for name, x in stage.engine.state_dict().items())
    steps(range(3, 6))
    assert all(torch.equal(x, later[name]) for name, x in stage.engine.state_dict().items())
    stage.engine.close()


def test_training_is_at_most_one_moment_ahead_and_memory_is_used_again(config, tmp_path, monkeypatch):
    stage, go, order = Small(config), threading.Event(), []
    keeper = Keeper(stage.engine)

    class Noted(engine_keeping.Snapshot):
        def __init__(self, memory) -> None:
            order.append("copied")
            super().__init__(memory)

    def write(_: dict[str, Tensor]) -> None:
        go.wait()
        order.append("written")

    monkeypatch.setattr(engine_keeping, "Snapshot", Noted)
    keeper.keep(write, None)
    second = threading.Thread(target=keeper.keep, args=(write, Due(tmp_path, 1, {})))
    second.start()
    second.join(0.2)
    assert second.is_alive() and order == ["copied"]
    go.set()
    second.join()
    keeper.wait()
    assert order == ["copied", "written"] * 2
    chunks = [chunk.data_ptr() for chunk in keeper._memory._chunks]
    for step in range(2, 6):
        keeper.keep(write, Due(tmp_path, step, {}))
    keeper.wait()
    assert [chunk.data_ptr() for chunk in keeper._memory._chunks] == chunks
    assert [path.name for path in states_in(tmp_path)] == ["step-5"]
    stage.engine.close()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_masters_that_are_in_the_state_are_not_copied_twice(precision, config, tmp_path):
    stage = Small(replace(config, engine=EngineConfig(precision=precision, zero_stage=0)))

    def used(write: Write | None, due: Due | None) -> list[int]:
        keeper = Keeper(stage.engine)
        keeper.keep(write, due)
        keeper.wait()
        return keeper._memory._used

    def write(weights: dict[str, Tensor]) -> None:
        assert all(torch.equal(x, expected[name]) for name, x in weights.items())

    expected, due = stage.engine.state_dict(), Due(tmp_path, 1, {})
    assert used(write, due) == used(None, due) and used(write, None) > []
    stage.engine.close()


def settle() -> None:
    """Wait until nothing is being written."""
    for thread in threading.enumerate():
        if thread.name == "mtfast-keeping":
            thread.join()


# Where what is written of a state, or of weights, comes from.
WRITERS = {
    "weights": (poison, "save_tensors"),
    "tensors": (engine_state, "save_tensors"),
    "position": (engine_state, "write_json"),
    "links": (engine_state, "link_files"),
    "manifest": (engine_state, "write_manifest"),
}


@pytest.mark.parametrize("what", WRITERS)
def test_what_cannot_be_written_is_told_and_the_state_before_kept(what, config, monkeypatch, tmp_path):
    full, (module, name) = threading.Event(), WRITERS[what]
    own = getattr(module, name)

    def write(*arguments: Any, **options: Any) -> None:
        if full.is_set():
            raise OSError(28, "No space left on device")
        own(*arguments, **options)

    monkeypatch.setattr(module, name, write)
    stage, numbers = Scored(config, {"mean": 1.0}, {"mean": 2.0}), itertools.count(1)
    made = stage.step

    def step(batch: Any) -> Tensor:
        settle()
        if next(numbers) > STEPS:
            full.set()
        return made(batch)

    stage.step = step
    with pytest.raises(CheckpointError, match=r"not be written.*No space left on device"):
        train(config, stage)
    assert next(numbers) == 2 * STEPS + 2  # at the first flush after it
    full.clear()
    assert states(config) == [f"step-{STEPS}"]
    train(config, Scored(config, {"mean": 2.0}))
    whole = replace(config, run_dir=str(tmp_path / "whole"))
    train(whole, Scored(whole, {"mean": 1.0}, {"mean": 2.0}))
    assert losses(config) == losses(whole) and len(losses(whole)) == 3 * STEPS
    assert states(config) == states(whole) == [f"step-{2 * STEPS}", f"step-{3 * STEPS}"]
    ours, expected = (load_file(weights(run, "best-mean")) for run in (config, whole))
    assert all(torch.equal(x, expected[name]) for name, x in ours.items())


def test_an_error_of_training_leaves_what_was_kept_before_it(config, monkeypatch):
    config = change(config, checkpoint_every="3 steps")
    own = engine_state.save_tensors

    def slow(*arguments: Any) -> None:
        time.sleep(0.2)
        own(*arguments)

    monkeypatch.setattr(engine_state, "save_tensors", slow)
    says = "the last good state is in .*run/finetune/state"
    with pytest.raises(NonFinite, match=says):  # the state of step 3 is being written still
        train(config, Small(config, bad=(4,)), log_every=4)
    assert states(config) == ["step-3"]


def test_a_failed_writing_does_not_hide_the_error_of_training(config, monkeypatch, capsys):
    config = change(config, checkpoint_every="3 steps")
    go = threading.Event()

    def full(*_: Any, **__: Any) -> None:
        go.wait()
        raise OSError(28, "No space left on device")

    stage = Small(config)

    def broken(batch: Any) -> Tensor:
        if next(stage.steps) == 4:
            go.set()
            raise ZeroDivisionError
        return made(batch)

    made, stage.step = stage.step, broken
    stage.total = lambda losses: losses["fit"]
    monkeypatch.setattr(engine_state, "save_tensors", full)
    with pytest.raises(ZeroDivisionError):
        train(config, stage)
    assert "could not be written" in capsys.readouterr().out
