"""Fused operations: each usable on its own, each with an eager reference `x_ref`."""

from mtfast.ops import _flops as _flops
from mtfast.ops._packed_attention_ref import packed_attention_cls_ref, packed_attention_ref
from mtfast.ops.bias_gelu import bias_gelu, bias_gelu_ref
from mtfast.ops.concat_mlp import ConcatMLP, concat_mlp, concat_mlp_ref
from mtfast.ops.dropout_add_layer_norm import dropout_add_layer_norm, dropout_add_layer_norm_ref
from mtfast.ops.mask_tokens import MaskedTokens, exact_count, mask_tokens, mask_tokens_ref
from mtfast.ops.packed_attention import (
    PackedSelfAttention,
    packed_attention,
    packed_attention_cls,
    packed_attention_qkv,
)

__all__ = [
    "ConcatMLP",
    "MaskedTokens",
    "PackedSelfAttention",
    "bias_gelu",
    "bias_gelu_ref",
    "concat_mlp",
    "concat_mlp_ref",
    "dropout_add_layer_norm",
    "dropout_add_layer_norm_ref",
    "exact_count",
    "mask_tokens",
    "mask_tokens_ref",
    "packed_attention",
    "packed_attention_cls",
    "packed_attention_cls_ref",
    "packed_attention_qkv",
    "packed_attention_ref",
]
