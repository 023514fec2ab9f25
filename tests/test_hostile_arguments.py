"""The ops, and the batch planner, under arguments that do not fit: they refuse them by name or compute what
eager PyTorch does, and touch no memory that is not theirs.

MTFAST_TEST_SWEEP=full makes 4,000 calls of each, half of them of the registered ops below the Python
functions, on a build with AddressSanitizer and UndefinedBehaviorSanitizer; otherwise 80 on the package's
own.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hostile.build import make_calls, sanitized
from mtfast._planner import balance

from mtfast.ops import concat_mlp

raw = torch.ops.mtfast
CU = torch.tensor([0, 4, 10], dtype=torch.int32)
OPS = (
    *("mask_tokens", "concat_mlp", "bias_gelu", "dropout_add_layer_norm"),
    *("packed_attention", "packed_attention_qkv", "packed_attention_cls", "balance"),
)


@pytest.mark.sweep
def test_random_arguments(full_sweep):
    if not full_sweep:
        make_calls(",".join(OPS), 0, 80)
        return
    libraries = sanitized()
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda op: make_calls(op, 0, 4000, libraries), OPS))


def concat_operands(batch: int) -> list[torch.Tensor]:
    shapes = ((batch, 4), (batch, 4), (16, 8), (16,), (3, 16), (3,))
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("batch", [0, 1])
def test_a_gradient_of_one_number_expanded(batch):
    """Whose strides are 0, which contiguous() leaves so where there is no element."""
    operands = concat_operands(batch)
    concat_mlp(*operands).sum().backward()
    assert torch.equal(operands[-1].grad, torch.full((3,), float(batch)))


@pytest.mark.parametrize("seed", [torch.zeros(0, dtype=torch.int64), torch.zeros(1, dtype=torch.int8)])
def test_a_seed_is_looked_at_without_dropout_too(seed):
    operands = [x.detach() for x in concat_operands(5)]
    with pytest.raises(RuntimeError, match="concat_mlp: seed must be an int64 tensor of one element"):
        raw.concat_mlp(*operands, None, None, 0, 0.0, seed, True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int32], ids=str)
@pytest.mark.parametrize("op", ["packed_attention", "packed_attention_qkv", "packed_attention_cls"])
def test_backward_looks_at_the_dtype_of_stats(op, dtype):
    qkv = torch.randn(10, 3, 2, 32)
    q, k, v = qkv.unbind(1)
    inputs = {"packed_attention_qkv": [qkv], "packed_attention_cls": [q[:2], k, v]}.get(op, [q, k, v])
    options = (CU, 6, 0.0, 0.2, None)
    out, stats = getattr(raw, op)(*inputs, *options)
    with pytest.raises(RuntimeError, match=f"{op}_backward: stats must be what the forward returned"):
        getattr(raw, f"{op}_backward")(out, *inputs, out, stats.to(dtype), *options)


def test_registered_ops_name_what_has_the_wrong_dimensions():
    qkv, stats = torch.randn(10, 3, 2, 32), torch.randn(2, 10, 2)
    q, k, v = qkv.unbind(1)
    options = (stats, CU, 6, 0.0, 0.2, None)
    for wrong in (k[0], k[0, 0], k[None]):
        with pytest.raises(RuntimeError, match="packed_attention_backward: k must be "):
            raw.packed_attention_backward(q, q, wrong, v, q, *options)
    for wrong in (q[:, 0], q[:, 0, 0], q[None]):
        with pytest.raises(RuntimeError, match="packed_attention_qkv_backward: out must be "):
            raw.packed_attention_qkv_backward(q, qkv, wrong, *options)
    with pytest.raises(RuntimeError, match="packed_attention_qkv: qkv must be float32"):
        raw.packed_attention_qkv(qkv.int(), *options[1:])


def test_balance_takes_more_bins_than_there_is_memory_for():
    tokens, offsets = np.array([3, 5, 4]), np.array([0, 2, 3])
    assert balance(tokens, offsets, 2**62).tolist() == balance(tokens, offsets, 2).tolist() == [1, 0, 0]


def test_balance_refuses_sums_of_more_than_64_bits():
    with pytest.raises(ValueError, match=r"tokens\[1\] must be at most 768614336404564650, so that sums fit"):
        balance(np.array([1, 2**62, 3]), np.array([0, 3]), 2)
