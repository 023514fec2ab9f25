"""mask_tokens against the eager masking of Hugging Face's collator, and against torch.compile of it.

    python -m benchmarks mask_tokens [--device cpu] [--threads 2] [--seconds 60] [--most-tokens 67108864]
        [--no-compile]

The baseline is what DataCollatorForLanguageModeling.torch_mask_tokens (transformers 5) does to tensors, on
the device of the tokens; it is given its mask of special tokens for nothing. int64 ids, as the collator's.
torch.compile gets the same with torch.where in place of indexing, which it can make one kernel of.
GB/s count ids read once, ids and labels written once, whatever a variant does. On a GPU "graph" replays a
CUDA graph, whose seed is an int: all replays mask the same places, which for timing is no matter. Inputs that
the L2 could hold are several, taken in turn (benchmarks/timing.py).
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import CLOCK, Case, op_parser, run_cases
from benchmarks.common import Row, rows_of
from benchmarks.timing import (
    Variant,
    cloned,
    copies,
    copy_bandwidth,
    graph_of,
    graphs,
    l2_bytes,
    measure,
    peak_mib,
    running,
    say_once,
)
from mtfast.ops import mask_tokens, mask_tokens_ref

SHAPES = ((16, 512), (2048, 128), (4, 128), (2048, 512), (16384, 512), (131072, 512))
STRATEGIES = ("bernoulli", "exact")
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


def difference(name: str, ids: Tensor, special: Tensor, masked: tuple[Tensor, Tensor]) -> str:
    """What of a variant's result is not the reference's or not about 15% masked; nothing when it is right."""
    if name in STRATEGIES:
        rows = ids[: max(1, 2**16 // ids.size(1))]
        expected = mask_tokens_ref(rows, strategy=name, **OPTIONS)
        for what, found, wanted in zip(("ids", "labels"), masked, expected, strict=True):
            if wrong := int((found[: len(rows)] != wanted).sum()):
                return f"{wrong} of {wanted.numel()} {what} are not the reference's"
    if name != "exact":
        share = float((masked[1] != -100).sum() / (~special).sum())
        if abs(share - 0.15) > 5 * (0.15 * 0.85 / ids.numel()) ** 0.5:
            return f"{share:.4f} of the tokens are masked, not 0.15"
    return ""


def main(argv: list[str]) -> int:
    """Run the benchmark, print its table and write it to the results file; 0 when no case failed."""
    parser = op_parser("mask_tokens", __doc__)
    parser.add_argument("--most-tokens", type=int, default=2**26)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
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
    special = torch.isin(ids, torch.tensor(SPECIAL, device=device))
    with CLOCK.paused():
        wrong = {
            name: difference(name, ids, special, mask_tokens(ids, strategy=name, **OPTIONS))
            for name in STRATEGIES
        }
        variants = running(variants_of(ids, special, compiled), STRATEGIES)
        for name in variants.keys() - wrong.keys():
            if reason := difference(name, ids, special, variants[name][0]()):
                say_once(f"left out: {name}: {reason}")
                del variants[name]
    peaks = {name: peak_mib(calls[0], device) for name, calls in variants.items()}
    variants |= graphs(variants, device)
    timings = measure(variants, device, budget_s=budget_s)
    moved = ids.numel() * BYTES_PER_TOKEN / 1e9
    return rows_of(
        "mask_tokens",
        name_of(shape),
        timings,
        next(iter(timings)),  # eager, unless it was left out
        gb_per_s={name: moved / timing.median for name, timing in timings.items()},
        copy_gb_per_s=bandwidth / 1e9,
        peak_mib=peaks,
        wrong=wrong | {graph_of(name): text for name, text in wrong.items()},
    )


def variants_of(ids: Tensor, special: Tensor, compiled: bool) -> dict[str, Variant]:
    """All that is compared, each on the same ids and, where they are several, on its turn of them."""
    count = copies(ids.numel() * BYTES_PER_TOKEN, l2_bytes(ids.device))
    sets = [(ids, special), *(cloned((ids, special)) for _ in range(count - 1))]
    variants: dict[str, Variant] = {
        "eager": [functools.partial(eager_masking, ids.clone(), special) for ids, special in sets]
    }
    for strategy in STRATEGIES:
        variants[strategy] = [
            functools.partial(mask_tokens, ids, strategy=strategy, **OPTIONS) for ids, _ in sets
        ]
    if compiled:
        torch._dynamo.reset()  # so that each shape is compiled for itself
        masking = torch.compile(masking_by_where, dynamic=False)
        variants["compile"] = [functools.partial(masking, ids, special) for ids, special in sets]
    return variants
