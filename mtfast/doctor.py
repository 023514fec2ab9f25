"""What this installation can do: versions, devices, what each op runs on, what is missing."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from mtfast.machine import cpu_has_bfloat16, cpu_name
from mtfast.packages import BUILD, SOURCE, Requirement, install_command, parsed, version_of
from mtfast.toolkit import homes, toolkit

OPS = {  # op: its eager reference
    "mask_tokens": "mask_tokens_ref",
    "concat_mlp": "concat_mlp_ref",
    "bias_gelu": "bias_gelu_ref",
    "dropout_add_layer_norm": "dropout_add_layer_norm_ref",
    "packed_attention": "packed_attention_ref",
    "packed_attention_qkv": "packed_attention_ref",
    "packed_attention_cls": "packed_attention_cls_ref",
}
PIP = f"{shlex.quote(sys.executable)} -m pip"
REBUILD = install_command(pip=PIP)
APEX = "https://github.com/NVIDIA/apex"


def collect() -> dict[str, Any]:
    """Everything `render` prints, as plain values.

    Keys: `versions` (of what the ops need), `training` and `building` (name -> version or None), `devices`
    (lines), `build` (name -> what is found or None), `ops` (name -> {"cuda", "cpu", "reference", "runs"}),
    `apex` (lines), `problems` (list of {"problem", "remedy"}).
    """
    problems: list[dict[str, str]] = []

    def missing(problem: str, remedy: str) -> None:
        problems.append({"problem": problem, "remedy": remedy})

    versions = {"mtfast": version_of("mtfast"), "python": platform.python_version()}
    if versions["mtfast"] is None:
        missing("mtfast is not installed, so what else it needs is not known", REBUILD)
    declared = _declared()
    versions |= _versions([wanted for wanted in declared if not wanted.extra], missing)
    training = _versions([wanted for wanted in declared if wanted.extra == "train"], missing)
    # What is installed from a wheel is built.
    from_source = (SOURCE / "setup.py").is_file()
    tools = [wanted for wanted in parsed(BUILD) if wanted.name != "torch"]
    building = _versions(tools, missing if from_source else lambda *_: None)
    compilers = _cuda_compilers()
    build = {
        "C++ compiler": _first_line([*_compiler().split(), "--version"]),
        "nvcc": _nvcc(compilers),
        "CUDA of torch": torch.version.cuda,
    }
    if build["C++ compiler"] is None and from_source:
        missing(f"no C++ compiler: {_compiler()} does not run", "install g++ or clang++, or set CXX")
    ops = _ops(missing)
    if importlib.util.find_spec("mtfast._planner") is None:
        missing("the C++ batch planner mtfast._planner is not built", REBUILD)
    _check_cuda(ops, missing)
    apex = _apex()
    if "web toolkit" in apex:
        missing(
            "the installed package apex is not NVIDIA's, but an unrelated web toolkit of that name",
            f"{PIP} uninstall apex; NVIDIA's is optional",
        )
    return {
        "versions": versions,
        "training": training,
        "building": building,
        "devices": _devices(),
        "build": build,
        "ops": ops,
        "apex": [apex] if apex == "installed" else [apex, _how_to_build_apex(compilers)],
        "problems": problems,
    }


def render() -> str:
    """`collect` as text for people."""
    found = collect()

    def listed(part: str, without: str = "not installed") -> list[str]:
        return [f"  {name:16}{value or without}" for name, value in found[part].items()]

    apex, *how = found["apex"]
    lines = ["Versions", *listed("versions"), "", "Training (the extra train, of which the ops need nothing)"]
    lines += [*listed("training"), f"  {'NVIDIA apex':16}{apex}", *(f"    {line}" for line in how)]
    lines += ["", "Devices", *(f"  {line}" for line in found["devices"])]
    lines += ["", "Build", *listed("building"), *listed("build", "none")]
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


def _declared() -> list[Requirement]:
    """What mtfast needs, with its extras."""
    try:
        return parsed(metadata.requires("mtfast") or [])
    except metadata.PackageNotFoundError:
        return []


def _versions(requirements: list[Requirement], missing: Any) -> dict[str, str | None]:
    """The version of each package, from its metadata: importing takes seconds.

    Reports those that are too old or not installed, all that the extra lacks as one problem.
    """
    found = {wanted.name: version_of(wanted.name) for wanted in requirements}
    absent = [wanted.name for wanted in requirements if wanted.extra and found[wanted.name] is None]
    if absent:
        problem = f"training, but not the ops, needs packages that are not installed: {', '.join(absent)}"
        missing(problem, install_command("train", PIP))
    for wanted in requirements:
        version = found[wanted.name]
        if wanted.name not in absent and not wanted.met_by(version):
            what = "not installed" if version is None else f"{version}; it should be >={wanted.oldest}"
            missing(f"the package {wanted.name} is {what}", f"{PIP} install {shlex.quote(str(wanted))}")
    return found


def _cuda_compilers() -> dict[Path, str]:
    """The release of nvcc in each toolkit, the most wanted first."""
    found = {}
    for home in dict.fromkeys(home.resolve() for home in homes()):
        try:
            command = [str(home / "bin" / "nvcc"), "--version"]
            output = subprocess.run(command, capture_output=True, text=True, timeout=20).stdout
        except (OSError, subprocess.SubprocessError):
            continue
        if release := re.search(r"release ([\d.]+)", output):
            found[home] = release[1]
    return found


def _nvcc(compilers: dict[Path, str]) -> str | None:
    """Release and place of the CUDA compiler that a build would use, else of one that is there."""
    cuda = torch.version.cuda
    home = toolkit(int(cuda.split(".")[0]))[0] if cuda else None
    if home not in compilers:
        home = next(iter(compilers), None)
    return None if home is None else f"{compilers[home]} ({home / 'bin' / 'nvcc'})"


def _devices() -> list[str]:
    lines = [f"CPU: {cpu_name()}, {os.cpu_count()} cores, {torch.get_num_threads()} thread(s) in torch"]
    fast = (
        "bfloat16 in hardware"
        if cpu_has_bfloat16()
        else "no bfloat16 in hardware: precision fp32 may be faster"
    )
    lines[0] += f", {torch.backends.cpu.get_cpu_capability()}, {fast}"
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        memory = gpu.total_memory / 2**30
        lines.append(f"GPU {index}: {gpu.name}, {memory:.0f} GiB, sm_{gpu.major}{gpu.minor}")
    return lines if len(lines) > 1 else [*lines, "no GPU that torch can use: everything runs on the CPU"]


def _ops(missing: Any) -> dict[str, dict[str, Any]]:
    """Of each op: whether CUDA, CPU and reference implementation are there, and which one runs here."""
    nothing = {"cuda": False, "cpu": False, "reference": False, "runs": "none"}
    try:
        from mtfast import ops
        from mtfast.ops import _library

        _library.load()
    except ImportError as error:
        missing(f"the ops cannot be loaded: {error}", REBUILD)
        return {name: dict(nothing) for name in OPS}
    table = {}
    for name, reference in OPS.items():
        compiled = {"cpu": True, "cuda": True}
        for part in (name, f"{name}_backward"):
            try:
                has = _library.implementations(part)
            except KeyError:
                has = (
                    {"cpu": False, "cuda": False} if part == name else compiled
                )  # not every op has a backward
            compiled = {device: compiled[device] and has[device] for device in compiled}
        has_reference = hasattr(ops, reference)
        runs = (
            "CUDA" if torch.cuda.is_available() and compiled["cuda"] else "CPU" if compiled["cpu"] else "none"
        )
        if not compiled["cpu"]:
            missing(f"{name} has no compiled implementation", REBUILD)
        table[name] = {**compiled, "reference": has_reference, "runs": runs}
    return table


def _check_cuda(ops: dict[str, dict[str, Any]], missing: Any) -> None:
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
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        missing(
            "there is a GPU, but torch cannot use it",
            "check the NVIDIA driver: run nvidia-smi"
            if hidden is None
            else f"unset CUDA_VISIBLE_DEVICES, which is {hidden!r}; else run nvidia-smi to check the driver",
        )
    elif not all(op["cuda"] for op in ops.values()):
        major = wanted.split(".")[0]
        home, why_not = toolkit(int(major))
        if home is None:
            missing(
                f"the ops have no CUDA kernels, and none can be built: torch has CUDA {wanted}, {why_not}",
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
            return "installed" if kernels else "installed without its CUDA kernels (optional)"
    return "not installed; the apex here is an unrelated web toolkit"


def _how_to_build_apex(compilers: dict[Path, str]) -> str:
    """The command, or what it needs to succeed: nvcc of exactly torch's CUDA version, and headers of CUDA's
    libraries."""
    wanted = torch.version.cuda
    if wanted is None:
        return "to build it, torch has to be one for CUDA"
    of_torch = [home for home, release in compilers.items() if release == wanted]
    whole = [home for home in of_torch if (home / "include" / "cusparse.h").is_file()]
    if not whole:
        lacks = [f"{home} has no include/cusparse.h" for home in of_torch]
        others = [f"{home} is {release}" for home, release in compilers.items()]
        there = ", ".join(lacks or others) or "there is none"
        return f"to build it, the whole CUDA {wanted} toolkit is needed, which this torch is of: {there}"
    setting = f"CUDA_HOME={shlex.quote(str(whole[0]))} APEX_CPP_EXT=1 APEX_CUDA_EXT=1"
    return f"to build it: git clone {APEX} && {setting} {PIP} install --no-build-isolation ./apex"
