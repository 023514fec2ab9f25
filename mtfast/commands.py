"""What the commands do: prepare the data, train a stage, evaluate, predict, report."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mtfast import __version__
from mtfast.config import STAGES, ConfigError, DataConfig, EngineConfig, RunConfig, StageName, to_dict
from mtfast.experiments import EXPERIMENTS, Experiment, pretrain_alike, runs_of
from mtfast.machine import device_name, version_of
from mtfast.predict import Predictor
from mtfast.report import write_comparison, write_report
from mtfast.tasks import Split
from mtfast.training.engine import ranks
from mtfast.training.engine.deepspeed_config import deepspeed_config
from mtfast.training.engine.engine import start
from mtfast.training.inputs import Inputs
from mtfast.training.loop import Stage, train_stage
from mtfast.training.run.directory import RunDirectory
from mtfast.training.run.progress import say
from mtfast.training.run.weights import Weights, best_weights, check_fit, find_weights
from mtfast.training.stages.finetune import Finetune
from mtfast.training.stages.heads import Heads
from mtfast.training.stages.pretrain import Pretrain

TRAINING_SPLITS: tuple[Split, ...] = ("train", "dev")


class OpenRun(NamedTuple):
    """A run that this process works on: its directory, its newest weights and its data."""

    directory: RunDirectory
    weights: Weights
    inputs: Inputs


def execute(command: str, recipe: str, config: RunConfig) -> None:
    """Carry out a command of the command line for every run of a recipe."""
    runs = runs_of(recipe, config)
    if command in STAGES:
        having_it = [run for run in runs.values() if command in run.stages]
        if not having_it:
            raise ConfigError(f"{command} is not among the run's stages, {' '.join(config.stages)}", "stages")
        for run in having_it:
            _train_once(run, command, having_it)
    elif command == "run":
        for run in runs.values():
            prepare(run)
        for run in runs.values():
            for stage in run.stages:
                _train_once(run, stage, list(runs.values()))
            evaluate(run)
            predict(run)
        _report(runs, config.path, EXPERIMENTS.get(recipe))
    elif command == "report":
        _report(runs, config.path, EXPERIMENTS.get(recipe))
    else:
        actions: dict[str, Callable[[RunConfig], Any]] = {
            "prepare": prepare,
            "evaluate": evaluate,
            "predict": predict,
        }
        for run in runs.values():
            actions[command](run)


def _train_once(run: RunConfig, stage: StageName, runs: list[RunConfig]) -> None:
    """Train a stage of one of `runs`; those that differ after pre-training alone do that once."""
    first = next(other for other in runs if other == run or pretrain_alike(other, run))
    train(run, stage, first.path if stage == "pretrain" and first != run else None)


def _report(runs: Mapping[str, RunConfig], directory: Path, experiment: Experiment | None) -> None:
    there = {name: run.path for name, run in runs.items() if run.path.is_dir()}
    if not there:
        raise ConfigError(f"{directory} holds no run to report on")
    if not ranks.is_main():
        return
    for path in there.values():
        say(f"wrote {write_report(path)}")
    if experiment is not None:
        say(f"wrote {write_comparison(there, directory, experiment)}")


def prepare(config: RunConfig) -> None:
    """Read, account for and tokenize all data of the run into its cache."""
    run = _open(config, config.stages)
    for split in TRAINING_SPLITS:
        run.inputs.load(split)
    if "pretrain" in config.stages:
        run.inputs.load_reviews(config.seed)


def train(config: RunConfig, name: StageName, same_as: Path | None = None) -> None:
    """Run one stage, from where the run stands; a finished one is left as it is.

    Args:
        same_as: directory of a run in which this stage, once finished, is what it would be here: then it is
            taken over instead.
    """
    run = _open(config, (name,))
    directory = run.directory
    if directory.result(name) is not None:
        say(f"{name}: already finished in {directory.stage(name)}")
        return
    for later in STAGES[STAGES.index(name) + 1 :]:
        if directory.has_begun(later):
            raise ConfigError(f"{directory.path}: {later} has begun without {name}; choose another --run-dir")
    _record(directory, config.model.checkpoint, config.engine)
    if same_as is not None and directory.take_over(name, same_as):
        say(f"{name}: taken over from {same_as}, where it is the same")
        return
    stage = _build(config, run, name)
    train_stage(stage, directory, config.log_every)
    stage.engine.close()


def evaluate(config: RunConfig) -> dict[str, float]:
    """Dev metrics of the run's best weights, printed and written to summary.json."""
    return _predictor(config).evaluate()


def predict(config: RunConfig) -> list[Path]:
    """Write the prediction files of every split that the data has, in input order."""
    return _predictor(config).write_predictions()


def _open(config: RunConfig, stages: tuple[StageName, ...]) -> OpenRun:
    """Join the process group and open the run. Raises for what keeps `stages` from running."""
    start()
    ranks.agree("the version of mtfast or torch", (__version__, torch.__version__))
    for name in stages:
        deepspeed_config(config.engine, config.stage(name), name, ranks.world_size())
    directory = RunDirectory(config.path, to_dict(config))
    weights = find_weights(config.model, directory, config.seed)
    joint = any(task.pair_input == "joint" for task in config.tasks.values())
    check_fit(weights, config.model.checkpoint, config.data, pretrain="pretrain" in stages, joint=joint)
    return OpenRun(directory, weights, Inputs(config.tasks, _data(config), weights.tokenizer, directory))


def _data(config: RunConfig) -> DataConfig:
    """The data's part, with its cache below the run's directory unless it is elsewhere."""
    cache = Path(config.data.cache_dir).expanduser() if config.data.cache_dir else config.path / "cache"
    return replace(config.data, cache_dir=str(cache))


def _predictor(config: RunConfig) -> Predictor:
    device = start()
    run = RunDirectory(config.path, to_dict(config), create=False)
    weights = best_weights(config.model, run, config.seed)
    inputs = Inputs(config.tasks, _data(config), weights.tokenizer, run)
    return Predictor(inputs, weights, config.engine, device)


def _build(config: RunConfig, run: OpenRun, name: StageName) -> Stage:
    engine, seed = config.engine, config.seed
    if name == "pretrain":
        return Pretrain(run.inputs.load_reviews(seed), run.weights, config.pretrain, engine, seed)
    if name == "finetune":
        return Finetune(run.inputs.load, run.weights, config.finetune, engine, seed)
    state = run.directory.stage(name) / "state"
    return Heads(run.inputs.load, run.weights, config.heads, engine, seed, state)


def _record(run: RunDirectory, checkpoint: str, engine: EngineConfig) -> None:
    run.summarize(
        checkpoint=checkpoint,
        environment={
            "mtfast": __version__,
            "torch": torch.__version__,
            "deepspeed": version_of("deepspeed"),
            "transformers": version_of("transformers"),
            "device": device_name(),
            "ranks": ranks.world_size(),
            "threads": torch.get_num_threads(),
            "precision": engine.precision,
            "zero_stage": engine.zero_stage,
        },
    )
