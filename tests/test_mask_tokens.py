"""mask_tokens: equal to its reference, invariant to layout, right in distribution, strict about arguments."""

from __future__ import annotations

import pytest
import torch
from devices import DEVICES, needs_cuda
from mask_tokens_cases import (
    BERT,
    SPECIAL,
    STRATEGIES,
    Mask,
    assert_same,
    check_a_seed_tensor,
    check_against_the_reference,
    check_empty_and_one_token,
    check_equal_draws,
    check_exact_counts,
    check_lengths_around_tiles,
    check_order_ranks_and_layout_do_not_matter,
    check_replacements_are_uniform_and_never_special,
    check_seeds_are_independent,
    check_shares,
    check_whole_words,
    ordinary_ids,
)

from mtfast.ops import MaskedTokens, mask_tokens, mask_tokens_ref


@pytest.fixture(params=DEVICES)
def mask(request: pytest.FixtureRequest) -> Mask:
    """mask_tokens on a device, taking and giving tensors on the CPU."""

    def on_device(ids: torch.Tensor, **options) -> MaskedTokens:
        moved = {k: v.to(request.param) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
        return MaskedTokens(*(x.cpu() for x in mask_tokens(ids.to(request.param), **moved)))

    return on_device


def test_agrees_with_the_reference_on_200_batches(mask):
    check_against_the_reference(mask, range(200))


def test_lengths_around_tiles_and_equal_draws(mask):
    check_lengths_around_tiles(mask)
    check_equal_draws(mask)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_ten_million_tokens(strategy, dtype, mask):
    ids = ordinary_ids(20_000, 500, dtype=dtype)
    options = BERT | {"strategy": strategy}
    masked = mask(ids, **options)
    for rows in (slice(0, 100), slice(9_990, 10_090), slice(19_900, 20_000)):  # the reference is slow
        positions = torch.arange(rows.start * 500, rows.stop * 500).view(-1, 500)
        expected = mask_tokens_ref(ids[rows], positions=positions, **options)
        assert_same(MaskedTokens(*(x[rows] for x in masked)), expected)


def test_empty_and_one_token(mask):
    check_empty_and_one_token(mask)


@pytest.mark.parametrize("whole_words", [False, True])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_order_ranks_and_layout_do_not_matter(strategy, whole_words, mask):
    check_order_ranks_and_layout_do_not_matter(mask, strategy, whole_words)


@pytest.mark.parametrize("whole_words", [False, True])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_threads_do_not_matter(strategy, whole_words):
    ids = ordinary_ids(64, 512)
    options = BERT | {"strategy": strategy, "subword": torch.rand(30522) < 0.3 if whole_words else None}
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(mask_tokens(ids, **options))
    finally:
        torch.set_num_threads(threads)
    assert_same(*results)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_offsets_of_64_bits_are_as_good(strategy):
    ids, options = ordinary_ids(100), BERT | {"strategy": strategy}
    narrow, wide = (
        mask_tokens(ids, cu_seqlens=x, **options)
        for x in (offsets(0, 40, 40, 100), torch.tensor([0, 40, 40, 100]))
    )
    assert_same(narrow, wide)


def test_shares_over_a_million_tokens(mask):
    check_shares(mask)


@pytest.mark.parametrize("random_fraction", [1.0, 0.1])
def test_random_replacements_are_uniform_and_never_special(random_fraction, mask):
    check_replacements_are_uniform_and_never_special(mask, random_fraction)


def test_seeds_are_independent(mask):
    check_seeds_are_independent(mask)


def test_a_seed_tensor(mask):
    check_a_seed_tensor(mask)


@pytest.mark.parametrize("probability", [0.15, 0.1, 0.5, 0.0, 1.0])
def test_exact_chooses_as_many_as_the_host_counts(probability, mask):
    check_exact_counts(mask, probability)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_whole_words(strategy, mask):
    check_whole_words(mask, strategy)


def test_opcheck():
    ids = ordinary_ids(4, 32, dtype=torch.int32)
    arguments = (ids, torch.arange(128).view(4, 32), None, torch.rand(30522) < 0.4)
    cu_seqlens = torch.tensor([0, 5, 32], dtype=torch.int32)
    for seed in ((7, None), (0, torch.tensor([7]))):
        rest = (SPECIAL, 103, 30522, *seed, 0.15, 0.8, 0.1)
        for exact in (True, False):
            torch.library.opcheck(torch.ops.mtfast.mask_tokens.default, (*arguments, *rest, exact))
        packed = (ids[0], None, cu_seqlens, None, *rest, True)
        torch.library.opcheck(torch.ops.mtfast.mask_tokens.default, packed)


def test_compile_and_export():
    class Module(torch.nn.Module):
        def forward(self, ids: torch.Tensor, seed: torch.Tensor) -> tuple[torch.Tensor, ...]:
            masked, followed = mask_tokens(ids, **BERT), mask_tokens(ids, **(BERT | {"seed": seed}))
            return masked.input_ids, (masked.labels != -100).sum(1), *followed

    ids = ordinary_ids(4, 32)
    compiled = torch.compile(Module(), fullgraph=True, backend="aot_eager")
    length = torch.export.Dim("length", max=512)
    example, dynamic_shapes = (ordinary_ids(4, 20), torch.tensor([1])), ({1: length}, None)
    exported = torch.export.export(Module(), example, dynamic_shapes=dynamic_shapes).module()
    for seed in (torch.tensor([2]), torch.tensor([3])):
        expected = Module()(ids, seed)
        for module in (compiled, exported):
            for value, right in zip(module(ids, seed), expected, strict=True):
                assert torch.equal(value, right)


@needs_cuda
@pytest.mark.gpu
def test_cuda_graph_replays(monkeypatch):
    # Looking at values waits for the GPU, which a capture does not allow.
    monkeypatch.setattr("mtfast.ops._library.CHECK_VALUES", False)
    ids = ordinary_ids(16, 512).cuda()
    mask_tokens(ids, **BERT)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        masked = mask_tokens(ids, **BERT)
    ids.copy_(ordinary_ids(16, 512))
    graph.replay()
    assert_same(masked, mask_tokens_ref(ids, **BERT))


@needs_cuda
@pytest.mark.gpu
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_cuda_graph_follows_the_seed_tensor(strategy, monkeypatch):
    monkeypatch.setattr("mtfast.ops._library.CHECK_VALUES", False)
    ids, seed = ordinary_ids(16, 512).cuda(), torch.tensor([1], device="cuda")
    options = BERT | {"seed": seed, "strategy": strategy}
    mask_tokens(ids, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        masked = mask_tokens(ids, **options)
    for value in (1, -1, 2**40):
        seed.fill_(value)
        graph.replay()
        assert_same(masked, mask_tokens_ref(ids, **(options | {"seed": value})), value)


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
        (IDS, {"positions": torch.arange(10).to("meta")}, "positions must be on the device of input_ids"),
        (IDS, {"cu_seqlens": offsets(0, 10).to("meta")}, "cu_seqlens must be on the device of input_ids"),
        (IDS, {"subword": torch.zeros(30522).to("meta")}, "subword must be on the device of input_ids"),
        (IDS, {"cu_seqlens": offsets(1, 10)}, "cu_seqlens must start at 0, found 1"),
        (IDS, {"cu_seqlens": offsets(0, 6, 4, 10)}, "cu_seqlens must not fall, but goes from 6 to 4"),
        (IDS, {"cu_seqlens": offsets(0, 9)}, "cu_seqlens must end at the number of tokens, 10, found 9"),
        (IDS, {"cu_seqlens": offsets(0, 10).float()}, "cu_seqlens must be int32"),
        (
            IDS,
            {"cu_seqlens": torch.tensor([0, 2**32 + 10])},
            "cu_seqlens must end at the number of tokens, 10",
        ),
        (IDS, {"cu_seqlens": offsets()}, "cu_seqlens must have the shape .sequences . 1."),
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
        (IDS, {"random_fraction": 1.1}, "random_fraction must be in"),
        (IDS, {"mask_fraction": 0.8, "random_fraction": 0.3}, "must be at most 1, found 1.1"),
    ],
)
def test_wrong_arguments_say_what_is_wrong(ids, options, message):
    with pytest.raises(RuntimeError, match=f"mask_tokens: .*{message}"):
        mask_tokens(ids, **(BERT | options))


def test_unknown_strategy():
    with pytest.raises(ValueError, match="strategy must be one of exact, bernoulli, found 'all'"):
        mask_tokens(IDS, **BERT, strategy="all")


@needs_cuda
@pytest.mark.gpu
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"positions": torch.arange(10)}, "positions must be on the device of input_ids"),
        ({"cu_seqlens": offsets(0, 10)}, "cu_seqlens must be on the device of input_ids"),
        ({"cu_seqlens": offsets(1, 10).cuda}, "cu_seqlens must start at 0, found 1"),
        ({"cu_seqlens": offsets(0, 6, 4, 10).cuda}, "cu_seqlens must not fall, but goes from 6 to 4"),
        ({"cu_seqlens": offsets(0, 9).cuda}, "cu_seqlens must end at the number of tokens, 10, found 9"),
        ({"vocab_size": 205}, "input_ids must be in .0, 205."),
    ],
)
def test_wrong_arguments_on_a_gpu(options, message):
    options = {key: value() if callable(value) else value for key, value in options.items()}
    with pytest.raises(RuntimeError, match=f"mask_tokens: {message}"):
        mask_tokens(IDS.cuda(), **(BERT | options))
