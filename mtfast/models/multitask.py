"""BERT with the heads of several tasks: linear, LSTM and MLP heads, and the model that runs all of them.

Every head returns float32 logits whatever the model's dtype, so that losses are computed in float32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertConfig

from mtfast.kinds import task_losses
from mtfast.models.bert import PackedBert, first_rows, init_weights
from mtfast.models.dropout import dropout
from mtfast.ops import ConcatMLP
from mtfast.ops.concat_mlp import ACTIVATIONS, FUNCTIONS, MAX_OUTPUTS
from mtfast.tasks import MlpConfig, Task

INIT_STD = 0.02


class LinearHead(nn.Module):
    """A linear layer on [CLS]."""

    def __init__(self, hidden: int, outputs: int, dropout_p: float) -> None:
        super().__init__()
        self.dropout_p = dropout_p
        self.classifier = nn.Linear(hidden, outputs)
        init_weights(self, INIT_STD)

    def forward(self, cls: Tensor) -> Tensor:
        """[CLS] states [n, hidden] -> [n, outputs]."""
        return self.classifier(dropout(cls, self.dropout_p, self.training)).float()


class _Mlp(nn.Module):
    """A hidden layer and an output layer, in plain PyTorch."""

    def __init__(self, inputs: int, width: int, outputs: int, activation: str, dropout_p: float) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, found {activation!r}")
        self.dense = nn.Linear(inputs, width)
        self.activation = FUNCTIONS[activation]
        self.dropout_p = dropout_p
        self.out_proj = nn.Linear(width, outputs)
        init_weights(self, INIT_STD)

    def _outputs(self, x: Tensor) -> Tensor:
        x = self.activation(self.dense(x))
        return self.out_proj(dropout(x, self.dropout_p, self.training)).float()


class FinalStates(nn.LSTM):
    """A bidirectional LSTM's last states over sequences of different lengths.

    Its shapes follow from those of its inputs and from `max_seqlen`, and nothing is read back to the host, so
    that a CUDA graph can record it: each direction is a plain LSTM over a dense [max_seqlen, n, hidden], of
    which a sequence, for the second direction reversed, has the first steps. The steps after those are
    computed as well, but what is returned does not depend on them.
    """

    def forward(  # type: ignore[override]
        self, tokens: Tensor, bounds: Tensor, max_seqlen: int
    ) -> Tensor:
        """The last state of each direction, side by side: [n, 2 * hidden_size].

        Args:
            tokens, bounds, max_seqlen: as in `LstmHead.forward`; at least one token and one sequence.
        """
        device, n = tokens.device, bounds.size(0)
        # torch decides how to run an LSTM before autocast makes its input bfloat16, which not every CPU can.
        autocast = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if autocast else self.weight_ih_l0.dtype
        assert isinstance(dtype, torch.dtype)
        begins, last = bounds[:, 0], (bounds[:, 1] - bounds[:, 0] - 1).clamp(min=0)
        # A step after the end has a token of the same sequence, so that no row is that of many such steps.
        within = torch.minimum(torch.arange(max_seqlen, device=device)[:, None], last)
        ends = last * n + torch.arange(n, device=device)
        states = []
        with torch.autocast(device.type, enabled=False):
            tokens, zeros = tokens.to(dtype), torch.zeros(1, n, self.hidden_size, dtype=dtype, device=device)
            for places, weights in zip((within, last - within), self.all_weights, strict=True):
                rows = (begins + places).clamp(max=tokens.size(0) - 1)  # an empty sequence may be at the end
                x = tokens.index_select(0, rows.flatten()).view(max_seqlen, n, tokens.size(1))
                parts = _in_one_piece(weights, dtype)
                output, _, _ = torch.lstm(x, (zeros, zeros), parts, True, 1, 0.0, self.training, False, False)
                states.append(output.flatten(0, 1).index_select(0, ends))
        return torch.cat(states, dim=1)


def _in_one_piece(weights: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Copies of an LSTM's weights, one after the other in memory, as cuDNN wants them."""
    flat = torch.cat([weight.flatten() for weight in weights]).to(dtype)
    parts = flat.split([weight.numel() for weight in weights])
    return [part.view_as(weight) for part, weight in zip(parts, weights, strict=True)]


class LstmHead(_Mlp):
    """Bidirectional LSTM over a sequence's states without [CLS]; an MLP on its two final states and [CLS].

    Each direction has hidden / 2 units, so that [CLS] and what the LSTM adds are of one width.
    """

    def __init__(self, hidden: int, width: int, outputs: int, activation: str, dropout_p: float) -> None:
        super().__init__(hidden + 2 * (hidden // 2), width, outputs, activation, dropout_p)
        self.lstm = FinalStates(hidden, hidden // 2, bidirectional=True)

    def forward(self, cls: Tensor, tokens: Tensor, bounds: Tensor, max_seqlen: int) -> Tensor:
        """[n, outputs].

        Args:
            cls: [CLS] states [n, hidden].
            tokens: states [tokens, hidden] that hold the n sequences.
            bounds: int64 [n, 2] on the tokens' device, begin and end of each sequence in `tokens`, [CLS] left
                out. Of an empty sequence the outputs are finite and mean nothing.
            max_seqlen: at least the longest of these sequences, on the host. It is not compared with bounds,
                whose values are on the device; a longer sequence reads out of range.

        Raises:
            ValueError: bounds has another shape or is on another device.
        """
        n = cls.size(0)
        if bounds.shape != (n, 2) or bounds.device != tokens.device:
            raise ValueError(
                f"bounds must be [{n}, 2] on {tokens.device}, found {list(bounds.shape)} on {bounds.device}"
            )
        if n == 0:  # a step without a sequence must still give every weight its (zero) gradient
            states = self.lstm(tokens.new_zeros(1, tokens.size(1)), bounds.new_zeros(1, 2), 1)[:0]
        else:
            states = self.lstm(tokens, bounds, max_seqlen)
        return self._outputs(torch.cat([cls, states], dim=1))


class JointPairMlp(_Mlp):
    """An MLP on the one [CLS] of pairs that are encoded as a single sequence."""

    def forward(self, cls: Tensor, rows: Tensor) -> Tensor:
        """[CLS] states [rows, hidden], rows int [n] -> [n, outputs]."""
        return self._outputs(cls.index_select(0, rows))


class WidePairMlp(_Mlp):
    """`PairMlp` with any number of outputs, in plain PyTorch."""

    def __init__(self, hidden: int, width: int, outputs: int, activation: str, dropout_p: float) -> None:
        super().__init__(2 * hidden, width, outputs, activation, dropout_p)

    def forward(self, cls: Tensor, rows: Tensor) -> Tensor:
        """[CLS] states [rows, hidden], rows int [n, 2] of them -> [n, outputs]."""
        return self._outputs(cls.index_select(0, rows.flatten()).view(rows.size(0), 2 * cls.size(1)))


class PairMlp(nn.Module):
    """An MLP on the [CLS] states of two separately encoded texts, side by side, with few outputs."""

    def __init__(self, hidden: int, width: int, outputs: int, activation: str, dropout_p: float) -> None:
        super().__init__()
        self.mlp = ConcatMLP(hidden, width, outputs, activation, dropout_p)
        init_weights(self, INIT_STD)

    def forward(self, cls: Tensor, rows: Tensor) -> Tensor:
        """[CLS] states [rows, hidden], rows int [n, 2] of them -> [n, outputs]."""
        first, second = rows.t().contiguous().unbind(0)
        return self.mlp(cls, cls, first, second).float()


def token_tasks(tasks: Mapping[str, Task]) -> tuple[str, ...]:
    """The tasks whose heads read the states of all tokens, not of [CLS] alone."""
    return tuple(name for name, task in tasks.items() if task.head == "lstm")


def sharing(tasks: Mapping[str, Task]) -> dict[str, list[str]]:
    """The tasks of each head: `task-NAME` is the linear or LSTM head of one task, `mlp-NAME` the MLP of those
    that name it. Heads are in the order of their first tasks, tasks in that of `tasks`."""
    heads: dict[str, list[str]] = {}
    for name, task in tasks.items():
        heads.setdefault(f"mlp-{task.head}" if task.has_mlp else f"task-{name}", []).append(name)
    return heads


class MultiTaskHeads(nn.Module):
    """The heads of all tasks on [CLS] states, from the encoder or from a table of cached ones.

    Its submodules are the heads by the names that `sharing` gives them. An MLP's outputs are those of one of
    its tasks after another's.

    Args:
        hidden: of the encoder.
        tasks: by name, at least one.
        mlp: width and activation of the hidden layer of every MLP and LSTM head.
        dropout_p: of the linear heads' input and of that hidden layer.

    Raises:
        ValueError: mlp or dropout_p is out of range; the message names it.
    """

    def __init__(self, hidden: int, tasks: Mapping[str, Task], mlp: MlpConfig, dropout_p: float) -> None:
        super().__init__()
        if mlp.width < 1:
            raise ValueError(f"width must be at least 1, found {mlp.width}")
        if not 0.0 <= dropout_p < 1.0:
            raise ValueError(f"dropout_p must be in [0, 1), found {dropout_p}")
        self.tasks, self.mlp = dict(tasks), mlp
        for head, names in sharing(self.tasks).items():
            first = self.tasks[names[0]]
            outputs = sum(self.tasks[name].outputs for name in names)
            if first.head == "linear":
                self.add_module(head, LinearHead(hidden, outputs, dropout_p))
                continue
            apart = WidePairMlp if outputs > MAX_OUTPUTS else PairMlp
            of_pairs = JointPairMlp if first.pair_input == "joint" else apart
            kind = LstmHead if first.head == "lstm" else of_pairs
            self.add_module(head, kind(hidden, mlp.width, outputs, mlp.activation, dropout_p))

    def forward(
        self,
        cls: Tensor,
        sequences: Mapping[str, Tensor],
        *,
        tokens: Tensor | None = None,
        token_bounds: Mapping[str, Tensor] | None = None,
        max_seqlen: int | None = None,
    ) -> dict[str, Tensor]:
        """Every head's output for the rows named, float32.

        Every head runs on every call, so every parameter has a gradient (zero without rows of its task).

        Args:
            cls: [rows, hidden], the [CLS] states of a packed batch's sequences, or a table of cached ones.
            sequences: rows of `cls` per task, int64 [n], or [n, 2] for separately encoded pairs. A task that
                is left out has no rows.
            tokens: [tokens, hidden] states that hold the sequences of `token_tasks`; for LSTM heads alone.
            token_bounds: of those tasks, int64 [n, 2] on the tokens' device: begin and end of each sequence
                in `tokens`, without [CLS].
            max_seqlen: at least the longest of those sequences, on the host.

        Returns:
            By task: logits [n, classes], a logit [n] (binary) or a score [n] (regression).

        Raises:
            ValueError: rows of another shape than the task's, or missing token states.
        """
        rows = {name: self._rows(sequences, name, cls.device) for name in self.tasks}
        outputs: dict[str, Tensor] = {}
        for head, names in sharing(self.tasks).items():
            module = self.get_submodule(head)
            if isinstance(module, LinearHead):
                found = module(cls.index_select(0, rows[names[0]]))
            elif isinstance(module, LstmHead):
                mine, bounds = rows[names[0]], (token_bounds or {}).get(names[0])
                if bounds is None and not len(mine):
                    bounds = torch.empty((0, 2), dtype=torch.int64, device=cls.device)
                if tokens is None or bounds is None or max_seqlen is None:
                    raise ValueError(f"the lstm head of {names[0]} needs tokens, token_bounds and max_seqlen")
                found = module(cls.index_select(0, mine), tokens, bounds, max_seqlen)
            else:
                found = module(cls, torch.cat([rows[name] for name in names]))
            self._share_out(found, names, rows, outputs)
        return {name: outputs[name] for name in self.tasks}

    def _share_out(
        self, found: Tensor, names: list[str], rows: Mapping[str, Tensor], outputs: dict[str, Tensor]
    ) -> None:
        """Each task's rows and columns of what one head gave."""
        row = column = 0
        for name in names:
            task = self.tasks[name]
            mine = found[row : row + rows[name].size(0), column : column + task.outputs]
            outputs[name] = mine if task.kind == "classification" else mine[:, 0]
            row, column = row + rows[name].size(0), column + task.outputs

    def _rows(self, sequences: Mapping[str, Tensor], name: str, device: torch.device) -> Tensor:
        paired = self.tasks[name].sequences_per_example == 2
        rows = sequences.get(name)
        if rows is None:
            return torch.empty((0, 2) if paired else (0,), dtype=torch.int64, device=device)
        if rows.dim() != (2 if paired else 1) or (paired and rows.size(1) != 2):
            wanted = "[n, 2]" if paired else "[n]"
            raise ValueError(f"sequences[{name!r}] must be {wanted}, found {list(rows.shape)}")
        return rows


class MultiTaskModel(nn.Module):
    """Encoder and task heads: one pass over the packed batch, all heads on it."""

    def __init__(self, encoder: PackedBert, heads: MultiTaskHeads) -> None:
        super().__init__()
        self.encoder = encoder
        self.heads = heads

    def forward(
        self,
        input_ids: Tensor,
        token_type_ids: Tensor,
        position_ids: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        sequences: Mapping[str, Tensor],
        token_bounds: Mapping[str, Tensor] | None = None,
        token_max_seqlen: int | None = None,
        rows: Mapping[str, Any] | None = None,
        rdrop: bool = False,
    ) -> dict[str, Tensor]:
        """`MultiTaskHeads.forward` on the encoder's output; with `rows`, the tasks' losses of that.

        Linear heads and MLPs read [CLS] alone, so without an LSTM head the last layer computes nothing else.

        Args:
            sequences, token_bounds: as there; they count the batch's sequences and its tokens.
            token_max_seqlen: its max_seqlen; by default the batch's.
            rows, rdrop: what `task_losses` takes.
        """
        inputs = (input_ids, token_type_ids, position_ids, cu_seqlens, max_seqlen)
        if token_tasks(self.heads.tasks):
            tokens = self.encoder(*inputs)
            cls = tokens.index_select(0, first_rows(cu_seqlens, tokens.size(0)))
            longest = max_seqlen if token_max_seqlen is None else token_max_seqlen
            of_tokens = {"tokens": tokens, "token_bounds": token_bounds, "max_seqlen": longest}
            outputs = self.heads(cls, sequences, **of_tokens)
        else:
            outputs = self.heads(self.encoder(*inputs, cls_only=True), sequences)
        return outputs if rows is None else task_losses(self.heads.tasks, outputs, rows, rdrop=rdrop)


def build_multitask_model(
    config: BertConfig, tasks: Mapping[str, Task], mlp: MlpConfig, dropout_p: float
) -> MultiTaskModel:
    """A freshly initialised encoder with the tasks' heads."""
    return MultiTaskModel(PackedBert(config), MultiTaskHeads(config.hidden_size, tasks, mlp, dropout_p))
