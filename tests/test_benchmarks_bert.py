"""The benchmarks of packed_attention's other arguments and of a BertModel with it."""

import csv

import pytest
import torch

from benchmarks import attention_arguments, bert_attention
from benchmarks.attention_batch import Batch

CPU = torch.device("cpu")


def rows_of(module, arguments: list[str], results) -> list[dict[str, str]]:
    shared = ["--device", "cpu", "--budget", "0", "--threads", str(torch.get_num_threads())]
    assert module.main([*arguments, *shared, "--results", str(results)]) == 0
    (path,) = results.glob("*.csv")
    return list(csv.DictReader(path.open()))


def test_arguments_leave_their_rows(tmp_path):
    rows = rows_of(attention_arguments, ["--tokens", "90"], tmp_path)
    variants = {*(f"head_dim {x}" for x in (64, 72, 80, 96, 128, 256)), "head_dim 64, cu_seqlens int64"}
    assert {(row["case"], row["variant"]) for row in rows} == {
        (f"mixture 90 {dtype} fwd+bwd", variant) for dtype in ("float32", "bfloat16") for variant in variants
    }
    assert all(row["wrong"] == "" and float(row["peak_mib"]) > 0 for row in rows)


def test_a_wrong_result_is_told(monkeypatch):
    batch = Batch.random((9, 30), torch.float32, CPU, 0.0, 72)
    assert attention_arguments.wrong_result(batch) == ""
    right = attention_arguments.PackedAttention.forward
    monkeypatch.setattr(attention_arguments.PackedAttention, "forward", lambda self: 1.25 * right(self))
    assert "out off by 0.25" in attention_arguments.wrong_result(batch)


@pytest.fixture
def small_shape(monkeypatch):
    monkeypatch.setitem(bert_attention.SHAPES, "minilm", (2, 384))


def test_a_bert_leaves_its_rows(tmp_path, small_shape):
    rows = rows_of(bert_attention, ["--shapes", "minilm", "--sentences", "3"], tmp_path)
    assert {(row["case"], row["variant"]) for row in rows} == {
        (f"2 x 384 3 sst sentences {dtype}", variant)
        for dtype in ("float32", "bfloat16")
        for variant in ("sdpa", "eager", "mtfast", "mtfast, without padding")
    }
    assert all(row["wrong"] == "" and float(row["peak_mib"]) > 0 for row in rows)


def test_a_bert_with_another_attention_is_told(tmp_path, small_shape, monkeypatch):
    """Which does not know where one sentence ends."""
    plain = bert_attention.batches_of

    def without_places(*arguments):
        padded, flat = plain(*arguments)
        return padded, {"input_ids": flat["input_ids"]}

    monkeypatch.setattr(bert_attention, "batches_of", without_places)
    rows = bert_attention.compare("case", 2, 384, 3, torch.float32, CPU, 0.0)
    wrong = {row["variant"]: row["wrong"] for row in rows}
    assert wrong.pop("mtfast, without padding").startswith("states off by") and not any(wrong.values())
