"""What the tests of packed attention share: batches, the float64 oracle, how far from it a result may be."""

from __future__ import annotations

import dataclasses
import random

import torch
from torch import Tensor

from mtfast.ops.packed_attention import packed_attention_cls_ref, packed_attention_ref

SEED = 0x1234_5678_9ABC_DEF0
NAMES = ("out", "lse", "dq", "dk", "dv")


@dataclasses.dataclass(frozen=True)
class Batch:
    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    lengths: tuple[int, ...]

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.q, self.k, self.v


def make_batch(
    lengths: list[int], heads: int, head_dim: int, dtype: torch.dtype, *, seed: int = 0, layout: str = "apart"
) -> Batch:
    """layout: "apart", "fused" (views of [total, 3, heads, head_dim]), "sliced" (views of something wider),
    or "cls" (q has one row a sequence)."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    if layout == "fused":
        q, k, v = normal(total, 3, heads, head_dim).unbind(1)
    elif layout == "sliced":
        q, k, v = (normal(total, heads + 1, 2 * head_dim)[:, 1:, head_dim:] for _ in range(3))
    else:
        rows = len(lengths) if layout == "cls" else total
        q, k, v = (normal(n, heads, head_dim) for n in (rows, total, total))
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    dout = normal(q.size(0), heads, head_dim)
    return Batch(q, k, v, dout, cu_seqlens, max(lengths, default=0), tuple(lengths))


def reference(
    batch: Batch, dtype: torch.dtype, dropout_p: float = 0.0, cls: bool = False
) -> list[Tensor | None]:
    """out, lse, dq, dk, dv of the eager reference computed in `dtype`."""
    inputs = [x.detach().to(dtype).requires_grad_() for x in batch.tensors]
    lse = None
    arguments = (*inputs, batch.cu_seqlens, batch.max_seqlen)
    if cls:
        out = packed_attention_cls_ref(*arguments, dropout_p=dropout_p, seed=SEED)
    else:
        out, lse = packed_attention_ref(*arguments, dropout_p=dropout_p, seed=SEED)
    return [out, lse, *torch.autograd.grad(out, inputs, batch.dout.to(dtype))]


def errors(
    got: list[Tensor | None], batch: Batch, dropout_p: float = 0.0, cls: bool = False
) -> dict[str, tuple]:
    """For each result its error against float64, eager PyTorch's in the batch's dtype (both root mean square)
    and the rounding of its greatest number."""
    exact = reference(batch, torch.float64, dropout_p, cls)
    eager = reference(batch, batch.k.dtype, dropout_p, cls)
    found = {}
    for name, x, wanted, other in zip(NAMES, got, exact, eager, strict=True):
        if x is None or wanted is None or other is None or x.numel() == 0:
            continue
        rounding = torch.finfo(x.dtype).eps / 2 * wanted.abs().max().item()
        found[name] = (
            (x.double() - wanted).square().mean().sqrt().item(),
            (other.double() - wanted).square().mean().sqrt().item(),
            rounding,
        )
    return found


def assert_close_to_exact(
    got: list[Tensor | None], batch: Batch, dropout_p: float = 0.0, cls: bool = False
) -> None:
    """At most twice eager's error; where eager happens to be all but exact, one rounding on top of it."""
    for name, (error, eager, rounding) in errors(got, batch, dropout_p, cls).items():
        assert error <= max(2 * eager, eager + rounding), (
            f"{name}: error {error:.3g}, eager PyTorch's {eager:.3g}, rounding {rounding:.3g}, "
            f"{batch.k.dtype}, head_dim {batch.k.size(-1)}, lengths {batch.lengths}, dropout_p {dropout_p}"
        )


def random_lengths(number: int) -> list[int]:
    """Lengths of random batch `number`: mostly short, every tenth batch up to 1,100 tokens."""
    choose = random.Random(number)
    longest = choose.choice([300, 700, 1100]) if number % 10 == 0 else choose.choice([8, 16, 40, 64, 65, 130])
    lengths = [choose.randint(0, longest) for _ in range(choose.randint(1, 3 if longest > 200 else 6))]
    lengths[choose.randrange(len(lengths))] = longest
    return [1, *lengths] if number % 7 == 0 else lengths
