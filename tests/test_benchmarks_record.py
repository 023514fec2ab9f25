"""Runs recorded as results: what the file says, and what is refused."""

import json
import os
import shutil
import subprocess
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from recorded_runs import labels_of, predicted, write_results

from benchmarks import common, record, record_experiment, report
from mtfast import comparison
from mtfast.config import to_dict
from mtfast.experiments import ALL_RECIPES, runs_of
from mtfast.files import to_yaml


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A git repository in place of this one's, with one commit of code."""
    root = tmp_path / "repository"
    for name in ("mtfast/loop.py", "benchmarks/results/old.csv", "README.md"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("as committed\n")
    monkeypatch.setattr(common, "SOURCES", root)
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):
        monkeypatch.delenv(name, raising=False)
    for who in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{who}_NAME", "a")
        monkeypatch.setenv(f"GIT_{who}_EMAIL", "a@example.org")
    subprocess.run(["git", "init", "-q", str(root)], check=True)
    commit(root, 1_000_000_000)
    return root


def commit(root, seconds):
    dates = {"GIT_AUTHOR_DATE": f"@{seconds} +0000", "GIT_COMMITTER_DATE": f"@{seconds} +0000"}
    git = ["git", "-C", str(root)]
    subprocess.run([*git, "add", "-A"], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "x"], check=True, env={**os.environ, **dates})


@pytest.fixture
def run_dir(tmp_path):
    """A finished run that began at 1,100,000,000 seconds."""
    directory = tmp_path / "run"
    directory.mkdir()
    stage = {"seconds": 10.0, "steps": 3}
    dev = {"sst_accuracy": 0.4, "quora_accuracy": 0.7, "sts_pearson": 0.6}
    made_by = {"torch": torch.__version__, "device": record.device_name(), "threads": 7}
    config = {
        "seed": 3,
        "stages": ["heads", "finetune"],
        "engine": {"precision": "bf16"},
        "tasks": {
            "sst": {"kind": "classification", "source": "/home/somebody/data/sst", "weight": 0.5},
            "quora": {"kind": "binary", "source": None, "pair_input": "joint"},
            "sts": {"kind": "regression", "source": None, "title": "STS"},
        },
        "model": {"checkpoint": "/home/somebody/checkpoints/bert-small", "dropout_p": 0.1},
        "heads": {"epochs": 48},
        "finetune": {"epochs": 3},
        "pretrain": {"epochs": 5},
        "data": {"tasks": "/home/somebody/data"},
    }
    summary = {"environment": made_by, "stages": {"heads": stage, "finetune": stage}, "dev": dev}
    (directory / "summary.json").write_text(json.dumps(summary))
    (directory / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    os.utime(directory / "config.yaml", (1_100_000_000, 1_100_000_000))
    return directory


cpu_only = pytest.mark.skipif(torch.cuda.is_available(), reason="the run is one of a machine without a GPU")


@cpu_only
def test_a_run_is_recorded_with_its_commit_and_without_paths(repository, run_dir, tmp_path, monkeypatch):
    (repository / "benchmarks" / "results" / "old.csv").write_text("measured again\n")
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    assert record.main([str(run_dir), "small"]) == 0
    text = (tmp_path / "run-small.json").read_text()
    result = json.loads(text)
    head = subprocess.run(
        ["git", "-C", str(repository), "describe", "--always"], capture_output=True, text=True, check=True
    )
    assert result["commit"] == head.stdout.strip()
    assert result["environment"]["threads"] == 7 and result["environment"]["device"].startswith(
        record.device_name()
    )
    assert result["checkpoint"] == "checkpoints/bert-small" and "somebody" not in text
    assert result["config"]["finetune"] == {"epochs": 3} and "pretrain" not in result["config"]
    assert result["config"]["model"] == {"checkpoint": "checkpoints/bert-small", "dropout_p": 0.1}
    assert result["config"]["tasks"] == {
        "sst": {"kind": "classification", "source": "data/sst", "weight": 0.5},
        "quora": {"kind": "binary", "source": None, "pair_input": "joint"},
        "sts": {"kind": "regression", "source": None, "title": "STS"},
    }
    table = report.render("<!-- results: runs -->\n<!-- end -->", tmp_path)
    assert "| run | sst | quora | STS | pretrain s |" in table
    assert "| run-small | 0.400 | 0.700 | 0.600 | - | 10 | 10 |" in table


def test_runs_of_other_tasks_and_of_before_tasks_were_declared_have_their_columns(tmp_path):
    common = {"environment": {"device": "x", "threads": 1}, "stages": {}, "commit": "abc1234"}
    tasks = {"imdb": {"kind": "binary", "metric": "f1"}, "sts": {"kind": "regression", "title": "STS"}}
    dev = {"imdb_accuracy": 0.9, "imdb_f1": 0.8, "sts_pearson": 0.6}
    runs = {
        "run-other": {"dev": dev, "config": {"tasks": tasks}, **common},
        "run-before": {"dev": {"sst_accuracy": 0.4, "quora_accuracy": 0.7, "sts_pearson": 0.5}, "config": {}}
        | common,
    }
    for name, run in runs.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(run))
    table = report.render("<!-- results: runs -->\n<!-- end -->", tmp_path)
    assert "| run | SST | Quora | STS | imdb | pretrain s |" in table
    assert "| run-before | 0.400 | 0.700 | 0.500 | - | - | - | - | x, 1 thread | abc1234 |" in table
    assert "| run-other | - | - | 0.600 | 0.800 | - | - | - | x, 1 thread | abc1234 |" in table
    alone = report.render("<!-- results: runs run-other -->\n<!-- end -->", tmp_path)
    assert "| run | imdb | STS | pretrain s |" in alone and "run-before" not in alone


@cpu_only
@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda root, run: (root / "mtfast" / "loop.py").write_text("edited\n"), "mtfast/loop.py"),
        (lambda root, run: change_summary(run, stages={"heads": {}}), "no result of finetune"),
        (lambda root, run: change_summary(run, dev=None), "no dev metrics"),
        (
            lambda root, run: change_summary(run, environment={"torch": "1.0", "device": "x"}),
            "torch was 1.0, here",
        ),
        (lambda root, run: (run / "summary.json").unlink(), "summary.json does not exist"),
        (lambda root, run: later_commit(root, "mtfast/loop.py"), "the run began before commit"),
    ],
)
def test_a_run_that_is_not_known_to_be_of_this_commit_is_refused(spoil, reason, repository, run_dir):
    record.record(run_dir)
    spoil(repository, run_dir)
    with pytest.raises(record.RecordError, match=reason):
        record.record(run_dir)


@cpu_only
@pytest.mark.parametrize("file", ["README.md", "mtfast/report.py"])
def test_a_later_commit_that_leaves_the_code_alone_is_no_matter(file, repository, run_dir):
    later_commit(repository, file)
    record.record(run_dir)


def change_summary(run, **entries):
    path = run / "summary.json"
    summary = {**json.loads(path.read_text()), **entries}
    path.write_text(json.dumps({key: value for key, value in summary.items() if value is not None}))


def later_commit(root, name):
    (root / name).write_text("changed later\n")
    commit(root, 1_200_000_000)


def test_results_do_not_make_the_commit_dirty_but_code_does(repository, monkeypatch):
    (repository / "benchmarks" / "results" / "old.csv").write_text("measured again\n")
    assert "dirty" not in common.commit()
    (repository / "README.md").write_text("edited\n")
    assert common.commit().endswith("-dirty")
    monkeypatch.setattr(common, "SOURCES", repository / "nowhere")
    monkeypatch.setenv("MTFAST_COMMIT", "abc1234")
    assert common.commit() == "abc1234"


@pytest.fixture
def experiment(tmp_path):
    """exp1 with two seeds, whose runs began at 1,100,000,000 seconds."""
    random = np.random.default_rng(0)
    labels = labels_of(random)
    config = replace(ALL_RECIPES["exp1"](), run_dir=str(tmp_path), seeds=2)
    stage = {"seconds": 1800.0, "steps": 3, "last_loss": 0.1}
    for of_variant in runs_of("exp1", config).values():
        for run in of_variant:
            summary = {
                "environment": {"torch": "2.0", "device": f"device {run.seed}", "threads": 1},
                "stages": {name: stage for name in run.stages},
                "data": {"quora-train": {"used": 16000}},
            }
            quality = 0.4 + 0.2 * ("pretrain" in run.stages)
            write_results(run.path, run, predicted(labels, random, quality), labels, **summary)
            os.utime(run.path / "config.yaml", (1_100_000_000, 1_100_000_000))
    directory = tmp_path / "exp1"
    directory.mkdir()
    (directory / "config.yaml").write_text(to_yaml({"recipe": "exp1", **to_dict(config)}))
    return directory


@pytest.fixture
def few_draws(monkeypatch):
    monkeypatch.setattr(comparison, "RESAMPLES", 100)


@pytest.mark.usefixtures("few_draws")
def test_an_experiment_is_recorded_with_all_its_runs(repository, experiment, tmp_path, monkeypatch):
    later_commit(repository, "mtfast/loop.py")
    later_commit(repository, "mtfast/report.py")
    late = experiment.parent / "with-pretraining" / "seed-1" / "config.yaml"
    os.utime(late, (1_300_000_000, 1_300_000_000))
    for name in ("RESULTS", "DOCS"):
        monkeypatch.setattr(record_experiment, name, tmp_path)
    assert record_experiment.main([str(experiment), "small", "--command", "mtfast run small.yaml"]) == 0
    text = (tmp_path / "experiment-small.json").read_text()
    result = json.loads(text)
    assert result["command"] == "mtfast run small.yaml" and result["rows"] == {"quora-train": 16000}
    assert str(tmp_path) not in text and (tmp_path / "small.png").stat().st_size > 10_000
    assert [run["seed"] for run in result["runs"]["with pre-training"]] == [0, 1]
    table = report.render("<!-- results: experiment small -->\n<!-- end -->", tmp_path)
    log = ["git", "-C", str(repository), "log", "--format=%h", "--", "mtfast/loop.py"]
    changed, first = subprocess.run(log, capture_output=True, text=True, check=True).stdout.split()
    made = f"device 0, 1 thread, torch 2.0; device 1, 1 thread, torch 2.0; commit {first} and {changed}"
    assert f"\n4 runs, 5.0 hours in all; {made}:" in table
    variants = result["comparison"]["splits"]["dev"]["variants"]
    found = variants["with pre-training"]["result"]["sst_accuracy"]
    shown = f"| Ours (dev): with pre-training | {found['mean']:.3f} ± {found['spread']:.3f} |"
    assert shown in table and "| Paper (test): with pre-training | 0.549 |" in table
    none = report.render("<!-- results: experiment other -->\n<!-- end -->", tmp_path)
    assert "\nnot measured\n" in none


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (
            lambda root, runs: os.utime(runs / "seed-1" / "config.yaml", (999_999_999, 999_999_999)),
            "seed-1 began before there was a commit",
        ),
        (lambda root, runs: change_summary(runs / "seed-1", dev=None), "seed-1 has no dev metrics"),
        (lambda root, runs: shutil.rmtree(runs / "seed-1"), "seed-1 holds no run; continue the experiment"),
    ],
)
def test_an_unfinished_experiment_is_not_recorded(spoil, reason, repository, experiment, capsys):
    spoil(repository, experiment.parent / "with-pretraining")
    assert record_experiment.main([str(experiment), "small", "--command", "x"]) == 1
    said = capsys.readouterr().out
    assert said.startswith("not recorded: ") and reason in said
