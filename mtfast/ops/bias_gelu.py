"""bias_gelu: the activation of a transformer's feed-forward layer, together with the bias before it.

A linear layer followed by GELU makes three passes over its output's gradient: GELU's derivative, and the sum
over rows that is the bias's gradient. Here the bias is added where GELU reads anyway, so that its gradient
comes out of GELU's backward pass. Nothing is stored but x, which is the linear layer's output.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from mtfast.ops import _arguments, _library

_library.load()


def bias_gelu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """`gelu(x + bias)`, with gelu(z) = z Phi(z), Phi the normal distribution's: the erf form.

    The sum is not rounded before GELU, nor are the terms of the bias's gradient before they are added up,
    in an order that does not vary.

    Args:
        x: floating [..., columns].
        bias: [columns], of x's dtype: that of the linear layer which made x without it.

    Returns:
        x's shape, in its dtype (under autocast, in autocast's).

    Raises:
        ValueError, TypeError: a kind of object, shape, dtype or device that does not fit.
        RuntimeError: a device or dtype without an implementation.
    """
    _check(x, bias)
    dtype = _arguments.autocast_dtype(x)
    operands = [
        y if y is None or dtype is None or y.dtype == torch.float64 else y.to(dtype) for y in (x, bias)
    ]
    return _bias_gelu(*(y if y is None else y.contiguous() for y in operands))


def bias_gelu_ref(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """The same mathematics in eager PyTorch: the oracle of the tests and the baseline of the benchmark."""
    return F.gelu(x if bias is None else x + bias)


@torch.library.register_fake("mtfast::bias_gelu")
def _fake(x, bias) -> Tensor:
    return torch.empty_like(x)


@torch.library.register_fake("mtfast::bias_gelu_backward")
def _fake_backward(dy, x, bias) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(0 if bias is None else x.shape[-1])


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _derivative(ctx, saved, dy) -> tuple[Tensor | None, Tensor | None]:
    x, bias = saved
    dx, dbias = _bias_gelu_backward(dy.contiguous(), x, bias)
    need_x, need_bias = ctx.needs_input_grad
    return dx if need_x else None, dbias if need_bias else None


_bias_gelu_backward = _library.underivable("bias_gelu_backward")
_bias_gelu = _library.with_derivative("bias_gelu", _setup_context, _derivative)


def _check(x: Tensor, bias: Tensor | None) -> None:
    """Raises for arguments that do not fit each other, naming what was found."""
    _arguments.check_tensor("x", x)
    if x.dim() == 0:
        raise ValueError("x must be [..., columns], found a tensor without dimensions")
    if not x.is_floating_point():
        raise TypeError(f"x must be float32, float64, bfloat16 or float16, found {x.dtype}")
    if bias is None:
        return
    _arguments.check_tensor("bias", bias)
    if bias.dim() != 1 or not _arguments.equal(bias.shape[0], x.shape[-1]):
        raise ValueError(f"bias must be [{x.shape[-1]}] for x {list(x.shape)}, found {list(bias.shape)}")
    if bias.device != x.device:
        raise ValueError(f"bias is on {bias.device}, x on {x.device}: they must be on one device")
    autocast = _arguments.autocast_dtype(x) is not None
    if bias.dtype != x.dtype and not (autocast and bias.is_floating_point()):
        raise TypeError(f"bias is {bias.dtype}, x is {x.dtype}: they must be of one dtype")
