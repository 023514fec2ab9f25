"""Imports point down: the command line, commands, predictions and report, training, models and data, ops."""

import ast
import sys
from pathlib import Path

import pytest

import mtfast

ROOT = Path(mtfast.__file__).parent
FLOORS = {
    "machine": 0,
    "launcher": 0,
    "toolkit": 0,
    "packages": 0,
    "errors": 0,
    "hints": 0,
    "durable": 0,
    "interval": 0,
    "tasks": 1,
    "ops": 0,
    "hf": 1,
    "config": 2,
    "kinds": 2,
    "data": 2,
    "models": 3,
    "files": 3,
    "training": 4,
    "plots": 4,
    "config_file": 4,
    "recipes": 4,
    "experiments": 5,
    "predict": 5,
    "markdown": 5,
    "page": 5,
    "run_record": 5,
    "results": 6,
    "evaluate": 6,
    "comparison": 6,
    "doctor": 6,
    "report": 7,
    "comparison_report": 7,
    "model_card": 7,
    "push": 8,
    "commands": 9,
    "run": 10,
    "invocation": 10,
    "cli": 11,
}
FLOORS_OF_TRAINING = {
    "engine": 0,
    "seeds": 0,
    "stopping": 0,
    "schedule": 0,
    "run": 1,
    "prediction": 2,
    "inputs": 2,
    "stage": 1,
    "loop": 2,
    "stages": 3,
}
FILES = sorted(path for path in ROOT.rglob("*.py") if path.parent != ROOT or not path.stem.startswith("__"))
TRAINING = sorted(path for path in (ROOT / "training").rglob("*.py") if path.name != "__init__.py")


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imports_of(path: Path) -> set[str]:
    """Every module named by an import statement anywhere in the file, relative ones made absolute."""
    package = ["mtfast", *path.relative_to(ROOT).parts[:-1]] if ROOT in path.parents else []
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return names


def assert_imports_point_down(path: Path, floors: dict[str, int], above: tuple[str, ...]) -> None:
    """What the file imports of the package `above` is on a lower floor, or in its own room."""
    parts = ("mtfast", *path.relative_to(ROOT).with_suffix("").parts)
    assert parts[: len(above)] == above
    room = parts[len(above)]
    for imported in map(lambda name: tuple(name.split(".")), imports_of(path)):
        if imported[: len(above)] == above and len(imported) > len(above):
            other = imported[len(above)]
            allowed = other == room or other not in floors or floors[other] < floors[room]
            assert allowed, f"{name_of(path)} imports {'.'.join(imported)}"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_point_down(path):
    assert_imports_point_down(path, FLOORS, ("mtfast",))


@pytest.mark.parametrize("path", TRAINING, ids=name_of)
def test_imports_point_down_in_training(path):
    assert_imports_point_down(path, FLOORS_OF_TRAINING, ("mtfast", "training"))


@pytest.mark.parametrize(("floors", "directory"), [(FLOORS, ROOT), (FLOORS_OF_TRAINING, ROOT / "training")])
def test_every_room_has_its_floor(floors, directory):
    rooms = {path.stem for path in directory.glob("*.py") if not path.stem.startswith("__")}
    rooms |= {path.parent.name for path in directory.glob("*/__init__.py")}
    assert rooms == set(floors)


def test_only_the_engine_imports_deepspeed():
    using = {
        str(path.relative_to(ROOT).parent)
        for path in ROOT.rglob("*.py")
        if any(name.split(".")[0] == "deepspeed" for name in imports_of(path))
        or 'import_module("deepspeed")' in path.read_text(encoding="utf-8")
    }
    assert using == {"training/engine"}


def test_ops_import_torch_alone():
    outside = {
        name.split(".")[0]
        for path in (ROOT / "ops").glob("*.py")
        for name in imports_of(path)
        if name.split(".")[0] in ("transformers", "deepspeed", "datasets", "numpy")
    }
    assert not outside


def test_tests_of_the_ops_need_torch_and_pytest_alone():
    """They also run where there is a GPU and little else."""
    tests = Path(__file__).parent
    own = {path.stem for path in tests.glob("*.py")} | {"mtfast", "torch", "pytest"}
    ops = ("mask_tokens", "packed_attention", "concat_mlp", "bias_gelu", "dropout_add_layer_norm")
    of_ops = [name for op in ops for name in (f"test_{op}.py", f"{op}_cases.py")]
    of_ops.append("test_packed_attention_arguments.py")
    for name in ("conftest.py", "devices.py", "real_lengths.py", *of_ops):
        imported = {imported.split(".")[0] for imported in imports_of(tests / name)}
        assert imported - own <= sys.stdlib_module_names, name
