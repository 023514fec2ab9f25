"""Reading the tasks: every source kind, every bad row, and the real files against a plain re-read."""

import csv
import json

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from paper_tables import read_paper_task

from mtfast.data.cs224n import COURSE_TASKS
from mtfast.data.records import is_one_file
from mtfast.data.rows import DataError, MissingDataError
from mtfast.recipes import PAPER_TASKS

SST_HEADER = "\tid\tsentence\tsentiment\n"
QUORA_HEADER = "\tid\tsentence1\tsentence2\tis_duplicate\n"


def write_sst(directory, *rows, split="train", header=SST_HEADER):
    path = directory / f"ids-sst-{split}.csv"
    path.write_text(header + "".join(row + "\n" for row in rows), encoding="utf-8")
    return path


GOOD = "0\tx0\tA good film .\t3"


@pytest.mark.parametrize("task", PAPER_TASKS)
@pytest.mark.parametrize("split", ["train", "dev", "test"])
def test_real_files_hold_what_a_plain_re_read_finds(data_dir, task, split):
    prefix = COURSE_TASKS[task].prefix
    path = data_dir / "cs224n" / f"{prefix}-{'test-student' if split == 'test' else split}.csv"
    if not path.exists():
        with pytest.raises(MissingDataError, match=r"no test file of quora: wanted quora-test-student\.csv"):
            read_paper_task(task, data_dir / "cs224n", split)
        return
    table = read_paper_task(task, data_dir / "cs224n", split)
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    label = PAPER_TASKS[task].label
    columns = PAPER_TASKS[task].texts
    usable = [
        row
        for row in rows
        if (split == "test" or row[label].strip()) and all(row[c].strip() for c in columns)
    ]
    assert table.account.read == len(rows)
    assert table.account.used == len(usable) == len(table)
    assert len(table.account.skipped) == len(rows) - len(usable)
    assert table.ids == [row["id"] for row in usable]
    assert table.texts == [[row[column].strip() for row in usable] for column in columns]
    if split == "test":
        assert table.labels is None
    else:
        assert table.labels.dtype == (np.int64 if task == "sst" else np.float32)
        np.testing.assert_allclose(table.labels, [float(row[label]) for row in usable], rtol=1e-6)


def test_the_real_quora_file_has_two_unusable_rows(data_dir):
    account = read_paper_task("quora", data_dir / "cs224n", "train").account
    lines = (data_dir / "cs224n" / "quora-train.csv").read_text(encoding="utf-8").split("\n")
    assert [row.reason for row in account.skipped] == ["empty label in is_duplicate", "empty sentence2"]
    for row, row_id in zip(
        account.skipped, ["ad118c967d683c93883bf072d", "9054345d02cd6c5642a4904dc"], strict=True
    ):
        assert row.file.endswith("quora-train.csv")
        assert row_id in lines[row.line - 1]
    assert "16,000 rows read, 15,998 used, 2 skipped" in account.summary()


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("1\tx1\tFine .\t", "empty label in sentiment"),
        ("1\tx1\tFine .\t  ", "empty label in sentiment"),
        ("1\tx1\tFine .\t5", "sentiment is '5', out of range: sst takes whole numbers from 0 to 4"),
        ("1\tx1\tFine .\t-1", "sentiment is '-1', out of range"),
        ("1\tx1\tFine .\t2.5", "sentiment is '2.5', out of range"),
        ("1\tx1\tFine .\tnan", "sentiment is 'nan', out of range"),
        ("1\tx1\tFine .\tinf", "sentiment is 'inf', out of range"),
        ("1\tx1\tFine .\tgood", "sentiment is 'good', not a number"),
        ("1\tx1\t\t2", "empty sentence"),
        ("1\tx1\t \t2", "empty sentence"),
        ("1\tx1\tFine .", "3 fields where the header has 4"),
        ("1\tx1\tFine .\t2\t2", "5 fields where the header has 4"),
        ('1\tx1\t"Fine" .\t2', "bad quoting"),
    ],
)
def test_a_bad_row_is_skipped_counted_and_named(tmp_path, row, reason):
    path = write_sst(tmp_path, GOOD, row, "2\tx2\tNot a good film .\t1")
    table = read_paper_task("sst", tmp_path)
    assert table.ids == ["x0", "x2"]
    assert table.labels.tolist() == [3, 1]
    assert (table.account.read, table.account.used) == (3, 2)
    [skipped] = table.account.skipped
    assert (skipped.file, skipped.line) == (str(path), 3)
    assert skipped.reason.startswith(reason)
    assert f"{path}:3: {reason}" in table.account.summary()
    with pytest.raises(DataError) as error:
        read_paper_task("sst", tmp_path, strict=True)
    assert str(error.value).startswith(f"{path}:3: {reason}")


@pytest.mark.parametrize(
    ("task", "value", "fine"),
    [
        ("quora", "1.0", True), ("quora", "0", True), ("quora", "0.5", False), ("quora", "2", False),
        ("sts", "5.0", True), ("sts", "3.25", True), ("sts", "5.01", False), ("sts", "-0.1", False),
    ],
)  # fmt: skip
def test_label_ranges_of_pairs(tmp_path, task, value, fine):
    label = PAPER_TASKS[task].label
    path = tmp_path / f"{task}-train.csv"
    path.write_text(f"\tid\tsentence1\tsentence2\t{label}\n0\ta\tx\ty\t1\n1\tb\tx\ty\t{value}\n")
    table = read_paper_task(task, tmp_path)
    assert len(table) == (2 if fine else 1)
    if fine:
        assert table.labels[1] == np.float32(value)


def test_lines_count_from_where_a_record_starts_when_fields_span_lines(tmp_path):
    path = tmp_path / "quora-train.csv"
    path.write_text(
        QUORA_HEADER
        + '0\ta\t"one\ntwo\nthree"\t"say ""hi"""\t1.0\n'  # lines 2 to 4
        + '1\tb\t"four\nfive"\tsix\t\n'  # lines 5 and 6
        + "2\tc\tseven\teight\t7\n"  # line 7
    )
    table = read_paper_task("quora", tmp_path)
    assert table.texts == [["one\ntwo\nthree"], ['say "hi"']]
    assert [row.line for row in table.account.skipped] == [5, 7]


def test_a_quote_that_is_never_closed_is_an_error_not_one_skipped_row(tmp_path):
    path = write_sst(tmp_path, GOOD, '1\tx1\t"Fine .\t2', *[GOOD] * 50)
    with pytest.raises(
        DataError, match=r"ids-sst-train\.csv:3: a quoted field begins here and is not closed"
    ):
        read_paper_task("sst", path)
    write_sst(
        tmp_path, GOOD, '1\tx1\t"Fine .\t2', *[GOOD] * 20000
    )  # more than the csv module takes as a field
    with pytest.raises(
        DataError, match=r"ids-sst-train\.csv:3: a quoted field begins here and is not closed"
    ):
        read_paper_task("sst", path)


def test_a_file_that_is_not_utf8_is_named_with_line_and_offset(tmp_path):
    raw = (SST_HEADER + GOOD + "\n1\tx1\tcaf").encode() + b"\xe9 noir\t2\n"
    (tmp_path / "ids-sst-train.csv").write_bytes(raw)
    with pytest.raises(DataError) as error:
        read_paper_task("sst", tmp_path)
    offset = raw.index(b"\xe9")
    assert f"ids-sst-train.csv:3: not UTF-8: byte 0xe9 at byte offset {offset}" in str(error.value)


def test_a_byte_order_mark_and_windows_line_ends_are_read(tmp_path):
    text = (SST_HEADER + GOOD + "\n").replace("\n", "\r\n").replace("\tid", "id\tix", 1)
    (tmp_path / "ids-sst-train.csv").write_bytes(b"\xef\xbb\xbf" + text.encode())
    table = read_paper_task("sst", tmp_path)
    assert table.texts == [["A good film ."]]


def test_a_missing_column_is_named_with_the_columns_found(tmp_path):
    path = write_sst(tmp_path, GOOD, header="\tid\tsentence\tmood\n")
    with pytest.raises(DataError) as error:
        read_paper_task("sst", tmp_path)
    assert str(error.value) == (
        f"{path}: no column 'sentiment' (or label); columns found: '', 'id', 'sentence', 'mood'"
    )


def test_columns_are_found_by_name_in_any_order(tmp_path):
    write_sst(tmp_path, "4\tA good film .\tnoise\tx9", header=" Sentiment\tsentence \tother\tID\n")
    table = read_paper_task("sst", tmp_path)
    assert (table.ids, table.texts, table.labels.tolist()) == (["x9"], [["A good film ."]], [4])


def test_missing_files_and_unknown_names(tmp_path):
    write_sst(tmp_path, GOOD)
    with pytest.raises(MissingDataError, match=r"wanted ids-sst-dev\.csv, found ids-sst-train\.csv"):
        read_paper_task("sst", tmp_path, "dev")
    with pytest.raises(MissingDataError, match=r"no file for the train split; wanted train\*"):
        read_paper_task("quora", tmp_path)
    with pytest.raises(MissingDataError, match=r"nowhere\.csv: no such file"):
        read_paper_task("sst", tmp_path / "nowhere.csv")
    with pytest.raises(
        MissingDataError, match=r"no validate file of sst: wanted ids-sst-validate\.csv, found"
    ):
        read_paper_task("sst", tmp_path, "dev", splits={"dev": "validate"})
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(DataError, match="unknown kind of file"):
        read_paper_task("sst", tmp_path / "notes.txt")


def test_a_file_without_a_usable_row_is_an_error(tmp_path):
    write_sst(tmp_path, "0\tx\t\t3")
    with pytest.raises(DataError, match=r"no usable row for sst; 1 rows read, 0 used"):
        read_paper_task("sst", tmp_path)
    write_sst(tmp_path)
    with pytest.raises(DataError, match="no rows"):
        read_paper_task("sst", tmp_path)
    (tmp_path / "ids-sst-train.csv").write_text("")
    with pytest.raises(DataError, match="no header row"):
        read_paper_task("sst", tmp_path)


def test_a_name_that_cannot_be_loaded_says_so(monkeypatch):
    def refuse(name, config):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(DataError, match=r"nyu-mll/glue:stsb: neither .* could be loaded \(ConnectionError"):
        read_paper_task("sts", "nyu-mll/glue:stsb")


def test_a_hub_name_with_a_configuration_maps_splits_and_columns(monkeypatch):
    calls = []

    def load(name, config):
        calls.append((name, config))
        rows = {"question1": ["a", "b"], "question2": ["c", "d"], "label": [1, 0], "idx": [7, 8]}
        hidden = rows | {"label": [-1, -1]}
        return datasets.DatasetDict(
            validation=datasets.Dataset.from_dict(rows), test=datasets.Dataset.from_dict(hidden)
        )

    monkeypatch.setattr(datasets, "load_dataset", load)
    dev = read_paper_task("quora", "nyu-mll/glue:qqp", "dev")
    assert calls == [("nyu-mll/glue", "qqp")]
    assert (dev.ids, dev.texts, dev.labels.tolist()) == (["7", "8"], [["a", "b"], ["c", "d"]], [1.0, 0.0])
    assert read_paper_task("quora", "nyu-mll/glue:qqp", "test").labels is None
    with pytest.raises(MissingDataError, match="no train split; wanted train, found validation, test"):
        read_paper_task("quora", "nyu-mll/glue:qqp", "train")


ROWS = {"text": ["A good film .", "A bad film .", ""], "label": [4, 0, 2]}


def save_parquet(directory):
    (directory / "data").mkdir()
    first, second = ({name: values[a:b] for name, values in ROWS.items()} for a, b in ((0, 1), (1, 3)))
    pyarrow.parquet.write_table(pyarrow.table(first), directory / "data" / "train-00000-of-00002.parquet")
    pyarrow.parquet.write_table(pyarrow.table(second), directory / "data" / "train-00001-of-00002.parquet")
    return directory, 2


def save_jsonl(directory):
    path = directory / "reviews.jsonl"
    path.write_text(
        "\n".join(json.dumps(dict(zip(ROWS, row, strict=True))) for row in zip(*ROWS.values(), strict=True))
    )
    return path, 3


def save_comma_csv(directory):
    path = directory / "train.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(ROWS)
        writer.writerows(zip(*ROWS.values(), strict=True))
    return directory, 4


def save_splits(directory):
    datasets.DatasetDict(train=datasets.Dataset.from_dict(ROWS)).save_to_disk(str(directory / "saved"))
    return directory / "saved", 3


def save_single(directory):
    datasets.Dataset.from_dict(ROWS).save_to_disk(str(directory / "saved"))
    return directory / "saved", 3


@pytest.mark.parametrize("save", [save_parquet, save_jsonl, save_comma_csv, save_splits, save_single])
def test_other_kinds_of_source_give_the_same_table(tmp_path, save):
    source, line = save(tmp_path)
    table = read_paper_task("sst", str(source))
    assert table.texts == [["A good film .", "A bad film ."]]
    assert table.labels.tolist() == [4, 0]
    assert table.ids == ["0", "1"]
    [skipped] = table.account.skipped
    assert (skipped.line, skipped.reason) == (line, "empty text")


def test_json_lines_that_are_not_json_are_named(tmp_path):
    path = tmp_path / "dev.jsonl"
    path.write_text('{"sentence": "Fine .", "label": 2}\nnonsense\n[1]\n\n{"sentence": null, "label": 1}\n')
    table = read_paper_task("sst", path, "dev")
    assert table.ids == ["0"]
    path.write_text('{"id": 7, "sentence": "a", "label": 2}\n{"sentence": "b", "label": 1}\n')
    assert read_paper_task("sst", path, "dev").ids == ["7", "1"]
    assert [(row.line, row.reason.split(":")[0]) for row in table.account.skipped] == [
        (2, "not JSON"), (3, "not a JSON object; one object on each line is expected"), (5, "empty sentence"),
    ]  # fmt: skip


def test_what_json_and_parquet_hold_besides_plain_values(tmp_path):
    path = tmp_path / "train.jsonl"
    rows = [
        '{"id": null, "sentence": "a", "sentiment": "4"}',
        '{"id": 0, "sentence": "b", "sentiment": 1.0}',
        '{"id": "x", "sentence": "c \\ud800", "sentiment": 1}',
        '{"id": "x", "sentence": "d", "sentiment": NaN}',
        '{"id": "x", "sentence": NaN, "sentiment": 1}',
        '{"id": "x", "sentence": 5, "sentiment": 1}',
        '{"id": "same", "sentence": "e", "sentiment": true}',
        '{"id": "same", "sentence": "f", "sentiment": 0}',
    ]
    path.write_text("\n".join(rows))
    table = read_paper_task("sst", path)
    assert table.texts == [["a", "b", "e", "f"]] and table.labels.tolist() == [4, 1, 1, 0]
    assert table.ids == ["0", "0", "same", "same"]  # the first is the row's number; two rows may share an id
    assert [(row.line, row.reason) for row in table.account.skipped] == [
        (3, "sentence holds half of a surrogate pair, which is no character"),
        (4, "sentiment is nan, out of range: sst takes whole numbers from 0 to 4"),
        (5, "empty sentence"),
        (6, "sentence is 5, not text"),
    ]
    columns = {"sentence": ["a", "b", None], "label": ["3", "nan", "1"]}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "dev.parquet")
    table = read_paper_task("sst", tmp_path, "dev")
    assert table.labels.tolist() == [3]
    assert [row.reason.split(",")[0] for row in table.account.skipped] == ["label is 'nan'", "empty sentence"]


def test_a_parquet_file_cut_short_is_named(tmp_path):
    path, _ = tmp_path / "train.parquet", pyarrow.parquet.write_table(pyarrow.table(ROWS), tmp_path / "a")
    path.write_bytes((tmp_path / "a").read_bytes()[:-20])
    with pytest.raises(DataError, match=r"train\.parquet: not a readable Parquet file"):
        read_paper_task("sst", tmp_path)


def write_lines(path, *sentences):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"sentence": text, "label": 1}) + "\n" for text in sentences))


def test_a_name_with_split_in_it_stands_for_one_file_a_split(tmp_path):
    write_lines(tmp_path / "sst-train.jsonl", "a", "b")
    write_lines(tmp_path / "sst-validation.jsonl", "c")
    source = f"{tmp_path}/sst-{{split}}.jsonl"
    assert len(read_paper_task("sst", source)) == 2
    assert read_paper_task("sst", source, "dev").texts == [["c"]]
    with pytest.raises(MissingDataError, match=r"sst-test\.jsonl: no such file"):
        read_paper_task("sst", source, "test")
    assert not is_one_file(source) and not is_one_file(tmp_path) and not is_one_file("nyu-mll/glue:stsb")
    assert is_one_file(tmp_path / "sst-train.jsonl") and is_one_file("nowhere.csv")


def test_which_files_of_a_directory_are_a_split(tmp_path):
    write_lines(tmp_path / "train-00000-of-00002.jsonl", "a")
    write_lines(tmp_path / "train-00001-of-00002.jsonl", "b")
    write_lines(tmp_path / "trainer_state.json", "not this")
    write_lines(tmp_path / "validation.jsonl", "c")
    assert read_paper_task("sst", tmp_path).texts == [["a", "b"]]
    assert read_paper_task("sst", tmp_path, "dev").texts == [["c"]]
    write_lines(tmp_path / "dev.jsonl", "d")
    assert read_paper_task("sst", tmp_path, "dev").texts == [["d"]]
    (tmp_path / "train.csv").write_text("sentence,label\na,1\n")
    with pytest.raises(DataError, match=r"train\): files of several kinds, .*train\.csv; keep one kind"):
        read_paper_task("sst", tmp_path)


def test_the_only_folder_with_data_is_that_of_the_hubs_configuration(tmp_path):
    write_lines(tmp_path / "default" / "train.jsonl", "a")
    (tmp_path / "images").mkdir()
    assert read_paper_task("sst", tmp_path).texts == [["a"]]
    write_lines(tmp_path / "other" / "train.jsonl", "b")
    with pytest.raises(DataError, match="several folders with data, default, other; name one of them"):
        read_paper_task("sst", tmp_path)


def test_a_file_that_is_not_parquet_is_named(tmp_path):
    (tmp_path / "train.parquet").write_text("text,label\n")
    with pytest.raises(DataError, match=r"train\.parquet: not a readable Parquet file"):
        read_paper_task("sst", tmp_path)


def test_similarities_on_another_scale_are_refused(tmp_path):
    path = tmp_path / "train.jsonl"
    rows = [{"sentence1": "a", "sentence2": "b", "score": i / 40} for i in range(40)]
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(DataError, match="every score lies between 0 and 1"):
        read_paper_task("sts", path)
