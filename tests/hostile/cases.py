"""Arguments that fit each other, drawn at random, for every op: its Python function with what eager PyTorch
makes of them, and the registered ops below it."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from mtfast import ops
from mtfast.ops.concat_mlp import ACTIVATIONS

raw = torch.ops.mtfast


@dataclass
class Case:
    """A call, and the function that says what it should return."""

    function: Callable[..., Any]
    arguments: dict[str, Any]
    reference: Callable[..., Any] | None = None
    exact: bool = False


def attention(rng: random.Random, op: str) -> Case:
    lengths = [
        rng.choice([0, 1, 2, 3, 15, 16, 17, 33, 64, 65, 70]) for _ in range(rng.choice([0, 1, 1, 2, 4]))
    ]
    total, heads, head_dim = sum(lengths), rng.choice([0, 1, 1, 2, 3]), rng.choice([32, 32, 64, 128])
    dtype = rng.choice([torch.float32, torch.float64, torch.bfloat16, torch.float16])
    qkv = torch.randn(total, 3, heads, head_dim).to(dtype)
    longest = max(lengths, default=0)
    rest = {
        "cu_seqlens": torch.tensor([0, *accumulate(lengths)], dtype=torch.int32),
        "max_seqlen": longest + rng.choice([0, 0, 5, 2**40]),
        "dropout_p": rng.choice([0.0, 0.1, 0.9]),
        "softmax_scale": rng.choice([None, 0.3]),
        "seed": rng.choice([rng.randrange(-(2**63), 2**64), torch.tensor([rng.randrange(2**62)])]),
    }
    if op == "packed_attention_qkv":
        arguments = {"qkv": qkv}
    else:
        q, k, v = qkv.unbind(1)
        arguments = {
            "q": torch.randn(len(lengths), heads, head_dim).to(dtype) if "cls" in op else q,
            "k": k,
            "v": v,
        }
    for name, x in arguments.items():
        arguments[name] = x.detach().requires_grad_(rng.random() < 0.7)

    def reference(**given: Any) -> Tensor:
        given["max_seqlen"] = longest
        if op == "packed_attention_cls":
            return ops.packed_attention_cls_ref(**given)
        if op == "packed_attention_qkv":
            given |= dict(zip("qkv", given.pop("qkv").unbind(1), strict=True))
        return ops.packed_attention_ref(**given)[0]

    return Case(getattr(ops, op), arguments | rest, reference)


def concat_mlp(rng: random.Random, op: str = "concat_mlp") -> Case:
    batch, hidden = rng.choice([0, 1, 5, 31, 70, 530]), rng.choice([0, 1, 2, 7, 16, 40, 65])
    inner, outputs = rng.choice([0, 1, 3, 16, 65, 130]), rng.randint(1, 8)
    dtype = rng.choice([torch.float32, torch.float64, torch.bfloat16, torch.float16])
    arguments: dict[str, Any] = {}
    rows = {}
    for name in "uv":
        count = batch
        if rng.random() < 0.4:
            # Gradients of rows gathered often are summed in their dtype: in 16 bits that loses more and more.
            count = rng.choice([1, 9, 40]) if batch < 100 else 40
            kind = rng.choice([torch.int32, torch.int64])
            rows[f"{name}_rows"] = torch.randint(count, (batch,)).to(kind)
        arguments[name] = torch.randn(count, hidden)
    arguments["weight1"] = torch.randn(inner, 2 * hidden) / (2 * hidden + 1) ** 0.5
    arguments["bias1"] = torch.randn(inner)
    arguments["weight2"] = torch.randn(outputs, inner) / (inner + 1) ** 0.5
    arguments["bias2"] = torch.randn(outputs)
    for name, x in arguments.items():
        arguments[name] = x.to(dtype).requires_grad_(rng.random() < 0.7)
    arguments |= rows
    # In 16 bits a rounding may turn a sign around, and with it relu's slope.
    arguments["activation"] = rng.choice(ACTIVATIONS[dtype.itemsize == 2 :])
    arguments["dropout_p"] = rng.choice([0.0, 0.1, 0.9])
    arguments["seed"] = rng.choice([rng.randrange(-(2**63), 2**64), torch.tensor([rng.randrange(2**62)])])
    return Case(ops.concat_mlp, arguments, ops.concat_mlp_ref)


def bias_gelu(rng: random.Random, op: str = "bias_gelu") -> Case:
    columns = rng.choice([0, 1, 2, 7, 16, 33, 130])
    shape = [*rng.choice([(), (0,), (1,), (5,), (70,), (3, 0), (3, 4)]), columns]
    dtype = rng.choice([torch.float32, torch.float64, torch.bfloat16, torch.float16])
    arguments = {"x": torch.randn(shape).to(dtype).requires_grad_(rng.random() < 0.7), "bias": None}
    if rng.random() < 0.7:
        arguments["bias"] = torch.randn(columns).to(dtype).requires_grad_(rng.random() < 0.7)
    return Case(ops.bias_gelu, arguments, ops.bias_gelu_ref)


def dropout_add_layer_norm(rng: random.Random, op: str = "dropout_add_layer_norm") -> Case:
    hidden = rng.choice([2, 7, 16, 40, 130])
    shape = [*rng.choice([[], [0], [1], [5], [70], [2, 3], [3, 0, 2]]), hidden]
    dtype = rng.choice([torch.float32, torch.float64, torch.bfloat16, torch.float16])

    def drawn(*size: int) -> Tensor:
        return torch.randn(size).to(dtype).requires_grad_(rng.random() < 0.7)

    arguments: dict[str, Any] = {
        "x": drawn(*shape),
        "residual": drawn(*shape) if rng.random() < 0.7 else None,
        "weight": drawn(hidden),
        "bias": drawn(hidden),
        "x_bias": drawn(hidden) if rng.random() < 0.7 else None,
        "dropout_p": rng.choice([0.0, 0.1, 0.9]),
        "eps": rng.choice([1e-3, 1e-2]),
        "seed": rng.choice([rng.randrange(-(2**63), 2**64), torch.tensor([rng.randrange(2**62)])]),
    }
    return Case(ops.dropout_add_layer_norm, arguments, ops.dropout_add_layer_norm_ref)


def mask_tokens(rng: random.Random, op: str = "mask_tokens") -> Case:
    vocab_size = rng.choice([1, 2, 100, 1000])
    shape = rng.choice([[rng.choice([0, 1, 7, 100, 2000])], [rng.choice([0, 1, 3]), rng.choice([0, 1, 50])]])
    ids = torch.randint(vocab_size, shape, dtype=rng.choice([torch.int32, torch.int64]))
    special = sorted({rng.randrange(vocab_size) for _ in range(rng.choice([0, 1, 5]))})
    arguments: dict[str, Any] = {
        "input_ids": ids,
        "special_ids": special,
        "mask_token_id": rng.randrange(vocab_size),
        "vocab_size": vocab_size,
        "seed": rng.choice([rng.randrange(-(2**63), 2**64), torch.tensor([rng.randrange(2**62)])]),
        "mlm_probability": rng.choice([0.0, 0.15, 0.5, 1.0]),
        "mask_fraction": rng.choice([0.0, 0.5, 0.8]),
        "random_fraction": 0.0 if len(special) == vocab_size else rng.choice([0.0, 0.1, 0.2]),
        "strategy": rng.choice(["exact", "bernoulli"]),
    }
    if rng.random() < 0.5:
        arguments["positions"] = torch.randint(-(2**63), 2**63 - 1, shape)
    if len(shape) == 1 and rng.random() < 0.5:
        bounds = [0, *sorted(rng.choices(range(ids.numel() + 1), k=rng.choice([0, 3]))), ids.numel()]
        arguments["cu_seqlens"] = torch.tensor(bounds, dtype=torch.int32)
    if rng.random() < 0.5:
        arguments["subword"] = torch.rand(vocab_size) < 0.4
    return Case(ops.mask_tokens, arguments, lambda **given: list(ops.mask_tokens_ref(**given)), exact=True)


def balance(rng: random.Random, op: str = "balance") -> Case:
    from mtfast._planner import balance

    sizes = [rng.choice([0, 1, 2, 9]) for _ in range(rng.choice([0, 1, 3]))]
    return Case(
        balance,
        {
            "tokens": torch.randint(rng.choice([1, 3, 600, 2**50]), (sum(sizes),)),
            "step_offsets": torch.tensor([0, *accumulate(sizes)]),
            "bins": rng.choice([1, 2, 3, 40, 2**62]),
        },
    )


def registered(rng: random.Random, op: str) -> Case:
    """The registered op, or its backward, with arguments as the Python function passes them."""
    given = CASES[op](rng, op).arguments
    given = {name: x.detach() if isinstance(x, Tensor) else x for name, x in given.items()}
    if op == "mask_tokens":
        options = {name: given.pop(name, None) for name in ("positions", "cu_seqlens", "subword")}
        seed = given.pop("seed")
        options |= {"seed": rng.choice([1, -1, 2**63 - 1]), "exact": given.pop("strategy") == "exact"}
        options["seed_tensor"] = seed if isinstance(seed, Tensor) else None
        return Case(raw.mask_tokens, given | options)
    if op == "bias_gelu":
        if rng.random() < 0.4:
            return Case(raw.bias_gelu, given)
        return Case(raw.bias_gelu_backward, {"dy": torch.randn_like(given["x"]), **given})
    seed = given["seed"]
    given["seed"] = seed if isinstance(seed, Tensor) else rng.choice([None, torch.tensor([1])])
    if given["dropout_p"] and given["seed"] is None:
        given["dropout_p"] = 0.0
    backward = rng.random() < 0.6
    if op == "concat_mlp":
        given |= {"u_rows": given.get("u_rows"), "v_rows": given.get("v_rows")}
        given["activation"] = ACTIVATIONS.index(given["activation"])
        if not backward:
            return Case(raw.concat_mlp, given | {"save_hidden": rng.random() < 0.5})
        y, z = raw.concat_mlp(**given, save_hidden=True)
        del given["bias1"], given["bias2"]
        return Case(raw.concat_mlp_backward, given | {"dy": y, "z": z, "needs": rng.randrange(8)})
    if op == "dropout_add_layer_norm":
        if not backward:
            return Case(raw.dropout_add_layer_norm, given | {"save_stats": rng.random() < 0.5})
        y, stats = raw.dropout_add_layer_norm(**given, save_stats=True)
        del given["bias"], given["eps"]
        needs = rng.randrange(32)
        return Case(raw.dropout_add_layer_norm_backward, given | {"dy": y, "stats": stats, "needs": needs})
    given["softmax_scale"] = 0.3
    if not backward:
        return Case(getattr(raw, op), given)
    out, stats = getattr(raw, op)(**given)
    return Case(getattr(raw, f"{op}_backward"), given | {"dout": out, "out": out, "stats": stats})


CASES: dict[str, Callable[[random.Random, str], Case]] = {
    "mask_tokens": mask_tokens,
    "concat_mlp": concat_mlp,
    "bias_gelu": bias_gelu,
    "dropout_add_layer_norm": dropout_add_layer_norm,
    "packed_attention": attention,
    "packed_attention_qkv": attention,
    "packed_attention_cls": attention,
    "balance": balance,
}
