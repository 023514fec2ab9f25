"""Run directories as runs leave them, written by hand, and what a report says of them."""

import json

import numpy as np
from safetensors.numpy import save_file

from mtfast.config import RunConfig, to_dict
from mtfast.files import to_yaml
from mtfast.kinds import task_metrics
from mtfast.recipes import PAPER_TASKS
from mtfast.report import write_report
from mtfast.run_record import outcomes_file
from mtfast.tasks import Task

N = 300  # examples
PAIR = ("first", "second")
FOUR_TASKS = {
    "news": Task(kind="classification", text="text", label="topic", classes=4, title="News *topics*"),
    "imdb": Task(kind="binary", text="text", label="label", metric="f1"),
    "nli": Task(kind="classification", text=PAIR, label="label", classes=("yes", "no", "maybe"), head="pair"),
    "stars": Task(kind="regression", text="text", label="stars", low=1, high=5, metric="spearman"),
}


def step(stage, number, **losses):
    return {
        "kind": "step",
        "stage": stage,
        "step": number,
        "epoch": 0,
        "loss": sum(losses.values()),
        "losses": losses,
    }


def evaluation(stage, number, epoch, sst, quora, sts):
    metrics = {
        "sst_accuracy": sst,
        "quora_accuracy": quora,
        "sts_pearson": sts,
        "mean": (sst + quora + sts) / 3,
    }
    metrics["cs224n_overall"] = (sst + quora + (sts + 1) / 2) / 3
    return {"kind": "eval", "stage": stage, "step": number, "epoch": epoch, "metrics": metrics}


def write_run(directory, records, summary=None, config=None):
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    if summary is not None:
        (directory / "summary.json").write_text(json.dumps(summary))
    if config is not None:
        (directory / "config.yaml").write_text(config)
    return directory


def declaring(tasks):
    """The config.yaml of a run of these tasks."""
    return to_yaml(to_dict(RunConfig(tasks=tasks)))


def write_four_task_run(directory, config=None):
    metrics = {
        "news_accuracy": 0.9,
        "imdb_accuracy": 0.8,
        "imdb_f1": 0.7,
        "nli_accuracy": 0.6,
        "stars_pearson": 0.5,
        "stars_spearman": 0.4,
        "mean": 0.65,
    }
    steps = [step("finetune", i, news=1.4, imdb=0.7, nli=1.1, stars=2.0) for i in range(30)]
    evaluated = {"kind": "eval", "stage": "finetune", "step": 29, "epoch": 1, "metrics": metrics}
    return write_run(directory, [*steps, evaluated], {"dev": metrics}, config or declaring(FOUR_TASKS))


def markdown_of(run):
    return (write_report(run).parent / "report.md").read_text()


def table_row(markdown, label):
    (line,) = [line for line in markdown.splitlines() if line.startswith(f"| {label} |")]
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def add_to_summary(run, **entries):
    path = run / "summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def labels_of(random):
    return {
        "sst": random.integers(5, size=N),
        "quora": random.integers(2, size=N).astype(np.float32),
        "sts": random.uniform(0, 5, N).astype(np.float32),
    }


def predicted(labels, random, quality):
    """Predictions of which a share `quality` is right, and scores that correlate with the labels by it."""
    right = random.random(N) < quality
    return {
        "sst": np.where(right, labels["sst"], random.integers(5, size=N)),
        "quora": np.where(right, labels["quora"], random.integers(2, size=N)).astype(np.int64),
        "sts": (quality * labels["sts"] + random.normal(0, 1, N)).astype(np.float32),
    }


def write_outcomes(run, split, predictions, labels):
    path = outcomes_file(run, split)
    path.parent.mkdir(exist_ok=True)
    arrays = {f"{name}.predictions": values for name, values in predictions.items()}
    save_file(arrays | {f"{name}.labels": values for name, values in labels.items()}, path)


def write_results(directory, config, predictions, labels, **summary):
    """A run of the paper's tasks whose results on dev are of its epoch 1 of 2."""
    metrics = task_metrics(PAPER_TASKS, predictions, labels)
    best = {"kind": "eval", "stage": "finetune", "step": 1, "epoch": 1, "metrics": metrics}
    last = evaluation("finetune", 2, 2, metrics["sst_accuracy"] - 0.01, 0.5, 0.1)
    run = write_run(directory, [best, last], {"dev": metrics, **summary}, to_yaml(to_dict(config)))
    write_outcomes(run, "dev", predictions, labels)
    return run
