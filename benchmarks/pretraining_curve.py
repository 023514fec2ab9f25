"""What further pre-training does to the tasks: dev metrics of the encoder after so many steps of it.

    python -m benchmarks pretraining_curve --data DIR --checkpoint DIR [--steps 150 300] [--head-steps 0 100]
        [--seeds 1] [--precision fp32] [--run-dir runs/pretraining-curve]

For each of --head-steps, the first steps that train the heads of pre-training alone, one run of
pre-training at a constant rate is halted at each of the steps. From every encoder, and from the checkpoint as
it is, the heads of SST and STS are trained with the encoder frozen, and SST is fine-tuned by itself, once
for each seed. Of the last encoder, parts are put back as the checkpoint has them, each in turn, and the
heads trained again: what comes back then was lost in that part. What the run directory has already is not
done again. Written are benchmarks/results/pretraining-curve.json and docs/pretraining_curve.png.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import DOCS, RESULTS, default_device, environment
from benchmarks.stage_setup import parser_of, reviews_in
from mtfast import commands
from mtfast.config import DataConfig, EngineConfig, HeadsConfig, ModelConfig, RunConfig
from mtfast.models.bert import PackedBert
from mtfast.models.checkpoint import load_bert_config, load_pretrained, load_tokenizer, save_pretrained
from mtfast.plots import PALETTE, PRETRAINING, Series, plot_dev_metrics
from mtfast.recipes import local
from mtfast.run_record import read_run

PARTS = ("embeddings", "lower-half", "upper-half")  # of the encoder, whose layers are halved
LOSSES = 20  # of the last steps, whose mean is shown
CORRELATION, ACCURACY = "Pearson correlation on dev", "accuracy on dev"
SHOWN = (
    PRETRAINING[0],
    Series("frozen_sst", "SST, encoder frozen", ACCURACY, PALETTE[0]),
    Series("frozen_sts", "STS, encoder frozen", CORRELATION, PALETTE[2]),
    Series("tuned_sst", "SST, fine-tuned by itself", ACCURACY, PALETTE[1]),
)


def main(argv: list[str]) -> int:
    """Train what is missing, then write the results file and the plot."""
    parser = parser_of("pretraining_curve", __doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--steps", type=int, nargs="+", default=[150, 300], help="of pre-training, in all")
    parser.add_argument("--head-steps", type=int, nargs="+", default=[0, 100], help="a curve for each")
    parser.add_argument("--seeds", type=int, default=1, help="of each fine-tuning (default: 1)")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="fp32", help="(default: fp32)")
    parser.add_argument("--run-dir", type=Path, default=Path("runs/pretraining-curve"), help="for all runs")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    base = base_config(Path(options.data), options.checkpoint, options.precision, options.run_dir)
    start = at(base, 0, options.seeds)
    steps = sorted(set(options.steps))
    curves = [curve(base, head_steps, steps, options.seeds) for head_steps in options.head_steps]
    result = {
        "pretrain": {"batch_size": base.pretrain.batch_size, "learning_rate": base.pretrain.learning_rate},
        "review_max_length": base.data.review_max_length,
        "dev_rows": dev_rows(Path(base.run_dir) / "frozen-0"),
        "start": start,
        "curves": curves,
        "environment": {**environment(default_device()), "threads": options.threads},
    }
    (RESULTS / "pretraining-curve.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    draw(result, DOCS / "pretraining_curve.png")
    return 0


def draw(result: dict[str, Any], path: Path) -> None:
    """Plot what a results file says: a line for each curve, all from the checkpoint as it is. Bars are the
    standard errors that so many examples leave, and accuracies have one scale."""
    lines: dict[str, list[dict[str, Any]]] = {}
    for of in result["curves"]:
        points = (result["start"], *of["points"])
        lines[title(of["head_steps"])] = [{"epoch": p["steps"], "metrics": averaged(p)} for p in points]
    figure = plot_dev_metrics(SHOWN, lines, "step of pre-training")
    assert figure is not None
    panels = dict(zip((series.key for series in SHOWN), figure.axes, strict=False))
    for series in SHOWN[1:]:
        n = result["dev_rows"][series.key.rsplit("_", 1)[1]]
        for records in lines.values():
            x, y = zip(*((r["epoch"], r["metrics"][series.key]) for r in records), strict=True)
            bars = [standard_error(series.unit, value, n) for value in y]
            panels[series.key].errorbar(x, y, bars, fmt="none", ecolor=series.colour, capsize=3, alpha=0.5)
    accuracies = [panels[series.key] for series in SHOWN if series.unit == ACCURACY]
    ends = [end for panel in accuracies for end in panel.get_ylim()]
    for panel in accuracies:
        panel.set_ylim(min(ends), max(ends))
    figure.savefig(path)


def standard_error(unit: str, value: float, examples: int) -> float:
    """Of an accuracy, sqrt(p (1 - p) / n), or of a correlation, (1 - r^2) / sqrt(n - 1)."""
    if unit == ACCURACY:
        return math.sqrt(value * (1 - value) / examples)
    return (1 - value**2) / math.sqrt(examples - 1)


def title(head_steps: int) -> str:
    """What a curve is called."""
    return f"heads alone for {head_steps} steps, then all" if head_steps else "all from the first step"


def base_config(data: Path, checkpoint: str, precision: Any, run_dir: Path) -> RunConfig:
    """What all runs have in common: the rates of `local`, that of pre-training constant."""
    recipe = local()
    constant: dict[str, Any] = {"schedule": "constant", "warmup_fraction": 0.0}
    return replace(
        recipe,
        run_dir=str(run_dir),
        model=ModelConfig(checkpoint=checkpoint),
        data=DataConfig(
            tasks=str(data / "cs224n" if (data / "cs224n").is_dir() else data),
            reviews=str(reviews_in(str(data))),
            review_max_length=128,
            samples="truncate",
            cache_dir=str(run_dir / "cache"),
        ),
        engine=EngineConfig(precision=precision),
        pretrain=replace(recipe.pretrain, **constant),
        heads=HeadsConfig(),
        finetune=replace(recipe.finetune, epochs=2, batch_size=32),
    )


def curve(base: RunConfig, head_steps: int, steps: list[int], seeds: int) -> dict[str, Any]:
    """A run of pre-training with so many steps of its heads alone: its points, and its parts put back."""
    run_dir = f"{base.run_dir}/head-steps-{head_steps}"
    base = replace(base, run_dir=run_dir, pretrain=replace(base.pretrain, head_steps=head_steps))
    points = [at(base, of, seeds) for of in steps]
    parts = {part: frozen(base, put_back(base, steps[-1], part), f"put-back-{part}") for part in PARTS}
    return {"head_steps": head_steps, "points": points, "put_back": parts}


def at(base: RunConfig, steps: int, seeds: int) -> dict[str, Any]:
    """Dev metrics of the encoder after so many steps, and the loss of masked words that it has come to."""
    encoder, loss = pretrained(base, steps) if steps else (base.model.checkpoint, None)
    model, sst = replace(base.model, checkpoint=encoder), {"sst": base.tasks["sst"]}
    tuned = replace(base, model=model, tasks=sst, stages=("finetune",))
    of_tuned = [
        dev_metrics(replace(tuned, seed=seed, run_dir=f"{base.run_dir}/tuned-{steps}/seed-{seed}"))
        for seed in range(seeds)
    ]
    found = {
        "steps": steps,
        "mlm": loss,
        **frozen(base, encoder, f"frozen-{steps}"),
        "tuned_sst": [metrics["sst_accuracy"] for metrics in of_tuned],
    }
    print(" ".join(f"{name} {value}" for name, value in found.items()), flush=True)
    return found


def frozen(base: RunConfig, encoder: str, name: str) -> dict[str, float]:
    """Dev metrics of heads of SST and STS that are trained on an encoder as it is, by a run of this name."""
    tasks = {task: base.tasks[task] for task in ("sst", "sts")}
    run = replace(base, model=replace(base.model, checkpoint=encoder), tasks=tasks, stages=("heads",))
    found = dev_metrics(replace(run, run_dir=f"{base.run_dir}/{name}"))
    return {"frozen_sst": found["sst_accuracy"], "frozen_sts": found["sts_pearson"]}


def put_back(base: RunConfig, steps: int, part: str) -> str:
    """The encoder after so many steps, a part of it as the checkpoint has it."""
    directory = Path(base.run_dir) / f"encoder-{steps}-put-back-{part}"
    encoders = []
    for checkpoint in (f"{base.run_dir}/encoder-{steps}", base.model.checkpoint):
        encoder = PackedBert(load_bert_config(checkpoint))
        load_pretrained(checkpoint, encoder)
        encoders.append(encoder)
    mixed, before = (encoder.state_dict() for encoder in encoders)
    layers = encoders[0].config.num_hidden_layers
    for name in mixed:
        place = int(name.split(".")[1]) * 2 // layers if name.startswith("layers.") else -1
        if PARTS[place + 1] == part:
            mixed[name] = before[name]
    save_pretrained(directory, mixed, encoders[0].config, load_tokenizer(base.model.checkpoint))
    return str(directory)


def dev_rows(run_dir: Path) -> dict[str, int]:
    """By task, the examples that a run was evaluated on."""
    data = read_run(run_dir).summary["data"]
    return {name.removesuffix("-dev"): of["used"] for name, of in data.items() if name.endswith("-dev")}


def averaged(point: dict[str, Any]) -> dict[str, Any]:
    """A point as one figure for each of its lists."""
    return {n: statistics.fmean(x) if isinstance(x, list) else x for n, x in point.items()}


def pretrained(base: RunConfig, steps: int) -> tuple[str, float]:
    """The encoder after so many steps of the one run, and the loss of masked words in the last of them."""
    run = replace(base, run_dir=f"{base.run_dir}/pretraining")
    run = replace(run, pretrain=replace(run.pretrain, epochs=1, max_steps=steps))
    copy = Path(base.run_dir) / f"encoder-{steps}"
    if not copy.exists():
        commands.train(run, "pretrain")
        partial = copy.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(run.path / "pretrain" / "last", partial)
        partial.rename(copy)
    losses = [step["losses"]["mlm"] for step in read_run(run.path).steps["pretrain"] if step["step"] <= steps]
    return str(copy), statistics.fmean(losses[-LOSSES:])


def dev_metrics(run: RunConfig) -> dict[str, float]:
    """Results of a run of one stage, which is trained unless it has been."""
    if not (run.path.is_dir() and read_run(run.path).summary.get("dev")):
        commands.train(run, run.stages[0])
        commands.evaluate(run)
    return read_run(run.path).metrics("dev")
