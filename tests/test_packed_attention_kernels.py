"""The CUDA kernels of packed attention without a GPU: the same source run on the CPU against float64, in any
thread order, under race detector; what its machine code holds.

MTFAST_TEST_SWEEP=full runs all 300 random batches in each dtype and head_dim, otherwise four of them and
twelve with one query; it draws 2,000 dropout masks instead of 500, takes every layout in every thread order,
and reads the machine code for Ampere too.
"""

from __future__ import annotations

import ctypes
import dataclasses
import math
import re

import pytest
import torch
from cuda_on_cpu.harness import (
    CASES,
    DTYPES_IN_C,
    SHARED_KIB,
    Case,
    KernelError,
    Kernels,
    load_all,
)
from cuda_on_cpu.machine_code import ARCHITECTURES, disassembled, ptx
from packed_attention_cases import (
    DTYPES,
    HEAD_DIMS,
    SEED,
    Batch,
    Run,
    check_a_sequence_does_not_notice_the_others,
    check_dropout,
    check_large_scores,
    check_mean_over_seeds,
    check_random_batches,
    check_what_is_not_finite,
    make_batch,
    offsets,
)
from torch import Tensor

from mtfast.ops.packed_attention import lse_of

# How many kernels each source has. On tensor cores, for two dtypes and three head_dims: forward a warp for a
# short sequence, a block of few or of many warps for a longer one; backward a warp for a short sequence, a
# block with room for 64 or, but for head_dim 128, for 128 tokens for a longer one, two passes beyond. Row by
# row, for four head_dims: for one query a sequence in three dtypes, forward and backward, and for all rows in
# float32 and of head_dim 256 in the other two, backward in two passes.
SOURCES = {
    "packed_attention.cu": 6 * (1 + 2) + 2 * 2,
    "packed_attention_backward.cu": 6 * (1 + 2 + 2) - 2,
    "packed_attention_rows.cu": 12 * 2 + (4 + 2) * 3,
}
ONE_PASS_TOKENS = 64  # kOnePassTokens of csrc/packed_attention.h


class CTensor(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("row_stride", ctypes.c_int64), ("head_stride", ctypes.c_int64))

    @classmethod
    def of(cls, x: Tensor) -> CTensor:
        return cls(x.data_ptr(), x.stride(0), x.stride(1))


class CShape(ctypes.Structure):
    _fields_ = (
        ("cu_seqlens", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("sequences", "total", "heads", "head_dim", "max_seqlen")),
        ("dtype", ctypes.c_int),
        ("softmax_scale", ctypes.c_double),
        ("threshold", ctypes.c_uint32),
        ("seed", ctypes.c_void_p),
    )


class CForward(ctypes.Structure):
    _fields_ = (
        ("shape", CShape),
        *((x, CTensor) for x in ("q", "k", "v", "out")),
        ("stats", ctypes.c_void_p),
    )


class CBackward(ctypes.Structure):
    _fields_ = (
        ("shape", CShape),
        *((x, CTensor) for x in ("q", "k", "v", "out", "dout", "dq", "dk", "dv")),
        ("stats", ctypes.c_void_p),
    )


def shape_of(batch: Batch, dropout_p: float, seed: Tensor) -> CShape:
    total, heads, head_dim = batch.k.shape
    return CShape(
        batch.cu_seqlens.data_ptr(),
        batch.cu_seqlens.numel() - 1,
        total,
        heads,
        head_dim,
        batch.max_seqlen,
        DTYPES_IN_C[batch.k.dtype],
        1 / math.sqrt(head_dim),
        round(dropout_p * 65536),
        seed.data_ptr(),
    )


def emulated(forward: Kernels, backward: Kernels, rows: Kernels) -> Run:
    """packed_attention, or for a batch with one query a sequence packed_attention_cls, by these kernels."""

    def run(batch: Batch, dropout_p: float = 0.0, seed: int = SEED) -> list[Tensor | None]:
        seed_there = torch.tensor([seed])
        shape = shape_of(batch, dropout_p, seed_there)
        out, *grads = (torch.full(x.shape, torch.nan, dtype=x.dtype) for x in (batch.q, *batch.tensors))
        stats = torch.full((batch.q.size(1), batch.q.size(0), 2), torch.nan)
        q, k, v, o, dout, dq, dk, dv = map(CTensor.of, (*batch.tensors, out, batch.dout, *grads))
        forward_args = ctypes.byref(CForward(shape, q, k, v, o, stats.data_ptr()))
        backward_args = ctypes.byref(CBackward(shape, q, k, v, o, dout, dq, dk, dv, stats.data_ptr()))
        by_rows = batch.cls or batch.q.dtype == torch.float32 or batch.q.size(2) == 256
        # As large as packed_attention.cpp makes it.
        needs_delta = not batch.cls and (by_rows or batch.max_seqlen > ONE_PASS_TOKENS)
        delta = torch.full((stats.size(0), stats.size(1) if needs_delta else 0), torch.nan)
        if by_rows:
            one_query = ctypes.c_int(batch.cls)
            rows.mtfast_packed_attention_rows_forward(forward_args, one_query, None)
            rows.mtfast_packed_attention_rows_backward(backward_args, one_query, delta, None)
        else:
            forward.mtfast_packed_attention_forward(forward_args, None)
            backward.mtfast_packed_attention_backward(backward_args, delta, None)
        if batch.cls:
            return [out, None, *grads]
        return [out, lse_of(stats), *grads]

    return run


@pytest.fixture(scope="module")
def run() -> Run:
    return emulated(*load_all(SOURCES))


@pytest.mark.sweep
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_random_batches_match_float64(dtype, head_dim, run, full_sweep):
    numbers = range(300) if full_sweep else range(head_dim // 64, 228, 57)
    check_random_batches(run, numbers, head_dim, dtype)


@pytest.mark.sweep
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_query_a_sequence(dtype, head_dim, run, full_sweep):
    check_random_batches(run, range(300 if full_sweep else 12), head_dim, dtype, cls=True)


@pytest.mark.parametrize("cls", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_scores(dtype, cls, run):
    check_large_scores(run, dtype, cls=cls, products_in_16_bits=dtype != torch.float32 and not cls)


@pytest.mark.parametrize("cls", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inf_and_nan_are_where_eager_has_them(dtype, cls, run):
    check_what_is_not_finite(run, dtype, cls=cls)


@pytest.mark.sweep
@pytest.mark.parametrize("layout", ["apart", "fused", "sliced", "cls"])
@pytest.mark.parametrize("case", CASES[1:], ids=str)
def test_any_thread_order_gives_the_same_without_races(case: Case, layout, run, full_sweep):
    if layout in ("fused", "sliced") and not (case.races or full_sweep):
        pytest.skip("the layout without races is for MTFAST_TEST_SWEEP=full")
    other = emulated(*load_all(SOURCES, case))
    for lengths, head_dim, dtype in (
        ([20, 0, 7, 40], 64, torch.bfloat16),
        ([70, 9], 32, torch.float16),
        ([70, 3], 32, torch.float32),
        ([1, 65], 128, torch.bfloat16),
        ([131, 40], 32, torch.bfloat16),
        ([3, 33], 256, torch.float32),
    ):
        batch = make_batch(lengths, 2, head_dim, dtype, layout=layout)
        pairs = zip(run(batch, 0.1), other(batch, 0.1), strict=True)
        assert all(a is b is None or torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 0.9])
def test_dropout_keeps_what_the_reference_says(dropout_p, run):
    check_dropout(run, dropout_p)


@pytest.mark.sweep
def test_mean_over_seeds_is_the_undropped_result(run, full_sweep):
    check_mean_over_seeds(run, 2000 if full_sweep else 500)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_sequence_does_not_notice_the_others(dtype, run):
    check_a_sequence_does_not_notice_the_others(run, dtype)


@pytest.mark.parametrize("head_dim", [32, 64])
def test_a_large_batch_gives_the_same(head_dim, run):
    """Whose blocks have more warps, and items more rows."""
    large = make_batch([140] + [32] * 124, 17, head_dim, torch.bfloat16)
    rows = {name: getattr(large, name)[:140] for name in ("q", "k", "v", "dout")}
    alone = dataclasses.replace(large, lengths=(140,), cu_seqlens=offsets([140]), **rows)
    for x, y in zip(run(large, 0.1), run(alone, 0.1), strict=True):
        assert torch.equal(x[:, :140] if x.dim() == 2 else x[:140], y)


@pytest.mark.parametrize("architecture", SHARED_KIB)
def test_every_kernel_fits_every_architecture(architecture):
    kernels = load_all(SOURCES, Case(architecture=architecture))
    run = emulated(*kernels)
    for kernel in kernels:
        kernel.take_launched()
    for dtype in DTYPES:
        for head_dim in HEAD_DIMS:
            for length, layout in ((20, "apart"), (50, "apart"), (70, "apart"), (130, "apart"), (5, "cls")):
                run(make_batch([length], 1, head_dim, dtype, layout=layout))
            if dtype == torch.float32 or head_dim >= 128:
                continue
            # So large that items have more rows, but with one token to work on.
            large = make_batch([256], 264, head_dim, dtype)
            run(dataclasses.replace(large, lengths=(130,), cu_seqlens=offsets([1])))
    launched = dict(zip(SOURCES, (kernel.take_launched() for kernel in kernels), strict=True))
    # 128 tokens of head_dim 32 or 64 go in two passes where a block cannot have their memory.
    without = 2 * 2 if SHARED_KIB[architecture] < 100 else 0
    assert launched == SOURCES | {
        "packed_attention_backward.cu": SOURCES["packed_attention_backward.cu"] - without
    }


def test_refused_shared_memory_leaves_no_error_behind(monkeypatch):
    """Which torch would find after its own next launch and take for that one's."""
    kernels = load_all(SOURCES, Case(architecture="sm_86"))
    run = emulated(*kernels)
    run(make_batch([70], 1, 64, torch.bfloat16))  # refused for one pass, done in two
    assert not any(kernel.last_error for kernel in kernels)
    monkeypatch.setitem(SHARED_KIB, "sm_86", 50)
    for length, head_dim, direction in ((130, 128, "forward"), (50, 64, "backward")):
        with pytest.raises(KernelError, match=f"{direction} returned 1"):
            run(make_batch([length], 1, head_dim, torch.bfloat16))
        assert not any(kernel.last_error for kernel in kernels)


WEIGHT = """#include "packed_attention.cuh"
__global__ void weight(float* x) { x[0] = mtfast::attention::Statistics(x, 1).weight(x[1], x[2]); }
"""


def test_weights_leave_no_rounding_to_the_compiler(tmp_path):
    """A score is rounded before the largest is taken away, as in the forward: never both in one step."""
    source = tmp_path / "weight.cu"
    source.write_text(WEIGHT)
    assert {"mul.rn.f32", "add.rn.f32"} <= set(ptx(source).split())


def small_shapes(*kernels: Kernels) -> None:
    """And max_seqlen and cu_seqlens that say what is not so."""
    run = emulated(*kernels)
    for dtype in DTYPES:
        for head_dim in HEAD_DIMS:
            for layout in ("apart", "cls"):
                run(make_batch([20, 0, 7], 1, head_dim, dtype, layout=layout), 0.1)
                run(make_batch([50], 1, head_dim, dtype, layout=layout), 0.1)
                run(make_batch([130, 70], 1, head_dim, dtype, layout=layout), 0.1)
    for dtype in (torch.bfloat16, torch.float32):
        for layout in ("apart", "cls"):
            batch = make_batch([100, 20], 1, 64, dtype, layout=layout)
            for bounds in ([0, 100, 120], [0, 500, 120], [-3, 20, 120], [120, 7, 120], [0, 120, 2**31 - 1]):
                batch.cu_seqlens.copy_(torch.tensor(bounds))
                for longest in (0, 8, 64, 128, 500):
                    run(dataclasses.replace(batch, lengths=(longest,)), 0.1)


# Products of 16 queries by 16 keys that a kernel needs at least, and its results.
WORK = {
    "forward_short": (2, 1),
    "forward_long": (2, 1),
    "backward_short": (5, 3),
    "backward_middle": (5, 3),
    "backward_queries": (3, 1),
    "backward_keys": (4, 2),
}


@pytest.mark.sweep
@pytest.mark.parametrize("source", SOURCES)
def test_machine_code_uses_tensor_cores_and_wide_loads(source):
    kernels = disassembled(source, "")
    assert len(kernels) == SOURCES[source] * len(ARCHITECTURES)
    for kernel in kernels:
        what = f"{kernel.name} for {kernel.architecture}"
        if kernel.name.startswith("rows"):
            assert kernel.count(r"LDG\.E\.128") >= 9 and kernel.count(r"STG\.E\.128") >= 1, what
            continue
        products, results = WORK[kernel.name.split("_kernel<")[0]]
        pieces = int(re.split("[,>] ?", kernel.name)[1]) // 16
        assert kernel.count(r"LDGSTS\.E\.BYPASS\.128") >= 2, what
        assert kernel.count("HMMA|HGMMA") >= 2 * products * pieces, what
        assert kernel.count("LDSM") >= products * pieces, what
        assert kernel.count(r"STG\.E\.128") >= results * pieces, what
