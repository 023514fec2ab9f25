"""csrc/mask_tokens.cu executed on the CPU against the eager reference."""

import ctypes
import random

import pytest
import torch
from cuda_on_cpu.harness import CASES, load, run_sanitized

from mtfast.ops import mask_tokens_ref
from mtfast.ops._philox import threshold

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


def random_arguments(draw: random.Random) -> tuple[torch.Tensor, dict]:
    """A random batch and the arguments to mask it with."""
    vocab_size = draw.choice([40, 1000, 30522])
    dtype = draw.choice([torch.int32, torch.int64])
    options: dict = {}
    if draw.random() < 0.6:
        lengths = [draw.choice([0, 1, 2, 5, 25, 100, 400]) for _ in range(draw.randint(0, 6))]
        shape: tuple[int, ...] = (sum(lengths),)
        options["cu_seqlens"] = torch.tensor([0, *lengths]).cumsum(0).int()
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
        "mask_token_id": vocab_size // 2,
        "vocab_size": vocab_size,
        "seed": draw.randint(-(2**63), 2**63 - 1),
        "mlm_probability": draw.choice([0.0, 0.15, 0.5, 1.0]),
        "mask_fraction": mask_fraction,
        "random_fraction": min(draw.choice([0.1, 1.0]), 1 - mask_fraction),
        "strategy": draw.choice(["exact", "bernoulli"]),
    }
    return ids, options


def c_arguments(ids: torch.Tensor, arguments: dict) -> tuple[Batch, Options]:
    special = sorted(set(arguments["special_ids"]))
    begin = [i for i in special if i - 1 not in special]
    end = [i + 1 for i in special if i + 1 not in special]
    ordinary = arguments["vocab_size"] - len(special)
    mask_below = threshold(arguments["mask_fraction"])
    random_below = min(2**32, mask_below + threshold(arguments["random_fraction"]))
    shift = 63 - ordinary.bit_length()
    options = Options(
        len(begin),
        len(special),
        (ctypes.c_int32 * RUNS)(*begin),
        (ctypes.c_int32 * RUNS)(*end),
        arguments["vocab_size"],
        arguments["mask_token_id"],
        arguments["seed"] % 2**64,
        arguments["mlm_probability"],
        threshold(arguments["mlm_probability"]),
        mask_below,
        random_below,
        (ordinary << shift) // max(1, random_below - mask_below),
        shift,
    )
    optional = [arguments.get(name) for name in ("positions", "cu_seqlens", "subword")]
    sequences = ids.size(0) if optional[1] is None else len(optional[1]) - 1
    pointers = [None if tensor is None else tensor.data_ptr() for tensor in optional]
    return Batch(ids.data_ptr(), *pointers, ids.numel(), sequences, ids.size(-1)), options


def compare(kernels, draw: random.Random, configurations: int) -> None:
    for _ in range(configurations):
        ids, arguments = random_arguments(draw)
        # Everything starts one element into its memory every other time: not aligned to 16 bytes.
        offset = draw.randint(0, 1)
        ids = torch.cat([ids.new_zeros(offset), ids.flatten()])[offset:].view(ids.shape)
        output, labels = (
            ids.new_full((ids.numel() + offset,), -7)[offset:].view(ids.shape) for _ in range(2)
        )
        batch, options = c_arguments(ids, arguments)
        exact = arguments["strategy"] == "exact"
        kernels.mtfast_mask_tokens(
            ctypes.byref(batch), ctypes.byref(options), ids.element_size(), exact, output, labels, None
        )
        expected = mask_tokens_ref(ids, **arguments)
        summary = {key: value for key, value in arguments.items() if not isinstance(value, torch.Tensor)}
        assert torch.equal(labels, expected.labels), (ids.shape, ids.dtype, summary)
        assert torch.equal(output, expected.input_ids), (ids.shape, ids.dtype, summary)


def small_shapes(kernels) -> None:
    torch.manual_seed(0)
    compare(kernels, random.Random(0), 10)


def long_sequence(kernels) -> None:
    """Longer than the draws that fit in shared memory."""
    torch.manual_seed(0)
    ids = torch.randint(5, 1000, (9000,))
    arguments = {
        "special_ids": [0, 1, 2],
        "mask_token_id": 2,
        "vocab_size": 1000,
        "seed": 3,
        "mlm_probability": 0.15,
        "mask_fraction": 0.8,
        "random_fraction": 0.1,
    }
    batch, options = c_arguments(ids[None], arguments)
    output, labels = torch.empty_like(ids), torch.empty_like(ids)
    kernels.mtfast_mask_tokens(ctypes.byref(batch), ctypes.byref(options), 8, 1, output, labels, None)
    expected = mask_tokens_ref(ids, **arguments)
    assert torch.equal(labels, expected.labels) and torch.equal(output, expected.input_ids)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_agrees_with_the_reference(case):
    torch.manual_seed(0)
    compare(load("mask_tokens.cu", case), random.Random(1), 5 if case.races else 65)


def test_long_sequence():
    long_sequence(load("mask_tokens.cu"))


def test_sanitized():
    run_sanitized("mask_tokens.cu", "test_kernels_mask_tokens:small_shapes")
