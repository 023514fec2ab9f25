"""What the tests of bias_gelu share: operands, and what holds whoever computes.

A `Run` takes x, bias (or None) and dy, and gives y, dx and, with a bias, dbias.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mtfast.ops import bias_gelu_ref

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Run = Callable[[Tensor, Tensor | None, Tensor], list[Tensor]]

# Around what is computed at a time: 16 and 32 columns, 32 rows on the CPU, 256 columns and 64 rows on CUDA.
SHAPES = [(5, 1), (1, 7), (33, 31), (32, 33), (70, 96), (65, 264), (129, 40), (3, 1536), (2, 4099)]


def draw(
    rows: int, columns: int, dtype: torch.dtype, device: str = "cpu", bias: bool = True, seed: int = 0
) -> tuple[Tensor, Tensor | None, Tensor]:
    """x, bias and dy as `dtype` has them; dy around 1, so that no sum cancels down to its rounding."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x, of_columns, dy = 2 * normal(rows, columns), normal(columns), 1 + normal(rows, columns)
    to = {"dtype": dtype, "device": device}
    return x.to(**to), of_columns.to(**to) if bias else None, dy.to(**to)


def by(function: Callable[[Tensor, Tensor | None], Tensor]) -> Run:
    """What bias_gelu or its reference, and autograd, compute."""

    def run(x: Tensor, bias: Tensor | None, dy: Tensor) -> list[Tensor]:
        leaves = [t.detach().requires_grad_() for t in (x, bias) if t is not None]
        y = function(leaves[0], leaves[1] if bias is not None else None)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy)]

    return run


def in_float64(x: Tensor, bias: Tensor | None, dy: Tensor) -> list[Tensor]:
    """The exact results of these numbers."""
    return by(bias_gelu_ref)(*(None if t is None else t.detach().cpu().double() for t in (x, bias, dy)))


def check_errors(
    run: Run, dtype: torch.dtype, device: str = "cpu", shapes: Sequence[tuple[int, int]] = SHAPES
) -> None:
    """Errors of y and of both gradients at most twice eager's, in each case and over all.

    Where a result is a few numbers, eager's error can happen to be all but nothing. There it is its usual
    one: relative to the result, that over all cases.
    """
    found = defaultdict(list)
    for seed, (rows, columns) in enumerate(shapes):
        for bias in (True, False):
            operands = draw(rows, columns, dtype, device, bias, seed)
            results = run(*operands), by(bias_gelu_ref)(*operands), in_float64(*operands)
            assert len(results[0]) == len(results[2])
            for name, ours, eager, truth in zip(("y", "dx", "dbias"), *results, strict=False):
                assert ours.shape == truth.shape and ours.dtype == dtype
                errors = [float((t.cpu().double() - truth).norm() / truth.norm()) for t in (ours, eager)]
                found[name].append((*errors, truth.numel(), (rows, columns, bias)))
    for name, cases in found.items():
        usual = math.sqrt(sum(eager**2 for _, eager, *_ in cases) / len(cases))
        for ours, eager, _, case in cases:
            assert ours <= 2 * max(eager, usual), f"{name} of {case}: {ours:.3g}, eager {eager:.3g}"


def check_every_number(run: Run, dtype: torch.dtype, device: str = "cpu", step: int = 1) -> None:
    """y and gelu's slope at every step-th finite number of 16 bits, or a grid of float32's.

    In the tail below 0 y is small and its digits count: an absolute error that does not show in norms would
    here.
    """
    if dtype == torch.float32:
        x = torch.linspace(-14, 14, 280_001)[::step]
    else:
        x = torch.arange(-(2**15), 2**15, step, dtype=torch.int16).view(dtype)
        x = x[x.isfinite()]
    x = x[: len(x) // 8 * 8].reshape(-1, 8).contiguous().to(device)
    y, slope, _ = run(x, torch.zeros_like(x[0]), torch.ones_like(x))
    exact, exact_slope, _ = in_float64(x, torch.zeros_like(x[0]), torch.ones_like(x))
    precision = torch.finfo(dtype).eps
    limit = precision * exact.abs() + 3e-7
    assert ((y.cpu().double() - exact).abs() <= limit).all()
    # The slope passes through 0.
    limit = precision * exact_slope.abs() + (4e-7 if dtype == torch.float32 else 5e-5)
    assert ((slope.cpu().double() - exact_slope).abs() <= limit).all()


def check_extremes(run: Run, dtype: torch.dtype, device: str = "cpu") -> None:
    """Where exp underflows, where x is as large as can be, and where it is no number."""
    largest = torch.finfo(dtype).max
    x = torch.tensor(
        [[0.0, -0.0, 30.0, -30.0, 200.0, -200.0, largest, -largest, math.nan, math.inf, -math.inf]]
    ).to(device, dtype)
    for bias in (None, torch.zeros_like(x[0])):
        y, dx, *dbias = (t.cpu().double() for t in run(x, bias, torch.ones_like(x)))
        exact, exact_dx, *_ = in_float64(x, bias, torch.ones_like(x))
        torch.testing.assert_close(y, exact, equal_nan=True, rtol=0, atol=0)
        torch.testing.assert_close(dx[:, :9], exact_dx[:, :9], equal_nan=True, rtol=1e-4, atol=1e-30)
        for sums in dbias:
            torch.testing.assert_close(sums, dx[0], equal_nan=True)


def check_sums(run: Run, rows: int, device: str = "cpu") -> None:
    """The bias's gradient is off by at most twice what rounding it to float32 costs: where the slope is 1, it
    is a sum of dy's numbers."""
    columns = 5
    dy = torch.rand(rows, columns, generator=torch.Generator().manual_seed(rows)).to(device)
    x, bias = torch.full_like(dy, 30.0), torch.zeros(columns, device=device)
    _, dx, dbias = run(x, bias, dy)
    assert torch.equal(dx, dy)
    truth = dy.cpu().double().sum(0)
    rounding = (truth.float() - truth).norm()
    assert (dbias.cpu() - truth).norm() <= 2 * rounding
