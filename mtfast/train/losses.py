"""The three tasks' losses and dev metrics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def task_losses(outputs: dict[str, Tensor], tasks: Mapping[str, Any], shares: int) -> dict[str, Tensor]:
    """Cross entropy (sst), logistic loss (quora) and squared error (sts), each a scalar in float32.

    A loss is this micro-batch's sum over its examples, divided by the number of examples the whole
    optimizer step has of the task and multiplied by `shares` = ranks x accumulation steps, over which
    DeepSpeed averages: what the optimizer sees is the mean over the step's examples, however it is cut.
    A task without examples gives zero, with a zero gradient for every parameter.

    Args:
        outputs: `sst` [n, 5] logits, `quora` [n] logits, `sts` [n] scores.
        tasks: the `TaskRows` of each task, with labels [n].
    """
    losses = {}
    for task, rows in tasks.items():
        output = outputs[task].float()
        if task == "sst":
            total = F.cross_entropy(output, rows.labels, reduction="sum")
        elif task == "quora":
            total = F.binary_cross_entropy_with_logits(output, rows.labels, reduction="sum")
        else:
            total = F.mse_loss(output, rows.labels, reduction="sum")
        losses[task] = total * (shares / max(rows.step_count, 1))
    return losses


def predictions_of(task: str, output: Tensor) -> np.ndarray:
    """Predictions of one task: class index (sst), 0 or 1 (quora), score (sts)."""
    if task == "sst":
        return output.argmax(dim=-1).cpu().numpy()
    if task == "quora":
        return (output > 0).to(torch.int64).cpu().numpy()
    return output.float().cpu().numpy()


def task_metrics(predictions: dict[str, np.ndarray], labels: dict[str, np.ndarray]) -> dict[str, float]:
    """Accuracy (sst, quora), Pearson correlation (sts), their mean and the CS 224N overall score.

    The overall score is mean(SST accuracy, Quora accuracy, (r + 1) / 2). A correlation of constant
    predictions is undefined and counts as 0.
    """
    sst = float(np.mean(predictions["sst"] == labels["sst"]))
    quora = float(np.mean(predictions["quora"] == labels["quora"]))
    scores, truth = (np.asarray(x, np.float64) for x in (predictions["sts"], labels["sts"]))
    constant = scores.std() == 0 or truth.std() == 0
    sts = 0.0 if constant else float(np.corrcoef(scores, truth)[0, 1])
    return {
        "sst_accuracy": sst,
        "quora_accuracy": quora,
        "sts_pearson": sts,
        "mean": (sst + quora + sts) / 3,
        "cs224n_overall": (sst + quora + (sts + 1) / 2) / 3,
    }
