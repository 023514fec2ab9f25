"""Stage 1: further pre-training on movie reviews with BERT's two objectives, masked words and next sentence.

Devlin et al. 2019, BERT: Pre-training of Deep Bidirectional Transformers, https://arxiv.org/abs/1810.04805
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mtfast.data.packing import ReviewBatch, pack_reviews, prefetch
from mtfast.data.reviews import ReviewSamples
from mtfast.data.sampler import ReviewStepPlan, plan_reviews
from mtfast.models.bert import flops_per_token
from mtfast.models.checkpoint import save_pretrained
from mtfast.ops import mask_tokens

from . import ranks
from .config import RunConfig
from .engine import Engine
from .loop import MicroBatch, Stage, seed_for
from .sources import Source, build_pretrain


@dataclass(frozen=True)
class MaskedBatch:
    """A review batch and the seed of its masking."""

    packed: ReviewBatch
    mask_seed: int


class Pretrain(Stage):
    """Whole BERT with its MLM and NSP heads on packed segment pairs."""

    name = "pretrain"
    loss_names = ("mlm", "nsp")

    def __init__(self, config: RunConfig, samples: ReviewSamples, source: Source) -> None:
        self.config, self.samples, self.source = config, samples, source
        self.settings = config.pretrain
        self.shares = ranks.world_size() * self.settings.accumulation
        self.masked = samples.masked_counts(self.settings.mlm_probability)
        model, self.carried = build_pretrain(config, source)
        self.engine = Engine(model, config.engine, self.settings, self.name)
        lengths = samples.lengths.astype(np.float64)
        self.flops_per_token = flops_per_token(source.config, float((lengths**2).sum() / lengths.sum()))

    def plan(self, epoch: int) -> list[ReviewStepPlan]:
        return plan_reviews(
            self.samples.lengths,
            self.masked,
            batch_size=self.settings.batch_size,
            seed=self.config.seed,
            epoch=epoch,
            rank=ranks.rank(),
            world_size=ranks.world_size(),
            accumulation=self.settings.accumulation,
        )

    def micro_batches(self, steps: list[ReviewStepPlan], epoch: int) -> Iterator[list[MicroBatch]]:
        # Static masking is one draw per token for the whole run, dynamic one for each epoch.
        seed = seed_for(self.config.seed, epoch + 1 if self.settings.masking == "dynamic" else 0)
        return prefetch(
            [self._micro_batch(step, part, seed) for part in step.micro_batches] for step in steps
        )

    def _micro_batch(self, step: ReviewStepPlan, rows: np.ndarray, mask_seed: int) -> MicroBatch:
        packed = pack_reviews(
            self.samples,
            rows,
            mlm_probability=self.settings.mlm_probability,
            step_masked=step.step_masked,
            step_samples=step.step_samples,
            bucket_tokens=self.settings.bucket_tokens,
        )
        if self.engine.device.type == "cuda":
            packed = packed.pin_memory().to(self.engine.device, non_blocking=True)
        return MicroBatch(MaskedBatch(packed, mask_seed), len(rows), packed.tokens)

    def losses(self, data: MaskedBatch) -> dict[str, Tensor]:
        batch = data.packed
        masked = mask_tokens(
            batch.input_ids,
            special_ids=self.samples.special.all,
            mask_token_id=self.source.tokenizer.mask_token_id,
            vocab_size=self.source.config.vocab_size,
            seed=data.mask_seed,
            positions=batch.positions,
            cu_seqlens=batch.cu_seqlens,
            mlm_probability=self.settings.mlm_probability,
            strategy="exact",
        )
        # "exact" chooses a number of tokens that the host knows, so finding them needs no synchronisation.
        chosen = torch.nonzero_static(masked.labels != -100, size=batch.masked).squeeze(1)
        inputs = batch.encoder_inputs() | {"input_ids": masked.input_ids}
        mlm, nsp = self.engine(**inputs, masked_rows=chosen, samples=len(batch.nsp_labels))
        targets = masked.labels[chosen].long()
        return {
            "mlm": F.cross_entropy(mlm, targets, reduction="sum") * (self.shares / max(batch.step_masked, 1)),
            "nsp": F.cross_entropy(nsp, batch.nsp_labels, reduction="sum")
            * (self.shares / batch.step_samples),
        }

    def total(self, losses: dict[str, Tensor]) -> Tensor:
        return losses["mlm"] + losses["nsp"]

    def evaluate(self) -> None:
        return None

    def save(self, directory: Path, state: dict[str, Tensor]) -> None:
        save_pretrained(directory, state, self.source.config, self.source.tokenizer, carried=self.carried)
