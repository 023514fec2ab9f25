"""What the tests of mask_tokens share: random arguments, and what holds whoever masks.

A `Mask` is mask_tokens or anything with its arguments and result: the op on a device, the emulated kernels.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable

import pytest
import torch
from real_lengths import REAL_LENGTHS
from torch import Tensor

from mtfast.ops import MaskedTokens, exact_count, mask_tokens_ref

Mask = Callable[..., MaskedTokens]
SPECIAL = [0, 100, 101, 102, 103]
BERT = {"special_ids": SPECIAL, "mask_token_id": 103, "vocab_size": 30522, "seed": 7}
STRATEGIES = ("exact", "bernoulli")


def ordinary_ids(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.randint(1000, 30522, shape, dtype=dtype)


def offsets(lengths: Iterable[int]) -> Tensor:
    """cu_seqlens of sequences of these lengths."""
    return torch.tensor([0, *lengths]).cumsum(0).int()


def assert_same(a: MaskedTokens, b: MaskedTokens, what: object = "") -> None:
    assert a.input_ids.dtype == b.input_ids.dtype and a.labels.dtype == b.labels.dtype, what
    assert torch.equal(a.labels, b.labels) and torch.equal(a.input_ids, b.input_ids), what


def random_arguments(number: int) -> tuple[Tensor, dict]:
    """Batch `number` and the arguments to mask it with."""
    draw = random.Random(number)
    torch.manual_seed(number)
    vocab_size = draw.choice([40, 1000, 30522])
    dtype = draw.choice([torch.int32, torch.int64])
    options: dict = {}
    layout = draw.choice(["packed", "packed", "one", "padded"])
    shape: tuple[int, ...]
    if layout == "packed":
        lengths = [draw.choice([0, 1, 2, 5, 25, 100, 400]) for _ in range(draw.randint(0, 6))]
        shape = (sum(lengths),)
        options["cu_seqlens"] = offsets(lengths)
    elif layout == "one":
        shape = (draw.choice([0, 1, 33, 700]),)
    else:
        shape = (draw.randint(1, 5), draw.choice([0, 1, 7, 128, 301]))
    ids = torch.randint(vocab_size, shape, dtype=dtype)
    kind = draw.choice(["none", "scattered", "shifted"])
    if kind == "scattered":
        options["positions"] = torch.randint(-(2**62), 2**62, shape)
    elif kind == "shifted":
        options["positions"] = torch.arange(ids.numel()).view(shape) + draw.randint(0, 2**60)
    if draw.random() < 0.5:
        options["subword"] = torch.rand(vocab_size) < 0.4
    mask_fraction = draw.choice([0.8, 0.0, 1.0, draw.random()])
    options |= {
        "special_ids": draw.sample(range(vocab_size), draw.choice([0, 1, 5, 20])),
        "mask_token_id": draw.randrange(vocab_size),
        "vocab_size": vocab_size,
        "seed": draw.randint(-(2**63), 2**63 - 1),
        "mlm_probability": draw.choice([0.0, 0.15, 0.5, 1.0, draw.random()]),
        "mask_fraction": mask_fraction,
        "random_fraction": min(draw.choice([0.0, 0.1, 1.0]), 1 - mask_fraction),
        "strategy": draw.choice(STRATEGIES),
    }
    if draw.random() < 0.5:
        options["seed"] = torch.tensor([options["seed"]])
    return ids, options


def check_against_the_reference(mask: Mask, numbers: Iterable[int]) -> None:
    """Bit for bit on these random batches."""
    for number in numbers:
        ids, options = random_arguments(number)
        summary = {k: v for k, v in options.items() if not isinstance(v, Tensor) or v.numel() == 1}
        what = (number, ids.shape, ids.dtype, summary)
        assert_same(mask(ids, **options), mask_tokens_ref(ids, **options), what)


TILE = 128  # what a warp of the kernels takes at a time; they keep four of them


def check_lengths_around_tiles(mask: Mask) -> None:
    """Bit for bit the reference's, short and long, empty and full sequences side by side."""
    around = [n * TILE + d for n in (1, 4) for d in (-1, 0, 1)]
    packed = ([3, 0, *around, 0, 0, 1, 2, 700, 20], [0, 9, *reversed(around), 5], [4 * 4 * TILE + 50, 0, 600])
    torch.manual_seed(6)
    subword = torch.rand(30522) < 0.4
    for number, lengths in enumerate(packed):
        ids = ordinary_ids(sum(lengths), dtype=(torch.int64, torch.int32)[number % 2])
        ids[torch.rand(ids.shape) < 0.1] = 102
        for strategy in STRATEGIES:
            for words in (None, subword):
                options = BERT | {"cu_seqlens": offsets(lengths), "strategy": strategy, "subword": words}
                assert_same(mask(ids, **options), mask_tokens_ref(ids, **options), (lengths, strategy))
    for length in around:
        ids = ordinary_ids(5, length)
        assert_same(mask(ids, **BERT), mask_tokens_ref(ids, **BERT), length)


def check_equal_draws(mask: Mask) -> None:
    """Of tokens whose draws are equal, as those of one position are, "exact" chooses the first ones."""
    torch.manual_seed(7)
    subword = torch.rand(30522) < 0.4
    lengths = [40, 1, 130, 0, 512, 513, 4 * 4 * TILE + 90]
    index = torch.arange(sum(lengths))
    ids = ordinary_ids(sum(lengths))
    ids[torch.rand(ids.shape) < 0.2] = 0
    for positions in (torch.zeros_like(index), index // 50, index % 3):
        for words in (None, subword):
            options = BERT | {"positions": positions, "cu_seqlens": offsets(lengths), "subword": words}
            assert_same(mask(ids, **options), mask_tokens_ref(ids, **options), positions[:100:25])
    labels = mask(ids[:40], positions=torch.zeros(40, dtype=torch.int64), **BERT).labels
    candidates = (ids[:40] != 0).nonzero().squeeze(1)
    chosen = int(exact_count(torch.tensor(len(candidates))))
    assert torch.equal((labels != -100).nonzero().squeeze(1), candidates[:chosen])


def check_empty_and_one_token(mask: Mask) -> None:
    for strategy in STRATEGIES:
        options = BERT | {"strategy": strategy, "mlm_probability": 1.0}
        for shape in [(0,), (0, 5), (3, 0)]:
            masked = mask(ordinary_ids(*shape), **options)
            assert masked.input_ids.shape == masked.labels.shape == shape
        assert mask(ordinary_ids(0), cu_seqlens=offsets([]), **options).labels.numel() == 0
        assert mask(torch.tensor([2000]), **options).labels.item() == 2000
        assert mask(torch.tensor([101]), **options).labels.item() == -100


def check_order_ranks_and_layout_do_not_matter(mask: Mask, strategy: str, whole_words: bool) -> None:
    torch.manual_seed(1)
    lengths = [*REAL_LENGTHS, 0, 1, 2]
    sequences = [ordinary_ids(n) for n in lengths]
    positions = [torch.arange(n) + 1000 * i for i, n in enumerate(lengths)]
    options = BERT | {"strategy": strategy}
    if whole_words:
        options["subword"] = torch.rand(30522) < 0.3

    def packed(order: list[int]) -> dict[int, MaskedTokens]:
        counts = [lengths[i] for i in order]
        masked = mask(
            torch.cat([sequences[i] for i in order]),
            positions=torch.cat([positions[i] for i in order]),
            cu_seqlens=offsets(counts),
            **options,
        )
        parts = zip(*(x.split(counts) for x in masked), strict=True)
        return {i: MaskedTokens(*part) for i, part in zip(order, parts, strict=True)}

    def same(other: dict[int, MaskedTokens]) -> None:
        for i, part in other.items():
            assert_same(part, expected[i], f"sequence {i}")

    everything = list(range(len(lengths)))
    expected = packed(everything)
    same(packed(random.Random(2).sample(everything, len(everything))))
    for rank in range(3):
        same(packed(everything[rank::3]))

    padded = torch.zeros(len(lengths), max(lengths), dtype=torch.int64)
    padded_positions = torch.zeros_like(padded)
    for i, n in enumerate(lengths):
        padded[i, :n], padded_positions[i, :n] = sequences[i], positions[i]
    masked = mask(padded, positions=padded_positions, **options)
    same({i: MaskedTokens(*(x[i, :n] for x in masked)) for i, n in enumerate(lengths)})
    assert all(bool((masked.labels[i, n:] == -100).all()) for i, n in enumerate(lengths))


def assert_share(count: int, n: int, p: float) -> None:
    error = (n * p * (1 - p)) ** 0.5
    assert abs(count - n * p) <= 4 * error, f"{count} of {n}, expected {n * p:.0f} +- {error:.0f}"


def check_shares(mask: Mask) -> None:
    """Over a million tokens: 15% chosen; of those 80% hidden, 10% kept, 10% replaced."""
    n = 1_000_000
    torch.manual_seed(2)
    ids = ordinary_ids(n)
    ids[::50] = 101
    masked = mask(ids, strategy="bernoulli", **BERT)
    assert bool((masked.labels[::50] == -100).all()) and bool((masked.input_ids[::50] == 101).all())
    chosen = masked.labels != -100
    assert torch.equal(masked.labels[chosen], ids[chosen])
    assert torch.equal(masked.input_ids[~chosen], ids[~chosen])
    count = int(chosen.sum())
    assert_share(count, n - n // 50, 0.15)
    became = masked.input_ids[chosen]
    hidden = became == 103
    kept = ~hidden & (became == ids[chosen])
    assert_share(int(hidden.sum()), count, 0.8)
    assert_share(int(kept.sum()), count, 0.1)
    assert_share(int((~hidden & ~kept).sum()), count, 0.1)


def check_replacements_are_uniform_and_never_special(mask: Mask, random_fraction: float) -> None:
    stats = pytest.importorskip("scipy.stats")
    options = BERT | {"mlm_probability": 1.0, "mask_fraction": 0.0, "vocab_size": 500}
    masked = mask(
        torch.full((1_000_000,), 499), strategy="bernoulli", random_fraction=random_fraction, **options
    )
    counts = torch.bincount(masked.input_ids, minlength=500)
    assert counts[SPECIAL].sum() == 0
    ordinary = [i for i in range(499) if i not in SPECIAL]
    assert stats.chisquare(counts[ordinary].numpy()).pvalue > 0.001


def check_seeds_are_independent(mask: Mask) -> None:
    stats = pytest.importorskip("scipy.stats")
    torch.manual_seed(3)
    ids = ordinary_ids(1_000_000)
    first, second = (
        mask(ids, strategy="bernoulli", **(BERT | {"seed": seed})).labels != -100 for seed in (7, 8)
    )
    both, only_first = int((first & second).sum()), int((first & ~second).sum())
    only_second, neither = int((~first & second).sum()), int((~first & ~second).sum())
    assert stats.chi2_contingency([[both, only_first], [only_second, neither]]).pvalue > 0.001


def check_a_seed_tensor(mask: Mask) -> None:
    """It gives what its int gives, and after a change of its value what that gives."""
    torch.manual_seed(8)
    ids, subword = ordinary_ids(6, 700), torch.rand(30522) < 0.4
    seed = torch.zeros(1, dtype=torch.int64)
    for value in (0, -1, 2**63 - 1, -(2**63), 5 << 32):
        seed.fill_(value)
        for strategy in STRATEGIES:
            for more in ({}, {"subword": subword}, {"positions": torch.arange(4200).view(6, 700) * 3}):
                options = BERT | {"strategy": strategy, **more}
                expected = mask_tokens_ref(ids, **(options | {"seed": value}))
                for shape in ((1,), (), (1, 1)):
                    assert_same(mask(ids, **(options | {"seed": seed.view(shape)})), expected, value)


def check_exact_counts(mask: Mask, probability: float) -> None:
    """max(1, floor(p * candidates + 1/2)) in every sequence that has a candidate."""
    lengths = [*range(200), *REAL_LENGTHS]
    torch.manual_seed(4)
    ids = ordinary_ids(sum(lengths))
    ids[torch.rand(ids.shape) < 0.1] = 102
    labels = mask(ids, cu_seqlens=offsets(lengths), mlm_probability=probability, **BERT).labels
    candidates = torch.tensor([int((part != 102).sum()) for part in ids.split(lengths)])
    chosen = torch.tensor([int((part != -100).sum()) for part in labels.split(lengths)])
    by_hand = [max(1, int(probability * n + 0.5)) if n else 0 for n in candidates.tolist()]
    assert chosen.tolist() == by_hand == exact_count(candidates, probability).tolist()
    rows = torch.nonzero_static(labels != -100, size=sum(by_hand)).squeeze(1)
    assert torch.equal(rows, (labels != -100).nonzero().squeeze(1))


def check_whole_words(mask: Mask, strategy: str) -> None:
    """Never split, and, with "exact", as many of them as of tokens otherwise."""
    torch.manual_seed(5)
    subword = torch.rand(30522) < 0.4
    lengths = [3, 0, 997, *REAL_LENGTHS]
    ids = ordinary_ids(sum(lengths))
    ids[::17] = 101
    labels = mask(ids, cu_seqlens=offsets(lengths), subword=subword, strategy=strategy, **BERT).labels
    for tokens, targets in zip(ids.split(lengths), labels.split(lengths), strict=True):
        words: list[list[bool]] = []  # of each piece of each word: was it chosen?
        previous = 101
        for token, target in zip(tokens.tolist(), targets.tolist(), strict=True):
            if token != 101 and subword[token] and previous != 101:
                words[-1].append(target != -100)
            elif token != 101:
                words.append([target != -100])
            previous = token
        assert all(len(set(word)) == 1 for word in words)
        if strategy == "exact":
            assert sum(word[0] for word in words) == (max(1, int(0.15 * len(words) + 0.5)) if words else 0)
    assert bool((labels != -100).any())
