"""The yardstick of the stage benchmarks: the same model and losses, as people write them in eager PyTorch.

Hugging Face's BertModel with SDPA, each task padded to the longest sentence of its own sub-batch and encoded
by itself, the same heads, the same weights. Of mtfast there is only the data and the weights to start from.
`varlen_attention` is what such a model needs to run on sequences back to back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, BertModel

from mtfast.data.tokens import TokenizedTask
from mtfast.models.multitask import MultiTaskHeads

VARLEN = "torch_varlen"  # varlen_attention's name in transformers


@dataclass(frozen=True)
class PaddedTask:
    """One task's part of a step: input_ids and attention_mask int64 [sequences, longest], labels [examples].

    Of pairs the first sentences come first, then the second ones.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor

    def to(self, device: torch.device) -> PaddedTask:
        """A copy on another device."""
        return PaddedTask(*(x.to(device) for x in (self.input_ids, self.attention_mask, self.labels)))


def pad_task(table: TokenizedTask, examples: np.ndarray) -> PaddedTask:
    """The examples (int indices) of a task, padded to their longest sentence."""
    per, sequences = table.task.sequences_per_example, table.sequences
    rows = np.concatenate([examples * per + side for side in range(per)])
    lengths = torch.from_numpy(sequences.lengths[rows])
    input_ids = torch.full((len(rows), int(lengths.max())), sequences.special.pad, dtype=torch.int64)
    for row, source in enumerate(rows):
        tokens = sequences.tokens[sequences.offsets[source] : sequences.offsets[source + 1]]
        input_ids[row, : len(tokens)] = torch.from_numpy(tokens.astype(np.int64))
    mask = (torch.arange(input_ids.size(1)) < lengths[:, None]).long()
    assert table.labels is not None
    return PaddedTask(input_ids, mask, torch.from_numpy(table.labels[examples]))


def total(losses: Mapping[str, Tensor]) -> Tensor:
    """The sum of the tasks' losses."""
    return torch.stack(list(losses.values())).sum()


class EagerHeads(nn.Module):
    """A linear head for sst and one MLP on concatenated [CLS] vectors for quora and sts, with the weights of
    `heads`."""

    def __init__(self, hidden: int, heads: MultiTaskHeads, dropout_p: float) -> None:
        super().__init__()
        width = heads.mlp.width
        self.dropout = nn.Dropout(dropout_p)
        self.sentiment = nn.Linear(hidden, 5)
        self.pair_hidden = nn.Linear(2 * hidden, width)
        self.pair_out = nn.Linear(width, 2)
        weights = heads.state_dict()
        for mine, theirs in (
            (self.sentiment, "task-sst.classifier"),
            (self.pair_hidden, "mlp-pair.mlp.dense"),
            (self.pair_out, "mlp-pair.mlp.out_proj"),
        ):
            mine.load_state_dict({name: weights[f"{theirs}.{name}"] for name in ("weight", "bias")})

    def sentiment_logits(self, cls: Tensor) -> Tensor:
        """[n, hidden] -> [n, 5]"""
        return self.sentiment(self.dropout(cls)).float()

    def pair_outputs(self, cls: Tensor) -> Tensor:
        """[2 n, hidden], first sentences then second ones -> [n, 2]: paraphrase logit, similarity."""
        first, second = cls.chunk(2)
        hidden = self.dropout(torch.relu(self.pair_hidden(torch.cat([first, second], dim=1))))
        return self.pair_out(hidden).float()

    def losses(self, cls: Mapping[str, Tensor], labels: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Each task's mean loss from its [CLS] states and labels [examples]."""
        sentiment = self.sentiment_logits(cls["sst"])
        paraphrase = self.pair_outputs(cls["quora"])[:, 0]
        similarity = self.pair_outputs(cls["sts"])[:, 1]
        return {
            "sst": F.cross_entropy(sentiment, labels["sst"]),
            "quora": F.binary_cross_entropy_with_logits(paraphrase, labels["quora"]),
            "sts": F.mse_loss(similarity, labels["sts"]),
        }


class EagerTwin(EagerHeads):
    """Those heads on BertModel: one that is given, or a checkpoint's with SDPA."""

    def __init__(self, bert: str | BertModel, heads: MultiTaskHeads, dropout_p: float) -> None:
        if isinstance(bert, str):
            bert = BertModel.from_pretrained(
                bert,
                attn_implementation="sdpa",
                add_pooling_layer=False,
                hidden_dropout_prob=dropout_p,
                attention_probs_dropout_prob=dropout_p,
            )
        super().__init__(bert.config.hidden_size, heads, dropout_p)
        self.bert = bert

    def encode(self, task: PaddedTask) -> Tensor:
        """[CLS] states [sequences, hidden]."""
        out = self.bert(input_ids=task.input_ids, attention_mask=task.attention_mask)
        return out.last_hidden_state[:, 0]

    def forward(self, batch: Mapping[str, PaddedTask]) -> dict[str, Tensor]:
        """Each task's mean loss, a float32 scalar."""
        cls = {name: self.encode(task) for name, task in batch.items()}
        return self.losses(cls, {name: task.labels for name, task in batch.items()})


def varlen_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    scaling: float,
    dropout: float = 0.0,
    **unused: object,
) -> tuple[Tensor, None]:
    """Attention inside each sequence of one row, as transformers' AttentionInterface has it.

    In 16 bits on a GPU torch's FlashAttention-2 for varying lengths, else one sequence after the other.

    Args:
        query, key, value: [1, heads, total, head_dim].

    Returns:
        [1, total, heads, head_dim], and no attention weights.
    """
    if query.is_cuda and query.dtype != torch.float32:
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        where = (cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q, dropout, False, False)
        return torch.ops.aten._flash_attention_forward(q, k, v, *where, scale=scaling)[0][None], None
    lengths = cu_seq_lens_q.diff().tolist()
    parts = zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True)
    attend = partial(F.scaled_dot_product_attention, dropout_p=dropout, scale=scaling)
    return torch.cat([attend(q, k, v) for q, k, v in parts], dim=2).transpose(1, 2), None


AttentionInterface.register(VARLEN, varlen_attention)


class MasterAdamW:
    """AdamW on float32 copies of a model's bf16 weights."""

    def __init__(self, model: nn.Module, learning_rate: float) -> None:
        self.weights: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
        self.masters = [p.detach().float().clone() for p in self.weights]
        self.grads = [torch.empty_like(master) for master in self.masters]
        for master, grad in zip(self.masters, self.grads, strict=True):
            master.grad = grad
        self.optimizer = torch.optim.AdamW(self.masters, lr=learning_rate, weight_decay=0.01, fused=True)

    def step(self) -> None:
        """Update from the weights' gradients, each of which must be there, and clear those."""
        torch._foreach_copy_(self.grads, [w.grad for w in self.weights if w.grad is not None])
        for weight in self.weights:
            weight.grad = None
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(self.weights, self.masters)
