"""Files of a run that are flipped, cut or gone: what each says, or how it is made up for."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import faulty
import numpy as np
import pytest
import yaml
from small_run import configure, finetuned_run, heads_run
from test_states import flip, truncate

import mtfast
from mtfast.commands import open_directory
from mtfast.config import ConfigError, RunConfig, to_dict
from mtfast.config_file import read_config_file
from mtfast.data import cache
from mtfast.models.checkpoint import CheckpointError
from mtfast.push import push
from mtfast.recipes import RECIPES
from mtfast.training.engine import engine
from mtfast.training.engine.state import states_in
from mtfast.training.run.directory import METRICS
from mtfast.training.run.lock import release
from mtfast.training.run.weights import best_weights, find_weights
from mtfast.training.stopping import Stopped

SPOILS = (flip, truncate, Path.unlink)


@pytest.fixture(autouse=True)
def opened_anew():
    engine.start()
    yield
    release()


def config_of(run: Path) -> RunConfig:
    return replace(read_config_file(run / "config.yaml", RECIPES).config, run_dir=str(run))


def finish(run: Path, *stages: str) -> None:
    """As the stages do."""
    directory = open_directory(config_of(run))
    for stage in stages:
        directory.finish_stage(stage, {"summary": {}, "best": {}})


@pytest.fixture(scope="module")
def finetuned(tmp_path_factory) -> Path:
    run = finetuned_run(tmp_path_factory.mktemp("finetuned") / "run")
    engine.start()
    finish(run, "finetune")
    release()
    return run


@pytest.fixture(scope="module")
def heads(tmp_path_factory) -> Path:
    run = heads_run(tmp_path_factory.mktemp("heads") / "run")
    engine.start()
    finish(run, "pretrain", "heads")
    release()
    return run


@pytest.mark.parametrize("file", ["state.safetensors", "best-quora/weights.safetensors"])
def test_a_run_whose_newest_state_is_damaged_makes_the_steps_since_the_one_before_again(
    file, tmp_path, capsys
):
    """Its best weights become those of then, too."""
    faulty.train_small(tmp_path / "whole")
    with pytest.raises(Stopped):
        faulty.train_small(tmp_path / "run", stop=11)
    before, newest = states_in(tmp_path / "run/finetune/state")
    assert (before.name, newest.name) == ("step-9", "step-11")
    flip(newest / file)
    capsys.readouterr()
    faulty.train_small(tmp_path / "run")
    said = capsys.readouterr().out
    assert (
        f"{newest / file} is damaged: its checksum is not the recorded one; going on from {before}\n" in said
    )
    assert faulty.left_by(tmp_path / "run") == faulty.left_by(tmp_path / "whole")


@pytest.mark.parametrize("spoil", SPOILS, ids=lambda spoil: spoil.__name__)
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "mtfast.json"])
def test_damaged_weights_of_a_finished_run_are_named_where_they_are_used(name, spoil, finetuned, tmp_path):
    run = shutil.copytree(finetuned, tmp_path / "run")
    config = config_of(run)
    best_weights(config.model, open_directory(config), config.seed)
    spoil(run / "finetune/best-mean" / name)
    says = rf"{run}/finetune/best-mean/{name} .*; put it back from a copy, or remove {run}/finetune to run"
    with pytest.raises(CheckpointError, match=says):
        mtfast.load(run)
    with pytest.raises(CheckpointError, match=says):
        push(run, "me/model", upload=False)
    with pytest.raises(CheckpointError, match=says):
        best_weights(config.model, open_directory(config), config.seed)


@pytest.mark.parametrize("file", ["pretrain/last/model.safetensors", "heads/best-mean/heads.safetensors"])
def test_damaged_weights_of_a_stage_are_named_before_another_builds_on_them(file, heads, tmp_path):
    run = shutil.copytree(heads, tmp_path / "run")
    config = config_of(run)
    find_weights(config.model, open_directory(config), config.seed)
    flip(run / file)
    with pytest.raises(CheckpointError, match=rf"{run}/{file} is damaged: its checksum is not the recorded"):
        find_weights(config.model, open_directory(config), config.seed)


@pytest.mark.parametrize("spoil", [flip, truncate], ids=["flip", "truncate"])
@pytest.mark.parametrize(
    ("file", "says"),
    [
        ("finetune/result.json", "cannot be read .*; remove .*/finetune to run the stage again"),
        ("summary.json", "cannot be read .*; remove it, and the run goes on without it"),
    ],
)
def test_a_damaged_record_is_named(file, says, spoil, finetuned, tmp_path):
    run = shutil.copytree(finetuned, tmp_path / "run")
    spoil(run / file)
    config = config_of(run)
    with pytest.raises(ConfigError, match=f"{run}/{file} {says}"):
        best_weights(config.model, open_directory(config), config.seed)


def cut(file: Path) -> None:
    """Leave off the end of a YAML file, from the middle of its last name on."""
    text = file.read_text()
    file.write_text(text[: text.rindex(":") - 2])


@pytest.mark.parametrize("spoil", [cut, Path.unlink], ids=["cut", "unlink"])
def test_a_damaged_configuration_is_written_anew_by_the_command_that_the_run_was_begun_with(
    spoil, tmp_path, capsys
):
    config = configure(tmp_path / "run")
    open_directory(config).stage("heads").mkdir()
    release()
    file = tmp_path / "run" / "config.yaml"
    spoil(file)
    open_directory(config)
    assert f"{file} was damaged and is written anew" in capsys.readouterr().out
    assert yaml.safe_load(file.read_text()) == to_dict(config)


def test_a_configuration_changed_on_the_disk_is_a_change_like_any_other(tmp_path):
    config = configure(tmp_path / "run")
    open_directory(config).stage("heads").mkdir()
    release()
    file = tmp_path / "run" / "config.yaml"
    file.write_text(file.read_text().replace("seed: 3", "seed: 2"))
    changed = read_config_file(file, RECIPES).config
    with pytest.raises(ConfigError, match=r"seed: 3 there, 2 here"):
        open_directory(replace(changed, run_dir=config.run_dir))


def test_damaged_lines_of_metrics_are_told_and_one_that_was_being_written_is_not(tmp_path, capsys):
    run = open_directory(configure(tmp_path / "run"))
    run.append([{"stage": "heads", "step": step} for step in range(1, 6)])
    metrics = run.path / METRICS
    metrics.write_text(metrics.read_text() + '{"stage": "he')
    run.rewind("heads", 5)
    assert "damaged" not in capsys.readouterr().out
    metrics.write_text(metrics.read_text().replace('"step": 2}', '"step": 2'))
    run.rewind("heads", 5)
    assert f"{metrics}: 1 damaged line(s) are left out" in capsys.readouterr().out
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()] == [1, 3, 4, 5]


def test_a_clock_that_is_set_back_costs_no_cached_data(tmp_path, monkeypatch):
    """What was written last is the oldest by the clock."""

    def made(key: str) -> np.ndarray:
        arrays, _ = cache.cached(tmp_path, "sst", key * 16, lambda: ({"x": np.arange(3)}, {}))
        return arrays["x"]

    for key in "abcd":
        made(key)
    ahead = 4_000_000_000
    for file in tmp_path.glob("*.arrow"):
        cache.os.utime(file, (ahead, ahead))
    assert made("e").tolist() == [0, 1, 2] and made("e").tolist() == [0, 1, 2]
    assert len(list(tmp_path.glob("*.arrow"))) == cache.KEPT
