"""Everything worth doing in a short visit to a GPU: build, tests, benchmarks, compute-sanitizer.

    python -m benchmarks gpu [--seconds 590] [--results DIR] [--prebuilt]

Builds the ops for this GPU in place, runs the GPU's part of the ops' tests, the ops' benchmarks, whose rows
go to benchmarks/results/<gpu>-<date>.csv case by case, and compute-sanitizer's memcheck and racecheck on
small shapes where it is installed. Where DeepSpeed is, and MTFAST_TEST_DATA and MTFAST_TEST_CHECKPOINT name
real data and a checkpoint, the stage benchmarks too. Needs torch, pytest, setuptools, ninja, pybind11 and a
CUDA toolkit.

A step that fails does not stop the others, but is told at the end and in the exit status; without a build
that succeeds there are no others. Each step may take its share of the time that is left when it begins, and
is ended after that; benchmarks end by themselves before. Where the sources are a copy without a repository,
MTFAST_COMMIT should say which commit they are.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import RESULTS, environment, results_path

ROOT = Path(__file__).parents[1]
OPS = ("packed_attention", "concat_mlp", "mask_tokens")
BUILD_TOOLS = ("setuptools", "ninja", "pybind11")
OURS = ("mtfast", "bernoulli", "exact")  # variants, as the benchmarks call them


@dataclass(frozen=True)
class Step:
    """A command, and how many seconds it gets when all steps take what they may; a visit is scaled to fit."""

    name: str
    command: list[str]
    seconds: int
    environment: Mapping[str, str] = field(default_factory=dict)
    ends_itself: bool = False  # takes --seconds


def main(argv: list[str]) -> int:
    """Run all steps; 0 when none failed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seconds", type=float, default=590, help="of the whole visit (default: 590)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="directory of the results file")
    parser.add_argument("--prebuilt", action="store_true", help="use the library that is there")
    parser.add_argument("--small-shapes", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("python -m benchmarks gpu: torch sees no GPU here", file=sys.stderr)
        return 2
    device = torch.device("cuda")
    if options.small_shapes:
        small_shapes(device)
        return 0
    print(", ".join(f"{key} {value}" for key, value in environment(device).items()), flush=True)
    wanted = ("pytest",) if options.prebuilt else ("pytest", *BUILD_TOOLS)
    if missing := [name for name in wanted if importlib.util.find_spec(name) is None]:
        print(f"not installed: {', '.join(missing)}; python -m pip install {' '.join(missing)}", flush=True)
    failed = run_steps(steps(options.results.resolve(), options.prebuilt), options.seconds)
    print_ours(results_path(device, options.results))
    print(f"failed: {', '.join(failed)}" if failed else "all steps passed")
    return 1 if failed else 0


def steps(results: Path, prebuilt: bool) -> list[Step]:
    """What there is to do on this machine, in this order."""
    python = [sys.executable, "-m"]
    found = []
    if not prebuilt:
        found.append(
            Step("build", [sys.executable, "setup.py", "build_ext", "--inplace"], 150, build_settings())
        )
    files = [f"tests/test_{op}.py" for op in OPS]
    # Tests look at values that ops do not look at on a GPU otherwise; benchmarks must not wait for that.
    settings = {"MTFAST_CHECK_VALUES": "1"}
    tests = ["pytest", "-q", "--tb=short", "--maxfail=20", "-k", "cuda or wrong_device", *files]
    found.append(Step("tests", [*python, *tests], 140, settings))
    for op, seconds in zip(OPS, (130, 60, 30), strict=True):
        command = [*python, "benchmarks", op, "--budget", "0.5", "--results", str(results)]
        found.append(Step(f"benchmark {op}", command, seconds, ends_itself=True))
    if sanitizer := find_sanitizer():
        for tool in ("memcheck", "racecheck"):
            # Importing torch takes longer than the sanitizer waits for a process by itself, and what torch's
            # probing of the driver returns is no error of a kernel.
            command = [sanitizer, "--tool", tool, "--launch-timeout", "0", "--report-api-errors", "no"]
            command += ["--error-exitcode", "9"]
            # Each tensor an allocation of its own, so that a step beyond its end is one.
            settings = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
            found.append(Step(tool, [*command, *python, "benchmarks", "gpu", "--small-shapes"], 40, settings))
    else:
        print("compute-sanitizer is not installed: its checks are left out")
    real_data = all(os.environ.get(name) for name in ("MTFAST_TEST_DATA", "MTFAST_TEST_CHECKPOINT"))
    if real_data and importlib.util.find_spec("deepspeed"):
        for stage in ("finetune_step", "head_stage"):
            command = [*python, "benchmarks", stage, "--steps", "10", "--results", str(results)]
            found.append(Step(f"benchmark {stage}", command, 60))
    return found


def build_settings() -> dict[str, str]:
    """The environment of the build: CUDA for this GPU alone, or an error."""
    major, minor = torch.cuda.get_device_capability()
    architecture = f"{major}.{minor}{'a' if major == 9 else ''}"
    settings = {"TORCH_CUDA_ARCH_LIST": architecture, "MTFAST_FORCE_CUDA_BUILD": "1"}
    nvcc = shutil.which("nvcc")
    if nvcc and not any((Path(home) / "bin" / "nvcc").exists() for home in cuda_homes()):
        settings["CUDA_HOME"] = str(Path(nvcc).resolve().parents[1])
    return settings


def cuda_homes() -> list[str]:
    """Where setup.py looks for the toolkit."""
    return [home for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home]


def find_sanitizer() -> str | None:
    """compute-sanitizer: on PATH or in the toolkit."""
    places = [Path(home) / "bin" / "compute-sanitizer" for home in cuda_homes()]
    return shutil.which("compute-sanitizer") or next((str(p) for p in places if p.exists()), None)


def run_steps(todo: list[Step], seconds: float) -> list[str]:
    """Run the steps within so many seconds; the names of those that failed or found no time."""
    end = time.monotonic() + seconds
    failed = []
    for index, step in enumerate(todo):
        left = end - time.monotonic()
        limit = left * step.seconds / sum(s.seconds for s in todo[index:])
        if limit < 5:
            print(f"== {step.name}: no time left", flush=True)
            failed.append(step.name)
            continue
        if not passes(step, limit):
            failed.append(step.name)
            if step.name == "build":
                print("== the rest needs the build, or --prebuilt with one from elsewhere", flush=True)
                return failed
    return failed


def passes(step: Step, limit: float) -> bool:
    """Whether the step's command succeeds within the limit; it and what it started are ended after that."""
    command = step.command
    if step.ends_itself:  # a case under way takes some seconds more
        command = [*command, "--seconds", f"{max(0.6 * limit, limit - 30):.0f}"]
    print(f"== {step.name}, at most {limit:.0f} s: {' '.join(command)}", flush=True)
    started = time.monotonic()
    process = subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, **step.environment}, preexec_fn=os.setpgrp
    )
    try:
        status = str(process.wait(limit))
    except subprocess.TimeoutExpired:
        status = "none, it was ended"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    print(f"== {step.name}: exit status {status} after {time.monotonic() - started:.0f} s", flush=True)
    return status == "0"


def print_ours(path: Path) -> None:
    """What this project's variants took, as the results file has it: a summary at the end of much output."""
    if not path.exists():
        print(f"no results: {path} does not exist")
        return
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            if row["variant"].split(",")[0] in OURS:
                share = f", {float(row['share_of_copy']):.0%} of copying" if row["share_of_copy"] else ""
                name = f"{row['benchmark']} {row['case']}, {row['variant']}"
                print(f"{name:66} {float(row['median_us']):10.1f} us {row['ratio_to_baseline']:>7} x{share}")
    print(f"in {path}")


def small_shapes(device: torch.device) -> None:
    """Every op on a few tokens, forward and backward: what compute-sanitizer watches."""
    from mtfast.ops import concat_mlp, mask_tokens, packed_attention_cls, packed_attention_qkv

    long, short = [1, 40, 0, 130, 17], [1, 40, 0, 64, 17]  # at most 64 tokens have kernels of their own
    ids = torch.randint(1000, 30522, (sum(long),), device=device)
    cu_seqlens = torch.tensor([0, *long]).cumsum(0).int().to(device)
    for strategy in ("exact", "bernoulli"):
        for subword in (None, torch.rand(30522, device=device) < 0.3):
            mask_tokens(
                ids,
                special_ids=[101],
                mask_token_id=103,
                vocab_size=30522,
                seed=1,
                cu_seqlens=cu_seqlens,
                strategy=strategy,
                subword=subword,
            )
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for lengths in (long, short):
            cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int().to(device)
            for head_dim in (32, 64, 128):
                kind: dict[str, Any] = {"device": device, "dtype": dtype, "requires_grad": True}
                qkv = torch.randn(sum(lengths), 3, 2, head_dim, **kind)
                out = packed_attention_qkv(qkv, cu_seqlens, max(lengths), dropout_p=0.1, seed=1)
                assert isinstance(out, torch.Tensor)
                out.sum().backward()
                q, k, v = (
                    torch.randn(n, 2, head_dim, **kind) for n in (len(lengths), sum(lengths), sum(lengths))
                )
                packed_attention_cls(
                    q, k, v, cu_seqlens, max(lengths), dropout_p=0.1, seed=1
                ).sum().backward()
        operands = [
            torch.randn(shape, **kind) for shape in ((33, 64), (33, 64), (96, 128), (96,), (2, 96), (2,))
        ]
        concat_mlp(*operands, dropout_p=0.1, seed=1).sum().backward()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
