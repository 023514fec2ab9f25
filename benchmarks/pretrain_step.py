"""Pre-training steps: mtfast's packed step against the same step in eager PyTorch, on the same samples.

    python -m benchmarks pretrain_step --data DIR --checkpoint DIR [--steps 10] [--shape bert-base]
        [--baseline COMMIT] [--compile] [--threads 2]

All train BERT with its masked-word and next-sentence heads on the recipe's 16 samples a step, which are of at
most 512 or of at most 256 word pieces of IMDb reviews, in bf16 with float32 weights in AdamW and dropout 0.1:
forward, backward, optimizer. They take turns, after they have given the same losses in float32 without
dropout. Batches are made beforehand; so are the masks, which mtfast draws in its step.

"mtfast" is the step that `mtfast pretrain` runs, under DeepSpeed; "plain" is its model in a loop of plain
PyTorch, which shows what the engine costs; on a GPU "launched" is mtfast's step without CUDA graphs. "eager"
is Hugging Face's BertForPreTraining with SDPA on padded samples, "masked logits" the same with the
vocabulary's logits at the masked places alone, "grouped" is "eager" on other batches, of the samples of 50
steps grouped by length as Trainer's `group_by_length` does, and "compile" is "eager" under torch.compile with
dynamic shapes. A commit's name is mtfast as it is there, in a process of its own. Ratios are of examples a
second over all steps; "tflop_per_s" are the encoder's products of the real tokens.
"""

from __future__ import annotations

from functools import partial

import torch.nn.functional as F
from torch import Tensor

from benchmarks.real_batches import Layouts, pretrain_batches
from benchmarks.real_steps import WARM_UP, Field, race_parser, run_race, setup_of
from benchmarks.stage_setup import StageMaker
from benchmarks.step_contenders import Losses, PackedPretrain, PaddedPretrain
from mtfast.training.run.weights import build_pretrain
from mtfast.training.stages.pretrain import Pretrain

MAX_LENGTHS = (512, 256)


def main(argv: list[str]) -> int:
    """Run the benchmark, print its table and write it to the results file."""
    options = race_parser("pretrain_step", __doc__).parse_args(argv)
    setups = {f"samples of at most {most}": setup_of(options, "pretrain", most) for most in MAX_LENGTHS}
    return run_race("pretrain_step", setups, field_of, options)


class MaskedBefore(PaddedPretrain):
    """BertForPreTraining on samples whose words were masked beforehand."""

    def losses(self, batch: Layouts) -> Losses:  # type: ignore[override]
        return self.fixed_losses(batch)  # type: ignore[arg-type]


class MaskedLogits(MaskedBefore):
    """The same, with logits of the masked words alone."""

    def of_masked(self, batch: Layouts, input_ids: Tensor, labels: Tensor) -> Losses:  # type: ignore[override]
        bert, heads, reviews = self.model.bert, self.model.cls, batch.padded
        outputs = bert(**reviews.inputs | {"input_ids": input_ids})  # type: ignore[union-attr]
        chosen = labels != -100
        words = heads.predictions(outputs.last_hidden_state[chosen])
        order = heads.seq_relationship(outputs.pooler_output)
        return {
            "mlm + nsp": F.cross_entropy(words, labels[chosen]) + F.cross_entropy(order, reviews.nsp_labels)  # type: ignore[union-attr]
        }


def field_of(maker: StageMaker, stage: Pretrain, turns: int) -> Field:
    """The contenders, from the stage's weights, and their batches."""
    source = build_pretrain(maker.weights)[0].to(stage.engine.device)
    batches, grouped = pretrain_batches(stage, turns, WARM_UP)
    return Field(
        batches,
        grouped,
        {
            "plain": partial(PackedPretrain, source),
            "eager": partial(MaskedBefore, source),
            "masked logits": partial(MaskedLogits, source),
            "grouped": partial(MaskedBefore, source),
            "compile": partial(MaskedBefore, source, compiled=True),
        },
    )
