"""mtfast as another commit has it, built in a directory of its own and run in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from benchmarks.common import SOURCES, git
from benchmarks.stage_setup import Setup


class Child:
    """A process that makes steps when it is told to, and waits in between.

    losses: those of its first step in float32, without dropout. package: the directory of its mtfast.
    """

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        """process: has unbuffered pipes."""
        self._process = process
        said = json.loads(self._answer())
        self.losses: dict[str, float] = said["losses"]
        self.package = Path(said["package"])

    def turn(self, index: int) -> float:
        """Make the step of a turn; its seconds."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # of a process that has ended, which has no answer either
            self._process.stdin.write(f"{index}\n".encode())
        return float(self._answer())

    def _answer(self) -> bytes:
        assert self._process.stdout is not None
        if not (line := self._process.stdout.readline()):
            raise SystemExit(
                f"the baseline's process ended with status {self._process.wait()}; what it wrote is above"
            )
        return line


@dataclass(frozen=True)
class Baseline:
    """mtfast of a commit. path: a directory with that and nothing else."""

    commit: str
    path: Path

    @contextmanager
    def child(self, setup: Setup) -> Iterator[Child]:
        """The commit's mtfast, taking the steps of the setup."""
        # The benchmark is that of today. How OpenMP's threads wait is left to be the same in both processes.
        path = os.pathsep.join([str(self.path), str(SOURCES)])
        environment = os.environ | {"PYTHONPATH": path}
        setup = replace(setup, data=_absolute(setup.data), checkpoint=_absolute(setup.checkpoint))
        command = [sys.executable, "-m", "benchmarks.baseline_child", json.dumps(asdict(setup))]
        with subprocess.Popen(
            command,
            env=environment,
            cwd=self.path,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
        ) as process:
            try:
                child = Child(process)
                if not child.package.samefile(self.path / "mtfast"):
                    raise SystemExit(f"the baseline's process found its mtfast in {child.package}")
                yield child
            finally:
                assert process.stdin is not None
                process.stdin.close()  # which ends it


@contextmanager
def built(commit: str) -> Iterator[Baseline]:
    """The commit's mtfast, with its extension, until this is left.

    Raises SystemExit where there is no such commit or it cannot be built.
    """
    if not git("rev-parse", "--verify", "--quiet", f"{commit}^{{commit}}"):
        raise SystemExit(f"--baseline {commit}: git knows no such commit of {SOURCES}")
    with tempfile.TemporaryDirectory(prefix="mtfast-baseline-") as directory:
        sources, path = Path(directory) / "sources", Path(directory) / "path"
        _run(["git", "-C", str(SOURCES), "worktree", "add", "--detach", str(sources), commit], SOURCES)
        try:
            print(f"building mtfast as {commit} has it", flush=True)
            _run([sys.executable, "setup.py", "build_ext", "--inplace"], sources)
            path.mkdir()
            (path / "mtfast").symlink_to(sources / "mtfast")
            yield Baseline(commit, path)
        finally:
            _run(["git", "-C", str(SOURCES), "worktree", "remove", "--force", str(sources)], SOURCES)


def _absolute(path: str) -> str:
    """A path that holds in another directory too; a name on the hub as it is."""
    return str(Path(path).resolve()) if Path(path).exists() else path


def _run(command: list[str], directory: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(directory)}
    if not torch.cuda.is_available():
        environment["MTFAST_SKIP_CUDA_BUILD"] = "1"
    done = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
