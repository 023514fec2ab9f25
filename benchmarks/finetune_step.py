"""Fine-tuning steps: mtfast's packed step against the same step in eager PyTorch, on the same examples.

    python -m benchmarks finetune_step --data DIR --checkpoint DIR [--steps 10] [--shape bert-base]
        [--baseline COMMIT] [--compile] [--threads 2]

All train one BERT on SST, Quora and STS with the recipe's 160 examples a step, proportionally mixed, in bf16
with float32 weights in AdamW and dropout 0.1: forward, backward, optimizer. They take turns, after they have
given the same losses in float32 without dropout. Batches are made beforehand.

"mtfast" is the step that `mtfast finetune` runs, under DeepSpeed; "plain" is its model in a loop of plain
PyTorch, which shows what the engine costs; on a GPU "launched" is mtfast's step without CUDA graphs. "eager"
is Hugging Face's BertModel with SDPA, each task padded to the longest sentence of its part; "grouped" is that
on other batches, of the examples of 50 steps grouped by length as Trainer's `group_by_length` does, within
their task, and "compile" is "eager" under torch.compile with dynamic shapes. A commit's name is mtfast as it
is there, in a process of its own. Ratios are of examples a second over all steps; "tflop_per_s" are the
encoder's products of the real tokens.
"""

from __future__ import annotations

from functools import partial

from benchmarks.real_batches import finetune_batches
from benchmarks.real_steps import WARM_UP, Field, race_parser, run_race, setup_of
from benchmarks.stage_setup import StageMaker
from benchmarks.step_contenders import PackedFinetune, PaddedFinetune
from mtfast.training.run.weights import build_multitask
from mtfast.training.stages.finetune import Finetune


def main(argv: list[str]) -> int:
    """Run the benchmark, print its table and write it to the results file."""
    options = race_parser("finetune_step", __doc__).parse_args(argv)
    return run_race("finetune_step", {"examples": setup_of(options, "finetune")}, field_of, options)


def field_of(maker: StageMaker, stage: Finetune, turns: int) -> Field:
    """The contenders, from the stage's weights, and their batches."""
    source = build_multitask(maker.weights, stage.tasks)[0].to(stage.engine.device)
    batches, grouped = finetune_batches(stage, turns, WARM_UP)
    return Field(
        batches,
        grouped,
        {
            "plain": partial(PackedFinetune, source),
            "eager": partial(PaddedFinetune, source),
            "grouped": partial(PaddedFinetune, source),
            "compile": partial(PaddedFinetune, source, compiled=True),
        },
    )
