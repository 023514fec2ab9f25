"""The CUDA source of dropout_add_layer_norm run on the CPU: against eager PyTorch in float64, in any thread
order, under race detector; what its machine code holds.

MTFAST_TEST_SWEEP=full runs all 200 random cases in each dtype, otherwise a dozen, and reads the machine code
for Ampere too.
"""

from __future__ import annotations

import ctypes

import pytest
import torch
from cuda_on_cpu.harness import CASES, DTYPES_IN_C, SHARED_KIB, Case, Kernels, load_all
from cuda_on_cpu.machine_code import ARCHITECTURES, disassembled
from dropout_add_layer_norm_cases import (
    DTYPES,
    Operands,
    Run,
    cast,
    check_dropout,
    check_random_cases,
    check_sums,
    draw,
)
from torch import Tensor

# How many kernels each source has, by dtype.
SOURCES = {"dropout_add_layer_norm.cu": 3 * 2, "dropout_add_layer_norm_backward.cu": 3 * (2 + 1)}


class Layer(ctypes.Structure):
    _fields_ = (
        ("rows", ctypes.c_int64),
        ("hidden", ctypes.c_int64),
        ("dtype", ctypes.c_int),
        ("eps", ctypes.c_double),
        ("threshold", ctypes.c_uint32),
        ("scale", ctypes.c_double),
        ("seed", ctypes.c_void_p),
    )


class Inputs(ctypes.Structure):
    _fields_ = (
        ("layer", Layer),
        ("x", ctypes.c_void_p),
        ("residual", ctypes.c_void_p),
        ("weight", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("x_bias", ctypes.c_void_p),
    )

    @classmethod
    def of(cls, operands: Operands, dropout_p: float, eps: float, seed: Tensor) -> Inputs:
        x = operands[0]
        hidden = x.size(-1)
        threshold = min(65535, int(dropout_p * 65536 + 0.5))
        at = seed.data_ptr() if threshold else None
        scale = 65536 / (65536 - threshold)
        layer = Layer(x.numel() // hidden, hidden, DTYPES_IN_C[x.dtype], eps, threshold, scale, at)
        return cls(layer, *map(place_of, operands))


class Gradients(ctypes.Structure):
    _fields_ = tuple((f"d{name}", ctypes.c_void_p) for name in ("x", "residual", "weight", "bias", "x_bias"))


def place_of(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def chunk_sums(rows: int, hidden: int) -> Tensor:
    """The backward's scratch, as csrc/dropout_add_layer_norm.h says."""
    chunk_rows = max(40, -(-rows // 128 // 8) * 8)
    chunks = -(-rows // chunk_rows)
    return torch.full((3, chunks, hidden), torch.nan)


def emulated(forward: Kernels, backward: Kernels) -> Run:
    """dropout_add_layer_norm by these kernels, put together as dropout_add_layer_norm.cpp does it."""

    def run(
        operands: Operands, dy: Tensor, *, dropout_p: float = 0.0, eps: float = 1e-12, seed: int = 0
    ) -> list[Tensor]:
        needs = [x is not None and x.requires_grad for x in operands]
        tensors = [None if x is None else x.detach().contiguous() for x in operands]
        x, at = tensors[0], torch.tensor([seed])
        rows, hidden = x.numel() // x.size(-1), x.size(-1)
        inputs = ctypes.byref(Inputs.of(tensors, dropout_p, eps, at))
        y, stats = torch.full_like(x, torch.nan), torch.full((rows, 2), torch.nan)
        forward.mtfast_dropout_add_layer_norm_forward(inputs, y, stats, None)
        alone = torch.full_like(x, torch.nan)
        forward.mtfast_dropout_add_layer_norm_forward(inputs, alone, None, None)
        torch.testing.assert_close(y, alone, rtol=0, atol=0, equal_nan=True)

        one_gradient = dropout_p == 0 and needs[1]
        wanted = [needs[0] or one_gradient, needs[1] and not one_gradient, *needs[2:]]
        likes = (x, x, *(x.new_empty(hidden) for _ in range(3)))
        grads = [torch.full_like(t, torch.nan) if n else None for t, n in zip(likes, wanted, strict=True)]
        to = ctypes.byref(Gradients(*map(place_of, grads)))
        partial = chunk_sums(rows, hidden) if any(wanted[2:]) else None
        backward.mtfast_dropout_add_layer_norm_backward(inputs, dy.contiguous(), stats, to, partial, None)
        if one_gradient:
            grads[1] = grads[0]
        return [y, *(grad for grad, need in zip(grads, needs, strict=True) if need)]

    return run


@pytest.fixture(scope="module")
def run() -> Run:
    return emulated(*load_all(SOURCES))


@pytest.mark.sweep
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_is_at_most_twice_eagers(dtype, run, full_sweep):
    check_random_cases(run, range(0, 200, 1 if full_sweep else 17), dtype)


# Rows and hidden: a row of one warp, of three, of all; of odd numbers; of more than a block has at once.
SHAPES = [
    ((21, 128), torch.bfloat16, {"dropout_p": 0.1}),
    ((9, 768), torch.float16, {"dropout_p": 0.5}),
    ((1, 4096), torch.float32, {"dropout_p": 0.25}),
    ((5, 301), torch.bfloat16, {"dropout_p": 0.1}),
    ((1, 4104), torch.float32, {}),
    ((40, 1), torch.float32, {"dropout_p": 0.1}),
]


def run_shapes(run: Run) -> list[list[Tensor]]:
    results = []
    for shape, dtype, options in SHAPES:
        operands, dy = cast(draw(shape, 1), dtype), torch.ones(shape, dtype=dtype)
        results.append(run(operands, dy, seed=7, **options))
        without = [operands[0], None, operands[2], operands[3].detach(), None]
        results.append(run(without, dy, seed=7, **options))
    return results


@pytest.mark.parametrize("case", CASES[1:], ids=str)
def test_any_thread_order_gives_the_same_without_races(case: Case, run):
    for expected, found in zip(run_shapes(run), run_shapes(emulated(*load_all(SOURCES, case))), strict=True):
        assert all(map(torch.equal, expected, found))


def test_rows_that_are_not_on_16_bytes(run):
    operands, dy = cast(draw((5, 64), 1), torch.bfloat16), torch.randn(5, 64).bfloat16()
    off = [
        torch.cat([x.new_zeros(1), x.detach().flatten()])[1:].view(x.shape).requires_grad_() for x in operands
    ]
    for found, expected in zip(*(run(x, dy, dropout_p=0.1, seed=1) for x in (off, operands)), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("rows", [1100, 9000])
def test_sums_over_rows(rows, run):
    check_sums(run, rows)


@pytest.mark.parametrize("dropout_p", [0.1, 0.5])
def test_dropout_is_the_documented_draw(dropout_p, run):
    for seed in (7, -(2**62), 2**63 - 1):
        check_dropout(run, dropout_p, seed)


def test_equal_numbers_have_no_gradient(run):
    """Whatever 1 / sqrt(eps) makes of rounding."""
    for dtype in DTYPES:
        x, _, weight, bias, _ = draw((5, 1), 2, dtype)
        operands = cast([x, x, weight, bias, bias], dtype)
        y, dx, dresidual, dweight, *_ = run(operands, torch.randn(5, 1).to(dtype), dropout_p=0.4, seed=1)
        assert torch.equal(y, operands[3].expand(5, 1))
        assert not dx.any() and not dresidual.any() and not dweight.any()


@pytest.mark.parametrize("architecture", SHARED_KIB)
def test_every_kernel_fits_every_architecture(architecture):
    kernels = load_all(SOURCES, Case(architecture=architecture))
    for kernel in kernels:
        kernel.take_launched()
    for dtype in DTYPES:
        for hidden in (512, 4096, 4099):
            emulated(*kernels)(cast(draw((2, hidden), 0), dtype), torch.ones(2, hidden, dtype=dtype))
    assert [kernel.take_launched() for kernel in kernels] == list(SOURCES.values())


def small_shapes(*kernels: Kernels) -> None:
    run_shapes(emulated(*kernels))


@pytest.mark.sweep
def test_machine_code_loads_and_stores_16_bytes():
    for source, direction in zip(SOURCES, ("forward", "backward"), strict=True):
        kernels = disassembled(source, f"{direction}_kernel")
        assert len(kernels) == 3 * len(ARCHITECTURES)
        for kernel in kernels:
            assert kernel.count(r"LDG\.E\.128") >= 2 + 1, kernel.name  # x, residual and a vector
            assert kernel.count(r"STG\.E\.128") >= 1, kernel.name
