"""The run directory: whose it is, its metrics as JSON lines, and each stage's results."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from mtfast.config import STAGES, ConfigError
from mtfast.files import naming, read_json, to_yaml, write_json, write_text
from mtfast.training.engine import ranks

from .lock import HOLDER, hold

CONFIG = "config.yaml"
METRICS = "metrics.jsonl"
SUMMARY = "summary.json"
SHARED_SECONDS = 10.0  # for which another host may still see an older state of a directory


class RunDirectory:
    """Files of one run. Only rank 0 writes; what it writes appears whole or not at all.

    No other process may open it before this one has ended. All ranks open it together; it must be one
    directory for all their hosts.
    """

    def __init__(self, path: Path, configuration: dict[str, Any], *, create: bool = True) -> None:
        """configuration: of the run, as plain values; what `config.yaml` holds."""
        self.path = path
        ranks.agree("the configuration", configuration)
        ranks.on_main(self._claim, configuration, create)
        self._check_shared()

    def _claim(self, configuration: dict[str, Any], create: bool) -> None:
        self._is_ours(configuration, create)  # a directory that is refused is left as it is, without a lock
        hold(self.path)
        if not self._is_ours(configuration, create):  # another process may have come before the lock
            write_text(self.path / CONFIG, to_yaml(configuration))
            (self.path / SUMMARY).unlink(missing_ok=True)  # of a false start: nothing was trained after it

    def _is_ours(self, configuration: dict[str, Any], create: bool) -> bool:
        """Whether the run has begun here; raises ConfigError where another has or, unless `create`, none."""
        owned = self.path / CONFIG
        if owned.exists():
            theirs = _read_yaml(owned)
            differences = list(_differences(theirs, configuration))
            if not differences:
                return True
            if "tasks" not in theirs:
                raise ConfigError(
                    f"{self.path} belongs to a run of an earlier mtfast, which did not declare its tasks; "
                    "go on with that version, or choose another --run-dir"
                )
            if any((self.path / name).exists() for name in (METRICS, *STAGES)):
                raise ConfigError(
                    f"{self.path} belongs to a run with another configuration:\n  "
                    + "\n  ".join(differences)
                    + "\nChoose another --run-dir, or remove that directory."
                )
        elif any((self.path / name).exists() for name in (METRICS, SUMMARY)):
            raise ConfigError(
                f"{self.path} holds another run's files but no {CONFIG}; choose another --run-dir"
            )
        if not create:
            raise ConfigError(f"{self.path} holds no run with this configuration; train one first")
        return False

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
        """Record a stage as finished and drop its resumable state, which nothing needs any more."""
        ranks.on_main(self._finish, self.stage(name), result)

    def _finish(self, stage: Path, result: dict[str, Any]) -> None:
        write_json(stage / "result.json", result)
        shutil.rmtree(stage / "state", ignore_errors=True)

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
        shutil.copytree(other / name, partial)
        self.append([record for _, record in _metrics(other / METRICS) if record["stage"] == name])
        partial.rename(self.stage(name))

    def append(self, records: list[dict[str, Any]]) -> None:
        """Add lines to metrics.jsonl."""
        if ranks.is_main() and records:
            path = self.path / METRICS
            with naming(path), open(path, "a", encoding="utf-8") as file:
                file.writelines(json.dumps(record) + "\n" for record in records)

    def rewind(self, stage: str, step: int) -> None:
        """Forget what metrics.jsonl says of `stage` after `step`: those steps are about to run again."""
        ranks.on_main(self._rewind, stage, step)

    def _rewind(self, stage: str, step: int) -> None:
        path = self.path / METRICS
        if path.exists():
            kept = [line for line, r in _metrics(path) if r["stage"] != stage or r["step"] <= step]
            write_text(path, "".join(line + "\n" for line in kept))

    def summarize(self, **entries: Any) -> dict[str, Any]:
        """Merge entries into summary.json and return it."""
        return ranks.seen_by_main(lambda: self._summarize(entries))

    def _summarize(self, entries: dict[str, Any]) -> dict[str, Any]:
        path = self.path / SUMMARY
        summary = read_json(path, "remove it, and the run goes on without it") if path.exists() else {}
        for key, value in entries.items():
            both = isinstance(value, dict) and isinstance(summary.get(key), dict)
            summary[key] = {**summary[key], **value} if both else value
        write_json(path, summary)
        return summary


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


def _differences(owner: Any, config: Any, prefix: str = "") -> Iterator[str]:
    for key in sorted(set(owner) | set(config), key=str):
        name = f"{prefix}{key}"
        if key == "run_dir" and not prefix:
            continue  # the same directory may be reached by another path
        was, now = owner.get(key), config.get(key)
        if isinstance(was, dict) and isinstance(now, dict):
            if name == "tasks" and set(was) == set(now) and list(was) != list(now):
                # Parameters and outputs follow their order.
                yield f"tasks: {', '.join(was)} there, {', '.join(now)} here"
            yield from _differences(was, now, f"{name}.")
        elif was != now:
            yield f"{name}: {was!r} there, {now!r} here"
