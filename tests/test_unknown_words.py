"""Tokenizers that do not fit: without files, another model's, or one that knows too few of the words."""

import json
import shutil
from dataclasses import replace

import pyarrow
import pyarrow.parquet
import pytest
from paper_tables import read_paper_task
from small_tokenizer import small_tokenizer

from mtfast.commands import prepare
from mtfast.config import ConfigError, RunConfig
from mtfast.data.demo import write_demo_corpus
from mtfast.data.rows import DataError
from mtfast.data.tokens import tokenize_task
from mtfast.models.checkpoint import CheckpointError, load_bert_config, load_tokenizer
from mtfast.recipes import PAPER_TASKS, RECIPES
from mtfast.training.inputs import load_reviews, load_task


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_demo_corpus(tmp_path_factory.mktemp("demo"))


@pytest.fixture
def bert(corpus, tmp_path):
    return shutil.copytree(corpus.bert, tmp_path / "bert")


@pytest.fixture
def config(corpus, bert, tmp_path) -> RunConfig:
    demo = RECIPES["demo"]()
    return replace(
        demo,
        run_dir=str(tmp_path / "run"),
        model=replace(demo.model, checkpoint=str(bert)),
        data=replace(demo.data, tasks=str(corpus.tasks), reviews=str(corpus.reviews)),
    )


@pytest.mark.parametrize("config_left", [False, True])
def test_a_checkpoint_without_tokenizer_files_is_refused(config, bert, config_left):
    for name in ("tokenizer.json", "vocab.txt", *(() if config_left else ("tokenizer_config.json",))):
        (bert / name).unlink()
    with pytest.raises(CheckpointError, match=r"bert has no tokenizer.*") as error:
        load_tokenizer(bert)
    assert "tokenizer.json or vocab.txt" in str(error.value) or "can load" in str(error.value)
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        prepare(config)


def test_a_half_downloaded_checkpoint_of_the_hub_is_refused(bert, tmp_path, monkeypatch):
    snapshot = tmp_path / "hub" / "models--acme--bert" / "snapshots" / "abc"
    (snapshot.parent.parent / "refs").mkdir(parents=True)
    (snapshot.parent.parent / "refs" / "main").write_text("abc")
    snapshot.mkdir(parents=True)
    shutil.copy(bert / "config.json", snapshot)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert load_bert_config("acme/bert").hidden_size == 128
    with pytest.raises(CheckpointError, match="acme/bert has no tokenizer"):
        load_tokenizer("acme/bert")


def test_a_tokenizer_far_smaller_than_the_models_table_is_refused(config, bert):
    large = load_bert_config(bert)
    pieces, large.vocab_size = large.vocab_size, 2 * large.vocab_size
    large.save_pretrained(bert)
    prepare(config)  # half the rows without a word piece
    large.vocab_size += 1
    large.save_pretrained(bert)
    message = (
        rf"tokenizer of .*bert has {pieces} word pieces, its model embeds {2 * pieces + 1}: .*vocab\.txt"
    )
    with pytest.raises(ConfigError, match=message):
        prepare(config)


def write_sst(tmp_path, sentences):
    rows = [json.dumps({"sentence": sentence, "label": 1}) + "\n" for sentence in sentences]
    for split in ("train", "dev"):
        (tmp_path / f"{split}.jsonl").write_text("".join(rows))
    return str(tmp_path)


KNOWN, UNKNOWN = "the film is the", "\u0416 \u0416 \u0416 \u0416"  # four word pieces each


def test_unknown_words_are_counted_also_in_cached_arrays(tmp_path):
    source = write_sst(tmp_path, [KNOWN, UNKNOWN, KNOWN])
    for _ in range(2):
        table = tokenize_task(
            read_paper_task("sst", source), small_tokenizer(), max_length=8, cache_dir=tmp_path / "c"
        )
        assert (table.sequences.unknown, table.sequences.word_pieces) == (4, 12)
    tokenizer = small_tokenizer()
    tokenizer.unk_token = None
    assert tokenize_task(read_paper_task("sst", source), tokenizer, max_length=8).sequences.unknown == 0


@pytest.mark.parametrize(("unknown", "reported"), [(3, False), (4, True), (80, True), (81, None)])
def test_a_tasks_unknown_words_are_reported_and_too_many_refused(config, tmp_path, capsys, unknown, reported):
    source = write_sst(tmp_path, [KNOWN] * (100 - unknown) + [UNKNOWN] * unknown)
    config = replace(config, tasks=config.tasks | {"sst": replace(PAPER_TASKS["sst"], source=source)})
    if reported is None:
        message = (
            rf"{tmp_path} \(sst train\): 324 of 400 word pieces \(81%\) are \[UNK\]; the tokenizer is not"
        )
        with pytest.raises(DataError, match=message):
            prepare(config)
        return
    for time in range(2):  # the second time from the cache
        prepare(config)
        said = f", {4 * unknown} of 400 word pieces ({unknown}%) are [UNK]" if reported else ""
        assert time or f"sst dev: 100 rows read, 100 used, 0 skipped{said}\n" in capsys.readouterr().out
        data = json.loads((config.path / "summary.json").read_text())["data"]
        assert data["sst-dev"].get("unknown") == (4 * unknown if reported else None)
        assert data["sst-dev"].get("word_pieces") == (400 if reported else None)


def test_reviews_unknown_words_are_reported_and_too_many_refused(config, tmp_path, capsys):
    def reviews(unknown):
        texts = [f"{KNOWN}. {KNOWN}."] * (10 - unknown) + [
            f"{UNKNOWN} {UNKNOWN}. {UNKNOWN} {UNKNOWN}."
        ] * unknown
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "reviews.parquet")
        return replace(config.data, reviews=str(tmp_path / "reviews.parquet"), cache_dir=str(tmp_path / "c"))

    load_reviews(reviews(1), small_tokenizer(), config.seed)
    assert "10 samples, 16 of 108 word pieces (15%) are [UNK]\n" in capsys.readouterr().out
    with pytest.raises(DataError, match=r"reviews\.parquet \(reviews\): 160 of 180 word pieces \(89%\) are"):
        load_reviews(reviews(10), small_tokenizer(), config.seed)


def test_the_demo_knows_its_words(config):
    tokenizer = load_tokenizer(config.model.checkpoint)
    table = load_task("sst", config.tasks["sst"], config.data, tokenizer, "train")
    assert table.sequences.unknown == 0 < table.sequences.word_pieces
