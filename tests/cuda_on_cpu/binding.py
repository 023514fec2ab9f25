"""The ops' CUDA bindings without a GPU: csrc/*.cpp as CUDA builds have it, over the emulated kernels.

    run_bound("tests/test_packed_attention.py", "-k", "opcheck")

runs pytest in a process in which mtfast loads that library in place of its own, so that ops on CPU tensors
take the way that they take on a GPU otherwise: checks, allocations, seeds, launches. Only the device guard,
the stream and torch's own CUDA kernels are left out. As a pytest plugin this module makes the switch, and
tells packed_attention which head_dims there are kernels for.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from .harness import CSRC, HERE, LINKED, compile_once, kernel_objects, object_of, toolkit

BINDINGS = (
    "bias_gelu.cpp",
    "bindings.cpp",
    "concat_mlp.cpp",
    "concat_mlp_on_cuda.cpp",
    "dropout_add_layer_norm.cpp",
    "mask_tokens.cpp",
    "packed_attention.cpp",
)
LIBRARY = "MTFAST_EMULATED_LIBRARY"
TORCH = Path(torch.__file__).parent


def run_bound(*arguments: str) -> None:
    """Run pytest with these arguments on the emulated implementations; AssertionError unless all pass."""
    environment = {
        **os.environ,
        LIBRARY: str(build()),
        "PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), str(HERE.parent)]),
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "cuda_on_cpu.binding", *arguments]
    done = subprocess.run(command, env=environment, cwd=HERE.parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def build() -> Path:
    """The library, built once; skips as the emulated kernels do."""
    kernels = sorted(path.name for path in CSRC.glob("*.cu"))
    with ThreadPoolExecutor(2) as pool:
        bindings = pool.map(lambda source: object_of(CSRC / source, _flags()), BINDINGS)
        objects = sorted({*kernel_objects(kernels), *bindings})
    digest = hashlib.sha256("\0".join(map(str, objects)).encode()).hexdigest()[:16]
    library = objects[0].with_name(f"mtfast-emulated-{digest}.so")
    libraries = [f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-lc10", "-ldl", "-lpthread"]
    compile_once(library, ["-Wl,-z,defs", *LINKED, *map(str, objects), *libraries])
    return library


def _flags() -> list[str]:
    home = toolkit()
    includes = [f"-isystem{TORCH / 'include'}", f"-isystem{home}/include"]
    target = "-DTORCH_TARGET_VERSION=0x020a000000000000ULL"
    return ["-std=c++17", "-O1", "-fPIC", target, "-DMTFAST_WITH_CUDA", "-DMTFAST_CUDA_ON_CPU", *includes]


if path := os.environ.get(LIBRARY):
    _load_library = torch.ops.load_library
    torch.ops.load_library = lambda own: _load_library(path if Path(own).stem == "_C.abi3" else own)
    _attention = importlib.import_module("mtfast.ops.packed_attention")
    _kernel_head_dim = _attention.kernel_head_dim
    _attention.kernel_head_dim = lambda head_dim, _: _kernel_head_dim(head_dim, "cuda")
