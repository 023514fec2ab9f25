"""Runs the steps of a visit to a GPU: each a process of its own with a limit, its output kept as it comes."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).parents[1]
LEAST_SECONDS = 5  # with less a step is not begun
# A group can be ended whole; a session of its own would outlive what ends the visit itself.
GROUP: dict[str, Any] = {"process_group": 0} if sys.version_info >= (3, 11) else {"preexec_fn": os.setpgrp}


@dataclass(frozen=True)
class Step:
    """A command, and the seconds it gets when all steps take what they may; a visit is scaled to fit.

    why_not: why this machine cannot run it, if so; the command is left out then.
    needs: a step without whose success this one is left out.
    together: neighbours of one such name run side by side, in the time of the longest.
    ends_itself: it takes --seconds, and ends within so many with what is done by then.
    """

    name: str
    command: Sequence[str]
    seconds: int
    environment: Mapping[str, str] = field(default_factory=dict)
    why_not: str = ""
    needs: str = ""
    together: str = ""
    ends_itself: bool = False


@dataclass(frozen=True)
class Outcome:
    """What became of a step: "passed", "failed", "ended" at its limit or "left out", with the reason."""

    name: str
    status: str
    seconds: float = 0.0
    reason: str = ""

    @property
    def bad(self) -> bool:
        return self.status in ("failed", "ended")


class Visit:
    """Runs steps; what they print goes to `<name>.log` too, what became of them to `<name>.json`.

    Args:
        directory: where both files are written, step by step.
        facts: what else the JSON file says.
    """

    def __init__(self, name: str, directory: Path, facts: Mapping[str, Any]) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._report, self._facts = directory / f"{name}.json", facts
        self._log = (directory / f"{name}.log").open("w", encoding="utf-8")
        self._lock = threading.Lock()
        self.outcomes: list[Outcome] = []

    def run(self, steps: Sequence[Step], seconds: float) -> list[Outcome]:
        """Run the steps within so many seconds. Each may take its share of what is left when it begins."""
        end = time.monotonic() + seconds
        groups = grouped(steps)
        for index, group in enumerate(groups):
            left = end - time.monotonic()
            limit = left * share(group) / max(1, sum(map(share, groups[index:])))
            with ThreadPoolExecutor(len(group)) as pool:
                outcomes = list(pool.map(self._outcome, group, [limit] * len(group)))
            for outcome in outcomes:
                reason = f": {outcome.reason}" if outcome.reason else ""
                self.say(f"== {outcome.name} {outcome.status} after {outcome.seconds:.0f} s{reason}")
            self.outcomes += outcomes
            report = {**self._facts, "steps": [asdict(o) for o in self.outcomes]}
            self._report.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        return self.outcomes

    def say(self, line: str) -> None:
        """Print a line and keep it."""
        with self._lock:
            print(line, flush=True)
            self._log.write(line + "\n")
            self._log.flush()

    def _outcome(self, step: Step, limit: float) -> Outcome:
        if step.why_not:
            return Outcome(step.name, "left out", reason=step.why_not)
        if any(step.needs == o.name and o.status != "passed" for o in self.outcomes):
            return Outcome(step.name, "left out", reason=f"it needs what {step.needs} did not give")
        if limit < LEAST_SECONDS:
            return Outcome(step.name, "ended", reason="no time was left for it")
        command = list(step.command)
        if step.ends_itself:  # a case under way takes some seconds more
            command += ["--seconds", f"{max(0.6 * limit, limit - 30):.0f}"]
        self.say(f"\n== {step.name}, at most {limit:.0f} s: {shlex.join(command)}")
        started = time.monotonic()
        status = self._status(command, step.environment, limit, f"{step.name}: " if step.together else "")
        took = time.monotonic() - started
        if status is None:
            return Outcome(step.name, "ended", took, f"it was not done within {limit:.0f} s")
        if status != 0:
            return Outcome(step.name, "failed", took, f"exit status {status}")
        return Outcome(step.name, "passed", took)

    def _status(
        self, command: Sequence[str], environment: Mapping[str, str], limit: float, mark: str
    ) -> int | None:
        """The command's exit status; None where it, and what it started, was ended at the limit. Its lines
        are marked."""
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            **GROUP,
        )
        assert process.stdout
        relay = threading.Thread(target=self._relay, args=(process.stdout, mark), daemon=True)
        relay.start()
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            return None
        finally:
            with contextlib.suppress(ProcessLookupError):  # what it left behind would hold its output open
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            relay.join(10)

    def _relay(self, output: IO[str], mark: str) -> None:
        for line in output:
            self.say(mark + line.rstrip("\n"))


def grouped(steps: Sequence[Step]) -> list[list[Step]]:
    """The steps that run side by side, in their order."""
    groups: list[list[Step]] = []
    for step in steps:
        if groups and step.together and groups[-1][0].together == step.together:
            groups[-1].append(step)
        else:
            groups.append([step])
    return groups


def share(group: Sequence[Step]) -> int:
    """Seconds that a group gets when all take what they may."""
    return max((step.seconds for step in group if not step.why_not), default=0)


def table(outcomes: Sequence[Outcome]) -> str:
    """The outcomes, a line each."""
    wide = max(len(outcome.name) for outcome in outcomes)
    return "\n".join(
        f"{o.name:{wide}}  {o.status:8}  {o.seconds:6.1f} s  {o.reason}".rstrip() for o in outcomes
    )
