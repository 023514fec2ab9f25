"""Stage 1: further pre-training on movie reviews with BERT's two objectives, masked words and next sentence.

Devlin et al. 2019, BERT: Pre-training of Deep Bidirectional Transformers, https://arxiv.org/abs/1810.04805
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mtfast.config import EngineConfig, PretrainConfig
from mtfast.data.packing import ReviewBatch, pack_reviews
from mtfast.data.prefetch import prefetch
from mtfast.data.reviews import ReviewSamples
from mtfast.data.sampler import Layout, ReviewStepPlan, plan_reviews, room_of_reviews
from mtfast.models.bert import flops_per_token, mean_seqlen
from mtfast.models.checkpoint import save_pretrained
from mtfast.ops import mask_tokens
from mtfast.training.engine import ranks
from mtfast.training.engine.deepspeed_json import checkpoints_activations
from mtfast.training.engine.engine import Engine
from mtfast.training.run.weights import Weights, build_pretrain
from mtfast.training.seeds import seed_for
from mtfast.training.stage import Stage


class Pretrain(Stage):
    """Whole BERT with its MLM and NSP heads on packed segment pairs."""

    name = "pretrain"
    loss_names = ("mlm", "nsp")
    criteria: Mapping[str, str] = {}
    settings: PretrainConfig

    def __init__(
        self,
        samples: ReviewSamples,
        weights: Weights,
        settings: PretrainConfig,
        engine: EngineConfig,
        seed: int,
    ) -> None:
        self.samples, self.weights, self.settings, self.seed = samples, weights, settings, seed
        self.layout = Layout(ranks.rank(), ranks.world_size(), settings.accumulation)
        self.masked = samples.masked_counts(settings.mlm_probability)
        model, self.carried = build_pretrain(weights)
        model.encoder.activation_checkpointing = checkpoints_activations(engine)
        apart = "encoder." if settings.head_steps else ""
        self.engine = Engine(model, engine, settings, self.name, apart=apart)
        self.flops_per_token = flops_per_token(weights.config, mean_seqlen(samples.lengths))

    def set_learning_rate(self, step: int, total_steps: int) -> float:
        first = self.settings.head_steps
        if step < first:
            rate = self.settings.head_learning_rate
            self.engine.set_learning_rate(rate, apart=0.0)
        else:
            rate = self.learning_rate_at(step - first, total_steps - first)
            self.engine.set_learning_rate(rate)
        return rate

    def plan(self, epoch: int) -> list[ReviewStepPlan]:
        return plan_reviews(
            self.samples.lengths,
            self.masked,
            batch_size=self.settings.batch_size,
            seed=self.seed,
            epoch=epoch,
            layout=self.layout,
        )

    def micro_batches(self, steps: list[ReviewStepPlan], epoch: int) -> Iterator[list[ReviewBatch]]:
        # Static masking is one draw per token for the whole run, dynamic one for each epoch.
        seed = seed_for(self.seed, epoch + 1 if self.settings.masking == "dynamic" else 0)
        return prefetch(
            [self._micro_batch(step, part, seed) for part in step.micro_batches] for step in steps
        )

    def _micro_batch(self, step: ReviewStepPlan, rows: np.ndarray, mask_seed: int) -> ReviewBatch:
        packed = pack_reviews(
            self.samples,
            rows,
            mlm_probability=self.settings.mlm_probability,
            mlm_weight=self.layout.shares / max(step.step_masked, 1),
            nsp_weight=self.layout.shares / step.step_samples,
            mask_seed=mask_seed,
            room=self.room,
        )
        return packed.sent_to(self.engine.device)

    @functools.cached_property
    def room(self) -> int | None:
        """Samples up to which micro-batches are filled, so that their shapes repeat; with None they are as
        they come."""
        return room_of_reviews(self.plan(0))

    def losses(self, batch: ReviewBatch) -> dict[str, Tensor]:
        masked = mask_tokens(
            batch.input_ids,
            special_ids=self.samples.sequences.special.all,
            mask_token_id=self.weights.tokenizer.mask_token_id,
            vocab_size=self.weights.config.vocab_size,
            seed=batch.mask_seed,
            positions=batch.positions,
            cu_seqlens=batch.cu_seqlens,
            mlm_probability=self.settings.mlm_probability,
            strategy="exact",
        )
        # "exact" chooses a number of tokens that the host knows, so finding them needs no synchronisation.
        # Where they are fewer the first token stands in: it is special, never chosen, and no loss sees it.
        chosen = torch.nonzero_static(masked.labels != -100, size=batch.masked, fill_value=0).squeeze(1)
        inputs = batch.encoder_inputs() | {"input_ids": masked.input_ids}
        mlm, nsp = self.engine.model(**inputs, masked_rows=chosen, samples=len(batch.nsp_labels))
        targets = masked.labels[chosen].long()
        return {
            "mlm": F.cross_entropy(mlm, targets, reduction="sum") * batch.mlm_weight[0],
            "nsp": (F.cross_entropy(nsp, batch.nsp_labels, reduction="none") * batch.nsp_weights).sum(),
        }

    def total(self, losses: dict[str, Tensor]) -> Tensor:
        return losses["mlm"] + losses["nsp"]

    def evaluate(self) -> None:
        return None

    def save(self, directory: Path, state: dict[str, Tensor]) -> None:
        save_pretrained(directory, state, self.weights.config, self.weights.tokenizer, carried=self.carried)
