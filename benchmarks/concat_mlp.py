"""concat_mlp against eager PyTorch, against torch.compile of it and, where installed, apex's fused MLP.

    python -m benchmarks concat_mlp [--device cpu] [--threads 2] [--dtypes float32 bfloat16] [--no-compile]

With dropout 0.1, relu and two outputs, the inner layer as wide as the hidden one. "forward" has no
gradients; "heads" adds the backward to the weights alone, as stage 2 has it, "full" also that to u and v.
On the CPU the memory that each variant takes at most, its result included, is printed too.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.common import default_device, measure, print_rows, rows_of, write_results
from mtfast.ops import concat_mlp, concat_mlp_ref

BATCHES = (160, 2048, 16384)
HIDDEN = (384, 768)
OPTIONS: dict[str, Any] = {"activation": "relu", "dropout_p": 0.1}
Function = Callable[..., Tensor]


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


def step(function: Function, operands: list[Tensor], wanted: list[Tensor], dy: Tensor) -> object:
    if not wanted:
        with torch.no_grad():
            return function(*operands, **OPTIONS)
    return torch.autograd.grad(function(*operands, **OPTIONS), wanted, dy)


def peak_memory(call: Callable[[], object]) -> int:
    """The most bytes of tensors alive at a time during the call, beyond those it began with."""
    call()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        call()
    alive = most = 0
    for event in sorted(profiled.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            alive += event.nbytes()
            most = max(most, alive)
    return most


def check(operands: list[Tensor]) -> None:
    """Stop unless concat_mlp equals its reference."""
    ours, eager = (f(*operands, **OPTIONS, seed=5).float() for f in (concat_mlp, concat_mlp_ref))
    error = ((ours - eager).norm() / eager.norm()).item()
    if not error < 4 * torch.finfo(operands[0].dtype).eps:
        raise SystemExit(f"concat_mlp: relative error {error} against the reference")


def main(argv: list[str]) -> None:
    """Run the benchmark, print its table and write it to benchmarks/results/."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks concat_mlp")
    parser.add_argument("--device", type=torch.device, default=default_device())
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    arguments = parser.parse_args(argv)
    device = arguments.device
    torch.set_num_threads(arguments.threads)
    rows = []
    for dtype_name in arguments.dtypes:
        for hidden in HIDDEN:
            for batch in BATCHES:
                operands = operands_of(batch, hidden, getattr(torch, dtype_name), device)
                check(operands)
                rows += compare(operands, f"{batch} x {hidden} {dtype_name}", not arguments.no_compile)
    print(f"written to {write_results(rows, device)}")


def compare(operands: list[Tensor], shape: str, compiled: bool) -> list[dict[str, Any]]:
    """The rows of one shape: forward, forward and backward to the weights, and to everything."""
    (batch, hidden), device = operands[0].shape, operands[0].device
    dy = torch.randn(batch, 2, device=device).to(operands[0].dtype)
    functions: dict[str, Function] = {"eager": concat_mlp_ref, "mtfast": concat_mlp}
    if compiled:
        functions["compile"] = torch.compile(concat_mlp_ref)
    if device.type == "cuda" and (apex := apex_mlp(hidden)):
        functions["apex"] = apex
    rows = []
    for name, first, products in (("forward", 6, 1), ("heads", 2, 2), ("full", 0, 3)):
        operands = [x.detach().requires_grad_(i >= first) for i, x in enumerate(operands)]
        calls: dict[str, Callable[[], Any]] = {
            k: functools.partial(step, f, operands, operands[first:], dy) for k, f in functions.items()
        }
        timings = measure(calls, device)
        flop = products * 4 * batch * hidden * hidden
        rates = {variant: flop / timing.median / 1e12 for variant, timing in timings.items()}
        rows += rows_of("concat_mlp", f"{name} {shape}", timings, "eager", tflop_per_s=rates)
        print_rows(rows[-len(timings) :])
        if device.type == "cpu":
            needed = {k: f"{peak_memory(c) / 2**20:.1f} MiB" for k, c in calls.items()}
            print(f"{'':18} {name} {shape}: at most " + ", ".join(f"{k} {v}" for k, v in needed.items()))
    return rows
