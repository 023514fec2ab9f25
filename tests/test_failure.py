"""What a process of a run dies of: told once, by whom it concerns, and all leave alike."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import mtfast

# On which rank, what it dies of; the status of both, and what is told of it.
WHERE = f"rank 1 on {socket.gethostname()}: "
DEATHS = {
    "one's own": ("rank == 1", 'raise DataError("a.csv:3: bad")', (1, 2), WHERE + "mtfast: a.csv:3: bad"),
    "everyone's": ("True", 'raise DataError("a.csv:3: bad")', (2, 2), "mtfast: a.csv:3: bad"),
    "rank 0's": ("True", 'ranks.on_main(lambda: open("none"))', (1, 1), "FileNotFoundError: [Errno 2]"),
    "one's own, unexpected": ("rank == 1", "1 / 0", (1, 1), WHERE + "Traceback"),
    "rank 0's alone": ("rank == 0", "1 / 0", (1, 1), "ZeroDivisionError"),
}  # fmt: skip

# One rank of all those runs, each in a fork of its own.
SCRIPT = """
import os, sys
import torch.distributed as dist
from mtfast import cli
from mtfast.data.records import DataError
from mtfast.train import loop, ranks

def run(fails, error):
    def command(config):
        dist.init_process_group("gloo")
        rank = ranks.rank()
        if eval(fails):
            exec(error)
        ranks.barrier()
    cli.COMMANDS["report"] = cli.Command("fails", command)
    cli.main(["report", "demo"])

for port, death in zip(sys.argv[1].split(","), {deaths}):
    print("=====", flush=True)
    os.environ["MASTER_PORT"] = port
    if (child := os.fork()) == 0:
        run(*death)
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
    there = {
        "MASTER_ADDR": "127.0.0.1",
        "WORLD_SIZE": "2",
        "PYTHONPATH": str(Path(mtfast.__file__).parents[1]),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script, ports],
            env=os.environ | there | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=tmp_path_factory.mktemp("ends"),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=200)[0] for process in processes]
    parts = zip(*(text.split("=====\n")[1:] for text in said), strict=True)
    status = re.compile(r"^status (\d+)\n", re.MULTILINE)
    return {
        name: (tuple(int(status.search(part)[1]) for part in both), status.sub("", "".join(both)))
        for name, both in zip(DEATHS, parts, strict=True)
    }


@pytest.mark.parametrize("name", DEATHS)
def test_a_reason_is_told_once(name, ends):
    fails, error, statuses, told = DEATHS[name]
    found, said = ends[name]
    assert found == statuses, said
    assert said.count(told) == 1, said
    assert said.count("Traceback (") == ("DataError" not in error), said
    assert ("rank 1 on" in said) == (fails == "rank == 1"), said
