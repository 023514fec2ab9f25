"""What metrics.jsonl, TensorBoard's event files and W&B's hold, read as curves.

Event files are read with TensorBoard's own reader, W&B's with its protocol.
"""

import collections
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto import wandb_internal_pb2

Curves = dict[str, list[tuple[int, float]]]  # steps and values by tag


def records_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def curves_of(records: list[dict[str, Any]]) -> Curves:
    """Every number that the records hold, where it belongs."""
    curves: Curves = collections.defaultdict(list)
    for record in records:
        stage, step = record["stage"], record["step"]
        for key, value in record.items():
            if key in ("losses", "metrics"):
                below = {"losses": "loss", "metrics": "dev"}[key]
                for name, number in value.items():
                    if number is not None:
                        curves[f"{stage}/{below}/{name}"].append((step, number))
            elif key not in ("kind", "stage", "step", "epoch"):
                curves[f"{stage}/{key}"].append((step, value))
        if record["kind"] == "skipped":
            curves[f"{stage}/skipped"].append((step, 1.0))
    return dict(curves)


def rounded(curves: Curves) -> Curves:
    return {
        tag: [(step, float(np.float32(value))) for step, value in of_tag] for tag, of_tag in curves.items()
    }


def read_events(directory: Path) -> Curves:
    """What TensorBoard reads in a directory."""
    events = EventAccumulator(str(directory), size_guidance={"scalars": 0})
    events.Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }


def logged(file: Path) -> Iterator[wandb_internal_pb2.Record]:
    """The records of a W&B file: LevelDB's log format, after a header of 7 bytes."""
    data, at, parts = file.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # the rest of a block holds nothing
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        parts, at = parts + data[at + 7 : at + 7 + length], at + 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def curves_of_rows(rows: list[dict[str, Any]]) -> Curves:
    curves: Curves = collections.defaultdict(list)
    for row in rows:
        (at,) = (key for key in row if key.endswith("/step"))
        for key, value in row.items():
            if key != at and not key.startswith("_"):
                curves[key].append((row[at], value))
    return dict(curves)
