"""What smoke runs: of each op, cases by name; each gives a line's entries for a device."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mtfast.ops import (
    bias_gelu,
    bias_gelu_ref,
    concat_mlp,
    concat_mlp_ref,
    dropout_add_layer_norm,
    dropout_add_layer_norm_ref,
    mask_tokens,
    mask_tokens_ref,
    packed_attention,
    packed_attention_cls,
    packed_attention_cls_ref,
    packed_attention_qkv,
    packed_attention_ref,
)
from mtfast.ops.concat_mlp import ACTIVATIONS

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# The longest sequence chooses the kernels; "long" runs those of up to 128 tokens too.
LENGTHS = {"short": (20, 0, 7, 31, 1), "middle": (40, 3, 64), "long": (70, 3, 200)}
# batch, hidden, inner, outputs
SHAPES = {"64": (70, 64, 96, 2), "unaligned": (33, 37, 65, 1), "3 outputs": (40, 72, 70, 3),
          "8 outputs": (9, 8, 16, 8), "large tiles": (990, 64, 1024, 2)}  # fmt: skip
ROWS = {"64": (70, 64), "unaligned": (33, 37), "many": (17_000, 8)}  # and columns; "many" in larger chunks
WIDTHS = {"128": 128, "768": 768, "4096": 4096, "unaligned": 301, "long": 4104}
Case = Callable[[torch.device], dict[str, Any]]


def agreement(
    names: Sequence[str], ours: Sequence[Tensor], eager: Sequence[Tensor], exact: Sequence[Tensor]
) -> dict[str, Any]:
    """Of each result the norms of our error and of eager's in the same dtype, over the exact result's."""
    errors = {}
    ok = True
    for name, x, e, truth in zip(names, ours, eager, exact, strict=True):
        truth = truth.detach()
        size = float(truth.norm()) or 1.0
        error, eagers = (float((y.detach().double() - truth).norm()) / size for y in (x, e))
        errors[name] = [float(f"{error:.3g}"), float(f"{eagers:.3g}")]
        ok &= error <= 2 * eagers + torch.finfo(x.dtype).eps
    return {"ok": ok, "errors": errors}


def attention(op: str, dtype: torch.dtype, head_dim: int, lengths: Sequence[int], device: torch.device):
    """Output and gradients of packed_attention, its fused form or that of one query a sequence."""
    total, heads = sum(lengths), 2
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int().to(device)
    rows = (len(lengths) if op == "packed_attention_cls" else total, total, total)
    inputs = [torch.randn(n, heads, head_dim, device=device, dtype=dtype) for n in rows]
    dout = torch.randn_like(inputs[0])
    where = {"cu_seqlens": cu_seqlens, "max_seqlen": max(lengths), "dropout_p": 0.1, "seed": 3}

    def fused(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        out = packed_attention_qkv(torch.stack((q, k, v), 1), **options)
        assert isinstance(out, Tensor)
        return out

    ours: dict[str, Callable[..., Any]] = {
        "packed_attention": packed_attention,
        "packed_attention_qkv": fused,
        "packed_attention_cls": packed_attention_cls,
    }
    reference = packed_attention_cls_ref if op == "packed_attention_cls" else packed_attention_ref

    def results(function: Callable[..., Any], wide: torch.dtype) -> list[Tensor]:
        leaves = [x.to(wide).requires_grad_() for x in inputs]
        out = function(*leaves, **where)
        out = out[0] if isinstance(out, tuple) else out
        return [out, *torch.autograd.grad(out, leaves, dout.to(wide))]

    names = ("out", "dq", "dk", "dv")
    return agreement(
        names, results(ours[op], dtype), results(reference, dtype), results(reference, torch.float64)
    )


def pair_head(dtype: torch.dtype, shape: Sequence[int], activation: str, device: torch.device):
    """Output and gradients of concat_mlp, both sides gathered from one matrix."""
    batch, hidden, inner, outputs = shape
    shapes = ((batch, hidden), (batch, hidden), (inner, 2 * hidden), (inner,), (outputs, inner), (outputs,))
    scales = (1.0, 1.0, (2 * hidden) ** -0.5, 0.3, inner**-0.5, 1.0)
    inputs = [
        (torch.randn(s, device=device) * scale).to(dtype) for s, scale in zip(shapes, scales, strict=True)
    ]
    rows = [torch.randint(batch, (batch,), device=device, dtype=kind) for kind in (torch.int64, torch.int32)]
    dy = 1 + torch.randn(batch, outputs, device=device)

    def results(function: Callable[..., Tensor], wide: torch.dtype) -> list[Tensor]:
        leaves = [x.to(wide).requires_grad_() for x in inputs]
        options = {"u_rows": rows[0], "v_rows": rows[1], "dropout_p": 0.1, "seed": 3}
        y = function(*leaves, activation=activation, **options)
        return [y, *torch.autograd.grad(y, leaves, dy.to(dtype).to(wide))]

    names = ("y", "du", "dv", "dweight1", "dbias1", "dweight2", "dbias2")
    eager, exact = results(concat_mlp_ref, dtype), results(concat_mlp_ref, torch.float64)
    return agreement(names, results(concat_mlp, dtype), eager, exact)


def activation(dtype: torch.dtype, shape: Sequence[int], with_bias: bool, device: torch.device):
    """Output and gradients of bias_gelu."""
    sizes = [tuple(shape), tuple(shape[1:])][: 1 + with_bias]
    inputs = [torch.randn(s, device=device).to(dtype) for s in sizes]
    dy = (1 + torch.randn(*shape, device=device)).to(dtype)

    def results(function: Callable[..., Tensor], wide: torch.dtype) -> list[Tensor]:
        leaves = [x.to(wide).requires_grad_() for x in inputs]
        y = function(*leaves)
        return [y, *torch.autograd.grad(y, leaves, dy.to(wide))]

    names = ("y", "dx", "dbias")[: 2 + with_bias]
    eager, exact = results(bias_gelu_ref, dtype), results(bias_gelu_ref, torch.float64)
    return agreement(names, results(bias_gelu, dtype), eager, exact)


def layer_end(dtype: torch.dtype, hidden: int, dropout_p: float, device: torch.device):
    """Output and gradients of dropout_add_layer_norm."""
    shapes = ((70, hidden), (70, hidden), (hidden,), (hidden,), (hidden,))
    inputs = [torch.randn(shape, device=device).to(dtype) for shape in shapes]
    dy = 1 + torch.randn(70, hidden, device=device)

    def results(function: Callable[..., Tensor], wide: torch.dtype) -> list[Tensor]:
        leaves = [x.to(wide).requires_grad_() for x in inputs]
        y = function(*leaves[:4], x_bias=leaves[4], dropout_p=dropout_p, seed=3)
        return [y, *torch.autograd.grad(y, leaves, dy.to(dtype).to(wide))]

    names = ("y", "dx", "dresidual", "dweight", "dbias", "dx_bias")
    eager, exact = (results(dropout_add_layer_norm_ref, wide) for wide in (dtype, torch.float64))
    return agreement(names, results(dropout_add_layer_norm, dtype), eager, exact)


def masking(dtype: torch.dtype, strategy: str, kind: str, device: torch.device):
    """mask_tokens and its reference, bit for bit."""
    lengths = (1, 40, 0, 300, 17, 128)
    total = sum(lengths)
    ids = torch.randint(30522, (total,), device=device, dtype=dtype)
    options: dict[str, Any] = {
        "special_ids": [0, 100, 101, 102, 103], "mask_token_id": 103, "vocab_size": 30522, "seed": 7,
        "cu_seqlens": torch.tensor([0, *lengths]).cumsum(0).int().to(device), "strategy": strategy,
    }  # fmt: skip
    if kind == "positions":
        options["positions"] = torch.randint(-(2**62), 2**62, (total,), device=device)
    if kind == "seed tensor":
        options["seed"] = torch.tensor([-7], device=device)
    if kind == "words":
        options["subword"] = torch.rand(30522, device=device) < 0.4
    ours, reference = mask_tokens(ids, **options), mask_tokens_ref(ids, **options)
    return {"ok": all(torch.equal(a, b) for a, b in zip(ours, reference, strict=True))}


def _name(*parts: Any) -> str:
    return " ".join(str(part).removeprefix("torch.") for part in parts)


CASES: Mapping[str, Mapping[str, Case]] = {
    "mask_tokens": {
        _name(dtype, strategy, kind): partial(masking, dtype, strategy, kind)
        for dtype in (torch.int64, torch.int32)
        for strategy in ("exact", "bernoulli")
        for kind in ("plain", "seed tensor", "positions", "words")
    },
    "concat_mlp": {
        _name(dtype, name, activation): partial(pair_head, dtype, shape, activation)
        for dtype in DTYPES
        for name, shape in SHAPES.items()
        for activation in (
            ACTIVATIONS if name == "64" else ["gelu"]
        )  # relu's kink makes errors a matter of luck
    },
    "bias_gelu": {
        _name(dtype, name, "bias" if with_bias else "alone"): partial(activation, dtype, shape, with_bias)
        for dtype in DTYPES
        for name, shape in ROWS.items()
        for with_bias in (True, False)
    },
    "dropout_add_layer_norm": {
        _name(dtype, name, f"p={dropout_p}"): partial(layer_end, dtype, hidden, dropout_p)
        for dtype in DTYPES
        for name, hidden in WIDTHS.items()
        for dropout_p in (0.0, 0.1)
    },
} | {
    op: {
        _name(dtype, f"head_dim {head_dim}", kind): partial(attention, op, dtype, head_dim, lengths)
        for dtype in DTYPES
        for head_dim in (32, 64, 128, 256)
        for kind, lengths in LENGTHS.items()
    }
    for op in ("packed_attention", "packed_attention_qkv", "packed_attention_cls")
}
