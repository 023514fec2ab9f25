"""A trained model in Python: `load` a run or a checkpoint, then `predict` and `encode`."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

import numpy as np
import torch

from mtfast.config import CONFIG_FILE, ConfigError, DataConfig
from mtfast.config_file import read_config_file
from mtfast.data.packing import PackedBatch
from mtfast.data.rows import RowAccount, listed, shown
from mtfast.data.tables import TaskTable
from mtfast.data.tokens import tokenize_task
from mtfast.kinds import KINDS, predictions_of
from mtfast.models.bert import PackedBert
from mtfast.models.checkpoint import (
    CheckpointError,
    load_bert_config,
    load_pretrained,
    load_tasks,
    load_tokenizer,
)
from mtfast.models.multitask import MultiTaskModel
from mtfast.models.sentence_files import max_length_of
from mtfast.recipes import RECIPES
from mtfast.tasks import MlpConfig, Task
from mtfast.training.prediction import Forward, in_order, packed_outputs
from mtfast.training.run.directory import read_result
from mtfast.training.run.weights import (
    Weights,
    best_files,
    check_files,
    check_fit,
    new_multitask,
    read_weights,
)

Precision = Literal["bf16", "fp32"]
Texts = str | tuple[str, str] | Iterable[str] | Iterable[Sequence[str]]

_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_TEXT = Task(kind="regression", low=0, high=1, text="text", label="label")  # a text that is by itself


@dataclass(frozen=True, eq=False)
class Predictions:
    """What a model says of n examples, in their order.

    labels: [n], int64 classes, or their names where the task has names for them; int64 0 or 1 (binary); None
        for regression.
    probabilities: float32, of each class [n, classes], or of the label 1 [n] (binary); None for regression.
    scores: float32 [n] for regression, else None.

        found = model.predict("sst", ["A dull film .", "Great !"])
        for label, of_each_class in zip(found.labels, found.probabilities): ...
    """

    labels: np.ndarray | None
    probabilities: np.ndarray | None
    scores: np.ndarray | None

    def __len__(self) -> int:
        found = self.scores if self.labels is None else self.labels
        assert found is not None
        return len(found)


class Model:
    """A trained model that predicts; `load` makes it.

    tasks: by name, empty for a checkpoint without task heads.
    """

    tasks: Mapping[str, Task]

    def __init__(
        self,
        source: str,
        model: MultiTaskModel | PackedBert,
        tokenizer: Any,
        max_length: int,
        device: torch.device,
    ) -> None:
        """model: on `device`, in evaluation mode. source: what messages call it."""
        self._source, self._device = source, device
        self._tokenizer, self._max_length = tokenizer, max_length
        self._whole = model if isinstance(model, MultiTaskModel) else None
        self._encoder = model.encoder if isinstance(model, MultiTaskModel) else model
        self.tasks = self._whole.heads.tasks if self._whole else {}

    def declared(self, task: str) -> Task:
        """One of `tasks`. Raises ConfigError if there is no such task, or the model has no task heads."""
        if not self.tasks:
            raise ConfigError(
                f"{self._source} has no task heads, so that it can encode but not predict; load a run whose "
                "heads or finetune stage has finished"
            )
        if task not in self.tasks:
            raise ConfigError(f"{self._source} has no task {task!r}; its tasks are {', '.join(self.tasks)}")
        return self.tasks[task]

    def predict(self, task: str, texts: Texts) -> Predictions:
        """What the model says of texts, or of pairs of texts where the task is on pairs.

            model.predict("sst", "A dull film .").labels[0]
            model.predict("quora", [("How old is Rome ?", "What is the age of Rome ?")]).probabilities[0]

        Args:
            task: one of `tasks`.
            texts: one text, or any number of them; for a task on pairs one pair, a tuple of two texts, or any
                number of pairs. What is longer than the model was trained on is cut.

        Raises:
            ConfigError: there is no such task, or the model has no task heads.
            ValueError: an item of `texts` is not what the task takes; the message has its index.

        The same texts give the same bits; among other texts a text may come out different by rounding.
        """
        declared, whole = self.declared(task), self._whole
        assert whole is not None
        width = () if declared.outputs == 1 else (declared.outputs,)
        columns = _columns(texts, task, len(declared.texts))

        def forward(batch: PackedBatch) -> Mapping[str, torch.Tensor]:
            return whole(**batch.model_inputs())

        found = self._run(f"predicting {task}", task, declared, columns, forward, width)
        outputs = torch.from_numpy(found)
        values, probabilities = predictions_of(declared, outputs), KINDS[declared.kind].probabilities
        if probabilities is None:
            return Predictions(None, None, values)
        classes = declared.classes
        labels = np.array(classes)[values] if isinstance(classes, tuple) else values
        return Predictions(labels, probabilities(outputs).numpy(), None)

    def encode(self, texts: str | Iterable[str]) -> np.ndarray:
        """The [CLS] vectors of the encoder's last layer, float32 [n, hidden].

            a, b = model.encode(["A dull film .", "A film that bores ."])
            similarity = a @ b / np.linalg.norm(a) / np.linalg.norm(b)

        Args:
            texts: one text, or any number of them, each encoded by itself.

        Raises:
            ValueError: an item of `texts` is no text; the message has its index.
        """
        encoder, columns = self._encoder, _columns(texts, "encode", 1)

        def forward(batch: PackedBatch) -> dict[str, torch.Tensor]:
            return {"text": encoder(**batch.encoder_inputs(), cls_only=True)}

        return self._run("encoding", "text", _TEXT, columns, forward, (encoder.config.hidden_size,))

    def _run(
        self,
        what: str,
        name: str,
        task: Task,
        columns: list[list[str]],
        forward: Forward,
        width: tuple[int, ...],
    ) -> np.ndarray:
        """What `forward` gives for the task's examples, float32 [n, *width], from a list of n texts for each
        of its columns. `what` is the name under which progress is shown."""
        count = len(columns[0])
        ids = [str(number) for number in range(count)]
        texts = TaskTable(name, task, "test", ids, columns, None, RowAccount(count, count))
        table = tokenize_task(texts, self._tokenizer, max_length=self._max_length)
        parts = [
            {name: (rows, outputs.numpy()) for name, (rows, outputs) in part.items()}
            for part in packed_outputs(what, forward, {name: table}, self._device)
        ]
        return in_order(parts, name, count).reshape(count, *width)


def load(
    source: str | os.PathLike[str],
    *,
    device: str | torch.device | None = None,
    precision: Precision | None = None,
) -> Model:
    """The trained model of a run or of a checkpoint.

        model = mtfast.load("runs/local")
        model.predict("sst", "A dull film .").labels

    Of a run its best weights: fine-tuned if that stage has finished, else the newest encoder with trained
    heads. Nothing is written or locked, so a copy of a run does, and one that is read-only; torch's random
    state stays as it was.

    Args:
        source: a run's directory, or a checkpoint: a directory in Hugging Face's layout, with mtfast's heads
            beside it or without, or a Hugging Face name.
        device: by default a GPU if there is one.
        precision: of weights and activations, by default the run's; float32 for a checkpoint.

    Raises:
        ConfigError: the run has no trained heads, or its configuration cannot be read.
        CheckpointError: source is neither, or one of its files cannot be used.
    """
    if precision is not None and precision not in _DTYPES:
        raise ConfigError(f"precision is {precision!r}; it must be {' or '.join(_DTYPES)}")
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    path = Path(source).expanduser()
    tasks: Mapping[str, Task]
    if _is_checkpoint(path) or not path.is_dir():
        name, wanted = os.path.expanduser(os.fspath(source)), precision or "fp32"
        bert, max_length = load_bert_config(name), max_length_of(name)
        tasks, mlp = load_tasks(name) or ({}, MlpConfig())
        weights = Weights(bert, load_tokenizer(name), name, None, mlp, seed=0)
    elif (path / CONFIG_FILE).is_file():
        name, config = str(path), read_config_file(path / CONFIG_FILE, RECIPES).config
        tasks, max_length = config.tasks, config.data.max_length
        wanted = precision or config.engine.precision
        files = best_files(config.model, path, lambda stage: read_result(path / stage) is not None)
        check_files(files, path)
        try:
            weights = read_weights(files, config.model, config.seed)
        except CheckpointError as error:  # the encoder may lie elsewhere, and be gone
            raise CheckpointError(f"the weights of {path}: {error}") from error
    else:
        _refuse(path)
    joint = any(task.pair_input == "joint" for task in tasks.values())
    check_fit(weights, name, DataConfig(max_length=max_length), pretrain=False, joint=joint)
    with torch.random.fork_rng(devices=[]):
        model = _loaded(weights, tasks, name)
    model.to(device, _DTYPES[wanted]).eval().requires_grad_(False)
    return Model(name, model, weights.tokenizer, max_length, torch.device(device))


def _loaded(weights: Weights, tasks: Mapping[str, Task], source: str) -> MultiTaskModel | PackedBert:
    """The encoder with the heads of all tasks, or alone where there are none."""
    if not tasks:
        encoder = PackedBert(weights.config)
        load_pretrained(source, encoder)
        return encoder
    model, report = new_multitask(weights, tasks)
    if report.initialised:
        raise CheckpointError(
            f"{weights.heads or source} lacks weights of the task heads: {listed(report.initialised, 3)}; it "
            "is not whole, or of other tasks"
        )
    return model


def _is_checkpoint(path: Path) -> bool:
    return any((path / name).is_file() for name in ("config.json", "modules.json"))


def _runs_in(path: Path) -> list[Path]:
    """The runs of an experiment."""
    return [child for child in sorted(path.iterdir()) if (child / CONFIG_FILE).is_file()]


def _refuse(path: Path) -> NoReturn:
    """Say what is wrong with a directory that is neither a run's nor a checkpoint's, and what to load."""
    if runs := _runs_in(path):
        raise CheckpointError(f"{path} holds several runs; load one of them, {listed(runs)}")
    what = (
        f"is neither a run's directory, which holds {CONFIG_FILE}, nor a checkpoint, which holds config.json"
    )
    if (path / "mtfast.json").is_file():
        what = "holds task heads without their encoder"
    around = [parent for parent in path.absolute().parents[:2] if (parent / CONFIG_FILE).is_file()]
    raise CheckpointError(
        f"{path} {what}{f'; load the run that it is part of, {around[0]}' if around else ''}"
    )


def _columns(texts: Any, what: str, wanted: int) -> list[list[str]]:
    """The texts of one or two columns, as lists. Raises ValueError for what is something else."""
    if wanted == 1:
        items = [texts] if isinstance(texts, str) else _items(texts, "a text, or texts")
        return [[_text(item, f"texts[{index}]", f"{what} takes texts") for index, item in enumerate(items)]]
    one = isinstance(texts, tuple) and len(texts) == 2 and all(isinstance(text, str) for text in texts)
    pairs = [texts] if one else _items(texts, "a pair (first, second), or pairs")
    right = f"{what} takes pairs of texts, each a tuple (first, second)"
    columns: list[list[str]] = [[], []]
    for index, pair in enumerate(pairs):
        if not isinstance(pair, tuple | list | np.ndarray) or len(pair) != 2:
            raise ValueError(f"texts[{index}] is {shown(pair)}, not a pair; {right}")
        for number, text in enumerate(pair):
            columns[number].append(_text(text, f"texts[{index}][{number}]", right))
    return columns


def _items(texts: Any, wanted: str) -> list[Any]:
    if isinstance(texts, str) or not isinstance(texts, Iterable):
        raise ValueError(f"texts is {shown(texts)}; it should be {wanted}")
    return list(texts)


def _text(text: Any, where: str, right: str) -> str:
    """The text as the readers of training data give it: stripped."""
    if not isinstance(text, str):
        raise ValueError(f"{where} is {shown(text)}, not a text; {right}")
    if not text.strip():
        raise ValueError(f"{where} is {shown(text)}, a text without a word; leave it out")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where} holds {text[error.start]!r}, half of a surrogate pair, which is no character; remove it"
        ) from None
    return text.strip()
