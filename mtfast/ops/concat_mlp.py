"""concat_mlp: a two-layer perceptron on the concatenation of two matrices, which nobody has to build.

The pair head of Sentence-BERT style models reads two sentence vectors, concatenates them and passes them
through one shared layer. Here the layer reads both where they are, gathering rows from the encoder's output
on the way in, and the backward does so again. A GPU lays them side by side where one product over both takes
less time than two over halves, for weight1's gradient and in float32, and only for that long; a CPU in 16
bits, where torch multiplies, so many rows at a time.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mtfast.ops import _arguments, _library, _philox

FUNCTIONS = {"relu": torch.relu, "gelu": F.gelu, "tanh": torch.tanh}
ACTIVATIONS = tuple(FUNCTIONS)  # in the order of the C++ enum
MAX_OUTPUTS = 8
_NEED_U, _NEED_V, _NEED_WEIGHT1 = 1, 2, 4
_PURPOSE = 3  # Purpose::kConcatMlpDropout

_library.load()


def concat_mlp(
    u: Tensor,
    v: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    *,
    u_rows: Tensor | None = None,
    v_rows: Tensor | None = None,
    activation: str = "relu",
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    training: bool = True,
) -> Tensor:
    """`dropout(act([u; v] @ weight1.T + bias1)) @ weight2.T + bias2`, of u and v apart.

    Args:
        u, v: floating [batch, hidden]; with `u_rows` (`v_rows`) any number of rows.
        weight1: [inner, 2 * hidden]; its left half multiplies u, its right half v.
        bias1: [inner].
        weight2: [outputs, inner], 1 to 8 outputs.
        bias2: [outputs].
        u_rows, v_rows: int32 or int64 [batch]: row i of the product reads `u[u_rows[i]]` (`v[v_rows[i]]`).
        activation: "relu", "gelu" (the erf form) or "tanh".
        dropout_p: probability in [0, 1) that an element of the hidden layer is dropped in training,
            resolved to 1/65536; what is kept is scaled so that the expectation is the undropped element.
        seed: what dropout is drawn from: one seed, row and column of the hidden layer give one decision. Any
            64-bit int, or an int64 tensor of one element on the inputs' device. None draws one from torch's
            default generator of that device. While a CUDA graph is captured an int is refused, since every
            replay would drop the same.
        training: False switches dropout off.

    Returns:
        [batch, outputs] in the inputs' dtype (under autocast, in autocast's).

    Raises:
        ValueError, TypeError: a kind of object, shape, dtype, device, activation or probability that does
            not fit.
        RuntimeError: an int seed in a capture; on the CPU, a row index out of range; a device or dtype
            without an implementation. A GPU is not waited for to check indices: such a row of the result is
            NaN, and its gradient fails torch's own assertion on the device.
    """
    dropout_p = _check(u, v, weight1, bias1, weight2, bias2, u_rows, v_rows, activation, dropout_p)
    operands = [u, v, weight1, bias1, weight2, bias2]
    dtype = _arguments.autocast_dtype(u)
    if dtype is not None:
        operands = [x if x.dtype == torch.float64 else x.to(dtype) for x in operands]
    operands = [x if x.stride(-1) == 1 else x.contiguous() for x in operands[:2]] + [
        x.contiguous() for x in operands[2:]
    ]
    dropout_p = dropout_p if training else 0.0
    y, _ = _concat_mlp(
        *operands,
        None if u_rows is None else u_rows.contiguous(),
        None if v_rows is None else v_rows.contiguous(),
        ACTIVATIONS.index(activation),
        dropout_p,
        _library.seed_tensor(seed, dropout_p, "u", u),
        torch.is_grad_enabled() and any(x.requires_grad for x in operands),
    )
    return y


def concat_mlp_ref(
    u: Tensor,
    v: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    *,
    u_rows: Tensor | None = None,
    v_rows: Tensor | None = None,
    activation: str = "relu",
    dropout_p: float = 0.0,
    seed: int | None = None,
    training: bool = True,
) -> Tensor:
    """The same mathematics in eager PyTorch: the oracle of the tests and the baseline of the benchmark.

    Given a seed, dropout drops what `concat_mlp` drops with it; without one it is torch's own.
    """
    u = u if u_rows is None else u[u_rows]
    v = v if v_rows is None else v[v_rows]
    hidden = F.linear(torch.cat([u, v], dim=1), weight1, bias1)
    hidden = FUNCTIONS[activation](hidden)
    if seed is None:
        hidden = F.dropout(hidden, dropout_p, training)
    elif training and dropout_p > 0:
        keep = dropout_keep(hidden.shape[0], hidden.shape[1], dropout_p, seed).to(hidden.device)
        hidden = torch.where(keep, hidden, 0.0) * (65536 / (65536 - _philox.dropout_threshold(dropout_p)))
    return F.linear(hidden, weight2, bias2)


def dropout_keep(batch: int, inner: int, dropout_p: float, seed: int) -> Tensor:
    """bool [batch, inner]: what `concat_mlp` with this seed keeps of the hidden layer."""
    row, column = (torch.arange(n, device="cpu") for n in (batch, inner))
    row, column = row[:, None], column[None, :]
    call = column // 32 * 4 + column % 8 // 2
    zero = torch.zeros_like(row + column)
    words = torch.stack(_philox.philox(call + zero, row + zero, zero, zero + _PURPOSE, seed), dim=-1)
    word = words.gather(-1, (column % 32 // 8 + zero)[..., None])[..., 0]
    draw = (word >> column % 2 * 16) & 0xFFFF
    return draw >= _philox.dropout_threshold(dropout_p)


@torch.library.register_fake("mtfast::concat_mlp")
def _fake(
    u, v, weight1, bias1, weight2, bias2, u_rows, v_rows, activation, dropout_p, seed, save_hidden
) -> tuple[Tensor, Tensor]:
    batch = u.shape[0] if u_rows is None else u_rows.shape[0]
    inner, outputs = weight1.shape[0], weight2.shape[0]
    return u.new_empty(batch, outputs), u.new_empty(batch if save_hidden else 0, inner)


@torch.library.register_fake("mtfast::concat_mlp_backward")
def _fake_backward(
    dy, u, v, weight1, weight2, z, u_rows, v_rows, activation, dropout_p, seed, needs
) -> tuple[Tensor, ...]:
    batch, hidden = dy.shape[0], u.shape[1]
    inner, outputs = weight1.shape[0], weight2.shape[0]
    return (
        u.new_empty(bool(needs & _NEED_U) + bool(needs & _NEED_V), batch, hidden),
        u.new_empty(inner if needs & _NEED_WEIGHT1 else 0, 2 * hidden),
        u.new_empty(inner),
        u.new_empty(outputs, inner),
        u.new_empty(outputs),
    )


def _setup_context(ctx, inputs, output) -> None:
    u, v, weight1, _, weight2, _, u_rows, v_rows, ctx.activation, ctx.dropout_p, seed, _ = inputs
    z = output[1]
    ctx.mark_non_differentiable(z)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(u, v, weight1, weight2, z, u_rows, v_rows, seed)


def _derivative(ctx, saved, dy, _dz) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 12
    u, v, weight1, weight2, z, u_rows, v_rows, seed = saved
    need = ctx.needs_input_grad
    dinputs, *dweights = _concat_mlp_backward(
        dy.contiguous(),
        u,
        v,
        weight1,
        weight2,
        z,
        u_rows,
        v_rows,
        ctx.activation,
        ctx.dropout_p,
        seed,
        need[0] * _NEED_U + need[1] * _NEED_V + need[2] * _NEED_WEIGHT1,
    )
    sides = iter(dinputs.unbind())
    grads = [
        _scatter(next(sides), rows, x) if needed else None
        for needed, rows, x in ((need[0], u_rows, u), (need[1], v_rows, v))
    ]
    grads += [grad if needed else None for grad, needed in zip(dweights, need[2:6], strict=True)]
    return (*grads, None, None, None, None, None, None)


def _scatter(grad: Tensor, rows: Tensor | None, like: Tensor) -> Tensor:
    """Gradient rows added up where `rows` gathered them from, in an order that does not vary."""
    if rows is None:
        return grad
    out = torch.zeros_like(like, memory_format=torch.contiguous_format)
    if like.device.type == "cpu":
        return out.index_add_(0, rows, grad)
    return out.index_put_((rows,), grad, accumulate=True)


_concat_mlp_backward = _library.underivable("concat_mlp_backward")
_concat_mlp = _library.with_derivative("concat_mlp", _setup_context, _derivative)


class ConcatMLP(nn.Module):
    """`concat_mlp` with its weights: `dense` on the concatenated pair, `out_proj` on its hidden layer.

    State dict: `dense.weight` [inner, 2 * hidden], `dense.bias`, `out_proj.weight` [outputs, inner],
    `out_proj.bias`; both initialised as `nn.Linear` is.
    """

    def __init__(
        self, hidden: int, inner: int, outputs: int, activation: str = "relu", dropout_p: float = 0.0
    ) -> None:
        super().__init__()
        _check_options(activation, dropout_p, outputs)
        self.dense = nn.Linear(2 * hidden, inner)
        self.out_proj = nn.Linear(inner, outputs)
        self.activation = activation
        self.dropout_p = dropout_p

    def forward(
        self,
        u: Tensor,
        v: Tensor,
        u_rows: Tensor | None = None,
        v_rows: Tensor | None = None,
        *,
        seed: int | Tensor | None = None,
    ) -> Tensor:
        """[batch, outputs] of two [batch, hidden] (or, with row indices, two matrices to gather from)."""
        return concat_mlp(
            u,
            v,
            self.dense.weight,
            self.dense.bias,
            self.out_proj.weight,
            self.out_proj.bias,
            u_rows=u_rows,
            v_rows=v_rows,
            activation=self.activation,
            dropout_p=self.dropout_p,
            seed=seed,
            training=self.training,
        )

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}, dropout_p={self.dropout_p}"


def _check_options(activation: str, dropout_p: float, outputs: int) -> float:
    _arguments.check_choice("activation", activation, ACTIVATIONS)
    dropout_p = _arguments.dropout_probability(dropout_p)
    if not 1 <= outputs <= MAX_OUTPUTS:
        raise ValueError(f"outputs must be 1 to {MAX_OUTPUTS}, found {outputs}")
    return dropout_p


def _check(
    u: Tensor,
    v: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    u_rows: Tensor | None,
    v_rows: Tensor | None,
    activation: str,
    dropout_p: float,
) -> float:
    """Raises for arguments that do not fit each other, naming what was found; returns dropout_p as float."""
    named = {"u": u, "v": v, "weight1": weight1, "bias1": bias1, "weight2": weight2, "bias2": bias2}
    for name, tensor in named.items():
        _arguments.check_tensor(name, tensor)
        if tensor.dim() != (1 if name.startswith("bias") else 2):
            raise ValueError(f"{name} has the wrong number of dimensions: shape {tuple(tensor.shape)}")
    (inner, twice), hidden = weight1.shape, u.shape[1]
    dropout_p = _check_options(activation, dropout_p, weight2.shape[0])
    expected = {
        "v": (v.shape[0], hidden),
        "weight1": (inner, 2 * hidden),
        "bias1": (inner,),
        "weight2": (weight2.shape[0], inner),
        "bias2": (weight2.shape[0],),
    }
    for name, shape in expected.items():
        if tuple(named[name].shape) != shape:
            raise ValueError(
                f"{name} must be {list(shape)} for u {list(u.shape)} and weight1 [{inner}, {twice}], "
                f"found {list(named[name].shape)}"
            )
    for name, rows in (("u_rows", u_rows), ("v_rows", v_rows)):
        if rows is None:
            continue
        _arguments.check_tensor(name, rows, "torch.int64")
        if rows.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{name} must be int32 or int64, found {rows.dtype}")
        if rows.dim() != 1:
            raise ValueError(f"{name} must be [batch], found shape {tuple(rows.shape)}")
        named[name] = rows
    batch = {"u": u.shape[0] if u_rows is None else u_rows.shape[0]}  # no len(): it fixes what is exported
    batch["v"] = v.shape[0] if v_rows is None else v_rows.shape[0]
    if not _arguments.equal(batch["u"], batch["v"]):
        raise ValueError(f"u gives {batch['u']} rows and v gives {batch['v']}: they must be as many")
    for name, tensor in named.items():
        if tensor.device != u.device:
            raise ValueError(f"{name} is on {tensor.device}, u on {u.device}: they must be on one device")
    if not u.is_floating_point():
        raise TypeError(f"u must be float32, float64, bfloat16 or float16, found {u.dtype}")
    autocast = _arguments.autocast_dtype(u) is not None
    for name in ("v", "weight1", "bias1", "weight2", "bias2"):
        dtype = named[name].dtype
        if dtype != u.dtype and not (autocast and dtype.is_floating_point):
            raise TypeError(f"{name} is {dtype}, u is {u.dtype}: they must be of one dtype")
    return dropout_p
