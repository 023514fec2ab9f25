"""The command line: `mtfast COMMAND RECIPE_OR_FILE --dotted.option value`."""

from __future__ import annotations

import errno
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import NoReturn

import tyro

from mtfast.config import ConfigError, RunConfig, to_dict, validate
from mtfast.config_file import ConfigFile, read_config_file
from mtfast.errors import FieldError
from mtfast.experiments import ALL_RECIPES
from mtfast.files import to_yaml
from mtfast.launcher import end_process
from mtfast.recipes import DEMO_CORPUS
from mtfast.training.engine import ranks

# Failures of the system that its user can do something about; any other keeps its traceback.
FIXABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR, errno.EEXIST)


COMMANDS = {
    "prepare": "read, account for and tokenize the data",
    "pretrain": "stage 1: further pre-training on reviews",
    "heads": "stage 2: train the heads on the frozen encoder",
    "finetune": "stage 3: train everything on all tasks",
    "evaluate": "dev metrics of the run's best weights",
    "predict": "write the prediction files",
    "run": "all stages, evaluation, predictions and the report",
    "report": "write report.md and report.html of a run",
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
    end_process(code)


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
    if not rest:
        _fail(f"{name} needs a recipe, {', '.join(ALL_RECIPES)}, or a configuration file")
    file = _configuration(rest[0])
    options = [option for option in rest[1:] if option != "--print-config"]
    config = tyro.cli(
        RunConfig,
        default=file.config,
        args=options,
        prog=f"mtfast {name} {rest[0]}",
        description=f"{COMMANDS[name]}. {ALL_RECIPES[file.recipe].__doc__} --print-config shows the result.",
        console_outputs=ranks.is_main(),
    )
    from mtfast.training.engine.failure import leave

    errors = _expected_errors()
    try:
        validate(config)
        if "--print-config" in rest:
            _print(to_yaml({"recipe": file.recipe, **to_dict(config)}))
            return
        read = (config.model.checkpoint, config.data.tasks, config.data.reviews)
        if name != "report" and any(path.startswith(DEMO_CORPUS) for path in read):
            _write_demo_corpus()
        from mtfast.commands import execute

        execute(name, file.recipe, config)
    except KeyboardInterrupt:
        _fail("interrupted; the same command continues the run", code=130)
    except errors as error:
        place = file.place_of(error.field, config) if isinstance(error, FieldError) else None
        leave(error, f"mtfast: {f'{place}: ' if place else ''}{error}", 2, expected=True)
    except Exception as error:
        if isinstance(error, OSError) and error.errno in FIXABLE:
            text = f"{error.filename}: {error.strerror}" if error.filename else str(error)
            leave(error, f"mtfast: {text}", 2, expected=True)
        if ranks.world_size() == 1:
            raise
        leave(error, traceback.format_exc(), 1, expected=False)


def _configuration(name: str) -> ConfigFile:
    """The configuration of a recipe, or the one in a file."""
    if name in ALL_RECIPES:
        return ConfigFile(Path(name), name, ALL_RECIPES[name]())
    path = Path(name).expanduser()
    if not path.is_file() and path.suffix not in (".yaml", ".yml"):
        _fail(
            f"there is no recipe {name!r}, and no such file; the recipes are {', '.join(ALL_RECIPES)}, "
            "and a file is YAML with a recipe's name and what differs"
        )
    try:
        return read_config_file(path, ALL_RECIPES)
    except ConfigError as error:
        _fail(str(error))


def _write_demo_corpus() -> None:
    from mtfast.data.demo import write_demo_corpus
    from mtfast.training.engine.engine import start

    start()
    ranks.on_main(write_demo_corpus, DEMO_CORPUS)


def _expected_errors() -> tuple[type[Exception], ...]:
    from mtfast.data.rows import DataError
    from mtfast.models.checkpoint import CheckpointError
    from mtfast.training.loop import NonFinite

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
    lines += [f"  {name:<10}{summary}" for name, summary in COMMANDS.items()]
    lines += [
        f"  {'doctor':<10}what is installed, which implementation each op has, what is missing",
        "",
        "recipes:",
    ]
    lines += [f"  {name:<10}{recipe.__doc__}" for name, recipe in ALL_RECIPES.items()]
    lines += [
        "",
        "A YAML file with a recipe's name and what differs, tasks of your own say, stands for a recipe.",
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
