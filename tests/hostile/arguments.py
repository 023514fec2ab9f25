"""Arguments that ops do not expect: spoil(random, x) gives another object in x's place."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

EXTREME = (0, 1, -1, 2**31 - 1, -(2**31), 2**62, 2**63 - 1, -(2**63))
DTYPES = (
    *(torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64),
    *(torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool),
)
INTS = (*EXTREME, 2, 7, 2**31, 2**63, 2**64, 2**70, -(2**63) - 1, 1.5, None, True, "7", [1], np.int64(3))
FLOATS = (
    *(float("nan"), float("inf"), -float("inf"), -0.1, -0.0, 1.0, 1 - 2**-53, 1e-30, 1e300, 1, 0, 2**80),
    *(None, True, "0.1", [0.1], np.float32(0.25), 0.5j),
)


def spoil(rng: random.Random, x: Any, in_python: bool) -> tuple[Any, bool]:
    """What to pass instead of x, and whether it is as good: the same values, laid out otherwise.

    Args:
        in_python: also what only Python's side looks at: meta tensors and objects that are none.
    """
    if isinstance(x, Tensor):
        if rng.random() < 0.25:
            return rng.choice(SAME)(rng, x), True
        return rng.choice(OTHER + PYTHONS if in_python else OTHER)(rng, x), False
    if x is None:
        return rng.choice([torch.zeros(1), torch.zeros(0, dtype=torch.int64), 1]), False
    if isinstance(x, bool):
        return rng.choice([not x, None, 3, "x"]), False
    if isinstance(x, int):
        return rng.choice([*INTS, torch.tensor(3)]), False
    if isinstance(x, float):
        return rng.choice([*FLOATS, torch.tensor(0.5)]), False
    if isinstance(x, str):
        return rng.choice(["", "silu", None, 3, [x], np.array([x, "x"])]), False
    return rng.choice([None, [], 3, [None], [1.5], [True], "ab", *([n] for n in INTS)]), False


def _apart(rng: random.Random, x: Tensor) -> Tensor:
    """With a gap after each element, or the last dimension before the first in memory."""
    if x.dim() == 0:
        return x
    if rng.random() < 0.5:
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    wide = x.new_zeros([*x.shape[:-1], 2 * x.shape[-1]])
    wide[..., ::2] = x
    return wide[..., ::2]


def _rows_apart(rng: random.Random, x: Tensor) -> Tensor:
    """Rows with other memory between them, from an odd element on."""
    if x.dim() == 0:
        return x
    wide = x.new_zeros([*x.shape[:-1], x.shape[-1] + rng.choice([1, 3, 16])])
    wide[..., 1 : 1 + x.shape[-1]] = x
    return wide[..., 1 : 1 + x.shape[-1]]


def _negated(_: random.Random, x: Tensor) -> Tensor:
    """Which torch negates lazily."""
    if x.dtype not in (torch.float32, torch.float64):
        return x
    return torch._neg_view(-x)


def _resized(rng: random.Random, x: Tensor) -> Tensor:
    if x.dim() == 0:
        return x.expand(2)
    d = rng.randrange(x.dim())
    if x.size(d) and rng.random() < 0.5:
        return x.narrow(d, 0, rng.randrange(x.size(d)))
    return torch.cat((x, x.new_zeros([*x.shape[:d], rng.choice([1, 2, 33]), *x.shape[d + 1 :]])), d)


def _other_values(rng: random.Random, x: Tensor) -> Tensor:
    x = x.detach().clone()
    if x.numel() == 0:
        return x
    place = rng.randrange(x.numel())
    if x.is_floating_point():
        x.view(-1)[place] = rng.choice([float("nan"), float("inf"), -float("inf"), 1e38, 65504.0, 0.0])
    elif x.dtype == torch.int32:
        x.view(-1)[place] = rng.choice([-1, 0, 1, 7, 2**31 - 1, -(2**31)])
    elif x.dtype == torch.int64:
        x.view(-1)[place] = rng.choice([*EXTREME, 7])
    return x


SAME: list[Callable[[random.Random, Tensor], Tensor]] = [_apart, _rows_apart, _negated]
OTHER: list[Callable[[random.Random, Tensor], Tensor]] = [
    _resized,
    _resized,
    _other_values,
    _other_values,
    _other_values,
    lambda rng, x: x.detach().to(rng.choice(DTYPES)),
    lambda rng, x: x.flip(-1) if x.dim() else x,
    lambda rng, x: x[None],
    lambda rng, x: x[0] if x.dim() and x.size(0) else x.flatten(),
    lambda rng, x: x.new_zeros(()),
    lambda rng, x: x.new_zeros([0] * x.dim()),
    lambda rng, x: x.new_zeros([1] * x.dim()).expand(x.shape),
    lambda rng, x: torch._efficientzerotensor(x.shape, dtype=x.dtype),
    lambda rng, x: x.detach().to_sparse(),
]
PYTHONS: list[Callable[[random.Random, Tensor], Any]] = [
    lambda rng, x: x.detach().to("meta"),
    lambda rng, x: x.detach().float().numpy(),
    lambda rng, x: x.tolist(),
    lambda rng, x: None,
    lambda rng, x: 3,
]
