"""packed_attention in Hugging Face models, as `attn_implementation="mtfast"`.

    from mtfast.hf import register_attention

    register_attention()
    model = transformers.AutoModel.from_pretrained(name, attn_implementation="mtfast")

For bidirectional encoders whose attention goes through transformers' AttentionInterface: BERT, RoBERTa,
DistilBERT, ELECTRA and more. What a layer is told says where sequences lie, the first that is there:

- `cu_seq_lens_q` and `max_length_q`, of a batch without padding [1, total]: what
  `DataCollatorWithFlattening(return_flash_attn_kwargs=True)` makes. The fastest, since nothing is padded;
- `attention_mask` [batch, length] of a padded batch. Each sequence attends within itself where it lies, and
  so does its padding, to no purpose: what a model makes of padding means nothing, as ever;
- `position_ids` [1, total] of a batch without padding, in which each sequence's begin anew. Each layer finds
  out where, which waits for the GPU.

Dropout draws from torch's default generator.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor

from mtfast.ops import packed_attention

NAME = "mtfast"
# Options of an attention that is not this one, with the values that change nothing.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "is_causal": (None, False),
    "sliding_window": (None,),
    "softcap": (None,),
    "s_aux": (None,),
    "head_mask": (None,),
    "position_bias": (None,),
    "output_attentions": (None, False),
}


def register_attention() -> None:
    """Makes `attn_implementation="mtfast"` known to transformers; more than once does no harm.

    Raises:
        ImportError: this transformers is older than 5.0, whose models do not ask for an attention by name.
    """
    if int(transformers.__version__.split(".")[0]) < 5:
        raise ImportError(
            f"transformers {transformers.__version__} has models with attentions of their own: "
            "attn_implementation='mtfast' needs transformers 5.0 or later"
        )
    transformers.AttentionInterface.register(NAME, attention)
    transformers.AttentionMaskInterface.register(NAME, sequences_of_mask)


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    position_ids: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in each layer.

    Args:
        query, key, value: [batch, heads, length, head_dim], head_dim at most 256.
        attention_mask: what `sequences_of_mask` made of the model's.
        dropout, scaling: dropout_p and softmax_scale of `packed_attention`.
        cu_seq_lens_q, max_length_q: its cu_seqlens and max_seqlen.
        position_ids: int64 [1, total].

    Returns:
        [batch, length, heads, head_dim], and None for the weights, which are never made.

    Raises:
        ValueError: the model wants another attention: causal, cross, windowed, with fewer heads in keys.
        TypeError, RuntimeError: as `packed_attention`.
    """
    _refuse_others(module, query, key, options)
    batch, heads, length, head_dim = query.shape
    max_seqlen = length
    if cu_seq_lens_q is not None:
        if max_length_q is None:
            raise ValueError("cu_seq_lens_q comes without max_length_q, the length of the longest sequence")
        cu_seqlens, max_seqlen = cu_seq_lens_q, int(max_length_q)
    elif attention_mask is not None:
        cu_seqlens = attention_mask
    elif batch == 1 and position_ids is not None:
        cu_seqlens = _sequences_of_positions(position_ids)
    else:
        cu_seqlens = torch.arange(batch + 1, dtype=torch.int32, device=query.device) * length
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    out = packed_attention(q, k, v, cu_seqlens, max_seqlen, dropout_p=dropout, softmax_scale=scaling)
    assert isinstance(out, Tensor)
    return out.view(batch, length, heads, head_dim), None


def sequences_of_mask(*, mask_function: Any, attention_mask: Tensor | None = None, **_: Any) -> Tensor | None:
    """What transformers calls once in each pass of a model, for all layers.

    Args:
        mask_function: which keys a query may see.
        attention_mask: bool [batch, length], whether there is a token; the tokens of a row have no gap.

    Returns:
        cu_seqlens, int32 [3 batch + 1]: of each row the padding before its sequence, the sequence, and the
        padding behind, each in a sequence of its own. None without a mask.

    Raises:
        ValueError: a row has a gap, or some keys are to be hidden from some queries.
    """
    if mask_function is not transformers.masking_utils.bidirectional_mask_function:
        raise ValueError(
            f"attn_implementation={NAME!r} is bidirectional attention inside each sequence; "
            "this model hides keys from queries: use 'sdpa' or 'eager'"
        )
    if attention_mask is None:
        return None
    rows, length = attention_mask.shape
    count = attention_mask.sum(1)
    begin = attention_mask.int().argmax(1)
    place = torch.arange(length, device=attention_mask.device)
    inside = (place >= begin[:, None]) & (place < (begin + count)[:, None])
    gaps = (attention_mask != inside).any(1)
    if not torch.compiler.is_compiling() and gaps.any():
        raise ValueError(
            f"attention_mask has a gap in row {int(gaps.int().argmax())}: the tokens of a row have to be "
            f"neighbours for attn_implementation={NAME!r}"
        )
    row = torch.arange(rows, device=attention_mask.device) * length
    bounds = torch.stack((row, row + begin, row + begin + count), 1).flatten()
    return torch.nn.functional.pad(bounds, (0, 1), value=rows * length).int()


def _sequences_of_positions(position_ids: Tensor) -> Tensor:
    """cu_seqlens of sequences that begin where a position is not greater than the one before."""
    places = position_ids.flatten()
    starts = (places.diff() <= 0).nonzero().flatten() + 1
    ends = starts.new_tensor([0]), starts.new_tensor([len(places)])
    return torch.cat((ends[0], starts, ends[1])).int()


def _refuse_others(module: torch.nn.Module, query: Tensor, key: Tensor, options: dict[str, Any]) -> None:
    """ValueError for what packed_attention does not do."""
    asked = {"is_causal": getattr(module, "is_causal", None)} | options
    for name, plain in _PLAIN.items():
        if asked.get(name) not in plain:
            raise ValueError(
                f"attn_implementation={NAME!r} has no {name}, found {asked[name]}: use 'sdpa' or 'eager'"
            )
    if query.shape != key.shape:
        raise ValueError(
            f"attn_implementation={NAME!r} is self-attention with as many heads in keys as in queries, found "
            f"queries [batch, heads, length, head_dim] {list(query.shape)} and keys {list(key.shape)}"
        )
