"""The visit to a GPU, without one: its steps, its time, what it needs."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import torch

from benchmarks import gpu

ROOT = Path(__file__).parents[1]


def step(name, code, seconds=100, **options):
    return gpu.Step(name, [sys.executable, "-c", code], seconds, **options)


def test_steps_go_on_after_a_failure_but_not_without_a_build(tmp_path):
    mark = f"open({str(tmp_path / 'ran')!r}, 'a').write('x')"
    todo = [step("build", "pass"), step("tests", "raise SystemExit(3)"), step("benchmark", mark)]
    assert gpu.run_steps(todo, 300) == ["tests"]
    assert (tmp_path / "ran").read_text() == "x"
    assert gpu.run_steps([step("build", "raise SystemExit(1)"), step("benchmark", mark)], 300) == ["build"]
    assert (tmp_path / "ran").read_text() == "x"


def test_a_step_and_what_it_started_are_ended_at_its_limit(tmp_path, capfd):
    pid = tmp_path / "pid"
    code = (
        "import subprocess, sys; child = subprocess.Popen(['sleep', '600']); "
        f"open({str(pid)!r}, 'w').write(str(child.pid)); child.wait()"
    )
    assert not gpu.passes(step("hangs", code), 2)
    state = Path(f"/proc/{pid.read_text()}/stat")
    assert not state.exists() or state.read_text().split()[2] == "Z"
    assert "exit status none, it was ended" in capfd.readouterr().out


def test_steps_share_the_time_that_is_left(monkeypatch):
    clock, limits = [0.0], {}
    monkeypatch.setattr(gpu, "time", SimpleNamespace(monotonic=lambda: clock[0]))

    def takes(step, limit):
        limits[step.name] = limit
        clock[0] += {"build": 40, "tests": limit, "benchmark": 99}[step.name]
        return True

    monkeypatch.setattr(gpu, "passes", takes)
    todo = [step("build", "", 300), step("tests", "", 200), step("benchmark", "", 60), step("late", "", 40)]
    assert gpu.run_steps(todo, 340) == ["late"]
    # The build may take half and needs 40; of the 300 left the tests get two thirds, the benchmark six tenths
    # of the rest and overruns that.
    assert limits == {"build": 170, "tests": 200, "benchmark": 60}


def test_benchmarks_end_before_their_limit(capfd):
    prints = step("benchmark", "import sys; print('got', sys.argv[1:])", ends_itself=True)
    assert gpu.passes(prints, 120)
    assert "got ['--seconds', '90']" in capfd.readouterr().out


def test_steps_of_a_visit(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(gpu, "find_sanitizer", lambda: "/opt/compute-sanitizer")
    for name in ("MTFAST_TEST_DATA", "MTFAST_TEST_CHECKPOINT"):
        monkeypatch.delenv(name, raising=False)
    found = {step.name: step for step in gpu.steps(tmp_path, prebuilt=False)}
    benchmarks = [f"benchmark {op}" for op in gpu.OPS]
    assert list(found) == ["build", "tests", *benchmarks, "memcheck", "racecheck"]
    assert sum(step.seconds for step in found.values()) <= 590
    assert found["build"].environment["TORCH_CUDA_ARCH_LIST"] == "9.0a"
    for file in found["tests"].command[-3:]:
        assert (ROOT / file).exists()
    assert "build" not in [step.name for step in gpu.steps(tmp_path, prebuilt=True)]


BARE = """
import sys
missing = ("deepspeed", "datasets", "sentencex", "tyro", "scipy", "xformers", "apex")
sys.modules.update(dict.fromkeys(missing))
sys.path.insert(0, "tests")
import torch, importlib
from benchmarks import gpu
for op in gpu.OPS:
    importlib.import_module(f"benchmarks.{op}")
    importlib.import_module(f"test_{op}")
gpu.small_shapes(torch.device("cpu"))
"""


def test_a_visit_needs_neither_deepspeed_nor_data_libraries():
    done = subprocess.run([sys.executable, "-c", BARE], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
