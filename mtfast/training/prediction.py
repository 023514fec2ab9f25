"""A model over whole tables: every example once, in packed batches, and the results in input order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from mtfast.data.packing import PackedBatch, pack_tasks
from mtfast.data.sampler import ALONE, Layout, plan_evaluation
from mtfast.data.tokens import TokenizedTask

EVALUATION_TOKENS = 16384  # of a batch

Forward = Callable[[PackedBatch], Mapping[str, Tensor]]


def packed_outputs(
    forward: Forward, tables: Mapping[str, TokenizedTask], device: torch.device, layout: Layout = ALONE
) -> Iterator[dict[str, tuple[np.ndarray, Tensor]]]:
    """Run `forward` over this rank's part of the examples, batch by batch, without gradients.

    Yields:
        Of each batch by task: the indices int64 [n] of its examples in their table, and what `forward` gives
        for these, float32 [n, ...] on `device`.
    """
    lengths = {name: table.lengths for name, table in tables.items()}
    for examples in plan_evaluation(lengths, tokens_per_batch=EVALUATION_TOKENS, layout=layout):
        batch = pack_tasks(tables, examples, {name: 0 for name in tables})
        with torch.no_grad():
            outputs = forward(batch.to(device))
        yield {name: (rows, outputs[name].float()) for name, rows in examples.items()}


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
