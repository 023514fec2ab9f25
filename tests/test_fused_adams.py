"""The Adams of apex and DeepSpeed, their CUDA kernel replaced: they train as torch's AdamW does, under each
ZeRO stage, and go on from its states as it does from theirs."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import apex_stand_in
import deepspeed.ops.adam.fused_adam as deepspeed_adam
import pytest
import torch
from processes import Ranks
from states import load_state, save_state
from torch import Tensor, nn

from mtfast import commands
from mtfast.config import ConfigError, EngineConfig, TaskStageConfig
from mtfast.recipes import demo
from mtfast.training.engine import engine as engine_module
from mtfast.training.engine import optimizer as optimizer_module
from mtfast.training.engine import ranks
from mtfast.training.engine.engine import Engine
from mtfast.training.engine.optimizer import optimizer_class

STAGE = TaskStageConfig(batch_size=8, weight_decay=0.1, decay_all=False, gradient_clipping=0.5)
ADAMS = ["apex-adam", "deepspeed-adam"]


class Builder:
    """DeepSpeed's, which would compile the kernel."""

    def load(self) -> type:
        return type("Kernels", (), {"multi_tensor_adam": staticmethod(apex_stand_in.multi_tensor_adam)})


def replace_kernels(patch: pytest.MonkeyPatch) -> None:
    """And let the optimizers find a GPU."""
    apex_stand_in.install(patch)
    patch.setattr(deepspeed_adam, "FusedAdamBuilder", Builder)
    patch.setattr(optimizer_module, "optimizer_class", with_gpu)


def with_gpu(config: EngineConfig, **options: Any) -> type:
    """`optimizer_class`, for which alone there is a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        return optimizer_class(config, **options)


@pytest.fixture
def kernels(monkeypatch):
    replace_kernels(monkeypatch)


def made(optimizer: str, zero_stage: int, directory: Path, precision: str = "fp32", world: int = 1) -> Engine:
    """Of a model with several weights in a group, and under ZeRO 3 with several parts of one."""
    engine_module.start()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    path = directory / f"deepspeed-{ranks.rank()}.json"
    path.write_text(json.dumps({"zero_optimization": {"sub_group_size": 30} if zero_stage == 3 else {}}))
    config = EngineConfig(precision, zero_stage, optimizer, deepspeed_config=str(path))
    return Engine(model, config, replace(STAGE, batch_size=8 * world), "finetune")


def train(engine: Engine, steps: range) -> dict[str, Tensor]:
    engine.train()
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(8, 7, generator=generator).to(next(engine.model.parameters()).dtype)
        engine.set_learning_rate(0.01 * (step + 1))
        engine.step((engine.model(x).float() - 1).square().mean())
    return engine.state_dict()


def close(found: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    for name, weight in right.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("zero_stage", range(4))
@pytest.mark.parametrize("optimizer", ADAMS)
def test_steps_are_those_of_adamw(optimizer, zero_stage, precision, kernels, tmp_path):
    found = {}
    for name in ("adamw", optimizer):
        engine = made(name, zero_stage, tmp_path, precision)
        found[name] = train(engine, range(5))
        if zero_stage == 3:
            assert len(engine._optimizer._flats) > len(engine._is_apart)
        engine.close()
    close(found[optimizer], found["adamw"])


@pytest.mark.parametrize("zero_stage", [0, 1, 3])
@pytest.mark.parametrize("optimizer", ADAMS)
def test_states_are_gone_on_from_by_one_another(optimizer, zero_stage, kernels, tmp_path):
    """By it from torch's, by it from its own and by torch's from its own."""
    whole = made("adamw", zero_stage, tmp_path)
    right = train(whole, range(8))
    whole.close()
    for part, name in enumerate(["adamw", optimizer, optimizer, "adamw"]):
        engine = made(name, zero_stage, tmp_path)
        assert (load_state(engine, tmp_path) is None) == (part == 0)
        found = train(engine, range(2 * part, 2 * part + 2))
        save_state(engine, tmp_path, 2 * part + 2, {})
        engine.close()
    close(found, right)


def train_on_two(directory: Path) -> None:
    """On one of two ranks."""
    with pytest.MonkeyPatch.context() as patch:
        replace_kernels(patch)
        for zero_stage in (0, 1):
            found = []
            for name in ("adamw", "apex-adam"):
                engine = made(name, zero_stage, directory, world=2)
                found.append(train(engine, range(4)))
                engine.close()
            close(*reversed(found))
    engine_module.stop()


def test_two_ranks_step_as_with_adamw(tmp_path):
    Ranks(train_on_two, tmp_path, output=tmp_path / "said", world_size=2).succeed()


@pytest.mark.parametrize(
    ("gpu", "absent", "message"),
    [
        (False, (), r"engine\.optimizer 'apex-adam' needs a GPU; use 'adamw' here"),
        (
            True,
            ("apex", "apex.optimizers"),
            r"needs NVIDIA apex .* unrelated web toolkit .*apex.* use 'adamw'",
        ),
        (True, ("apex.optimizers",), r"needs NVIDIA apex .* an unrelated web toolkit .*apex\.optimizers"),
        (True, ("amp_C",), r"needs NVIDIA apex with its CUDA kernels.*amp_C"),
    ],
    ids=["no GPU", "no apex", "the web toolkit", "no kernels"],
)
def test_what_it_needs_is_told_before_anything_is_read(gpu, absent, message, tmp_path, monkeypatch):
    apex_stand_in.install(monkeypatch)
    for name in absent:
        monkeypatch.setitem(sys.modules, name, None)
    if gpu:
        monkeypatch.setattr(optimizer_module, "optimizer_class", with_gpu)
    monkeypatch.chdir(tmp_path)  # where the demo's corpus would be written
    config = demo()
    data = replace(config.data, tasks="no/such/directory")
    config = replace(config, data=data, engine=EngineConfig(optimizer="apex-adam"))
    for command in (commands.prepare, lambda config: commands.train(config, "pretrain")):
        with pytest.raises(ConfigError, match=message):
            command(config)
    assert not list(tmp_path.iterdir())
