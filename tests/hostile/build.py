"""Builds the CPU side of the extension with AddressSanitizer and UndefinedBehaviorSanitizer, and makes calls
on it, or on the package's own library, in a process of their own."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11
import pytest
import torch
from cuda_on_cpu.harness import CSRC, SANITIZED, compile_once, object_of, sanitizer_runtimes

TESTS = Path(__file__).parents[1]
TORCH = Path(torch.__file__).parent
PLANNER = CSRC / "planner.cpp"
FLAGS = (
    *("-std=c++17", "-fvisibility=hidden", "-O1", "-g", "-fPIC", *SANITIZED),
    "-DTORCH_TARGET_VERSION=0x020a000000000000ULL",
    *(
        f"-isystem{path}"
        for path in (TORCH / "include", pybind11.get_include(), sysconfig.get_path("include"))
    ),
)
# Memory that nobody has written to reads as NaN in every dtype, without the sanitizers as large numbers.
SANITIZERS = {
    "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1:"
    "max_malloc_fill_size=268435456:malloc_fill_byte=255",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "PYTHONMALLOC": "malloc",
}
PLAIN = {"MALLOC_PERTURB_": "1"}


def sanitized() -> list[Path]:
    """The library of ops and the planner, built once; skips where there is no GCC on Linux."""
    if sys.platform != "linux" or shutil.which("g++") is None:
        pytest.skip("the sanitizers are GCC's on Linux")
    sources = sorted(CSRC.glob("*.cpp"), reverse=True)  # what takes longest to compile comes early so
    with ThreadPoolExecutor(2) as pool:
        compiled = pool.map(lambda source: object_of(source, [*FLAGS]), sources)
        objects = dict(zip(sources, compiled, strict=True))
    planner = objects.pop(PLANNER)
    return [_linked("mtfast-sanitized", [*objects.values()]), _linked("mtfast-sanitized-planner", [planner])]


def _linked(name: str, objects: list[Path]) -> Path:
    digest = hashlib.sha256("\0".join(map(str, objects)).encode()).hexdigest()[:16]
    library = objects[0].with_name(f"{name}-{digest}.so")
    torchs = [f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-lc10"]
    compile_once(library, ["-shared", *SANITIZED, *map(str, objects), *torchs])
    return library


def make_calls(ops: str, first: int, count: int, libraries: list[Path] | None = None) -> str:
    """Makes these calls of each op ("x,y") and returns what came of them, in words.

    Raises AssertionError unless all went as they should.

    Args:
        libraries: what `sanitized` returns, to make them on.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])}
    environment |= SANITIZERS | {"LD_PRELOAD": sanitizer_runtimes()} if libraries else PLAIN
    command = [sys.executable, "-m", "hostile.calls", ops, str(first), str(count), *map(str, libraries or ())]
    done = subprocess.run(command, env=environment, cwd=TESTS.parent, capture_output=True, text=True)
    told = re.sub(r"^\w+ \d+\n(?=\w+ \d+$)", "", done.stdout, flags=re.MULTILINE)  # calls that went well
    assert done.returncode == 0, f"{told[-8000:]}\n{done.stderr[:8000]}"
    return done.stdout.splitlines()[-1]
