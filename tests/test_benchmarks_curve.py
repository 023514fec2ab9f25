"""What pre-training does, step by step: each point is of the encoder after its steps, and is made once."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from bert_twins import small_corpus
from safetensors.torch import load_file
from transformers import AutoTokenizer, BertConfig, BertForPreTraining

from benchmarks import pretraining_curve, report
from mtfast import commands

ROWS = 40


@pytest.fixture
def corpus(tmp_path):
    """With random weights beside its BERT's configuration."""
    corpus = small_corpus(tmp_path / "corpus", ROWS)
    BertForPreTraining(BertConfig.from_pretrained(corpus.bert)).save_pretrained(tmp_path / "bert")
    AutoTokenizer.from_pretrained(corpus.bert).save_pretrained(tmp_path / "bert")
    return replace(corpus, bert=tmp_path / "bert")


def test_a_point_is_of_the_encoder_after_its_steps(corpus, tmp_path, monkeypatch):
    def small(*arguments):
        base = original(*arguments)
        data = replace(base.data, reviews=str(corpus.reviews))
        return replace(base, data=data, pretrain=replace(base.pretrain, batch_size=8))

    def dev_metrics(run):
        """Other figures for each encoder, task and seed."""
        asked.append((Path(run.model.checkpoint).name, run.stages, list(run.tasks), run.seed))
        weights = load_file(Path(run.model.checkpoint) / "model.safetensors")
        drawn = float(sum(x.double().sum() for name, x in weights.items() if "layer.1" in name)) % 1
        return {"sst_accuracy": drawn / (1 + run.seed), "sts_pearson": -drawn}

    asked, original = [], pretraining_curve.base_config
    monkeypatch.setattr(pretraining_curve, "base_config", small)
    monkeypatch.setattr(pretraining_curve, "dev_metrics", dev_metrics)
    for name in ("RESULTS", "DOCS"):
        monkeypatch.setattr(pretraining_curve, name, tmp_path)
    run_dir = tmp_path / "curve"
    arguments = ["--data", str(corpus.tasks), "--checkpoint", str(corpus.bert), "--run-dir", str(run_dir)]
    arguments += ["--steps", "3", "1", "--seeds", "2"]
    assert pretraining_curve.main(arguments) == 0
    encoders, parts = ["bert", "encoder-1", "encoder-3"], ["embeddings", "lower-half", "upper-half"]
    assert asked == [
        of
        for encoder in encoders
        for of in (
            (encoder, ("finetune",), ["sst"], 0),
            (encoder, ("finetune",), ["sst"], 1),
            (encoder, ("heads",), ["sst", "sts"], 0),
        )
    ] + [(f"encoder-3-put-back-{part}", ("heads",), ["sst", "sts"], 0) for part in parts]
    result = json.loads((tmp_path / "pretraining-curve.json").read_text())
    points = result["points"]
    assert [point["steps"] for point in points] == [0, 1, 3]
    assert len({point["frozen_sst"] for point in points}) == 3
    assert all(point["tuned_sst"] == [-point["frozen_sts"], -point["frozen_sts"] / 2] for point in points)
    lines = (run_dir / "pretraining" / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["losses"]["mlm"] for line in lines]
    assert [point["mlm"] for point in points] == [None, losses[0], pytest.approx(sum(losses) / 3)]
    three, last = (
        load_file(run_dir / name / "model.safetensors") for name in ("encoder-3", "pretraining/pretrain/last")
    )
    assert all((three[name] == x).all() for name, x in last.items())
    before = load_file(corpus.bert / "model.safetensors")
    assert list(result["put_back"]) == parts
    for part in parts:
        mixed = load_file(run_dir / f"encoder-3-put-back-{part}" / "model.safetensors")
        back = {name for name, x in mixed.items() if (x == before[f"bert.{name}"]).all()}
        alike = {name for name in mixed if (before[f"bert.{name}"] == three[f"bert.{name}"]).all()}
        where = {"lower-half": "encoder.layer.0.", "upper-half": "encoder.layer.1."}.get(part, "embeddings.")
        assert back - alike == {name for name in mixed if name.startswith(where)} - alike
    assert (tmp_path / "pretraining_curve.png").stat().st_size > 10_000
    table = report.render("<!-- results: pretraining_curve -->\n<!-- end -->", tmp_path)
    assert f"| 3, lower half as before | - | {result['put_back']['lower-half']['frozen_sst']:.3f} |" in table
    assert f"| 0 | - | {points[0]['frozen_sst']:.3f} |" in table and ", fine-tuning with 2 seeds:" in table

    monkeypatch.setattr(commands, "train", None)  # nothing is left to train
    assert pretraining_curve.main(arguments) == 0
    assert json.loads((tmp_path / "pretraining-curve.json").read_text()) == result


def test_metrics_are_those_of_a_run_that_is_made_once(corpus, tmp_path, monkeypatch):
    run_dir = tmp_path / "curve"
    base = pretraining_curve.base_config(corpus.tasks, str(corpus.bert), "fp32", run_dir)
    run = replace(base, tasks={"sst": base.tasks["sst"]}, stages=("finetune",))
    run = replace(run, finetune=replace(run.finetune, epochs=1))
    found = pretraining_curve.dev_metrics(run)
    assert 0 <= found["sst_accuracy"] == found["mean"] <= 1 and found["sst_accuracy"] * ROWS % 1 < 1e-9
    monkeypatch.setattr(commands, "train", None)
    assert pretraining_curve.dev_metrics(run) == found
