"""Copies of tensors in host memory, as they are at one moment: later steps leave them alone."""

from __future__ import annotations

import torch
from torch import Tensor

_CHUNK = 16 << 20  # bytes; a power of two, to which page-locked memory is rounded up
_ALIGNMENT = 64


class HostMemory:
    """Host memory for one snapshot, used again by the next one; page-locked where the copies are of a GPU's
    tensors."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._chunks: list[Tensor] = []
        self._used: list[int] = []

    @property
    def nbytes(self) -> int:
        return sum(chunk.nbytes for chunk in self._chunks)

    def clear(self) -> None:
        """Let go of all that was placed."""
        self._used = [0] * len(self._chunks)

    def place(self, like: Tensor) -> Tensor:
        """An uninitialised contiguous tensor like that one, with a storage of its own size."""
        if not like.nbytes:
            return torch.empty(like.shape, dtype=like.dtype, device="cpu")
        free = (i for i, chunk in enumerate(self._chunks) if self._used[i] + like.nbytes <= chunk.nbytes)
        index = next(free, None)
        if index is None:
            index = len(self._chunks)
            self._chunks.append(self._chunk(like.nbytes))
            self._used.append(0)
        begin = self._used[index]
        self._used[index] += -(-like.nbytes // _ALIGNMENT) * _ALIGNMENT
        # A storage of its own: what writes tensors takes views of one storage for shared weights.
        memory = self._chunks[index].numpy()
        placed = torch.frombuffer(memory, dtype=like.dtype, count=like.numel(), offset=begin)
        return placed.view(like.shape)

    def _chunk(self, least: int) -> Tensor:
        on_gpu = self.device.type == "cuda"
        return torch.empty(max(least, _CHUNK), dtype=torch.uint8, device="cpu", pin_memory=on_gpu)


class Snapshot:
    """Copies of this moment's tensors. Those of a GPU are made on its current stream and whole after `wait`,
    which may be another thread's call."""

    def __init__(self, memory: HostMemory) -> None:
        """What `memory` held before is written over."""
        memory.clear()
        self._memory = memory
        self._copied = torch.cuda.Event(blocking=True) if memory.device.type == "cuda" else None

    def tensor(self, x: Tensor) -> Tensor:
        """A contiguous copy of `x`."""
        return self._memory.place(x).copy_(x.detach(), non_blocking=True)

    def end(self) -> None:
        """No more is copied."""
        if self._copied is not None:
            self._copied.record()

    def wait(self) -> None:
        """Return when all copies are made."""
        if self._copied is not None:
            self._copied.synchronize()
