"""Who is told of a run's records while it trains: TensorBoard, Weights & Biases, a function of the caller's.

All of them follow metrics.jsonl, from which what they show can be made again. Their packages are imported
where they are asked for.
"""

from __future__ import annotations

import contextvars
import gc
import importlib
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from mtfast.config import STAGES, ConfigError, LoggerName, RunConfig, to_dict
from mtfast.files import naming, write_text
from mtfast.packages import version_of
from mtfast.training.engine import ranks

from .directory import Listener
from .progress import say

if TYPE_CHECKING:
    from typing_extensions import Self

Record = dict[str, Any]
OnEvent = Callable[[Record], None]

# Versions that will do.
OLDEST: dict[LoggerName, tuple[int, int]] = {"tensorboard": (2, 18), "wandb": (0, 28)}
RATES = ("learning_rate", "examples_per_s", "tokens_per_s")
EVENT_FILES = "events.out.tfevents.*"
FLUSH_SECONDS = 10
WANDB_ID = "wandb-id.txt"  # of the run at Weights & Biases; without it, it is another one there
FINISH_SECONDS = 300.0  # for which the end of a run waits for uploads


def check(names: tuple[LoggerName, ...]) -> None:
    """Import the packages of these loggers.

    Raises:
        ConfigError: one cannot be used here; the message says what to do about it.
    """
    for name in names:
        oldest = ".".join(map(str, OLDEST[name]))
        install = f"python -m pip install '{name}>={oldest}'"
        try:
            importlib.import_module("torch.utils.tensorboard" if name == "tensorboard" else name)
        except ImportError as error:
            raise ConfigError(f"log {name} needs the package {name} ({error}): {install}", "log") from error
        found = version_of(name) or "0.0"
        if tuple(map(int, re.findall(r"\d+", found)[:2])) < OLDEST[name]:
            raise ConfigError(
                f"log {name} needs {name} {oldest} or newer, {found} is installed: {install}", "log"
            )
        if name == "wandb":
            _check_login()


def _check_login() -> None:
    import wandb

    try:
        if wandb.setup().settings.mode in ("online", "shared"):
            wandb.login(verify=False)  # which asks for a key where there is a terminal
    except Exception as error:
        raise ConfigError(
            f"log wandb needs a login ({error}): run `wandb login`, set WANDB_API_KEY, or set "
            "WANDB_MODE=offline, which keeps the curves in the run's directory for `wandb sync`",
            "log",
        ) from error


@contextmanager
def opened(config: RunConfig, on_event: OnEvent | None) -> Iterator[tuple[Listener, ...]]:
    """The listeners of a run, on rank 0; closed however it ends."""
    with ExitStack() as stack:
        listeners: list[Listener] = []
        if ranks.is_main():
            listeners += [stack.enter_context(LOGGERS[name](config)) for name in config.log]
            if on_event is not None:  # which may raise: after the others
                listeners.append(Caller(on_event))
        yield tuple(listeners)


def scalars(record: Record) -> dict[str, float]:
    """The numbers of a line of metrics.jsonl by their tags, `finetune/loss/sst` say."""
    found = {name: record[name] for name in ("loss", *RATES) if name in record}
    found |= {f"loss/{name}": loss for name, loss in record.get("losses", {}).items() if loss is not None}
    found |= {f"dev/{name}": value for name, value in record.get("metrics", {}).items()}
    if record.get("kind") == "skipped":
        found["skipped"] = 1.0
    return {f"{record['stage']}/{tag}": value for tag, value in found.items()}


class Caller:
    """A function that is called with each new record."""

    def __init__(self, on_event: OnEvent) -> None:
        self._on_event = on_event

    def restart(self, records: list[Record]) -> None:
        pass

    def add(self, records: list[Record]) -> None:
        for record in records:
            self._on_event(record)


class TensorBoard:
    """`tensorboard/` in the run's directory, one event file with what metrics.jsonl holds.

    It is written anew where a run goes on, with the times of then. A purge_step would hide old events, but
    those of all stages from a step on, of which each counts its own, and not from every reader.
    """

    def __init__(self, config: RunConfig) -> None:
        self._directory = config.path / "tensorboard"
        self._writer: Any = None
        self._written = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def _close(self) -> None:
        if self._writer is not None:
            with naming(self._directory):
                self._writer.close()

    def restart(self, records: list[Record]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        if self._writer is not None and len(records) == self._written:
            return  # the next stage: nothing was taken back
        self._close()
        for old in self._directory.glob(EVENT_FILES):
            old.unlink()
        # A TensorBoard that is open forgets what it has read, from step 0 on.
        self._writer = SummaryWriter(str(self._directory), purge_step=0, flush_secs=FLUSH_SECONDS)
        self._written = 0
        self.add(records)

    def add(self, records: list[Record]) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        with naming(self._directory):
            for record in records:
                values = [
                    Summary.Value(tag=tag, simple_value=value) for tag, value in scalars(record).items()
                ]
                self._writer.file_writer.add_summary(Summary(value=values), record["step"])
            self._written += len(records)
            if any(record.get("kind") == "eval" for record in records):
                self._writer.flush()


class WeightsAndBiases:
    """A run at Weights & Biases that has the record in line i of metrics.jsonl as its step i.

    How many it has, `starting_step` tells when a run goes on: those are not sent again, and what it lacks is
    made up for. Offline nobody can tell, and what was kept for `wandb sync` is written anew, with the output
    from then on. Whatever goes wrong there, the run goes on without it.
    """

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._run: Any = None
        self._begun = False
        self._works = True  # until something goes wrong there
        self._context = contextvars.Context()
        self._next = 0  # the line that comes next
        self._step = 0  # the first line that W&B does not have

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._run is not None:  # also where it lacks rows: it would be taken for one that goes on
            self._call(self._run.finish, int(error is not None))

    def restart(self, records: list[Record]) -> None:
        if not self._begun:
            self._begun = True
            self._call(self._init)
        self._next = 0
        self.add(records)

    def add(self, records: list[Record]) -> None:
        self._call(self._send, records)

    def _call(self, function: Callable[..., None], *args: Any) -> None:
        """Call what calls W&B, in a context of its own, while no garbage is collected.

        W&B relies on context variables, and sets some whenever anything is printed. Where that collects
        garbage whose finalizer prints, Python before 3.12 can ruin the context
        (github.com/python/cpython/issues/148891): ours it cannot, and a caller's ruined one does no harm.
        """
        collects = gc.isenabled()
        gc.disable()
        try:
            self._context.run(function, *args)
        except Exception as error:  # of any kind: a connection, a process of its own, what a server answers
            if not self._works:
                return
            self._works = False
            reason = " ".join(str(error).split()) or type(error).__name__
            send = f"`mtfast resume {self._config.run_dir}` sends what is missing there"
            say(f"log wandb: {reason}; the run goes on without it, and {send}")
        finally:
            if collects:
                gc.enable()

    def _send(self, records: list[Record]) -> None:
        for record in records:
            if self._run is not None and self._works and self._next >= self._step:
                values = {f"{record['stage']}/step": record["step"], **scalars(record)}
                self._run.log(values, step=self._next, commit=True)
                self._step = self._next + 1
            self._next += 1

    def _init(self) -> None:
        import wandb

        path, settings = self._config.path, wandb.setup().settings
        run = self._run = wandb.init(
            project=settings.project or "mtfast",
            dir=str(path),
            id=_wandb_id(path / WANDB_ID),
            name=path.absolute().name,
            config=to_dict(self._config),
            allow_val_change=True,
            resume="allow",
            reinit="create_new",  # one that the caller has open is not ours
            settings={"finish_timeout": settings.finish_timeout or FINISH_SECONDS},
        )
        self._step = run.starting_step
        for stage in STAGES:
            run.define_metric(f"{stage}/step", hidden=True)
            run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
        if run.offline:
            files = Path(run.dir).parent
            for other in files.parent.glob(f"offline-run-*-{run.id}*"):
                if other != files:
                    shutil.rmtree(other)


def _wandb_id(file: Path) -> str:
    """The id in a file, which gets a new one where it has none."""
    found = file.read_text(encoding="utf-8", errors="replace").strip() if file.exists() else ""
    if not re.fullmatch("[0-9a-z]+", found):
        found = secrets.token_hex(8)
        write_text(file, found + "\n")
    return found


LOGGERS: dict[LoggerName, Callable[[RunConfig], Any]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
}
