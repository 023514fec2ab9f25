"""Stages of the demo's runs, made as the commands make them."""

from dataclasses import replace
from pathlib import Path

from mtfast.commands import open_directory
from mtfast.config import RunConfig
from mtfast.data.demo import DemoCorpus
from mtfast.recipes import demo
from mtfast.training.engine import engine
from mtfast.training.inputs import Inputs
from mtfast.training.run.weights import find_weights
from mtfast.training.stage import Stage
from mtfast.training.stages.heads import Heads
from mtfast.training.stages.pretrain import Pretrain


def demo_on(corpus: DemoCorpus, run_dir: Path) -> RunConfig:
    """The demo's recipe on a corpus that is written already."""
    config = demo()
    return replace(
        config,
        run_dir=str(run_dir),
        model=replace(config.model, checkpoint=str(corpus.bert)),
        data=replace(
            config.data,
            tasks=str(corpus.tasks),
            reviews=str(corpus.reviews),
            cache_dir=str(corpus.tasks / "cache"),
        ),
    )


def stage_of(kind: type[Stage], config: RunConfig) -> Stage:
    engine.start()
    run = open_directory(config)
    weights = find_weights(config.model, run, config.seed)
    inputs = Inputs(config.tasks, config.data, weights.tokenizer, run)
    common = (weights, config.stage(kind.name), config.engine, config.seed)
    if kind is Pretrain:
        return kind(inputs.load_reviews(config.seed), *common)
    return (
        kind(inputs.load, *common, config.path / "features") if kind is Heads else kind(inputs.load, *common)
    )
