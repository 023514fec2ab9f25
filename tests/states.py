"""A resumable state, written as training writes it."""

from pathlib import Path
from typing import Any

from mtfast.training.engine.engine import Engine
from mtfast.training.engine.keeping import Keeper, State


def save_state(engine: Engine, directory: Path, step: int, client: dict[str, Any]) -> None:
    """Write the engine's state of this moment and wait for it."""
    keeper = Keeper(engine)
    keeper.keep(None, State(directory, step, client))
    keeper.wait()
