"""mask_tokens: equal to its reference, invariant to layout, right in distribution, strict about arguments."""

import random

import pytest
import torch
from test_kernels_mask_tokens import random_arguments

from mtfast.ops import MaskedTokens, exact_count, mask_tokens, mask_tokens_ref

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")),
]
SPECIAL = [0, 100, 101, 102, 103]
BERT = {"special_ids": SPECIAL, "mask_token_id": 103, "vocab_size": 30522, "seed": 7}


def ordinary_ids(*shape: int, dtype=torch.int64, device="cpu") -> torch.Tensor:
    return torch.randint(1000, 30522, shape, dtype=dtype, device=device)


def assert_same(a: MaskedTokens, b: MaskedTokens) -> None:
    assert a.input_ids.dtype == b.input_ids.dtype and a.labels.dtype == b.labels.dtype
    assert torch.equal(a.labels, b.labels) and torch.equal(a.input_ids, b.input_ids)


@pytest.mark.parametrize("device", DEVICES)
def test_agrees_with_the_reference_on_200_configurations(device):
    torch.manual_seed(0)
    draw = random.Random(0)
    for _ in range(200):
        ids, options = random_arguments(draw)
        expected = mask_tokens_ref(ids, **options)
        moved = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
        masked = mask_tokens(ids.to(device), **moved)
        assert_same(MaskedTokens(*(x.cpu() for x in masked)), expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("strategy", ["exact", "bernoulli"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_ten_million_tokens(strategy, dtype, device):
    ids = ordinary_ids(20_000, 500, dtype=dtype, device=device)
    options = BERT | {"strategy": strategy}
    masked = mask_tokens(ids, **options)
    for rows in (
        slice(0, 100),
        slice(9_990, 10_090),
        slice(19_900, 20_000),
    ):  # what the reference can do soon
        positions = torch.arange(rows.start * 500, rows.stop * 500, device=device).view(-1, 500)
        expected = mask_tokens_ref(ids[rows], positions=positions, **options)
        assert_same(MaskedTokens(*(x[rows] for x in masked)), expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("strategy", ["exact", "bernoulli"])
def test_empty_and_one_token(strategy, device):
    options = BERT | {"strategy": strategy, "mlm_probability": 1.0}
    for shape in [(0,), (0, 5), (3, 0)]:
        masked = mask_tokens(ordinary_ids(*shape, device=device), **options)
        assert masked.input_ids.shape == masked.labels.shape == shape
    no_sequence = torch.zeros(1, dtype=torch.int32, device=device)
    assert mask_tokens(ordinary_ids(0, device=device), cu_seqlens=no_sequence, **options).labels.numel() == 0
    assert mask_tokens(torch.tensor([2000], device=device), **options).labels.item() == 2000


@pytest.mark.parametrize("subword", [False, True])
@pytest.mark.parametrize("strategy", ["exact", "bernoulli"])
def test_masks_do_not_depend_on_order_ranks_layout_or_threads(strategy, subword):
    torch.manual_seed(1)
    lengths = torch.randint(0, 60, (50,)).tolist()
    sequences = [ordinary_ids(n) for n in lengths]
    positions = [torch.arange(n) + 1000 * i for i, n in enumerate(lengths)]
    options = BERT | {"strategy": strategy}
    if subword:
        options["subword"] = torch.rand(30522) < 0.3

    def packed(order: list[int]) -> dict[int, MaskedTokens]:
        counts = torch.tensor([lengths[i] for i in order])
        cu_seqlens = torch.cat([torch.zeros(1), counts.cumsum(0)]).int()
        masked = mask_tokens(
            torch.cat([sequences[i] for i in order]),
            positions=torch.cat([positions[i] for i in order]),
            cu_seqlens=cu_seqlens,
            **options,
        )
        parts = zip(*(x.split(counts.tolist()) for x in masked), strict=True)
        return {i: MaskedTokens(*part) for i, part in zip(order, parts, strict=True)}

    def same(other: dict[int, MaskedTokens]) -> None:
        for i, part in other.items():
            assert_same(part, expected[i])

    everything = list(range(50))
    expected = packed(everything)
    same(packed(random.Random(2).sample(everything, 50)))
    for rank in range(3):
        same(packed(everything[rank::3]))

    padded = torch.zeros(50, 60, dtype=torch.int64)
    padded_positions = torch.zeros(50, 60, dtype=torch.int64)
    for i, n in enumerate(lengths):
        padded[i, :n], padded_positions[i, :n] = sequences[i], positions[i]
    masked = mask_tokens(padded, positions=padded_positions, **options)
    same({i: MaskedTokens(*(x[i, :n] for x in masked)) for i, n in enumerate(lengths)})
    assert all(bool((masked.labels[i, n:] == -100).all()) for i, n in enumerate(lengths))

    threads = torch.get_num_threads()
    try:
        big = ordinary_ids(64, 512)
        results = []
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(mask_tokens(big, **options))
    finally:
        torch.set_num_threads(threads)
    assert_same(*results)


def within_four_standard_errors(count: int, n: int, p: float) -> bool:
    return abs(count - n * p) <= 4 * (n * p * (1 - p)) ** 0.5


@pytest.mark.parametrize("device", DEVICES)
def test_distribution_over_a_million_tokens(device):
    n = 1_000_000
    ids = ordinary_ids(n, device=device)
    ids[::50] = 101
    masked = MaskedTokens(*(x.cpu() for x in mask_tokens(ids, strategy="bernoulli", **BERT)))
    ids = ids.cpu()
    assert bool((masked.labels[::50] == -100).all()) and bool((masked.input_ids[::50] == 101).all())
    chosen = masked.labels != -100
    assert torch.equal(masked.labels[chosen], ids[chosen])
    assert torch.equal(masked.input_ids[~chosen], ids[~chosen])
    count = int(chosen.sum())
    assert within_four_standard_errors(count, n - n // 50, 0.15)
    became = masked.input_ids[chosen]
    hidden = became == 103
    kept = ~hidden & (became == ids[chosen])
    assert within_four_standard_errors(int(hidden.sum()), count, 0.8)
    assert within_four_standard_errors(int(kept.sum()), count, 0.1)
    assert within_four_standard_errors(int((~hidden & ~kept).sum()), count, 0.1)


def test_random_replacements_are_uniform_and_never_special():
    stats = pytest.importorskip("scipy.stats")
    options = BERT | {"mlm_probability": 1.0, "mask_fraction": 0.0, "random_fraction": 1.0, "vocab_size": 500}
    for random_fraction in (1.0, 0.1):
        options["random_fraction"] = random_fraction
        masked = mask_tokens(torch.full((1_000_000,), 499), strategy="bernoulli", **options)
        counts = torch.bincount(masked.input_ids, minlength=500)
        assert counts[SPECIAL].sum() == 0
        ordinary = [i for i in range(499) if i not in SPECIAL]
        assert stats.chisquare(counts[ordinary].numpy()).pvalue > 0.001


def test_seeds_are_independent():
    stats = pytest.importorskip("scipy.stats")
    ids = ordinary_ids(1_000_000)
    first, second = (
        mask_tokens(ids, strategy="bernoulli", **(BERT | {"seed": seed})).labels != -100 for seed in (7, 8)
    )
    both, only_first = int((first & second).sum()), int((first & ~second).sum())
    only_second, neither = int((~first & second).sum()), int((~first & ~second).sum())
    assert stats.chi2_contingency([[both, only_first], [only_second, neither]]).pvalue > 0.001


@pytest.mark.parametrize("probability", [0.15, 0.1, 0.5, 0.0, 1.0])
def test_exact_chooses_as_many_as_the_host_counts(probability):
    lengths = list(range(0, 200))
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    ids = ordinary_ids(int(cu_seqlens[-1]))
    ids[torch.rand(ids.shape) < 0.1] = 102
    labels = mask_tokens(ids, cu_seqlens=cu_seqlens, mlm_probability=probability, **BERT).labels
    candidates = torch.tensor([int((part != 102).sum()) for part in ids.split(lengths)])
    chosen = torch.tensor([int((part != -100).sum()) for part in labels.split(lengths)])
    by_hand = [max(1, int(probability * n + 0.5)) if n else 0 for n in candidates.tolist()]
    assert chosen.tolist() == by_hand == exact_count(candidates, probability).tolist()
    rows = torch.nonzero_static(labels != -100, size=sum(by_hand)).squeeze(1)
    assert torch.equal(rows, (labels != -100).nonzero().squeeze(1))


@pytest.mark.parametrize("strategy", ["exact", "bernoulli"])
def test_whole_words_are_never_split(strategy):
    subword = torch.rand(30522) < 0.4
    cu_seqlens = torch.tensor([0, 3, 3, 1000, 5000], dtype=torch.int32)
    ids = ordinary_ids(5000)
    ids[::17] = 101
    labels = mask_tokens(ids, cu_seqlens=cu_seqlens, subword=subword, strategy=strategy, **BERT).labels
    starts = set(cu_seqlens.tolist())
    for i in range(1, 5000):
        if i not in starts and subword[ids[i]] and ids[i] != 101 and ids[i - 1] != 101:
            assert (labels[i] == -100) == (labels[i - 1] == -100)
    assert bool((labels != -100).any())


def test_opcheck():
    ids = ordinary_ids(4, 32, dtype=torch.int32)
    arguments = (ids, torch.arange(128).view(4, 32), None, torch.rand(30522) < 0.4)
    rest = (SPECIAL, 103, 30522, 7, 0.15, 0.8, 0.1)
    for exact in (True, False):
        torch.library.opcheck(torch.ops.mtfast.mask_tokens.default, (*arguments, *rest, exact))
    cu_seqlens = torch.tensor([0, 5, 32], dtype=torch.int32)
    torch.library.opcheck(torch.ops.mtfast.mask_tokens.default, (ids[0], None, cu_seqlens, None, *rest, True))


def test_compile_and_export():
    class Module(torch.nn.Module):
        def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            masked = mask_tokens(ids, **BERT)
            return masked.input_ids, (masked.labels != -100).sum(1)

    ids = ordinary_ids(4, 32)
    expected = Module()(ids)
    compiled = torch.compile(Module(), fullgraph=True, backend="aot_eager")
    exported = torch.export.export(Module(), (ids,)).module()
    for module in (compiled, exported):
        for value, right in zip(module(ids), expected, strict=True):
            assert torch.equal(value, right)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_cuda_graph_replays(monkeypatch):
    # Looking at values waits for the GPU, which a capture does not allow.
    monkeypatch.setattr("mtfast.ops._library.CHECK_VALUES", False)
    ids = ordinary_ids(16, 512, device="cuda")
    mask_tokens(ids, **BERT)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        masked = mask_tokens(ids, **BERT)
    ids.copy_(ordinary_ids(16, 512, device="cuda"))
    graph.replay()
    assert_same(masked, mask_tokens_ref(ids, **BERT))


IDS = torch.arange(200, 210)


def offsets(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    ("ids", "options", "message"),
    [
        (IDS.float(), {}, "input_ids must be int32 or int64"),
        (IDS.view(1, 2, 5), {}, "input_ids must be .total. or .batch, length."),
        (IDS.view(2, 5).t(), {}, "input_ids must be contiguous"),
        (IDS + 30520, {}, "input_ids must be in .0, vocab_size = 30522., but token"),
        (IDS - 201, {}, "input_ids must be in .0, vocab_size = 30522., but token 0"),
        (IDS, {"positions": torch.arange(9)}, "positions must have the shape"),
        (IDS, {"positions": torch.arange(10).int()}, "positions must be int64"),
        (IDS, {"cu_seqlens": offsets(1, 10)}, "cu_seqlens must start at 0, found 1"),
        (IDS, {"cu_seqlens": offsets(0, 6, 4, 10)}, "cu_seqlens must not fall, but goes from 6 to 4"),
        (IDS, {"cu_seqlens": offsets(0, 9)}, "cu_seqlens must end at the number of tokens, 10, found 9"),
        (IDS, {"cu_seqlens": offsets(0, 10).long()}, "cu_seqlens must be int32"),
        (IDS.view(2, 5), {"cu_seqlens": offsets(0, 10)}, "cu_seqlens goes with input_ids .total."),
        (
            IDS,
            {"subword": torch.zeros(5, dtype=torch.bool)},
            "subword must have the shape .vocab_size = 30522.",
        ),
        (IDS, {"subword": torch.zeros(30522)}, "subword must be bool"),
        (IDS, {"special_ids": [30522]}, "special_ids must be in"),
        (IDS, {"special_ids": range(0, 200, 2)}, "special_ids must form at most 64 runs"),
        (IDS, {"special_ids": range(30522)}, "special_ids must leave an id"),
        (IDS, {"mask_token_id": -1}, "mask_token_id must be in"),
        (IDS, {"mlm_probability": 1.5}, "mlm_probability must be in .0, 1., found 1.5"),
        (IDS, {"mlm_probability": float("nan")}, "mlm_probability must be in"),
        (IDS, {"mask_fraction": -0.1}, "mask_fraction must be in"),
        (IDS, {"mask_fraction": 0.8, "random_fraction": 0.3}, "must be at most 1, found 1.1"),
    ],
)
def test_wrong_arguments_say_what_is_wrong(ids, options, message):
    with pytest.raises(RuntimeError, match=f"mask_tokens: .*{message}"):
        mask_tokens(ids, **(BERT | options))


def test_unknown_strategy():
    with pytest.raises(ValueError, match="strategy must be one of exact, bernoulli, found 'all'"):
        mask_tokens(IDS, **BERT, strategy="all")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_wrong_device():
    with pytest.raises(RuntimeError, match="positions must be on the device of input_ids"):
        mask_tokens(IDS.cuda(), positions=torch.arange(10), **BERT)
