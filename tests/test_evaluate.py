"""Test metrics of a run by hand, and predictions of a file against those in Python, bit for bit."""

import csv
import io
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import scipy.stats
import torch
from small_run import TASKS, configure, finetuned_run, some_texts

from mtfast.commands import open_directory
from mtfast.config import ConfigError, DataConfig
from mtfast.data.rows import DataError
from mtfast.evaluate import Evaluation, predict_file
from mtfast.predict import Model, load
from mtfast.training.inputs import Inputs
from mtfast.training.run.weights import best_weights

ROWS = 12


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return finetuned_run(tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture(scope="module")
def model(run) -> Model:
    return load(run)


def labels_of(task: str) -> list:
    declared = TASKS[task]
    if declared.kind == "regression":
        return [i % 11 / 2 for i in range(ROWS)]
    names = declared.classes if isinstance(declared.classes, tuple) else range(max(declared.outputs, 2))
    return [list(names)[i % len(names)] for i in range(ROWS)]


def texts_of(task: str) -> dict[str, list[str]]:
    return {column: some_texts(ROWS, seed) for seed, column in enumerate(TASKS[task].texts)}


def given(task: str) -> list:
    """What `predict` takes, of these texts."""
    columns = list(texts_of(task).values())
    return columns[0] if len(columns) == 1 else list(zip(*columns, strict=True))


def write(path: Path, columns: dict[str, list]) -> Path:
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table(columns), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    else:
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, delimiter="," if path.suffix == ".csv" else "\t")
            writer.writerows([list(columns), *(row.values() for row in rows)])
    return path


def evaluation(run: Path, data: Path, **changes) -> Evaluation:
    """Of a run on files `<task>-<split>.jsonl`, some of whose tasks are changed."""
    tasks = {
        name: replace(task, source=str(data / f"{name}-{{split}}.jsonl"), **changes.get(name, {}))
        for name, task in TASKS.items()
    }
    config = configure(run, tasks=tasks, data=DataConfig(max_length=24, cache_dir=str(data / "cache")))
    directory = open_directory(config, create=False)
    weights = best_weights(config.model, directory, config.seed)
    inputs = Inputs(tasks, config.data, weights.tokenizer, directory)
    return Evaluation(inputs, weights, config.engine, torch.device("cpu"))


@pytest.fixture
def data(tmp_path) -> Path:
    for task in TASKS:
        for split in ("train", "dev", "test"):
            rows = texts_of(task) | {"label": labels_of(task)}
            write(
                tmp_path / f"{task}-{split}.jsonl",
                {name: x[:-1] if split == "train" else x for name, x in rows.items()},
            )
    return tmp_path


def by_hand(model: Model, task: str) -> dict[str, float]:
    found, labels = model.predict(task, given(task)), np.array(labels_of(task))
    if found.scores is not None:
        return {
            f"{task}_pearson": scipy.stats.pearsonr(found.scores, labels).statistic,
            f"{task}_spearman": scipy.stats.spearmanr(found.scores, labels).statistic,
        }
    right = found.labels == labels
    if TASKS[task].kind != "binary":
        return {f"{task}_accuracy": right.mean()}
    f1 = 2 * np.sum(right & (labels == 1)) / (np.sum(found.labels == 1) + np.sum(labels == 1))
    return {f"{task}_accuracy": right.mean(), f"{task}_f1": f1}


@pytest.mark.parametrize("split", ["dev", "test"])
def test_metrics_of_a_split_are_those_of_its_predictions(tmp_path, data, model, capsys, split):
    run = finetuned_run(tmp_path / "run")
    found = evaluation(run, data).evaluate(split)
    wanted = {name: value for task in TASKS for name, value in by_hand(model, task).items()}
    counting = [wanted.get(f"{task}_accuracy", wanted.get(f"{task}_pearson")) for task in TASKS]
    assert found == pytest.approx(wanted | {"mean": sum(counting) / len(counting)})
    assert json.loads((run / "summary.json").read_text())[split] == found
    said = capsys.readouterr().out
    assert all(f"{split} {name} {value:.4f}\n" in said for name, value in found.items())


def test_tasks_without_test_labels_are_named_and_nothing_is_computed_over_the_rest(
    tmp_path, data, model, capsys
):
    run = finetuned_run(tmp_path / "run")
    write(data / "stars-test.jsonl", texts_of("stars"))
    write(data / "mood-test.jsonl", texts_of("mood") | {"label": [-1] * ROWS})
    (data / "tone-test.jsonl").unlink()
    found = evaluation(run, data, near={"splits": {"dev": "test"}}).evaluate("test")
    assert found == pytest.approx(by_hand(model, "same") | by_hand(model, "nli"))
    assert json.loads((run / "summary.json").read_text())["test"] == found
    said = capsys.readouterr().out
    assert "stars test: no labels\n" in said and "mood test: no labels\n" in said
    assert "tone test: left out (" in said and "no such file" in said
    assert "near test: left out (it is the dev split)\n" in said and "test mean" not in said


def test_test_data_without_any_label_is_an_error(tmp_path, data):
    run = finetuned_run(tmp_path / "run")
    for task in TASKS:
        write(data / f"{task}-test.jsonl", texts_of(task))
    with pytest.raises(DataError, match=r"no test data with labels: stars, mood, .* can be evaluated on dev"):
        evaluation(run, data).evaluate("test")


def test_prediction_files_have_the_rows_of_both_splits(tmp_path, data, model):
    run = finetuned_run(tmp_path / "run")
    written = evaluation(run, data, near={"splits": {"dev": "test"}}).write_predictions()
    assert [path.name for path in written] == [
        f"{task}-{split}.tsv"
        for split in ("dev", "test")
        for task in TASKS
        if (task, split) != ("near", "test")
    ]
    header, *lines = (run / "predictions" / "mood-test.tsv").read_text().splitlines()
    assert header == "id\tprediction"
    assert lines == [f"{i}\t{label}" for i, label in enumerate(model.predict("mood", given("mood")).labels)]


def read_back(text: str, delimiter: str) -> dict[str, list[str]]:
    header, *rows = csv.reader(io.StringIO(text), delimiter=delimiter)
    return {name: [row[i] for row in rows] for i, name in enumerate(header)}


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet", ".txt", "-"])
@pytest.mark.parametrize("task", TASKS)
def test_a_file_gets_what_python_gets_bit_for_bit(model, task, suffix, tmp_path, capsys, monkeypatch):
    columns, found = texts_of(task), model.predict(task, given(task))
    source, ids = tmp_path / f"in{suffix}", [f"row, {i}" for i in range(ROWS)]
    if suffix in (".txt", "-"):
        ids = [str(i) for i in range(ROWS)]
        text = "".join("\t".join(row) + "\r\n" for row in zip(*columns.values(), strict=True))
        source.write_bytes(text.encode())
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    else:
        if "text" in columns and task == "stars":
            columns["review"] = columns.pop("text")  # an alias
        write(source, {"idx": ids, "label": ["not one that there is"] * ROWS} | columns)
    output = "-" if suffix == "-" else str(tmp_path / ("out.csv" if suffix == ".csv" else "out.tsv"))
    predict_file(model, task, "-" if suffix == "-" else str(source), output, strict=True)
    said = capsys.readouterr()
    assert said.err == ""
    text = said.out if output == "-" else Path(output).read_text(encoding="utf-8")
    assert output == "-" or said.out == f"wrote {output}\n"
    rows = read_back(text, "," if output.endswith(".csv") else "\t")
    assert rows.pop("id") == ids

    def floats(name: str) -> np.ndarray:
        return np.array([np.float32(float(value)) for value in rows.pop(name)])

    if found.scores is not None:
        np.testing.assert_array_equal(floats("score"), found.scores)
    else:
        assert rows.pop("label") == [str(label) for label in found.labels]
        classes = TASKS[task].classes
        names = classes if isinstance(classes, tuple) else range(TASKS[task].outputs)
        if TASKS[task].kind == "binary":
            np.testing.assert_array_equal(floats("probability"), found.probabilities)
        else:
            of_classes = np.stack([floats(f"probability_{name}") for name in names], axis=1)
            np.testing.assert_array_equal(of_classes, found.probabilities)
    assert rows == {}


def test_rows_that_cannot_be_used_are_named_and_the_others_predicted(model, tmp_path, capsys):
    source = tmp_path / "in.txt"
    source.write_text("good\tbad\n\nbad\na\tb\tc\n \tgood\nfilm\tplay\n", encoding="utf-8")
    predict_file(model, "same", str(source), "-", strict=False)
    said = capsys.readouterr()
    assert said.err.splitlines() == [
        f"{source}: 6 rows read, 2 used, 4 skipped",
        f"  {source}:2: empty line",
        f"  {source}:3: 0 tabs; two texts with one tab between them are expected",
        f"  {source}:4: 2 tabs; two texts with one tab between them are expected",
        f"  {source}:5: empty first",
    ]
    rows = read_back(said.out, "\t")
    assert rows["id"] == ["0", "5"]
    wanted = model.predict("same", [("good", "bad"), ("film", "play")]).probabilities
    np.testing.assert_array_equal(np.array(rows["probability"], np.float32), wanted)
    with pytest.raises(DataError, match=r"in.txt:2: empty line \(strict"):
        predict_file(model, "same", str(source), "-", strict=True)


def test_a_task_need_not_be_named_where_there_is_one(model, tmp_path, capsys):
    source = tmp_path / "in.txt"
    source.write_text("good\n", encoding="utf-8")
    with pytest.raises(
        ConfigError, match="name the task to predict, one of stars, mood, tone, same, near, nli"
    ):
        predict_file(model, None, str(source), "-", strict=False)
    one = Model.__new__(Model)
    one.__dict__ = model.__dict__ | {"tasks": {"mood": TASKS["mood"]}}
    predict_file(one, None, str(source), "-", strict=False)
    assert read_back(capsys.readouterr().out, "\t")["label"] == [model.predict("mood", "good").labels[0]]


@pytest.mark.parametrize(
    ("task", "name", "text", "message"),
    [
        ("stars", "in.csv", "words\ngood\n", r"no column 'text' \(or review\); columns found: 'words'"),
        ("stars", "in.csv", "text\n", "in.csv: no rows"),
        ("stars", "in.txt", "", "in.txt: no rows"),
        ("stars", "in.txt", "\n \n", "in.txt: no usable row for stars; 2 rows read, 0 used, 2 skipped"),
        ("stars", "in.doc", "good", r"in.doc: unknown kind of file; known are .*, \.txt, and - for text on"),
        ("stars", None, "", "none.txt: no such file"),
        ("sst", "in.txt", "good", "run has no task 'sst'; its tasks are stars, mood"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_file_is_told(model, tmp_path, task, name, text, message):
    if name:
        (tmp_path / name).write_text(text, encoding="utf-8")
    output = tmp_path / "out.csv"
    with pytest.raises((DataError, ConfigError), match=message):
        predict_file(model, task, str(tmp_path / (name or "none.txt")), str(output), strict=False)
    assert not output.exists()


def test_bytes_that_are_no_text_are_told_with_their_line(model, tmp_path):
    (tmp_path / "in.txt").write_bytes(b"good\nb\xffd\n")
    with pytest.raises(DataError, match=r"in.txt:2: not UTF-8: byte 0xff at byte offset 6"):
        predict_file(model, "stars", str(tmp_path / "in.txt"), "-", strict=False)


def test_the_output_is_neither_a_directory_nor_the_input(model, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    source = tmp_path / "in.txt"
    source.write_text("good\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="is a directory; name a file in it"):
        predict_file(model, "stars", str(source), str(tmp_path), strict=False)
    for path in (str(source), "~/in.txt"):
        with pytest.raises(ConfigError, match="is the input; name another file"):
            predict_file(model, "stars", path, path, strict=False)
    assert source.read_text(encoding="utf-8") == "good\n"
