"""What the tests of packed attention share: batches, the float64 oracle, and what holds whoever computes.

A `Run` gives out, lse, dq, dk and dv of a batch, on the CPU; lse is None where there is one query a sequence.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections import defaultdict
from collections.abc import Callable, Iterable

import torch
from real_lengths import IMDB, QUORA, SST, STS
from torch import Tensor

from mtfast.ops import packed_attention, packed_attention_cls
from mtfast.ops._packed_attention_ref import (
    dropout_keep_ref,
    packed_attention_cls_ref,
    packed_attention_ref,
)

SEED = 0x1234_5678_9ABC_DEF0
NAMES = ("out", "lse", "dq", "dk", "dv")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
HEAD_DIMS = (32, 64, 128, 256)


@dataclasses.dataclass(frozen=True)
class Batch:
    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    cu_seqlens: Tensor
    lengths: tuple[int, ...]
    cls: bool = False  # one query a sequence

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.q, self.k, self.v

    @property
    def max_seqlen(self) -> int:
        return max(self.lengths, default=0)


Run = Callable[..., list[Tensor | None]]  # (batch, dropout_p=0.0, seed=SEED)


def offsets(lengths: Iterable[int]) -> Tensor:
    """cu_seqlens of sequences of these lengths."""
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def make_batch(
    lengths: Iterable[int],
    heads: int,
    head_dim: int,
    dtype: torch.dtype,
    *,
    seed: int = 0,
    layout: str = "apart",
    device: str = "cpu",
) -> Batch:
    """layout: "apart", "fused" (views of [total, 3, heads, head_dim]), "sliced" (views of something wider),
    or "cls" (q has one row a sequence)."""
    generator = torch.Generator().manual_seed(seed)
    lengths = tuple(lengths)
    total = sum(lengths)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    if layout == "fused":
        q, k, v = normal(total, 3, heads, head_dim).unbind(1)
    elif layout == "sliced":
        q, k, v = (normal(total, heads + 1, 2 * head_dim)[:, 1:, head_dim:] for _ in range(3))
    else:
        rows = len(lengths) if layout == "cls" else total
        q, k, v = (normal(n, heads, head_dim) for n in (rows, total, total))
    dout = normal(q.size(0), heads, head_dim)
    return Batch(q, k, v, dout, offsets(lengths).to(device), lengths, layout == "cls")


def random_lengths(number: int) -> list[int]:
    """Lengths of random batch `number`: mostly short, every tenth up to 1,100 tokens, every eleventh real."""
    choose = random.Random(number)
    if number % 11 == 5:
        return [*choose.sample(SST, 2), *choose.sample(QUORA, 4), *choose.sample(STS, 2), choose.choice(IMDB)]
    longest = choose.choice([300, 700, 1100]) if number % 10 == 0 else choose.choice([8, 16, 40, 64, 65, 130])
    lengths = [choose.randint(0, longest) for _ in range(choose.randint(1, 3 if longest > 200 else 6))]
    lengths[choose.randrange(len(lengths))] = longest
    return [1, *lengths] if number % 7 == 0 else lengths


def reference(batch: Batch, dtype: torch.dtype, dropout_p: float = 0.0) -> list[Tensor | None]:
    """out, lse, dq, dk, dv of the eager reference computed in `dtype`, on the CPU."""
    inputs = [x.detach().to("cpu", dtype).requires_grad_() for x in batch.tensors]
    lse = None
    arguments = (*inputs, batch.cu_seqlens.cpu(), batch.max_seqlen)
    if batch.cls:
        out = packed_attention_cls_ref(*arguments, dropout_p=dropout_p, seed=SEED)
    else:
        out, lse = packed_attention_ref(*arguments, dropout_p=dropout_p, seed=SEED)
    return [out, lse, *torch.autograd.grad(out, inputs, batch.dout.to("cpu", dtype))]


def run_op(batch: Batch, dropout_p: float = 0.0, seed: int = SEED) -> list[Tensor | None]:
    """out, lse, dq, dk, dv of the op, on the CPU."""
    q, k, v = (x.detach().requires_grad_() for x in batch.tensors)
    arguments = (q, k, v, batch.cu_seqlens, batch.max_seqlen)
    lse = None
    if batch.cls:
        out = packed_attention_cls(*arguments, dropout_p=dropout_p, seed=seed)
    else:
        out, lse = packed_attention(*arguments, dropout_p=dropout_p, seed=seed, return_lse=True)
    grads = torch.autograd.grad(out, (q, k, v), batch.dout)
    return [None if x is None else x.detach().cpu() for x in (out, lse, *grads)]


@dataclasses.dataclass(frozen=True)
class Error:
    """Of one result against float64: ours, and eager PyTorch's in the batch's dtype."""

    rms: float
    eager_rms: float
    greatest: float
    eager_greatest: float
    numbers: int

    @classmethod
    def of(cls, result: Tensor, eager: Tensor, exact: Tensor) -> Error:
        ours, eagers = result.double() - exact, eager.double() - exact
        rms = (x.square().mean().sqrt().item() for x in (ours, eagers))
        greatest = (x.abs().max().item() for x in (ours, eagers))
        return cls(*rms, *greatest, exact.numel())


def check_random_batches(
    run: Run,
    numbers: Iterable[int],
    head_dim: int,
    dtype: torch.dtype,
    *,
    cls: bool = False,
    device: str = "cpu",
) -> None:
    """Root-mean-square errors at most twice eager's in each batch and over all; in 16 bits the greatest too.

    In float32 few rows tell little of eager's usual error: fewer than 64 count only among all batches. The
    greatest error tells as little: to add up in another order moves eager's own by a factor of up to 4 in one
    batch, and of 1.8 over a hundred.
    """
    all_errors: dict[str, list[Error]] = defaultdict(list)
    for number in numbers:
        layout = "cls" if cls else ("apart", "fused", "sliced")[number // 3 % 3]
        lengths = random_lengths(number)
        batch = make_batch(lengths, 1, head_dim, dtype, seed=number, layout=layout, device=device)
        dropout_p = (0.0, 0.1)[number // 9 % 2]
        got, eager, exact = (
            run(batch, dropout_p),
            reference(batch, dtype, dropout_p),
            reference(batch, torch.float64, dropout_p),
        )
        for name, *results in zip(NAMES, got, eager, exact, strict=True):
            if results[0] is None or results[0].numel() == 0:
                continue
            error = Error.of(*results)
            all_errors[name].append(error)
            few = dtype == torch.float32 and len(batch.q) < 64
            assert few or error.rms <= 2 * error.eager_rms, (
                f"{name} of batch {number}, head_dim {head_dim}, {dtype}, lengths {lengths}, dropout_p "
                f"{dropout_p}: error {error.rms:.3g}, eager PyTorch's {error.eager_rms:.3g}"
            )
        if cls:
            empty = torch.tensor(lengths) == 0
            assert (got[0][empty] == 0).all() and (got[2][empty] == 0).all()
    for name, errors in all_errors.items():
        ours = math.sqrt(sum(e.rms**2 * e.numbers for e in errors))
        eagers = math.sqrt(sum(e.eager_rms**2 * e.numbers for e in errors))
        assert ours <= 2 * eagers, f"{name}: {ours / eagers:.2f} times eager's error over all batches"
        if dtype != torch.float32:
            ours, eagers = max(e.greatest for e in errors), max(e.eager_greatest for e in errors)
            assert ours <= 2 * eagers, f"{name}: greatest error {ours:.3g}, eager's {eagers:.3g}"


def check_dropout(
    run: Run, dropout_p: float, *, length: int = 60, heads: int = 30, device: str = "cpu"
) -> None:
    """Forward and backward drop what the reference says, as often as they should.

    Equal scores, v and dout the identity: then out and dv are the weights.
    """
    zeros = torch.zeros(length, heads, 64, device=device)
    identity = torch.eye(length, 64, device=device)[:, None].expand(-1, heads, -1).contiguous()
    batch = Batch(zeros, zeros, identity, identity, offsets([length]).to(device), (length,))
    out, _, _, _, dv = run(batch, dropout_p)
    row = torch.arange(length)
    keep = dropout_keep_ref(torch.zeros(1, 1).long(), row[:, None], row[None], heads, dropout_p, SEED)
    factors = keep / (1 - round(dropout_p * 65536) / 65536)
    torch.testing.assert_close(out[:, :, :length].permute(1, 0, 2) * length, factors, rtol=1e-5, atol=0)
    torch.testing.assert_close(dv[:, :, :length].permute(1, 2, 0) * length, factors, rtol=1e-5, atol=0)
    error = math.sqrt(dropout_p * (1 - dropout_p) / keep.numel())
    assert abs(keep.double().mean() - (1 - dropout_p)) < 4 * error


def check_mean_over_seeds(run: Run, seeds: int, device: str = "cpu") -> None:
    """Approaches the undropped result, which dropout_p = 0 gives bit for bit."""
    batch = make_batch([12, 5], 1, 32, torch.float32, device=device)
    plain = run(batch, 0.0)
    assert all(torch.equal(a, b) for a, b in zip(run(batch, 0.0, seed=1), plain, strict=True))
    draws = [torch.stack(x) for x in zip(*(run(batch, 0.1, seed=s)[::4] for s in range(seeds)), strict=True)]
    for values, wanted in zip(draws, plain[::4], strict=True):  # out and dv, which are linear in the weights
        error = values.std(0) / math.sqrt(seeds)
        assert ((values.mean(0) - wanted).abs() < 5 * error + 1e-6).all()


def check_a_sequence_does_not_notice_the_others(run: Run, dtype: torch.dtype, device: str = "cpu") -> None:
    for length in (23, 64, 90, 150):
        alone = make_batch([length], 2, 64, dtype, device=device)
        wanted = run(alone)
        for before, after in (([3], [60]), ([64, 9], []), ([70, 1], [130]), ([], [170])):
            begin = sum(before)
            packed = make_batch([*before, length, *after], 2, 64, dtype, seed=1, device=device)
            for x, y in zip((*packed.tensors, packed.dout), (*alone.tensors, alone.dout), strict=True):
                x[begin : begin + length] = y
            out, lse, *grads = run(packed)
            got = [x[begin : begin + length] for x in (out, lse.T, *grads)]
            got[1] = got[1].T
            assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True)), (length, before, after)


def torch_math(batch: Batch) -> list[Tensor | None]:
    """As `reference`, sequence by sequence without dropout, in the steps of torch's `SDPBackend.MATH`: in
    float32, with the root of the scale on both sides, the weights kept for the backward pass."""
    inputs = [x.detach().cpu().requires_grad_() for x in batch.tensors]
    q, k, v = (x.float() for x in inputs)
    q, k = (x / q.size(2) ** 0.25 for x in (q, k))
    outs, lses = [], []
    for number, (begin, length) in enumerate(zip(batch.cu_seqlens.tolist(), batch.lengths, strict=False)):
        at = slice(begin, begin + length)
        scores = torch.einsum("ihd,jhd->hij", q[number : number + 1] if batch.cls else q[at], k[at])
        outs.append(torch.einsum("hij,jhd->ihd", scores.softmax(-1), v[at]))
        lses.append(scores.logsumexp(-1))
    out = torch.cat(outs).to(batch.q.dtype)
    lse = None if batch.cls else torch.cat(lses, 1)
    return [out, lse, *torch.autograd.grad(out, inputs, batch.dout.cpu())]


def check_large_scores(
    run: Run, dtype: torch.dtype, *, cls: bool = False, device: str = "cpu", products_in_16_bits: bool = False
) -> None:
    """Scores from usual ones to saturated ones of 10^7: errors at most twice those of torch's math path. But
    kernels that multiply in 16 bits are held to eager PyTorch in 16 bits.

    Where two large scores are nearly equal the error of one batch says little: the geometric mean counts.
    """
    for factor in (1, 10, 30, 100, 4000):
        shares: dict[str, list[float]] = defaultdict(list)
        for number in range(12):
            lengths, layout = ([7, 20], [30], [70])[number % 3], "cls" if cls else "apart"
            batch = make_batch(lengths, 1, 32, dtype, seed=number, layout=layout, device=device)
            batch = dataclasses.replace(batch, q=batch.q * factor, k=batch.k * factor)
            eager = reference(batch, dtype) if products_in_16_bits else torch_math(batch)
            results = run(batch), eager, reference(batch, torch.float64)
            for name, ours, theirs, exact in zip(NAMES, *results, strict=True):
                if exact is None:
                    continue
                error = Error.of(ours, theirs, exact)
                assert math.isfinite(error.rms), f"{name} with q and k times {factor}"
                if math.isfinite(error.eager_rms):  # float16's scores overflow
                    shares[name].append(math.log((error.rms + 1e-30) / (error.eager_rms + 1e-30)))
        for name, logs in shares.items():
            share = math.exp(sum(logs) / len(logs))
            assert share <= 2, f"{name} with q and k times {factor}: {share:.3g} times eager's error"


def check_what_is_not_finite(run: Run, dtype: torch.dtype, *, cls: bool = False, device: str = "cpu") -> None:
    """Inf and NaN appear where eager PyTorch has them, and in no other sequence."""
    lengths = [20, 9, 70]
    for sequence, (begin, length) in enumerate(zip((0, 20, 29), lengths, strict=True)):
        for name in ("q", "k", "v", "dout"):
            for value in (math.inf, -math.inf, math.nan):
                batch = make_batch(lengths, 1, 32, dtype, layout="cls" if cls else "apart", device=device)
                parts = {x: getattr(batch, x) for x in ("q", "k", "v", "dout")}
                at = {
                    x: slice(sequence, sequence + 1)
                    if cls and x in ("q", "dout")
                    else slice(begin, begin + length)
                    for x in parts
                }
                parts[name][at[name]][-1, 0, 3] = value
                alone = {x: part[at[x]] for x, part in parts.items()}
                wanted = reference(
                    Batch(**alone, cu_seqlens=offsets([length]), lengths=(length,), cls=cls), torch.float32
                )
                for result, where, want in zip(run(batch), ("q", "", "q", "k", "v"), wanted, strict=True):
                    if not where:
                        continue
                    inside = result[at[where]]
                    assert torch.equal(inside.isfinite(), want.isfinite()), (sequence, name, value, where)
                    finite = result.isfinite().sum() - inside.isfinite().sum()
                    assert finite == result.numel() - inside.numel(), (sequence, name, value, where)
