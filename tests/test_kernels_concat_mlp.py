"""The CUDA source of concat_mlp run on the CPU: against eager PyTorch, race detector and sanitizers."""

import ctypes
import random

import pytest
import torch
from cuda_on_cpu.harness import CASES, Case, Kernels, load, run_sanitized
from cuda_on_cpu.machine_code import ARCHITECTURES, compiled, disassembler
from torch import Tensor

from mtfast.ops import concat_mlp_ref
from mtfast.ops.concat_mlp import ACTIVATIONS

DTYPES = {torch.float32: 0, torch.bfloat16: 2, torch.float16: 3}


class Layer(ctypes.Structure):
    _fields_ = (
        ("batch", ctypes.c_int64),
        ("inner", ctypes.c_int64),
        ("outputs", ctypes.c_int),
        ("dtype", ctypes.c_int),
        ("activation", ctypes.c_int),
        ("drop_below", ctypes.c_uint32),
        ("scale", ctypes.c_double),
    )


class Source(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("pitch", ctypes.c_int64),
        ("count", ctypes.c_int64),
        ("rows", ctypes.c_void_p),
        ("wide_rows", ctypes.c_int32),
    )


def source(x: Tensor, rows: Tensor | None) -> Source:
    at = None if rows is None else rows.data_ptr()
    return Source(x.data_ptr(), x.stride(0), len(x), at, int(rows is not None and rows.dtype == torch.int64))


def compare(
    forward: Kernels,
    backward: Kernels,
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    activation: str = "relu",
    dropout_p: float = 0.0,
    gather: bool = False,
) -> None:
    """Runs the kernels and checks y, z and every sum of the backward against eager PyTorch in float64."""
    batch, hidden, inner, outputs = shape
    torch.manual_seed(batch + hidden + inner)
    u, v = torch.randn(batch, hidden).to(dtype), torch.randn(batch, hidden).to(dtype)
    weight1 = (torch.randn(inner, 2 * hidden) * (2 * hidden) ** -0.5).to(dtype)
    weight2 = (torch.randn(outputs, inner) * inner**-0.5).to(dtype)
    bias1, bias2 = torch.randn(inner).to(dtype), torch.randn(outputs).to(dtype)
    dy = torch.randn(batch, outputs).to(dtype)
    pick = random.Random(batch)
    u_rows = torch.tensor(pick.choices(range(batch), k=batch)) if gather else None
    v_rows = torch.tensor(pick.choices(range(batch), k=batch), dtype=torch.int32) if gather else None

    threshold = min(65535, int(dropout_p * 65536 + 0.5))
    code = ACTIVATIONS.index(activation)
    layer = Layer(batch, inner, outputs, DTYPES[dtype], code, threshold, 1 / (1 - dropout_p))
    seed = torch.tensor([-12345678901234567])
    exact = [x.double() for x in (u, v, weight1, bias1, weight2, bias2)]
    sides = [x if r is None else x[r] for x, r in zip(exact[:2], (u_rows, v_rows), strict=True)]
    z_exact = (torch.cat(sides, 1) @ exact[2].T + exact[3]).requires_grad_()
    z, y = (
        torch.full((batch, inner), torch.nan, dtype=dtype),
        torch.full((batch, outputs), torch.nan, dtype=dtype),
    )
    if dtype == torch.float32:
        z.copy_(z_exact.detach())
        forward.mtfast_concat_mlp_output(ctypes.byref(layer), z, weight2, bias2, seed, y, None)
    else:
        partial = torch.full(((inner + 63) // 64, batch, outputs), torch.nan)
        sides_c = [ctypes.byref(source(u, u_rows)), ctypes.byref(source(v, v_rows))]
        operands = (hidden, weight1, bias1, weight2, bias2, seed)
        forward.mtfast_concat_mlp_forward(ctypes.byref(layer), *sides_c, *operands, z, partial, y, None)
    tolerance = {"rtol": 0.0, "atol": 1e-5 if dtype == torch.float32 else 0.04}
    torch.testing.assert_close(z.double(), z_exact.detach(), **tolerance)

    # The rest of the function alone, from the kernel's own z: an identity for the first weight.
    z_in = z.double().requires_grad_()
    weight2_in, bias2_in = exact[4].requires_grad_(), exact[5].requires_grad_()
    none = torch.zeros(batch, 0, dtype=torch.float64)
    identity, zero = torch.eye(inner, dtype=torch.float64), torch.zeros(inner, dtype=torch.float64)
    options = {"activation": activation, "dropout_p": dropout_p, "seed": seed.item()}
    y_exact = concat_mlp_ref(z_in, none, identity, zero, weight2_in, bias2_in, **options)
    torch.testing.assert_close(y.double(), y_exact.detach(), **tolerance)

    chunk_rows = 32 if batch <= 2048 else -(-batch // 64 // 8) * 8
    partial = torch.full((-(-batch // chunk_rows), 1 + outputs, inner), torch.nan)
    dz, dbias1, dweight2, dbias2 = (torch.full_like(x, torch.nan) for x in (z, bias1, weight2, bias2))
    results = (dz, partial, dbias1, dweight2, dbias2)
    backward.mtfast_concat_mlp_backward(ctypes.byref(layer), dy, z, weight2, seed, *results, None)
    truth = torch.autograd.grad(y_exact, [z_in, weight2_in, bias2_in], dy.double())
    relative = 1e-5 if dtype == torch.float32 else 0.01
    expected = (truth[0], truth[0].sum(0), truth[1], truth[2])
    for name, found, want in zip(
        ("dz", "dbias1", "dweight2", "dbias2"), (dz, *results[2:]), expected, strict=True
    ):
        error = (found.double() - want).norm() / want.norm().clamp_min(1e-3)
        assert error < relative, f"{name}: relative error {error}"


SHAPES = [
    ((70, 64, 96, 2), torch.bfloat16, "relu", 0.1, False),
    ((5, 72, 70, 3), torch.float16, "gelu", 0.5, True),
    ((33, 37, 65, 1), torch.bfloat16, "tanh", 0.1, True),
    ((40, 1, 300, 8), torch.float32, "gelu", 0.25, False),
    ((1, 1, 37, 4), torch.float32, "tanh", 0.0, False),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_match_eager(case: Case) -> None:
    forward, backward = load("concat_mlp.cu", case), load("concat_mlp_backward.cu", case)
    for shape in SHAPES:
        compare(forward, backward, *shape)


def test_large_tiles() -> None:
    """Enough rows and columns that the forward takes its 128 x 128 tiles."""
    compare(
        load("concat_mlp.cu"), load("concat_mlp_backward.cu"), (990, 8, 1024, 2), torch.bfloat16, "relu", 0.1
    )


def test_rows_out_of_range_read_nothing_and_give_nan() -> None:
    kernels = load("concat_mlp.cu")
    u, weight1, weight2 = (
        torch.randn(4, 8).bfloat16(),
        torch.randn(16, 16).bfloat16(),
        torch.randn(2, 16).bfloat16(),
    )
    rows, fine = torch.tensor([0, 4, -1]), torch.tensor([3, 0, 1], dtype=torch.int32)
    layer = Layer(3, 16, 2, DTYPES[torch.bfloat16], 0, 0, 1.0)
    y, partial = torch.zeros(3, 2).bfloat16(), torch.empty(1, 3, 2)
    bias1, bias2 = torch.zeros(16).bfloat16(), torch.zeros(2).bfloat16()
    sides = ctypes.byref(source(u, rows)), ctypes.byref(source(u, fine))
    operands = (8, weight1, bias1, weight2, bias2, None, None)
    kernels.mtfast_concat_mlp_forward(ctypes.byref(layer), *sides, *operands, partial, y, None)
    assert y.isnan().all(1).tolist() == [False, True, True]


def sanitize_forward(kernels: Kernels) -> None:
    backward = load("concat_mlp_backward.cu")
    for shape in SHAPES:
        compare(kernels, backward, *shape)


def sanitize_backward(kernels: Kernels) -> None:
    forward = load("concat_mlp.cu")
    for shape in SHAPES:
        compare(forward, kernels, *shape)


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_sanitizers_are_silent(direction: str) -> None:
    file = "concat_mlp.cu" if direction == "forward" else "concat_mlp_backward.cu"
    run_sanitized(file, f"test_kernels_concat_mlp:sanitize_{direction}")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_machine_code_uses_tensor_cores_and_wide_loads(architecture: str) -> None:
    if disassembler() is None:
        pytest.skip("no nvdisasm: install nvidia-cuda-nvdisasm or the CUDA toolkit's")
    forward = [k for k in compiled("concat_mlp.cu", architecture) if k.name.startswith("forward_kernel")]
    assert len(forward) == 6
    for kernel in forward:
        assert kernel.count("HMMA") >= 4 * 4 * 2, kernel.name  # a step's k-slices, n-tiles and m-tiles
        assert kernel.count("LDSM") >= 4 * 4, kernel.name
        assert kernel.count(r"STG\.E\.128"), kernel.name
    assert sum(kernel.count(r"LDGSTS\.E\.BYPASS\.128") > 0 for kernel in forward) == 4  # the aligned ones
    backward = [
        k for k in compiled("concat_mlp_backward.cu", architecture) if k.name.startswith("backward_kernel")
    ]
    assert len(backward) == 12
    for kernel in backward:
        assert kernel.count(r"LDG\.E\.128"), kernel.name
