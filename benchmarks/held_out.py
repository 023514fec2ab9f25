"""Puts labels to the test files of the CS 224N project, from where the project has the texts.

    python -m benchmarks held_out --minbert ../minbert/data --treebank trees/test.txt
        --stsbenchmark stsbenchmark --data data/held-out

The project keeps the labels of its test files to itself. SST's are in the Stanford Sentiment Treebank
(https://nlp.stanford.edu/sentiment, trainDevTestTrees_PTB.zip), whose test file has the same sentences in the
same order. The pairs of STS are in the STS Benchmark (https://ixa2.si.ehu.eus/stswiki), in files that are
split otherwise. For Quora the last 2,000 pairs of the project's dev file are taken, which docs/quality.md
leaves out of training and of dev. Written are ids-sst-test.csv, sts-test.csv and quora-test.csv in --data,
for `mtfast evaluate RUN --split test --data.tasks data/held-out`.
"""

from __future__ import annotations

import argparse
import csv
import re
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

LEAF = re.compile(r"\(\d ([^()]+)\)")
QUORA_BEGIN = 18214  # of the project's dev file: the rows before are docs/quality.md's train and dev


def main(argv: list[str]) -> int:
    """Write the three files."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks held_out",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--minbert", type=Path, required=True, help="directory with the project's files")
    parser.add_argument("--treebank", type=Path, required=True, help="the treebank's test file")
    parser.add_argument(
        "--stsbenchmark", type=Path, required=True, help="directory with the benchmark's files"
    )
    parser.add_argument("--data", type=Path, required=True, help="directory to write to")
    options = parser.parse_args(argv)
    quora = rows_of(options.minbert / "quora-dev.csv")[QUORA_BEGIN:]
    rows = {
        "ids-sst": labelled_sst(rows_of(options.minbert / "ids-sst-test-student.csv"), options.treebank),
        "sts": labelled_sts(rows_of(options.minbert / "sts-test-student.csv"), options.stsbenchmark),
        "quora": [
            {name: row[name] for name in ("id", "sentence1", "sentence2", "is_duplicate")} for row in quora
        ],
    }
    options.data.mkdir(parents=True, exist_ok=True)
    for prefix, of_task in rows.items():
        write(path := options.data / f"{prefix}-test.csv", of_task)
        print(f"written {len(of_task):,} rows to {path}")
    return 0


def labelled_sst(rows: Sequence[dict[str, str]], treebank: Path) -> list[dict[str, str]]:
    """The sentences with the labels that the roots of their trees have."""
    trees = treebank.read_text(encoding="utf-8").splitlines()
    sentences = [" ".join(LEAF.findall(tree)) for tree in trees]
    if sentences != [row["sentence"].strip() for row in rows]:
        raise ValueError(f"{treebank} has not the sentences of the project's test file in their order")
    return [
        {"id": row["id"], "sentence": row["sentence"], "sentiment": tree[1]}
        for row, tree in zip(rows, trees, strict=True)
    ]


def labelled_sts(rows: Sequence[dict[str, str]], benchmark: Path) -> list[dict[str, str]]:
    """The pairs with their scores, the mean of them where a pair is there more than once."""
    scores: dict[tuple[str, str], set[float]] = {}
    for split in ("train", "dev", "test"):
        for line in (benchmark / f"sts-{split}.csv").read_text(encoding="utf-8").splitlines():
            *_, score, first, second = line.split("\t")[:7]
            scores.setdefault((first, second), set()).add(float(score))
    found = []
    for row in rows:
        texts = row["sentence1"], row["sentence2"]
        if texts not in scores:
            raise ValueError(f"{benchmark} has no pair {texts}")
        score = f"{statistics.fmean(scores[texts]):.3f}"
        found.append({"id": row["id"], "sentence1": texts[0], "sentence2": texts[1], "similarity": score})
    return found


def rows_of(path: Path) -> list[dict[str, str]]:
    """The rows of a file of the project."""
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def write(path: Path, rows: Iterable[dict[str, str]]) -> None:
    """A file in the project's format, but for the index."""
    rows = list(rows)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
