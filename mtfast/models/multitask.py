"""The two models that are trained: BERT with its pre-training heads, and BERT with three tasks' heads."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import BertConfig

from mtfast.models.bert import PackedBert, first_rows
from mtfast.models.heads import (
    JointPairHead,
    LstmSentimentHead,
    MlmHead,
    NspHead,
    PairHead,
    SentimentHead,
)
from mtfast.ops.concat_mlp import ACTIVATIONS

SENTIMENT_HEADS = ("linear", "lstm")
PAIR_INPUTS = ("separate", "joint")


@dataclass(frozen=True)
class HeadsConfig:
    """What the task heads look like.

    sentiment: "linear", a softmax classifier on [CLS], or "lstm", a bidirectional LSTM beside it.
    pair_input: "separate", two sentences encoded apart, or "joint", both in one sequence.
    inner: width of the pair head's hidden layer.
    activation: of that layer, "relu", "gelu" or "tanh".
    dropout_p: of the sentiment head's input and the pair head's hidden layer.
    """

    sentiment: str = "linear"
    pair_input: str = "separate"
    inner: int = 768
    activation: str = "relu"
    dropout_p: float = 0.1

    def __post_init__(self) -> None:
        for name, allowed in (
            ("sentiment", SENTIMENT_HEADS),
            ("pair_input", PAIR_INPUTS),
            ("activation", ACTIVATIONS),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, found {getattr(self, name)!r}")
        if self.inner < 1:
            raise ValueError(f"inner must be at least 1, found {self.inner}")
        if not 0.0 <= self.dropout_p < 1.0:
            raise ValueError(f"dropout_p must be in [0, 1), found {self.dropout_p}")


class MultiTaskHeads(nn.Module):
    """The heads of the three tasks on [CLS] states, from the encoder or from a table of cached ones."""

    def __init__(self, hidden: int, config: HeadsConfig) -> None:
        super().__init__()
        self.config = config
        self.sentiment: nn.Module
        self.pair: nn.Module
        if config.sentiment == "lstm":
            self.sentiment = LstmSentimentHead(hidden, config.dropout_p)
        else:
            self.sentiment = SentimentHead(hidden, config.dropout_p)
        pair_head = JointPairHead if config.pair_input == "joint" else PairHead
        self.pair = pair_head(hidden, config.inner, config.activation, config.dropout_p)

    def forward(
        self,
        cls: Tensor,
        sequences: Mapping[str, Tensor],
        *,
        tokens: Tensor | None = None,
        token_bounds: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Every head's output for the rows named, float32.

        Every head runs on every call, so every parameter has a gradient (zero without rows of its task).

        Args:
            cls: [rows, hidden], the [CLS] states of a packed batch's sequences, or a table of cached ones.
            sequences: rows of `cls` per task, int64: "sst" [n]; "quora" and "sts" [n, 2], or [n] with joint
                pairs. A task that is left out has no rows.
            tokens: [tokens, hidden] states that hold the "sst" sentences; for the LSTM head alone.
            token_bounds: int64 [n, 2] on the host: begin and end of each "sst" sentence in `tokens`, without
                [CLS]; for the LSTM head alone.

        Returns:
            {"sst": logits [n, 5], "quora": logit [n], "sts": score [n]}.

        Raises:
            ValueError: rows of another shape than the config's pair_input asks for, or missing token states.
        """
        sst = self._rows(sequences, "sst", cls.device)
        quora = self._rows(sequences, "quora", cls.device)
        sts = self._rows(sequences, "sts", cls.device)
        sst_cls = cls.index_select(0, sst)
        if self.config.sentiment == "lstm":
            if tokens is None or token_bounds is None:
                raise ValueError("the lstm sentiment head needs tokens and token_bounds")
            sentiment = self.sentiment(sst_cls, tokens, token_bounds)
        else:
            sentiment = self.sentiment(sst_cls)
        pairs = torch.cat([quora, sts])
        if self.config.pair_input == "joint":
            pair = self.pair(cls.index_select(0, pairs))
        else:
            pair = self.pair(cls, pairs)
        split = quora.size(0)
        return {"sst": sentiment, "quora": pair[:split, 0], "sts": pair[split:, 1]}

    def _rows(self, sequences: Mapping[str, Tensor], task: str, device: torch.device) -> Tensor:
        paired = task != "sst" and self.config.pair_input == "separate"
        rows = sequences.get(task)
        if rows is None:
            return torch.empty((0, 2) if paired else (0,), dtype=torch.int64, device=device)
        if rows.dim() != (2 if paired else 1) or (paired and rows.size(1) != 2):
            wanted = "[n, 2]" if paired else "[n]"
            raise ValueError(
                f"sequences[{task!r}] must be {wanted} with pair_input {self.config.pair_input!r}, "
                f"found {list(rows.shape)}"
            )
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
        token_bounds: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """`MultiTaskHeads.forward` on the encoder's output; `sequences` counts the batch's sequences.

        The linear sentiment head reads [CLS] alone, so the last layer computes nothing else. For the LSTM
        head token_bounds (int64 [n, 2] on the host, places in the packed batch without [CLS]) spares a copy
        of cu_seqlens to the host.
        """
        inputs = (input_ids, token_type_ids, position_ids, cu_seqlens, max_seqlen)
        if self.heads.config.sentiment == "linear":
            return self.heads(self.encoder(*inputs, cls_only=True), sequences)
        if token_bounds is None:
            begins = cu_seqlens.cpu().long()
            rows = sequences["sst"].cpu() if "sst" in sequences else begins[:0]
            token_bounds = torch.stack([begins[rows] + 1, begins[rows + 1]], dim=1)
        tokens = self.encoder(*inputs)
        cls = tokens.index_select(0, first_rows(cu_seqlens, tokens.size(0)))
        return self.heads(cls, sequences, tokens=tokens, token_bounds=token_bounds)


class PretrainModel(nn.Module):
    """Encoder with BERT's two pre-training heads."""

    def __init__(self, encoder: PackedBert, mlm: MlmHead, nsp: NspHead) -> None:
        super().__init__()
        self.encoder = encoder
        self.mlm = mlm
        self.nsp = nsp

    def forward(
        self,
        input_ids: Tensor,
        token_type_ids: Tensor,
        position_ids: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        masked_rows: Tensor,
        samples: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Logits of the masked words and of the next-sentence question.

        Args:
            masked_rows: int64 [m], the chosen tokens' places in the packed batch. The vocabulary product, and
                the last layer's output and MLP, run for these and the [CLS] rows alone.
            samples: answer the next-sentence question for the first `samples` sequences (default: all),
                leaving out a filler sequence behind them.

        Returns:
            (mlm_logits [m, vocab], nsp_logits [samples, 2]), float32.
        """
        cls_rows = first_rows(cu_seqlens, input_ids.size(0))[:samples]
        rows = torch.cat([cls_rows.to(masked_rows.dtype), masked_rows])
        x = self.encoder(input_ids, token_type_ids, position_ids, cu_seqlens, max_seqlen, rows=rows)
        return self.mlm(x[cls_rows.size(0) :]), self.nsp(x[: cls_rows.size(0)])


def build_multitask_model(config: BertConfig, heads: HeadsConfig) -> MultiTaskModel:
    """A freshly initialised encoder with the task heads."""
    return MultiTaskModel(PackedBert(config), MultiTaskHeads(config.hidden_size, heads))


def build_pretrain_model(config: BertConfig) -> PretrainModel:
    """A freshly initialised encoder with the pre-training heads, the decoder tied to its word embeddings."""
    encoder = PackedBert(config)
    return PretrainModel(encoder, MlmHead(config, encoder.embeddings.word), NspHead(config))
