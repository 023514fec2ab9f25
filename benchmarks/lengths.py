"""Lengths of the real data's sequences: counts them once, and draws the benchmarks' batches from the counts.

    python -m benchmarks lengths --data DIR --checkpoint DIR

Writes benchmarks/lengths.json: how many sequences of each length there are, in word pieces with [CLS] and
[SEP], read and cut as training does: Quora questions, SST sentences and STS sentences of the training splits
(at most 128) and pre-training samples `[CLS] A [SEP] B [SEP]` of IMDb reviews (at most 512).
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

HISTOGRAMS = Path(__file__).parent / "lengths.json"
STEP = 160  # examples of a fine-tuning step
# Examples of each task: "mixture" has them as the full data does (CS 224N's Quora training file has 141,506
# pairs), "mixture-16k" with the 16,000 pairs that stage benchmarks here have. A pair is two sequences.
MIXTURES = {
    "mixture": {"sst": 8_544, "quora": 141_506, "sts": 6_040},
    "mixture-16k": {"sst": 8_544, "quora": 16_000, "sts": 6_040},
}
SEQUENCES = {"sst": 1, "quora": 2, "sts": 2, "imdb": 1}
FIXED = ("32", "64", "128", "256", "512")
DISTRIBUTIONS = (*SEQUENCES, *MIXTURES, *FIXED)


@functools.cache
def histograms(path: Path = HISTOGRAMS) -> dict[str, dict[int, int]]:
    """How many sequences of each length there are, by source."""
    counts = json.loads(path.read_text(encoding="utf-8"))
    return {name: {int(k): v for k, v in counts[name].items()} for name in SEQUENCES}


def draw_examples(distribution: str, examples: int, seed: int = 0) -> list[int]:
    """Lengths of so many examples' sequences, in random order; a mixture's tasks are in proportion."""
    if distribution.isdigit():
        return [int(distribution)] * examples
    random = np.random.default_rng([seed, DISTRIBUTIONS.index(distribution)])
    shares = proportional(MIXTURES.get(distribution, {distribution: 1}), examples)
    lengths = []
    for name, count in shares.items():
        counts = histograms()[name]
        weights = np.array(list(counts.values())) / sum(counts.values())
        lengths.append(random.choice(list(counts), count * SEQUENCES[name], p=weights))
    return random.permutation(np.concatenate(lengths)).tolist()


def draw_tokens(distribution: str, tokens: int) -> list[int]:
    """Lengths of sequences that hold so many tokens, step after step of examples; the last is cut to fit."""
    lengths: list[int] = []
    step = 0
    while sum(lengths) < tokens:
        lengths += draw_examples(distribution, STEP, seed=step)
        step += 1
    while (excess := sum(lengths) - tokens) >= lengths[-1]:
        lengths.pop()
    lengths[-1] -= excess
    return lengths


def proportional(sizes: Mapping[str, int], total: int) -> dict[str, int]:
    """`total` shared out in proportion to the sizes; what rounding leaves goes to the largest remainders."""
    exact = {name: total * size / sum(sizes.values()) for name, size in sizes.items()}
    shares = {name: int(share) for name, share in exact.items()}
    left = total - sum(shares.values())
    for name in sorted(exact, key=lambda name: shares[name] - exact[name])[:left]:
        shares[name] += 1
    return shares


def main(argv: list[str]) -> None:
    """Count the lengths and write them."""
    # What reads and tokenizes is not installed wherever kernels are measured.
    from benchmarks.stage_setup import load_tables, parser_of, recipe
    from mtfast.data.reviews import build_samples, read_reviews
    from mtfast.models.checkpoint import load_tokenizer

    parser = parser_of("lengths", "counts the lengths of the real data's sequences")
    options = parser.parse_args(argv)
    config = recipe(options.checkpoint)
    tables = load_tables(options.data, config, "train")
    samples = build_samples(
        read_reviews(Path(options.data) / "imdb"),
        load_tokenizer(options.checkpoint),
        max_length=config.data.review_max_length,
        seed=config.seed,
    )
    lengths = {task: table.sequences.lengths for task, table in tables.items()}
    write_histograms({**lengths, "imdb": samples.lengths}, HISTOGRAMS)
    print(f"written to {HISTOGRAMS}")


def write_histograms(lengths: Mapping[str, np.ndarray], path: Path) -> None:
    """Write how often each length occurs, one source a line, and say what there is."""
    lines = []
    for name in SEQUENCES:
        values, counts = np.unique(lengths[name], return_counts=True)
        mean = lengths[name].mean()
        print(f"{name:6} {counts.sum():8,} sequences, {mean:6.1f} word pieces, at most {values[-1]}")
        counted = dict(zip(map(str, values), counts.tolist(), strict=True))
        lines.append(f"{json.dumps(name)}: {json.dumps(counted, separators=(',', ':'))}")
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
