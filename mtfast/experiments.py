"""The paper's two experiments: comparisons of runs that differ in one thing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from mtfast.config import ConfigError, RunConfig
from mtfast.recipes import RECIPES, paper


def exp1() -> RunConfig:
    """The paper's Exp-I: the recipe without and with further pre-training."""
    return replace(paper(), run_dir="runs/exp1")


def exp2() -> RunConfig:
    """The paper's Exp-II: the recipe with the linear and with the LSTM sentiment head."""
    return replace(paper(), run_dir="runs/exp2")


# Recipes and experiments, by the names that the command line and configuration files know them by.
ALL_RECIPES: dict[str, Callable[[], RunConfig]] = RECIPES | {"exp1": exp1, "exp2": exp2}


def _figures(sst: float, quora: float, sts: float) -> dict[str, float]:
    return {"sst_accuracy": sst, "quora_accuracy": quora, "sts_pearson": sts, "mean": (sst + quora + sts) / 3}


# On the test sets, by what was trained.
PAPER_FIGURES = {
    "without pre-training": _figures(0.480, 0.851, 0.623),
    "with pre-training": _figures(0.549, 0.858, 0.631),
    "LSTM head": _figures(0.500, 0.859, 0.656),
}


@dataclass(frozen=True)
class Experiment:
    """A comparison of runs that differ in one thing.

    variants: the runs by name, each with what it changes, given the config.
    figures: the paper's, by variant.
    """

    title: str
    variants: Callable[[RunConfig], dict[str, dict[str, Any]]]
    figures: dict[str, dict[str, float]]


def _with_and_without_pretraining(config: RunConfig) -> dict[str, dict[str, Any]]:
    without = tuple(stage for stage in config.stages if stage != "pretrain")
    return {"without pre-training": {"stages": without}, "with pre-training": {}}


def _sentiment_heads(config: RunConfig) -> dict[str, dict[str, Any]]:
    if "sst" not in config.tasks:
        raise ConfigError("exp2 compares two heads of the task sst, which is not among the tasks", "tasks")
    return {
        f"{name} head": {"tasks": config.tasks | {"sst": replace(config.tasks["sst"], head=head)}}
        for name, head in (("linear", "linear"), ("LSTM", "lstm"))
    }


EXPERIMENTS = {
    "exp1": Experiment(
        "Exp-I: the flow without and with further pre-training",
        _with_and_without_pretraining,
        {name: PAPER_FIGURES[name] for name in ("without pre-training", "with pre-training")},
    ),
    "exp2": Experiment(
        "Exp-II: the simple and the LSTM sentiment head",
        _sentiment_heads,
        {"linear head": PAPER_FIGURES["with pre-training"], "LSTM head": PAPER_FIGURES["LSTM head"]},
    ),
}


def runs_of(recipe: str, config: RunConfig) -> dict[str, RunConfig]:
    """The runs of a recipe by name: the one, or those of an experiment, each in a directory of its own below
    the config's.

    The runs of an experiment share the cache of tokenized data.
    """
    if recipe not in EXPERIMENTS:
        return {"": config}
    data = replace(config.data, cache_dir=config.data.cache_dir or str(config.path / "cache"))
    runs = {}
    for name, changes in EXPERIMENTS[recipe].variants(config).items():
        directory = name.replace("pre-", "pre").replace(" ", "-").lower()  # without-pretraining, lstm-head
        runs[name] = replace(config, run_dir=str(config.path / directory), data=data, **changes)
    return runs


def pretrain_alike(config: RunConfig, other: RunConfig) -> bool:
    """Whether pre-training leaves both runs the same encoder: what they differ in comes after it."""
    return replace(config, run_dir=other.run_dir, tasks=other.tasks) == other
