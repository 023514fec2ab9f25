"""A resumable state, written as training writes it."""

from pathlib import Path
from typing import Any

from mtfast.training.engine.engine import Engine
from mtfast.training.engine.keeping import Due, Keeper
from mtfast.training.engine.state import newest_state, read_state


def save_state(engine: Engine, directory: Path, step: int, client: dict[str, Any]) -> None:
    """Write the engine's state of this moment and wait for it."""
    keeper = Keeper(engine)
    keeper.keep(None, Due(directory, step, client))
    keeper.wait()


def load_state(engine: Engine, directory: Path) -> dict[str, Any] | None:
    """Go on from the newest state; what was saved with it."""
    found = newest_state(directory)
    if found is None:
        return None
    state = read_state(found.path)
    engine.load(state)
    return state.client
