"""torch's FlopCounterMode counts the ops' products as it counts those of their references."""

import functools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mtfast import ops


def counted(function, *inputs) -> int:
    """Of the forward and, where an input wants a gradient, the backward pass."""
    with FlopCounterMode(display=False) as counter:
        output = function(*inputs)
        if output.requires_grad:
            output.sum().backward()
    return counter.get_total_flops()


LENGTHS = (5, 1, 0, 12)
CU_SEQLENS = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)], dtype=torch.int32)


@pytest.mark.parametrize("backward", [False, True])
def test_attention(backward):
    """4 heads head_dim length^2 for each sequence, once and, with torch's count of five products for two in
    the backward pass, 2.5 times again."""
    heads, head_dim = 3, 32
    of_all = 4 * heads * head_dim * sum(length**2 for length in LENGTHS)
    of_first = 4 * heads * head_dim * sum(LENGTHS)
    q, k, v = torch.randn(3, sum(LENGTHS), heads, head_dim).unbind()
    first = torch.randn(len(LENGTHS), heads, head_dim)
    qkv = torch.stack([q, k, v], dim=1)
    times = 3.5 if backward else 1
    for function, inputs, flops in (
        (ops.packed_attention, (q, k, v), of_all),
        (ops.packed_attention_qkv, (qkv,), of_all),
        (ops.packed_attention_cls, (first, k, v), of_first),
    ):
        inputs = [x.clone().requires_grad_(backward) for x in inputs]
        call = functools.partial(function, cu_seqlens=CU_SEQLENS, max_seqlen=max(LENGTHS))
        assert counted(call, *inputs) == times * flops


@pytest.mark.parametrize("needs", [(), ("u",), ("weight1", "weight2"), ("v", "weight1", "weight2")])
@pytest.mark.parametrize("gathers", [False, True])
def test_concat_mlp(needs, gathers):
    hidden, inner, outputs, batch = 8, 16, 2, 6
    shapes = {"u": (batch, hidden), "v": (batch, hidden), "weight1": (inner, 2 * hidden), "bias1": (inner,)}
    shapes |= {"weight2": (outputs, inner), "bias2": (outputs,)}
    inputs = [torch.randn(shape).requires_grad_(name in needs) for name, shape in shapes.items()]
    rows = {"u_rows": torch.arange(3), "v_rows": torch.tensor([5, 0, 0])} if gathers else {}
    examples = 3 if gathers else batch
    first, second = 2 * examples * 2 * hidden * inner, 2 * examples * inner * outputs
    wanted = first + second
    if needs:
        # Of the second layer both gradients, whoever asks; of the first, what is asked for.
        wanted += 2 * second + ("weight1" in needs) * first + (("u" in needs) + ("v" in needs)) * first // 2
    assert counted(lambda *x: ops.concat_mlp(*x, **rows), *inputs) == wanted


def test_under_fake_tensors_lengths_are_the_longest():
    with torch._subclasses.FakeTensorMode():
        q, k, v = (torch.empty(10, 2, 32) for _ in range(3))
        cu_seqlens = torch.empty(4, dtype=torch.int32)
        flops = counted(lambda *x: ops.packed_attention(*x, cu_seqlens, 7), q, k, v)
    assert flops == 4 * 2 * 32 * 10 * 7
