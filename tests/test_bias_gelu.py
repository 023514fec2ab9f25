"""bias_gelu against eager PyTorch in float64, on every device there is."""

from __future__ import annotations

import pytest
import torch
from bias_gelu_cases import (
    DTYPES,
    by,
    check_errors,
    check_every_number,
    check_extremes,
    check_sums,
    draw,
)
from devices import DEVICES
from torch import Tensor

from mtfast.ops import bias_gelu, bias_gelu_ref

pytestmark = pytest.mark.parametrize("device", DEVICES)
run = by(bias_gelu)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_is_at_most_twice_eagers(dtype: torch.dtype, device: str) -> None:
    check_errors(run, dtype, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_number(dtype: torch.dtype, device: str) -> None:
    check_every_number(run, dtype, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extremes_nan_and_inf(dtype: torch.dtype, device: str) -> None:
    check_extremes(run, dtype, device)


@pytest.mark.parametrize("rows", [1100, 4203, 40_000])
def test_sums_over_rows(rows: int, device: str) -> None:
    check_sums(run, rows, device)


def test_gradcheck(device: str) -> None:
    if device != "cpu":
        pytest.skip("float64 is for the CPU")
    x, bias, _ = draw(4, 37, torch.float64)
    leaves = [t.requires_grad_() for t in (x.view(2, 2, 37), bias)]
    assert torch.autograd.gradcheck(bias_gelu, leaves)
    assert torch.autograd.gradcheck(bias_gelu, leaves[:1])


def test_float64_is_eagers(device: str) -> None:
    if device != "cpu":
        pytest.skip("float64 is for the CPU")
    operands = draw(70, 96, torch.float64)
    for ours, eager in zip(run(*operands), by(bias_gelu_ref)(*operands), strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=str)
def test_threads_and_repetition_do_not_matter(dtype: torch.dtype, device: str) -> None:
    if device != "cpu" and dtype == torch.float64:
        pytest.skip("float64 is for the CPU")
    operands = draw(300, 264, dtype, device)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            results.append(run(*operands))
    finally:
        torch.set_num_threads(before)
    for one, *others in zip(*results, strict=True):
        assert all(torch.equal(one, other) for other in others)


def test_rows_do_not_depend_on_the_rest_of_the_batch(device: str) -> None:
    x, bias, _ = draw(70, 96, torch.bfloat16, device)
    assert torch.equal(bias_gelu(x[40:], bias), bias_gelu(x, bias)[40:])


def test_each_gradient_alone(device: str) -> None:
    x, bias, dy = draw(40, 33, torch.float32, device)
    _, *both = run(x, bias, dy)
    for i, wanted in enumerate(both):
        leaves = [t.detach().requires_grad_(i == j) for j, t in enumerate((x, bias))]
        (alone,) = torch.autograd.grad(bias_gelu(*leaves), leaves[i], dy)
        assert torch.equal(alone, wanted)


def test_any_layout_and_number_of_dimensions(device: str) -> None:
    x, bias, dy = draw(24, 40, torch.float32, device)
    expected = run(x, bias, dy)
    strided = x.t().contiguous().t()
    spread = torch.stack([bias, bias], 1)[:, 0]
    assert not strided.is_contiguous() and not spread.is_contiguous()
    assert all(map(torch.equal, run(strided, spread, dy.t().contiguous().t()), expected))
    y, dx, dbias = run(x.view(2, 3, 4, 40), bias, dy.view(2, 3, 4, 40))
    assert all(map(torch.equal, (y.view(24, 40), dx.view(24, 40), dbias), expected))
    assert torch.equal(run(x[0], bias, dy[0])[0], expected[0][0])
    expanded = torch.ones((), device=device).expand(24, 40)
    assert all(map(torch.equal, run(x, bias, expanded), run(x, bias, expanded.contiguous())))


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0,), (2, 0, 4)], ids=str)
def test_empty(shape: tuple[int, ...], device: str) -> None:
    for dtype in DTYPES:
        x = torch.zeros(shape, dtype=dtype, device=device)
        y, dx, dbias = run(x, torch.ones(shape[-1], dtype=dtype, device=device), x)
        assert y.shape == dx.shape == x.shape and dbias.shape == shape[-1:] and not dbias.any()
        assert run(x, None, x)[0].shape == x.shape


def test_opcheck(device: str) -> None:
    x, bias, dy = draw(6, 40, torch.float32, device)
    leaves = x.requires_grad_(), bias.requires_grad_()
    op, backward = torch.ops.mtfast.bias_gelu.default, torch.ops.mtfast.bias_gelu_backward.default
    torch.library.opcheck(op, leaves)
    torch.library.opcheck(op, (x.view(2, 3, 40), None))
    torch.library.opcheck(backward, (dy, x.detach(), bias.detach()))
    torch.library.opcheck(backward, (dy, x.detach(), None))


def test_compiles_once_for_changing_batches(device: str) -> None:
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    compiled = torch.compile(bias_gelu, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (12, 7, 30):
        operands = draw(rows, 40, torch.float32, device)
        for found, expected in zip(by(compiled)(*operands), run(*operands), strict=True):
            assert torch.equal(found, expected)
    assert counters["stats"]["unique_graphs"] == 1


def test_export(device: str) -> None:
    class Module(torch.nn.Module):
        def forward(self, x: Tensor, bias: Tensor) -> Tensor:
            return bias_gelu(x, bias)

    x, bias, _ = draw(11, 40, torch.float32, device)
    shapes = ({0: torch.export.Dim.AUTO}, None)
    exported = torch.export.export(Module(), (x[:4], bias), dynamic_shapes=shapes).module()
    for rows in (4, 11):
        assert torch.equal(exported(x[:rows], bias), bias_gelu(x[:rows], bias))


def test_cuda_graph_replays(device: str) -> None:
    if device != "cuda":
        pytest.skip("CUDA graphs need a GPU")
    operands = draw(40, 96, torch.bfloat16, device)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(*operands)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(*operands)
    operands[0].neg_()
    graph.replay()
    assert all(map(torch.equal, captured, run(*operands)))


def test_autocast(device: str) -> None:
    x, bias, _ = draw(12, 40, torch.float32, device)
    leaves = [x.requires_grad_(), bias.requires_grad_()]
    with torch.autocast(device, torch.bfloat16):
        y = bias_gelu(*leaves)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, bias_gelu(*(t.bfloat16() for t in leaves)))
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(y.float().sum(), leaves))
    with torch.autocast(device, torch.bfloat16):
        mixed = bias_gelu(x.bfloat16(), bias)  # a linear layer's output beside its parameter
    assert torch.equal(mixed, y)


def test_wrong_arguments_are_named(device: str) -> None:
    x, bias, _ = draw(4, 8, torch.float32, device)
    wrong = [
        ("x must be a tensor, found a list", TypeError, ([1.0], bias)),
        ("bias must be a tensor, found a list", TypeError, (x, [1.0])),
        (r"x must be \[..., columns\], found a tensor without dim", ValueError, (x[0, 0], None)),
        ("x must be float32, float64, bfloat16 or float16, found torch.int32", TypeError, (x.int(), None)),
        (r"bias must be \[8\] for x \[4, 8\], found \[7\]", ValueError, (x, bias[:7])),
        (r"bias must be \[8\] for x \[4, 8\], found \[4, 8\]", ValueError, (x, x)),
        ("bias is torch.float64, x is torch.float32", TypeError, (x, bias.double())),
        ("bias is on meta", ValueError, (x, bias.to("meta"))),
    ]
    for message, error, arguments in wrong:
        with pytest.raises(error, match=message):
            bias_gelu(*arguments)


def test_the_registered_ops_look_too(device: str) -> None:
    x, bias, dy = draw(4, 8, torch.float32, device)
    raw = torch.ops.mtfast
    wrong = [
        ("x must be float32, float64, bfloat16 or float16", raw.bias_gelu, (x.int(), None)),
        ("x must be contiguous", raw.bias_gelu, (x.t(), None)),
        (r"bias must be \[8\]", raw.bias_gelu, (x, bias[:7])),
        ("bias and x must be of one dtype", raw.bias_gelu, (x, bias.half())),
        ("dy must have x's shape", raw.bias_gelu_backward, (dy[:3], x, bias)),
        ("dy must be contiguous", raw.bias_gelu_backward, (dy.t().contiguous().t(), x, bias)),
        ("dy and x must be of one dtype", raw.bias_gelu_backward, (dy.half(), x, bias)),
    ]
    for message, op, arguments in wrong:
        with pytest.raises(RuntimeError, match=f"bias_gelu: {message}"):
            op(*arguments)
