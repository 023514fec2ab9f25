"""The monitors of a DeepSpeed JSON show all losses, rates and dev metrics, by the samples trained on."""

import collections
import csv
import json
import os
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
from bert_twins import small_corpus
from curves import Curves, curves_of, curves_of_rows, logged, read_events, records_of, rounded
from processes import Ranks
from stages import demo_on

import mtfast
from mtfast import commands
from mtfast.config import EngineConfig, RunConfig


def train_monitored(config: RunConfig) -> None:
    """Train in this process, which W&B has to itself; what comet is told is written to comet.json."""
    told = []

    class Experiment:
        """comet_ml's, as far as DeepSpeed uses it."""

        def __internal_api__log_metric__(self, *, name, value, step):
            told.append((name, step, value))

    comet = types.ModuleType("comet_ml")
    comet.start = lambda **_: Experiment()
    comet.__version__ = "3.50.0"
    comet.__spec__ = types.SimpleNamespace(origin="comet_ml")
    sys.modules["comet_ml"] = comet
    directory = config.path.parent
    os.environ |= {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_DIR": str(directory)}
    commands._report = lambda *_: None  # plots take seconds
    mtfast.train(config)
    (directory / "comet.json").write_text(json.dumps(told))


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> RunConfig:
    """A run of all stages, every monitor's files beside it."""
    directory = tmp_path_factory.mktemp("monitored")
    corpus = small_corpus(directory / "corpus", 40)
    given = {
        "tensorboard": {"enabled": True, "output_path": str(directory / "events"), "job_name": "job"},
        "csv_monitor": {"enabled": True, "output_path": str(directory / "csv"), "job_name": "job"},
        "wandb": {"enabled": True, "project": "of the JSON"},
        "comet": {"enabled": True, "samples_log_interval": 0},
    }
    (directory / "ds.json").write_text(json.dumps(given))
    config = demo_on(corpus, directory / "run")
    few = {name: replace(config.stage(name), batch_size=40, epochs=2, max_steps=4) for name in config.stages}
    engine = EngineConfig(precision="fp32", deepspeed_config=str(directory / "ds.json"))
    config = replace(config, engine=engine, **few)
    Ranks(train_monitored, config, output=directory / "said").succeed()
    return config


@pytest.fixture(scope="module")
def wanted(run) -> Curves:
    """By samples instead of steps."""
    curves = curves_of(records_of(run.path))
    assert {"pretrain/loss/mlm", "heads/dev/sts_pearson", "finetune/tokens_per_s"} < curves.keys()
    return {
        tag: [(step * run.stage(tag.split("/")[0]).batch_size, value) for step, value in values]
        for tag, values in curves.items()
    }


def own(curves: Curves) -> Curves:
    """Without what DeepSpeed itself tells."""
    return {tag: values for tag, values in curves.items() if not tag.startswith("Train/")}


def test_tensorboard_has_everything(run, wanted):
    found = read_events(run.path.parent / "events" / "job")
    assert own(found) == rounded(wanted)
    assert "Train/Samples/lr" in found


def test_csv_files_have_everything(run, wanted):
    directory = run.path.parent / "csv" / "job"
    for tag, values in wanted.items():
        with (directory / f"{tag.replace('/', '_')}.csv").open() as file:
            header, *rows = csv.reader(file)
        assert header == ["step", tag.split("/")[-1]]
        assert [(int(step), float(value)) for step, value in rows] == values


def test_wandb_has_a_run_with_everything_for_each_stage(run, wanted):
    found: Curves = {}
    files = list((run.path.parent / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 3
    for file in files:
        rows = []
        for record in logged(file):
            if record.HasField("history"):
                items = record.history.item
                row = {x.key or "/".join(x.nested_key): json.loads(x.value_json) for x in items}
                rows.append(row | {"samples/step": row["_step"]})
        curves = own(curves_of_rows(rows))
        assert len({tag.split("/")[0] for tag in curves}) == 1
        found |= curves
    assert found == wanted


def test_comet_is_told_everything(run, wanted):
    found: Curves = collections.defaultdict(list)
    for name, step, value in json.loads((run.path.parent / "comet.json").read_text()):
        found[name].append((step, value))
    assert own(found) == wanted


def test_the_configuration_is_kept_apart(run):
    assert not (Path(run.run_dir) / "wandb").exists()
