"""Runs of tasks that nothing in the package knows, each declared in one file: on one rank and on two."""

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from processes import Ranks, command

from mtfast import cli
from mtfast.data.demo import write_demo_corpus
from mtfast.models.checkpoint import load_tasks

SETTINGS = """\
recipe: demo
run_dir: {run_dir}
seed: 3
log_every: 1
model: {{checkpoint: {corpus}/bert, dropout_p: 0.0, mlp: {{width: 32}}}}
data: {{tasks: {corpus}, reviews: {corpus}/imdb, max_length: 48, review_max_length: 64}}
pretrain: {{max_steps: 2}}
heads: {{epochs: 2, batch_size: 512}}
finetune: {{epochs: 1, batch_size: 96, max_steps: 12, patience: 1}}
tasks:
"""
SST, QUORA = "  sst: {max_rows: 300}\n", "  quora: {max_rows: 300, head: para}\n"
STS = "  sts: {max_rows: 200, head: sim, weight: 0.5, metric: spearman}\n"
IMDB = """\
  imdb: {kind: binary, text: text, label: label, source: %s, splits: {dev: test}, max_rows: 100,
         head: lstm}
"""
NLI = """\
  nli: {kind: classification, classes: [entailment, neutral, contradiction], text: [premise, hypothesis],
        label: gold, source: "%s/nli-{split}.jsonl", head: sim, title: Inference}
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """The demo's corpus; `nli-*.jsonl`, made up, three classes of pairs; `imdb2`, reviews in two splits."""
    directory = tmp_path_factory.mktemp("corpus")
    write_demo_corpus(directory)
    moods = {"good": ("fine", "dull"), "bad": ("poor", "great")}
    rows = []
    for i in range(240):
        mood = ("good", "bad")[i % 2]
        gold = ("entailment", "contradiction", "neutral")[i % 3]
        said = {"entailment": moods[mood][0], "contradiction": moods[mood][1], "neutral": "long"}[gold]
        rows.append(
            {"premise": f"the film number {i} is {mood} .", "hypothesis": f"it is {said} .", "gold": gold}
        )
    for split, part in (("train", rows[:180]), ("dev", rows[180:])):
        lines = "".join(json.dumps(row) + "\n" for row in part)
        (directory / f"nli-{split}.jsonl").write_text(lines, encoding="utf-8")
    reviews = pyarrow.parquet.read_table(directory / "imdb" / "train.parquet")
    reviews = pyarrow.table({"text": reviews["text"], "label": [i % 2 for i in range(reviews.num_rows)]})
    (directory / "imdb2").mkdir()
    for split, part in (("train", reviews[:220]), ("test", reviews[220:])):
        pyarrow.parquet.write_table(part, directory / "imdb2" / f"{split}.parquet")
    return directory


def declared(corpus: Path, run_dir: Path, tasks: str) -> Path:
    path = run_dir.with_suffix(".yaml")
    path.write_text(SETTINGS.format(corpus=corpus, run_dir=run_dir) + tasks, encoding="utf-8")
    return path


def records(run_dir: Path, kind: str) -> list[dict]:
    found = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [record for record in found if record["kind"] == kind]


def five(corpus: Path) -> str:
    return SST + QUORA + STS + IMDB % (corpus / "imdb2") + NLI % corpus


@pytest.fixture(scope="module")
def one_rank(corpus, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("one") / "run"
    cli.main(["run", str(declared(corpus, run_dir, five(corpus)))])
    return run_dir


def test_five_tasks_go_through_all_stages(one_rank, corpus):
    names = ["sst", "quora", "sts", "imdb", "nli"]
    steps = records(one_rank, "step")
    assert [step["stage"] for step in steps].count("pretrain") == 2
    for stage in ("heads", "finetune"):
        losses = [step["losses"] for step in steps if step["stage"] == stage]
        assert losses and all(list(loss) == names for loss in losses)
        for loss, step in zip(losses, (s for s in steps if s["stage"] == stage), strict=True):
            weights = {"sts": 0.5}
            assert step["loss"] == pytest.approx(sum(v * weights.get(k, 1) for k, v in loss.items()))
    counting = ["sst_accuracy", "quora_accuracy", "sts_spearman", "imdb_accuracy", "nli_accuracy"]
    for evaluation in records(one_rank, "eval"):
        metrics = evaluation["metrics"]
        assert metrics["mean"] == pytest.approx(sum(metrics[key] for key in counting) / 5)
        assert {"quora_f1", "imdb_f1", "sts_pearson", "cs224n_overall"} < set(metrics)
    kept = {path.name for path in (one_rank / "finetune").iterdir() if path.is_dir()}
    assert kept == {"state", "last", "best-mean", *(f"best-{name}" for name in names)}
    tasks, mlp = load_tasks(one_rank / "finetune" / "best-mean")
    assert list(tasks) == names and mlp.width == 32
    assert tasks["nli"].classes == ("entailment", "neutral", "contradiction")


def test_what_is_predicted_is_in_the_order_of_the_rows_and_in_the_datas_words(one_rank, corpus):
    lines = (one_rank / "predictions" / "nli-dev.tsv").read_text().splitlines()
    assert lines[0] == "id\tprediction" and len(lines) == 61
    assert [line.split("\t")[0] for line in lines[1:]] == [str(i) for i in range(60)]
    found = [line.split("\t")[1] for line in lines[1:]]
    assert set(found) <= {"entailment", "neutral", "contradiction"}
    gold = [json.loads(line)["gold"] for line in (corpus / "nli-dev.jsonl").read_text().splitlines()]
    accuracy = sum(a == b for a, b in zip(found, gold, strict=True)) / 60
    dev = json.loads((one_rank / "summary.json").read_text())["dev"]
    assert accuracy == pytest.approx(dev["nli_accuracy"])
    names = {path.name for path in (one_rank / "predictions").iterdir()}
    assert {"sst-dev-output.csv", "para-dev-output.csv", "sts-dev-output.csv", "imdb-dev.tsv"} < names
    assert "imdb-test.tsv" not in names  # its dev split


def test_rows_are_limited_and_that_is_said(one_rank):
    data = json.loads((one_rank / "summary.json").read_text())["data"]
    assert data["imdb-train"]["used"] == 100
    assert data["imdb-train"]["notes"] == ["100 of 220 rows, evenly spaced (max_rows)"]
    assert data["imdb-dev"]["used"] == 80 and "notes" not in data["imdb-dev"]
    assert data["sst-test"]["used"] == 300 and data["sts-test"]["used"] == 200


def test_the_report_has_every_task(one_rank):
    report = (one_rank / "report.md").read_text()
    for title in ("SST accuracy", "Quora F1", "STS Spearman", "imdb accuracy", "Inference accuracy"):
        assert title in report
    assert "Beside the paper" not in report
    assert "| nli-train | 180 | 180 | 0 | 0 |" in report


def test_two_ranks_under_zero_2_follow_one(one_rank, corpus, tmp_path):
    run_dir = tmp_path / "run"
    path = declared(corpus, run_dir, five(corpus))
    arguments = ("run", str(path), "--engine.zero-stage", "2")
    Ranks(command, *arguments, output=tmp_path, world_size=2).succeed()
    ours, theirs = records(run_dir, "step"), records(one_rank, "step")
    assert len(ours) == len(theirs) > 12
    for mine, wanted in zip(ours, theirs, strict=True):
        assert mine["losses"] == pytest.approx(wanted["losses"], rel=1e-3), mine["step"]


@pytest.mark.parametrize(
    ("task", "metric"),
    [
        ("  sst: {head: lstm}\n", "sst_accuracy"),
        ("  sts:\n", "sts_pearson"),
        ("  nli: {kind: classification, classes: 3, text: [premise, hypothesis], label: gold,\n"
         "        source: '%s', pair_input: joint}\n", "nli_accuracy"),
    ],
)  # fmt: skip
def test_one_task_alone(corpus, tmp_path, task, metric):
    if "%s" in task:  # the classes by number
        for split in ("train", "dev"):
            rows = [json.loads(line) for line in (corpus / f"nli-{split}.jsonl").read_text().splitlines()]
            numbers = {"entailment": 0, "neutral": 1, "contradiction": 2}
            lines = "".join(json.dumps(row | {"gold": numbers[row["gold"]]}) + "\n" for row in rows)
            (tmp_path / f"numbered-{split}.jsonl").write_text(lines, encoding="utf-8")
        task %= f"{tmp_path}/numbered-{{split}}.jsonl"
    run_dir = tmp_path / "run"
    cli.main(["run", str(declared(corpus, run_dir, task)), "--pretrain.max-steps", "1"])
    assert (
        len({tuple(step["losses"]) for step in records(run_dir, "step")}) == 2
    )  # of pre-training, and the task's
    dev = json.loads((run_dir / "summary.json").read_text())["dev"]
    assert dev["mean"] == dev[metric] and "cs224n_overall" not in dev
    assert (run_dir / "report.html").is_file()
