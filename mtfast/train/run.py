"""What the commands do: prepare the data, run a stage or all of them, evaluate, predict."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from mtfast import __version__
from mtfast.data.reviews import ReviewSamples
from mtfast.data.rows import MissingDataError
from mtfast.data.tasks import Split
from mtfast.data.tokenized import TokenizedTask
from mtfast.machine import device_name, version_of

from . import ranks
from .config import STAGES, TASK_NAMES, ConfigError, RunConfig, StageName
from .deepspeed_config import deepspeed_config
from .engine import start
from .finetune import Finetune
from .heads import Heads
from .inputs import account_of, labels_of, load_reviews, load_task, load_tasks
from .loop import Stage, run_stage
from .pretrain import Pretrain
from .progress import say
from .rundir import RunDirectory, write_text
from .sources import Source, build_multitask, check_fit, find_source, finished_source
from .task_stage import dev_metrics, predict_packed

TRAINING_SPLITS: tuple[Split, ...] = ("train", "dev")
PREDICTION_SPLITS: tuple[Split, ...] = ("dev", "test")


def prepare(config: RunConfig) -> None:
    """Read, account for and tokenize all data of the run into its cache."""
    run, source = _open(config, config.stages)
    for split in TRAINING_SPLITS:
        _load_tasks(config, run, source, split)
    if "pretrain" in config.stages:
        _load_reviews(config, run, source)


def train(config: RunConfig, name: StageName, same_as: Path | None = None) -> None:
    """Run one stage, from where the run stands; a finished one is left as it is.

    Args:
        same_as: directory of a run in which this stage, once finished, is what it would be here: then it is
            taken over instead.
    """
    run, source = _open(config, (name,))
    if run.result(name) is not None:
        say(f"{name}: already finished in {run.stage(name)}")
        return
    for later in STAGES[STAGES.index(name) + 1 :]:
        if run.has_begun(later):
            raise ConfigError(f"{run.path}: {later} has begun without {name}; choose another --run-dir")
    _record(config, run)
    if same_as is not None and run.take_over(name, same_as):
        say(f"{name}: taken over from {same_as}, where it is the same")
        return
    stage = _build(config, run, source, name)
    run_stage(stage, config, run)
    stage.engine.close()


def _open(config: RunConfig, stages: tuple[StageName, ...]) -> tuple[RunDirectory, Source]:
    """Join the process group; the run's directory and weights. Tells what keeps `stages` from running."""
    start()
    ranks.agree("the version of mtfast or torch", (__version__, torch.__version__))
    for name in stages:
        deepspeed_config(config.engine, config.stage(name), name, ranks.world_size())
    run = RunDirectory(config)
    source = find_source(config, run)
    check_fit(config, source, stages)
    return run, source


def _build(config: RunConfig, run: RunDirectory, source: Source, name: StageName) -> Stage:
    if name == "pretrain":
        return Pretrain(config, _load_reviews(config, run, source), source)
    stage = Heads if name == "heads" else Finetune
    train, dev = (_load_tasks(config, run, source, split) for split in TRAINING_SPLITS)
    return stage(config, train, dev, source)


def _load_tasks(
    config: RunConfig, run: RunDirectory, source: Source, split: Split
) -> dict[str, TokenizedTask]:
    tables = load_tasks(config, source.tokenizer, split)
    run.summarize(data={f"{task}-{split}": account_of(table) for task, table in tables.items()})
    return tables


def _load_reviews(config: RunConfig, run: RunDirectory, source: Source) -> ReviewSamples:
    samples = load_reviews(config, source.tokenizer)
    run.summarize(data={"reviews": account_of(samples)})
    return samples


def _record(config: RunConfig, run: RunDirectory) -> None:
    run.summarize(
        checkpoint=config.model.checkpoint,
        environment={
            "mtfast": __version__,
            "torch": torch.__version__,
            "deepspeed": version_of("deepspeed"),
            "transformers": version_of("transformers"),
            "device": device_name(),
            "ranks": ranks.world_size(),
            "threads": torch.get_num_threads(),
            "precision": config.engine.precision,
            "zero_stage": config.engine.zero_stage,
        },
    )


class Predictor:
    """The run's best weights, ready to predict: fine-tuned if that stage has finished, else trained heads."""

    def __init__(self, config: RunConfig) -> None:
        self.device = start()
        self.config = config
        self.run = RunDirectory(config, create=False)
        self.source = self._source()
        model, _ = build_multitask(config, self.source)
        dtype = torch.bfloat16 if config.engine.precision == "bf16" else torch.float32
        self.model = model.to(self.device, dtype).eval()

    def _source(self) -> Source:
        if self.run.result("finetune") is not None:
            return finished_source(self.config, self.run.stage("finetune") / "best-mean")
        if self.run.result("heads") is not None:
            return find_source(self.config, self.run)
        raise ConfigError(
            f"{self.config.run_dir} holds no finished heads or finetune stage; train one first "
            "(mtfast heads, mtfast finetune or mtfast run)"
        )

    def tables(self, split: Split) -> dict[str, TokenizedTask]:
        return load_tasks(self.config, self.source.tokenizer, split)

    def predict(self, tables: dict[str, TokenizedTask]) -> dict[str, np.ndarray]:
        """Predictions in the tables' order: class (sst), 0 or 1 (quora), score (sts)."""

        def forward(batch: Any, bounds: Any) -> dict[str, torch.Tensor]:
            sequences = {task: rows.sequences for task, rows in batch.tasks.items()}
            return self.model(**batch.encoder_inputs(), sequences=sequences, token_bounds=bounds)

        return predict_packed(forward, tables, self.device)


def evaluate(config: RunConfig) -> dict[str, float]:
    """Dev metrics of the run's best weights, printed and written to summary.json."""
    predictor = Predictor(config)
    dev = predictor.tables("dev")
    metrics = dev_metrics(predictor.predict(dev), labels_of(dev))
    predictor.run.summarize(dev=metrics)
    for name, value in metrics.items():
        say(f"dev {name} {value:.4f}")
    return metrics


PREDICTION_FILES = {
    "sst": ("sst", "Predicted_Sentiment"),
    "quora": ("para", "Predicted_Is_Paraphrase"),
    "sts": ("sts", "Predicted_Similiary"),  # spelled as the course's graders expect it
}


def predict(config: RunConfig) -> list[Path]:
    """Write the CS 224N prediction files of every split that the data has, in input order."""
    predictor = Predictor(config)
    written = []
    for split in PREDICTION_SPLITS:
        for task in TASK_NAMES:
            try:
                table = load_task(config, predictor.source.tokenizer, task, split)
            except MissingDataError as error:
                say(f"{task} {split}: nothing to predict ({error})")
                continue
            predictor.run.summarize(data={f"{task}-{split}": account_of(table)})
            values = predictor.predict({task: table})[task]
            stem, column = PREDICTION_FILES[task]
            path = predictor.run.path / "predictions" / f"{stem}-{split}-output.csv"
            ranks.on_main(_write_predictions, path, column, table.ids, values)
            written.append(path)
    say("\n".join(f"wrote {path}" for path in written))
    return written


def _write_predictions(path: Path, column: str, ids: list[str], values: np.ndarray) -> None:
    # The course's own files have these spaces, and paraphrase as 0.0 or 1.0.
    numbers = values.astype(float) if values.dtype != np.int64 or "Paraphrase" in column else values
    rows = "".join(f"{name} , {value} \n" for name, value in zip(ids, numbers.tolist(), strict=True))
    write_text(path, f"id \t {column} \n{rows}")
