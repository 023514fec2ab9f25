"""concat_mlp against eager PyTorch in float64, on every device there is.

MTFAST_TEST_SWEEP=full runs all 200 random cases in each dtype and 20 large ones, otherwise 29 and 7.
"""

from __future__ import annotations

import pytest
import torch
from concat_mlp_cases import (
    DTYPES,
    NAMES,
    by,
    cast,
    check_dropout,
    check_mean_over_seeds,
    check_random_cases,
    check_sums,
    draw,
)
from devices import DEVICES
from torch import Tensor, nn

from mtfast.ops import ConcatMLP, concat_mlp, concat_mlp_ref
from mtfast.ops.concat_mlp import ACTIVATIONS, dropout_keep

pytestmark = pytest.mark.parametrize("device", DEVICES)


@pytest.mark.sweep
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_is_at_most_twice_eagers(dtype: torch.dtype, device: str, full_sweep: bool) -> None:
    check_random_cases(by(concat_mlp), range(0, 200, 1 if full_sweep else 7), dtype, device)


@pytest.mark.sweep
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_batches(dtype: torch.dtype, device: str, full_sweep: bool) -> None:
    """Which on the CPU go through blocks of rows, forward and backward."""
    numbers = range(0, 20, 1 if full_sweep else 3)
    check_random_cases(by(concat_mlp), numbers, dtype, device, batches=(511, 512, 513, 1100))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_over_thousands_of_rows(dtype: torch.dtype, device: str) -> None:
    """Which go through several blocks and, within one, several depths."""
    exact = draw(4203, 96, 70, 2, seed=5)
    dy = torch.randn(4203, 2, dtype=torch.float64)
    options = {"activation": "tanh", "dropout_p": 0.1, "seed": 3}
    wide = [x.to(dtype).double().requires_grad_() for x in exact]
    truths = by(concat_mlp_ref)(wide, dy.to(dtype).double(), **options)
    ours, eagers = (
        by(f)(cast(exact, dtype, device), dy.to(device, dtype), **options)
        for f in (concat_mlp, concat_mlp_ref)
    )
    for name, x, e, truth in zip(("y", *NAMES), ours, eagers, truths, strict=True):
        error, usual = ((found.cpu().double() - truth).norm() for found in (x, e))
        assert error <= 2 * usual, f"{name}: {error:.3g}, eager {usual:.3g}"


@pytest.mark.parametrize("batch", [1100, 4203, 20000])
def test_sums_over_rows(batch: int, device: str) -> None:
    check_sums(by(concat_mlp), batch, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_gradients_the_output_is_the_same(dtype: torch.dtype, device: str) -> None:
    """Though the hidden layer, which nobody needs then, is not kept."""
    operands = cast(draw(1100, 64, 96, 3, seed=1), dtype, device)
    rows = torch.randperm(1100, device=device)
    kept = concat_mlp(*operands, u_rows=rows, dropout_p=0.1, seed=1)
    with torch.no_grad():
        assert torch.equal(concat_mlp(*operands, u_rows=rows, dropout_p=0.1, seed=1), kept)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(activation: str, device: str) -> None:
    if device != "cpu":
        pytest.skip("float64 is for the CPU")
    operands = cast(draw(5, 3, 37, 2, seed=1), torch.float64, device)
    rows = torch.tensor([0, 0, 3], device=device), torch.tensor([1, 2, 4], dtype=torch.int32, device=device)

    def plain(*x: Tensor) -> Tensor:
        return concat_mlp(*x, activation=activation, dropout_p=0.3, seed=1)

    def gathered(*x: Tensor) -> Tensor:
        return concat_mlp(*x, activation=activation, u_rows=rows[0], v_rows=rows[1])

    assert torch.autograd.gradcheck(plain, operands)
    assert torch.autograd.gradcheck(gathered, operands)


@pytest.mark.parametrize("dropout_p", [0.1, 0.5])
def test_dropout_is_the_documented_draw(dropout_p: float, device: str) -> None:
    for seed in (7, -(2**62), 2**63 - 1):
        check_dropout(by(concat_mlp), dropout_p, seed, device)


def test_dropout_is_independent_between_seeds_and_neighbours(device: str) -> None:
    keep, other = dropout_keep(512, 768, 0.1, 3), dropout_keep(512, 768, 0.1, 4)
    n = keep.numel()
    assert abs((~keep & ~other).sum().item() / n - 0.01) < 4 * (0.0099 / n) ** 0.5
    for neighbours in (~keep[:, 1:] & ~keep[:, :-1], ~keep[1:] & ~keep[:-1]):
        # Pairs overlap, so their errors add up: (0.01 - 0.0001 + 2 * (0.001 - 0.0001)) / n.
        assert abs(neighbours.double().mean().item() - 0.01) < 4 * (0.0117 / n) ** 0.5


def test_mean_over_seeds_is_the_undropped_result(device: str) -> None:
    check_mean_over_seeds(by(concat_mlp), 2000, device)


def test_seed_behaviour(device: str) -> None:
    operands = cast(draw(40, 16, 100, 2, seed=0), torch.float32, device, (False,) * 6)

    def run(**options) -> Tensor:
        return concat_mlp(*operands, dropout_p=0.3, **options)

    as_tensor = torch.tensor([11], device=device)
    assert torch.equal(run(seed=11), run(seed=11))
    assert torch.equal(run(seed=11), run(seed=as_tensor))
    assert not torch.equal(run(seed=11), run(seed=12))
    torch.manual_seed(5)
    first, second = run(), run()
    torch.manual_seed(5)
    assert torch.equal(run(), first)
    assert not torch.equal(first, second)
    assert torch.equal(run(training=False), concat_mlp(*operands))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_result_does_not_depend_on_threads_or_on_the_rest_of_the_batch(
    dtype: torch.dtype, device: str
) -> None:
    if device != "cpu":
        pytest.skip("threads are the CPU's")
    operands = cast(draw(1100, 32, 200, 2, seed=0), dtype, device)
    dy = torch.randn(1100, 2, dtype=torch.float64).to(dtype)
    tolerance = 8 * torch.finfo(dtype).eps  # of torch's library, where the products are its
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(by(concat_mlp)(operands, dy, dropout_p=0.2, seed=9))
    finally:
        torch.set_num_threads(before)
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, rtol=tolerance, atol=tolerance * one.abs().max().item())
    head = concat_mlp(operands[0][:50], operands[1][:50], *operands[2:], dropout_p=0.2, seed=9)
    torch.testing.assert_close(head, results[0][0][:50], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_lies_between_rows_is_not_read(dtype: torch.dtype, device: str) -> None:
    """It is NaN here; and no size is a multiple of what is computed at a time."""
    operands, dy = cast(draw(45, 74, 106, 3, seed=4), dtype, device), torch.randn(45, 3, device=device)
    apart = [
        torch.nn.functional.pad(x.detach(), (3, 3, 1, 1), value=float("nan"))[1:-1, 3:-3]
        for x in operands[:2]
    ]
    apart = [*(x.requires_grad_() for x in apart), *operands[2:]]
    for ours, expected in zip(
        by(concat_mlp)(apart, dy.to(dtype)), by(concat_mlp)(operands, dy.to(dtype)), strict=True
    ):
        assert ours.isfinite().all()
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_passes_are_bit_identical(dtype: torch.dtype, device: str) -> None:
    exact = draw(50, 72, 130, 3, seed=2, rows=20)
    rows = {name: torch.randint(20, (50,), device=device) for name in ("u_rows", "v_rows")}
    operands, dy = cast(exact, dtype, device), torch.randn(50, 3, device=device).to(dtype)
    first, second = (by(concat_mlp)(operands, dy, dropout_p=0.1, seed=1, **rows) for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_each_gradient_alone(device: str) -> None:
    exact, dy = draw(20, 24, 70, 3, seed=2), torch.randn(20, 3, device=device)
    options = {"dropout_p": 0.1, "seed": 1}
    everything = by(concat_mlp)(cast(exact, torch.float32, device), dy, **options)[1:]
    for i, name in enumerate(NAMES):
        needs = tuple(j == i for j in range(6))
        alone = by(concat_mlp)(cast(exact, torch.float32, device, needs), dy, **options)[1]
        torch.testing.assert_close(alone, everything[i], msg=name)


def test_rows_of_one_matrix_strided_and_repeated(device: str) -> None:
    """As the pair head uses it: both sides gathered from the [CLS] rows of a wider tensor."""
    states = torch.randn(9, 3, 64, device=device, requires_grad=True)
    u_rows, v_rows = torch.tensor([0, 2, 2, 8], device=device), torch.tensor([1, 3, 0, 8], device=device)
    weights = cast(draw(1, 64, 48, 2, seed=3), torch.float32, device)[2:]
    grads = []
    for function in (concat_mlp, concat_mlp_ref):
        cls = states[:, 0]
        y = function(cls, cls, *weights, u_rows=u_rows, v_rows=v_rows, activation="tanh")
        grads.append(torch.autograd.grad(y.square().sum(), [states, *weights]))
    for ours, eager in zip(*grads, strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_empty_batch(dtype: torch.dtype, device: str) -> None:
    operands = cast(draw(0, 16, 20, 2, seed=0), dtype, device)
    y, *grads = by(concat_mlp)(operands, torch.empty(0, 2, device=device, dtype=dtype), dropout_p=0.1)
    assert y.shape == (0, 2)
    for grad, operand in zip(grads, operands, strict=True):
        assert grad.shape == operand.shape and not grad.any()


def test_nan_and_inf_pass_through(device: str) -> None:
    operands = cast(draw(4, 16, 40, 2, seed=0), torch.float32, device, (False,) * 6)
    operands[0][1, 3], operands[0][2, 3] = float("nan"), float("inf")
    for activation in ACTIVATIONS:
        ours, eager = (f(*operands, activation=activation) for f in (concat_mlp, concat_mlp_ref))
        torch.testing.assert_close(ours, eager, equal_nan=True, rtol=1e-4, atol=1e-5)


def test_opcheck(device: str) -> None:
    operands = cast(draw(6, 16, 40, 2, seed=0), torch.float32, device)
    rows, seed = torch.tensor([1, 1, 0], device=device), torch.tensor([3], device=device)
    op = torch.ops.mtfast.concat_mlp.default
    torch.library.opcheck(op, (*operands, None, None, 1, 0.1, seed, True))
    torch.library.opcheck(op, (*operands, rows, rows.int(), 2, 0.0, None, True))
    u, v, weight1, _, weight2, _ = (x.detach() for x in operands)
    dy, z = torch.randn(6, 2, device=device), torch.randn(6, 40, device=device)
    backward = torch.ops.mtfast.concat_mlp_backward.default
    for needs in (0, 1, 6, 7):
        torch.library.opcheck(backward, (dy, u, v, weight1, weight2, z, None, None, 0, 0.1, seed, needs))


def test_compiles_without_a_graph_break(device: str) -> None:
    module = ConcatMLP(16, 40, 2, "gelu", dropout_p=0.2).to(device)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    u, v = (torch.randn(12, 16, device=device, requires_grad=True) for _ in range(2))
    seed = torch.tensor([4], device=device)
    for expected, found in zip(
        torch.autograd.grad(module(u, v, seed=seed).sum(), [u, v, *module.parameters()]),
        torch.autograd.grad(compiled(u, v, seed=seed).sum(), [u, v, *module.parameters()]),
        strict=True,
    ):
        torch.testing.assert_close(found, expected)
    assert not torch.equal(compiled(u, v), compiled(u, v)), "a compiled module must draw anew each call"


def test_compiles_once_for_changing_batches(device: str) -> None:
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    module = ConcatMLP(16, 40, 2, dropout_p=0.2).to(device)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in (12, 7, 30):
        u, v = torch.randn(batch, 16, device=device), torch.randn(batch, 16, device=device)
        seed = torch.tensor([batch], device=device)
        y = compiled(u, v, seed=seed)
        torch.testing.assert_close(y, module(u, v, seed=seed))
        y.sum().backward()
    assert counters["stats"]["unique_graphs"] == 1


def test_export(device: str) -> None:
    module = ConcatMLP(16, 40, 2).to(device).eval()
    auto = {0: torch.export.Dim.AUTO}
    u, v = torch.randn(2, 11, 16, device=device)
    exported = torch.export.export(module, (u[:4], v[:4]), dynamic_shapes=(auto, auto)).module()
    for batch in (4, 11):
        torch.testing.assert_close(exported(u[:batch], v[:batch]), module(u[:batch], v[:batch]))
    rows = torch.tensor([1, 1, 0, 7], device=device), torch.tensor([3, 4, 10, 0], device=device)
    exported = torch.export.export(
        module, (u, v, *(x[:3] for x in rows)), dynamic_shapes=(None, None, auto, auto)
    ).module()
    torch.testing.assert_close(exported(u, v, *rows), module(u, v, *rows))


def test_cuda_graph_replays(device: str) -> None:
    if device != "cuda":
        pytest.skip("CUDA graphs need a GPU")
    operands = cast(draw(40, 64, 96, 2, seed=0), torch.bfloat16, device)
    dy, seed = torch.ones(40, 2, device=device).bfloat16(), torch.tensor([1], device=device)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        by(concat_mlp)(operands, dy, dropout_p=0.1, seed=seed)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = by(concat_mlp)(operands, dy, dropout_p=0.1, seed=seed)
    seed.fill_(2)
    graph.replay()
    assert all(map(torch.equal, captured, by(concat_mlp)(operands, dy, dropout_p=0.1, seed=2)))


def test_autocast(device: str) -> None:
    operands = cast(draw(12, 32, 40, 2, seed=0), torch.float32, device)
    with torch.autocast(device, torch.bfloat16):
        y = concat_mlp(*operands)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, concat_mlp(*cast(operands, torch.bfloat16, device)))
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(y.float().sum(), operands))


def test_module(device: str) -> None:
    torch.manual_seed(0)
    module = ConcatMLP(32, 20, 2, "tanh", dropout_p=0.5).to(device)
    torch.manual_seed(0)
    eager = nn.ModuleDict({"dense": nn.Linear(64, 20), "out_proj": nn.Linear(20, 2)}).to(device)
    assert list(module.state_dict()) == ["dense.weight", "dense.bias", "out_proj.weight", "out_proj.bias"]
    for name, value in eager.state_dict().items():
        assert torch.equal(module.state_dict()[name], value)
    u, v = torch.randn(6, 32, device=device), torch.randn(6, 32, device=device)
    with torch.no_grad():
        expected = eager["out_proj"](torch.tanh(eager["dense"](torch.cat([u, v], 1))))
        torch.testing.assert_close(module.eval()(u, v), expected)
        assert not torch.allclose(module.train()(u, v), expected)
        rows = torch.tensor([5, 0], device=device)
        torch.testing.assert_close(module.eval()(u, v, rows, rows), expected[rows])


def wrong(device: str) -> list[tuple[str, type[Exception], dict]]:
    rows = torch.tensor([0, 1], device=device)
    return [
        ("v must be", ValueError, {"v": torch.randn(4, 9, device=device)}),
        ("weight1 must be", ValueError, {"weight1": torch.randn(5, 17, device=device)}),
        ("bias1 must be", ValueError, {"bias1": torch.randn(4, device=device)}),
        ("weight2 must be", ValueError, {"weight2": torch.randn(2, 6, device=device)}),
        ("bias2 must be", ValueError, {"bias2": torch.randn(3, device=device)}),
        ("u has the wrong number of dim", ValueError, {"u": torch.randn(4, 8, 1, device=device)}),
        ("outputs must be 1 to 8", ValueError, {"weight2": torch.randn(9, 5, device=device)}),
        ("u gives 4 rows and v gives 2", ValueError, {"v_rows": rows}),
        ("u gives 4 rows and v gives 3", ValueError, {"v": torch.randn(3, 8, device=device)}),
        ("u_rows must be int32 or int64", TypeError, {"u_rows": rows.float(), "v_rows": rows}),
        ("u_rows must be \\[batch\\]", ValueError, {"u_rows": rows[None], "v_rows": rows[:1]}),
        (
            "v is torch.float64, u is torch.float32",
            TypeError,
            {"v": torch.randn(4, 8, device=device).double()},
        ),
        ("bias2 is torch.bfloat16", TypeError, {"bias2": torch.randn(2, device=device).bfloat16()}),
        ("activation must be one of relu, gelu, tanh, found 'silu'", ValueError, {"activation": "silu"}),
        ("dropout_p must be in \\[0, 1\\), found 1.0", ValueError, {"dropout_p": 1.0}),
        ("dropout_p must be in \\[0, 1\\), found -0.1", ValueError, {"dropout_p": -0.1}),
        ("weight1 is on meta", ValueError, {"weight1": torch.randn(5, 16, device="meta")}),
        ("u_rows is on meta", ValueError, {"u_rows": rows.to("meta"), "v_rows": rows}),
        ("seed must be an int or an int64 tensor", TypeError, {"seed": torch.tensor([1.0], device=device)}),
    ]


def test_wrong_arguments_are_named(device: str) -> None:
    right = dict(zip(NAMES, cast(draw(4, 8, 5, 2, seed=0), torch.float32, device), strict=True))
    for message, error, change in wrong(device):
        with pytest.raises(error, match=message):
            concat_mlp(**{**right, **change})
    with pytest.raises(TypeError, match="must be float"):
        concat_mlp(**{name: x.detach().int() for name, x in right.items()})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_row_indices_out_of_range(dtype: torch.dtype, device: str) -> None:
    operands = cast(draw(4, 8, 5, 2, seed=0), dtype, device, (False,) * 6)
    good = torch.tensor([0, 3], device=device)
    for bad in (4, -1):
        bad_rows = torch.tensor([1, bad], dtype=torch.int32, device=device)
        if device == "cpu":
            with pytest.raises(RuntimeError, match=f"v_rows\\[1\\] is {bad}, but v has 4 rows"):
                concat_mlp(*operands, u_rows=good, v_rows=bad_rows)
        else:
            y = concat_mlp(*operands, u_rows=good, v_rows=bad_rows)
            assert y[1].isnan().all() and not y[0].isnan().any()
