"""Timing of calls side by side, as they are and as CUDA graphs, on inputs that are in no L2; their memory.

A variant is a list of calls that do the same on inputs of their own, as many as `copies` says. Whatever is
timed goes round them.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.common import Timing, summary

MOST_COPIES = 16
Call = Callable[[], Any]
Variant = Sequence[Call]


def measure(
    variants: Mapping[str, Variant],
    device: torch.device,
    *,
    budget_s: float = 2.0,
    most_runs: int = 200,
) -> dict[str, Timing]:
    """Time the variants, taking turns, so that a slow moment of the machine meets all of them.

    Each gets one warm-up round and `budget_s` seconds in all; at least five runs. A run repeats short calls
    until it takes about a millisecond. Check results before: this looks at none. On CUDA the time is that
    between events on the stream, the launches included when they are what is slow.
    """
    calls = {name: going_round(variant) for name, variant in variants.items()}
    repeats: dict[str, int] = {}
    longest = 0.0
    for name, call in calls.items():
        for _ in variants[name]:
            call()
        single = min(_seconds(call, 1, device) for _ in range(2))
        repeats[name] = max(1, min(1000, int(1e-3 / max(single, 1e-7))))
        longest = max(longest, single * repeats[name])
    runs = max(5, min(most_runs, int(budget_s / longest)))
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(runs):
        for name, call in calls.items():
            seconds[name].append(_seconds(call, repeats[name], device))
    return {name: summary(values) for name, values in seconds.items()}


def _seconds(call: Call, repeats: int, device: torch.device) -> float:
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        begin.record()
        for _ in range(repeats):
            call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / repeats
    started = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - started) / repeats


def copies(touched: int, l2: int) -> int:
    """How many inputs there are to be for calls that each read and write `touched` bytes beside such an L2.

    Together that is more than three times the L2, so that nothing is still there when its turn comes again;
    where MOST_COPIES are not enough some of it is.
    """
    return min(MOST_COPIES, 3 * l2 // touched + 1)


def l2_bytes(device: torch.device) -> int:
    """Size of a GPU's L2; 0 on the CPU, where inputs are one."""
    return torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0


def cloned(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The same tensors elsewhere in memory, as leaves."""
    return [x.detach().clone().requires_grad_(x.requires_grad) for x in tensors]


def going_round(calls: Sequence[Call]) -> Call:
    """A call that makes the calls one after the other, over and over.

    A result is kept until its call comes again: otherwise all would be written to the same memory.
    """
    if len(calls) == 1:
        return calls[0]
    kept: list[Any] = [None] * len(calls)
    turns = itertools.cycle(range(len(calls)))

    def call() -> None:
        turn = next(turns)
        kept[turn] = calls[turn]()

    return call


def peak_mib(call: Call, device: torch.device) -> float:
    """MiB of tensors alive at most during the call beyond those it began with, its result included."""
    call()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiled:
        call()
    alive = most = 0
    for event in sorted(profiled.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            alive += event.nbytes()
            most = max(most, alive)
    return most / 2**20


@functools.cache
def say_once(text: str) -> None:
    """Print what holds for many cases."""
    print(text, flush=True)


def running(variants: Mapping[str, Variant], ours: Sequence[str]) -> dict[str, Variant]:
    """The variants that run; why another one is left out is told. An error of `ours` is raised."""
    found = {}
    for name, variant in variants.items():
        try:
            for call in variant:
                call()
            found[name] = variant
        except Exception as error:
            if name in ours:
                raise
            say_once(f"left out: {name}: {reason_of(error)}")
    return found


def graph_of(name: str) -> str:
    """What the variant is called whose calls replay CUDA graphs of this one's."""
    return f"{name}, graph"


def graphs(variants: Mapping[str, Variant], device: torch.device) -> dict[str, Variant]:
    """Each variant as replays of CUDA graphs of its calls; why one is left out is told. None on the CPU."""
    found: dict[str, Variant] = {}
    if device.type != "cuda":
        return found
    for name, variant in variants.items():
        try:
            found[graph_of(name)] = _captured(variant)
        except Exception as error:
            say_once(f"left out: {graph_of(name)}: {reason_of(error)}")
    return found


def reason_of(error: Exception) -> str:
    """The error in a line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:240]}"


def _captured(variant: Variant) -> list[Call]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            variant[0]()
        # A capture that fails leaves torch's allocator and generator as if it still went on, so what waits
        # for the GPU, and could not be captured, is found out before.
        torch.cuda.set_sync_debug_mode("error")
        try:
            variant[0]()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(stream)
    replays = []
    for call in variant:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        replays.append(graph.replay)
    return replays


def copy_bandwidth(device: torch.device, bytes_each_way: int = 2**28) -> float:
    """Bytes read plus bytes written a second when a large tensor is copied."""
    source = torch.ones(bytes_each_way // 4, device=device)
    target = torch.empty_like(source)
    timing = measure({"copy": [lambda: target.copy_(source)]}, device, budget_s=1.0, most_runs=20)["copy"]
    return 2 * bytes_each_way / timing.median
