"""Runs by `deepspeed` and `torchrun` on two ranks and on two nodes follow one rank."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from bert_twins import short_corpus
from following import (
    BIN,
    IN_TURN,
    STAGES,
    STEPS,
    assert_follow,
    environment,
    flags,
    launch,
    losses,
    options,
    train,
)
from patience import PATIENCE
from processes import Ranks, command


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("demo-corpus")
    short_corpus(directory, 240)
    return directory


def deepspeed_launcher() -> list[str]:
    port = 29600 + os.getpid() % 1000
    return [sys.executable, str(BIN / "deepspeed"), "--num_gpus", "2", "--master_port", str(port)]


@pytest.fixture(scope="module")
def one_rank(corpus, tmp_path_factory) -> Path:
    """Heads, then 12 steps of fine-tuning, on one rank without ZeRO."""
    run_dir = tmp_path_factory.mktemp("one") / "run"
    train(run_dir, *options(corpus, run_dir))
    assert len(losses(run_dir, "finetune")) == STEPS
    return run_dir


@pytest.fixture(scope="module")
def two_ranks(corpus, tmp_path_factory) -> Path:
    """A directory of runs on two ranks, by ZeRO stage and precision: 0-fp32, ..., 3-bf16."""
    directory = tmp_path_factory.mktemp("two")
    runs = []
    for zero_stage, precision in (
        (0, "fp32"),
        (1, "fp32"),
        (2, "fp32"),
        (3, "fp32"),
        (3, "bf16"),
        (0, "bf16"),
    ):
        engine = {"engine.zero-stage": zero_stage, "engine.precision": precision}
        arguments = options(corpus, directory / f"{zero_stage}-{precision}", **engine)
        if zero_stage in (1, 3):
            arguments.append("--engine.activation-checkpointing")
        runs += [[stage, "demo", *arguments] for stage in STAGES]
    script = directory / "in_turn.py"
    script.write_text(IN_TURN)
    launch([*deepspeed_launcher(), str(script), json.dumps(runs)])
    return directory


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_two_ranks_follow_one_under_every_zero_stage(zero_stage, one_rank, two_ranks):
    assert_follow(two_ranks / f"{zero_stage}-fp32", one_rank)


@pytest.mark.parametrize("zero_stage", [0, 3])
def test_bf16_starts_from_the_exact_weights_on_two_ranks(zero_stage, one_rank, two_ranks):
    ours, expected = losses(two_ranks / f"{zero_stage}-bf16", "finetune"), losses(one_rank, "finetune")
    assert len(ours) == STEPS
    for mine, wanted in zip(ours[:5], expected[:5], strict=True):
        assert mine == pytest.approx(wanted, rel=0.01)


def test_the_demo_on_two_ranks_says_and_writes_what_one_rank_does(tmp_path):
    steps = {"pretrain.max-steps": 2, "heads.max-steps": 2, "finetune.max-steps": 2, "log-every": 100}
    short = flags(steps | {"engine.zero-stage": 2})
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir(), two.mkdir()
    said = {}
    for directory, world_size in ((one, 1), (two, 2)):
        output = tmp_path / f"{directory.name}-said"
        run = Ranks(command, "run", "demo", *short, output=output, cwd=directory, world_size=world_size)
        run.succeed()
        said[directory.name] = [re.sub(r"-?\d[\d,.:]*", "#", line) for line in run.stdout().splitlines()]
        # How far it is, on a slow machine.
        assert [line for line in run.stderr().splitlines() if not line.endswith(" left")] == []
    assert run.stdout(1) == run.stderr(1) == ""
    assert said["two"] == said["one"] and len(set(said["one"])) > 20
    files = {
        name: sorted(
            path.relative_to(tmp_path / name)
            for path in (tmp_path / name).rglob("*")
            if "state" not in path.parts  # where each rank has its own
        )
        for name in said
    }
    assert files["two"] == files["one"]
    records = [
        json.loads(line) for line in (tmp_path / "two/runs/demo/metrics.jsonl").read_text().splitlines()
    ]
    assert len({(r["kind"], r["stage"], r["step"]) for r in records}) == len(records)


def test_two_nodes_follow_one_rank(corpus, one_rank, tmp_path):
    run_dir = tmp_path / "run"
    port = 30600 + os.getpid() % 1000
    nodes = [
        subprocess.Popen(
            [
                sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1",
                f"--node_rank={node}", "--master_addr=127.0.0.1", f"--master_port={port}",
                "-m", "mtfast", "run", "demo", "--stages", *STAGES, *options(corpus, run_dir),
            ],
            env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for node in range(2)
    ]  # fmt: skip
    outputs = [node.communicate(timeout=PATIENCE)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs[0][-3000:]
    assert_follow(run_dir, one_rank)


def test_accumulation_follows_one_batch(corpus, one_rank, tmp_path):
    run_dir = tmp_path / "run"
    more = {"finetune.accumulation": 2, "heads.accumulation": 2}
    train(run_dir, *options(corpus, run_dir, **more))
    assert_follow(run_dir, one_rank)
