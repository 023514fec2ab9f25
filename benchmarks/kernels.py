"""Launches kernels for others to watch: all of them on few tokens, or the main ones once at a step's size.

    compute-sanitizer --tool racecheck python -m benchmarks kernels --shapes small
    ncu --csv --page raw python -m benchmarks kernels --shapes step

benchmarks/tools.py has such commands with the options they need.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import default_device
from benchmarks.lengths import draw_tokens
from mtfast.ops import (
    bias_gelu,
    concat_mlp,
    dropout_add_layer_norm,
    mask_tokens,
    packed_attention_cls,
    packed_attention_qkv,
)

STEP_TOKENS = 16384
VOCAB = 30522


def main(argv: list[str]) -> None:
    """Launch them."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks kernels",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", type=torch.device, default=default_device())
    parser.add_argument("--shapes", choices=("small", "step"), default="small")
    parser.add_argument("--tokens", type=int, default=STEP_TOKENS, help="of a step")
    options = parser.parse_args(argv)
    if options.shapes == "small":
        small(options.device)
    else:
        step(options.device, options.tokens)
    if options.device.type == "cuda":
        torch.cuda.synchronize(options.device)


def small(device: torch.device) -> None:
    """Every op on a few tokens, forward and backward, in every dtype and head_dim."""
    long = [1, 40, 0, 130, 17]
    # The longest sequence chooses the kernels.
    shorter = ([1, 40, 0, 128, 17], [1, 40, 0, 64, 17], [30, 0, 32])
    for strategy in ("exact", "bernoulli"):
        for subword in (None, torch.rand(VOCAB, device=device) < 0.3):
            masked(torch.randint(1000, VOCAB, (sum(long),), device=device), long, strategy, subword)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for lengths in (long, *shorter):
            for head_dim in (32, 64, 128, 256):
                attend(lengths, 2, head_dim, dtype, device)
                attend_cls(lengths, 2, head_dim, dtype, device)
        for hidden, outputs in ((64, 2), (37, 1), (8, 3), (8, 8)):
            pair_head(33, hidden, 96, outputs, dtype, device)
        for columns in (264, 31):
            activate(70, columns, dtype, device)
        for hidden in (128, 768, 4096, 4099, 37):
            layer_end(33, hidden, dtype, device)
    pair_head(1, 8, 8192, 2, torch.bfloat16, device)  # large tiles


def step(device: torch.device, tokens: int) -> None:
    """The kernels of training steps, each once at a step's size."""
    mixture, samples = draw_tokens("mixture", tokens), draw_tokens("imdb", tokens)
    for strategy in ("exact", "bernoulli"):
        masked(torch.randint(1000, VOCAB, (sum(samples),), device=device), samples, strategy)
    for lengths in (mixture, draw_tokens("32", tokens)):  # with long sequences, and without
        attend(lengths, 12, 64, torch.bfloat16, device)
    attend_cls(mixture, 12, 64, torch.bfloat16, device)
    pair_head(tokens // 8, 768, 768, 2, torch.bfloat16, device)
    activate(tokens, 3072, torch.bfloat16, device)
    layer_end(tokens, 768, torch.bfloat16, device)


def offsets(lengths: Sequence[int], device: torch.device) -> Tensor:
    """cu_seqlens of sequences of these lengths."""
    return torch.tensor([0, *lengths]).cumsum(0).int().to(device)


def masked(ids: Tensor, lengths: Sequence[int], strategy: str, subword: Tensor | None = None) -> None:
    """mask_tokens on these sequences."""
    options: dict[str, Any] = {"special_ids": [101], "mask_token_id": 103, "vocab_size": VOCAB, "seed": 1}
    mask_tokens(ids, cu_seqlens=offsets(lengths, ids.device), strategy=strategy, subword=subword, **options)


def attend(
    lengths: Sequence[int], heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> None:
    """packed_attention_qkv with dropout, forward and backward."""
    shape = (sum(lengths), 3, heads, head_dim)
    qkv = torch.randn(shape, dtype=dtype, device=device, requires_grad=True)
    out = packed_attention_qkv(qkv, offsets(lengths, device), max(lengths), dropout_p=0.1, seed=1)
    assert isinstance(out, Tensor)
    out.sum().backward()


def attend_cls(
    lengths: Sequence[int], heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> None:
    """packed_attention_cls with dropout, forward and backward."""
    q, k, v = (
        torch.randn(rows, heads, head_dim, dtype=dtype, device=device, requires_grad=True)
        for rows in (len(lengths), sum(lengths), sum(lengths))
    )
    cu_seqlens = offsets(lengths, device)
    packed_attention_cls(q, k, v, cu_seqlens, max(lengths), dropout_p=0.1, seed=1).sum().backward()


def pair_head(
    batch: int, hidden: int, inner: int, outputs: int, dtype: torch.dtype, device: torch.device
) -> None:
    """concat_mlp with dropout, forward and backward."""
    shapes = ((batch, hidden), (batch, hidden), (inner, 2 * hidden), (inner,), (outputs, inner), (outputs,))
    operands = [torch.randn(s, dtype=dtype, device=device, requires_grad=True) for s in shapes]
    concat_mlp(*operands, dropout_p=0.1, seed=1).sum().backward()


def activate(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> None:
    """bias_gelu, forward and backward."""
    x, bias = (
        torch.randn(s, dtype=dtype, device=device, requires_grad=True) for s in ((rows, columns), (columns,))
    )
    bias_gelu(x, bias).sum().backward()


def layer_end(rows: int, hidden: int, dtype: torch.dtype, device: torch.device) -> None:
    """dropout_add_layer_norm with dropout, forward and backward."""
    shapes = ((rows, hidden), (rows, hidden), (hidden,), (hidden,), (hidden,))
    *operands, x_bias = (torch.randn(s, dtype=dtype, device=device, requires_grad=True) for s in shapes)
    dropout_add_layer_norm(*operands, x_bias=x_bias, dropout_p=0.1, seed=1).sum().backward()
