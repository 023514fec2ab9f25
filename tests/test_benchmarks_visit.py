"""The steps of a visit to a GPU: their time, their output, what one that fails takes with it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from patience import PATIENCE

from benchmarks import visit
from benchmarks.visit import Outcome, Step, Visit, table


def step(name: str, code: str, seconds: int = 100, **options) -> Step:
    return Step(name, [sys.executable, "-c", code], seconds, **options)


@pytest.fixture
def begun(tmp_path) -> Visit:
    return Visit("visit-1", tmp_path, {"commit": "abc"})


def statuses(outcomes: list[Outcome]) -> dict[str, str]:
    return {outcome.name: outcome.status for outcome in outcomes}


def test_steps_go_on_after_a_failure_but_not_without_what_they_need(begun, tmp_path):
    mark = f"open({str(tmp_path / 'ran')!r}, 'a').write('x')"
    outcomes = begun.run(
        [
            step("build", "print('nvcc is missing'); raise SystemExit(3)"),
            step("tests", mark, needs="build"),
            step("ncu", mark, why_not="not installed"),
            step("versions", mark),
        ],
        300,
    )
    assert statuses(outcomes) == {
        "build": "failed", "tests": "left out", "ncu": "left out", "versions": "passed"
    }  # fmt: skip
    assert (tmp_path / "ran").read_text() == "x"
    assert [o.reason for o in outcomes[:3]] == [
        "exit status 3", "it needs what build did not give", "not installed"
    ]  # fmt: skip
    assert [o.bad for o in outcomes] == [True, False, False, False]


def test_what_steps_print_and_what_became_of_them_is_kept_as_it_comes(begun, tmp_path):
    code = (
        "import pathlib, sys; print('first', flush=True); print('to stderr', file=sys.stderr, flush=True); "
        f"import time; time.sleep(0.5); print(pathlib.Path({str(tmp_path / 'visit-1.log')!r}).read_text())"
    )
    begun.run([step("a", code), step("b", "import os; os.abort()")], PATIENCE)
    log = (tmp_path / "visit-1.log").read_text()
    assert log.count("first") == log.count("to stderr") == 2 + 2  # said, read back, and in the two commands
    report = json.loads((tmp_path / "visit-1.json").read_text())
    assert report["commit"] == "abc"
    assert [(s["name"], s["status"], s["reason"]) for s in report["steps"]] == [
        ("a", "passed", ""), ("b", "failed", "exit status -6")
    ]  # fmt: skip


def test_a_step_and_what_it_started_are_ended_at_its_limit(begun, tmp_path, monkeypatch):
    monkeypatch.setattr(visit, "LEAST_SECONDS", 0)
    pid = tmp_path / "pid"
    code = (
        "import subprocess; child = subprocess.Popen(['sleep', '600']); "
        f"open({str(pid)!r}, 'w').write(str(child.pid)); print('began', flush=True); child.wait()"
    )
    (outcome,) = begun.run([step("hangs", code)], 5)
    assert (outcome.status, outcome.reason) == ("ended", "it was not done within 5 s")
    state = Path(f"/proc/{pid.read_text()}/stat")
    assert not state.exists() or state.read_text().split()[2] == "Z"
    assert "began" in (tmp_path / "visit-1.log").read_text()


def test_steps_share_the_time_that_is_left(begun, monkeypatch):
    clock, limits = [0.0], {}
    monkeypatch.setattr(visit, "time", SimpleNamespace(monotonic=lambda: clock[0]))

    def takes(command, environment, limit, mark):
        (name,) = command
        limits[name] = limit
        clock[0] += {"build": 40, "tests": limit, "benchmark": 99}[name]
        return 0

    monkeypatch.setattr(begun, "_status", takes)
    todo = [
        Step("build", ["build"], 300),
        Step("tests", ["tests"], 200),
        Step("ncu", [], 500, why_not="not installed"),
        Step("benchmark", ["benchmark"], 60),
        Step("late", ["late"], 40),
    ]
    outcomes = begun.run(todo, 340)
    assert (outcomes[-1].status, outcomes[-1].reason) == ("ended", "no time was left for it")
    # The build may take half and needs 40; of the 300 left the tests get two thirds, the benchmark six tenths
    # of the rest and overruns that. What is left out takes no share.
    assert limits == {"build": 170, "tests": 200, "benchmark": 60}


def test_neighbours_run_side_by_side_in_the_time_of_the_longest(begun, tmp_path):
    """Each waits for the other here, so that one after the other none would end."""
    code = (
        "import pathlib, time; mine, other = (pathlib.Path({path!r}) / n for n in {names!r}); mine.touch()\n"
        "while not other.exists(): time.sleep(0.01)\nprint('met')"
    )
    pair = [
        step(f"tests of {a}", code.format(path=str(tmp_path), names=(a, b)), together="tests")
        for a, b in (("x", "y"), ("y", "x"))
    ]
    assert [len(group) for group in visit.grouped([step("build", ""), *pair, step("smoke", "")])] == [1, 2, 1]
    assert visit.share([Step("a", [], 30), Step("b", [], 50), Step("c", [], 90, why_not="no")]) == 50
    assert statuses(begun.run(pair, PATIENCE)) == {"tests of x": "passed", "tests of y": "passed"}
    log = (tmp_path / "visit-1.log").read_text()
    assert "tests of x: met" in log and "tests of y: met" in log


def test_benchmarks_are_told_to_end_before_their_limit(begun, tmp_path):
    begun.run([step("benchmark", "import sys; print('got', sys.argv[1:])", ends_itself=True)], 120)
    assert "got ['--seconds', '90']" in (tmp_path / "visit-1.log").read_text()


def test_table():
    lines = table([Outcome("build", "passed", 61.2), Outcome("ncu", "left out", reason="not installed")])
    assert lines.split("\n") == [
        "build  passed      61.2 s", "ncu    left out     0.0 s  not installed"
    ]  # fmt: skip
