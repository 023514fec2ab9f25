"""Draws where the time of mtfast's steps goes, from the rows of `step_parts` in a results file."""

from __future__ import annotations

import csv
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.step_parts import INPUT, KEEPING, PARTS, PRODUCTS, STEP
from mtfast.plots import GREY, PALETTE

BESIDE = (INPUT, KEEPING)
NARROWEST = 0.04  # of the step; a narrower part has no number in it


def draw(results: Path, picture: Path) -> Path:
    """One bar for each case of the results file: parts of the step as shares of it, and behind them what is
    beside it; the matrix products are a line below. Returns the picture's path."""
    with results.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["benchmark"] == "step_parts"]
    cases = sorted({row["case"] for row in rows})
    cells = {(row["case"], row["variant"]): row for row in rows}
    figure = Figure(figsize=(10, 1.6 + 0.8 * len(cases)), layout="constrained")
    axes = figure.add_subplot()
    for height, case in enumerate(reversed(cases)):
        left = 0.0
        for colour, part in zip(PALETTE, (*PARTS, *BESIDE), strict=True):
            share = float(cells[case, part]["share_of_step"])
            axes.barh(
                height,
                share,
                0.55,
                left,
                color=colour,
                alpha=0.45 if part in BESIDE else 1.0,
                edgecolor="white",
                linewidth=0.5,
                label=part if height == 0 else None,
            )
            if share >= NARROWEST:
                axes.text(
                    left + share / 2, height, f"{share:.0%}", ha="center", va="center", color="white", size=10
                )
            left += share
        products = float(cells[case, PRODUCTS]["share_of_step"])
        axes.plot([0, products], [height - 0.36] * 2, color=GREY, lw=3, solid_capstyle="butt")
        axes.text(
            products + 0.01, height - 0.36, f"{PRODUCTS} {products:.0%}", va="center", color=GREY, size=9
        )
    axes.set_yticks(range(len(cases)), [_label(case, cells[case, STEP]) for case in reversed(cases)])
    axes.set_ylim(-0.6, len(cases) - 0.5)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.set_xlabel("part of the step's time; paler: beside the step")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
    figure.savefig(picture, dpi=150)
    return picture


def _label(case: str, step: dict[str, str]) -> str:
    words = case.split()
    return f"{' '.join(words[3:])}\n{' '.join(words[:3])}, {float(step['median_us']) / 1e6:.2f} s a step"
