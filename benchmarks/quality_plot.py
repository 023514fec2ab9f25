"""Draws what the recipe `best` and its parts reach, docs/quality.png, from benchmarks/results/ablation.json.

    python -m benchmarks quality_plot

A panel for each task: of each variant the mean over seeds with the sample standard deviation, every seed as a
dot, and, dashed, what reports of the CS 224N project give for BERT-base and all of Quora.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.ablation import PARTS
from benchmarks.common import DOCS, RESULTS
from benchmarks.report import REPORTS
from mtfast.plots import GREY, METRIC_UNITS, PALETTE
from mtfast.tasks import METRICS_OF


def main(argv: list[str]) -> int:
    """Write the picture."""
    argparse.ArgumentParser(prog="python -m benchmarks quality_plot", description=__doc__).parse_args(argv)
    print(f"written to {draw(RESULTS / 'ablation.json', DOCS / 'quality.png')}")
    return 0


def draw(results: Path, picture: Path) -> Path:
    """Returns the picture's path."""
    result: dict[str, Any] = json.loads(results.read_text(encoding="utf-8"))
    variants = {name: runs for name, runs in reversed(result["variants"].items()) if runs and name in PARTS}
    tasks = result["config"]["tasks"]
    figure = Figure(
        figsize=(10, 0.9 + 0.34 * len(variants)), dpi=150, layout="constrained", facecolor="white"
    )
    panels = figure.subplots(1, len(tasks), sharey=True)
    for panel, colour, (name, task) in zip(panels, PALETTE, tasks.items(), strict=False):
        metric = METRICS_OF[task["kind"]][0]
        for place, runs in enumerate(variants.values()):
            values = [run["dev"][f"{name}_{metric}"] for run in runs]
            panel.plot(values, [place] * len(values), "o", color=colour, alpha=0.35, markersize=4.5)
            spread = statistics.stdev(values) if len(values) > 1 else 0
            panel.errorbar(
                statistics.fmean(values), place, xerr=spread, fmt="s", color=colour, capsize=4, markersize=5
            )
        panel.axvline(REPORTS[name], color=GREY, linestyle="--", linewidth=1)
        panel.set_title(task["title"] or name, loc="left", fontweight="bold", fontsize=10.5)
        panel.set_xlabel(METRIC_UNITS[metric], fontsize=9)
        panel.set_yticks(range(len(variants)), list(variants), fontsize=8.5)
        panel.set_ylim(-0.6, len(variants) - 0.4)
        panel.tick_params(labelsize=8.5, colors=GREY)
        panel.grid(True, axis="x", color="#E3E6EA", linewidth=0.8)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(picture)
    return picture
