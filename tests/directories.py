"""The directory of a run, opened as the commands open it."""

from mtfast.config import RunConfig, to_dict
from mtfast.training.run.directory import RunDirectory


def directory_of(config: RunConfig, **options) -> RunDirectory:
    return RunDirectory(config.path, to_dict(config), **options)
