"""Counts what a step asks torch to compute: kernels on a GPU, calls on the CPU.

    python -m benchmarks op_count

prints them for a fine-tuning step of mtfast under its engine, at the shape of BERT-base, by how often each op
is called; under `torchrun --nproc_per_node 2 -m benchmarks op_count` those of one of two ranks. The number
follows from the layers and the engine, neither from the machine nor from the examples.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertConfig

from benchmarks.step_batches import random_tables
from mtfast.config import EngineConfig, TaskStageConfig
from mtfast.tasks import MlpConfig
from mtfast.training.engine import ranks
from mtfast.training.engine.engine import start, stop
from mtfast.training.run.weights import Weights
from mtfast.training.stages.finetune import Finetune

EXAMPLES = 12
# Beside views: memory that is set aside, and a view that says it is none.
NO_KERNEL = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view")


class _Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if not (func.is_view or name in NO_KERNEL or func.namespace == "profiler"):
            self.calls[f"{func.namespace}.{name}"] += 1
        return func(*args, **(kwargs or {}))


def count_ops(call: Callable[[], Any]) -> Counter[str]:
    """How often each op that computes something is called, by name: "aten.mm", "mtfast.mask_tokens".

    A call counts once, whatever it does: an op of mtfast, a fused or foreach op. Backward passes count, also
    where threads of a GPU's make them, since those take over what watches the forward pass.
    """
    with _Counting() as counting:
        call()
    return counting.calls


def finetune_ops(config: BertConfig | None = None) -> Counter[str]:
    """`count_ops` of one fine-tuning step under the engine, in a process group of this process alone, which
    must have been started. config: of the encoder, BERT-base's by default, with random weights."""
    tables = random_tables(EXAMPLES, seed=0)
    settings = TaskStageConfig(batch_size=EXAMPLES)
    weights = Weights(config or BertConfig(), None, None, None, MlpConfig(), 0)
    engine = EngineConfig(precision="bf16")
    stage = Finetune({"train": tables, "dev": {}}.__getitem__, weights, settings, engine, 0)
    stage.engine.train()
    ((batch,),) = stage.micro_batches(stage.plan(0)[:1], 0)
    stage.step(batch)  # which makes the optimizer's state
    found = count_ops(lambda: stage.step(batch))
    stage.engine.close()
    return found


def main(argv: list[str]) -> None:
    """Print the table."""
    argparse.ArgumentParser(
        prog="python -m benchmarks op_count", description=__doc__.split("\n")[0]
    ).parse_args(argv)
    start()
    try:
        found = finetune_ops()
        is_main = ranks.is_main()
    finally:
        stop()
    if not is_main:
        return
    for name, count in found.most_common():
        print(f"{count:6} {name}")
    print(f"{found.total():6} in all")
