"""dropout_add_layer_norm against eager PyTorch, torch.compile of it and, where installed, apex's layer norm.

    python -m benchmarks dropout_add_layer_norm [--device cpu] [--threads 2] [--seconds 60]
        [--dtypes bfloat16 float32] [--hidden 768 384] [--rows 4096 16384] [--no-compile]

With dropout 0.1 and a residual, as a post-norm layer ends; without the linear layer's bias, which eager adds
in its product. "full" is forward and backward with gradients to all four, "forward" has none. GB/s count what
must move: forward x, residual and y, backward dy, x, residual and two gradients, whatever a variant does.
torch.compile is given each shape anew, so that it may specialise. On a GPU "graph" replays a CUDA graph, and
"apex" is apex's fused normalisation of a dropout and a sum by eager PyTorch.
Inputs that the L2 could hold are several, taken in turn (benchmarks/timing.py).
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.cases import CLOCK, Case, op_parser, run_cases
from benchmarks.common import Row, rows_of
from benchmarks.concat_mlp import step
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
from mtfast.ops import dropout_add_layer_norm, dropout_add_layer_norm_ref

OURS = "mtfast"
ROWS = (4096, 16384)
HIDDEN = (768, 384)
MATRICES = {"full": 3 + 5, "forward": 3}  # that must be read or written, each once
MOST_CHECKED = 4096  # rows, of which the reference in float64 takes a second on a CPU
DROPOUT = 0.1
Function = Callable[..., Tensor]


@dataclass(frozen=True)
class Problem:
    """What one case measures."""

    gradients: str
    rows: int
    hidden: int
    dtype: torch.dtype

    @property
    def name(self) -> str:
        return f"{self.gradients} {self.rows} x {self.hidden} {str(self.dtype)[6:]}"


def main(argv: list[str]) -> int:
    """Run the benchmark, print its table and write it to the results file; 0 when no case failed."""
    parser = op_parser("dropout_add_layer_norm", __doc__)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--hidden", type=int, nargs="+", default=HIDDEN)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    bandwidth = copy_bandwidth(options.device)
    print(f"copying moves {bandwidth / 1e9:.1f} GB/s", flush=True)
    compare_problem = functools.partial(
        compare,
        device=options.device,
        compiled=not options.no_compile,
        bandwidth=bandwidth,
        budget_s=options.budget,
    )
    problems = [
        Problem(gradients, rows, hidden, getattr(torch, dtype))
        for dtype in options.dtypes
        for hidden in options.hidden
        for rows in options.rows
        for gradients in MATRICES
    ]
    return run_cases([Case(p.name, functools.partial(compare_problem, p)) for p in problems], options)


def operands_of(problem: Problem, device: torch.device) -> list[Tensor]:
    """x, residual, weight and bias as in a trained layer, leaves where they have gradients."""
    shape = (problem.rows, problem.hidden)
    scale = 1 + 0.1 * torch.randn(problem.hidden)
    tensors = [torch.randn(shape), torch.randn(shape), scale, 0.1 * torch.randn(problem.hidden)]
    wanted = problem.gradients == "full"
    return [x.to(device, problem.dtype).requires_grad_(wanted) for x in tensors]


def apex_layer_norm() -> Function | None:
    """Dropout and sum by eager PyTorch, normalised as apex's FusedLayerNorm does. None without apex."""
    if importlib.util.find_spec("apex") is None or importlib.util.find_spec("fused_layer_norm_cuda") is None:
        return None
    from apex.normalization.fused_layer_norm import fused_layer_norm_affine

    def run(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, *, dropout_p: float) -> Tensor:
        y = residual + F.dropout(x, dropout_p)
        return fused_layer_norm_affine(y, weight, bias, y.shape[-1:], 1e-12)

    return run


def wanted_of(operands: list[Tensor]) -> list[Tensor]:
    """Those that have gradients."""
    return [x for x in operands if x.requires_grad]


@functools.cache
def difference(problem: Problem, device: torch.device) -> str:
    """What of the output and the gradients is not as near to float64's as eager PyTorch's; nothing if all."""
    operands = operands_of(problem, device)
    wide = [x.detach().double().requires_grad_(x.requires_grad) for x in operands]
    dy = torch.randn(problem.rows, problem.hidden, device=device).to(problem.dtype)
    options = {"dropout_p": DROPOUT, "seed": 5}
    exact = step(dropout_add_layer_norm_ref, wide, wanted_of(wide), dy.double(), **options)
    ours, eager = (
        step(function, operands, wanted_of(operands), dy, **options)
        for function in (dropout_add_layer_norm, dropout_add_layer_norm_ref)
    )
    names = ("y", "dx", "dresidual", "dweight", "dbias")[: len(exact)]
    for name, x, e, truth in zip(names, ours, eager, exact, strict=True):
        size = truth.detach().norm()
        error, eagers = (float((y.detach().double() - truth.detach()).norm() / size) for y in (x, e))
        if not error <= 2 * eagers + torch.finfo(problem.dtype).eps:
            return f"{name} off by {error:.2g} of its norm, eager PyTorch by {eagers:.2g}"
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
    moved = MATRICES[problem.gradients] * problem.rows * problem.hidden * problem.dtype.itemsize / 1e9
    return rows_of(
        "dropout_add_layer_norm",
        problem.name,
        timings,
        "eager",
        gb_per_s={name: moved / timing.median for name, timing in timings.items()},
        copy_gb_per_s=bandwidth / 1e9,
        peak_mib=peaks,
        wrong=dict.fromkeys((OURS, graph_of(OURS)), wrong),
    )


def functions_of(device: torch.device, compiled: bool) -> dict[str, Function]:
    """All that is compared on this kind of device, by name."""
    functions: dict[str, Function] = {"eager": dropout_add_layer_norm_ref, OURS: dropout_add_layer_norm}
    if compiled:
        torch._dynamo.reset()  # past its limit of recompilations it would run uncompiled
        functions["compile"] = torch.compile(dropout_add_layer_norm_ref, dynamic=False)
    if device.type == "cuda" and (apex := apex_layer_norm()):
        functions["apex"] = apex
    return functions


def variants_of(problem: Problem, device: torch.device, compiled: bool) -> dict[str, Variant]:
    """All that is compared, each on the same inputs and, where they are several, on its turn of them."""
    operands = operands_of(problem, device)
    inputs = [*operands, torch.randn(problem.rows, problem.hidden, device=device).to(problem.dtype)]
    touched = sum(x.nbytes for x in (*inputs, *wanted_of(operands)))  # read, and the gradients written
    sets = [inputs, *(cloned(inputs) for _ in range(copies(touched, l2_bytes(device)) - 1))]
    functions = functions_of(device, compiled)
    return {
        name: [functools.partial(step, function, x, wanted_of(x), dy, dropout_p=DROPOUT) for *x, dy in sets]
        for name, function in functions.items()
    }
