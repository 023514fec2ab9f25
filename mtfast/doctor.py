"""What this installation can do: versions, devices, what each op runs on, what is missing."""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

from mtfast.machine import cpu_name, version_of
from mtfast.toolkit import homes

# Asked of the package metadata, not imported: importing DeepSpeed alone takes seconds.
PACKAGES = (
    *("torch", "deepspeed", "transformers", "datasets", "tokenizers", "safetensors", "numpy"),
    *("sentencex", "tyro", "rich", "matplotlib", "ninja", "pybind11"),
)
OPS = {  # op: its module in mtfast.ops, and its eager reference there
    "mask_tokens": ("mask_tokens", "mask_tokens_ref"),
    "concat_mlp": ("concat_mlp", "concat_mlp_ref"),
    "bias_gelu": ("bias_gelu", "bias_gelu_ref"),
    "dropout_add_layer_norm": ("dropout_add_layer_norm", "dropout_add_layer_norm_ref"),
    "packed_attention": ("packed_attention", "packed_attention_ref"),
    "packed_attention_qkv": ("packed_attention", "packed_attention_ref"),
    "packed_attention_cls": ("packed_attention", "packed_attention_cls_ref"),
}
REBUILD = "python -m pip install --no-build-isolation -e ."


def collect() -> dict[str, Any]:
    """Everything `render` prints, as plain values.

    Keys: `versions` (name -> version or None), `devices` (lines), `build` (name -> what is found or None),
    `ops` (name -> {"cuda", "cpu", "reference", "runs"}), `apex`, `problems` (list of {"problem", "remedy"}).
    """
    problems: list[dict[str, str]] = []

    def missing(problem: str, remedy: str) -> None:
        problems.append({"problem": problem, "remedy": remedy})

    versions: dict[str, str | None] = {
        "mtfast": version_of("mtfast") or "run from its source directory",
        "python": platform.python_version(),
    }
    versions |= {name: version_of(name) for name in PACKAGES}
    for name, version in versions.items():
        if version is None:
            missing(f"the package {name} is not installed", f"python -m pip install {name}")
    build = {
        "C++ compiler": _first_line([*_compiler().split(), "--version"]),
        "nvcc": _nvcc(),
        "CUDA of torch": torch.version.cuda,
    }
    if build["C++ compiler"] is None:
        missing(f"no C++ compiler: {_compiler()} does not run", "install g++ or clang++, or set CXX")
    ops = _ops(missing)
    if importlib.util.find_spec("mtfast._planner") is None:
        missing("the C++ batch planner mtfast._planner is not built", REBUILD)
    _check_cuda(build["nvcc"], ops, missing)
    apex = _apex()
    if "web toolkit" in apex:
        missing(
            "the installed package apex is not NVIDIA's, but an unrelated web toolkit of that name",
            "python -m pip uninstall apex; NVIDIA's, which is optional, is at https://github.com/NVIDIA/apex",
        )
    found = {"versions": versions, "devices": _devices(), "build": build, "ops": ops, "apex": apex}
    return {**found, "problems": problems}


def render() -> str:
    """`collect` as text for people."""
    found = collect()
    lines = ["Versions"]
    lines += [f"  {name:14}{version or 'not installed'}" for name, version in found["versions"].items()]
    lines += [f"  {'NVIDIA apex':14}{found['apex']}", "", "Devices"]
    lines += [f"  {line}" for line in found["devices"]]
    lines += ["", "Build"]
    lines += [f"  {name:14}{value or 'none'}" for name, value in found["build"].items()]
    lines += ["", f"{'Ops':26}{'CUDA':8}{'CPU':8}{'reference':12}here"]
    for name, op in found["ops"].items():
        marks = ["yes" if op[kind] else "no" for kind in ("cuda", "cpu", "reference")]
        lines.append(f"  {name:24}{marks[0]:8}{marks[1]:8}{marks[2]:12}{op['runs']}")
    lines += ["", "Missing"]
    for entry in found["problems"]:
        lines += [f"  {entry['problem']}", f"    remedy: {entry['remedy']}"]
    return "\n".join(lines if found["problems"] else [*lines, "  nothing"])


def _compiler() -> str:
    return os.environ.get("CXX", "c++")


def _first_line(command: list[str]) -> str | None:
    """First line of a command's output, None where it does not run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip().split("\n")[0]


def _nvcc() -> str | None:
    """Release and place of the CUDA compiler that a build would use."""
    for home in homes():
        path = str(home / "bin" / "nvcc")
        try:
            output = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20).stdout
        except (OSError, subprocess.SubprocessError):
            continue
        if release := re.search(r"release ([\d.]+)", output):
            return f"{release[1]} ({path})"
    return None


def _devices() -> list[str]:
    lines = [f"CPU: {cpu_name()}, {os.cpu_count()} cores, {torch.get_num_threads()} thread(s) in torch"]
    fast = (
        "bfloat16 in hardware"
        if _cpu_has_bfloat16()
        else "no bfloat16 in hardware: precision fp32 may be faster"
    )
    lines[0] += f", {torch.backends.cpu.get_cpu_capability()}, {fast}"
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        memory = gpu.total_memory / 2**30
        lines.append(f"GPU {index}: {gpu.name}, {memory:.0f} GiB, sm_{gpu.major}{gpu.minor}")
    return lines if len(lines) > 1 else [*lines, "no GPU that torch can use: everything runs on the CPU"]


def _cpu_has_bfloat16() -> bool:
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported", "_is_arm_bf16_supported")
    return any(getattr(torch.cpu, name)() for name in names if hasattr(torch.cpu, name))


def _ops(missing: Any) -> dict[str, dict[str, Any]]:
    """Of each op: whether CUDA, CPU and reference implementation are there, and which one runs here."""
    nothing = {"cuda": False, "cpu": False, "reference": False, "runs": "none"}
    try:
        from mtfast.ops import _library

        _library.load()
    except ImportError as error:
        missing(f"the ops cannot be loaded: {error}", REBUILD)
        return {name: dict(nothing) for name in OPS}
    table = {}
    for name, (module, reference) in OPS.items():
        compiled = {"cpu": True, "cuda": True}
        for part in (name, f"{name}_backward"):
            try:
                has = _library.implementations(part)
            except KeyError:
                has = (
                    {"cpu": False, "cuda": False} if part == name else compiled
                )  # not every op has a backward
            compiled = {device: compiled[device] and has[device] for device in compiled}
        has_reference = hasattr(importlib.import_module(f"mtfast.ops.{module}"), reference)
        runs = (
            "CUDA" if torch.cuda.is_available() and compiled["cuda"] else "CPU" if compiled["cpu"] else "none"
        )
        if not compiled["cpu"]:
            missing(f"{name} has no compiled implementation", REBUILD)
        table[name] = {**compiled, "reference": has_reference, "runs": runs}
    return table


def _check_cuda(nvcc: str | None, ops: dict[str, dict[str, Any]], missing: Any) -> None:
    """Report what keeps a GPU of this machine from being used."""
    gpu_here = torch.cuda.is_available() or Path("/dev/nvidia0").exists()
    wanted = torch.version.cuda
    if not gpu_here:
        return
    if wanted is None:
        missing(
            "there is a GPU, but this torch is a build for CPU",
            "install torch for CUDA, see https://pytorch.org",
        )
    elif not torch.cuda.is_available():
        missing("there is a GPU, but torch cannot use it", "check the NVIDIA driver: run nvidia-smi")
    elif not all(op["cuda"] for op in ops.values()):
        major = wanted.split(".")[0]
        if nvcc is None or nvcc.split(".")[0] != major:
            missing(
                f"the ops have no CUDA kernels; torch has CUDA {wanted}, the toolkit is {nvcc or 'missing'}",
                f"install the CUDA {major} toolkit, set CUDA_HOME, then {REBUILD}",
            )
        else:
            missing("the ops have no CUDA kernels", f"MTFAST_FORCE_CUDA_BUILD=1 {REBUILD}")


def _apex() -> str:
    """Which apex is installed: NVIDIA's has apex.optimizers, the web toolkit on PyPI has not."""
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return "not installed (optional)"
    for place in spec.submodule_search_locations or []:
        if (Path(place) / "optimizers" / "__init__.py").is_file():
            kernels = importlib.util.find_spec("amp_C") is not None
            return "installed" if kernels else "installed without its CUDA kernels (--cpp_ext --cuda_ext)"
    return "not installed; the apex here is an unrelated web toolkit"
