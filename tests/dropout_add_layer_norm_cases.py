"""What the tests of dropout_add_layer_norm share: operands, random cases, and what holds whoever computes.

A `Run` takes x, residual, weight, bias and x_bias, then dy and options, and gives y and the gradients of the
operands that require one.
"""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mtfast.ops import dropout_add_layer_norm_ref
from mtfast.ops.dropout_add_layer_norm import dropout_keep

NAMES = ("x", "residual", "weight", "bias", "x_bias")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Operands = list[Tensor | None]
Run = Callable[..., list[Tensor]]  # (operands, dy, **options)
ROWS = (1, 1, 2, 3, 7, 16, 31, 32, 65, 130)
HIDDEN = (7, 16, 33, 127, 128, 200, 256, 257, 384, 500, 768, 1000, 1024, 2056, 4096, 4099)


class Error(NamedTuple):
    """Norms of a result's errors against float64, and of the exact result."""

    case: int
    ours: float
    eagers: float
    exact: float
    numbers: int


def draw(shape: Sequence[int], seed: int, dtype: torch.dtype = torch.float64, mean: float = 0.0) -> Operands:
    """Operands in float64, of numbers that `dtype` has, at a trained layer's scale; residual about `mean`."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int, scale: float = 1.0, about: float = 0.0) -> Tensor:
        drawn = about + torch.randn(*size, generator=generator, dtype=torch.float64) * scale
        return drawn.to(dtype).double()

    hidden = shape[-1]
    vectors = [normal(hidden, scale=0.3, about=1.0), normal(hidden), normal(hidden, scale=0.3)]
    return [normal(*shape), normal(*shape, about=mean), *vectors]


def cast(
    operands: Operands, dtype: torch.dtype, device: str = "cpu", needs: Sequence[bool] = (True,) * 5
) -> Operands:
    """Leaves of that dtype."""
    return [
        None if x is None else x.detach().to(device, dtype).requires_grad_(n)
        for x, n in zip(operands, needs, strict=True)
    ]


def by(function: Callable[..., Tensor]) -> Run:
    """What dropout_add_layer_norm or its reference, and autograd, compute."""

    def run(operands: Operands, dy: Tensor, **options) -> list[Tensor]:
        x, residual, weight, bias, x_bias = operands
        y = function(x, residual, weight, bias, x_bias=x_bias, **options)
        wanted = [x for x in operands if x is not None and x.requires_grad]
        return [y.detach(), *torch.autograd.grad(y, wanted, dy)]

    return run


def random_case(
    number: int, dtype: torch.dtype, hidden: Sequence[int] = HIDDEN
) -> tuple[Operands, dict, tuple[bool, ...]]:
    """Operands (in float64, of numbers that `dtype` has), options, and which gradients.

    Every subset of gradients comes six times in 200 cases, without the residual or x_bias where that is left
    out.
    """
    pick = random.Random(number)
    width = hidden[number % len(hidden)]
    rows = pick.choice([n for n in ROWS if n * width <= 32768 or n == 1])
    shape = (rows, width) if pick.random() < 0.5 or rows % 2 else (2, rows // 2, width)
    subset = number % 31 + 1
    needs = [bool(subset >> i & 1) for i in range(5)]
    operands = draw(shape, number, dtype, pick.choice([0.0, 0.0, 30.0]))
    for name in ("residual", "x_bias"):
        if pick.random() < 0.25 and sum(needs) > needs[NAMES.index(name)]:
            operands[NAMES.index(name)], needs[NAMES.index(name)] = None, False
    options = {
        "dropout_p": pick.choice([0.0, 0.1, 0.5]),
        "seed": pick.randint(-(2**63), 2**63 - 1),
        "eps": pick.choice([1e-12, 1e-5]),
    }
    return operands, options, tuple(needs)


def check_random_cases(
    run: Run,
    numbers: Iterable[int],
    dtype: torch.dtype,
    device: str = "cpu",
    hidden: Sequence[int] = HIDDEN,
) -> None:
    """Errors of y and of all gradients at most twice eager's, in each case and over all.

    Where a result is a few sums, eager's error can happen to be all but nothing. There it is its usual one:
    relative to the result, that over all cases. Fewer than eight numbers count only among all cases.
    """
    found: dict[str, list[Error]] = defaultdict(list)
    for number in numbers:
        exact, options, needs = random_case(number, dtype, hidden)
        generator = torch.Generator().manual_seed(number)
        # Around 1, so that no sum over rows cancels down to its own rounding error.
        dy = (1 + torch.randn(exact[0].shape, generator=generator)).to(device, dtype)
        truth = by(dropout_add_layer_norm_ref)(
            cast(exact, torch.float64, needs=needs), dy.cpu().double(), **options
        )
        operands = cast(exact, dtype, device, needs)
        ours, eager = (f(operands, dy, **options) for f in (run, by(dropout_add_layer_norm_ref)))
        names = ["y", *(f"d{n}" for n, need in zip(NAMES, needs, strict=True) if need)]
        for name, x, e, t in zip(names, ours, eager, truth, strict=True):
            assert x.shape == t.shape and x.dtype == dtype
            error, eagers = ((y.cpu().double() - t).norm().item() for y in (x, e))
            found[name].append(Error(number, error, eagers, t.norm().item(), t.numel()))
    for name, errors in found.items():
        ours = math.sqrt(sum((e.ours / e.exact) ** 2 for e in errors) / len(errors))
        usual = math.sqrt(sum((e.eagers / e.exact) ** 2 for e in errors) / len(errors))
        assert ours <= 2 * usual, f"{name}: {ours / usual:.2f} times eager's error over all cases"
        for e in errors:
            limit = 2 * max(e.eagers, usual * e.exact)
            assert e.numbers < 8 or e.ours <= limit, f"{name}, {e}: more than {limit:.3g}"


def check_dropout(run: Run, dropout_p: float, seed: int, device: str = "cpu") -> None:
    """Forward and backward drop what the reference says, as often as they should.

    Of ones, what is kept is above a row's mean and what is dropped below it; and a gradient goes back through
    what is kept alone.
    """
    shape = (9, 300)
    keep = dropout_keep(*shape, dropout_p, seed)
    ones, weight = torch.ones(shape, device=device), torch.ones(shape[1], device=device)
    operands = [ones, None, weight, torch.zeros_like(weight), None]
    dy = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device)
    y, dx = run(
        cast(operands, torch.float32, device, (True, *(False,) * 4)), dy, dropout_p=dropout_p, seed=seed
    )
    assert torch.equal(y.cpu() > 0, keep) and torch.equal(dx.cpu() != 0, keep)
    many = dropout_keep(512, 768, dropout_p, seed)
    error = math.sqrt(dropout_p * (1 - dropout_p) / many.numel())
    assert abs(many.double().mean().item() - (1 - dropout_p)) < 4 * error


def check_sums(run: Run, rows: int, device: str = "cpu") -> None:
    """Sums over rows are off by at most twice what rounding them to float32 costs.

    Each row is 1 and -1 in turn, so that every term of the sums is one of dy's numbers.
    """
    hidden = 24
    dy = torch.rand(rows, hidden, generator=torch.Generator().manual_seed(rows))
    signs = torch.tensor([1.0, -1.0]).repeat(hidden // 2)
    operands = [signs.expand(rows, hidden), None, torch.ones(hidden), torch.zeros(hidden), None]
    _, dweight, dbias = run(
        cast(operands, torch.float32, device, (False, False, True, True, False)), dy.to(device), eps=0.0
    )
    truth = dy.double().sum(0)
    rounding = (truth.float() - truth).norm()
    for sums in (dweight.cpu() * signs, dbias.cpu()):
        assert (sums - truth).norm() <= 2 * rounding
