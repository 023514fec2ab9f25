"""The first steps of pre-training, in which the heads alone are trained."""

import json
from dataclasses import replace

import pytest
import torch
from bert_twins import small_corpus
from stages import demo_on, stage_of

from mtfast import commands
from mtfast.config import EngineConfig, RunConfig
from mtfast.training.run.settings import Change, Progress, refused
from mtfast.training.schedule import learning_rate_at
from mtfast.training.stages.pretrain import Pretrain


@pytest.fixture
def config(tmp_path) -> RunConfig:
    config = demo_on(small_corpus(tmp_path / "corpus", 40), tmp_path / "run")
    schedule = {"schedule": "linear", "warmup_fraction": 0.5, "learning_rate": 1e-3, "batch_size": 16}
    heads = {"head_steps": 2, "head_learning_rate": 0.01}
    return replace(config, log_every=1, pretrain=replace(config.pretrain, epochs=1, **schedule, **heads))


CASES = [("fp32", 0), ("fp32", 1), ("fp32", 2), ("fp32", 3), ("bf16", 0), ("bf16", 1)]


@pytest.mark.parametrize(("precision", "zero_stage"), CASES)
def test_the_encoder_stays_as_it_is(precision, zero_stage, config):
    stage = stage_of(Pretrain, replace(config, engine=EngineConfig(precision, zero_stage)))
    stage.engine.train()
    states, rates = [stage.engine.state_dict()], []
    for step, (batch,) in enumerate(stage.micro_batches(stage.plan(0)[:3], 0)):
        rates.append(stage.set_learning_rate(step, 10))
        stage.step(batch)
        states.append(stage.engine.state_dict())
    stage.engine.close()
    assert rates == [0.01, 0.01, learning_rate_at(config.pretrain, 0, 8)] and rates[2] == 1e-3 / 4
    shared = "mlm.decoder_weight"  # the word embeddings
    for name, weight in states[0].items():
        of_encoder = name.startswith("encoder.") or name == shared
        first, second, third = (state[name] for state in states[1:])
        assert torch.equal(second, weight) == torch.equal(first, weight) == of_encoder, name
        assert not torch.equal(third, second), name
    # Adam's first step is the rate, whatever the gradient, unless that is next to nothing.
    moved = states[1]["mlm.transform.weight"] - states[0]["mlm.transform.weight"] * (1 - 0.01 * 0.01)
    assert moved.abs().quantile(0.1) == pytest.approx(0.01, rel=1e-3) == moved.abs().max()


def test_metrics_have_the_rates(config):
    commands.train(replace(config, pretrain=replace(config.pretrain, max_steps=4)), "pretrain")
    lines = (config.path / "metrics.jsonl").read_text().splitlines()
    rates = [json.loads(line)["learning_rate"] for line in lines]
    assert rates == [0.01, 0.01, *(learning_rate_at(config.pretrain, step, 2) for step in (0, 1))]


def test_settings_of_a_stage_that_a_run_does_not_have_may_change():
    change = Change("pretrain.head_steps", None, 100)
    made = Progress(steps=3, epochs=1, finished=False, resumable=True)

    def progress(name):
        return made if name == "heads" else None

    assert refused([change], progress, {"stages": ["heads", "finetune"]}) == []
    assert refused([change], progress, {"stages": ["pretrain", "heads"]}) == [str(change)]
    assert refused([change], lambda name: made, {"stages": ["heads", "finetune"]}) == [str(change)]
    heads = Change("heads.learning_rate", 1e-3, 1e-4)
    assert refused([heads], progress, {"stages": ["heads"]}) == [str(heads)]
