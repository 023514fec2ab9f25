"""packed_attention against padded, per-sequence, nested and packed attention of torch and others.

    python -m benchmarks packed_attention [--device cpu] [--threads 2] [--seconds 300]
        [--distributions quora 512 ...] [--tokens 4096 ...] [--dtypes bfloat16]

12 heads of 64, forward ("fwd") and forward with backward ("fwd+bwd"), with dropout 0.1 and without. The
lengths are drawn from those of real data (benchmarks/lengths.py): Quora questions, SST sentences, STS
sentences, pre-training samples of IMDb of at most 512; or all are equal. "mixture" is fine-tuning on the full
data: examples in proportion to its 141,506 Quora pairs, 8,544 SST sentences and 6,040 STS pairs, a pair being
two sequences. On the CPU it is measured at one step of 160 examples too, as is "mixture-16k", the same with
16,000 Quora pairs.

Each peer works on the layout that suits it best, made beforehand, and is compared with the float64 reference
first. GB/s and TFLOP/s count what the packed problem needs, whatever a variant does: q, k and v read and out
written once; with the backward those, dout and out read again and three gradients written. "graph" replays a
CUDA graph, as a training step of fixed size does. On a GPU inputs that the L2 could hold are several, taken
in turn (benchmarks/timing.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial

import torch

from benchmarks.attention_batch import HEAD_DIM, HEADS, Batch, Peer, difference, suitable
from benchmarks.attention_peers import PEERS, FlashAttention2, PackedAttention
from benchmarks.cases import CLOCK, Case, op_parser, run_cases
from benchmarks.common import Row, rows_of
from benchmarks.lengths import DISTRIBUTIONS, MIXTURES, STEP, draw_examples, draw_tokens
from benchmarks.timing import (
    Variant,
    copies,
    copy_bandwidth,
    graph_of,
    graphs,
    l2_bytes,
    measure,
    peak_mib,
    say_once,
)

BASELINES = (FlashAttention2.name, "padded sdpa", PackedAttention.name)  # the first that was measured


@dataclass(frozen=True)
class Problem:
    """What one case measures; `size` is tokens, or examples where `by_examples`."""

    distribution: str
    size: int
    by_examples: bool
    dtype: torch.dtype
    dropout_p: float
    backward: bool

    @property
    def name(self) -> str:
        size = f"{self.size} examples" if self.by_examples else str(self.size)
        what = "fwd+bwd" if self.backward else "fwd"
        return f"{self.distribution} {size} {str(self.dtype)[6:]} p={self.dropout_p} {what}"

    @property
    def lengths(self) -> list[int]:
        draw = draw_examples if self.by_examples else draw_tokens
        return draw(self.distribution, self.size)

    @property
    def urgency(self) -> int:
        """What training does comes first, then what shows the bandwidth, then the rest."""
        typical = self.by_examples or (self.distribution in ("quora", "mixture", "512") and self.size > 4096)
        if typical and self.dropout_p and self.backward:
            return 0
        return 1 if self.distribution == "quora" and self.size > 16384 and not self.backward else 2


def main(argv: list[str]) -> int:
    """Run the benchmark, print its table and write it to the results file; 0 when no case failed."""
    parser = op_parser("packed_attention", __doc__)
    parser.add_argument("--tokens", type=int, nargs="+", help="default 4096, on a GPU also 16384 and 131072")
    parser.add_argument("--distributions", nargs="+", default=DISTRIBUTIONS, choices=DISTRIBUTIONS)
    parser.add_argument("--dtypes", nargs="+", help="default bfloat16, on the CPU also float32")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    gpu = options.device.type == "cuda"
    tokens = options.tokens or ([4096, 16384, 131072] if gpu else [4096])
    dtypes = options.dtypes or (["bfloat16"] if gpu else ["float32", "bfloat16"])
    bandwidth = copy_bandwidth(options.device)
    print(f"copying moves {bandwidth / 1e9:.1f} GB/s", flush=True)
    kinds = [getattr(torch, name) for name in dtypes]
    cases = [
        Case(problem.name, partial(compare, problem, options.device, bandwidth, options.budget))
        for problem in problems(options.distributions, tokens, kinds, steps=not gpu)
    ]
    return run_cases(cases, options)


def problems(
    distributions: Sequence[str], tokens: Sequence[int], dtypes: Sequence[torch.dtype], steps: bool
) -> list[Problem]:
    """All cases, the most urgent first; with `steps` also the mixtures at one fine-tuning step."""
    sizes = [(name, size, False) for size in tokens for name in distributions if name != "mixture-16k"]
    if steps:
        sizes += [(name, STEP, True) for name in distributions if name in MIXTURES]
    every = [
        Problem(*size, dtype, dropout_p, backward)
        for dropout_p in (0.1, 0.0)
        for backward in (True, False)
        for size in sizes
        for dtype in dtypes
    ]
    return sorted(every, key=lambda problem: problem.urgency)


def compare(problem: Problem, device: torch.device, bandwidth: float, budget_s: float) -> list[Row]:
    """The rows of one case; why a peer is left out is printed once."""
    batch = Batch.random(problem.lengths, problem.dtype, device, problem.dropout_p)
    with CLOCK.paused():
        wrong = wrong_result(problem.dtype, device)
        peers: list[Peer] = [PackedAttention(batch)]
        for kind in PEERS[device.type]:
            peer = suitable(kind, batch, problem.backward)
            if isinstance(peer, str):
                say_once(f"left out: {kind.name}: {peer}")
            else:
                peers.append(peer)
    touched = (8 if problem.backward else 4) * batch.dout.nbytes  # q, k, v and out, and the gradient of each
    count = copies(touched, l2_bytes(device))

    def variant(peer: Peer) -> Variant:
        several = (peer, *(peer.again() for _ in range(count - 1)))
        return [partial(each.run, problem.backward) for each in several]

    variants = {peer.name: variant(peer) for peer in peers}
    peaks = {name: peak_mib(calls[0], device) for name, calls in variants.items()}
    seeded = PackedAttention(batch, torch.zeros(1, dtype=torch.int64, device=device))
    packed = {name: calls for name, calls in variants.items() if name == FlashAttention2.name}
    variants |= graphs({PackedAttention.name: variant(seeded), **packed}, device)
    timings = measure(variants, device, budget_s=budget_s)
    tensors, products = (12, 14) if problem.backward else (4, 4)
    moved = tensors * batch.dout.nbytes
    flop = products * sum(n * n for n in batch.lengths) * HEADS * HEAD_DIM
    return rows_of(
        "packed_attention",
        problem.name,
        timings,
        next(name for name in BASELINES if name in timings),
        gb_per_s={name: moved / timing.median / 1e9 for name, timing in timings.items()},
        copy_gb_per_s=bandwidth / 1e9,
        tflop_per_s={name: flop / timing.median / 1e12 for name, timing in timings.items()},
        peak_mib=peaks,
        wrong=dict.fromkeys((PackedAttention.name, graph_of(PackedAttention.name)), wrong),
    )


@cache
def wrong_result(dtype: torch.dtype, device: torch.device) -> str:
    """What is wrong with this project's result, on long sequences or short; nothing when it is right."""
    batches = (Batch.random(lengths, dtype, device, 0.0) for lengths in ((1, 30, 9, 64, 5), (7, 130, 64)))
    return next(filter(None, (difference(PackedAttention, batch) for batch in batches)), "")
