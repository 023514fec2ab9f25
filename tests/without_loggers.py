"""What `processes.Ranks` calls where loggers cannot be had, or are not asked for."""

import os
import sys

from processes import command

import mtfast
from mtfast import commands
from mtfast.config import RunConfig


def without(package: str, *arguments: str) -> None:
    """A command where a package is not installed."""
    sys.modules[package] = None  # type: ignore[assignment]
    command(*arguments)


def not_logged_in(home: str, *arguments: str) -> None:
    """A command of a user whom W&B does not know."""
    os.environ["HOME"] = home
    for name in ("WANDB_MODE", "WANDB_API_KEY", "NETRC"):
        os.environ.pop(name, None)
    command(*arguments)


def train_telling_loggers(config: RunConfig) -> None:
    """Train a run, and say which loggers have been imported."""
    commands._report = lambda *_: None  # type: ignore[assignment]
    mtfast.train(config)
    print(sorted({name.split(".")[0] for name in sys.modules} & {"tensorboard", "wandb"}))
