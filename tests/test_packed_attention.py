"""packed_attention on the devices that are there, against float64 and the eager reference.

MTFAST_TEST_SWEEP=full runs all 300 random batches in each dtype and head_dim, otherwise 13.
"""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from devices import DEVICES, needs_cuda
from packed_attention_cases import (
    DTYPES,
    HEAD_DIMS,
    SEED,
    check_a_sequence_does_not_notice_the_others,
    check_dropout,
    check_large_scores,
    check_mean_over_seeds,
    check_random_batches,
    check_what_is_not_finite,
    make_batch,
    offsets,
)
from packed_attention_cases import (
    run_op as run,
)
from torch import Tensor

from mtfast.ops import (
    PackedSelfAttention,
    packed_attention,
    packed_attention_cls,
    packed_attention_qkv,
    packed_attention_ref,
)

ops = torch.ops.mtfast


def random_numbers(full_sweep: bool, head_dim: int) -> range:
    """Of random batches. A step of 23 meets every layout, length and dropout that they take turns in."""
    return range(300) if full_sweep else range(HEAD_DIMS.index(head_dim), 300, 23)


@pytest.mark.sweep
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_random_batches_match_float64(dtype, head_dim, device, full_sweep):
    check_random_batches(run, random_numbers(full_sweep, head_dim), head_dim, dtype, device=device)


@pytest.mark.sweep
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_query_a_sequence(dtype, head_dim, device, full_sweep):
    numbers = random_numbers(full_sweep, head_dim)
    check_random_batches(run, numbers, head_dim, dtype, cls=True, device=device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("scale", [0.0, -0.3, 1.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_softmax_scale(dtype, scale, device):
    """On lengths of every kernel: what masks keys that are not there must not be scaled."""
    batch = make_batch([5, 33, 70, 130], 1, 64, dtype, device=device)

    def results(function, wide: torch.dtype) -> list[Tensor]:
        leaves = [x.detach().to(wide).requires_grad_() for x in batch.tensors]
        out = function(*leaves, batch.cu_seqlens, batch.max_seqlen, softmax_scale=scale)
        out = out[0] if isinstance(out, tuple) else out
        return [out.detach(), *torch.autograd.grad(out, leaves, batch.dout.to(wide))]

    ours, eagers = results(packed_attention, dtype), results(packed_attention_ref, dtype)
    for x, eager, exact in zip(ours, eagers, results(packed_attention_ref, torch.float64), strict=True):
        error, usual = ((y.double() - exact).norm() for y in (x, eager))
        assert error <= 2 * usual + torch.finfo(dtype).eps * exact.norm(), f"{error:.3g}, eager {usual:.3g}"


@pytest.mark.parametrize("device", DEVICES)
def test_one_query_is_the_first_row_of_all(device):
    batch = make_batch([7, 1, 40], 3, 64, torch.float32, device=device)
    q, k, v = batch.tensors
    first = batch.cu_seqlens[:-1].long()
    every = packed_attention(q, k, v, batch.cu_seqlens, 40, dropout_p=0.2, seed=SEED)
    cls = packed_attention_cls(q[first], k, v, batch.cu_seqlens, 40, dropout_p=0.2, seed=SEED)
    torch.testing.assert_close(cls, every[first], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("max_seqlen", [141, 2**31 - 1, 2**32 + 5])
def test_max_seqlen_may_be_any_bound(max_seqlen, device):
    batch = make_batch([20, 3, 140, 40], 2, 64, torch.bfloat16, device=device)
    bounded = dataclasses.replace(batch, lengths=(max_seqlen,))
    assert all(map(torch.equal, run(batch, 0.1), run(bounded, 0.1)))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("head_dim", [64, 80])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fused_projection_is_the_same_bit_for_bit(dtype, head_dim, device):
    batch = make_batch([9, 0, 70, 3], 2, head_dim, dtype, layout="fused", device=device)
    qkv = torch.stack(batch.tensors, 1).requires_grad_()
    out = packed_attention_qkv(qkv, batch.cu_seqlens, 70, dropout_p=0.1, seed=SEED)
    (grad,) = torch.autograd.grad(out, qkv, batch.dout)
    wanted = run(batch, 0.1)
    assert torch.equal(out.cpu(), wanted[0])
    assert torch.equal(grad.cpu(), torch.stack(wanted[2:], 1))


def test_gradcheck():
    cu = offsets([3, 0, 5])
    q, k, v = (torch.randn(8, 1, 32, dtype=torch.float64, requires_grad=True) for _ in range(3))
    for dropout_p in (0.0, 0.3):
        options = {"dropout_p": dropout_p, "seed": SEED}
        assert torch.autograd.gradcheck(lambda *x, o=options: packed_attention(*x, cu, 5, **o), (q, k, v))
        assert torch.autograd.gradcheck(
            lambda x, *kv, o=options: packed_attention_cls(x[:3], *kv, cu, 5, **o), (q, k, v)
        )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("cls", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_scores(dtype, cls, device):
    rounded = device == "cuda" and dtype != torch.float32 and not cls
    check_large_scores(run, dtype, cls=cls, device=device, products_in_16_bits=rounded)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("cls", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inf_and_nan_are_where_eager_has_them(dtype, cls, device):
    check_what_is_not_finite(run, dtype, cls=cls, device=device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("length", [5, 19, 33, 100, 150])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_score_of_minus_infinity_spoils_no_other_key(dtype, length, device):
    """Nor do places of queries that are not there, in which it would be NaN."""
    batch = make_batch([length], 1, 32, dtype, device=device)
    batch.q[:, 0, 3], batch.k[-1, 0, 3] = 1, -math.inf
    out, _, _, dk, dv = run(batch)
    assert all(x.isfinite().all() for x in (out, dk, dv)) and (dv[-1] == 0).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 0.9])
def test_dropout_keeps_what_the_reference_says(dropout_p, device):
    check_dropout(run, dropout_p, device=device)


@pytest.mark.parametrize("device", DEVICES)
def test_mean_over_seeds_is_the_undropped_result(device):
    check_mean_over_seeds(run, 2000, device)


@pytest.mark.parametrize("device", DEVICES)
def test_torch_manual_seed_governs_dropout(device):
    batch = make_batch([12, 5], 1, 32, torch.float32, device=device)

    def draw(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return packed_attention(*batch.tensors, batch.cu_seqlens, 12, dropout_p=0.5)

    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_sequence_does_not_notice_the_others(dtype, device):
    check_a_sequence_does_not_notice_the_others(run, dtype, device)


@pytest.mark.parametrize("layout", ["apart", "cls"])
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_deterministic_whatever_the_threads(dtype, device, layout):
    batch = make_batch([40, 1, 300, 17], 3, 64, dtype, layout=layout, device=device)
    first = run(batch, 0.1)
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            again = run(batch, 0.1)
            assert all(a is b is None or torch.equal(a, b) for a, b in zip(first, again, strict=True))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device):
    batch = make_batch([5, 0, 17], 2, 32, torch.float32, device=device)
    seed = torch.tensor([SEED % 2**62], device=device)
    q, k, v = (x.requires_grad_() for x in batch.tensors)
    qkv = torch.stack((q, k, v), 1).detach().requires_grad_()
    tail = (batch.cu_seqlens, 17, 0.1, 0.2, seed)
    torch.library.opcheck(ops.packed_attention.default, (q, k, v, *tail))
    torch.library.opcheck(ops.packed_attention_qkv.default, (qkv, *tail))
    torch.library.opcheck(ops.packed_attention_cls.default, (q[:3].detach().requires_grad_(), k, v, *tail))


@pytest.mark.parametrize("hidden", [64, 80])
@pytest.mark.parametrize("one_query", [False, True])
@pytest.mark.parametrize("dynamic", [True, None])
@pytest.mark.parametrize("device", DEVICES)
def test_compiles_once_for_changing_batches(device, dynamic, one_query, hidden):
    """Or, where torch is to find out by itself what changes, twice."""
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    module = PackedSelfAttention(hidden, 2, dropout_p=0.1).to(device)
    compiled = torch.compile(module, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for number, lengths in enumerate(([5, 6], [7, 8, 9], [20, 3, 1, 1], [64, 2, 7, 7, 7], [3] * 9)):
        cu = offsets(lengths).to(device)
        rows = cu[:-1].long() if one_query else None
        x = torch.randn(sum(lengths), hidden, device=device)
        seed = torch.tensor([number], device=device)
        out = compiled(x, cu, max(lengths), seed=seed, cls_rows=rows)
        torch.testing.assert_close(out, module(x, cu, max(lengths), seed=seed, cls_rows=rows))
        out.sum().backward()
    assert counters["stats"]["unique_graphs"] == (1 if dynamic else 2)


@pytest.mark.parametrize("one_query", [False, True])
def test_export(one_query):
    module = PackedSelfAttention(64, 2).eval()

    def arguments(lengths: list[int]) -> tuple:
        cu = offsets(lengths)
        rows = cu[:-1].long() if one_query else None
        return (torch.randn(sum(lengths), 64), cu, max(lengths)), {"cls_rows": rows}

    auto = torch.export.Dim.AUTO
    shapes = ({0: auto}, {0: auto}, auto)
    args, kwargs = arguments([5, 6, 2])
    exported = torch.export.export(
        module, args, kwargs, dynamic_shapes=(*shapes, {0: auto} if one_query else None)
    ).module()
    for lengths in ([5, 6, 2], [7, 80, 9, 1]):
        args, kwargs = arguments(lengths)
        torch.testing.assert_close(exported(*args, **kwargs), module(*args, **kwargs))


def test_torch_func():
    """functional_call, vmap, grad, vjp and per-sample gradients; jvp has no formula."""
    batch = make_batch([5, 9], 2, 32, torch.float32)
    cu, max_seqlen = batch.cu_seqlens, batch.max_seqlen
    stacked = [torch.stack((x, 2 * x)) for x in batch.tensors]
    out = torch.func.vmap(lambda *qkv: packed_attention(*qkv, cu, max_seqlen))(*stacked)
    for i in range(2):
        assert torch.equal(out[i], packed_attention(*(x[i] for x in stacked), cu, max_seqlen))

    module, twin, x = PackedSelfAttention(64, 2), PackedSelfAttention(64, 2), torch.randn(14, 64)
    out = torch.func.functional_call(module, dict(twin.named_parameters()), (x, cu, max_seqlen))
    assert torch.equal(out, twin(x, cu, max_seqlen))

    def loss(*qkv: Tensor) -> Tensor:
        return packed_attention(*qkv, cu, max_seqlen, dropout_p=0.2, seed=1).square().sum()

    leaves = [x.clone().requires_grad_() for x in batch.tensors]
    wanted = torch.autograd.grad(loss(*leaves), leaves)
    gradient = torch.func.grad(loss, (0, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(gradient(*batch.tensors), wanted, strict=True))
    _, pull = torch.func.vjp(loss, *batch.tensors)
    assert all(torch.equal(a, b) for a, b in zip(pull(torch.tensor(1.0)), wanted, strict=True))
    each = torch.func.vmap(gradient)(*stacked)
    for i in range(2):
        alone = gradient(*(x[i] for x in stacked))
        assert all(torch.equal(a[i], b) for a, b in zip(each, alone, strict=True))


@needs_cuda
@pytest.mark.gpu
def test_cuda_graph_capture():
    batch = make_batch([9, 30, 64], 4, 64, torch.bfloat16, device="cuda")
    q, k, v = (x.requires_grad_() for x in batch.tensors)
    seed = torch.tensor([1], device="cuda")

    def step(seed: int | Tensor) -> list[Tensor]:
        out = packed_attention(q, k, v, batch.cu_seqlens, 64, dropout_p=0.1, seed=seed)
        return [out, *torch.autograd.grad(out, (q, k, v), batch.dout)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(seed)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(seed)
    seed.fill_(2)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, step(2), strict=True))


@needs_cuda
@pytest.mark.gpu
def test_a_captured_graph_draws_anew():
    """Without a seed; one that is a number of the host is refused."""
    batch = make_batch([64], 4, 64, torch.bfloat16, device="cuda")

    def step(seed: int | None = None) -> Tensor:
        return packed_attention(*batch.tensors, batch.cu_seqlens, 64, dropout_p=0.5, seed=seed)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
        with pytest.raises(RuntimeError, match="while a CUDA graph is captured"):
            step(3)
    graph.replay()
    first = captured.clone()
    graph.replay()
    assert not torch.equal(captured, first)


@pytest.mark.parametrize("device", DEVICES)
def test_autocast(device):
    batch = make_batch([5, 9], 2, 32, torch.float32, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert packed_attention(*batch.tensors, batch.cu_seqlens, 9).dtype == torch.bfloat16


@pytest.mark.parametrize("device", DEVICES)
def test_empty(device):
    for lengths in ([], [0, 0]):
        x = torch.zeros(0, 2, 32, requires_grad=True, device=device)
        cu = offsets(lengths).to(device)
        packed_attention(x, x, x, cu, 0).sum().backward()
        q = torch.zeros(len(lengths), 2, 32, device=device)
        assert (packed_attention_cls(q, x, x, cu, 0) == 0).all()
