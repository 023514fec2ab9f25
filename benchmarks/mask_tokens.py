"""mask_tokens against the eager masking of Hugging Face's collator, and against torch.compile of it.

    python -m benchmarks mask_tokens [--device cpu] [--threads 2] [--most-tokens 67108864] [--no-compile]

The baseline is what DataCollatorForLanguageModeling.torch_mask_tokens (transformers 5) does to tensors, on
the device of the tokens; it is given its mask of special tokens for nothing. int64 ids, as the collator's.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import copy_bandwidth, default_device, measure, print_rows, rows_of, write_results
from mtfast.ops import mask_tokens, mask_tokens_ref

SHAPES = ((4, 128), (16, 512), (2048, 128), (2048, 512), (16384, 512), (131072, 512))
SPECIAL = [0, 100, 101, 102, 103]
OPTIONS: dict[str, Any] = {"special_ids": SPECIAL, "mask_token_id": 103, "vocab_size": 30522, "seed": 1}
BYTES_PER_TOKEN = 3 * 8  # ids in, ids and labels out


def eager_masking(inputs: Tensor, special_tokens_mask: Tensor) -> tuple[Tensor, Tensor]:
    """The operations of the collator's torch_mask_tokens at 15%, 80%, 10%; changes `inputs` as it does."""
    device = inputs.device
    labels = inputs.clone()
    probability_matrix = torch.full(labels.shape, 0.15, device=device)
    probability_matrix.masked_fill_(special_tokens_mask, value=0.0)
    masked_indices = torch.bernoulli(probability_matrix).bool()
    labels[~masked_indices] = -100
    indices_replaced = torch.bernoulli(torch.full(labels.shape, 0.8, device=device)).bool() & masked_indices
    inputs[indices_replaced] = 103
    indices_random = (
        torch.bernoulli(torch.full(labels.shape, 0.5, device=device)).bool()
        & masked_indices
        & ~indices_replaced
    )
    random_words = torch.randint(30522, labels.shape, dtype=torch.long, device=device)
    inputs[indices_random] = random_words[indices_random]
    return inputs, labels


def check(ids: Tensor) -> None:
    """Stop unless mask_tokens equals its reference and both mask about 15%."""
    rows = ids[: max(1, 2**16 // ids.size(1))]
    for strategy in ("bernoulli", "exact"):
        masked = mask_tokens(rows, strategy=strategy, **OPTIONS)
        expected = mask_tokens_ref(rows, strategy=strategy, **OPTIONS)
        if not (torch.equal(masked[0], expected[0]) and torch.equal(masked[1], expected[1])):
            raise SystemExit(f"mask_tokens, {strategy}: the result is not the reference's")
    special = torch.isin(ids, torch.tensor(SPECIAL, device=ids.device))
    for labels in (
        mask_tokens(ids, strategy="bernoulli", **OPTIONS)[1],
        eager_masking(ids.clone(), special)[1],
    ):
        share = float((labels != -100).sum() / (~special).sum())
        if abs(share - 0.15) > 4 * (0.15 * 0.85 / ids.numel()) ** 0.5:
            raise SystemExit(f"{share:.4f} of the tokens are masked, not 0.15")


def main(argv: list[str]) -> None:
    """Run the benchmark, print its table and write it to benchmarks/results/."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks mask_tokens")
    parser.add_argument("--device", type=torch.device, default=default_device())
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--most-tokens", type=int, default=2**26)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    arguments = parser.parse_args(argv)
    device = arguments.device
    torch.set_num_threads(arguments.threads)
    bandwidth = copy_bandwidth(device) / 1e9
    rows = []
    for shape in SHAPES:
        tokens = shape[0] * shape[1]
        if tokens > arguments.most_tokens:
            break
        ids = torch.randint(1000, 30522, shape, device=device)
        ids[:, 0], ids[:, -1] = 101, 102
        check(ids)
        special = torch.isin(ids, torch.tensor(SPECIAL, device=device))
        scratch = ids.clone()
        variants: dict[str, Callable[[], Any]] = {
            "eager": functools.partial(eager_masking, scratch, special),
            "bernoulli": functools.partial(mask_tokens, ids, strategy="bernoulli", **OPTIONS),
            "exact": functools.partial(mask_tokens, ids, strategy="exact", **OPTIONS),
        }
        if not arguments.no_compile:
            variants["compile"] = functools.partial(torch.compile(eager_masking), scratch, special)
        timings = measure(variants, device, budget_s=1.0)
        moved = {
            name: tokens * BYTES_PER_TOKEN / timings[name].median / 1e9 for name in ("bernoulli", "exact")
        }
        case = f"{shape[0]} x {shape[1]} int64"
        rows += rows_of("mask_tokens", case, timings, "eager", gb_per_s=moved, copy_gb_per_s=bandwidth)
        print_rows(rows[-len(timings) :])
    print(f"copying moves {bandwidth:.1f} GB/s; written to {write_results(rows, device)}")
