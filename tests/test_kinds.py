"""Losses, predictions and metrics of each kind of task, against what is computed by hand or by SciPy."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, kl_divergence

from mtfast.data.sampler import StepPlan
from mtfast.kinds import KINDS, METRICS, predictions_of, task_losses, task_metrics
from mtfast.tasks import METRICS_OF, Task

TASKS = {
    "nli": Task(kind="classification", classes=3, text=("a", "b"), label="label", head="pair"),
    "spam": Task(kind="binary", text="text", label="label"),
    "grade": Task(kind="regression", low=0, high=10, text="text", label="score"),
}
TIES = {
    "some in one": ([1.0, 2.0, 2.0, 3.0, 5.0], [2.0, 1.0, 4.0, 3.0, 9.0]),
    "some in both": ([1.0, 2.0, 2.0, 3.0, 5.0, 5.0], [3.0, 1.0, 1.0, 3.0, 3.0, 0.0]),
    "none": ([0.1, -4.0, 7.0, 2.0], [1.0, 0.0, 2.0, 9.0]),
    "two values": ([0.0, 1.0, 1.0, 0.0, 1.0], [4.0, 5.0, 4.0, 4.0, 5.0]),
}


def rows_of(
    labels: dict[str, Tensor], step_counts: dict[str, int], shares: int = 1
) -> dict[str, SimpleNamespace]:
    """What `task_losses` reads of a micro-batch, one of so many shares of a step with these counts."""
    weights = StepPlan([], step_counts).weights(shares)
    return {
        n: SimpleNamespace(labels=x, weights=torch.full((len(x),), weights[n])) for n, x in labels.items()
    }


def some_rows(counts: dict[str, int]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Outputs of heads and labels, so many of each task."""
    torch.manual_seed(0)
    outputs = {
        name: torch.randn((counts[name], 3) if task.kind == "classification" else (counts[name],))
        for name, task in TASKS.items()
    }
    labels = {
        "nli": torch.randint(3, (counts["nli"],)),
        "spam": torch.rand(counts["spam"]).round(),
        "grade": 10 * torch.rand(counts["grade"]),
    }
    return outputs, labels


def sum_by_hand(name: str, outputs: Tensor, labels: Tensor) -> float:
    """The sum of the examples' losses, example by example."""
    total = 0.0
    for output, label in zip(outputs.tolist(), labels.tolist(), strict=True):
        if name == "nli":
            total += math.log(sum(math.exp(x) for x in output)) - output[label]
        elif name == "spam":
            p = 1 / (1 + math.exp(-output))
            total -= math.log(p if label == 1 else 1 - p)
        else:
            total += (output - label) ** 2
    return total


def test_losses_are_the_means_over_the_steps_examples():
    outputs, labels = some_rows({"nli": 5, "spam": 4, "grade": 3})
    counts = {"nli": 12, "spam": 4, "grade": 7}
    losses = task_losses(TASKS, outputs, rows_of(labels, counts, shares=6))
    assert list(losses) == list(TASKS)
    for name, loss in losses.items():
        expected = sum_by_hand(name, outputs[name], labels[name]) / counts[name] * 6
        assert loss.shape == () and loss.dtype == torch.float32
        assert loss.item() == pytest.approx(expected, rel=1e-5), name


def test_a_step_cut_into_parts_has_the_loss_of_the_whole():
    counts = {"nli": 9, "spam": 6, "grade": 6}
    outputs, labels = some_rows(counts)
    whole = task_losses(TASKS, outputs, rows_of(labels, counts))
    cuts = {"nli": (2, 9), "spam": (6, 6), "grade": (0, 5)}
    parts = []
    for part in range(3):
        bounds = {n: ([0, *cuts[n], counts[n]][part], [0, *cuts[n], counts[n]][part + 1]) for n in TASKS}
        cut = {n: slice(*bound) for n, bound in bounds.items()}
        rows = rows_of({n: labels[n][cut[n]] for n in TASKS}, counts, shares=3)
        parts.append(task_losses(TASKS, {n: outputs[n][cut[n]] for n in TASKS}, rows))
    for name, loss in whole.items():
        # DeepSpeed averages over the parts.
        assert sum(part[name] for part in parts).item() / 3 == pytest.approx(loss.item(), rel=1e-5)


def test_rdrop_adds_the_distance_of_an_examples_two_outputs():
    outputs, labels = some_rows({"nli": 10, "spam": 8, "grade": 6})
    labels = {name: x[0::2].repeat_interleave(2) for name, x in labels.items()}
    counts = {"nli": 12, "spam": 4, "grade": 7}  # of the step, each example once
    twice = {name: 2 * count for name, count in counts.items()}
    alphas = {"nli": 5.0, "spam": 0.5, "grade": 3.0}
    tasks = {name: replace(task, rdrop_alpha=alphas[name]) for name, task in TASKS.items()}
    for shares in (1, 3):
        losses = task_losses(tasks, outputs, rows_of(labels, twice, shares), rdrop=True)
        for name, loss in losses.items():
            x = outputs[name].double()
            distance = 0.0
            for a, b in zip(x[0::2], x[1::2], strict=True):
                if name == "grade":
                    distance += float((a - b) ** 2)
                    continue
                p, q = (Categorical(logits=y) if name == "nli" else Bernoulli(logits=y) for y in (a, b))
                distance += float(kl_divergence(p, q) + kl_divergence(q, p)) / 2
            plain = sum_by_hand(name, outputs[name], labels[name]) / 2
            expected = (plain + alphas[name] / 2 * distance) / counts[name] * shares
            assert distance > 0 and loss.item() == pytest.approx(expected, rel=1e-5), name


def test_a_task_without_examples_has_no_loss_and_a_zero_gradient():
    outputs, labels = some_rows(dict.fromkeys(TASKS, 0))
    weights = {name: torch.ones((), requires_grad=True) for name in TASKS}
    scaled = {name: outputs[name] * weights[name] for name in TASKS}
    losses = task_losses(TASKS, scaled, rows_of(labels, dict.fromkeys(TASKS, 0), shares=4))
    assert all(loss.item() == 0.0 for loss in losses.values())
    torch.stack(list(losses.values())).sum().backward()
    assert all(weight.grad is not None and weight.grad.item() == 0.0 for weight in weights.values())


def test_losses_of_bfloat16_outputs_are_computed_in_float32():
    outputs, labels = some_rows({"nli": 5, "spam": 4, "grade": 3})
    coarse = {name: output.bfloat16() for name, output in outputs.items()}
    rows = rows_of(labels, dict.fromkeys(TASKS, 5))
    found = task_losses(TASKS, coarse, rows)
    expected = task_losses(TASKS, {name: output.float() for name, output in coarse.items()}, rows)
    assert all(loss.dtype == torch.float32 and torch.equal(loss, expected[n]) for n, loss in found.items())


def test_an_example_of_weight_zero_is_seen_by_no_loss():
    outputs, labels = some_rows({"nli": 5, "spam": 4, "grade": 3})
    rows = rows_of(labels, {"nli": 4, "spam": 3, "grade": 2})
    outputs = {name: output.requires_grad_() for name, output in outputs.items()}
    for of_task in rows.values():
        of_task.weights[-1] = 0.0
    losses = task_losses(TASKS, outputs, rows)
    for name, loss in losses.items():
        expected = sum_by_hand(name, outputs[name][:-1], labels[name][:-1]) / (len(labels[name]) - 1)
        assert loss.item() == pytest.approx(expected, rel=1e-5), name
    torch.stack(list(losses.values())).sum().backward()
    assert all((x.grad[-1] == 0).all() and (x.grad[:-1] != 0).any() for x in outputs.values())


def test_predictions_are_what_the_outputs_say():
    classes = torch.tensor([[0.0, 2.0, 1.0], [3.0, -1.0, 2.9], [-3.0, -2.0, -1.0]])
    logits = torch.tensor([-1.0, 0.0, 1e-6, 4.0])
    scores = torch.tensor([-1.5, 3.25, 11.0], dtype=torch.bfloat16)
    found = {
        "nli": predictions_of(TASKS["nli"], classes),
        "spam": predictions_of(TASKS["spam"], logits),
        "grade": predictions_of(TASKS["grade"], scores),
    }
    assert {name: x.tolist() for name, x in found.items()} == {
        "nli": [1, 0, 2],
        "spam": [0, 0, 1, 1],
        "grade": [-1.5, 3.25, 11.0],
    }
    assert [x.dtype for x in found.values()] == [np.int64, np.int64, np.float32]


def test_probabilities_are_those_whose_loss_is_minimised():
    outputs, labels = some_rows({"nli": 40, "spam": 40, "grade": 3})
    for name in ("nli", "spam"):
        kind, given = KINDS[TASKS[name].kind], 5 * outputs[name]
        found = kind.probabilities(given)
        assert found.shape == given.shape and found.dtype == torch.float32
        of_each = found if name == "nli" else torch.stack([1 - found, found], dim=1)
        of_label = of_each.gather(1, labels[name].long()[:, None])
        likelihood = -of_label.double().log().sum().item()
        assert kind.loss(given, labels[name]).sum().item() == pytest.approx(likelihood, rel=1e-4)
        likeliest = found.argmax(1) if name == "nli" else (found > 0.5).long()
        assert torch.equal(kind.predict(given), likeliest)
    assert KINDS["regression"].probabilities is None


@pytest.mark.parametrize(
    ("predictions", "labels", "accuracy", "f1"),
    [
        # Two of the three found are right, two of the four there are found: 2 * (2/3 * 1/2) / (2/3 + 1/2).
        ([1, 1, 1, 0, 0, 0], [1, 1, 0, 1, 1, 0], 3 / 6, 4 / 7),
        ([1, 0, 1], [1, 0, 1], 1.0, 1.0),
        ([0, 1], [1, 0], 0.0, 0.0),
        ([0, 0, 0], [0, 1, 0], 2 / 3, 0.0),
        ([1, 1, 1], [0, 1, 0], 1 / 3, 0.5),
        ([0, 0], [0, 0], 1.0, 0.0),
    ],
)
def test_accuracy_and_f1(predictions, labels, accuracy, f1):
    predictions, labels = np.array(predictions), np.array(labels, np.float32)
    assert METRICS["accuracy"](predictions, labels) == pytest.approx(accuracy)
    assert METRICS["f1"](predictions, labels) == pytest.approx(f1)


@pytest.mark.parametrize("name", TIES)
def test_correlations_are_scipys(name):
    exact = [np.array(values, np.float32).astype(np.float64) for values in TIES[name]]
    x, y = (values.astype(np.float32) for values in exact)
    assert METRICS["pearson"](x, y) == pytest.approx(scipy.stats.pearsonr(*exact).statistic, abs=1e-12)
    assert METRICS["spearman"](x, y) == pytest.approx(scipy.stats.spearmanr(*exact).statistic, abs=1e-12)


def test_ties_share_the_mean_of_their_ranks():
    predictions, labels = np.array([1, 2, 2, 3, 5], np.float32), np.array([2, 1, 4, 3, 9], np.float32)
    # Ranks less their mean: -2 -0.5 -0.5 1 2 and -1 -2 1 0 2; their products add up to 6.5, 9.5 and 10.
    assert METRICS["spearman"](predictions, labels) == pytest.approx(6.5 / math.sqrt(9.5 * 10))


@pytest.mark.parametrize("metric", ["pearson", "spearman"])
@pytest.mark.parametrize("constant", [0.0, 0.1, 2.7])
def test_a_correlation_with_a_constant_counts_as_none(metric, constant):
    constant = np.full(1500, constant, np.float32)
    varied = np.arange(1500, dtype=np.float32)
    for predictions, labels in ((constant, varied), (varied, constant), (constant, constant)):
        assert METRICS[metric](predictions, labels) == 0.0


@pytest.mark.parametrize("metric", ["pearson", "spearman"])
def test_predictions_that_are_not_finite_have_no_finite_correlation(metric):
    found = METRICS[metric](np.array([1.0, np.nan, 2.0], np.float32), np.array([1.0, 2.0, 3.0], np.float32))
    assert math.isnan(found)


def test_every_task_has_its_metrics_and_the_mean_is_of_those_that_count():
    tasks = TASKS | {
        "rank": Task(kind="regression", low=0, high=1, text="text", label="x", metric="spearman")
    }
    tasks |= {"rare": Task(kind="binary", text="text", label="label", metric="f1")}
    x, y = (np.array(values, np.float32) for values in TIES["some in one"])
    predictions = {"nli": np.array([0, 1, 2, 2]), "spam": np.array([1, 0, 0]), "grade": x, "rank": x}
    labels = {"nli": np.array([0, 1, 1, 2]), "spam": np.array([1, 0, 1], np.float32), "grade": y, "rank": y}
    predictions["rare"], labels["rare"] = predictions["spam"], labels["spam"]
    pearson = scipy.stats.pearsonr(x.astype(float), y.astype(float)).statistic
    spearman = scipy.stats.spearmanr(x, y).statistic
    expected = {
        "nli_accuracy": 3 / 4,
        "spam_accuracy": 2 / 3,
        "spam_f1": 2 / 3,
        "grade_pearson": pearson,
        "grade_spearman": spearman,
        "rank_pearson": pearson,
        "rank_spearman": spearman,
        "rare_accuracy": 2 / 3,
        "rare_f1": 2 / 3,
        "mean": (3 / 4 + 2 / 3 + pearson + spearman + 2 / 3) / 5,
    }
    found = task_metrics(tasks, predictions, labels)
    assert list(found) == list(expected) and found == pytest.approx(expected)


def test_every_kind_has_metrics_and_every_metric_is_computed():
    assert set(KINDS) == set(METRICS_OF)
    assert {metric for metrics in METRICS_OF.values() for metric in metrics} == set(METRICS)
