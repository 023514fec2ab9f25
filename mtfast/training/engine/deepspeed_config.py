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
    """The DeepSpeed configuration of one stage. Without ZeRO the optimizer is one that clips, and keeps
    float32 copies of bf16 weights, by itself (`WholeOptimizer`), so DeepSpeed is told of neither.

    A user's JSON (`engine.deepspeed_config`) may set anything that the run's configuration does not
    decide; what the run decides may be left out, be "auto", or agree.

    Args:
        float32: the stage keeps its weights in float32 whatever `engine.precision` is (and computes in bf16
            under autocast).

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
        "zero_optimization": {} if engine.zero_stage is None else {"stage": engine.zero_stage},
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
    if isinstance(given.get("checkpoint"), dict) and "writer" in given["checkpoint"]:
        conflicts.append("checkpoint.writer: a thread of the run's own writes the states")
    said = given.get("zero_optimization", {})
    if isinstance(said, dict) and said.get("stage", AUTO) not in (AUTO, 0, 1, 2, 3):
        conflicts.append(f'zero_optimization.stage: {said["stage"]!r} is none of 0, 1, 2, 3 and "auto"')
    if conflicts:
        raise ConfigError(
            f"{engine.deepspeed_config} contradicts the configuration of {stage_name}:\n  "
            + "\n  ".join(conflicts)
            + '\nChange one of the two, or write "auto" in the JSON to take the run\'s value.'
        )
    extra = {key: value for key, value in given.items() if key not in ("optimizer", "scheduler")}
    stage_of_zero = _zero_stage(engine, extra.get("zero_optimization", {}), world_size, float32)
    decided["zero_optimization"] = {"stage": stage_of_zero}
    if float32 or stage_of_zero == 0:
        decided["bf16"] = {"enabled": False}
    if stage_of_zero == 0:
        decided["gradient_clipping"] = 0.0
    return _merge(_merge(_defaults(decided, extra), extra), decided)


def _zero_stage(engine: EngineConfig, given: dict[str, Any], world_size: int, float32: bool) -> int:
    """What is sharded. Unless the run or the JSON decides, optimizer state where there are ranks to share it
    or the JSON tunes ZeRO; heads in float32 are too few for more than that to matter."""
    said = given.get("stage", AUTO)
    stage = said if engine.zero_stage is None else engine.zero_stage
    alone = world_size == 1 and not given.keys() - {"stage"}
    if stage == AUTO or (float32 and alone):
        return 0 if alone else 1
    if stage == 0 and world_size > 1 and engine.precision == "bf16" and not float32:
        # DeepSpeed would add up gradients over ranks in bf16 alone. ZeRO 1 makes the same update.
        return 1
    return stage


def _defaults(decided: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """What is cheapest. Left out is what makes the host wait for the device in every step: timing it, looking
    for overflows (the loop looks at losses and weights when it reads them), and the norm of gradients that
    nobody clips."""
    defaults: dict[str, Any] = {
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
        "timers": {"throughput": {"enabled": False}},
        "bf16": {"check_grad_overflow": False},
    }
    stage, zero = decided["zero_optimization"]["stage"], defaults.setdefault("zero_optimization", {})
    if stage in (1, 2) and "offload_optimizer" not in given.get("zero_optimization", {}):
        zero["compute_grad_norm"] = decided["gradient_clipping"] > 0
    if stage == 1:
        # The same sums with a third of the copies: gradients are put in a row once, added up over the ranks
        # and handed back, not taken apart by owner in between.
        zero |= {"contiguous_gradients": False, "reduce_scatter": False}
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
