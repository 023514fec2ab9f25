"""A run that is sent a signal finishes its step, saves it and leaves, all ranks together; ranks that die."""

import itertools
import os
import re
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import faulty
import pytest
from bert_twins import small_corpus
from following import flags
from poison import STEPS, Small
from processes import Ranks, command
from stages import demo_on

from mtfast import run as run_module
from mtfast.commands import open_directory
from mtfast.config import EngineConfig, RunConfig, TaskStageConfig
from mtfast.data.demo import DemoCorpus
from mtfast.training import stopping
from mtfast.training.engine import engine as engine_module
from mtfast.training.engine.state import states_in
from mtfast.training.loop import train_stage
from mtfast.training.stopping import Stopped


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> DemoCorpus:
    return small_corpus(tmp_path_factory.mktemp("corpus"), 40)


def config_in(run_dir: Path) -> RunConfig:
    return RunConfig(
        run_dir=str(run_dir),
        engine=EngineConfig(precision="fp32", zero_stage=0),
        finetune=TaskStageConfig(epochs=3, batch_size=4, learning_rate=0.02, checkpoint_every="1 hour"),
    )


class Signalled(Small):
    """Is sent a signal in its n-th step, or in its n-th evaluation."""

    def __init__(self, config: RunConfig, signum: int, step: int = 0, evaluation: int = 0) -> None:
        super().__init__(config)
        self.signum, self.at = signum, {"step": step, "evaluation": evaluation}
        self.calls = {"step": itertools.count(1), "evaluation": itertools.count(1)}

    def _count(self, what: str) -> None:
        if next(self.calls[what]) == self.at[what]:
            signal.raise_signal(self.signum)

    def step(self, batch):
        self._count("step")
        return super().step(batch)

    def evaluate(self) -> dict[str, float]:
        self._count("evaluation")
        return super().evaluate()


def train(config: RunConfig, stage: Small, log_every: int = 10) -> None:
    try:
        train_stage(stage, open_directory(config), log_every)
    finally:
        stage.engine.close()


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict:
    engine_module.start()
    config = config_in(tmp_path_factory.mktemp("whole"))
    train(config, Small(config))
    return faulty.left_by(config.path)


def gone_on_with(config: RunConfig, whole: dict) -> None:
    train(config, Small(config))
    assert faulty.left_by(config.path) == whole


@pytest.mark.parametrize("step", range(1, 3 * STEPS + 1))
def test_a_signal_ends_a_run_after_the_step_that_it_comes_in(step, tmp_path, whole):
    config, signum = config_in(tmp_path), stopping.SIGNALS[step % 2]
    handlers = [signal.getsignal(x) for x in stopping.SIGNALS]
    with pytest.raises(
        Stopped, match=rf"stopped after step {step} of 12, .* {signum.name} was rec"
    ) as stopped:
        train(config, Signalled(config, signum, step=step))
    assert stopped.value.signum == signum
    assert [path.name for path in states_in(tmp_path / "finetune" / "state")] == [f"step-{step}"]
    assert [signal.getsignal(x) for x in stopping.SIGNALS] == handlers
    gone_on_with(config, whole)


@pytest.mark.parametrize("epoch", [1, 3])
def test_a_signal_ends_an_evaluation_at_once(epoch, tmp_path, whole):
    config = config_in(tmp_path)
    with pytest.raises(Stopped, match=f"after step {epoch * STEPS} of 12"):
        train(config, Signalled(config, signal.SIGTERM, evaluation=epoch))
    gone_on_with(config, whole)


def test_an_evaluation_that_is_made_again_is_recorded_once(tmp_path, whole):
    config = config_in(tmp_path)
    with pytest.raises(Stopped):
        train(config, Signalled(config, signal.SIGTERM, step=STEPS))  # before its evaluation
    stage = Small(config)
    stage.step = lambda _: 1 / 0  # after it, with no state in between
    with pytest.raises(ZeroDivisionError):
        train(config, stage)
    gone_on_with(config, whole)


def test_a_stage_that_a_signal_finds_over_has_finished(tmp_path, whole, monkeypatch):
    config = config_in(tmp_path)
    stage = Small(config)
    save, writes = stage.save, itertools.count(1)

    def slow(*arguments) -> None:
        if next(writes) == 2:  # of the last weights
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.1)
        save(*arguments)

    stage.save = slow
    with pytest.raises(Stopped, match="finetune has finished; SIGTERM was received; the same command"):
        train(config, stage)
    assert faulty.left_by(config.path) == whole


def test_a_second_ctrl_c_interrupts_and_a_second_sigterm_does_not(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(stopping.time, "monotonic", lambda: now[0])
    with stopping.Stopping() as taken:
        for signum in (signal.SIGINT, signal.SIGINT, signal.SIGTERM):  # a launcher's
            signal.raise_signal(signum)
        assert taken.signum == signal.SIGINT
        now[0] = 3.0
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_training_in_another_thread_leaves_signals_to_the_main_one(tmp_path, whole):
    config = config_in(tmp_path)
    thread = threading.Thread(target=train, args=(config, Small(config)))
    thread.start()
    thread.join()
    assert faulty.left_by(config.path) == whole


def test_in_python_a_signal_has_its_effect_once_the_step_is_saved(tmp_path, monkeypatch):
    config, received = config_in(tmp_path), []

    def execute(*_) -> None:
        train(config, Signalled(config, signal.SIGTERM, step=3))

    monkeypatch.setattr(run_module, "execute", execute)
    monkeypatch.setattr(run_module, "validate", lambda config: None)
    before = signal.signal(signal.SIGTERM, lambda signum, _: received.append(signum))
    try:
        with pytest.raises(Stopped):
            run_module.train(config)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert received == [signal.SIGTERM] and states_in(tmp_path / "finetune" / "state")


def options(corpus: DemoCorpus, run_dir: Path) -> list[str]:
    return flags(
        {
            "run-dir": run_dir,
            "model.checkpoint": corpus.bert,
            "data.tasks": corpus.tasks,
            "data.reviews": corpus.reviews,
            "engine.zero-stage": 2,
            "finetune.batch-size": 16,
            "finetune.max-steps": 40,
            "finetune.checkpoint-every": "1 hour",
            "finetune.epochs": 9,
            "log-every": 10,
        }
    )


def wait_for(ranks: Ranks, run_dir: Path, lines: int) -> None:
    metrics = run_dir / "metrics.jsonl"
    while not metrics.exists() or metrics.read_text().count("\n") < lines:
        assert ranks.processes[0].is_alive(), ranks.stderr()
        time.sleep(0.05)


@pytest.mark.parametrize(("signum", "world_size", "to"), [(signal.SIGINT, 1, 0), (signal.SIGTERM, 2, 1)])
def test_a_signalled_command_leaves_with_a_status_that_says_so(signum, world_size, to, corpus, tmp_path):
    """Of two ranks one is sent the signal; both leave."""
    arguments = ("finetune", "demo", *options(corpus, tmp_path / "run"))
    ranks = Ranks(command, *arguments, output=tmp_path, world_size=world_size)
    wait_for(ranks, tmp_path / "run", 5)
    os.kill(ranks.processes[to].pid, signum)
    assert ranks.wait() == [128 + signum] * world_size
    said = re.search(r"mtfast: finetune: stopped after step (\d+) of 40, which is saved", ranks.stderr())
    assert said and ranks.stderr().count("mtfast: ") == 1, ranks.stderr()
    (state,) = states_in(tmp_path / "run/finetune/state")
    assert state.name == f"step-{said[1]}"
    again = Ranks(command, *arguments, output=tmp_path, world_size=world_size)
    again.succeed()
    assert f"continuing after step {said[1]} of 40\n" in again.stdout()


@pytest.mark.parametrize(
    ("gone", "how", "said"),
    [
        (1, signal.SIGKILL, r"mtfast: rank 1 on \S+ has ended without a word, .* continues the run\n"),
        (0, signal.SIGKILL, r"rank 1 on \S+: lost the connection to rank 0\n"),
        (1, signal.SIGSTOP, r"mtfast: rank 1 on \S+ gave no sign of life for 10 s: .* continues the run\n"),
        (0, signal.SIGSTOP, r"mtfast: rank 1 on \S+: rank 0 has given no answer for 20 s: .* the run\n"),
    ],
    ids=["killed", "the first killed", "hanging", "the first hanging"],
)
def test_a_rank_that_dies_ends_the_others_with_its_reason(gone, how, said, corpus, tmp_path):
    arguments = ("finetune", "demo", *options(corpus, tmp_path / "run"))
    ranks = Ranks(faulty.impatient_command, *arguments, output=tmp_path, world_size=2)
    wait_for(ranks, tmp_path / "run", 5)
    os.kill(ranks.processes[gone].pid, how)
    other = ranks.processes[1 - gone]
    other.join(60)
    found = other.exitcode
    ranks.kill()
    assert found == 1, ranks.stderr(1 - gone)
    assert re.search(said, ranks.stderr(1 - gone)) and "Traceback" not in ranks.stderr(1 - gone)


def test_a_run_goes_on_on_other_numbers_of_ranks_under_other_zero_stages(corpus, tmp_path):
    """Begun on two ranks with ZeRO 2; without dropout, whose masks follow from the rank."""

    def config(name: str, zero_stage: int) -> RunConfig:
        config = demo_on(corpus, tmp_path / name)
        often = {"batch_size": 16, "max_steps": 8, "decay_all": False}
        return replace(
            config,
            log_every=1,
            engine=EngineConfig(precision="fp32", zero_stage=zero_stage),
            model=replace(config.model, dropout_p=0.0),
            pretrain=replace(config.pretrain, **often),
            heads=replace(config.heads, **often),
            finetune=replace(config.finetune, **often),
        )

    Ranks(faulty.train_stages, config("whole", 2), output=tmp_path, world_size=2).succeed()
    for world_size, zero_stage, *stop in (
        (2, 2, "pretrain", 3),
        (1, 0, "heads", 3),
        (2, 1, "heads", 2),
        (2, 2, "finetune", 3),
        (1, 2, "finetune", 2),
        (2, 3),
    ):
        parts = Ranks(
            *(faulty.train_stages, config("parts", zero_stage), None, tuple(stop) or None),
            output=tmp_path,
            world_size=world_size,
        )
        if stop:
            assert set(parts.wait()) == {1} and "Stopped: " in parts.stderr(), parts.stderr()
        else:
            parts.succeed()
    whole, parts = (faulty.left_by(tmp_path / name) for name in ("whole", "parts"))
    steps = [key for key in whole if key[0] == "step"]
    assert len(steps) == 24 and whole.keys() == parts.keys()
    for key in steps:
        assert parts[key] == pytest.approx(whole[key], rel=1e-5), key
