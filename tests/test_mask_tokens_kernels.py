"""csrc/mask_tokens.cu executed on the CPU: what holds of the op holds of it; and its machine code.

MTFAST_TEST_SWEEP=full compares ten million tokens with the CPU's, otherwise half a million, and 200 random
batches with the reference in each thread order, otherwise in one, and 40 in the others; it reads the machine
code for Ampere too.
"""

from __future__ import annotations

import ctypes

import pytest
import torch
from cuda_on_cpu.harness import CASES, SHARED_KIB, Case, Kernels, load
from cuda_on_cpu.machine_code import disassembled
from mask_tokens_cases import (
    BERT,
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
    offsets,
    ordinary_ids,
)

from mtfast.ops import MaskedTokens, mask_tokens
from mtfast.ops._philox import threshold

SOURCE = "mask_tokens.cu"
KERNELS = 2 * 2 * 2  # of each dtype of ids, of tokens and of whole words: "bernoulli" and "exact"
RUNS = 64


class Options(ctypes.Structure):
    """struct Options of csrc/mask_tokens.h, its SpecialIds first."""

    _fields_ = (
        ("runs", ctypes.c_int32),
        ("special", ctypes.c_int32),
        ("begin", ctypes.c_int32 * RUNS),
        ("end", ctypes.c_int32 * RUNS),
        ("vocab_size", ctypes.c_int64),
        ("mask_token_id", ctypes.c_int64),
        ("seed", ctypes.c_uint64),
        ("seed_tensor", ctypes.c_void_p),
        ("mlm_probability", ctypes.c_double),
        ("choose_below", ctypes.c_uint64),
        ("mask_below", ctypes.c_uint64),
        ("random_below", ctypes.c_uint64),
        ("random_scale", ctypes.c_uint64),
        ("random_shift", ctypes.c_int32),
    )


class Batch(ctypes.Structure):
    _fields_ = (
        ("input_ids", ctypes.c_void_p),
        ("positions", ctypes.c_void_p),
        ("cu_seqlens", ctypes.c_void_p),
        ("subword", ctypes.c_void_p),
        ("total", ctypes.c_int64),
        ("sequences", ctypes.c_int64),
        ("row_length", ctypes.c_int64),
    )


def c_arguments(ids: torch.Tensor, arguments: dict) -> tuple[Batch, Options]:
    special = sorted(set(arguments["special_ids"]))
    begin = [i for i in special if i - 1 not in special]
    end = [i + 1 for i in special if i + 1 not in special]
    ordinary = arguments["vocab_size"] - len(special)
    mask_below = threshold(arguments["mask_fraction"])
    random_below = min(2**32, mask_below + threshold(arguments["random_fraction"]))
    shift = 63 - ordinary.bit_length()
    seed = arguments["seed"]
    on_host = not isinstance(seed, torch.Tensor)
    options = Options(
        len(begin),
        len(special),
        (ctypes.c_int32 * RUNS)(*begin),
        (ctypes.c_int32 * RUNS)(*end),
        arguments["vocab_size"],
        arguments["mask_token_id"],
        seed % 2**64 if on_host else 0,
        None if on_host else seed.data_ptr(),
        arguments["mlm_probability"],
        threshold(arguments["mlm_probability"]),
        mask_below,
        random_below,
        (ordinary << shift) // max(1, random_below - mask_below),
        shift,
    )
    optional = [arguments.get(name) for name in ("positions", "cu_seqlens", "subword")]
    rows = ids.size(0) if ids.dim() == 2 else 1
    sequences = rows if optional[1] is None else len(optional[1]) - 1
    pointers = [None if tensor is None else tensor.data_ptr() for tensor in optional]
    return Batch(ids.data_ptr(), *pointers, ids.numel(), sequences, ids.size(-1)), options


def emulated(kernels: Kernels, offset: int = 0) -> Mask:
    """mask_tokens by these kernels. All tensors of tokens start `offset` elements into their memory."""

    def mask(ids: torch.Tensor, strategy: str = "exact", **arguments) -> MaskedTokens:
        ids = torch.cat([ids.new_zeros(offset), ids.flatten()])[offset:].view(ids.shape)
        masked = MaskedTokens(
            *(ids.new_full((ids.numel() + offset,), -7)[offset:].view(ids.shape) for _ in range(2))
        )
        batch, options = c_arguments(ids, DEFAULTS | arguments)
        kernels.mtfast_mask_tokens(
            ctypes.byref(batch), ctypes.byref(options), ids.element_size(), strategy == "exact", *masked, None
        )
        return masked

    return mask


DEFAULTS = {"mlm_probability": 0.15, "mask_fraction": 0.8, "random_fraction": 0.1}


@pytest.fixture(scope="module")
def mask() -> Mask:
    return emulated(load(SOURCE))


@pytest.mark.sweep
@pytest.mark.parametrize("case", CASES, ids=str)
def test_agrees_with_the_reference_on_200_batches(case, full_sweep):
    kernels = load(SOURCE, case)
    count = 10 if case.races else 200 if full_sweep or case == CASES[0] else 40
    for offset in (0, 1):  # at 1 nothing is aligned to 16 bytes
        check_against_the_reference(emulated(kernels, offset), range(offset, count, 2))


@pytest.mark.sweep
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_agrees_with_the_cpu_on_many_tokens(strategy, dtype, mask, full_sweep):
    ids = ordinary_ids(20_000 if full_sweep else 1_000, 500, dtype=dtype)
    options = BERT | {"strategy": strategy}
    assert_same(mask(ids, **options), mask_tokens(ids, **options))


def test_empty_and_one_token(mask):
    check_empty_and_one_token(mask)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_lengths_around_tiles_and_equal_draws(case):
    kernels = load(SOURCE, case)
    for offset in (0, 1):
        check_lengths_around_tiles(emulated(kernels, offset))
        check_equal_draws(emulated(kernels, offset))


@pytest.mark.parametrize("whole_words", [False, True])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_order_ranks_and_layout_do_not_matter(strategy, whole_words, mask):
    check_order_ranks_and_layout_do_not_matter(mask, strategy, whole_words)


def test_distribution(mask):
    check_shares(mask)
    check_replacements_are_uniform_and_never_special(mask, 0.1)
    check_seeds_are_independent(mask)


def test_a_seed_tensor(mask):
    check_a_seed_tensor(mask)


@pytest.mark.parametrize("probability", [0.15, 0.1, 0.5, 0.0, 1.0])
def test_exact_chooses_as_many_as_the_host_counts(probability, mask):
    check_exact_counts(mask, probability)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_whole_words(strategy, mask):
    check_whole_words(mask, strategy)


@pytest.mark.parametrize("architecture", SHARED_KIB)
def test_every_kernel_fits_every_architecture(architecture):
    kernels = load(SOURCE, Case(architecture=architecture))
    mask = emulated(kernels)
    kernels.take_launched()
    for dtype in (torch.int32, torch.int64):
        for options in ({}, {"positions": torch.arange(9000)}, {"subword": torch.rand(30522) < 0.3}):
            for strategy in STRATEGIES:
                mask(ordinary_ids(9000, dtype=dtype), strategy, **(BERT | options))
    assert kernels.take_launched() == KERNELS


HOSTILE = (
    [0, 500, 120],
    [-3, 20, 120],
    [120, 7, 120],
    [0, 120, 2**31 - 1],
    [5, 20, 20, 100],
    [7, -(2**31), 3],
    [40, 40],
    [0],
    [130],
)


def check_wrong_offsets(kernels: Kernels) -> None:
    """Nothing is read or written out of bounds, every token is written; one that no sequence covers stays."""
    mask = emulated(kernels)
    ids = ordinary_ids(120)
    for bounds in HOSTILE:
        for strategy in STRATEGIES:
            for subword in (None, torch.ones(30522, dtype=torch.bool)):
                options = BERT | {"strategy": strategy, "cu_seqlens": torch.tensor(bounds).int()}
                masked = mask(ids, **(options | {"subword": subword}))
                kept = masked.labels == -100
                assert torch.equal(masked.input_ids[kept], ids[kept])
                assert torch.equal(masked.labels[~kept], ids[~kept])
    masked = mask(ids, "exact", **(BERT | {"cu_seqlens": torch.tensor([5, 20, 20, 100]).int()}))
    expected = mask_tokens(
        ids[5:100], positions=torch.arange(5, 100), cu_seqlens=offsets([15, 0, 80]), **BERT
    )
    assert_same(MaskedTokens(*(x[5:100] for x in masked)), expected)
    assert bool((masked.labels[:5] == -100).all()) and bool((masked.labels[100:] == -100).all())


def test_wrong_offsets():
    check_wrong_offsets(load(SOURCE))


def small_shapes(kernels: Kernels) -> None:
    check_wrong_offsets(kernels)
    check_against_the_reference(emulated(kernels), range(0, 30, 2))
    check_against_the_reference(emulated(kernels, 1), range(1, 30, 2))
    check_lengths_around_tiles(emulated(kernels))


@pytest.mark.sweep
@pytest.mark.parametrize(("strategy", "load"), [("bernoulli", "LDG"), ("exact", "LDGSTS")])
def test_tokens_move_16_bytes_at_a_time(strategy, load):
    kernels = disassembled(SOURCE, strategy)
    assert kernels
    for kernel in kernels:
        vectors = 2 if "long" in kernel.name else 1
        found = {name: kernel.count(rf"{name}\.E\.(\w+\.)*128") for name in (load, "STG")}
        assert found[load] >= vectors and found["STG"] >= 2 * vectors, f"{kernel}: {found}"
