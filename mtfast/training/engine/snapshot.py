"""Copies of tensors in host memory, as they are at one moment: later steps leave them alone."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

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
        # What is saved of a tensor is its whole storage, so it cannot be a view of the chunk.
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
        self._of: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = {}
        self._copied = torch.cuda.Event(blocking=True) if memory.device.type == "cuda" else None

    def tensor(self, x: Tensor) -> Tensor:
        """A copy of `x`; that of `value`, where `x` was in there."""
        return self._of[_key(x)][1] if _key(x) in self._of else self._copy(x)

    def value(self, value: Any) -> Any:
        """A deep copy of `value`, nested containers of tensors and anything else."""
        copies = {}
        for x in _tensors(value):
            if x.numel() and _key(x) not in self._of:
                self._of[_key(x)] = x, self._copy(x)  # which keeps x, so that no other takes its place
            copies[id(x)] = self.tensor(x)
        return copy.deepcopy(value, copies)

    def end(self) -> None:
        """No more is copied."""
        self._of.clear()
        if self._copied is not None:
            self._copied.record()

    def wait(self) -> None:
        """Return when all copies are made."""
        if self._copied is not None:
            self._copied.synchronize()

    def _copy(self, x: Tensor) -> Tensor:
        return self._memory.place(x).copy_(x.detach(), non_blocking=True)


def _key(x: Tensor) -> tuple[Any, ...]:
    """The same for two tensors that are the same memory."""
    return x.device, x.dtype, x.data_ptr(), x.shape, x.stride()


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)
