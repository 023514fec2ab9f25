"""mtfast: one BERT, several tasks, packed steps.

`mtfast.train(mtfast.recipes.demo())` trains a run, `mtfast.load("runs/demo").predict("sst", texts)` uses it.
`mtfast.Task` declares a task, `mtfast.ops` has the fused operations.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mtfast import recipes
    from mtfast.predict import load
    from mtfast.run import train
    from mtfast.tasks import Task

__all__ = ["Task", "__version__", "load", "recipes", "train"]
__version__ = "0.1.0"

# Imported when they are used: torch, transformers and deepspeed take seconds.
_WHERE = {
    "Task": "mtfast.tasks",
    "load": "mtfast.predict",
    "recipes": "mtfast.recipes",
    "train": "mtfast.run",
}


if not TYPE_CHECKING:  # which knows the names above, and no others

    def __getattr__(name: str) -> Any:
        if name not in _WHERE:
            raise AttributeError(f"module 'mtfast' has no attribute {name!r}")
        from mtfast.packages import explained

        with explained():
            module = importlib.import_module(_WHERE[name])
        return module if name == "recipes" else getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_WHERE})
