"""The stage benchmarks run, and refuse to time two things that are not the same."""

import csv
from dataclasses import replace

import pytest
import torch
from bert_twins import small_corpus
from transformers import BertConfig, BertForPreTraining, BertTokenizerFast

from benchmarks import (
    filled_steps,
    finetune_step,
    head_stage,
    keeping,
    keeping_child,
    pretrain_step,
    real_steps,
    shapes,
    step_parts,
)
from benchmarks.op_count import finetune_ops
from benchmarks.real_steps import WARM_UP
from benchmarks.stage_setup import Setup, StageMaker
from mtfast.data.demo import write_demo_corpus
from mtfast.training.engine.engine import start
from mtfast.training.engine.state import states_in

ROWS = 240  # of each task: an epoch of five steps


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return small_corpus(tmp_path_factory.mktemp("demo"), ROWS)


@pytest.fixture(scope="module")
def data(corpus):
    return str(corpus.tasks)


@pytest.fixture(scope="module")
def checkpoint(corpus, tmp_path_factory):
    """A tiny checkpoint with random weights."""
    checkpoint = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    BertForPreTraining(BertConfig.from_pretrained(corpus.bert)).save_pretrained(checkpoint)
    BertTokenizerFast.from_pretrained(corpus.bert).save_pretrained(checkpoint)
    return str(checkpoint)


@pytest.fixture(scope="module")
def steps(data, checkpoint):
    """Rows of the benchmarks of whole steps on two measured steps."""
    start()
    finetune = Setup("finetune", data, checkpoint, "checkpoint", 512, 4, 1)
    pretrain = Setup("pretrain", data, checkpoint, "checkpoint", 64, 4, 1)
    return {
        "finetune": real_steps.compare("finetune_step", "examples", finetune, finetune_step.field_of),
        "pretrain": real_steps.compare("pretrain_step", "samples", pretrain, pretrain_step.field_of),
        "parts": step_parts.parts_of_stage("pretrain at most 64", StageMaker(pretrain), 4),
    }


def test_head_stage(data, checkpoint, monkeypatch):
    monkeypatch.setattr(head_stage, "stop", lambda: None)  # the process group is the other tests' too
    result = head_stage.compare(data, checkpoint, 1)
    cached, live, eager = (result[name] for name in ("cached", "live", "eager"))
    assert cached["stage_s"] == pytest.approx(cached["before_s"] + 48 * cached["epoch_s"])
    assert live["ratio"] == pytest.approx(48 * live["epoch_s"] / cached["stage_s"])
    assert eager["stage_s"] > 0 and cached["ratio"] == 1


@pytest.mark.parametrize(
    ("stage", "case", "others"),
    [
        ("finetune", "160 examples, ", {"plain", "eager", "grouped"}),
        ("pretrain", "16 samples, ", {"plain", "eager", "grouped", "masked logits"}),
    ],
)
def test_whole_steps(steps, stage, case, others):
    rows = {row["variant"]: row for row in steps[stage]}
    assert set(rows) == {"mtfast", *others}
    eager = rows["eager"]
    for row in rows.values():
        assert case in row["case"] and row["case"].endswith(" padded") and row["runs"] == 2
        expected = row["examples_per_s"] / eager["examples_per_s"]
        assert row["ratio_to_baseline"] == pytest.approx(expected, abs=2e-3 * expected + 1e-3)
    # The engine's own calls come on top of the plain loop's.
    assert rows["plain"]["kernels"] < min(rows["mtfast"]["kernels"], eager["kernels"])


def test_parts_of_a_step_add_up(steps):
    rows = {row["variant"]: row for row in steps["parts"]}
    assert set(rows) == {
        step_parts.STEP,
        *step_parts.PARTS,
        step_parts.INPUT,
        step_parts.KEEPING,
        step_parts.PRODUCTS,
    }
    shares = {name: row["share_of_step"] for name, row in rows.items()}
    assert sum(shares[part] for part in step_parts.PARTS) == pytest.approx(1, abs=2e-3)
    assert all(share > 0 for share in shares.values())
    assert 0 < shares[step_parts.PRODUCTS] < 1


def test_ops_of_a_step_grow_with_its_layers():
    """The last layer is one on [CLS] alone; what one more layer adds is an ordinary one, both ways."""
    start()
    shape = dict(hidden_size=64, num_attention_heads=2, intermediate_size=64, vocab_size=30522)
    one, two = (finetune_ops(BertConfig(num_hidden_layers=layers, **shape)) for layers in (1, 2))
    for op, per_layer in {
        "mtfast.packed_attention_qkv": 1,
        "mtfast.packed_attention_qkv_backward": 1,
        "mtfast.dropout_add_layer_norm": 2,
        "mtfast.dropout_add_layer_norm_backward": 2,
        "mtfast.bias_gelu": 1,
        "mtfast.bias_gelu_backward": 1,
        "aten.addmm": 1,
        "aten.mm": 11,
    }.items():
        assert two.get(op, 0) - one.get(op, 0) == per_layer, op
    of_one, of_two = sum(one.values()), sum(two.values())
    assert of_one + 11 * (of_two - of_one) <= 420  # BERT-base has twelve layers
    assert not {"aten.view", "aten.t", "aten.detach", "aten.empty"} & set(two)


def test_keeping(data, checkpoint, tmp_path, monkeypatch):
    in_a_process = keeping.epochs_of

    def epochs_of(fit, name):
        """One of the two in this process, which saves a start."""
        if name == keeping.NOTHING:
            return in_a_process(fit, name)
        return keeping_child.measure(replace(fit, run_dir=str(tmp_path / name)))

    monkeypatch.setattr(keeping, "epochs_of", epochs_of)
    fit = keeping.Fit(
        str(tmp_path), data, checkpoint, epochs=3, rows=200, precision="fp32", threads=1, kept=True
    )
    rows = {(row["case"].endswith(", waiting"), row["variant"]): row for row in keeping.compare(fit, {})}
    assert set(rows) == {(part, name) for part in (False, True) for name in ("mtfast", "nothing kept")}
    epoch, waiting = rows[False, "mtfast"], rows[True, "mtfast"]
    assert "finetune in fp32, epochs of 4 steps" in epoch["case"] and epoch["runs"] == waiting["runs"] == 1
    assert epoch["examples_per_s"] == pytest.approx(600 / epoch["median_us"] * 1e6, rel=1e-3)
    share = waiting["median_us"] / epoch["median_us"]
    assert 0 < share < 1 and waiting["share_of_step"] == pytest.approx(share, rel=1e-3)
    assert states_in(tmp_path / "mtfast" / "finetune" / "state")
    assert not (tmp_path / "nothing kept" / "finetune" / "last").exists()


@pytest.mark.parametrize("module", [finetune_step, pretrain_step])
def test_options_make_the_cases(module, monkeypatch, tmp_path):
    found = {}
    monkeypatch.setattr(module, "run_race", lambda *arguments: found.update(arguments[1]))
    module.main(
        ["--data", "d", "--checkpoint", "c", "--steps", "3", "--threads", "1", "--shape", "bert-base"]
    )
    expected = {
        finetune_step: {"examples": Setup("finetune", "d", "c", "bert-base", 512, WARM_UP + 3, 1)},
        pretrain_step: {
            f"samples of at most {most}": Setup("pretrain", "d", "c", "bert-base", most, WARM_UP + 3, 1)
            for most in (512, 256)
        },
    }
    assert found == expected[module]


def test_shapes(checkpoint, tmp_path):
    data = str(write_demo_corpus(tmp_path).tasks)
    rows = shapes.finetuning(data, checkpoint) + shapes.pretraining(data, checkpoint, 60, 64)
    assert [row["variant"] for row in rows] == 2 * [shapes.AS_THEY_COME, shapes.FILLED]
    for plain, filled in zip(rows[::2], rows[1::2], strict=True):
        assert plain["case"] == filled["case"] and plain["shapes"] > filled["shapes"] >= 1
        assert plain["filler_share"] == 0 < filled["filler_share"] < 64 / 200


def test_filled_steps(data, checkpoint):
    rows = filled_steps.compare("finetune", Setup("finetune", data, checkpoint, "checkpoint", 512, 4, 1))
    assert [row["variant"] for row in rows] == [shapes.AS_THEY_COME, shapes.FILLED]
    for row in rows:
        assert row["case"].endswith("finetune, 160 examples a step") and row["runs"] == 2
        assert row["peak_mib"] > 100  # torch alone has as much
    came, filled = rows
    assert filled["ratio_to_baseline"] == pytest.approx(
        filled["examples_per_s"] / came["examples_per_s"], rel=2e-3
    )


def test_a_picture_of_the_parts(tmp_path):
    from benchmarks.step_parts_plot import draw

    names = (step_parts.STEP, *step_parts.PARTS, step_parts.INPUT, step_parts.KEEPING, step_parts.PRODUCTS)
    table = tmp_path / "rows.csv"
    with table.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("benchmark", "case", "variant", "median_us", "share_of_step"))
        for case in ("6 x 384 finetune", "6 x 384 pretrain at most 512"):
            writer.writerows(("step_parts", case, name, 1e5, 0.2) for name in names)
        writer.writerow(("another", "case", "mtfast", 1, ""))
    assert draw(table, tmp_path / "parts.png").read_bytes().startswith(b"\x89PNG")


def test_a_wrong_contender_stops_the_benchmark():
    with pytest.raises(SystemExit, match=r"eager does not compute what mtfast does: quora loss 0\.71"):
        real_steps.check("eager", {torch.float32: {"quora": 0.71}}, {torch.float32: {"quora": 0.7}})
