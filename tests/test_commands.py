"""The commands in this process, on the demo corpus: what they refuse, and what they leave behind."""

import json
import shutil
from dataclasses import replace

import pytest

from mtfast import cli
from mtfast.data.demo import write_demo_corpus
from mtfast.models.checkpoint import load_bert_config
from mtfast.recipes import RECIPES
from mtfast.train import run
from mtfast.train.config import ConfigError, RunConfig
from mtfast.train.rundir import RunDirectory


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_demo_corpus(tmp_path_factory.mktemp("demo"))


@pytest.fixture
def config(corpus, tmp_path) -> RunConfig:
    demo = RECIPES["demo"]()
    return replace(
        demo,
        run_dir=str(tmp_path / "run"),
        model=replace(demo.model, checkpoint=str(corpus.bert)),
        data=replace(demo.data, tasks=str(corpus.tasks), reviews=str(corpus.reviews)),
    )


def change_data(config: RunConfig, **changes) -> RunConfig:
    return replace(config, data=replace(config.data, **changes))


def test_prepare_records_what_became_of_every_row(config):
    run.prepare(config)
    data = json.loads((config.path / "summary.json").read_text())["data"]
    assert set(data) == {
        f"{task}-{split}" for task in ("sst", "quora", "sts") for split in ("train", "dev")
    } | {"reviews"}
    assert data["sts-dev"] == {"read": 200, "used": 200, "skipped": [], "truncated": 0}
    assert data["reviews"]["samples"] >= data["reviews"]["used"] == 300
    assert len(list((config.path / "cache").glob("*.arrow"))) == 7


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_length": 129}, r"data\.max_length is 129, but .*bert has positions for 128 tokens"),
        ({"review_max_length": 256}, r"data\.review_max_length is 256, but .* 128 tokens"),
    ],
)
def test_sequences_longer_than_the_models_positions_are_refused_before_anything_is_read(
    config, changes, message
):
    with pytest.raises(ConfigError, match=message):
        run.prepare(change_data(config, **changes))
    assert not (config.path / "cache").exists()
    if "review_max_length" in changes:  # does not matter to the other stages
        run.prepare(replace(change_data(config, **changes), stages=("heads", "finetune")))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [("vocab_size", 100, "word pieces, its model embeds 100"), ("type_vocab_size", 1, "has 1 token type")],
)
def test_a_checkpoint_too_small_for_its_tokenizer_or_for_pairs_is_refused(
    config, corpus, tmp_path, field, value, message
):
    shutil.copytree(corpus.bert, tmp_path / "bert")
    bert = load_bert_config(corpus.bert)
    setattr(bert, field, value)
    bert.save_pretrained(tmp_path / "bert")
    with pytest.raises(ConfigError, match=message):
        run.prepare(replace(config, model=replace(config.model, checkpoint=str(tmp_path / "bert"))))


def test_what_a_later_stage_cannot_do_is_told_before_the_first(config, tmp_path):
    with pytest.raises(ConfigError, match=r"finetune\.batch_size 10 does not divide"):
        run.prepare(replace(config, finetune=replace(config.finetune, batch_size=10, accumulation=3)))
    assert not config.path.exists()


def test_one_file_for_every_split_is_refused(config, corpus):
    path = corpus.tasks / "sts-train.csv"
    with pytest.raises(ConfigError, match=r"data\.sts is one file, .*which would be training and dev data"):
        run.prepare(change_data(config, sts=str(path)))
    run.prepare(change_data(config, sts=str(path).replace("train", "{split}")))


def test_a_stage_does_not_come_after_one_that_builds_on_it(config):
    (RunDirectory(config).stage("heads") / "state").mkdir(parents=True)
    with pytest.raises(ConfigError, match="heads has begun without pretrain"):
        run.train(config, "pretrain")


@pytest.mark.parametrize("command", [run.evaluate, run.predict])
def test_nothing_to_evaluate(config, command):
    with pytest.raises(ConfigError, match="holds no run with this configuration"):
        command(config)
    assert not config.path.exists()
    run.prepare(config)
    with pytest.raises(ConfigError, match="holds no finished heads or finetune stage"):
        command(config)


def test_report_of_an_experiment_of_which_one_run_is_there(tmp_path, capsys):
    (tmp_path / "exp1" / "with-pretraining").mkdir(parents=True)
    cli.main(["report", "exp1", "--run-dir", str(tmp_path / "exp1")])
    assert capsys.readouterr().out.count("wrote ") == 2
    assert "Not run: `without pre-training`." in (tmp_path / "exp1" / "report.md").read_text()
