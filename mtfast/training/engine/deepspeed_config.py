"""DeepSpeed's JSON made from the run's configuration, and a user's own JSON merged into it."""

from __future__ import annotations

from typing import Any

from mtfast.config import ConfigError, EngineConfig, StageConfig

from .deepspeed_json import MONITORS, PRINTED, faults_of, is_on, read_json, updates_on_host
from .deepspeed_keys import AUTO, KEYS

_NEVER = 10**9


def deepspeed_config(
    engine: EngineConfig, stage: StageConfig, stage_name: str, world_size: int, *, float32: bool = False
) -> dict[str, Any]:
    """The DeepSpeed configuration of one stage. Without ZeRO the optimizer is one that clips, and keeps
    float32 copies of bf16 weights, by itself (`WholeOptimizer`), so DeepSpeed is told of neither.

    A user's JSON (`engine.deepspeed_config`) may set anything that the run's configuration does not
    decide; what the run decides may be left out, be "auto", or agree. KEYS says what becomes of each key.

    Args:
        float32: the stage keeps its weights in float32 whatever `engine.precision` is (and computes in bf16
            under autocast).

    Raises:
        ConfigError: the batch does not divide, the JSON cannot be read, or has something in it that cannot be
            done or contradicts the run's configuration; everything is named, with both values.
    """
    shares = world_size * stage.accumulation
    if stage.batch_size % shares:
        raise ConfigError(
            f"{stage_name}.batch_size {stage.batch_size} does not divide into {world_size} rank(s) x "
            f"{stage.accumulation} accumulation step(s); use a multiple of {shares}"
        )
    micro_batch = stage.batch_size // shares
    given = read_json(engine)
    said = given.get("zero_optimization", {})
    zero_stage = _zero_stage(engine, said if isinstance(said, dict) else {}, world_size, float32)
    decided = {
        "train_batch_size": (f"{stage_name}.batch_size", stage.batch_size),
        "train_micro_batch_size_per_gpu": (f"what {stage_name}.batch_size leaves a rank", micro_batch),
        "gradient_accumulation_steps": (f"{stage_name}.accumulation", stage.accumulation),
        "gradient_clipping": (f"{stage_name}.gradient_clipping", stage.gradient_clipping),
        "bf16.enabled": ("engine.precision bf16", engine.precision == "bf16"),
        "optimizer.params.lr": (f"{stage_name}.learning_rate", stage.learning_rate),
        "optimizer.params.betas": (f"{stage_name}.betas", list(stage.betas)),
        "optimizer.params.weight_decay": (f"{stage_name}.weight_decay", stage.weight_decay),
    }
    if engine.zero_stage is not None:
        decided["zero_optimization.stage"] = ("engine.zero_stage", engine.zero_stage)
    if faults := faults_of(given, decided, stage, stage_name, zero_stage):
        raise ConfigError(
            f"{engine.deepspeed_config} does not go with the configuration of {stage_name}:\n  "
            + "\n  ".join(faults),
            "engine.deepspeed_config",
        )
    ours = ("optimizer", "scheduler", "activation_checkpointing")  # built here, and handed over
    extra = {k: v for k, v in given.items() if KEYS[k].verdict == "works" and k not in ours}
    # Without ZeRO, weights that compute in bf16 have their float32 masters in the optimizer.
    bf16 = engine.precision == "bf16" and not float32 and zero_stage > 0
    settled: dict[str, Any] = {
        "train_batch_size": stage.batch_size,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": stage.accumulation,
        "gradient_clipping": stage.gradient_clipping if zero_stage > 0 else 0.0,
        "bf16": {"enabled": bf16},
        "fp16": {"enabled": False},
        "zero_optimization": {"stage": zero_stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    return _merge(_merge(_defaults(settled, given), _without_auto(extra)), settled)


def prints(settings: dict[str, Any]) -> bool:
    """Whether DeepSpeed's logger is asked for more than warnings."""
    printed = settings["steps_per_print"] < _NEVER or settings["timers"]["throughput"]["enabled"]
    return printed or any(is_on(settings, key) for key in PRINTED)


def is_monitored(settings: dict[str, Any]) -> bool:
    """Whether a monitor is asked for."""
    return any(is_on(settings, key) for key in MONITORS)


def is_watched(settings: dict[str, Any]) -> bool:
    """Whether DeepSpeed's engine looks at each step on the host: such a step cannot be a CUDA graph."""
    return prints(settings) or is_monitored(settings)


def _zero_stage(engine: EngineConfig, given: dict[str, Any], world_size: int, float32: bool) -> int:
    """What is sharded. Unless the run or the JSON decides, optimizer state where there are ranks to share it
    or the JSON tunes ZeRO; heads in float32 are too few for more than that to matter."""
    said = given.get("stage", AUTO)
    if said not in (AUTO, 0, 1, 2, 3):
        raise ConfigError(
            f'{engine.deepspeed_config}: zero_optimization.stage: {said!r} is none of 0, 1, 2, 3 and "auto"',
            "engine.deepspeed_config",
        )
    stage = said if engine.zero_stage is None else engine.zero_stage
    alone = world_size == 1 and not given.keys() - {"stage"}
    if stage == AUTO or (float32 and alone):
        return 0 if alone else 1
    if stage == 0 and world_size > 1 and engine.precision == "bf16" and not float32:
        # DeepSpeed would add up gradients over ranks in bf16 alone. ZeRO 1 makes the same update.
        return 1
    return stage


def _defaults(settled: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """What is cheapest. Left out is what makes the host wait for the device in every step: timing it, looking
    for overflows (the loop looks at losses and weights when it reads them), and the norm of gradients that
    nobody clips."""
    defaults: dict[str, Any] = {
        "steps_per_print": _NEVER,
        "timers": {"throughput": {"enabled": False}},
        "bf16": {"check_grad_overflow": False},
    }
    stage, zero = settled["zero_optimization"]["stage"], defaults.setdefault("zero_optimization", {})
    if stage in (1, 2) and not updates_on_host(given):
        zero["compute_grad_norm"] = settled["gradient_clipping"] > 0
    if stage == 1:
        # The same sums with a third of the copies: gradients are put in a row once, added up over the ranks
        # and handed back, not taken apart by owner in between.
        zero |= {"contiguous_gradients": False, "reduce_scatter": False}
    return defaults


def _without_auto(value: Any) -> Any:
    """A block without what it leaves to the defaults, by "auto" or null."""
    if not isinstance(value, dict):
        return value
    return {name: _without_auto(of) for name, of in value.items() if of not in (AUTO, None)}


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged
