"""What a person sees of what runs long: a live line on a terminal, plain lines elsewhere; rank 0 only."""

from __future__ import annotations

import datetime
import functools
import sys
import time
from collections.abc import Generator, Iterable
from contextlib import closing
from types import TracebackType
from typing import ClassVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from mtfast.data.packing import PackedBatch
from mtfast.training.engine import ranks

# Dense bf16 tensor-core peaks in FLOP/s, from the data sheets.
PEAK_FLOPS = {
    "A100": 312e12,
    "H100": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H200": 989e12,
    "H200 NVL": 835e12,
    "B200": 2250e12,
}
PLAIN_LINE_SECONDS = 10.0
SHORT_SECONDS = 3.0  # a pass over data that takes no longer shows nothing

# In a notebook plain lines: it takes colours, as a terminal does, but a line cannot be written over.
_notebook = False if "ipykernel" in sys.modules else None
_console, _errors = (
    Console(stderr=stderr, highlight=False, soft_wrap=True, force_jupyter=_notebook, force_terminal=_notebook)
    for stderr in (False, True)
)


def say(text: str) -> None:
    """Print a line from rank 0."""
    if ranks.is_main():
        _console.print(text, markup=False)


@functools.cache
def say_once(text: str) -> None:
    """Print a line from rank 0, unless this process has printed it before."""
    say(text)


def peak_flops(device_name: str) -> float | None:
    """Peak bf16 FLOP/s of a device by its name, None where it is not known."""
    matches = [name for name in PEAK_FLOPS if name in device_name]
    return PEAK_FLOPS[max(matches, key=len)] if matches else None


class _Line:
    """How much of a total is done, a note and the time left: a live line on a terminal, else a plain one
    every `PLAIN_LINE_SECONDS` and at the end. While another line is live, this is one more below it."""

    _live: ClassVar[Progress | None] = None

    def __init__(self, console: Console, name: str, total: int, done: int = 0) -> None:
        self._console, self._name, self._total, self._first = console, name, total, done
        self.started = self._last = time.perf_counter()
        self._bar: Progress | None = None
        self._owner = False

    def open(self) -> None:
        """Show it from now on, where it can be live."""
        if not ranks.is_main() or self._bar:
            return
        if _Line._live is None and self._console.is_terminal:
            _Line._live = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"),
                console=self._console,
                redirect_stdout=self._console is _console,  # else what is printed there would come here
            )
            _Line._live.start()
            self._owner = True
        if bar := _Line._live:
            self._bar = bar
            self._row = bar.add_task(self._name, total=self._total, completed=self._first, note="")

    def close(self) -> None:
        if self._bar and self._owner:
            self._bar.stop()
            _Line._live = None
        elif self._bar:
            self._bar.remove_task(self._row)

    def show(self, done: int, note: str) -> None:
        now = time.perf_counter()
        seconds = (now - self.started) / max(done - self._first, 1) * (self._total - done)
        note += f" | {datetime.timedelta(seconds=round(seconds))} left"
        if self._bar:
            self._bar.update(self._row, completed=done, note=note)
        elif ranks.is_main() and (now - self._last >= PLAIN_LINE_SECONDS or done == self._total):
            self._last = now
            self._console.print(f"{self._name} {done}/{self._total} {note}", markup=False)


def _rates(examples: float, tokens: float, seconds: float) -> str:
    seconds = max(seconds, 1e-9)
    return f"{examples / seconds:,.0f} examples/s {tokens / seconds:,.0f} tokens/s"


class StageProgress:
    """Progress of one stage; `update` takes totals since the last call and shows rates over that time."""

    def __init__(self, stage: str, total_steps: int, done: int, flops_per_token: float, peak: float | None):
        self._line = _Line(_console, stage, total_steps, done)
        self._flops_per_token, self._peak = flops_per_token, peak
        self._last_update = self._line.started

    def __enter__(self) -> StageProgress:
        self._line.open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._line.close()

    def update(self, step: int, losses: dict[str, float], examples: float, tokens: float) -> None:
        """Show the state after `step`, with the examples and real tokens trained on since the last call."""
        now = time.perf_counter()
        seconds = max(now - self._last_update, 1e-9)
        note = " ".join(f"{name} {value:.3f}" for name, value in losses.items())
        note += f" | {_rates(examples, tokens, seconds)}"
        if self._peak and self._flops_per_token:
            mfu = tokens / seconds * self._flops_per_token / (self._peak * ranks.world_size())
            note += f" MFU {mfu:.1%}"
        self._last_update = now
        self._line.show(step, note)

    def rest(self) -> None:
        """Leave the time since the last update out of the next rates (an evaluation, a checkpoint)."""
        self._last_update = time.perf_counter()


def watched(
    what: str, batches: Iterable[PackedBatch], total: int, world_size: int = 1
) -> Generator[PackedBatch, None, None]:
    """The batches as they come. How many of the `total` are done is shown on standard error, unless all of it
    takes no longer than `SHORT_SECONDS`; with the rates of `world_size` ranks that do as much as this one."""
    line = _Line(_errors, what, total)
    shown, examples, tokens = False, 0, 0
    with closing(line):
        for done, batch in enumerate(batches, 1):
            yield batch
            examples, tokens = examples + batch.size * world_size, tokens + batch.tokens * world_size
            seconds = time.perf_counter() - line.started
            if seconds > SHORT_SECONDS and (done < total or shown):
                shown = True
                line.open()
                line.show(done, f"| {_rates(examples, tokens, seconds)}")
