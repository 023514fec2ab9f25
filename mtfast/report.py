"""The report of a run: what its run directory recorded, as tables and plots, beside the paper's figures.

`write_report` turns one run directory into `report.md`, `report.html` and `plots/*.png`; `write_comparison`
does so for the runs of an experiment. What a run did not record is left out, or said.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mtfast.experiments import PAPER_FIGURES, Experiment
from mtfast.markdown import (
    count,
    difference,
    duration,
    escape,
    gibibytes,
    number,
    picture,
    plain,
    sentence_case,
    table,
)
from mtfast.page import write_page
from mtfast.plots import PRETRAINING, is_number, losses_of, metrics_of, plot_dev_metrics, plot_losses
from mtfast.recipes import PAPER_TASKS
from mtfast.results import STAGES, choice_in_words, data_table, metric_titles, plot_of_dev_metrics
from mtfast.run_record import RunRecord, read_run
from mtfast.tasks import Task

SKIPPED_SHOWN = 10
PEAKS = {"peak_rss_bytes": "peak memory (resident)", "peak_gpu_bytes": "peak GPU memory"}
Scores = Mapping[str, Mapping[str, Any]]  # metrics by run


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
    if _are_the_papers(run.tasks):
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


def write_comparison(runs: Mapping[str, str | Path], directory: str | Path, experiment: Experiment) -> Path:
    """Write the report of an experiment into `directory`; return the path of `report.html`.

    Args:
        runs: run directory of each variant. A variant that is not given is reported as not run.
        directory: where `report.md`, `report.html` and `plots/` go; created if need be.
    """
    title, variants = experiment.title, experiment.figures
    if unknown := sorted(set(runs) - set(variants)):
        raise ValueError(f"runs: {unknown[0]!r} is no variant of {title}; those are {', '.join(variants)}")
    directory = Path(directory)
    records = {name: read_run(runs[name]) for name in variants if name in runs}
    tasks = next((run.tasks for run in records.values()), PAPER_TASKS)
    comparable = _are_the_papers(tasks)
    sources: dict[str, Scores] = {"Paper (test)": variants} if comparable else {}
    everywhere = all(name in records and _has_all(records[name], "test") for name in variants)
    splits = ["test", "dev"] if everywhere else ["dev"]
    for split in splits:
        ours = {name: records[name].metrics(split) if name in records else {} for name in variants}
        sources[f"Ours ({split})"] = ours
    heading = "Ours and the paper's" if comparable else "Results"
    parts = [f"# {title}", f"## {heading}", _experiment_table(tasks, sources)]
    if comparable:
        parts.append(_paper_note(splits))
    if missing := [f"`{name}`" for name in variants if name not in records]:
        parts.append(f"Not run: {', '.join(missing)}.")
    lines = {name: run.evaluations.get("finetune", []) for name, run in records.items()}
    if figure := plot_dev_metrics(metrics_of(tasks), lines, "epoch of fine-tuning"):
        parts.append(
            picture(figure, directory / "plots" / "dev_metrics.png", "Dev metrics while fine-tuning")
        )
    for name, run in records.items():
        parts += [
            f"## {sentence_case(name)}",
            f"Run directory: `{run.directory}`",
            _result_table(run),
            choice_in_words(run),
            _stage_table(run),
        ]
    return write_page(directory, f"mtfast: {title}", parts)


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


def _are_the_papers(tasks: Mapping[str, Task]) -> bool:
    """Whether these tasks' metrics can stand beside the paper's; heads, weights and data may be others."""

    def measured(tasks: Mapping[str, Task]) -> dict[str, tuple[str, int, str]]:
        return {name: (task.kind, task.outputs, task.main_metric) for name, task in tasks.items()}

    return measured(tasks) == measured(PAPER_TASKS)


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
    return [table(("", *(titles[key] for key in keys)), rows), _paper_note([split])]


def _paper_note(splits: Sequence[str]) -> str:
    ours = {"dev": "dev", "test": "the test split of the run's own data"}
    return (
        "The paper's figures are on test sets whose labels are not public; ours are on "
        f"{' and on '.join(ours[split] for split in splits)}. "
        "They are comparable only for the paper's recipe on the paper's data and checkpoint."
    )


def _experiment_table(tasks: Mapping[str, Task], scores: Mapping[str, Scores]) -> str:
    """By source of scores, a line for each of the two variants and one for their difference."""
    titles = metric_titles(tasks)
    keys = [*(metric.key for metric in metrics_of(tasks)), "mean"]
    rows: list[Sequence[str]] = []
    for source, variants in scores.items():
        for variant, score in variants.items():
            rows.append((f"{source}: {variant}", *(number(score.get(key)) for key in keys)))
        differences = (difference(*(score.get(key) for score in variants.values())) for key in keys)
        rows.append((f"{source}: difference", *differences))
    return table(("", *(titles[key] for key in keys)), rows)


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
