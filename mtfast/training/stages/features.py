"""Encoder outputs computed once for every sentence, as a table that heads train on."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mtfast.data.packing import sent
from mtfast.data.sampler import Layout
from mtfast.data.tokens import TokenizedTask
from mtfast.files import naming
from mtfast.models.bert import PackedBert, first_rows
from mtfast.training.engine import ranks
from mtfast.training.prediction import packed_batches

SHARED_ROWS = 65536


@dataclass(frozen=True)
class Features:
    """States of some examples, as `MultiTaskHeads` takes them.

    cls: [rows, hidden]. sequences: rows of each task's examples in `cls`, int64 [n], or [n, 2] for pairs.
    tokens: [tokens, hidden] or None. token_bounds: int64 [n, 2] by task, of rows of `tokens`.
    max_seqlen: at least the longest of what they bound, on the host.
    """

    cls: Tensor
    sequences: dict[str, Tensor]
    tokens: Tensor | None
    token_bounds: dict[str, Tensor]
    max_seqlen: int


@dataclass(frozen=True)
class FeatureTable:
    """[CLS] states of every sequence of every task, and all token states of some tasks.

    cls: [sequences of all tasks, hidden], task after task in input order.
    first_row: the first row of each task in `cls`. per_example: sequences of one example of each task.
    tokens: [tokens, hidden], the states of those tasks' sequences back to back, or None.
    offsets: int64 [sequences + 1] by such a task, where its sequences begin in `tokens`.
    max_seqlen: the longest of such a task's sequences without [CLS], and at least 1.
    device: where the heads are. The tensors are there too, or on the host, the states in mapped files.
    """

    cls: Tensor
    first_row: dict[str, int]
    per_example: dict[str, int]
    tokens: Tensor | None
    offsets: dict[str, Tensor]
    max_seqlen: int
    device: torch.device

    @property
    def resident(self) -> bool:
        """Whether the whole table is where the heads are."""
        return self.cls.device == self.device

    def rows(self, task: str, examples: Tensor) -> Tensor:
        """Rows of `cls` for these examples: int64 [n], or [n, 2] for separately encoded pairs."""
        per = self.per_example[task]
        first = self.first_row[task] + examples * per
        return first if per == 1 else first[:, None] + torch.arange(per, device=examples.device)

    def select(self, examples: Mapping[str, Tensor]) -> Features:
        """The states of these examples (int64 [n] by task, where the table is).

        A resident table is handed on whole; of one on the host the rows that are needed are copied.
        """
        token_bounds = {
            task: torch.stack([offsets[examples[task]] + 1, offsets[examples[task] + 1]], dim=1)
            for task, offsets in self.offsets.items()
        }
        rows = {task: self.rows(task, index) for task, index in examples.items()}
        if self.resident:
            return Features(self.cls, rows, self.tokens, token_bounds, self.max_seqlen)
        wanted = torch.cat([index.reshape(-1) for index in rows.values()])
        copied = torch.arange(len(wanted), device=self.device).split([x.numel() for x in rows.values()])
        sequences = {
            task: row.view(index.shape) for (task, index), row in zip(rows.items(), copied, strict=True)
        }
        tokens = None
        if self.tokens is not None:
            bounds = torch.cat(list(token_bounds.values()))
            lengths = bounds[:, 1] - bounds[:, 0]
            ends = lengths.cumsum(0)
            tokens = self.tokens[_ranges(bounds[:, 0], lengths)].to(self.device)
            copied = torch.stack([ends - lengths, ends], dim=1).to(self.device)
            parts = copied.split([len(x) for x in token_bounds.values()])
            token_bounds = dict(zip(token_bounds, parts, strict=True))
        return Features(self.cls[wanted].to(self.device), sequences, tokens, token_bounds, self.max_seqlen)


def encode(
    what: str,
    encoder: PackedBert,
    tables: Mapping[str, TokenizedTask],
    device: torch.device,
    directory: Path,
    token_tasks: Sequence[str] = (),
) -> FeatureTable:
    """Encode every sequence once, in evaluation mode, sharded over the ranks and then shared.

    Args:
        what: the name under which progress is shown.
        directory: where the table goes as a file when it is too large for half the device's memory.
        token_tasks: tasks with one sequence to an example whose token states are kept too.
    """
    first_row, size = {}, 0
    for task, table in tables.items():
        first_row[task] = size
        size += len(table.sequences)
    per_example = {task: table.task.sequences_per_example for task, table in tables.items()}
    lengths = {task: table.lengths for task, table in tables.items()}
    dtype, hidden = next(encoder.parameters()).dtype, encoder.config.hidden_size
    offsets, kept, longest = {}, 0, 1
    for task in token_tasks:
        sequences = tables[task].sequences
        offsets[task] = torch.tensor(kept + sequences.offsets, device="cpu")
        kept = int(offsets[task][-1])
        longest = max(longest, int(sequences.lengths.max(initial=0)) - 1)
    heights = {"cls": size} | ({"tokens": kept} if token_tasks else {})
    storage = _allocate(heights, hidden, dtype, device, directory)
    cls, tokens = storage["cls"], storage.get("tokens")
    begins = {task: x.to(cls.device) for task, x in offsets.items()}
    features = FeatureTable(cls, first_row, per_example, tokens, begins, longest, device)
    layout = Layout(ranks.rank(), ranks.world_size())
    with closing(packed_batches(what, tables, device, layout)) as batches:
        for numbers, batch in batches:
            with torch.no_grad():
                states = encoder(**batch.encoder_inputs(), cls_only=not token_tasks)
            first = states if tokens is None else states[first_rows(batch.cu_seqlens, len(states))]
            examples = {task: torch.from_numpy(index) for task, index in numbers.items()}
            # The sequences and tokens of a batch are in this order too, filler last.
            rows = torch.cat([features.rows(task, index).flatten() for task, index in examples.items()])
            _put(cls, rows, first[: len(rows)])
            end = 0
            for task, index in examples.items():
                begin, end = end, end + int(lengths[task][index].sum())
                if tokens is not None and task in offsets:
                    firsts, ends = offsets[task][index], offsets[task][index + 1]
                    _put(tokens, _ranges(firsts, ends - firsts), states[begin:end])
    # A row that another rank encoded is zero here, so the sum over the ranks is the table.
    for table_part in storage.values():
        for block in table_part.split(SHARED_ROWS) if ranks.world_size() > 1 else ():
            shared = block.to(device)
            ranks.sum_over_ranks(shared)
            if shared is not block:
                block.copy_(shared)
    return features


def _allocate(
    heights: Mapping[str, int], hidden: int, dtype: torch.dtype, device: torch.device, directory: Path
) -> dict[str, Tensor]:
    """Zeros [height, hidden] by name: on the device when it has room, else in files mapped into memory."""
    needed = sum(heights.values()) * hidden * dtype.itemsize
    if needed <= room(device):
        return {name: torch.zeros(rows, hidden, dtype=dtype, device=device) for name, rows in heights.items()}
    directory.mkdir(parents=True, exist_ok=True)
    mapped = {}
    for name, rows in heights.items():
        path = directory / f"{name}-{ranks.rank()}.bin"
        path.unlink(missing_ok=True)  # a new file reads as zeros
        with naming(path), open(path, "wb") as file:
            # Else a disk that runs full would end the process, without a word, as it writes to its memory.
            os.posix_fallocate(file.fileno(), 0, rows * hidden * dtype.itemsize)
        flat = torch.from_file(str(path), shared=True, size=rows * hidden, dtype=dtype)
        mapped[name] = flat.view(rows, hidden)
    return mapped


def room(device: torch.device) -> int:
    """Bytes that a table may take of the device's memory."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] // 2
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4


def _ranges(begins: Tensor, lengths: Tensor) -> Tensor:
    """The integers of all ranges [begin, begin + length), one after the other."""
    within = torch.arange(int(lengths.sum()), device=begins.device)
    within -= (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
    return begins.repeat_interleave(lengths) + within


def _put(table: Tensor, rows: Tensor, states: Tensor) -> None:
    """Copies states [n, hidden] to these rows of a table; int64 [n], on the host."""
    table[sent(rows, table.device)] = states.to(table.device)
