"""What several pages say of runs: what metrics are called, choices, data, how the paper's compare."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from mtfast.experiments import PAPER_ROWS
from mtfast.markdown import count, escape, table
from mtfast.plots import metrics_of, plot_dev_metrics
from mtfast.recipes import PAPER_TASKS
from mtfast.run_record import RunRecord
from mtfast.tasks import METRICS_OF, Task

STAGES = {"pretrain": "Pre-training", "heads": "Head training", "finetune": "Fine-tuning"}
METRIC_TITLES = {"accuracy": "accuracy", "f1": "F1", "pearson": "Pearson", "spearman": "Spearman"}


def metric_titles(tasks: Mapping[str, Task]) -> dict[str, str]:
    """What the metrics of an evaluation are called: first those that count, and what is made of them."""

    def of(name: str, task: Task, metric: str) -> tuple[str, str]:
        return f"{name}_{metric}", f"{escape(task.title or name)} {METRIC_TITLES[metric]}"

    counting = dict(of(name, task, task.main_metric) for name, task in tasks.items())
    together = {"mean": "Mean", "cs224n_overall": "CS 224N overall"}
    every = dict(of(name, task, metric) for name, task in tasks.items() for metric in METRICS_OF[task.kind])
    return counting | together | every


def choice_in_words(run: RunRecord) -> str:
    """Which epoch the results are of and how it was chosen; empty where nothing has been evaluated."""
    choice = run.choice()
    if choice is None:
        return ""
    stage, looks = STAGES[choice.stage].lower(), choice.looks
    if looks == 1:
        said = f"The results are those of the one epoch of {stage}."
    else:
        said = (
            f"The results are those of epoch {choice.epoch} of {looks} of {stage}, whose weights had the "
            f"best mean of the tasks' metrics on dev. Figures on dev are therefore the best of {looks} looks "
            "and tend to be high."
        )
    return f"{said} Figures on test were used for no choice." if run.metrics("test") else said


def plot_of_dev_metrics(run: RunRecord) -> Figure | None:
    """The tasks' metrics on dev over the epochs of each stage; None where nothing has been evaluated."""
    stages = {title: run.evaluations[stage] for stage, title in STAGES.items() if stage in run.evaluations}
    return plot_dev_metrics(metrics_of(run.tasks), stages, "epoch of the stage")


def data_table(data: Mapping[str, Any]) -> str:
    """Row accounts by data set: rows read, used and skipped, texts cut."""
    rows: list[Sequence[str]] = []
    for name, account in data.items():
        if isinstance(account, Mapping):
            skipped = account.get("skipped", [])
            left_out = len(skipped) if isinstance(skipped, list | tuple) else skipped
            counts = (account.get("read"), account.get("used"), left_out, account.get("truncated"))
            rows.append((name, *map(count, counts)))
    return table(("", "rows read", "used", "skipped", "cut to length"), rows)


def are_the_papers(tasks: Mapping[str, Task]) -> bool:
    """Whether these tasks' metrics can stand beside the paper's; heads, weights and data may be others."""

    def measured(tasks: Mapping[str, Task]) -> dict[str, tuple[str, int, str]]:
        return {name: (task.kind, task.outputs, task.main_metric) for name, task in tasks.items()}

    return measured(tasks) == measured(PAPER_TASKS)


def paper_note(splits: Sequence[str]) -> str:
    """How far figures on these splits can be compared with the paper's."""
    ours = {"dev": "dev", "test": "the test split of the run's own data"}
    return (
        "The paper's figures are on test sets whose labels are not public; ours are on "
        f"{' and on '.join(ours[split] for split in splits)}. "
        "They are comparable only for the paper's recipe on the paper's data and checkpoint."
    )


def papers_rows(runs: Sequence[RunRecord]) -> str:
    """Where the rows of the runs' data are not as many as the paper's; empty where they are."""
    data = {name: account for run in runs for name, account in run.summary.get("data", {}).items()}
    used = {name: data[name].get("used") for name in PAPER_ROWS if isinstance(data.get(name), Mapping)}
    differing = [
        f"{name} {count(rows)} of {count(PAPER_ROWS[name])}"
        for name, rows in used.items()
        if rows != PAPER_ROWS[name]
    ]
    return f"Rows used here, of the paper's: {', '.join(differing)}." if differing else ""
