"""concat_mlp against eager PyTorch, against torch.compile of it and, where installed, apex's fused MLP.

    python -m benchmarks concat_mlp [--device cpu] [--threads 2] [--seconds 100] [--dtypes float32 bfloat16]
        [--hidden 768 384] [--batches 2048 160 16384] [--no-compile]

With dropout 0.1, relu and two outputs, the inner layer as wide as the hidden one. "forward" has no
gradients; "heads" adds the backward to the weights alone, as stage 2 has it with 2048 examples a step, "full"
also that to u and v. "products" are the matrix products of the case alone, by torch's library.
torch.compile is given each shape anew, so that it may specialise. On a GPU "graph" replays a CUDA graph:
training heads on cached features repeats one shape. Inputs that the L2 could hold are several, taken in turn
(benchmarks/timing.py).
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cases import CLOCK, Case, op_parser, run_cases
from benchmarks.common import Row, rows_of
from benchmarks.timing import (
    Call,
    Variant,
    cloned,
    copies,
    graph_of,
    graphs,
    l2_bytes,
    measure,
    peak_mib,
    running,
)
from mtfast.ops import concat_mlp, concat_mlp_ref

OURS = "mtfast"
BATCHES = (2048, 160, 16384)
HIDDEN = (768, 384)
GRADIENTS = {"heads": 2, "full": 0, "forward": 6}  # the first operand that has one
MOST_CHECKED = 2048  # rows, of which the reference in float64 takes a second on a CPU
OPTIONS: dict[str, Any] = {"activation": "relu", "dropout_p": 0.1}
Function = Callable[..., Tensor]


@dataclass(frozen=True)
class Problem:
    """What one case measures."""

    gradients: str
    batch: int
    hidden: int
    dtype: torch.dtype

    @property
    def name(self) -> str:
        return f"{self.gradients} {self.batch} x {self.hidden} {str(self.dtype)[6:]}"


def main(argv: list[str]) -> int:
    """Run the benchmark, print its table and write it to the results file; 0 when no case failed."""
    parser = op_parser("concat_mlp", __doc__)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--hidden", type=int, nargs="+", default=HIDDEN)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    compiled = not options.no_compile
    problems = [
        Problem(gradients, batch, hidden, getattr(torch, dtype))
        for dtype in options.dtypes
        for hidden in options.hidden
        for batch in options.batches
        for gradients in GRADIENTS
    ]
    cases = [
        Case(p.name, functools.partial(compare, p, options.device, compiled, options.budget))
        for p in problems
    ]
    return run_cases(cases, options)


def operands_of(problem: Problem, device: torch.device) -> list[Tensor]:
    """u, v, weight1, bias1, weight2, bias2 as they are initialised, leaves where they have gradients."""
    hidden, first = problem.hidden, GRADIENTS[problem.gradients]
    dense, out = nn.Linear(2 * hidden, hidden), nn.Linear(hidden, 2)
    rows = [torch.randn(problem.batch, hidden) for _ in range(2)]
    tensors = [*rows, dense.weight, dense.bias, out.weight, out.bias]
    return [x.detach().to(device, problem.dtype).requires_grad_(i >= first) for i, x in enumerate(tensors)]


def apex_mlp(hidden: int) -> Function | None:
    """apex's fused MLP on the concatenation; it has no dropout, so does less, relu on the output too, and no
    kernel for bf16. None without apex."""
    if importlib.util.find_spec("apex") is None or importlib.util.find_spec("mlp_cuda") is None:
        return None
    from apex.mlp import MLP

    mlp = MLP([2 * hidden, hidden, 2], bias=True, activation="relu")

    def run(
        u: Tensor, v: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, **_
    ) -> Tensor:
        mlp.weights, mlp.biases = [weight1, weight2], [bias1, bias2]
        return mlp(torch.cat([u, v], 1))

    return run


def step(
    function: Function, operands: list[Tensor], wanted: list[Tensor], dy: Tensor, **options
) -> list[Tensor]:
    """The output and, where any is wanted, the gradients."""
    if not wanted:
        with torch.no_grad():
            return [function(*operands, **options)]
    y = function(*operands, **options)
    return [y, *torch.autograd.grad(y, wanted, dy)]


def products_of(gradients: str, operands: list[Tensor]) -> Call:
    """The large matrix products by torch's library, on a [u; v] that is there."""
    u, v, weight1 = (x.detach() for x in operands[:3])
    both, dz = torch.cat([u, v], 1), torch.randn_like(u)

    def run() -> list[Tensor]:
        made = [both @ weight1.t()]
        if gradients != "forward":
            made.append(dz.t() @ both)
        if gradients == "full":
            made.append(dz @ weight1)
        return made

    return run


@functools.cache
def difference(problem: Problem, device: torch.device) -> str:
    """What of the output and the gradients is not as near to float64's as eager PyTorch's; nothing if all."""
    first = GRADIENTS[problem.gradients]
    operands = operands_of(problem, device)
    wide = [x.detach().double().requires_grad_(x.requires_grad) for x in operands]
    dy = torch.randn(problem.batch, 2, device=device).to(problem.dtype)
    exact = step(concat_mlp_ref, wide, wide[first:], dy.double(), **OPTIONS, seed=5)
    ours, eager = (
        step(function, operands, operands[first:], dy, **OPTIONS, seed=5)
        for function in (concat_mlp, concat_mlp_ref)
    )
    names = ("y", *("du", "dv", "dweight1", "dbias1", "dweight2", "dbias2")[first:])
    for name, x, e, truth in zip(names, ours, eager, exact, strict=True):
        size = truth.detach().norm()
        error, eagers = (float((y.detach().double() - truth.detach()).norm() / size) for y in (x, e))
        if not error <= 2 * eagers + torch.finfo(problem.dtype).eps:
            return f"{name} off by {error:.2g} of its norm, eager PyTorch by {eagers:.2g}"
    return ""


def compare(problem: Problem, device: torch.device, compiled: bool, budget_s: float) -> list[Row]:
    """The rows of one case."""
    with CLOCK.paused():
        wrong = difference(replace(problem, batch=min(problem.batch, MOST_CHECKED)), device)
        variants = running(variants_of(problem, device, compiled), [OURS])
    peaks = {name: peak_mib(calls[0], device) for name, calls in variants.items()}
    variants |= graphs(variants, device)
    timings = measure(variants, device, budget_s=budget_s)
    products = {"forward": 1, "heads": 2, "full": 3}[problem.gradients]
    flop = products * 4 * problem.batch * problem.hidden**2
    rates = {name: flop / timing.median / 1e12 for name, timing in timings.items()}
    return rows_of(
        "concat_mlp",
        problem.name,
        timings,
        "eager",
        tflop_per_s=rates,
        peak_mib=peaks,
        wrong=dict.fromkeys((OURS, graph_of(OURS)), wrong),
    )


def functions_of(hidden: int, device: torch.device, compiled: bool) -> dict[str, Function]:
    """All that is compared on this kind of device, by name."""
    functions: dict[str, Function] = {"eager": concat_mlp_ref, OURS: concat_mlp}
    if compiled:
        torch._dynamo.reset()  # past its limit of recompilations it would run uncompiled
        functions["compile"] = torch.compile(concat_mlp_ref, dynamic=False)
    if device.type == "cuda" and (apex := apex_mlp(hidden)):
        functions["apex"] = apex
    return functions


def variants_of(problem: Problem, device: torch.device, compiled: bool) -> dict[str, Variant]:
    """All that is compared, each on the same inputs and, where they are several, on its turn of them."""
    first = GRADIENTS[problem.gradients]
    operands = operands_of(problem, device)
    inputs = [*operands, torch.randn(problem.batch, 2, device=device).to(problem.dtype)]
    touched = sum(x.nbytes for x in (*inputs, *operands[first:]))  # read, and the gradients written
    sets = [inputs, *(cloned(inputs) for _ in range(copies(touched, l2_bytes(device)) - 1))]
    functions = functions_of(problem.hidden, device, compiled)
    variants: dict[str, Variant] = {
        name: [functools.partial(step, function, x, x[first:], dy, **OPTIONS) for *x, dy in sets]
        for name, function in functions.items()
    }
    variants["products"] = [products_of(problem.gradients, x) for x in sets]
    return variants
