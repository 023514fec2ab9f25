"""Fused operations: each usable on its own, each with an eager reference `x_ref`."""

from mtfast.ops.concat_mlp import ConcatMLP, concat_mlp, concat_mlp_ref
from mtfast.ops.packed_attention import (
    PackedSelfAttention,
    packed_attention,
    packed_attention_cls,
    packed_attention_qkv,
    packed_attention_ref,
)

__all__ = [
    "ConcatMLP",
    "PackedSelfAttention",
    "concat_mlp",
    "concat_mlp_ref",
    "packed_attention",
    "packed_attention_cls",
    "packed_attention_qkv",
    "packed_attention_ref",
]
