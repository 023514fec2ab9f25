"""How many shapes the steps of an epoch have, as they come and filled up, and what filling up costs.

    python -m benchmarks shapes --data DIR --checkpoint DIR [--reviews 16000]

Of fine-tuning at the recipe's 160 examples a step on all of the data, and of pre-training at 16 samples of at
most 512 and of at most 256 word pieces on some of the reviews. "filler_share" is the filler's tokens over the
real ones; the time is that of packing a step, on the CPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import RESULTS, Row, print_rows, rows_of, summary, write_results
from benchmarks.pretrain_step import MAX_LENGTHS
from benchmarks.stage_setup import load_tables, parser_of, recipe, reviews_in
from mtfast.data.packing import PackedBatch, ReviewBatch, pack_reviews, pack_tasks
from mtfast.data.reviews import build_samples, read_reviews
from mtfast.data.sampler import plan_epoch, plan_reviews, room_of, room_of_reviews
from mtfast.models.checkpoint import load_tokenizer

AS_THEY_COME, FILLED = "as they come", "filled up"
Pack = Callable[[Any, Any], PackedBatch | ReviewBatch]  # a step's plan, and the room there is


def main(argv: list[str]) -> int:
    """Run the benchmark, print its table and write it to the results file."""
    parser = parser_of("shapes", "shapes of an epoch's steps, as they come and filled up")
    parser.add_argument("--reviews", type=int, default=16000, help="for pre-training (default: 16000)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="directory of the results file")
    options = parser.parse_args(argv)
    rows = finetuning(options.data, options.checkpoint)
    for most in MAX_LENGTHS:
        rows += pretraining(options.data, options.checkpoint, options.reviews, most)
    print_rows(rows)
    print(f"written to {write_results(rows, torch.device('cpu'), options.results)}")
    return 0


def finetuning(data: str, checkpoint: str) -> list[Row]:
    """The rows of fine-tuning."""
    config = recipe(checkpoint)
    tables, size = load_tables(data, config, "train"), config.finetune.batch_size
    lengths = {name: table.lengths for name, table in tables.items()}
    plan = plan_epoch(lengths, batch_size=size, seed=config.seed, epoch=0)

    def pack(step: Any, room: Any) -> PackedBatch:
        return pack_tasks(tables, step.micro_batches[0], step.weights(1), room=room)

    return compare(f"finetune {size} examples, {len(plan)} steps", plan, pack, room_of(plan))


def pretraining(data: str, checkpoint: str, reviews: int, max_length: int) -> list[Row]:
    """The rows of pre-training on samples of at most `max_length` tokens."""
    config = recipe(checkpoint)
    size, probability = config.pretrain.batch_size, config.pretrain.mlm_probability
    samples = build_samples(
        read_reviews(reviews_in(data), reviews),
        load_tokenizer(checkpoint),
        max_length=max_length,
        seed=config.seed,
    )
    masked = samples.masked_counts(probability)
    plan = plan_reviews(samples.lengths, masked, batch_size=size, seed=config.seed, epoch=0)

    def pack(step: Any, room: Any) -> ReviewBatch:
        weights = {"mlm_weight": 1 / step.step_masked, "nsp_weight": 1 / step.step_samples}
        return pack_reviews(samples, step.micro_batches[0], mlm_probability=probability, **weights, room=room)

    case = f"pretrain {size} samples of at most {max_length}, {len(plan)} steps"
    return compare(case, plan, pack, room_of_reviews(plan))


def compare(case: str, plan: Sequence[Any], pack: Pack, room: Any) -> list[Row]:
    """The rows of a stage."""
    seconds: dict[str, list[float]] = {AS_THEY_COME: [], FILLED: []}
    batches: dict[str, list[PackedBatch | ReviewBatch]] = {AS_THEY_COME: [], FILLED: []}
    for step in plan:
        for name, call in {
            AS_THEY_COME: partial(pack, step, None),
            FILLED: partial(pack, step, room),
        }.items():
            begin = time.perf_counter()
            batches[name].append(call())
            seconds[name].append(time.perf_counter() - begin)
    real = sum(batch.tokens for batch in batches[FILLED])
    return rows_of(
        "shapes",
        case,
        {name: summary(values) for name, values in seconds.items()},
        AS_THEY_COME,
        shapes={name: len({batch.shape for batch in packed}) for name, packed in batches.items()},
        filler_share={
            name: sum(len(batch.input_ids) for batch in packed) / real - 1 for name, packed in batches.items()
        },
    )
