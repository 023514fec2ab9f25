"""Floating-point operations of the ops' matrix products, for `torch.utils.flop_counter.FlopCounterMode`."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from mtfast.ops import _library

_library.load()

BACKWARD = 2.5  # five products instead of two, as torch counts its own attention's


def _attention(heads_by_dim: int, cu_seqlens: Tensor, max_seqlen: int, total: int) -> int:
    """Of `softmax(q k^T) v` inside each sequence; where lengths cannot be read, of the longest everywhere."""
    if cu_seqlens.is_meta or isinstance(cu_seqlens, torch._subclasses.FakeTensor):
        return 4 * heads_by_dim * total * max_seqlen
    return 4 * heads_by_dim * int(cu_seqlens.long().diff().square().sum())


@register_flop_formula(torch.ops.mtfast.packed_attention, get_raw=True)
def _(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, *_: Any, **__: Any) -> int:
    return _attention(q[0].numel(), cu_seqlens, max_seqlen, len(q))


@register_flop_formula(torch.ops.mtfast.packed_attention_qkv, get_raw=True)
def _(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, *rest: Any, **_: Any) -> int:
    return _attention(qkv[0, 0].numel(), cu_seqlens, max_seqlen, len(qkv))


@register_flop_formula(torch.ops.mtfast.packed_attention_cls, get_raw=True)
def _(q: Tensor, k: Tensor, *_: Any, **__: Any) -> int:
    return 4 * k.numel()  # one query a sequence


@register_flop_formula(torch.ops.mtfast.packed_attention_backward, get_raw=True)
def _(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, stats: Tensor, *rest: Any, **_: Any) -> int:
    cu_seqlens, max_seqlen, *_options = rest
    return int(BACKWARD * _attention(q[0].numel(), cu_seqlens, max_seqlen, len(q)))


@register_flop_formula(torch.ops.mtfast.packed_attention_qkv_backward, get_raw=True)
def _(dout: Tensor, qkv: Tensor, out: Tensor, stats: Tensor, *rest: Any, **_: Any) -> int:
    cu_seqlens, max_seqlen, *_options = rest
    return int(BACKWARD * _attention(qkv[0, 0].numel(), cu_seqlens, max_seqlen, len(qkv)))


@register_flop_formula(torch.ops.mtfast.packed_attention_cls_backward, get_raw=True)
def _(dout: Tensor, q: Tensor, k: Tensor, *_: Any, **__: Any) -> int:
    return int(BACKWARD * 4 * k.numel())


@register_flop_formula(torch.ops.mtfast.concat_mlp, get_raw=True)
def _(
    u: Tensor,
    v: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    *rest: Any,
    **__: Any,
) -> int:
    rows = len(u if rest[0] is None else rest[0])  # u_rows
    return 2 * rows * (weight1.numel() + weight2.numel())


@register_flop_formula(torch.ops.mtfast.concat_mlp_backward, get_raw=True)
def _(dy: Tensor, u: Tensor, v: Tensor, weight1: Tensor, weight2: Tensor, *rest: Any, **__: Any) -> int:
    needs = rest[-1]  # of u, v and weight1: half of a product, half of one, and one
    first = weight1.numel() * (((needs & 1) + (needs >> 1 & 1)) / 2 + (needs >> 2 & 1))
    return int(2 * len(dy) * (first + 2 * weight2.numel()))
