"""What the keys of a DeepSpeed JSON do that work."""

import gc
import json
import re
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from bert_twins import small_corpus
from processes import Ranks
from stages import demo_on, stage_of
from states import STAGE, load_state, save_state, small, steps
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mtfast.config import ConfigError, EngineConfig, TaskStageConfig
from mtfast.training.engine import engine as engine_module
from mtfast.training.engine.deepspeed_json import MONITORS
from mtfast.training.engine.deepspeed_keys import KEYS
from mtfast.training.engine.engine import Engine, confirm
from mtfast.training.stages.finetune import Finetune

CPU = {"device": "cpu"}
# Blocks and flags of which a model sees nothing but where its numbers lie and how they travel.
UNSEEN = [
    (1, {"zero_optimization": {"offload_optimizer": CPU}}),
    (2, {"zero_optimization": {"offload_optimizer": CPU | {"pin_memory": True}}}),
    (3, {"zero_optimization": {"offload_optimizer": CPU}}),
    (3, {"zero_optimization": {"offload_param": CPU}}),
    (3, {"zero_optimization": {"offload_optimizer": CPU, "offload_param": CPU, "sub_group_size": 20}}),
    (2, {"zero_optimization": {"reduce_bucket_size": 10, "overlap_comm": True, "allgather_bucket_size": 10}}),
    (3, {"zero_optimization": {"stage3_prefetch_bucket_size": "auto", "stage3_max_live_parameters": 8}}),
    (1, {"prescale_gradients": True, "gradient_predivide_factor": 2.0}),
    (1, {"communication_data_type": "fp32", "disable_python_gc": True}),
    (2, {"zero_force_ds_cpu_optimizer": True, "zero_optimization": {"offload_optimizer": CPU}}),
    (2, {"zero_allow_untested_optimizer": False}),
]  # fmt: skip


def write(directory: Path, given: dict[str, Any]) -> str:
    path = directory / "ds.json"
    path.write_text(json.dumps(given))
    return str(path)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("zero_stage", "given"), UNSEEN)
def test_training_with_it_is_training_without(zero_stage, given, precision, tmp_path):
    """Losses, weights and resumable states; one may go on where the other left off."""
    path = write(tmp_path, given)
    plain = small(precision, zero_stage)
    losses = steps(plain, range(4))
    weights = plain.state_dict()
    plain.close()
    first = small(precision, zero_stage, deepspeed_config=path)
    found = steps(first, range(2))
    save_state(first, tmp_path / "state", 2, {})
    first.close()
    assert found == losses[:2]
    for config in ({"deepspeed_config": path}, {}):
        second = small(precision, zero_stage, **config)
        load_state(second, tmp_path / "state")
        assert steps(second, range(2, 4)) == losses[2:]
        for name, x in second.state_dict().items():
            # Weights that are updated in other rows are rounded elsewhere.
            torch.testing.assert_close(x, weights[name], rtol=1e-6, atol=1e-7)
        second.close()


BETWEEN_RANKS = {
    "plain": {},
    "second-partition": {"zero_optimization": {"zero_hpz_partition_size": 2}},
    "bf16": {"communication_data_type": "bf16"},
    "prescaled": {
        "prescale_gradients": True,
        "gradient_predivide_factor": 4.0,
        "zero_optimization": {"reduce_scatter": False},
    },
}


def check_two_ranks(directory: Path) -> None:
    losses = {}
    for name in BETWEEN_RANKS:
        engine = small("fp32", 3, deepspeed_config=str(directory / f"{name}.json"))
        losses[name] = steps(engine, range(4))
        engine.close()
    plain = losses["plain"]
    assert losses["second-partition"] == plain
    assert losses["prescaled"] == pytest.approx(plain, rel=1e-5)
    assert losses["bf16"] != plain
    assert losses["bf16"] == pytest.approx(plain, rel=0.05)


def test_two_ranks_with_a_second_partition_and_gradients_in_another_type_or_scaled(tmp_path):
    for name, given in BETWEEN_RANKS.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(given))
    Ranks(check_two_ranks, tmp_path, output=tmp_path, world_size=2).succeed()


@pytest.mark.sweep
def test_deepspeeds_adam_for_the_cpu_updates_what_is_offloaded(tmp_path, full_sweep):
    if not full_sweep:
        pytest.skip("DeepSpeed compiles its optimizer first, for two minutes")
    path = write(tmp_path, {"zero_optimization": {"offload_optimizer": CPU}})
    for precision in ("fp32", "bf16"):
        losses = []
        for config in ({}, {"deepspeed_config": path, "optimizer": "deepspeed-adam"}):
            engine = small(precision, 2, **config)
            losses.append(steps(engine, range(4)))
            engine.close()
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=1e-5)


def test_the_jsons_epsilon_is_adams(tmp_path):
    """Adam's first step is the learning rate times g / (|g| + eps), of gradients that are all 4."""
    path = write(tmp_path, {"optimizer": {"type": "Adam", "params": {"lr": "auto", "eps": 0.5}}})
    engine_module.start()
    for zero_stage in (0, 1):
        model = nn.Linear(24, 8)
        config = EngineConfig(precision="fp32", zero_stage=zero_stage, deepspeed_config=path)
        engine = Engine(model, config, TaskStageConfig(batch_size=4, weight_decay=0.0), "finetune")
        before = engine.state_dict()
        engine.set_learning_rate(0.25)
        engine.step(engine.model(torch.ones(4, 24)).sum())
        for name, weight in engine.state_dict().items():
            torch.testing.assert_close(weight, before[name] - 0.25 * 4 / 4.5)
        engine.close()


AUTO_WARM_UP = {"warmup_num_steps": "auto", "warmup_type": "auto"}
SCHEDULERS = [
    ("WarmupLR", {"warmup_min_lr": 0.01, "warmup_max_lr": "auto", "warmup_num_steps": 5}, {}),
    ("WarmupLR", {"warmup_min_lr": "auto", **AUTO_WARM_UP}, {"warmup_num_steps": 3, "warmup_type": "linear"}),
    ("WarmupDecayLR", {"total_num_steps": "auto", "warmup_num_steps": 4}, {"total_num_steps": 12}),
    ("WarmupDecayLR", {"total_num_steps": 9, "warmup_type": "linear", "warmup_num_steps": 4}, {}),
    ("WarmupCosineLR", {"warmup_min_ratio": 0.1, "warmup_num_steps": 4}, {"total_num_steps": 12}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "params", "filled"), SCHEDULERS)
def test_the_learning_rate_is_that_of_deepspeeds_scheduler(kind, params, filled, tmp_path):
    """As an engine of DeepSpeed's own steps it."""
    engine_module.start()
    right = {name: value for name, value in params.items() if value != "auto"} | filled
    if kind != "WarmupCosineLR":
        right["warmup_max_lr"] = 0.5
    model = nn.Linear(2, 1)
    theirs, _, _, _ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.5),
        config={"train_batch_size": 1, "scheduler": {"type": kind, "params": right}},
    )
    rates = []
    for _ in range(12):
        rates.append(theirs.optimizer.param_groups[0]["lr"])
        theirs.backward(theirs(torch.ones(1, 2)).sum())
        theirs.step()
    theirs.destroy()
    fraction = 0.25 if params["warmup_num_steps"] == "auto" else 0.0
    stage = replace(STAGE, learning_rate=0.5, warmup_fraction=fraction)
    path = write(tmp_path, {"scheduler": {"type": kind, "params": params}})
    engine = small(stage=stage, deepspeed_config=path)
    ours = [engine.scheduler.learning_rate_at(step, 12) for step in range(12)]
    engine.close()
    assert ours == pytest.approx(rates, rel=1e-12)
    assert len({round(rate, 6) for rate in ours}) > 2


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return small_corpus(tmp_path_factory.mktemp("demo"), 120)


def test_layers_are_checkpointed_and_the_stage_follows_the_scheduler(corpus, tmp_path):
    given = {"activation_checkpointing": {}}
    given["scheduler"] = {"type": "WarmupLR", "params": {"warmup_num_steps": 2, "warmup_type": "linear"}}
    config = demo_on(corpus, tmp_path / "run")
    engine = EngineConfig(precision="fp32", deepspeed_config=write(tmp_path, given))
    stage = stage_of(Finetune, replace(config, engine=engine, finetune=TaskStageConfig(learning_rate=0.5)))
    assert stage.engine._module.encoder.activation_checkpointing
    assert [stage.set_learning_rate(step, 9) for step in range(4)] == [0.0, 0.0, 0.25, 0.5]
    assert stage.engine._engine.optimizer.param_groups[0]["lr"] == 0.5
    stage.engine.close()


@pytest.mark.parametrize("zero_stage", [0, 3])
def test_the_profiler_counts_every_product_once(zero_stage, corpus, tmp_path):
    """What torch counts of the forward pass, mtfast's ops included."""
    profile = tmp_path / "profile"
    given = {"flops_profiler": {"enabled": True, "profile_step": 1, "output_file": str(profile)}}
    engine = EngineConfig("fp32", zero_stage, deepspeed_config=write(tmp_path, given))
    config = replace(demo_on(corpus, tmp_path / "run"), engine=engine)
    stage = stage_of(Finetune, replace(config, finetune=TaskStageConfig(batch_size=40)))
    stage.engine.train()
    first, second = (batch for (batch,) in stage.micro_batches(stage.plan(0)[:2], 0))
    stage.step(first)
    assert not profile.exists()
    stage.step(second)
    (found,) = re.findall(r"fwd MACs per GPU: +([\d.]+) MMACs", profile.read_text())
    with FlopCounterMode(display=False) as counter:
        stage.engine.model(**second.model_inputs(), rows=second.tasks)
    stage.engine.close()
    counts = counter.get_flop_counts()["Global"]
    assert {str(op) for op in counts} >= {"mtfast.packed_attention_qkv", "mtfast.concat_mlp", "aten.mm"}
    assert float(found) == pytest.approx(sum(counts.values()) / 2e6, abs=0.006)


PRINTED = [
    ({"wall_clock_breakdown": True}, "time (ms) | fwd_microstep"),
    ({"memory_breakdown": True}, "Engine after step"),
    ({"steps_per_print": 2}, "step=2, skipped=0"),
    ({"timers": {"throughput": {"enabled": True}}, "steps_per_print": 1}, "SamplesPerSec"),
    ({"dump_state": True}, "DeepSpeedEngine configuration"),
    ({"log_level": "info"}, "DeepSpeed Final Optimizer"),
    ({"comms_logger": {"enabled": True, "prof_all": True}}, "all_reduce"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "said"), PRINTED)
def test_what_deepspeed_is_asked_to_print_is_printed(given, said, tmp_path, capfd, caplog):
    for path in (None, write(tmp_path, given)):
        engine = small("fp32", 2, deepspeed_config=path)
        steps(engine, range(4))
        engine.close()
        assert (said in caplog.text + capfd.readouterr().out) == (path is not None)
        caplog.clear()


def test_an_engine_that_is_closed_says_no_more(tmp_path, capfd, caplog):
    engine = small("fp32", 2, deepspeed_config=write(tmp_path, {"log_level": "info"}))
    of_deepspeed = weakref.ref(engine._engine)
    engine.close()
    assert "Removed grad acc hooks" in caplog.text + capfd.readouterr().out
    caplog.clear()
    del engine
    gc.collect()
    assert of_deepspeed() is None and caplog.text + capfd.readouterr().out == ""


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"zero_optimization": {"offload_optimiser": CPU}}, "offload_optimiser: Extra inputs are not"),
        ({"zero_optimization": {"offload_optimizer": {"device": "disk"}}}, "device: Input should be "),
        ({"zero_optimization": {"zero_quantized_weights": True}}, "zero_quantized_weights needs a GPU"),
        ({"communication_data_type": "int3"}, "fp16"),
        ({"csv_monitor": {"enable": True}}, "enable: Extra inputs are not permitted"),
    ],
)  # fmt: skip
def test_what_deepspeed_cannot_read_is_told_before_any_data_is(given, said, tmp_path):
    engine_module.start()
    config = EngineConfig(precision="fp32", zero_stage=3, deepspeed_config=write(tmp_path, given))
    with pytest.raises(ConfigError, match=r"ds\.json: ") as raised:
        confirm(config, STAGE, "finetune")
    assert said in str(raised.value) and raised.value.field == "engine.deepspeed_config"


def test_a_step_that_deepspeed_watches_is_no_graph(tmp_path, monkeypatch):
    """It would time, and write, one replay."""
    watched = [given for given, _ in PRINTED if "log_level" not in given]
    watched += [{"csv_monitor": {"enabled": True, "output_path": str(tmp_path)}}]
    engine = small()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert engine._is_capturable(EngineConfig(), STAGE)
    for given in watched:
        path = write(tmp_path, given)
        engine._settings = engine_module.deepspeed_config(
            EngineConfig(precision="fp32", deepspeed_config=path), STAGE, "finetune", 1
        )
        assert not engine._is_capturable(EngineConfig(), STAGE), given
    monkeypatch.undo()
    engine.close()


def test_every_key_that_works_is_tried():
    given = [given for _, given in UNSEEN] + [given for given, _ in PRINTED] + list(BETWEEN_RANKS.values())
    here = {key for keys in given for key in keys}
    here |= {"optimizer", "scheduler", "activation_checkpointing", "flops_profiler"}
    elsewhere = {*MONITORS, "train_batch_size", "train_micro_batch_size_per_gpu", "bf16"}
    elsewhere |= {"gradient_accumulation_steps", "gradient_clipping"}  # in test_deepspeed_json.py
    assert here | elsewhere == {name for name, key in KEYS.items() if key.verdict == "works"}
