"""Whole training steps of the three stages: mtfast against eager PyTorch, unpadded and compiled.

    python -m benchmarks steps [--device cpu] [--seconds 300] [--stages finetune] [--no-compile]
        [--layers 2 --hidden 64 --heads 2 --examples 6]

A step is forward, losses, backward and optimizer, in plain torch: without DeepSpeed, without data sets, from
random weights of the shape of BERT-base. Lengths are drawn from those of real data (benchmarks/lengths.py),
words are random. Dropout is 0.1; steps compute in bf16 and keep float32 weights in torch's fused AdamW.

"pretrain" masks words and trains on 16 samples, "finetune" trains encoder and heads on 160 examples of the
three tasks, "heads" the heads alone on the cached features of 2048. "eager" is Hugging Face's model on padded
batches with SDPA, "unpadded" the same model on one row of sequences with torch's FlashAttention-2 for varying
lengths (on the CPU one sequence after the other), "compile" is "eager" under torch.compile with dynamic
shapes. On a GPU "graph" replays a CUDA graph of the step of "heads", which repeats one shape.

All go round the same batches, which are made beforehand. Before they are timed all must give mtfast's losses
from the same weights without dropout, and on a GPU mtfast's steps must not wait for it; what is not so is in
the column "wrong". Memory is what a step needs beyond weights and optimizer. On a GPU torch's profiler, which
makes launching slower, counts a step's kernels and says in which part of the time none of them runs
("idle_share"). What is compiled comes last, when all the rest is written.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.cases import Case, op_parser, run_cases
from benchmarks.common import Row, rows_of
from benchmarks.timing import Variant, measure, peak_mib, reason_of, say_once

if TYPE_CHECKING:
    from benchmarks.step_contenders import Contender, Stage

STAGES = ("heads", "finetune", "pretrain")  # the quickest first
BATCHES = 6
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.01}  # relative, of losses without dropout
OURS, BASELINE, COMPILED = "mtfast", "eager", "compile"
LossesIn = dict[torch.dtype, dict[str, float]]


def main(argv: list[str]) -> int:
    """Run the benchmark, print its table and write it to the results file; 0 when no case failed."""
    parser = op_parser("steps", __doc__)
    parser.add_argument("--stages", nargs="+", default=STAGES, choices=STAGES)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--examples", type=int, help="of a step, at least 3; default: the recipe's")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    options = parser.parse_args(argv)
    if importlib.util.find_spec("transformers") is None:
        print("left out: steps need transformers, which is not installed")
        return 0
    from benchmarks.step_contenders import stages_of

    torch.set_num_threads(options.threads)
    stages = stages_of(options.layers, options.hidden, options.heads)
    cases = [Case(name, partial(compare, name, stages[name], options)) for name in options.stages]
    if not options.no_compile:
        cases += [
            Case(f"{name} with compile", partial(compare, name, stages[name], options, compiled=True))
            for name in options.stages
        ]
    return run_cases(cases, options)


def compare(name: str, stage: Stage, options: argparse.Namespace, compiled: bool = False) -> list[Row]:
    """The rows of a stage; a contender that fails is reported and left out."""
    device = options.device
    examples = options.examples or stage.examples
    batches = [stage.batch(examples, seed, device) for seed in range(BATCHES)]
    variants: dict[str, Variant] = {}
    wrong: dict[str, str] = {}
    peaks: dict[str, float] = {}
    expected: LossesIn = {}
    torch.manual_seed(0)
    if compiled:
        torch._dynamo.reset()  # past its limit of recompilations it would run uncompiled
    for variant, make in stage.contenders(device).items():
        if variant.startswith(COMPILED) and not compiled:
            continue
        try:
            contender = make()
            found = losses_of(contender, batches[0], device)
            expected = expected or found
            faults = [difference(found, expected)]
            step = contender.training()
            if device.type == "cuda" and (variant.startswith(OURS) or contender.captured):
                faults.append(waits(contender, batches))
            calls = [partial(step, batch) for batch in batches]
            go_round(calls)
            if not contender.captured:  # whose memory is the graph's
                peaks[variant] = peak_mib(partial(go_round, calls), device)
            variants[variant], wrong[variant] = calls, "; ".join(filter(None, faults))
        except Exception as error:
            say_once(f"left out: {name}, {variant}: {reason_of(error)}")
    if not variants:
        raise RuntimeError("no contender runs")
    timings = measure(variants, device, budget_s=options.budget)
    return rows_of(
        "steps",
        case_of(name, examples, batches),
        timings,
        BASELINE if BASELINE in timings else next(iter(timings)),
        peak_mib=peaks,
        wrong=wrong,
        **kernel_columns(variants, device),
    )


def case_of(stage: str, examples: int, batches: Sequence[Any]) -> str:
    """The case's name in the results file; tokens are the mean over the batches."""
    if stage == "heads":
        return f"heads {examples} examples on cached features"
    real = mean(batch.packed.tokens for batch in batches)
    padded = mean(batch.padded_tokens for batch in batches)
    return f"{stage} {examples} examples, {real:.0f} real tokens, {padded:.0f} padded"


def losses_of(contender: Contender, batch: Any, device: torch.device) -> LossesIn:
    """The losses without dropout: in float32 and on a GPU, where that has kernels of its own, in bf16.

    What is compiled would have to be compiled once more for bf16.
    """
    contender.model.eval()
    found = {}
    for dtype in TOLERANCES if device.type == "cuda" and not contender.compiled else (torch.float32,):
        contender.cast(dtype)
        with torch.no_grad():
            found[dtype] = {name: loss.item() for name, loss in contender.fixed_losses(batch).items()}
    return found


def difference(found: LossesIn, expected: LossesIn) -> str:
    """What is wrong with the losses; nothing when they are the expected ones."""
    for dtype, losses in found.items():
        for name, loss in losses.items():
            right = expected[dtype][name]
            if not abs(loss - right) <= TOLERANCES[dtype] * abs(right):
                return f"{name} loss {loss:.6f} instead of {right:.6f} in {str(dtype)[6:]}"
    return ""


def go_round(calls: Variant) -> None:
    """Make each call once."""
    for call in calls:
        call()


def waits(contender: Contender, batches: Sequence[Any]) -> str:
    """Where a step waits for the GPU; nothing when none does.

    Raises:
        RuntimeError: a step that waits was to be captured, which would leave torch's allocator in disorder.
    """
    contender.step(batches[0])  # what is set up at first use may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in batches:
            contender.step(batch)
    except RuntimeError as error:
        if contender.captured or "synchroniz" not in str(error):
            raise
        place = traceback.extract_tb(error.__traceback__)[-1]
        return f"synchronises: {Path(place.filename).name}:{place.lineno} {place.line}"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return ""


def kernel_columns(variants: Mapping[str, Variant], device: torch.device) -> dict[str, dict[str, float]]:
    """Kernels of a step and the idle part of the time, by variant; nothing where no kernel was seen."""
    columns: dict[str, dict[str, float]] = {"kernels": {}, "idle_share": {}}
    for name, calls in variants.items() if device.type == "cuda" else ():
        if intervals := kernel_intervals(trace_of(calls, device)):
            columns["kernels"][name] = len(intervals) / len(calls)
            columns["idle_share"][name] = idle_share(intervals)
    return columns


def trace_of(calls: Variant, device: torch.device) -> dict[str, Any]:
    """torch's profile of the calls on the GPU, in the format of Chrome's traces."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        go_round(calls)
        torch.cuda.synchronize(device)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "trace.json"
        profiled.export_chrome_trace(str(path))
        return json.loads(path.read_text(encoding="utf-8"))


def kernel_intervals(trace: Mapping[str, Any]) -> list[tuple[float, float]]:
    """Begin and end of every kernel of a trace, in microseconds; copies and fills of memory are none."""
    kernels = [event for event in trace["traceEvents"] if event.get("cat") == "kernel"]
    return [(event["ts"], event["ts"] + event["dur"]) for event in kernels]


def idle_share(intervals: Sequence[tuple[float, float]]) -> float:
    """The part of the time from the first begin to the last end in which none of the intervals lies."""
    ordered = sorted(intervals)
    first = reached = ordered[0][0]
    idle = 0.0
    for begin, end in ordered:
        idle += max(0.0, begin - reached)
        reached = max(reached, end)
    return idle / (reached - first)
