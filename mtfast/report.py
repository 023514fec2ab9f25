"""The report of a run: what its run directory recorded, as tables and plots, beside the paper's figures.

`write_report` turns one run directory into `report.md`, `report.html` and `plots/*.png`; `write_comparison`
does so for the runs of an experiment. What a run did not record is left out, or said.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt
from matplotlib.figure import Figure

from mtfast.config_file import read_config_file
from mtfast.experiments import PAPER_FIGURES, Experiment
from mtfast.files import read_json, write_text
from mtfast.plots import PRETRAINING, is_number, losses_of, metrics_of, plot_dev_metrics, plot_losses
from mtfast.recipes import PAPER_TASKS, RECIPES
from mtfast.tasks import METRICS_OF, Task

STAGES = {"pretrain": "Pre-training", "heads": "Head training", "finetune": "Fine-tuning"}
METRIC_TITLES = {"accuracy": "accuracy", "f1": "F1", "pearson": "Pearson", "spearman": "Spearman"}
PAPER_NOTE = (
    "The paper's figures are on the test sets, whose labels are not public; ours are on dev. "
    "They are comparable only for the paper's recipe on the paper's data and checkpoint."
)
SKIPPED_SHOWN = 10
Scores = Mapping[str, Mapping[str, Any]]  # dev metrics by run


@dataclass(frozen=True)
class RunRecord:
    """What a run directory holds, as far as it is there."""

    directory: Path
    summary: dict[str, Any]
    steps: dict[str, list[dict[str, Any]]]  # by stage, in order
    evaluations: dict[str, list[dict[str, Any]]]  # by stage, in order
    config: str
    tasks: Mapping[str, Task]
    torn_lines: int

    @property
    def title(self) -> str:
        return self.directory.resolve().name

    def best_evaluation(self, stage: str) -> dict[str, Any] | None:
        """The stage's evaluation with the best mean, the first of equals."""
        rated = [e for e in self.evaluations.get(stage, []) if is_number(e["metrics"].get("mean"))]
        return max(rated, key=lambda e: e["metrics"]["mean"], default=None)

    def dev_metrics(self) -> dict[str, float]:
        """The run's final dev metrics; of an unfinished run, the best of its last evaluated stage."""
        if self.summary.get("dev"):
            return self.summary["dev"]
        best = self.best_evaluation("finetune") or self.best_evaluation("heads")
        return best["metrics"] if best else {}


def read_run(run_dir: str | Path) -> RunRecord:
    """Read a run directory. Missing files count as empty; a directory that is not there is an error.

    A run that was continued may have recorded a step twice: the later record stands.

    Raises:
        ConfigError: summary.json or config.yaml cannot be read.
    """
    directory = Path(run_dir)
    if not directory.is_dir():
        raise FileNotFoundError(f"run_dir: {directory} is not a directory")
    latest: dict[str, dict[tuple[str, int], dict[str, Any]]] = {"step": {}, "eval": {}}
    torn = 0
    for line in _text(directory / "metrics.jsonl").splitlines():
        try:
            record = json.loads(line)
            latest.get(record["kind"], {})[record["stage"], int(record["step"])] = record
        except (ValueError, KeyError, TypeError):
            torn += 1
    summary = directory / "summary.json"
    by_stage: dict[str, dict[str, list[dict[str, Any]]]] = {"step": {}, "eval": {}}
    for kind, records in latest.items():
        for (stage, _), record in sorted(records.items(), key=lambda item: item[0]):
            by_stage[kind].setdefault(stage, []).append(record)
    return RunRecord(
        directory=directory,
        summary=read_json(summary, "remove it, and the run goes on without it") if summary.is_file() else {},
        steps=by_stage["step"],
        evaluations=by_stage["eval"],
        config=_text(directory / "config.yaml"),
        tasks=_tasks(directory / "config.yaml"),
        torn_lines=torn,
    )


def _tasks(config: Path) -> Mapping[str, Task]:
    """The tasks that a configuration declares; the paper's where it declares none, as an earlier mtfast's."""
    if not re.search("^tasks:", _text(config), re.MULTILINE):
        return PAPER_TASKS
    return read_config_file(config, RECIPES).config.tasks


def _are_the_papers(tasks: Mapping[str, Task]) -> bool:
    """Whether these tasks' metrics can stand beside the paper's; heads, weights and data may be others."""

    def measured(tasks: Mapping[str, Task]) -> dict[str, tuple[str, int, str]]:
        return {name: (task.kind, task.outputs, task.main_metric) for name, task in tasks.items()}

    return measured(tasks) == measured(PAPER_TASKS)


def write_report(run_dir: str | Path) -> Path:
    """Write `report.md`, `report.html` and `plots/*.png` into `run_dir`; return the path of `report.html`."""
    run = read_run(run_dir)
    plots = run.directory / "plots"
    parts = [f"# Run report: {_escape(run.title)}", _headline(run)]
    parts += ["## Dev metrics", _dev_table(run)]
    stages = {title: run.evaluations[stage] for stage, title in STAGES.items() if stage in run.evaluations}
    if figure := plot_dev_metrics(metrics_of(run.tasks), stages, "epoch of the stage"):
        parts.append(_save(figure, plots / "dev_metrics.png", "Dev metrics per epoch"))
    parts += ["## Stages", _stage_table(run)]
    for stage, title in STAGES.items():
        losses = PRETRAINING if stage == "pretrain" else losses_of(run.tasks)
        if figure := plot_losses(losses, run.steps.get(stage, [])):
            caption = f"{title}: losses"
            parts += [f"### {caption}", _save(figure, plots / f"losses_{stage}.png", caption)]
    if _are_the_papers(run.tasks):
        parts += ["## Beside the paper", _paper_table(run), PAPER_NOTE]
    if run.summary.get("data"):
        parts += ["## Data", _data_table(run.summary["data"])]
    if run.summary.get("environment"):
        rows = [(key.replace("_", " "), _plain(value)) for key, value in run.summary["environment"].items()]
        parts += ["## Environment", _table(("", "value"), rows, text_columns=2)]
    if run.config:
        parts += ["## Configuration", f"```yaml\n{run.config.rstrip()}\n```"]
    if run.torn_lines:
        parts.append(f"{run.torn_lines} unreadable line(s) of `metrics.jsonl` were left out.")
    return _write(run.directory, f"mtfast: {run.title}", parts)


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
    ours = {name: records[name].dev_metrics() if name in records else {} for name in variants}
    if _are_the_papers(tasks):
        table = _experiment_table(tasks, {"Paper (test)": variants, "Ours (dev)": ours})
        parts = [f"# {title}", "## Ours and the paper's", table, PAPER_NOTE]
    else:
        parts = [f"# {title}", "## Dev metrics", _experiment_table(tasks, {"Ours (dev)": ours})]
    if missing := [f"`{name}`" for name in variants if name not in records]:
        parts.append(f"Not run: {', '.join(missing)}.")
    lines = {name: run.evaluations.get("finetune", []) for name, run in records.items()}
    if figure := plot_dev_metrics(metrics_of(tasks), lines, "epoch of fine-tuning"):
        parts.append(_save(figure, directory / "plots" / "dev_metrics.png", "Dev metrics while fine-tuning"))
    for name, run in records.items():
        parts += [
            f"## {_sentence_case(name)}",
            f"Run directory: `{run.directory}`",
            _dev_table(run),
            _stage_table(run),
        ]
    return _write(directory, f"mtfast: {title}", parts)


# ---- tables ----


def _headline(run: RunRecord) -> str:
    dev = run.dev_metrics()
    seconds = [stage.get("seconds") for stage in run.summary.get("stages", {}).values()]
    titles = _titles(run.tasks)
    counting = [metric.key for metric in metrics_of(run.tasks) if is_number(dev.get(metric.key))]
    said = [f"{titles[key]} **{_number(dev[key])}**" for key in counting]
    total = sum(value for value in seconds if is_number(value))
    headline = f"On dev: {', '.join(said)}." if said else "This run has not been evaluated on dev yet."
    return f"{headline} Stages took {_duration(total)} in all." if total else headline


def _titles(tasks: Mapping[str, Task]) -> dict[str, str]:
    """What the metrics of an evaluation are called: first those that count, and what is made of them."""

    def of(name: str, task: Task, metric: str) -> tuple[str, str]:
        return f"{name}_{metric}", f"{_escape(task.title or name)} {METRIC_TITLES[metric]}"

    counting = dict(of(name, task, task.main_metric) for name, task in tasks.items())
    together = {"mean": "Mean", "cs224n_overall": "CS 224N overall"}
    every = dict(of(name, task, metric) for name, task in tasks.items() for metric in METRICS_OF[task.kind])
    return counting | together | every


def _dev_table(run: RunRecord) -> str:
    evaluations: list[tuple[str, str, Mapping[str, Any]]] = []
    for stage, title in STAGES.items():
        if best := run.best_evaluation(stage):
            evaluations.append((f"{title}, best epoch", str(best.get("epoch", "")), best["metrics"]))
    dev = run.summary.get("dev")
    titles = {
        key: title
        for key, title in _titles(run.tasks).items()
        if any(key in metrics for metrics in (*(e[2] for e in evaluations), dev or {}))
    }
    rows: list[Sequence[str]] = [
        (what, epoch, *(_number(metrics.get(key)) for key in titles)) for what, epoch, metrics in evaluations
    ]
    if dev:
        rows.append(("**Result of the run**", "", *(f"**{_number(dev.get(key))}**" for key in titles)))
    if not rows:
        return "No evaluation is recorded."
    return _table(("", "epoch", *titles.values()), rows)


def _stage_table(run: RunRecord) -> str:
    recorded = run.summary.get("stages", {})
    rows = []
    for stage, title in STAGES.items():
        if facts := recorded.get(stage):
            losses = (_number(facts.get(key), 3) for key in ("first_loss", "last_loss"))
            rates = (_count(facts.get(key)) for key in ("examples_per_s", "tokens_per_s"))
            rows.append((title, _count(facts.get("steps")), _duration(facts.get("seconds")), *rates, *losses))
    not_run = [title.lower() for stage, title in STAGES.items() if stage not in recorded]
    left_out = f"Not finished or not part of this run: {', '.join(not_run)}." if not_run else ""
    if not rows:
        return left_out
    header = ("stage", "steps", "time", "examples/s", "tokens/s", "first loss", "last loss")
    return "\n\n".join(part for part in (_table(header, rows), left_out) if part)


def _paper_table(run: RunRecord) -> str:
    keys, dev, titles = _counting(run.tasks), run.dev_metrics(), _titles(run.tasks)
    rows = [
        (f"Paper, {name} (test)", *(_number(figures[key]) for key in keys))
        for name, figures in PAPER_FIGURES.items()
    ]
    rows.append(("**This run (dev)**", *(f"**{_number(dev.get(key))}**" for key in keys)))
    return _table(("", *(titles[key] for key in keys)), rows)


def _counting(tasks: Mapping[str, Task]) -> list[str]:
    """The metric that counts of each task, and their mean."""
    return [*(metric.key for metric in metrics_of(tasks)), "mean"]


def _experiment_table(tasks: Mapping[str, Task], scores: Mapping[str, Scores]) -> str:
    """By source of scores, a line for each of the two variants and one for their difference."""
    keys, titles = _counting(tasks), _titles(tasks)
    rows: list[Sequence[str]] = []
    for source, variants in scores.items():
        for variant, score in variants.items():
            rows.append((f"{source}: {variant}", *(_number(score.get(key)) for key in keys)))
        differences = (_difference(*(score.get(key) for score in variants.values())) for key in keys)
        rows.append((f"{source}: difference", *differences))
    return _table(("", *(titles[key] for key in keys)), rows)


def _data_table(data: Mapping[str, Any]) -> str:
    """Row accounts by data set: rows read, used, skipped, texts cut; then the notes on them, and the first
    skipped rows by name."""
    rows, named, notes = [], [], []
    for name, account in data.items():
        if not isinstance(account, Mapping):
            continue
        skipped = account.get("skipped", [])
        left_out = len(skipped) if isinstance(skipped, list | tuple) else skipped
        counts = (account.get("read"), account.get("used"), left_out, account.get("truncated"))
        rows.append((name, *map(_count, counts)))
        notes += [f"- {name}: {_escape(str(note))}" for note in account.get("notes", ())]
        if account.get("unknown"):
            pieces = f"{_count(account['unknown'])} of {_count(account.get('word_pieces'))} word pieces"
            notes.append(f"- {name}: {pieces} stand for words that the tokenizer does not know")
        if isinstance(skipped, list | tuple):
            named += [row for row in skipped if isinstance(row, Mapping)]
    parts = [_table(("", "rows read", "used", "skipped", "cut to length"), rows)]
    if notes:
        parts.append("\n".join(notes))
    if named:
        shown = [
            f"- `{row.get('file')}:{row.get('line')}`: {_escape(str(row.get('reason')))}" for row in named
        ]
        more = [f"- and {len(named) - SKIPPED_SHOWN:,} more"] if len(named) > SKIPPED_SHOWN else []
        parts += ["Skipped rows:", "\n".join(shown[:SKIPPED_SHOWN] + more)]
    return "\n\n".join(parts)


def _table(header: Sequence[str], rows: Iterable[Sequence[str]], text_columns: int = 1) -> str:
    marks = ["---" if column < text_columns else "---:" for column in range(len(header))]
    lines = [header, marks, *([_cell(value) for value in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _save(figure: Figure, path: Path, caption: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return f"![{caption}]({path.parent.name}/{path.name})"


# ---- text ----


def _number(value: object, digits: int = 3) -> str:
    return f"{value:.{digits}f}" if is_number(value) else "—"


def _count(value: object) -> str:
    return f"{value:,.0f}" if is_number(value) else "—"


def _difference(first: object, second: object) -> str:
    return f"{second - first:+.3f}" if is_number(first) and is_number(second) else "—"  # type: ignore[operator]


def _duration(seconds: object) -> str:
    if not is_number(seconds):
        return "—"
    whole = float(seconds)  # type: ignore[arg-type]
    if whole < 60:
        return f"{whole:.1f} s"
    minutes, rest = divmod(round(whole), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _plain(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_plain(item)}" for key, item in value.items())
    return ", ".join(map(_plain, value)) if isinstance(value, list | tuple) else str(value)


def _sentence_case(text: str) -> str:
    return text[0].upper() + text[1:]


def _escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace("*", "\\*").replace("_", "\\_").replace("<", "&lt;")


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _write(directory: Path, title: str, parts: Iterable[str]) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    markdown = "\n\n".join(part for part in parts if part) + "\n"
    write_text(directory / "report.md", markdown)
    renderer = MarkdownIt("commonmark", {"html": False}).enable("table")
    body = renderer.render(markdown)
    for picture in sorted((directory / "plots").glob("*.png")):
        encoded = base64.b64encode(picture.read_bytes()).decode()
        body = body.replace(f'src="plots/{picture.name}"', f'src="data:image/png;base64,{encoded}"')
    body = body.replace("<table>", '<div class="wide"><table>').replace("</table>", "</table></div>")
    page = PAGE.replace("TITLE", title.replace("<", "&lt;")).replace("BODY", body)
    write_text(directory / "report.html", page)
    return directory / "report.html"


PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>TITLE</title>
<style>
body { font: 16px/1.55 system-ui, sans-serif; color: #1d2329; background: #fff; max-width: 66rem;
       margin: 2.5rem auto; padding: 0 1.25rem; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .75rem; }
h3 { font-size: 1rem; margin: 1.8rem 0 .2rem; }
h2 { font-size: 1.15rem; margin: 2.4rem 0 .75rem; padding-bottom: .3rem; border-bottom: 1px solid #dfe3e8; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .92rem; margin: .75rem 0; }
th, td { padding: .38rem 1.3rem .38rem 0; border-bottom: 1px solid #e8ebef; text-align: left;
         font-variant-numeric: tabular-nums; }
th { font-weight: 600; color: #57606a; vertical-align: bottom; }
tr:last-child td { border-bottom-color: #b9c0c8; }
img { display: block; max-width: 100%; margin: 1.1rem 0; }
code { font-size: .88em; background: #f3f5f7; padding: .1em .3em; border-radius: 3px;
       overflow-wrap: anywhere; }
pre { background: #f3f5f7; padding: .9rem 1rem; border-radius: 6px; overflow-x: auto; font-size: .86rem; }
pre code { background: none; padding: 0; font-size: 1em; overflow-wrap: normal; }
</style>
<body>
BODY
</body>
</html>
"""
