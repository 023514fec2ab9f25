"""The peers of packed_attention: the same attention as others compute it.

Each works on the layout that suits it best, laid out when the peer is made, which is not timed, and raises
UnsuitableError where it does not take the batch.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import dropout, scaled_dot_product_attention

from benchmarks.attention_batch import HEAD_DIM, HEADS, AutogradPeer, Batch, Peer, UnsuitableError
from mtfast.ops import packed_attention_qkv


class PackedAttention(AutogradPeer):
    """This project's op. With a seed tensor, as a CUDA graph needs it, each call counts that up first."""

    name = "mtfast"

    def __init__(self, batch: Batch, seed: Tensor | None = None) -> None:
        super().__init__(batch)
        self.inputs, self.seed = (batch.qkv,), seed

    def forward(self) -> Tensor:
        batch, (qkv,) = self.batch, self.inputs
        if self.seed is not None:
            self.seed += 1
        out = packed_attention_qkv(
            qkv, batch.cu_seqlens, batch.max_seqlen, dropout_p=batch.dropout_p, seed=self.seed
        )
        assert isinstance(out, Tensor)
        return out

    def packed(self, results: list[Tensor]) -> list[Tensor]:
        return [results[0], *results[1].unbind(1)]


class Padded(AutogradPeer):
    """On tensors padded to the longest sequence; padding and unpadding are not timed."""

    def __init__(self, batch: Batch) -> None:
        scores = len(batch.lengths) * HEADS * batch.max_seqlen**2 * batch.qkv.itemsize
        if batch.qkv.device.type == "cpu" and 6 * scores > _free_memory():  # a GPU's allocator says so itself
            raise UnsuitableError(f"padded scores of {scores / 2**30:.1f} GiB are too much for this machine")
        self.batch = batch
        *self.inputs, dout = batch.padded
        self.douts = (dout,)
        self.mask = None if batch.inside.all() else batch.inside[:, None, None, :]

    def packed(self, results: list[Tensor]) -> list[Tensor]:
        return [x.transpose(1, 2)[self.batch.inside] for x in results]


class PaddedEager(Padded):
    """Scores, softmax, dropout and product one after the other, as BERT was first written."""

    name = "padded eager"

    def forward(self) -> Tensor:
        q, k, v = self.inputs
        scores = q @ k.transpose(-1, -2) / math.sqrt(HEAD_DIM)
        if self.mask is not None:
            scores = scores.masked_fill(~self.mask, torch.finfo(scores.dtype).min)
        return dropout(scores.softmax(-1), self.batch.dropout_p) @ v


class PaddedSdpa(Padded):
    """torch's scaled_dot_product_attention, which chooses its backend itself."""

    name = "padded sdpa"

    def forward(self) -> Tensor:
        q, k, v = self.inputs
        return scaled_dot_product_attention(q, k, v, attn_mask=self.mask, dropout_p=self.batch.dropout_p)


class PaddedSdpaBackend(PaddedSdpa):
    """The same with one backend allowed, which costs the host some 10 us a call."""

    backend: ClassVar[SDPBackend]

    def forward(self) -> Tensor:
        with sdpa_kernel(self.backend):
            return super().forward()


class PaddedSdpaMath(PaddedSdpaBackend):
    name, backend = "padded sdpa math", SDPBackend.MATH


class PaddedSdpaEfficient(PaddedSdpaBackend):
    name, backend = "padded sdpa efficient", SDPBackend.EFFICIENT_ATTENTION


class PaddedSdpaFlash(PaddedSdpaBackend):
    name, backend = "padded sdpa flash", SDPBackend.FLASH_ATTENTION


class PaddedSdpaCudnn(PaddedSdpaBackend):
    name, backend = "padded sdpa cudnn", SDPBackend.CUDNN_ATTENTION


class PerSequence(AutogradPeer):
    """SDPA on one sequence after the other, cut out of qkv and joined again; split's backward is one cat."""

    name = "per sequence"

    def __init__(self, batch: Batch) -> None:
        super().__init__(batch)
        self.inputs = (batch.qkv,)

    def forward(self) -> Tensor:
        outs = []
        for part in self.inputs[0].split(self.batch.lengths):
            q, k, v = part.permute(1, 2, 0, 3).unsqueeze(1).unbind()
            out = scaled_dot_product_attention(q, k, v, dropout_p=self.batch.dropout_p)
            outs.append(out[0].transpose(0, 1))
        return torch.cat(outs)

    def packed(self, results: list[Tensor]) -> list[Tensor]:
        return [results[0], *results[1].unbind(1)]


class PerSequenceApart(Peer):
    """SDPA on one sequence after the other, each with tensors of its own: nothing is cut or joined."""

    name = "per sequence, apart"

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        tensors = [x.detach().split(batch.lengths) for x in (*batch.apart, batch.dout)]
        *qkv, self.douts = ([x.transpose(0, 1)[None].contiguous() for x in parts] for parts in tensors)
        self.inputs = [x.requires_grad_() for triple in zip(*qkv, strict=True) for x in triple]

    def run(self, backward: bool) -> list[Tensor]:
        thirds = (self.inputs[i::3] for i in range(3))
        with torch.set_grad_enabled(backward):
            outs = [
                scaled_dot_product_attention(q, k, v, dropout_p=self.batch.dropout_p)
                for q, k, v in zip(*thirds, strict=True)
            ]
        return [*outs, *torch.autograd.grad(outs, self.inputs, self.douts)] if backward else outs

    def packed(self, results: list[Tensor]) -> list[Tensor]:
        rows = [x[0].transpose(0, 1) for x in results]
        count = len(self.batch.lengths)
        return [torch.cat(part) for part in (rows[:count], *(rows[count + i :: 3] for i in range(3)))]


class Nested(AutogradPeer):
    """SDPA on nested tensors of jagged layout."""

    name = "nested sdpa"

    def __init__(self, batch: Batch) -> None:
        super().__init__(batch)
        offsets = batch.cu_seqlens.long()
        shortest, longest = min(batch.lengths), batch.max_seqlen
        jagged = torch.nested.nested_tensor_from_jagged
        self.inputs = [
            jagged(x.detach(), offsets, min_seqlen=shortest, max_seqlen=longest).requires_grad_()
            for x in batch.apart
        ]

    def forward(self) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in self.inputs)
        out = scaled_dot_product_attention(q, k, v, dropout_p=self.batch.dropout_p)
        return out.transpose(1, 2).values()

    def packed(self, results: list[Tensor]) -> list[Tensor]:
        return [results[0], *(x.values() for x in results[1:])]


class FlashAttention2(Peer):
    """FlashAttention-2 for varying lengths as torch ships it, without the cost of autograd around it."""

    name = "flash-2"

    def __init__(self, batch: Batch) -> None:
        _only_half_precision(batch)
        super().__init__(batch)

    def run(self, backward: bool) -> list[Tensor]:
        batch, aten = self.batch, torch.ops.aten
        q, k, v = self.inputs
        longest, p = batch.max_seqlen, batch.dropout_p
        where = (batch.cu_seqlens, batch.cu_seqlens, longest, longest, p, False)
        with torch.no_grad():
            out, lse, state, unused, _ = aten._flash_attention_forward(q, k, v, *where, False)
            if not backward:
                return [out]
            grads = aten._flash_attention_backward(*self.douts, q, k, v, out, lse, *where, state, unused)
        return [out, *grads]


class VarlenAttention(AutogradPeer):
    """torch.nn.attention.varlen.varlen_attn."""

    name = "varlen_attn"

    def __init__(self, batch: Batch) -> None:
        _only_half_precision(batch)
        _no_dropout(batch)
        super().__init__(batch)

    def forward(self) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn

        q, k, v = self.inputs
        cu, longest = self.batch.cu_seqlens, self.batch.max_seqlen
        out = varlen_attn(q, k, v, cu, cu, longest, longest)
        assert isinstance(out, Tensor)
        return out


class FlexAttention(AutogradPeer):
    """FlexAttention with a mask of documents, compiled for the batch's shape."""

    name = "flex"

    def __init__(self, batch: Batch) -> None:
        from torch.nn.attention.flex_attention import flex_attention

        _no_dropout(batch)
        super().__init__(batch)
        self.inputs = [x.detach().transpose(0, 1)[None].contiguous().requires_grad_() for x in batch.apart]
        self.douts = (batch.dout.transpose(0, 1)[None].contiguous(),)
        self.block_mask = document_mask(batch.lengths, batch.qkv.device)
        torch._dynamo.reset()  # past its limit of recompilations it would run uncompiled
        self.compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)

    def forward(self) -> Tensor:
        q, k, v = self.inputs
        return self.compiled(q, k, v, block_mask=self.block_mask)

    def packed(self, results: list[Tensor]) -> list[Tensor]:
        return [x[0].transpose(0, 1) for x in results]


def document_mask(lengths: Sequence[int], device: torch.device, block: int = 128) -> Any:
    """FlexAttention's BlockMask of sequences that see themselves alone, without [total, total] on the way."""
    from torch.nn.attention.flex_attention import BlockMask

    total = sum(lengths)
    counts = torch.tensor(lengths, device=device)
    document = torch.repeat_interleave(torch.arange(len(lengths), device=device), counts)
    begins = torch.arange(0, total, block, device=device)
    first, last = document[begins], document[(begins + block - 1).clamp(max=total - 1)]
    meets = (first[:, None] <= last) & (first <= last[:, None])
    whole = (first == last) & (begins + block <= total)
    full = whole[:, None] & whole & (first[:, None] == first)

    def listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
        order = blocks.int().argsort(dim=-1, descending=True, stable=True)
        return blocks.sum(-1, dtype=torch.int32)[None, None], order.int()[None, None]

    def same_document(batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return document[row] == document[column]

    partial, whole_blocks = listed(meets & ~full), listed(full)
    return BlockMask.from_kv_blocks(
        *partial, *whole_blocks, BLOCK_SIZE=block, mask_mod=same_document, seq_lengths=(total, total)
    )


class Xformers(AutogradPeer):
    """xformers' memory_efficient_attention with a block-diagonal mask."""

    name = "xformers"

    def __init__(self, batch: Batch) -> None:
        if importlib.util.find_spec("xformers") is None:
            raise UnsuitableError("xformers is not installed")
        from xformers.ops import fmha

        super().__init__(batch)
        self.attention = fmha.memory_efficient_attention
        self.bias = fmha.BlockDiagonalMask.from_seqlens(list(batch.lengths))

    def forward(self) -> Tensor:
        q, k, v = (x[None] for x in self.inputs)
        return self.attention(q, k, v, attn_bias=self.bias, p=self.batch.dropout_p)[0]


def _only_half_precision(batch: Batch) -> None:
    if batch.qkv.device.type != "cuda" or batch.qkv.dtype not in (torch.bfloat16, torch.float16):
        raise UnsuitableError("bfloat16 and float16 on a GPU alone")


def _no_dropout(batch: Batch) -> None:
    if batch.dropout_p:
        raise UnsuitableError("no dropout")


def _free_memory() -> int:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


PEERS: dict[str, tuple[type[Peer], ...]] = {
    "cpu": (PaddedEager, PaddedSdpa, PerSequence, PerSequenceApart),
    "cuda": (
        PaddedEager, PaddedSdpa, PaddedSdpaMath, PaddedSdpaEfficient, PaddedSdpaFlash, PaddedSdpaCudnn,
        Nested, FlashAttention2, VarlenAttention, FlexAttention, Xformers,
    ),
}  # fmt: skip
