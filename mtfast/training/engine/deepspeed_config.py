"""DeepSpeed's JSON made from the run's configuration, and a user's own JSON merged into it."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

from mtfast.config import ConfigError, EngineConfig, StageConfig

AUTO = "auto"


def deepspeed_config(
    engine: EngineConfig, stage: StageConfig, stage_name: str, world_size: int, *, float32: bool = False
) -> dict[str, Any]:
    """The DeepSpeed configuration of one stage.

    A user's JSON (`engine.deepspeed_config`) may set anything that the run's configuration does not
    decide; what the run decides may be left out, be "auto", or agree.

    Args:
        float32: the stage keeps its weights in float32 whatever `engine.precision` is (and computes in bf16
            under autocast). On one rank it then runs without ZeRO, which would have nothing to shard.

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
    given = {} if engine.deepspeed_config is None else _read(Path(engine.deepspeed_config))
    conflicts = _conflicts(decided | optimizer, given)
    if "scheduler" in given and given["scheduler"] != AUTO:
        conflicts.append(f"scheduler: the learning rate follows {stage_name}.schedule={stage.schedule!r}")
    if "activation_checkpointing" in given:
        conflicts.append(
            "activation_checkpointing: layers do it themselves; set engine.activation_checkpointing"
        )
    if conflicts:
        raise ConfigError(
            f"{engine.deepspeed_config} contradicts the configuration of {stage_name}:\n  "
            + "\n  ".join(conflicts)
            + '\nChange one of the two, or write "auto" in the JSON to take the run\'s value.'
        )
    extra = {key: value for key, value in given.items() if key not in ("optimizer", "scheduler")}
    if float32:
        decided["bf16"] = {"enabled": False}
        if world_size == 1 and set(extra.get("zero_optimization", {})) <= {"stage"}:
            decided["zero_optimization"] = {"stage": 0}
    elif engine.precision == "bf16" and engine.zero_stage == 0:
        # Without ZeRO, DeepSpeed's bf16 optimizer goes through the weights one by one and reads each
        # gradient's norm back to the host. ZeRO 1 makes the same update without that.
        decided["zero_optimization"] = {"stage": 1}
    return _merge(_merge(_defaults(decided, extra), extra), decided)


def _defaults(decided: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Leaves out what makes the host wait for the device in every step: timing it, looking for overflows (the
    loop looks at losses and weights when it reads them), and the norm of gradients that nobody clips."""
    defaults: dict[str, Any] = {
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
        "timers": {"throughput": {"enabled": False}},
        "bf16": {"check_grad_overflow": False},
    }
    zero = given.get("zero_optimization", {})
    if decided["zero_optimization"]["stage"] in (1, 2) and "offload_optimizer" not in zero:
        defaults["zero_optimization"] = {"compute_grad_norm": decided["gradient_clipping"] > 0}
    return defaults


def checksum_of(path: str) -> int:
    """Of what a user's JSON says."""
    return zlib.crc32(json.dumps(_read(Path(path)), sort_keys=True).encode())


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
