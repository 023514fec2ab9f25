"""A packed batch, what a peer of packed_attention is, and the check that it computes the same attention."""

from __future__ import annotations

import copy
import functools
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from benchmarks.timing import cloned, reason_of
from mtfast.ops import packed_attention_ref

HEADS, HEAD_DIM = 12, 64
SMALL = {"ragged": (5, 1, 16, 37, 130, 12), "equal": (32, 32, 32)}  # lengths that a peer is checked on
# Norm of the error over that of the exact result: far above rounding, far below that of any other attention.
MOST_ERROR = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


class UnsuitableError(Exception):
    """Why a peer does not take a batch."""


@dataclass(frozen=True)
class Batch:
    """A packed batch: qkv [total, 3, heads, head_dim], a leaf that wants a gradient; dout [total, heads,
    head_dim]; cu_seqlens int32 [sequences + 1]. The other layouts are made when first asked for."""

    lengths: tuple[int, ...]
    qkv: Tensor
    dout: Tensor
    cu_seqlens: Tensor
    dropout_p: float

    @classmethod
    def random(
        cls,
        lengths: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
        dropout_p: float,
        head_dim: int = HEAD_DIM,
    ) -> Batch:
        """Normally distributed tensors for sequences of these lengths."""
        total = sum(lengths)
        qkv = torch.randn(total, 3, HEADS, head_dim, device=device, dtype=dtype, requires_grad=True)
        dout = torch.randn(total, HEADS, head_dim, device=device, dtype=dtype)
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
        return cls(tuple(lengths), qkv, dout, cu_seqlens, dropout_p)

    @property
    def max_seqlen(self) -> int:
        return max(self.lengths)

    @functools.cached_property
    def apart(self) -> tuple[Tensor, ...]:
        """q, k and v, each [total, heads, head_dim] and contiguous, leaves."""
        return tuple(x.detach().contiguous().requires_grad_() for x in self.qkv.unbind(1))

    @functools.cached_property
    def inside(self) -> Tensor:
        """Which places of a padded batch hold a token, bool [sequences, max_seqlen]."""
        places = torch.arange(self.max_seqlen, device=self.qkv.device)
        return places < self.cu_seqlens.diff()[:, None]

    @functools.cached_property
    def padded(self) -> tuple[Tensor, ...]:
        """q, k, v (leaves) and dout, each [sequences, heads, max_seqlen, head_dim] and contiguous."""
        tensors = []
        for x in (*self.apart, self.dout):
            wide = x.new_zeros(*self.inside.shape, *x.shape[1:])
            wide[self.inside] = x.detach()
            tensors.append(wide.transpose(1, 2).contiguous())
        return (*(x.requires_grad_() for x in tensors[:3]), tensors[3])


class Peer(ABC):
    """Attention over one batch, as somebody computes it. What it reads of it is in `inputs` and `douts`."""

    name: ClassVar[str]
    inputs: Sequence[Tensor]
    douts: Sequence[Tensor]

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        self.inputs, self.douts = batch.apart, (batch.dout,)

    def again(self) -> Peer:
        """The same on tensors of its own; what was compiled is shared."""
        other = copy.copy(self)
        other.inputs, other.douts = cloned(self.inputs), cloned(self.douts)
        return other

    @abstractmethod
    def run(self, backward: bool) -> list[Tensor]:
        """What is timed: the forward, or the forward and the backward to all inputs. Output and gradients."""

    def packed(self, results: list[Tensor]) -> list[Tensor]:
        """What `run` returned, with a backward, as out, dq, dk and dv of [total, heads, head_dim]."""
        return results


class AutogradPeer(Peer):
    """One that autograd differentiates: `inputs` are the leaves, `douts` is the gradient of the output."""

    @abstractmethod
    def forward(self) -> Tensor:
        """The output, in this peer's layout."""

    def run(self, backward: bool) -> list[Tensor]:
        if not backward:
            with torch.no_grad():
                return [self.forward()]
        out = self.forward()
        return [out, *torch.autograd.grad(out, self.inputs, self.douts)]


def suitable(kind: type[Peer], batch: Batch, backward: bool) -> Peer | str:
    """The peer, checked and warmed up on the batch; or in one line why it is left out."""
    shape = "equal" if len(set(batch.lengths)) == 1 else "ragged"
    refused = refusal(kind, shape, batch.qkv.dtype, batch.qkv.device, batch.dropout_p)  # type: ignore[arg-type]
    if refused:
        return refused
    try:
        peer = kind(batch)
        peer.run(backward)
    except Exception as error:
        return _reason(error)
    return peer


@functools.cache
def refusal(
    kind: type[Peer], shape: str, dtype: torch.dtype, device: torch.device, dropout_p: float
) -> str | None:
    """Why the peer cannot be compared, as a small batch shows; None if it computes what it should."""
    torch.manual_seed(0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            batch = Batch.random(SMALL[shape], dtype, device, dropout_p)
            peer, whole = kind(batch), replace(batch, dropout_p=0.0)
            if wrong := difference(kind, whole):
                raise UnsuitableError(wrong)
            if dropout_p and torch.equal(peer.run(False)[0], kind(whole).run(False)[0]):
                raise UnsuitableError("dropout changes nothing")
        except Exception as error:
            # torch warns of each backend's reasons; those that were switched off are disabled.
            causes = [str(w.message).split(" (Triggered")[0] for w in caught]
            causes = [c for c in causes if "because" not in c and "disabled" not in c]
            return " ".join([_reason(error), *causes[:1]])
    return None


def difference(kind: type[Peer], batch: Batch) -> str:
    """What of the output and the gradients is not the float64 reference's; nothing when they all are."""
    q, k, v = (x.detach().double().requires_grad_() for x in batch.apart)
    out, _ = packed_attention_ref(q, k, v, batch.cu_seqlens, batch.max_seqlen)
    exact = [out, *torch.autograd.grad(out, (q, k, v), batch.dout.double())]
    peer = kind(batch)
    for name, found, wanted in zip(
        ("out", "dq", "dk", "dv"), peer.packed(peer.run(True)), exact, strict=True
    ):
        error = float((found.detach().double() - wanted.detach()).norm() / wanted.detach().norm())
        if not error < MOST_ERROR[batch.qkv.dtype]:
            return f"{name} off by {error:.2g} of its norm"
    return ""


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, UnsuitableError) else reason_of(error)
