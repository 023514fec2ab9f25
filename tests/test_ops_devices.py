"""Ops put every tensor they make on their tensors' device, whatever torch's default device is, and say where
a seed or row tensor should be."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from concat_mlp_cases import draw
from packed_attention_cases import make_batch
from torch import Tensor

from mtfast.models.dropout import dropout
from mtfast.models.multitask import LstmHead
from mtfast.ops import (
    concat_mlp,
    concat_mlp_ref,
    dropout_add_layer_norm,
    dropout_add_layer_norm_ref,
    mask_tokens,
    mask_tokens_ref,
    packed_attention,
    packed_attention_cls,
    packed_attention_cls_ref,
    packed_attention_qkv,
    packed_attention_ref,
)
from mtfast.ops._library import seed_tensor

BATCH = make_batch([5, 0, 9], 2, 32, torch.float32)
QKV, CLS = torch.stack(BATCH.tensors, 1), BATCH.q[:3]
WHERE = (BATCH.cu_seqlens, 9)
ROWS, NORM = torch.randn(4, 8), (torch.randn(8), torch.randn(8))
OPERANDS = [x.float() for x in draw(4, 8, 16, 2, seed=0)]
IDS = torch.arange(1000, 1014)
MASKING = {"special_ids": [0], "mask_token_id": 1, "vocab_size": 2000, "seed": 1, "mlm_probability": 0.5}
LSTM = LstmHead(8, 6, 5, "relu", 0.1)
STATES, BOUNDS = torch.randn(9, 8), torch.tensor([[1, 4], [5, 9]])

CALLS: dict[str, Callable[[int | None], object]] = {
    "packed_attention": lambda seed: packed_attention(*BATCH.tensors, *WHERE, dropout_p=0.5, seed=seed),
    "packed_attention_qkv": lambda seed: packed_attention_qkv(QKV, *WHERE, dropout_p=0.5, seed=seed),
    "packed_attention_cls": lambda seed: packed_attention_cls(
        CLS, *BATCH.tensors[1:], *WHERE, dropout_p=0.5, seed=seed
    ),
    "packed_attention_ref": lambda seed: packed_attention_ref(
        *BATCH.tensors, *WHERE, dropout_p=0.5, seed=seed or 1
    ),
    "packed_attention_cls_ref": lambda seed: packed_attention_cls_ref(
        CLS, *BATCH.tensors[1:], *WHERE, dropout_p=0.5, seed=seed or 1
    ),
    "concat_mlp": lambda seed: concat_mlp(*OPERANDS, dropout_p=0.5, seed=seed),
    "concat_mlp_ref": lambda seed: concat_mlp_ref(*OPERANDS, dropout_p=0.5, seed=seed),
    "dropout_add_layer_norm": lambda seed: dropout_add_layer_norm(
        ROWS, ROWS, *NORM, dropout_p=0.5, seed=seed
    ),
    "dropout_add_layer_norm_ref": lambda seed: dropout_add_layer_norm_ref(
        ROWS, ROWS, *NORM, dropout_p=0.5, seed=seed
    ),
    "mask_tokens": lambda _: mask_tokens(IDS, cu_seqlens=BATCH.cu_seqlens, **MASKING),
    "mask_tokens_ref": lambda _: mask_tokens_ref(IDS, cu_seqlens=BATCH.cu_seqlens, **MASKING),
    "dropout": lambda _: dropout(STATES, 0.5, True),
    "lstm head": lambda _: LSTM(STATES[:2], STATES, BOUNDS, 4),
    "lstm head without rows": lambda _: LSTM(STATES[:0], STATES, BOUNDS[:0], 4),
}


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("name", CALLS)
def test_the_default_device_does_not_matter(name, seed):
    results = []
    for default in (None, "meta"):
        torch.manual_seed(0)
        torch.set_default_device(default)
        try:
            found = CALLS[name](seed)
        finally:
            torch.set_default_device(None)
        results.append([found] if isinstance(found, Tensor) else list(found))
    for ours, expected in zip(*results, strict=True):
        assert ours.device == expected.device and torch.equal(ours, expected)


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_a_seed_elsewhere_is_named(dropout_p):
    seed = torch.tensor([1], device="meta")
    options = {"dropout_p": dropout_p, "seed": seed}
    with pytest.raises(ValueError, match="seed is on meta, q on cpu: they must be on one device"):
        packed_attention(*BATCH.tensors, *WHERE, **options)
    with pytest.raises(ValueError, match="seed is on meta, q on cpu"):
        packed_attention_cls(CLS, *BATCH.tensors[1:], *WHERE, **options)
    with pytest.raises(ValueError, match="seed is on meta, qkv on cpu"):
        packed_attention_qkv(QKV, *WHERE, **options)
    with pytest.raises(ValueError, match="seed is on meta, u on cpu"):
        concat_mlp(*OPERANDS, **options)
    with pytest.raises(ValueError, match="seed is on meta, x on cpu"):
        dropout_add_layer_norm(ROWS, ROWS, *NORM, **options)
    with pytest.raises(ValueError, match="seed is on meta, input_ids on cpu"):
        mask_tokens(IDS, **(MASKING | {"seed": seed}))


def test_an_int_seed_is_refused_while_a_graph_is_captured(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    on_gpu = SimpleNamespace(device=torch.device("cuda"))
    with pytest.raises(RuntimeError, match="seed is the int 3 while a CUDA graph is captured"):
        seed_tensor(3, 0.1, "q", on_gpu)
    assert seed_tensor(3, 0.0, "q", on_gpu) is None
    assert seed_tensor(3, 0.1, "q", torch.zeros(1)).item() == 3
