"""Passes over whole tables: every example once, packed ahead in the background, results in input order."""

import threading

import numpy as np
import pytest
import torch
from paper_tables import table_of
from small_tokenizer import small_tokenizer

from mtfast.data.sampler import Layout
from mtfast.data.tokens import tokenize_task
from mtfast.training import prediction
from mtfast.training.prediction import in_order, packed_batches, packed_outputs

CPU = torch.device("cpu")


@pytest.fixture
def tables(monkeypatch):
    """11 and 5 examples of 3 to 13 tokens, in batches of at most 20 tokens."""
    monkeypatch.setattr(prediction, "EVALUATION_TOKENS", 20)
    tokenizer = small_tokenizer()
    sst = table_of("sst", ["good " * (1 + 3 * i % 11) for i in range(11)], labels=[0] * 11)
    quora = table_of("quora", ["a film"] * 5, ["bad " * (i + 1) for i in range(5)], labels=[1] * 5)
    return {name: tokenize_task(t, tokenizer, max_length=32) for name, t in (("sst", sst), ("quora", quora))}


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "mtfast-prefetch"]


def tokens_of(batch):
    """In the place of a model: how many tokens each example has."""
    lengths = batch.cu_seqlens.diff()
    return {
        "sst": lengths[batch.sequences["sst"]].double(),
        "quora": lengths[batch.sequences["quora"]].sum(1).double(),
    }


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_every_example_has_the_output_of_its_own_sequences(tables, ranks):
    parts = []
    for rank in range(ranks):
        mine = list(packed_outputs("dev", tokens_of, tables, CPU, Layout(rank, ranks)))
        assert len(mine) > 2
        parts += [{name: (rows, x.numpy()) for name, (rows, x) in part.items()} for part in mine]
    for name, table in tables.items():
        assert sorted(np.concatenate([part[name][0] for part in parts])) == list(range(len(table)))
        found = in_order(parts, name, len(table))
        assert found.dtype == np.float32 and found.tolist() == table.lengths.tolist()
    assert not threads()


def test_outputs_come_when_the_next_batch_is_under_way(tables):
    events: list[str] = []

    def forward(batch):
        assert not torch.is_grad_enabled() and all(rows.labels is None for rows in batch.tasks.values())
        events.append("begun")
        return tokens_of(batch)

    for _ in packed_outputs("dev", forward, tables, CPU):
        events.append("given")
    count = events.count("begun")
    assert events == ["begun", *["begun", "given"] * (count - 1), "given"]


@pytest.mark.parametrize("where", ["packing", "forward", "left early"])
def test_what_fails_is_raised_and_the_thread_ends(tables, where, monkeypatch):
    pack, packed = prediction.pack_tasks, []

    def broken(*arguments):
        packed.append(arguments)
        if len(packed) == 3 and where == "packing":
            raise RuntimeError("packing failed")
        return pack(*arguments)

    def forward(batch):
        if where == "forward" and len(seen) == 2:
            raise RuntimeError("forward failed")
        return tokens_of(batch)

    monkeypatch.setattr(prediction, "pack_tasks", broken)
    seen: list[object] = []
    outputs = packed_outputs("dev", forward, tables, CPU)
    if where == "left early":
        next(outputs)
        assert threads()
        outputs.close()
    else:
        with pytest.raises(RuntimeError, match=f"{where} failed") as raised:
            seen.extend(outputs)
        assert raised.traceback  # which keeps what was running alive
    assert not threads()


def test_batches_are_packed_ahead(tables, monkeypatch):
    pack, packed = prediction.pack_tasks, []
    monkeypatch.setattr(prediction, "pack_tasks", lambda *args: packed.append(pack(*args)) or packed[-1])
    batches = packed_batches("dev", tables, CPU)
    _, first = next(batches)
    for _ in range(100):
        if len(packed) > 2:
            break
        threading.Event().wait(0.05)
    assert len(packed) > 2 and first is packed[0]
    batches.close()
