"""The optimizer without ZeRO: masters, gradients that add up in float32, clipping, its state."""

import copy

import pytest
import torch
from states import load_state, save_state
from torch import nn

from mtfast.config import EngineConfig, TaskStageConfig
from mtfast.training.engine import engine as engine_module
from mtfast.training.engine.engine import Engine
from mtfast.training.engine.optimizer import WholeOptimizer, parameter_groups

STEPS = 6


@pytest.fixture(autouse=True)
def started():
    engine_module.start()


def made(model: nn.Module, zero_stage: int, parts: int, **settings) -> Engine:
    stage = TaskStageConfig(batch_size=4 * parts, accumulation=parts, weight_decay=0.1, **settings)
    return Engine(model, EngineConfig(precision="bf16", zero_stage=zero_stage), stage, "finetune")


def part_of(step: int, part: int) -> torch.Tensor:
    return torch.randn(4, 7, generator=torch.Generator().manual_seed(10 * step + part)).bfloat16()


def loss_of(out: torch.Tensor) -> torch.Tensor:
    return (out.float() - 1).square().mean()


@pytest.mark.parametrize(
    ("parts", "clipping", "decay_all"), [(1, 0.05, True), (3, 0.0, False), (3, 0.05, True)]
)
def test_steps_are_adamws_in_float64_on_bf16_gradients(parts, clipping, decay_all):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3))
    masters = copy.deepcopy(model).double()
    bf16 = copy.deepcopy(model)
    found = {}
    for zero_stage in (0, 1) if parts == 1 else (0,):  # ZeRO adds up in bf16
        engine = made(
            copy.deepcopy(model), zero_stage, parts, gradient_clipping=clipping, decay_all=decay_all
        )
        for step in range(STEPS):
            engine.set_learning_rate(0.01 * (step + 1))
            for part in range(parts):
                engine.step(loss_of(engine.model(part_of(step, part))))
        found[zero_stage] = engine.state_dict()
        engine.close()

    vectors = {"params": [p for p in masters.parameters() if p.dim() == 1], "weight_decay": 0.1 * decay_all}
    others = {"params": [p for p in masters.parameters() if p.dim() > 1], "weight_decay": 0.1}
    optimizer = torch.optim.AdamW([vectors, others], eps=1e-8, foreach=False)
    for step in range(STEPS):
        for part in range(parts):
            bf16.load_state_dict(masters.state_dict())
            bf16.bfloat16()
            (loss_of(bf16(part_of(step, part))) / parts).backward()
            for p, master in zip(bf16.parameters(), masters.parameters(), strict=True):
                earlier = 0 if master.grad is None else master.grad
                master.grad = earlier + p.grad.double()
                p.grad = None
            bf16.float()
        if clipping:
            nn.utils.clip_grad_norm_(masters.parameters(), clipping)
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * (step + 1)
        optimizer.step()
        optimizer.zero_grad()
    for name, right in masters.state_dict().items():
        for state in found.values():
            torch.testing.assert_close(state[name].double(), right, rtol=1e-4, atol=1e-5)


def test_gradients_add_up_in_float32():
    """256 + 1 is 256 in bf16."""
    weight = nn.Parameter(torch.zeros(2))
    model = nn.ParameterList([weight])
    optimizer = WholeOptimizer(
        parameter_groups(model, TaskStageConfig()),
        lambda groups: torch.optim.SGD(groups, lr=1.0),
        copies=True,
        clipping=0.0,
        skip_non_finite=False,
    )
    model.bfloat16()
    for gradient in (256.0, 1.0):
        weight.grad = torch.full_like(weight, gradient)
        optimizer.accumulate()
        assert weight.grad is None
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    optimizer.step()
    assert optimizer.master_of[weight].tolist() == [-257.0, -257.0]
    assert weight.tolist() == [-256.0, -256.0] and optimizer.master_of[weight].grad is None


def test_a_continued_optimizer_repeats_the_uninterrupted_one(tmp_path):
    torch.manual_seed(0)
    model = nn.Linear(7, 3)

    def steps(engine: Engine, numbers: range) -> dict[str, torch.Tensor]:
        engine.set_learning_rate(0.01)
        for step in numbers:
            for part in range(2):
                engine.step(loss_of(engine.model(part_of(step, part))))
        return engine.state_dict()

    whole = made(copy.deepcopy(model), 0, 2)
    steps(whole, range(3))
    save_state(whole, tmp_path, 3, {})
    right = steps(whole, range(3, 6))
    whole.close()
    continued = made(model, 0, 2)
    assert load_state(continued, tmp_path) is not None
    found = steps(continued, range(3, 6))
    continued.close()
    assert all(torch.equal(found[name], x) for name, x in right.items())
