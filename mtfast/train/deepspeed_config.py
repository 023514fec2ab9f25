"""DeepSpeed's JSON made from the run's configuration, and a user's own JSON merged into it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .config import ConfigError, EngineConfig, StageConfig

AUTO = "auto"


def deepspeed_config(
    engine: EngineConfig, stage: StageConfig, stage_name: str, world_size: int
) -> dict[str, Any]:
    """The DeepSpeed configuration of one stage.

    A user's JSON (`engine.deepspeed_config`) may set anything that the run's configuration does not
    decide; what the run decides may be left out, be "auto", or agree.

    Raises:
        ConfigError: the batch does not divide, the JSON cannot be read, or it contradicts the run's
            configuration; every contradiction is named with both values.
    """
    shares = world_size * stage.accumulation
    if stage.batch_size % shares:
        raise ConfigError(
            f"{stage_name}.batch_size {stage.batch_size} does not divide into {world_size} rank(s) x "
            f"{stage.accumulation} accumulation step(s); use a multiple of {shares}"
        )
    decided: dict[str, Any] = {
        "train_batch_size": stage.batch_size,
        "train_micro_batch_size_per_gpu": stage.batch_size // shares,
        "gradient_accumulation_steps": stage.accumulation,
        "gradient_clipping": stage.gradient_clipping,
        "bf16": {"enabled": engine.precision == "bf16"},
        "fp16": {"enabled": False},
        "zero_optimization": {"stage": engine.zero_stage},
    }
    # The optimizer is built here and handed over; a JSON may still describe it, and must then agree.
    optimizer = {
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": stage.learning_rate,
                "betas": list(stage.betas),
                "eps": 1e-8,
                "weight_decay": stage.weight_decay,
            },
        }
    }
    defaults = {"zero_allow_untested_optimizer": True, "steps_per_print": 10**9}
    if engine.deepspeed_config is None:
        return decided | defaults
    given = _read(Path(engine.deepspeed_config))
    conflicts = _conflicts(decided | optimizer, given)
    if "scheduler" in given and given["scheduler"] != AUTO:
        conflicts.append(f"scheduler: the learning rate follows {stage_name}.schedule={stage.schedule!r}")
    if conflicts:
        raise ConfigError(
            f"{engine.deepspeed_config} contradicts the configuration of {stage_name}:\n  "
            + "\n  ".join(conflicts)
            + '\nChange one of the two, or write "auto" in the JSON to take the run\'s value.'
        )
    extra = {key: value for key, value in given.items() if key not in ("optimizer", "scheduler")}
    return _merge(_merge(defaults, extra), decided)


def _read(path: Path) -> dict[str, Any]:
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"engine.deepspeed_config {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise ConfigError(f"engine.deepspeed_config {path} is not JSON: {error}") from error
    if not isinstance(given, dict):
        raise ConfigError(f"engine.deepspeed_config {path} must hold a JSON object")
    return given


def _conflicts(decided: dict[str, Any], given: dict[str, Any], prefix: str = "") -> list[str]:
    found = []
    for key, value in decided.items():
        if key not in given or given[key] == AUTO:
            continue
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            if not isinstance(given[key], dict):
                found.append(f"{name}: {given[key]!r} must be an object")
                continue
            found += _conflicts(value, given[key], f"{name}.")
        elif given[key] != value:
            found.append(f"{name}: the JSON says {given[key]!r}, the run {value!r}")
    return found


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged
