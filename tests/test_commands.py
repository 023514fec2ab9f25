"""The commands in this process, on the demo corpus: what they refuse, and what they leave behind."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import scipy.stats
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, BertModel

from mtfast import cli, commands, machine
from mtfast.commands import open_directory
from mtfast.config import ConfigError, RunConfig
from mtfast.data.demo import write_demo_corpus
from mtfast.data.tables import read_task
from mtfast.models.checkpoint import load_bert_config
from mtfast.recipes import PAPER_TASKS, demo


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_demo_corpus(tmp_path_factory.mktemp("demo"))


@pytest.fixture
def config(corpus, tmp_path) -> RunConfig:
    config = demo()
    return replace(
        config,
        run_dir=str(tmp_path / "run"),
        model=replace(config.model, checkpoint=str(corpus.bert)),
        data=replace(config.data, tasks=str(corpus.tasks), reviews=str(corpus.reviews)),
    )


def change_data(config: RunConfig, **changes) -> RunConfig:
    return replace(config, data=replace(config.data, **changes))


def with_sts_from(config: RunConfig, source: str) -> RunConfig:
    return replace(config, tasks=config.tasks | {"sts": replace(config.tasks["sts"], source=source)})


def test_prepare_records_what_became_of_every_row(config):
    commands.prepare(config)
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
        commands.prepare(change_data(config, **changes))
    assert not (config.path / "cache").exists()
    if "review_max_length" in changes:  # does not matter to the other stages
        commands.prepare(replace(change_data(config, **changes), stages=("heads", "finetune")))


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
        commands.prepare(replace(config, model=replace(config.model, checkpoint=str(tmp_path / "bert"))))


def test_what_a_later_stage_cannot_do_is_told_before_the_first(config, tmp_path):
    with pytest.raises(ConfigError, match=r"finetune\.batch_size 10 does not divide"):
        commands.prepare(replace(config, finetune=replace(config.finetune, batch_size=10, accumulation=3)))
    assert not config.path.exists()


def test_one_file_for_every_split_is_refused(config, corpus):
    path = corpus.tasks / "sts-train.csv"
    said = r"tasks\.sts\.source is one file, .*which would be training and dev data"
    with pytest.raises(ConfigError, match=said) as raised:
        commands.prepare(with_sts_from(config, str(path)))
    assert raised.value.field == "tasks.sts.source"
    commands.prepare(with_sts_from(config, str(path).replace("train", "{split}")))


@pytest.mark.parametrize("tasks", ["data/nowhere", "sts-{split}.csv"])
def test_a_missing_directory_of_the_tasks_is_not_asked_of_the_hub(config, tasks, monkeypatch):
    monkeypatch.setattr("datasets.load_dataset", None)
    with pytest.raises(ConfigError, match=rf"data\.tasks is {tasks}, which is no directory here"):
        commands.prepare(change_data(config, tasks=tasks))


def test_a_stage_does_not_come_after_one_that_builds_on_it(config):
    (open_directory(config).stage("heads") / "state").mkdir(parents=True)
    with pytest.raises(ConfigError, match="heads has begun without pretrain"):
        commands.train(config, "pretrain")


@pytest.mark.parametrize("command", [commands.evaluate, commands.predict])
def test_nothing_to_evaluate(config, command):
    with pytest.raises(ConfigError, match="holds no run with this configuration"):
        command(config)
    assert not config.path.exists()
    commands.prepare(config)
    with pytest.raises(ConfigError, match="holds no finished heads or finetune stage"):
        command(config)


def oracle(directory, tasks: dict[str, list[list[str]]]) -> dict[str, torch.Tensor]:
    """Predictions of a fine-tuned checkpoint, sentence by sentence through Hugging Face's BertModel."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    bert = BertModel.from_pretrained(directory).eval()
    heads = load_file(directory / "heads.safetensors")

    def linear(x, name):
        return x @ heads[f"heads.{name}.weight"].T + heads[f"heads.{name}.bias"]

    def cls(texts):
        with torch.no_grad():
            return torch.cat(
                [bert(**tokenizer(t, return_tensors="pt")).last_hidden_state[:, 0] for t in texts]
            )

    found = {"sst": linear(cls(tasks["sst"][0]), "task-sst.classifier").argmax(1)}
    for output, task in enumerate(("quora", "sts")):
        pair = torch.cat([cls(column) for column in tasks[task]], dim=1)
        found[task] = linear(linear(pair, "mlp-pair.mlp.dense").relu(), "mlp-pair.mlp.out_proj")[:, output]
    return found | {"quora": (found["quora"] > 0).double()}


def test_a_short_run_predicts_evaluates_and_summarises(config, corpus):
    config = replace(
        config,
        stages=("heads", "finetune"),
        heads=replace(config.heads, epochs=1),
        finetune=replace(config.finetune, epochs=1, max_steps=60),
    )
    for stage in config.stages:
        commands.train(config, stage)
    metrics = commands.evaluate(config)
    assert [path.name for path in commands.predict(config)] == [
        f"{stem}-{split}-output.csv" for split in ("dev", "test") for stem in ("sst", "para", "sts")
    ]

    columns = {"sst": "Predicted_Sentiment", "quora": "Predicted_Is_Paraphrase", "sts": "Predicted_Similiary"}
    tables = {name: read_task(name, task, corpus.tasks, "test") for name, task in PAPER_TASKS.items()}
    expected = oracle(config.path / "finetune/best-mean", {task: t.texts for task, t in tables.items()})
    dev = {}
    for task, column in columns.items():
        for split in ("dev", "test"):
            name = f"{'para' if task == 'quora' else task}-{split}-output.csv"
            header, *rows = (config.path / "predictions" / name).read_text().split("\n")[:-1]
            assert header == f"id \t {column} " and all(row.endswith(" ") for row in rows)
            ids, values = zip(*(row.split(" , ") for row in rows), strict=True)
            table = read_task(task, PAPER_TASKS[task], corpus.tasks, split)
            assert list(ids) == table.ids
            if split == "test":
                assert list(map(float, values)) == pytest.approx(expected[task].tolist(), rel=1e-4, abs=1e-4)
            else:
                dev[task] = np.array(values, dtype=float), table.labels
    sst, quora = ((dev[task][0] == dev[task][1]).mean() for task in ("sst", "quora"))
    pearson, spearman = (f(*dev["sts"]).statistic for f in (scipy.stats.pearsonr, scipy.stats.spearmanr))
    predicted, labels = dev["quora"]
    f1 = 2 * sum(predicted * labels) / (sum(predicted) + sum(labels))
    assert metrics == pytest.approx(
        {
            "sst_accuracy": sst,
            "quora_accuracy": quora,
            "quora_f1": f1,
            "sts_pearson": pearson,
            "sts_spearman": spearman,
            "mean": (sst + quora + pearson) / 3,
            "cs224n_overall": (sst + quora + (pearson + 1) / 2) / 3,
        },
        rel=1e-5,
    )

    summary = json.loads((config.path / "summary.json").read_text())
    assert summary["dev"] == metrics
    assert set(summary["stages"]) == {"heads", "finetune"}
    facts = {"seconds", "steps", "examples_per_s", "tokens_per_s", "first_loss", "last_loss"}
    facts |= {"skipped_steps", "peak_rss_bytes"} | (
        {"peak_gpu_bytes"} if torch.cuda.is_available() else set()
    )
    assert all(set(stage) == facts for stage in summary["stages"].values())
    assert summary["stages"]["finetune"]["steps"] == 60
    assert {"sst-test", "quora-train"} < set(summary["data"])
    assert summary["environment"]["device"] == machine.device_name()
    assert {"mtfast", "torch", "deepspeed", "transformers", "ranks", "threads"} < set(summary["environment"])


def test_report_of_an_experiment_of_which_one_run_is_there(tmp_path, capsys):
    (tmp_path / "with-pretraining" / "seed-0").mkdir(parents=True)
    cli.main(["report", "exp1", "--run-dir", str(tmp_path), "--seeds", "2"])
    assert capsys.readouterr().out.count("wrote ") == 2
    assert "Not run: `without pre-training`." in (tmp_path / "exp1" / "report.md").read_text()


def test_runs_that_differ_after_pre_training_share_it(config, capsys):
    short = replace(config.pretrain, max_steps=3)
    commands.execute("pretrain", "exp2", replace(config, pretrain=short))
    assert "pretrain: taken over from" in capsys.readouterr().out
    ours, theirs = (config.path / name / "seed-0" for name in ("lstm-head", "with-pretraining"))
    for name in ("pretrain/result.json", "pretrain/last/model.safetensors", "metrics.jsonl"):
        assert (ours / name).read_bytes() == (theirs / name).read_bytes()
    summaries = [json.loads((path / "summary.json").read_text()) for path in (ours, theirs)]
    assert summaries[0]["stages"] == summaries[1]["stages"] and summaries[0]["stages"]["pretrain"]
