"""The report of a run: what its run directory recorded, as tables and plots, beside the paper's figures.

`write_report` turns one run directory into `report.md`, `report.html` and `plots/*.png`; `write_comparison`
does so for the two runs of one of the paper's experiments. What a run did not record is left out, or said.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt
from matplotlib.figure import Figure

from mtfast.plots import DEV_METRICS, is_number, plot_dev_metrics, plot_losses
from mtfast.train.files import read_json, write_text

STAGES = {"pretrain": "Pre-training", "heads": "Head training", "finetune": "Fine-tuning"}
METRICS = {
    "sst_accuracy": "SST accuracy",
    "quora_accuracy": "Quora accuracy",
    "sts_pearson": "STS Pearson",
    "mean": "Mean of the three",
    "cs224n_overall": "CS 224N overall",
}


def _figures(sst: float, quora: float, sts: float) -> dict[str, float]:
    return {"sst_accuracy": sst, "quora_accuracy": quora, "sts_pearson": sts, "mean": (sst + quora + sts) / 3}


WITH_PRETRAINING = _figures(0.549, 0.858, 0.631)
EXPERIMENTS: dict[str, tuple[str, dict[str, dict[str, float]]]] = {
    "exp1": (
        "Exp-I: the flow without and with further pre-training",
        {
            "without pre-training": _figures(0.480, 0.851, 0.623),
            "with pre-training": WITH_PRETRAINING,
        },
    ),
    "exp2": (
        "Exp-II: the simple and the LSTM sentiment head",
        {
            "linear head": WITH_PRETRAINING,
            "LSTM head": _figures(0.500, 0.859, 0.656),
        },
    ),
}
PAPER_NOTE = (
    "The paper's figures are on the test sets, whose labels are not public; ours are on dev. "
    "They are comparable only for the paper's recipe on the paper's data and checkpoint."
)
SKIPPED_SHOWN = 10


@dataclass(frozen=True)
class RunRecord:
    """What a run directory holds, as far as it is there."""

    directory: Path
    summary: dict[str, Any]
    steps: dict[str, list[dict[str, Any]]]  # by stage, in order
    evaluations: dict[str, list[dict[str, Any]]]  # by stage, in order
    config: str
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
        torn_lines=torn,
    )


def write_report(run_dir: str | Path) -> Path:
    """Write `report.md`, `report.html` and `plots/*.png` into `run_dir`; return the path of `report.html`."""
    run = read_run(run_dir)
    plots = run.directory / "plots"
    parts = [f"# Run report: {_escape(run.title)}", _headline(run)]
    parts += ["## Dev metrics", _dev_table(run)]
    stages = {title: run.evaluations[stage] for stage, title in STAGES.items() if stage in run.evaluations}
    if figure := plot_dev_metrics(stages, "epoch of the stage"):
        parts.append(_save(figure, plots / "dev_metrics.png", "Dev metrics per epoch"))
    parts += ["## Stages", _stage_table(run)]
    for stage, title in STAGES.items():
        if figure := plot_losses(run.steps.get(stage, [])):
            parts += [
                f"### {title}: losses",
                _save(figure, plots / f"losses_{stage}.png", f"{title}: losses"),
            ]
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


def write_comparison(runs: Mapping[str, str | Path], directory: str | Path, experiment: str = "exp1") -> Path:
    """Write the report of one of the paper's experiments into `directory`; return the path of `report.html`.

    Args:
        runs: run directory of each variant: "without pre-training" and "with pre-training" for `exp1`,
            "linear head" and "LSTM head" for `exp2`. A variant that is not given is reported as not run.
        directory: where `report.md`, `report.html` and `plots/` go; created if need be.
        experiment: "exp1" or "exp2".
    """
    if experiment not in EXPERIMENTS:
        raise ValueError(f"experiment: {experiment!r} is not one of {', '.join(EXPERIMENTS)}")
    title, variants = EXPERIMENTS[experiment]
    if unknown := sorted(set(runs) - set(variants)):
        raise ValueError(
            f"runs: {unknown[0]!r} is not a variant of {experiment}; those are {', '.join(variants)}"
        )
    directory = Path(directory)
    records = {name: read_run(runs[name]) for name in variants if name in runs}
    parts = [f"# {title}", "## Ours and the paper's", _experiment_table(variants, records), PAPER_NOTE]
    lines = {name: run.evaluations.get("finetune", []) for name, run in records.items()}
    if figure := plot_dev_metrics(lines, "epoch of fine-tuning"):
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
    said = [f"{METRICS[key]} **{_number(dev[key])}**" for key in DEV_METRICS if is_number(dev.get(key))]
    total = sum(value for value in seconds if is_number(value))
    told = f"On dev: {', '.join(said)}." if said else "This run has not been evaluated on dev yet."
    return f"{told} Stages took {_duration(total)} in all." if total else told


def _dev_table(run: RunRecord) -> str:
    rows: list[Sequence[str]] = []
    for stage, title in STAGES.items():
        if best := run.best_evaluation(stage):
            epoch, scores = str(best.get("epoch", "")), best["metrics"]
            rows.append((f"{title}, best epoch", epoch, *(_number(scores.get(key)) for key in METRICS)))
    if dev := run.summary.get("dev"):
        rows.append(("**Result of the run**", "", *(f"**{_number(dev.get(key))}**" for key in METRICS)))
    if not rows:
        return "No evaluation is recorded."
    return _table(("", "epoch", *METRICS.values()), rows)


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
    keys = ("sst_accuracy", "quora_accuracy", "sts_pearson", "mean")
    dev = run.dev_metrics()
    rows = [
        (f"Paper, {name} (test)", *(_number(paper[key]) for key in keys))
        for name, paper in (
            {**EXPERIMENTS["exp1"][1], "LSTM head": EXPERIMENTS["exp2"][1]["LSTM head"]}
        ).items()
    ]
    rows.append(("**This run (dev)**", *(f"**{_number(dev.get(key))}**" for key in keys)))
    return _table(("", *(METRICS[key] for key in keys)), rows)


def _experiment_table(variants: Mapping[str, Mapping[str, float]], records: Mapping[str, RunRecord]) -> str:
    keys = ("sst_accuracy", "quora_accuracy", "sts_pearson", "mean")
    ours = {name: record.dev_metrics() for name, record in records.items()}
    rows: list[Sequence[str]] = []
    for source, figures in (("Paper (test)", variants), ("Ours (dev)", ours)):
        scores = [figures.get(name, {}) for name in variants]
        for variant, score in zip(variants, scores, strict=True):
            rows.append((f"{source}: {variant}", *(_number(score.get(key)) for key in keys)))
        rows.append(
            (f"{source}: difference", *(_difference(*(score.get(key) for score in scores)) for key in keys))
        )
    missing = [f"`{name}`" for name in variants if name not in records]
    note = f"\n\nNot run: {', '.join(missing)}." if missing else ""
    return _table(("", *(METRICS[key] for key in keys)), rows) + note


def _data_table(data: Mapping[str, Any]) -> str:
    """Row accounts by data set: rows read, used, skipped, texts cut; then the first skipped rows by name."""
    rows, named = [], []
    for name, account in data.items():
        if not isinstance(account, Mapping):
            continue
        skipped = account.get("skipped", [])
        left_out = len(skipped) if isinstance(skipped, list | tuple) else skipped
        counts = (account.get("read"), account.get("used"), left_out, account.get("truncated"))
        rows.append((name, *map(_count, counts)))
        if isinstance(skipped, list | tuple):
            named += [row for row in skipped if isinstance(row, Mapping)]
    parts = [_table(("", "rows read", "used", "skipped", "cut to length"), rows)]
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
