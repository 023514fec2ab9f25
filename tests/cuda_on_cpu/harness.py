"""Runs csrc/*.cu on the CPU, from the same source, through the plain launch functions of csrc/*.h.

    from cuda_on_cpu.harness import CASES, load

    # Thread orders, early and late copies, the race detector. Built once, cached; skips without CUDA headers.
    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_x(case):
        kernels = load("x.cu", case)
        kernels.mtfast_x(tensor, ctypes.c_float(0.5), 7, None)

Tensors pass their address, ints are 64 bits wide. A launch function takes pointers, int64 or ctypes values
and last the stream (None here), and returns 0 or a cudaError_t; anything but 0 raises KernelError with what
the emulation saw.

    kernels = load("x.cu", Case(costs=True))
    kernels.mtfast_x(tensor, ctypes.c_float(0.5), 7, None)
    kernels.costs.read  # bytes of global memory; see Costs

For AddressSanitizer and UndefinedBehaviorSanitizer, which must be loaded before Python:

    def small_shapes(kernels): ...                           # a function at the top of a module in tests/
    def test_x_sanitized():
        run_sanitized("test_x_kernels:small_shapes", "x.cu")
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import hashlib
import importlib
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import filelock
import pytest
import torch

from mtfast.toolkit import homes

from .costs import Costs, costs_of

# csrc/dtype.h
DTYPES_IN_C = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
EMULATION = [HERE / name for name in ("cuda_on_cpu.cpp", "cost.cpp", "race.cpp", "runtime.cpp", "warp.cpp")]
ORDERS = ("forward", "reverse", "random", "warp priority")
# KiB of shared memory that a block may have: the CUDA programming guide, "Technical Specifications per
# Compute Capability".
SHARED_KIB = {"sm_80": 163, "sm_86": 99, "sm_90": 227, "sm_120": 99}
SANITIZED = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")
# What the emulation defines of the CUDA runtime is meant for the kernels it is linked with alone.
LINKED = ("-shared", "-Wl,-Bsymbolic")


class KernelError(RuntimeError):
    """A launch function returned an error: a race, a divergent barrier, a bad launch, ..."""


@dataclasses.dataclass(frozen=True)
class Case:
    """How the emulation runs a kernel."""

    order: str = "forward"  # in which the threads of a block run
    late_copies: bool = True  # cp.async lands when it is waited for; False: at once
    races: bool = False
    sanitized: bool = False
    seed: int = 0
    architecture: str = "sm_90"  # whose limits hold
    costs: bool = False  # are counted

    def __str__(self) -> str:
        copies = "late" if self.late_copies else "early"
        extra = "".join(f"-{name}" for name in ("races", "sanitized", "costs") if getattr(self, name))
        return f"{self.order}-{copies}{extra}-{self.architecture}".replace(" ", "_")


CASES = (
    Case(),
    Case(order="reverse", late_copies=False, architecture="sm_86"),
    Case(order="random", seed=1, architecture="sm_80"),
    Case(order="warp priority", races=True, architecture="sm_120"),
)


def toolkit() -> Path | None:
    """The CUDA toolkit whose headers kernels are compiled with."""
    return next((home for home in homes() if (home / "include" / "cuda_runtime.h").exists()), None)


class Kernels:
    """The launch functions of one compiled source, as methods."""

    def __init__(self, library: Path, case: Case) -> None:
        self._library = ctypes.CDLL(str(library))
        self._library.cuda_on_cpu_error.restype = ctypes.c_char_p
        self._library.cuda_on_cpu_costs.restype = ctypes.c_void_p
        self._path = library
        self._case = case

    @property
    def last_error(self) -> int:
        """The cudaError_t that cudaGetLastError would give somebody else now."""
        return self._library.cuda_on_cpu_last_error()

    def take_launched(self) -> int:
        """How many different kernels were launched since this was last asked."""
        return self._library.cuda_on_cpu_take_launched()

    @property
    def costs(self) -> Costs:
        """Those of the last call."""
        size = ctypes.c_int64()
        address = self._library.cuda_on_cpu_costs(ctypes.byref(size))
        return costs_of(self._path, address, size.value)

    def __getattr__(self, name: str) -> Any:
        launch = getattr(self._library, name)

        def call(*arguments: Any) -> None:
            case = self._case
            limit = ctypes.c_int64(SHARED_KIB[case.architecture] * 1024)
            self._library.cuda_on_cpu_configure(
                ORDERS.index(case.order), case.seed, case.late_copies, case.races, limit
            )
            self._library.cuda_on_cpu_begin_costs(case.costs)
            error = launch(*map(_as_argument, arguments))
            if error:
                raise KernelError(self._library.cuda_on_cpu_error().decode() or f"{name} returned {error}")

        return call


def load(source: str | Path, case: Case = CASES[0]) -> Kernels:
    """The kernels of `source` (in csrc, or a path), to run as `case` says."""
    if case.sanitized:
        raise ValueError("sanitized kernels are run by run_sanitized")
    return Kernels(_build(_find(source), case.races or case.costs, False), case)


def load_all(sources: Iterable[str | Path], case: Case = CASES[0]) -> list[Kernels]:
    """Those of each source, compiled side by side."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(lambda source: load(source, case), sources))


def run_sanitized(function: str, *sources: str | Path) -> str:
    """Calls `function` ("module:name", in tests/) with the Kernels of each source under ASan and UBSan.

    Returns its output. Raises KernelError with the report when the sanitizers or the emulation object.
    """
    with ThreadPoolExecutor() as pool:
        libraries = list(pool.map(lambda source: _build(_find(source), False, True), sources))
    environment = {
        **os.environ,
        "LD_PRELOAD": sanitizer_runtimes(),
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0",
        "PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), str(HERE.parent)]),
        "PYTHONMALLOC": "malloc",
    }
    done = subprocess.run(
        [sys.executable, "-m", "cuda_on_cpu.harness", function, *map(str, libraries)],
        env=environment,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise KernelError(done.stdout + done.stderr)
    return done.stdout


def sanitizer_runtimes() -> str:
    """What LD_PRELOAD must name in a process that loads sanitized libraries."""
    runtimes = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True)
        for name in ("libasan.so", "libubsan.so")
    ]
    return " ".join(runtime.stdout.strip() for runtime in runtimes)


def _contracted() -> list[str]:
    """Flags with which products and sums become one rounding, as nvcc makes them, where the processor can."""
    has_fma = re.search(r"^flags\b.* fma\b", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return ["-mfma", "-ffp-contract=fast"] if has_fma else []


def _find(source: str | Path) -> Path:
    path = Path(source)
    return path if path.is_absolute() else CSRC / path


def _build(source: Path, races: bool, sanitized: bool) -> Path:
    objects = kernel_objects([source], races, sanitized)
    library = objects[0].with_suffix(".so")
    flags = [*LINKED, *(SANITIZED if sanitized else ())]
    compile_once(library, [*flags, *map(str, objects), "-ldl", "-lpthread"])
    return library


def kernel_objects(sources: Iterable[str | Path], races: bool = False, sanitized: bool = False) -> list[Path]:
    """Object files of these kernels (in csrc, or paths) and of the emulation they run on, in this order."""
    home = toolkit()
    if home is None:
        pytest.skip("no CUDA headers: CUDA_HOME, /usr/local/cuda or nvcc on PATH should lead to them")
    if platform.machine() != "x86_64" or sys.platform != "linux":
        pytest.skip("the emulation switches fibers by x86-64 Linux code")
    flags = ["-std=c++17", "-fPIC", "-DMTFAST_CUDA_ON_CPU", f"-I{CSRC}", f"-I{HERE}"]
    flags += ["-isystem", str(home / "include"), "-Wno-unknown-pragmas", "-Wno-attributes"]
    flags += ["-fno-strict-aliasing"]
    # Without jump threading a place in the source stays one in the code, as collectives need it.
    flags += ["-O1", "-fno-thread-jumps", "-fno-omit-frame-pointer"]
    flags += SANITIZED if sanitized else []
    # Kernels take longer to compile than to run, so they are hardly optimised. Only they are instrumented for
    # races and costs: the emulation itself is the detector.
    kernel_flags = [*flags, *_contracted(), *(["-O0"] if sanitized else [])]
    # Lines are what reports of races and sanitizers name by address.
    kernel_flags += ["-g1"] if races or sanitized else []
    kernel_flags += ["-fsanitize=thread"] if races else []
    kernels = [object_of(_find(source), [*kernel_flags, "-x", "c++"]) for source in sources]
    emulation_flags = [*flags, "-O2", *(["-fno-sanitize=undefined"] if sanitized else [])]
    return [*kernels, *(object_of(part, emulation_flags) for part in EMULATION)]


def object_of(source: Path, flags: list[str]) -> Path:
    """The object file of `source`, compiled unless it is there."""
    digest = hashlib.sha256(
        _shared_digest() + source.read_bytes() + "\0".join([str(source), *flags]).encode()
    )
    folder = Path(tempfile.gettempdir()) / f"mtfast-cuda-on-cpu-{os.getuid()}"
    folder.mkdir(exist_ok=True, mode=0o700)
    compiled = folder / f"{source.stem}-{digest.hexdigest()[:16]}.o"
    compile_once(compiled, [*flags, "-c", str(source)])
    return compiled


@functools.cache
def _shared_digest() -> bytes:
    """Of what every library is made from besides its own source."""
    files = sorted([*CSRC.rglob("*.h"), *CSRC.rglob("*.cuh"), *HERE.glob("*.h"), *EMULATION])
    return hashlib.sha256(b"".join(f.read_bytes() for f in files)).digest()


def compile_once(path: Path, arguments: list[str]) -> None:
    """Let g++ make `path`, unless it is there; who else wants it, in another process too, waits meanwhile.

    Raises RuntimeError with the compiler's output when it fails.
    """
    with filelock.FileLock(f"{path}.lock"):
        if path.exists():
            return
        unfinished = path.with_name(f"unfinished-{path.name}")
        done = subprocess.run(["g++", *arguments, "-o", unfinished], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"g++ {' '.join(arguments)}\n{done.stderr}")
        unfinished.rename(path)


def _as_argument(value: Any) -> Any:
    if hasattr(value, "data_ptr"):
        return ctypes.c_void_p(value.data_ptr())
    return ctypes.c_int64(value) if isinstance(value, int) else value


if __name__ == "__main__":
    module, name = sys.argv[1].split(":")
    kernels = [Kernels(Path(library), Case(sanitized=True)) for library in sys.argv[2:]]
    getattr(importlib.import_module(module), name)(*kernels)
