"""BERT over a packed batch: sentences back to back, no padding anywhere.

The architecture is that of "BERT: Pre-training of Deep Bidirectional Transformers" (Devlin et al., 2019) and
computes what `transformers.BertModel` computes for each sentence alone. Query, key and value are one
projection; `mtfast.models.checkpoint` converts the weights from and to Hugging Face's names.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import BertConfig

from mtfast.models.dropout import dropout
from mtfast.ops import bias_gelu, dropout_add_layer_norm, packed_attention_cls, packed_attention_qkv
from mtfast.ops.packed_attention import HEAD_DIMS


def check_config(config: BertConfig) -> None:
    """Raise ValueError, naming the field, for a BertConfig that is not an absolute-position BERT encoder."""
    if config.is_decoder or config.add_cross_attention:
        field = "is_decoder" if config.is_decoder else "add_cross_attention"
        raise ValueError(f"{field} is true: a decoder; only the bidirectional BERT encoder is supported")
    position_type = getattr(config, "position_embedding_type", None) or "absolute"
    if position_type != "absolute":
        raise ValueError(f"position_embedding_type is {position_type!r}; only 'absolute' is supported")
    if config.hidden_size % config.num_attention_heads:
        raise ValueError(
            f"hidden_size {config.hidden_size} is not a multiple of "
            f"num_attention_heads {config.num_attention_heads}"
        )
    head_dim = config.hidden_size // config.num_attention_heads
    if head_dim > HEAD_DIMS[-1]:
        raise ValueError(
            f"hidden_size {config.hidden_size} / num_attention_heads {config.num_attention_heads} gives "
            f"head_dim {head_dim}; packed attention takes at most {HEAD_DIMS[-1]}"
        )
    if config.hidden_act != "gelu" and config.hidden_act not in _transformers_activations():
        raise ValueError(f"hidden_act {config.hidden_act!r} is not an activation that transformers knows")


def first_rows(cu_seqlens: Tensor, total: int) -> Tensor:
    """The row of each sequence's first token, [sequences]; any valid row for a sequence without tokens."""
    return cu_seqlens[:-1].clamp(max=max(total - 1, 0))


def activation_with_bias(name: str) -> Callable[[Tensor, Tensor], Tensor]:
    """`activation(x + bias)` of (x [..., columns], bias [columns]), by transformers' name."""
    if name == "gelu":
        return bias_gelu
    activation = _transformers_activations()[name]
    return lambda x, bias: activation(x + bias)


def _transformers_activations() -> Mapping[str, Callable[[Tensor], Tensor]]:
    """By name. Imported when one is asked for, since that takes a second or two."""
    from transformers.activations import ACT2FN

    return ACT2FN


def init_weights(module: nn.Module, std: float) -> None:
    """Initialise as Hugging Face does: weights normal with `std`, biases zero, layer norms the identity."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.normal_(part.weight, std=std)
            nn.init.zeros_(part.bias)
        elif isinstance(part, PackedEmbeddings):
            part.reset_parameters(std)


class AddNorm(nn.LayerNorm):
    """The layer norm of a residual and what is added to it, over the last dimension."""

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        residual: Tensor | None = None,
        x_bias: Tensor | None = None,
        dropout_p: float = 0.0,
        seed: Tensor | None = None,
    ) -> Tensor:
        """`layer_norm(residual + dropout(x + x_bias))` of x and residual [..., hidden], x_bias [hidden]."""
        options: dict[str, Any] = {"eps": self.eps, "seed": seed, "training": self.training}
        return dropout_add_layer_norm(
            x, residual, self.weight, self.bias, x_bias=x_bias, dropout_p=dropout_p, **options
        )


class Product(nn.Linear):
    """A linear layer's product alone: what reads it adds the bias and gives that its gradient, in passing."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class PackedEmbeddings(nn.Module):
    """Sum of word, position and token-type embeddings, layer norm, dropout."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.word = nn.Parameter(torch.empty(config.vocab_size, hidden))
        self.position = nn.Parameter(torch.empty(config.max_position_embeddings, hidden))
        self.token_type = nn.Parameter(torch.empty(config.type_vocab_size, hidden))
        self.norm = AddNorm(hidden, eps=config.layer_norm_eps)
        self.padding_idx = config.pad_token_id
        self.dropout_p = config.hidden_dropout_prob
        self.reset_parameters(config.initializer_range)

    def reset_parameters(self, std: float) -> None:
        for table in (self.word, self.position, self.token_type):
            nn.init.normal_(table, std=std)
        if self.padding_idx is not None:
            nn.init.zeros_(self.word[self.padding_idx])

    def forward(self, input_ids: Tensor, token_type_ids: Tensor, position_ids: Tensor) -> Tensor:
        # The sums of the two small tables are few: one lookup and one pass over the tokens instead of two.
        sums = (self.token_type[:, None] + self.position).flatten(0, 1)
        words = F.embedding(input_ids, self.word, self.padding_idx)
        places = F.embedding(token_type_ids * self.position.size(0) + position_ids, sums)
        return dropout(self.norm(words, places), self.dropout_p, self.training)


class QkvProjection(nn.Linear):
    """The fused projection; with `cls_rows`, queries of those rows alone and keys and values of all."""

    def __init__(self, hidden: int) -> None:
        super().__init__(hidden, 3 * hidden)

    def forward(  # type: ignore[override]
        self, x: Tensor, cls_rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """x [total, hidden] -> ([total, 3 * hidden], None) or ([cls, hidden], [total, 2 * hidden])."""
        if cls_rows is None:
            return super().forward(x), None
        hidden = self.in_features
        q = F.linear(x.index_select(0, cls_rows), self.weight[:hidden], self.bias[:hidden])
        return q, F.linear(x, self.weight[hidden:], self.bias[hidden:])


class PackedAttention(nn.Module):
    """Self-attention inside each sequence, with its output projection but for that one's bias."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.dropout_p = config.attention_probs_dropout_prob
        self.qkv = QkvProjection(config.hidden_size)
        self.out = Product(config.hidden_size, config.hidden_size)

    def forward(
        self,
        x: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        seed: Tensor | None,
        cls_rows: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """x [total, hidden] -> [total, hidden], or the rows `cls_rows` or `rows` of it."""
        options: dict[str, Any] = {"dropout_p": self.dropout_p if self.training else 0.0, "seed": seed}
        q, kv = self.qkv(x, cls_rows)
        if kv is None:
            qkv = q.view(-1, 3, self.num_heads, self.head_dim)
            context = packed_attention_qkv(qkv, cu_seqlens, max_seqlen, **options)
        else:
            k, v = kv.view(-1, 2, self.num_heads, self.head_dim).unbind(1)
            q = q.view(-1, self.num_heads, self.head_dim)
            context = packed_attention_cls(q, k, v, cu_seqlens, max_seqlen, **options)
        assert isinstance(context, Tensor)  # a pair only where the log-sum-exp is asked for
        context = context.flatten(1)
        return self.out(context if rows is None else context.index_select(0, rows))


class FeedForward(nn.Module):
    """The position-wise MLP of a layer, but for the bias of its last product."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.up = Product(config.hidden_size, config.intermediate_size)
        self.activation = activation_with_bias(config.hidden_act)
        self.down = Product(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.up(x), self.up.bias))


class PackedBertLayer(nn.Module):
    """Attention and MLP, each followed by dropout, the residual and a layer norm."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.attention = PackedAttention(config)
        self.attention_norm = AddNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = FeedForward(config)
        self.mlp_norm = AddNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout_p = config.hidden_dropout_prob

    def forward(
        self,
        x: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        seeds: tuple[Tensor | None, ...],
        cls_rows: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """x [total, hidden] -> [total, hidden], or the rows `cls_rows` (first tokens) or `rows` of it; seeds
        of the dropouts of attention, its output and the MLP's."""
        attended = self.attention(x, cu_seqlens, max_seqlen, seeds[0], cls_rows, rows)
        wanted = cls_rows if cls_rows is not None else rows
        x = x if wanted is None else x.index_select(0, wanted)
        x = self.attention_norm(attended, x, self.attention.out.bias, self.dropout_p, seeds[1])
        return self.mlp_norm(self.mlp(x), x, self.mlp.down.bias, self.dropout_p, seeds[2])


class PackedBert(nn.Module):
    """The BERT encoder over a packed batch, freshly initialised from a `transformers.BertConfig`.

    Attributes:
        activation_checkpointing: in training, keep only the layers' inputs and compute the rest again in the
            backward pass: the same gradients, with less memory and about a third more work.

    Raises:
        ValueError: the config describes something else than an absolute-position BERT encoder.
    """

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        check_config(config)
        self.config = config
        self.activation_checkpointing = False
        self.embeddings = PackedEmbeddings(config)
        self.layers = nn.ModuleList(PackedBertLayer(config) for _ in range(config.num_hidden_layers))
        init_weights(self, config.initializer_range)

    def forward(
        self,
        input_ids: Tensor,
        token_type_ids: Tensor,
        position_ids: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        *,
        cls_only: bool = False,
        rows: Tensor | None = None,
    ) -> Tensor:
        """Last-layer hidden states of every token, or of the tokens asked for.

        Args:
            input_ids, token_type_ids, position_ids: int32 or int64 [total], the sequences back to back.
            cu_seqlens: int32 [sequences + 1], where each begins and, last, the total.
            max_seqlen: at least the longest sequence's length, on the host.
            cls_only: return each sequence's first token alone; the last layer then computes queries, output
                and MLP for those rows alone. The row of an empty sequence means nothing.
            rows: int [n], return these tokens alone; the last layer's output and MLP run on them alone.

        Returns:
            [total, hidden]; [sequences, hidden] with cls_only; [n, hidden] with rows.

        Raises:
            ValueError: max_seqlen exceeds the position table, or both cls_only and rows are given.
        """
        if max_seqlen > self.config.max_position_embeddings:
            raise ValueError(
                f"max_seqlen is {max_seqlen}, but the model has positions for "
                f"{self.config.max_position_embeddings} tokens (max_position_embeddings)"
            )
        if cls_only and rows is not None:
            raise ValueError("cls_only and rows exclude each other: both say which tokens to return")
        x = self.embeddings(input_ids, token_type_ids, position_ids)
        *seeds, last = self._seeds(x.device)
        for layer, of_layer in zip(self.layers, seeds, strict=False):
            x = self._run(layer, x, cu_seqlens, max_seqlen, of_layer)
        cls_rows = first_rows(cu_seqlens, x.size(0)) if cls_only else None
        return self._run(self.layers[-1], x, cu_seqlens, max_seqlen, last, cls_rows, rows)

    def _seeds(self, device: torch.device) -> list[tuple[Tensor | None, ...]]:
        """Of every layer's dropouts, drawn at once from torch's default generator of the device."""
        if not self.training:
            return [(None, None, None)] * len(self.layers)
        shape = (len(self.layers), 3, 1)
        drawn = torch.randint(2**63 - 1, shape, dtype=torch.int64, device=device)
        return [of_layer.unbind() for of_layer in drawn.unbind()]

    def _run(self, layer: nn.Module, *arguments: Any) -> Tensor:
        if self.activation_checkpointing and self.training and torch.is_grad_enabled():
            # What a layer draws follows from the seeds it is given.
            return checkpoint(layer, *arguments, use_reentrant=False, preserve_rng_state=False)
        return layer(*arguments)


def mean_seqlen(lengths: np.ndarray) -> float:
    """Length of the sequence that the average token is in: sum of squared lengths [n] / sum of lengths."""
    lengths = lengths.astype(np.float64)
    return float((lengths**2).sum() / lengths.sum())


def flops_per_token(config: BertConfig, mean_seqlen: float, *, training: bool = True) -> float:
    """Floating-point operations per real token of the encoder's matrix products, for MFU.

    Per layer and token the forward costs 2 * (4 hidden^2 + 2 hidden * intermediate) for the projections and
    4 * hidden * mean_seqlen for the two products of attention (see the function of that name). The backward
    costs twice the forward. Heads, embeddings and what the [CLS]-only last layer saves are not in it.
    """
    hidden, inner = config.hidden_size, config.intermediate_size
    layer = 2 * (4 * hidden**2 + 2 * hidden * inner) + 4 * hidden * mean_seqlen
    return config.num_hidden_layers * layer * (3 if training else 1)
