"""Training from Python: what `mtfast run` does, in a script or a notebook."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mtfast.commands import execute
from mtfast.config import RunConfig, validate
from mtfast.training.engine import alive
from mtfast.training.run.directory import read_summary
from mtfast.training.run.lock import release
from mtfast.training.run.loggers import OnEvent
from mtfast.training.stopping import Stopped

LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


@dataclass(frozen=True)
class Run(os.PathLike[str]):
    """A run that has been trained. It stands for its directory: `mtfast.load(run)` gives its model.

        run = mtfast.train(mtfast.recipes.demo())
        print(run.metrics["dev"]["sst_accuracy"], run.report)

    path: its directory, absolute.
    """

    path: Path

    def __fspath__(self) -> str:
        return str(self.path)

    @property
    def metrics(self) -> dict[str, dict[str, float]]:
        """The metrics of its best weights, by the splits that were evaluated: dev, and test if asked for."""
        summary = read_summary(self.path)
        return {split: summary[split] for split in ("dev", "test") if split in summary}

    @property
    def report(self) -> Path:
        """Its report, a page that holds its plots."""
        return self.path / "report.html"


def train(config: RunConfig, *, on_event: OnEvent | None = None) -> Run:
    """Train all stages of a run, evaluate it, write its predictions and its report, as `mtfast run` does.

    Where the run's directory holds a part of that already, it goes on from there. Started by deepspeed or
    torchrun, every rank calls it.

        config = dataclasses.replace(mtfast.recipes.local(), run_dir="runs/mine")
        run = mtfast.train(config)

    SIGTERM and SIGINT, which Ctrl-C sends, take effect once the step that is being made is saved.

    Args:
        on_event: is called on rank 0 with each line of metrics.jsonl, a dict, once the line is written: those
            of steps every `config.log_every` steps, together, those of evaluations as they come. Of a run
            that goes on it gets the new lines. What it raises ends the run, which the same call continues.

                def show(event):
                    if event["kind"] == "step":
                        losses.append(event["loss"])
                    elif event["kind"] == "eval":
                        print(event["stage"], event["epoch"], event["metrics"]["mean"], min(losses))

                losses = []
                mtfast.train(config, on_event=show)

    Raises:
        mtfast.errors.Error: the configuration, the data or the checkpoint cannot be used, or the run went
            astray; the message says what is right.
    """
    validate(config)
    with _environment_kept():
        try:
            execute("run", "", config, on_event)
            alive.finish()
        except Stopped as stopped:
            alive.finish()
            signal.raise_signal(stopped.signum)  # whose handlers are again those of the caller
            raise
        finally:
            release()
    return Run(config.path.absolute())


@contextmanager
def _environment_kept() -> Iterator[None]:
    """Without a launcher a run is given its rank; what comes after it in this process should not see that."""
    unset = [name for name in LAUNCHERS if name not in os.environ]
    try:
        yield
    finally:
        for name in unset:
            os.environ.pop(name, None)
