"""The plots of a run's report: one style, colours safe for colour-blind readers, a unit on every axis."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

LOSSES = {  # name in the losses of a step: title, unit, colour
    "mlm": ("Masked words (MLM)", "cross entropy (nats)", "#CC79A7"),
    "nsp": ("Next sentence (NSP)", "cross entropy (nats)", "#B8860B"),
    "sst": ("Sentiment (SST)", "cross entropy (nats)", "#0072B2"),
    "quora": ("Paraphrase (Quora)", "logistic loss (nats)", "#D55E00"),
    "sts": ("Similarity (STS)", "squared error (score²)", "#009E73"),
}
DEV_METRICS = {  # name in an evaluation: title, unit, colour
    "sst_accuracy": ("Sentiment (SST)", "accuracy (share of sentences)", "#0072B2"),
    "quora_accuracy": ("Paraphrase (Quora)", "accuracy (share of pairs)", "#D55E00"),
    "sts_pearson": ("Similarity (STS)", "Pearson correlation", "#009E73"),
}
LINES = (("--", "s"), ("-", "o"), (":", "^"))
GREY = "#4A5158"


def is_number(value: object) -> bool:
    """True for a finite int or float."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def plot_losses(steps: Sequence[Mapping[str, Any]]) -> Figure | None:
    """A panel for each loss over the optimizer steps of a stage: every step faint, the running mean on top.

    `steps` are the step records of one stage, in order. None if they hold no loss.
    """
    series = {}
    for name in LOSSES:
        points = [(s["step"], s["losses"][name]) for s in steps if is_number(s.get("losses", {}).get(name))]
        if points:
            series[name] = np.array(points, dtype=float).T
    if not series:
        return None
    figure, panels = _panels(len(series))
    for panel, (name, (x, y)) in zip(panels, series.items(), strict=True):
        title, unit, colour = LOSSES[name]
        mean = _running_mean(y)
        panel.plot(x, y, color=colour, alpha=0.28, linewidth=0.9, marker="" if len(x) > 1 else "o")
        panel.plot(x, mean, color=colour, linewidth=2)
        _dress(panel, title, "optimizer step", unit)
        high = np.quantile(y, 0.995) if len(y) > 20 else y.max()  # one spike must not flatten the curve
        panel.set_ylim(0, max(float(high), float(mean.max())) * 1.08 or 1)
    faint = Line2D([], [], color=GREY, alpha=0.4, linewidth=0.9, label="each step")
    figure.legend(handles=[faint, Line2D([], [], color=GREY, linewidth=2, label="running mean")], **_LEGEND)
    return figure


def plot_dev_metrics(series: Mapping[str, Sequence[Mapping[str, Any]]], x_label: str) -> Figure | None:
    """A panel for each task's dev metric over epochs; one line for each of the (up to three) named series.

    Each series is a list of evaluation records, in order. None if they hold no metric.
    """
    figure, panels = _panels(len(DEV_METRICS))
    drawn = {}
    for panel, (key, (title, unit, colour)) in zip(panels, DEV_METRICS.items(), strict=True):
        for (label, evaluations), (line, marker) in zip(series.items(), LINES, strict=False):
            points = [
                (e["epoch"], e["metrics"][key]) for e in evaluations if is_number(e["metrics"].get(key))
            ]
            if points:
                x, y = np.array(points, dtype=float).T
                style: dict[str, Any] = {
                    "linestyle": line,
                    "marker": marker if len(x) <= 12 else "",
                    "markersize": 4.5,
                }
                panel.plot(x, y, color=colour, linewidth=1.8, **style)
                drawn[label] = Line2D([], [], color=GREY, label=label, linewidth=1.8, **style)
        _dress(panel, title, x_label, unit)
    if not drawn:
        return None
    figure.legend(handles=list(drawn.values()), **_LEGEND)
    return figure


_LEGEND: dict[str, Any] = {
    "loc": "outside upper left", "ncols": 3, "frameon": False, "fontsize": 8.5, "handlelength": 3.2,
}  # fmt: skip


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    """A figure three panels wide, so that all figures share one scale, with `count` of its panels."""
    layout = ConstrainedLayoutEngine(wspace=0.06)
    figure = Figure(figsize=(10.2, 3.2), dpi=144, layout=layout, facecolor="white")
    panels = list(figure.subplots(1, 3))
    for surplus in panels[count:]:
        surplus.set_visible(False)
    return figure, panels[:count]


def _dress(panel: Axes, title: str, x_label: str, y_label: str) -> None:
    panel.set_title(title, fontsize=10.5, loc="left", fontweight="bold")
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
