"""The demo corpus: formats, sameness on every machine, and that its tasks can be learned from the words."""

import csv
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
from transformers import BertConfig, BertTokenizerFast

from mtfast.data.demo import ROWS, DemoCorpus, write_demo_corpus

COLUMNS = {
    "ids-sst": ("sst", ["sentence", "sentiment"]),
    "quora": ("quora", ["sentence1", "sentence2", "is_duplicate"]),
    "sts": ("sts", ["sentence1", "sentence2", "similarity"]),
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> DemoCorpus:
    return write_demo_corpus(tmp_path_factory.mktemp("demo"))


def read(corpus: DemoCorpus, prefix: str, split: str) -> list[dict[str, str]]:
    with open(corpus.tasks / f"{prefix}-{split}.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


@pytest.mark.parametrize("prefix", COLUMNS)
def test_task_files_have_the_format_and_sizes(corpus, prefix):
    task, columns = COLUMNS[prefix]
    seen = set()
    for split, count in ROWS[task].items():
        rows = read(corpus, prefix, split)
        expected = columns[:-1] if split == "test-student" else columns
        assert list(rows[0]) == ["", "id", *expected]
        assert len(rows) == count
        texts = {tuple(row[column] for column in columns[:-1]) for row in rows}
        assert len(texts) == count and not texts & seen  # no dev or test row was seen in training
        seen |= texts
        assert all(re.fullmatch("[0-9a-f]{25}", row["id"]) for row in rows)


def test_labels_fill_their_ranges(corpus):
    sentiments = [int(row["sentiment"]) for row in read(corpus, "ids-sst", "train")]
    assert min(np.bincount(sentiments, minlength=5)) > 200 and max(sentiments) == 4
    assert 0.4 < np.mean([float(row["is_duplicate"]) for row in read(corpus, "quora", "train")]) < 0.6
    similarities = [float(row["similarity"]) for row in read(corpus, "sts", "train")]
    assert min(similarities) == 0 and max(similarities) == 5 and np.std(similarities) > 1


def test_same_bytes_in_another_process(corpus, tmp_path):
    code = "import sys; from mtfast.data.demo import write_demo_corpus; write_demo_corpus(sys.argv[1])"
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    root = Path(__file__).parent.parent
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, env=environment, cwd=root)
    files = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file())
    assert len(files) == 14
    for file in files:
        assert (tmp_path / file).read_bytes() == (corpus.tasks / file).read_bytes(), file


def test_what_is_there_stays_and_what_was_changed_is_written_again(tmp_path):
    corpus = write_demo_corpus(tmp_path)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    before = {path: (path.read_bytes(), path.stat().st_ino) for path in files}
    changed, gone = corpus.bert / "config.json", corpus.reviews / "train.parquet"
    changed.write_text("{}")
    gone.unlink()
    write_demo_corpus(tmp_path)
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == set(files)
    for path, (content, number) in before.items():
        assert path.read_bytes() == content
        assert path in (changed, gone) or path.stat().st_ino == number


def test_reviews_are_in_the_hubs_layout(corpus):
    table = pyarrow.parquet.read_table(corpus.reviews / "train.parquet")
    assert table.column_names == ["text", "label"] and table.num_rows == 300
    assert str(table.schema.field("label").type) == "int64"
    assert set(table["label"].to_pylist()) == {0, 1}
    assert all(len(re.findall(r"[.!?]", text)) >= 5 for text in table["text"].to_pylist())


def test_tokenizer_and_config_fit_the_corpus(corpus):
    tokenizer = BertTokenizerFast.from_pretrained(corpus.bert)
    config = BertConfig.from_pretrained(corpus.bert)
    texts = pyarrow.parquet.read_table(corpus.reviews / "train.parquet")["text"].to_pylist()
    for prefix, (_, columns) in COLUMNS.items():
        for row in read(corpus, prefix, "train"):
            texts += [row[column] for column in columns[:-1]]
    pieces = [piece for text in texts for piece in tokenizer.tokenize(text)]
    assert tokenizer.unk_token not in pieces
    assert any(piece.startswith("##") for piece in pieces)
    assert len(tokenizer) == config.vocab_size
    assert tokenizer.pad_token_id == config.pad_token_id
    assert json.loads((corpus.bert / "config.json").read_text())["architectures"] == ["BertForPreTraining"]


def test_sentiment_can_be_learned_from_words(corpus):
    """Ridge regression on a bag of words and word pairs beats chance (0.2) by far."""

    def features(rows):
        bags = np.zeros((len(rows), len(vocabulary) + 1))
        bags[:, -1] = 1
        for row, terms in enumerate(rows):
            bags[row, [vocabulary[term] for term in terms if term in vocabulary]] = 1
        return bags

    def terms_of(row):
        words = re.findall(r"\w+", row["sentence"].lower())
        return {*words, *itertools.pairwise(words)}

    train, dev = read(corpus, "ids-sst", "train"), read(corpus, "ids-sst", "dev")
    vocabulary = {term: i for i, term in enumerate(sorted({t for r in train for t in terms_of(r)}, key=str))}
    x, y = features([terms_of(row) for row in train]), np.array([float(row["sentiment"]) for row in train])
    weights = np.linalg.solve(x.T @ x + np.eye(x.shape[1]), x.T @ y)
    guess = np.clip(np.rint(features([terms_of(row) for row in dev]) @ weights), 0, 4)
    assert np.mean(guess == [float(row["sentiment"]) for row in dev]) > 0.5
