"""Odd files: stray quotes, long fields, line ends, byte-order marks, and what JSON and Parquet can hold."""

import csv
import json
import re

import pyarrow
import pyarrow.parquet
import pytest
from paper_tables import read_paper_task

from mtfast.data.delimited import split_rows
from mtfast.data.reviews import read_reviews
from mtfast.data.rows import DataError

QUORA = "\tid\tsentence1\tsentence2\tis_duplicate\n"


def quora(tmp_path, *lines):
    path = tmp_path / "quora-train.csv"
    path.write_text(QUORA + "".join(f"{line}\n" for line in lines), encoding="utf-8", newline="")
    table = read_paper_task("quora", tmp_path)
    assert table.account.read == table.account.used + len(table.account.skipped)
    return table


def skipped(table):
    return [(row.line, row.reason) for row in table.account.skipped]


GOOD = "9\tz\tgood\tfine\t1.0"


@pytest.mark.parametrize(
    ("first", "last", "used"),
    [
        ('0\ta\t"why is it blue\tblue\t1', '2\tc\the said "art"\tart\t0', ["b", "c"]),  # it ends amid a field
        ('0\ta\t"why is it blue\tblue\t1', '2\tc\tit is "art"\tart\t0', ["b", "c"]),  # ... at a field's end
        ('0\ta\t"why is it blue\tblue\t1', '2\tc\tart\tit is "art"\t0', ["b", "c"]),  # ... of another column
        ('0\ta\t"why is it blue\tblue\t1', '2\tart"\tart\t0', ["b"]),  # ... in a row that lacks a field
        ('0\t"why is it blue\tblue\t1', '2\tc\tit is "art"\tart\t0', ["b", "c"]),  # ... begins in such a row
        ('0\ta\tblue\t"why is it\t1', '2\tc\t"it is art\tart\t0', ["b"]),  # ... where another one begins
    ],
)
def test_a_stray_quote_costs_its_own_row_only(tmp_path, first, last, used):
    table = quora(tmp_path, GOOD, first, "1\tb\tthree\tfour\t0", last, '3\td\t"five"\tsix\t0')
    assert table.ids == ["z", *used, "d"]
    assert table.texts[0][1] == "three"
    assert table.account.read == 5
    line, reason = skipped(table)[0]
    assert line == 3
    assert reason.startswith("a quote begins a field here and takes in rows of their own, up to line 5")
    with pytest.raises(DataError, match=r"quora-train\.csv:3: a quote begins a field here .*\(strict"):
        read_paper_task("quora", tmp_path, strict=True)


def test_a_stray_quote_in_a_comma_file_costs_its_own_row_only(tmp_path):
    path = tmp_path / "train.csv"
    path.write_text('text,label\ngood,1\n"why not,0\nfine,1\nthe "best",0\nbad,0\n')
    table = read_paper_task("sst", tmp_path)
    assert table.texts == [["good", "fine", 'the "best"', "bad"]]
    assert [line for line, _ in skipped(table)] == [3]
    assert read_reviews(path).account.used == 4


def test_a_row_of_several_lines_that_cannot_be_used_is_skipped_line_by_line(tmp_path):
    table = quora(tmp_path, '0\ta\t"one\ntwo"\t1', GOOD, '1\tb\t"one\n\ntwo" three\tfour\t1', GOOD)
    assert table.ids == ["z", "z"]
    fault = r"bad quoting: '\t' expected after the quote that ends a field"
    assert skipped(table) == [
        (2, "4 fields where the header has 5, in lines 2 to 3"),
        (3, "belongs to the row that begins in line 2: 4 fields where the header has 5"),
        (5, f"{fault}, in lines 5 to 7"),
        (7, f"belongs to the row that begins in line 5: {fault}"),
    ]


def test_quoted_line_breaks_and_tabs_are_read_and_reported(tmp_path):
    table = quora(tmp_path, GOOD, '0\ta\t"one\ntwo"\tthree\t1', '1\tb\t"one\ttwo"\t"say ""hi"""\t0', GOOD)
    assert table.texts[0] == ["good", "one\ntwo", "one\ttwo", "good"]
    assert table.texts[1][2] == 'say "hi"'
    assert table.account.notes == ("quora-train.csv: 2 rows with quoted line breaks or tabs, in line 3, 5",)
    assert "in line 3, 5" in table.account.summary()


@pytest.mark.parametrize("label_first", [False, True])
def test_reviews_with_line_breaks_and_commas_in_a_comma_file_are_whole(tmp_path, label_first):
    texts = [
        "I liked it, really, and so did\nmy friends, all of them.",
        "One, two.\n\nThree, four.\n\nFive.",
        'She said: "no, never".\nThe end.',
        "plain",
        "quoted, plain",
    ]
    path = tmp_path / "reviews.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows(
            [
                row[::-1] if label_first else row
                for row in [("text", "label"), *zip(texts, "01010", strict=True)]
            ]
        )
    reviews = read_reviews(path)
    assert reviews.texts == texts and not reviews.account.skipped
    assert [line for _, line in reviews.lines] == [2, 4, 9, 11, 12]
    assert reviews.account.notes == ("reviews.csv: 3 rows with quoted line breaks, in line 2, 4, 9",)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["text"], *([text] for text in texts)])
    assert read_reviews(path).texts == texts


def test_a_header_whose_quote_takes_in_rows_is_an_error(tmp_path):
    path = tmp_path / "train.csv"
    path.write_text('text,label,"note\na,1,x\nb,0,y"\nc,1,z\n')
    with pytest.raises(DataError, match=r"train\.csv:1: a name in the header .* goes on to line 3"):
        read_paper_task("sst", path)


def test_fields_of_any_length_are_read(tmp_path):
    limit = csv.field_size_limit()
    long = "play " * 30_000
    path = tmp_path / "reviews.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["text"], [long + ", quoted"], [long], ["short"]])
    assert read_reviews(path).texts == [long + ", quoted", long.strip(), "short"]
    assert csv.field_size_limit() == limit
    path.write_text('text\nshort\n"' + long + "\n")
    with pytest.raises(DataError, match=r"reviews\.csv:3: a quoted field begins here and is not closed"):
        read_reviews(path)


def test_the_line_of_an_unclosed_quote_is_that_of_the_quote(tmp_path):
    with pytest.raises(DataError, match=r"quora-train\.csv:3: a quoted field begins here and is not closed"):
        quora(tmp_path, '0\ta\t"one\ntwo"\t"three\t1', GOOD)


@pytest.mark.parametrize("quote", ["", '"'])
def test_a_carriage_return_in_a_sentence_is_part_of_it(tmp_path, quote):
    table = quora(tmp_path, f"0\ta\t{quote}one\rtwo{quote}\tthree\t1.0\r", "1\tb\tfour\tfive\t2\r", GOOD)
    assert table.texts[0] == ["one\rtwo", "good"]
    assert [line for line, _ in skipped(table)] == [3]
    (tmp_path / "quora-train.csv").write_bytes((QUORA + GOOD).replace("\n", "\r").encode())
    with pytest.raises(
        DataError, match=r"quora-train\.csv:1: a carriage return in the header; lines should end"
    ):
        read_paper_task("quora", tmp_path)


def test_many_stray_quotes_take_no_longer_than_their_lines():
    lines = 20_000
    for line in ('x"\t"y', '"x\ty'):
        rows = list(split_rows("a\tb\n" + f"{line}\n" * lines + 'z\tend"', "\t"))
        assert len(rows) == lines + 2


def test_byte_order_marks(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"sentence": "a", "label": 1}\n')
    assert read_paper_task("sst", path).texts == [["a"]]
    for encoding in ("utf-16-le", "utf-16-be"):
        path.write_bytes('\ufeff{"sentence": "a", "label": 1}\n'.encode(encoding))
        with pytest.raises(
            DataError, match=r"train\.jsonl: UTF-16, by its byte-order mark; save the file as"
        ):
            read_paper_task("sst", path)


ROW = {"sentence": "a", "label": 1}


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (json.dumps([ROW, ROW]), ":1: a JSON array begins here; JSON lines are expected"),
        ("\n" + json.dumps([ROW, ROW], indent=1), ":2: a JSON array begins here"),
        (json.dumps([ROW, ROW], indent=1)[:-20], ":1: a JSON array begins here"),
        (json.dumps(ROW, indent=1), ":1: a JSON object over several lines begins here"),
        ("\n".join([json.dumps(ROW, indent=1)] * 2), ":1: a JSON object over several lines begins here"),
    ],
)
def test_json_that_is_not_in_lines_is_one_error(tmp_path, text, what):
    path = tmp_path / "train.json"
    path.write_text(text)
    with pytest.raises(DataError, match=re.escape(f"{path}{what}")):
        read_paper_task("sst", path)


def test_json_values_that_cannot_be_read_are_skipped(tmp_path):
    path = tmp_path / "train.jsonl"
    deep = "[" * 900 + "]" * 900
    lines = [
        json.dumps(ROW),
        '{"sentence": "a", "label": 1, "label": 2}',
        f'{{"sentence": "a", "label": 1{"0" * 5000}}}',
        f'{{"sentence": "a", "label": 1{"0" * 400}}}',
        f'{{"sentence": "a", "label": {"[" * 100_000}1{"]" * 100_000}}}',
        f'{{"sentence": {deep}, "label": 1}}',
        f'{{"sentence": "a", "label": {deep}}}',
        '{"sentence": "a", "label": "0_1"}',
        '{"sentence": "a", "label": {"x": 1}}',
        '{"sentence": "a", "label": 1, "id": "\\ud800"}',
        '{"sentence": "a", "label": 1, "id": NaN}',
        '{"sentence": "a", "label": 1, "id": "two\\nlines"}',
    ]
    path.write_text("\n".join(lines))
    table = read_paper_task("sst", path)
    assert table.ids == ["0", "10", "two lines"] and table.account.read == len(lines)
    reasons = dict(skipped(table))
    assert list(reasons) == list(range(2, 11))
    assert reasons[2] == "keys that appear twice: 'label'"
    assert all(reasons[line].startswith("JSON that cannot be read: ") for line in (3, 5))
    assert reasons[4].endswith("not a number") and reasons[9] == "label is {'x': 1}, not a number"
    assert reasons[8] == "label is '0_1', not a number"
    assert reasons[10] == "id holds half of a surrogate pair, which is no character"
    assert max(map(len, reasons.values())) < 200


def test_parquet_columns_that_cannot_be_read_are_named(tmp_path):
    path = tmp_path / "train.parquet"
    bad = pyarrow.Array.from_buffers(pyarrow.string(), 2, pyarrow.array([b"a", b"\xff"]).buffers())
    pyarrow.parquet.write_table(pyarrow.table({"sentence": bad, "label": [1, 2]}), path)
    with pytest.raises(
        DataError, match=r"train\.parquet: sentence cannot be read: .*UTF8 sequence at string index 1"
    ):
        read_paper_task("sst", path)
    late = pyarrow.array([2**60], pyarrow.timestamp("us"))
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"], "when": late}), path)
    with pytest.raises(DataError, match=r"train\.parquet:1: when cannot be read"):
        read_reviews(path)
    twice = pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 2, names=["text", "text"])
    pyarrow.parquet.write_table(twice, path)
    with pytest.raises(DataError, match=r"train\.parquet: column names appear twice: text"):
        read_reviews(path)
