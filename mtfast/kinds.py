"""What the kinds of tasks compute: loss, predictions, probabilities and metrics, from one table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mtfast.tasks import METRICS_OF, Task


@dataclass(frozen=True)
class Kind:
    """What a kind of task computes.

    label_dtype: of the labels, NumPy's.
    loss: (outputs [n] or [n, classes] in float32, labels [n]) -> each example's loss [n].
    distance: of two such outputs, [n]: the mean of the two Kullback-Leibler divergences, or the squared
        difference of scores.
    predict: outputs -> predictions [n], int64 classes or float32 scores.
    probabilities: outputs in float32 -> of every class [n, classes], or of the label 1 [n], in float32; None
        where predictions are scores.
    """

    label_dtype: type
    loss: Callable[[Tensor, Tensor], Tensor]
    distance: Callable[[Tensor, Tensor], Tensor]
    predict: Callable[[Tensor], Tensor]
    probabilities: Callable[[Tensor], Tensor] | None


def _cross_entropy(outputs: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(outputs, labels, reduction="none")


def _logistic(outputs: Tensor, labels: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(outputs, labels, reduction="none")


def _squared_error(outputs: Tensor, labels: Tensor) -> Tensor:
    return F.mse_loss(outputs, labels, reduction="none")


def _distance_of_classes(a: Tensor, b: Tensor) -> Tensor:
    log_a, log_b = a.log_softmax(dim=-1), b.log_softmax(dim=-1)
    return ((log_a.exp() - log_b.exp()) * (log_a - log_b)).sum(dim=-1) / 2


def _distance_of_logits(a: Tensor, b: Tensor) -> Tensor:
    return (a.sigmoid() - b.sigmoid()) * (a - b) / 2


KINDS: dict[str, Kind] = {
    "classification": Kind(
        np.int64,
        _cross_entropy,
        _distance_of_classes,
        predict=lambda outputs: outputs.argmax(dim=-1),
        probabilities=lambda outputs: outputs.softmax(dim=-1),
    ),
    "binary": Kind(
        np.float32,
        _logistic,
        _distance_of_logits,
        predict=lambda outputs: (outputs > 0).to(torch.int64),
        probabilities=torch.sigmoid,
    ),
    "regression": Kind(
        np.float32,
        _squared_error,
        _squared_error,
        predict=lambda outputs: outputs.float(),
        probabilities=None,
    ),
}


def task_losses(
    tasks: Mapping[str, Task],
    outputs: Mapping[str, Tensor],
    rows: Mapping[str, Any],
    *,
    rdrop: bool = False,
) -> dict[str, Tensor]:
    """Each task's loss as a scalar in float32: the weighted sum of its examples' losses.

    A task without examples gives zero, with a zero gradient for every parameter.

    Args:
        outputs: of each task's head, [n] or [n, classes].
        rows: the `TaskRows` of each task, with labels and weights [n].
        rdrop: rows 2 i and 2 i + 1 of a task with an `rdrop_alpha` are the same example, and that times the
            distance of their outputs, weighted as one of them, is added.
    """
    losses = {}
    for name, task in tasks.items():
        kind, found, weights = KINDS[task.kind], outputs[name].float(), rows[name].weights
        losses[name] = (kind.loss(found, rows[name].labels) * weights).sum()
        if rdrop and task.rdrop_alpha:
            distances = kind.distance(found[0::2], found[1::2])
            losses[name] = losses[name] + task.rdrop_alpha * (distances * weights[0::2]).sum()
    return losses


def predictions_of(task: Task, outputs: Tensor) -> np.ndarray:
    """Predictions [n] of one task: class (int64), 0 or 1 (int64), or score (float32)."""
    return KINDS[task.kind].predict(outputs).cpu().numpy()


def _accuracy(predictions: np.ndarray, labels: np.ndarray) -> float:
    return float(np.mean(predictions == labels))


def _f1(predictions: np.ndarray, labels: np.ndarray) -> float:
    """2 TP / (2 TP + FP + FN) of the label 1; 0 where no example has it and none is predicted."""
    positive, true = predictions == 1, labels == 1
    both = np.count_nonzero(positive) + np.count_nonzero(true)
    return 2 * np.count_nonzero(positive & true) / both if both else 0.0


def _pearson(predictions: np.ndarray, labels: np.ndarray) -> float:
    """0 where one of the two is constant and the correlation is undefined."""
    x, y = (np.asarray(values, np.float64) for values in (predictions, labels))
    return 0.0 if x.std() == 0 or y.std() == 0 else float(np.corrcoef(x, y)[0, 1])


def _spearman(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Pearson's correlation of the ranks, equal values sharing the mean of theirs."""
    from scipy.stats import rankdata

    return _pearson(rankdata(predictions), rankdata(labels))


METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "accuracy": _accuracy,
    "f1": _f1,
    "pearson": _pearson,
    "spearman": _spearman,
}


def task_metrics(
    tasks: Mapping[str, Task], predictions: Mapping[str, np.ndarray], labels: Mapping[str, np.ndarray]
) -> dict[str, float]:
    """Every metric of every task under `<task>_<metric>`, and `mean`, that of the metrics that count.

    Predictions and labels are [n] by task. Classification has the accuracy; binary tasks have it and F1 of
    the label 1; regression has Pearson's and Spearman's correlation.
    """
    metrics = {
        f"{name}_{metric}": METRICS[metric](predictions[name], labels[name])
        for name, task in tasks.items()
        for metric in METRICS_OF[task.kind]
    }
    counting = [metrics[f"{name}_{task.main_metric}"] for name, task in tasks.items()]
    return metrics | {"mean": sum(counting) / len(counting)}
