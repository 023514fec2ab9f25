"""A finished run's best weights: dev metrics and prediction files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from mtfast.config import EngineConfig
from mtfast.data.cs224n import COURSE_TASKS, prediction_file
from mtfast.data.rows import MissingDataError
from mtfast.data.tokens import TokenizedTask
from mtfast.files import write_text
from mtfast.tasks import Split
from mtfast.training.engine import ranks
from mtfast.training.inputs import Inputs
from mtfast.training.run.progress import say
from mtfast.training.run.weights import Weights, build_multitask
from mtfast.training.stages.task_stage import dev_metrics, predict_packed

SPLITS: tuple[Split, ...] = ("dev", "test")


class Predictor:
    """The run's best weights, ready to predict: fine-tuned if that stage has finished, else trained heads."""

    def __init__(self, inputs: Inputs, weights: Weights, engine: EngineConfig, device: torch.device) -> None:
        self.inputs, self.device = inputs, device
        dtype = torch.bfloat16 if engine.precision == "bf16" else torch.float32
        self.model = build_multitask(weights, inputs.tasks)[0].to(device, dtype).eval()

    def predict(self, tables: Mapping[str, TokenizedTask]) -> dict[str, np.ndarray]:
        """Predictions in the tables' order: class (int64), 0 or 1 (int64), or score (float32)."""

        return predict_packed(lambda batch: self.model(**batch.model_inputs()), tables, self.device)

    def evaluate(self) -> dict[str, float]:
        """Dev metrics, printed and written to summary.json."""
        dev = self.inputs.load("dev")
        metrics = dev_metrics(dev, self.predict(dev))
        self.inputs.run.summarize(dev=metrics)
        for name, value in metrics.items():
            say(f"dev {name} {value:.4f}")
        return metrics

    def write_predictions(self) -> list[Path]:
        """Write the prediction files of every split that the data has, in input order: the course's files for
        its tasks, tab-separated ids and predictions for others."""
        written = []
        for split in SPLITS:
            for name, task in self.inputs.tasks.items():
                if split == "test" and task.splits.get("test", "test") == task.splits.get("dev"):
                    say(f"{name} test: nothing to predict (it is the dev split)")
                    continue
                try:
                    table = self.inputs.load_task(name, split)
                except MissingDataError as error:
                    say(f"{name} {split}: nothing to predict ({error})")
                    continue
                values = self.predict({name: table})[name]
                file, text = _prediction_file(name, split, table, values)
                path = self.inputs.run.path / "predictions" / file
                ranks.on_main(write_text, path, text)
                written.append(path)
        say("\n".join(f"wrote {path}" for path in written))
        return written


def _prediction_file(name: str, split: Split, table: TokenizedTask, values: np.ndarray) -> tuple[str, str]:
    if name in COURSE_TASKS:
        return prediction_file(name, split, table.ids, values)
    classes = table.task.classes
    shown = [classes[value] for value in values] if isinstance(classes, tuple) else values.tolist()
    rows = "".join(f"{row}\t{value}\n" for row, value in zip(table.ids, shown, strict=True))
    return f"{name}-{split}.tsv", f"id\tprediction\n{rows}"
