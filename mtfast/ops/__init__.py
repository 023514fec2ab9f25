"""Fused operations: each usable on its own, each with an eager reference `x_ref`."""

from mtfast.ops.concat_mlp import ConcatMLP, concat_mlp, concat_mlp_ref

__all__ = ["ConcatMLP", "concat_mlp", "concat_mlp_ref"]
