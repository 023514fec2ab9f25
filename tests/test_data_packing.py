"""Packed batches against packing by hand, token by token."""

import itertools

import numpy as np
import pytest
import torch
from paper_tables import read_paper_task, table_of
from small_tokenizer import small_tokenizer
from transformers import AutoTokenizer

from mtfast.data.packing import PackedBatch, ReviewBatch, pack_reviews, pack_tasks
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
    batch = pack_tasks(tables, micro_batch, {"sst": 0.5, "quora": 0.25, "sts": 3.0})
    text = (
        "[CLS] bad [SEP]  [CLS] a film [SEP]  [CLS] good [SEP]  [CLS] the film ! [SEP]  "
        "[CLS] not bad [SEP] good [SEP]"
    )
    expected = tokenizer.convert_tokens_to_ids(text.split())
    assert len(expected) == batch.tokens == 21 and batch.size == 4
    assert batch.input_ids.tolist() == expected
    assert batch.cu_seqlens.tolist() == [0, 3, 7, 10, 15, 21]
    assert batch.position_ids.tolist() == [
        position for length in (3, 4, 3, 5, 6) for position in range(length)
    ]
    assert batch.token_type_ids.tolist() == [0] * 19 + [1, 1]
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
    assert [rows[name].weights.tolist() for name in rows] == [[0.5, 0.5], [0.25], [3.0]]
    assert all(rows[name].weights.dtype == torch.float32 for name in rows)
    assert set(batch.encoder_inputs()) == {
        "input_ids", "token_type_ids", "position_ids", "cu_seqlens", "max_seqlen",
    }  # fmt: skip


def test_a_batch_filled_up_by_hand(tables):
    micro_batch = {"sst": np.array([2, 0]), "quora": np.array([1])}
    weights = {"sst": 0.5, "quora": 0.25, "sts": 3.0}
    plain = pack_tasks(tables, micro_batch, weights)
    batch = pack_tasks(tables, micro_batch, weights, room={"sst": 3, "quora": 2, "sts": 1})
    assert (batch.tokens, batch.size, plain.tokens) == (15, 3, 15)
    # To 64 tokens, by sequences of at most max_length, and to 3 + 2 * 2 + 1 sequences before these two.
    assert batch.cu_seqlens.tolist() == [0, 3, 7, 10, 15, 47, 64, 64, 64, 64, 64]
    assert batch.max_seqlen == 32
    for name in ("input_ids", "token_type_ids", "position_ids"):
        assert torch.equal(getattr(batch, name)[:15], getattr(plain, name))
        assert (getattr(batch, name)[15:] == 0).all() or name == "position_ids"
    assert batch.position_ids[15:].tolist() == [*range(32), *range(17)]
    rows = batch.tasks
    assert rows["sst"].sequences.tolist() == [0, 1, 0]
    assert rows["quora"].sequences.tolist() == [[2, 3], [0, 0]]
    assert rows["sts"].sequences.tolist() == [0]
    assert [rows[name].labels.tolist() for name in rows] == [[0, 2, 0], [1, 0], [0]]
    assert [rows[name].weights.tolist() for name in rows] == [[0.5, 0.5, 0.0], [0.25, 0.0], [0.0]]


@pytest.mark.parametrize("copies", [1, 7, 40, 400])
def test_a_batch_is_filled_up_by_little(tables, copies):
    """By no more than a 32nd of its tokens or 64, to one shape for batches of about the same size."""
    micro_batch = {"sst": np.arange(3).repeat(copies), "sts": np.zeros(copies, np.int64)}
    room = {"sst": 3 * copies + 5, "quora": 1, "sts": copies - 1}
    batch = pack_tasks(tables, micro_batch, dict.fromkeys(tables, 1.0), room=room)
    plain = pack_tasks(tables, micro_batch, dict.fromkeys(tables, 1.0))
    filler = len(batch.input_ids) - batch.tokens
    assert 0 <= filler < max(64, batch.tokens / 32) and batch.tokens == plain.tokens == len(plain.input_ids)
    assert torch.equal(batch.input_ids[: batch.tokens], plain.input_ids)
    lengths = np.diff(batch.cu_seqlens.numpy())
    assert (
        (lengths >= 0).all() and lengths.sum() == len(batch.input_ids) and lengths.max() <= batch.max_seqlen
    )
    sizes = {name: len(rows.sequences) for name, rows in batch.tasks.items()}
    # The third task has more examples than there is room for.
    assert sizes == {"sst": 3 * copies + 5, "quora": 1, "sts": -(-copies // 16) * 16}
    fewer = {"sst": micro_batch["sst"][1:], "sts": micro_batch["sts"]}
    one_less = pack_tasks(tables, fewer, dict.fromkeys(tables, 1.0), room=room)
    assert (one_less.shape == batch.shape) == (len(one_less.input_ids) == len(batch.input_ids))


def test_max_seqlen_of_a_batch_that_is_filled_up():
    texts = ["a", " ".join(["film"] * 60), " ".join(["film"] * 63), " ".join(["film"] * 300)]
    read = {
        limit: tokenize_task(table_of("sst", texts, labels=[0] * 4), small_tokenizer(), max_length=limit)
        for limit in (100, 512)
    }
    room = {"sst": 1}
    found = {
        limit: [
            pack_tasks({"sst": table}, {"sst": np.array([row])}, room=room).max_seqlen for row in range(4)
        ]
        for limit, table in read.items()
    }
    assert found == {100: [64, 64, 100, 100], 512: [64, 64, 128, 512]}


def test_a_task_without_rows_and_a_batch_without_examples(tables):
    batch = pack_tasks(tables, {"sst": np.array([1])}, {"sst": 1.0, "quora": 0.25, "sts": 1.0})
    assert batch.tasks["quora"].sequences.shape == (0, 2)
    assert batch.tasks["sts"].sequences.shape == (0,)
    assert batch.tasks["quora"].labels.shape == batch.tasks["quora"].weights.shape == (0,)
    plain = pack_tasks(tables, {})
    assert (plain.tokens, plain.size, plain.cu_seqlens.tolist(), plain.max_seqlen) == (0, 0, [0, 1], 1)
    filled = pack_tasks(tables, {}, dict.fromkeys(tables, 1.0), room={"sst": 2, "quora": 0, "sts": 1})
    assert (filled.tokens, filled.size, len(filled.input_ids)) == (0, 0, 64)
    assert filled.cu_seqlens.tolist() == [0, 32, 64, 64, 64, 64]
    assert all((rows.weights == 0).all() for rows in filled.tasks.values())


def test_tables_without_labels(tables):
    unlabelled = tokenize_task(table_of("sst", ["a film"]), small_tokenizer(), max_length=32)
    batch = pack_tasks({"sst": unlabelled}, {"sst": np.array([0])}, {"sst": 1.0})
    assert batch.tasks["sst"].labels is None and batch.tasks["sst"].weights is None


def tensors_of(batch: PackedBatch | ReviewBatch) -> dict[str, torch.Tensor]:
    """Every tensor of a batch but its buffer, by a name of its own."""
    tasks = batch.tasks if isinstance(batch, PackedBatch) else {}
    found = dict(vars(batch)) | {f"{name} {key}": x for name in tasks for key, x in vars(tasks[name]).items()}
    return {name: x for name, x in found.items() if isinstance(x, torch.Tensor) and name != "buffer"}


def odd_batches(tables) -> list[PackedBatch | ReviewBatch]:
    """Of mixed tasks, one of them without rows, and of reviews; both with parts of odd lengths."""
    sequences, ones = tables["sst"].sequences, np.ones(3, np.int64)
    account = ReviewAccount(3, 3, samples=3, single_sentence_reviews=0, long_sentences=0, truncated_reviews=0)
    samples = ReviewSamples(sequences, ones, ones, ones, account)
    reviews = {"mlm_probability": 0.15, "mlm_weight": 1.0, "nsp_weight": 1.0, "mask_seed": 5}
    return [
        pack_tasks(tables, {"sst": np.array([2, 0, 1]), "quora": np.array([1])}, dict.fromkeys(tables, 1.0)),
        pack_reviews(samples, np.array([2, 0, 1]), **reviews),
    ]


def test_a_batch_is_one_run_of_bytes(tables):
    for batch, parts in zip(odd_batches(tables), (13, 9), strict=True):
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


def test_a_copy_takes_over_another_batch_of_its_shape(tables):
    for batch, other in zip(odd_batches(tables), odd_batches(tables), strict=True):
        other.buffer[:] = 1
        held = batch.clone()
        assert held.shape == batch.shape == other.shape
        assert all(torch.equal(x, tensors_of(batch)[name]) for name, x in tensors_of(held).items())
        held.copy_(other)
        assert all(torch.equal(x, tensors_of(other)[name]) for name, x in tensors_of(held).items())
        assert (batch.buffer != 1).any()


def test_bounds_of_an_lstms_tokens(tables):
    sst, tokenizer = table_of("sst", ["a film", "bad"], labels=[2, 0], head="lstm"), small_tokenizer()
    read = {"sst": tokenize_task(sst, tokenizer, max_length=32), "quora": tables["quora"]}
    rows = {"sst": np.array([1, 0]), "quora": np.array([0])}
    batch = pack_tasks(read, rows)  # nothing is trained
    assert set(tensors_of(batch)) == {
        *("input_ids", "token_type_ids", "position_ids", "cu_seqlens"),
        *("sst sequences", "sst token_bounds", "quora sequences"),
    }
    filled = pack_tasks(read, rows, room={"sst": 3, "quora": 1})
    assert list(batch.token_bounds) == ["sst"]
    assert batch.token_bounds["sst"].tolist() == [[1, 3], [4, 7]]
    assert filled.token_bounds["sst"].tolist() == [[1, 3], [4, 7], [0, 0]]
    assert (batch.token_max_seqlen, filled.token_max_seqlen) == (3, 32)
    assert pack_tasks(tables, {"sst": np.array([0])}).token_max_seqlen == 0
    assert pack_tasks(read, {}, room={"sst": 3, "quora": 1}).token_max_seqlen == 32


def test_wrong_arguments():
    with pytest.raises(ValueError, match="tables is empty"):
        pack_tasks({}, {})


def test_real_steps_hold_each_example_with_its_tokens_and_label(data_dir, checkpoint_dir):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint_dir)
    raw = {name: read_paper_task(name, data_dir / "cs224n", "dev") for name in PAPER_TASKS}
    tables = {name: tokenize_task(table, tokenizer, max_length=128) for name, table in raw.items()}
    lengths = {name: table.lengths for name, table in tables.items()}
    steps = plan_epoch(lengths, batch_size=160, seed=3, epoch=0)
    for step in steps:
        weights = step.weights(shares=1)
        batch = pack_tasks(tables, step.micro_batches[0], weights, room=dict.fromkeys(tables, 80))
        offsets = batch.cu_seqlens.tolist()
        for name, rows in batch.tasks.items():
            examples = step.micro_batches[0][name]
            real = len(examples)
            assert real == step.step_counts[name] <= len(rows.sequences)
            assert (rows.weights[:real] == np.float32(1 / real)).all() and (rows.weights[real:] == 0).all()
            for example, label, sequences in zip(
                examples[::8], rows.labels[:real:8], rows.sequences[:real:8], strict=True
            ):
                assert label == raw[name].labels[example]
                for column, index in zip(raw[name].texts, sequences.reshape(-1).tolist(), strict=True):
                    found = batch.input_ids[offsets[index] : offsets[index + 1]].tolist()
                    assert found == tokenizer(column[example])["input_ids"]
