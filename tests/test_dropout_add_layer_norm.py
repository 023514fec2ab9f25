"""dropout_add_layer_norm against eager PyTorch in float64, on every device there is.

MTFAST_TEST_SWEEP=full runs all 200 random cases in each dtype, otherwise twenty.
"""

from __future__ import annotations

import pytest
import torch
from devices import DEVICES
from dropout_add_layer_norm_cases import (
    DTYPES,
    NAMES,
    by,
    cast,
    check_dropout,
    check_random_cases,
    check_sums,
    draw,
)
from torch import Tensor

from mtfast.ops import dropout_add_layer_norm, dropout_add_layer_norm_ref
from mtfast.ops.dropout_add_layer_norm import dropout_keep

pytestmark = pytest.mark.parametrize("device", DEVICES)
ours = by(dropout_add_layer_norm)
eager = by(dropout_add_layer_norm_ref)


def dy_of(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device, dtype)


@pytest.mark.sweep
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_is_at_most_twice_eagers(dtype: torch.dtype, device: str, full_sweep: bool) -> None:
    check_random_cases(ours, range(0, 200, 1 if full_sweep else 11), dtype, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_over_thousands_of_rows(dtype: torch.dtype, device: str) -> None:
    """Which go through many chunks."""
    exact, options = draw((4203, 40), 5, dtype), {"dropout_p": 0.1, "seed": 3}
    dy = dy_of((4203, 40), dtype, "cpu")
    truths = eager(cast(exact, torch.float64), dy.double(), **options)
    found = (f(cast(exact, dtype, device), dy.to(device), **options) for f in (ours, eager))
    for name, x, e, truth in zip(("y", *NAMES), *found, truths, strict=True):
        error, usual = ((y.cpu().double() - truth).norm() for y in (x, e))
        assert error <= 2 * usual, f"{name}: {error:.3g}, eager {usual:.3g}"


@pytest.mark.parametrize("rows", [1100, 4203, 20000])
def test_sums_over_rows(rows: int, device: str) -> None:
    check_sums(ours, rows, device)


@pytest.mark.parametrize("hidden", [16, 4099])
@pytest.mark.parametrize("mean", [1e2, 1e4, 1e6])
def test_a_large_mean_costs_no_digits(hidden: int, mean: float, device: str) -> None:
    """Beyond those that the numbers themselves have lost."""
    exact = draw((6, hidden), 1, torch.float32, mean)
    exact[0], exact[4] = torch.zeros_like(exact[0]), None
    truth, found, eagers = (
        dropout_add_layer_norm_ref(*cast(exact, torch.float64)[:4]),
        dropout_add_layer_norm(*cast(exact, torch.float32, device)[:4]).cpu(),
        dropout_add_layer_norm_ref(*cast(exact, torch.float32, device)[:4]).cpu(),
    )
    assert (found - truth).norm() <= 2 * (eagers - truth).norm()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_without_variance(dtype: torch.dtype, device: str) -> None:
    """Equal numbers give the bias, and one has no gradient, whatever 1 / sqrt(eps) makes of rounding."""
    for shape in ((5, 1), (3, 768)):
        hidden = shape[1]
        x, _, weight, bias, _ = draw(shape, 2, dtype)
        operands = cast([x[:, :1].expand(shape), None, weight, bias, None], dtype, device)
        y, _, dweight, dbias = ours(operands, torch.ones(shape, device=device, dtype=dtype))
        assert torch.equal(y.cpu().double(), bias.expand(shape))
        assert not dweight.any() and torch.equal(dbias, torch.full_like(dbias, shape[0]))
        if hidden == 1:
            y, dx, *_ = ours(
                cast([x, x, weight, bias, bias], dtype, device),
                dy_of(shape, dtype, device),
                dropout_p=0.4,
                seed=1,
            )
            assert torch.equal(y.cpu().double(), bias.expand(shape)) and not dx.any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_gradients_the_output_is_the_same(dtype: torch.dtype, device: str) -> None:
    """Though the statistics, which nobody needs then, are not kept."""
    operands = cast(draw((70, 96), 1), dtype, device)[:4]
    kept = dropout_add_layer_norm(*operands, dropout_p=0.1, seed=1)
    with torch.no_grad():
        assert torch.equal(dropout_add_layer_norm(*operands, dropout_p=0.1, seed=1), kept)


def test_gradcheck(device: str) -> None:
    if device != "cpu":
        pytest.skip("float64 is for the CPU")
    operands = cast(draw((2, 3, 19), 1), torch.float64)

    def dropped(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, x_bias: Tensor) -> Tensor:
        return dropout_add_layer_norm(x, residual, weight, bias, x_bias=x_bias, dropout_p=0.3, seed=1)

    assert torch.autograd.gradcheck(dropped, operands)
    assert torch.autograd.gradcheck(
        lambda x, *vectors: dropout_add_layer_norm(x, None, *vectors), [operands[0], *operands[2:4]]
    )


@pytest.mark.parametrize("dropout_p", [0.1, 0.5])
def test_dropout_is_the_documented_draw(dropout_p: float, device: str) -> None:
    for seed in (7, -(2**62), 2**63 - 1):
        check_dropout(ours, dropout_p, seed, device)


def test_dropout_is_independent_between_seeds_and_neighbours(device: str) -> None:
    keep, other = dropout_keep(512, 768, 0.1, 3), dropout_keep(512, 768, 0.1, 4)
    n = keep.numel()
    assert abs((~keep & ~other).sum().item() / n - 0.01) < 4 * (0.0099 / n) ** 0.5
    for neighbours in (~keep[:, 1:] & ~keep[:, :-1], ~keep[1:] & ~keep[:-1]):
        # Pairs overlap, so their errors add up: (0.01 - 0.0001 + 2 * (0.001 - 0.0001)) / n.
        assert abs(neighbours.double().mean().item() - 0.01) < 4 * (0.0117 / n) ** 0.5


def test_seed_behaviour(device: str) -> None:
    operands = cast(draw((40, 100), 0), torch.float32, device, (False,) * 5)[:4]

    def run(**options) -> Tensor:
        return dropout_add_layer_norm(*operands, dropout_p=0.3, **options)

    as_tensor = torch.tensor([11], device=device)
    assert torch.equal(run(seed=11), run(seed=11))
    assert torch.equal(run(seed=11), run(seed=as_tensor))
    assert not torch.equal(run(seed=11), run(seed=12))
    torch.manual_seed(5)
    first, second = run(), run()
    torch.manual_seed(5)
    assert torch.equal(run(), first)
    assert not torch.equal(first, second)
    assert torch.equal(run(training=False), dropout_add_layer_norm(*operands))
    assert torch.equal(
        dropout_add_layer_norm(*operands, dropout_p=0.0, seed=1), dropout_add_layer_norm(*operands)
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_result_does_not_depend_on_threads_or_on_the_rest_of_the_batch(
    dtype: torch.dtype, device: str
) -> None:
    if device != "cpu":
        pytest.skip("threads are the CPU's")
    operands, dy = cast(draw((1100, 72), 0), dtype), dy_of((1100, 72), dtype, device)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(ours(operands, dy, dropout_p=0.2, seed=9))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))
    x, residual, *vectors = operands
    head = [x[:50].detach(), residual[:50].detach(), *vectors]
    assert torch.equal(ours(head, dy[:50], dropout_p=0.2, seed=9)[0], results[0][0][:50])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_passes_are_bit_identical(dtype: torch.dtype, device: str) -> None:
    operands, dy = cast(draw((300, 136), 2), dtype, device), dy_of((300, 136), dtype, device)
    first, second = (ours(operands, dy, dropout_p=0.1, seed=1) for _ in range(2))
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_each_gradient_alone(dropout_p: float, device: str) -> None:
    exact, dy, options = (
        draw((20, 70), 2),
        dy_of((20, 70), torch.float32, device),
        {"dropout_p": dropout_p, "seed": 1},
    )
    everything = ours(cast(exact, torch.float32, device), dy, **options)[1:]
    for i, name in enumerate(NAMES):
        needs = tuple(j == i for j in range(5))
        alone = ours(cast(exact, torch.float32, device, needs), dy, **options)[1]
        assert torch.equal(alone, everything[i]), name


def test_tensors_that_are_not_contiguous(device: str) -> None:
    whole = torch.randn(2, 3, 10, 24, device=device)
    x, residual = whole[0].transpose(1, 2), whole[1].transpose(1, 2)
    weight, bias = torch.randn(2, 10, 2, device=device)[..., 0]
    x, weight = x.requires_grad_(), weight.requires_grad_()
    dy = torch.randn(3, 1, 10, device=device).expand(3, 24, 10)
    for found, expected in zip(
        *(f([x, residual, weight, bias, None], dy) for f in (ours, eager)), strict=True
    ):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("shape", [(0, 16), (4, 0, 16)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_rows(dtype: torch.dtype, shape: tuple[int, ...], device: str) -> None:
    operands = cast(draw(shape, 0), dtype, device)
    y, *grads = ours(operands, torch.empty(shape, device=device, dtype=dtype), dropout_p=0.1)
    assert y.shape == shape
    for grad, operand in zip(grads, operands, strict=True):
        assert grad.shape == operand.shape and not grad.any()


def test_nan_and_inf_spoil_their_rows_alone(device: str) -> None:
    operands = cast(draw((4, 40), 0), torch.float32, device, (False,) * 5)[:4]
    operands[0][1, 3], operands[1][2, 3] = float("nan"), float("inf")
    y, expected = (f(*operands) for f in (dropout_add_layer_norm, dropout_add_layer_norm_ref))
    torch.testing.assert_close(y, expected, equal_nan=True)
    assert y.isnan().all(1).tolist() == [False, True, True, False]


def test_what_is_dropped_is_gone_whatever_it_is(device: str) -> None:
    keep = dropout_keep(3, 40, 0.5, 8).to(device)
    x, residual, weight, bias = cast(draw((3, 40), 0), torch.float32, device, (False,) * 5)[:4]
    options = {"dropout_p": 0.5, "seed": 8}
    spoilt = torch.where(keep, x, float("nan")).requires_grad_()
    y, dx = ours([spoilt, residual, weight, bias, None], torch.full_like(x, float("inf")), **options)
    assert torch.equal(y, dropout_add_layer_norm(x, residual, weight, bias, **options))
    assert not dx[~keep].any()


def test_opcheck(device: str) -> None:
    x, residual, weight, bias, x_bias = cast(draw((2, 3, 40), 0), torch.float32, device)
    seed = torch.tensor([3], device=device)
    op = torch.ops.mtfast.dropout_add_layer_norm.default
    torch.library.opcheck(op, (x, residual, weight, bias, x_bias, 0.1, 1e-5, seed, True))
    torch.library.opcheck(op, (x, None, weight, bias, None, 0.0, 1e-5, None, True))
    x, residual, weight, x_bias = (t.detach() for t in (x, residual, weight, x_bias))
    dy, stats = torch.randn(2, 3, 40, device=device), torch.rand(6, 2, device=device)
    backward = torch.ops.mtfast.dropout_add_layer_norm_backward.default
    for p, needs in ((0.0, 2), (0.1, 31)):
        torch.library.opcheck(backward, (dy, x, residual, weight, x_bias, stats, p, seed, needs))


def test_compiles_without_a_graph_break_and_once_for_changing_batches(device: str) -> None:
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    _, _, *vectors = cast(draw((1, 16), 0), torch.float32, device)

    def plain(x: Tensor, residual: Tensor, seed: Tensor | None) -> Tensor:
        weight, bias, x_bias = vectors
        return dropout_add_layer_norm(x, residual, weight, bias, x_bias=x_bias, dropout_p=0.2, seed=seed)

    compiled = torch.compile(plain, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (12, 7, 30):
        x, residual = torch.randn(2, rows, 16, device=device, requires_grad=True)
        leaves, seed = [x, residual, *vectors], torch.tensor([rows], device=device)
        expected, found = (torch.autograd.grad(f(x, residual, seed).sum(), leaves) for f in (plain, compiled))
        assert all(map(torch.equal, found, expected))
    assert counters["stats"]["unique_graphs"] == 1
    assert not torch.equal(compiled(x, residual, None), compiled(x, residual, None)), (
        "it must draw anew each call"
    )


def test_cuda_graph_replays(device: str) -> None:
    if device != "cuda":
        pytest.skip("CUDA graphs need a GPU")
    operands = cast(draw((40, 64), 0), torch.bfloat16, device)
    dy, seed = torch.ones(40, 64, device=device).bfloat16(), torch.tensor([1], device=device)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        ours(operands, dy, dropout_p=0.1, seed=seed)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ours(operands, dy, dropout_p=0.1, seed=seed)
    seed.fill_(2)
    graph.replay()
    assert all(map(torch.equal, captured, ours(operands, dy, dropout_p=0.1, seed=2)))


def test_autocast(device: str) -> None:
    operands = cast(draw((12, 32), 0), torch.float32, device)[:4]
    with torch.autocast(device, torch.bfloat16):
        y = dropout_add_layer_norm(*operands)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, dropout_add_layer_norm(*(x.bfloat16() for x in operands)))
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(y.float().sum(), operands))


def wrong(device: str) -> list[tuple[str, type[Exception], dict]]:
    return [
        (r"x must be \[..., hidden\]", ValueError, {"x": torch.tensor(1.0, device=device)}),
        (r"x must be \[..., hidden\]", ValueError, {"x": torch.empty(3, 0, device=device)}),
        (
            r"residual must be \[4, 8\] for x \[4, 8\], found \[8, 4\]",
            ValueError,
            {"residual": torch.randn(8, 4, device=device)},
        ),
        (r"weight must be \[8\]", ValueError, {"weight": torch.randn(7, device=device)}),
        (r"bias must be \[8\]", ValueError, {"bias": torch.randn(1, 8, device=device)}),
        (r"x_bias must be \[8\]", ValueError, {"x_bias": torch.randn(9, device=device)}),
        ("weight must be a tensor, found None", TypeError, {"weight": None}),
        (
            "residual is torch.float64, x is torch.float32",
            TypeError,
            {"residual": torch.randn(4, 8, device=device).double()},
        ),
        (
            "x_bias is torch.bfloat16, x is torch.float32",
            TypeError,
            {"x_bias": torch.randn(8, device=device).bfloat16()},
        ),
        ("x must be float32, float64", TypeError, {"x": torch.ones(4, 8, device=device).int()}),
        ("bias is on meta", ValueError, {"bias": torch.randn(8, device="meta")}),
        (r"dropout_p must be in \[0, 1\), found 1.0", ValueError, {"dropout_p": 1.0}),
        ("eps must not be negative, found -1e-05", ValueError, {"eps": -1e-5}),
        ("eps must not be negative, found nan", ValueError, {"eps": float("nan")}),
        ("seed must be an int or an int64 tensor", TypeError, {"seed": torch.tensor([1.0], device=device)}),
    ]


def test_wrong_arguments_are_named(device: str) -> None:
    right = dict(zip(NAMES, cast(draw((4, 8), 0), torch.float32, device), strict=True))
    for message, error, change in wrong(device):
        with pytest.raises(error, match=message):
            dropout_add_layer_norm(**{**right, **change})
