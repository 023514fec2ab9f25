"""What the commands do: prepare the data, train a stage, evaluate, predict, report."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from mtfast import __version__
from mtfast.comparison_report import write_comparison
from mtfast.config import (
    CONFIG_FILE,
    STAGES,
    ConfigError,
    DataConfig,
    EngineConfig,
    RunConfig,
    StageName,
    to_dict,
)
from mtfast.data.demo import write_demo_corpus
from mtfast.evaluate import Evaluation, predict_file
from mtfast.experiments import EXPERIMENTS, directory_of, pretrain_alike, runs_of
from mtfast.files import to_yaml, write_text
from mtfast.machine import cpu_has_bfloat16, device_name
from mtfast.packages import version_of
from mtfast.predict import load
from mtfast.push import push
from mtfast.recipes import DEMO_CORPUS
from mtfast.report import write_report
from mtfast.run_record import outcomes_file
from mtfast.tasks import Split
from mtfast.training.engine import peak_memory, ranks
from mtfast.training.engine.deepspeed_json import checksum_of
from mtfast.training.engine.engine import confirm, start
from mtfast.training.engine.memory import leaving_none
from mtfast.training.inputs import Inputs
from mtfast.training.loop import train_stage
from mtfast.training.run import loggers
from mtfast.training.run.directory import FEATURES, Listener, RunDirectory, compare, read_summary
from mtfast.training.run.progress import say, say_once
from mtfast.training.run.settings import PLACES, located
from mtfast.training.run.weights import Weights, best_weights, check_fit, confirm_checkpoint, find_weights
from mtfast.training.stage import Stage
from mtfast.training.stages.finetune import Finetune
from mtfast.training.stages.heads import Heads
from mtfast.training.stages.pretrain import Pretrain

TRAINING_SPLITS: tuple[Split, ...] = ("train", "dev")
TRAINING = ("prepare", *STAGES, "run", "resume")  # commands that begin a run or go on with it


class OpenRun(NamedTuple):
    """A run that this process works on: its directory, its newest weights and its data."""

    directory: RunDirectory
    weights: Weights
    inputs: Inputs


def execute(
    command: str, recipe: str, config: RunConfig, on_event: loggers.OnEvent | None = None, **options: Any
) -> None:
    """Carry out a command of the command line for every run of a recipe, with the command's own options.

    on_event: is called on rank 0 with each record of training, once metrics.jsonl has it.
    """
    by_variant = runs_of(recipe, config)
    runs = [run for of_one_seed in zip(*by_variant.values(), strict=True) for run in of_one_seed]
    if command in TRAINING:
        start()
        if command != "prepare":
            ranks.on_main(loggers.check, config.log)
        if recipe in EXPERIMENTS:
            ranks.on_main(_write_config, recipe, config, runs)
    if command in STAGES:
        having_it = [run for run in runs if command in run.stages]
        if not having_it:
            raise ConfigError(f"{command} is not among the run's stages, {' '.join(config.stages)}", "stages")
        for run in having_it:
            with loggers.opened(run, on_event) as listeners:
                _train_once(run, command, having_it, listeners)
    elif command in ("run", "resume"):
        left = [
            run
            for run in runs
            if recipe not in EXPERIMENTS or not ranks.seen_by_main(functools.partial(_is_done, run))
        ]
        for run in left:
            prepare(run)
        for run in left:
            with loggers.opened(run, on_event) as listeners:
                for stage in run.stages:
                    _train_once(run, stage, runs, listeners)
            evaluate(run)
            predict(run)
        _report(recipe, config, by_variant)
    elif command == "report":
        _report(recipe, config, by_variant)
    else:
        actions: dict[str, Callable[..., Any]] = {
            "prepare": prepare,
            "evaluate": evaluate,
            "predict": predict,
            "push": push_run,
        }
        if len(runs) > 1 and (command == "push" or options.get("input")):
            there = ", ".join(run.run_dir for run in runs)
            raise ConfigError(f"{directory_of(recipe, config)} has several runs; name one of {there}")
        for run in runs:
            actions[command](run, **options)


def _write_config(recipe: str, config: RunConfig, runs: list[RunConfig]) -> None:
    """Give the directory of an experiment the file by which commands find out what it is."""
    for run in runs:
        compare(run.path, to_dict(located(run)), create=True)
    path = directory_of(recipe, config) / CONFIG_FILE
    write_text(path, to_yaml({"recipe": recipe, **to_dict(located(config))}))


def _is_done(run: RunConfig) -> bool:
    """Whether a run has its results, and nothing has changed that they could follow from."""
    found = compare(run.path, to_dict(located(run)), create=True)
    done = found == [] and "dev" in read_summary(run.path) and outcomes_file(run.path, "dev").is_file()
    if done:
        say(f"{run.path} has its results")
    return done


def _train_once(
    run: RunConfig, stage: StageName, runs: list[RunConfig], listeners: Sequence[Listener]
) -> None:
    """Train a stage of one of `runs`; those that differ after pre-training alone do that once."""
    first = next(other for other in runs if other == run or pretrain_alike(other, run))
    train(run, stage, first.path if stage == "pretrain" and first != run else None, listeners)


def _report(recipe: str, config: RunConfig, runs: Mapping[str, list[RunConfig]]) -> None:
    there = {name: [run.path for run in of_one if run.path.is_dir()] for name, of_one in runs.items()}
    if not any(there.values()):
        raise ConfigError(f"{config.path} holds no run to report on")
    if not ranks.is_main():
        return
    for path in itertools.chain(*there.values()):
        say(f"wrote {write_report(path)}")
    if recipe in EXPERIMENTS:
        directory = directory_of(recipe, config)
        say(f"wrote {write_comparison(there, directory, EXPERIMENTS[recipe])}")


@leaving_none
def prepare(config: RunConfig) -> None:
    """Read, account for and tokenize all data of the run into its cache."""
    _read(config, _open(config, config.stages).inputs)


def _read(config: RunConfig, inputs: Inputs) -> None:
    """Read all that the run is trained on, which is compared with what it has read before."""
    for split in TRAINING_SPLITS:
        inputs.load(split)
    if "pretrain" in config.stages:
        inputs.load_reviews(config.seed)


@leaving_none
def train(
    config: RunConfig, name: StageName, same_as: Path | None = None, listeners: Sequence[Listener] = ()
) -> None:
    """Run one stage, from where the run stands; a finished one is left as it is.

    Args:
        same_as: directory of a run in which this stage, once finished, is what it would be here: then it is
            taken over instead.
        listeners: are told what the run records.
    """
    peak_memory.reset()
    run = _open(config, (name,))
    directory = run.directory
    directory.listen(listeners)
    begun = [later for later in STAGES[STAGES.index(name) + 1 :] if directory.has_begun(later)]
    if directory.result(name) is not None:
        say(f"{name}: already finished in {directory.stage(name)}")
        if not begun:  # else that stage may yet take back what it has recorded
            directory.tell()
        return
    if begun:
        raise ConfigError(f"{directory.path}: {begun[0]} has begun without {name}; choose another --run-dir")
    confirm_checkpoint(run.weights, config.model, directory)
    _record(directory, config.model.checkpoint, config.engine)
    if same_as is not None and directory.take_over(name, same_as):
        say(f"{name}: taken over from {same_as}, where it is the same")
        return
    directory.drop_states_before(name)
    stage = _build(config, run, name)
    train_stage(stage, directory, config.log_every)
    stage.engine.close()


@leaving_none
def evaluate(config: RunConfig, split: Literal["dev", "test"] = "dev") -> dict[str, float]:
    """Metrics of the run's best weights, printed and written to summary.json."""
    return _evaluation(config).evaluate(split)


@leaving_none
def predict(
    config: RunConfig, task: str | None = None, input: str | None = None, output: str | None = None
) -> list[Path]:
    """Write the prediction files of every split that the data has, in input order, and return their paths;
    with `input`, write predictions of a task for the texts in that file to `output` alone."""
    if input is None:
        if task or output:
            raise ConfigError("--task and --output are for predictions of --input, which is not given")
        return _evaluation(config).write_predictions()
    if ranks.is_main():  # the others have nothing to do
        compare(config.path, to_dict(located(config)), create=False)
        predict_file(load(config.path), task, input, output or "-", strict=config.data.strict)
    return []


def push_run(config: RunConfig, repo_id: str, private: bool, upload: bool) -> None:
    """Put the run's model with a card on the hub."""
    if ranks.is_main():
        folder = push(config.path, repo_id, private=private, upload=upload)
        say(f"https://huggingface.co/{repo_id} has what {folder} holds" if upload else f"wrote {folder}")


def open_directory(config: RunConfig, *, create: bool = True) -> RunDirectory:
    """The run's directory, for this process and the others of the run.

    Args:
        create: make it where there is none yet; else that is an error.

    Raises:
        ConfigError: it belongs to another run or another process, or not all ranks see the same.
    """
    ranks.agree("the configuration", to_dict(config))
    return RunDirectory(config.path, to_dict(located(config)), create=create)


def _open(config: RunConfig, stages: tuple[StageName, ...]) -> OpenRun:
    """Join the process group and open the run. Raises for what keeps `stages` from running."""
    start()
    ranks.agree("the version of mtfast or torch", (__version__, torch.__version__))
    if config.engine.precision == "bf16" and not torch.cuda.is_available() and not cpu_has_bfloat16():
        say_once("engine.precision bf16: this CPU has no instructions for it, so fp32 may be much faster")
    for name in stages:
        confirm(config.engine, config.stage(name), name, float32=name == "heads")
    _write_demo_corpus(config)
    directory = open_directory(config)
    if config.engine.deepspeed_config:
        path = config.engine.deepspeed_config
        directory.confirm(
            "deepspeed_config", checksum_of(config.engine), STAGES, path, "engine.deepspeed_config"
        )
    weights = find_weights(config.model, directory, config.seed)
    joint = any(task.pair_input == "joint" for task in config.tasks.values())
    check_fit(weights, config.model.checkpoint, config.data, pretrain="pretrain" in stages, joint=joint)
    inputs = Inputs(config.tasks, _data(config), weights.tokenizer, directory)
    if directory.changes:
        if any(change.is_one_of(PLACES) for change in directory.changes):
            confirm_checkpoint(weights, config.model, directory)
            _read(config, inputs)
        directory.adopt()
    return OpenRun(directory, weights, inputs)


def _write_demo_corpus(config: RunConfig) -> None:
    """Write the demo's corpus if the run reads it from this directory."""
    ours = Path(DEMO_CORPUS).absolute()
    read = (config.model.checkpoint, config.data.tasks, config.data.reviews)
    if any(Path(path).absolute().is_relative_to(ours) for path in read):
        ranks.on_main(write_demo_corpus, DEMO_CORPUS)


def _data(config: RunConfig) -> DataConfig:
    """The data's part, with its cache below the run's directory unless it is elsewhere."""
    cache = Path(config.data.cache_dir).expanduser() if config.data.cache_dir else config.path / "cache"
    return replace(config.data, cache_dir=str(cache))


def _evaluation(config: RunConfig) -> Evaluation:
    device = start()
    _write_demo_corpus(config)
    run = open_directory(config, create=False)
    weights = best_weights(config.model, run, config.seed)
    inputs = Inputs(config.tasks, _data(config), weights.tokenizer, run)
    return Evaluation(inputs, weights, config.engine, device)


def _build(config: RunConfig, run: OpenRun, name: StageName) -> Stage:
    engine, seed = config.engine, config.seed
    if name == "pretrain":
        return Pretrain(run.inputs.load_reviews(seed), run.weights, config.pretrain, engine, seed)
    if name == "finetune":
        return Finetune(run.inputs.load, run.weights, config.finetune, engine, seed)
    features = run.directory.stage(name) / FEATURES
    return Heads(run.inputs.load, run.weights, config.heads, engine, seed, features)


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
