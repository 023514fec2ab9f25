"""Compiles csrc/*.cu with nvcc for real GPUs and reads what came out: registers, memory, instructions."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from .harness import CSRC, toolkit

# Both under MTFAST_TEST_SWEEP=full: nvcc takes up to half a minute for one source and one of them.
ARCHITECTURES = ("sm_80", "sm_90a") if os.environ.get("MTFAST_TEST_SWEEP") == "full" else ("sm_90a",)
COUNTED = ("HGMMA", "HMMA", "LDSM", "LDGSTS", "LDG", "STG", "BAR", "MUFU", "LDL", "STL")


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One kernel's machine code. `opcodes` counts full names such as "LDG.E.128"; empty without nvdisasm."""

    name: str
    architecture: str
    registers: int
    shared_bytes: int
    opcodes: Counter[str]

    def count(self, pattern: str) -> int:
        """Instructions whose full name matches the regular expression from its beginning."""
        return sum(n for opcode, n in self.opcodes.items() if re.match(pattern, opcode))


def compiled(source: str) -> list[Kernel]:
    """The kernels of csrc/`source` for each of ARCHITECTURES, compiled side by side.

    Skips without nvcc. A spill or local memory is a RuntimeError.
    """
    nvcc = _nvcc()
    with ThreadPoolExecutor() as pool:
        built = pool.map(functools.partial(_compiled, nvcc, source), ARCHITECTURES)
        return [kernel for kernels in built for kernel in kernels]


def disassembled(source: str, name: str) -> list[Kernel]:
    """Those of them whose names begin with `name`, with their opcodes. Skips without nvdisasm too."""
    if disassembler() is None:
        pytest.skip("no nvdisasm: install nvidia-cuda-nvdisasm or the CUDA toolkit's")
    return [kernel for kernel in compiled(source) if kernel.name.startswith(name)]


def ptx(source: Path) -> str:
    """What nvcc hands to the assembler for a source that includes headers of csrc. Skips without nvcc."""
    command = [_nvcc(), "-std=c++17", "-O3", f"-I{CSRC}", "-arch=compute_80", "-ptx", source, "-o", "-"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _nvcc() -> Path:
    home = toolkit()
    if home is None or not (home / "bin" / "nvcc").exists():
        pytest.skip("no nvcc: neither CUDA_HOME nor /usr/local/cuda holds bin/nvcc")
    return home / "bin" / "nvcc"


@functools.cache
def _compiled(nvcc: Path, source: str, architecture: str) -> list[Kernel]:
    files = sorted([CSRC / source, *CSRC.rglob("*.h"), *CSRC.rglob("*.cuh")])
    digest = hashlib.sha256(b"".join(f.read_bytes() for f in files) + architecture.encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"mtfast-machine-code-{os.getuid()}"
    folder.mkdir(exist_ok=True, mode=0o700)
    cubin, log = folder / f"{source}-{digest}.cubin", folder / f"{source}-{digest}.log"
    if not (cubin.exists() and log.exists()):
        target = f"arch={architecture.replace('sm', 'compute')},code={architecture}"
        checks = "-v,-warn-spills,-warn-lmem-usage,-Werror"
        command = [nvcc, "-std=c++17", "-O3", f"-I{CSRC}", "-Xptxas", checks]
        done = subprocess.run(
            [*command, "-gencode", target, "-cubin", CSRC / source, "-o", cubin],
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise RuntimeError(f"{source} for {architecture}:\n{done.stdout}{done.stderr}")
        log.write_text(done.stdout + done.stderr)
    opcodes = _opcodes(cubin)
    kernels = []
    for entry in re.split(r"Compiling entry function ", log.read_text())[1:]:
        mangled = re.match(r"'(\S+)'", entry)
        registers = re.search(r"Used (\d+) registers", entry)
        shared = re.search(r"(\d+) bytes smem", entry)
        assert mangled and registers
        kernels.append(
            Kernel(
                _readable(mangled[1]),
                architecture,
                int(registers[1]),
                int(shared[1]) if shared else 0,
                opcodes.get(mangled[1], Counter()),
            )
        )
    return kernels


def table(kernels: list[Kernel]) -> str:
    """One line a kernel: registers, static shared memory, instructions."""
    lines = [f"{'kernel':60} {'target':7} {'regs':>4} {'smem':>5} {'instr':>6}"]
    for k in kernels:
        counts = " ".join(f"{name}={k.count(name)}" for name in COUNTED if k.count(name))
        resources = f"{k.registers:4} {k.shared_bytes:5} {k.opcodes.total():6}"
        lines.append(f"{k.name[:60]:60} {k.architecture:7} {resources} {counts}")
    return "\n".join(lines)


def disassembler() -> Path | None:
    """nvdisasm: beside nvcc, on PATH, or in the package nvidia-cuda-nvdisasm or triton."""
    home = toolkit()
    places = [home / "bin" / "nvdisasm"] if home else []
    if on_path := shutil.which("nvdisasm"):
        places.append(Path(on_path))
    for package, pattern in (("nvidia", "cu*/bin/nvdisasm"), ("triton", "backends/nvidia/bin/nvdisasm")):
        if spec := importlib.util.find_spec(package):
            for root in spec.submodule_search_locations or ():
                places += Path(root).glob(pattern)
    return next((place for place in places if place.exists()), None)


def _opcodes(cubin: Path) -> dict[str, Counter[str]]:
    tool = disassembler()
    if tool is None:
        return {}
    text = subprocess.run([tool, "-c", cubin], capture_output=True, text=True, check=True).stdout
    found: dict[str, Counter[str]] = {}
    for section in re.split(r"^\s*\.section\s+\.text\.", text, flags=re.MULTILINE)[1:]:
        name = re.match(r"[\w$.]+", section)
        assert name
        instructions = re.findall(
            r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", section, re.MULTILINE
        )
        found[name[0]] = Counter(instructions)
    return found


def _readable(mangled: str) -> str:
    done = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True)
    name = re.sub(r"\(anonymous namespace\)::|^void ", "", done.stdout.strip())
    return re.sub(r"^([\w:]*::)?", "", re.sub(r"\((?!anonymous).*", "", name))
