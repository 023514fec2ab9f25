"""Dropout that is cheap on the CPU, where `torch.nn.functional.dropout` costs more than a layer norm.

torch draws one float per element there. A decision needs no more than 16 bits: four come from each 64-bit
word of torch's default generator, so `torch.manual_seed` governs them and thread count does not matter. The
probability is resolved to 1/65536 and the scale is that of the resolved probability, so the expectation is
exact. On other devices torch's own kernel is used.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

_LEVELS = 65536
_ONE_IN_BFLOAT16 = 0x3F80


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """Inverted dropout: each element is zero with probability p, the others are scaled by 1 / (1 - p).

    x is floating, of any shape; p is in [0, 1). The identity when not training or with p = 0.
    """
    if not training or p == 0.0:
        return x
    if x.device.type != "cpu":
        return F.dropout(x, p, True)
    return _Dropout.apply(x, p)


def _draw_keep(x: Tensor, threshold: int) -> Tensor:
    """1 where an element is kept and 0 where it is dropped, in x's shape and dtype."""
    words = torch.empty((x.numel() + 3) // 4, dtype=torch.int64, device=x.device).random_(-(2**63), None)
    keep = words.view(torch.int16)[: x.numel()].view(x.shape).ge_(threshold - _LEVELS // 2)
    if x.dtype == torch.bfloat16:  # 16-bit integer arithmetic builds the number's bits: no conversion pass
        return keep.mul_(_ONE_IN_BFLOAT16).view(torch.bfloat16)
    return keep.to(x.dtype)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, p: float) -> Tensor:
        threshold = min(round(p * _LEVELS), _LEVELS - 1)
        keep = _draw_keep(x, threshold)
        ctx.save_for_backward(keep)
        ctx.scale = _LEVELS / (_LEVELS - threshold)
        return (x * keep).mul_(ctx.scale)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (keep,) = ctx.saved_tensors
        return (grad * keep).mul_(ctx.scale), None
