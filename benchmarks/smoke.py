"""Every kernel once against float64, in every dtype and head_dim: what to know first of a GPU.

    python -m benchmarks smoke [--device cpu] [--ops concat_mlp] [--results DIR]

Writes a JSON line a case to smoke.jsonl: whether the results' errors are at most twice eager PyTorch's (of
mask_tokens: whether they are the reference's bit for bit), and which they are. Each op has a process of its
own; one that a case ends is started again behind that case. A case that fails is run again at once under
compute-sanitizer's memcheck, where that is installed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import RESULTS, SOURCES, default_device
from benchmarks.smoke_cases import CASES
from benchmarks.tools import sanitized

SILENCE = 60  # seconds without a line after which a process is ended
Line = dict[str, Any]


def main(argv: list[str]) -> int:
    """Run all cases; 0 when every one is right."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks smoke",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", type=torch.device, default=default_device())
    parser.add_argument("--results", type=Path, default=RESULTS, help="directory of smoke.jsonl")
    text = "ops whose names begin so (default: all)"
    parser.add_argument("--ops", nargs="+", default=[""], metavar="OP", help=text)
    parser.add_argument("--op", choices=CASES, help=argparse.SUPPRESS)  # in a process of its own,
    parser.add_argument("--cases", nargs="+", help=argparse.SUPPRESS)  # these of its cases
    options = parser.parse_args(argv)
    if options.op:
        return run_here(options.op, options.cases, options.device)
    ops = [op for op in CASES if op.startswith(tuple(options.ops))]
    options.results.mkdir(parents=True, exist_ok=True)
    path, lock = options.results / "smoke.jsonl", threading.Lock()
    failed = []
    with path.open("w", encoding="utf-8") as file:

        def keep(op: str) -> None:
            for line in run_op(op, options.device):
                text = json.dumps(line)
                with lock:
                    print(text, flush=True)
                    file.write(text + "\n")
                    file.flush()
                    failed.extend([] if line["ok"] else [f"{op} {line['case']}"])

        with ThreadPoolExecutor() as pool:
            list(pool.map(keep, ops))
    count = sum(len(CASES[op]) for op in ops)
    print(f"written to {path}")
    print(f"{len(failed)} of {count} cases failed: {'; '.join(failed)}" if failed else f"all {count} right")
    return 1 if failed else 0


def run_here(op: str, names: list[str], device: torch.device) -> int:
    """Run these cases in this process, with a line before and after each; not 0 when the GPU is lost."""
    for name in names:
        print(json.dumps({"begins": name}), flush=True)
        line: Line = {"op": op, "case": name, "ok": False}
        try:
            torch.manual_seed(0)
            line |= CASES[op][name](device)
            synchronize(device)
        except Exception as error:
            line["error"] = f"{type(error).__name__}: {error}"
        print(json.dumps(line), flush=True)
        try:
            synchronize(device)
        except RuntimeError:
            return 1
    return 0


def synchronize(device: torch.device) -> None:
    """Wait for a GPU, whose errors are reported here at the latest."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def run_op(op: str, device: torch.device) -> Iterator[Line]:
    """The lines of the op's cases, from as many processes as it takes."""
    left = list(CASES[op])
    while left:
        begun, before = None, len(left)
        process = subprocess.Popen(
            command_of(op, left, device),
            cwd=SOURCES,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
        errors: list[str] = []
        reader = threading.Thread(target=lambda p=process, e=errors: e.extend(p.stderr), daemon=True)
        reader.start()
        assert process.stdout
        watch = _watch(process)
        for text in process.stdout:
            watch.cancel()
            line = json.loads(text)
            if "begins" in line:
                begun = line["begins"]
            else:
                left.remove(line["case"])
                begun = None
                yield line if line["ok"] else line | memcheck(op, line["case"], device)
            watch = _watch(process)
        watch.cancel()
        status = process.wait()
        reader.join(10)
        if begun is not None:  # which ended its process
            left.remove(begun)
            error = f"its process ended with {status}: {' '.join(errors[-5:])}"
            yield {"op": op, "case": begun, "ok": False, "error": error} | memcheck(op, begun, device)
        elif len(left) == before:
            error = f"no case could be begun, exit status {status}: {' '.join(errors[-5:])}"
            yield from ({"op": op, "case": name, "ok": False, "error": error} for name in left)
            return


def command_of(op: str, cases: list[str], device: torch.device) -> list[str]:
    """What runs these cases in a process of its own."""
    command = [sys.executable, "-m", "benchmarks", "smoke", "--op", op, "--device", str(device)]
    return [*command, "--cases", *cases]


def memcheck(op: str, case: str, device: torch.device) -> Line:
    """What memcheck says of the case."""
    watched = sanitized("memcheck", command_of(op, [case], device)) if device.type == "cuda" else None
    if watched is None:
        return {}
    command, environment = watched
    try:
        done = subprocess.run(
            command, cwd=SOURCES, env={**os.environ, **environment}, capture_output=True,
            text=True, errors="replace", timeout=2 * SILENCE,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"memcheck": f"not done within {2 * SILENCE} s"}
    said = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("=========")]
    return {"memcheck": said[:30]}


def _watch(process: subprocess.Popen[str]) -> threading.Timer:
    timer = threading.Timer(SILENCE, process.kill)
    timer.daemon = True
    timer.start()
    return timer
