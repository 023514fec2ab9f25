"""Each of examples/, as it is, on the demo's corpus and a BERT like the demo's with random weights."""

import re
import runpy
import sys
from pathlib import Path

import datasets
import pytest
import torch
from transformers import AutoConfig, AutoTokenizer, BertForMaskedLM

from mtfast.data.demo import write_demo_corpus

EXAMPLES = Path(__file__).parents[1] / "examples"
STEPS = {"cross_sentence_head": 20, "masked_language_model": 8, "sentence_transformers_training": 4}


@pytest.fixture(scope="module")
def after_the_demo(tmp_path_factory) -> Path:
    """A directory with what `make demo` leaves, as far as examples read it."""
    root = tmp_path_factory.mktemp("examples")
    bert = write_demo_corpus(root / "runs" / "demo-corpus").bert
    torch.manual_seed(0)
    model = BertForMaskedLM(AutoConfig.from_pretrained(bert))
    tokenizer = AutoTokenizer.from_pretrained(bert)
    for place in ("pretrain/last", "finetune/best-mean"):
        model.save_pretrained(root / "runs" / "demo" / place)
        tokenizer.save_pretrained(root / "runs" / "demo" / place)
    return root


@pytest.fixture
def last_line(after_the_demo, tmp_path, monkeypatch, capsys):
    """Runs an example; what it says in the end."""

    def run(name: str) -> str:
        steps = ["--steps", str(STEPS[name])] if name in STEPS else []
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *steps])
        monkeypatch.chdir(after_the_demo)
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path))
        capsys.readouterr()
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out.strip().split("\n")[-1]

    return run


def numbers(line: str) -> list[float]:
    return [float(x) for x in re.findall(r"-?\d+\.\d+(?:e-\d+)?", line)]


def test_every_example_is_tested():
    tested = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    assert {path.stem for path in EXAMPLES.glob("*.py")} <= tested


def test_attention_in_bert(last_line):
    line = last_line("attention_in_bert")
    _, states, gradient = numbers(line)
    assert line.startswith("mtfast, without padding") and 0 < states < 2e-5 and gradient < 2e-5


def test_sentence_transformers_training(last_line):
    before, after = numbers(last_line("sentence_transformers_training"))
    assert -1 < before < 1 and -1 < after < 1 and before != after


def test_masked_language_model(last_line):
    before, after = numbers(last_line("masked_language_model"))
    assert after < before - 0.05


def test_cross_sentence_head(last_line):
    line = last_line("cross_sentence_head")
    assert line.startswith("accuracy on dev: ") and 0.3 < numbers(line)[0] <= 1
