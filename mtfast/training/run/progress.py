"""What a person sees of a running stage: a live line on a terminal, plain lines elsewhere; rank 0 only."""

from __future__ import annotations

import datetime
import functools
import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

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

# In a notebook plain lines: it takes colours, as a terminal does, but a line cannot be written over.
_notebook = False if "ipykernel" in sys.modules else None
_console = Console(highlight=False, soft_wrap=True, force_jupyter=_notebook, force_terminal=_notebook)


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


class StageProgress:
    """Progress of one stage; `update` takes totals since the last call and shows rates over that time."""

    def __init__(self, stage: str, total_steps: int, done: int, flops_per_token: float, peak: float | None):
        self._stage, self._total, self._step = stage, total_steps, done
        self._flops_per_token, self._peak = flops_per_token, peak
        self._last_line = self._last_update = self._started = time.perf_counter()
        self._first = done
        self._bar: Progress | None = None
        if ranks.is_main() and _console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"),
                TimeRemainingColumn(),
                console=_console,
            )
            self._row = self._bar.add_task(stage, total=total_steps, completed=done, note="")

    def __enter__(self) -> StageProgress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def update(self, step: int, losses: dict[str, float], examples: float, tokens: float) -> None:
        """Show the state after `step`, with the examples and real tokens trained on since the last call."""
        now = time.perf_counter()
        seconds = max(now - self._last_update, 1e-9)
        note = " ".join(f"{name} {value:.3f}" for name, value in losses.items())
        note += f" | {examples / seconds:,.0f} examples/s {tokens / seconds:,.0f} tokens/s"
        if self._peak and self._flops_per_token:
            mfu = tokens / seconds * self._flops_per_token / (self._peak * ranks.world_size())
            note += f" MFU {mfu:.1%}"
        self._last_update, self._step = now, step
        if self._bar:
            self._bar.update(self._row, completed=step, note=note)
        elif now - self._last_line >= PLAIN_LINE_SECONDS or step == self._total:
            self._last_line = now
            seconds_left = (now - self._started) / max(step - self._first, 1) * (self._total - step)
            left = datetime.timedelta(seconds=round(seconds_left))
            say(f"{self._stage} {step}/{self._total} {note} | {left} left")

    def rest(self) -> None:
        """Leave the time since the last update out of the next rates (an evaluation, a checkpoint)."""
        self._last_update = time.perf_counter()
