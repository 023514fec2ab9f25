"""mask_tokens against the eager masking of Hugging Face's collator, and against torch.compile of it.

    python -m benchmarks mask_tokens [--device cpu] [--threads 2] [--seconds 60] [--most-tokens 67108864]
        [--no-compile]

The baseline is what DataCollatorForLanguageModeling.torch_mask_tokens (transformers 5) does to tensors, on
the device of the tokens; it is given its mask of special tokens for nothing. int64 ids, as the collator's.
torch.compile gets the same with torch.where in place of indexing, which it can make one kernel of.
GB/s count ids read once, ids and labels written once, whatever a variant does. There is no CUDA graph: the
seed is a number of the host, so a replay would mask the same places again.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import (
    Call,
    Case,
    Row,
    WrongResultError,
    copy_bandwidth,
    measure,
    op_parser,
    peak_mib,
    rows_of,
    run_cases,
    running,
)
from mtfast.ops import mask_tokens, mask_tokens_ref

SHAPES = ((16, 512), (131072, 512), (4, 128), (2048, 128), (2048, 512), (16384, 512))
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


def masking_by_where(inputs: Tensor, special_tokens_mask: Tensor) -> tuple[Tensor, Tensor]:
    """The same distribution without shapes that depend on the draws; leaves `inputs` as they are."""
    draw, kind = torch.rand_like(inputs, dtype=torch.float32), torch.rand_like(inputs, dtype=torch.float32)
    chosen = (draw < 0.15) & ~special_tokens_mask
    replaced = torch.where(kind < 0.9, torch.randint_like(inputs, 30522), inputs)
    return torch.where(chosen, torch.where(kind < 0.8, 103, replaced), inputs), torch.where(
        chosen, inputs, -100
    )


def check(ids: Tensor) -> None:
    """WrongResultError unless mask_tokens equals its reference, and it and the others mask about 15%."""
    rows = ids[: max(1, 2**16 // ids.size(1))]
    for strategy in ("bernoulli", "exact"):
        masked = mask_tokens(rows, strategy=strategy, **OPTIONS)
        expected = mask_tokens_ref(rows, strategy=strategy, **OPTIONS)
        if not (torch.equal(masked[0], expected[0]) and torch.equal(masked[1], expected[1])):
            raise WrongResultError(f"{strategy}: the result is not the reference's")
    special = torch.isin(ids, torch.tensor(SPECIAL, device=ids.device))
    for labels in (
        mask_tokens(ids, strategy="bernoulli", **OPTIONS)[1],
        eager_masking(ids.clone(), special)[1],
        masking_by_where(ids, special)[1],
    ):
        share = float((labels != -100).sum() / (~special).sum())
        if abs(share - 0.15) > 4 * (0.15 * 0.85 / ids.numel()) ** 0.5:
            raise WrongResultError(f"{share:.4f} of the tokens are masked, not 0.15")


def main(argv: list[str]) -> int:
    """Run the benchmark, print its table and write it to the results file; 0 when no case failed."""
    parser = op_parser("mask_tokens", __doc__)
    parser.add_argument("--most-tokens", type=int, default=2**26)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--budget", type=float, default=1.0, help="seconds a variant")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    bandwidth = copy_bandwidth(options.device)
    print(f"copying moves {bandwidth / 1e9:.1f} GB/s", flush=True)
    compare_shape = functools.partial(
        compare,
        device=options.device,
        compiled=not options.no_compile,
        bandwidth=bandwidth,
        budget_s=options.budget,
    )
    cases = [
        Case(name_of(shape), functools.partial(compare_shape, shape))
        for shape in SHAPES
        if shape[0] * shape[1] <= options.most_tokens
    ]
    return run_cases(cases, options)


def name_of(shape: tuple[int, int]) -> str:
    """The case's name in the results file."""
    return f"{shape[0]} x {shape[1]} int64"


def compare(
    shape: tuple[int, int], device: torch.device, compiled: bool, bandwidth: float, budget_s: float
) -> list[Row]:
    """The rows of one case."""
    ids = torch.randint(1000, 30522, shape, device=device)
    ids[:, 0], ids[:, -1] = 101, 102
    check(ids)
    special = torch.isin(ids, torch.tensor(SPECIAL, device=device))
    scratch = ids.clone()
    calls: dict[str, Call] = {
        "eager": functools.partial(eager_masking, scratch, special),
        "bernoulli": functools.partial(mask_tokens, ids, strategy="bernoulli", **OPTIONS),
        "exact": functools.partial(mask_tokens, ids, strategy="exact", **OPTIONS),
    }
    if compiled:
        torch._dynamo.reset()  # so that each shape is compiled for itself
        calls["compile"] = functools.partial(torch.compile(masking_by_where, dynamic=False), ids, special)
    calls = running(calls)
    peaks = {name: peak_mib(call, device) for name, call in calls.items()}
    timings = measure(calls, device, budget_s=budget_s)
    moved = ids.numel() * BYTES_PER_TOKEN / 1e9
    return rows_of(
        "mask_tokens",
        name_of(shape),
        timings,
        "eager",
        gb_per_s={name: moved / timing.median for name, timing in timings.items()},
        copy_gb_per_s=bandwidth / 1e9,
        peak_mib=peaks,
    )
