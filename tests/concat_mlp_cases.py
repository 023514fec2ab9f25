"""What the tests of concat_mlp share: operands, random cases, and what holds whoever computes.

A `Run` takes concat_mlp's arguments and dy, and gives y and the gradients of the operands that require one.
"""

from __future__ import annotations

import itertools
import math
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mtfast.ops import concat_mlp_ref
from mtfast.ops.concat_mlp import ACTIVATIONS, dropout_keep

NAMES = ("u", "v", "weight1", "bias1", "weight2", "bias2")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Operands = list[Tensor]
Run = Callable[..., list[Tensor]]  # (operands, dy, **options)
ALL = (True,) * 6


class Error(NamedTuple):
    """Norms of a result's errors against float64, and of the exact result."""

    case: int
    ours: float
    eagers: float
    exact: float
    numbers: int


def draw(batch: int, hidden: int, inner: int, outputs: int, seed: int, rows: int | None = None) -> Operands:
    """Operands in float64, at the scale of a trained layer; with `rows`, u and v have that many.

    bias2 is large enough that no output is a difference of equals.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64) * scale

    source = batch if rows is None else rows
    return [
        normal(source, hidden),
        normal(source, hidden),
        normal(inner, 2 * hidden, scale=(2 * hidden) ** -0.5),
        normal(inner, scale=0.3),
        normal(outputs, inner, scale=inner**-0.5),
        1 + normal(outputs).abs(),
    ]


def cast(
    operands: Operands, dtype: torch.dtype, device: str, needs: tuple[bool, ...] = ALL, gap: int = 0
) -> Operands:
    """Leaves of that dtype; `gap` elements lie between one row of u and v and the next."""
    moved = [x.detach().to(device, dtype) for x in operands]
    if gap:
        moved[:2] = [torch.nn.functional.pad(x, (0, gap))[:, :-gap] for x in moved[:2]]
    return [x.detach().requires_grad_(n) for x, n in zip(moved, needs, strict=True)]


def by(function: Callable[..., Tensor]) -> Run:
    """What concat_mlp or its reference, and autograd, compute."""

    def run(operands: Operands, dy: Tensor, **options) -> list[Tensor]:
        y = function(*operands, **options)
        return [y.detach(), *torch.autograd.grad(y, [x for x in operands if x.requires_grad], dy)]

    return run


def kink_distance(operands: Operands, options: dict) -> float:
    """How near an argument of the activation comes to 0, where relu's derivative jumps."""
    u, v, weight1, bias1, *_ = operands
    u = u if options["u_rows"] is None else u[options["u_rows"]]
    v = v if options["v_rows"] is None else v[options["v_rows"]]
    return (torch.cat([u, v], 1) @ weight1.T + bias1).abs().min().item()


BATCHES = (1, 1, 2, 3, 7, 16, 31, 32, 65, 129)


def random_case(
    number: int, dtype: torch.dtype, batches: Sequence[int] = BATCHES
) -> tuple[Operands, dict, tuple[bool, ...], int]:
    """Operands (in float64, of numbers that `dtype` has), options, which gradients, and the gap between rows.

    Every subset of gradients comes three times in 200 cases.
    """
    pick = random.Random(number)
    batch = pick.choice(batches)
    hidden = pick.choice([128, 129, 192, 200, 256, 330, 384, 500, 768, 1000, 1024])
    inner, outputs = pick.choice([16, 17, 32, 100, 128, 129, 256, 300]), pick.randint(1, 8)
    rows = pick.randint(1, 2 * batch) if pick.random() < 0.5 else None
    index_dtype = pick.choice([torch.int32, torch.int64])
    options = {
        "activation": pick.choice(ACTIVATIONS),
        "dropout_p": pick.choice([0.0, 0.1, 0.5]),
        "seed": pick.randint(-(2**63), 2**63 - 1),
        "u_rows": None,
        "v_rows": None,
    }
    if rows is not None:
        for name in ("u_rows", "v_rows"):
            options[name] = torch.tensor(pick.choices(range(rows), k=batch), dtype=index_dtype)
    subset = number % 63 + 1
    needs = tuple(bool(subset >> i & 1) for i in range(6))
    gap = pick.choice([0, 0, 8, 5])
    for attempt in itertools.count():
        operands = [
            x.to(dtype).double() for x in draw(batch, hidden, inner, outputs, number + 1000 * attempt, rows)
        ]
        if options["activation"] != "relu" or kink_distance(operands, options) > 3e-6:
            return operands, options, needs, gap
    raise AssertionError


def check_random_cases(
    run: Run,
    numbers: Iterable[int],
    dtype: torch.dtype,
    device: str = "cpu",
    batches: Sequence[int] = BATCHES,
) -> None:
    """Errors of y and of all gradients at most twice eager's, in each case and over all.

    Where a result is a few sums, eager's error can happen to be all but nothing. There it is its usual one:
    relative to the result, that over all cases. Fewer than eight numbers count only among all cases.
    """
    found: dict[str, list[Error]] = defaultdict(list)
    for number in numbers:
        exact, options, needs, gap = random_case(number, dtype, batches)
        batch = len(exact[0] if options["u_rows"] is None else options["u_rows"])
        # Around 1, so that no sum over rows cancels down to its own rounding error.
        generator = torch.Generator().manual_seed(number)
        dy = (1 + torch.randn(batch, len(exact[5]), generator=generator)).to(device, dtype)
        truth = by(concat_mlp_ref)(cast(exact, torch.float64, "cpu", needs), dy.cpu().double(), **options)
        options = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in options.items()}
        operands = cast(exact, dtype, device, needs, gap)
        ours, eager = (f(operands, dy, **options) for f in (run, by(concat_mlp_ref)))
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


def check_sums(run: Run, batch: int, device: str = "cpu") -> None:
    """Sums over rows are off by at most twice what rounding them to float32 costs; dbias2 by only that.

    The hidden layer is all ones and each of its columns goes to one output, so that every term is one of dy's
    numbers.
    """
    inner, outputs = 24, 8
    dy = torch.rand(batch, outputs, generator=torch.Generator().manual_seed(batch))
    weight2 = torch.eye(outputs).repeat(1, inner // outputs)
    shapes = (batch, 1), (batch, 1), (inner, 2)
    operands = [*(torch.zeros(shape) for shape in shapes), torch.ones(inner), weight2, torch.zeros(outputs)]
    *_, dbias1, dweight2, dbias2 = run(cast(operands, torch.float32, device), dy.to(device))
    truth = dy.double().sum(0)
    rounding = (truth.float() - truth).norm()
    assert torch.equal(dbias2.cpu(), truth.float())
    for sums in (dbias1.cpu()[:outputs], dweight2.cpu()[:, 0]):
        assert (sums - truth).norm() <= 2 * rounding


def check_dropout(run: Run, dropout_p: float, seed: int, device: str = "cpu") -> None:
    """Forward and backward drop what the reference says, as often as they should.

    Before dropout the hidden layer is all ones. With an identity for dy, dweight2 is that layer after
    dropout; with one for u, dweight1 is what the backward lets through.
    """
    inner, batch = 150, 8
    keep = dropout_keep(batch, inner, dropout_p, seed)
    factors = keep.float() / (1 - round(dropout_p * 65536) / 65536)
    ones, zeros = torch.ones(inner, device=device), torch.zeros(inner, 2 * batch, device=device)
    weight2 = torch.ones(batch, inner, device=device)
    operands = [
        torch.eye(batch, device=device),
        torch.zeros(batch, batch, device=device),
        zeros,
        ones,
        weight2,
        torch.zeros(batch, device=device),
    ]
    for x in operands:
        x.requires_grad_()
    y, _, _, dweight1, _, dweight2, _ = run(
        operands, torch.eye(batch, device=device), dropout_p=dropout_p, seed=seed
    )
    torch.testing.assert_close(dweight2.cpu(), factors)
    torch.testing.assert_close(y.cpu(), factors.sum(1, keepdim=True).expand(-1, batch))
    torch.testing.assert_close(dweight1[:, :batch].cpu(), factors.T)
    many = dropout_keep(512, 768, dropout_p, seed)
    error = math.sqrt(dropout_p * (1 - dropout_p) / many.numel())
    assert abs(many.double().mean().item() - (1 - dropout_p)) < 4 * error


def check_mean_over_seeds(run: Run, seeds: int, device: str = "cpu") -> None:
    """Approaches the undropped result, which dropout_p = 0 gives bit for bit."""
    operands = cast(draw(5, 16, 40, 2, seed=0), torch.float32, device)
    dy = torch.ones(5, 2, device=device)
    plain = run(operands, dy)
    assert all(map(torch.equal, run(operands, dy, dropout_p=0.0, seed=1), plain))
    drawn = [run(operands, dy, dropout_p=0.1, seed=seed) for seed in range(seeds)]
    draws = [torch.stack(x) for x in zip(*drawn, strict=True)]
    for values, wanted in zip(draws, plain, strict=True):  # all are linear in what is kept
        error = values.std(0) / math.sqrt(seeds)
        assert ((values.mean(0) - wanted).abs() < 5 * error + 1e-5).all()
