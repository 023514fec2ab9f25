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
PARTS = {"embeddings": "embeddings.", "lower-half": "encoder.layer.0.", "upper-half": "encoder.layer.1."}


@pytest.fixture
def corpus(tmp_path):
    """With random weights beside its BERT's configuration."""
    corpus = small_corpus(tmp_path / "corpus", ROWS)
    BertForPreTraining(BertConfig.from_pretrained(corpus.bert)).save_pretrained(tmp_path / "bert")
    AutoTokenizer.from_pretrained(corpus.bert).save_pretrained(tmp_path / "bert")
    return replace(corpus, bert=tmp_path / "bert")


def of_point(encoder):
    """What is trained of an encoder: SST by itself with two seeds, heads of two tasks with one."""
    return [
        (encoder, ("finetune",), ["sst"], 0),
        (encoder, ("finetune",), ["sst"], 1),
        (encoder, ("heads",), ["sst", "sts"], 0),
    ]


def of_curve(encoders):
    """And of the last of a curve, with each part put back."""
    parts = [(f"{encoders[-1]}-put-back-{part}", ("heads",), ["sst", "sts"], 0) for part in PARTS]
    return [*(of for encoder in encoders for of in of_point(encoder)), *parts]


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
    monkeypatch.setattr(pretraining_curve, "dev_rows", lambda run_dir: {"sst": 300, "sts": 200})
    for name in ("RESULTS", "DOCS"):
        monkeypatch.setattr(pretraining_curve, name, tmp_path)
    run_dir = tmp_path / "curve"
    arguments = ["--data", str(corpus.tasks), "--checkpoint", str(corpus.bert), "--run-dir", str(run_dir)]
    arguments += ["--steps", "3", "1", "--head-steps", "0", "2", "--seeds", "2"]
    assert pretraining_curve.main(arguments) == 0
    assert asked == [
        *of_point("bert"),
        *of_curve(["encoder-1", "encoder-3"]),
        *of_curve(["encoder-1", "encoder-3"]),
    ]
    result = json.loads((tmp_path / "pretraining-curve.json").read_text())
    start = result["start"]
    assert start["steps"] == 0 and start["mlm"] is None
    for curve, head_steps in zip(result["curves"], (0, 2), strict=True):
        points = curve["points"]
        assert curve["head_steps"] == head_steps and [point["steps"] for point in points] == [1, 3]
        found = [point["frozen_sst"] for point in (start, *points)]
        assert len(set(found)) == 3 if head_steps == 0 else found[0] == found[1] != found[2]
        for point in (start, *points):
            assert point["tuned_sst"] == [-point["frozen_sts"], -point["frozen_sts"] / 2]
        of_curve_dir = run_dir / f"head-steps-{head_steps}"
        lines = (of_curve_dir / "pretraining" / "metrics.jsonl").read_text().splitlines()
        losses = [json.loads(line)["losses"]["mlm"] for line in lines]
        assert [point["mlm"] for point in points] == [losses[0], pytest.approx(sum(losses) / 3)]
        three, last = (
            load_file(of_curve_dir / name / "model.safetensors")
            for name in ("encoder-3", "pretraining/pretrain/last")
        )
        assert all((three[name] == x).all() for name, x in last.items())
        before = load_file(corpus.bert / "model.safetensors")
        assert list(curve["put_back"]) == list(PARTS)
        for part in PARTS:
            mixed = load_file(of_curve_dir / f"encoder-3-put-back-{part}" / "model.safetensors")
            back = {name for name, x in mixed.items() if (x == before[f"bert.{name}"]).all()}
            alike = {name for name in mixed if (before[f"bert.{name}"] == three[f"bert.{name}"]).all()}
            where = PARTS[part]
            assert back - alike == {name for name in mixed if name.startswith(where)} - alike
    assert (tmp_path / "pretraining_curve.png").stat().st_size > 10_000
    table = report.render("<!-- results: pretraining_curve -->\n<!-- end -->", tmp_path)
    first, second = result["curves"]
    lower = [f"{of['put_back']['lower-half']['frozen_sst']:.3f}" for of in (first, second)]
    assert all(f"| the same, lower half put back | - | {of} |" in table for of in lower)
    assert f"| none | - | {start['frozen_sst']:.3f} |" in table and ", fine-tuning with 2 seeds:" in table
    last = second["points"][-1]
    assert f"| 3, the first 2 of the heads alone | {last['mlm']:.2f} | {last['frozen_sst']:.3f} |" in table

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
    assert pretraining_curve.dev_rows(Path(run.run_dir)) == {"sst": ROWS}
    monkeypatch.setattr(commands, "train", None)
    assert pretraining_curve.dev_metrics(run) == found


def test_standard_errors():
    """Those of the fair coin, and of what is known without error."""
    assert pretraining_curve.standard_error(pretraining_curve.ACCURACY, 0.5, 100) == pytest.approx(0.05)
    assert pretraining_curve.standard_error(pretraining_curve.CORRELATION, 1.0, 100) == 0.0
    assert pretraining_curve.standard_error(pretraining_curve.CORRELATION, 0.0, 101) == pytest.approx(0.1)
