"""The command line: `mtfast COMMAND RECIPE --dotted.option value`."""

from __future__ import annotations

import errno
import os
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import tyro

from mtfast.recipes import DEMO_CORPUS, RECIPES, pretrain_alike, variants
from mtfast.train import ranks
from mtfast.train.config import ConfigError, RunConfig, to_yaml, validate

# Failures of the system that its user can do something about; any other keeps its traceback.
FIXABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR, errno.EEXIST)


@dataclass(frozen=True)
class Command:
    """A command: what `--help` says of it, and what it does with the configuration."""

    summary: str
    run: Callable[[RunConfig], Any]


def _each(config: RunConfig, action: Callable[[RunConfig], Any]) -> None:
    for variant in variants(config).values():
        action(variant)


def _prepare(config: RunConfig) -> None:
    from mtfast.train import run

    _each(config, run.prepare)


def _write_demo_corpus() -> None:
    from mtfast.data.demo import write_demo_corpus
    from mtfast.train.engine import start

    start()
    ranks.on_main(write_demo_corpus, DEMO_CORPUS)


def _train(stage: Any) -> Callable[[RunConfig], None]:
    def action(config: RunConfig) -> None:
        having_it = [variant for variant in variants(config).values() if stage in variant.stages]
        if not having_it:
            raise ConfigError(f"{stage} is not among the run's stages, {' '.join(config.stages)}")
        for variant in having_it:
            _train_variant(config, variant, stage)

    return action


def _train_variant(config: RunConfig, variant: RunConfig, stage: Any) -> None:
    from mtfast.train import run

    # An experiment whose runs differ after pre-training alone does that once.
    alike = [
        other for other in variants(config).values() if stage == "pretrain" and pretrain_alike(other, variant)
    ]
    run.train(variant, stage, same_as=alike[0].path if alike and alike[0] != variant else None)


def _evaluate(config: RunConfig) -> None:
    from mtfast.train import run

    _each(config, run.evaluate)


def _predict(config: RunConfig) -> None:
    from mtfast.train import run

    _each(config, run.predict)


def _report(config: RunConfig) -> None:
    from mtfast import report
    from mtfast.train.progress import say

    runs = {name: variant.path for name, variant in variants(config).items() if variant.path.is_dir()}
    if not runs:
        raise ConfigError(f"{config.path} holds no run to report on")
    if not ranks.is_main():
        return
    for path in runs.values():
        say(f"wrote {report.write_report(path)}")
    if config.experiment != "none":
        say(f"wrote {report.write_comparison(runs, config.path, experiment=config.experiment)}")


def _run(config: RunConfig) -> None:
    _prepare(config)
    for variant in variants(config).values():
        for stage in variant.stages:
            _train_variant(config, variant, stage)
        _evaluate(variant)
        _predict(variant)
    _report(config)


COMMANDS = {
    "prepare": Command("read, account for and tokenize the data", _prepare),
    "pretrain": Command("stage 1: further pre-training on reviews", _train("pretrain")),
    "heads": Command("stage 2: train the heads on the frozen encoder", _train("heads")),
    "finetune": Command("stage 3: train everything on the three tasks", _train("finetune")),
    "evaluate": Command("dev metrics of the run's best weights", _evaluate),
    "predict": Command("write the CS 224N prediction files", _predict),
    "run": Command("all stages, evaluation, predictions and the report", _run),
    "report": Command("write report.md and report.html of a run", _report),
}


def run_process() -> NoReturn:
    """Entry point of `mtfast` and `python -m mtfast`: `main`, and with it the process."""
    code = 0
    try:
        main()
    except SystemExit as end:
        if isinstance(end.code, str):
            raise
        code = end.code or 0
    else:
        ranks.finish()
    ranks.end_process(code)


def main(argv: list[str] | None = None) -> None:
    """Run a command. Raises SystemExit where it fails."""
    try:
        try:
            _main(argv)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # who reads has had enough, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(128 + signal.SIGPIPE) from None


def _main(argv: list[str] | None) -> None:
    arguments = _without_launcher_flags(list(sys.argv[1:] if argv is None else argv))
    name, *rest = arguments or ["--help"]
    if name in ("-h", "--help") or rest[:1] in (["-h"], ["--help"]):
        _print(_usage())
        return
    if name == "doctor":
        if rest:
            _fail(f"doctor takes no options, found {rest[0]!r}")
        from mtfast import doctor

        _print(doctor.render())
        return
    if name not in COMMANDS:
        _fail(f"there is no command {name!r}\n\n{_usage()}")
    if not rest or rest[0] not in RECIPES:
        found = f"there is no recipe {rest[0]!r}" if rest else f"{name} needs a recipe"
        _fail(f"{found}; the recipes are {', '.join(RECIPES)}")
    recipe, *options = rest
    print_config = "--print-config" in options
    config = tyro.cli(
        RunConfig,
        default=RECIPES[recipe](),
        args=[option for option in options if option != "--print-config"],
        prog=f"mtfast {name} {recipe}",
        description=f"{COMMANDS[name].summary}. {RECIPES[recipe].__doc__} --print-config shows the result.",
        console_outputs=ranks.is_main(),
    )
    from mtfast.train.failure import leave

    errors = _expected_errors()
    try:
        validate(config)
        if print_config:
            _print(to_yaml(config))
            return
        if recipe == "demo" and name != "report":
            _write_demo_corpus()
        COMMANDS[name].run(config)
    except KeyboardInterrupt:
        _fail("interrupted; the same command continues the run", code=130)
    except errors as error:
        leave(error, f"mtfast: {error}", 2, expected=True)
    except Exception as error:
        if isinstance(error, OSError) and error.errno in FIXABLE:
            text = f"{error.filename}: {error.strerror}" if error.filename else str(error)
            leave(error, f"mtfast: {text}", 2, expected=True)
        if ranks.world_size() == 1:
            raise
        leave(error, traceback.format_exc(), 1, expected=False)


def _expected_errors() -> tuple[type[Exception], ...]:
    from mtfast.data.rows import DataError
    from mtfast.models.checkpoint import CheckpointError
    from mtfast.train.loop import NonFinite

    return ConfigError, DataError, CheckpointError, NonFinite


def _without_launcher_flags(arguments: list[str]) -> list[str]:
    """Drop the rank that launchers append; the environment says it too."""
    kept = []
    skip = False
    for argument in arguments:
        flag, _, value = argument.partition("=")
        if skip:
            skip = False
        elif flag in ("--local_rank", "--local-rank"):
            skip = not value
        else:
            kept.append(argument)
    return kept


def _usage() -> str:
    lines = ["usage: mtfast COMMAND RECIPE [--dotted.option value ...]", "", "commands:"]
    lines += [f"  {name:<10}{command.summary}" for name, command in COMMANDS.items()]
    lines += [
        f"  {'doctor':<10}what is installed, which implementation each op has, what is missing",
        "",
        "recipes:",
    ]
    lines += [f"  {name:<10}{recipe.__doc__}" for name, recipe in RECIPES.items()]
    lines += [
        "",
        "mtfast COMMAND RECIPE --help lists every option; --print-config shows the configuration and stops.",
        "Start it with `deepspeed --module mtfast ...`, `torchrun -m mtfast ...` or plainly.",
    ]
    return "\n".join(lines)


def _print(text: str) -> None:
    if ranks.is_main():
        print(text.rstrip("\n"))


def _fail(message: str, code: int = 2) -> NoReturn:
    if ranks.is_main():
        print(f"mtfast: {message}", file=sys.stderr)
    raise SystemExit(code)
