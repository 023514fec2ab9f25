"""`mtfast doctor`: what it says is what is there, and what is missing comes with a remedy."""

import subprocess
import sys
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest
import torch

from mtfast import commands, doctor, machine, toolkit
from mtfast.config import EngineConfig, ModelConfig
from mtfast.errors import Error
from mtfast.recipes import demo
from mtfast.training.run import progress


@pytest.fixture(scope="module")
def found():
    return doctor.collect()


def test_versions_are_those_installed(found):
    assert found["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert found["training"]["deepspeed"] == metadata.version("deepspeed")
    assert found["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))


def test_every_compiled_op_is_listed(found):
    names = {
        name.removeprefix("mtfast::") for name in torch._C._dispatch_get_all_op_names() if "mtfast::" in name
    }
    assert {name for name in names if not name.endswith("_backward")} == set(doctor.OPS)


def test_ops_say_what_is_compiled_in(found):
    for name, op in found["ops"].items():
        assert op["cpu"] and op["reference"], name
        assert op["cuda"] == torch._C._dispatch_has_kernel_for_dispatch_key(f"mtfast::{name}", "CUDA")
        assert op["runs"] == ("CUDA" if torch.cuda.is_available() else "CPU")


def test_rendered_text_names_everything(found):
    text = doctor.render()
    parts = (found["versions"], found["training"], found["building"])
    for name in (
        *doctor.OPS,
        *(name for part in parts for name in part),
        "C++ compiler",
        "nvcc",
        "NVIDIA apex",
        "CPU:",
    ):
        assert name in text
    for entry in found["problems"]:
        assert entry["problem"] in text and f"remedy: {entry['remedy']}" in text


def test_deepspeed_is_not_imported():
    code = "import sys; from mtfast import doctor; doctor.collect(); sys.exit('deepspeed' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_library_that_is_not_built_is_reported(monkeypatch, tmp_path):
    from mtfast.ops import _library

    monkeypatch.setattr(_library, "LIBRARY", tmp_path / "_C.abi3.so")
    _library.load.cache_clear()
    try:
        found = doctor.collect()
    finally:
        _library.load.cache_clear()
    assert all(op["runs"] == "none" for op in found["ops"].values())
    (entry,) = [entry for entry in found["problems"] if "the ops cannot be loaded" in entry["problem"]]
    assert "pip install" in entry["remedy"]


def test_packages_that_are_missing_or_too_old_and_a_compiler_are_reported(monkeypatch):
    """What the extra train lacks as one; other extras are not missed."""
    declared = ["torch>=2.10", "numpy>=999", "no-tensorboard>=1; extra == 'logs'", "ruff"]
    declared += [f"{name}; extra == 'train'" for name in ("no-such-package>=2", "nor-this>=1", "tyro>=999")]
    monkeypatch.setattr(metadata, "requires", lambda name: declared)
    monkeypatch.setattr(doctor, "PIP", "python -m pip")
    monkeypatch.setenv("CXX", "/no/such/compiler")
    found = doctor.collect()

    def too_old(name: str) -> dict[str, str]:
        problem = f"the package {name} is {metadata.version(name)}; it should be >=999"
        return {problem: f"python -m pip install '{name}>=999'"}

    assert {entry["problem"]: entry["remedy"] for entry in found["problems"]} == {
        **too_old("numpy"),
        "training, but not the ops, needs packages that are not installed: no-such-package, nor-this": (
            "python -m pip install 'mtfast[train]'"
        ),
        **too_old("tyro"),
        "no C++ compiler: /no/such/compiler does not run": "install g++ or clang++, or set CXX",
    }
    assert set(found["versions"]) == {"mtfast", "python", "torch", "numpy"}
    assert set(found["training"]) == {"no-such-package", "nor-this", "tyro"}


def test_what_builds_is_not_missed_where_nothing_is_to_be_built(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "SOURCE", tmp_path)  # as site-packages, without setup.py
    monkeypatch.setattr(doctor, "version_of", lambda name: None if name == "ninja" else "1000")
    monkeypatch.setenv("CXX", "/no/such/compiler")
    found = doctor.collect()
    assert found["building"]["ninja"] is None and found["build"]["C++ compiler"] is None
    assert not any("ninja" in entry["problem"] or "C++" in entry["problem"] for entry in found["problems"])


def test_without_metadata_it_says_that_mtfast_is_not_installed(monkeypatch):
    def not_installed(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", not_installed)
    monkeypatch.setattr(doctor, "version_of", lambda name: None if name == "mtfast" else "1000")
    (entry,) = doctor.collect()["problems"]
    assert entry["problem"].startswith("mtfast is not installed")
    assert entry["remedy"] == doctor.REBUILD


def test_remedies_are_for_this_python_and_this_source():
    assert doctor.PIP.split() == [sys.executable, "-m", "pip"]
    assert doctor.REBUILD.endswith(f" -e {Path(doctor.__file__).parents[1]}")


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ((), "not installed (optional)"),
        (("apex/__init__.py", "apex/lib/__init__.py"), "unrelated web toolkit"),
        (("apex/__init__.py", "apex/optimizers/__init__.py"), "installed without its CUDA kernels"),
        (("apex/__init__.py", "apex/optimizers/__init__.py", "amp_C.py"), "installed"),
    ],
)
def test_which_apex_is_installed(monkeypatch, tmp_path, files, said):
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("raise RuntimeError('doctor must look, not import')")
    elsewhere = [path for path in sys.path if "site-packages" not in path]
    monkeypatch.setattr(sys, "path", [str(tmp_path), *elsewhere])
    apex = doctor._apex()
    assert said in apex
    assert said != "installed" or apex == "installed"


def test_the_unrelated_apex_comes_with_a_remedy(monkeypatch):
    monkeypatch.setattr(doctor, "_apex", lambda: "not installed; the apex here is an unrelated web toolkit")
    (entry,) = [entry for entry in doctor.collect()["problems"] if "apex" in entry["problem"]]
    assert entry["remedy"].startswith(f"{doctor.PIP} uninstall apex")


def cuda(home: Path, release: str, headers: tuple[str, ...] = ()) -> Path:
    """A toolkit, as far as it is looked at."""
    major, minor = map(int, release.split("."))
    (home / "bin").mkdir(parents=True)
    (home / "include").mkdir()
    (home / "bin" / "nvcc").write_text(f"#!/bin/sh\necho Cuda tools, release {release}, V{release}.1\n")
    (home / "bin" / "nvcc").chmod(0o755)
    version = f"#define CUDART_VERSION {1000 * major + 10 * minor}\n"
    (home / "include" / "cuda_runtime_api.h").write_text(version)
    for name in headers:
        (home / "include" / name).touch()
    return home


@pytest.fixture
def toolkits(tmp_path, monkeypatch):
    """Makes toolkits the only ones, the first the most wanted, and torch one for a version of CUDA."""

    def only(of_torch: str | None, *releases: str, headers: tuple[str, ...] = ("cusparse.h",)) -> list[Path]:
        homes = [cuda(tmp_path / f"cuda {release}", release, headers) for release in releases]
        for module in (doctor, toolkit):
            monkeypatch.setattr(module, "homes", lambda: iter(homes))
        monkeypatch.setattr(torch.version, "cuda", of_torch)
        return homes

    return only


def test_a_gpu_that_cannot_be_used_is_reported(toolkits, monkeypatch):
    ops = {"mask_tokens": {"cuda": False}}
    reported = []

    def check():
        doctor._check_cuda(ops, lambda *entry: reported.append(entry))
        return reported[-1]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    (home,) = toolkits("13.0", "12.8")
    problem, remedy = check()
    assert f"torch has CUDA 13.0, {home} is CUDA 12, wanted is CUDA 13" in problem
    assert remedy == f"install the CUDA 13 toolkit, set CUDA_HOME, then {doctor.REBUILD}"
    assert doctor._nvcc(doctor._cuda_compilers()) == f"12.8 ({home}/bin/nvcc)"
    _, home = toolkits("13.0", "12.6", "13.1")  # a build takes the second
    assert check() == ("the ops have no CUDA kernels", f"MTFAST_FORCE_CUDA_BUILD=1 {doctor.REBUILD}")
    assert doctor._nvcc(doctor._cuda_compilers()) == f"13.1 ({home}/bin/nvcc)"

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(Path, "exists", lambda path: True)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert check()[1] == "check the NVIDIA driver: run nvidia-smi"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert check()[1].startswith("unset CUDA_VISIBLE_DEVICES, which is ''")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert check()[0] == "there is a GPU, but this torch is a build for CPU"


def test_how_apex_is_built_is_said_where_it_can_be(toolkits):
    def said():
        return doctor._how_to_build_apex(doctor._cuda_compilers())

    toolkits(None, "13.0")
    assert said() == "to build it, torch has to be one for CUDA"
    toolkits("12.8")
    assert said().endswith("the whole CUDA 12.8 toolkit is needed, which this torch is of: there is none")
    (home,) = toolkits("12.9", "12.6")  # apex wants the minor version too
    assert said().endswith(f": {home} is 12.6")
    (home,) = toolkits("13.1", "13.1", headers=())
    assert said().endswith(f": {home} has no include/cusparse.h")
    _, home = toolkits("12.4", "11.8", "12.4")
    assert said() == (
        f"to build it: git clone https://github.com/NVIDIA/apex && CUDA_HOME='{home}' APEX_CPP_EXT=1 "
        f"APEX_CUDA_EXT=1 {doctor.PIP} install --no-build-isolation ./apex"
    )


def test_what_is_said_of_apex_is_no_problem(monkeypatch):
    monkeypatch.setattr(doctor, "_apex", lambda: "not installed (optional)")
    monkeypatch.setattr(doctor, "_how_to_build_apex", lambda compilers: "to build it: do so")
    assert not any("apex" in str(entry) for entry in doctor.collect()["problems"])
    assert "  NVIDIA apex     not installed (optional)\n    to build it: do so\n" in doctor.render()
    monkeypatch.setattr(doctor, "_apex", lambda: "installed")
    assert "to build it" not in doctor.render()


@pytest.mark.parametrize(
    ("precision", "gpu", "instructions", "said"),
    [
        ("bf16", False, False, 1),
        ("fp32", False, False, 0),
        ("bf16", True, False, 0),
        ("bf16", False, True, 0),
    ],
)
def test_a_run_in_bf16_on_a_cpu_without_it_says_so_once(
    precision, gpu, instructions, said, tmp_path, monkeypatch, capsys
):
    """Before it looks at its data, which are not there."""
    monkeypatch.setattr(commands, "start", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(commands, "cpu_has_bfloat16", lambda: instructions)
    monkeypatch.setattr(commands, "_write_demo_corpus", lambda config: None)
    progress.say_once.cache_clear()
    config = replace(demo(), run_dir=str(tmp_path / "run"), engine=EngineConfig(precision=precision))
    for name in ("pretrain", "heads"):
        with pytest.raises(Error):
            commands._open(replace(config, model=ModelConfig(checkpoint=str(tmp_path / "none"))), (name,))
    assert capsys.readouterr().out.count("fp32 may be much faster") == said


def test_a_runs_summary_names_the_processor_as_doctor_does(found):
    (line,) = [line for line in found["devices"] if line.startswith("CPU: ")]
    assert line.startswith(f"CPU: {machine.cpu_name()}, ")
    assert machine.device_name() == (
        torch.cuda.get_device_name() if torch.cuda.is_available() else machine.cpu_name()
    )


def test_nothing_but_the_answer_is_printed():
    done = subprocess.run(
        [sys.executable, "-m", "mtfast", "doctor"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("Versions\n") and done.stderr == ""
