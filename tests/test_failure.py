"""What a process of a run dies of: told once, by whom it concerns, and all leave alike."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from patience import PATIENCE

import mtfast

# On which rank, what it dies of; the status of both, and what is told of it.
HOST = socket.gethostname()
WHERE = f"rank 1 on {HOST}: "
NOT_THE_SAME = f"is not the same on rank 1 on {HOST} as on rank 0 on {HOST}"
DEATHS = {
    "one's own": ("rank == 1", 'raise DataError("a.csv:3: bad")', (1, 2), WHERE + "mtfast: a.csv:3: bad"),
    "everyone's": ("True", 'raise DataError("a.csv:3: bad")', (2, 2), "mtfast: a.csv:3: bad"),
    "rank 0's": ("True", 'ranks.on_main(open, "none")', (1, 1), "FileNotFoundError: [Errno 2]"),
    "one's own, unexpected": ("rank == 1", "1 / 0", (1, 1), WHERE + "Traceback"),
    "rank 0's alone": ("rank == 0", "1 / 0", (1, 1), "ZeroDivisionError"),
    "one's share of a cache": (
        "True", "ranks.main_first(lambda: 1 / (1 - rank))", (2, 2), WHERE + "division by zero",
    ),
    "a run directory that is not shared": (
        "True", 'os.chdir(f"host-{rank}"); open_directory(RunConfig(run_dir="run"))', (2, 2),
        f"mtfast: rank 1 on {HOST} does not see ",
    ),
    "other options": (
        "True", "open_directory(RunConfig(run_dir='shared', seed=rank))", (2, 2),
        f"mtfast: the configuration {NOT_THE_SAME}",
    ),
    "other weights": (
        "True", "build_multitask(Weights(BERT, None, None, None, MlpConfig(), rank), PAPER_TASKS)", (2, 2),
        f"mtfast: the weights of a new model {NOT_THE_SAME}",
    ),
    "other data": (
        "True", 'os.chdir(f"host-{rank}"); load_task("sst", SST, DATA, small_tokenizer(), "train")', (2, 2),
        f"mtfast: data (sst train) {NOT_THE_SAME}",
    ),
}  # fmt: skip

# One rank of all those runs, each in a fork of its own.
SCRIPT = """
import os, sys
import torch.distributed as dist
from transformers import BertConfig
from mtfast import cli, commands
from dataclasses import replace
from mtfast.config import DataConfig, RunConfig
from mtfast.data.rows import DataError
from mtfast.recipes import PAPER_TASKS, paper
from mtfast.tasks import MlpConfig
from mtfast.training import loop
from mtfast.training.engine import failure, ranks
from mtfast.training.inputs import load_task
from mtfast.training.run import directory
from mtfast.training.run.weights import Weights, build_multitask
from mtfast.commands import open_directory
from small_tokenizer import small_tokenizer

cli._parsed = lambda *arguments: (cli.NoOptions(), paper())  # which takes half a second to read
directory.SHARED_SECONDS, failure.PATIENCE_SECONDS = 0.5, 1.0
BERT = BertConfig(
    vocab_size=9, hidden_size=32, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8
)
SST, DATA = replace(PAPER_TASKS["sst"], source="data"), DataConfig(cache_dir="cache")

def run(fails, code):
    def command(name, recipe, config):
        dist.init_process_group("gloo")
        rank = ranks.rank()
        if eval(fails):
            exec(code, globals() | locals())
        ranks.barrier()
    commands.execute = command
    cli.main(["report", "demo"])

for port, death in zip(sys.argv[1].split(","), {deaths}):
    print("=====", flush=True)
    os.environ["MASTER_PORT"] = port
    if (child := os.fork()) == 0:
        try:
            run(*death)
        except SystemExit as end:  # at once: to take all modules down takes a second
            sys.stderr.flush()
            os._exit(end.code)
    print(f"status {{os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}}", flush=True)
"""


def free_ports(count: int) -> list[str]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [str(each.getsockname()[1]) for each in sockets]
    for each in sockets:
        each.close()
    return ports


@pytest.fixture(scope="module")
def ends(tmp_path_factory) -> dict[str, tuple[tuple[int, ...], str]]:
    """Of each death the processes' statuses, and all that they said."""
    script = SCRIPT.format(deaths=[death[:2] for death in DEATHS.values()])
    ports = ",".join(free_ports(len(DEATHS)))
    root = Path(mtfast.__file__).parents[1]
    path = f"{root}:{root / 'tests'}"
    there = {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "2", "PYTHONPATH": path}
    here = tmp_path_factory.mktemp("ends")
    for rank in range(2):
        data = here / f"host-{rank}" / "data"
        data.mkdir(parents=True)
        (data / "train.csv").write_text(f"sentence,label\na b c,{rank}\n")
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script, ports],
            env=os.environ | there | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=here,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=PATIENCE)[0] for process in processes]
    parts = zip(*(text.split("=====\n")[1:] for text in said), strict=True)
    status = re.compile(r"^status (\d+)\n", re.MULTILINE)
    return {
        name: (tuple(int(status.search(part)[1]) for part in both), status.sub("", "".join(both)))
        for name, both in zip(DEATHS, parts, strict=True)
    }


@pytest.mark.parametrize("name", DEATHS)
def test_a_reason_is_told_once(name, ends):
    *_, statuses, told = DEATHS[name]
    found, said = ends[name]
    assert found == statuses, said
    assert said.count(told) == 1, said
    assert said.count("Traceback (") == (1 in statuses and 2 not in statuses), said
    assert ("rank 1 on" in said) == ("rank 1 on" in told), said
