"""concat_mlp against eager PyTorch, against torch.compile of it and, where installed, apex's fused MLP.

    python -m benchmarks concat_mlp [--device cpu] [--threads 2] [--seconds 100] [--dtypes float32 bfloat16]
        [--no-compile]

With dropout 0.1, relu and two outputs, the inner layer as wide as the hidden one. "forward" has no
gradients; "heads" adds the backward to the weights alone, as stage 2 has it, "full" also that to u and v.
"products" are the matrix products of the case alone, by torch's library.
torch.compile is given each shape anew, so that it may specialise. On a GPU "graph" replays a CUDA graph, up
to the 2048 examples of a step of stage 2: training heads on cached features repeats one shape, and launching
is what costs there.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import (
    Call,
    Case,
    Row,
    WrongResultError,
    graphs,
    measure,
    op_parser,
    peak_mib,
    rows_of,
    run_cases,
    running,
)
from mtfast.ops import concat_mlp, concat_mlp_ref

BATCHES = (2048, 160, 16384)
HIDDEN = (768, 384)
GRADIENTS = {"full": 0, "heads": 2, "forward": 6}  # the first operand that has one
GRAPH_BATCH = 2048
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
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--budget", type=float, default=1.0, help="seconds a variant")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    compiled = not options.no_compile
    problems = [
        Problem(gradients, batch, hidden, getattr(torch, dtype))
        for dtype in options.dtypes
        for hidden in HIDDEN
        for batch in options.batches
        for gradients in GRADIENTS
    ]
    cases = [
        Case(p.name, functools.partial(compare, p, options.device, compiled, options.budget))
        for p in problems
    ]
    return run_cases(cases, options)


def operands_of(batch: int, hidden: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """u, v, weight1, bias1, weight2, bias2 as they are initialised."""
    dense, out = nn.Linear(2 * hidden, hidden), nn.Linear(hidden, 2)
    rows = [torch.randn(batch, hidden) for _ in range(2)]
    weights = [dense.weight, dense.bias, out.weight, out.bias]
    return [x.detach().to(device, dtype) for x in (*rows, *weights)]


def apex_mlp(hidden: int) -> Function | None:
    """apex's fused MLP on the concatenation; it has no dropout, so does less. None without apex."""
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
def check(batch: int, hidden: int, dtype: torch.dtype, device: torch.device) -> None:
    """WrongResultError unless output and gradients are as near to float64's as eager PyTorch's are."""
    operands = [x.requires_grad_() for x in operands_of(batch, hidden, dtype, device)]
    wide = [x.detach().double().requires_grad_() for x in operands]
    dy = torch.randn(batch, 2, device=device).to(dtype)
    exact = step(concat_mlp_ref, wide, wide, dy.double(), **OPTIONS, seed=5)
    ours, eager = (step(f, operands, operands, dy, **OPTIONS, seed=5) for f in (concat_mlp, concat_mlp_ref))
    names = ("y", "du", "dv", "dweight1", "dbias1", "dweight2", "dbias2")
    for name, x, e, truth in zip(names, ours, eager, exact, strict=True):
        size = truth.detach().norm()
        error, eagers = (float((y.detach().double() - truth.detach()).norm() / size) for y in (x, e))
        if not error <= 2 * eagers + torch.finfo(dtype).eps:
            raise WrongResultError(
                f"{name} is wrong by {error:.2g} of its norm, eager PyTorch by {eagers:.2g}"
            )


def compare(problem: Problem, device: torch.device, compiled: bool, budget_s: float) -> list[Row]:
    """The rows of one case."""
    check(min(problem.batch, GRAPH_BATCH), problem.hidden, problem.dtype, device)
    first = GRADIENTS[problem.gradients]
    operands = operands_of(problem.batch, problem.hidden, problem.dtype, device)
    operands = [x.requires_grad_(i >= first) for i, x in enumerate(operands)]
    dy = torch.randn(problem.batch, 2, device=device).to(problem.dtype)
    functions: dict[str, Function] = {"eager": concat_mlp_ref, "mtfast": concat_mlp}
    if compiled:
        torch._dynamo.reset()  # past its limit of recompilations it would run uncompiled
        functions["compile"] = torch.compile(concat_mlp_ref, dynamic=False)
    if device.type == "cuda" and (apex := apex_mlp(problem.hidden)):
        functions["apex"] = apex
    calls: dict[str, Call] = running(
        {
            name: functools.partial(step, function, operands, operands[first:], dy, **OPTIONS)
            for name, function in functions.items()
        }
    )
    calls["products"] = products_of(problem.gradients, operands)
    peaks = {name: peak_mib(call, device) for name, call in calls.items()}
    if device.type == "cuda" and problem.batch <= GRAPH_BATCH:
        calls |= graphs(calls)
    timings = measure(calls, device, budget_s=budget_s)
    products = {"forward": 1, "heads": 2, "full": 3}[problem.gradients]
    flop = products * 4 * problem.batch * problem.hidden**2
    rates = {name: flop / timing.median / 1e12 for name, timing in timings.items()}
    return rows_of("concat_mlp", problem.name, timings, "eager", tflop_per_s=rates, peak_mib=peaks)
