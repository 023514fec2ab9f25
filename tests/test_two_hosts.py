"""Runs by `deepspeed --hostfile` on two hosts follow one rank, also when one host has been cut off."""

import json
import re
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from bert_twins import short_corpus
from following import BIN, STAGES, STEPS, assert_follow, launch, losses, options, run, train
from two_hosts import Hosts, two_hosts

from mtfast.training.engine.state import states_in

# Every command of a list, in processes that start once for all of them. In the last one the second host's
# link goes down in the seventh step of fine-tuning, before the hosts have added up its gradients.
CUT_OFF = """
import itertools, json, socket, subprocess, sys
from mtfast import cli
from mtfast.training.engine import alive
from mtfast.training.stages.finetune import Finetune

def step(self, batch):
    if next(steps) == 7:
        subprocess.run(["ip", "link", "set", "eth0", "down"], check=True)
    return made(self, batch)

*whole, last = json.loads(sys.argv[-1])
for arguments in whole:
    cli.main(arguments)
made, steps = Finetune.step, itertools.count(1)
if socket.gethostname() == "second":
    Finetune.step = step
alive.SILENT_SECONDS = 10.0
cli.main(last)
"""
ZERO_STAGES = (1, 2, 3)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("demo-corpus")
    short_corpus(directory, 240)
    return directory


@pytest.fixture(scope="module")
def one_rank(corpus, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("one") / "run"
    train(run_dir, *options(corpus, run_dir))
    assert len(losses(run_dir, "finetune")) == STEPS
    return run_dir


def deepspeed(hosts: Hosts, cwd: Path, *arguments: str) -> list[str]:
    """A command that launches on both hosts what `arguments` say."""
    # What DeepSpeed hands on to them beside Python's variables.
    (cwd / ".deepspeed_env").write_text("DS_ACCELERATOR=cpu\nOMP_NUM_THREADS=1\n")
    return hosts.on_first([str(BIN / "deepspeed"), "--hostfile", str(hosts.file), *arguments], cwd)


def commands_in(run_dir: Path, corpus: Path, zero_stage: int, **more: object) -> list[list[str]]:
    more["engine.zero-stage"] = zero_stage
    return [[stage, "demo", *options(corpus, run_dir, **more)] for stage in STAGES]


def commands_cut_off(directory: Path, corpus: Path) -> list[list[str]]:
    return commands_in(directory / "cut-off", corpus, 2, **{"finetune.checkpoint-every": "3 steps"})


@pytest.fixture(scope="module")
def runs(corpus, tmp_path_factory) -> tuple[Path, CompletedProcess[str]]:
    """A directory with a run under every ZeRO stage and one that was cut off, and how their launch ended."""
    directory = tmp_path_factory.mktemp("two")
    commands = [x for stage in ZERO_STAGES for x in commands_in(directory / str(stage), corpus, stage)]
    commands += commands_cut_off(directory, corpus)
    script = directory / "cut_off.py"
    script.write_text(CUT_OFF)
    with two_hosts(directory / "hosts") as hosts:
        return directory, run(deepspeed(hosts, directory, str(script), json.dumps(commands)))


@pytest.mark.parametrize("zero_stage", ZERO_STAGES)
def test_two_hosts_follow_one_rank_under_every_zero_stage(zero_stage, one_rank, runs):
    directory, done = runs
    run_dir = directory / str(zero_stage)
    assert run_dir.exists(), done.stdout + done.stderr
    assert_follow(run_dir, one_rank)


def test_a_host_that_is_cut_off_ends_the_run_and_the_same_command_continues_it(corpus, one_rank, runs):
    directory, done = runs
    said, run_dir = done.stdout + done.stderr, directory / "cut-off"
    assert done.returncode != 0, said
    assert "mtfast: rank 1 on second gave no sign of life for 10 s: " in said, said
    assert [path.name for path in states_in(run_dir / "finetune/state")] == ["step-3", "step-6"]
    again = commands_cut_off(directory, corpus)[-1]
    with two_hosts(directory / "hosts-again") as hosts:
        done = launch(deepspeed(hosts, directory, "--module", "mtfast", *again))
    assert re.search("continuing after step 6 of 12$", done.stdout, re.MULTILINE), done.stdout
    assert_follow(run_dir, one_rank)


def test_a_run_directory_that_the_second_host_does_not_see_is_refused(corpus, tmp_path):
    run_dir = tmp_path / "apart/run"
    run_dir.parent.mkdir()
    with two_hosts(tmp_path / "hosts", apart=run_dir.parent) as hosts:
        done = run(deepspeed(hosts, tmp_path, "--module", "mtfast", "run", "demo", *options(corpus, run_dir)))
    said = done.stdout + done.stderr
    assert done.returncode != 0, said
    assert said.count("mtfast: ") == 1, said
    assert (
        f"mtfast: rank 1 on second does not see {run_dir} of rank 0 on first: --run-dir must lie on a file "
        "system that all hosts share\n" in said
    ), said
