"""Where the time of mtfast's training steps goes, part by part, and the share of matrix products in it.

    python -m benchmarks step_parts --data DIR --checkpoint DIR [--steps 10] [--shape bert-base]
        [--threads 2] [--plot docs/step_parts.png]

The steps are those of `finetune_step` and `pretrain_step` as their commands run them, under the engine in
bf16. A step is cut where it enters and leaves the encoder, where autograd begins, where the gradient of the
encoder's output is there, and where autograd ends; on a GPU each cut waits for it. "optimizer and engine" is
what is left of the step; hooks of the engine that run while autograd does count as the backward pass they are
in, and drawing the masks of pre-training as a part of the heads and losses.

Beside the step, not in it: "input", the packing of its micro-batch, which training does in a thread of its
own meanwhile; "keeping", what copies the state, and the best weights, at the end of an epoch for the thread
that writes them, as a part of each of the epoch's steps. "matrix products" are the step's own, by torch's
profiler (addmm, mm and bmm), without those inside mtfast's ops. The picture shows the cases of the results
file.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.common import Row, rows_of, summary, write_results
from benchmarks.pretrain_step import MAX_LENGTHS
from benchmarks.real_steps import WARM_UP, setup_of, step_parser
from benchmarks.stage_setup import Clock, StageMaker, packed_batches
from mtfast.models.bert import PackedBert
from mtfast.training.engine.engine import start, stop
from mtfast.training.engine.keeping import Due, Keeper

STEP, INPUT, KEEPING, PRODUCTS = "step", "input", "keeping", "matrix products"
PARTS = (
    "encoder forward",
    "heads and losses forward",
    "heads and losses backward",
    "encoder backward",
    "optimizer and engine",
)
PRODUCT_OPS = ("aten::addmm", "aten::mm", "aten::bmm")


def main(argv: list[str]) -> int:
    """Run the benchmark, print its table, write it to the results file and draw it."""
    parser = step_parser("step_parts", __doc__)
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the results there")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    setups = {"finetune": setup_of(options, "finetune")} | {
        f"pretrain at most {most}": setup_of(options, "pretrain", most) for most in MAX_LENGTHS
    }
    device = start()
    try:
        for case, setup in setups.items():
            rows = parts_of_stage(case, StageMaker(setup), setup.steps)
            path = write_results(rows, device, options.results)
            print(describe(rows), flush=True)
    finally:
        stop()
    print(f"written to {path}")
    if options.plot:
        from benchmarks.step_parts_plot import draw

        print(f"drawn in {draw(path, options.plot)}")
    return 0


def parts_of_stage(case: str, maker: StageMaker, turns: int) -> list[Row]:
    """The rows of a stage: seconds of the step and of its parts, and their shares of it."""
    stage = maker.make()
    stage.engine.train()
    batches = packed_batches(stage, turns)
    with Cuts(stage) as cuts:
        seconds = [cuts.step(batch) for batch in batches][WARM_UP:]
    found = {STEP: [sum(parts.values()) for parts in seconds]}
    found |= {part: [parts[part] for parts in seconds] for part in PARTS}
    whole = mean(found[STEP])
    found[PRODUCTS] = [whole * product_share(stage, batch) for batch in batches[-2:]]
    found[INPUT] = input_seconds(stage, turns)
    found[KEEPING] = [keeping_seconds(stage) / maker.epoch_steps(stage)]
    stage.engine.close()
    config = maker.weights.config
    return rows_of(
        "step_parts",
        f"{config.num_hidden_layers} x {config.hidden_size} {case}",
        {name: summary(values) for name, values in found.items()},
        STEP,
        share_of_step={name: mean(values) / whole for name, values in found.items()},
    )


def describe(rows: Sequence[Row]) -> str:
    """The rows of a case as a table for people."""
    lines = [
        f"{row['variant']:26} {row['median_us'] / 1e6:9.4f} s {row['share_of_step']:7.1%}" for row in rows
    ]
    return "\n".join([rows[0]["case"], *lines])


class Cuts:
    """Notes when a stage's step passes from one part to the next, inside `with`."""

    def __init__(self, stage: Any) -> None:
        self.stage = stage
        self.clock = Clock(stage.engine.device)
        self.seconds: dict[str, float] = {}
        (self.encoder,) = (part for part in stage.engine.model.modules() if isinstance(part, PackedBert))

    def __enter__(self) -> Cuts:
        backward = torch.autograd.backward

        def timed(*args: Any, **kwargs: Any) -> None:
            self._end("heads and losses forward")
            backward(*args, **kwargs)
            self._end("encoder backward")

        self._hooks = [
            self.encoder.register_forward_pre_hook(lambda *_: self._end("heads and losses forward")),
            self.encoder.register_forward_hook(self._encoded),
        ]
        self._patch = mock.patch.object(torch.autograd, "backward", timed)
        self._patch.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._patch.stop()
        for hook in self._hooks:
            hook.remove()

    def step(self, batch: Any) -> dict[str, float]:
        """Make a step; seconds of its parts."""
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.clock.lap()
        self.stage.step(batch)
        self._end("optimizer and engine")
        return self.seconds

    def _encoded(self, module: torch.nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        self._end("encoder forward")
        output.register_hook(lambda gradient: self._end("heads and losses backward"))

    def _end(self, part: str) -> None:
        """What passed since the last cut belongs to this part."""
        self.seconds[part] += self.clock.lap()


def product_share(stage: Any, batch: Any) -> float:
    """The part of a step's time that it spends in matrix products."""
    clock = Clock(stage.engine.device)
    on_gpu = stage.engine.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities, acc_events=True) as profiled:
        clock.lap()
        stage.step(batch)
        seconds = clock.lap()
    own = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    return sum(getattr(e, own) for e in profiled.key_averages() if e.key in PRODUCT_OPS) / 1e6 / seconds


def input_seconds(stage: Any, turns: int) -> list[float]:
    """Seconds in which a micro-batch is packed while nothing else runs, each the mean of so many."""
    plan = stage.plan(0)[:turns]
    clock = Clock(stage.engine.device)
    found = []
    for _ in range(3):
        for _ in stage.micro_batches(plan, 0):
            pass
        found.append(clock.lap() / turns)
    return found


def keeping_seconds(stage: Any) -> float:
    """Seconds that training waits for copies of the state and, where there is a best epoch, the weights."""
    keeper = Keeper(stage.engine)
    clock = Clock(stage.engine.device)
    with tempfile.TemporaryDirectory() as directory:
        best = partial(stage.save, Path(directory) / "best") if stage.criteria else None
        for step in range(2):  # what the first takes memory for, the others use again
            clock.lap()
            keeper.keep(best, Due(Path(directory) / "state", step, {}))
            seconds = clock.lap()
            keeper.wait()
    return seconds
