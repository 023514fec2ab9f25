"""`packed_attention` and `packed_attention_cls` in eager PyTorch, and which weights the kernels keep."""

from __future__ import annotations

import torch
from torch import Tensor

from mtfast.ops import _arguments
from mtfast.ops._philox import dropout_threshold, philox


def packed_attention_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    seed: int | Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The same mathematics in eager PyTorch on padded tensors, in q's dtype: (out, lse)."""
    rows, inside = _padded_rows(cu_seqlens, max_seqlen, k.size(0))
    place = torch.arange(max_seqlen, device=q.device)
    begin = cu_seqlens[:-1].long()[:, None, None]
    keep = dropout_keep_ref(begin, place[:, None], place[None], q.size(1), dropout_p, seed)
    padded, lse = _attend_ref(q[rows], k[rows], v[rows], inside, dropout_p, softmax_scale, keep)
    return padded[inside], lse.transpose(0, 1)[:, inside]


def packed_attention_cls_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    seed: int | Tensor | None = None,
) -> Tensor:
    """`packed_attention_cls` in eager PyTorch on padded tensors."""
    rows, inside = _padded_rows(cu_seqlens, max_seqlen, k.size(0))
    place = torch.arange(max_seqlen, device=q.device)
    begin = cu_seqlens[:-1].long()[:, None, None]
    keep = dropout_keep_ref(begin, begin.new_zeros(1, 1), place[None], q.size(1), dropout_p, seed)
    out, _ = _attend_ref(q[:, None], k[rows], v[rows], inside, dropout_p, softmax_scale, keep)
    return out[:, 0] * inside.any(1)[:, None, None].to(out.dtype)


def dropout_keep_ref(
    begin: Tensor, row: Tensor, column: Tensor, heads: int, dropout_p: float, seed: int | Tensor | None
) -> Tensor | None:
    """Which weights the kernels keep: bool [..., heads, rows, columns] for int64 begin [..., 1, 1], where
    each sequence begins in the packed batch, and row [rows, 1] and column [1, columns], the places of query
    and key in it; None without dropout.

    One Philox 4x32-7 call gives eight 16-bit draws: of rows r and r + 8 of 16 and of columns 2 t, 2 t + 1,
    2 t + 8 and 2 t + 9 of 16, as csrc/packed_attention.h says. A weight is kept where its draw is at least
    round(65536 * dropout_p).
    """
    threshold = dropout_threshold(dropout_p)
    if threshold == 0:
        return None
    assert seed is not None
    head = torch.arange(heads, device=row.device)[:, None, None]
    words = philox(
        (begin + row // 16 * 16 + row % 8).unsqueeze(-3),
        column // 16 * 4 + column % 8 // 2,
        head,
        torch.full_like(head, _PURPOSE),
        int(seed),
    )
    lower, right = row % 16 // 8 == 1, column % 16 // 8 == 1
    word = torch.where(right, torch.where(lower, words[3], words[2]), torch.where(lower, words[1], words[0]))
    return ((word >> (16 * (column % 2))) & 0xFFFF) >= threshold


_PURPOSE = 4  # Purpose::kAttentionDropout of csrc/device/philox.cuh


def _padded_rows(cu_seqlens: Tensor, max_seqlen: int, total: int) -> tuple[Tensor, Tensor]:
    """Token of each padded place [sequences, max_seqlen], and whether there is one."""
    bounds = cu_seqlens.long()
    rows = bounds[:-1, None] + torch.arange(max_seqlen, device=cu_seqlens.device)
    inside = rows < bounds[1:, None]
    return rows.clamp(max=max(total - 1, 0)), inside


def _attend_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    inside: Tensor,
    dropout_p: float,
    scale: float | None,
    keep: Tensor | None,
) -> tuple[Tensor, Tensor]:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores = (q @ k.transpose(-1, -2)) * _arguments.softmax_scale(scale, q.size(-1))
    scores = scores.masked_fill(~inside[:, None, None, :], torch.finfo(scores.dtype).min)
    weights = scores.softmax(-1)
    if keep is not None:
        weights = weights * keep * (65536 / (65536 - dropout_threshold(dropout_p)))
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    return (weights @ v).transpose(1, 2), scores.to(wide).logsumexp(-1)
