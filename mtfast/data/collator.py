"""A drop-in for the masking of Hugging Face's DataCollatorForLanguageModeling."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import torch
from torch import Tensor
from transformers import DataCollatorForLanguageModeling

from mtfast.ops import mask_tokens


@dataclasses.dataclass
class FusedMaskingCollator(DataCollatorForLanguageModeling):
    """Pads as `DataCollatorForLanguageModeling` does and masks with `mtfast.ops.mask_tokens`.

    Same arguments, same batches: input_ids, labels and what else the tokenizer made, as int64 tensors. Tokens
    are never chosen when they are the tokenizer's special tokens or marked in a `special_tokens_mask`; random
    replacements are never special. It differs in that `whole_word_mask` keeps random replacements, and in one
    argument more:

    strategy: "bernoulli", as Hugging Face does, or "exact" (see `mask_tokens`).

    With `seed`, batch n of a worker is masked by (seed, worker, n), so that a run can be repeated; without it
    the seeds come from torch's default generator.
    """

    strategy: str = "bernoulli"

    def __post_init__(self) -> None:
        fractions = self.mask_replace_prob, self.random_replace_prob
        with warnings.catch_warnings():  # that whole words get no random replacements: here they do
            warnings.filterwarnings("ignore", message="Random token replacement is not supported")
            super().__post_init__()
        if not self.mlm or self.return_tensors != "pt":
            raise ValueError(
                "FusedMaskingCollator masks PyTorch batches: it wants mlm=True and return_tensors='pt', "
                f"found mlm={self.mlm} and return_tensors={self.return_tensors!r}"
            )
        self.mask_replace_prob, self.random_replace_prob = map(float, fractions)
        self._batches = 0
        vocabulary = self.tokenizer.get_vocab()
        self._vocab_size = max(vocabulary.values()) + 1
        self._special_ids = sorted(self.tokenizer.all_special_ids)
        self._subword: Tensor | None = None
        if self.whole_word_mask:
            self._subword = torch.zeros(self._vocab_size, dtype=torch.bool, device="cpu")
            continuing = [index for piece, index in vocabulary.items() if piece.startswith("##")]
            if not continuing:
                raise ValueError(
                    "whole_word_mask wants a WordPiece tokenizer, whose pieces continue with '##'"
                )
            self._subword[continuing] = True

    def torch_mask_tokens(
        self, inputs: Any, special_tokens_mask: Any | None = None, offset_mapping: Any | None = None
    ) -> tuple[Tensor, Tensor]:
        """(input_ids, labels) for int64 inputs [batch, length]; offset_mapping is not needed."""
        protected = None
        if special_tokens_mask is not None:
            protected = torch.as_tensor(special_tokens_mask, dtype=torch.bool, device=inputs.device)
        masked = mask_tokens(
            inputs if protected is None else inputs.masked_fill(protected, self._special_ids[0]),
            special_ids=self._special_ids,
            mask_token_id=self.tokenizer.mask_token_id,
            vocab_size=self._vocab_size,
            seed=self._next_seed(),
            mlm_probability=self.mlm_probability or 0.0,
            mask_fraction=self.mask_replace_prob,
            random_fraction=self.random_replace_prob,
            strategy=self.strategy,
            subword=self._subword,
        )
        ids = masked.input_ids if protected is None else torch.where(protected, inputs, masked.input_ids)
        return ids, masked.labels

    def _next_seed(self) -> int:
        if self.seed is None:
            return int(torch.randint(2**63 - 1, (), device="cpu"))
        worker = torch.utils.data.get_worker_info()
        # Fields of 24 bits for the seed, 8 for the worker, 32 for the batch: different for different triples.
        seed = (self.seed % 2**23) << 40 | (worker.id % 256 if worker else 0) << 32 | self._batches % 2**32
        self._batches += 1
        return seed
