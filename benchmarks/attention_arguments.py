"""packed_attention with what it takes by way of copies: other head_dims than its kernels', int64 offsets.

    python -m benchmarks attention_arguments [--device cpu] [--threads 2] [--seconds 60] [--tokens 4096]
        [--dtypes float32 bfloat16]

12 heads, forward with backward, dropout 0.1, from a fused projection, on sequences as long as those of
fine-tuning ("mixture", benchmarks/lengths.py). The baseline is head_dim 64 with cu_seqlens of int32. On the
CPU 72 is filled up to 80 in each call, on a GPU 72, 80 and 96 to 128.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch

from benchmarks.attention_batch import Batch, difference
from benchmarks.attention_peers import PackedAttention
from benchmarks.cases import Case, op_parser, run_cases
from benchmarks.common import Row, rows_of
from benchmarks.lengths import draw_tokens
from benchmarks.timing import measure, peak_mib

BASELINE, WIDE_OFFSETS = "head_dim 64", "head_dim 64, cu_seqlens int64"
HEAD_DIMS = (64, 72, 80, 96, 128, 256)
DROPOUT_P = 0.1


def main(argv: list[str]) -> int:
    """Run the benchmark, print its table and write it to the results file; 0 when no case failed."""
    parser = op_parser("attention_arguments", __doc__)
    parser.add_argument("--tokens", type=int, nargs="+", help="default 4096, on a GPU also 16384")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    tokens = options.tokens or ([4096, 16384] if options.device.type == "cuda" else [4096])
    cases = [
        Case(
            f"mixture {size} {name} fwd+bwd",
            partial(compare, size, getattr(torch, name), options.device, options.budget),
        )
        for size in tokens
        for name in options.dtypes
    ]
    return run_cases(cases, options)


def compare(tokens: int, dtype: torch.dtype, device: torch.device, budget_s: float) -> list[Row]:
    """The rows of one case."""
    lengths = draw_tokens("mixture", tokens)
    batches = {
        f"head_dim {head_dim}": Batch.random(lengths, dtype, device, DROPOUT_P, head_dim)
        for head_dim in HEAD_DIMS
    }
    plain = batches[BASELINE]
    batches[WIDE_OFFSETS] = replace(plain, cu_seqlens=plain.cu_seqlens.long())
    calls = {name: partial(PackedAttention(batch).run, True) for name, batch in batches.items()}
    timings = measure({name: [call] for name, call in calls.items()}, device, budget_s=budget_s)
    case = f"mixture {tokens} {str(dtype)[6:]} fwd+bwd"
    return rows_of(
        "attention_arguments",
        case,
        timings,
        BASELINE,
        peak_mib={name: peak_mib(call, device) for name, call in calls.items()},
        wrong={name: wrong_result(batch) for name, batch in batches.items()},
    )


def wrong_result(batch: Batch) -> str:
    """What is wrong with the result for such arguments, on a few sequences without dropout."""
    small = Batch.random((1, 30, 9, 64, 130), batch.qkv.dtype, batch.qkv.device, 0.0, batch.qkv.size(-1))
    return difference(PackedAttention, replace(small, cu_seqlens=small.cu_seqlens.to(batch.cu_seqlens.dtype)))
