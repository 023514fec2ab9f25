"""What is shipped: the source distribution, the metadata, and what is said where a part is not installed."""

import email
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from importlib import metadata
from pathlib import Path

import pytest
from patience import PATIENCE

import mtfast
from mtfast import packages

try:
    import tomllib
except ImportError:  # Python 3.10
    from pip._vendor import tomli as tomllib

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PLAIN = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"', re.MULTILINE)
OPS = ("mask_tokens", "packed_attention", "concat_mlp", "bias_gelu", "dropout_add_layer_norm")
TESTS_OF_OPS = ("conftest.py", "devices.py", "real_lengths.py", "test_packed_attention_arguments.py")
TESTS_OF_OPS += tuple(name for op in OPS for name in (f"test_{op}.py", f"{op}_cases.py"))
JUNK = ("mtfast/_C.abi3.so", "build/a.py", "runs/demo/report.html", "dist/old.whl", "tests/__pycache__/a.pyc")
# A sitecustomize with which packages are as where they are not installed.
WITHOUT = """
import sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name in {hidden}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Finder())
from importlib import metadata
version = metadata.version
def of_what_is_there(name):
    if name.lower() in {hidden_packages}:
        raise metadata.PackageNotFoundError(name)
    return version(name)
metadata.version = of_what_is_there
"""


def run(command: list[str], cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=cwd, env=PLAIN | environment, capture_output=True, text=True, timeout=PATIENCE
    )


def files_of(root: Path, *others: str) -> set[str]:
    """What the repository holds, with others what it would."""
    listed = run(["git", "ls-files", "--cached", *others], root).stdout.split("\n")
    return {name for name in listed if name and (root / name).is_file()}


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    """The source distribution, built from a copy that also holds what does not belong in it, and unpacked."""
    if not (ROOT / ".git").exists():
        pytest.skip("compares with what git has")
    folder = tmp_path_factory.mktemp("sdist")
    copy = folder / "copy"
    for name in files_of(ROOT, "--others", "--exclude-standard"):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, copy / name)
    for name in JUNK:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).touch()
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})"
    done = run([sys.executable, "-c", code], copy, MTFAST_SKIP_CUDA_BUILD="1")
    assert done.returncode == 0, done.stderr
    with tarfile.open(folder / f"mtfast-{mtfast.__version__}.tar.gz") as archive:
        archive.extractall(folder)
    return folder / f"mtfast-{mtfast.__version__}"


def test_the_sdist_holds_what_the_repository_does(sdist):
    held = {str(path.relative_to(sdist)) for path in sdist.rglob("*") if path.is_file()}
    added = {"PKG-INFO", "setup.cfg"} | {name for name in held if name.startswith("mtfast.egg-info/")}
    assert held - added <= files_of(ROOT, "--others", "--exclude-standard")
    assert files_of(ROOT) - held == {".ci/run", ".gitignore"}


def test_every_header_that_a_source_includes_is_in_the_sdist(sdist):
    sources = [path for path in (sdist / "csrc").rglob("*") if path.is_file()]
    assert {path.suffix for path in sources} == {".cpp", ".cu", ".h", ".cuh"}
    for path in sources:
        places = (path.parent, sdist / "csrc", sdist / "tests" / "cuda_on_cpu")  # the last for tests alone
        for name in INCLUDE.findall(path.read_text()):
            assert any((place / name).is_file() for place in places), f"{path}: {name}"


def test_metadata_ask_for_torch_alone(sdist):
    found = email.message_from_string((sdist / "PKG-INFO").read_text())
    required = found.get_all("Requires-Dist")
    assert [text for text in required if "extra ==" not in text] == ["torch>=2.10"]
    assert found["License-Expression"] == PROJECT["license"] and found.get_all("License-File") == ["LICENSE"]
    assert found["Version"] == mtfast.__version__
    assert not any("License ::" in classifier for classifier in found.get_all("Classifier"))
    # Which doctor reads there, and nothing but a name and the oldest version.
    of_training = {str(wanted) for wanted in packages.parsed(required) if wanted.extra == "train"}
    assert of_training == set(PROJECT["optional-dependencies"]["train"])


def test_what_is_declared_is_what_is_asked_for_by_name():
    declared = packages.parsed(PROJECT["optional-dependencies"]["train"])
    assert sorted(wanted.name for wanted in declared) == sorted(packages.TRAIN.values())
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    assert set(build) == set(packages.BUILD)
    installed = metadata.packages_distributions()
    for module, package in packages.TRAIN.items():
        assert package in {name.lower().replace("_", "-") for name in installed[module]}, module


def test_version_and_licence_are_the_same_everywhere():
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {mtfast.__version__}\n" in citation
    assert f"\nlicense: {PROJECT['license']}\n" in citation
    changes = (ROOT / "CHANGELOG.md").read_text()
    assert re.search(r"^## \[(\d.*?)\]", changes, re.MULTILINE)[1] == mtfast.__version__
    assert "version" in PROJECT["dynamic"] and PROJECT["license"] == "BSD-3-Clause"
    assert (ROOT / "LICENSE").read_text().startswith("BSD 3-Clause License\n")
    (author,) = PROJECT["authors"]
    assert f"- name: {author['name']}\n" in citation


@pytest.mark.parametrize(
    ("version", "oldest", "met"),
    [
        ("2.10.0", "2.10", True),
        ("2.10", "2.10.0", True),
        ("2.9.1", "2.10", False),
        ("2.13.0+cpu", "2.10", True),
        ("2.10.0rc1", "2.10", True),
        ("1.11.1.4", "1.11.1.5", False),
        ("unknown", "1", False),
        (None, "1", False),
    ],
)
def test_versions_are_compared_as_numbers(version, oldest, met):
    assert packages.Requirement("x", oldest).met_by(version) is met


def test_a_wheel_is_of_one_python_and_its_ops_of_any():
    """The planner is of one Python; the ops' library can be copied to another's."""
    code = """
import json
from distutils.core import run_setup
made = run_setup("setup.py", stop_after="config")
wheel = made.get_command_obj("bdist_wheel")
wheel.ensure_finalized()
build = made.get_command_obj("build_ext")
build.ensure_finalized()
print(json.dumps([wheel.get_tag(), [build.get_ext_filename(made.name) for made in made.ext_modules]]))
"""
    done = run([sys.executable, "-c", "import setuptools\n" + code], ROOT, MTFAST_SKIP_CUDA_BUILD="1")
    assert done.returncode == 0, done.stderr
    tag, libraries = json.loads(done.stdout.strip().split("\n")[-1])
    python = "cp" + sysconfig.get_config_var("py_version_nodot")
    assert tag == [python, python, sysconfig.get_platform().replace("-", "_")]
    assert libraries == ["mtfast/_C.abi3.so", f"mtfast/_planner{sysconfig.get_config_var('EXT_SUFFIX')}"]


def environment_of(folder: Path, **versions: str) -> Path:
    """A folder of packages: setuptools as it is here, and of each other nothing but its metadata."""
    site = Path(metadata.distribution("setuptools").locate_file(""))
    for name in ("setuptools", "_distutils_hack", "pkg_resources"):
        if (site / name).exists():
            (folder / name).symlink_to(site / name)
    for name, version in ({"setuptools": metadata.version("setuptools")} | versions).items():
        (folder / f"{name}-{version}.dist-info").mkdir()
        text = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        (folder / f"{name}-{version}.dist-info" / "METADATA").write_text(text)
    return folder


@pytest.mark.parametrize(
    ("there", "lacking"),
    [
        ({}, "torch>=2.10 (not installed), ninja>=1.11 (not installed), pybind11>=2.13 (not installed)"),
        ({"torch": "2.9.1", "ninja": "1.13.0", "pybind11": "2.13.6"}, "torch>=2.10 (2.9.1 is installed)"),
        ({"torch": "2.13.0+cpu", "pybind11": "3.0"}, "ninja>=1.11 (not installed)"),
        ({"torch": "2.13.0+cpu", "ninja": "1.13.0"}, "pybind11>=2.13 (not installed)"),
        (
            {"torch": "2.13.0", "ninja": "1.13", "pybind11": "3", "setuptools": "65.5.0"},
            "setuptools>=77 (65.5.0 is",
        ),
    ],
)
def test_a_build_that_lacks_something_says_what_and_how_to_get_it(there, lacking, tmp_path):
    """Without site-packages, and where no other ninja is on the path."""
    site = environment_of(tmp_path, **there)
    command = [sys.executable, "-S", "setup.py", "--version"]
    done = run(command, ROOT, PYTHONPATH=str(site), PATH=str(tmp_path), PYTHONDONTWRITEBYTECODE="1")
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.startswith("mtfast: the ops are compiled against torch")
    assert f" lacks {lacking}" in done.stderr
    assert "-m pip install 'setuptools>=77' 'torch>=2.10' 'ninja>=1.11' 'pybind11>=2.13'\n" in done.stderr


@pytest.fixture
def with_torch_alone(tmp_path) -> Path:
    """A folder for PYTHONPATH with which nothing that the extra `train` declares can be imported, but what
    torch itself needs."""
    of_torch = {"filelock"}
    hidden = {module: package for module, package in packages.TRAIN.items() if package not in of_torch}
    code = WITHOUT.format(hidden=set(hidden), hidden_packages=set(hidden.values()))
    (tmp_path / "sitecustomize.py").write_text(code)
    return tmp_path


def alone(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run([sys.executable, *arguments], folder, PYTHONPATH=os.pathsep.join((str(folder), str(ROOT))))


LACKING = "training needs more than the ops: {} is not installed; "


@pytest.mark.parametrize(
    "arguments", [[], ["--help"], ["run", "demo"], ["predict", "runs/demo"], ["nothing"]]
)
def test_the_command_line_with_torch_alone_says_what_to_install(arguments, with_torch_alone):
    done = alone(with_torch_alone, "-m", "mtfast", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"mtfast: {LACKING.format('tyro')}{packages.install_command('train')}\n"


def test_python_with_torch_alone_has_the_ops_and_says_what_else_needs(with_torch_alone):
    code = """
import mtfast, torch
from mtfast.ops import packed_attention
q = torch.randn(5, 2, 32)
packed_attention(q, q, q, torch.tensor([0, 2, 5], dtype=torch.int32), 3)
mtfast.Task
for statement in ("mtfast.train", "mtfast.load", "mtfast.recipes", "from mtfast import recipes",
                  "import mtfast.recipes", "from mtfast.config import RunConfig"):
    try:
        exec(statement)
    except ModuleNotFoundError as error:
        print(error.name, error)
"""
    done = alone(with_torch_alone, "-c", code)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.strip().split("\n")
    assert [line.split()[0] for line in lines] == ["numpy", "numpy", *["tyro"] * 4]
    for line in lines:
        name, _, said = line.partition(" ")
        assert said.startswith(LACKING.format(name)) and said.endswith(packages.install_command("train"))


def test_doctor_with_torch_alone_tells_the_ops_from_training(with_torch_alone):
    done = alone(with_torch_alone, "-m", "mtfast", "doctor")
    assert done.returncode == 0, done.stderr
    before, training, after = re.split(r"\nTraining .*|\nDevices\n", done.stdout)
    assert "torch" in before and "deepspeed" not in before
    assert re.search(r"packed_attention +(yes|no) +yes +yes", after)
    missing = after.partition("\nMissing\n")[2]
    if metadata.requires("mtfast") and any("train" in text for text in metadata.requires("mtfast")):
        assert re.search(r"deepspeed +not installed", training)
        assert re.search("training, but not the ops, needs .*: deepspeed, .*tyro", missing)
        assert "-m pip install 'mtfast[train]'" in missing and "the package" not in missing


def test_any_other_module_that_is_missing_keeps_its_own_error():
    for name in ("mtfast.nothing", "yaml.nothing", "of_the_users_own"):
        with (
            pytest.raises(ModuleNotFoundError, match=f"'{name}'") as raised,
            packages.explained(),
        ):
            importlib.import_module(name)
        assert not isinstance(raised.value, packages.MissingExtra)


def test_a_command_installs_the_extra_of_this_mtfast(monkeypatch, tmp_path):
    """Of one that is not installed, as on PYTHONPATH, a name would get another from an index."""
    monkeypatch.setattr(packages, "version_of", lambda name: "0.1.0")
    assert packages.install_command("train", "python -m pip") == "python -m pip install 'mtfast[train]'"
    monkeypatch.setattr(packages, "version_of", lambda name: None)
    assert packages.install_command("train").endswith(f"-e '{ROOT}[train]'")
    monkeypatch.setattr(packages, "SOURCE", tmp_path)
    assert packages.install_command("train").endswith("-e '.[train]', in a clone of mtfast")


@pytest.mark.sweep
def test_a_wheel_from_the_sdist_runs_the_ops_with_torch_and_pytest_alone(sdist, tmp_path, full_sweep):
    """In an environment of its own, which sees of this one torch, what torch needs, and pytest."""
    if not full_sweep:
        pytest.skip("compiles the ops: for MTFAST_TEST_SWEEP=full")
    pip = [sys.executable, "-m", "pip"]
    wheel = [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(sdist)]
    done = run(wheel, tmp_path, MTFAST_SKIP_CUDA_BUILD="1")
    assert done.returncode == 0, done.stderr
    (made,) = tmp_path.glob("*.whl")
    venv = tmp_path / "venv"
    run([sys.executable, "-m", "venv", "--without-pip", str(venv)], tmp_path)
    python = str(venv / "bin" / "python")
    (site,) = venv.glob("lib/python*/site-packages")
    link(("torch", "pytest"), site)
    done = run([*pip, "--python", python, "install", "--no-deps", "--no-index", str(made)], tmp_path)
    assert done.returncode == 0, done.stderr
    tests = tmp_path / "tests"
    tests.mkdir()
    for name in TESTS_OF_OPS:
        shutil.copyfile(ROOT / "tests" / name, tests / name)
    shutil.copyfile(ROOT / "pyproject.toml", tmp_path / "pyproject.toml")
    done = run([python, "-m", "pytest", "-q", "tests"], tmp_path, MTFAST_TEST_SWEEP="")
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-3000:]
    asked = "import mtfast, importlib.util; print(mtfast.__file__, importlib.util.find_spec('tyro'))"
    assert run([python, "-c", asked], tmp_path).stdout == f"{site / 'mtfast' / '__init__.py'} None\n"
    done = run([str(venv / "bin" / "mtfast"), "run", "demo"], tmp_path)
    assert done.returncode == 2 and done.stderr.endswith("is not installed; pip install 'mtfast[train]'\n")


def link(names: tuple[str, ...], site: Path) -> None:
    """Link packages that are installed here, and what they need, into another environment."""
    from packaging.requirements import Requirement

    wanted, done = list(names), set()
    while wanted:
        name = wanted.pop().lower()
        if name in done:
            continue
        done.add(name)
        found = metadata.distribution(name)
        for top in {file.parts[0] for file in found.files or ()} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(found.locate_file(top))
        for requirement in map(Requirement, found.requires or ()):
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                wanted.append(requirement.name)
