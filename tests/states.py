"""Small engines, their steps, and resumable states, written as training writes them."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from mtfast.config import EngineConfig, TaskStageConfig
from mtfast.training.engine import engine as engine_module
from mtfast.training.engine.engine import Engine
from mtfast.training.engine.keeping import Due, Keeper
from mtfast.training.engine.state import newest_state, read_state

STAGE = TaskStageConfig(batch_size=8, weight_decay=0.1, decay_all=False)  # so that weights are in two groups


def small(
    precision: str = "fp32",
    zero_stage: int | None = 0,
    hidden: int = 5,
    stage: TaskStageConfig = STAGE,
    **config: Any,
) -> Engine:
    engine_module.start()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, hidden), nn.Tanh(), nn.Linear(hidden, 3))
    model.register_buffer("steps", torch.zeros((), dtype=torch.int64))
    settings = EngineConfig(precision=precision, zero_stage=zero_stage, **config)
    engine = Engine(model, settings, stage, "finetune")
    engine.train()
    return engine


def steps(engine: Engine, numbers: range) -> list[float]:
    """The losses of so many steps, whose data follows from their numbers."""
    losses = []
    for number in numbers:
        torch.manual_seed(number)
        engine.set_learning_rate(0.01 * (number + 1))
        x = torch.randn(4, 7).to(next(engine.model.parameters()).dtype)
        loss = engine.model(x).float().square().sin().mean()
        engine.step(loss)
        engine.model.module.steps += 1
        losses.append(loss.item())
    return losses


def save_state(engine: Engine, directory: Path, step: int, client: dict[str, Any]) -> None:
    """Write the engine's state of this moment and wait for it."""
    keeper = Keeper(engine)
    keeper.keep(None, Due(directory, step, client))
    keeper.wait()


def load_state(engine: Engine, directory: Path) -> dict[str, Any] | None:
    """Go on from the newest state; what was saved with it."""
    found = newest_state(directory)
    if found is None:
        return None
    state = read_state(found.path)
    engine.load(state)
    return state.client
