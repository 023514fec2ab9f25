"""`mtfast doctor`: what it says is what is there, and what is missing comes with a remedy."""

import subprocess
import sys
from importlib import metadata

import pytest
import torch

from mtfast import doctor, machine


@pytest.fixture(scope="module")
def found():
    return doctor.collect()


def test_versions_are_those_installed(found):
    assert found["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert found["versions"]["deepspeed"] == metadata.version("deepspeed")
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
    for name in (*doctor.OPS, *doctor.PACKAGES, "C++ compiler", "nvcc", "NVIDIA apex", "CPU:"):
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


def test_a_missing_package_and_compiler_are_reported(monkeypatch):
    monkeypatch.setattr(doctor, "PACKAGES", ("torch", "no-such-package"))
    monkeypatch.setenv("CXX", "/no/such/compiler")
    problems = {entry["problem"]: entry["remedy"] for entry in doctor.collect()["problems"]}
    assert problems["the package no-such-package is not installed"] == "python -m pip install no-such-package"
    assert "no C++ compiler: /no/such/compiler does not run" in problems


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
    assert "uninstall apex" in entry["remedy"] and "NVIDIA/apex" in entry["remedy"]


def test_a_gpu_that_cannot_be_used_is_reported(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    ops = {"mask_tokens": {"cuda": False}}
    reported = []
    doctor._check_cuda("12.8 (/cuda/bin/nvcc)", ops, lambda *entry: reported.append(entry))
    doctor._check_cuda("13.0 (/cuda/bin/nvcc)", ops, lambda *entry: reported.append(entry))
    assert "torch has CUDA 13.0, the toolkit is 12.8" in reported[0][0] and "CUDA_HOME" in reported[0][1]
    assert "MTFAST_FORCE_CUDA_BUILD=1" in reported[1][1]


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
