"""packed_attention on the devices that are there, against float64 and the eager reference."""

from __future__ import annotations

import math

import pytest
import torch
from packed_attention_cases import SEED, Batch, assert_close_to_exact, make_batch, random_lengths
from torch import Tensor

from mtfast.ops import (
    PackedSelfAttention,
    packed_attention,
    packed_attention_cls,
    packed_attention_qkv,
)
from mtfast.ops.packed_attention import dropout_keep_ref

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
ops = torch.ops.mtfast


def run(batch: Batch, dropout_p: float = 0.0, device: str = "cpu") -> list[Tensor | None]:
    """out, lse, dq, dk, dv of the op, back on the CPU."""
    q, k, v = (x.detach().to(device).requires_grad_() for x in batch.tensors)
    cls = q.size(0) != k.size(0)
    arguments = (q, k, v, batch.cu_seqlens.to(device), batch.max_seqlen)
    lse = None
    if cls:
        out = packed_attention_cls(*arguments, dropout_p=dropout_p, seed=SEED)
    else:
        out, lse = packed_attention(*arguments, dropout_p=dropout_p, seed=SEED, return_lse=True)
    grads = torch.autograd.grad(out, (q, k, v), batch.dout.to(device))
    return [None if x is None else x.detach().cpu() for x in (out, lse, *grads)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("head_dim", [32, 64, 128])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_random_batches_match_float64(dtype, head_dim, device):
    for number in range(300):
        if number % 3 != [32, 64, 128].index(head_dim) and number % 30:
            continue  # each of 300 batches in each dtype; the long ones in every head_dim
        layout = ("apart", "fused", "sliced")[number // 3 % 3]
        batch = make_batch(random_lengths(number), 1, head_dim, dtype, seed=number, layout=layout)
        dropout_p = (0.0, 0.1)[number // 9 % 2]
        assert_close_to_exact(run(batch, dropout_p, device), batch, dropout_p)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_query_a_sequence(dtype, device):
    for number in range(12):
        lengths = random_lengths(number)
        batch = make_batch(lengths, 2, 64, dtype, seed=number, layout="cls")
        for dropout_p in (0.0, 0.1):
            got = run(batch, dropout_p, device)
            assert_close_to_exact(got, batch, dropout_p, cls=True)
            empty = torch.tensor(lengths) == 0
            assert (got[0][empty] == 0).all() and (got[2][empty] == 0).all()


@pytest.mark.parametrize("device", DEVICES)
def test_one_query_is_the_first_row_of_all(device):
    batch = make_batch([7, 1, 40], 3, 64, torch.float32)
    q, k, v = (x.to(device) for x in batch.tensors)
    cu, first = batch.cu_seqlens.to(device), batch.cu_seqlens[:-1].long()
    every = packed_attention(q, k, v, cu, 40, dropout_p=0.2, seed=SEED)
    cls = packed_attention_cls(q[first], k, v, cu, 40, dropout_p=0.2, seed=SEED)
    torch.testing.assert_close(cls, every[first], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fused_projection_is_the_same_bit_for_bit(dtype, device):
    batch = make_batch([9, 0, 70, 3], 2, 64, dtype, layout="fused")
    qkv = torch.stack(batch.tensors, 1).to(device).requires_grad_()
    cu = batch.cu_seqlens.to(device)
    out = packed_attention_qkv(qkv, cu, 70, dropout_p=0.1, seed=SEED)
    (grad,) = torch.autograd.grad(out, qkv, batch.dout.to(device))
    wanted = run(batch, 0.1, device)
    assert torch.equal(out.cpu(), wanted[0])
    assert torch.equal(grad.cpu(), torch.stack(wanted[2:], 1))


def test_gradcheck():
    cu = torch.tensor([0, 3, 3, 8], dtype=torch.int32)
    q, k, v = (torch.randn(8, 1, 32, dtype=torch.float64, requires_grad=True) for _ in range(3))
    for dropout_p in (0.0, 0.3):
        options = {"dropout_p": dropout_p, "seed": SEED}
        assert torch.autograd.gradcheck(lambda *x, o=options: packed_attention(*x, cu, 5, **o), (q, k, v))
        assert torch.autograd.gradcheck(
            lambda x, *kv, o=options: packed_attention_cls(x[:3], *kv, cu, 5, **o), (q, k, v)
        )


def weights_kept(length: int, heads: int, dropout_p: float, device: str, seed: int = SEED) -> Tensor:
    """The factors of the op's weights, [heads, length, length]: equal scores, v the identity."""
    q = torch.zeros(length, heads, 64, device=device)
    v = torch.eye(length, 64, device=device)[:, None].expand(-1, heads, -1).contiguous()
    cu = torch.tensor([0, length], dtype=torch.int32, device=device)
    out = packed_attention(q, q, v, cu, length, dropout_p=dropout_p, seed=seed)
    return (out[:, :, :length] * length).permute(1, 0, 2).cpu()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 0.9])
def test_dropout_keeps_what_the_reference_says(dropout_p, device):
    factors = weights_kept(60, 30, dropout_p, device)
    row = torch.arange(60)
    keep = dropout_keep_ref(row[:, None], row[None], 30, dropout_p, SEED)
    torch.testing.assert_close(factors, keep / (1 - round(dropout_p * 65536) / 65536), rtol=1e-5, atol=0)
    draws = keep.numel()
    assert abs(keep.double().mean() - (1 - dropout_p)) < 4 * math.sqrt(dropout_p * (1 - dropout_p) / draws)


@pytest.mark.parametrize("device", DEVICES)
def test_backward_drops_what_forward_dropped(device):
    factors = weights_kept(40, 2, 0.3, device)
    q = torch.zeros(40, 2, 64, device=device)
    v = torch.zeros(40, 2, 64, device=device, requires_grad=True)
    cu = torch.tensor([0, 40], dtype=torch.int32, device=device)
    dout = torch.eye(40, 64, device=device)[:, None].expand(-1, 2, -1)
    out = packed_attention(q, q, v, cu, 40, dropout_p=0.3, seed=SEED)
    (dv,) = torch.autograd.grad(out, v, dout)  # dv[key, head, query] is the weight
    torch.testing.assert_close(dv[:, :, :40].permute(1, 2, 0).cpu() * 40, factors, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
def test_mean_over_seeds_is_the_undropped_result(device):
    batch = make_batch([12, 5], 1, 32, torch.float32)
    q, k, v, cu = (x.to(device) for x in (*batch.tensors, batch.cu_seqlens))
    plain = packed_attention(q, k, v, cu, 12)
    draws = torch.stack([packed_attention(q, k, v, cu, 12, dropout_p=0.1, seed=s) for s in range(2000)])
    error = draws.std(0) / math.sqrt(2000)
    assert ((draws.mean(0) - plain).abs() < 5 * error + 1e-6).all()
    assert torch.equal(packed_attention(q, k, v, cu, 12, dropout_p=0.0, seed=1), plain)


def test_torch_manual_seed_governs_dropout():
    batch = make_batch([12, 5], 1, 32, torch.float32)

    def draw(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return packed_attention(*batch.tensors, batch.cu_seqlens, 12, dropout_p=0.5)

    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_sequence_does_not_notice_the_others(dtype, device):
    alone = make_batch([23], 2, 64, dtype)
    wanted = run(alone, 0.0, device)
    for before, after in (([3], [60]), ([64, 9], []), ([70, 1], [500])):
        begin = sum(before)
        packed = make_batch([*before, 23, *after], 2, 64, dtype, seed=1)
        for x, y in zip((*packed.tensors, packed.dout), (*alone.tensors, alone.dout), strict=True):
            x[begin : begin + 23] = y
        out, lse, *grads = run(packed, 0.0, device)
        got = [out[begin : begin + 23], lse[:, begin : begin + 23], *(g[begin : begin + 23] for g in grads)]
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize("device", DEVICES)
def test_deterministic_whatever_the_threads(device):
    batch = make_batch([40, 1, 300, 17], 3, 64, torch.bfloat16)
    first = run(batch, 0.1, device)
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            again = run(batch, 0.1, device)
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    finally:
        torch.set_num_threads(threads)


def test_opcheck():
    batch = make_batch([5, 0, 17], 2, 32, torch.float32)
    seed = torch.tensor([SEED % 2**62])
    q, k, v = (x.requires_grad_() for x in batch.tensors)
    tail = (batch.cu_seqlens, 17, 0.1, 0.2, seed)
    torch.library.opcheck(ops.packed_attention.default, (q, k, v, *tail))
    torch.library.opcheck(ops.packed_attention_qkv.default, (torch.stack((q, k, v), 1).detach(), *tail))
    torch.library.opcheck(ops.packed_attention_cls.default, (q[:3].detach(), k, v, *tail))


def test_compiles_once_for_changing_batches():
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    module = PackedSelfAttention(64, 2, dropout_p=0.1)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for number, lengths in enumerate(([5, 6], [7, 8, 9], [20, 3, 1, 1], [64, 2])):
        cu = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        x = torch.randn(sum(lengths), 64)
        seed = torch.tensor([number])
        out = compiled(x, cu, max(lengths), seed=seed)
        torch.testing.assert_close(out, module(x, cu, max(lengths), seed=seed))
        out.sum().backward()
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_graph_capture():
    batch = make_batch([9, 30, 64], 4, 64, torch.bfloat16)
    q, k, v, cu = (x.cuda() for x in (*batch.tensors, batch.cu_seqlens))
    seed = torch.tensor([1], device="cuda")
    packed_attention(q, k, v, cu, 64, dropout_p=0.1, seed=seed)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = packed_attention(q, k, v, cu, 64, dropout_p=0.1, seed=seed)
    seed.fill_(2)
    graph.replay()
    assert torch.equal(out, packed_attention(q, k, v, cu, 64, dropout_p=0.1, seed=2))


def test_autocast():
    batch = make_batch([5, 9], 2, 32, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert packed_attention(*batch.tensors, batch.cu_seqlens, 9).dtype == torch.bfloat16


def test_empty():
    for bounds in ([0], [0, 0, 0]):
        x = torch.zeros(0, 2, 32, requires_grad=True)
        cu = torch.tensor(bounds, dtype=torch.int32)
        packed_attention(x, x, x, cu, 0).sum().backward()
        q = torch.zeros(len(bounds) - 1, 2, 32)
        assert (packed_attention_cls(q, x, x, cu, 0) == 0).all()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(q=torch.zeros(10, 2, 32).bfloat16()), TypeError, "k must have q's dtype"),
        (dict(k=torch.zeros(10, 2, 32, device="meta")), ValueError, "k must be on q's device"),
        (dict(q=torch.zeros(10, 64)), ValueError, r"must be \[total, heads, head_dim\]"),
        (dict(q=torch.zeros(9, 2, 32)), ValueError, "total = 10 rows, got 9"),
        (dict(q=torch.zeros(10, 2, 32).long()), TypeError, "q must be bfloat16"),
        (dict.fromkeys("qkv", torch.zeros(10, 2, 48)), ValueError, "head_dim must be one of"),
        (dict(v=torch.zeros(10, 32, 2).mT), RuntimeError, "last dimension of v must be contiguous"),
        (dict(cu_seqlens=torch.tensor([0, 4, 10])), TypeError, "cu_seqlens must be int32"),
        (dict(cu_seqlens=torch.tensor([1, 10]).int()), RuntimeError, "cu_seqlens must start at 0"),
        (dict(cu_seqlens=torch.tensor([0, 9]).int()), RuntimeError, "must end at the number of tokens"),
        (dict(cu_seqlens=torch.tensor([0, 7, 4, 10]).int()), RuntimeError, "must not fall"),
        (dict(max_seqlen=5), RuntimeError, "max_seqlen is 5, but sequence 1 has 6 tokens"),
        (dict(dropout_p=1.0), ValueError, r"dropout_p must be in \[0, 1\)"),
        (dict(dropout_p=-0.1), ValueError, r"dropout_p must be in \[0, 1\)"),
        (dict(dropout_p=0.1, seed=torch.tensor([1.0])), TypeError, "seed must be"),
    ],
)
def test_wrong_arguments_are_named(change, error, message):
    x = torch.zeros(10, 2, 32)
    arguments = dict(q=x, k=x, v=x, cu_seqlens=torch.tensor([0, 4, 10]).int(), max_seqlen=6) | change
    with pytest.raises(error, match=message):
        packed_attention(**arguments)
