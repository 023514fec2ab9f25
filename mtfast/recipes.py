"""Named runs: a recipe is a function that returns a frozen config, and its docstring says what it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from mtfast.train.config import (
    DataConfig,
    EngineConfig,
    HeadsStageConfig,
    LossWeights,
    ModelConfig,
    PretrainConfig,
    RunConfig,
    TaskStageConfig,
)

DEMO_CORPUS = "runs/demo-corpus"


def paper() -> RunConfig:
    """The paper's recipe to the letter, on bert-base-uncased."""
    return RunConfig(run_dir="runs/paper")


def exp1() -> RunConfig:
    """The paper's Exp-I: the recipe without and with further pre-training."""
    return RunConfig(run_dir="runs/exp1", experiment="exp1")


def exp2() -> RunConfig:
    """The paper's Exp-II: the recipe with the linear and with the LSTM sentiment head."""
    return RunConfig(run_dir="runs/exp2", experiment="exp2")


def local() -> RunConfig:
    """Any checkpoint and data directory; rates and epochs suit a small checkpoint on a small machine."""
    return RunConfig(
        run_dir="runs/local",
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
        heads=HeadsStageConfig(),
        finetune=TaskStageConfig(
            epochs=3,
            batch_size=64,
            learning_rate=2e-4,
            schedule="linear",
            warmup_fraction=0.1,
            gradient_clipping=1.0,
            # The squared error on a scale of 0 to 5 is the largest of the three losses by far.
            loss_weights=LossWeights(sts=0.5),
        ),
    )


def demo() -> RunConfig:
    """A tiny BERT from scratch on a small corpus of invented films: two minutes on two cores."""
    return RunConfig(
        run_dir="runs/demo",
        model=ModelConfig(checkpoint=f"{DEMO_CORPUS}/bert", from_scratch=True, pair_inner=128),
        data=DataConfig(
            tasks=DEMO_CORPUS, reviews=f"{DEMO_CORPUS}/imdb", max_length=64, review_max_length=128
        ),
        engine=EngineConfig(precision="fp32", zero_stage=0),
        pretrain=PretrainConfig(
            epochs=4, batch_size=32, learning_rate=1e-3, schedule="linear", warmup_fraction=0.1
        ),
        heads=HeadsStageConfig(epochs=12, batch_size=256),
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


def variants(config: RunConfig) -> dict[str, RunConfig]:
    """The runs of an experiment by name, each in a directory of its own below the config's; else one.

    The runs of an experiment share the cache of tokenized data.
    """
    data = replace(config.data, cache_dir=config.data.cache_dir or str(config.path / "cache"))

    def at(name: str, **changes: object) -> RunConfig:
        run_dir = str(config.path / name)
        return replace(config, run_dir=run_dir, experiment="none", data=data, **changes)  # type: ignore[arg-type]

    if config.experiment == "exp1":
        without = tuple(stage for stage in config.stages if stage != "pretrain")
        return {
            "without pre-training": at("without-pretraining", stages=without),
            "with pre-training": at("with-pretraining"),
        }
    if config.experiment == "exp2":
        return {
            "linear head": at("linear-head", model=replace(config.model, sentiment_head="linear")),
            "LSTM head": at("lstm-head", model=replace(config.model, sentiment_head="lstm")),
        }
    return {"": config}


def pretrain_alike(config: RunConfig, other: RunConfig) -> bool:
    """Whether pre-training leaves both runs the same encoder: what they differ in comes after it."""
    head = other.model.sentiment_head
    changed = replace(config, run_dir=other.run_dir, model=replace(config.model, sentiment_head=head))
    return changed == other
