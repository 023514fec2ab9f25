"""Ops inside torch.utils.checkpoint: what is computed again is what was computed first, dropout included."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from mtfast.ops import (
    ConcatMLP,
    PackedSelfAttention,
    bias_gelu,
    concat_mlp,
    dropout_add_layer_norm,
    packed_attention,
    packed_attention_cls,
    packed_attention_qkv,
)

CU = torch.tensor([0, 7, 21, 30], dtype=torch.int32)
MAX_SEQLEN = 14


class Region(nn.Module):
    """A linear layer and, last, an op, most with dropout: nothing after it is saved for the backward pass."""

    def __init__(self, op: str) -> None:
        super().__init__()
        self.op = op
        self.linear = nn.Linear(64, 192)
        self.attention = PackedSelfAttention(64, 2, dropout_p=0.3)
        self.norm = nn.LayerNorm(64)
        self.mlp = ConcatMLP(64, 16, 2, dropout_p=0.3)

    def forward(self, x):
        q, k, v = self.linear(x).view(-1, 3, 2, 32).unbind(1)
        if self.op == "packed_attention":
            return packed_attention(q, k, v, CU, MAX_SEQLEN, dropout_p=0.3)
        if self.op == "packed_attention_qkv":
            return packed_attention_qkv(torch.stack([q, k, v], 1), CU, MAX_SEQLEN, dropout_p=0.3)
        if self.op == "packed_attention_cls":
            return packed_attention_cls(q[CU[:-1]], k, v, CU, MAX_SEQLEN, dropout_p=0.3)
        if self.op == "PackedSelfAttention":
            return self.attention(x, CU, MAX_SEQLEN)
        if self.op == "ConcatMLP":
            return self.mlp(x * 2, x)
        if self.op == "bias_gelu":
            return bias_gelu(F.linear(x, self.linear.weight), self.linear.bias)
        if self.op == "dropout_add_layer_norm":
            return dropout_add_layer_norm(x * 2, x, self.norm.weight, self.norm.bias, dropout_p=0.3)
        weights = [
            self.mlp.dense.weight,
            self.mlp.dense.bias,
            self.mlp.out_proj.weight,
            self.mlp.out_proj.bias,
        ]
        rows = torch.tensor([0, 3, 3])
        return concat_mlp(x * 2, x, *weights, u_rows=rows, v_rows=rows, dropout_p=0.3)


OPS = (
    "packed_attention",
    "packed_attention_qkv",
    "packed_attention_cls",
    "PackedSelfAttention",
    "ConcatMLP",
    "concat_mlp",
    "bias_gelu",
    "dropout_add_layer_norm",
)


def once(run, x):
    return checkpoint(run, x, use_reentrant=False)


def nested(run, x):
    return checkpoint(lambda y: once(run, y), x, use_reentrant=False)


def to_the_end(run, x):
    with set_checkpoint_early_stop(False):
        return once(run, x)


def reentrant(run, x):
    return checkpoint(run, x, use_reentrant=True)


def of_compiled(run, x):
    return once(torch.compile(run, backend="aot_eager"), x)


def compiled(run, x):
    return torch.compile(lambda y: once(run, y), backend="aot_eager")(x)


def under_autocast(run, x):
    with torch.autocast("cpu", torch.bfloat16):
        return once(run, x)


def gradients(region, way, x):
    """Of x and the parameters, and the output, with one seed for all."""
    torch.manual_seed(5)
    x = x.clone().requires_grad_()
    out = way(region, x)
    torch.manual_seed(6)  # which must not reach what is computed again
    out.float().sum().backward()
    grads = [x.grad, *(p.grad for p in region.parameters())]
    region.zero_grad()
    return out, grads


@pytest.mark.filterwarnings("ignore:.*autocast")
@pytest.mark.parametrize("way", (once, nested, to_the_end, reentrant, of_compiled, compiled, under_autocast))
@pytest.mark.parametrize("op", OPS)
def test_checkpointed_gradients_are_the_plain_ones(op, way):
    torch.manual_seed(0)
    region, x = Region(op), torch.randn(30, 64)
    plain = {
        under_autocast: lambda run, y: torch.autocast("cpu", torch.bfloat16)(run)(y),
        of_compiled: lambda run, y: torch.compile(run, backend="aot_eager")(y),
        compiled: lambda run, y: torch.compile(run, backend="aot_eager")(y),
    }.get(way, lambda run, y: run(y))
    out, grads = gradients(region, way, x)
    expected_out, expected = gradients(region, plain, x)
    assert torch.equal(out, expected_out)
    for grad, wanted in zip(grads, expected, strict=True):
        assert (grad is None) == (wanted is None)
        assert grad is None or torch.equal(grad, wanted)
    assert any(grad is not None and grad.abs().max() > 0 for grad in grads)


@pytest.mark.parametrize("op", OPS)
def test_saved_tensors_may_be_kept_elsewhere(op):
    torch.manual_seed(0)
    region, x = Region(op), torch.randn(30, 64)

    def packed(run, y):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.numpy(force=True), torch.from_numpy):
            return run(y)

    for grad, wanted in zip(
        gradients(region, packed, x)[1], gradients(region, lambda r, y: r(y), x)[1], strict=True
    ):
        assert (grad is None and wanted is None) or torch.equal(grad, wanted)
