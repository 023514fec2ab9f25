"""Everything worth doing in a short visit to a GPU, in two parts.

    python -m benchmarks gpu [--part 1|2] [--ops OP ...] [--prebuilt FILE] [--results DIR] [--commit HASH]
    python -m benchmarks gpu --plan        what would run, and for how long
    python -m benchmarks gpu --rehearse    every step on the CPU, small, without haste: no GPU is needed

Part 1, at most 240 s, is what is right: versions and peaks, the build, every kernel once against float64,
the ops' GPU tests, compute-sanitizer on small shapes, the demo and the tests of CUDA graphs in all stages.
Part 2, at most 400 s, is how fast: the ops' benchmarks, whole training steps, ncu on the main kernels. Both
need a library for this GPU: --prebuilt brings one, else it is built. With MTFAST_TEST_DATA and
MTFAST_TEST_CHECKPOINT, a directory of data and a checkpoint of which tokenizer and config are enough, the
steps are measured as the trainer makes them too, in the shape of BERT-base.

Each step is a process of its own with its share of the time that is left, so that none takes another with it;
one that needs what is not installed here is left out. Results go to $OUT where that is set, else to
benchmarks/results/: rows in <gpu>-<date>.csv, case by case, smoke.jsonl, ncu.csv, all that was printed in
visit-<part>.log and what became of each step in visit-<part>.json. Needs torch and pytest; to build also
setuptools, ninja, pybind11 and a CUDA toolkit.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shlex
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.build import LIBRARY
from benchmarks.common import RESULTS, commit, default_device, environment
from benchmarks.tools import SANITIZERS, profiled, sanitized
from benchmarks.visit import Outcome, Step, Visit, grouped, share, table

SECONDS = {1: 240, 2: 400}
REHEARSAL_FACTOR = 20  # times as long as on a GPU: a CPU is no measure of what a GPU does in time
TRAINER = ("deepspeed", "datasets", "transformers")  # the packages that training needs beside the ops'
REAL = ("MTFAST_TEST_DATA", "MTFAST_TEST_CHECKPOINT")
OPS = ("packed_attention", "concat_mlp", "dropout_add_layer_norm", "bias_gelu", "mask_tokens")
PYTHON = (sys.executable, "-m")
WORKERS = 4  # of pytest for each op, whose references are computed on the CPU


@dataclass(frozen=True)
class Place:
    """Where the visit is: a GPU, or a CPU that stands for one.

    results: where files are written.
    prebuilt: a library built elsewhere.
    ops: those that are looked at.
    """

    device: torch.device
    results: Path
    prebuilt: Path | None
    ops: Sequence[str] = OPS

    @property
    def is_rehearsal(self) -> bool:
        return self.device.type != "cuda"

    def seconds(self, part: int) -> int:
        """What a part may take here."""
        return SECONDS[part] * (REHEARSAL_FACTOR if self.is_rehearsal else 1)

    def benchmark(self, name: str, *arguments: str, results: bool = True, small: str = "") -> list[str]:
        """The command of a benchmark here; `small` is what cuts it down for a rehearsal."""
        command = [*PYTHON, "benchmarks", name, "--device", str(self.device), *arguments]
        if results:
            command += ["--results", str(self.results)]
        return command + shlex.split(small if self.is_rehearsal else "")


def main(argv: list[str]) -> int:
    """Run the steps; 0 when none failed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--part", type=int, choices=(1, 2), help="one of the two parts (default: both)")
    parser.add_argument("--ops", nargs="+", choices=OPS, default=OPS, help="look at these alone")
    parser.add_argument("--prebuilt", type=Path, metavar="FILE", help="a library built elsewhere")
    parser.add_argument("--results", type=Path, help="directory of the results (default: $OUT)")
    parser.add_argument("--commit", help="which commit the sources are, where they are no repository")
    parser.add_argument("--plan", action="store_true", help="print what would run")
    parser.add_argument("--rehearse", action="store_true", help="run every step without a GPU, small")
    options = parser.parse_args(argv)
    if options.commit:
        os.environ["MTFAST_COMMIT"] = options.commit
    parts = [options.part] if options.part else [1, 2]
    place = place_of(options)
    steps = {part: (part_1, part_2)[part - 1](place) for part in parts}
    if place.is_rehearsal:
        os.environ["OMP_NUM_THREADS"] = "1"  # what is so small is slower on more
    if options.plan:
        for part in parts:
            print(f"Part {part}, at most {place.seconds(part)} s\n{plan(steps[part], place.seconds(part))}\n")
        return 0
    if not torch.cuda.is_available() and not options.rehearse:
        print("python -m benchmarks gpu: torch sees no GPU here; --rehearse needs none", file=sys.stderr)
        return 2
    outcomes: list[Outcome] = []
    for part in parts:
        facts = environment(place.device) | {"part": part, "rehearsal": place.is_rehearsal}
        visit = Visit(f"visit-{part}", place.results, facts)
        visit.say(", ".join(f"{key} {value}" for key, value in facts.items()))
        if commit() == "unknown":
            visit.say("these sources are no repository: say with --commit which commit they are")
        outcomes += visit.run(steps[part], place.seconds(part))
    print(f"\n{table(outcomes)}\nin {place.results}")
    return 1 if any(outcome.bad for outcome in outcomes) else 0


def place_of(options: argparse.Namespace) -> Place:
    """The place that the options describe. A rehearsal's figures are no results, so they go to a folder of
    their own unless one is named, and it takes the library that is there."""
    if options.rehearse:
        results = options.results or Path(tempfile.mkdtemp(prefix="mtfast-rehearsal-"))
        return Place(torch.device("cpu"), results.resolve(), options.prebuilt or LIBRARY, options.ops)
    results = options.results or Path(os.environ.get("OUT") or RESULTS)
    device = default_device() if not options.plan else torch.device("cuda")
    return Place(device, results.resolve(), options.prebuilt, options.ops)


def part_1(place: Place) -> list[Step]:
    """What is right."""
    return [
        Step("peaks", place.benchmark("peaks", small="--mib 4 --size 128"), 20),
        build(place),
        Step("smoke", place.benchmark("smoke", "--ops", *place.ops), 50, needs="build"),
        *(gpu_tests(place, op) for op in place.ops),
        # A rehearsal's are one and the same.
        *(sanitizer(place, name) for name in (SANITIZERS[:1] if place.is_rehearsal else SANITIZERS)),
        demo(place),
        graph_tests(place),
    ]


def part_2(place: Place) -> list[Step]:
    """How fast."""
    of_ops = {
        "packed_attention": (60, "--tokens 64 --distributions quora --dtypes float32"),
        "concat_mlp": (30, "--batches 8 --hidden 16 --no-compile"),
        "dropout_add_layer_norm": (25, "--rows 8 --hidden 16 --no-compile"),
        "bias_gelu": (25, "--rows 64 --columns 64 --dtypes float32 --no-compile"),
        "mask_tokens": (25, "--most-tokens 512 --no-compile"),
    }
    return [
        build(place),
        *(measured(place, op, *of_ops[op]) for op in OPS if op in place.ops),
        *(attention_in_use(place) if "packed_attention" in place.ops else ()),
        ncu(place),
        real_steps(place, "finetune_step", 130),
        real_steps(place, "pretrain_step", 100),
        # Last, since what is compiled there may take longer than there is time.
        measured(
            place,
            "steps",
            110,
            "--layers 1 --hidden 64 --heads 2 --examples 4 --no-compile",
            why_not=missing("transformers"),
        ),
    ]


def attention_in_use(place: Place) -> list[Step]:
    """packed_attention with other arguments than its kernels' own, and in a model of transformers."""
    without = missing("transformers")
    small = "--shapes minilm --sentences 3 --dtypes float32"
    return [
        measured(place, "attention_arguments", 10, "--tokens 64"),
        measured(place, "bert_attention", 20, small, why_not=without),
    ]


def missing(*packages: str) -> str:
    """Which of the packages are not installed; nothing when all are."""
    absent = [name for name in packages if not importlib.util.find_spec(name)]
    return f"not installed: {', '.join(absent)}" if absent else ""


def measured(place: Place, name: str, seconds: int, small: str, why_not: str = "") -> Step:
    """A benchmark that ends by itself with the cases done by then."""
    command = place.benchmark(name, "--budget", "0.3", small=f"--budget 0.02 {small}")
    return Step(name, command, seconds, needs="build", ends_itself=True, why_not=why_not)


def build(place: Place) -> Step:
    """A library for this device in its place."""
    prebuilt = ["--prebuilt", str(place.prebuilt.resolve())] if place.prebuilt else []
    return Step("build", place.benchmark("build", *prebuilt, results=False), 120)


def gpu_tests(place: Place, op: str) -> Step:
    """The op's tests that are marked `gpu`."""
    files = [f"tests/test_{op}.py", f"tests/test_{op}_arguments.py"]
    files = [file for file in files if Path(file).is_file()]
    command = [*PYTHON, "pytest", "-v", "--tb=short", "-m", "gpu", *files]
    # Tests look at values that ops do not look at on a GPU otherwise; benchmarks must not wait for that.
    settings = {"MTFAST_CHECK_VALUES": "1"}
    if place.is_rehearsal:
        command += ["-k", "empty or autocast or opcheck or wrong"]
        settings["MTFAST_TEST_GPU"] = str(place.device)
    elif importlib.util.find_spec("xdist"):
        command += ["-n", str(WORKERS)]
        settings["OMP_NUM_THREADS"] = "2"
    return Step(f"tests of {op}", command, 80, settings, needs="build", together="tests")


def demo(place: Place) -> Step:
    """All stages of the demo, as its command runs them."""
    why_not = "on a CPU it takes minutes: make demo" if place.is_rehearsal else missing(*TRAINER)
    run_dir = Path(tempfile.gettempdir()) / "mtfast-demo"
    command = [*PYTHON, "mtfast", "run", "demo", "--run-dir", str(run_dir)]
    return Step("demo", command, 60, needs="build", why_not=why_not)


def graph_tests(place: Place) -> Step:
    """That a captured step is the step, in every stage, and that none waits for the GPU."""
    why_not = "captures need a GPU" if place.is_rehearsal else missing(*TRAINER)
    command = [*PYTHON, "pytest", "-v", "--tb=short", "-m", "gpu", "tests/test_graphs.py"]
    return Step("tests of graphs", command, 80, needs="build", why_not=why_not)


def real_steps(place: Place, name: str, seconds: int) -> Step:
    """Whole steps of the trainer on real data."""
    unset = [variable for variable in REAL if not os.environ.get(variable)]
    why_not = f"not set: {', '.join(unset)}" if unset else missing(*TRAINER)
    command = [*PYTHON, "benchmarks", name, "--shape", "bert-base", "--no-compile", "--results"]
    command += [str(place.results), *(("--steps", "1") if place.is_rehearsal else ("--steps", "10"))]
    return Step(name, command, seconds, needs="build", why_not=why_not)


def ncu(place: Place) -> Step:
    """What the main kernels reach and wait for."""
    command = place.benchmark("kernels", "--shapes", "step", results=False, small="--tokens 256")
    if place.is_rehearsal:
        return Step("ncu", command, 40, needs="build")
    watched = profiled(command, place.results / "ncu.csv")
    return Step("ncu", watched or command, 40, needs="build", why_not="" if watched else "not installed")


def sanitizer(place: Place, name: str) -> Step:
    """One of compute-sanitizer's tools on all kernels, small."""
    command = place.benchmark("kernels", "--shapes", "small", results=False)
    watched = (command, {}) if place.is_rehearsal else sanitized(name, command)
    if watched is None:
        return Step(name, command, 0, why_not="compute-sanitizer is not installed")
    return Step(name, watched[0], 60, watched[1], needs="build", together="sanitizers")


def plan(steps: list[Step], seconds: int) -> str:
    """What would run, a line each: its share of the time, and the command or why there is none."""
    groups = grouped(steps)
    everything = sum(map(share, groups))
    lines = []
    for group in groups:
        for step in group:
            time = f"{seconds * share(group) / everything:4.0f} s" if not step.why_not else "      "
            what = f"left out: {step.why_not}" if step.why_not else shlex.join(step.command)
            beside = f"  beside the other {step.together}" if len(group) > 1 else ""
            lines.append(f"  {step.name:26} {time}  {what}{beside}")
    return "\n".join(lines)
