"""A command, its recipe, file or run, and its options: read, checked and carried out.

Nothing here imports torch before a command is carried out: help and configurations are answered at once.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import signal
import traceback
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from mtfast.config import CONFIG_FILE, ConfigError, RunConfig, to_dict, validate
from mtfast.config_file import ConfigFile, read_config_file
from mtfast.errors import Error, FieldError
from mtfast.experiments import ALL_RECIPES, EXPERIMENTS
from mtfast.files import to_yaml
from mtfast.launcher import answer, fail, is_main, world_size

# Failures of the system that its user can do something about; any other keeps its traceback.
FIXABLE = (
    errno.EACCES,
    errno.EPERM,
    errno.EIO,
    errno.EROFS,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.ENOTDIR,
    errno.EEXIST,
)

COMMANDS = {
    "prepare": "read, account for and tokenize the data",
    "pretrain": "stage 1: further pre-training on reviews",
    "heads": "stage 2: train the heads on the frozen encoder",
    "finetune": "stage 3: train everything on all tasks",
    "evaluate": "metrics of the run's best weights",
    "predict": "write the prediction files, or predict for a file of texts",
    "run": "all stages, evaluation, predictions and the report",
    "resume": "go on with a run: what `run` has left to do",
    "report": "write report.md and report.html of a run",
    "push": "put a run's model with a model card on the Hugging Face hub",
}
OF_RUNS = ("resume", "push")  # which have nothing to do before there is one


@dataclass(frozen=True)
class NoOptions:
    """Of a command that has none of its own."""


@dataclass(frozen=True)
class EvaluateOptions:
    split: Literal["dev", "test"] = "dev"
    """Split whose labels the predictions are compared with; the best epoch was chosen on dev."""


@dataclass(frozen=True)
class PredictOptions:
    task: str | None = None
    """Task to predict, with --input; by default the run's only one."""
    input: str | None = None
    """Texts to predict for, instead of the run's own data: a Parquet, CSV, TSV or JSON-lines file with the
    task's columns, a .txt file or - (standard input) with a text in each line, pairs separated by a tab."""
    output: str | None = None
    """File for the predictions of --input, comma-separated where it ends in .csv, else tab-separated; by
    default - (standard output)."""


@dataclass(frozen=True)
class PushOptions:
    repo_id: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="OWNER/NAME")]
    """Name on the hub: owner/name."""
    private: bool = False
    """Make the repository private."""
    upload: bool = True
    """Upload it; without, `hub/` in the run's directory has what would be."""


OPTIONS: dict[str, Any] = {"evaluate": EvaluateOptions, "predict": PredictOptions, "push": PushOptions}


def invoke(arguments: list[str]) -> None:
    """Carry out what a command line says, or answer it with help. Raises SystemExit where that fails."""
    name, *rest = arguments or ["--help"]
    if name in ("-h", "--help") or rest[:1] in (["-h"], ["--help"]):
        answer(_usage())
        return
    if name not in COMMANDS:
        fail(f"there is no command {name!r}\n\n{_usage()}")
    if not rest:
        others = "" if name in OF_RUNS else f"a recipe, {', '.join(ALL_RECIPES)}, a configuration file or "
        fail(f"{name} needs {others}the directory of a run")
    file = _configuration(name, rest[0])
    options = [option for option in rest[1:] if option != "--print-config"]
    own, config = _parsed(name, rest[0], file, options)
    try:
        validate(config)
    except ConfigError as error:
        fail(_located(error, file, config))
    if "--print-config" in rest:
        answer(to_yaml({"recipe": file.recipe, **to_dict(config)}))
        return
    _carry_out(name, file, config, dataclasses.asdict(own))


def _parsed(command: str, name: str, file: ConfigFile, options: list[str]) -> tuple[Any, RunConfig]:
    """The command's own options, and the configuration with those of the command line in place."""
    kind = OPTIONS.get(command, NoOptions)
    summary = COMMANDS[command]
    said: dict[str, Any] = {"prog": f"mtfast {command} {name}", "args": options, "console_outputs": is_main()}
    if command == "push":  # changes nothing that the run was made with
        return tyro.cli(kind, description=f"{summary[0].upper()}{summary[1:]}.", **said), file.config
    recipe = "" if file.lines else f" {ALL_RECIPES[file.recipe].__doc__}"
    description = f"{summary[0].upper()}{summary[1:]}.{recipe} --print-config shows the result."
    # The class is made here for its default: the configuration that the options change.
    arguments: Any = dataclasses.make_dataclass(
        "Arguments",
        [
            ("own", Annotated[kind, tyro.conf.arg(name="")], field(default_factory=kind)),
            ("config", Annotated[RunConfig, tyro.conf.arg(name="")], field(default=file.config)),
        ],
        frozen=True,
        # Else Python 3.11.2, say, makes one of its defaults, of which it cannot print an endless integer.
        namespace={"__doc__": description},
    )
    parsed = tyro.cli(arguments, description=description, **said)
    return parsed.own, parsed.config


def _carry_out(name: str, file: ConfigFile, config: RunConfig, options: dict[str, Any]) -> None:
    from mtfast.commands import execute
    from mtfast.training.engine import alive
    from mtfast.training.engine.failure import leave
    from mtfast.training.stopping import SIGNALS, Stopped

    try:
        execute(name, file.recipe, config, **options)
        alive.finish()
    except Stopped as stopped:
        for signum in SIGNALS:  # launchers pass on what they were sent, to whom it was sent too
            signal.signal(signum, signal.SIG_IGN)
        alive.finish()
        fail(str(stopped), code=128 + stopped.signum)
    except KeyboardInterrupt:
        fail("interrupted; the same command continues the run", code=128 + signal.SIGINT)
    except Error as error:
        leave(error, f"mtfast: {_located(error, file, config)}", 2, expected=True)
    except Exception as error:
        if isinstance(error, OSError) and error.errno in FIXABLE:
            text = f"{error.filename}: {error.strerror}" if error.filename else str(error)
            leave(error, f"mtfast: {text}", 2, expected=True)
        if world_size() == 1:
            raise
        leave(error, traceback.format_exc(), 1, expected=False)


def _located(error: Error, file: ConfigFile, config: RunConfig) -> str:
    """What an error says, with the line of the field that is at fault."""
    place = file.place_of(error.field, config) if isinstance(error, FieldError) else None
    return f"{place}: {error}" if place else str(error)


def _configuration(command: str, name: str) -> ConfigFile:
    """The configuration of a recipe, in a file, or of a run by its directory, wherever that lies now."""
    if name in ALL_RECIPES and command not in OF_RUNS:
        return ConfigFile(Path(name), name, ALL_RECIPES[name]())
    path = Path(os.path.expanduser(name))
    try:
        # Of os.path, to which a name that is too long for a file is no file.
        if os.path.isdir(path):
            if not (path / CONFIG_FILE).is_file():
                below = sorted(str(found.parent) for found in path.glob(f"*/{CONFIG_FILE}"))
                meant = f"; name one of {', '.join(below)}" if below else ""
                fail(f"{name} holds no run: there is no {CONFIG_FILE} in it{meant}")
            file = read_config_file(path / CONFIG_FILE, ALL_RECIPES)
            # The directory of an experiment lies in the one of its runs.
            run_dir = os.path.normpath(os.path.join(name, "..")) if file.recipe in EXPERIMENTS else name
            return replace(file, config=replace(file.config, run_dir=run_dir))
        if command in OF_RUNS:
            fail(f"{command} needs the directory of a run, and {name} is none")
        if not os.path.isfile(path) and path.suffix not in (".yaml", ".yml"):
            fail(
                f"there is no recipe {name!r}, and no such file or directory; the recipes are "
                f"{', '.join(ALL_RECIPES)}, a file is YAML with a recipe's name and what differs, and a "
                "directory is that of a run"
            )
        return read_config_file(path, ALL_RECIPES)
    except ConfigError as error:
        fail(str(error))


def _usage() -> str:
    lines = ["usage: mtfast COMMAND RECIPE_OR_RUN [--dotted.option value ...]", "", "commands:"]
    lines += [f"  {name:<10}{summary}" for name, summary in COMMANDS.items()]
    lines += [
        f"  {'doctor':<10}what is installed, which implementation each op has, what is missing",
        "",
        "recipes:",
    ]
    lines += [f"  {name:<10}{recipe.__doc__}" for name, recipe in ALL_RECIPES.items()]
    lines += [
        "",
        "A YAML file with a recipe's name and what differs, tasks of your own say, stands for a recipe, and",
        "so does the directory of a run, runs/demo say, with all that it was made with.",
        "mtfast COMMAND RECIPE --help lists every option; --print-config shows the configuration and stops.",
        "Start it with `deepspeed --module mtfast ...`, `torchrun -m mtfast ...` or plainly.",
    ]
    return "\n".join(lines)
