"""A Hugging Face BertModel with packed attention against its own attentions, on lengths of real sentences.

    python -m benchmarks bert_attention [--device cpu] [--threads 2] [--seconds 120] [--shapes bert-base]
        [--sentences 64] [--dtypes float32 bfloat16]

Forward and backward in train mode, random weights and word pieces, sentences as long as SST's
(benchmarks/lengths.py). "mtfast" gets the padded batch that the others get, "mtfast, without padding" the
same sentences back to back, as `DataCollatorWithFlattening` lays them out, and so does flash_attention_2
where it is installed. The states are compared with SDPA's first.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor

from benchmarks.attention_batch import MOST_ERROR
from benchmarks.cases import Case, op_parser, run_cases
from benchmarks.common import Row, rows_of
from benchmarks.lengths import draw_examples
from benchmarks.timing import measure, peak_mib
from mtfast.hf import NAME, register_attention

SHAPES = {"minilm": (6, 384), "bert-base": (12, 768)}  # layers, hidden
BASELINE, UNPADDED = "sdpa", "without padding"
Batch = dict[str, Any]  # arguments of the model


def main(argv: list[str]) -> int:
    """Run the benchmark, print its table and write it to the results file; 0 when no case failed."""
    parser = op_parser("bert_attention", __doc__)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--sentences", type=int, default=64)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    cases = []
    for shape in options.shapes:
        for dtype in options.dtypes:
            layers, hidden = SHAPES[shape]
            name = f"{layers} x {hidden} {options.sentences} sst sentences {dtype}"
            arguments = (name, layers, hidden, options.sentences, getattr(torch, dtype))
            cases.append(Case(name, partial(compare, *arguments, options.device, options.budget)))
    return run_cases(cases, options)


def compare(
    name: str,
    layers: int,
    hidden: int,
    sentences: int,
    dtype: torch.dtype,
    device: torch.device,
    budget_s: float,
) -> list[Row]:
    """The rows of one case."""
    register_attention()
    padded, flat = batches_of(draw_examples("sst", sentences), device)
    inside = padded["attention_mask"].bool()
    contenders: list[tuple[str, bool]] = [(BASELINE, False), ("eager", False), (NAME, False), (NAME, True)]
    if device.type == "cuda" and dtype != torch.float32 and transformers.utils.is_flash_attn_2_available():
        contenders += [("flash_attention_2", False), ("flash_attention_2", True)]
    calls, wrong = {}, {}
    states = None
    for attention, unpadded in contenders:
        torch.manual_seed(0)
        # Of each its own, which is where the name of the attention stays.
        config = transformers.BertConfig(
            num_hidden_layers=layers, hidden_size=hidden, intermediate_size=4 * hidden, num_attention_heads=12
        )
        model = transformers.BertModel._from_config(config, attn_implementation=attention, dtype=dtype)
        model = model.to(device).eval()
        batch = flat if unpadded else padded
        with torch.no_grad():
            found = model(**batch).last_hidden_state.double()
        found = found[0] if unpadded else found[inside]
        states = found if states is None else states
        error = float((found - states).norm() / states.norm())
        variant = f"{attention}, {UNPADDED}" if unpadded else attention
        calls[variant] = partial(step, model.train(), batch)
        wrong[variant] = "" if error < MOST_ERROR[dtype] else f"states off by {error:.2g} of their norm"
    timings = measure({variant: [call] for variant, call in calls.items()}, device, budget_s=budget_s)
    peaks = {variant: peak_mib(call, device) for variant, call in calls.items()}
    return rows_of("bert_attention", name, timings, BASELINE, peak_mib=peaks, wrong=wrong)


def batches_of(lengths: Sequence[int], device: torch.device) -> tuple[Batch, Batch]:
    """Random word pieces of sentences of these lengths, padded and back to back."""
    rows = [{"input_ids": torch.randint(1000, 30_000, (length,)).tolist()} for length in lengths]
    flat = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True)(rows)
    del flat["labels"]
    place, count = torch.arange(max(lengths)), torch.tensor(lengths)
    mask = place < count[:, None]
    ids = torch.zeros(mask.shape, dtype=torch.int64)
    ids[mask] = flat["input_ids"][0]
    padded = {"input_ids": ids, "attention_mask": mask.long()}
    there = [
        {name: x.to(device) if isinstance(x, Tensor) else x for name, x in batch.items()}
        for batch in (padded, flat)
    ]
    return there[0], there[1]


def step(model: torch.nn.Module, batch: Batch) -> tuple[Tensor, ...]:
    """Forward and backward: the gradients of the weights."""
    weights = [weight for name, weight in model.named_parameters() if "pooler" not in name]
    return torch.autograd.grad(model(**batch).last_hidden_state.float().square().mean(), weights)
