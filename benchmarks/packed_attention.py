"""packed_attention against padded attention, per-sequence attention and FlashAttention-2 on packed sequences.

    python -m benchmarks packed_attention [--device cpu] [--threads 2] [--tokens 4096] [--slow]

Lengths: fixed, and drawn from gamma distributions with the means of Quora questions (14 tokens), SST
sentences (25) and the stage-3 mixture of both with STS pairs (15). 12 heads of 64. Forward, and forward and
backward.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.common import copy_bandwidth, default_device, measure, print_rows, rows_of, write_results
from mtfast.ops import packed_attention_qkv, packed_attention_ref

HEADS, HEAD_DIM = 12, 64
FIXED = (32, 64, 128, 256, 512)
MEANS = {"quora": ((14, 1.0),), "sst": ((25, 1.0),), "mixture": ((25, 0.23), (14, 0.62), (15, 0.15))}


def lengths_of(case: str, tokens: int) -> list[int]:
    """About `tokens` tokens in sequences: `case` is a length or a name in MEANS (gamma, 4 to 80 tokens)."""
    if case.isdigit():
        return [int(case)] * max(1, tokens // int(case))
    random = np.random.default_rng(0)
    means, shares = zip(*MEANS[case], strict=True)
    lengths: list[int] = []
    while sum(lengths) < tokens:
        mean = random.choice(means, p=np.array(shares) / sum(shares))
        lengths.append(int(np.clip(random.gamma(4, mean / 4), 4, 80)))
    return lengths


def step(call: Callable[[], Tensor], inputs: list[Tensor], dout: Tensor | None) -> None:
    """The forward, and the backward when there is a dout for it."""
    if dout is None:
        with torch.no_grad():
            call()
    else:
        torch.autograd.grad(call(), inputs, dout)


def variants_of(
    lengths: list[int], dtype: torch.dtype, dropout_p: float, backward: bool, device: torch.device, slow: bool
) -> dict[str, Callable[[], None]]:
    """Ours first; each works on the layout that suits it best, made beforehand."""
    total, longest, sequences = sum(lengths), max(lengths), len(lengths)
    cu = torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)
    bounds = cu.tolist()
    qkv = torch.randn(total, 3, HEADS, HEAD_DIM, device=device, dtype=dtype, requires_grad=True)
    dout = torch.randn(total, HEADS, HEAD_DIM, device=device, dtype=dtype)

    def ours() -> Tensor:
        out = packed_attention_qkv(qkv, cu, longest, dropout_p=dropout_p)
        assert isinstance(out, Tensor)
        return out

    places = torch.arange(longest, device=device)
    inside = places[None] < torch.tensor(lengths, device=device)[:, None]
    shape = (sequences, HEADS, longest, HEAD_DIM)
    pq, pk, pv = (torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
    padded_dout = torch.randn(shape, device=device, dtype=dtype)
    mask = None if inside.all() else inside[:, None, None, :]

    def padded_sdpa() -> Tensor:
        return scaled_dot_product_attention(pq, pk, pv, attn_mask=mask, dropout_p=dropout_p)

    def per_sequence() -> Tensor:
        outs = []
        for begin, end in pairwise(bounds):
            q, k, v = (x.transpose(0, 1)[None] for x in qkv[begin:end].unbind(1))
            outs.append(scaled_dot_product_attention(q, k, v, dropout_p=dropout_p)[0].transpose(0, 1))
        return torch.cat(outs)

    with torch.no_grad():
        q64, k64, v64 = qkv.double().unbind(1)
        exact = packed_attention_ref(q64, k64, v64, cu, longest)[0] if total <= 2**14 else None
        out = packed_attention_qkv(qkv, cu, longest)
        assert isinstance(out, Tensor)
        if exact is not None and (out - exact).abs().max() > 0.05:
            raise SystemExit(f"packed_attention: wrong by {float((out - exact).abs().max()):.3g}")
    variants: dict[str, Callable[[], None]] = {
        "padded sdpa": partial(step, padded_sdpa, [pq, pk, pv], padded_dout if backward else None),
        "mtfast": partial(step, ours, [qkv], dout if backward else None),
    }
    if device.type == "cpu":
        if sequences <= 512 and (slow or dtype != torch.bfloat16 or sequences <= 64):  # seconds a call
            variants["per sequence"] = partial(step, per_sequence, [qkv], dout if backward else None)
    elif dtype != torch.float32:
        variants["flash-2 varlen"] = partial(flash2, qkv, cu, longest, dropout_p, dout if backward else None)
    return variants


def flash2(qkv: Tensor, cu: Tensor, longest: int, dropout_p: float, dout: Tensor | None) -> None:
    """FlashAttention-2 as torch ships it, on the packed tensors."""
    with torch.no_grad():
        q, k, v = qkv.unbind(1)
        lengths = (longest, longest, dropout_p, False, False)
        out, lse, state, unused, _ = torch.ops.aten._flash_attention_forward(q, k, v, cu, cu, *lengths)
        if dout is not None:
            torch.ops.aten._flash_attention_backward(
                dout, q, k, v, out, lse, cu, cu, longest, longest, dropout_p, False, state, unused
            )


def main(argv: list[str]) -> None:
    """Run the benchmark, print its table and write it to benchmarks/results/."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks packed_attention")
    parser.add_argument("--device", type=torch.device, default=default_device())
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--tokens", type=int, nargs="+", help="default 4096, on a GPU also 16384 and 131072")
    parser.add_argument("--cases", nargs="+", default=[*MEANS, *map(str, FIXED)])
    parser.add_argument("--slow", action="store_true", help="also many sequences one by one in bfloat16")
    parser.add_argument("--budget", type=float, default=2.0, help="seconds a variant")
    arguments = parser.parse_args(argv)
    device = arguments.device
    torch.set_num_threads(arguments.threads)
    gpu = device.type == "cuda"
    bandwidth = copy_bandwidth(device) / 1e9
    rows = []
    for tokens in arguments.tokens or ([4096, 16384, 131072] if gpu else [4096]):
        for case in arguments.cases:
            lengths = lengths_of(case, tokens)
            for dtype in (torch.bfloat16,) if gpu else (torch.float32, torch.bfloat16):
                for dropout_p in (0.0, 0.1):
                    for backward in (False, True):
                        variants = variants_of(lengths, dtype, dropout_p, backward, device, arguments.slow)
                        timings = measure(variants, device, budget_s=arguments.budget)
                        # Forward: q, k, v in, out out; backward: those, dout and three gradients.
                        tensors, products = (12, 14) if backward else (4, 4)
                        moved = tensors * sum(lengths) * HEADS * HEAD_DIM * dtype.itemsize / 1e9
                        work = products * sum(n * n for n in lengths) * HEADS * HEAD_DIM / 1e12
                        what = "fwd+bwd" if backward else "fwd"
                        name = f"{case} {tokens} {str(dtype)[6:]} p={dropout_p} {what}"
                        new = rows_of(
                            "packed_attention",
                            name,
                            timings,
                            "padded sdpa",
                            gb_per_s={n: moved / t.median for n, t in timings.items()},
                            tflop_per_s={n: work / t.median for n, t in timings.items()},
                            copy_gb_per_s=bandwidth,
                        )
                        print_rows(new)
                        rows += new
    print(f"copying moves {bandwidth:.1f} GB/s; written to {write_results(rows, device)}")
