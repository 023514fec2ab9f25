"""What the benchmarks of ops share: their options, and cases measured one by one in the time there is."""

from __future__ import annotations

import argparse
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.common import RESULTS, Row, default_device, print_rows, write_results


class CaseClock:
    """Seconds, without those that pass inside `paused`."""

    def __init__(self) -> None:
        self._paused = 0.0

    def now(self) -> float:
        """Seconds since some moment."""
        return time.monotonic() - self._paused

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Around first calls and checks: what is compiled for one case says nothing about another's time."""
        begun = self.now()
        try:
            yield
        finally:
            self._paused += self.now() - begun


CLOCK = CaseClock()


@dataclass(frozen=True)
class Case:
    """One line of comparison: `measure` checks and times its variants and returns their rows."""

    name: str
    measure: Callable[[], list[Row]]


def op_parser(name: str, module_doc: str | None) -> argparse.ArgumentParser:
    """A parser with the options that the benchmarks of ops share."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks {name}",
        description=module_doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", type=torch.device, default=default_device())
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--budget", type=float, default=1.0, help="seconds a variant")
    parser.add_argument("--seconds", type=float, help="end within so many, with the cases done by then")
    parser.add_argument("--results", type=Path, default=RESULTS, help="directory of the results file")
    return parser


def run_cases(cases: Sequence[Case], options: argparse.Namespace) -> int:
    """Measure the cases in their order; write and print each one's rows before the next. The exit status.

    A case that fails is reported and does not take the others with it; a wrong result is a failure too, but
    has its row. When another case as long as the longest so far, by CLOCK, would not end within
    `options.seconds`, the rest is named and left out: no failure.
    """
    started = time.monotonic()
    longest = 0.0
    failed: list[str] = []
    wrong: list[Row] = []
    path = None
    for index, case in enumerate(cases):
        if options.seconds is not None and time.monotonic() - started + longest > options.seconds:
            print(f"out of time: {len(cases) - index} of {len(cases)} cases left out, from {case.name!r} on")
            break
        begun = CLOCK.now()
        try:
            rows = case.measure()
            path = write_results(rows, options.device, options.results)
            print_rows(rows)
            wrong += [row for row in rows if row.get("wrong")]
        except Exception:
            failed.append(case.name)
            print(f"case {case.name!r} failed:\n{traceback.format_exc()}", flush=True)
            if not _alive(options.device):
                print("the GPU does not answer any more: the other cases are left out")
                break
        longest = max(longest, CLOCK.now() - begun)
    if path:
        print(f"written to {path}")
    for row in wrong:
        print(f"wrong: {row['case']}, {row['variant']}: {row['wrong']}")
    print(f"failed: {', '.join(failed)}" if failed else "no case failed", flush=True)
    return 1 if failed or wrong else 0


def _alive(device: torch.device) -> bool:
    if device.type != "cuda":
        return True
    try:
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
    except RuntimeError:
        return False
    return True
