"""Gradients that are not finite under a finite loss, and small training runs that meet them."""

import itertools
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mtfast.config import EngineConfig, RunConfig, TaskStageConfig
from mtfast.models.files import replacing, save_tensors
from mtfast.training.engine import alive, ranks
from mtfast.training.engine import engine as engine_module
from mtfast.training.engine.engine import Engine
from mtfast.training.stage import Stage


class Poison(torch.autograd.Function):
    """The identity; the gradient that goes back through it is `value`."""

    @staticmethod
    def forward(context, x: Tensor, value: float) -> Tensor:
        context.value = value
        return x.clone()

    @staticmethod
    def backward(context, gradient: Tensor) -> tuple[Tensor, None]:
        return torch.full_like(gradient, context.value), None


STEPS = 4  # in an epoch of `Small`
METRICS = {"mean": "mean", "sst": "sst_accuracy", "quora": "quora_accuracy", "sts": "sts_pearson"}


class Rows(NamedTuple):
    """A micro-batch of `Small`."""

    x: Tensor
    size: int = 4
    tokens: int = 4


class Small(Stage):
    """A linear layer fitted to zero. `bad`: calls of the backward pass that find a NaN gradient."""

    name = "finetune"
    loss_names = ("fit",)
    criteria: Mapping[str, str] = METRICS
    flops_per_token = 0.0

    def __init__(self, config: RunConfig, bad: tuple[int, ...] = ()) -> None:
        self.settings, self.seed = config.finetune, config.seed
        torch.manual_seed(0)
        self.engine = Engine(nn.Linear(6, 2), config.engine, config.finetune, self.name)
        self.bad, self.steps = bad, itertools.count(1)
        self.dtype = torch.bfloat16 if config.engine.precision == "bf16" else torch.float32
        self.scores = itertools.repeat(0.5)

    def plan(self, epoch: int) -> list[int]:
        return list(range(STEPS))

    def micro_batches(self, steps: list[int], epoch: int) -> Iterator[list[Rows]]:
        for step in steps:
            generator = torch.Generator().manual_seed(STEPS * epoch + step)
            yield [Rows(torch.randn(4, 6, generator=generator).to(self.dtype))]

    def losses(self, batch: Rows) -> dict[str, Tensor]:
        return {"fit": self.engine.model(batch.x).float().square().mean()}

    def total(self, losses: dict[str, Tensor]) -> Tensor:
        loss = losses["fit"]
        return Poison.apply(loss, math.nan) if loss.requires_grad and next(self.steps) in self.bad else loss

    def evaluate(self) -> dict[str, float]:
        score = next(self.scores)
        return {name: score for name in METRICS.values()}

    def save(self, directory: Path, state: dict[str, Tensor]) -> None:
        with replacing(directory) as incoming:
            save_tensors(incoming / "weights.safetensors", state)


def trained(
    precision: str, zero_stage: int, steps: list[int], bad: dict[int, float], **settings
) -> tuple[dict[str, Tensor], int, str | None]:
    """A small model trained on `steps`, whose data follows from their numbers.

    Args:
        bad: numbers of steps whose last micro-batch on the last rank has this gradient in place of its own.

    Returns:
        Its weights, how many steps were left out and the first weight that is not finite.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3))
    stage = TaskStageConfig(batch_size=8 * ranks.world_size(), accumulation=2, weight_decay=0.1, **settings)
    engine = Engine(model, EngineConfig(precision=precision, zero_stage=zero_stage), stage, "finetune")
    engine.train()
    for number in steps:
        engine.set_learning_rate(0.1)
        for part in range(2):
            torch.manual_seed(100 * number + 10 * part + ranks.rank())
            out = engine.model(torch.randn(4, 7).to(next(model.parameters()).dtype)).float()
            last = part == 1 and ranks.rank() == ranks.world_size() - 1
            engine.step((Poison.apply(out, bad[number]) if last and number in bad else out).square().mean())
    found = engine.state_dict(), engine.skipped, engine.first_non_finite()
    engine.close()
    return found


def check_skipping(precision: str, zero_stage: int, value: float, clipping: float) -> None:
    """A step whose gradients are not finite is as if it were not there."""
    settings = {"non_finite": "skip", "gradient_clipping": clipping}
    weights, skipped, bad = trained(precision, zero_stage, [1, 2, 3], {2: value}, **settings)
    without, *_ = trained(precision, zero_stage, [1, 3], {}, **settings)
    assert (skipped, bad) == (1, None)
    assert all(torch.equal(x, without[name]) for name, x in weights.items())


def check_every_zero_stage() -> None:
    """On each rank of a run: `check_skipping` with gradients of the last rank's."""
    engine_module.start()
    for kind in (("fp32", 0), ("bf16", 1), ("fp32", 2), ("bf16", 3)):
        check_skipping(*kind, math.nan, clipping=0.0)
    # The rank without such gradients tells of the weights too.
    assert trained("bf16", 1, [1, 2], {2: math.nan})[1:] == (0, "0.weight")
    alive.finish()
