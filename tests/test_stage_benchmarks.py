"""The stage benchmarks run, and refuse to time two things that are not the same."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForPreTraining, BertTokenizerFast

from benchmarks import finetune_step
from benchmarks.stage_setup import load_tables, recipe
from mtfast.data.demo import write_demo_corpus

RUN = """
import importlib, json, sys
name, out, data, checkpoint, steps = sys.argv[1:]
result = importlib.import_module(f"benchmarks.{name}").compare(data, checkpoint, int(steps))
json.dump(result, open(out, "w"))
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """The demo corpus, and a tiny checkpoint with random weights."""
    corpus = write_demo_corpus(tmp_path_factory.mktemp("demo"))
    checkpoint = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    BertForPreTraining(BertConfig.from_pretrained(corpus.bert)).save_pretrained(checkpoint)
    BertTokenizerFast.from_pretrained(corpus.bert).save_pretrained(checkpoint)
    return str(corpus.tasks), str(checkpoint)


def run(name, inputs, tmp_path, steps):
    """The result of a benchmark, in a process of its own, because DeepSpeed starts but once."""
    out = tmp_path / "result.json"
    command = [sys.executable, "-c", RUN, name, str(out), *inputs, str(steps)]
    done = subprocess.run(
        command, cwd=Path(__file__).parent.parent, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text())


def test_finetune_step(inputs, tmp_path):
    result = run("finetune_step", inputs, tmp_path, 2)
    assert result["examples_per_step"] == 160
    assert len(result["mtfast"]["seconds"]) == len(result["eager"]["seconds"]) == 2
    assert result["padded_tokens_per_step"] > result["real_tokens_per_step"] > 160
    assert result["ratio"] == result["eager"]["median_s"] / result["mtfast"]["median_s"]
    assert f"ratio {result['ratio']:.2f}" in finetune_step.describe(result)


def test_head_stage(inputs, tmp_path):
    result = run("head_stage", inputs, tmp_path, 1)
    cached, live, eager = (result[name] for name in ("cached", "live", "eager"))
    assert cached["stage_s"] == pytest.approx(cached["before_s"] + 48 * cached["epoch_s"])
    assert live["ratio"] == pytest.approx(48 * live["epoch_s"] / cached["stage_s"])
    assert eager["stage_s"] > 0 and cached["ratio"] == 1


@pytest.mark.parametrize("spoilt", [False, True])
def test_losses_are_compared_first(inputs, monkeypatch, spoilt):
    data, checkpoint = inputs
    config, device = recipe(checkpoint), torch.device("cpu")
    (packed,), (padded,) = finetune_step.make_batches(load_tables(data, config, "train"), config, 1, device)
    twin_of = finetune_step.twin_of

    def other(config, heads):
        twin = twin_of(config, heads)
        twin.pair_out.bias.data += 0.01
        return twin

    if not spoilt:
        finetune_step.check_losses(checkpoint, packed, padded, device)
        return
    monkeypatch.setattr(finetune_step, "twin_of", other)
    with pytest.raises(SystemExit, match="quora: mtfast's loss is"):
        finetune_step.check_losses(checkpoint, packed, padded, device)
