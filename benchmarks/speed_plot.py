"""Draws whole training steps against their peers, docs/speed.png, from the newest rows of the results files.

    python -m benchmarks speed_plot

A bar is a contender's speed over that of Hugging Face's BertModel on padded batches in eager PyTorch,
measured in the same run. Of the peers that a benchmark has, the fastest is drawn.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.common import DOCS, RESULTS
from benchmarks.report import newest_rows
from mtfast.plots import GREY, PALETTE

OURS, BASELINE = "mtfast", "eager"
# What others offer for such a step, and what a bar calls it.
PEERS = {
    "grouped": "grouped by length",
    "masked logits": "logits of masked tokens alone",
    "unpadded": "unpadded",
}
DEVICES = {
    "AMD EPYC (AVX512)": "Two CPU cores, MiniLM (22.7 M)",
    "NVIDIA H200": "One H200, BERT-base (110 M)",
}
STEPS = (
    ("finetune_step", "160 examples", "fine-tuning,\n160 examples"),
    ("steps", "finetune 160", "fine-tuning,\n160 examples"),
    ("pretrain_step", "at most 512", "pre-training,\nat most 512 tokens"),
    ("pretrain_step", "at most 256", "pre-training,\nat most 256 tokens"),
)


def main(argv: list[str]) -> int:
    """Write the picture."""
    argparse.ArgumentParser(prog="python -m benchmarks speed_plot", description=__doc__).parse_args(argv)
    print(f"written to {draw(RESULTS, DOCS / 'speed.png')}")
    return 0


def draw(results: Path, picture: Path) -> Path:
    """A panel for each device with a group of bars for each step; returns the picture's path."""
    rows = newest_rows(results)
    figure = Figure(figsize=(10, 3.6), dpi=150, layout="constrained", facecolor="white")
    for panel, (device, title) in zip(figure.subplots(1, len(DEVICES)), DEVICES.items(), strict=True):
        of_steps = []
        for benchmark, words, name in STEPS:
            found = {
                row["variant"]: row
                for row in rows
                if row["benchmark"] == benchmark and row["device"] == device and words in row["case"]
            }
            if OURS in found:
                of_steps.append((name, found))
        _bars(panel, of_steps)
        panel.set_title(title, loc="left", fontweight="bold", fontsize=10.5)
    figure.savefig(picture)
    return picture


def _bars(panel: Axes, steps: list[tuple[str, dict[str, dict[str, str]]]]) -> None:
    for place, (_, found) in enumerate(reversed(steps)):
        peer = max((v for v in PEERS if v in found), key=lambda v: float(found[v]["ratio_to_baseline"]))
        bars = (
            (BASELINE, "padded, eager", "#C9CED4"),
            (peer, PEERS[peer], "#8B949E"),
            (OURS, OURS, PALETTE[0]),
        )
        for height, (variant, label, colour) in zip((0.27, 0.0, -0.27), bars, strict=True):
            ratio = float(found[variant]["ratio_to_baseline"])
            panel.barh(place + height, ratio, 0.25, color=colour)
            said = f" {label}, {_rate(found[variant])}" + ("" if variant == BASELINE else f" ({ratio:.2f}x)")
            panel.text(ratio, place + height, said, va="center", fontsize=7.5, color=GREY)
    panel.set_yticks(range(len(steps)), [name for name, _ in reversed(steps)], fontsize=8.5)
    panel.set_xlabel("times the speed of the padded eager step", fontsize=9)
    panel.set_xlim(0, 1.75 * max(float(found[OURS]["ratio_to_baseline"]) for _, found in steps))
    panel.tick_params(labelsize=8.5, colors=GREY)
    panel.spines[["top", "right"]].set_visible(False)


def _rate(row: dict[str, str]) -> str:
    if rate := row.get("examples_per_s"):
        return f"{float(rate):,.0f} a second" if float(rate) >= 10 else f"{float(rate):.1f} a second"
    return f"{float(row['median_us']) / 1e3:,.0f} ms a step"
