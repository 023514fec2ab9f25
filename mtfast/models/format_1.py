"""Task heads as mtfast saved them before tasks were declared: one for sentences, one MLP for pairs."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mtfast.tasks import MlpConfig, Task

KINDS = ("classification", "binary", "regression")


def read_format_1(
    fields: Mapping[str, Any], tensors: Mapping[str, Tensor], tasks: Mapping[str, Task], mlp: MlpConfig
) -> tuple[tuple[str, Any, Any] | None, dict[str, Tensor]]:
    """In what the saved heads differ from those of `tasks` (what, there, here); the tensors by today's names.

    Args:
        fields: what `mtfast.json` holds.
        tensors: what `heads.safetensors` holds: `heads.sentiment.*` and `heads.pair.*`.
    """
    if tuple(task.kind for task in tasks.values()) != KINDS:
        return None, dict(tensors)  # of other tasks: these have no head among them
    sentence, pair, other = tasks.values()
    if pair.head != other.head or not pair.has_mlp:
        return ("heads of the two tasks on pairs", "one MLP", f"{pair.head} and {other.head}"), {}
    saved = fields.get("heads")
    saved = saved if isinstance(saved, dict) else {}
    for name, here in (
        ("sentiment", sentence.head),
        ("pair_input", pair.pair_input),
        ("inner", mlp.width),
        ("activation", mlp.activation),
    ):
        if saved.get(name) != here:
            return (name, saved.get(name), here), {}
    today = {"heads.sentiment.": f"heads.task-{next(iter(tasks))}.", "heads.pair.": f"heads.mlp-{pair.head}."}
    renamed = {}
    for name, tensor in tensors.items():
        old = next((prefix for prefix in today if name.startswith(prefix)), "")
        renamed[today.get(old, "") + name.removeprefix(old)] = tensor
    return None, renamed
