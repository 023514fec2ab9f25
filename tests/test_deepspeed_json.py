"""A user's DeepSpeed JSON: every key that DeepSpeed knows works, has a setting in its place, or is refused.

`python tests/test_deepspeed_json.py` writes the table of docs/deepspeed.md anew.
"""

import json
import re
from collections.abc import KeysView
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from deepspeed.runtime.config import DeepSpeedConfig

from mtfast.config import ConfigError, EngineConfig, TaskStageConfig
from mtfast.training.engine.deepspeed_config import deepspeed_config
from mtfast.training.engine.deepspeed_keys import KEYS, says_nothing

PAGE = Path(__file__).parents[1] / "docs" / "deepspeed.md"
STAGE = TaskStageConfig(batch_size=160, learning_rate=1e-5)

# A value of each key that mtfast does something else for, and that therefore must not be passed over.
NOT_DONE: dict[str, Any] = {
    "aio": {"block_size": 131072},
    "amp": {"enabled": True, "opt_level": "O1"},
    "autotuning": {"enabled": True},
    "checkpoint": {"writer": {"type": "FAST"}},
    "compile": {"deepcompile": True},
    "compression_training": {"weight_quantization": {"shared_parameters": {"enabled": True}}},
    "curriculum_learning": {"enabled": True},
    "data_efficiency": {"enabled": True},
    "data_types": {"grad_accum_dtype": "fp32"},
    "dataloader_drop_last": True,
    "datastates_ckpt": {"host_cache_size": 16},
    "disable_allgather": True,
    "eigenvalue": {"enabled": True},
    "elasticity": {"enabled": True, "max_train_batch_size": 2000},
    "expert_parallel": {"enabled": True},
    "fp16": {"enabled": True, "loss_scale": 0},
    "gradient_allreduce_op": "sum",
    "graph_harvesting": True,
    "hybrid_engine": {"enabled": True},
    "managed_gradient_accumulation": False,
    "nebula": {"enabled": True},
    "pipeline": {"stages": 2},
    "progressive_layer_drop": {"enabled": True},
    "quantize_training": {"enabled": True},
    "seq_parallel_communication_data_type": "bf16",
    "sequence_parallel_size": 2,
    "sparse_attention": {"mode": "fixed"},
    "sparse_gradients": True,
    "tensor_parallel": {"autotp_size": 2},
    "torch_autocast": {"enabled": True},
    "use_data_before_expert_parallelism": True,
    "vocabulary_size": 30522,
    "weight_quantization": {"post_init_quant": {"fc": {"num_bits": 4}}},
}


def settings(
    tmp_path: Path, given: Any, *, world_size: int = 1, stage=STAGE, **engine: Any
) -> dict[str, Any]:
    path = tmp_path / "ds.json"
    path.write_text(given if isinstance(given, str) else json.dumps(given))
    config = EngineConfig(deepspeed_config=str(path), **engine)
    return deepspeed_config(config, stage, "finetune", world_size)


def refusal(tmp_path: Path, given: Any, **options: Any) -> str:
    with pytest.raises(ConfigError) as raised:
        settings(tmp_path, given, **options)
    assert raised.value.field == "engine.deepspeed_config"
    return str(raised.value)


class Asked(dict):
    """A configuration that notes every key that it is asked for."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.asked: set[str] = set()

    def get(self, key, default=None):
        self.asked.add(key)
        return super().get(key, default)

    def __getitem__(self, key):
        self.asked.add(key)
        return super().__getitem__(key)

    def __contains__(self, key):
        self.asked.add(key)
        return super().__contains__(key)

    def keys(self):
        whole = self

        class Keys(KeysView):
            def __contains__(self, key):
                return key in whole

        return Keys(self)

    def __copy__(self):
        return self


def keys_of_deepspeed() -> set[str]:
    given = Asked(train_batch_size=1)
    DeepSpeedConfig(given)
    return given.asked - {"bfloat16"}  # an old name of bf16


def table() -> str:
    lines = ["| key | what becomes of it | how, or why not |", "| --- | --- | --- |"]
    lines += [f"| `{name}` | {key.verdict} | {key.text} |" for name, key in KEYS.items()]
    return "\n".join(lines)


def test_every_key_that_deepspeed_asks_for_is_decided_on():
    asked = keys_of_deepspeed()
    assert len(asked) > 50 and {"optimizer", "scheduler", "aio", "autotuning", "nebula"} <= asked
    assert asked - KEYS.keys() == set()


def test_the_page_has_the_table():
    assert table() in PAGE.read_text(), f"python {Path(__file__).name} writes it"


def test_the_pages_json_is_taken(tmp_path):
    (given,) = re.findall(r"```json\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert settings(tmp_path, given)["zero_optimization"]["stage"] == 2


def test_each_key_that_is_not_done_is_named_with_what_to_do(tmp_path):
    assert NOT_DONE.keys() == {name for name, key in KEYS.items() if key.verdict != "works"}
    for name, value in NOT_DONE.items():
        text = refusal(tmp_path, {name: value})
        assert re.search(rf"\n  {name}: .+; leave it out$", text), text
    everything = refusal(tmp_path, NOT_DONE)
    assert all(f"\n  {name}: " in everything for name in NOT_DONE)


def test_what_is_off_is_no_reason_to_refuse(tmp_path):
    off = {"elasticity": {"enabled": False}, "fp16": {"enabled": "auto", "loss_scale_window": 1000}}
    off |= {"checkpoint": {"use_node_local_storage": False}, "gradient_allreduce_op": "mean"}
    off |= {"sparse_gradients": False, "seq_parallel_communication_data_type": "fp32", "amp": {}}
    made = settings(tmp_path, off)
    assert made["fp16"] == {"enabled": False}
    assert not made.keys() & (off.keys() - {"fp16"})
    assert all(says_nothing(key, value) for key, value in off.items())


def test_a_key_that_deepspeed_does_not_know_is_refused(tmp_path):
    text = refusal(tmp_path, {"zero_optimisation": {"stage": 2}, "colour": "red"})
    assert "zero_optimisation: DeepSpeed has no such key; did you mean zero_optimization?" in text
    assert "colour: DeepSpeed has no such key; docs/deepspeed.md has those that there are" in text


def test_what_the_run_decides_is_auto_or_equal(tmp_path):
    """The JSON of Hugging Face's Trainer, say."""
    usual = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto", "loss_scale": 0, "initial_scale_power": 16},
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
        },
        "scheduler": {
            "type": "WarmupLR",
            "params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto"},
        },
        "zero_optimization": {
            "stage": 3,
            "offload_optimizer": {"device": "cpu", "pin_memory": True},
            "overlap_comm": True,
            "sub_group_size": 1e9,
            "reduce_bucket_size": "auto",
            "stage3_prefetch_bucket_size": "auto",
            "stage3_gather_16bit_weights_on_model_save": True,
        },
        "steps_per_print": 2000,
        "wall_clock_breakdown": False,
    }
    made = settings(
        tmp_path, usual, world_size=2, stage=replace(STAGE, accumulation=4, gradient_clipping=1.0)
    )
    assert made["train_batch_size"] == 160 and made["train_micro_batch_size_per_gpu"] == 20
    assert made["gradient_accumulation_steps"] == 4 and made["gradient_clipping"] == 1.0
    assert made["bf16"]["enabled"] is True and made["steps_per_print"] == 2000
    assert made["zero_optimization"]["sub_group_size"] == 1e9
    assert "auto" not in json.dumps(made)
    assert settings(tmp_path, {"steps_per_print": None, "zero_optimization": {"offload_param": None}})
    equal = json.loads(json.dumps(usual).replace('"lr": "auto"', '"lr": 1e-05'))
    settings(tmp_path, equal | {"train_batch_size": 160, "gradient_clipping": 0.0})


def test_every_contradiction_is_named_with_both_values(tmp_path):
    contrary = {
        "train_batch_size": 64,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": False},
        "zero_optimization": {"stage": 3},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "weight_decay": 0.1, "eps": 1e-6}},
        "scheduler": {"type": "WarmupDecayLR", "params": {"warmup_num_steps": 50, "warmup_max_lr": 0.1}},
    }
    stage = replace(STAGE, schedule="cosine", warmup_fraction=0.1)
    text = refusal(tmp_path, contrary, zero_stage=1, stage=stage)
    for wanted in (
        "train_batch_size: the JSON says 64, finetune.batch_size 160; make them equal, or write",
        "gradient_clipping: the JSON says 1.0, finetune.gradient_clipping 0.0",
        "bf16.enabled: the JSON says False, engine.precision bf16 True",
        "zero_optimization.stage: the JSON says 3, engine.zero_stage 1",
        "optimizer.params.lr: the JSON says 0.001, finetune.learning_rate 1e-05",
        "optimizer.params.weight_decay: the JSON says 0.1, finetune.weight_decay 0.01",
        "scheduler.type: the JSON says WarmupDecayLR, finetune.schedule cosine",
        "scheduler.params.warmup_num_steps: the JSON says 50, finetune.warmup_fraction 0.1",
        "scheduler.params.warmup_max_lr: the JSON says 0.1, finetune.learning_rate 1e-05",
    ):
        assert f"\n  {wanted}" in text
    assert len(text.splitlines()) == 10


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"optimizer": {"type": "Lamb"}}, "optimizer.type: 'Lamb' is neither AdamW nor Adam"),
        ({"optimizer": {"type": "Adam", "params": {"adam_w_mode": False}}}, "adam_w_mode: False, and"),
        ({"optimizer": {"type": "Adam", "params": {"eps": "x"}}}, "eps: 'x' must be a number"),
        ({"optimizer": {"type": "Adam", "params": {"freeze_step": 3}}}, "params.freeze_step: there are lr,"),
        ({"optimizer": "AdamW"}, "optimizer: 'AdamW' must be an object"),
        ({"scheduler": {"type": "OneCycle"}}, "'OneCycle' is none of WarmupLR, WarmupDecayLR, Warmup"),
        ({"scheduler": {"type": "WarmupLR", "params": {"total_num_steps": 9}}}, "WarmupLR has warmup_min_lr"),
        ({"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 1.5}}}, "a number of steps"),
        ({"scheduler": {"type": "WarmupLR", "params": {"warmup_type": "sqrt"}}}, "none of log, linear"),
        ({"zero_optimization": {"stage": 4}}, "4 is none of 0, 1, 2, 3"),
        ({"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}}, "needs ZeRO 1, 2 or 3"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme"}}}, "update; use cpu"),
        ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, "param needs ZeRO 3"),
        ({"zero_optimization": {"stage": 2, "zero_hpz_partition_size": 2}}, "partition_size needs ZeRO 3"),
        ({"zero_optimization": {"stage": 2, "zero_quantized_weights": True}}, "_weights needs ZeRO 3"),
        ({"zero_optimization": {"stage": 2, "cpu_offload": True}}, "calls it offload_optimizer now"),
        ({"zero_optimization": {"stage": 3, "mics_shard_size": 8}}, "mics_shard_size: DeepSpeed has dropped"),
        ({"zero_optimization": {"stage": 3, "zeropp_loco_param": {}}}, "loco_param: DeepSpeed has dropped"),
        ({"zero_optimization": {"stage": 2, "zenflow": {}}}, "updates weights outside the step"),
        ({"activation_checkpointing": {"cpu_checkpointing": True}}, "inputs whole and on the device"),
        ({"zero_optimization": {"stage": 2}, "gradient_predivide_factor": 2.0}, "factor: ZeRO 2 needs zero"),
        ({"zero_optimization": {"stage": 3}, "prescale_gradients": True}, "gradients: ZeRO 3 needs zero"),
        ({"steps_per_print": {"a": 1}}, "steps_per_print: {'a': 1} must be a value"),
        ({"steps_per_print": 0}, "steps_per_print: 0 must be a number of steps, at least 1"),
        ({"wall_clock_breakdown": "yes"}, "wall_clock_breakdown: 'yes' must be true or false"),
        ({"gradient_predivide_factor": "2"}, "gradient_predivide_factor: '2' must be a positive number"),
        ('{"train_batch_size": 1, "train_batch_size": 2}', "two values are called train_batch_size"),
        ("{", "is not JSON"),
        ("[1]", "must hold a JSON object"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_told(tmp_path, given, said):
    assert said in refusal(tmp_path, given)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        deepspeed_config(EngineConfig(deepspeed_config=str(tmp_path / "absent.json")), STAGE, "finetune", 1)


@pytest.mark.parametrize("package", ["tensorboard", "wandb", "comet_ml"])
def test_a_monitor_without_its_package_is_refused(tmp_path, package, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    block = {"comet_ml": "comet"}.get(package, package)
    text = refusal(tmp_path, {block: {"enabled": True}})
    assert f"{block}: the package {package} is not installed: python -m pip install {package}" in text
    settings(tmp_path, {block: {"enabled": False}})


def test_a_users_json_has_the_last_word_on_what_the_run_does_not_decide(tmp_path):
    given = {
        "timers": {"throughput": {"enabled": True}},
        "bf16": {"check_grad_overflow": True},
        "zero_optimization": {"offload_optimizer": {"device": "cpu"}, "overlap_comm": False},
    }
    made = settings(tmp_path, given, zero_stage=2)
    assert made["timers"]["throughput"]["enabled"] is True and made["bf16"]["check_grad_overflow"] is True
    assert "compute_grad_norm" not in made["zero_optimization"]  # DeepSpeed's offload needs the norm
    assert made["zero_optimization"]["overlap_comm"] is False
    assert not made.keys() & {"optimizer", "scheduler"}  # they are handed over as objects


if __name__ == "__main__":
    text = PAGE.read_text()
    PAGE.write_text(re.sub(r"\| key \|.*\n(\|.*\n?)*", lambda _: table() + "\n", text))
