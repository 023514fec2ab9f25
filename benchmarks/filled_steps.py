"""What training on a CPU gains from batches that are filled up so that their shapes repeat.

    python -m benchmarks filled_steps --data DIR --checkpoint DIR [--steps 60] [--threads 2]

"as they come" and "filled up" are stages of the paper's recipe as the trainer has them, in bf16, each in a
process of its own. They take turns, step by step, at the same examples. Ratios are of examples a second over
all steps after the first two; "peak_mib" is the most memory that the process has had.
"""

from __future__ import annotations

import multiprocessing
import resource
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from benchmarks.common import Row, print_rows, rows_of, summary, write_results
from benchmarks.pretrain_step import MAX_LENGTHS
from benchmarks.real_steps import setup_of, step_parser, take_turns
from benchmarks.shapes import AS_THEY_COME, FILLED
from benchmarks.stage_setup import Clock, Setup, StageMaker, packed_batches
from mtfast.training.engine.engine import start


def main(argv: list[str]) -> int:
    """Run the benchmark, print its table and write it to the results file."""
    parser = step_parser("filled_steps", __doc__)
    parser.set_defaults(steps=60)
    options = parser.parse_args(argv)
    if torch.cuda.is_available():
        raise SystemExit("filled_steps measures the CPU; set CUDA_VISIBLE_DEVICES= to hide the GPU")
    torch.set_num_threads(options.threads)
    setups = {"finetune": setup_of(options, "finetune")}
    setups |= {f"pretrain at most {most}": setup_of(options, "pretrain", most) for most in MAX_LENGTHS}
    for case, setup in setups.items():
        rows = compare(case, setup)
        print_rows(rows)
        path = write_results(rows, torch.device("cpu"), options.results)
    print(f"written to {path}")
    return 0


def compare(case: str, setup: Setup) -> list[Row]:
    """The rows of a stage's steps."""
    with ExitStack() as stack:
        processes = {
            name: stack.enter_context(process(setup, filled))
            for name, filled in ((AS_THEY_COME, False), (FILLED, True))
        }
        turns = {
            name: lambda index, one=one: one.submit(_turn, index).result() for name, one in processes.items()
        }
        seconds = take_turns(turns, setup.steps)
        peaks = {name: one.submit(_peak_mib).result() for name, one in processes.items()}
        size, shape = next(iter(processes.values())).submit(_size).result()
    return rows_of(
        "filled_steps",
        f"{shape} {case}, {size} examples a step",
        {name: summary(values) for name, values in seconds.items()},
        AS_THEY_COME,
        examples_per_s={name: size * len(values) / sum(values) for name, values in seconds.items()},
        peak_mib=peaks,
    )


@contextmanager
def process(setup: Setup, filled: bool) -> Iterator[ProcessPoolExecutor]:
    """A process that has the stage ready."""
    fresh = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=fresh, initializer=_begin, initargs=(setup, filled)) as one:
        yield one


# What a process of its own has.
_stage: Any
_batches: list[Any]


def _begin(setup: Setup, filled: bool) -> None:
    global _stage, _batches
    torch.set_num_threads(setup.threads)
    start()
    _stage = StageMaker(setup).make()
    if not filled:
        _stage.room = None
    _stage.engine.train()
    _batches = packed_batches(_stage, setup.steps)


def _turn(index: int) -> float:
    """Make the step of a turn; its seconds."""
    clock = Clock(_stage.engine.device)
    _stage.step(_batches[index])
    return clock.lap()


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # which Linux gives in KiB


def _size() -> tuple[int, str]:
    """Examples a step, and the shape of the model."""
    bert = _stage.weights.config
    return _stage.settings.batch_size, f"{bert.num_hidden_layers} x {bert.hidden_size}"
