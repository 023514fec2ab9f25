"""The package from Python: how little an import loads, and training in a notebook."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import filelock
import nbclient
import nbformat
import pytest
from patience import PATIENCE

import mtfast
from mtfast import cli
from mtfast.config import ConfigError
from mtfast.run import LAUNCHERS

HEAVY = {"torch", "transformers", "deepspeed", "datasets", "matplotlib", "scipy", "pyarrow", "pandas"}
TRAIN = """
import dataclasses, os, sys
import mtfast
before = dict(os.environ)
config = mtfast.recipes.demo()
short = dataclasses.replace(config.finetune, max_steps=4, epochs=1)
config = dataclasses.replace(config, stages=("finetune",), finetune=short, run_dir="notebook")
run = mtfast.train(config)
assert {k: v for k, v in os.environ.items() if k in ("RANK", "WORLD_SIZE", "LOCAL_RANK")} == {}
assert mtfast.train(config) == run
print("dev", run.metrics["dev"]["mean"], os.path.isfile(run.report))
"""


def python(code: str, cwd: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": str(Path(mtfast.__file__).parents[1])}
    for name in LAUNCHERS:
        environment.pop(name, None)
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize(
    ("statement", "without"),
    [
        ("import mtfast", HEAVY | {"numpy", "tyro", "yaml"}),
        ("import mtfast; mtfast.Task; mtfast.recipes.demo()", HEAVY),
        ("from mtfast import cli; cli.main(['--help'])", HEAVY),
        ("from mtfast import cli; cli.main(['run', 'demo', '--print-config'])", HEAVY),
        ("import contextlib; from mtfast import cli\n"
         "with contextlib.suppress(SystemExit): cli.main(['predict', 'demo', '--help'])", HEAVY),
    ],
)  # fmt: skip
def test_what_is_imported_only_when_it_is_needed(statement, without, tmp_path):
    printed = python(f"import sys\n{statement}\nprint('loaded', *sys.modules)", tmp_path)
    loaded = {name.split(".")[0] for name in printed.rpartition("loaded ")[2].split()}
    assert "mtfast" in loaded and not loaded & without


def losses(run_dir: Path) -> list[dict[str, float]]:
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [record["losses"] for record in records if record["kind"] == "step"]


def test_training_in_a_notebook_leaves_the_losses_of_the_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--stages", "finetune", "--finetune.max-steps", "4", "--finetune.epochs", "1"]
    cli.main(["run", "demo", *flags, "--run-dir", "command"])
    for name in LAUNCHERS:  # which the command has set in this process
        monkeypatch.delenv(name, raising=False)
    notebook = nbclient.execute(
        nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(TRAIN)]),
        cwd=str(tmp_path),
        timeout=PATIENCE,
        kernel_name="python3",
    )
    printed = "".join(output.get("text", "") for output in notebook.cells[0].outputs)
    dev = json.loads((tmp_path / "command" / "summary.json").read_text())["dev"]["mean"]
    assert f"dev {dev} True" in printed
    assert "finetune 4/4 sst" in printed and "\x1b" not in printed
    assert len(losses(tmp_path / "command")) == 4
    assert losses(tmp_path / "notebook") == losses(tmp_path / "command")


def test_a_run_stands_for_its_directory_and_nobody_holds_it_any_more(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    demo = mtfast.recipes.demo()
    finetune = replace(demo.finetune, max_steps=2, epochs=1)
    run = mtfast.train(replace(demo, stages=("finetune",), finetune=finetune, run_dir="run"))
    assert os.fspath(run) == str(tmp_path / "run")
    filelock.FileLock(tmp_path / "run" / "run.lock").acquire(timeout=0).lock.release()
    assert mtfast.load(run).predict("sst", "a fine film .").labels.shape == (1,)


def test_a_configuration_that_cannot_be_meant_is_refused_before_anything_is_written(tmp_path):
    config = replace(mtfast.recipes.demo(), run_dir=str(tmp_path / "run"), log_every=0)
    with pytest.raises(ConfigError, match="log_every is 0; it must be at least 1"):
        mtfast.train(config)
    assert not (tmp_path / "run").exists()


def test_the_public_names_are_listed_and_no_other_is_there():
    assert {"Task", "load", "recipes", "train", "__version__"} == set(mtfast.__all__) <= set(dir(mtfast))
    with pytest.raises(AttributeError, match="no attribute 'fly'"):
        mtfast.fly  # noqa: B018
    assert (Path(mtfast.__file__).parent / "py.typed").is_file()
