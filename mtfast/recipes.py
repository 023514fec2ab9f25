"""Named runs: a recipe is a function that returns a frozen config, and its docstring says what it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from mtfast.config import (
    ConfigError,
    DataConfig,
    EngineConfig,
    HeadsConfig,
    ModelConfig,
    PretrainConfig,
    RunConfig,
    TaskStageConfig,
)
from mtfast.tasks import MlpConfig, Task

DEMO_CORPUS = "runs/demo-corpus"

PAIR_ALIASES: dict[str, tuple[str, ...]] = {
    "sentence1": ("question1", "text1", "sentence_1"),
    "sentence2": ("question2", "text2", "sentence_2"),
}
PAPER_TASKS = {
    "sst": Task(
        kind="classification",
        classes=5,
        text="sentence",
        label="sentiment",
        aliases={"sentence": ("text", "review", "phrase"), "sentiment": ("label",)},
        title="SST",
    ),
    "quora": Task(
        kind="binary",
        text=("sentence1", "sentence2"),
        label="is_duplicate",
        aliases=PAIR_ALIASES | {"is_duplicate": ("label",)},
        head="pair",
        title="Quora",
    ),
    "sts": Task(
        kind="regression",
        low=0,
        high=5,
        text=("sentence1", "sentence2"),
        label="similarity",
        aliases=PAIR_ALIASES | {"similarity": ("similarity_score", "score", "label")},
        head="pair",
        title="STS",
    ),
}


def paper() -> RunConfig:
    """The paper's recipe to the letter, on bert-base-uncased."""
    return RunConfig(run_dir="runs/paper", tasks=PAPER_TASKS)


def exp1() -> RunConfig:
    """The paper's Exp-I: the recipe without and with further pre-training."""
    return replace(paper(), run_dir="runs/exp1")


def exp2() -> RunConfig:
    """The paper's Exp-II: the recipe with the linear and with the LSTM sentiment head."""
    return replace(paper(), run_dir="runs/exp2")


def local() -> RunConfig:
    """Any checkpoint and data directory; rates and epochs suit a small checkpoint on a small machine."""
    return RunConfig(
        run_dir="runs/local",
        # The squared error on a scale of 0 to 5 is the largest of the three losses by far.
        tasks=PAPER_TASKS | {"sts": replace(PAPER_TASKS["sts"], weight=0.5)},
        data=DataConfig(max_reviews=2000, review_max_length=256),
        engine=EngineConfig(zero_stage=0),
        pretrain=PretrainConfig(
            epochs=1,
            batch_size=32,
            learning_rate=1e-4,
            schedule="linear",
            warmup_fraction=0.1,
            gradient_clipping=1.0,
        ),
        finetune=TaskStageConfig(
            epochs=3,
            batch_size=64,
            learning_rate=2e-4,
            schedule="linear",
            warmup_fraction=0.1,
            gradient_clipping=1.0,
        ),
    )


def demo() -> RunConfig:
    """A tiny BERT from scratch on a small corpus of invented films: two minutes on two cores."""
    return RunConfig(
        run_dir="runs/demo",
        tasks=PAPER_TASKS,
        model=ModelConfig(checkpoint=f"{DEMO_CORPUS}/bert", from_scratch=True, mlp=MlpConfig(width=128)),
        data=DataConfig(
            tasks=DEMO_CORPUS, reviews=f"{DEMO_CORPUS}/imdb", max_length=64, review_max_length=128
        ),
        engine=EngineConfig(precision="fp32", zero_stage=0),
        pretrain=PretrainConfig(
            epochs=4, batch_size=32, learning_rate=1e-3, schedule="linear", warmup_fraction=0.1
        ),
        heads=HeadsConfig(epochs=12, batch_size=256),
        finetune=TaskStageConfig(
            epochs=12,
            batch_size=64,
            learning_rate=1e-3,
            schedule="linear",
            warmup_fraction=0.1,
            gradient_clipping=1.0,
        ),
    )


RECIPES: dict[str, Callable[[], RunConfig]] = {
    recipe.__name__: recipe for recipe in (demo, local, paper, exp1, exp2)
}


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
