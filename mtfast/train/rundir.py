"""The run directory: whose it is, its metrics as JSON lines, and each stage's results."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from . import ranks
from .config import STAGES, ConfigError, RunConfig, to_dict, to_yaml

CONFIG = "config.yaml"
METRICS = "metrics.jsonl"
SUMMARY = "summary.json"


class RunDirectory:
    """Files of one run. Only rank 0 writes; what it writes appears whole or not at all."""

    def __init__(self, config: RunConfig, *, create: bool = True) -> None:
        self.path = config.path
        ranks.on_main(lambda: self._claim(config, create))

    def _claim(self, config: RunConfig, create: bool) -> None:
        owned = self.path / CONFIG
        if owned.exists():
            differences = list(_differences(_read_yaml(owned), to_dict(config)))
            if not differences:
                return
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
        write_text(owned, to_yaml(config))
        (self.path / SUMMARY).unlink(missing_ok=True)  # of a false start: nothing was trained after it

    def stage(self, name: str) -> Path:
        return self.path / name

    def result(self, name: str) -> dict[str, Any] | None:
        """What a finished stage left: its summary and its best epochs; None if it has not finished."""
        path = self.stage(name) / "result.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def finish_stage(self, name: str, result: dict[str, Any]) -> None:
        """Record a stage as finished and drop its resumable state, which nothing needs any more."""
        if ranks.is_main():
            write_json(self.stage(name) / "result.json", result)
            shutil.rmtree(self.stage(name) / "state", ignore_errors=True)
        ranks.barrier()

    def take_over(self, name: str, other: Path) -> bool:
        """Copy a stage with its metrics and summary from another run.

        False, and nothing done, if it has not finished there or has begun here.
        """
        if not (other / name / "result.json").exists() or self.stage(name).exists():
            return False
        self.rewind(name, 0)  # what an interrupted attempt has left
        ranks.on_main(lambda: self._copy_stage(name, other))
        result = self.result(name)
        assert result is not None
        self.summarize(stages={name: result["summary"]})
        return True

    def _copy_stage(self, name: str, other: Path) -> None:
        partial = self.path / f"{name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(other / name, partial)
        lines = (other / METRICS).read_text(encoding="utf-8").splitlines()
        self.append([record for record in map(json.loads, lines) if record["stage"] == name])
        partial.rename(self.stage(name))

    def append(self, records: list[dict[str, Any]]) -> None:
        """Add lines to metrics.jsonl."""
        if ranks.is_main() and records:
            with open(self.path / METRICS, "a", encoding="utf-8") as file:
                file.writelines(json.dumps(record) + "\n" for record in records)

    def rewind(self, stage: str, step: int) -> None:
        """Forget what metrics.jsonl says of `stage` after `step`: those steps are about to run again."""
        path = self.path / METRICS
        if ranks.is_main() and path.exists():
            kept = []
            for line in path.read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(json.JSONDecodeError):  # a line cut off by the interruption
                    record = json.loads(line)
                    if record["stage"] != stage or record["step"] <= step:
                        kept.append(line)
            write_text(path, "".join(line + "\n" for line in kept))
        ranks.barrier()

    def summarize(self, **entries: Any) -> dict[str, Any]:
        """Merge entries into summary.json and return it."""
        path = self.path / SUMMARY
        summary = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        for key, value in entries.items():
            both = isinstance(value, dict) and isinstance(summary.get(key), dict)
            summary[key] = {**summary[key], **value} if both else value
        if ranks.is_main():
            write_json(path, summary)
        return summary


def write_text(path: Path, text: str) -> None:
    """Write a file whole: to a neighbour first, then renamed over it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} is not a run's configuration")
    return values


def _differences(owner: Any, config: Any, prefix: str = "") -> Iterator[str]:
    for key in sorted(set(owner) | set(config)):
        name = f"{prefix}{key}"
        if key == "run_dir" and not prefix:
            continue  # the same directory may be reached by another path
        was, now = owner.get(key), config.get(key)
        if isinstance(was, dict) and isinstance(now, dict):
            yield from _differences(was, now, f"{name}.")
        elif was != now:
            yield f"{name}: {was!r} there, {now!r} here"
