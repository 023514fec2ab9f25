"""Timing: what is measured, inputs that go round, CUDA graphs without a GPU."""

import weakref
from contextlib import contextmanager, nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from benchmarks import timing

CPU = torch.device("cpu")


def test_peak_memory_of_known_allocations():
    def call():
        large = torch.empty(2**20, dtype=torch.float64)  # 8 MiB
        result = large[: 2**19].clone()  # 4 MiB
        del large
        return result

    assert timing.peak_mib(call, CPU) == 12.0


def test_variants_that_do_not_run_are_left_out_but_ours(capsys):
    def fails():
        raise RuntimeError("Cannot find a working\ntriton installation")

    variants = {"eager": [lambda: None], "compile": [lambda: None, fails]}
    assert list(timing.running(variants, ["eager"])) == ["eager"]
    assert "left out: compile: RuntimeError: Cannot find a working triton" in capsys.readouterr().out
    with pytest.raises(RuntimeError, match="triton"):
        timing.running(variants, ["compile"])


def test_inputs_are_as_many_as_exceed_the_l2_three_times():
    assert timing.copies(151, 50) == 1
    assert timing.copies(150, 50) == 2
    assert timing.copies(50, 50) == 4
    assert timing.copies(1, 50) == timing.MOST_COPIES == 16
    assert timing.copies(1, 0) == 1 and timing.l2_bytes(CPU) == 0


class Result:
    pass


def test_calls_go_round_and_a_result_is_kept_until_its_call_comes_again():
    made = []

    def call(index):
        result = Result()
        made.append((index, weakref.ref(result)))
        return result

    turn = timing.going_round([partial(call, index) for index in range(3)])
    for _ in range(5):
        turn()
    assert [index for index, _ in made] == [0, 1, 2, 0, 1]
    assert [result() is not None for _, result in made] == [False, False, True, True, True]


def test_what_is_timed_goes_round():
    made = []
    variants = {
        "one": [lambda: made.append("one")],
        "three": [lambda i=i: made.append(i) for i in range(3)],
    }
    timing.measure(variants, CPU, budget_s=0)
    of_three = [i for i in made if i != "one"]
    assert of_three == [i % 3 for i in range(len(of_three))] and len(of_three) > 3
    assert "one" in made


class Gpu:
    """What capturing needs of torch.cuda: calls made in a capture are those that its graph replays."""

    def __init__(self):
        self.mode, self.capture = "default", None

    def Stream(self):
        return SimpleNamespace(wait_stream=lambda other: None)

    current_stream = Stream

    def stream(self, stream):
        return nullcontext()

    def set_sync_debug_mode(self, mode):
        self.mode = mode

    def CUDAGraph(self):
        graph = SimpleNamespace(launched=[])
        graph.replay = lambda: tuple(graph.launched)
        return graph

    @contextmanager
    def graph(self, graph):
        self.capture = graph.launched
        yield
        self.capture = None

    def launch(self, kernel):
        if self.capture is not None:
            self.capture.append(kernel)

    def wait(self):
        assert self.capture is None, "what waits must not get as far as a capture"
        if self.mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation")


def test_each_call_has_its_graph_and_what_waits_for_the_gpu_has_none(monkeypatch, capsys):
    gpu = Gpu()
    monkeypatch.setattr(torch, "cuda", gpu)
    variants = {
        "eager": [gpu.wait, gpu.wait],
        "mtfast": [partial(gpu.launch, "first"), partial(gpu.launch, "second")],
    }
    for _ in range(2):
        found = timing.graphs(variants, torch.device("cuda"))
        assert {name: [replay() for replay in replays] for name, replays in found.items()} == {
            "mtfast, graph": [("first",), ("second",)]
        }
    assert gpu.mode == "default"
    assert capsys.readouterr().out.count("left out: eager, graph: RuntimeError: called a synchronizing") == 1
    assert timing.graphs(variants, CPU) == {}
