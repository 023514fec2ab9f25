"""What the kernels ask of a GPU, on recorded lengths, against the least that their results need.

Counted while the emulation runs them, so that a multiple of the floor is held without a GPU. A floor is the
bytes of what must be read and written, each once.

MTFAST_TEST_SWEEP=full takes the 16,384 tokens of a large step, otherwise 2,048.
"""

from __future__ import annotations

import ctypes

import pytest
import torch
from bias_gelu_cases import draw as draw_gelu
from cuda_on_cpu.costs import Costs
from cuda_on_cpu.harness import Case, load, load_all
from dropout_add_layer_norm_cases import cast, draw
from mask_tokens_cases import BERT, offsets, ordinary_ids
from packed_attention_cases import make_batch
from test_bias_gelu_kernels import emulated as bias_gelu_by
from test_concat_mlp_kernels import Inputs, Sums, chunk_sums
from test_dropout_add_layer_norm_kernels import SOURCES as LAYER_NORM
from test_dropout_add_layer_norm_kernels import emulated as emulated_layer_norm
from test_mask_tokens_kernels import emulated
from test_packed_attention_kernels import CBackward, CForward, CTensor, shape_of

from benchmarks.lengths import draw_tokens

pytestmark = pytest.mark.sweep

COUNTED = Case(costs=True)
HEADS, HEAD_DIM, DROPOUT = 12, 64, 0.1
MATRIX = HEADS * HEAD_DIM * 2  # bytes of a token in q, k, v, ...
STATISTICS = HEADS * 8


@pytest.fixture(scope="module")
def tokens(full_sweep) -> int:
    return 16_384 if full_sweep else 2_048


def attention(lengths: str, tokens: int, backward: bool) -> tuple[Costs, int]:
    """Costs and floor of packed attention in one direction."""
    kernels = load(f"packed_attention{'_backward' if backward else ''}.cu", COUNTED)
    batch = make_batch(draw_tokens(lengths, tokens), HEADS, HEAD_DIM, torch.bfloat16)
    seed = torch.tensor([1])
    shape = shape_of(batch, DROPOUT, seed)
    # A large step nearly always has a sequence of up to 128 tokens, a small one here not.
    shape.max_seqlen = max(128, batch.max_seqlen)
    # Costs do not depend on what is in these: a backward needs no forward.
    out, dq, dk, dv = (torch.zeros_like(batch.q) for _ in range(4))
    stats, delta = torch.ones(HEADS, tokens, 2), torch.zeros(HEADS, tokens)
    read = map(CTensor.of, (*batch.tensors, out))
    if backward:
        others = map(CTensor.of, (batch.dout, dq, dk, dv))
        arguments = CBackward(shape, *read, *others, stats.data_ptr())
        kernels.mtfast_packed_attention_backward(ctypes.byref(arguments), delta, None)
    else:
        arguments = CForward(shape, *read, stats.data_ptr())
        kernels.mtfast_packed_attention_forward(ctypes.byref(arguments), None)
    return kernels.costs, tokens * ((8 if backward else 4) * MATRIX + STATISTICS)


def masking(lengths: str, tokens: int, strategy: str) -> tuple[Costs, int]:
    """Costs and floor of mask_tokens."""
    kernels = load("mask_tokens.cu", COUNTED)
    ids, cu_seqlens = ordinary_ids(tokens), offsets(draw_tokens(lengths, tokens))
    emulated(kernels)(ids, strategy, cu_seqlens=cu_seqlens, **(BERT | {"seed": torch.tensor([7])}))
    return kernels.costs, tokens * 3 * 8


def concat_mlp(batch: int, hidden: int, inner: int, outputs: int, backward: bool) -> tuple[Costs, int]:
    """Costs and floor of concat_mlp's kernels in one direction, in bfloat16 with ReLU."""
    forward_kernels, backward_kernels = load_all(("concat_mlp.cu", "concat_mlp_backward.cu"), COUNTED)

    def matrix(*shape: int) -> torch.Tensor:
        return torch.randn(shape).bfloat16()

    bias1, weight2, bias2 = matrix(inner), matrix(outputs, inner), matrix(outputs)
    u, v, weight1 = matrix(batch, hidden), matrix(batch, hidden), matrix(inner, 2 * hidden)
    operands = u, v, weight1, bias1, weight2, bias2
    y, z, seed = matrix(batch, outputs), matrix(batch, inner), torch.tensor([1])
    inputs = ctypes.byref(Inputs.of(operands, batch, dropout_p=DROPOUT, seed=seed))
    if backward:
        dz, sums = torch.empty_like(z), [torch.empty_like(x) for x in (bias1, weight2, bias2)]
        to, partial = Sums(*(x.data_ptr() for x in sums)), chunk_sums(batch, inner, outputs)
        backward_kernels.mtfast_concat_mlp_backward(inputs, y, z, dz, partial, ctypes.byref(to), None)
        return backward_kernels.costs, 2 * sum(x.numel() for x in (y, z, dz, weight2, *sums))
    partial = torch.empty((inner + 63) // 64, batch, outputs)
    forward_kernels.mtfast_concat_mlp_forward(inputs, z, partial, y, None)
    return forward_kernels.costs, 2 * sum(x.numel() for x in (*operands, z, y))


def bias_gelu(rows: int, columns: int, dtype: torch.dtype, backward: bool) -> tuple[Costs, int]:
    """Costs and floor of bias_gelu in one direction."""
    kernels = load("bias_gelu.cu", COUNTED)
    x, bias, dy = draw_gelu(rows, columns, dtype)
    bias_gelu_by(kernels, only="backward" if backward else "forward")(x, bias, dy)
    matrices, vectors = (3, 2) if backward else (2, 1)
    return kernels.costs, matrices * x.nbytes + vectors * bias.nbytes


def layer_norm(rows: int, hidden: int, dropout_p: float, backward: bool) -> tuple[Costs, int]:
    """Costs and floor of dropout_add_layer_norm in one direction, in bfloat16."""
    kernels = load_all(LAYER_NORM, COUNTED)
    operands = cast(draw((rows, hidden), 0), torch.bfloat16)
    run = emulated_layer_norm(*kernels)
    run(operands, torch.ones(rows, hidden).bfloat16(), dropout_p=dropout_p, seed=1)
    matrices = 3 if not backward else 5 if dropout_p else 4
    return kernels[backward].costs, rows * (2 * matrices * hidden + 8) + 2 * (5 if backward else 3) * hidden


def check(measured: tuple[Costs, int], limit: float) -> None:
    costs, floor = measured
    assert costs.moved <= limit * floor, f"{costs.moved / floor:.3f} times the floor: {costs}"


@pytest.mark.parametrize("lengths", ["quora", "mixture"])
def test_attention_forward(lengths, tokens):
    check(attention(lengths, tokens, backward=False), 1.1)


def test_attention_forward_of_long_sequences(tokens, full_sweep):
    """In a step that fills a GPU; in smaller ones several blocks share a sequence of more than 128 tokens,
    and each reads all of its keys and values."""
    check(attention("512" if full_sweep else "128", tokens, backward=False), 1.1)


@pytest.mark.parametrize("lengths", ["quora", "mixture"])
def test_attention_backward(lengths, tokens):
    check(attention(lengths, tokens, backward=True), 1.15)


@pytest.mark.parametrize("lengths", ["quora", "mixture", "512"])
def test_mask_tokens_bernoulli(lengths, tokens):
    check(masking(lengths, tokens, "bernoulli"), 1.05)


@pytest.mark.parametrize("lengths", ["quora", "mixture", "512"])
def test_mask_tokens_exact(lengths, tokens):
    measured = masking(lengths, tokens, "exact")
    check(measured, 1.25)
    assert measured[0].longest_loop <= 32


@pytest.fixture(scope="module")
def layer(full_sweep) -> tuple[int, int, int, int]:
    """Sizes of a concat_mlp: batch, hidden, inner, outputs."""
    return (2048, 768, 768, 2) if full_sweep else (512, 256, 256, 2)


def test_concat_mlp_forward(layer, full_sweep):
    """Each block reads the rows and the weights of its tile: those of 128 by 96 fill the machine, and read u
    and v once for 96 columns, weight1 once for 128 rows."""
    measured = concat_mlp(*layer, backward=False)
    check(measured, 8 if full_sweep else 4.5)
    batch, hidden, inner, _ = layer
    assert measured[0].mma == batch // 16 * (inner // 8) * (2 * hidden // 16)


def test_concat_mlp_backward(layer):
    check(concat_mlp(*layer, backward=True), 1.5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_bias_gelu(backward, dtype, full_sweep):
    rows, columns = (4096, 1536) if full_sweep else (512, 256)
    check(bias_gelu(rows, columns, dtype, backward), 1.1)


@pytest.mark.parametrize("hidden", [384, 768])
def test_dropout_add_layer_norm_forward(hidden, tokens):
    check(layer_norm(tokens, hidden, DROPOUT, backward=False), 1.1)


@pytest.mark.parametrize("hidden", [384, 768])
@pytest.mark.parametrize("dropout_p", [DROPOUT, 0.0])
def test_dropout_add_layer_norm_backward(hidden, dropout_p, tokens, full_sweep):
    """A small batch has chunks of 40 rows, so that they fill a GPU: their sums, written and read in float32,
    are as much as nine rows."""
    check(layer_norm(tokens, hidden, dropout_p, backward=True), 1.1 if full_sweep else 1.105)
