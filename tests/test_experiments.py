"""An experiment over seeds, killed and continued, and what two experiments have in common."""

import json
import re
import signal
from dataclasses import replace
from pathlib import Path

import faulty
import pytest
from bert_twins import small_corpus
from processes import Ranks
from stages import demo_on

from mtfast.config import RunConfig
from mtfast.data.demo import DemoCorpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> DemoCorpus:
    return small_corpus(tmp_path_factory.mktemp("corpus"), 40)


def experiment_on(corpus: DemoCorpus, run_dir: Path, seeds: int) -> RunConfig:
    """A few steps a stage, with dropout."""
    config = demo_on(corpus, run_dir)
    few = {"epochs": 1, "max_steps": 3, "batch_size": 16}
    return replace(
        config,
        seeds=seeds,
        log_every=1,
        pretrain=replace(config.pretrain, **few),
        heads=replace(config.heads, **few),
        finetune=replace(config.finetune, **few | {"epochs": 2, "checkpoint_every": "1 step"}),
    )


def started(output: Path, *arguments) -> Ranks:
    return Ranks(faulty.run_experiment, *arguments, output=output)


def test_an_experiment_killed_in_the_middle_goes_on_to_the_same_comparison(corpus, tmp_path):
    """With three seeds; of the runs that have their results nothing is done again, for another experiment
    neither: its run with the linear head is the one with pre-training, which the LSTM head's takes over."""
    whole = experiment_on(corpus, tmp_path / "whole", 3)
    started(tmp_path, "exp1", whole).succeed()
    expected = (whole.path / "exp1" / "comparison.json").read_bytes()
    of_dev = json.loads(expected)["splits"]["dev"]
    for variant in of_dev["variants"].values():
        assert variant["seeds"] == [0, 1, 2]
        values = variant["result"]["mean"]["values"]
        assert len(set(values)) == 3 and variant["result"]["mean"]["spread"] > 0
    assert all("low" in of for of in of_dev["difference"].values())

    killed = experiment_on(corpus, tmp_path / "killed", 3)
    changes = int(whole.path.with_suffix(".changes").read_text())
    assert started(tmp_path, "exp1", killed, changes * 5 // 9).wait() == [-signal.SIGKILL]
    done = [path.parent for path in killed.path.glob("*/seed-*/outcomes")]
    assert 2 <= len(done) < 6 and not (killed.path / "exp1" / "comparison.json").exists()
    before = {path: (path / "summary.json").stat().st_mtime_ns for path in done}
    ranks = started(tmp_path, "exp1", killed)
    ranks.succeed()
    assert (killed.path / "exp1" / "comparison.json").read_bytes() == expected
    assert {path: (path / "summary.json").stat().st_mtime_ns for path in done} == before
    assert len(re.findall("has its results", ranks.stdout())) == len(done)

    ranks = started(tmp_path, "exp2", replace(killed, seeds=1))
    ranks.succeed()
    shared = killed.path / "with-pretraining" / "seed-0"
    said = ranks.stdout()
    assert f"{shared} has its results" in said and f"pretrain: taken over from {shared}" in said
    heads = json.loads((killed.path / "exp2" / "comparison.json").read_text())["splits"]["dev"]["variants"]
    linear, lstm = (heads[name]["result"]["mean"] for name in ("linear head", "LSTM head"))
    trained = of_dev["variants"]["with pre-training"]["result"]["mean"]["values"]
    assert linear["values"] == trained[:1] and lstm["values"][0] not in trained


def test_an_experiment_on_two_ranks(corpus, tmp_path):
    config = experiment_on(corpus, tmp_path / "run", 1)
    Ranks(faulty.run_experiment, "exp1", config, output=tmp_path, world_size=2).succeed()
    assert (config.path / "exp1" / "comparison.json").is_file()
