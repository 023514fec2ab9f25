"""Token sequences against single calls of the Hugging Face tokenizer; the Arrow cache, stale and torn."""

import itertools
import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow.ipc
import pytest
from paper_tables import read_paper_task, table_of
from small_tokenizer import small_tokenizer
from transformers import AutoTokenizer

from mtfast.data import cache
from mtfast.data.tokens import Sequences, SpecialTokens, TokenizedTask, longest_first, tokenize_task


def sequence(tokenized: TokenizedTask, index: int) -> list[int]:
    sequences = tokenized.sequences
    return sequences.tokens[sequences.offsets[index] : sequences.offsets[index + 1]].tolist()


def types(tokenized: TokenizedTask, index: int) -> list[int]:
    sequences = tokenized.sequences
    length = int(sequences.offsets[index + 1] - sequences.offsets[index])
    return [int(position >= sequences.segment_b_start[index]) for position in range(length)]


@pytest.mark.parametrize("max_length", [128, 20])
@pytest.mark.parametrize(
    ("task", "pair_input"), [("sst", "separate"), ("quora", "separate"), ("sts", "joint"), ("quora", "joint")]
)
def test_real_sentences_equal_single_tokenizer_calls(data_dir, checkpoint_dir, task, pair_input, max_length):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint_dir)
    table = read_paper_task(task, data_dir / "cs224n", "dev", pair_input=pair_input)
    tokenized = tokenize_task(table, tokenizer, max_length=max_length)
    assert len(tokenized) == len(table) and tokenized.ids == table.ids
    np.testing.assert_array_equal(tokenized.labels, table.labels)
    per = tokenized.task.sequences_per_example
    assert per == (2 if task != "sst" and pair_input == "separate" else 1)
    cut = 0
    for row in range(0, len(table), 3):
        texts = [column[row] for column in table.texts]
        calls = [texts] if pair_input == "joint" else [[text] for text in texts]
        encodings = [tokenizer(*call, truncation=True, max_length=max_length) for call in calls]
        assert [sequence(tokenized, row * per + j) for j in range(per)] == [e["input_ids"] for e in encodings]
        assert [types(tokenized, row * per + j) for j in range(per)] == [
            e["token_type_ids"] for e in encodings
        ]
        assert tokenized.lengths[row] == sum(len(e["input_ids"]) for e in encodings)
        cut += sum(len(tokenizer(*call)["input_ids"]) > max_length for call in calls)
    assert (cut > 0) == (max_length == 20)
    everything = sum(
        len(ids) > max_length
        for call in ([table.texts] if pair_input == "joint" else [[column] for column in table.texts])
        for ids in tokenizer(*call)["input_ids"]
    )
    assert tokenized.sequences.truncated == everything


def test_longest_first_is_that_of_hugging_face():
    tokenizer = small_tokenizer()
    for a in range(1, 14):
        for b in range(1, 14):
            for room in (5, 6, 9):
                kept = longest_first(np.array([a]), np.array([b]), room)
                oracle = tokenizer(
                    " ".join(["film"] * a),
                    " ".join(["play"] * b),
                    truncation="longest_first",
                    max_length=room + 3,
                )["input_ids"]
                film, play = tokenizer.convert_tokens_to_ids(["film", "play"])
                assert (kept[0][0], kept[1][0]) == (oracle.count(film), oracle.count(play)), (a, b, room)


def test_a_sentence_of_5000_words_is_cut_and_counted():
    tokenizer = small_tokenizer()
    columns = ["a film .", "play " * 5000], ["good film " * 2500, "bad"]
    separate = tokenize_task(table_of("quora", *columns), tokenizer, max_length=64)
    assert (separate.sequences.truncated, separate.lengths.tolist()) == (2, [5 + 64, 64 + 3])
    cls, sep = tokenizer.cls_token_id, tokenizer.sep_token_id
    play = tokenizer.convert_tokens_to_ids("play")
    assert sequence(separate, 2) == [cls, *[play] * 62, sep]
    joint = tokenize_task(table_of("quora", *columns, pair_input="joint"), tokenizer, max_length=64)
    assert (joint.sequences.truncated, joint.lengths.tolist()) == (2, [64, 64])
    bad = tokenizer.convert_tokens_to_ids("bad")
    assert sequence(joint, 1) == [cls, *[play] * 60, sep, bad, sep]
    assert types(joint, 1) == [0] * 62 + [1] * 2


def test_select_takes_rows_in_the_order_asked():
    table = table_of("quora", ["a", "film", "good film"], ["bad", "play", "the"], labels=[0, 1, 1])
    tokenized = tokenize_task(table, small_tokenizer(), max_length=16)
    part = tokenized.select(np.array([2, 0]))
    assert part.ids == ["x2", "x0"] and part.labels.tolist() == [1, 0]
    assert [sequence(part, i) for i in range(4)] == [sequence(tokenized, i) for i in (4, 5, 0, 1)]
    assert part.lengths.tolist() == tokenized.lengths[[2, 0]].tolist()
    masked = tokenized.select(np.array([False, True, False]))
    assert masked.ids == ["x1"] and sequence(masked, 1) == sequence(tokenized, 3)


def test_runs_join_sequences_as_a_loop_does():
    random = np.random.default_rng(0)
    lengths = random.integers(0, 5, 40)  # some of them empty
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens = random.integers(5, 100, offsets[-1]).astype(np.int32)
    texts = Sequences(tokens, offsets, lengths.astype(np.int32), SpecialTokens.of(small_tokenizer()))
    begin = random.integers(0, 40, 60)
    end = np.minimum(begin + random.integers(0, 6, 60), 40)  # they overlap, and some are empty
    runs = texts.runs(begin, end)
    expected: list[list[int]] = []
    for first, last in zip(begin, end, strict=True):
        joined: list[int] = []
        for index in range(first, last):
            joined += tokens[offsets[index] : offsets[index + 1]].tolist()
        expected.append(joined)
    assert len(runs) == 60 and any(map(len, expected)) and not all(map(len, expected))
    assert [runs.tokens[a:b].tolist() for a, b in itertools.pairwise(runs.offsets)] == expected
    assert runs.segment_b_start.tolist() == runs.lengths.tolist() == [len(joined) for joined in expected]
    assert (runs.tokens.dtype, runs.offsets.dtype, runs.segment_b_start.dtype) == (
        np.int32, np.int64, np.int32,
    )  # fmt: skip
    assert (runs.special, runs.max_length, runs.truncated) == (texts.special, None, 0)


def count_calls(monkeypatch):
    import mtfast.data.tokens as module

    calls = []
    original = module.tokenize_texts
    monkeypatch.setattr(
        module, "tokenize_texts", lambda tokenizer, texts: calls.append(1) or original(tokenizer, texts)
    )
    return calls


def test_the_cache_is_used_for_the_same_tokenizer_data_and_settings_only(tmp_path, monkeypatch, caplog):
    calls = count_calls(monkeypatch)
    table = table_of("sst", ["a good film .", "a film"], labels=[4, 2])

    def made(table=table, tokenizer=None, **settings):
        before = len(calls)
        arguments = {"max_length": 32, "cache_dir": tmp_path} | settings
        result = tokenize_task(table, tokenizer or small_tokenizer(), **arguments)
        return result, len(calls) > before

    first, built = made()
    assert built
    used = small_tokenizer()
    used(["a", "b c"], padding="max_length", truncation=True, max_length=9)  # leaves its settings behind
    again, built = made(tokenizer=used)
    assert not built
    for name in ("tokens", "offsets", "segment_b_start"):
        np.testing.assert_array_equal(getattr(again.sequences, name), getattr(first.sequences, name))
    np.testing.assert_array_equal(again.labels, first.labels)
    flags = again.sequences.tokens.flags
    assert not flags.owndata and not flags.writeable  # a view of the mapped file
    relabelled, built = made(table_of("sst", ["a good film .", "a film"], labels=[0, 1]))
    assert not built and relabelled.labels.tolist() == [0, 1]  # labels are not in the cache
    assert made(max_length=8)[1]
    assert made(tokenizer=small_tokenizer(("good film",)))[1]
    assert made(table_of("sst", ["a good film .", "a films"], labels=[4, 2]))[1]
    assert made(table_of("sst", ["a good film .a", " film"], labels=[4, 2]))[1]
    assert {path.suffix for path in tmp_path.iterdir()} == {".arrow", ".lock"}
    assert not caplog.records


@pytest.mark.parametrize("damage", ["truncated", "empty", "flipped", "foreign", "other key"])
def test_a_stale_or_torn_cache_file_is_rebuilt_with_a_log_line(tmp_path, monkeypatch, caplog, damage):
    table = table_of("sst", ["a good film .", "play " * 300], labels=[4, 2])
    whole = tokenize_task(table, small_tokenizer(), max_length=200, cache_dir=tmp_path)
    [path] = tmp_path.glob("*.arrow")
    expected, raw = whole.sequences.tokens.copy(), path.read_bytes()
    path.unlink()  # the mapping above stays valid
    if damage == "truncated":
        path.write_bytes(raw[: len(raw) // 2])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "flipped":
        at = raw.index(expected[50:60].tobytes())
        path.write_bytes(raw[:at] + b"\x7f" + raw[at + 1 :])
    elif damage == "foreign":
        batch = pyarrow.record_batch({"a": [1]})
        with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_file(sink, batch.schema) as writer:
            writer.write_batch(batch)
    else:
        other = table_of("sst", ["another"], labels=[1])
        tokenize_task(other, small_tokenizer(), max_length=200, cache_dir=tmp_path / "other")
        path.write_bytes(next((tmp_path / "other").glob("*.arrow")).read_bytes())
    calls = count_calls(monkeypatch)
    with caplog.at_level(logging.WARNING):
        again = tokenize_task(table, small_tokenizer(), max_length=200, cache_dir=tmp_path)
    assert calls
    [record] = caplog.records
    assert str(path) in record.getMessage() and "rebuilt" in record.getMessage()
    np.testing.assert_array_equal(again.sequences.tokens, expected)
    once_more = tokenize_task(table, small_tokenizer(), max_length=200, cache_dir=tmp_path)
    np.testing.assert_array_equal(once_more.sequences.tokens, expected)
    assert len(calls) == 1


def test_the_files_used_last_stay_and_older_ones_go(tmp_path, monkeypatch):
    calls = count_calls(monkeypatch)

    def load(max_length):
        before = len(calls)
        table = tokenize_task(
            table_of("sst", ["a good film ."]), small_tokenizer(), max_length=max_length, cache_dir=tmp_path
        )
        time.sleep(0.01)  # file times are that coarse
        return table.sequences.tokens, len(calls) > before

    other = tokenize_task(
        table_of("quora", ["a"], ["b"]), small_tokenizer(), max_length=8, cache_dir=tmp_path
    )
    first, _ = load(8)
    for max_length in range(9, 8 + cache.KEPT):
        load(max_length)
    assert not load(8)[1]  # used again: now 9 is the one not used for longest
    assert load(100)[1] and not load(8)[1] and load(9)[1]
    assert first.tolist() == load(8)[0].tolist()
    assert sorted(path.name.rsplit("-", 1)[0] for path in tmp_path.glob("*.arrow")) == [
        "quora-train", *["sst-train"] * cache.KEPT
    ]  # fmt: skip
    assert sorted(path.name for path in tmp_path.glob("*.lock")) == ["quora-train.lock", "sst-train.lock"]
    assert other.sequences.tokens.tolist()  # nobody touched it


def test_a_build_that_fails_leaves_nothing_behind(tmp_path, monkeypatch):
    import mtfast.data.tokens as module

    def fail(tokenizer, texts):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "tokenize_texts", fail)
    with pytest.raises(KeyboardInterrupt):
        tokenize_task(table_of("sst", ["a"]), small_tokenizer(), max_length=32, cache_dir=tmp_path)
    assert not list(tmp_path.glob("*.arrow")) and not list(tmp_path.glob("*.tmp"))


def test_of_several_that_start_together_one_builds_and_all_load(tmp_path, monkeypatch):
    calls = count_calls(monkeypatch)
    table = table_of("sst", [f"a good film {i}" for i in range(3000)])
    start = threading.Barrier(4)

    def load(_):
        start.wait()
        return tokenize_task(table, small_tokenizer(), max_length=32, cache_dir=tmp_path).sequences.tokens

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(load, range(4)))
    assert len(calls) == 1 and len(list(tmp_path.glob("*.arrow"))) == 1
    for tokens in found[1:]:
        np.testing.assert_array_equal(tokens, found[0])


def test_wrong_settings_are_refused():
    table = table_of("sst", ["a"])
    with pytest.raises(ValueError, match="max_length must be at least 8, found 2"):
        tokenize_task(table, small_tokenizer(), max_length=2)
    tokenizer = small_tokenizer()
    tokenizer.cls_token = None
    with pytest.raises(ValueError, match="tokenizer has no cls_token_id"):
        tokenize_task(table, tokenizer, max_length=32)
