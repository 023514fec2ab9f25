"""The report of an experiment: its variants with their spread over seeds, beside the paper's figures."""

from __future__ import annotations

import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mtfast.comparison import LEVEL, compared, keys_of
from mtfast.experiments import Experiment
from mtfast.files import write_json
from mtfast.markdown import (
    NOTHING,
    count,
    difference,
    duration,
    number,
    picture,
    sentence_case,
    signed,
    table,
)
from mtfast.page import write_page
from mtfast.plots import is_number, metrics_of, plot_comparison, plot_dev_metrics
from mtfast.recipes import PAPER_TASKS
from mtfast.results import STAGES, are_the_papers, metric_titles, paper_note, papers_rows
from mtfast.run_record import RunRecord, read_run
from mtfast.tasks import Task

COMPARISON = "comparison.json"


def write_comparison(
    runs: Mapping[str, Sequence[str | Path]], directory: str | Path, experiment: Experiment
) -> Path:
    """Write what an experiment has found into `directory`, which is created if need be: `comparison.json`
    (what `compared` returns), `report.md`, `report.html` and `plots/`; return the path of `report.html`.

    Args:
        runs: run directories of each variant, one for each seed. What is not given is reported as not run.
    """
    names = [variant.name for variant in experiment.variants]
    if unknown := sorted(set(runs) - set(names)):
        raise ValueError(
            f"runs: {unknown[0]!r} is no variant of {experiment.title}; those are {', '.join(names)}"
        )
    directory = Path(directory)
    records = {name: [read_run(path) for path in runs.get(name, ())] for name in names}
    found = compared(experiment, records)
    write_json(directory / COMPARISON, found)
    every = [run for of_variant in records.values() for run in of_variant]
    tasks = every[0].tasks if every else PAPER_TASKS
    papers = are_the_papers(tasks)
    figures = {variant.name: variant.figures for variant in experiment.variants} if papers else {}
    parts = [
        f"# {experiment.title}",
        "## Ours and the paper's" if papers else "## Results",
        comparison_table(found, tasks, figures),
        *([] if not every else [_reading(found), *_findings(found, tasks)]),
    ]
    if figures:
        parts += [paper_note(list(found["splits"])), papers_rows(every)]
    if missing := [f"`{name}`" for name in names if not records[name]]:
        parts.append(f"Not run: {', '.join(missing)}.")
    split = next(iter(found["splits"]))
    ours = {name: of["result"] for name, of in found["splits"][split]["variants"].items()}
    if figure := plot_comparison(metrics_of(tasks), ours, figures):
        caption = f"Results on {split} by variant"
        parts.append(picture(figure, directory / "plots" / "comparison.png", caption))
    lines = {name: _mean_curve(of_variant) for name, of_variant in records.items()}
    if figure := plot_dev_metrics(metrics_of(tasks), lines, "epoch of fine-tuning"):
        caption = "Dev metrics while fine-tuning, means over seeds"
        parts.append(picture(figure, directory / "plots" / "dev_metrics.png", caption))
    for name, of_variant in records.items():
        if of_variant:
            parts += [f"## {sentence_case(name)}", _runs_table(of_variant, tasks, directory)]
    return write_page(directory, f"mtfast: {experiment.title}", parts)


def comparison_table(
    found: Mapping[str, Any], tasks: Mapping[str, Task], figures: Mapping[str, Mapping[str, float]]
) -> str:
    """By source of figures, a line for each of the two variants and one for their difference.

    Args:
        found: what `compared` returns.
        figures: the paper's by variant, or empty.
    """
    titles, keys = metric_titles(tasks), keys_of(tasks)
    rows: list[Sequence[str]] = []
    if figures:
        rows += [
            (f"Paper (test): {name}", *(number(of.get(key)) for key in keys)) for name, of in figures.items()
        ]
        apart = [difference(*(of.get(key) for of in figures.values())) for key in keys]
        rows.append(("Paper (test): difference", *apart))
    for split, result in found["splits"].items():
        for part, source in (("result", f"Ours ({split})"), ("last", f"Ours ({split}, last epoch)")):
            for name, of in result["variants"].items():
                if part in of:
                    rows.append((f"{source}: {name}", *(_with_spread(of[part][key]) for key in keys)))
            if part == "result":
                apart = [_with_interval(result["difference"].get(key, {})) for key in keys]
                rows.append((f"{source}: difference", *apart))
    return table(("", *(titles[key] for key in keys)), rows)


def _with_spread(score: Mapping[str, Any]) -> str:
    if not is_number(score["spread"]):
        return number(score["mean"])
    return f"{number(score['mean'])} ± {number(score['spread'])}"


def _with_interval(of: Mapping[str, Any]) -> str:
    if not of:
        return NOTHING
    return signed(of["mean"]) + (f" ({signed(of['low'])} to {signed(of['high'])})" if "low" in of else "")


def _reading(found: Mapping[str, Any]) -> str:
    """What the table's marks mean."""
    seeds = {len(of["seeds"]) for split in found["splits"].values() for of in split["variants"].values()}
    over = f"Means ± sample standard deviations over {max(seeds)} seeds." if max(seeds) > 1 else "One seed."
    return (
        f"{over} In brackets, where a difference lies with {LEVEL:.0%} by the paired bootstrap over examples "
        f"({count(found['resamples'])} draws): what other examples would give, not what other seeds would. "
        "Figures on dev are of the epoch with the best mean there and tend to be high; the last epoch was "
        "chosen by nobody."
    )


def _findings(found: Mapping[str, Any], tasks: Mapping[str, Task]) -> list[str]:
    """Of each split, what its intervals say of every metric."""
    titles, said = metric_titles(tasks), []
    for split, result in found["splits"].items():
        lines = []
        for key, of in result["difference"].items():
            if "low" not in of:
                continue
            first, second = result["variants"]
            apart = f"{number(abs(of['mean']))} {'above' if of['mean'] > 0 else 'below'}"
            shown = of["low"] > 0 or of["high"] < 0
            p = f"p {of['p']:.3f}" if of["p"] >= 0.001 else "p < 0.001"
            verdict = (
                f"{second} is {apart} {first}"
                if shown
                else f"no difference between {first} and {second} that these examples could tell"
            )
            lines.append(f"- {titles[key]}: {verdict} ({p}).")
        if lines:
            said += [f"On {split}:", "\n".join(lines)]
    return said


def _mean_curve(runs: Sequence[RunRecord]) -> list[dict[str, Any]]:
    """Dev metrics by epoch of fine-tuning, means over the runs that have come so far."""
    by_epoch: dict[int, list[Mapping[str, Any]]] = {}
    for run in runs:
        for record in run.evaluations.get("finetune", []):
            by_epoch.setdefault(record["epoch"], []).append(record["metrics"])
    return [
        {
            "epoch": epoch,
            "metrics": {
                key: statistics.fmean(metrics[key] for metrics in every)
                for key in every[0]
                if all(is_number(metrics.get(key)) for metrics in every)
            },
        }
        for epoch, every in sorted(by_epoch.items())
    ]


def _runs_table(runs: Sequence[RunRecord], tasks: Mapping[str, Task], directory: Path) -> str:
    """A line for each seed: its results, the epoch they are of, the time of its stages; for a page in
    `directory`."""
    titles, keys = metric_titles(tasks), keys_of(tasks)
    rows = []
    for run in runs:
        choice, stages = run.choice(), run.summary.get("stages", {})
        rows.append(
            (
                f"`{os.path.relpath(run.directory, directory)}`",
                *(number(run.metrics("dev").get(key)) for key in keys),
                f"{choice.epoch} of {choice.looks}" if choice else NOTHING,
                *(duration(stages.get(stage, {}).get("seconds")) for stage in STAGES),
            )
        )
    return table(("run", *(titles[key] for key in keys), "epoch", *STAGES.values()), rows)
