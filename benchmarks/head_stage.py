"""Head training: cached features against live ones and against the eager loop.

    python -m benchmarks head_stage --data DIR --checkpoint DIR

The heads of SST, Quora and STS are trained on the frozen encoder with the recipe's 2048 examples a step in
bf16: by mtfast with `features: cached` (every sentence encoded once, then epochs on the table), by mtfast
with `features: live` (the encoder in every step) and by plain PyTorch with Hugging Face's BertModel, which
also runs the encoder in every step. The ratios are for the recipe's 48 epochs; the cached side includes its
encoding.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import RESULTS, default_device, rows_of, summary, write_results
from benchmarks.eager_twin import MasterAdamW, pad_task
from benchmarks.stage_setup import (
    Clock,
    Tables,
    device_name,
    load_tables,
    parser_of,
    recipe,
    source_of,
    total,
    twin_of,
)
from mtfast.data.sampler import StepPlan
from mtfast.train.config import RunConfig
from mtfast.train.engine import start, stop
from mtfast.train.heads import Heads
from mtfast.train.sources import build_multitask

CACHED_EPOCHS = 3


@dataclass(frozen=True)
class Cost:
    """Seconds before the first step, and of one epoch."""

    before: float
    epoch: float

    def of(self, epochs: int) -> float:
        """Seconds of a stage of so many epochs."""
        return self.before + epochs * self.epoch


def main(argv: list[str]) -> None:
    """Run the benchmark, print its result and write it to benchmarks/results/."""
    parser = parser_of("head_stage", "head training with cached features, live features and eager PyTorch")
    text = "steps measured of live and eager, from which an epoch is worked out (default: a whole epoch)"
    parser.add_argument("--steps", type=int, help=text)
    parser.add_argument("--results", type=Path, default=RESULTS, help="directory of the results file")
    arguments = parser.parse_args(argv)
    result = compare(arguments.data, arguments.checkpoint, arguments.steps)
    print(describe(result))
    timings = {name: summary([result[name]["stage_s"]]) for name in ("cached", "live", "eager")}
    rows = rows_of("head_stage", f"{result['epochs']} epochs", timings, "live")
    print(f"written to {write_results(rows, default_device(), arguments.results)}")


def compare(data: str, checkpoint: str, steps: int | None) -> dict[str, Any]:
    """Seconds of the stage in all three ways; live and eager worked out from `steps` steps, or an epoch."""
    config = recipe(checkpoint)
    tables = {split: load_tables(data, config, split) for split in ("train", "dev")}  # type: ignore[arg-type]
    device = start()
    try:
        costs = {
            "cached": cached(config, tables, device),
            "live": live(recipe(checkpoint, features="live"), tables, device, steps),
            "eager": eager(config, tables, device, steps),
        }
    finally:
        stop()
    epochs = config.heads.epochs
    result: dict[str, Any] = {"device": device_name(device), "epochs": epochs}
    for name, cost in costs.items():
        stage = {"before_s": cost.before, "epoch_s": cost.epoch, "stage_s": cost.of(epochs)}
        result[name] = {**stage, "ratio": cost.of(epochs) / costs["cached"].of(epochs)}
    return result


def cached(config: RunConfig, tables: dict[str, Tables], device: torch.device) -> Cost:
    """mtfast on cached features; before the first step it builds the stage and encodes train and dev."""
    source = source_of(config)
    clock = Clock(device)
    stage = Heads(config, tables["train"], tables["dev"], source)
    before = clock.lap()
    epochs = []
    for epoch in range(CACHED_EPOCHS):
        _train(stage, stage.plan(epoch), epoch)
        epochs.append(clock.lap())
    stage.engine.close()
    return Cost(before, statistics.median(epochs))


def live(config: RunConfig, tables: dict[str, Tables], device: torch.device, steps: int | None) -> Cost:
    """mtfast with the encoder in every step."""
    stage = Heads(config, tables["train"], tables["dev"], source_of(config))
    plan = stage.plan(0)
    _train(stage, plan[:1], 0)
    measured = plan[:steps]
    clock = Clock(device)
    _train(stage, measured, 0)
    seconds = clock.lap()
    stage.engine.close()
    return Cost(0.0, seconds * len(plan) / len(measured))


def _train(stage: Heads, steps: list[StepPlan], epoch: int) -> None:
    stage.engine.train()
    for micro_batches in stage.micro_batches(steps, epoch):
        for micro_batch in micro_batches:
            stage.step(micro_batch.data)


def eager(config: RunConfig, tables: dict[str, Tables], device: torch.device, steps: int | None) -> Cost:
    """The loop in plain PyTorch; its batches are padded outside the clock."""
    stage = Heads(
        recipe(config.model.checkpoint, features="live"), tables["train"], tables["dev"], source_of(config)
    )
    plan = stage.plan(0)
    stage.engine.close()
    model, _ = build_multitask(config, source_of(config))
    twin = twin_of(config, model.heads).to(device, torch.bfloat16).train()
    twin.bert.requires_grad_(False)
    optimizer = MasterAdamW(twin, config.heads.learning_rate)
    measured = plan[:steps]
    seconds = 0.0
    for index, step in enumerate([plan[0], *measured]):
        (examples,) = step.micro_batches
        batch = {task: pad_task(tables["train"][task], rows).to(device) for task, rows in examples.items()}
        clock = Clock(device)
        with torch.no_grad():
            cls = {task: twin.encode(part) for task, part in batch.items()}
        total(twin.losses(cls, batch)).backward()
        optimizer.step()
        seconds += clock.lap() if index else 0.0  # the first step warms up
    return Cost(0.0, seconds * len(plan) / len(measured))


def describe(result: dict[str, Any]) -> str:
    """The result as a few lines for people."""
    lines = [f"head training in bf16, 2048 examples a step, {result['device']}"]
    for name in ("cached", "live", "eager"):
        part = result[name]
        lines.append(
            f"{name:7} {part['before_s']:8.1f} s before, {part['epoch_s']:9.3f} s an epoch, "
            f"{part['stage_s']:10.1f} s for {result['epochs']} epochs ({part['ratio']:.1f} x cached)"
        )
    return "\n".join(lines)
