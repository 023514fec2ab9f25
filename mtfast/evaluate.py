"""What a finished run's best weights make of data: its own, as metrics and prediction files, and any file."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.numpy import save

from mtfast.config import ConfigError, EngineConfig
from mtfast.data.cs224n import COURSE_TASKS, prediction_file
from mtfast.data.lines import read_lines
from mtfast.data.records import FILE_SUFFIXES, read_file
from mtfast.data.rows import DataError, MissingDataError, Records, listed
from mtfast.data.tables import table_of
from mtfast.data.tokens import TokenizedTask
from mtfast.files import write_bytes, write_text
from mtfast.predict import Model, Predictions
from mtfast.run_record import outcomes_file
from mtfast.tasks import Split, Task
from mtfast.training.engine import ranks
from mtfast.training.inputs import Inputs
from mtfast.training.run.progress import say
from mtfast.training.run.weights import Weights, build_multitask
from mtfast.training.stages.task_stage import labelled_metrics, predict_packed

SPLITS: tuple[Split, ...] = ("dev", "test")
OVER_TASKS = ("mean", "cs224n_overall")  # metrics of all tasks together


class Evaluation:
    """A run's best weights on the run's data, on all ranks."""

    def __init__(self, inputs: Inputs, weights: Weights, engine: EngineConfig, device: torch.device) -> None:
        self.inputs, self.device = inputs, device
        dtype = torch.bfloat16 if engine.precision == "bf16" else torch.float32
        self.model = build_multitask(weights, inputs.tasks)[0].to(device, dtype).eval()

    def evaluate(self, split: Literal["dev", "test"] = "dev") -> dict[str, float]:
        """Metrics of a split, printed and written to summary.json under its name; each example's prediction
        and label go to `outcomes/`.

        Tasks whose test data has no labels are named and left out; what is computed over tasks is then left
        out too, since over fewer it would be another figure.

        Raises:
            DataError: no task has labels.
        """
        tables = self.inputs.load("dev") if split == "dev" else self._labelled_test()
        predictions = self._predict(split, tables)
        metrics = labelled_metrics(tables, predictions)
        if set(tables) != set(self.inputs.tasks):
            metrics = {name: value for name, value in metrics.items() if name not in OVER_TASKS}
        outcomes = {f"{name}.predictions": values for name, values in predictions.items()}
        outcomes |= {f"{name}.labels": np.asarray(table.labels) for name, table in tables.items()}
        ranks.on_main(write_bytes, outcomes_file(self.inputs.run.path, split), save(outcomes))
        self.inputs.run.summarize(**{split: metrics})
        for name, value in metrics.items():
            say(f"{split} {name} {value:.4f}")
        return metrics

    def write_predictions(self) -> list[Path]:
        """Write the prediction files of every split that the data has, in input order: the course's files for
        its tasks, tab-separated ids and predictions for others."""
        written = []
        for split in SPLITS:
            for name in self.inputs.tasks:
                if (table := self._own(name, split)) is None:
                    continue
                values = self._predict(f"{name} {split}", {name: table})[name]
                file, text = _prediction_file(name, split, table, values)
                path = self.inputs.run.path / "predictions" / file
                ranks.on_main(write_text, path, text)
                written.append(path)
        say("\n".join(f"wrote {path}" for path in written))
        return written

    def _predict(self, what: str, tables: Mapping[str, TokenizedTask]) -> dict[str, np.ndarray]:
        return predict_packed(what, lambda batch: self.model(**batch.model_inputs()), tables, self.device)

    def _own(self, name: str, split: Split) -> TokenizedTask | None:
        """A task's examples of a split; None, and that is said, where it has none of its own."""
        splits = self.inputs.tasks[name].splits
        if split == "test" and splits.get("test", "test") == splits.get("dev"):
            say(f"{name} test: left out (it is the dev split)")
            return None
        try:
            return self.inputs.load_task(name, split)
        except MissingDataError as error:
            say(f"{name} {split}: left out ({error})")
            return None

    def _labelled_test(self) -> dict[str, TokenizedTask]:
        tables = {}
        for name in self.inputs.tasks:
            table = self._own(name, "test")
            if table is not None and table.labels is None:
                say(f"{name} test: no labels")
            elif table is not None:
                tables[name] = table
        if not tables:
            raise DataError(
                f"no test data with labels: {', '.join(self.inputs.tasks)} can be evaluated on dev alone"
            )
        return tables


def predict_file(model: Model, task: str | None, input: str, output: str, *, strict: bool) -> None:
    """Predictions for the rows of a file, in its order, those of `Model.predict`.

    They are written as a table with the column `id`, then `label` and `probability` (binary) or `label` and
    `probability_<class>` for each class, or `score` (regression). Rows that cannot be used are named on
    standard error.

    Args:
        task: None for the model's only one.
        input: Parquet, CSV, TSV or JSON lines with the task's columns; a `.txt` file, or `-` for standard
            input, with a text on each line, for pairs two with a tab between them.
        output: a file, comma-separated if it is a `.csv`, else tab-separated; `-` for standard output.
        strict: raise for the first row that cannot be used.

    Raises:
        ConfigError: there is no such task, or none is named and the model has several; output is no file that
            can be written.
        DataError: the input is missing, of another kind, lacks a column, or has no row that can be used.
    """
    name = _task_of(model, task)
    _refuse_output(input, output)
    declared = model.declared(name)
    table = table_of(name, declared, _read(input, declared), strict=strict)
    if table.account.skipped or table.account.notes:
        said = table.account.summary(at_most=len(table.account.skipped))
        print(f"{input}: {said}", file=sys.stderr)
    texts: Any = table.texts[0] if len(table.texts) == 1 else list(zip(*table.texts, strict=True))
    found = model.predict(name, texts)
    columns = {"id": table.ids, **_columns(declared, found)}
    file = io.StringIO()
    writer = csv.writer(file, delimiter="," if output.lower().endswith(".csv") else "\t", lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(zip(*columns.values(), strict=True))
    if output == "-":
        sys.stdout.write(file.getvalue())
    else:
        write_text(Path(output).expanduser(), file.getvalue())
        say(f"wrote {output}")


def _task_of(model: Model, task: str | None) -> str:
    if task is None and len(model.tasks) > 1:
        raise ConfigError(f"name the task to predict, one of {', '.join(model.tasks)}")
    return next(iter(model.tasks), "") if task is None else task


def _refuse_output(input: str, output: str) -> None:
    there, read = Path(output).expanduser(), Path(input).expanduser()
    if output == "-":
        return
    if there.is_dir():
        raise ConfigError(f"the output {output} is a directory; name a file in it")
    if input != "-" and there.exists() and read.exists() and there.samefile(read):
        raise ConfigError(f"the output {output} is the input; name another file")


def _read(input: str, task: Task) -> Records:
    if input == "-":
        return read_lines(sys.stdin.buffer.read(), "standard input", task.texts)
    path = Path(input).expanduser()
    suffix = path.suffix.lower()
    if suffix in FILE_SUFFIXES or not path.exists():
        return read_file(path)
    if suffix == ".txt" and path.is_file():
        return read_lines(path.read_bytes(), str(path), task.texts)
    known = listed((*FILE_SUFFIXES, ".txt"))
    raise DataError(f"{path}: unknown kind of file; known are {known}, and - for text on standard input")


def _columns(task: Task, found: Predictions) -> dict[str, list[Any]]:
    """The columns of a table of predictions. Python's floats are written so that they read back exactly."""
    if found.scores is not None:
        return {"score": found.scores.tolist()}
    assert found.labels is not None and found.probabilities is not None
    columns = {"label": found.labels.tolist()}
    if found.probabilities.ndim == 1:
        return columns | {"probability": found.probabilities.tolist()}
    classes = task.classes if isinstance(task.classes, tuple) else range(task.outputs)
    by_class = zip(classes, found.probabilities.T.tolist(), strict=True)
    return columns | {f"probability_{which}": values for which, values in by_class}


def _prediction_file(name: str, split: Split, table: TokenizedTask, values: np.ndarray) -> tuple[str, str]:
    if name in COURSE_TASKS:
        return prediction_file(name, split, table.ids, values)
    classes = table.task.classes
    shown = [classes[value] for value in values] if isinstance(classes, tuple) else values.tolist()
    rows = "".join(f"{row}\t{value}\n" for row, value in zip(table.ids, shown, strict=True))
    return f"{name}-{split}.tsv", f"id\tprediction\n{rows}"
