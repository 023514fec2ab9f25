"""What keeping weights and states costs fine-tuning: whole epochs, and what training waits for at their ends.

    python -m benchmarks keeping --data DIR --checkpoint DIR [--epochs 5] [--rows N] [--precision fp32]
        [--baseline COMMIT] [--directory DIR] [--threads 2]

Each variant is `mtfast finetune` of the paper's recipe without ZeRO, in a process of its own, one after the
other, with dev metrics and a state at the end of each epoch: "mtfast" as it is, "nothing kept" without
writing weights and states, and, by a commit's name, mtfast as it is there. An epoch is from one plan of its
steps to the next; waiting is from the end of the dev metrics to the next plan, and its share is of the epoch.
The first epoch warms up. On a GPU copies that are queued as an epoch ends are a part of the next one's time.

Fewer rows of each task make an epoch shorter, and keeping a larger share of it; the case says how many steps
there are. The directory should lie where runs do: how fast its disk is counts.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from statistics import median

import torch

from benchmarks.baseline import built
from benchmarks.common import (
    RESULTS,
    SOURCES,
    Row,
    default_device,
    print_rows,
    rows_of,
    summary,
    write_results,
)
from benchmarks.keeping_child import Epochs, Fit
from benchmarks.stage_setup import parser_of
from mtfast.models.checkpoint import load_bert_config

OURS, NOTHING = "mtfast", "nothing kept"
LEAST_EPOCHS = 3  # the first warms up, and none begins after the last


def main(argv: list[str]) -> int:
    """Run the benchmark, print its table and write it to the results file."""
    parser = parser_of("keeping", __doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--epochs", type=int, default=5, help="epochs of each variant (default: 5)")
    parser.add_argument("--rows", type=int, help="training rows of each task (default: all)")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16", help="(default: bf16)")
    parser.add_argument("--baseline", metavar="COMMIT", help="mtfast as it is there takes part too")
    parser.add_argument("--directory", type=Path, help="where the runs are (default: a temporary one)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--results", type=Path, default=RESULTS, help="directory of the results file")
    options = parser.parse_args(argv)
    if options.epochs < LEAST_EPOCHS:
        parser.error(f"--epochs {options.epochs}: at least {LEAST_EPOCHS} are needed")
    torch.set_num_threads(options.threads)
    with ExitStack() as stack:
        baseline = stack.enter_context(built(options.baseline)) if options.baseline else None
        place = stack.enter_context(tempfile.TemporaryDirectory(prefix="keeping-", dir=options.directory))
        fit = Fit(
            run_dir=place,
            data=str(Path(options.data).resolve()),
            checkpoint=str(Path(options.checkpoint).resolve()),
            epochs=options.epochs,
            rows=options.rows,
            precision=options.precision,
            threads=options.threads,
            kept=True,
        )
        rows = compare(fit, {options.baseline: baseline.path} if baseline else {})
    print_rows(rows)
    print(f"written to {write_results(rows, default_device(), options.results)}")
    return 0


def compare(fit: Fit, others: Mapping[str, Path]) -> list[Row]:
    """The rows: seconds of an epoch and of waiting at its end, by variant.

    others: directories with mtfast as it is elsewhere.
    """
    found = {OURS: epochs_of(fit, OURS), NOTHING: epochs_of(fit, NOTHING)}
    found |= {name: epochs_of(fit, name, path) for name, path in others.items()}
    config = load_bert_config(fit.checkpoint)
    steps, examples = found[OURS].steps, found[OURS].examples
    shape = f"{config.num_hidden_layers} x {config.hidden_size}"
    case = f"{shape} finetune in {fit.precision}, epochs of {steps} steps"
    timings = {name: summary(epochs.seconds) for name, epochs in found.items()}
    rates = {name: examples / timing.median for name, timing in timings.items()}
    rows = rows_of("keeping", case, timings, OURS, examples_per_s=rates)
    waits = {name: summary(epochs.waits) for name, epochs in found.items()}
    shares = {name: median(epochs.waits) / median(epochs.seconds) for name, epochs in found.items()}
    return rows + rows_of("keeping", f"{case}, waiting", waits, OURS, share_of_step=shares)


def epochs_of(fit: Fit, name: str, path: Path = SOURCES) -> Epochs:
    """A variant's epochs, measured in a process of its own whose mtfast is in that directory."""
    values = asdict(fit) | {"run_dir": str(Path(fit.run_dir) / name), "kept": name != NOTHING}
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(path), str(SOURCES)])}
    command = [sys.executable, "-m", "benchmarks.keeping_child", json.dumps(values)]
    print(f"training: {name}", flush=True)
    done = subprocess.run(command, cwd=path, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{name}: fine-tuning ended with status {done.returncode}; what it wrote is above")
    said = json.loads(done.stdout)
    if not Path(said.pop("package")).samefile(path / "mtfast"):
        raise SystemExit(f"{name}: its process found another mtfast than that in {path}")
    return Epochs(**said)
