"""Bidirectional self-attention inside each sequence of a packed batch, for training."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from mtfast.ops import _arguments, _library

_library.load()

HEAD_DIMS = (32, 64, 128, 256)  # that there are CUDA kernels for
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    seed: int | Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(softmax_scale * q k^T) v inside each sequence; no token sees another sequence.

    Args:
        q, k, v: [total, heads, head_dim], bfloat16, float16 or float32 (float64 on the CPU), head_dim at most
            256. 32, 64, 128 and 256, on the CPU every multiple of 16, are taken as they are, with any strides
            as long as the last dimension is contiguous (views of a fused projection are fine). Of others
            each call makes copies filled up with zeros to the next.
        cu_seqlens: int32 [sequences + 1], where each sequence begins and, last, the total. Empty sequences
            (a repeated value) are allowed. Of int64 each call makes one of int32.
        max_seqlen: at least the longest sequence's length; a host integer, so that nothing syncs.
        dropout_p: probability in [0, 1) with which an attention weight is dropped, resolved to 1/65536.
        softmax_scale: default 1/sqrt(head_dim).
        seed: of the dropout; any 64-bit int, or an int64 tensor of one element on q's device. None draws one
            from torch's default generator of that device. What is dropped depends on (seed, head, where the
            sequence begins in the packed batch, the places of query and key in it) alone. While a CUDA graph
            is captured an int is refused, since every replay would drop the same.
        return_lse: also return the log-sum-exp of the scaled scores, float32 [heads, total]
            (float64 for float64 inputs); no gradient flows through it.

    Returns:
        [total, heads, head_dim] in q's dtype, or (out, lse).

    Raises:
        TypeError, ValueError: the named argument is of a wrong kind, dtype, shape, device or value.
        RuntimeError: an int seed in a capture; on the CPU, also where cu_seqlens' values are wrong or
            max_seqlen is less than a length. On CUDA reading them would sync, so there they are not looked
            at: wrong ones give wrong numbers, never an access out of bounds.
    """
    q, k, v = _autocast(q=q, k=k, v=v)
    max_seqlen, dropout_p = _check(q, k, v, cu_seqlens, max_seqlen, dropout_p)
    out, stats = _attend(
        "packed_attention", (q, k, v), cu_seqlens, max_seqlen, dropout_p, softmax_scale, seed
    )
    return (out, lse_of(stats)) if return_lse else out


def packed_attention_qkv(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    seed: int | Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`packed_attention` of a fused projection qkv [total, 3, heads, head_dim], without the unbind."""
    (qkv,) = _autocast(qkv=qkv)
    if qkv.dim() != 4 or qkv.size(1) != 3:
        raise ValueError(f"qkv must be [total, 3, heads, head_dim], found {list(qkv.shape)}")
    q, k, v = qkv.unbind(1)
    max_seqlen, dropout_p = _check(q, k, v, cu_seqlens, max_seqlen, dropout_p, q_name="qkv")
    out, stats = _attend(
        "packed_attention_qkv", (qkv,), cu_seqlens, max_seqlen, dropout_p, softmax_scale, seed, "qkv"
    )
    return (out, lse_of(stats)) if return_lse else out


def packed_attention_cls(
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
    """One query per sequence: what `packed_attention` computes for each sequence's first token.

    q is [sequences, heads, head_dim]; k and v are [total, heads, head_dim]; the result is
    [sequences, heads, head_dim], zero for an empty sequence. With the same seed the weights dropped are
    those that `packed_attention` drops in the first tokens' rows. Arguments and errors as there.
    """
    q, k, v = _autocast(q=q, k=k, v=v)
    max_seqlen, dropout_p = _check(q, k, v, cu_seqlens, max_seqlen, dropout_p, cls=True)
    return _attend("packed_attention_cls", (q, k, v), cu_seqlens, max_seqlen, dropout_p, softmax_scale, seed)[
        0
    ]


class PackedSelfAttention(nn.Module):
    """Multi-head self-attention over a packed batch: fused projection, `packed_attention`, no output layer.

    Args:
        hidden: width of the input and of the output; heads * head_dim with head_dim at most 256.
        heads: number of heads.
        dropout_p: of the attention weights, active in train mode.
    """

    def __init__(self, hidden: int, heads: int, dropout_p: float = 0.0) -> None:
        super().__init__()
        if hidden % heads or not 0 < hidden // heads <= HEAD_DIMS[-1]:
            raise ValueError(
                f"hidden / heads must be a whole number of at most {HEAD_DIMS[-1]}, found {hidden} / {heads}"
            )
        self.hidden = hidden
        self.heads = heads
        self.dropout_p = dropout_p
        self.qkv = nn.Linear(hidden, 3 * hidden)

    def forward(
        self,
        x: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        *,
        seed: int | Tensor | None = None,
        cls_rows: Tensor | None = None,
    ) -> Tensor:
        """x [total, hidden] -> [total, hidden]; with cls_rows (int64 [sequences], each sequence's first
        token) -> [sequences, hidden], queries computed for those rows alone."""
        dropout_p = self.dropout_p if self.training else 0.0
        head_dim = self.hidden // self.heads
        if cls_rows is None:
            qkv = self.qkv(x).view(-1, 3, self.heads, head_dim)
            out = packed_attention_qkv(qkv, cu_seqlens, max_seqlen, dropout_p=dropout_p, seed=seed)
        else:
            weight, bias = self.qkv.weight, self.qkv.bias
            q = nn.functional.linear(x[cls_rows], weight[: self.hidden], bias[: self.hidden])
            kv = nn.functional.linear(x, weight[self.hidden :], bias[self.hidden :])
            k, v = kv.view(-1, 2, self.heads, head_dim).unbind(1)
            q = q.view(-1, self.heads, head_dim)
            out = packed_attention_cls(q, k, v, cu_seqlens, max_seqlen, dropout_p=dropout_p, seed=seed)
        assert isinstance(out, Tensor)
        return out.flatten(1)


def kernel_head_dim(head_dim: int, device_type: str) -> int:
    """The least head_dim, from this one on, that there is a kernel for."""
    if device_type == "cpu":
        return (head_dim + 15) // 16 * 16
    return next(size for size in HEAD_DIMS if size >= head_dim)


def _attend(
    op: str,
    tensors: tuple[Tensor, ...],
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float,
    softmax_scale: float | None,
    seed: int | Tensor | None,
    name: str = "q",
) -> tuple[Tensor, Tensor]:
    """The op on tensors of a head_dim that the device has a kernel for: zeros behind the last number add
    nothing to a product."""
    head_dim = tensors[0].size(-1)
    wide = kernel_head_dim(head_dim, tensors[0].device.type)
    out, stats = _calls[op](
        *(x if wide == head_dim else nn.functional.pad(x, (0, wide - head_dim)) for x in tensors),
        _arguments.int32_offsets(cu_seqlens),
        max_seqlen,
        dropout_p,
        _arguments.softmax_scale(softmax_scale, head_dim),
        _library.seed_tensor(seed, dropout_p, name, tensors[0]),
    )
    return (out if wide == head_dim else out[..., :head_dim]), stats


def _autocast(**tensors: Tensor) -> tuple[Tensor, ...]:
    """As scaled_dot_product_attention: under autocast in its dtype (float64 stays)."""
    for name, x in tensors.items():
        _arguments.check_tensor(name, x)
    found = tuple(tensors.values())
    dtype = _arguments.autocast_dtype(found[0])
    if dtype is None:
        return found
    return tuple(x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in found)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float,
    *,
    cls: bool = False,
    q_name: str = "q",
) -> tuple[int, float]:
    """Raises for arguments that do not fit each other; returns max_seqlen and dropout_p as plain numbers."""
    _arguments.check_tensor("cu_seqlens", cu_seqlens, "torch.int32")
    shape, k_shape, dtype, device = q.shape, k.shape, q.dtype, q.device
    if len(shape) != 3 or len(k_shape) != 3 or v.dim() != 3:
        raise ValueError(
            "q, k and v must be [total, heads, head_dim], found "
            f"{list(shape)}, {list(k_shape)} and {list(v.shape)}"
        )
    if dtype not in DTYPES:
        raise TypeError(f"{q_name} must be bfloat16, float16, float32 or float64, found {dtype}")
    for name, x in (("k", k), ("v", v)):
        if x.dtype != dtype:
            raise TypeError(f"{name} must have q's dtype {dtype}, found {x.dtype}")
    for name, x in (("k", k), ("v", v), ("cu_seqlens", cu_seqlens)):
        if x.device != device:
            raise ValueError(f"{name} must be on {q_name}'s device {device}, found {x.device}")
    if not 0 < shape[2] <= HEAD_DIMS[-1]:
        raise ValueError(f"head_dim must be at most {HEAD_DIMS[-1]}, found {shape[2]}")
    if k_shape != v.shape or k_shape[1:] != shape[1:]:
        raise ValueError(
            f"q, k and v must agree in heads and head_dim, and k and v in all, found {list(shape)}, "
            f"{list(k_shape)} and {list(v.shape)}"
        )
    if cu_seqlens.dim() != 1 or cu_seqlens.size(0) < 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(
            "cu_seqlens must be int32 or int64 [sequences + 1], found "
            f"{cu_seqlens.dtype} {list(cu_seqlens.shape)}"
        )
    rows = cu_seqlens.size(0) - 1 if cls else k_shape[0]
    if not _arguments.equal(shape[0], rows):
        what = "sequences" if cls else "total"
        raise ValueError(f"q must have {what} = {rows} rows, found {shape[0]}")
    return _arguments.not_negative("max_seqlen", max_seqlen), _arguments.dropout_probability(dropout_p)


def lse_of(stats: Tensor) -> Tensor:
    """Log-sum-exp [heads, rows] of what the ops keep of each row of scores, `AttentionForward::stats`."""
    most, total = stats.detach().double().unbind(-1)
    return (most * math.log(2) + total.log()).to(stats.dtype)


def _stats_like(rows: Tensor, k: Tensor) -> Tensor:
    dtype = torch.float64 if k.dtype == torch.float64 else torch.float32
    return k.new_empty((k.size(-2), rows.size(0), 2), dtype=dtype)


def _fake(q, k, v, cu_seqlens, max_seqlen, dropout_p, softmax_scale, seed):
    return k.new_empty(q.shape), _stats_like(q, k)


def _fake_backward(dout, q, k, v, out, stats, cu_seqlens, max_seqlen, dropout_p, softmax_scale, seed):
    return tuple(k.new_empty(x.shape) for x in (q, k, v))


def _fake_qkv(qkv, cu_seqlens, max_seqlen, dropout_p, softmax_scale, seed):
    return qkv.new_empty((qkv.size(0), qkv.size(2), qkv.size(3))), _stats_like(qkv, qkv)


def _fake_qkv_backward(dout, qkv, out, stats, cu_seqlens, max_seqlen, dropout_p, softmax_scale, seed):
    return qkv.new_empty(qkv.shape)


def _setup_context(tensors: int):
    def setup(ctx, inputs, output):
        ctx.options = inputs[tensors + 1 : tensors + 4]
        ctx.save_for_backward(*inputs[: tensors + 1], inputs[tensors + 4], *output)
        ctx.set_materialize_grads(False)

    return setup


def _derivative(op: str, tensors: int):
    call = _library.underivable(op)

    def derivative(ctx, saved, dout, _dstats):
        nothing = (None,) * 5
        if dout is None:
            return (*(None,) * tensors, *nothing)
        *inputs, cu_seqlens, seed, out, stats = saved
        grads = call(dout, *inputs, out, stats, cu_seqlens, *ctx.options, seed)
        return (*(grads if tensors > 1 else (grads,)), *nothing)

    return derivative


_calls = {}
for _op, _tensors, _fakes in (
    ("packed_attention", 3, (_fake, _fake_backward)),
    ("packed_attention_cls", 3, (_fake, _fake_backward)),
    ("packed_attention_qkv", 1, (_fake_qkv, _fake_qkv_backward)),
):
    torch.library.register_fake(f"mtfast::{_op}", _fakes[0])
    torch.library.register_fake(f"mtfast::{_op}_backward", _fakes[1])
    _calls[_op] = _library.with_derivative(
        _op, _setup_context(_tensors), _derivative(f"{_op}_backward", _tensors)
    )
