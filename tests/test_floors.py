"""Imports point down: the command line, recipes and report, train, models and data, ops."""

import ast
import sys
from pathlib import Path

import pytest

import mtfast

ROOT = Path(mtfast.__file__).parent
FLOORS = {
    "machine": 0,
    "toolkit": 0,
    "ops": 0,
    "models": 1,
    "data": 1,
    "train": 2,
    "plots": 2,
    "recipes": 3,
    "report": 3,
    "doctor": 3,
    "cli": 4,
}
FILES = sorted(path for path in ROOT.rglob("*.py") if path.parent != ROOT or path.stem in FLOORS)


def room_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


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


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path):
    room = room_of(path)
    for name in imports_of(path):
        parts = name.split(".")
        if parts[0] != "mtfast" or len(parts) < 2 or parts[1] == room or parts[1] not in FLOORS:
            continue
        assert FLOORS[parts[1]] < FLOORS[room], f"{path.relative_to(ROOT)} imports {name}"


def test_only_the_engine_imports_deepspeed():
    using = {
        str(path.relative_to(ROOT))
        for path in ROOT.rglob("*.py")
        if any(name.split(".")[0] == "deepspeed" for name in imports_of(path))
        or 'import_module("deepspeed")' in path.read_text(encoding="utf-8")
    }
    assert using == {"train/engine.py"}


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
    ops = ("mask_tokens", "packed_attention", "concat_mlp")
    of_ops = [name for op in ops for name in (f"test_{op}.py", f"{op}_cases.py")]
    for name in ("conftest.py", "devices.py", "real_lengths.py", *of_ops):
        imported = {imported.split(".")[0] for imported in imports_of(tests / name)}
        assert imported - own <= sys.stdlib_module_names, name
