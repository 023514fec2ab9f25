"""The benchmark of packed attention: batches drawn as the data is, peers that compute the same thing."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from benchmarks import attention_peers as peers
from benchmarks import lengths, packed_attention
from benchmarks.attention_batch import SMALL, Batch, refusal, suitable
from mtfast.ops import packed_attention_ref

CPU = torch.device("cpu")


def test_drawn_lengths_have_the_distribution_of_the_histogram():
    for name in lengths.SEQUENCES:
        counts = lengths.histograms()[name]
        values = np.repeat(list(counts), list(counts.values()))
        drawn = np.array(lengths.draw_examples(name, 20_000))
        assert len(drawn) == 20_000 * lengths.SEQUENCES[name]
        assert set(drawn) <= set(counts)
        error = values.std() / len(drawn) ** 0.5
        assert abs(drawn.mean() - values.mean()) < 4 * error, name
        for share in (0.1, 0.5, 0.9):
            below = (values <= np.quantile(values, share)).mean()
            found = (drawn <= np.quantile(values, share)).mean()
            assert abs(found - below) < 4 * (below * (1 - below) / len(drawn)) ** 0.5 + 1e-9, (name, share)


def test_the_counted_data_is_what_training_reads():
    counted = lengths.histograms()
    assert {name: sum(counts.values()) for name, counts in counted.items() if name != "imdb"} == {
        "sst": 8_544,
        "quora": 31_996,  # two of the pairs at hand have no label
        "sts": 12_080,
    }
    assert max(counted["imdb"]) == 512 and max(max(counted[name]) for name in ("sst", "quora", "sts")) <= 128


def test_a_mixture_has_its_tasks_proportions(monkeypatch):
    alone = {"sst": {5: 1}, "quora": {7: 1}, "sts": {9: 1}, "imdb": {512: 1}}
    monkeypatch.setattr(lengths, "histograms", lambda: alone)
    drawn = lengths.draw_examples("mixture", 160)
    # 160 examples of 156,090: 8.76 SST, 145.05 Quora and 6.19 STS, and two sequences a pair.
    assert {n: drawn.count(n) for n in set(drawn)} == {5: 9, 7: 2 * 145, 9: 2 * 6}
    drawn = lengths.draw_examples("mixture-16k", 160)
    # Of 30,584: 44.70, 83.70 and 31.60.
    assert {n: drawn.count(n) for n in set(drawn)} == {5: 45, 7: 2 * 84, 9: 2 * 31}
    assert drawn != sorted(drawn)


@pytest.mark.parametrize("distribution", lengths.DISTRIBUTIONS)
def test_drawn_tokens_are_as_many_as_asked_for(distribution):
    drawn = lengths.draw_tokens(distribution, 4096)
    assert sum(drawn) == 4096 and min(drawn) > 0
    assert drawn == lengths.draw_tokens(distribution, 4096)
    if distribution.isdigit():
        assert set(drawn) == {int(distribution)}


def test_lengths_are_counted_as_the_tokenizer_counts(tmp_path, monkeypatch, capsys):
    # Not installed wherever kernels are measured.
    transformers = pytest.importorskip("transformers")
    from mtfast.data.demo import write_demo_corpus
    from mtfast.data.tables import read_task
    from mtfast.recipes import PAPER_TASKS

    corpus = write_demo_corpus(tmp_path)
    monkeypatch.setattr(lengths, "HISTOGRAMS", tmp_path / "lengths.json")
    lengths.main(["--data", str(corpus.tasks), "--checkpoint", str(corpus.bert)])
    counted = lengths.histograms(tmp_path / "lengths.json")
    printed = capsys.readouterr().out
    tokenizer = transformers.BertTokenizerFast.from_pretrained(corpus.bert)
    assert list(PAPER_TASKS) == ["sst", "quora", "sts"]
    for name, task in PAPER_TASKS.items():
        texts = [text for texts in read_task(name, task, corpus.tasks, "train").texts for text in texts]
        expected = [len(ids) for ids in tokenizer(texts, truncation=True, max_length=128)["input_ids"]]
        assert counted[name] == {n: expected.count(n) for n in set(expected)}
        assert f"{name:6} {len(expected):8,} sequences" in printed
    assert sum(counted["imdb"].values()) > 0


ON_CPU = (
    peers.PackedAttention,
    *peers.PEERS["cpu"],
    peers.PaddedSdpaMath,
    peers.Nested,
)


@pytest.mark.parametrize("shape", SMALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ON_CPU, ids=lambda kind: kind.name)
def test_peers_compute_the_same_attention(kind, dtype, shape):
    for dropout_p in (0.0, 0.1):
        assert refusal(kind, shape, dtype, CPU, dropout_p) is None


@pytest.mark.parametrize("kind", ON_CPU, ids=lambda kind: kind.name)
def test_a_peer_again_reads_tensors_of_its_own(kind):
    peer = kind(Batch.random(SMALL["ragged"], torch.float32, CPU, 0.0))
    first = [x.detach().clone() for x in peer.packed(peer.run(True))]
    again = peer.again()
    for x in (*peer.inputs, *peer.douts):
        x.detach().zero_()
    for found, expected in zip(again.packed(again.run(True)), first, strict=True):
        torch.testing.assert_close(found, expected)
    assert not peer.run(True)[0].any()
    assert again.run(False)[0].any()


class WithoutMask(peers.PaddedSdpa):
    name = "without mask"

    def __init__(self, batch):
        super().__init__(batch)
        self.mask = None


class WithoutDropout(peers.PaddedSdpa):
    name = "without dropout"

    def __init__(self, batch):
        super().__init__(replace(batch, dropout_p=0.0))


class WrongGradient(peers.PaddedEager):
    name = "wrong gradient"

    def run(self, backward):
        out, *grads = super().run(backward)
        return [out, *(1.1 * grad for grad in grads)]


def test_what_computes_something_else_is_not_measured():
    wrong = {
        WithoutMask: "out off by",
        WithoutDropout: "dropout changes nothing",
        WrongGradient: "dq off by",
    }
    for kind, reason in wrong.items():
        assert reason in refusal(kind, "ragged", torch.float32, CPU, 0.1)
    assert refusal(WithoutMask, "equal", torch.float32, CPU, 0.0) is None


def test_peers_that_do_not_take_a_case_say_why():
    batch = Batch.random((4, 9), torch.float32, CPU, 0.1)
    assert suitable(peers.FlashAttention2, batch, True) == "bfloat16 and float16 on a GPU alone"
    assert suitable(peers.FlexAttention, batch, True) == "no dropout"
    assert "not support non-zero dropout" in suitable(peers.PaddedSdpaFlash, batch, True)
    assert suitable(peers.PaddedSdpa, batch, True).name == "padded sdpa"


def test_padding_that_does_not_fit_is_left_out(monkeypatch):
    monkeypatch.setattr(peers, "_free_memory", lambda: 1000)
    batch = Batch.random((4, 9), torch.float32, CPU, 0.0)
    refused = suitable(peers.PaddedEager, batch, False)
    assert isinstance(refused, str) and "too much for this machine" in refused


@pytest.mark.parametrize("each", [(5, 1, 300, 37, 130, 128, 64), (512,) * 3, (128, 256, 1)])
def test_document_mask_is_the_one_that_create_block_mask_finds(each):
    total = sum(each)
    document = torch.repeat_interleave(torch.arange(len(each)), torch.tensor(each))

    def same(batch, head, row, column):
        return document[row] == document[column]

    ours, theirs = (
        peers.document_mask(each, CPU),
        create_block_mask(same, None, None, total, total, device="cpu"),
    )
    assert torch.equal(ours.to_dense(), theirs.to_dense())
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    q, k, v = (torch.randn(total, 2, 16) for _ in range(3))
    cu_seqlens = torch.tensor([0, *each]).cumsum(0).int()
    out = flex_attention(*(x.transpose(0, 1)[None] for x in (q, k, v)), block_mask=ours)
    expected, _ = packed_attention_ref(q, k, v, cu_seqlens, max(each))
    torch.testing.assert_close(out[0].transpose(0, 1), expected)


def test_urgent_cases_come_first_and_none_is_lost():
    sizes = (4096, 16384, 131072)
    found = packed_attention.problems(lengths.DISTRIBUTIONS, sizes, [torch.bfloat16], steps=False)
    names = [problem.name for problem in found]
    urgent = [
        f"{what} {size} bfloat16 p=0.1 fwd+bwd" for size in sizes[1:] for what in ("quora", "mixture", "512")
    ]
    assert names[:6] == urgent
    assert names[6:8] == [f"quora 131072 bfloat16 p={p} fwd" for p in (0.1, 0.0)]
    assert len(set(names)) == len(names) == 10 * 3 * 2 * 2
    on_cpu = packed_attention.problems(
        lengths.DISTRIBUTIONS, [4096], [torch.float32, torch.bfloat16], steps=True
    )
    assert [p.name for p in on_cpu[:4]] == [
        f"{what} 160 examples {dtype} p=0.1 fwd+bwd"
        for what in ("mixture", "mixture-16k")
        for dtype in ("float32", "bfloat16")
    ]
