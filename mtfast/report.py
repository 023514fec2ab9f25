"""The report of a run: what its run directory recorded, as tables and plots, beside the paper's figures.

`write_report` turns one run directory into `report.md`, `report.html` and `plots/*.png`. What a run did not
record is left out, or said.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mtfast.experiments import PAPER_FIGURES
from mtfast.markdown import (
    count,
    duration,
    escape,
    gibibytes,
    number,
    picture,
    plain,
    table,
)
from mtfast.page import write_page
from mtfast.plots import PRETRAINING, is_number, losses_of, plot_losses
from mtfast.results import (
    STAGES,
    are_the_papers,
    choice_in_words,
    data_table,
    metric_titles,
    paper_note,
    papers_rows,
    plot_of_dev_metrics,
)
from mtfast.run_record import RunRecord, read_run

SKIPPED_SHOWN = 10
PEAKS = {"peak_rss_bytes": "peak memory (resident)", "peak_gpu_bytes": "peak GPU memory"}


def write_report(run_dir: str | Path) -> Path:
    """Write `report.md`, `report.html` and `plots/*.png` into `run_dir`; return the path of `report.html`."""
    run = read_run(run_dir)
    plots = run.directory / "plots"
    parts = [f"# Run report: {escape(run.title)}", _headline(run)]
    parts += ["## Results", _result_table(run), choice_in_words(run)]
    if figure := plot_of_dev_metrics(run):
        parts.append(picture(figure, plots / "dev_metrics.png", "Dev metrics per epoch"))
    parts += ["## Stages", _stage_table(run)]
    if changes := run.summary.get("changes"):
        parts += ["### Continued with other settings", _change_table(changes)]
    for stage, title in STAGES.items():
        losses = PRETRAINING if stage == "pretrain" else losses_of(run.tasks)
        if figure := plot_losses(losses, run.steps.get(stage, [])):
            caption = f"{title}: losses on the training data"
            parts += [f"### {caption}", picture(figure, plots / f"losses_{stage}.png", caption)]
    if are_the_papers(run.tasks):
        parts += ["## Beside the paper", *_beside_the_paper(run)]
    if run.summary.get("data"):
        parts += ["## Data", data_table(run.summary["data"]), *_remarks_on(run.summary["data"])]
    if run.summary.get("environment"):
        rows = [(key.replace("_", " "), plain(value)) for key, value in run.summary["environment"].items()]
        parts += ["## Environment", table(("", "value"), rows, text_columns=2)]
    if run.text:
        parts += ["## Configuration", f"```yaml\n{run.text.rstrip()}\n```"]
    if run.torn_lines:
        parts.append(f"{run.torn_lines} unreadable line(s) of `metrics.jsonl` were left out.")
    return write_page(run.directory, f"mtfast: {run.title}", parts)


# ---- results ----


def _headline(run: RunRecord) -> str:
    titles, said = metric_titles(run.tasks), []
    for split in ("dev", "test"):
        metrics = run.metrics(split)
        if figures := [
            f"{titles[key]} **{number(metrics[key])}**" for key in run.counting if is_number(metrics.get(key))
        ]:
            said.append(f"On {split}: {', '.join(figures)}.")
    seconds = [stage.get("seconds") for stage in run.summary.get("stages", {}).values()]
    total = sum(value for value in seconds if is_number(value))
    headline = " ".join(said) or "This run has not been evaluated on dev yet."
    return f"{headline} Stages took {duration(total)} in all." if total else headline


def _result_table(run: RunRecord) -> str:
    evaluations: list[tuple[str, str, Mapping[str, Any]]] = []
    for stage, title in STAGES.items():
        if best := run.best_evaluation(stage):
            epoch = str(best.get("epoch", ""))
            evaluations.append((f"{title}, best epoch on dev", epoch, best["metrics"]))
    results = {split: run.metrics(split) for split in ("dev", "test") if run.summary.get(split)}
    every = [*(metrics for _, _, metrics in evaluations), *results.values()]
    titles = {
        key: title
        for key, title in metric_titles(run.tasks).items()
        if any(key in metrics for metrics in every)
    }
    rows: list[Sequence[str]] = [
        (what, epoch, *(number(metrics.get(key)) for key in titles)) for what, epoch, metrics in evaluations
    ]
    for split, metrics in results.items():
        rows.append((f"**Result on {split}**", "", *(f"**{number(metrics.get(key))}**" for key in titles)))
    return table(("", "epoch", *titles.values()), rows) if rows else "No evaluation is recorded."


# ---- beside the paper ----


def _has_all(run: RunRecord, split: str) -> bool:
    """Whether the run has a result of every task on a split."""
    metrics = run.metrics(split)
    return all(is_number(metrics.get(key)) for key in run.counting)


def _beside_the_paper(run: RunRecord) -> list[str]:
    """The paper's figures and the run's, on test if they are there; then how far they can be compared."""
    keys, titles = [*run.counting, "mean"], metric_titles(run.tasks)
    split = "test" if _has_all(run, "test") else "dev"
    ours = run.metrics(split)
    rows: list[Sequence[str]] = [
        (f"Paper, {name} (test)", *(number(figures[key]) for key in keys))
        for name, figures in PAPER_FIGURES.items()
    ]
    rows.append((f"**This run ({split})**", *(f"**{number(ours.get(key))}**" for key in keys)))
    return [table(("", *(titles[key] for key in keys)), rows), paper_note([split]), papers_rows([run])]


# ---- stages ----


def _stage_table(run: RunRecord) -> str:
    recorded = run.summary.get("stages", {})
    rows, peaks = [], {key: title for key, title in PEAKS.items() if any(key in x for x in recorded.values())}
    for stage, title in STAGES.items():
        if facts := recorded.get(stage):
            losses = (number(facts.get(key), 3) for key in ("first_loss", "last_loss"))
            rates = (count(facts.get(key)) for key in ("examples_per_s", "tokens_per_s"))
            sizes = (gibibytes(facts.get(key)) for key in peaks)
            made = count(facts.get("steps")), duration(facts.get("seconds"))
            rows.append((title, *made, *rates, *losses, *sizes))
    not_run = [title.lower() for stage, title in STAGES.items() if stage not in recorded]
    left_out = f"Not finished or not part of this run: {', '.join(not_run)}." if not_run else ""
    if not rows:
        return left_out
    header = ("stage", "steps", "time", "examples/s", "tokens/s", "first training loss", "last training loss")
    parts = (table((*header, *peaks.values()), rows), left_out)
    return "\n\n".join(part for part in parts if part)


def _change_table(changes: Sequence[Mapping[str, Any]]) -> str:
    """Settings that differed when the run was continued, and how far it had come."""

    def shown(value: object) -> str:
        return "not set" if value is None else escape(plain(value))

    rows = []
    for change in changes:
        begun = [
            f"step {count(change['at'][stage])} of {title.lower()}"
            for stage, title in STAGES.items()
            if stage in change["at"]
        ]
        since = begun[-1] if begun else "the beginning"
        rows.append((f"`{change['field']}`", shown(change["was"]), shown(change["now"]), since))
    return table(("setting", "was", "is", "since"), rows, text_columns=4)


# ---- data ----


def _remarks_on(data: Mapping[str, Any]) -> list[str]:
    """Notes on the row accounts, and the first skipped rows by name."""
    named, notes = [], []
    for name, account in data.items():
        if not isinstance(account, Mapping):
            continue
        notes += [f"- {name}: {escape(str(note))}" for note in account.get("notes", ())]
        if account.get("unknown"):
            pieces = f"{count(account['unknown'])} of {count(account.get('word_pieces'))} word pieces"
            notes.append(f"- {name}: {pieces} stand for words that the tokenizer does not know")
        skipped = account.get("skipped", [])
        if isinstance(skipped, list | tuple):
            named += [row for row in skipped if isinstance(row, Mapping)]
    parts = ["\n".join(notes)]
    if named:
        shown = [
            f"- `{row.get('file')}:{row.get('line')}`: {escape(str(row.get('reason')))}" for row in named
        ]
        more = [f"- and {len(named) - SKIPPED_SHOWN:,} more"] if len(named) > SKIPPED_SHOWN else []
        parts += ["Skipped rows:", "\n".join(shown[:SKIPPED_SHOWN] + more)]
    return parts
