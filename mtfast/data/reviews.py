"""Pre-training samples from movie reviews: sentence pairs, half of them from two different reviews."""

import itertools
import re
import zlib
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import sentencex
import torch

from mtfast.data.cache import Arrays, Notes, cache_key, cached
from mtfast.data.records import read_every_split
from mtfast.data.rows import DataError, RowAccount, SkippedRow, UnusableRowError
from mtfast.data.tokens import (
    Sequences,
    SpecialTokens,
    assemble_pairs,
    check_max_length,
    offsets_of,
    tokenize_texts,
)
from mtfast.ops import exact_count

SamplesOfReview = Literal["runs", "truncate"]

_TEXT_COLUMNS = ("text", "review", "sentence")
_LINE_BREAK = re.compile(r"<br\s*/?>", re.IGNORECASE)


@dataclass(frozen=True)
class ReviewTable:
    """The usable reviews of a source, cleaned of `<br />` tags, in input order.

    lines: the file and the line (or row number) of each.
    """

    source: str
    texts: list[str]
    lines: list[tuple[str, int]]
    account: RowAccount

    def __len__(self) -> int:
        return len(self.texts)


@dataclass(frozen=True, kw_only=True)
class ReviewAccount(RowAccount):
    """The account of the reviews' rows, and of the samples made of them.

    samples: their number.
    single_sentence_reviews: reviews of one sentence, whose B always is from another review.
    long_sentences: sentences cut into runs because two of their length do not fit in a sample.
    truncated_reviews: reviews of which only the first sentences are in a sample.
    """

    samples: int
    single_sentence_reviews: int
    long_sentences: int
    truncated_reviews: int

    def summary(self, *facts: str, at_most: int = 10) -> str:
        odd = {
            "reviews of one sentence": self.single_sentence_reviews,
            "long sentences cut into runs": self.long_sentences,
            "reviews cut to the first sentences that fit": self.truncated_reviews,
        }
        counted = [f"{count:,} {what}" for what, count in odd.items() if count]
        return super().summary(f"{self.samples:,} samples", *counted, *facts, at_most=at_most)


@dataclass(frozen=True)
class ReviewSamples:
    """Pre-training samples `[CLS] A [SEP] B [SEP]`; sample i is sequence i.

    nsp_labels: int64 [samples], 0 where B follows A, 1 where it is from another review.
    candidates: int64 [samples], tokens that may be masked (not special).
    reviews: int64 [samples], the review (index in its table) that A is from.
    """

    sequences: Sequences
    nsp_labels: np.ndarray
    candidates: np.ndarray
    reviews: np.ndarray
    account: ReviewAccount

    def __len__(self) -> int:
        return len(self.nsp_labels)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each sample, int64 [samples]."""
        return self.sequences.lengths

    def masked_counts(self, mlm_probability: float, rows: np.ndarray | slice = slice(None)) -> np.ndarray:
        """Tokens that mask_tokens chooses in each sample (of ``rows``) with its "exact" strategy, int64."""
        return exact_count(torch.tensor(self.candidates[rows], device="cpu"), mlm_probability).numpy()


def read_reviews(source: str | Path, limit: int | None = None, *, strict: bool = False) -> ReviewTable:
    """Reads the reviews of a Parquet/CSV/JSON-lines file, a data set directory or a Hugging Face data set.

    Every split is read. The column is `text`, `review` or `sentence`. ``limit`` keeps that many reviews,
    evenly spaced, since these data sets come sorted by label. Reviews without text are skipped and listed;
    with ``strict`` the first one raises DataError instead.
    Raises DataError for a missing source or column and when no review is left.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, found {limit}")
    texts: list[str] = []
    lines: list[tuple[str, int]] = []
    skipped: list[SkippedRow] = []
    parts = read_every_split(source, limit)
    columns = [part.require(_TEXT_COLUMNS) if part.rows or part.left_out else "" for part in parts]
    rows = [(row, column) for part, column in zip(parts, columns, strict=True) for row in part.rows]
    for row, column in rows:
        try:
            if not (text := _LINE_BREAK.sub("\n", row.text(column)).strip()):
                raise UnusableRowError(f"empty {column}")
        except UnusableRowError as problem:
            skipped.append(SkippedRow(row.file, row.line, str(problem)))
            continue
        texts.append(text)
        lines.append((row.file, row.line))
    _refuse_if_strict(skipped, strict)
    notes = tuple(note for part in parts for note in part.notes)
    account = RowAccount(len(rows), len(texts), skipped, notes)
    if not texts:
        raise DataError(f"{source}: no usable review; {account.summary(at_most=3)}")
    return ReviewTable(str(source), texts, lines, account)


def _refuse_if_strict(skipped: list[SkippedRow], strict: bool) -> None:
    if strict and skipped:
        raise DataError(f"{skipped[0]} (strict: rows are not skipped)")


def build_samples(
    reviews: ReviewTable,
    tokenizer: Any,
    *,
    max_length: int = 512,
    samples: SamplesOfReview = "runs",
    seed: int,
    cache_dir: str | Path | None = None,
    strict: bool = False,
) -> ReviewSamples:
    """Turns reviews into samples `[CLS] A [SEP] B [SEP]` of at most ``max_length`` tokens.

    Each review is split into sentences (sentencex) and the sentences gathered into runs that fit; with
    ``samples`` "truncate" a review has the first such run alone, its other sentences are left out and it is
    counted. A run is cut at a random sentence into A and B. Then half of the samples exchange their B's among
    each other, so that each of them has B from another review while every sentence of the runs stays in use
    once. A run of a single sentence gets a copy of a random sample's B and counts among that half. Everything
    follows from ``seed``.
    With ``cache_dir`` the samples are kept in the Arrow cache. A review without a word piece is skipped and
    listed, or with ``strict`` an error. Raises DataError if fewer than two reviews are left.
    """
    check_max_length(max_length)
    special = SpecialTokens.of(tokenizer)

    def build() -> tuple[Arrays, Notes]:
        return _build(reviews, tokenizer, max_length, samples, seed)

    if cache_dir is None:
        arrays, notes = build()
    else:
        settings = {"max_length": max_length, "samples": samples, "seed": seed, "special": asdict(special)}
        key = cache_key(tokenizer, [reviews.texts], settings)
        arrays, notes = cached(Path(cache_dir), "reviews", key, build)
    lines = [reviews.lines[int(row)] for row in notes["without_pieces"]]
    without_pieces = [SkippedRow(file, line, "no word pieces in it") for file, line in lines]
    _refuse_if_strict(without_pieces, strict)
    skipped = [*reviews.account.skipped, *without_pieces]
    account = ReviewAccount(
        reviews.account.read,
        reviews.account.read - len(skipped),
        skipped,
        reviews.account.notes,
        samples=len(arrays["nsp_labels"]),
        single_sentence_reviews=notes["single"],
        long_sentences=notes["long_sentences"],
        truncated_reviews=notes["truncated_reviews"],
    )
    return ReviewSamples(
        sequences=Sequences.of_arrays(arrays, notes, special, max_length),
        nsp_labels=arrays["nsp_labels"],
        candidates=arrays["candidates"],
        reviews=arrays["reviews"],
        account=account,
    )


@dataclass(frozen=True)
class _Sentences:
    """Sentences as word pieces, none of them empty; the review of each; how many long ones were cut."""

    pieces: Sequences
    review: np.ndarray
    long: int


@dataclass(frozen=True)
class _Runs:
    """Runs of sentences: A is begin to split, B is split to end (empty in a run of one sentence)."""

    begin: np.ndarray
    split: np.ndarray
    end: np.ndarray
    review: np.ndarray


def _build(
    reviews: ReviewTable, tokenizer: Any, max_length: int, samples: SamplesOfReview, seed: int
) -> tuple[Arrays, Notes]:
    random = np.random.default_rng([seed, zlib.crc32(b"next sentence")])
    room = max_length - 3
    sentences = _sentences(reviews.texts, tokenizer, room // 2)
    parts = _first_parts(sentences, room) if samples == "truncate" else _parts(sentences, room)
    runs = _runs(sentences, *parts, random)
    owners = np.unique(runs.review)
    if len(owners) < 2:
        raise DataError(
            f"{reviews.source}: {len(owners)} usable review; next-sentence prediction takes B from another "
            "review and needs at least 2"
        )
    pieces = sentences.pieces
    b_begin, b_end, labels = _second_segments(runs, random)
    a, b = pieces.runs(runs.begin, runs.split), pieces.runs(b_begin, b_end)
    sequences = assemble_pairs(a, b, max_length)
    maskable = ~np.isin(sequences.tokens, sequences.special.all)
    arrays, notes = sequences.arrays()
    arrays["nsp_labels"] = labels
    arrays["candidates"] = np.add.reduceat(maskable.astype(np.int64), sequences.offsets[:-1])
    arrays["reviews"] = runs.review
    sentences_of = np.bincount(sentences.review, minlength=len(reviews))
    notes["single"] = int(np.count_nonzero(sentences_of == 1))
    notes["without_pieces"] = np.flatnonzero(sentences_of == 0).tolist()
    notes["long_sentences"] = sentences.long
    in_runs = np.bincount(runs.review, weights=runs.end - runs.begin, minlength=len(reviews))
    notes["truncated_reviews"] = int(np.count_nonzero(in_runs < sentences_of))
    return arrays, notes


def _sentences(texts: list[str], tokenizer: Any, longest: int) -> _Sentences:
    """The sentences of every review as word pieces; longer ones than ``longest`` become equal runs."""
    split = [sentencex.segment("en", text) for text in texts]
    review = np.repeat(np.arange(len(texts)), [len(sentences) for sentences in split])
    pieces = tokenize_texts(tokenizer, [sentence for sentences in split for sentence in sentences])
    parts = -(-pieces.lengths // longest)  # 0 for a sentence without word pieces
    part = np.arange(parts.sum()) - np.repeat(offsets_of(parts)[:-1], parts)
    counts, of = np.repeat(pieces.lengths, parts), np.repeat(parts, parts)
    lengths = (part + 1) * counts // of - part * counts // of
    cut = replace(pieces, offsets=offsets_of(lengths), segment_b_start=lengths.astype(np.int32))
    return _Sentences(cut, np.repeat(review, parts), int(np.count_nonzero(parts > 1)))


def _parts(sentences: _Sentences, room: int) -> tuple[np.ndarray, np.ndarray]:
    """Where consecutive sentences of one review that fit in ``room`` begin and end, two or more wherever
    possible; all sentences are in them."""
    lengths = sentences.pieces.lengths.tolist()
    begins: list[int] = []
    for first, last in itertools.pairwise(_edges(sentences).tolist()):
        begins.append(first)
        filled = 0
        for index in range(first, last):
            if filled + lengths[index] > room:
                begins.append(index)
                filled = 0
            filled += lengths[index]
        # A last part of one sentence takes another from the part before it, if that keeps two.
        if begins[-1] == last - 1 and begins[-1] > first and begins[-1] - begins[-2] > 2:
            begins[-1] -= 1
    begin = np.asarray(begins, np.int64)
    return begin, np.append(begin[1:], len(lengths))


def _first_parts(sentences: _Sentences, room: int) -> tuple[np.ndarray, np.ndarray]:
    """Where the first sentences of each review that fit in ``room`` begin and end."""
    edges, offsets = _edges(sentences), sentences.pieces.offsets
    begin = edges[:-1]
    fitting = np.searchsorted(offsets, offsets[begin] + room, side="right") - 1
    return begin, np.minimum(fitting, edges[1:])


def _edges(sentences: _Sentences) -> np.ndarray:
    """The first sentence of each review that has one, and the number of all sentences."""
    firsts = np.flatnonzero(np.diff(sentences.review, prepend=-1))
    return np.append(firsts, len(sentences.review)).astype(np.int64)


def _runs(sentences: _Sentences, begin: np.ndarray, end: np.ndarray, random: np.random.Generator) -> _Runs:
    """Parts of reviews, each cut at a random sentence."""
    split = begin + np.maximum(1, 1 + (random.random(len(begin)) * (end - begin - 1)).astype(np.int64))
    return _Runs(begin, split, end, sentences.review[begin].astype(np.int64))


def _second_segments(runs: _Runs, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The sentences that each sample's B begins and ends with, and the next-sentence labels."""
    b_begin, b_end = runs.split.copy(), runs.end.copy()
    single = runs.split == runs.end
    pairs = np.flatnonzero(~single)
    wanted = max(len(single) // 2 - np.count_nonzero(single), 0)
    chosen = random.permutation(pairs)[:wanted]

    # Sorted by (shuffled) review, two samples that are `largest` apart, the most samples of one review, are
    # from different reviews: the chosen ones exchange their B's along that shift, and none is lost.
    shuffled = random.permutation(runs.review.max() + 1)
    chosen = chosen[np.lexsort((chosen, shuffled[runs.review[chosen]]))]
    largest = int(np.bincount(runs.review[chosen]).max(initial=0))
    if len(chosen) >= 2 * largest:
        donors = np.roll(chosen, -largest)
        copied = np.flatnonzero(single)
    else:
        donors = chosen[:0]
        copied = np.concatenate([np.flatnonzero(single), chosen])
        chosen = donors
    b_begin[chosen], b_end[chosen] = runs.split[donors], runs.end[donors]

    # The others copy from any sample but those of their own review, which are consecutive.
    low = np.searchsorted(runs.review, runs.review[copied], "left")
    high = np.searchsorted(runs.review, runs.review[copied], "right")
    donor = (random.random(len(copied)) * (len(single) - (high - low))).astype(np.int64)
    donor += np.where(donor >= low, high - low, 0)
    b_begin[copied] = np.where(single[donor], runs.begin[donor], runs.split[donor])
    b_end[copied] = runs.end[donor]
    labels = np.zeros(len(single), np.int64)
    labels[chosen] = labels[copied] = 1
    return b_begin, b_end, labels
