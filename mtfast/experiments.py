"""The paper's two experiments: comparisons of runs that differ in one thing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from mtfast.config import ConfigError, RunConfig
from mtfast.recipes import RECIPES, paper


def exp1() -> RunConfig:
    """The paper's Exp-I: the recipe without and with further pre-training."""
    return replace(paper(), run_dir="runs/experiments")


def exp2() -> RunConfig:
    """The paper's Exp-II: the recipe with the linear and with the LSTM sentiment head."""
    return replace(paper(), run_dir="runs/experiments")


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
# The rows of its data, by their names in a run's summary: those of the CS 224N project and of IMDb.
PAPER_ROWS = {
    **{"sst-train": 8544, "sst-dev": 1101, "sst-test": 2210},
    **{"quora-train": 141_506, "quora-dev": 20_215, "quora-test": 40_431},
    **{"sts-train": 6041, "sts-dev": 864, "sts-test": 1726},
    "reviews": 100_000,
}


@dataclass(frozen=True)
class Variant:
    """One side of a comparison.

    name: what reports call it.
    directory: of its runs, below that of the experiments; variants of one directory are one.
    of: gives its configuration, from that which all variants have in common.
    figures: the paper's.
    """

    name: str
    directory: str
    of: Callable[[RunConfig], RunConfig]
    figures: Mapping[str, float]


@dataclass(frozen=True)
class Experiment:
    """A comparison of two variants that differ in one thing."""

    title: str
    variants: tuple[Variant, Variant]


def _without_pretraining(config: RunConfig) -> RunConfig:
    return replace(config, stages=tuple(stage for stage in config.stages if stage != "pretrain"))


def _with_lstm_head(config: RunConfig) -> RunConfig:
    if "sst" not in config.tasks:
        raise ConfigError("exp2 compares two heads of the task sst, which is not among the tasks", "tasks")
    return replace(config, tasks=config.tasks | {"sst": replace(config.tasks["sst"], head="lstm")})


def _as_it_is(name: str) -> Variant:
    return Variant(name, "with-pretraining", lambda config: config, PAPER_FIGURES["with pre-training"])


def _other(name: str, of: Callable[[RunConfig], RunConfig]) -> Variant:
    return Variant(name, name.replace("pre-", "pre").replace(" ", "-").lower(), of, PAPER_FIGURES[name])


EXPERIMENTS = {
    "exp1": Experiment(
        "Exp-I: the flow without and with further pre-training",
        (_other("without pre-training", _without_pretraining), _as_it_is("with pre-training")),
    ),
    "exp2": Experiment(
        "Exp-II: the simple and the LSTM sentiment head",
        (_as_it_is("linear head"), _other("LSTM head", _with_lstm_head)),
    ),
}


def runs_of(recipe: str, config: RunConfig) -> dict[str, list[RunConfig]]:
    """The runs of a recipe: the one, under an empty name, or those of an experiment by variant, one for each
    seed.

    A variant's runs are in directories of their own below the config's, `with-pretraining/seed-0` say, where
    experiments that have it in common find them; all share a cache of tokenized data.

    Raises:
        ConfigError: several seeds are asked of a recipe that is no experiment.
    """
    if recipe not in EXPERIMENTS:
        if config.seeds > 1:
            asked = f"seeds is {config.seeds}; {' and '.join(EXPERIMENTS)} have runs with several seeds"
            raise ConfigError(f"{asked}, any other recipe has one run", "seeds")
        return {"": [config]}
    data = replace(config.data, cache_dir=config.data.cache_dir or str(config.path / "cache"))
    runs = {}
    for variant in EXPERIMENTS[recipe].variants:
        common = variant.of(replace(config, seeds=1, data=data))
        runs[variant.name] = [
            replace(common, seed=seed, run_dir=str(config.path / variant.directory / f"seed-{seed}"))
            for seed in range(config.seed, config.seed + config.seeds)
        ]
    return runs


def directory_of(recipe: str, config: RunConfig) -> Path:
    """Where what is said of a recipe's runs together goes; of the one run, its own directory."""
    return config.path / recipe if recipe in EXPERIMENTS else config.path


def pretrain_alike(config: RunConfig, other: RunConfig) -> bool:
    """Whether pre-training leaves both runs the same encoder: what they differ in comes after it."""
    return replace(config, run_dir=other.run_dir, tasks=other.tasks) == other
