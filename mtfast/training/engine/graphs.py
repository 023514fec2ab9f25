"""Training steps as CUDA graphs: all launches of a step become one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

MOST_GRAPHS = 48


class Recorder(Protocol):
    """What records the work that a function gives the device."""

    def run(self, function: Callable[[], Tensor]) -> Tensor:
        """Call `function` where it would be recorded, without recording it."""

    def record(self, function: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """What does the work of `function` again, and where its result is then. Recording does no work."""


@dataclass(frozen=True)
class _Graph:
    """A recorded step. inputs: the batch that it reads, in memory of its own."""

    inputs: Any
    replay: Callable[[], None]
    result: Tensor


class StepGraphs:
    """Runs `step` as a graph for each shape of its batch.

    The first batch of a shape runs as it is, so that what libraries set up at first use is not recorded; the
    second is recorded, and it and every later one is a replay. A step must read nothing back to the host, and
    whatever differs from step to step must be in the batch or lie on the device.

    All graphs use one pool of memory, as large as the largest step needs; of `MOST_GRAPHS` the one used least
    makes room for a shape that comes more often.

    Args:
        step: takes a batch on the device, trains on it and returns one tensor.
        recorder: how a step is recorded.
    """

    def __init__(self, step: Callable[[Any], Tensor], recorder: Recorder) -> None:
        self._step, self._recorder = step, recorder
        self._uses: Counter[Hashable] = Counter()
        self._graphs: dict[Hashable, _Graph] = {}

    def __call__(self, batch: Any) -> Tensor:
        """The step's result; its memory is used again by later calls.

        batch: has a `shape`, `clone()` and `copy_()`, as packed batches do.
        """
        shape = batch.shape
        self._uses[shape] += 1
        if shape not in self._graphs:
            if self._uses[shape] == 1 or not self._has_room(shape):
                return self._recorder.run(lambda: self._step(batch))
            inputs = batch.clone()
            self._graphs[shape] = _Graph(inputs, *self._recorder.record(lambda: self._step(inputs)))
        graph = self._graphs[shape]
        graph.inputs.copy_(batch)
        graph.replay()
        return graph.result

    def _has_room(self, shape: Hashable) -> bool:
        """Whether a graph of this shape may be kept; drops the one used least where it is used less."""
        if len(self._graphs) < MOST_GRAPHS:
            return True
        least = min(self._graphs, key=self._uses.__getitem__)
        if self._uses[least] >= self._uses[shape]:
            return False
        del self._graphs[least]
        return True


class CudaRecorder:
    """CUDA graphs, recorded on a stream of their own and sharing one pool of memory."""

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()
        self._pool = torch.cuda.graph_pool_handle()

    def run(self, function: Callable[[], Tensor]) -> Tensor:
        # On the recording's stream: autograd returns to the stream on which it first saw a weight.
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            result = function()
        torch.cuda.current_stream().wait_stream(self._stream)
        return result

    def record(self, function: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            result = function()
        return graph.replay, result
