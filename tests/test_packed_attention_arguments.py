"""What packed_attention takes: any head_dim up to 256, offsets of 32 or 64 bits. What is wrong is named."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from devices import DEVICES
from packed_attention_cases import DTYPES, check_random_batches, make_batch, offsets
from packed_attention_cases import run_op as run

from mtfast.ops import PackedSelfAttention, packed_attention, packed_attention_cls, packed_attention_qkv
from mtfast.ops.packed_attention import kernel_head_dim


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("cls", [False, True])
@pytest.mark.parametrize("head_dim", [5, 31, 33, 80, 96, 160, 200])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_head_dim(dtype, head_dim, cls, device):
    """Also where rows begin at no multiple of 16 bytes."""
    check_random_batches(run, range(head_dim % 5, 12, 5), head_dim, dtype, cls=cls, device=device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("head_dim", [1, 80])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zeros_behind_the_last_number_change_nothing(dtype, head_dim, device):
    batch = make_batch([9, 0, 70, 3], 2, head_dim, dtype, device=device)
    zeros = kernel_head_dim(head_dim, device) - head_dim
    q, k, v = (torch.nn.functional.pad(x, (0, zeros)) for x in batch.tensors)
    scale = head_dim**-0.5
    wide = packed_attention(q, k, v, batch.cu_seqlens, 70, softmax_scale=scale, dropout_p=0.1, seed=1)
    narrow = packed_attention(*batch.tensors, batch.cu_seqlens, 70, dropout_p=0.1, seed=1)
    assert narrow.size(2) == head_dim and torch.equal(narrow, wide[..., :head_dim])


@pytest.mark.parametrize("device", DEVICES)
def test_offsets_of_64_bits_are_as_good(device):
    batch = make_batch([9, 0, 70, 3], 2, 64, torch.float32, device=device)
    wide = dataclasses.replace(batch, cu_seqlens=batch.cu_seqlens.long())
    assert all(map(torch.equal, run(batch, 0.1), run(wide, 0.1)))
    one_query = make_batch([9, 0, 70, 3], 2, 64, torch.float32, layout="cls", device=device)
    outs = [packed_attention_cls(*one_query.tensors, x.cu_seqlens, 70) for x in (batch, wide)]
    assert torch.equal(*outs)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(q=torch.zeros(10, 2, 32).bfloat16()), TypeError, "k must have q's dtype"),
        (dict(v=torch.zeros(10, 2, 32).bfloat16()), TypeError, "v must have q's dtype"),
        (dict(k=torch.zeros(10, 2, 32, device="meta")), ValueError, "k must be on q's device"),
        (dict(cu_seqlens=offsets([4, 6]).to("meta")), ValueError, "cu_seqlens must be on q's device"),
        (dict(q=torch.zeros(10, 64)), ValueError, r"must be \[total, heads, head_dim\]"),
        (dict(q=torch.zeros(9, 2, 32)), ValueError, "total = 10 rows, found 9"),
        (dict(v=torch.zeros(10, 2, 64)), ValueError, "must agree in heads and head_dim"),
        (dict(q=torch.zeros(10, 2, 32).long()), TypeError, "q must be bfloat16"),
        (
            dict.fromkeys("qkv", torch.zeros(10, 2, 257)),
            ValueError,
            "head_dim must be at most 256, found 257",
        ),
        (dict.fromkeys("qkv", torch.zeros(10, 2, 0)), ValueError, "head_dim must be at most 256, found 0"),
        (dict(v=torch.zeros(10, 32, 2).mT), RuntimeError, "last dimension of v must be contiguous"),
        (dict(cu_seqlens=torch.tensor([0.0, 4, 10])), TypeError, "cu_seqlens must be int32 or int64"),
        (dict(cu_seqlens=torch.tensor([[0, 4, 10]]).int()), TypeError, r"int64 \[sequences \+ 1\]"),
        # What has these ends in 32 bits.
        (dict(cu_seqlens=torch.tensor([2**32, 4, 10])), RuntimeError, "cu_seqlens must start at 0"),
        (dict(cu_seqlens=torch.tensor([0, 4, 2**32 + 10])), RuntimeError, "must end at the number of tokens"),
        (dict(cu_seqlens=torch.tensor([1, 10]).int()), RuntimeError, "cu_seqlens must start at 0"),
        (dict(cu_seqlens=torch.tensor([0, 9]).int()), RuntimeError, "must end at the number of tokens"),
        (dict(cu_seqlens=torch.tensor([0, 7, 4, 10]).int()), RuntimeError, "must not fall"),
        (dict(max_seqlen=5), RuntimeError, "max_seqlen is 5, but sequence 1 has 6 tokens"),
        (dict(max_seqlen=-1), ValueError, "max_seqlen must not be negative"),
        (dict(dropout_p=1.0), ValueError, r"dropout_p must be in \[0, 1\)"),
        (dict(dropout_p=-0.1), ValueError, r"dropout_p must be in \[0, 1\)"),
        (dict(dropout_p=float("nan")), ValueError, r"dropout_p must be in \[0, 1\)"),
        (dict(dropout_p=0.1, seed=torch.tensor([1.0])), TypeError, "seed must be"),
    ],
)
def test_wrong_arguments_are_named(change, error, message):
    x = torch.zeros(10, 2, 32)
    arguments = dict(q=x, k=x, v=x, cu_seqlens=offsets([4, 6]), max_seqlen=6) | change
    with pytest.raises(error, match=message):
        packed_attention(**arguments)


def test_wrong_arguments_of_the_other_two_are_named():
    x, cu = torch.zeros(10, 2, 32), offsets([4, 6])
    with pytest.raises(ValueError, match="sequences = 2 rows, found 10"):
        packed_attention_cls(x, x, x, cu, 6)
    with pytest.raises(RuntimeError, match="max_seqlen is 5, but sequence 1 has 6 tokens"):
        packed_attention_cls(x[:2], x, x, cu, 5)
    with pytest.raises(ValueError, match=r"qkv must be \[total, 3, heads, head_dim\]"):
        packed_attention_qkv(x, cu, 6)
    with pytest.raises(RuntimeError, match="max_seqlen is 5, but sequence 1 has 6 tokens"):
        packed_attention_qkv(torch.zeros(10, 3, 2, 32), cu, 5)
    for hidden in (97, 1024, 0):
        with pytest.raises(ValueError, match=f"hidden / heads must .* 256, found {hidden} / 2"):
            PackedSelfAttention(hidden, 2)
