"""Named runs: a recipe is a function that returns a frozen config, and its docstring says what it is.

config = dataclasses.replace(mtfast.recipes.local(), run_dir="runs/mine", seed=1)
run = mtfast.train(config)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from mtfast.config import (
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
    return RunConfig(
        run_dir="runs/paper",
        tasks=PAPER_TASKS,
        data=DataConfig(samples="truncate"),
        heads=HeadsConfig(features="live"),
    )


def local() -> RunConfig:
    """Any checkpoint and data directory; rates and epochs suit a small checkpoint on a small machine."""
    return RunConfig(
        run_dir="runs/local",
        # The squared error on a scale of 0 to 5 is the largest of the three losses by far.
        tasks=PAPER_TASKS | {"sts": replace(PAPER_TASKS["sts"], weight=0.5)},
        data=DataConfig(max_reviews=2000, review_max_length=256),
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


def best() -> RunConfig:
    """The best model that was found for the data of `local`: docs/quality.md has what each part is worth."""
    common = local()
    return replace(
        common,
        run_dir="runs/best",
        stages=("heads", "finetune"),
        tasks={
            "sst": replace(common.tasks["sst"], rdrop_alpha=7.0),
            "quora": replace(common.tasks["quora"], pair_input="joint", rdrop_alpha=2.0),
            "sts": replace(common.tasks["sts"], pair_input="joint", rdrop_alpha=3.0),
        },
        heads=HeadsConfig(epochs=10),
        finetune=replace(common.finetune, batch_size=128),
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
        engine=EngineConfig(precision="fp32"),
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
    recipe.__name__: recipe for recipe in (demo, local, best, paper)
}
