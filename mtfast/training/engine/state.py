"""A stage's resumable states on disk: written whole, described by a manifest; the newest whole one counts.

A state is the directory `step-<steps made>`: every weight and what AdamW knows of it as float32 tensors in a
safetensors file, whatever precision, ZeRO stage and number of ranks the steps were made with; where the loop
stands as JSON; links to the checkpoints that were the best by then. Reading it executes nothing.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from mtfast.config import ConfigError
from mtfast.durable import MANIFEST, damage, read_manifest, write_manifest
from mtfast.files import read_json, write_json
from mtfast.models.checkpoint import CheckpointError
from mtfast.models.files import link_files, read_tensors, replacing, save_tensors

TENSORS, REST = "state.safetensors", "state.json"
WEIGHT = "weight"
_REST = ("step", "skipped", "ranks", "client")
_NAME = re.compile(r"step-(\d+)")


@dataclass(frozen=True)
class State:
    """What training goes on from, on the host.

    step: optimizer steps made. skipped: how many of them left the weights as they were.
    ranks: how many made the last.
    client: what the loop adds, plain values.
    weights: every weight and buffer by its name, float32.
    moments: what AdamW knows of each, `exp_avg.<name>`, `exp_avg_sq.<name>` and `step.<name>`.
    """

    step: int
    skipped: int
    ranks: int
    client: dict[str, Any]
    weights: dict[str, Tensor]
    moments: dict[str, Tensor]


@dataclass(frozen=True)
class Found:
    """A state on disk. best: the checkpoints in it that are whole, by their names.

    faults: what is wrong with newer ones, and with checkpoints in this one.
    """

    path: Path
    best: tuple[str, ...]
    faults: tuple[str, ...]


def write_state(directory: Path, state: State, best: Iterable[Path], keep: int) -> None:
    """Write a state, then remove all but the `keep` newest.

    Args:
        best: directories of checkpoints that belong to it.

    Raises:
        CheckpointError: it cannot be written; nothing is removed then.
    """
    target = directory / f"step-{state.step}"
    try:
        with replacing(target) as incoming:
            weights = {f"{WEIGHT}.{name}": x for name, x in state.weights.items()}
            save_tensors(incoming / TENSORS, weights | state.moments)
            rest = {name: getattr(state, name) for name in _REST}
            write_json(incoming / REST, rest)
            for checkpoint in best:
                (incoming / checkpoint.name).mkdir()
                link_files(checkpoint, incoming / checkpoint.name)
            write_manifest(incoming)
    except CheckpointError as error:
        raise CheckpointError(
            f"the training state could not be written: {error}; the one before it, if there is one, is "
            "kept, and the same command continues from there"
        ) from error
    # Those of later steps were damaged, so that the stage has gone on from an earlier one.
    numbered = {_step(path): path for path in states_in(directory)}
    kept = sorted(step for step in numbered if step <= state.step)[-keep:]
    for path in (path for step, path in numbered.items() if step not in kept):
        shutil.rmtree(path, ignore_errors=True)  # what stays is removed with the next


def states_in(directory: Path) -> list[Path]:
    """The states in a directory, whole or not, the newest last."""
    found = [path for path in directory.glob("step-*") if _NAME.fullmatch(path.name)]
    return sorted(found, key=_step)


def newest_state(directory: Path) -> Found | None:
    """The newest state that is whole; where there is none, the newest of which no more than checkpoints are
    damaged. None where there are no states.

    Raises:
        ConfigError: all are damaged; the message says how.
    """
    faults: list[str] = []
    usable: list[Found] = []
    for path in reversed(states_in(directory)):
        try:
            described = read_manifest(path)
        except ValueError as error:
            faults.append(f"{error}: the state is not whole, or of another version of mtfast")
            continue
        own = {name: of for name, of in described.items() if "/" not in name}
        if not {TENSORS, REST} <= own.keys() or (fault := damage(path, own)):
            faults.append(fault or f"{path / MANIFEST} is damaged")
            continue
        best, bad = [], []
        for checkpoint in sorted({name.split("/")[0] for name in described.keys() - own.keys()}):
            its = {name: of for name, of in described.items() if name.startswith(f"{checkpoint}/")}
            fault = damage(path, its)
            bad += [fault] if fault else []
            best += [] if fault else [checkpoint]
        if not bad:
            return Found(path, tuple(best), tuple(faults))
        usable.append(Found(path, tuple(best), (*faults, *bad)))
        faults += bad
    if usable:
        return usable[0]
    if faults:
        raise ConfigError(
            "no training state can be gone on from:\n  "
            + "\n  ".join(faults)
            + f"\nPut the files back from a copy, or remove {directory} to start the stage again."
        )
    return None


def read_state(path: Path) -> State:
    """Raises CheckpointError where it cannot be read."""
    try:
        tensors = read_tensors(path / TENSORS)
        rest = read_json(path / REST, "it is not what mtfast has written")
        weights = {n.partition(".")[2]: x for n, x in tensors.items() if n.startswith(f"{WEIGHT}.")}
        moments = {name: x for name, x in tensors.items() if not name.startswith(f"{WEIGHT}.")}
        return State(**{name: rest[name] for name in _REST}, weights=weights, moments=moments)
    except (ConfigError, CheckpointError, KeyError) as error:
        raise unreadable(path, error) from error


def unreadable(path: Path, error: Exception) -> CheckpointError:
    """What to raise for a state that its manifest calls whole."""
    return CheckpointError(
        f"the training state {path} cannot be gone on from ({error}); remove {path.parent} to start the "
        "stage again"
    )


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))
