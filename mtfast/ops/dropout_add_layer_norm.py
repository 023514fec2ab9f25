"""dropout_add_layer_norm: how each half of a transformer's layer ends, in one pass over the rows each way.

Post-norm layers, BERT's among them, end twice in dropout of what a linear layer gave, a sum with what went
into the half, and layer normalisation (Ba, Kiros and Hinton, "Layer normalization", 2016). Here the sum is
never stored: the backward makes it again, dropout included, from what the forward read, and the mean and
deviation of each row.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from mtfast.ops import _arguments, _library, _philox

_NEED_X, _NEED_RESIDUAL = 1, 2  # and 4, 8, 16 for weight, bias and x_bias
_PURPOSE = 5  # Purpose::kDropoutAddLayerNorm

_library.load()


def dropout_add_layer_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    *,
    x_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    eps: float = 1e-12,
    seed: int | Tensor | None = None,
    training: bool = True,
) -> Tensor:
    """`layer_norm(residual + dropout(x + x_bias))` over the last dimension.

    Args:
        x: floating [..., hidden].
        residual: of x's shape, or None for none.
        weight, bias: [hidden], the normalisation's.
        x_bias: [hidden], the bias of the linear layer that made x without it, or None. Added here, it gets
            its gradient from the pass that makes the others.
        dropout_p: probability in [0, 1) that an element of `x + x_bias` is dropped in training, resolved to
            1/65536; what is kept is scaled so that the expectation is the undropped element.
        eps: what is added to a row's variance, not negative.
        seed: what dropout is drawn from: one seed, row (of x flattened to [rows, hidden]) and column give one
            decision. Any 64-bit int, or an int64 tensor of one element on x's device. None draws one from
            torch's default generator of that device. While a CUDA graph is captured an int is refused, since
            every replay would drop the same.
        training: False switches dropout off.

    Returns:
        [..., hidden] in x's dtype (under autocast, in autocast's). Statistics and sums are made in float32,
        of float64 in float64. Results do not depend on the number of threads or vary between runs.

    Raises:
        ValueError, TypeError: a kind of object, shape, dtype, device, probability or eps that does not fit.
        RuntimeError: an int seed in a capture; a device or dtype without an implementation.
    """
    dropout_p, eps = _check(x, residual, weight, bias, x_bias, dropout_p, eps)
    operands = [x, residual, weight, bias, x_bias]
    dtype = _arguments.autocast_dtype(x)
    if dtype is not None:
        operands = [t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in operands]
    operands = [None if t is None else t.contiguous() for t in operands]
    dropout_p = dropout_p if training else 0.0
    y, _ = _dropout_add_layer_norm(
        *operands,
        dropout_p,
        eps,
        _library.seed_tensor(seed, dropout_p, "x", x),
        torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in operands),
    )
    return y


def dropout_add_layer_norm_ref(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    *,
    x_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    eps: float = 1e-12,
    seed: int | None = None,
    training: bool = True,
) -> Tensor:
    """The same mathematics in eager PyTorch: the oracle of the tests and the baseline of the benchmark.

    Given a seed, dropout drops what `dropout_add_layer_norm` drops with it; without one it is torch's own.
    """
    if x_bias is not None:
        x = x + x_bias
    if seed is None:
        x = F.dropout(x, dropout_p, training)
    elif training and dropout_p > 0:
        keep = dropout_keep(x.numel() // x.shape[-1], x.shape[-1], dropout_p, seed).view(x.shape).to(x.device)
        x = torch.where(keep, x, 0.0) * (65536 / (65536 - _philox.dropout_threshold(dropout_p)))
    return F.layer_norm(x if residual is None else residual + x, x.shape[-1:], weight, bias, eps)


def dropout_keep(rows: int, hidden: int, dropout_p: float, seed: int) -> Tensor:
    """bool [rows, hidden]: what `dropout_add_layer_norm` with this seed keeps of `x + x_bias`."""
    row, column = (torch.arange(n, device="cpu") for n in (rows, hidden))
    row, column = row[:, None], column[None, :]
    zero = torch.zeros_like(row + column)
    words = torch.stack(_philox.philox(column // 8 + zero, row + zero, zero, zero + _PURPOSE, seed), dim=-1)
    word = words.gather(-1, (column % 8 // 2 + zero)[..., None])[..., 0]
    draw = (word >> column % 2 * 16) & 0xFFFF
    return draw >= _philox.dropout_threshold(dropout_p)


@torch.library.register_fake("mtfast::dropout_add_layer_norm")
def _fake(x, residual, weight, bias, x_bias, dropout_p, eps, seed, save_stats) -> tuple[Tensor, Tensor]:
    rows = x.numel() // x.shape[-1] if save_stats else 0
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return torch.empty_like(x), x.new_empty((rows, 2), dtype=dtype)


@torch.library.register_fake("mtfast::dropout_add_layer_norm_backward")
def _fake_backward(dy, x, residual, weight, x_bias, stats, dropout_p, seed, needs) -> tuple[Tensor, ...]:
    if dropout_p == 0 and needs & _NEED_RESIDUAL:
        needs = (needs | _NEED_X) & ~_NEED_RESIDUAL
    likes = (x, x, weight, weight, weight)
    return tuple(like.new_empty(like.shape if needs >> i & 1 else 0) for i, like in enumerate(likes))


def _setup_context(ctx, inputs, output) -> None:
    x, residual, weight, _, x_bias, ctx.dropout_p, _, seed, _ = inputs
    stats = output[1]
    ctx.mark_non_differentiable(stats)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, residual, weight, x_bias, stats, seed)


def _derivative(ctx, saved, dy, _dstats) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 9
    x, residual, weight, x_bias, stats, seed = saved
    need = ctx.needs_input_grad[:5]
    grads = list(
        _dropout_add_layer_norm_backward(
            dy.contiguous(),
            x,
            residual,
            weight,
            x_bias,
            stats,
            ctx.dropout_p,
            seed,
            sum(needed << i for i, needed in enumerate(need)),
        )
    )
    if ctx.dropout_p == 0:  # then one tensor is the gradient of both
        grads[1] = grads[0]
    return (
        *(grad if needed else None for grad, needed in zip(grads, need, strict=True)),
        None,
        None,
        None,
        None,
    )


_dropout_add_layer_norm_backward = _library.underivable("dropout_add_layer_norm_backward")
_dropout_add_layer_norm = _library.with_derivative("dropout_add_layer_norm", _setup_context, _derivative)


def _check(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    x_bias: Tensor | None,
    dropout_p: float,
    eps: float,
) -> tuple[float, float]:
    """Raises for arguments that do not fit x, naming what was found; returns dropout_p and eps as floats."""
    _arguments.check_tensor("x", x)
    if x.dim() < 1 or x.shape[-1] < 1:
        raise ValueError(f"x must be [..., hidden] with hidden of at least 1, found {list(x.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"x must be float32, float64, bfloat16 or float16, found {x.dtype}")
    named = {"weight": weight, "bias": bias}
    named |= {name: t for name, t in (("residual", residual), ("x_bias", x_bias)) if t is not None}
    autocast = _arguments.autocast_dtype(x) is not None
    for name, tensor in named.items():
        _arguments.check_tensor(name, tensor)
        shape = x.shape if name == "residual" else x.shape[-1:]
        if tensor.shape != shape:
            raise ValueError(
                f"{name} must be {list(shape)} for x {list(x.shape)}, found {list(tensor.shape)}"
            )
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, x on {x.device}: they must be on one device")
        if tensor.dtype != x.dtype and not (autocast and tensor.dtype.is_floating_point):
            raise TypeError(f"{name} is {tensor.dtype}, x is {x.dtype}: they must be of one dtype")
    eps = _arguments.real("eps", eps)
    if not eps >= 0.0:
        raise ValueError(f"eps must not be negative, found {eps}")
    return _arguments.dropout_probability(dropout_p), eps
