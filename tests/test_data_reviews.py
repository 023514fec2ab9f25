"""Pre-training samples: whose sentences they hold, how many follow, and what happens to odd reviews."""

import json

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import sentencex
import torch
from small_tokenizer import small_tokenizer
from transformers import AutoTokenizer

from mtfast.data import delimited, files
from mtfast.data.packing import pack_reviews
from mtfast.data.reviews import ReviewTable, build_samples, read_reviews
from mtfast.data.rows import DataError, Record, RowAccount
from mtfast.data.sampler import plan_reviews
from mtfast.ops import mask_tokens

CLS, SEP = 2, 3


def table_of(*texts: str) -> ReviewTable:
    lines = [("here", line) for line in range(1, len(texts) + 1)]
    return ReviewTable("here", list(texts), lines, RowAccount(len(texts), len(texts)))


def numbered_reviews(count: int, sentences: int = 6) -> ReviewTable:
    """Review r consists of the sentences `Review r sentence s .`, all different."""
    return table_of(
        *(" ".join(f"Review {r}x sentence {s}y." for s in range(sentences)) for r in range(count))
    )


def tokens_of(samples, index):
    """A sample's token ids, and where B begins in them."""
    sequences = samples.sequences
    tokens = sequences.tokens[sequences.offsets[index] : sequences.offsets[index + 1]]
    return tokens.tolist(), int(sequences.segment_b_start[index])


def segments(samples, index):
    """Token ids of A and of B of a sample, checked for their frame."""
    tokens, second = tokens_of(samples, index)
    assert tokens[0] == CLS and tokens[second - 1] == SEP and tokens[-1] == SEP
    a, b = tokens[1 : second - 1], tokens[second:-1]
    assert a and b and CLS not in a + b and SEP not in a + b
    return a, b


def pieces(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_b_follows_a_in_half_of_the_samples_and_is_from_another_review_in_the_other():
    tokenizer = small_tokenizer()
    reviews = numbered_reviews(40)
    samples = build_samples(reviews, tokenizer, max_length=512, seed=1)
    assert len(samples) == 40 and samples.nsp_labels.sum() == 20
    whole = [pieces(tokenizer, text) for text in reviews.texts]
    for index in range(len(samples)):
        a, b = segments(samples, index)
        own = whole[samples.reviews[index]]
        assert own[: len(a)] == a
        if samples.nsp_labels[index] == 0:
            assert a + b == own
        else:
            owners = [r for r, text in enumerate(whole) if text[-len(b) :] == b]
            assert len(owners) == 1 and owners[0] != samples.reviews[index]


@pytest.mark.parametrize("sentences", [9, 60])
def test_every_sentence_is_used_exactly_once(sentences):
    tokenizer = small_tokenizer()
    reviews = numbered_reviews(30, sentences)
    samples = build_samples(reviews, tokenizer, max_length=512, seed=2)
    assert (len(samples) > 30) == (sentences == 60)  # more than one sample a review
    found = [piece for i in range(len(samples)) for part in segments(samples, i) for piece in part]
    expected = [piece for text in reviews.texts for piece in pieces(tokenizer, text)]
    lost = len(expected) - len(found)
    assert (
        sorted(found) == sorted(expected)
        if samples.sequences.truncated == 0
        else 0 < lost < len(expected) / 10
    )
    assert sentences == 60 or samples.sequences.truncated == 0


def test_a_run_does_not_end_in_a_single_sentence_if_the_one_before_can_spare_one():
    tokenizer = small_tokenizer()
    reviews = table_of(
        *(" ".join(f"{'Good ' * 18}{word}." for word in ("film", "play", "is", "bad")) for _ in range(10))
    )
    samples = build_samples(reviews, tokenizer, max_length=3 + 3 * 20, seed=0)
    assert len(samples) == 20 and samples.sequences.truncated == 0
    assert {len(part) for index in range(20) for part in segments(samples, index)} == {20}  # 2 + 2, not 3 + 1
    assert samples.nsp_labels.sum() == 10


@pytest.mark.parametrize("room", [40, 41, 59, 60, 200])
def test_a_truncated_review_gives_one_sample_of_the_sentences_that_fit(room):
    """Sentences of 20 word pieces, as many of them as fit; a review of two keeps both of them."""
    tokenizer = small_tokenizer()
    words = ("film", "play", "is", "bad")
    texts = [" ".join(f"{'Good ' * 18}{word}." for word in words[:n]) for n in (4, 3, 2) for _ in range(4)]
    samples = build_samples(table_of(*texts), tokenizer, max_length=3 + room, samples="truncate", seed=0)
    assert samples.reviews.tolist() == list(range(12)) and samples.nsp_labels.sum() == 6
    fitting = [min(n, room // 20) for n in (4, 3, 2) for _ in range(4)]
    whole = [pieces(tokenizer, text)[: 20 * n] for text, n in zip(texts, fitting, strict=True)]
    for index in np.flatnonzero(samples.nsp_labels == 0):
        a, b = segments(samples, index)
        assert a + b == whole[index]
    if not samples.sequences.truncated:  # exchanged B's may be longer than those they stand for
        assert samples.candidates.sum() == sum(map(len, whole))
    assert samples.account.truncated_reviews == sum(n > room // 20 for n in (4, 3, 2) for _ in range(4))
    said = f"{samples.account.truncated_reviews} reviews cut to the first sentences that fit"
    assert (said in samples.account.summary()) == (room < 80)
    both = build_samples(table_of(*texts), tokenizer, max_length=3 + room, seed=0)
    assert both.account.truncated_reviews == 0 and (len(both) > 12) == (room < 80)


def test_samples_follow_from_the_seed_alone():
    reviews = numbered_reviews(25)
    first, again, other = (
        build_samples(reviews, small_tokenizer(), max_length=512, seed=seed) for seed in (3, 3, 4)
    )
    np.testing.assert_array_equal(first.sequences.tokens, again.sequences.tokens)
    np.testing.assert_array_equal(first.nsp_labels, again.nsp_labels)
    assert first.sequences.tokens.tolist() != other.sequences.tokens.tolist()
    assert first.nsp_labels.tolist() != other.nsp_labels.tolist()


def test_reviews_of_one_sentence_and_of_none_are_handled_and_counted():
    tokenizer = small_tokenizer()
    texts = [*numbered_reviews(10).texts, "A good film", "Bad.", "\u0007"]  # the last has no word piece
    samples = build_samples(table_of(*texts), tokenizer, max_length=256, seed=0)
    account = samples.account
    assert account.single_sentence_reviews == 2
    assert (account.read, account.used, len(account.skipped)) == (13, 12, 1)
    assert (account.skipped[0].line, account.skipped[0].reason) == (13, "no word pieces in it")
    assert set(samples.reviews.tolist()) == set(range(12))
    for review in (10, 11):
        [index] = np.flatnonzero(samples.reviews == review)
        a, _ = segments(samples, index)
        assert a == pieces(tokenizer, texts[review]) and samples.nsp_labels[index] == 1
    assert samples.nsp_labels.sum() == len(samples) // 2
    assert "2 reviews of one sentence" in account.summary()
    assert "here:13: no word pieces in it" in account.summary()
    with pytest.raises(DataError, match=r"here:13: no word pieces in it \(strict"):
        build_samples(table_of(*texts), tokenizer, max_length=256, seed=0, strict=True)


@pytest.mark.parametrize(
    "texts", [["One two. Three four.", "Five."], ["One.", "Two.", "Three."], ["A. B.", "C. D."]]
)
def test_very_small_corpora(texts):
    samples = build_samples(table_of(*texts), small_tokenizer(), max_length=64, seed=0)
    assert len(samples) == len(texts)
    tokenizer = small_tokenizer()
    for index in range(len(samples)):
        a, b = segments(samples, index)
        own = pieces(tokenizer, texts[samples.reviews[index]])
        if samples.nsp_labels[index]:
            others = [pieces(tokenizer, text) for r, text in enumerate(texts) if r != samples.reviews[index]]
            assert any(other[-len(b) :] == b for other in others)
        else:
            assert a + b == own


def test_one_review_is_not_enough():
    with pytest.raises(DataError, match="1 usable review; next-sentence prediction takes B from another"):
        build_samples(table_of("One. Two."), small_tokenizer(), seed=0)
    with pytest.raises(DataError, match="0 usable review"):
        build_samples(table_of("\u0007", "\u0007"), small_tokenizer(), seed=0)


def test_a_sentence_of_5000_words_is_cut_into_runs_and_none_of_it_is_lost():
    tokenizer = small_tokenizer()
    reviews = table_of("play " * 5000, *numbered_reviews(60).texts)
    samples = build_samples(reviews, tokenizer, max_length=128, seed=0)
    assert samples.account.long_sentences == 1
    assert samples.lengths.max() <= 128
    # No run is longer than half of what fits, so no sample has to lose any of it.
    [play] = pieces(tokenizer, "play")
    assert np.count_nonzero(samples.sequences.tokens == play) >= 5000 - samples.sequences.truncated * 64
    assert np.count_nonzero(samples.reviews == 0) >= 5000 / 125


def test_real_reviews_each_used_half_following_and_at_most_512_tokens(data_dir, checkpoint_dir):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint_dir)
    reviews = read_reviews(data_dir / "imdb" / "train.parquet", limit=300)
    samples = build_samples(reviews, tokenizer, max_length=512, seed=7)
    assert len(reviews) == 300 and set(samples.reviews.tolist()) == set(range(300))
    assert abs(samples.nsp_labels.mean() - 0.5) <= 0.5 / len(samples)
    assert samples.lengths.max() <= 512
    special = set(tokenizer.all_special_ids)
    vocabulary = tokenizer.get_vocab()
    cls, sep = vocabulary["[CLS]"], vocabulary["[SEP]"]
    ends = [
        [pieces(tokenizer, sentence)[-1:] for sentence in sentencex.segment("en", text)]
        for text in reviews.texts
    ]
    following = 0
    for index in range(len(samples)):
        tokens, second = tokens_of(samples, index)
        assert tokens[0] == cls
        assert [i for i, token in enumerate(tokens) if token == sep] == [second - 1, len(tokens) - 1]
        assert samples.candidates[index] == sum(token not in special for token in tokens)
        if samples.nsp_labels[index] == 0:
            own = pieces(tokenizer, reviews.texts[samples.reviews[index]])
            body = tokens[1 : second - 1] + tokens[second:-1]
            text, part = (" ".join(map(str, ids)) for ids in (own, body))
            following += f" {part} " in f" {text} "
            assert [tokens[second - 2]] in ends[samples.reviews[index]]  # A ends with a sentence
    # Word pieces of a whole review can differ from those of its sentences only where they meet.
    assert following >= 0.99 * np.count_nonzero(samples.nsp_labels == 0)


def test_line_break_tags_are_cleaned_and_empty_reviews_counted(tmp_path):
    texts = ["One.<br /><br />Two.", "Three<BR>four", "", None, " <br /> ", "Five. Six."]
    path = tmp_path / "train.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": texts, "label": [0] * 6}), path)
    reviews = read_reviews(path)
    assert reviews.texts == ["One.\n\nTwo.", "Three\nfour", "Five. Six."]
    assert (reviews.account.read, reviews.account.used) == (6, 3)
    with pytest.raises(DataError, match=r"train\.parquet:3: empty text \(strict"):
        read_reviews(path, strict=True)
    assert [(row.file, row.line, row.reason) for row in reviews.account.skipped] == [
        (str(path), line, "empty text") for line in (3, 4, 5)
    ]


def test_a_review_without_word_pieces_is_named_where_it_stands(tmp_path):
    path = tmp_path / "reviews.jsonl"
    path.write_text('{"text": ""}\n\n{"text": "One. Two."}\n{"text": "\\u0007"}\n{"text": "Three. Four."}\n')
    account = build_samples(read_reviews(path), small_tokenizer(), max_length=64, seed=0).account
    assert [(row.file, row.line) for row in account.skipped] == [(str(path), 1), (str(path), 4)]
    assert (account.read, account.used) == (4, 2)


def test_the_layout_of_the_hubs_imdb_is_read(tmp_path):
    (tmp_path / "README.md").write_text("---\n")
    folder = tmp_path / "plain_text"
    folder.mkdir()
    for split in ("train", "test", "unsupervised"):
        rows = {"text": [f"{split}. One."], "label": [-1]}
        pyarrow.parquet.write_table(pyarrow.table(rows), folder / f"{split}-00000-of-00001.parquet")
    assert read_reviews(tmp_path).texts == ["test. One.", "train. One.", "unsupervised. One."]
    assert read_reviews(folder).texts == read_reviews(tmp_path).texts


def test_every_file_or_split_of_a_source_is_read_and_a_limit_is_spread_over_it(tmp_path):
    parts = {split: {"text": [f"{split} {i}." for i in range(10)]} for split in ("train", "unsupervised")}
    for split, columns in parts.items():
        pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / f"{split}.parquet")
    assert len(read_reviews(tmp_path)) == 20
    assert read_reviews(tmp_path, limit=4).texts == [
        "train 0.", "train 5.", "unsupervised 0.", "unsupervised 5.",
    ]  # fmt: skip
    (tmp_path / "dataset_infos.json").write_text("{}")  # lies beside the data in snapshots of the hub
    assert len(read_reviews(tmp_path)) == 20
    saved = datasets.DatasetDict({name: datasets.Dataset.from_dict(part) for name, part in parts.items()})
    saved.save_to_disk(str(tmp_path / "saved"))
    assert read_reviews(tmp_path / "saved").texts == read_reviews(tmp_path).texts


def write_reviews(path, texts):
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    elif path.suffix:
        path.write_text("".join(f"{line}\n" for line in ("text", *texts)))
    else:
        datasets.Dataset.from_dict({"text": texts}).save_to_disk(str(path))


@pytest.mark.parametrize("name", ["reviews.parquet", "reviews.jsonl", "reviews.csv", "saved"])
def test_no_rows_beyond_the_limit_are_held(name, tmp_path, monkeypatch):
    texts = [f"Review number {i}." for i in range(9001)]  # of Parquet more than is decoded at once
    write_reviews(tmp_path / name, texts)
    whole = read_reviews(tmp_path / name)
    made = []

    class Counted(Record):
        def __init__(self, *values) -> None:
            super().__init__(*values)
            made.append(self.line)

    for module in (files, delimited):
        monkeypatch.setattr(module, "Record", Counted)
    reviews = read_reviews(tmp_path / name, limit=7)
    chosen = [i * 9001 // 7 for i in range(7)]
    assert reviews.texts == [texts[i] for i in chosen]
    assert reviews.lines == [whole.lines[i] for i in chosen]
    assert (reviews.account.read, reviews.account.used) == (7, 7)
    assert made == [line for _, line in reviews.lines]


def test_a_limit_counts_the_rows_that_cannot_be_used_and_keeps_the_notes(tmp_path):
    (tmp_path / "a.csv").write_text('text,label\n"One\ntwo.",0\n,0\nThree.,0\n')
    (tmp_path / "b.jsonl").write_text('{"text": "Four."}\n\n{"label": 1}\n{"text": "Five."}\n')
    reviews = read_reviews(tmp_path, limit=3)  # of six: the first, third and fifth
    assert reviews.texts == ["One\ntwo.", "Three."] and reviews.account.read == 3
    assert [(row.line, row.reason) for row in reviews.account.skipped] == [(3, "empty text")]
    assert reviews.account.notes == read_reviews(tmp_path).account.notes and len(reviews.account.notes) == 2
    assert read_reviews(tmp_path, limit=7).texts == read_reviews(tmp_path).texts
    (tmp_path / "b.jsonl").write_text('{"body": "Four."}\n' * 3)
    with pytest.raises(DataError, match=r"b\.jsonl: no column 'text'"):
        read_reviews(tmp_path, limit=1)  # which is in the other file


def test_wrong_sources_of_reviews(tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.parquet: no such file"):
        read_reviews(tmp_path / "nowhere.parquet")
    with pytest.raises(DataError, match="no file with one of the suffixes"):
        read_reviews(tmp_path)
    path = tmp_path / "train.jsonl"
    path.write_text('{"body": "x"}\n')
    with pytest.raises(DataError, match=r"no column 'text' \(or review, sentence\); columns found: 'body'"):
        read_reviews(path)
    path.write_text('{"text": ""}\n')
    with pytest.raises(DataError, match="no usable review; 1 rows read, 0 used"):
        read_reviews(path)
    with pytest.raises(ValueError, match="limit must be at least 1, found 0"):
        read_reviews(path, limit=0)


def test_samples_are_cached_by_seed_and_length(tmp_path):
    reviews = numbered_reviews(12)
    settings = {"max_length": 128, "seed": 1, "cache_dir": tmp_path}
    first = build_samples(reviews, small_tokenizer(), **settings)
    again = build_samples(reviews, small_tokenizer(), **settings)
    assert len(list(tmp_path.glob("*.arrow"))) == 1 and not again.sequences.tokens.flags.writeable
    for name in ("tokens", "offsets", "segment_b_start"):
        np.testing.assert_array_equal(getattr(first.sequences, name), getattr(again.sequences, name))
    for name in ("nsp_labels", "candidates", "reviews"):
        np.testing.assert_array_equal(getattr(first, name), getattr(again, name))
    assert first.account == again.account
    build_samples(reviews, small_tokenizer(), **settings | {"seed": 2})
    build_samples(reviews, small_tokenizer(), **settings | {"max_length": 64})
    build_samples(reviews, small_tokenizer(), **settings | {"samples": "truncate"})
    assert len(list(tmp_path.glob("*.arrow"))) == 4


def test_packed_samples_know_their_corpus_positions_and_masked_counts():
    samples = build_samples(numbered_reviews(20), small_tokenizer(), max_length=128, seed=1)
    rows = np.array([7, 2, 11])
    weights = {"mlm_weight": 0.25, "nsp_weight": 0.5}
    batch = pack_reviews(samples, rows, mlm_probability=0.15, **weights, mask_seed=2**64 - 3)
    offsets = batch.cu_seqlens.tolist()
    assert len(batch.input_ids) == batch.tokens == samples.lengths[rows].sum()
    expected = 0
    for index, row in enumerate(rows.tolist()):
        part = slice(offsets[index], offsets[index + 1])
        tokens, second = tokens_of(samples, row)
        length = len(tokens)
        assert batch.input_ids[part].tolist() == tokens
        assert batch.positions[part].tolist() == list(range(row * 128, row * 128 + length))
        assert batch.position_ids[part].tolist() == list(range(length))
        assert batch.token_type_ids[part].tolist() == [0] * second + [1] * (length - second)
        candidates = sum(token > 4 for token in tokens)
        expected += max(1, int(0.15 * candidates + 0.5))
    assert batch.masked == expected
    assert (batch.mlm_weight.tolist(), batch.nsp_weights.tolist()) == ([0.25], [0.5] * 3)
    assert batch.mask_seed.tolist() == [-3] and batch.size == 3
    assert batch.nsp_labels.tolist() == samples.nsp_labels[rows].tolist()
    assert (batch.positions.dtype, batch.nsp_labels.dtype) == (torch.int64, torch.int64)
    assert len(set(batch.positions.tolist())) == len(batch.positions)
    assert set(batch.encoder_inputs()) <= set(vars(batch))
    empty = pack_reviews(samples, rows[:0], mlm_probability=0.15, **weights)
    assert (empty.tokens, empty.masked, len(empty.input_ids)) == (0, 0, 1)


def test_masked_counts_are_what_exact_masking_chooses():
    tokenizer = small_tokenizer()
    samples = build_samples(numbered_reviews(30, sentences=5), tokenizer, max_length=200, seed=3)
    for step in plan_reviews(samples.lengths, samples.masked_counts(0.15), batch_size=8, seed=0, epoch=0):
        [rows] = step.micro_batches
        batch, filled = (
            pack_reviews(samples, rows, mlm_probability=0.15, mlm_weight=1.0, nsp_weight=1.0, room=room)
            for room in (None, 9)
        )
        masked = mask_tokens(
            batch.input_ids, special_ids=samples.sequences.special.all, mask_token_id=tokenizer.mask_token_id,
            vocab_size=len(tokenizer), seed=1, positions=batch.positions, cu_seqlens=batch.cu_seqlens,
            mlm_probability=0.15, strategy="exact",
        )  # fmt: skip
        assert int((masked.labels != -100).sum()) == batch.masked == step.step_masked <= filled.masked
