"""What a person sees of a running stage: plain lines or one live line on a terminal, from rank 0 alone."""

import io

import pytest
from rich.console import Console

from mtfast.training.run import progress
from mtfast.training.run.progress import StageProgress, peak_flops, say, say_once


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test sets."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    return now


def console(monkeypatch, terminal: bool) -> io.StringIO:
    out = io.StringIO()
    made = Console(file=out, force_terminal=terminal, width=120, highlight=False, soft_wrap=True)
    monkeypatch.setattr(progress, "_console", made)
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


@pytest.mark.parametrize("terminal", [False, True])
def test_other_ranks_are_silent(monkeypatch, terminal):
    out = console(monkeypatch, terminal)
    monkeypatch.setenv("RANK", "1")
    with StageProgress("finetune", 1, 0, 0.0, None) as bar:
        bar.update(1, {"sts": 2.0}, examples=1, tokens=1)
    say("hello")
    assert out.getvalue() == ""


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
