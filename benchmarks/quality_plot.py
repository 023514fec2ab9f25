"""Draws what the recipes `best` and `local` reach, and `best` without its parts, as docs/quality.png.

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
    print(f"written to {draw(RESULTS, DOCS / 'quality.png')}")
    return 0


def draw(results: Path, picture: Path) -> Path:
    """Of a directory with ablation.json and run-local-separate.json; returns the picture's path."""
    result, local = (_read(results / f"{name}.json") for name in ("ablation", "run-local-separate"))
    found = {name: result["variants"].get(name) for name in PARTS} | {"local": [local]}
    variants = {name: runs for name, runs in reversed(found.items()) if runs}
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


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found
