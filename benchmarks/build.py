"""Puts the ops' library for this machine in place: one built elsewhere where it serves, else built here.

    python -m benchmarks build [--prebuilt FILE] [--device cpu]

A library serves any torch from 2.10 on, but only GPUs of the architectures that it was built for: it is
loaded and an op of it is run on the device before it is taken. Building needs setuptools, ninja, pybind11 and
a CUDA toolkit of torch's major version.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.common import SOURCES, default_device

LIBRARY = SOURCES / "mtfast" / "_C.abi3.so"
BUILD_TOOLS = ("setuptools", "ninja", "pybind11")
# In a process of its own: a library that does not fit can end it, and a loaded one cannot be replaced.
CHECK = """
import sys, torch
torch.ops.load_library(sys.argv[1])
device = torch.device(sys.argv[2])
key = device.type.upper()
ops = "mask_tokens concat_mlp bias_gelu dropout_add_layer_norm"
ops += " packed_attention packed_attention_qkv packed_attention_cls"
for op in ops.split():
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"mtfast::{op}", key):
        sys.exit(f"it has no {op} for {key}")
q = torch.randn(5, 1, 32, device=device)
cu_seqlens = torch.tensor([0, 5], dtype=torch.int32, device=device)
out, _ = torch.ops.mtfast.packed_attention(q, q, q, cu_seqlens, 5, 0.0, 1.0, None)
if not out.isfinite().all():
    sys.exit("packed_attention gives numbers that are not finite")
"""


def main(argv: list[str]) -> int:
    """Put the library in place; 0 when it is there and serves."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks build",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--prebuilt", type=Path, metavar="FILE", help="a library built elsewhere")
    parser.add_argument("--device", type=torch.device, default=default_device())
    options = parser.parse_args(argv)
    if options.prebuilt:
        why = unfit(options.prebuilt, options.device)
        if why is None:
            put(options.prebuilt)
            print(f"{options.prebuilt} serves {options.device}")
            return 0
        print(f"{options.prebuilt} does not serve {options.device}, so it is built here: {why}", flush=True)
    if missing := [name for name in BUILD_TOOLS if importlib.util.find_spec(name) is None]:
        print(f"not installed, so nothing can be built: {', '.join(missing)}")
        return 1
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    status = subprocess.run(command, cwd=SOURCES, env=build_environment(options.device)).returncode
    if status:
        print(f"building failed with exit status {status}; why is said above")
        return 1 if salvaged(options.device) is None else 0
    if why := unfit(LIBRARY, options.device):
        print(f"what was built does not serve {options.device}: {why}")
        return 1
    return 0


def unfit(library: Path, device: torch.device) -> str | None:
    """Why this library does not serve the device; None if it does."""
    if not library.is_file():
        return "there is no such file"
    command = [sys.executable, "-c", CHECK, str(library.resolve()), str(device)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    except subprocess.TimeoutExpired:
        return "it could not be loaded and run within 120 s"
    if done.returncode == 0:
        return None
    return done.stderr.strip().rsplit("\n", 1)[-1] or f"loading it ended with {done.returncode}"


def salvaged(device: torch.device) -> Path | None:
    """The ops' library of a build that failed in something else, put in place where it serves; else None."""
    for library in SOURCES.glob("build/lib*/mtfast/_C.abi3.so"):
        if unfit(library, device) is None:
            put(library)
            print(f"but the ops' library was built, and serves {device}: {library}")
            return library
    return None


def put(library: Path) -> None:
    """Make it the package's library, whole or not at all."""
    if library.resolve() == LIBRARY.resolve():
        return
    partial = LIBRARY.with_suffix(".partial")
    shutil.copyfile(library, partial)
    partial.replace(LIBRARY)


def build_environment(device: torch.device) -> dict[str, str]:
    """Of the build: for this GPU alone, and an error where CUDA cannot be built."""
    environment = dict(os.environ)
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        environment["TORCH_CUDA_ARCH_LIST"] = f"{major}.{minor}{'a' if major == 9 else ''}"
        environment["MTFAST_FORCE_CUDA_BUILD"] = "1"
    return environment
