"""What the commands do: prepare the data, run a stage or all of them, evaluate, predict."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mtfast import __version__
from mtfast.data.cache import TokenizedTask
from mtfast.data.records import MissingDataError
from mtfast.data.tasks import Split
from mtfast.machine import device_name, version_of

from . import ranks
from .config import TASK_NAMES, ConfigError, RunConfig, StageName
from .engine import start
from .finetune import Finetune
from .heads import Heads
from .inputs import labels_of, load_reviews, load_task, load_tasks
from .loop import Stage, run_stage
from .losses import task_metrics
from .pretrain import Pretrain
from .progress import say
from .rundir import RunDirectory, write_text
from .sources import Source, build_multitask, find_source, finished_source
from .task_stage import predict_packed

TRAINING_SPLITS: tuple[Split, ...] = ("train", "dev")
PREDICTION_SPLITS: tuple[Split, ...] = ("dev", "test")


def prepare(config: RunConfig) -> None:
    """Read, account for and tokenize all data of the run into its cache."""
    start()
    run = RunDirectory(config)
    source = find_source(config, run)
    accounts: dict[str, Any] = {}
    for task in TASK_NAMES:
        for split in TRAINING_SPLITS:
            _, accounts[f"{task}-{split}"] = load_task(config, source.tokenizer, task, split)
    if "pretrain" in config.stages:
        account = asdict(load_reviews(config, source.tokenizer).account)
        accounts["reviews"] = {**account.pop("rows"), **account}
    run.summarize(data=accounts)


def train(config: RunConfig, name: StageName) -> None:
    """Run one stage, from where the run stands; a finished one is left as it is."""
    start()
    run = RunDirectory(config)
    if run.result(name) is not None:
        say(f"{name}: already finished in {run.stage(name)}")
        return
    _record(config, run)
    stage = _build(config, run, find_source(config, run), name)
    run_stage(stage, config, run)
    stage.engine.close()


def _build(config: RunConfig, run: RunDirectory, source: Source, name: StageName) -> Stage:
    if name == "pretrain":
        return Pretrain(config, load_reviews(config, source.tokenizer), source)
    stage = Heads if name == "heads" else Finetune
    train, dev = (load_tasks(config, source.tokenizer, split) for split in TRAINING_SPLITS)
    return stage(config, train, dev, source)


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
        self.run = RunDirectory(config)
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
    metrics = task_metrics(predictor.predict(dev), labels_of(dev))
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
                table, _ = load_task(config, predictor.source.tokenizer, task, split)
            except MissingDataError as error:
                say(f"{task} {split}: nothing to predict ({error})")
                continue
            values = predictor.predict({task: table})[task]
            stem, column = PREDICTION_FILES[task]
            path = predictor.run.path / "predictions" / f"{stem}-{split}-output.csv"
            if ranks.is_main():
                _write_predictions(path, column, table.ids, values)
            written.append(path)
    say("\n".join(f"wrote {path}" for path in written))
    return written


def _write_predictions(path: Path, column: str, ids: list[str], values: np.ndarray) -> None:
    # The course's own files have these spaces, and paraphrase as 0.0 or 1.0.
    numbers = values.astype(float) if values.dtype != np.int64 or "Paraphrase" in column else values
    rows = "".join(f"{name} , {value} \n" for name, value in zip(ids, numbers.tolist(), strict=True))
    write_text(path, f"id \t {column} \n{rows}")
