"""What `finetune_step` and `pretrain_step` share: whole steps on real data whose contenders take turns."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from benchmarks.baseline import Baseline, Child, built
from benchmarks.common import RESULTS, Row, print_rows, rows_of, summary, write_results
from benchmarks.op_count import count_ops
from benchmarks.real_batches import Layouts
from benchmarks.stage_setup import SHAPES, Clock, Setup, StageMaker, parser_of
from benchmarks.step_contenders import Contender
from benchmarks.steps import LossesIn, difference, kernel_columns, losses_of
from benchmarks.timing import reason_of
from mtfast.training.engine.engine import start, stop

WARM_UP = 2
OURS, LAUNCHED, GROUPED, COMPILED, REFERENCE = "mtfast", "launched", "grouped", "compile", "eager"
Turn = Callable[[int], float]  # makes the step of that turn; its seconds


@dataclass(frozen=True)
class Field:
    """Who takes part beside mtfast's stage, and on what.

    batches: of each turn, the warm-up's first. grouped: those of "grouped". contenders: how to make each,
    mtfast's model without an engine first, what is compiled last.
    """

    batches: Sequence[Layouts]
    grouped: Sequence[Layouts]
    contenders: Mapping[str, Callable[[], Contender]]


FieldOf = Callable[[StageMaker, Any, int], Field]


def step_parser(name: str, module_doc: str | None) -> argparse.ArgumentParser:
    """A parser with the options of the benchmarks of whole steps."""
    parser = parser_of(name, module_doc or "")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--steps", type=int, default=10, help="steps measured of each (default: 10)")
    parser.add_argument(
        "--shape", choices=SHAPES, default=SHAPES[0], help="of the model; bert-base has random weights"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--results", type=Path, default=RESULTS, help="directory of the results file")
    return parser


def race_parser(name: str, module_doc: str | None) -> argparse.ArgumentParser:
    """A parser with the options of the benchmarks in which whole steps take turns."""
    parser = step_parser(name, module_doc)
    parser.add_argument("--baseline", metavar="COMMIT", help="mtfast as it is there takes part too")
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=torch.cuda.is_available(),
        help="torch.compile takes part, which on the CPU compiles for minutes",
    )
    return parser


def setup_of(options: argparse.Namespace, stage: str, max_length: int = 512) -> Setup:
    """The setup that the options ask for, with the steps of the warm-up."""
    turns = WARM_UP + options.steps
    return Setup(stage, options.data, options.checkpoint, options.shape, max_length, turns, options.threads)


def run_race(
    benchmark: str, setups: Mapping[str, Setup], field_of: FieldOf, options: argparse.Namespace
) -> int:
    """Compare the contenders in each case, by what it is called; print the rows and write them."""
    torch.set_num_threads(options.threads)
    device = start()
    try:
        with ExitStack() as stack:
            baseline = stack.enter_context(built(options.baseline)) if options.baseline else None
            for case, setup in setups.items():
                rows = compare(benchmark, case, setup, field_of, baseline, compiled=options.compile)
                path = write_results(rows, device, options.results)
                print_rows(rows)
    finally:
        stop()
    print(f"written to {path}")
    return 0


def compare(
    benchmark: str,
    case: str,
    setup: Setup,
    field_of: FieldOf,
    baseline: Baseline | None = None,
    *,
    compiled: bool = False,
) -> list[Row]:
    """The rows of a case: seconds of each one's steps, and examples a second over all of them.

    Raises SystemExit where a contender's losses are not mtfast's; one that is compiled and fails is left out.
    """
    maker = StageMaker(setup)
    expected: LossesIn = {torch.float32: maker.losses()}
    stage = maker.make()
    stage.engine.train()
    field = field_of(maker, stage, setup.steps)
    device, packed = stage.engine.device, [layouts.packed for layouts in field.batches]
    entrants: dict[str, Entrant | Child] = {OURS: Entrant(stage.step, packed, device)}
    if stage.graphs is not None:
        entrants[LAUNCHED] = Entrant(stage.train_on, packed, device)
        for turn in 2 * list(range(len(packed))):  # the second step of a shape is captured
            entrants[OURS].turn(turn)
    with ExitStack() as stack:
        stack.callback(stage.engine.close)
        if baseline:
            child = stack.enter_context(baseline.child(setup))
            check(baseline.commit, {torch.float32: child.losses}, expected)
            entrants[baseline.commit] = child
        for name, make in field.contenders.items():
            batches = field.grouped if name == GROUPED else field.batches
            try:
                if name != COMPILED or compiled:
                    entrants[name] = entered(name, make(), batches, field.batches[0], expected, device)
            except Exception as error:
                if name != COMPILED:
                    raise
                print(f"left out: {name}: {reason_of(error)}", flush=True)
        seconds = take_turns({name: entrant.turn for name, entrant in entrants.items()}, setup.steps)
        here = {name: entrant for name, entrant in entrants.items() if isinstance(entrant, Entrant)}
        kernels = {
            name: entrant.kernels()
            for name, entrant in here.items()
            if name != COMPILED and not (name == OURS and LAUNCHED in entrants)  # a replay launches none
        }
        idle = kernel_columns({name: entrant.calls() for name, entrant in here.items()}, device)["idle_share"]
    timings = {name: summary(values) for name, values in seconds.items()}
    examples = {
        name: sum(layouts.size for layouts in (field.grouped if name == GROUPED else field.batches)[WARM_UP:])
        for name in seconds
    }
    rates = {name: examples[name] / sum(values) for name, values in seconds.items()}
    tokens = sum(batch.tokens for batch in packed[WARM_UP:])
    tflops = {
        name: stage.flops_per_token * tokens / sum(values) / 1e12
        for name, values in seconds.items()
        if name != GROUPED  # whose examples are others
    }
    named = case_of(maker, f"{stage.settings.batch_size} {case}", field.batches[WARM_UP:])
    columns = {"examples_per_s": rates, "tflop_per_s": tflops, "kernels": kernels, "idle_share": idle}
    return rows_of(benchmark, named, timings, REFERENCE, **columns)


@dataclass(frozen=True)
class Entrant:
    """A step in this process, and its batch of each turn."""

    step: Callable[[Any], Any]
    batches: Sequence[Any]
    device: torch.device

    def turn(self, index: int) -> float:
        """Make the step of a turn; its seconds."""
        clock = Clock(self.device)
        self.step(self.batches[index])
        return clock.lap()

    def calls(self) -> list[Callable[[], Any]]:
        """The steps of the turns that are measured."""
        return [partial(self.step, batch) for batch in self.batches[WARM_UP:]]

    def kernels(self) -> int:
        """Ops of a step that compute something."""
        return count_ops(lambda: self.step(self.batches[0])).total()


def entered(
    name: str,
    contender: Contender,
    batches: Sequence[Layouts],
    first: Layouts,
    expected: LossesIn,
    device: torch.device,
) -> Entrant:
    """The contender ready to train, once its losses of `first` are the expected ones; those in other
    precisions than float32 are expected of the contenders after it."""
    found = losses_of(contender, first, device)
    check(name, {dtype: losses for dtype, losses in found.items() if dtype in expected}, expected)
    expected |= {dtype: losses for dtype, losses in found.items() if dtype not in expected}
    entrant = Entrant(contender.training(), batches, device)
    for turn in range(len(batches) if contender.compiled else 0):  # what is compiled may be so for each shape
        entrant.turn(turn)
    return entrant


def check(name: str, found: LossesIn, expected: LossesIn) -> None:
    """SystemExit unless the losses are the expected ones."""
    if fault := difference(found, expected):
        raise SystemExit(f"{name} does not compute what mtfast does: {fault}")


def take_turns(turns: Mapping[str, Turn], count: int) -> dict[str, list[float]]:
    """Seconds of each one's steps after the warm-up.

    They go one after the other, and back in the next turn, so that a slow moment of the machine meets all of
    them and none has always the same before it.
    """
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    for index in range(count):
        for name in list(turns)[:: -1 if index % 2 else 1]:
            seconds[name].append(turns[name](index))
    return {name: values[WARM_UP:] for name, values in seconds.items()}


def case_of(maker: StageMaker, case: str, batches: Sequence[Layouts]) -> str:
    """The case's name in the results file: shape, examples, and tokens of the measured steps."""
    config = maker.weights.config
    real = mean(layouts.packed.tokens for layouts in batches)
    padded = mean(layouts.padded_tokens for layouts in batches)
    shape = f"{config.num_hidden_layers} x {config.hidden_size}"
    return f"{shape} {case}, {real:.0f} real tokens, {padded:.0f} padded"
