"""Every reader on inputs nobody would write: DataError or an account of every row, and no text is lost."""

import csv
import io
import json
import os
import shutil
from dataclasses import replace

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from paper_tables import read_paper_task

from mtfast.data.cs224n import COURSE_TASKS
from mtfast.data.delimited import UnclosedQuoteError, split_rows
from mtfast.data.reviews import read_reviews
from mtfast.data.rows import DataError
from mtfast.data.tables import read_task
from mtfast.recipes import PAPER_TASKS
from mtfast.tasks import Task

pytestmark = pytest.mark.sweep
_FULL = os.environ.get("MTFAST_TEST_SWEEP") == "full"
settings.register_profile(
    "mtfast",
    max_examples=10_000 if _FULL else 50,
    derandomize=not _FULL,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
settings.load_profile("mtfast")

PIECES = [
    "", " ", "a", "film", '"', '""', '"a', 'a"', '"a"', '"a" b', 'a "b"', "a, b", "a,b", "a\tb", "\r", "a\rb",
    "\n", "\x00", "\ufeff", "\u2028", "\x85", "\U0001f3ac", "1", "2.5", "-1", "nan", "1e999", "0_1", "5.0",
]  # fmt: skip
HEADERS = [
    ["", "id", "sentence", "sentiment"], ["text", "label"], ["text"], ["label", "review"],
    ["", "id", "sentence1", "sentence2", "is_duplicate"], ["sentence1", "sentence2", "similarity"],
    ["idx", "sentence"],
]  # fmt: skip
TEXT = st.one_of(st.lists(st.sampled_from(PIECES), max_size=4).map("".join), st.text(max_size=12))
WORDS = Task(
    kind="classification",
    classes=("a", "film", '"a"'),
    text="sentence",
    label="label",
    aliases={"sentence": ("text",), "label": ("sentiment", "review")},
)
NAMED = {"words": WORDS, "numbers": replace(WORDS, classes=("1", "2", "a"))}
READERS = {
    **{task: lambda path, task=task: read_paper_task(task, path).account for task in PAPER_TASKS},
    **{name: lambda path, name=name: read_task(name, NAMED[name], path).account for name in NAMED},
    "reviews": lambda path: read_reviews(path).account,
}


@st.composite
def delimited(draw):
    """A header that some reader takes, and lines of fields whose quotes mean anything."""
    delimiter, end = draw(st.sampled_from([",", "\t"])), draw(st.sampled_from(["\n", "\r\n"]))
    header = draw(st.sampled_from(HEADERS))
    width = st.sampled_from([len(header)] * 8 + [0, 1, len(header) + 1])
    rows = draw(st.lists(width.flatmap(lambda n: st.lists(st.sampled_from(PIECES), min_size=n, max_size=n))))
    return end.join(delimiter.join(row) for row in [header, *rows]) + draw(st.sampled_from(["", end]))


def account_or_error(read, path):
    """What became of the rows, or None where the reader gave up with the one error it may raise."""
    try:
        account = read(path)
    except DataError:
        return None
    assert account.read == account.used + len(account.skipped)
    assert len({(row.file, row.line) for row in account.skipped}) == len(account.skipped)
    assert account.used
    account.summary().encode()
    return account


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("hostile")


@given(st.one_of(st.binary(max_size=80), delimited().map(str.encode)), st.sampled_from(["csv", "tsv"]))
def test_delimited_text(folder, content, suffix):
    path = folder / f"train.{suffix}"
    path.write_bytes(content)
    for read in READERS.values():
        account_or_error(read, path)


@given(delimited(), st.sampled_from(",\t"))
def test_every_line_of_delimited_text_is_in_one_row(content, delimiter):
    try:
        rows = list(split_rows(content, delimiter))
    except UnclosedQuoteError as error:
        assert '"' in content.split("\n")[error.line - 1]
        return
    lines = content.split("\n")
    covered = [
        row.line + more
        for row in rows
        for more in range(1 + sum(field.count("\n") for field in row.fields if row.problem is None))
    ]
    assert len(set(covered)) == len(covered)
    assert {number for number, line in enumerate(lines, start=1) if line.removesuffix("\r")} == {
        number for number in covered if lines[number - 1].removesuffix("\r")
    }
    width = len(rows[0].fields)
    for row in rows:
        assert row.problem is not None or len(row.fields) == width
        if row.problem is None and not row.odd:
            assert all("\n" not in field for field in row.fields)


@given(
    st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=4),
    st.sampled_from(",\t"),
    st.sampled_from(["\n", "\r\n"]),
    st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
)
def test_what_the_csv_module_writes_is_read(folder, rows, delimiter, end, quoting):
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter=delimiter, lineterminator=end, quoting=quoting)
    writer.writerow(["id", "sentence1", "sentence2", "similarity"])
    for number, row in enumerate(rows):
        begin = text.tell()
        writer.writerow([number, *row, 2.5])
        written = text.getvalue()[begin:].removesuffix(end)
        like_rows = [line.count(delimiter) > 2 for line in written.split("\n")]
        assume(len(like_rows) == 1 or not ((like_rows[0] and like_rows[-1]) or any(like_rows[1:-1])))
    path = folder / "train.csv"
    path.write_text(text.getvalue(), encoding="utf-8", newline="")
    check_pairs(path, rows)


def check_pairs(path, rows):
    """That `read_task` finds the pairs which are text, under their numbers, and skips the others."""
    usable = {
        number: [text.strip() for text in row] for number, row in enumerate(rows) if all(map(is_text, row))
    }
    if not usable:
        assert account_or_error(READERS["sts"], path) is None
        return
    table = read_paper_task("sts", path)
    assert table.account.read == len(rows) and len(table.account.skipped) == len(rows) - len(usable)
    assert table.ids == [str(number) for number in usable]
    assert [list(pair) for pair in zip(*table.texts, strict=True)] == list(usable.values())
    assert set(table.labels.tolist()) == {2.5}


def is_text(value):
    try:
        return bool(isinstance(value, str) and value.encode() and value.strip())
    except UnicodeEncodeError:
        return False


ANY_TEXT = st.one_of(TEXT, st.text(st.characters(), max_size=6))  # half surrogate pairs among the characters
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), ANY_TEXT, st.just(10**400)),
    lambda inner: st.one_of(st.lists(inner, max_size=2), st.dictionaries(ANY_TEXT, inner, max_size=2)),
    max_leaves=4,
)
NAMES = [name for header in HEADERS for name in header]
JSON_LINES = st.one_of(
    st.dictionaries(st.sampled_from(NAMES), VALUES).map(json.dumps),
    VALUES.map(json.dumps),
    st.sampled_from([*PIECES, "[", "]", "{", "}", '{"text": "a", "text": "b"}', "[" * 2000, "1" * 5000]),
    ANY_TEXT.map(
        lambda text: json.dumps({"sentence": text, "sentence1": text, "sentence2": "b", "label": 1})
    ),
)


@given(
    st.one_of(
        st.binary(max_size=80),
        st.lists(JSON_LINES, max_size=5).map("\n".join).map(lambda text: text.encode()),
    ),
    st.sampled_from(["json", "jsonl"]),
)
def test_json_lines(folder, content, suffix):
    path = folder / f"train.{suffix}"
    path.write_bytes(content)
    for read in READERS.values():
        account = account_or_error(read, path)
        lines = content.decode().removeprefix("\ufeff").split("\n") if account else []
        assert account is None or account.read == sum(bool(line.strip()) for line in lines)


@given(st.lists(st.tuples(ANY_TEXT, ANY_TEXT), min_size=1, max_size=4), st.booleans())
def test_what_the_json_module_writes_is_read(folder, rows, escaped):
    path = folder / "written.jsonl"
    with path.open("w", encoding="utf-8", errors="surrogatepass", newline="") as file:
        for number, (first, second) in enumerate(rows):
            row = {"id": number, "sentence1": first, "sentence2": second, "score": 2.5}
            escape = escaped or not (is_text(first or "a") and is_text(second or "a"))
            file.write(json.dumps(row, ensure_ascii=escape) + "\n")
    check_pairs(path, rows)


COLUMN_TYPES = [
    (pyarrow.string(), TEXT), (pyarrow.large_string(), TEXT), (pyarrow.binary(), st.binary(max_size=6)),
    (pyarrow.int64(), st.integers(-(2**63), 2**63 - 1)), (pyarrow.float64(), st.floats()),
    (pyarrow.bool_(), st.booleans()), (pyarrow.list_(pyarrow.string()), st.lists(TEXT, max_size=2)),
    (pyarrow.timestamp("us"), st.integers(-(2**63), 2**63 - 1)), (pyarrow.null(), st.none()),
    (pyarrow.struct({"a": pyarrow.int64()}), st.just({"a": 1})),
    (pyarrow.dictionary(pyarrow.int32(), pyarrow.string()), TEXT),
]  # fmt: skip


@st.composite
def tables(draw):
    """A table with some columns that readers look for, of any type; a few have the right one."""
    header, length = draw(st.sampled_from(HEADERS)), draw(st.integers(0, 4))
    columns = []
    for _ in header:
        kind, values = draw(st.sampled_from(COLUMN_TYPES[:1] * 8 + COLUMN_TYPES))
        values = draw(st.lists(st.one_of(values, st.none()), min_size=length, max_size=length))
        columns.append(pyarrow.array(values, kind))
    return pyarrow.Table.from_arrays(columns, names=header)


@st.composite
def damaged(draw, content):
    """The bytes with some of them changed, cut off or repeated."""
    changed = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(changed) - 1, 0)))
        what = draw(st.sampled_from(["change", "cut", "repeat"]))
        if what == "change":
            changed[at : at + 1] = draw(st.binary(min_size=1, max_size=8))
        elif what == "cut":
            del changed[at:]
        else:
            changed[at:at] = changed[at : at + 8]
    return bytes(changed)


@given(tables(), st.data())
def test_parquet(folder, table, data):
    path = folder / "train.parquet"
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(table, sink)
    content = sink.getvalue().to_pybytes()
    path.write_bytes(content)
    for read in READERS.values():
        account = account_or_error(read, path)
        assert account is None or account.read == len(table)
    path.write_bytes(data.draw(st.one_of(st.binary(max_size=80), damaged(content))))
    for read in READERS.values():
        account_or_error(read, path)


PAIRS = st.lists(st.tuples(st.one_of(TEXT, st.none()), TEXT), min_size=1, max_size=4)


def pair_columns(rows):
    first, second = map(list, zip(*rows, strict=True))
    return {
        "idx": list(range(len(rows))),
        "sentence1": first,
        "sentence2": second,
        "score": [2.5] * len(rows),
    }


@given(PAIRS)
def test_what_is_written_as_parquet_is_read(folder, rows):
    path = folder / "written.parquet"
    pyarrow.parquet.write_table(pyarrow.table(pair_columns(rows)), path)
    check_pairs(path, rows)


@given(PAIRS, st.data())
def test_saved_data_sets(folder, rows, data):
    datasets.disable_progress_bars()
    path = folder / "saved"
    shutil.rmtree(path, ignore_errors=True)
    saved = datasets.Dataset.from_dict(pair_columns(rows))
    (saved if data.draw(st.booleans()) else datasets.DatasetDict(train=saved)).save_to_disk(str(path))
    check_pairs(path, rows)
    file = data.draw(st.sampled_from(sorted(file for file in path.rglob("*") if file.is_file())))
    content = data.draw(st.one_of(st.binary(max_size=80), damaged(file.read_bytes())))
    file.unlink()  # the one that is mapped keeps its contents
    file.write_bytes(content)
    for read in READERS.values():
        account_or_error(read, path)


COURSE_FILES = [
    f"{task.prefix}-{part}.csv"
    for task in COURSE_TASKS.values()
    for part in ("train", "dev", "test", "test-student")
] + ["train.csv", "validation.csv", "dev.jsonl"]


@given(st.dictionaries(st.sampled_from(COURSE_FILES), delimited(), max_size=4))
def test_course_directories(folder, files):
    path = folder / "course"
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    for name, content in files.items():
        (path / name).write_text(content, encoding="utf-8", newline="")
    for task in PAPER_TASKS:
        for split in ("train", "dev", "test"):
            account_or_error(
                lambda path, task=task, split=split: read_paper_task(task, path, split).account, path
            )


@given(
    st.dictionaries(
        st.sampled_from(["train", "test", "data/train"]), st.one_of(delimited(), TEXT), max_size=3
    ),
    st.sampled_from([".csv", ".tsv", ".jsonl", ".parquet"]),
    st.integers(1, 5) | st.none(),
)
def test_review_directories(folder, files, suffix, limit):
    path = folder / "reviews"
    shutil.rmtree(path, ignore_errors=True)
    (path / "data").mkdir(parents=True)
    for name, content in files.items():
        path.joinpath(name + suffix).write_text(content, encoding="utf-8", newline="")
    account = account_or_error(lambda path: read_reviews(path, limit=limit).account, path)
    assert account is None or limit is None or account.read <= limit


REVIEW = st.lists(st.sampled_from([*PIECES, "<br />", "<br><BR/>", "One. Two.\n"]), max_size=6).map("".join)


@given(st.lists(REVIEW, min_size=1, max_size=4), st.sampled_from(["parquet", "jsonl", "csv"]))
def test_reviews_that_were_written_are_read(folder, texts, suffix):
    path = folder / f"written-reviews.{suffix}"
    if suffix == "parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path)
    elif suffix == "jsonl":
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    else:
        with path.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([["text"], *([text] for text in texts)])
    lines = [text.strip().replace("<br />", "\n").replace("<br><BR/>", "\n\n").strip() for text in texts]
    expected = [line for line in lines if line]
    if not expected:
        assert account_or_error(READERS["reviews"], path) is None
        return
    reviews = read_reviews(path)
    assert reviews.texts == expected and reviews.account.read == len(texts)
