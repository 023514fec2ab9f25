"""Labels of the CS 224N project's test files, from files as the treebank and STS Benchmark have them."""

import pytest

from benchmarks import held_out
from mtfast.data.tables import read_task
from mtfast.recipes import PAPER_TASKS

SENTENCES = ("A `` dull '' film -LRB- really -RRB- .", "Good .")
TREES = """\
(1 (2 A) (1 (2 ``) (1 (1 dull) (2 (2 '') (2 (2 film) (2 (2 -LRB-) (2 (2 really) (2 (2 -RRB-) (2 .)))))))))
(4 (3 Good) (2 .))
"""
PAIRS = (('A "cat" sat.', "A cat sat ."), ("One.", "Two."))
BENCHMARK = {
    "train": 'main-captions\tMSRvid\t2012test\t0001\t4.2\tA "cat" sat.\tA cat sat .\n',
    "dev": "main-news\theadlines\t2016\t0281\t0.25\tOne.\tTwo.\tof a source\tof another\n",
    "test": 'main-forums\tdeft\t2014\t0002\t5.000\tA "cat" sat.\tA cat sat .\n',
}


def quoted(text: str) -> str:
    return '"' + text.replace('"', '""') + '"'


@pytest.fixture
def sources(tmp_path):
    """Arguments of the files; those of the project have other index columns than one another."""
    lines = [f"{i}\t{i}.0\ts{i}\t{quoted(' ' + text)}\n" for i, text in enumerate(SENTENCES)]
    (tmp_path / "ids-sst-test-student.csv").write_text("0\t\tid\tsentence\n" + "".join(lines))
    lines = [f"{9 - i}\tp{i}\t{quoted(a)}\t{quoted(b)}\n" for i, (a, b) in enumerate(PAIRS)]
    (tmp_path / "sts-test-student.csv").write_text("\tid\tsentence1\tsentence2\n" + "".join(lines))
    lines = [f"{i}\tq{i}\tWhy {i}?\tHow {i}?\t{i % 2}.0\n" for i in range(held_out.QUORA_BEGIN + 3)]
    (tmp_path / "quora-dev.csv").write_text("\tid\tsentence1\tsentence2\tis_duplicate\n" + "".join(lines))
    (tmp_path / "test.txt").write_text(TREES)
    for split, text in BENCHMARK.items():
        (tmp_path / f"sts-{split}.csv").write_text(text)
    return {"--minbert": tmp_path, "--treebank": tmp_path / "test.txt", "--stsbenchmark": tmp_path}


def arguments(sources, data) -> list[str]:
    return [str(x) for pair in (sources | {"--data": data}).items() for x in pair]


def test_what_is_written_is_read_with_its_labels(sources, tmp_path):
    assert held_out.main(arguments(sources, tmp_path / "data")) == 0
    found = {name: read_task(name, PAPER_TASKS[name], tmp_path / "data", "test") for name in PAPER_TASKS}
    assert found["sst"].labels.tolist() == [1, 4] and found["sst"].ids == ["s0", "s1"]
    assert [text.strip() for text in found["sst"].texts[0]] == list(SENTENCES)
    assert found["sts"].labels.tolist() == pytest.approx([4.6, 0.25])  # the first is there twice
    assert list(zip(*found["sts"].texts, strict=True)) == list(PAIRS) and found["sts"].ids == ["p0", "p1"]
    first = held_out.QUORA_BEGIN
    assert found["quora"].ids == [f"q{first + i}" for i in range(3)]
    assert found["quora"].labels.tolist() == [(first + i) % 2 for i in range(3)]


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("test.txt", TREES.replace("Good", "Bad"), "has not the sentences of the project's test file"),
        ("sts-dev.csv", BENCHMARK["dev"].replace("Two", "Too"), r"has no pair \('One.', 'Two.'\)"),
    ],
)
def test_other_texts_are_an_error_and_nothing_is_written(file, text, said, sources, tmp_path):
    (tmp_path / file).write_text(text)
    with pytest.raises(ValueError, match=said):
        held_out.main(arguments(sources, tmp_path / "data"))
    assert not (tmp_path / "data").exists()
