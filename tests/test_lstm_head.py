"""The LSTM head against torch's LSTM on each sequence alone in float64; in bfloat16 against a packed one."""

from __future__ import annotations

import copy

import pytest
import torch
from bert_twins import relative_difference
from torch import Tensor, nn

from mtfast.models.multitask import LstmHead

HIDDEN = 32
LENGTHS = [1, 2, 3, 4, 5, 7, 8, 9, 12, 16, 17, 23, 31, 42, 55, 60, 60, 1, 17]
N = len(LENGTHS)


def drawn(dtype: torch.dtype, seed: int = 0) -> tuple[LstmHead, Tensor, Tensor, Tensor]:
    """A head, [CLS] states, token states and bounds of sequences that stand in any order, with gaps."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    head = LstmHead(HIDDEN, 24, 5, "tanh", 0.0)
    for parameter in head.parameters():  # large enough that every gate matters
        nn.init.normal_(parameter, std=0.3, generator=generator)
    lengths = torch.tensor(LENGTHS)
    order = torch.randperm(N, generator=generator)
    ends = (lengths[order] + 1).cumsum(0)
    bounds = torch.empty(N, 2, dtype=torch.int64)
    bounds[order] = torch.stack([ends - lengths[order], ends], dim=1)
    cls, tokens = (torch.randn(count, HIDDEN, generator=generator) for count in (N, int(ends[-1])))
    return head.to(dtype), cls.to(dtype), tokens.to(dtype), bounds


def alone(head: LstmHead, tokens: Tensor, bounds: Tensor) -> Tensor:
    """The last states of each sequence, one run of PyTorch's LSTM after another."""
    lstm = nn.LSTM(HIDDEN, HIDDEN // 2, bidirectional=True, dtype=tokens.dtype)
    weights = dict(head.lstm.named_parameters())
    states = [
        torch.func.functional_call(lstm, weights, (tokens[begin:end],))[1][0].flatten()
        for begin, end in bounds.tolist()
    ]
    return torch.stack(states)


def packed(head: LstmHead, tokens: Tensor, bounds: Tensor) -> Tensor:
    """The same for all of them at once, in PyTorch's packed form."""
    lstm = nn.LSTM(HIDDEN, HIDDEN // 2, bidirectional=True, dtype=head.lstm.weight_ih_l0.dtype)
    sequences = nn.utils.rnn.pack_sequence([tokens[b:e] for b, e in bounds.tolist()], enforce_sorted=False)
    _, (final, _) = torch.func.functional_call(lstm, dict(head.lstm.named_parameters()), (sequences,))
    return final.transpose(0, 1).flatten(1)


def gradients(loss: Tensor, head: LstmHead, *inputs: Tensor) -> dict[str, Tensor]:
    wanted = dict(head.lstm.named_parameters()) | {str(index): x for index, x in enumerate(inputs)}
    return dict(zip(wanted, torch.autograd.grad(loss, list(wanted.values())), strict=True))


@pytest.mark.parametrize("max_seqlen", [60, 61, 100])
def test_final_states_are_those_of_each_sequence_alone(max_seqlen):
    head, _, tokens, bounds = drawn(torch.float64)
    tokens.requires_grad_()
    found, expected = head.lstm(tokens, bounds, max_seqlen), alone(head, tokens, bounds)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    factors = torch.randn_like(expected)
    ours, theirs = (gradients((x * factors).sum(), head, tokens) for x in (found, expected))
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-10, atol=1e-10, msg=name)


def test_outputs_and_gradients_are_the_oracles():
    head, cls, tokens, bounds = drawn(torch.float32)
    exact = copy.deepcopy(head).double()
    inputs = [x.requires_grad_() for x in (cls, tokens)]
    exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
    found = head(*inputs, bounds, 60)
    features = torch.cat([exact_inputs[0], alone(exact, exact_inputs[1], bounds)], dim=1)
    expected = exact.out_proj(torch.tanh(exact.dense(features)))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
    factors = torch.randn_like(expected)
    ours = gradients((found * factors).sum(), head, *inputs)
    for name, gradient in gradients((expected * factors).sum(), exact, *exact_inputs).items():
        assert relative_difference(ours[name], gradient) < 1e-5, name


@pytest.mark.parametrize("where", ["first", "within", "last"])
def test_an_empty_sequence_is_finite_and_changes_no_other(where):
    head, cls, tokens, bounds = drawn(torch.float32)
    tokens.requires_grad_()
    place = {"first": 0, "within": 100, "last": len(tokens)}[where]
    filled = torch.cat([bounds, torch.tensor([[place, place]] * 3)])
    given = torch.cat([cls, torch.zeros(3, HIDDEN)])
    expected, found = head(cls, tokens, bounds, 60), head(given, tokens, filled, 60)
    assert torch.isfinite(found).all()
    torch.testing.assert_close(found[:N], expected, rtol=1e-5, atol=1e-6)
    ours, theirs = (gradients(x[:N].square().sum(), head, tokens) for x in (found, expected))
    for name, gradient in theirs.items():
        assert relative_difference(ours[name], gradient) < 1e-5, name
    alone_there = head(given[N:], tokens, filled[N:], 1)
    assert torch.isfinite(alone_there).all()


@pytest.mark.parametrize("count", [0, 7])
def test_without_sequences_every_weight_has_a_gradient_of_zero(count):
    head, cls, tokens, bounds = drawn(torch.float32)
    output = head(cls[:0], tokens[:count], bounds[:0], 60)
    assert output.shape == (0, 5)
    output.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in head.parameters())


@pytest.mark.parametrize("autocast", ["float32 states", "bfloat16 states", None])
def test_bfloat16_is_no_worse_than_the_packed_form(autocast):
    """Under autocast with float32 weights, or with all in bfloat16, against float64 on the same numbers."""
    errors: dict[str, list[tuple[float, float]]] = {}
    for seed in range(3):
        head, _, tokens, bounds = drawn(torch.float32, seed)
        tokens = tokens.bfloat16()
        if autocast is None:
            head = head.bfloat16()
        exact, exact_tokens = copy.deepcopy(head).double(), tokens.double().requires_grad_()
        tokens = (tokens.float() if autocast == "float32 states" else tokens).requires_grad_()
        expected = alone(exact, exact_tokens, bounds)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast is not None):
            ours, theirs = head.lstm(tokens, bounds, 64), packed(head, tokens, bounds)
        factors = torch.randn_like(expected)
        wanted = gradients((expected * factors).sum(), exact, exact_tokens) | {"states": expected}
        found = gradients((ours * factors).sum(), head, tokens) | {"states": ours}
        others = gradients((theirs * factors).sum(), head, tokens) | {"states": theirs}
        for name, x in wanted.items():
            ours_off, theirs_off = (
                (y.detach().double() - x.detach()).norm() for y in (found[name], others[name])
            )
            errors.setdefault(name, []).append((float(ours_off), float(theirs_off)))
    for name, pairs in errors.items():
        mine, packed_ones = (sum(error) for error in zip(*pairs, strict=True))
        assert mine <= 2 * packed_ones, (name, pairs)
