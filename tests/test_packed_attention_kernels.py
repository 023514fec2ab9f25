"""The CUDA kernels of packed attention without a GPU: the same source run on the CPU, under race detector and
the sanitizers."""

from __future__ import annotations

import ctypes
import math

import pytest
import torch
from cuda_on_cpu.harness import CASES, Case, load, run_sanitized
from packed_attention_cases import SEED, Batch, assert_close_to_exact, make_batch
from torch import Tensor

FORWARD, BACKWARD, CLS = "packed_attention.cu", "packed_attention_backward.cu", "packed_attention_cls.cu"
DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}


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
        ("seed", ctypes.c_uint64),
        ("seed_on_device", ctypes.c_void_p),
    )


class CForward(ctypes.Structure):
    _fields_ = (("shape", CShape), *((x, CTensor) for x in ("q", "k", "v", "out")), ("lse", ctypes.c_void_p))


class CBackward(ctypes.Structure):
    _fields_ = (
        ("shape", CShape),
        *((x, CTensor) for x in ("q", "k", "v", "out", "dout", "dq", "dk", "dv")),
        ("lse", ctypes.c_void_p),
    )


def shape_of(batch: Batch, dropout_p: float, max_seqlen: int | None = None) -> CShape:
    total, heads, head_dim = batch.k.shape
    return CShape(
        batch.cu_seqlens.data_ptr(),
        batch.cu_seqlens.numel() - 1,
        total,
        heads,
        head_dim,
        batch.max_seqlen if max_seqlen is None else max_seqlen,
        DTYPES[batch.k.dtype],
        1 / math.sqrt(head_dim),
        round(dropout_p * 65536),
        SEED,
        None,
    )


def forward(kernels, batch: Batch, dropout_p: float, cls: bool = False, max_seqlen: int | None = None):
    out = torch.full(batch.q.shape, torch.nan, dtype=batch.k.dtype)
    lse = torch.full((batch.q.size(1), batch.q.size(0)), torch.nan)
    tensors = [CTensor.of(x) for x in (*batch.tensors, out)]
    args = CForward(shape_of(batch, dropout_p, max_seqlen), *tensors, lse.data_ptr())
    name = "mtfast_packed_attention_cls_forward" if cls else "mtfast_packed_attention_forward"
    getattr(kernels, name)(ctypes.byref(args), None)
    return out, lse


def backward(kernels, batch: Batch, out: Tensor, lse: Tensor, dropout_p: float, cls: bool = False):
    grads = [torch.full(x.shape, torch.nan, dtype=x.dtype) for x in batch.tensors]
    tensors = [CTensor.of(x) for x in (*batch.tensors, out, batch.dout, *grads)]
    args = CBackward(shape_of(batch, dropout_p), *tensors, lse.data_ptr())
    if cls:
        kernels.mtfast_packed_attention_cls_backward(ctypes.byref(args), None)
    else:
        delta = torch.full(lse.shape, torch.nan)
        kernels.mtfast_packed_attention_backward(ctypes.byref(args), delta, None)
    return grads


def check(batch: Batch, dropout_p: float, forwards, backwards, cls: bool = False) -> None:
    out, lse = forward(forwards, batch, dropout_p, cls)
    grads = backward(backwards, batch, out, lse, dropout_p, cls)
    assert_close_to_exact([out, lse, *grads], batch, dropout_p, cls)
    again = backward(backwards, batch, out, lse, dropout_p, cls)
    assert all(torch.equal(a, b) for a, b in zip(grads, again, strict=True))


SHORT = [5, 0, 16, 1, 33, 3, 3, 3]
MIXED = [5, 0, 70, 1]


@pytest.mark.parametrize("head_dim", [32, 64, 128])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_float64(dtype, head_dim):
    kernels = load(FORWARD), load(BACKWARD)
    check(make_batch(SHORT, 1, head_dim, dtype, layout="fused"), 0.1, *kernels)
    check(make_batch(MIXED, 1, head_dim, dtype, layout="sliced"), 0.1, *kernels)
    check(make_batch([64, 9], 2, head_dim, dtype), 0.0, *kernels)
    cls = load(CLS)
    for dropout_p in (0.0, 0.1):
        check(make_batch(SHORT, 2, head_dim, dtype, layout="cls"), dropout_p, cls, cls, cls=True)


@pytest.mark.parametrize("case", CASES[1:], ids=str)
def test_any_thread_order_without_races(case: Case):
    kernels = load(FORWARD, case), load(BACKWARD, case)
    check(make_batch([20, 7, 40], 1, 64, torch.bfloat16), 0.1, *kernels)
    check(make_batch([70, 9], 1, 64, torch.bfloat16), 0.1, *kernels)
    check(make_batch([70], 1, 32, torch.float32), 0.1, *kernels)
    cls = load(CLS, case)
    check(make_batch([20, 7], 1, 64, torch.bfloat16, layout="cls"), 0.1, cls, cls, cls=True)


def sanitized_forward(kernels) -> None:
    for dtype in DTYPES:
        forward(kernels, make_batch([20, 0, 7], 1, 64, dtype), 0.1)
        forward(kernels, make_batch([70], 1, 64, dtype), 0.1)
    batch = make_batch([100, 20], 1, 64, torch.bfloat16)
    forward(kernels, batch, 0.1, max_seqlen=8)  # a lie
    for bounds in ([0, 500, 120], [-3, 20, 120], [120, 7, 120]):
        batch.cu_seqlens.copy_(torch.tensor(bounds))
        for max_seqlen in (64, 500):
            forward(kernels, batch, 0.1, max_seqlen=max_seqlen)


def sanitized_backward(kernels) -> None:
    for dtype in DTYPES:
        for lengths in ([20, 0, 7], [70]):
            batch = make_batch(lengths, 1, 64, dtype)
            backward(
                kernels, batch, torch.zeros(batch.q.shape, dtype=dtype), torch.zeros(1, sum(lengths)), 0.1
            )


def sanitized_cls(kernels) -> None:
    for dtype in DTYPES:
        batch = make_batch([20, 0, 7], 1, 64, dtype, layout="cls")
        out, lse = forward(kernels, batch, 0.1, cls=True)
        backward(kernels, batch, out, lse, 0.1, cls=True)


@pytest.mark.parametrize(
    ("source", "function"),
    [(FORWARD, "sanitized_forward"), (BACKWARD, "sanitized_backward"), (CLS, "sanitized_cls")],
)
def test_sanitizers_are_silent(source, function):
    run_sanitized(source, f"test_packed_attention_kernels:{function}")


def test_result_does_not_depend_on_the_batch():
    kernels = load(FORWARD)
    alone = make_batch([23], 1, 64, torch.bfloat16)
    out, lse = forward(kernels, alone, 0.0)
    for before, after in ([[3], [60]], [[64, 9], []], [[70], [5]]):
        lengths = [*before, 23, *after]
        begin = sum(before)
        packed = make_batch(lengths, 1, 64, torch.bfloat16, seed=1)
        for x, y in zip(packed.tensors, alone.tensors, strict=True):
            x[begin : begin + 23] = y
        packed_out, packed_lse = forward(kernels, packed, 0.0)
        assert torch.equal(packed_out[begin : begin + 23], out)
        assert torch.equal(packed_lse[:, begin : begin + 23], lse)
