"""Philox 4x32-7 in eager PyTorch, for the references: the same bits as csrc/device/philox.cuh."""

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF
ROUNDS = 7  # kPhiloxRounds of csrc/device/philox.cuh


def philox(
    c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, seed: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four 32-bit words, as int64, of one counter under the 64-bit key `seed`; the counters broadcast."""
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(ROUNDS):
        # int64 products wrap, which leaves the low 64 bits of the unsigned product.
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = ((p1 >> 32) & _LOW) ^ c1 ^ k0, p1 & _LOW, ((p0 >> 32) & _LOW) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + 0x9E3779B9) & _LOW, (k1 + 0xBB67AE85) & _LOW
    return c0, c1, c2, c3


def draw(seed: int, purpose: int, element: Tensor) -> Tensor:
    """The 32-bit draw (as int64) of each int64 element: word element % 4 of the counter element // 4."""
    group = element >> 2
    zero = torch.zeros_like(group)
    words = philox(group & _LOW, (group >> 32) & _LOW, zero, zero + purpose, seed)
    return torch.stack(words, -1).gather(-1, (element & 3).unsqueeze(-1)).squeeze(-1)


def threshold(probability: float) -> int:
    """How many of the 2**32 values of a draw are below `probability`."""
    return int(probability * 4294967296.0 + 0.5)


def dropout_threshold(dropout_p: float) -> int:
    """Of dropout: 16-bit draws below it are dropped, and what is kept is scaled by 65536 / (65536 - it)."""
    return min(int(dropout_p * 65536 + 0.5), 65535)
