"""Head training: cached features against live ones and against the eager loop, on either.

    python -m benchmarks head_stage --data DIR --checkpoint DIR

The heads of SST, Quora and STS are trained on the frozen encoder with the recipe's 2048 examples a step in
bf16: by mtfast with `features: cached` (every sentence encoded once, then epochs on the table), by mtfast
with `features: live` (the encoder in every step) and by plain PyTorch with Hugging Face's BertModel, which
also runs the encoder in every step. The ratios are for the recipe's 48 epochs; the cached side includes its
encoding. An epoch on cached features is also compared with plain PyTorch on the same table: the same heads
under autocast with torch's fused AdamW, taking turns.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import RESULTS, default_device, rows_of, summary, write_results
from benchmarks.eager_twin import EagerTwin, MasterAdamW, pad_task, total
from benchmarks.stage_setup import (
    Clock,
    Tables,
    device_name,
    load_tables,
    parser_of,
    recipe,
    weights_of,
)
from mtfast.config import RunConfig
from mtfast.data.packing import PackedBatch
from mtfast.data.sampler import StepPlan
from mtfast.models.multitask import MultiTaskHeads
from mtfast.training.engine.engine import start, stop
from mtfast.training.run.weights import Weights, build_multitask
from mtfast.training.stages.heads import CachedBatch, Heads

CACHED_EPOCHS = 3
LOSS_TOLERANCE = 0.02  # relative, bf16, dropout off


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
    epochs = {name: summary(seconds) for name, seconds in result["epoch_on_table"].items()}
    rows += rows_of("head_stage", f"epoch on cached features, {result['examples']} examples", epochs, "eager")
    print(f"written to {write_results(rows, default_device(), arguments.results)}")


def compare(data: str, checkpoint: str, steps: int | None) -> dict[str, Any]:
    """Seconds of the stage in all three ways; live and eager worked out from `steps` steps, or an epoch."""
    config = recipe(checkpoint)
    tables = {split: load_tables(data, config, split) for split in ("train", "dev")}  # type: ignore[arg-type]
    device = start()
    try:
        cost, epochs = cached(config, tables, device)
        costs = {
            "cached": cost,
            "live": live(recipe(checkpoint, features="live"), tables, device, steps),
            "eager": eager(config, tables, device, steps),
        }
    finally:
        stop()
    result: dict[str, Any] = {
        "device": device_name(device),
        "epochs": config.heads.epochs,
        "examples": sum(len(table) for table in tables["train"].values()),
        "epoch_on_table": epochs,
    }
    for name, cost in costs.items():
        stage = {"before_s": cost.before, "epoch_s": cost.epoch, "stage_s": cost.of(config.heads.epochs)}
        ratio = stage["stage_s"] / costs["cached"].of(config.heads.epochs)
        result[name] = {**stage, "ratio": ratio}
    return result


def stage_of(config: RunConfig, tables: dict[str, Tables], weights: Weights) -> Heads:
    """Head training as `mtfast heads` has it."""
    state = config.path / "heads" / "state"
    return Heads(tables.__getitem__, weights, config.heads, config.engine, config.seed, state)


def cached(
    config: RunConfig, tables: dict[str, Tables], device: torch.device
) -> tuple[Cost, dict[str, list[float]]]:
    """mtfast on cached features; before the first step it builds the stage and encodes train and dev.

    Also the seconds of epochs of mtfast and of plain PyTorch on that table, taking turns.
    """
    weights = weights_of(config)
    clock = Clock(device)
    stage = stage_of(config, tables, weights)
    before = clock.lap()
    twin = eager_twin(config, build_multitask(weights, config.tasks)[0].heads).to(device).train()
    heads = [p for name, p in twin.named_parameters() if not name.startswith("bert.")]
    optimizer = torch.optim.AdamW(heads, lr=config.heads.learning_rate, weight_decay=0.01, fused=True)
    check_losses(stage, twin)
    seconds: dict[str, list[float]] = {"mtfast": [], "eager": []}
    for epoch in range(1 + CACHED_EPOCHS):
        plan = stage.plan(epoch)
        clock.lap()
        _train(stage, plan, epoch)
        seconds["mtfast"].append(clock.lap())
        _train_eager(stage, plan, epoch, twin, optimizer)
        seconds["eager"].append(clock.lap())
    stage.engine.close()
    measured = {name: values[1:] for name, values in seconds.items()}  # the first epoch warms up
    return Cost(before, statistics.median(measured["mtfast"])), measured


def eager_twin(config: RunConfig, heads: MultiTaskHeads) -> EagerTwin:
    """The eager model with the checkpoint's weights and those of `heads`, in float32."""
    return EagerTwin(config.model.checkpoint, heads, config.model.dropout_p)


def check_losses(stage: Heads, twin: EagerTwin) -> None:
    """Stop the benchmark unless both give the same losses for the same cached examples, without dropout."""
    ((batch,),) = stage.micro_batches(stage.plan(0)[:1], 0)
    assert isinstance(batch, CachedBatch)
    stage.engine.train(False)
    with torch.no_grad():
        ours, theirs = stage.losses(batch), eager_losses(stage, twin.eval(), batch)
    twin.train()
    for task, loss in theirs.items():
        if not abs(ours[task].item() - loss.item()) <= LOSS_TOLERANCE * abs(loss.item()):
            raise SystemExit(
                f"{task}: mtfast's loss is {ours[task].item():.4f}, the eager twin's {loss.item():.4f}"
            )


def _train_eager(
    stage: Heads, plan: list[StepPlan], epoch: int, twin: EagerTwin, optimizer: torch.optim.Optimizer
) -> None:
    with unfilled(stage):
        for (batch,) in stage.micro_batches(plan, epoch):
            assert isinstance(batch, CachedBatch)
            optimizer.zero_grad()
            total(eager_losses(stage, twin, batch)).backward()
            optimizer.step()


@contextmanager
def unfilled(stage: Heads) -> Iterator[None]:
    """Batches with their examples alone, for what takes the mean over them."""
    room, stage.room = stage.room, None
    try:
        yield
    finally:
        stage.room = room


def eager_losses(stage: Heads, twin: EagerTwin, batch: CachedBatch) -> dict[str, Tensor]:
    """The eager heads' losses on the stage's table."""
    cls, labels = {}, {}
    for task, examples in batch.by_task(batch.numbers).items():
        rows = stage.table.rows(task, examples)
        cls[task] = stage.table.cls[rows if rows.dim() == 1 else rows.t().reshape(-1)]
        labels[task] = stage.labels[task][examples]
    with torch.autocast(stage.engine.device.type, torch.bfloat16):
        return twin.losses(cls, labels)


def live(config: RunConfig, tables: dict[str, Tables], device: torch.device, steps: int | None) -> Cost:
    """mtfast with the encoder in every step."""
    stage = stage_of(config, tables, weights_of(config))
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
            assert isinstance(micro_batch, CachedBatch | PackedBatch)
            stage.step(micro_batch)


def eager(config: RunConfig, tables: dict[str, Tables], device: torch.device, steps: int | None) -> Cost:
    """The loop in plain PyTorch; its batches are padded outside the clock."""
    weights = weights_of(config)
    stage = stage_of(recipe(config.model.checkpoint, features="live"), tables, weights)
    plan = stage.plan(0)
    stage.engine.close()
    model, _ = build_multitask(weights, config.tasks)
    twin = eager_twin(config, model.heads).to(device, torch.bfloat16).train()
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
        total(twin.losses(cls, {task: part.labels for task, part in batch.items()})).backward()
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
    ours, theirs = (statistics.median(result["epoch_on_table"][name]) for name in ("mtfast", "eager"))
    rate = result["examples"] / ours
    lines.append(
        f"an epoch on cached features: mtfast {ours:.3f} s ({rate:,.0f} examples/s), eager {theirs:.3f} s, "
        f"ratio {theirs / ours:.2f}"
    )
    return "\n".join(lines)
