"""The visit to a GPU, without one: what it runs, how it gets a library, and the whole of it rehearsed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from benchmarks import build, gpu, smoke, smoke_cases, tools
from mtfast import toolkit

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")


def place(tmp_path: Path, device: str = "cuda", prebuilt: Path | None = None) -> gpu.Place:
    return gpu.Place(torch.device(device), tmp_path, prebuilt)


def executable(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


# ---- what runs ----


def test_both_parts_fit_one_visit(tmp_path, monkeypatch):
    monkeypatch.setattr(tools, "tool", lambda name: f"/cuda/bin/{name}")
    parts = [gpu.part_1(place(tmp_path)), gpu.part_2(place(tmp_path))]
    assert [[step.name for step in steps] for steps in parts] == [
        [
            *("peaks", "build", "smoke", *(f"tests of {op}" for op in gpu.OPS), *tools.SANITIZERS),
            *("demo", "tests of graphs"),
        ],
        [
            *("build", *gpu.OPS, "attention_arguments", "bert_attention"),
            *("ncu", "finetune_step", "pretrain_step", "steps"),
        ],
    ]
    assert gpu.SECONDS == {1: 240, 2: 400}
    for steps in parts:
        assert all(step.needs == "build" for step in steps if step.name not in ("peaks", "build"))


def test_tools_that_are_not_there_are_left_out(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tools, "tool", lambda name: None)
    monkeypatch.setattr(gpu, "TRAINER", ("deepspeed", "no_such_package"))
    monkeypatch.delenv(gpu.REAL[1], raising=False)
    found = [s.name for part in (gpu.part_1, gpu.part_2) for s in part(place(tmp_path)) if s.why_not]
    assert found == [*tools.SANITIZERS, "demo", "tests of graphs", "ncu", "finetune_step", "pretrain_step"]
    assert gpu.main(["--plan", "--part", "1"]) == 0
    printed = capsys.readouterr().out
    assert "left out: compute-sanitizer is not installed" in printed and "Part 2" not in printed
    assert "left out: not installed: no_such_package" in printed


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    assert "torch sees no GPU here; --rehearse needs none" in capsys.readouterr().err


def test_results_go_to_out_where_that_is_set(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    assert gpu.main(["--plan"]) == 0
    assert f"--results {tmp_path / 'out'}" in capsys.readouterr().out


def test_every_test_of_a_gpu_is_selected(capsys):
    """By the marker that the visit asks for: tests that take a device, and those that are for a GPU alone."""
    files = [f"tests/test_{op}.py" for op in gpu.OPS]
    paths = [str(ROOT / file) for file in files]
    assert pytest.main(["-q", "--collect-only", "-m", "gpu", "--rootdir", str(ROOT), *paths]) == 0
    collected = capsys.readouterr().out
    for name in ("test_wrong_arguments_on_a_gpu", "test_cuda_graph_replays", "test_cuda_graph_capture"):
        assert name in collected
    for file in files:
        text = (ROOT / file).read_text()
        for function in text.split("\ndef ")[1:]:
            name, arguments = function.split("(", 1)
            takes = arguments.split(")")[0]
            if name.startswith("test_") and ("device" in takes or "mask" in takes.split(", ")):
                assert f"{file}::{name}[" in collected and "cuda" in collected, name


# ---- the library ----


def test_a_toolkit_is_found_behind_a_wrapper(tmp_path, monkeypatch):
    home = tmp_path / "cuda-13.0"
    executable(home / "bin" / "nvcc", f'#!/bin/sh\necho "#$ _HERE_={home}/bin" >&2\n')
    (home / "include").mkdir()
    (home / "include" / "cuda_runtime_api.h").write_text("#define CUDART_VERSION  13000\n")
    executable(home / "bin" / "ncu", "#!/bin/sh\n")
    executable(tmp_path / "bin" / "nvcc", f'#!/bin/sh\nexec {home}/bin/nvcc "$@"\n')
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    assert home in toolkit.homes()
    monkeypatch.setattr(toolkit, "homes", lambda: iter([tmp_path / "none", home]))
    assert toolkit.toolkit(13) == (home, "")
    assert toolkit.toolkit(12) == (None, f"{home} is CUDA 13, wanted is CUDA 12")
    assert toolkit.tool("ncu") == str(home / "bin" / "ncu")


def test_a_library_that_serves_is_taken(tmp_path, monkeypatch, capsys):
    target = tmp_path / "there.so"
    monkeypatch.setattr(build, "LIBRARY", target)
    assert build.main(["--device", "cpu", "--prebuilt", str(ROOT / "mtfast" / "_C.abi3.so")]) == 0
    assert target.read_bytes() == (ROOT / "mtfast" / "_C.abi3.so").read_bytes()
    assert "serves cpu" in capsys.readouterr().out


@pytest.mark.parametrize("missing", [True, False])
def test_one_that_does_not_is_told_and_another_built(missing, tmp_path, monkeypatch, capsys):
    broken = tmp_path / "broken.so"
    if not missing:
        broken.write_bytes(b"\x7fELF")
    monkeypatch.setattr(build, "BUILD_TOOLS", ("setuptools", "no_such_package"))
    assert build.main(["--device", "cpu", "--prebuilt", str(broken)]) == 1
    printed = capsys.readouterr().out
    assert ("there is no such file" if missing else "OSError") in printed
    assert "not installed, so nothing can be built: no_such_package" in printed


def test_the_library_of_a_build_that_failed_later_is_taken(tmp_path, monkeypatch, capsys):
    """The ops are all that a visit needs, whatever else could not be built."""
    built = tmp_path / "build" / "lib.linux" / "mtfast" / "_C.abi3.so"
    built.parent.mkdir(parents=True)
    (tmp_path / "setup.py").write_text("raise SystemExit('Python.h is missing')")
    monkeypatch.setattr(build, "SOURCES", tmp_path)
    monkeypatch.setattr(build, "LIBRARY", tmp_path / "there.so")
    monkeypatch.setattr(build, "BUILD_TOOLS", ())
    assert build.main(["--device", "cpu"]) == 1
    shutil.copy(ROOT / "mtfast" / "_C.abi3.so", built)
    assert build.main(["--device", "cpu"]) == 0 and (tmp_path / "there.so").exists()
    assert "but the ops' library was built" in capsys.readouterr().out


def test_the_build_is_for_this_gpu_alone(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    settings = build.build_environment(torch.device("cuda"))
    assert settings["TORCH_CUDA_ARCH_LIST"] == "9.0a" and settings["MTFAST_FORCE_CUDA_BUILD"] == "1"


# ---- smoke ----


def test_smoke_goes_on_behind_a_case_that_ends_its_process(tmp_path, monkeypatch):
    """And tells of one that only raises, and runs both again under memcheck."""
    program = tmp_path / "child.py"
    program.write_text(
        "import os, sys\nfrom benchmarks import smoke\n"
        "def aborts(device):\n    os.write(2, b'an illegal access'); os.abort()\n"
        "def raises(device):\n    raise ValueError('wrong dtype')\n"
        "def right(device):\n    return {'ok': True}\n"
        "smoke.CASES = {'op': {'a': right, 'b': aborts, 'c': raises, 'd': right}}\n"
        "sys.exit(smoke.run_here('op', sys.argv[1:], None or __import__('torch').device('cpu')))\n"
    )
    monkeypatch.setattr(smoke, "CASES", {"op": dict.fromkeys("abcd")})
    monkeypatch.setattr(smoke, "command_of", lambda op, cases, device: [sys.executable, str(program), *cases])
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    watched = []
    monkeypatch.setattr(smoke, "memcheck", lambda op, case, device: watched.append(case) or {"memcheck": []})
    lines = {line["case"]: line for line in smoke.run_op("op", CPU)}
    assert {case: line["ok"] for case, line in lines.items()} == {
        "a": True,
        "b": False,
        "c": False,
        "d": True,
    }
    assert "its process ended with -6" in lines["b"]["error"] and "illegal access" in lines["b"]["error"]
    assert lines["c"]["error"] == "ValueError: wrong dtype"
    assert watched == ["b", "c"]


def test_smoke_tells_when_no_case_can_be_begun(monkeypatch):
    monkeypatch.setattr(smoke, "CASES", {"op": dict.fromkeys("ab")})
    failing = [sys.executable, "-c", "raise SystemExit('no library')"]
    monkeypatch.setattr(smoke, "command_of", lambda *_: failing)
    lines = list(smoke.run_op("op", CPU))
    assert [line["case"] for line in lines] == ["a", "b"] and not any(line["ok"] for line in lines)
    assert "no library" in lines[0]["error"]


def test_memcheck_of_a_case(tmp_path, monkeypatch):
    sanitizer = executable(
        tmp_path / "compute-sanitizer",
        "#!/bin/sh\necho ran $PYTORCH_NO_CUDA_MEMORY_CACHING $@\necho ========= $2\n",
    )
    monkeypatch.setattr(tools, "tool", lambda name: str(sanitizer))
    assert smoke.memcheck("op", "a", CPU) == {}
    assert smoke.memcheck("op", "a", torch.device("cuda")) == {"memcheck": ["========= memcheck"]}


def test_smoke_knows_wrong_from_right():
    exact = [torch.randn(50, dtype=torch.float64)]
    right = [exact[0].bfloat16()]
    assert smoke_cases.agreement(["y"], right, right, exact)["ok"]
    line = smoke_cases.agreement(["y"], [right[0] * 1.1], right, exact)
    assert not line["ok"] and line["errors"]["y"][0] == pytest.approx(0.1, abs=0.01)
    assert not smoke_cases.agreement(["y"], [right[0] * torch.nan], right, exact)["ok"]


def test_smoke_has_every_op_dtype_and_head_dim():
    for op in ("packed_attention", "packed_attention_qkv", "packed_attention_cls"):
        assert len(smoke_cases.CASES[op]) == 3 * 4 * 3
    assert len(smoke_cases.CASES["mask_tokens"]) == 2 * 2 * 4
    assert len(smoke_cases.CASES["concat_mlp"]) == 3 * 7
    assert len(smoke_cases.CASES["bias_gelu"]) == 3 * 3 * 2
    assert len(smoke_cases.CASES["dropout_add_layer_norm"]) == 3 * 5 * 2


# ---- the whole ----

# A machine with a GPU may have torch and little else.
MISSING = (
    "deepspeed",
    "datasets",
    "sentencex",
    "tyro",
    "scipy",
    "rich",
    "matplotlib",
    "markdown_it",
    "pydantic",
    "xformers",
    "apex",
)


WITHOUT = """
import sys
sys.modules.update(dict.fromkeys({missing}))
sys.modules["mtfast.ops"] = None
from benchmarks import build, gpu, peaks
gpu.main(["--plan"])
del sys.modules["mtfast.ops"]
import {modules}
"""


def test_what_it_runs_imports_nothing_that_may_be_missing(tmp_path):
    """It begins without a library too, which it is there to build: nothing before that imports the ops."""
    steps = [step for part in (gpu.part_1, gpu.part_2) for step in part(place(tmp_path, "cpu"))]
    names = {step.command[3] for step in steps if step.command[1:3] == ["-m", "benchmarks"]}
    names -= {"finetune_step", "pretrain_step"}  # which are the trainer's
    assert names >= {*gpu.OPS, "smoke", "kernels", "steps"}
    modules = [f"benchmarks.{name}" for name in sorted({*names, "gpu", "step_contenders"})]
    code = WITHOUT.format(missing=MISSING, modules=", ".join(modules))
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "Part 2" in done.stdout, done.stderr


@pytest.mark.sweep
def test_rehearsal(tmp_path, full_sweep):
    """Both parts, on a machine that lacks what may be missing."""
    if not full_sweep:
        pytest.skip("takes minutes: for MTFAST_TEST_SWEEP=full")
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({MISSING}))\n")
    results = tmp_path / "results"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "gpu", "--rehearse", "--results", str(results)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(tmp_path), "MTFAST_COMMIT": "abc"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr
    there = place(tmp_path, "cpu")
    steps = [*gpu.part_1(there), *gpu.part_2(there)]
    lines = done.stdout.strip().split("\n")[-1 - len(steps) : -1]
    assert [line.split("  ")[0] for line in lines] == [step.name for step in steps]
    for line, step in zip(lines, steps, strict=True):
        assert (" left out " if step.why_not or step.name.endswith("_step") else " passed ") in line, line
    names = {path.name for path in results.iterdir()}
    of_parts = {f"visit-{part}.{kind}" for part in (1, 2) for kind in ("log", "json")}
    assert of_parts | {"smoke.jsonl"} <= names
    assert len(names) <= 8  # with ncu.csv: what can be brought back
    report = json.loads((results / "visit-1.json").read_text())
    found = [step["status"] for step in report["steps"]]
    assert report["rehearsal"] and found == ["passed"] * (4 + len(gpu.OPS)) + ["left out"] * 2
    cases = [json.loads(line) for line in (results / "smoke.jsonl").read_text().splitlines()]
    smoked = {op: len(cases) for op, cases in smoke_cases.CASES.items() if op.startswith(gpu.OPS)}
    assert Counter(case["op"] for case in cases) == smoked
    (table,) = results.glob("*.csv")
    measured = {line.split(",")[0] for line in table.read_text().split("\n")[1:-1]}
    assert measured == {"peaks", *gpu.OPS, "attention_arguments", "bert_attention", "steps"}


def test_make_uses_a_python_with_cuda(tmp_path):
    """.venv's where its torch has CUDA, else the one that PYTHON names."""
    for name in ("Makefile", "pyproject.toml", "setup.py"):
        shutil.copy(ROOT / name, tmp_path)
    said = {}
    for with_cuda in (0, 1):
        fake = '#!/bin/sh\ncase "$*" in -c*) exit {};; *) echo {} "$@";; esac\n'
        executable(tmp_path / ".venv/bin/python", fake.format(1 - with_cuda, "venv"))
        other = executable(tmp_path / "other", fake.format(0, "other"))
        command = ["make", "-s", "gpu", f"PYTHON={other}", "ARGS=--part 1"]
        said[with_cuda] = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True).stdout.strip()
    assert said == {0: "other -m benchmarks gpu --part 1", 1: "venv -m benchmarks gpu --part 1"}
