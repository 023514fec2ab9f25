"""What one call of a launch function asks of a GPU, counted while the emulation runs it."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import re
import subprocess
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Costs:
    """Of one launch, or of all launches of a call.

    Bytes are those that warps ask of global memory, whichever cache has them: what several lanes read at once
    from one place counts once, what is read again counts again. An atomic operation reads and writes. The
    longest loop is the most times that one thread comes to the same place in the code, of those that touch
    memory, talk to the warp or call Philox: loops of arithmetic alone go unseen, one inside another counts as
    their product, and short ones of fixed length the compiler may unroll.
    """

    read: int = 0  # bytes, by plain loads and atomics
    written: int = 0  # bytes, by plain stores and atomics
    copied: int = 0  # bytes read by cp.async; what it fills with zeros is not counted
    mma: int = 0  # m16n8k16 products; these, ldmatrix, shuffles and votes once for each warp
    ldmatrix: int = 0
    shuffles: int = 0
    votes: int = 0
    philox: int = 0  # calls, for each thread
    barriers: int = 0  # __syncthreads, once for each block
    warp_barriers: int = 0  # __syncwarp, once for each warp
    longest_loop: int = 0
    blocks: int = 0
    by_kernel: tuple[tuple[str, Costs], ...] = ()  # in order of launch

    @property
    def moved(self) -> int:
        """Bytes read, written and copied."""
        return self.read + self.written + self.copied


COUNTERS = [field.name for field in dataclasses.fields(Costs)][:-2]  # enum Cost of machine.h


class _Launch(ctypes.Structure):
    """struct Launch of cost.cpp."""

    _fields_ = (
        ("kernel", ctypes.c_int64),
        ("blocks", ctypes.c_int64),
        ("count", ctypes.c_int64 * len(COUNTERS)),
    )


def costs_of(library: Path, address: int, size: int) -> Costs:
    """Those of `size` launches, whose counts are at `address`."""
    by_kernel = []
    for launch in (_Launch * size).from_address(address) if size else ():
        counts = dict(zip(COUNTERS, launch.count, strict=True))
        by_kernel.append((_kernels(library)[launch.kernel], Costs(**counts, blocks=launch.blocks)))
    totals = {
        name: (max if name == "longest_loop" else sum)(getattr(costs, name) for _, costs in by_kernel)
        for name in (*COUNTERS, "blocks")
        if by_kernel
    }
    return Costs(**totals, by_kernel=tuple(by_kernel))


@functools.cache
def _kernels(library: Path) -> dict[int, str]:
    """The names of a library's functions by their place in it, without namespaces and parameters."""
    listed = subprocess.run(["nm", "--demangle", library], capture_output=True, text=True, check=True)
    names = {}
    for line in listed.stdout.splitlines():
        if function := re.match(r"([0-9a-f]+) [tTwW] (.*)", line):
            name = re.sub(r"\(anonymous namespace\)|\b\w+::", "", function[2].removeprefix("void "))
            names[int(function[1], 16)] = re.sub(r"^:+|(?<![ ,<])\(.*", "", name.replace("::", ""))
    return names
