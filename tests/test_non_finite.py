"""What NaN does to a run: it stops before anything is saved, or leaves the step out where it is asked to."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from poison import STEPS, Small, check_every_zero_stage, check_skipping
from processes import Ranks
from safetensors.torch import load_file
from torch import Tensor

from mtfast.commands import open_directory
from mtfast.config import EngineConfig, RunConfig, TaskStageConfig
from mtfast.recipes import PAPER_TASKS
from mtfast.training.engine import engine as engine_module
from mtfast.training.engine.state import newest_state
from mtfast.training.loop import NonFinite, train_stage
from mtfast.training.stage import Stage
from mtfast.training.stages.task_stage import labelled_metrics

KINDS = [("fp32", 0), ("bf16", 0), ("bf16", 1), ("fp32", 2), ("bf16", 3)]


@pytest.fixture
def config(tmp_path) -> RunConfig:
    engine_module.start()
    return RunConfig(
        run_dir=str(tmp_path / "run"),
        engine=EngineConfig(precision="fp32", zero_stage=0),
        finetune=TaskStageConfig(epochs=2, batch_size=4, learning_rate=0.1, checkpoint_every="2 steps"),
    )


def train(config: RunConfig, stage: Stage) -> dict:
    try:
        return train_stage(stage, open_directory(config), config.log_every)
    finally:
        stage.engine.close()


def change(config: RunConfig, **changes) -> RunConfig:
    return replace(config, finetune=replace(config.finetune, **changes))


def last_weights(config: RunConfig) -> dict[str, Tensor]:
    return load_file(config.path / "finetune" / "last" / "weights.safetensors")


def lines(config: RunConfig, kind: str) -> list[dict]:
    records = map(json.loads, (config.path / "metrics.jsonl").read_text().splitlines())
    return [record for record in records if record["kind"] == kind]


@pytest.mark.parametrize(
    ("precision", "zero_stage", "clipping"), [*((*kind, 0.0) for kind in KINDS), ("fp32", 2, 1.0)]
)
def test_a_nan_gradient_stops_the_run_before_it_is_saved(precision, zero_stage, clipping, config, tmp_path):
    config = replace(config, engine=EngineConfig(precision=precision, zero_stage=zero_stage))
    config = change(config, gradient_clipping=clipping)
    what = (
        "the gradients of step 4 were not finite"
        if zero_stage == 3 or clipping  # where DeepSpeed makes no such step, and tells nobody
        else "weights are not finite after steps 3 to 4, weight first"
    )
    with pytest.raises(NonFinite, match=rf"finetune: {what}; the last good state is in .*run/finetune/state"):
        train(config, Small(config, bad=(STEPS,)))
    assert not list((config.path / "finetune").glob("best-*"))
    assert newest_state(config.path / "finetune/state").path.name == "step-2"
    train(config, Small(config))  # goes on from there
    whole = replace(config, run_dir=str(tmp_path / "whole"))
    train(whole, Small(whole))
    weights, expected = last_weights(config), last_weights(whole)
    assert all(torch.equal(x, expected[name]) for name, x in weights.items())
    assert [r["losses"] for r in lines(config, "step")] == [r["losses"] for r in lines(whole, "step")]


def test_steps_left_out_are_counted_told_and_recorded(config, capsys):
    config = change(config, non_finite="skip")
    result = train(config, Small(config, bad=(2, 5, 6)))
    assert [r["step"] for r in lines(config, "skipped")] == [2, 5, 6]
    assert [r["step"] for r in lines(config, "step")] == [1, 3, 4, 7, 8]
    assert lines(config, "skipped")[0] | {"losses": 0} == {
        "kind": "skipped", "stage": "finetune", "step": 2, "epoch": 0, "losses": 0
    }  # fmt: skip
    assert result["summary"]["skipped_steps"] == 3 and result["summary"]["steps"] == 8
    said = capsys.readouterr().out
    assert "finetune: the gradients of step 2 were not finite: left out, 1 of 2 so far" in said
    assert "the gradients of steps 5, 6 were not finite: left out, 3 of 6 so far" in said
    assert all(x.isfinite().all() for x in last_weights(config).values())


def test_too_many_steps_in_a_row_stop_the_run_at_once(config):
    config = change(config, non_finite="skip", max_skipped=2, checkpoint_every="1 step")
    stage = Small(config, bad=(2, 4, 5, 6))
    with pytest.raises(
        NonFinite, match=r"gradients of step 6 .*, 3 in a row, and finetune\.max_skipped is 2"
    ):
        train(config, stage)
    assert next(stage.steps) == 7
    assert newest_state(config.path / "finetune/state").path.name == "step-5"
    with pytest.raises(NonFinite, match="gradients of step 6 "):  # steps are counted across a continuation
        train(config, Small(config, bad=(1,)))


@pytest.mark.parametrize(("precision", "zero_stage"), KINDS)
@pytest.mark.parametrize(("value", "clipping"), [(math.nan, 0.0), (math.inf, 1.0)])
def test_a_step_left_out_changes_nothing(precision, zero_stage, value, clipping):
    engine_module.start()
    check_skipping(precision, zero_stage, value, clipping)


def test_two_ranks_leave_out_a_step_in_which_one_has_a_nan(tmp_path):
    Ranks(check_every_zero_stage, output=tmp_path, world_size=2).succeed()


def test_weights_that_are_bad_from_the_start_are_not_blamed_on_the_learning_rate(config):
    stage = Small(config)
    with torch.no_grad():
        stage.engine.model.module.bias[1] = math.nan
    with pytest.raises(NonFinite, match="not finite before step 1 is made, bias first; start from another"):
        train(config, stage)


def test_a_loss_that_is_nan_before_any_update_is_not_blamed_on_the_learning_rate(config):
    stage = Small(config)
    stage.losses = lambda batch: {"fit": stage.engine.model(batch.x).mean() * math.nan}
    with pytest.raises(NonFinite, match="the fit loss is nan at step 1; no update had been made yet"):
        train(config, stage)


def test_a_dev_metric_that_is_nan_is_never_the_best(config):
    config = change(config, patience=1)
    stage = Small(config)
    stage.scores = iter([0.5, math.nan])
    with pytest.raises(NonFinite, match=r"finetune: mean is nan after step 8: predictions for the dev data"):
        train(config, stage)
    assert len(lines(config, "eval")) == 1
    result = train(config, Small(config))
    assert result["best"]["mean"]["value"] == 0.5


def test_a_correlation_that_is_undefined_is_told(capsys):
    labels = {"sst": np.zeros(3), "quora": np.zeros(3), "sts": np.array([1.0, 2.0, 3.0])}
    tables = {n: SimpleNamespace(task=task, labels=labels[n]) for n, task in PAPER_TASKS.items()}
    metrics = labelled_metrics(tables, labels | {"sts": np.full(3, 2.5)})
    assert metrics["sts_pearson"] == metrics["sts_spearman"] == 0.0
    said = capsys.readouterr().out
    assert "sts: all predictions are equal, their correlation is undefined" in said
    assert said.count("undefined") == 1  # equal classes are no such matter
    tables["sts"].labels = np.zeros(3)
    labelled_metrics(tables, labels)
    assert "sts: all labels are equal, their correlation is undefined" in capsys.readouterr().out
