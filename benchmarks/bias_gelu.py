"""bias_gelu against eager PyTorch and against torch.compile of it.

    python -m benchmarks bias_gelu [--device cpu] [--threads 2] [--seconds 60] [--dtypes float32 bfloat16]
        [--columns 1536 3072] [--rows 4096 16384] [--no-compile]

As wide as the feed-forward layers of encoders with 384 and 768 features, on the tokens of a step. "forward"
has no gradients; "full" adds the backward, which gives the bias's gradient too. GB/s count what must be
moved: x in and y out, and in the backward x and dy in and dx out. torch.compile is given each shape anew. On
a GPU "graph" replays a CUDA graph. Inputs that the L2 could hold are several, taken in turn
(benchmarks/timing.py).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.cases import CLOCK, Case, op_parser, run_cases
from benchmarks.common import Row, rows_of
from benchmarks.timing import (
    Variant,
    cloned,
    copies,
    copy_bandwidth,
    graph_of,
    graphs,
    l2_bytes,
    measure,
    peak_mib,
    running,
)
from mtfast.ops import bias_gelu, bias_gelu_ref

OURS = "mtfast"
ROWS = (4096, 16384)
COLUMNS = (1536, 3072)
MOVED = {"full": 5, "forward": 2}  # matrices
MOST_CHECKED = 1024  # rows
Function = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Problem:
    """What one case measures."""

    gradients: str
    rows: int
    columns: int
    dtype: torch.dtype

    @property
    def name(self) -> str:
        return f"{self.gradients} {self.rows} x {self.columns} {str(self.dtype)[6:]}"


def main(argv: list[str]) -> int:
    """Run the benchmark, print its table and write it to the results file; 0 when no case failed."""
    parser = op_parser("bias_gelu", __doc__)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--columns", type=int, nargs="+", default=COLUMNS)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    bandwidth = copy_bandwidth(options.device)
    print(f"copying moves {bandwidth / 1e9:.1f} GB/s", flush=True)
    measure_case = functools.partial(
        compare,
        device=options.device,
        compiled=not options.no_compile,
        bandwidth=bandwidth,
        budget_s=options.budget,
    )
    problems = [
        Problem(gradients, rows, columns, getattr(torch, dtype))
        for dtype in options.dtypes
        for columns in options.columns
        for rows in options.rows
        for gradients in MOVED
    ]
    return run_cases([Case(p.name, functools.partial(measure_case, p)) for p in problems], options)


def inputs_of(problem: Problem, device: torch.device) -> list[Tensor]:
    """x and bias, leaves where they have gradients, and dy."""
    size = (problem.rows, problem.columns)
    tensors = [torch.randn(shape, device=device).to(problem.dtype) for shape in (size, size[1:], size)]
    for x in tensors[:2]:
        x.requires_grad_(problem.gradients == "full")
    return tensors


def step(function: Function, x: Tensor, bias: Tensor, dy: Tensor) -> list[Tensor]:
    """The output and, where they are wanted, the gradients."""
    y = function(x, bias)
    return [y, *torch.autograd.grad(y, (x, bias), dy)] if x.requires_grad else [y]


@functools.cache
def difference(problem: Problem, device: torch.device) -> str:
    """What of the output and the gradients is not as near to float64's as eager PyTorch's; nothing if all."""
    x, bias, dy = inputs_of(problem, device)
    wide_x, wide_bias = (t.detach().double().requires_grad_(t.requires_grad) for t in (x, bias))
    exact = step(bias_gelu_ref, wide_x, wide_bias, dy.double())
    ours, eager = (step(function, x, bias, dy) for function in (bias_gelu, bias_gelu_ref))
    for name, found, eagers, truth in zip(("y", "dx", "dbias"), ours, eager, exact, strict=False):
        size = truth.detach().norm()
        error, usual = (float((t.detach().double() - truth.detach()).norm() / size) for t in (found, eagers))
        if not error <= 2 * usual + torch.finfo(problem.dtype).eps:
            return f"{name} off by {error:.2g} of its norm, eager PyTorch by {usual:.2g}"
    return ""


def compare(
    problem: Problem, device: torch.device, compiled: bool, bandwidth: float, budget_s: float
) -> list[Row]:
    """The rows of one case."""
    with CLOCK.paused():
        wrong = difference(replace(problem, rows=min(problem.rows, MOST_CHECKED)), device)
        variants = running(variants_of(problem, device, compiled), [OURS])
    peaks = {name: peak_mib(calls[0], device) for name, calls in variants.items()}
    variants |= graphs(variants, device)
    timings = measure(variants, device, budget_s=budget_s)
    moved = MOVED[problem.gradients] * problem.rows * problem.columns * problem.dtype.itemsize / 1e9
    return rows_of(
        "bias_gelu",
        problem.name,
        timings,
        "eager",
        gb_per_s={name: moved / timing.median for name, timing in timings.items()},
        copy_gb_per_s=bandwidth / 1e9,
        peak_mib=peaks,
        wrong=dict.fromkeys((OURS, graph_of(OURS)), wrong),
    )


def variants_of(problem: Problem, device: torch.device, compiled: bool) -> dict[str, Variant]:
    """All that is compared, each on the same inputs and, where they are several, on its turn of them."""
    inputs = inputs_of(problem, device)
    touched = MOVED[problem.gradients] * inputs[0].nbytes
    sets = [inputs, *(cloned(inputs) for _ in range(copies(touched, l2_bytes(device)) - 1))]
    functions: dict[str, Function] = {"eager": bias_gelu_ref, OURS: bias_gelu}
    if compiled:
        torch._dynamo.reset()  # past its limit of recompilations it would run uncompiled
        functions["compile"] = torch.compile(bias_gelu_ref, dynamic=False)
    return {
        name: [functools.partial(step, function, *x) for x in sets] for name, function in functions.items()
    }
