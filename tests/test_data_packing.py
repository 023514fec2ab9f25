"""Packed batches against packing by hand, token by token; the prefetching thread."""

import itertools
import threading
import time

import numpy as np
import pytest
import torch
from paper_tables import read_paper_task, table_of
from small_tokenizer import small_tokenizer
from transformers import AutoTokenizer

from mtfast.data.packing import PackedBatch, ReviewBatch, pack_reviews, pack_tasks, prefetch
from mtfast.data.reviews import ReviewAccount, ReviewSamples
from mtfast.data.sampler import plan_epoch
from mtfast.data.tokens import tokenize_task
from mtfast.recipes import PAPER_TASKS


@pytest.fixture
def tables():
    tokenizer = small_tokenizer()
    sst = table_of("sst", ["a film", "the good film is good .", "bad"], labels=[2, 4, 0])
    quora = table_of("quora", ["is a film a play ?", "good"], ["a", "the film !"], labels=[0, 1])
    sts = table_of("sts", ["not bad"], ["good"], labels=[3.5], pair_input="joint")
    raw = {"sst": sst, "quora": quora, "sts": sts}
    return {name: tokenize_task(table, tokenizer, max_length=32) for name, table in raw.items()}


def test_a_batch_packed_by_hand(tables):
    tokenizer = small_tokenizer()
    micro_batch = {"sst": np.array([2, 0]), "quora": np.array([1]), "sts": np.array([0])}
    batch = pack_tasks(tables, micro_batch, {"sst": 7, "quora": 5, "sts": 3}, bucket_tokens=8)
    text = (
        "[CLS] bad [SEP]  [CLS] a film [SEP]  [CLS] good [SEP]  [CLS] the film ! [SEP]  "
        "[CLS] not bad [SEP] good [SEP]"
    )
    expected = tokenizer.convert_tokens_to_ids(text.split())
    assert len(expected) == batch.tokens == 21
    assert batch.input_ids.tolist() == [*expected, 0, 0, 0]
    assert batch.cu_seqlens.tolist() == [0, 3, 7, 10, 15, 21, 24]
    assert batch.position_ids.tolist() == [
        position for length in (3, 4, 3, 5, 6, 3) for position in range(length)
    ]
    assert batch.token_type_ids.tolist() == [0] * 19 + [1, 1] + [0] * 3
    assert batch.max_seqlen == 6
    for name in ("input_ids", "token_type_ids", "position_ids", "cu_seqlens"):
        assert getattr(batch, name).dtype == torch.int32
    rows = batch.tasks
    assert list(rows) == ["sst", "quora", "sts"]
    assert rows["sst"].sequences.tolist() == [0, 1]
    assert rows["quora"].sequences.tolist() == [[2, 3]]
    assert rows["sts"].sequences.tolist() == [4]
    assert (rows["sst"].labels.tolist(), rows["sst"].labels.dtype) == ([0, 2], torch.int64)
    assert (rows["quora"].labels.tolist(), rows["quora"].labels.dtype) == ([1.0], torch.float32)
    assert (rows["sts"].labels.tolist(), rows["sts"].labels.dtype) == ([3.5], torch.float32)
    assert [rows[name].step_count for name in rows] == [7, 5, 3]
    assert set(batch.encoder_inputs()) == {
        "input_ids", "token_type_ids", "position_ids", "cu_seqlens", "max_seqlen",
    }  # fmt: skip


@pytest.mark.parametrize("bucket", [1, 7, 16, 64, 1000])
def test_filler_fills_the_bucket_without_longer_sequences(tables, bucket):
    micro_batch = {"sst": np.array([0, 1]), "sts": np.array([0])}
    batch = pack_tasks(tables, micro_batch, {}, bucket_tokens=bucket)
    plain = pack_tasks(tables, micro_batch, {}, bucket_tokens=1)
    total = len(batch.input_ids)
    assert total % bucket == 0 and 0 <= total - batch.tokens < bucket
    assert batch.max_seqlen == plain.max_seqlen == int(np.diff(batch.cu_seqlens.numpy()).max())
    assert batch.cu_seqlens[-1] == total and (np.diff(batch.cu_seqlens.numpy()) > 0).all()
    assert batch.tokens == len(plain.input_ids)
    for name in ("input_ids", "token_type_ids", "position_ids"):
        assert torch.equal(getattr(batch, name)[: batch.tokens], getattr(plain, name))
    assert (batch.input_ids[batch.tokens :] == 0).all() and (batch.token_type_ids[batch.tokens :] == 0).all()
    assert batch.position_ids.max() < batch.max_seqlen
    real = len(plain.cu_seqlens) - 1
    assert all((rows.sequences < real).all() for rows in batch.tasks.values())


def test_a_task_without_rows_and_a_batch_without_examples(tables):
    batch = pack_tasks(tables, {"sst": np.array([1])}, {"sst": 1, "quora": 4}, bucket_tokens=4)
    assert batch.tasks["quora"].sequences.shape == (0, 2)
    assert batch.tasks["sts"].sequences.shape == (0,)
    assert batch.tasks["quora"].labels.shape == (0,) and batch.tasks["quora"].step_count == 4
    empty = pack_tasks(tables, {}, {}, bucket_tokens=80)
    assert (empty.tokens, len(empty.input_ids)) == (0, 80)
    assert empty.cu_seqlens.tolist() == [0, 32, 64, 80]  # no sequence longer than max_length
    assert pack_tasks(tables, {}, {}).cu_seqlens.tolist() == [0, 1]


def test_tables_without_labels(tables):
    unlabelled = tokenize_task(table_of("sst", ["a film"]), small_tokenizer(), max_length=32)
    batch = pack_tasks({"sst": unlabelled}, {"sst": np.array([0])}, {})
    assert batch.tasks["sst"].labels is None


def tensors_of(batch: PackedBatch | ReviewBatch) -> dict[str, torch.Tensor]:
    """Every tensor of a batch but its buffer, by a name of its own."""
    tasks = batch.tasks if isinstance(batch, PackedBatch) else {}
    found = dict(vars(batch)) | {f"{name} {key}": x for name in tasks for key, x in vars(tasks[name]).items()}
    return {name: x for name, x in found.items() if isinstance(x, torch.Tensor) and name != "buffer"}


def odd_batches(tables) -> list[PackedBatch | ReviewBatch]:
    """Of mixed tasks, one of them without rows, and of reviews; both with parts of odd lengths."""
    sequences, ones = tables["sst"].sequences, np.ones(3, np.int64)
    account = ReviewAccount(3, 3, samples=3, single_sentence_reviews=0, long_sentences=0)
    samples = ReviewSamples(sequences, ones, ones, ones, account)
    reviews = {"mlm_probability": 0.15, "step_masked": 1, "step_samples": 1}
    return [
        pack_tasks(tables, {"sst": np.array([2, 0, 1]), "quora": np.array([1])}, {"sst": 3}, bucket_tokens=7),
        pack_reviews(samples, np.array([2, 0, 1]), **reviews, bucket_tokens=7),
    ]


def test_a_batch_is_one_run_of_bytes(tables):
    for batch, parts in zip(odd_batches(tables), (10, 6), strict=True):
        first, last = batch.buffer.data_ptr(), batch.buffer.data_ptr() + batch.buffer.nbytes
        spans = [(x.data_ptr(), x.data_ptr() + x.nbytes) for x in tensors_of(batch).values() if x.numel()]
        assert len(tensors_of(batch)) == parts and batch.buffer.dtype == torch.uint8
        assert all(first <= begin < end <= last and begin % 16 == 0 for begin, end in spans)
        spans.sort()
        assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(spans))
        assert sum(end - begin for begin, end in spans) > batch.buffer.nbytes - 16 * parts  # and little else


@pytest.mark.parametrize("how", ["sent_to", "to"])
def test_a_batch_moves_in_one_copy(tables, how, monkeypatch):
    made = []

    def to(x: torch.Tensor, device: torch.device, non_blocking: bool = False) -> torch.Tensor:
        made.append((x.nbytes, device.type, non_blocking))
        return x.clone()

    for batch in odd_batches(tables):
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "to", to)
            patch.setattr(torch.Tensor, "pin_memory", lambda x: made.append(x.nbytes) or x.clone())
            moved = getattr(batch, how)(torch.device("cuda"))
        size, sending = batch.buffer.nbytes, how == "sent_to"
        assert made == [size] * sending + [(size, "cuda", sending)]
        made.clear()
        assert type(moved) is type(batch) and moved.max_seqlen == batch.max_seqlen
        here, there = tensors_of(batch), tensors_of(moved)
        assert list(there) == list(here)
        for name, x in here.items():
            assert torch.equal(there[name], x) and there[name].dtype == x.dtype
            assert there[name].untyped_storage().data_ptr() == moved.buffer.data_ptr()


def test_on_the_host_nothing_is_copied(tables):
    for batch in odd_batches(tables):
        assert batch.sent_to(torch.device("cpu")) is batch


def test_what_only_the_host_reads_stays_there(tables):
    sst, tokenizer = table_of("sst", ["a film", "bad"], labels=[2, 0], head="lstm"), small_tokenizer()
    read = {"sst": tokenize_task(sst, tokenizer, max_length=32), "quora": tables["quora"]}
    rows = {"sst": np.array([1, 0]), "quora": np.array([0])}
    batch = pack_tasks(read, rows, None)  # nothing is trained
    assert set(tensors_of(batch)) == {
        *("input_ids", "token_type_ids", "position_ids", "cu_seqlens"),
        *("sst sequences", "quora sequences"),
    }
    moved = batch.to("cpu")
    assert isinstance(moved.tasks["sst"].token_bounds, np.ndarray) and moved.tasks["quora"].labels is None
    assert moved.token_bounds["sst"].tolist() == [[1, 3], [4, 7]]


def test_wrong_arguments(tables):
    with pytest.raises(ValueError, match="bucket_tokens must be at least 1, found 0"):
        pack_tasks(tables, {}, {}, bucket_tokens=0)
    with pytest.raises(ValueError, match="tables is empty"):
        pack_tasks({}, {}, {})


def test_real_steps_hold_each_example_with_its_tokens_and_label(data_dir, checkpoint_dir):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint_dir)
    raw = {name: read_paper_task(name, data_dir / "cs224n", "dev") for name in PAPER_TASKS}
    tables = {name: tokenize_task(table, tokenizer, max_length=128) for name, table in raw.items()}
    lengths = {name: table.lengths for name, table in tables.items()}
    steps = plan_epoch(lengths, batch_size=160, seed=3, epoch=0)
    for step in steps:
        batch = pack_tasks(tables, step.micro_batches[0], step.step_counts, bucket_tokens=512)
        offsets = batch.cu_seqlens.tolist()
        for name, rows in batch.tasks.items():
            examples = step.micro_batches[0][name]
            assert len(examples) == step.step_counts[name] == rows.step_count
            for example, label, sequences in zip(
                examples[::8], rows.labels[::8], rows.sequences[::8], strict=True
            ):
                assert label == raw[name].labels[example]
                for column, index in zip(raw[name].texts, sequences.reshape(-1).tolist(), strict=True):
                    found = batch.input_ids[offsets[index] : offsets[index + 1]].tolist()
                    assert found == tokenizer(column[example])["input_ids"]


def test_prefetch_keeps_order_and_works_ahead():
    made = []

    def produce():
        for item in range(20):
            made.append(item)
            yield item

    iterator = prefetch(produce(), depth=3)
    assert next(iterator) == 0
    deadline = time.monotonic() + 5
    while len(made) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert len(made) == 5  # 1 taken, 3 waiting, 1 that waits for room
    assert list(iterator) == list(range(1, 20))


def test_prefetch_raises_what_its_source_raised_after_the_items_before_it():
    def produce():
        yield 1
        yield 2
        raise RuntimeError("disk on fire")

    seen = []
    with pytest.raises(RuntimeError, match="disk on fire"):
        for item in prefetch(produce(), depth=1):
            seen.append(item)
    assert seen == [1, 2]


@pytest.mark.parametrize("how", ["closed", "dropped", "broken out of"])
def test_prefetch_stops_its_thread_when_abandoned(how):
    before = set(threading.enumerate())

    def produce():
        while True:
            yield 0

    iterator = prefetch(produce(), depth=1)
    if how == "broken out of":
        for _ in iterator:
            break
    else:
        next(iterator)
    started = set(threading.enumerate()) - before
    assert len(started) == 1
    if how == "closed":
        iterator.close()
    del iterator
    thread = started.pop()
    thread.join(timeout=5)
    assert not thread.is_alive()


def test_prefetch_wants_a_depth():
    with pytest.raises(ValueError, match="depth must be at least 1, found 0"):
        next(prefetch([1], depth=0))
