"""Fine-tuning steps: mtfast's packed step against the same step in eager PyTorch, on the same examples.

    python -m benchmarks finetune_step --data DIR --checkpoint DIR

Both train one BERT on SST, Quora and STS with the recipe's 160 examples a step, proportionally mixed, in bf16
with float32 weights in AdamW and dropout 0.1: forward, backward, optimizer. mtfast runs the step that
`mtfast finetune` runs, under DeepSpeed; the other is plain PyTorch with Hugging Face's BertModel
(`benchmarks/eager_twin.py`). They take turns on the same batches, so that a slow moment of the machine meets
both. Before that, both must give the same losses in float32 without dropout. Batches are made beforehand.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import RESULTS, default_device, rows_of, summary, write_results
from benchmarks.eager_twin import MasterAdamW, PaddedTask, pad_task
from benchmarks.stage_setup import (
    Clock,
    Tables,
    device_name,
    load_tables,
    parser_of,
    recipe,
    total,
    twin_of,
    weights_of,
)
from mtfast.config import RunConfig
from mtfast.data.packing import PackedBatch, pack_tasks
from mtfast.data.sampler import plan_epoch
from mtfast.training.engine.engine import start, stop
from mtfast.training.run.weights import build_multitask
from mtfast.training.stages.finetune import Finetune

WARM_UP = 2
LOSS_TOLERANCE = 1e-4  # relative, float32, dropout off


def main(argv: list[str]) -> None:
    """Run the benchmark, print its result and write it to benchmarks/results/."""
    parser = parser_of("finetune_step", "fine-tuning steps, packed against eager PyTorch")
    parser.add_argument("--steps", type=int, default=10, help="steps measured of each (default: 10)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="directory of the results file")
    arguments = parser.parse_args(argv)
    result = compare(arguments.data, arguments.checkpoint, arguments.steps)
    print(describe(result))
    real, padded = (round(result[f"{kind}_tokens_per_step"]) for kind in ("real", "padded"))
    case = f"{result['examples_per_step']} examples, {real} real tokens, {padded} padded"
    timings = {name: summary(result[name]["seconds"]) for name in ("eager", "mtfast")}
    rows = rows_of("finetune_step", case, timings, "eager")
    print(f"written to {write_results(rows, default_device(), arguments.results)}")


def compare(data: str, checkpoint: str, steps: int) -> dict[str, Any]:
    """Check the losses and measure `steps` steps of both."""
    config = recipe(checkpoint)
    tables = load_tables(data, config, "train")
    device = start()
    try:
        packed, padded = make_batches(tables, config, WARM_UP + steps, device)
        check_losses(checkpoint, packed[0], padded[0], device)
        return measure(config, tables, packed, padded, device)
    finally:
        stop()


def make_batches(
    tables: Tables, config: RunConfig, count: int, device: torch.device
) -> tuple[list[PackedBatch], list[dict[str, PaddedTask]]]:
    """The first `count` steps of an epoch, packed and padded."""
    stage = config.finetune
    lengths = {task: table.lengths for task, table in tables.items()}
    packed, padded = [], []
    for plan in plan_epoch(lengths, batch_size=stage.batch_size, seed=config.seed, epoch=0)[:count]:
        (examples,) = plan.micro_batches
        batch = pack_tasks(tables, examples, plan.step_counts, bucket_tokens=stage.bucket_tokens)
        packed.append(batch.to(device))
        padded.append({task: pad_task(tables[task], rows).to(device) for task, rows in examples.items()})
    return packed, padded


def check_losses(
    checkpoint: str, packed: PackedBatch, padded: dict[str, PaddedTask], device: torch.device
) -> None:
    """Stop the benchmark unless both models give the same losses for the same examples."""
    config = recipe(checkpoint, dropout_p=0.0)
    model, _ = build_multitask(weights_of(config), config.tasks)
    twin = twin_of(config, model.heads).to(device).train()
    model.to(device).train()
    with torch.no_grad():
        ours = model(**packed.model_inputs(), rows=packed.tasks)
        theirs = twin(padded)
    for task in config.tasks:
        mine, other = ours[task].item(), theirs[task].item()
        if not abs(mine - other) <= LOSS_TOLERANCE * abs(other):
            raise SystemExit(f"{task}: mtfast's loss is {mine:.6f}, the eager twin's {other:.6f}")
        print(f"{task}: float32 loss without dropout {mine:.6f}, eager {other:.6f}")


def measure(
    config: RunConfig,
    tables: Tables,
    packed: list[PackedBatch],
    padded: list[dict[str, PaddedTask]],
    device: torch.device,
) -> dict[str, Any]:
    """Seconds of every step of both, taking turns, after the warm-up."""
    weights = weights_of(config)
    model, _ = build_multitask(weights, config.tasks)
    twin = twin_of(config, model.heads).to(device, torch.bfloat16).train()
    optimizer = MasterAdamW(twin, config.finetune.learning_rate)
    load = {"train": tables, "dev": {}}.__getitem__
    stage = Finetune(load, weights, config.finetune, config.engine, config.seed)
    stage.engine.train()
    ours, theirs = [], []
    for our_batch, their_batch in zip(packed, padded, strict=True):
        clock = Clock(device)
        stage.step(our_batch)
        ours.append(clock.lap())
        total(twin(their_batch)).backward()
        optimizer.step()
        theirs.append(clock.lap())
    stage.engine.close()

    examples = config.finetune.batch_size
    tokens = statistics.mean(batch.tokens for batch in packed[WARM_UP:])
    padding = statistics.mean(sum(t.input_ids.numel() for t in batch.values()) for batch in padded[WARM_UP:])
    result: dict[str, Any] = {
        "device": device_name(device),
        "examples_per_step": examples,
        "real_tokens_per_step": tokens,
        "padded_tokens_per_step": padding,
    }
    for name, times in (("mtfast", ours[WARM_UP:]), ("eager", theirs[WARM_UP:])):
        median = statistics.median(times)
        rates = {"examples_per_s": examples / median, "tokens_per_s": tokens / median}
        result[name] = {"median_s": median, **rates, "seconds": times}
    result["ratio"] = result["eager"]["median_s"] / result["mtfast"]["median_s"]
    return result


def describe(result: dict[str, Any]) -> str:
    """The result as a few lines for people."""
    real, padded = result["real_tokens_per_step"], result["padded_tokens_per_step"]
    lines = [
        f"fine-tuning in bf16, {result['examples_per_step']} examples a step, {result['device']}",
        f"{real:,.0f} real tokens a step; padded to the longest of each task {padded:,.0f}",
    ]
    for name, label in (("mtfast", "mtfast, packed"), ("eager", "eager, padded")):
        part = result[name]
        lines.append(
            f"{label:15} {part['median_s']:8.3f} s/step {part['examples_per_s']:9.1f} examples/s "
            f"{part['tokens_per_s']:10,.0f} real tokens/s"
        )
    return "\n".join([*lines, f"ratio {result['ratio']:.2f}"])
