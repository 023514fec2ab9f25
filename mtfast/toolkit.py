"""Where the CUDA toolkit is. Imports nothing but the standard library, since setup.py asks too."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path


def toolkit(major: int | None = None) -> tuple[Path | None, str]:
    """The first toolkit with bin/nvcc and headers, of CUDA `major` where that is given; or None and why.

    Looked for in CUDA_HOME, /usr/local/cuda and where the nvcc on PATH has its own.
    """
    why = "no toolkit at CUDA_HOME or /usr/local/cuda, and no nvcc on PATH"
    for home in homes():
        header = home / "include" / "cuda_runtime_api.h"
        if not (home / "bin" / "nvcc").exists() or not header.exists():
            why = f"{home} holds no bin/nvcc or no include/cuda_runtime_api.h"
            continue
        found = re.search(r"#define\s+CUDART_VERSION\s+(\d+)", header.read_text(encoding="utf-8"))
        its_major = int(found[1]) // 1000 if found else 0
        if major is None or its_major == major:
            return home, ""
        why = f"{home} is CUDA {its_major}, wanted is CUDA {major}"
    return None, why


def tool(name: str) -> str | None:
    """The path of compute-sanitizer, ncu or another tool: on PATH, else in a toolkit."""
    if on_path := shutil.which(name):
        return on_path
    for home in homes():
        for place in (home / "bin" / name, home / "compute-sanitizer" / name):
            if place.exists():
                return str(place)
    return None


def homes() -> Iterator[Path]:
    """Directories that may be a toolkit, the most wanted first."""
    if named := os.environ.get("CUDA_HOME"):
        yield Path(named)
    yield Path("/usr/local/cuda")
    if home := _home_of_nvcc(shutil.which("nvcc")):
        yield home


@functools.cache
def _home_of_nvcc(nvcc: str | None) -> Path | None:
    """Where an nvcc, or the one that it is a wrapper of, belongs: it names its own directory on a dry run."""
    if nvcc is None:
        return None
    try:
        dry_run = subprocess.run(
            [nvcc, "--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull],
            capture_output=True,
            text=True,
            timeout=60,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    found = re.search(r"^#\$ _HERE_=(.+)$", dry_run.stderr, re.MULTILINE)
    return (Path(found[1]) if found else Path(nvcc).resolve().parent).parent
