"""The run directory: whose it is, its metrics as JSON lines, and each stage's results."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import yaml

from mtfast.config import CONFIG_FILE, STAGES, ConfigError, StageName
from mtfast.durable import damage, manifest_of, sync, sync_tree
from mtfast.files import naming, read_json, to_yaml, write_json, write_text
from mtfast.models.checkpoint import CheckpointError
from mtfast.training.engine import ranks
from mtfast.training.engine.state import states_in

from .lock import HOLDER, hold
from .progress import say
from .settings import FREE, Change, Progress, changes, refused

METRICS = "metrics.jsonl"
SUMMARY = "summary.json"
STATE = "state"  # of a stage: what it goes on from
FEATURES = "features"  # of a stage: tables that were too large for memory
SHARED_SECONDS = 10.0  # for which another host may still see an older state of a directory


class Listener(Protocol):
    """Is told, on rank 0, what metrics.jsonl holds: the lines as plain values of the listener's own."""

    def restart(self, records: list[dict[str, Any]]) -> None:
        """These it holds, and no others: a stage is about to begin or to go on."""

    def add(self, records: list[dict[str, Any]]) -> None:
        """These it holds besides, from now on."""


class RunDirectory:
    """Files of one run. Only rank 0 writes; what it writes appears whole or not at all.

    No other process may open it before this one has ended. All ranks open it together; it must be one
    directory for all their hosts.
    """

    def __init__(self, path: Path, configuration: dict[str, Any], *, create: bool = True) -> None:
        """configuration: of the run, as plain values; what `config.yaml` is to hold. Rank 0's counts.

        `changes` has what differs from that of the run as it has begun; to be confirmed, then adopted.
        """
        self.path = path
        self.changes: list[Change] = ranks.seen_by_main(lambda: self._claim(configuration, create))
        self._configuration = configuration
        self._listeners: Sequence[Listener] = ()
        self._check_shared()

    def _claim(self, configuration: dict[str, Any], create: bool) -> list[Change]:
        # A directory that is refused is left as it is, without a lock; another process may come before it.
        compare(self.path, configuration, create=create)
        hold(self.path)
        found = compare(self.path, configuration, create=create)
        file = self.path / CONFIG_FILE
        if found is None:
            (self.path / SUMMARY).unlink(missing_ok=True)  # of a false start: nothing was trained after it
            write_text(file, to_yaml(configuration))
        elif not found and not _holds(file, configuration):
            if not _holds(file, _configuration_of(self.path)):
                say(f"{file} was damaged and is written anew")
            _rewrite(file, to_yaml(configuration))
        if not found:
            self._summarize({"config": configuration})
        return found or []

    def adopt(self) -> None:
        """Go on with the new configuration; say and keep what differs, unless nothing follows from it."""
        ranks.on_main(self._adopt)
        self.changes = []

    def _adopt(self) -> None:
        told = [change for change in self.changes if not change.is_one_of(FREE)]
        for name in {change.stage for change in told if change.stage}:
            self._reopen(name)
        if told:
            at = {name: made.steps for name in STAGES if (made := _progress(self.path, name))}
            kept = read_summary(self.path).get("changes", [])
            new = [{"field": c.field, "was": c.was, "now": c.now, "at": at} for c in told]
            self._summarize({"changes": kept + [change for change in new if change not in kept]})
            rate = "; the learning rate follows the new number of steps from here on"
            for change in told:
                planned = change.stage in at and _is_planned(self._configuration[change.stage])
                say(f"{self.path} goes on with another setting, {change}{rate if planned else ''}")
        _rewrite(self.path / CONFIG_FILE, to_yaml(self._configuration))
        self._summarize({"config": self._configuration})

    def _reopen(self, name: StageName) -> None:
        """Make a stage unfinished, if it has finished: it goes on from its last state."""
        if (result := self.stage(name) / "result.json").exists():
            result.unlink()
            summary = read_summary(self.path)
            summary["stages"] = {stage: x for stage, x in summary.get("stages", {}).items() if stage != name}
            kept = {key: value for key, value in summary.items() if key not in ("dev", "test")}
            write_json(self.path / SUMMARY, kept)

    def _check_shared(self) -> None:
        """Raises ConfigError, naming the hosts, where a rank does not find here what rank 0 has written."""
        written = ranks.seen_by_main(lambda: (self.path / HOLDER).read_text(encoding="utf-8"))
        deadline = time.monotonic() + SHARED_SECONDS
        while not (found := self._holds(written)) and time.monotonic() < deadline:
            time.sleep(0.2)
        everywhere = ranks.gather((ranks.whereabouts(), found))
        if apart := [where for where, found in everywhere if not found]:
            raise ConfigError(
                f"{', '.join(apart)} does not see {self.path.absolute()} of {everywhere[0][0]}: --run-dir "
                "must lie on a file system that all hosts share"
            )

    def _holds(self, written: str) -> bool:
        try:
            os.listdir(self.path)  # a network file system looks anew
            return (self.path / HOLDER).read_text(encoding="utf-8") == written
        except OSError:
            return False

    def stage(self, name: str) -> Path:
        return self.path / name

    def result(self, name: str) -> dict[str, Any] | None:
        """What a finished stage left: its summary and its best epochs; None if it has not finished."""
        return ranks.seen_by_main(lambda: read_result(self.stage(name)))

    def has_begun(self, name: str) -> bool:
        """Whether a stage has left anything, finished or not."""
        return ranks.seen_by_main(self.stage(name).exists)

    def finish_stage(self, name: str, result: dict[str, Any]) -> None:
        """Record a stage as finished. Its resumable state stays until the next stage begins: more epochs may
        be asked for."""
        ranks.on_main(self._finish, self.stage(name), result)

    def _finish(self, stage: Path, result: dict[str, Any]) -> None:
        shutil.rmtree(stage / FEATURES, ignore_errors=True)
        checkpoints = [path for path in sorted(stage.glob("*")) if path.is_dir() and path.name != STATE]
        described = {path.name: manifest_of(path) for path in checkpoints if not path.name.startswith(".")}
        write_json(stage / "result.json", {**result, "checkpoints": described})

    def drop_states_before(self, name: StageName) -> None:
        """Drop the resumable states of the stages before `name`, which is about to build on them."""
        ranks.on_main(self._drop_states, STAGES[: STAGES.index(name)])

    def _drop_states(self, stages: tuple[StageName, ...]) -> None:
        for stage in stages:
            shutil.rmtree(self.stage(stage) / STATE, ignore_errors=True)

    def confirm(
        self, what: str, checksum: int, readers: tuple[StageName, ...], text: str, field: str | None = None
    ) -> None:
        """See to it that what the run reads is what it has read before, wherever that lies now.

        Args:
            checksum: of its contents, as rank 0 sees them.
            readers: the stages whose results follow from it.

        Raises:
            ConfigError: it is another and one of the readers has begun; `text` begins the message.
        """
        ranks.on_main(self._confirm, what, checksum, readers, text, field)

    def _confirm(
        self, what: str, checksum: int, readers: tuple[StageName, ...], text: str, field: str | None
    ) -> None:
        known = read_summary(self.path).get("checksums", {}).get(what)
        if known == checksum:
            return
        begun = [name for name in readers if self.stage(name).exists()]
        if known is not None and begun:
            raise ConfigError(
                f"{text} is not what the run in {self.path} has read in {begun[0]}; give it the same, or "
                "choose another --run-dir",
                field,
            )
        self._summarize({"checksums": {what: checksum}})

    def take_over(self, name: str, other: Path) -> bool:
        """Copy a stage with its metrics and summary from another run.

        False, and nothing done, if it has not finished there or has begun here.
        """
        result = ranks.seen_by_main(lambda: read_result(other / name))
        if result is None or self.has_begun(name):
            return False
        self.rewind(name, 0)  # what an interrupted attempt has left
        ranks.on_main(self._copy_stage, name, other)
        self.summarize(stages={name: result["summary"]})
        return True

    def _copy_stage(self, name: str, other: Path) -> None:
        partial = self.path / f"{name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(other / name, partial, ignore=shutil.ignore_patterns(STATE))
        self.append([record for _, record in _metrics(other / METRICS) if record["stage"] == name])
        sync_tree(partial)
        partial.rename(self.stage(name))
        sync(self.path)

    def listen(self, listeners: Sequence[Listener]) -> None:
        """Tell `listeners`, on rank 0, what metrics.jsonl holds from the next `rewind` on."""
        self._listeners = listeners

    def append(self, records: list[dict[str, Any]]) -> None:
        """Add lines to metrics.jsonl, then tell the listeners."""
        if ranks.is_main() and records:
            path = self.path / METRICS
            lines = [json.dumps(record) + "\n" for record in records]
            with naming(path), open(path, "a", encoding="utf-8") as file:
                file.writelines(lines)
            for listener in self._listeners:
                listener.add([json.loads(line) for line in lines])

    def sync_metrics(self) -> None:
        """See to it that metrics.jsonl is on the disk."""
        if ranks.is_main() and (path := self.path / METRICS).exists():
            sync(path)

    def rewind(self, stage: str, step: int, *, evaluated: bool = True) -> None:
        """Forget what metrics.jsonl says of `stage` after `step`: that is about to happen again.

        evaluated: an evaluation after the step itself is not.
        """
        ranks.on_main(self._rewind, stage, step, evaluated)

    def _rewind(self, stage: str, step: int, evaluated: bool) -> None:
        path = self.path / METRICS
        if path.exists():
            records, lines = _metrics(path), path.read_bytes().count(b"\n")
            if lines > len(records):  # besides one that was being written
                say(f"{path}: {lines - len(records)} damaged line(s) are left out")
            kept = [
                line
                for line, r in records
                if r["stage"] != stage or r["step"] < step + (evaluated or r.get("kind") != "eval")
            ]
            write_text(path, "".join(line + "\n" for line in kept))
        self._tell()

    def tell(self) -> None:
        """Tell the listeners what metrics.jsonl holds."""
        ranks.on_main(self._tell)

    def _tell(self) -> None:
        for listener in self._listeners:
            listener.restart([record for _, record in _metrics(self.path / METRICS)])

    def summarize(self, **entries: Any) -> dict[str, Any]:
        """Merge entries into summary.json and return it."""
        return ranks.seen_by_main(lambda: self._summarize(entries))

    def _summarize(self, entries: dict[str, Any]) -> dict[str, Any]:
        summary = read_summary(self.path)
        for key, value in entries.items():
            both = isinstance(value, dict) and isinstance(summary.get(key), dict)
            summary[key] = {**summary[key], **value} if both else value
        write_json(self.path / SUMMARY, summary)
        return summary


def compare(path: Path, configuration: dict[str, Any], *, create: bool) -> list[Change] | None:
    """What differs from the configuration of the run that has begun in `path`; None where none has.

    Raises:
        ConfigError: the run cannot go on with it or, unless `create`, none has begun.
    """
    theirs = _configuration_of(path)
    if theirs is not None:
        if "tasks" not in theirs:
            raise ConfigError(
                f"{path} belongs to a run of an earlier mtfast, which did not declare its tasks; go on with "
                "that version, or choose another --run-dir"
            )
        found = list(changes(theirs, configuration))
        reasons = refused(found, lambda name: _progress(path, name), configuration)
        if not reasons:
            return found
        if any((path / name).exists() for name in (METRICS, *STAGES)):
            raise ConfigError(
                f"{path} belongs to a run with another configuration:\n  "
                + "\n  ".join(reasons)
                + "\nChoose another --run-dir, or remove that directory."
            )
    elif any((path / name).exists() for name in (METRICS, SUMMARY)):
        raise ConfigError(f"{path} holds another run's files but no {CONFIG_FILE}; choose another --run-dir")
    if not create:
        raise ConfigError(f"{path} holds no run with this configuration; train one first")
    return None


def _configuration_of(path: Path) -> dict[str, Any] | None:
    """What the run that has begun in `path` was made with; None where none has. The summary has it too, so
    that what becomes of the file, by hand say, counts as a change like one on the command line."""
    if (told := read_summary(path).get("config")) is not None:
        return told
    return _read_yaml(path / CONFIG_FILE) if (path / CONFIG_FILE).exists() else None


def _rewrite(file: Path, text: str) -> None:
    """Write a file that goes on telling when the run began."""
    begun = file.stat().st_mtime_ns if file.exists() else time.time_ns()
    write_text(file, text)
    os.utime(file, ns=(begun, begun))


def _holds(file: Path, configuration: dict[str, Any] | None) -> bool:
    try:
        return _read_yaml(file) == configuration
    except ConfigError:
        return False


def _progress(path: Path, name: StageName) -> Progress | None:
    """How far a stage of the run in `path` is; None where it has not begun."""
    stage = path / name
    if not stage.exists():
        return None
    steps = [r for _, r in _metrics(path / METRICS) if r["stage"] == name and "losses" in r]
    return Progress(
        steps=max((step["step"] for step in steps), default=0),
        epochs=max((step["epoch"] + 1 for step in steps), default=0),
        finished=read_result(stage) is not None,
        resumable=bool(states_in(stage / STATE)),
    )


def _is_planned(stage: dict[str, Any]) -> bool:
    """Whether the learning rate of a stage depends on how many steps there will be."""
    return stage["schedule"] != "constant" or stage["warmup_fraction"] > 0


def read_summary(path: Path) -> dict[str, Any]:
    """What summary.json of the run in `path` holds, empty where there is none. For this process alone, with
    no lock.

    Raises:
        ConfigError: it cannot be read.
    """
    summary = path / SUMMARY
    return read_json(summary, "remove it, and the run goes on without it") if summary.exists() else {}


def read_result(stage: Path) -> dict[str, Any] | None:
    """What a finished stage left in its directory: its summary and its best epochs; None if it has not
    finished. For this process alone, with no lock."""
    path = stage / "result.json"
    if not path.exists():
        return None
    remedy = f"remove {stage} to run the stage again"
    result = read_json(path, remedy)
    if not isinstance(result.get("summary"), dict):
        raise ConfigError(f"{path} is not what a finished stage leaves; {remedy}")
    return result


def check_checkpoint(directory: Path) -> None:
    """See to it that a checkpoint of a stage that has finished is as the stage has left it.

    Raises:
        CheckpointError: it is damaged; the message says where.
    """
    result = read_result(directory.parent) or {}
    fault = damage(directory, result.get("checkpoints", {}).get(directory.name, {}))
    if fault is not None:
        raise CheckpointError(
            f"{fault}; put it back from a copy, or remove {directory.parent} to run the stage again"
        )


def _metrics(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Each line of a metrics.jsonl with its record, without lines that an interruption has cut off."""
    if not path.exists():
        return []
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int) and "stage" in record:
            found.append((line, record))
    return found


def _read_yaml(path: Path) -> dict[str, Any]:
    remedy = "choose another --run-dir, or remove that directory"
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else " ".join(str(error).split())
        raise ConfigError(f"{path} cannot be read ({reason}); {remedy}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} is not a run's configuration; {remedy}")
    return values
