"""Calls an op again and again with arguments of which some do not fit, and ends with status 1 if one call did
what it must not: raise without naming an argument, or return numbers that eager PyTorch does not.

    python -m hostile.calls OP,... FIRST COUNT [LIBRARY PLANNER]

Each call's arguments follow from its number, which is printed before it is made. Even calls are of the Python
function, odd ones of the registered op or its backward. LIBRARY and PLANNER are loaded in place of the
package's own.
"""

from __future__ import annotations

import importlib.util
import random
import re
import sys
import traceback
import warnings
from collections import Counter
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .arguments import spoil

ALLOWED = (TypeError, ValueError, RuntimeError, NotImplementedError)
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 8e-2}


def replace_libraries(library: str, planner: str) -> None:
    load = torch.ops.load_library
    torch.ops.load_library = lambda own: load(library if Path(own).stem == "_C.abi3" else own)
    spec = importlib.util.spec_from_file_location("mtfast._planner", planner)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules["mtfast._planner"] = module


def call(op: str, number: int) -> str:
    """Makes one call; returns what came of it: "right", "returned" or "refused"."""
    from . import cases

    rng = random.Random(f"{op} {number}")
    torch.manual_seed(rng.randrange(2**60))
    in_python = op == "balance" or number % 2 == 0
    case = cases.CASES[op](rng, op) if in_python else cases.registered(rng, op)
    given = dict(case.arguments)
    fits, spoiled = True, rng.sample(sorted(given), rng.choice([0, 1, 1, 1, 2]))
    for name in spoiled:
        given[name], same = spoil(rng, given[name], in_python)
        fits &= same
    if op == "balance":
        given = {name: _as_array(x) for name, x in given.items()}
    leaves = [x for x in given.values() if isinstance(x, Tensor) and x.requires_grad]
    grads: tuple[Tensor | None, ...] = ()
    try:
        returned = case.function(**given)
        results = returned if isinstance(returned, tuple) else (returned,)
        tensors = [x for x in results if isinstance(x, Tensor)]
        ends = [x.sum() for x in tensors if x.requires_grad]
        if ends and leaves:
            grads = torch.autograd.grad(ends, leaves, allow_unused=True)
    except ALLOWED as error:
        if not spoiled:
            raise
        names = "|".join(map(re.escape, [*case.arguments, "outputs", "head_dim", "hidden"]))
        if isinstance(error, NotImplementedError) or re.search(rf"\b({names})\b", str(error)):
            return "refused"
        raise
    if not fits or case.reference is None:
        return "returned"
    compare(case, given, tensors, grads)
    return "right"


def compare(
    case: Any, given: dict[str, Any], tensors: list[Tensor], grads: tuple[Tensor | None, ...]
) -> None:
    """Raises AssertionError unless these are what the reference gives in float64, and their gradients."""
    wide = {name: x.detach().double() if _floats(x) else x for name, x in given.items()}
    leaves = [wide[name].requires_grad_() for name, x in given.items() if _floats(x) and x.requires_grad]
    expected = case.reference(**wide)
    expected = expected if isinstance(expected, list) else [expected]
    if grads:
        expected += torch.autograd.grad(expected[0].sum(), leaves, allow_unused=True)
    found = [*tensors, *grads]
    for ours, right in zip(found, expected, strict=True):
        if ours is None and right is None:
            continue
        ours = torch.zeros_like(right) if ours is None else ours
        right = torch.zeros_like(ours, dtype=torch.float64) if right is None else right
        if case.exact:
            assert torch.equal(ours, right), "not what eager PyTorch gives"
            continue
        scale = 1 + (right.detach().abs().max().item() if right.numel() else 0)
        torch.testing.assert_close(
            ours.detach().double(), right.detach(), rtol=0, atol=scale * TOLERANCE[ours.dtype]
        )


def _as_array(x: Any) -> Any:
    try:
        return x.numpy() if isinstance(x, Tensor) else x
    except (TypeError, RuntimeError):  # of a kind that NumPy has not
        return None


def _floats(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def main(ops: str, first: str, count: str, *libraries: str) -> int:
    warnings.simplefilter("ignore")
    if libraries:
        replace_libraries(*libraries)
    tally = Counter()
    for op, number in product(ops.split(","), range(int(first), int(first) + int(count))):
        print(f"{op} {number}", flush=True)
        try:
            tally[call(op, number)] += 1
        except Exception:
            traceback.print_exc(file=sys.stdout)
            tally["wrong"] += 1
    print(*(f"{count} {outcome}" for outcome, count in sorted(tally.items())), sep=", ")
    return int(tally["wrong"] > 0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
