"""A run's directory: one process at a time in it, and what is said of damaged files and full disks."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from patience import PATIENCE
from poison import Small
from states import load_state, save_state
from torch import nn

import mtfast
from mtfast.commands import open_directory
from mtfast.config import ConfigError, EngineConfig, RunConfig, TaskStageConfig, to_dict
from mtfast.files import to_yaml
from mtfast.models.checkpoint import CheckpointError
from mtfast.recipes import paper
from mtfast.report import read_run
from mtfast.training.engine import engine as engine_module
from mtfast.training.engine.engine import Engine
from mtfast.training.loop import train_stage
from mtfast.training.stages import features

HOLD = """
import sys, time
from pathlib import Path
from mtfast.training.run.lock import hold
hold(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture
def config(tmp_path) -> RunConfig:
    return replace(paper(), run_dir=str(tmp_path / "run"))


@pytest.fixture
def engine():
    engine_module.start()
    made = Engine(
        nn.Linear(64, 64), EngineConfig(precision="fp32", zero_stage=1), TaskStageConfig(), "finetune"
    )
    yield made
    made.close()


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Writing more to a file fails as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_tasks_in_another_order_are_another_configuration(config):
    open_directory(config).append([{"stage": "heads", "step": 1}])
    with pytest.raises(
        ConfigError, match=r"tasks: \['sst', 'quora', 'sts'\] there, \['sts', 'quora', 'sst'\] here"
    ):
        open_directory(replace(config, tasks=dict(reversed(config.tasks.items()))))


def test_a_second_process_is_refused_until_the_first_is_gone(config):
    run = open_directory(config)
    other = replace(config, run_dir=f"{config.run_dir}-2")
    for _ in range(2):  # one process may open a directory again, and others beside it
        assert open_directory(config).path == run.path and open_directory(other)

    directory = Path(f"{config.run_dir}-3")
    python = {**os.environ, "PYTHONPATH": str(Path(mtfast.__file__).parents[1])}
    command = [sys.executable, "-c", HOLD]
    refused = subprocess.run(
        [*command, config.run_dir], env=python, capture_output=True, text=True, timeout=PATIENCE
    )
    assert (
        refused.returncode
        and f"ConfigError: {run.path} is in use by process {os.getpid()} " in refused.stderr
    )
    holder = subprocess.Popen([*command, str(directory)], env=python, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    third = replace(config, run_dir=str(directory))
    says = (
        rf"-3 is in use by process {holder.pid} on \S+ since \d{{4}}-\S+ \S+ \(.*python.*run-3\); wait for it"
    )
    with pytest.raises(ConfigError, match=f"(?s){says}"):
        open_directory(third)
    assert not (directory / "config.yaml").exists()
    read_run(directory)  # a report only reads
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    open_directory(third).append([{"stage": "heads", "step": 1}])
    assert json.loads((directory / "run.lock.json").read_text())["pid"] == os.getpid()


def test_a_directory_that_is_refused_gets_no_lock(config):
    config.path.mkdir()
    (config.path / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(ConfigError, match=r"no config\.yaml"):
        open_directory(config)
    assert [path.name for path in config.path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"best": 3}', '{"summary": []}'])
def test_a_result_that_cannot_be_read_is_named(config, tmp_path, text):
    run = open_directory(config)
    run.stage("heads").mkdir()
    (run.stage("heads") / "result.json").write_text(text)
    says = r"run/heads/result\.json .*; remove \S*run/heads to run the stage again"
    with pytest.raises(ConfigError, match=says):
        run.result("heads")
    other = open_directory(replace(config, run_dir=str(tmp_path / "other")))
    with pytest.raises(ConfigError, match=says):
        other.take_over("heads", run.path)
    assert not other.stage("heads").exists()


@pytest.mark.parametrize("text", ["", '{"a": ', "[1]"])
def test_a_summary_that_cannot_be_read_is_named(config, text):
    run = open_directory(config)
    (run.path / "summary.json").write_text(text)
    for read in (lambda: run.summarize(a=1), lambda: read_run(run.path)):
        with pytest.raises(
            ConfigError, match=r"run/summary\.json .*; remove it, and the run goes on without it"
        ):
            read()
    (run.path / "summary.json").unlink()
    assert run.summarize(a=1) == {"a": 1}


@pytest.mark.parametrize("text", [b"", b"a: [", b"\xff", b"- 1", None, b"1: 2\ntasks: 3"])
def test_a_configuration_that_cannot_be_read_is_named(config, text):
    open_directory(config).append([{"stage": "heads", "step": 1}])
    owned = config.path / "config.yaml"
    owned.unlink()
    (config.path / "summary.json").unlink()  # which would tell it too
    if text is None:
        owned.mkdir()
    else:
        owned.write_bytes(text)
    with pytest.raises(ConfigError, match=r"(?si)run\b.*choose another --run-dir, or remove that directory"):
        open_directory(config)


def test_a_run_of_an_earlier_version_without_tasks_is_told_so(config):
    earlier = to_dict(config)
    del earlier["tasks"]
    config.path.mkdir()
    (config.path / "config.yaml").write_text(to_yaml(earlier))
    says = "run of an earlier mtfast, .*; go on with that version, or choose another --run-dir$"
    with pytest.raises(ConfigError, match=f"{config.path} belongs to a {says}"):
        open_directory(config)
    assert [path.name for path in config.path.iterdir()] == ["config.yaml"]


def test_lines_of_metrics_that_are_no_records_are_left_out(config, tmp_path):
    run = open_directory(config)
    run.append([{"stage": "heads", "step": 1}, {"stage": "heads", "step": 2}])
    metrics = run.path / "metrics.jsonl"
    metrics.write_bytes(b'3\n{"stage": "heads"}\n\xff\x00\n' + metrics.read_bytes() + b'{"stage": "he')
    run.stage("heads").mkdir()
    run.finish_stage("heads", {"summary": {}})
    other = open_directory(replace(config, run_dir=str(tmp_path / "other")))
    assert other.take_over("heads", run.path)
    run.rewind("heads", 1)
    assert metrics.read_text() == '{"stage": "heads", "step": 1}\n'
    assert (other.path / "metrics.jsonl").read_text().count("\n") == 2


def test_a_full_disk_is_told_with_the_files_name(config):
    run = open_directory(config)
    run.summarize(a=1)
    with file_size_limit(1000):
        for write, name in (
            (lambda: run.append([{"stage": "heads", "step": 1, "text": "x" * 2000}]), "metrics.jsonl"),
            (lambda: run.summarize(b="x" * 2000), "summary.json"),
        ):
            with pytest.raises(OSError, match="File too large") as raised:
                write()
            assert raised.value.filename == str(run.path / name)
    assert run.summarize()["a"] == 1 and "b" not in run.summarize() and not list(run.path.glob("*.partial"))


def test_a_state_on_a_full_disk_says_so_and_the_one_before_is_kept(tmp_path, engine):
    save_state(engine, tmp_path, 1, {"position": 1})
    says = rf"could not be written: {tmp_path}/step-2 cannot be written: .*File too large"
    with file_size_limit(1000), pytest.raises(CheckpointError, match=says):
        save_state(engine, tmp_path, 2, {"position": 2})
    assert load_state(engine, tmp_path) == {"position": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]


def test_a_state_of_another_version_is_named(config, tmp_path):
    engine_module.start()
    config = replace(config, engine=EngineConfig(precision="fp32", zero_stage=0))
    stage = Small(config)
    run = open_directory(config)
    state = run.stage("finetune") / "state"
    save_state(stage.engine, state, 1, {"place": 1})
    with pytest.raises(CheckpointError, match=rf"{state}/step-1 cannot be gone on from .*'place'.*; remove"):
        train_stage(stage, run, config.log_every)
    # As DeepSpeed wrote it.
    shutil.rmtree(state / "step-1")
    (state / "step-1").mkdir()
    (state / "step-1" / "mp_rank_00_model_states.pt").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"manifest\.json is missing: .* of another version of mtf"):
        train_stage(stage, run, config.log_every)
    stage.engine.close()


def test_a_table_in_a_file_has_its_room_on_the_disk_before_it_is_filled(tmp_path, monkeypatch):
    monkeypatch.setattr(features, "room", lambda device: 0)
    heights, device = {"cls": 1000}, torch.device("cpu")
    table = features._allocate(heights, 64, torch.float32, device, tmp_path)["cls"]
    assert table.shape == (1000, 64) and not table.any()
    assert (tmp_path / "cls-0.bin").stat().st_blocks * 512 >= 1000 * 64 * 4
    with file_size_limit(1000), pytest.raises(OSError, match="File too large") as raised:
        features._allocate(heights, 64, torch.float32, device, tmp_path)
    assert raised.value.filename == str(tmp_path / "cls-0.bin")
