"""A model over whole tables: every example once, in packed batches, and the results in input order."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing

import numpy as np
import torch
from torch import Tensor

from mtfast.data.packing import PackedBatch, pack_tasks
from mtfast.data.prefetch import prefetch
from mtfast.data.sampler import ALONE, Layout, plan_evaluation
from mtfast.data.tokens import TokenizedTask
from mtfast.training.run.progress import watched

EVALUATION_TOKENS = 16384  # of a batch

Forward = Callable[[PackedBatch], Mapping[str, Tensor]]
Outputs = dict[str, tuple[np.ndarray, Tensor]]


def packed_batches(
    what: str, tables: Mapping[str, TokenizedTask], device: torch.device, layout: Layout = ALONE
) -> Generator[tuple[dict[str, np.ndarray], PackedBatch], None, None]:
    """This rank's part of the examples, every one once, in batches on `device` that are packed ahead in the
    background, until this is closed. Progress is shown under the name `what`.

    Yields:
        By task the indices int64 [n] of the batch's examples in their table, and the batch, without labels.
    """
    lengths = {name: table.lengths for name, table in tables.items()}
    plan = plan_evaluation(lengths, tokens_per_batch=EVALUATION_TOKENS, layout=layout)
    packed = prefetch(pack_tasks(tables, examples).sent_to(device) for examples in plan)
    yield from zip(plan, watched(what, packed, len(plan), layout.world_size), strict=True)


def packed_outputs(
    what: str,
    forward: Forward,
    tables: Mapping[str, TokenizedTask],
    device: torch.device,
    layout: Layout = ALONE,
) -> Iterator[Outputs]:
    """Run `forward` over the batches of `packed_batches`, without gradients.

    Yields:
        Of each batch by task: the indices int64 [n] of its examples in their table, and what `forward` gives
        for these, float32 [n, ...] on the host.
    """
    with closing(packed_batches(what, tables, device, layout)) as batches:
        before = None  # a batch is waited for when the device has the next one to work on
        for examples, batch in batches:
            with torch.no_grad():
                outputs = forward(batch)
            found = {
                name: (rows, outputs[name].float().to("cpu", non_blocking=True))
                for name, rows in examples.items()
            }
            queued = found, _end_of_queue(device)
            if before is not None:
                yield _arrived(*before)
            before = queued
        if before is not None:
            yield _arrived(*before)


def _end_of_queue(device: torch.device) -> torch.cuda.Event | None:
    """Where the work given to a GPU so far ends."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record()
    return event


def _arrived(found: Outputs, event: torch.cuda.Event | None) -> Outputs:
    if event is None:
        return found
    event.synchronize()
    # Copied, so that the page-locked memory in which they came is free for the batches to come.
    return {name: (rows, values.clone()) for name, (rows, values) in found.items()}


def in_order(
    parts: Sequence[Mapping[str, tuple[np.ndarray, np.ndarray]]], name: str, size: int
) -> np.ndarray:
    """One array [size, ...] from parts that each have, under a table's name, the indices [n] and the values
    [n, ...] of some of its examples; [size] in float32 where that is 0."""
    values = [part[name] for part in parts if len(part[name][0])]
    like = values[0][1] if values else np.empty(0, np.float32)
    result = np.empty((size, *like.shape[1:]), like.dtype)
    for rows, found in values:
        result[rows] = found
    return result
