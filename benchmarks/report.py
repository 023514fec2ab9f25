"""Writes the measured tables in README.md and docs/ from the files in benchmarks/results/."""

from __future__ import annotations

import argparse
import csv
import json
import re
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.ablation import LESS_DATA, PARTS
from benchmarks.common import RESULTS
from mtfast.comparison_report import comparison_table
from mtfast.experiments import ALL_RECIPES, EXPERIMENTS, PAPER_ROWS
from mtfast.tasks import METRICS_OF

ROOT = RESULTS.parents[1]
PAGES = (
    "README.md",
    *(f"docs/{name}.md" for name in ("benchmarks", "ops", "packed_attention", "paper", "performance")),
    *(f"docs/{name}.md" for name in ("quality", "training")),
)
# What reports of the CS 224N project give, with BERT-base.
REPORTS = {"sst": 0.541, "quora": 0.901, "sts": 0.891}
SECTION = re.compile(r"(<!-- results: (?P<name>[\w-]+)(?P<words>[^>]*?) -->\n).*?(<!-- end -->)", re.DOTALL)


def main(argv: list[str]) -> int:
    """Rewrite the tables, or with --check say whether they are those of the results files."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks report", description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; fail if a table is out of date")
    check = parser.parse_args(argv).check
    stale = 0
    for page in PAGES:
        old = (ROOT / page).read_text(encoding="utf-8")
        new = render(old)
        stale += new != old
        if check:
            differs = f"{page} differs: run python -m benchmarks report"
            print(f"{page} is up to date" if new == old else differs)
        else:
            (ROOT / page).write_text(new, encoding="utf-8")
    return int(check and stale > 0)


def render(text: str, results: Path = RESULTS) -> str:
    """`text` with every section between `<!-- results: NAME WORDS -->` and `<!-- end -->` made anew.

    Of benchmark NAME a section has the cases in which all WORDS, if any, occur; "runs" are recorded runs, all
    or those named, "experiment" is the recorded one that is named, "pretraining_curve" what steps of
    pre-training do, "ablation" what the recipe `best` is on dev without its parts, with WORDS "test" on test,
    with "data" with less data, "quality" that recipe beside others' results, and "utilisation" holds training
    steps against the peak of their machine.
    """
    rows = newest_rows(results)
    runs = {
        path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(results.glob("run-*.json"))
    }

    def section(match: re.Match[str]) -> str:
        name, words = match["name"], set(match["words"].split())
        if name == "runs":
            body = _runs_table({run: runs[run] for run in runs if not words or run in words})
        elif name == "experiment":
            body = _experiment(results / f"experiment-{match['words'].strip()}.json")
        elif name == "pretraining_curve":
            body = _curve(results / "pretraining-curve.json")
        elif name == "ablation":
            variants = LESS_DATA if "data" in words else PARTS
            body = _ablation(results / "ablation.json", variants, "test" if "test" in words else "dev")
        elif name == "quality":
            body = _quality(results / "ablation.json")
        elif name == "utilisation":
            body = _utilisation(rows)
        else:
            wanted = [r for r in rows if r["benchmark"] == name and words <= set(r["case"].split())]
            body = _benchmark_table(wanted)
        return f"{match[1]}{body}\n{match[4]}"

    return SECTION.sub(section, text)


def newest_rows(results: Path) -> list[dict[str, str]]:
    """The newest row of each machine, benchmark, case and variant, older ones first."""
    rows = [row for path in results.glob("*-????-??-??.csv") for row in _read(path)]
    newest: dict[tuple[str, ...], dict[str, str]] = {}
    for row in sorted(rows, key=lambda row: row["date"]):
        newest[tuple(row[name] for name in ("device", "benchmark", "case", "variant"))] = row
    return list(newest.values())


def _read(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _benchmark_table(rows: list[dict[str, str]]) -> str:
    """A table for each machine and commit: a line a case, a column a variant."""
    groups: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        threads = "" if row["driver"] else f", {_threads(row['threads'])}"
        made_by = f"{row['device']}{threads}, torch {row['torch']}, commit {row['commit']}"
        groups.setdefault(made_by, []).append(row)
    return "\n\n".join(f"{name}:\n\n{_cases(group)}" for name, group in groups.items()) or "not measured"


def _utilisation(rows: list[dict[str, str]]) -> str:
    """Of mtfast's steps the encoder's products, what they would take at the machine's peak, and the step."""
    peaks, steps = {}, {}
    for row in rows:
        if row["benchmark"] == "peaks" and row["variant"] == "matmul":
            peaks[row["device"]] = float(row["tflop_per_s"])
        elif row["benchmark"] in ("finetune_step", "pretrain_step") and row["variant"] == "mtfast":
            steps[row["device"], row["case"]] = row
    body = []
    for (device, case), row in steps.items():
        if not row.get("tflop_per_s") or device not in peaks:
            continue
        rate, seconds = float(row["tflop_per_s"]), float(row["median_us"]) / 1e6
        peak = peaks[device]
        body.append(
            (
                case.split(" real")[0],
                f"{device}, commit {row['commit']}",
                f"{rate * seconds:.3g} TFLOP",
                f"{peak:.3g} TFLOP/s",
                _time(rate * seconds / peak * 1e6),
                _time(seconds * 1e6),
                f"{rate / peak:.0%}",
            )
        )
    columns = (
        "step",
        "machine",
        "products",
        "peak",
        "products at the peak (projection)",
        "step",
        "utilisation",
    )
    return _markdown(columns, body) if body else "not measured"


def _cases(rows: list[dict[str, str]]) -> str:
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    cells: dict[str, dict[str, str]] = {}
    for row in rows:
        cells.setdefault(row["case"], {})[row["variant"]] = _cell(row)
    body = [
        (case, *(cells[case].get(variant, "") for variant in variants))
        for case in sorted(cells, key=_natural)
    ]
    return _markdown(("case", *variants), body)


def _natural(case: str) -> list[tuple[int, str]]:
    """Sorts numbers by their value."""
    return [(int(word), "") if word.isdecimal() else (-1, word) for word in case.split()]


def _cell(row: dict[str, str]) -> str:
    """Time or examples a second, the ratio to the baseline unless it is that, and memory where it was
    measured; of a part of a step its share.

    The time of a wrong result is none.
    """
    if row.get("wrong"):
        return "wrong"
    if row.get("shapes"):
        return f"{float(row['shapes']):.0f} shapes, {float(row['filler_share']):.1%} more tokens"
    if row.get("share_of_step"):
        return f"{_time(float(row['median_us']))} ({float(row['share_of_step']):.1%})"
    facts = [] if row["ratio_to_baseline"] == "1.0" else [f"{float(row['ratio_to_baseline']):.2f}x"]
    if row.get("peak_mib"):
        size = float(row["peak_mib"])
        facts.append(f"{size:,.0f} MiB" if size >= 100 else f"{size:.3g} MiB")
    rate = row.get("examples_per_s")
    what = f"{float(rate):,.1f}/s" if rate else _time(float(row["median_us"]))
    return what + (f" ({', '.join(facts)})" if facts else "")


def _runs_table(runs: dict[str, Any]) -> str:
    if not runs:
        return "not measured"
    stages = ("pretrain", "heads", "finetune")
    scores = {name: _scores(run) for name, run in runs.items()}
    titles = list(dict.fromkeys(title for found in scores.values() for title in found))
    columns = ("run", *titles, *(f"{stage} s" for stage in stages), "device", "commit")
    body = []
    for name, run in runs.items():
        device = run["environment"]
        body.append(
            (
                name,
                *(f"{scores[name][title]:.3f}" if title in scores[name] else "-" for title in titles),
                *(f"{run['stages'][s]['seconds']:.0f}" if s in run["stages"] else "-" for s in stages),
                f"{device['device']}, {_threads(device['threads'])}",
                run["commit"],
            )
        )
    return _markdown(columns, body)


def _experiment(path: Path) -> str:
    """The variants of an experiment with their spread, beside the paper's figures."""
    if not path.is_file():
        return "not measured"
    result = json.loads(path.read_text(encoding="utf-8"))
    experiment, tasks = EXPERIMENTS[result["experiment"]], ALL_RECIPES[result["experiment"]]().tasks
    figures = {variant.name: variant.figures for variant in experiment.variants}
    made = [run for of_variant in result["runs"].values() for run in of_variant]
    hours = sum(stage["seconds"] for run in made for stage in run["stages"].values()) / 3600
    devices = dict.fromkeys(
        f"{of['device']}, {_threads(of['threads'])}, torch {of['torch']}"
        for of in (run["environment"] for run in made)
    )
    commits = " and ".join(dict.fromkeys(run["commit"] for run in made))
    took = f", {hours:.1f} hours in all" if hours else ""
    where = f"{len(made)} runs{took}; {'; '.join(devices)}; commit {commits}"
    return f"{where}:\n\n{comparison_table(result['comparison'], tasks, figures)}"


def _curve(path: Path) -> str:
    """What the tasks make of the encoder after so many steps of pre-training."""
    if not path.is_file():
        return "not measured"
    result = json.loads(path.read_text(encoding="utf-8"))
    body = [_point("none", result["start"])]
    for curve in result["curves"]:
        first = curve["head_steps"]
        how = f", the first {first} of the heads alone" if first else ""
        body += [_point(f"{point['steps']}{how}", point) for point in curve["points"]]
        for part, of in curve["put_back"].items():
            name = f"the same, {part.replace('-', ' ')} put back"
            body.append((name, "-", f"{of['frozen_sst']:.3f}", f"{of['frozen_sts']:.3f}", "-"))
    columns = ("steps", "MLM loss", "SST, frozen", "STS, frozen", "SST, fine-tuned")
    by = result["environment"]
    made_by = f"{by['device']}, {_threads(by['threads'])}, torch {by['torch']}, commit {by['commit']}"
    seeds = len(result["start"]["tuned_sst"])
    fine_tuned = f", fine-tuning with {seeds} seeds" if seeds > 1 else ", one seed"
    return f"{made_by}{fine_tuned}:\n\n{_markdown(columns, body)}"


def _point(name: str, point: dict[str, Any]) -> tuple[str, ...]:
    """A line of the curve's table."""
    return (
        name,
        "-" if point["mlm"] is None else f"{point['mlm']:.2f}",
        f"{point['frozen_sst']:.3f}",
        f"{point['frozen_sts']:.3f}",
        _spread(point["tuned_sst"]),
    )


def _ablation(path: Path, wanted: Iterable[str], split: str) -> str:
    """The recipe `best`, and what some of its variants differ by from it: means and sample standard
    deviations over seeds, of a split's metrics and of their differences from `best` with the same seed."""
    if not path.is_file():
        return "not measured"
    result = json.loads(path.read_text(encoding="utf-8"))
    best = {run["seed"]: run[split] for run in result["variants"]["best"] if run.get(split)}
    if not best:
        return "not measured"
    variants = {
        name: [run for run in result["variants"].get(name, []) if run.get(split) and run["seed"] in best]
        for name in dict.fromkeys(("best", *wanted))
    }
    variants = {name: runs for name, runs in variants.items() if runs}
    keys = [f"{name}_{METRICS_OF[task['kind']][0]}" for name, task in result["config"]["tasks"].items()]
    titles = [task["title"] or name for name, task in result["config"]["tasks"].items()]
    body = []
    for name, runs in variants.items():
        if name == "best":
            cells = [_spread([run[split][key] for run in runs]) for key in (*keys, "mean")]
        else:
            gains = [[run[split][key] - best[run["seed"]][key] for run in runs] for key in (*keys, "mean")]
            cells = [_spread(gain, "+.4f") for gain in gains]
        body.append((name, str(len(runs)), *cells))
    every = [run for runs in variants.values() for run in runs]
    made_by = dict.fromkeys(
        f"{of['device']}, {_threads(of['threads'])}, torch {of['torch']}"
        for of in (run["environment"] for run in every)
    )
    commits = " and ".join(dict.fromkeys(run["commit"] for run in every))
    columns = ("variant", "seeds", *titles, "mean")
    return f"{'; '.join(made_by)}; commit {commits}:\n\n{_markdown(columns, body)}"


def _quality(path: Path) -> str:
    """The recipe `best` beside what reports of the CS 224N project give."""
    if not path.is_file():
        return "not measured"
    result = json.loads(path.read_text(encoding="utf-8"))
    runs, tasks = result["variants"]["best"], result["config"]["tasks"]
    keys = [f"{name}_{METRICS_OF[task['kind']][0]}" for name, task in tasks.items()]
    pairs = result["rows"]["quora-train"]
    seeds = f"mean of {len(runs)} seeds" if len(runs) > 1 else "one seed"
    what = {
        "dev": f"`best`, MiniLM of 22.7 M parameters, {pairs:,} Quora pairs: dev, {seeds}",
        "test": "the same runs on test",
    }
    body = [
        (title, *(_spread([run[split][key] for run in runs]) for key in keys))
        for split, title in what.items()
        if all(run.get(split) for run in runs)
    ]
    body += [
        (
            f"reports of the CS 224N project, BERT-base of 110 M, {PAPER_ROWS['quora-train']:,} pairs",
            *(f"{REPORTS[name]:.3f}" for name in tasks),
        ),
    ]
    return _markdown(("", *(task["title"] or name for name, task in tasks.items())), body)


def _spread(values: list[float], form: str = ".3f") -> str:
    """Mean and sample standard deviation, which has no sign."""
    mean = f"{statistics.fmean(values):{form}}"
    return f"{mean} ± {statistics.stdev(values):{form.lstrip('+')}}" if len(values) > 1 else mean


def _scores(run: dict[str, Any]) -> dict[str, float]:
    """The dev metric that counts of each task, by what the task is called."""
    tasks = run["config"].get("tasks")
    if tasks is None:  # recorded before tasks were declared
        keys = {"SST": "sst_accuracy", "Quora": "quora_accuracy", "STS": "sts_pearson"}
    else:
        keys = {
            task.get("title") or name: f"{name}_{task.get('metric') or METRICS_OF[task['kind']][0]}"
            for name, task in tasks.items()
        }
    return {title: run["dev"][key] for title, key in keys.items()}


def _threads(number: int | str) -> str:
    return f"{number} thread{'s' * (int(number) != 1)}"


def _time(microseconds: float) -> str:
    if microseconds >= 1e6:
        return f"{microseconds / 1e6:.2f} s"
    return f"{microseconds / 1e3:.2f} ms" if microseconds >= 1e3 else f"{microseconds:.1f} us"


def _markdown(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [list(columns), *map(list, rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
