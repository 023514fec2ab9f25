"""What the CUDA bindings must do beside what the ops' own tests ask; run by test_cuda_bindings.py, over the
emulated kernels. Tensors lie on the CPU and go where CUDA tensors do."""

from __future__ import annotations

import ctypes
import os

import pytest
import torch
from concat_mlp_cases import draw
from cuda_on_cpu.binding import LIBRARY
from mask_tokens_cases import BERT, ordinary_ids
from packed_attention_cases import make_batch
from torch import Tensor

from mtfast.ops import (
    bias_gelu,
    concat_mlp,
    dropout_add_layer_norm,
    mask_tokens,
    packed_attention,
    packed_attention_qkv,
)

ops = torch.ops.mtfast


def off_by_one(x: Tensor) -> Tensor:
    """The same numbers, contiguous, one element after a multiple of 16 bytes."""
    moved = torch.cat([x.new_zeros(1), x.detach().flatten()])[1:].view(x.shape)
    assert moved.is_contiguous() and moved.data_ptr() % 16
    return moved


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_misaligned_qkv_and_dout_are_copied(dtype):
    batch = make_batch([20, 3, 70], 2, 64, dtype)
    qkv = torch.stack(batch.tensors, 1)
    results = []
    for place in (lambda x: x, off_by_one):
        leaf = place(qkv).requires_grad_()
        out = packed_attention_qkv(leaf, batch.cu_seqlens, 70, dropout_p=0.1, seed=1)
        results.append([out, *torch.autograd.grad(out, leaf, place(batch.dout))])
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_a_misaligned_row_is_named(name):
    batch = make_batch([5], 2, 64, torch.bfloat16)
    tensors = {key: off_by_one(x) if key == name else x for key, x in zip("qkv", batch.tensors, strict=True)}
    with pytest.raises(RuntimeError, match=f"every row of {name} must begin at a multiple of 16 bytes"):
        packed_attention(**tensors, cu_seqlens=batch.cu_seqlens, max_seqlen=5)


def test_weight1_that_is_not_contiguous_is_refused():
    """The kernel reads it as one block; concat_mlp itself makes it contiguous first."""
    u, v, weight1, bias1, weight2, bias2 = (x.bfloat16() for x in draw(4, 8, 16, 2, seed=0))
    strided = torch.cat([weight1, weight1], 1)[:, :16]
    with pytest.raises(RuntimeError, match="weight1 must be contiguous"):
        ops.concat_mlp(u, v, strided, bias1, weight2, bias2, None, None, 0, 0.0, None, False)
    y = concat_mlp(u, v, strided, bias1, weight2, bias2)
    assert torch.equal(y, concat_mlp(u, v, weight1, bias1, weight2, bias2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_misaligned_rows_of_bias_gelu_give_the_same(dtype):
    x, bias, dy = torch.randn(70, 40).to(dtype), torch.randn(40).to(dtype), torch.randn(70, 40).to(dtype)
    results = []
    for place in (lambda x: x, off_by_one):
        leaves = [place(x).requires_grad_(), place(bias).requires_grad_()]
        y = bias_gelu(*leaves)
        results.append([y, *torch.autograd.grad(y, leaves, place(dy))])
    assert all(map(torch.equal, *results))


def test_rows_of_a_layer_norm_that_are_not_on_16_bytes():
    """They are read one by one."""
    x, weight = torch.randn(3, 64).bfloat16(), torch.randn(64).bfloat16()
    found, expected = (
        dropout_add_layer_norm(place(x), x, weight, place(weight), dropout_p=0.1, seed=1)
        for place in (off_by_one, lambda t: t)
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("bounds", [[0, 500, 120], [120, 7, 120], [5, 100], [0]])
def test_wrong_offsets_leave_no_token_unwritten(bounds):
    ids, cu_seqlens = ordinary_ids(120), torch.tensor(bounds).int()
    masked = mask_tokens(ids, cu_seqlens=cu_seqlens, **BERT)
    kept = masked.labels == -100
    assert torch.equal(masked.labels[~kept], ids[~kept]) and torch.equal(masked.input_ids[kept], ids[kept])


def test_a_launch_that_fails_is_told_in_words():
    library = ctypes.CDLL(os.environ[LIBRARY])
    batch = make_batch([130], 2, 128, torch.bfloat16)
    library.cuda_on_cpu_configure(0, 0, 1, 0, ctypes.c_int64(49 * 1024))
    try:
        with pytest.raises(
            RuntimeError, match=r"packed_attention: .* could not be launched: \w+.*cudaError 1\)"
        ):
            packed_attention(*batch.tensors, batch.cu_seqlens, 130)
    finally:
        library.cuda_on_cpu_configure(0, 0, 1, 0, ctypes.c_int64(227 * 1024))
    packed_attention(*batch.tensors, batch.cu_seqlens, 130)
