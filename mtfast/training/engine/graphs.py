"""Training steps as CUDA graphs: all launches of a step become one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor


class Recorder(Protocol):
    """What records the work that a function gives the device."""

    def run(self, function: Callable[[], Tensor]) -> Tensor:
        """Call `function` where it would be recorded, without recording it."""

    def record(self, function: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """What does the work of `function` again, and where its result is then. Recording does no work."""


class StepGraphs:
    """Runs `step` as a graph for each shape of its inputs.

    The first batch of a shape runs as it is, so that what libraries set up at first use is not recorded; the
    second is recorded, and it and every later one is a replay. A step must read nothing back to the host, and
    whatever differs from step to step must be among its inputs or lie on the device.

    Args:
        step: takes named tensors on the device, trains on them and returns one tensor.
        recorder: how a step is recorded.
    """

    def __init__(self, step: Callable[[Mapping[str, Tensor]], Tensor], recorder: Recorder) -> None:
        self._step, self._recorder = step, recorder
        self._met: set[Any] = set()
        self._graphs: dict[Any, tuple[dict[str, Tensor], Callable[[], None], Tensor]] = {}

    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The step's result; its memory is used again by later calls."""
        shapes = tuple((name, tuple(x.shape)) for name, x in inputs.items())
        if shapes not in self._met:
            self._met.add(shapes)
            return self._recorder.run(lambda: self._step(inputs))
        if shapes not in self._graphs:
            held = {name: x.clone() for name, x in inputs.items()}
            self._graphs[shapes] = (held, *self._recorder.record(lambda: self._step(held)))
        held, replay, result = self._graphs[shapes]
        for name, x in inputs.items():
            held[name].copy_(x)
        replay()
        return result


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
