"""Declared tasks: columns, classes, splits, limits, and labels that do not fit the declaration."""

import json
import pickle
import random
from dataclasses import replace

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from small_tokenizer import small_tokenizer

from mtfast.config import ConfigError, DataConfig
from mtfast.config_file import read_config_file
from mtfast.data.cs224n import overall_score, prediction_file
from mtfast.data.packing import pack_tasks
from mtfast.data.rows import DataError, MissingDataError
from mtfast.data.tables import read_task, task_files
from mtfast.data.tokens import tokenize_task
from mtfast.recipes import RECIPES
from mtfast.tasks import Task
from mtfast.training.inputs import load_task

IMDB = Task(kind="binary", text="text", label="label", splits={"dev": "test"})
NAMES = ("entailment", "neutral", "contradiction")
NLI = Task(kind="classification", classes=NAMES, text=("premise", "hypothesis"), label="label", head="pair")
TOPIC = Task(kind="classification", classes=3, text="text", label="label")
RATING = Task(kind="regression", low=0, high=5, text="text", label="score")


def write_parquet(path, rows, **columns):
    """``rows`` rows `text i`, the first half labelled 0 and the others 1."""
    labels = [int(row >= rows // 2) for row in range(rows)]
    data = {"text": [f"text {row}" for row in range(rows)], "label": labels} | columns
    pyarrow.parquet.write_table(pyarrow.table(data), path)


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def labelled(*labels, column="label"):
    return [{"text": f"text {row}", column: label} for row, label in enumerate(labels)]


def reasons(table):
    return [(row.line, row.reason) for row in table.account.skipped]


@pytest.fixture
def imdb(tmp_path):
    write_parquet(tmp_path / "train-00000-of-00001.parquet", 20)
    write_parquet(tmp_path / "test-00000-of-00001.parquet", 12)
    return tmp_path


def test_a_binary_task_of_parquet_files_whose_dev_split_is_called_test(imdb):
    train, dev, test = (read_task("imdb", IMDB, imdb, split) for split in ("train", "dev", "test"))
    assert (len(train), len(dev), len(test)) == (20, 12, 12)
    assert train.texts == [[f"text {row}" for row in range(20)]]
    assert train.ids == [str(row) for row in range(20)]
    assert train.labels.tolist() == [0.0] * 10 + [1.0] * 10 and train.labels.dtype == np.float32
    assert (dev.split, test.split) == ("dev", "test")
    assert dev.texts == test.texts and dev.labels.tolist() == test.labels.tolist()
    assert task_files("imdb", IMDB, imdb, "dev") == [imdb / "test-00000-of-00001.parquet"]
    with pytest.raises(MissingDataError, match="no file for the dev split; wanted dev"):
        read_task("imdb", Task(kind="binary", text="text", label="label"), imdb, "dev")


def test_max_rows_takes_evenly_spaced_rows_of_train_and_dev_and_says_so(imdb):
    task = replace(IMDB, max_rows=8)
    train, dev, test = (read_task("imdb", task, imdb, split) for split in ("train", "dev", "test"))
    expected = [0, 2, 5, 7, 10, 12, 15, 17]
    assert train.texts == [[f"text {row}" for row in expected]]
    assert train.ids == [str(row) for row in expected]  # their numbers in the file
    assert train.labels.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert (train.account.read, train.account.used) == (8, 8)
    assert train.account.notes == ("8 of 20 rows, evenly spaced (max_rows)",)
    assert "\n  8 of 20 rows, evenly spaced (max_rows)" in train.account.summary()
    assert dev.ids == ["0", "1", "3", "4", "6", "7", "9", "10"]
    assert dev.account.notes == ("8 of 12 rows, evenly spaced (max_rows)",)
    assert len(test) == 12 and test.account.notes == ()
    for enough in (20, 21):
        whole = read_task("imdb", replace(IMDB, max_rows=enough), imdb)
        assert len(whole) == 20 and whole.account.notes == ()
    assert read_task("imdb", replace(IMDB, max_rows=1), imdb).ids == ["0"]


def test_max_rows_counts_rows_that_cannot_be_used_and_keeps_ids(tmp_path):
    rows = [{"text": "" if row == 4 else f"text {row}", "label": 0, "id": f"x{row}"} for row in range(8)]
    table = read_task("topic", replace(TOPIC, max_rows=4), write_lines(tmp_path / "train.jsonl", rows))
    assert table.ids == ["x0", "x2", "x6"]
    assert (table.account.read, table.account.used, reasons(table)) == (4, 3, [(5, "empty text")])


def test_labels_of_named_classes_are_names_or_numbers(tmp_path):
    usable = ["entailment", " contradiction ", 1, 0.0, "2", "2.0"]
    unusable = ["Neutral", 3, -1, 1.5, "", None, ["neutral"]]
    rows = [{"premise": "a", "hypothesis": "b", "label": label} for label in (*usable, *unusable)]
    table = read_task("nli", NLI, write_lines(tmp_path / "train.jsonl", rows))
    assert table.labels.tolist() == [0, 2, 1, 0, 2, 2] and table.labels.dtype == np.int64
    wanted = "not one of entailment, neutral, contradiction"
    beyond = "out of range: nli takes whole numbers from 0 to 2"
    assert reasons(table) == [
        (7, f"label is 'Neutral', {wanted}"),
        (8, f"label is 3, {beyond}"),
        (9, f"label is -1, {beyond}"),
        (10, f"label is 1.5, {beyond}"),
        (11, "empty label in label"),
        (12, "empty label in label"),
        (13, f"label is ['neutral'], {wanted}"),
    ]


def test_classes_called_by_numbers_are_not_indices(tmp_path):
    task = Task(kind="classification", classes=("1", "2", "3"), text="text", label="label")
    path = write_lines(tmp_path / "train.jsonl", labelled(1, "2", 3.0, "3.0", 0, "0", 2.5))
    table = read_task("stars", task, path)
    assert table.labels.tolist() == [0, 1, 2, 2]
    assert [reason for _, reason in reasons(table)] == [
        f"label is {label}, not one of 1, 2, 3" for label in ("0", "'0'", "2.5")
    ]
    write_lines(path, labelled(*[1, 2, 3] * 20, *[4] * 20))
    with pytest.raises(DataError, match="20 of 80 rows have a label of 4; classes is 1, 2, 3, so"):
        read_task("stars", task, path)


def test_aliases_are_other_names_of_columns(tmp_path):
    task = Task(
        kind="binary",
        text=("First", "second"),
        label="label",
        aliases={"First": ("Question 1", "s1"), "second": ("s2",), "label": ("gold",)},
        head="pair",
    )
    path = write_lines(tmp_path / "train.jsonl", [{"s1": "a", " S2 ": "b", "GOLD": 1}])
    table = read_task("pairs", task, path)
    assert (table.texts, table.labels.tolist()) == ([["a"], ["b"]], [1.0])
    both = {"s1": "a", "question 1": "c", "s2": "b", "gold": 1, "label": 0}
    table = read_task("pairs", task, write_lines(path, [both]))
    assert (table.texts, table.labels.tolist()) == ([["c"], ["b"]], [0.0])  # the first name found counts
    table = read_task("pairs", task, write_lines(path, [both | {"first": "d"}]))
    assert table.texts == [["d"], ["b"]]
    table = read_task("pairs", task, write_lines(path, [both | {"First": "e", "first": "d"}]))
    assert table.texts == [["e"], ["b"]]  # exactly the name, then one that differs in case
    with pytest.raises(DataError) as error:
        read_task("pairs", task, write_lines(path, [{"s2": "b", "gold": 1}]))
    assert str(error.value) == f"{path}: no column 'First' (or Question 1, s1); columns found: 's2', 'gold'"
    assert error.value.field == "tasks.pairs.text"


def test_a_split_with_a_name_of_its_own(tmp_path):
    task = Task(kind="binary", text="text", label="label", splits={"dev": "validation_matched"})
    write_lines(tmp_path / "train.jsonl", labelled(0))
    write_lines(tmp_path / "validation.jsonl", labelled(1))
    write_lines(tmp_path / "validation_matched.jsonl", labelled(0, 1))
    for source in (tmp_path, f"{tmp_path}/{{split}}.jsonl"):
        assert read_task("mnli", task, source, "dev").labels.tolist() == [0, 1]
        assert read_task("mnli", task, source, "train").labels.tolist() == [0]
        assert task_files("mnli", task, source, "dev") == [tmp_path / "validation_matched.jsonl"]
    parts = {
        name: datasets.Dataset.from_dict({"text": ["a"], "label": [label]})
        for label, name in enumerate(("validation", "validation_matched"))
    }
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "saved"))
    assert read_task("mnli", task, tmp_path / "saved", "dev").labels.tolist() == [1]
    task = Task(kind="binary", text="text", label="label", splits={"dev": "elsewhere"})
    with pytest.raises(MissingDataError, match="no elsewhere split; wanted elsewhere, found validation"):
        read_task("mnli", task, tmp_path / "saved", "dev")
    with pytest.raises(MissingDataError, match="no file for the elsewhere split; wanted elsewhere"):
        read_task("mnli", task, tmp_path, "dev")


BEYOND = {
    "number": (TOPIC, 3, "classes is 3", "classes"),
    "name": (replace(TOPIC, classes=("a", "b")), "other", "classes is a, b", "classes"),
    "binary": (Task(kind="binary", text="text", label="label"), 2, "a binary task takes 0 and 1", "kind"),
    "above": (RATING, 5.5, "low is 0 and high is 5", "high"),
    "below": (RATING, -0.5, "low is 0 and high is 5", "low"),
}


@pytest.mark.parametrize("what", BEYOND)
def test_labels_beyond_the_declaration_are_refused_if_many_and_skipped_if_few(tmp_path, what):
    task, label, declared, field = BEYOND[what]
    path = tmp_path / "train.jsonl"

    def read(beyond, rows):
        labels = [*[1] * (rows - beyond), *[label] * beyond]
        return read_task("topic", task, write_lines(path, labelled(*labels, column=task.label)))

    for beyond, rows in ((20, 100), (20, 2000), (30, 3000)):
        with pytest.raises(DataError) as error:
            read(beyond, rows)
        assert error.value.field == f"tasks.topic.{field}"
        assert str(error.value) == (
            f"{path}: {beyond} of {rows:,} rows have a {task.label} of {label!r}; {declared}, so "
            f"tasks.topic.{field} should be another, or tasks.topic.label another column"
        )
    for beyond, rows in ((19, 100), (20, 2001), (29, 3000)):
        table = read(beyond, rows)
        assert len(table) == rows - beyond and len(reasons(table)) == beyond
        assert set(table.labels.tolist()) == {1}


def test_the_commonest_labels_beyond_the_declaration_are_named(tmp_path):
    labels = [*[1] * 9, *[7] * 3, *[3] * 9, *[4] * 8, *[5] * 2, *[6]]
    with pytest.raises(DataError, match="23 of 32 rows have a label of 3, 4, 7, 5; classes is 3, so"):
        read_task("topic", TOPIC, write_lines(tmp_path / "train.jsonl", labelled(*labels)))


def test_labels_that_are_missing_or_withheld_are_skipped_however_many(tmp_path):
    rows = labelled(*[0, 1, 2] * 10, *[-1] * 30, *[None] * 30, *["?"] * 30)
    table = read_task("topic", TOPIC, write_lines(tmp_path / "train.jsonl", rows))
    assert len(table) == 30 and len(reasons(table)) == 90


def test_a_missing_label_column_is_refused_but_in_a_test_split(tmp_path):
    path = write_lines(tmp_path / "all.jsonl", [{"text": "a", "stars": 1}])
    with pytest.raises(DataError) as error:
        read_task("topic", TOPIC, path)
    assert str(error.value) == f"{path}: no column 'label'; columns found: 'text', 'stars'"
    assert error.value.field == "tasks.topic.label"
    again = pickle.loads(pickle.dumps(error.value))  # as it is sent between ranks
    assert (str(again), again.field) == (str(error.value), "tasks.topic.label")
    assert read_task("topic", TOPIC, path, "test").labels is None
    with pytest.raises(DataError) as error:
        read_task("topic", TOPIC, write_lines(path, []))
    assert error.value.field == "tasks.topic.source"


def test_scores_on_another_scale_are_refused(tmp_path):
    path = tmp_path / "train.jsonl"

    def read(fractions, whole=(0.0, 1.0), **changes):
        scores = [*whole, *((i + 1) / (fractions + 1) for i in range(fractions))]
        rows = labelled(*scores, column="score")
        return read_task("rating", replace(RATING, **changes), write_lines(path, rows))

    with pytest.raises(DataError) as error:
        read(20)
    assert str(error.value) == (
        f"{path}: every score lies between 0 and 1, but rating is on a scale from 0 to 5; "
        "multiply the column by 5, or declare high: 1"
    )
    assert error.value.field == "tasks.rating.high"
    assert len(read(20, high=1)) == 22
    assert len(read(19)) == 21  # so few may be low scores
    assert len(read(20, whole=(0.0, 3.0))) == 22
    assert len(read(20, low=-5)) == 22  # 0 is not the lowest score


def test_three_classes_of_pairs_as_json_lines_by_split(tmp_path):
    draw = random.Random(0)
    words = ["the", "film", "films", "good", "bad", "played", "not", "."]
    written = {}
    for split, count in {"train": 40, "validation": 11, "test": 7}.items():
        written[split] = [
            {
                "premise": " ".join(draw.choices(words, k=draw.randint(1, 9))),
                "hypothesis": " ".join(draw.choices(words, k=draw.randint(1, 9))),
                "label": draw.choice(NAMES),
                "pairID": number,
            }
            for number in range(count)
        ]
        write_lines(tmp_path / f"nli-{split}.jsonl", written[split])
    tokenizer = small_tokenizer()
    declared = replace(NLI, source=f"{tmp_path}/nli-{{split}}.jsonl")
    tasks = {"nli": declared, "joint": replace(declared, pair_input="joint")}
    for split, rows in zip(("train", "dev", "test"), written.values(), strict=True):
        data = DataConfig(max_length=32)
        tables = {name: load_task(name, task, data, tokenizer, split) for name, task in tasks.items()}
        batch = pack_tasks(tables, {name: np.arange(len(rows)) for name in tables})
        assert batch.tasks["nli"].sequences.shape == (len(rows), 2)
        assert batch.tasks["joint"].sequences.shape == (len(rows),)
        ends = batch.cu_seqlens.tolist()
        for number, row in enumerate(rows):
            pair = row["premise"], row["hypothesis"]
            calls = [(text,) for text in pair], [pair]
            for name, texts in zip(tables, calls, strict=True):
                assert tables[name].labels[number] == NAMES.index(row["label"])
                assert tables[name].ids[number] == str(number)
                indices = batch.tasks[name].sequences[number].reshape(-1).tolist()
                for index, call in zip(indices, texts, strict=True):
                    encoding = tokenizer(*call, return_token_type_ids=True)
                    part = slice(ends[index], ends[index + 1])
                    assert batch.input_ids[part].tolist() == encoding["input_ids"]
                    assert batch.token_type_ids[part].tolist() == encoding["token_type_ids"]


def test_the_cache_keeps_tasks_of_the_same_texts_apart(tmp_path):
    rows = [{"premise": "a film", "hypothesis": "good", "label": 1}]
    path = write_lines(tmp_path / "train.jsonl", rows)
    tables = {
        pair_input: tokenize_task(
            read_task("nli", replace(NLI, pair_input=pair_input), path),
            small_tokenizer(),
            max_length=32,
            cache_dir=tmp_path / "cache",
        )
        for pair_input in ("separate", "joint", "separate")
    }
    assert [len(table.sequences) for table in tables.values()] == [2, 1]
    assert len(list((tmp_path / "cache").glob("nli-train-*.arrow"))) == 2


def test_a_pair_input_that_does_not_exist_is_refused_in_a_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("recipe: demo\ntasks:\n  quora:\n    pair_input: both\n")
    message = r"run\.yaml:4: tasks\.quora\.pair_input is 'both'; .*'separate' or 'joint'"
    with pytest.raises(ConfigError, match=message):
        read_config_file(path, RECIPES)


def test_the_courses_prediction_files():
    assert prediction_file("sst", "dev", ["a", "b"], np.array([4, 0])) == (
        "sst-dev-output.csv", "id \t Predicted_Sentiment \na , 4 \nb , 0 \n",
    )  # fmt: skip
    assert prediction_file("quora", "test", ["c", "d"], np.array([1, 0])) == (
        "para-test-output.csv", "id \t Predicted_Is_Paraphrase \nc , 1.0 \nd , 0.0 \n",
    )  # fmt: skip
    assert prediction_file("sts", "dev", ["e", "f"], np.array([2.5, 0.125], np.float32)) == (
        "sts-dev-output.csv", "id \t Predicted_Similiary \ne , 2.5 \nf , 0.125 \n",
    )  # fmt: skip


def test_the_courses_overall_score():
    metrics = {"sst_accuracy": 0.5, "quora_accuracy": 0.75, "sts_pearson": 0.4, "quora_f1": 0.1, "mean": 0.9}
    assert overall_score(metrics) == pytest.approx(0.65, abs=1e-15)  # (0.5 + 0.75 + 0.7) / 3
    assert overall_score(metrics | {"sts_pearson": -1.0}) == pytest.approx(1.25 / 3, abs=1e-15)
    for name in ("sst_accuracy", "quora_accuracy", "sts_pearson"):
        assert overall_score({key: value for key, value in metrics.items() if key != name}) is None


def test_labels_of_minus_one_and_one_are_no_binary_task(tmp_path):
    rows = [{"text": f"film {i}", "label": (-1, 1)[i % 2]} for i in range(60)]
    write_lines(tmp_path / "train.jsonl", rows)
    with pytest.raises(DataError, match=r"every usable row has the label 1; 60 rows read, 30 used") as error:
        read_task("mood", Task("binary", "text", "label"), tmp_path, "train")
    assert error.value.field == "tasks.mood.label"
