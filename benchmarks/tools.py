"""Commands under NVIDIA's compute-sanitizer and ncu, with the options those need."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mtfast.toolkit import tool

SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
# On an H200 racecheck names a kernel of cuBLAS and none of ours, and initcheck nothing but copies by torch of
# memory that it takes for unwritten.
OF_ONE = {"racecheck": ["--kernel-name", "kns=mtfast"], "initcheck": ["--check-api-memory-access", "no"]}


def sanitized(name: str, command: Sequence[str]) -> tuple[list[str], dict[str, str]] | None:
    """The command under compute-sanitizer's tool of that name, and its environment; None where that is not
    installed."""
    sanitizer = tool("compute-sanitizer")
    if sanitizer is None:
        return None
    # Importing torch takes longer than the sanitizer waits for a process by itself, and what torch's probing
    # of the driver returns is no error of a kernel.
    options = ["--tool", name, "--launch-timeout", "0", "--report-api-errors", "no", "--error-exitcode", "9"]
    options += OF_ONE.get(name, [])
    # Each tensor an allocation of its own, so that a step beyond its end is one.
    return [sanitizer, *options, *command], {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


def profiled(command: Sequence[str], csv: Path) -> list[str] | None:
    """The command under ncu, which writes to `csv` of each of this project's kernels how near it is to the
    GPU's limits and what its warps wait for; None where that is not installed."""
    ncu = tool("ncu")
    if ncu is None:
        return None
    # The card's clocks are not ours to set.
    options = ["--csv", "--page", "raw", "--clock-control", "none", "--log-file", str(csv)]
    # "full" would run each kernel some forty times, and nothing is written before all are done.
    options += ["--set", "basic", "--section", "WarpStateStats"]
    kernels = ["--kernel-name-base", "demangled", "--kernel-name", "regex:mtfast"]
    return [ncu, *options, *kernels, *command]
