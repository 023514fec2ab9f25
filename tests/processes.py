"""The processes of a run, forked from one that has imported what they import, so that they begin at once.

`python -m mtfast` and launchers take longer to import than a small run to train; tests/test_launch.py and
tests/test_command_line.py start them as people do.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import faults
from patience import PATIENCE

import mtfast

FORKS = multiprocessing.get_context("forkserver")
# Of every process; a fork could not use a GPU.
ENVIRONMENT = {
    "PYTHONPATH": os.pathsep.join(map(str, (Path(mtfast.__file__).parents[1], Path(__file__).parent))),
    "OMP_NUM_THREADS": "1",
    "DS_ACCELERATOR": "cpu",
    "CUDA_VISIBLE_DEVICES": "",
}
RENDEZVOUS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Ranks:
    """Processes that call `function(*arguments)`, one a rank; a single one finds itself started plainly.

    Args:
        function: of a module that another process can import.
        output: a directory for what they say: <rank>.out and <rank>.err.
        cwd: the directory that they are in; this process's if None.
    """

    def __init__(
        self,
        function: Callable[..., None],
        *arguments: Any,
        output: Path,
        world_size: int = 1,
        cwd: Path | None = None,
    ) -> None:
        output.mkdir(parents=True, exist_ok=True)
        _start_server()
        self._output = output
        self.processes = [
            FORKS.Process(target=_call, args=(function, arguments, variables, output / str(rank), cwd))
            for rank, variables in enumerate(_rendezvous(world_size))
        ]
        for process in self.processes:
            process.start()

    def wait(self) -> list[int]:
        """Exit statuses by rank, -9 of one that was killed."""
        for process in self.processes:
            process.join(PATIENCE)
        return [-1000 if process.exitcode is None else process.exitcode for process in self.processes]

    def succeed(self) -> None:
        """Wait for the end; an error where one did not end well."""
        statuses = self.wait()
        assert not any(statuses), f"{statuses}\n" + "\n".join(
            text[-3000:] for rank in range(len(statuses)) for text in (self.stdout(rank), self.stderr(rank))
        )

    def kill(self) -> None:
        for process in self.processes:
            process.kill()

    def stdout(self, rank: int = 0) -> str:
        return (self._output / f"{rank}.out").read_text()

    def stderr(self, rank: int = 0) -> str:
        return (self._output / f"{rank}.err").read_text()


def command(*arguments: str) -> None:
    """What `python -m mtfast` does with these arguments."""
    from mtfast import cli

    sys.argv = ["mtfast", *arguments]
    cli.run_process()


def _rendezvous(world_size: int) -> list[dict[str, str]]:
    """What a launcher tells each rank."""
    if world_size == 1:
        return [{}]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    there = {"WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    there |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        {name: str(value) for name, value in {**there, "RANK": rank, "LOCAL_RANK": rank}.items()}
        for rank in range(world_size)
    ]


@functools.cache
def _start_server() -> None:
    kept = dict(os.environ)
    os.environ.update(ENVIRONMENT, LD_PRELOAD=str(faults.preloaded()))
    try:
        FORKS.set_forkserver_preload(["imported"])
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(kept)


def _call(
    function: Callable[..., None],
    arguments: tuple[Any, ...],
    variables: dict[str, str],
    said: Path,
    cwd: Path | None,
) -> None:
    for name in RENDEZVOUS:
        os.environ.pop(name, None)
    os.environ.update(variables)
    for stream, name in ((1, "out"), (2, "err")):
        with said.with_suffix(f".{name}").open("wb") as file:
            os.dup2(file.fileno(), stream)
    if cwd is not None:
        os.chdir(cwd)
    function(*arguments)
