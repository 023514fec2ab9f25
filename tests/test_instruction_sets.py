"""The CPU implementations under narrower instruction sets than this machine's: what older machines run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mtfast.ops import (
    bias_gelu,
    concat_mlp,
    dropout_add_layer_norm,
    packed_attention,
)

CALLS = """
import sys, torch
from test_instruction_sets import results
torch.save(results(), sys.argv[1])
"""


def results() -> list[torch.Tensor]:
    """Outputs and gradients of each op, in every dtype."""
    torch.manual_seed(0)
    cu_seqlens = torch.tensor([0, 5, 5, 75, 92], dtype=torch.int32)
    found = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        q, k, v = (torch.randn(92, 2, 64).to(dtype).requires_grad_() for _ in range(3))
        out = packed_attention(q, k, v, cu_seqlens, 70, dropout_p=0.3, seed=1)
        found += [out, *torch.autograd.grad(out, (q, k, v), torch.ones_like(out))]
        shapes = ((33, 20), (33, 20), (70, 40), (70,), (3, 70), (3,))
        operands = [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]
        y = concat_mlp(*operands, activation="gelu", dropout_p=0.3, seed=1)
        found += [y, *torch.autograd.grad(y, operands, torch.ones_like(y))]
        x, bias = (torch.randn(shape).to(dtype).requires_grad_() for shape in ((40, 70), (70,)))
        y = bias_gelu(x, bias)
        found += [y, *torch.autograd.grad(y, (x, bias), torch.ones_like(y))]
        shapes = ((9, 300), (9, 300), (300,), (300,))
        operands = [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]
        y = dropout_add_layer_norm(*operands, dropout_p=0.3, seed=1)
        found += [y, *torch.autograd.grad(y, operands, torch.ones_like(y))]
    return [x.detach() for x in found]


@pytest.mark.parametrize("instruction_set", ["avx512", "avx2", "generic"])
def test_results_are_those_of_this_machine(instruction_set, tmp_path):
    file = tmp_path / "results.pt"
    environment = {
        **os.environ, "MTFAST_CPU": instruction_set, "PYTHONPATH": str(Path(__file__).parent),
    }  # fmt: skip
    subprocess.run(
        [sys.executable, "-c", CALLS, str(file)], cwd=Path(__file__).parents[1], env=environment, check=True
    )
    # A weight dropped otherwise would show at once: what is left are sums in another order.
    for theirs, ours in zip(torch.load(file), results(), strict=True):
        rounding = torch.finfo(ours.dtype).eps
        torch.testing.assert_close(
            theirs, ours, rtol=8 * rounding, atol=8 * rounding * ours.abs().max().item()
        )
