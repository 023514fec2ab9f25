"""The CUDA source of bias_gelu run on the CPU: against eager PyTorch in float64, in any thread order, under
race detector; what its machine code holds.

MTFAST_TEST_SWEEP=full takes every number, otherwise every seventh, and reads the machine code for Ampere too.
"""

from __future__ import annotations

import ctypes

import pytest
import torch
from bias_gelu_cases import DTYPES, Run, check_errors, check_every_number, check_extremes, check_sums, draw
from cuda_on_cpu.harness import CASES, DTYPES_IN_C, SHARED_KIB, Case, Kernels, load
from cuda_on_cpu.machine_code import ARCHITECTURES, disassembled
from torch import Tensor

SOURCE = "bias_gelu.cu"
KERNELS = 3 * 3  # forward, backward and sums, by dtype


class Inputs(ctypes.Structure):
    _fields_ = (
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("dtype", ctypes.c_int),
        ("x", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
    )

    @classmethod
    def of(cls, x: Tensor, bias: Tensor | None) -> Inputs:
        at = None if bias is None else bias.data_ptr()
        return cls(*x.shape, DTYPES_IN_C[x.dtype], x.data_ptr(), at)


def chunk_sums(rows: int, columns: int) -> Tensor:
    """The backward's scratch: backward_chunks of csrc/bias_gelu.h."""
    chunks = -(-rows // (64 * -(-rows // (64 * 256))))
    return torch.full((chunks, columns), torch.nan)


def moved(x: Tensor | None, offset: int) -> Tensor | None:
    """The same numbers, contiguous, `offset` elements after a multiple of 16 bytes."""
    if x is None or offset == 0:
        return x
    return torch.cat([x.new_zeros(offset), x.flatten()])[offset:].view(x.shape)


def emulated(kernels: Kernels, offset: int = 0, only: str = "") -> Run:
    """bias_gelu by these kernels, as bias_gelu.cpp calls them; or the calls of one direction only."""

    def run(x: Tensor, bias: Tensor | None, dy: Tensor) -> list[Tensor]:
        x, bias, dy = (moved(t, offset) for t in (x, bias, dy))
        y, dx = torch.full_like(x, torch.nan), torch.full_like(x, torch.nan)
        inputs = ctypes.byref(Inputs.of(x, bias))
        if only != "backward":
            kernels.mtfast_bias_gelu_forward(inputs, y, None)
        partial, dbias = None, None
        if bias is not None:
            partial, dbias = chunk_sums(*x.shape), torch.full_like(bias, torch.nan)
        if only != "forward":
            kernels.mtfast_bias_gelu_backward(inputs, dy, dx, partial, dbias, None)
        return [y, dx] if dbias is None else [y, dx, dbias]

    return run


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    return load(SOURCE)


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_is_at_most_twice_eagers(dtype, offset, kernels):
    check_errors(emulated(kernels, offset), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_number(dtype, kernels, full_sweep):
    check_every_number(emulated(kernels), dtype, step=1 if full_sweep else 7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extremes_nan_and_inf(dtype, kernels):
    check_extremes(emulated(kernels), dtype)


@pytest.mark.parametrize("rows", [1100, 17_000])  # the second in chunks of twice as many
def test_sums_over_rows(rows, kernels):
    check_sums(emulated(kernels), rows)


SHAPES = [(70, 264), (33, 31), (3, 512), (129, 40)]


@pytest.mark.parametrize("case", CASES[1:], ids=str)
def test_any_thread_order_gives_the_same_without_races(case: Case, kernels):
    other = load(SOURCE, case)
    for dtype in DTYPES:
        for shape in SHAPES:
            operands = draw(*shape, dtype)
            assert all(map(torch.equal, *(emulated(k)(*operands) for k in (kernels, other))))


@pytest.mark.parametrize("architecture", SHARED_KIB)
def test_every_kernel_fits_every_architecture(architecture):
    kernels = load(SOURCE, Case(architecture=architecture))
    kernels.take_launched()
    for dtype in DTYPES:
        emulated(kernels)(*draw(3, 16, dtype))
    assert kernels.take_launched() == KERNELS


def small_shapes(kernels: Kernels) -> None:
    for dtype in DTYPES:
        for shape, offset, bias in (((70, 40), 0, True), ((33, 31), 0, True), ((3, 264), 1, False)):
            emulated(kernels, offset)(*draw(*shape, dtype, bias=bias))


@pytest.mark.sweep
@pytest.mark.parametrize(("direction", "read"), [("forward", 1), ("backward", 2)])
def test_rows_move_16_bytes_at_a_time(direction, read):
    """Two rows of each matrix before the first is turned to, in registers that leave room for 32 warps; of
    special functions there is one exponential an element, where erf and exp would be two."""
    kernels = [k for k in disassembled(SOURCE, f"{direction}_kernel") if "true" in k.name]
    assert len(kernels) == len(DTYPES) * len(ARCHITECTURES)
    for kernel in kernels:
        assert kernel.count(r"LDG\.E\.(\w+\.)*128") >= 2 * read and kernel.count(r"STG\.E\.(\w+\.)*128"), (
            kernel
        )
        assert kernel.registers <= 64, kernel.name
        elements = 4 if "<float" in kernel.name else 8
        assert kernel.count(r"MUFU\.EX2") == kernel.count("MUFU") <= elements, kernel.name
