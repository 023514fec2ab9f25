"""The learning rate of each step."""

from __future__ import annotations

import math

from mtfast.config import StageConfig


def learning_rate_at(stage: StageConfig, step: int, total_steps: int) -> float:
    """Learning rate of the step with index `step`: linear warm-up, then constant, linear or cosine decay."""
    warmup = round(stage.warmup_fraction * total_steps)
    if step < warmup:
        return stage.learning_rate * (step + 1) / warmup
    left = (total_steps - step) / max(total_steps - warmup, 1)
    if stage.schedule == "linear":
        return stage.learning_rate * left
    if stage.schedule == "cosine":
        return stage.learning_rate * 0.5 * (1 + math.cos(math.pi * (1 - left)))
    return stage.learning_rate
