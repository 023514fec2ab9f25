"""Encoder outputs computed once for every sentence, as a table that heads train on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mtfast.data.cache import TokenizedTask
from mtfast.data.packing import pack_tasks
from mtfast.data.sampler import plan_evaluation
from mtfast.models.bert import PackedBert, first_rows

from . import ranks
from .inputs import EVALUATION_TOKENS


@dataclass(frozen=True)
class FeatureTable:
    """[CLS] states of every sequence of every task, and all token states of one task.

    cls: [sequences of all tasks, hidden], task after task in input order.
    first_row: the first row of each task in `cls`. per_example: sequences of one example of each task.
    tokens: [tokens, hidden], the states of `token_task`'s sequences back to back, or None.
    offsets: int64 [sequences + 1], where each of them begins in `tokens`, on the host.
    """

    cls: Tensor
    first_row: dict[str, int]
    per_example: dict[str, int]
    tokens: Tensor | None
    offsets: Tensor | None

    def rows(self, task: str, examples: Tensor) -> Tensor:
        """Rows of `cls` for these examples: int64 [n], or [n, 2] for separately encoded pairs."""
        per = self.per_example[task]
        first = self.first_row[task] + examples * per
        return first if per == 1 else first[:, None] + torch.arange(per)

    def bounds(self, examples: Tensor) -> Tensor:
        """Begin and end of these examples in `tokens` without [CLS]: int64 [n, 2] on the host."""
        assert self.offsets is not None
        return torch.stack([self.offsets[examples] + 1, self.offsets[examples + 1]], dim=1)


def encode(
    encoder: PackedBert,
    tables: Mapping[str, TokenizedTask],
    device: torch.device,
    token_task: str | None = None,
) -> FeatureTable:
    """Encode every sequence once, in evaluation mode, sharded over the ranks and then shared.

    Args:
        token_task: a single-sentence task whose token states are kept too.
    """
    first_row, size = {}, 0
    for task, table in tables.items():
        first_row[task] = size
        size += len(table.sequences)
    per_example = {task: table.sequences_per_example for task, table in tables.items()}
    dtype, hidden = next(encoder.parameters()).dtype, encoder.config.hidden_size
    cls = torch.zeros(size, hidden, dtype=dtype, device=device)
    tokens = offsets = None
    if token_task is not None:
        offsets = torch.from_numpy(np.asarray(tables[token_task].offsets))
        tokens = torch.zeros(int(offsets[-1]), hidden, dtype=dtype, device=device)
    lengths = {task: table.lengths for task, table in tables.items()}
    plan = plan_evaluation(
        lengths, tokens_per_batch=EVALUATION_TOKENS, rank=ranks.rank(), world_size=ranks.world_size()
    )
    features = FeatureTable(cls, first_row, per_example, tokens, offsets)
    for examples in plan:
        batch = pack_tasks(tables, examples, {task: 0 for task in tables}).to(device)
        with torch.no_grad():
            states = encoder(**batch.encoder_inputs(), cls_only=token_task is None)
        heads = (
            states
            if token_task is None
            else states.index_select(0, first_rows(batch.cu_seqlens, len(states)))
        )
        for task, rows in batch.tasks.items():
            places = features.rows(task, torch.from_numpy(examples[task])).reshape(-1).to(device)
            cls[places] = heads[rows.sequences.reshape(-1)]
            if task == token_task:
                _copy_tokens(features, batch.cu_seqlens, rows.sequences, examples[task], states)
    # A row that another rank encoded is zero here, so the sum over the ranks is the table.
    ranks.sum_over_ranks(cls)
    if tokens is not None:
        ranks.sum_over_ranks(tokens)
    return features


def _copy_tokens(
    table: FeatureTable, cu_seqlens: Tensor, sequences: Tensor, examples: np.ndarray, states: Tensor
) -> None:
    assert table.tokens is not None and table.offsets is not None
    index = torch.from_numpy(examples)
    lengths = (table.offsets[index + 1] - table.offsets[index]).to(states.device)
    ends = lengths.cumsum(0)
    within = torch.arange(int(lengths.sum()), device=states.device) - (ends - lengths).repeat_interleave(
        lengths
    )
    source = cu_seqlens.long()[sequences].repeat_interleave(lengths) + within
    target = table.offsets[index].to(states.device).repeat_interleave(lengths) + within
    table.tokens[target] = states[source]
