"""What the ops' arguments may be, and that an error names the one that is wrong and what would be right."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from concat_mlp_cases import NAMES, cast, draw
from devices import DEVICES
from mask_tokens_cases import BERT, SPECIAL, assert_same, ordinary_ids
from packed_attention_cases import make_batch, offsets
from torch import Tensor

from mtfast.ops import (
    concat_mlp,
    dropout_add_layer_norm,
    exact_count,
    mask_tokens,
    mask_tokens_ref,
    packed_attention,
    packed_attention_cls,
    packed_attention_qkv,
)
from mtfast.ops.concat_mlp import dropout_keep

IDS = ordinary_ids(4, 32)
BATCH = make_batch([4, 6], 2, 32, torch.float32)
ATTENTION = dict(zip("qkv", BATCH.tensors, strict=True)) | {"cu_seqlens": offsets([4, 6]), "max_seqlen": 6}
PAIR = dict(zip(NAMES, cast(draw(4, 8, 5, 2, seed=0), torch.float32, "cpu"), strict=True))
NORM = {"x": torch.randn(3, 6), "residual": None, "weight": torch.ones(6), "bias": torch.zeros(6)}
ROWS = torch.tensor([0, 3])
Q = ATTENTION["q"]


def unusual(kind: str) -> Tensor:
    """Of a kind that torch warns of."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if kind == "quantized":
            return torch.quantize_per_tensor(Q, 0.1, 0, torch.qint8)
        return torch.nested.nested_tensor([Q, Q], layout=getattr(torch, kind))


@pytest.mark.parametrize(
    "special_ids",
    [
        torch.tensor(SPECIAL),
        torch.tensor(SPECIAL, dtype=torch.int32),
        np.array(SPECIAL),
        tuple(SPECIAL),
        set(SPECIAL),
        list(np.array(SPECIAL)),
        (i for i in SPECIAL),
    ],
    ids=["tensor", "int32", "array", "tuple", "set", "ints of an array", "generator"],
)
def test_special_ids_of_every_kind(special_ids):
    assert_same(mask_tokens(IDS, **(BERT | {"special_ids": special_ids})), mask_tokens(IDS, **BERT))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"special_ids": None}, TypeError, "special_ids must be a list or a tensor of ints, found None"),
        ({"special_ids": "[PAD]"}, TypeError, "special_ids must be a list or a tensor of ints, found a str"),
        ({"special_ids": 3}, TypeError, "special_ids must be a list or a tensor of ints, found an? int"),
        ({"special_ids": [0, 1.0]}, TypeError, r"special_ids\[1\] must be an int, found a float"),
        ({"special_ids": [False]}, TypeError, r"special_ids\[0\] must be an int, found False"),
        ({"special_ids": torch.tensor([1.0])}, TypeError, "special_ids must hold ints, found a tensor of"),
        ({"special_ids": torch.ones(9) > 0}, TypeError, "special_ids must hold ints, .*torch.bool"),
        ({"special_ids": torch.tensor([30522])}, RuntimeError, "special_ids must be in"),
        ({"special_ids": [-1]}, RuntimeError, "special_ids must be in .*, found -1"),
        ({"mask_token_id": None}, TypeError, "mask_token_id must be an int, found None"),
        ({"mask_token_id": 2**63}, ValueError, "mask_token_id must have at most 64 bits"),
        ({"vocab_size": 30522.0}, TypeError, "vocab_size must be an int, found a float"),
        ({"vocab_size": 2**64}, ValueError, "vocab_size must have at most 64 bits"),
        ({"mlm_probability": "0.15"}, TypeError, "mlm_probability must be a float, found a str"),
        ({"mask_fraction": torch.tensor(0.5)}, TypeError, "mask_fraction must be a float, found a tensor"),
        ({"random_fraction": None}, TypeError, "random_fraction must be a float, found None"),
        ({"strategy": np.array(["exact", "all"])}, ValueError, "strategy must be one of exact, bernoulli"),
        ({"seed": 1.0}, TypeError, "seed must be an int or an int64 tensor of one element, found a float"),
        ({"seed": None}, TypeError, "seed must be an int or an int64 tensor of one element, found None"),
        ({"seed": torch.tensor([1, 2])}, TypeError, r"seed must be .*, found torch.int64 \[2\]"),
        ({"seed": torch.tensor([1]).int()}, TypeError, r"seed must be .*, found torch.int32 \[1\]"),
        ({"seed": torch.tensor([1]).to_sparse()}, TypeError, "seed must be a dense tensor"),
        ({"seed": 2**64}, ValueError, "seed must have at most 64 bits"),
        ({"input_ids": IDS.tolist()}, TypeError, "input_ids must be a tensor, found a list: pass torch.as_"),
        ({"input_ids": IDS.to_sparse()}, TypeError, "input_ids must be a dense tensor"),
        (
            {"positions": IDS.numpy()},
            TypeError,
            "positions must be a tensor, found an? ndarray: .*torch.int64",
        ),
        ({"subword": [True]}, TypeError, "subword must be a tensor, found a list: .*dtype=torch.bool"),
        ({"cu_seqlens": [0, 128]}, TypeError, "cu_seqlens must be a tensor, found a list: .*torch.int32"),
    ],
)
def test_mask_tokens_names_what_is_wrong(options, error, message):
    with pytest.raises(error, match=message):
        mask_tokens(**({"input_ids": IDS} | BERT | options))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": Q.detach().numpy()}, TypeError, "q must be a tensor, found an? ndarray"),
        ({"k": None}, TypeError, "k must be a tensor, found None"),
        ({"v": Q.to_sparse()}, TypeError, "v must be a dense tensor, found a torch.sparse_coo one"),
        ({"q": Q.to_mkldnn()}, TypeError, "q must be a dense tensor, found a torch._mkldnn one"),
        ({"q": Q.to(torch.complex64)}, TypeError, "q must be bfloat16, float16, float32 or float64, found"),
        (
            {"q": unusual("quantized")},
            TypeError,
            "q must be .*, found torch.qint8",
        ),
        ({"k": unusual("strided")}, TypeError, "k must be a dense tensor, found a nested one"),
        ({"k": unusual("jagged")}, TypeError, "k must be a dense tensor, found a nested one"),
        ({"cu_seqlens": [0, 4, 10]}, TypeError, "cu_seqlens must be a tensor, found a list: .*torch.int32"),
        ({"cu_seqlens": np.array([0, 4, 10])}, TypeError, "cu_seqlens must be a tensor, found an? ndarray"),
        ({"max_seqlen": None}, TypeError, "max_seqlen must be an int, found None"),
        ({"max_seqlen": 6.0}, TypeError, "max_seqlen must be an int, found a float"),
        ({"max_seqlen": True}, TypeError, "max_seqlen must be an int, found True"),
        ({"max_seqlen": torch.tensor(6)}, TypeError, r"max_seqlen .*found a tensor: pass int\(max_seqlen\)"),
        ({"max_seqlen": 2**63}, ValueError, "max_seqlen must be less than 2.63, found 92"),
        ({"dropout_p": None}, TypeError, "dropout_p must be a float, found None"),
        ({"dropout_p": "0.1"}, TypeError, "dropout_p must be a float, found a str"),
        ({"dropout_p": torch.tensor(0.1)}, TypeError, "dropout_p must be a float, found a tensor"),
        ({"dropout_p": 10**400}, TypeError, "dropout_p must be a float, found an int"),
        ({"dropout_p": np.zeros(2)}, TypeError, "dropout_p must be a float, found a ndarray"),
        ({"max_seqlen": np.array([6, 6])}, TypeError, "max_seqlen must be an int, found a ndarray"),
        ({"softmax_scale": "0.1"}, TypeError, "softmax_scale must be a float, found a str"),
        ({"softmax_scale": torch.tensor(0.1)}, TypeError, "softmax_scale must be a float, found a tensor"),
        ({"seed": 1.0}, TypeError, "seed must be an int or an int64 tensor of one element, found a float"),
        ({"seed": True}, TypeError, "seed must be an int or an int64 tensor of one element, found True"),
        ({"seed": torch.tensor([1]).to_sparse()}, TypeError, "seed must be a dense tensor"),
        (
            {"seed": 2**64, "dropout_p": 0.1},
            ValueError,
            "seed must have at most 64 bits, .*found 18446744073709",
        ),
        ({"seed": -(2**63) - 1}, ValueError, "seed must have at most 64 bits"),
    ],
)
def test_packed_attention_names_what_is_wrong(change, error, message):
    with pytest.raises(error, match=message):
        packed_attention(**(ATTENTION | change))
    if not {*change} & {*"qkv"}:
        qkv, one = torch.stack(BATCH.tensors, 1), {"q": Q[:2]}
        rest = {name: x for name, x in (ATTENTION | change).items() if name not in "qkv"}
        with pytest.raises(error, match=message):
            packed_attention_qkv(qkv, **rest)
        with pytest.raises(error, match=message):
            packed_attention_cls(**(ATTENTION | one | change))


def test_of_a_fused_projection_qkv_is_named():
    cu, qkv = ATTENTION["cu_seqlens"], torch.stack(BATCH.tensors, 1)
    with pytest.raises(TypeError, match="qkv must be a tensor, found a list"):
        packed_attention_qkv([Q, Q, Q], cu, 6)
    with pytest.raises(TypeError, match=r"qkv must be bfloat16, .*found torch\.int32"):
        packed_attention_qkv(qkv.int(), cu, 6)
    with pytest.raises(ValueError, match="cu_seqlens must be on qkv's device"):
        packed_attention_qkv(qkv, cu.to("meta"), 6)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weight1": PAIR["weight1"].tolist()}, TypeError, "weight1 must be a tensor, found a list"),
        ({"u": None}, TypeError, "u must be a tensor, found None"),
        ({"v": PAIR["v"].to_sparse()}, TypeError, "v must be a dense tensor"),
        ({"u": PAIR["u"].to(torch.complex64)}, TypeError, "u must be float32, .*found torch.complex64"),
        ({"u_rows": [0, 1, 2, 3]}, TypeError, "u_rows must be a tensor, found a list: .*torch.int64"),
        ({"v_rows": np.arange(4)}, TypeError, "v_rows must be a tensor, found an? ndarray"),
        ({"u_rows": torch.ones(4).bool()}, TypeError, "u_rows must be int32 or int64, found torch.bool"),
        ({"v_rows": torch.tensor(3)}, ValueError, r"v_rows must be \[batch\], found shape \(\)"),
        ({"activation": ["relu"]}, ValueError, "activation must be one of relu, gelu, tanh"),
        ({"activation": np.array(["relu", "silu"])}, ValueError, "activation must be one of relu"),
        ({"dropout_p": None}, TypeError, "dropout_p must be a float, found None"),
        ({"dropout_p": float("nan")}, ValueError, r"dropout_p must be in \[0, 1\), found nan"),
        ({"seed": "1"}, TypeError, "seed must be an int or an int64 tensor of one element, found a str"),
        ({"seed": 2**64}, ValueError, "seed must have at most 64 bits"),
    ],
)
def test_concat_mlp_names_what_is_wrong(change, error, message):
    with pytest.raises(error, match=message):
        concat_mlp(**(PAIR | change))


def test_autocast_casts_no_ints_and_no_complex_numbers():
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(TypeError, match=r"q must be bfloat16.*found torch\.int64"):
            packed_attention(**(ATTENTION | dict.fromkeys("qkv", Q.long())))
        with pytest.raises(TypeError, match=r"v must have q's dtype .*found torch\.complex64"):
            packed_attention(**(ATTENTION | {"v": Q.to(torch.complex64)}))
        with pytest.raises(TypeError, match=r"bias2 is torch\.int64, u is torch\.float32"):
            concat_mlp(**(PAIR | {"bias2": PAIR["bias2"].long()}))


def test_exact_count_names_what_is_wrong():
    with pytest.raises(TypeError, match="candidates must be a tensor, found a list"):
        exact_count([3, 4])


@pytest.mark.parametrize("seed", [2**63, 2**64 - 1, -1, -(2**63), np.uint64(2**63 + 5), np.int32(7)])
def test_a_seed_of_any_64_bits(seed):
    """What counts is its value modulo 2^64."""
    bits = int(seed)
    assert_same(mask_tokens(IDS, **(BERT | {"seed": seed})), mask_tokens_ref(IDS, **(BERT | {"seed": bits})))
    assert_same(
        mask_tokens(IDS, **(BERT | {"seed": seed})), mask_tokens(IDS, **(BERT | {"seed": bits % 2**64}))
    )
    as_int64 = torch.tensor([bits - 2**64 if bits >= 2**63 else bits])
    assert_same(mask_tokens(IDS, **(BERT | {"seed": seed})), mask_tokens(IDS, **(BERT | {"seed": as_int64})))
    for one, other in ((seed, bits % 2**64), (seed, as_int64)):
        for op, arguments in (
            (packed_attention, ATTENTION),
            (concat_mlp, PAIR),
            (dropout_add_layer_norm, NORM),
        ):
            first, second = (op(**arguments, dropout_p=0.5, seed=x) for x in (one, other))
            assert torch.equal(first, second)
    kept = dropout_keep(4, 5, 0.5, bits)
    ones = PAIR | {"weight2": torch.eye(5), "bias1": torch.full((5,), 100.0), "bias2": torch.zeros(5)}
    assert torch.equal(concat_mlp(**ones, dropout_p=0.5, seed=seed) != 0, kept)


@pytest.mark.parametrize("number", [np.int64(6), np.uint8(6)])
def test_ints_of_numpy(number):
    expected = packed_attention(**ATTENTION)
    assert torch.equal(packed_attention(**(ATTENTION | {"max_seqlen": number})), expected)
    options = {"dropout_p": np.float64(0.5), "softmax_scale": np.float64(0.25), "seed": number}
    expected = packed_attention(**ATTENTION, dropout_p=0.5, softmax_scale=0.25, seed=6)
    assert torch.equal(packed_attention(**ATTENTION, **options), expected)


def test_on_meta_tensors_results_are_meta_tensors():
    meta = {name: x.to("meta") if isinstance(x, Tensor) else x for name, x in ATTENTION.items()}
    q, k, v = (meta[name].detach().requires_grad_() for name in "qkv")
    cu = meta["cu_seqlens"]
    out, lse = packed_attention(q, k, v, cu, 6, dropout_p=0.5, return_lse=True)
    assert out.is_meta and out.shape == Q.shape and lse.is_meta and lse.shape == (2, 10)
    one = packed_attention_cls(q[:2], k, v, cu, 6, dropout_p=0.5, seed=1)
    fused = packed_attention_qkv(torch.stack((q, k, v), 1), cu, 6)
    (out.sum() + one.sum() + fused.sum()).backward()
    assert all(x.grad.is_meta and x.grad.shape == Q.shape for x in (q, k, v))

    pair = {name: x.detach().to("meta").requires_grad_() for name, x in PAIR.items()}
    rows = ROWS.to("meta")
    y = concat_mlp(**pair, u_rows=rows, v_rows=rows, dropout_p=0.5)
    y.sum().backward()
    assert y.is_meta and y.shape == (2, 2)
    assert all(x.grad.is_meta and x.grad.shape == x.shape for x in pair.values())

    norm = {name: x if x is None else x.to("meta").requires_grad_() for name, x in NORM.items()}
    y = dropout_add_layer_norm(**norm, dropout_p=0.5)
    y.sum().backward()
    assert y.is_meta and y.shape == norm["x"].grad.shape == (3, 6) and norm["bias"].grad.shape == (6,)

    for seed in (7, torch.tensor([7], device="meta")):
        masked = mask_tokens(IDS.to("meta"), **(BERT | {"seed": seed}))
        assert all(x.is_meta and x.shape == IDS.shape for x in masked)


@pytest.mark.parametrize("name", ["k", "v", "cu_seqlens"])
def test_meta_and_other_tensors_do_not_mix(name):
    with pytest.raises(ValueError, match=f"{name} must be on q's device cpu, found meta"):
        packed_attention(**(ATTENTION | {name: ATTENTION[name].to("meta")}))
    meta = {key: x.to("meta") if isinstance(x, Tensor) else x for key, x in ATTENTION.items()}
    with pytest.raises(ValueError, match=f"{name} must be on q's device meta, found cpu"):
        packed_attention(**(meta | {name: ATTENTION[name]}))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("op", ["packed_attention", "packed_attention_qkv", "packed_attention_cls"])
@torch._dynamo.config.patch(capture_scalar_outputs=True)
def test_a_longest_length_computed_under_compile(op, device):
    """Whose value no compiler knows."""
    torch._dynamo.reset()

    def step(qkv: Tensor, cu: Tensor) -> Tensor:
        longest = int((cu[1:] - cu[:-1]).max())
        q, k, v = qkv.unbind(1)
        if op == "packed_attention_qkv":
            return packed_attention_qkv(qkv, cu, longest)
        if op == "packed_attention_cls":
            return packed_attention_cls(q[cu[:-1].long()], k, v, cu, longest)
        return packed_attention(q, k, v, cu, longest)

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for lengths in ([5, 6], [20, 3, 1]):
        qkv = torch.randn(sum(lengths), 3, 2, 32, device=device, requires_grad=True)
        cu = offsets(lengths).to(device)
        found, expected = compiled(qkv, cu), step(qkv, cu)
        assert torch.equal(found, expected)
        grads = (torch.autograd.grad(x.square().sum(), qkv)[0] for x in (found, expected))
        torch.testing.assert_close(*grads)


@pytest.mark.parametrize("device", DEVICES)
@torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
def test_rows_found_under_compile(device):
    """Two lists of rows, of which no compiler knows that they are equally long."""
    torch._dynamo.reset()
    pair = {name: x.detach().to(device) for name, x in PAIR.items()}

    def step(first: Tensor, second: Tensor) -> Tensor:
        return concat_mlp(**pair, u_rows=first.nonzero()[:, 0], v_rows=second.nonzero()[:, 0])

    chosen = [torch.tensor(x, device=device) > 0 for x in ([1, 0, 1, 0], [0, 1, 0, 1])]
    assert torch.equal(torch.compile(step, fullgraph=True, backend="aot_eager")(*chosen), step(*chosen))


def test_a_large_seed_under_compile():
    torch._dynamo.reset()
    compiled = torch.compile(packed_attention, fullgraph=True, backend="aot_eager")
    for seed in (1, 2, 2**63, 2**64 - 1):
        options = {"dropout_p": 0.5, "seed": seed}
        assert torch.equal(compiled(**ATTENTION, **options), packed_attention(**ATTENTION, **options))
