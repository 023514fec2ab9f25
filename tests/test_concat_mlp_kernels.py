"""The CUDA source of concat_mlp run on the CPU: against eager PyTorch in float64, in any thread order, under
race detector; what its machine code holds.

MTFAST_TEST_SWEEP=full runs all 200 random cases in each dtype, otherwise twelve, draws 2,000 dropout
masks instead of 500, and reads the machine code for Ampere too.
"""

from __future__ import annotations

import ctypes

import pytest
import torch
from concat_mlp_cases import (
    ALL,
    DTYPES,
    Operands,
    Run,
    by,
    cast,
    check_dropout,
    check_mean_over_seeds,
    check_random_cases,
    check_sums,
    draw,
)
from cuda_on_cpu.harness import CASES, DTYPES_IN_C, SHARED_KIB, Case, Kernels, load_all
from cuda_on_cpu.machine_code import ARCHITECTURES, disassembled
from torch import Tensor

from mtfast.ops import concat_mlp_ref
from mtfast.ops.concat_mlp import ACTIVATIONS

# How many kernels each source has: by dtype, tile or number of outputs.
SOURCES = {"concat_mlp.cu": 2 * 3 + 2 + 1, "concat_mlp_backward.cu": 3 * 4 + 3, "concat_mlp_gather.cu": 2}


class Layer(ctypes.Structure):
    _fields_ = (
        ("batch", ctypes.c_int64),
        ("hidden", ctypes.c_int64),
        ("inner", ctypes.c_int64),
        ("outputs", ctypes.c_int),
        ("dtype", ctypes.c_int),
        ("activation", ctypes.c_int),
        ("threshold", ctypes.c_uint32),
        ("scale", ctypes.c_double),
        ("seed", ctypes.c_void_p),
    )


class Source(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("pitch", ctypes.c_int64),
        ("count", ctypes.c_int64),
        ("rows", ctypes.c_void_p),
        ("wide_rows", ctypes.c_int32),
    )

    @classmethod
    def of(cls, x: Tensor, rows: Tensor | None) -> Source:
        wide = rows is not None and rows.dtype == torch.int64
        return cls(x.data_ptr(), x.stride(0), len(x), None if rows is None else rows.data_ptr(), int(wide))


class Inputs(ctypes.Structure):
    _fields_ = (
        ("layer", Layer),
        ("u", Source),
        ("v", Source),
        ("weight1", ctypes.c_void_p),
        ("weight2", ctypes.c_void_p),
        ("bias1", ctypes.c_void_p),
        ("bias2", ctypes.c_void_p),
    )

    @classmethod
    def of(
        cls,
        operands: Operands,
        batch: int,
        *,
        u_rows: Tensor | None = None,
        v_rows: Tensor | None = None,
        activation: str = "relu",
        dropout_p: float = 0.0,
        seed: Tensor,
    ) -> Inputs:
        u, v, weight1, bias1, weight2, bias2 = operands
        threshold = min(65535, int(dropout_p * 65536 + 0.5))
        codes = DTYPES_IN_C[u.dtype], ACTIVATIONS.index(activation)
        at = seed.data_ptr() if threshold else None
        layer = Layer(batch, u.size(1), *weight2.T.shape, *codes, threshold, 65536 / (65536 - threshold), at)
        weights = (x.data_ptr() for x in (weight1, weight2, bias1, bias2))
        return cls(layer, Source.of(u, u_rows), Source.of(v, v_rows), *weights)


class Sums(ctypes.Structure):
    _fields_ = (("dbias1", ctypes.c_void_p), ("dweight2", ctypes.c_void_p), ("dbias2", ctypes.c_void_p))


def chunk_sums(batch: int, inner: int, outputs: int) -> Tensor:
    """The backward's scratch: backward_scratch_bytes of csrc/concat_mlp.h."""
    chunks = -(-batch // (32 * max(1, -(-batch // (32 * 128)))))
    return torch.full((chunks * (2 * outputs + (1 + outputs) * inner),), torch.nan)


def emulated(forward: Kernels, backward: Kernels, gather: Kernels) -> Run:
    """concat_mlp by these kernels, put together as concat_mlp_on_cuda.cpp does it."""

    def run(
        operands: Operands,
        dy: Tensor,
        *,
        u_rows: Tensor | None = None,
        v_rows: Tensor | None = None,
        activation: str = "relu",
        dropout_p: float = 0.0,
        seed: int = 0,
    ) -> list[Tensor]:
        need_u, need_v, need_weight1, *others = (x.requires_grad for x in operands)
        u, v, weight1, bias1, weight2, bias2 = tensors = [x.detach() for x in operands]
        (outputs, inner), batch, at = weight2.shape, len(dy), torch.tensor([seed])
        options = {"activation": activation, "dropout_p": dropout_p, "seed": at}
        inputs = ctypes.byref(Inputs.of(tensors, batch, u_rows=u_rows, v_rows=v_rows, **options))

        y, z, dz, both = (u.new_full((batch, n), torch.nan) for n in (outputs, inner, inner, 2 * u.size(1)))
        gather.mtfast_concat_mlp_gather(inputs, both, None)
        if u.dtype == torch.float32:
            torch.addmm(bias1, both, weight1.T, out=z)
            forward.mtfast_concat_mlp_output(inputs, z, y, None)
        else:
            partial = torch.full(((inner + 63) // 64, batch, outputs), torch.nan)
            forward.mtfast_concat_mlp_forward(inputs, z, partial, y, None)
            alone = torch.full_like(y, torch.nan)
            forward.mtfast_concat_mlp_forward(inputs, None, partial, alone, None)
            torch.testing.assert_close(y, alone, rtol=0, atol=0, equal_nan=True)

        partial = chunk_sums(batch, inner, outputs)
        sums = [torch.full_like(x, torch.nan) for x in (bias1, weight2, bias2)]
        dz_at = dz if need_u or need_v or need_weight1 else None
        to = ctypes.byref(Sums(*(x.data_ptr() for x in sums)))
        backward.mtfast_concat_mlp_backward(inputs, dy, z, dz_at, partial, to, None)

        grads = [y]
        sides = zip((u, v), (u_rows, v_rows), (need_u, need_v), weight1.chunk(2, 1), strict=True)
        for x, rows, need, half in sides:
            if need:
                grad = dz @ half
                grads.append(grad if rows is None else torch.zeros_like(x).index_add_(0, rows, grad))
        if need_weight1:
            grads.append(dz.T @ both)
        return grads + [x for x, need in zip(sums, others, strict=True) if need]

    return run


@pytest.fixture(scope="module")
def run() -> Run:
    return emulated(*load_all(SOURCES))


@pytest.mark.sweep
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_is_at_most_twice_eagers(dtype, run, full_sweep):
    check_random_cases(run, range(0, 200, 1 if full_sweep else 17), dtype)


# batch, hidden, inner, outputs
SHAPES = [
    ((70, 64, 96, 2), torch.bfloat16, {"dropout_p": 0.1}),
    ((5, 72, 70, 3), torch.float16, {"activation": "gelu", "dropout_p": 0.5}),
    ((33, 37, 65, 1), torch.bfloat16, {"activation": "tanh", "dropout_p": 0.1}),
    ((40, 1, 300, 8), torch.float32, {"activation": "gelu", "dropout_p": 0.25}),
    ((1, 1, 37, 4), torch.float32, {"activation": "tanh"}),
]


def case_of(shape: tuple[int, int, int, int], gather: bool) -> tuple[Operands, dict]:
    torch.manual_seed(0)
    batch, rows = shape[0], shape[0] + 3
    if not gather:
        return draw(*shape, seed=1), {}
    indices = torch.randint(rows, (batch,)), torch.randint(rows, (batch,), dtype=torch.int32)
    return draw(*shape, seed=1, rows=rows), dict(zip(("u_rows", "v_rows"), indices, strict=True))


@pytest.mark.parametrize("case", CASES[1:], ids=str)
def test_any_thread_order_gives_the_same_without_races(case: Case, run):
    other = emulated(*load_all(SOURCES, case))
    for shape, dtype, options in SHAPES:
        for gather in (False, True):
            exact, rows = case_of(shape, gather)
            operands, dy = cast(exact, dtype, "cpu", gap=8), torch.ones(shape[0], shape[3], dtype=dtype)
            results = [f(operands, dy, seed=7, **options, **rows) for f in (run, other)]
            assert all(map(torch.equal, *results))


def test_large_tiles(run):
    """Enough rows and columns that the forward takes its 128 x 128 tiles."""
    operands = cast(draw(990, 8, 1024, 2, seed=0), torch.bfloat16, "cpu", (False,) * 3 + (True,) * 3)
    dy, options = torch.ones(990, 2).bfloat16(), {"dropout_p": 0.1, "seed": 3}
    exact = by(concat_mlp_ref)(
        [x.detach().double().requires_grad_(x.requires_grad) for x in operands], dy.double(), **options
    )
    eager = by(concat_mlp_ref)(operands, dy, **options)
    for ours, eagers, wanted in zip(run(operands, dy, **options), eager, exact, strict=True):
        assert (ours.double() - wanted).norm() <= 2 * (eagers.double() - wanted).norm()


@pytest.mark.parametrize("batch", [1100, 4203, 20000])
def test_sums_over_rows(batch, run):
    check_sums(run, batch)


@pytest.mark.parametrize("dropout_p", [0.1, 0.5])
def test_dropout_is_the_documented_draw(dropout_p, run):
    for seed in (7, -(2**62), 2**63 - 1):
        check_dropout(run, dropout_p, seed)


@pytest.mark.sweep
def test_mean_over_seeds_is_the_undropped_result(run, full_sweep):
    check_mean_over_seeds(run, 2000 if full_sweep else 500)


def test_rows_out_of_range_read_nothing_and_give_nan(run):
    for dtype in DTYPES:
        operands = cast(draw(4, 8, 16, 2, seed=0), dtype, "cpu", (False,) * 6)
        rows = torch.tensor([0, 4, -1]), torch.tensor([3, 0, 1], dtype=torch.int32)
        y, *_ = run(operands, torch.ones(3, 2, dtype=dtype), u_rows=rows[0], v_rows=rows[1])
        assert y.isnan().all(1).tolist() == [False, True, True]


@pytest.mark.parametrize("architecture", SHARED_KIB)
def test_every_kernel_fits_every_architecture(architecture):
    kernels = load_all(SOURCES, Case(architecture=architecture))
    run = emulated(*kernels)
    for kernel in kernels:
        kernel.take_launched()
    for dtype in DTYPES:
        for shape in ((3, 8, 16, 1), (3, 9, 16, 2), (3, 8, 16, 3), (3, 8, 16, 8), (1, 8, 8192, 1)):
            dy = torch.ones(shape[0], shape[3], dtype=dtype)
            run(cast(draw(*shape, seed=0), dtype, "cpu", (False,) * 3 + (True,) * 3), dy)
    assert [kernel.take_launched() for kernel in kernels] == list(SOURCES.values())


def small_shapes(*kernels: Kernels) -> None:
    run = emulated(*kernels)
    for shape, dtype, options in SHAPES:
        for gather, needs in ((False, ALL), (True, (False, False, False, True, True, True))):
            exact, rows = case_of(shape, gather)
            dy = torch.ones(shape[0], shape[3], dtype=dtype)
            run(cast(exact, dtype, "cpu", needs, gap=5), dy, seed=7, **options, **rows)
    test_rows_out_of_range_read_nothing_and_give_nan(run)


@pytest.mark.sweep
def test_machine_code_uses_tensor_cores_and_wide_loads():
    forward = disassembled("concat_mlp.cu", "forward_kernel")
    assert len(forward) == 6 * len(ARCHITECTURES)
    for kernel in forward:
        assert kernel.count("HMMA|HGMMA") >= 4 * 4 * 2, kernel.name  # a step's k-slices, n-tiles and m-tiles
        assert kernel.count("LDSM") >= 4 * 4, kernel.name
        assert kernel.count(r"STG\.E\.128"), kernel.name
    aligned = sum(kernel.count(r"LDGSTS\.E\.BYPASS\.128") > 0 for kernel in forward)
    assert aligned == 4 * len(ARCHITECTURES)
    backward = disassembled("concat_mlp_backward.cu", "backward_kernel")
    assert len(backward) == 12 * len(ARCHITECTURES)
    for kernel in backward:
        assert kernel.count(r"LDG\.E\.128"), kernel.name
