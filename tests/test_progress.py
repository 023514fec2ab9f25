"""What a person sees of a running stage: plain lines or one live line on a terminal, from rank 0 alone."""

import io
from dataclasses import dataclass

import pytest
from rich.console import Console

from mtfast.training.run import progress
from mtfast.training.run.progress import StageProgress, peak_flops, say, say_once, watched


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test sets."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    return now


def console(monkeypatch, terminal: bool, name: str = "_console") -> io.StringIO:
    out = io.StringIO()
    made = Console(file=out, force_terminal=terminal, width=120, highlight=False, soft_wrap=True)
    monkeypatch.setattr(progress, name, made)
    return out


def test_plain_lines_every_ten_seconds_and_at_the_end(clock, monkeypatch):
    out = console(monkeypatch, terminal=False)
    losses = {"sst": 1.5, "quora": 0.25}
    with StageProgress("heads", 5000, 1000, flops_per_token=2e9, peak=1e12) as bar:
        clock[0] += 4
        bar.update(1100, losses, examples=400, tokens=1000)  # too early for a line
        clock[0] += 8
        bar.update(1200, losses, examples=8000, tokens=1200)
        clock[0] += 60
        bar.rest()  # an evaluation
        clock[0] += 2
        bar.update(5000, {"sst": 1.0}, examples=10, tokens=4)
    # 200 of 4000 steps took 12 s; 1200 tokens in 8 s at 2 GFLOP are 30% of 1 TFLOP/s.
    assert out.getvalue().splitlines() == [
        "heads 1200/5000 sst 1.500 quora 0.250 | 1,000 examples/s 150 tokens/s MFU 30.0% | 0:03:48 left",
        "heads 5000/5000 sst 1.000 | 5 examples/s 2 tokens/s MFU 0.4% | 0:00:00 left",
    ]


@pytest.mark.parametrize(("flops", "peak"), [(2e9, None), (0.0, 1e12)])
def test_no_mfu_where_the_peak_is_unknown_or_no_encoder_runs(clock, monkeypatch, flops, peak):
    out = console(monkeypatch, terminal=False)
    with StageProgress("heads", 1, 0, flops, peak) as bar:
        clock[0] += 1
        bar.update(1, {"sst": 1.0}, examples=1, tokens=1)
    assert "tokens/s" in out.getvalue() and "MFU" not in out.getvalue()


def test_mfu_counts_every_rank(clock, monkeypatch):
    out = console(monkeypatch, terminal=False)
    monkeypatch.setenv("WORLD_SIZE", "4")
    with StageProgress("finetune", 1, 0, 1e9, 1e12) as bar:
        clock[0] += 1
        bar.update(1, {}, examples=1, tokens=2000)
    assert "MFU 50.0%" in out.getvalue()


def test_a_live_line_on_a_terminal(monkeypatch):
    out = console(monkeypatch, terminal=True)
    with StageProgress("finetune", 10, 0, 0.0, None) as bar:
        bar.update(4, {"sts": 2.125}, examples=1, tokens=1)
        say("finetune epoch 1")
    text = out.getvalue()
    assert "4/10" in text and "sts 2.125" in text and "finetune epoch 1" in text and "\x1b[" in text


@dataclass(frozen=True)
class Batch:
    size: int
    tokens: int


def passing(clock, seconds: list[float], world_size: int = 1, live: bool = False) -> int:
    """How many batches of 10 examples and 600 tokens come through, that take so long."""
    batches = [Batch(10, 600)] * len(seconds)
    found = watched("dev", iter(batches), len(batches), world_size)
    for (batch, taken), seen in zip(zip(batches, seconds, strict=True), found, strict=True):
        assert batch is seen
        if live:
            progress._Line._live.refresh()
        clock[0] += taken
    return len(seconds)


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize(
    "seconds", [[], [0.5, 2], [2.9, 60]], ids=["nothing", "short", "short until its end"]
)
def test_short_passes_show_nothing(clock, monkeypatch, terminal, seconds):
    out = console(monkeypatch, terminal, "_errors")
    assert passing(clock, seconds) == len(seconds)
    assert out.getvalue() == ""


def test_long_passes_show_plain_lines_on_standard_error(clock, monkeypatch):
    out, errors = console(monkeypatch, False), console(monkeypatch, False, "_errors")
    passing(clock, [4, 2, 6, 4, 4, 4], world_size=2)
    # Lines after 12 s, 24 s (the end), of 2 ranks.
    assert errors.getvalue().splitlines() == [
        "dev 3/6 | 5 examples/s 300 tokens/s | 0:00:12 left",
        "dev 6/6 | 5 examples/s 300 tokens/s | 0:00:00 left",
    ]
    assert out.getvalue() == ""


def test_long_passes_have_a_live_line_on_a_terminal(clock, monkeypatch, capsys):
    out = console(monkeypatch, True, "_errors")
    batches = watched("dev", iter([Batch(10, 600)] * 3), 3)
    for _ in range(2):
        next(batches)
        clock[0] += 4
    next(batches)
    progress._Line._live.refresh()
    print("id,label")  # what a command writes is not drawn into the line's console
    assert "2/3" in out.getvalue() and "dev" in out.getvalue() and "\x1b[" in out.getvalue()
    batches.close()
    assert capsys.readouterr().out == "id,label\n" and "id,label" not in out.getvalue()
    assert progress._Line._live is None


def test_a_pass_within_a_stage_is_a_line_below_it(clock, monkeypatch):
    out, errors = console(monkeypatch, True), console(monkeypatch, True, "_errors")
    with StageProgress("finetune", 10, 0, 0.0, None) as bar:
        bar.update(4, {"sts": 2.125}, examples=1, tokens=1)
        passing(clock, [4, 4, 4], live=True)
        bar.update(5, {"sts": 2.0}, examples=1, tokens=1)
    *_, with_pass, end = out.getvalue().split("finetune")
    assert "4/10" in with_pass and "dev" in with_pass and "2/3" in with_pass
    assert "5/10" in end and "dev" not in end
    assert errors.getvalue() == "" and progress._Line._live is None


@pytest.mark.parametrize("terminal", [False, True])
def test_other_ranks_are_silent(clock, monkeypatch, terminal):
    out = console(monkeypatch, terminal)
    monkeypatch.setenv("RANK", "1")
    errors = console(monkeypatch, terminal, "_errors")
    with StageProgress("finetune", 1, 0, 0.0, None) as bar:
        bar.update(1, {"sts": 2.0}, examples=1, tokens=1)
    passing(clock, [20, 20, 20])
    say("hello")
    assert out.getvalue() == errors.getvalue() == ""


def test_said_once(monkeypatch):
    out = console(monkeypatch, terminal=False)
    for text in ("a [b] c", "a [b] c", "d"):
        say_once(text)
    assert out.getvalue() == "a [b] c\nd\n"  # brackets are no markup


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("AMD EPYC", None),
    ],
)
def test_peaks_by_name(name, peak):
    assert peak_flops(name) == peak
