"""The plots of a run's report: one style, colours safe for colour-blind readers, a unit on every axis."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from mtfast.tasks import Task

LOSS_UNITS = {  # by kind of task
    "classification": "cross entropy (nats)",
    "binary": "logistic loss (nats)",
    "regression": "squared error (score²)",
}
METRIC_UNITS = {
    "accuracy": "accuracy (share of examples)",
    "f1": "F1",
    "pearson": "Pearson correlation",
    "spearman": "Spearman correlation",
}
# Okabe and Ito's, which colour-blind readers can tell apart, with a darker yellow and with grey for black.
# Tasks take them in their order; an eighth has the first again.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#B8860B", "#56B4E9", "#4A5158")
COLUMNS = 3
TITLE_WIDTH = 32  # letters that fit over a panel
LINES = (("--", "s"), ("-", "o"), (":", "^"))
GREY = "#4A5158"


def is_number(value: object) -> bool:
    """True for a finite int or float."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True)
class Series:
    """A quantity that is drawn: where records have it, what it is called, its unit and colour."""

    key: str
    title: str
    unit: str
    colour: str


PRETRAINING = (
    Series("mlm", "Masked words (MLM)", "cross entropy (nats)", PALETTE[3]),
    Series("nsp", "Next sentence (NSP)", "cross entropy (nats)", PALETTE[4]),
)


def losses_of(tasks: Mapping[str, Task]) -> list[Series]:
    """The losses of the tasks, by their names in the steps."""
    return [
        Series(name, task.title or name, LOSS_UNITS[task.kind], PALETTE[index % len(PALETTE)])
        for index, (name, task) in enumerate(tasks.items())
    ]


def metrics_of(tasks: Mapping[str, Task]) -> list[Series]:
    """The dev metric that counts of each task, by its name in an evaluation."""
    return [
        Series(
            f"{name}_{task.main_metric}",
            task.title or name,
            METRIC_UNITS[task.main_metric],
            PALETTE[index % len(PALETTE)],
        )
        for index, (name, task) in enumerate(tasks.items())
    ]


def plot_losses(losses: Sequence[Series], steps: Sequence[Mapping[str, Any]]) -> Figure | None:
    """A panel for each loss over the optimizer steps of a stage: every step faint, the running mean on top.

    `steps` are the step records of one stage, in order. None if they hold none of the losses.
    """
    drawn = []
    for loss in losses:
        values = [(step["step"], step.get("losses", {}).get(loss.key)) for step in steps]
        points = [(number, value) for number, value in values if is_number(value)]
        if points:
            drawn.append((loss, *np.array(points, dtype=float).T))
    if not drawn:
        return None
    figure, panels = _panels(len(drawn))
    for panel, (loss, x, y) in zip(panels, drawn, strict=True):
        mean = _running_mean(y)
        panel.plot(x, y, color=loss.colour, alpha=0.28, linewidth=0.9, marker="" if len(x) > 1 else "o")
        panel.plot(x, mean, color=loss.colour, linewidth=2)
        _dress(panel, loss.title, "optimizer step", loss.unit)
        high = np.quantile(y, 0.995) if len(y) > 20 else y.max()  # one spike must not flatten the curve
        panel.set_ylim(0, max(float(high), float(mean.max())) * 1.08 or 1)
    faint = Line2D([], [], color=GREY, alpha=0.4, linewidth=0.9, label="each step")
    figure.legend(handles=[faint, Line2D([], [], color=GREY, linewidth=2, label="running mean")], **_LEGEND)
    return figure


def plot_dev_metrics(
    metrics: Sequence[Series], lines: Mapping[str, Sequence[Mapping[str, Any]]], x_label: str
) -> Figure | None:
    """A panel for each metric over epochs; in it one line for each of the (up to three) named series.

    Each series is a list of evaluation records, in order. None if they hold no metric.
    """
    figure, panels = _panels(len(metrics))
    drawn = {}
    for panel, metric in zip(panels, metrics, strict=True):
        for (label, evaluations), (line, marker) in zip(lines.items(), LINES, strict=False):
            values = [(e["epoch"], e["metrics"].get(metric.key)) for e in evaluations]
            points = [(epoch, value) for epoch, value in values if is_number(value)]
            if points:
                x, y = np.array(points, dtype=float).T
                style: dict[str, Any] = {
                    "linestyle": line,
                    "marker": marker if len(x) <= 12 else "",
                    "markersize": 4.5,
                }
                panel.plot(x, y, color=metric.colour, linewidth=1.8, **style)
                drawn[label] = Line2D([], [], color=GREY, label=label, linewidth=1.8, **style)
        _dress(panel, metric.title, x_label, metric.unit)
    if not drawn:
        return None
    figure.legend(handles=list(drawn.values()), **_LEGEND)
    return figure


def plot_comparison(
    metrics: Sequence[Series],
    ours: Mapping[str, Mapping[str, Mapping[str, Any]]],
    paper: Mapping[str, Mapping[str, float]],
) -> Figure | None:
    """A panel for each metric; in it, for each variant, the mean over its seeds with the standard deviation
    as a bar, every seed as a dot, and the paper's figure. None if no variant has a mean.

    Args:
        ours: by variant and key, `values`, `mean` and `spread` (None for one seed).
        paper: by variant and key, or empty.
    """
    figure, panels = _panels(len(metrics))
    drawn = False
    for panel, metric in zip(panels, metrics, strict=True):
        for place, (variant, scores) in enumerate(ours.items()):
            score = scores.get(metric.key, {})
            if is_number(score.get("mean")):
                drawn = True
                colour, values = metric.colour, score["values"]
                panel.plot([place] * len(values), values, "o", color=colour, alpha=0.35, markersize=4.5)
                bar: dict[str, Any] = {"fmt": "s", "color": colour, "capsize": 5, "markersize": 6}
                panel.errorbar(place, score["mean"], score["spread"] or 0, **bar)
            if variant in paper:
                figures = paper[variant]
                panel.plot(place + 0.22, figures[metric.key], "D", color=GREY, fillstyle="none", markersize=6)
        _dress(panel, metric.title, "", metric.unit)
        panel.set_xlim(-0.6, len(ours) - 0.4)
        names = [textwrap.fill(variant, 14, break_on_hyphens=False) for variant in ours]
        panel.set_xticks(range(len(ours)), names)
    if not drawn:
        return None
    marks = {
        "mean ± standard deviation over seeds": ("s", "full", GREY),
        "each seed": ("o", "full", "#B9BEC4"),
        **({"paper (test)": ("D", "none", GREY)} if paper else {}),
    }
    handles = [
        Line2D([], [], linestyle="", marker=mark, fillstyle=fill, color=colour, label=label)  # type: ignore[arg-type]
        for label, (mark, fill, colour) in marks.items()
    ]
    figure.legend(handles=handles, **_LEGEND)
    return figure


_LEGEND: dict[str, Any] = {
    "loc": "outside upper left", "ncols": 3, "frameon": False, "fontsize": 8.5, "handlelength": 3.2,
}  # fmt: skip


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    """A figure three panels wide, so that all figures share one scale, with `count` of its panels."""
    rows = max(-(-count // COLUMNS), 1)
    layout = ConstrainedLayoutEngine(wspace=0.06, hspace=0.05)
    figure = Figure(figsize=(10.2, 3.2 * rows), dpi=144, layout=layout, facecolor="white")
    panels = list(figure.subplots(rows, COLUMNS).flat)
    for surplus in panels[count:]:
        surplus.set_visible(False)
    return figure, panels[:count]


def _dress(panel: Axes, title: str, x_label: str, y_label: str) -> None:
    lines = textwrap.fill(title, TITLE_WIDTH)
    panel.set_title(lines, fontsize=10.5, loc="left", fontweight="bold", parse_math=False)
    panel.set_xlabel(x_label, fontsize=9)
    panel.set_ylabel(y_label, fontsize=9)
    panel.tick_params(labelsize=8.5, colors=GREY)
    panel.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    panel.grid(True, color="#E3E6EA", linewidth=0.8)
    panel.set_axisbelow(True)
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)


def _running_mean(values: np.ndarray) -> np.ndarray:
    """Mean over a window of about a twentieth of the series, centred, and cut off at both ends."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    place, reach = np.arange(len(values)), len(values) // 40
    first, last = np.maximum(place - reach, 0), np.minimum(place + reach + 1, len(values))
    return (sums[last] - sums[first]) / (last - first)
