"""What a task is: its kind, its columns and data, its head, its part in the loss, its metric."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, get_type_hints

from mtfast.errors import shown
from mtfast.hints import PATH_WANTED, fits, in_words, is_path

Split = Literal["train", "dev", "test"]
SINGLE_HEADS = ("linear", "lstm")
METRICS_OF = {  # by kind, first the one that counts unless the task says otherwise
    "classification": ("accuracy",),
    "binary": ("accuracy", "f1"),
    "regression": ("pearson", "spearman"),
}
RESERVED_NAMES = ("mean", "reviews")  # of the tasks' mean metric and of the pre-training data


@dataclass(frozen=True)
class Task:
    """One task of a run. Its name is the key it is declared under, in a configuration file or in Python:
    `tasks={"imdb": Task(kind="binary", text="text", label="label", source="data/imdb")}`."""

    kind: Literal["classification", "binary", "regression"]
    """One of several classes (cross entropy), yes or no (logistic loss), or a score (squared error)."""
    text: str | tuple[str, ...]
    """The column with the text; two columns for a task on pairs."""
    label: str
    """The column with the label."""
    classes: int | tuple[str, ...] | None = None
    """For classification: how many classes there are, labels counting from 0, or what the data calls them."""
    low: float | None = None
    """For regression: the lowest score there is."""
    high: float | None = None
    """For regression: the highest score there is."""
    aliases: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Other names that a column may go by in the data."""
    source: str | None = None
    """Where the data is: a directory, a Hugging Face data set, or files with {split} in their name; by
    default the directory `data.tasks` with the CS 224N files."""
    splits: dict[Split, str] = field(default_factory=dict)
    """What the source calls the splits train, dev and test, where it has other names for them."""
    max_rows: int | None = None
    """Use at most so many rows of train and of dev, evenly spaced; test is whole."""
    head: str = "linear"
    """`linear` or `lstm` for one sequence; for pairs the name of an MLP, shared by the tasks that name it."""
    pair_input: Literal["separate", "joint"] = "separate"
    """Encode a pair's texts separately, or as one sequence `[CLS] a [SEP] b [SEP]`."""
    weight: float = 1.0
    """Weight of the task's loss in the sum."""
    rdrop_alpha: float = 0.0
    """R-Drop in fine-tuning (Liang et al. 2021, https://arxiv.org/abs/2106.14448): every example goes through
    the model twice, with other dropout, and this times half the distance of its two outputs is added to the
    mean of their losses. 0 does without, in half the time."""
    metric: str | None = None
    """The dev metric that counts: accuracy; accuracy or f1 (binary); pearson or spearman (regression)."""
    title: str | None = None
    """What reports and plots call the task; by default its name."""

    @property
    def texts(self) -> tuple[str, ...]:
        """The columns with its texts, one or two."""
        return (self.text,) if isinstance(self.text, str) else self.text

    @property
    def sequences_per_example(self) -> int:
        """2 where the texts of a pair are encoded separately, else 1."""
        return 1 if self.pair_input == "joint" else len(self.texts)

    @property
    def outputs(self) -> int:
        """Numbers that its head gives for an example."""
        if self.kind != "classification" or self.classes is None:
            return 1
        return self.classes if isinstance(self.classes, int) else len(self.classes)

    @property
    def main_metric(self) -> str:
        """The dev metric that counts."""
        return self.metric or METRICS_OF[self.kind][0]

    @property
    def has_mlp(self) -> bool:
        """Whether its head is an MLP, which other tasks may share."""
        return self.head not in SINGLE_HEADS

    def names_of(self, column: str) -> tuple[str, ...]:
        """What a column of the task may be called in the data, the name to be preferred first."""
        return (column, *self.aliases.get(column, ()))


@dataclass(frozen=True)
class MlpConfig:
    width: int = 768
    """Width of the hidden layer of each MLP that a task names as its head, and of each LSTM head."""
    activation: Literal["relu", "gelu", "tanh"] = "relu"
    """Activation of that layer."""


class Fault(NamedTuple):
    """Why a declaration cannot be meant: the field at fault, and what is wrong with it and would be right."""

    field: str
    text: str


def fault_of(name: str, task: Task) -> Fault | None:
    """What is wrong with a task; the text goes on from the task's dotted name."""
    if not re.fullmatch("[A-Za-z][A-Za-z0-9_]*", name) or name in RESERVED_NAMES:
        return Fault(
            "",
            f" is no name for a task: it is letters, digits and underscores, begins with a letter and is not "
            f"{' or '.join(RESERVED_NAMES)}",
        )
    for field_name, hint in get_type_hints(Task).items():
        if not fits(value := getattr(task, field_name), hint):
            return Fault(field_name, f".{field_name} is {shown(value)}; it must be {in_words(hint)}")
    faults = itertools.chain(_faults_of_data(task), _faults_of_kind(task), _faults_of_head(task))
    return next((Fault(field_name, f".{field_name} {text}") for field_name, text in faults), None)


def _faults_of_data(task: Task) -> Iterator[tuple[str, str]]:
    columns = (*task.texts, task.label)
    if not 1 <= len(task.texts) <= 2 or len(set(columns)) < len(columns):
        wanted = "it must name one column, or two for pairs, and none of them twice"
        yield "text", f"is {shown(task.text)}; {wanted}"
    if task.source is not None and not is_path(task.source):
        yield "source", f"is {shown(task.source)}; it must {PATH_WANTED}"
    if task.max_rows is not None and task.max_rows < 1:
        yield "max_rows", f"is {task.max_rows}; it must be at least 1"


def _faults_of_kind(task: Task) -> Iterator[tuple[str, str]]:
    if task.kind == "classification":
        names = task.classes if isinstance(task.classes, tuple) else ()
        if task.classes is None or task.outputs < 2 or len(set(names)) < len(names):
            yield (
                "classes",
                f"is {shown(task.classes)}; it must be a number of at least 2, or as many different names",
            )
    elif task.classes is not None:
        what = f"is {shown(task.classes)}, but only kind classification has classes"
        yield "classes", f"{what}, this is {task.kind}"
    if task.kind == "regression":
        for name in ("low", "high"):
            if (bound := getattr(task, name)) is None:
                yield name, "is not set; regression needs low and high, the lowest and the highest score"
            if not math.isfinite(bound):
                yield name, f"is {bound}; it must be finite"
        if not task.low < task.high:  # type: ignore[operator]
            yield "high", f"is {task.high} and low is {task.low}; high must be above low"
    else:
        for name in ("low", "high"):
            if getattr(task, name) is not None:
                what = f"is {getattr(task, name)}, but only kind regression has scores"
                yield name, f"{what}, this is {task.kind}"
    for name in ("weight", "rdrop_alpha"):
        if not 0.0 <= (value := getattr(task, name)) < math.inf:
            yield name, f"is {value}; it must be finite and not negative"
    if task.metric is not None and task.metric not in METRICS_OF[task.kind]:
        yield "metric", f"is {shown(task.metric)}; kind {task.kind} has {' and '.join(METRICS_OF[task.kind])}"


def _faults_of_head(task: Task) -> Iterator[tuple[str, str]]:
    if len(task.texts) == 1:
        if task.pair_input == "joint":
            yield "pair_input", "is joint, but the task has one text; joint is for pairs"
        if task.has_mlp:
            yield "head", f"is {shown(task.head)}; a task with one text has {' or '.join(SINGLE_HEADS)}"
    elif task.sequences_per_example == 2 and not task.has_mlp:
        yield (
            "head",
            f"is {task.head}, which takes one sequence; name an MLP for the pair (head: pair), or set "
            "pair_input: joint",
        )
    if not re.fullmatch("[A-Za-z][A-Za-z0-9_]*", task.head):
        wanted = "a name is letters, digits and underscores and begins with a letter"
        yield "head", f"is {shown(task.head)}; {wanted}"


def fault_of_mlps(tasks: Mapping[str, Task]) -> Fault | None:
    """What is wrong with tasks that share an MLP: the field's dotted name, and the whole text."""
    first: dict[str, str] = {}
    for name, task in tasks.items():
        if not task.has_mlp:
            continue
        other = first.setdefault(task.head, name)
        if task.pair_input != tasks[other].pair_input:
            return Fault(
                f"tasks.{name}.pair_input",
                f"tasks.{name}.pair_input is {task.pair_input}, but it shares the head {task.head!r} with "
                f"{other}, whose pairs are {tasks[other].pair_input}; let them agree, or name another head "
                "for one",
            )
    return None
