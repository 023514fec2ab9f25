"""A user's own DeepSpeed JSON: read, and checked against what a run decides; nothing in it is passed over."""

from __future__ import annotations

import difflib
import importlib.util
import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mtfast.config import ConfigError, EngineConfig, StageConfig

from . import scheduler
from .deepspeed_keys import AUTO, KEYS, NVME, says_nothing

ADAM_EPS = 1e-8
MONITORS = {"tensorboard": "tensorboard", "wandb": "wandb", "csv_monitor": None, "comet": "comet_ml"}
PRINTED = ("wall_clock_breakdown", "memory_breakdown", "dump_state", "comms_logger", "flops_profiler")
_ADAM = {  # what the JSON's Adam may say besides what the stage does
    "torch_adam": (True, False),
    "adam_w_mode": (True,),
    "bias_correction": (True,),
    "amsgrad": (False,),
    "fused": (True, False),
}
_KEPT_WHOLE = (
    "partition_activations",
    "cpu_checkpointing",
    "contiguous_memory_optimization",
    "number_checkpoints",
)
_OF_ZERO_3 = (
    "offload_param",
    "zero_hpz_partition_size",
    "zero_quantized_weights",
    "zero_quantized_gradients",
    "zero_quantized_nontrainable_weights",
)
_OLD_NAMES = {
    "cpu_offload": "offload_optimizer",
    "cpu_offload_param": "offload_param",
    "cpu_offload_use_pin_memory": "offload_optimizer with pin_memory",
}
_DROPPED_BY_ZERO = ("mics_shard_size", "mics_hierarchical_params_gather", "zeropp_loco_param")


def read_json(engine: EngineConfig) -> dict[str, Any]:
    """What `engine.deepspeed_config` holds, {} where it is not set.

    Raises:
        ConfigError: it cannot be read.
    """
    if engine.deepspeed_config is None:
        return {}
    path = Path(engine.deepspeed_config).expanduser()
    field = "engine.deepspeed_config"
    try:
        given = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_without_twins)
    except OSError as error:
        raise ConfigError(f"{field} {path}: {error.strerror or error}", field) from error
    except ValueError as error:
        raise ConfigError(f"{field} {path} is not JSON: {error}", field) from error
    if not isinstance(given, dict):
        raise ConfigError(f"{field} {path} must hold a JSON object", field)
    return given


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if twins := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"two values are called {', '.join(twins)}")
    return dict(pairs)


def checksum_of(engine: EngineConfig) -> int:
    """Of what the JSON says."""
    return zlib.crc32(json.dumps(read_json(engine), sort_keys=True).encode())


def adam_eps(given: Mapping[str, Any]) -> float:
    """AdamW's epsilon, which a run has no setting for."""
    optimizer = given.get("optimizer", AUTO)
    eps = AUTO if optimizer == AUTO else optimizer.get("params", {}).get("eps", AUTO)
    return ADAM_EPS if eps == AUTO else float(eps)


def checkpoints_activations(engine: EngineConfig) -> bool:
    """Whether layers keep only their inputs for the backward pass."""
    return engine.activation_checkpointing or read_json(engine).get("activation_checkpointing", AUTO) != AUTO


def is_on(given: Mapping[str, Any], key: str) -> bool:
    """Whether a block, or a flag, is enabled."""
    value = given.get(key)
    return (value.get("enabled") if isinstance(value, dict) else value) not in (None, False, AUTO)


def offloads(given: Mapping[str, Any], what: str) -> str | None:
    """The device, "cpu" or "nvme", that `offload_optimizer` or `offload_param` names, if one does."""
    zero = given.get("zero_optimization", AUTO)
    block = None if zero == AUTO else zero.get(what)
    device = block.get("device", "none") if isinstance(block, dict) else "none"
    return None if device in ("none", AUTO) else device


def updates_on_host(given: Mapping[str, Any]) -> bool:
    """Whether what the optimizer updates is offloaded."""
    return offloads(given, "offload_optimizer") is not None


def faults_of(
    given: Mapping[str, Any],
    decided: Mapping[str, tuple[str, Any]],
    stage: StageConfig,
    stage_name: str,
    zero_stage: int,
) -> list[str]:
    """Everything in a JSON that is unknown, refused, or says something else than the run, a line each.

    Args:
        decided: by dotted key, the setting that decides it and the value that it has.
        zero_stage: that the stage would run under.
    """
    found, shapeless = [], []
    for key, value in given.items():
        if key not in KEYS:
            near = difflib.get_close_matches(key, KEYS, n=1)
            meant = f"did you mean {near[0]}?" if near else "docs/deepspeed.md has those that there are"
            found.append(f"{key}: DeepSpeed has no such key; {meant}")
        elif KEYS[key].verdict == "taken over" and not says_nothing(key, value):
            found.append(f"{key}: mtfast has this in {KEYS[key].text.replace('`', '')}; leave it out")
        elif KEYS[key].verdict == "refused" and not says_nothing(key, value):
            found.append(f"{key}: {KEYS[key].text.replace('`', '')}; leave it out")
        elif KEYS[key].verdict == "works" and isinstance(value, dict) != (key in _BLOCKS) and value != AUTO:
            shapeless.append(f"{key}: {value!r} must be {'an object' if key in _BLOCKS else 'a value'}")
    shapeless += [
        f"{key}: {given[key]!r} must be {wanted}"
        for key, (wanted, holds) in _SCALARS.items()
        if given.get(key) not in (None, AUTO) and not holds(given[key])
    ]
    if shapeless:
        return found + shapeless
    found += [
        f'{name}: the JSON says {there!r}, {setting} {value!r}; make them equal, or write "auto" in the JSON'
        for name, (setting, value) in decided.items()
        if (there := _at(given, name)) != AUTO and there != value
    ]
    found += scheduler.faults_of(given.get("scheduler", AUTO), stage, stage_name)
    found += _faults_of_optimizer(given.get("optimizer", AUTO))
    found += _faults_of_zero(given, zero_stage)
    scatters = zero_stage >= 2 and _at(given, "zero_optimization.reduce_scatter") is not False
    found += [
        f"{name}: ZeRO {zero_stage} needs zero_optimization.reduce_scatter false for it"
        for name in ("prescale_gradients", "gradient_predivide_factor")
        if scatters and _is_set(given.get(name))
    ]
    block = given.get("activation_checkpointing", AUTO)
    found += [
        f"activation_checkpointing.{name}: layers keep their inputs whole and on the device; leave it out"
        for name in _KEPT_WHOLE
        if block != AUTO and block.get(name) not in (None, False, AUTO)
    ]
    for key, package in MONITORS.items():
        if is_on(given, key) and package and importlib.util.find_spec(package) is None:
            found.append(f"{key}: the package {package} is not installed: python -m pip install {package}")
    return found


_BLOCKS = (
    *("optimizer", "scheduler", "bf16", "zero_optimization", "activation_checkpointing"),
    *(*MONITORS, "comms_logger", "flops_profiler", "timers"),
)
_FLAG = "true or false", lambda value: isinstance(value, bool)
_SCALARS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "steps_per_print": ("a number of steps, at least 1", lambda value: type(value) is int and value > 0),
    "gradient_predivide_factor": (
        "a positive number",
        lambda value: type(value) in (int, float) and value > 0,
    ),
    **dict.fromkeys(("wall_clock_breakdown", "memory_breakdown", "dump_state"), _FLAG),
    **dict.fromkeys(("prescale_gradients", "disable_python_gc"), _FLAG),
}


def _at(given: Mapping[str, Any], name: str) -> Any:
    """The value of a dotted key, "auto" where there is none."""
    value: Any = given
    for part in name.split("."):
        value = value.get(part, AUTO) if isinstance(value, dict) else AUTO
    return value


def _is_set(value: Any) -> bool:
    """Whether a flag is, or a number is another than 1."""
    return value is True or value not in (None, False, AUTO, 1)


def _faults_of_optimizer(block: Any) -> Iterator[str]:
    if block == AUTO:
        return
    if block.get("type") not in ("AdamW", "Adam"):
        yield (
            f"optimizer.type: {block.get('type')!r} is neither AdamW nor Adam; leave the optimizer out, and "
            "engine.optimizer says which implementation of AdamW it is"
        )
    params = block.get("params", {})
    if not isinstance(params, dict):
        yield f"optimizer.params: {params!r} must be an object"
        return
    eps = params.get("eps", AUTO)
    if eps != AUTO and not (isinstance(eps, float) and 0 < eps < 1):
        yield f"optimizer.params.eps: {eps!r} must be a number between 0 and 1"
    for name, value in params.items():
        if name in ("lr", "betas", "eps", "weight_decay"):
            continue
        if name not in _ADAM:
            yield f"optimizer.params.{name}: there are lr, betas, eps, weight_decay, {', '.join(_ADAM)}"
        elif value not in (*_ADAM[name], AUTO):
            yield f"optimizer.params.{name}: {value!r}, and AdamW here has {_ADAM[name][0]!r}"


def _faults_of_zero(given: Mapping[str, Any], zero_stage: int) -> Iterator[str]:
    zero = given.get("zero_optimization", AUTO)
    if zero == AUTO:
        return
    under = f"it is ZeRO {zero_stage} here; set engine.zero_stage"
    for name, now in _OLD_NAMES.items():
        if name in zero:
            yield f"zero_optimization.{name}: DeepSpeed calls it {now} now; use that"
    if zero.get("zenflow") is not None:
        yield "zero_optimization.zenflow: it updates weights outside the step, which no state could hold"
    for name in _DROPPED_BY_ZERO:
        if name in zero:
            yield f"zero_optimization.{name}: DeepSpeed has dropped it; leave it out"
    for name in _OF_ZERO_3:
        said = offloads(given, name) if name == "offload_param" else zero.get(name)
        if _is_set(said) and zero_stage != 3:
            yield f"zero_optimization.{name} needs ZeRO 3; {under}"
    if offloads(given, "offload_optimizer") and zero_stage == 0:
        yield f"zero_optimization.offload_optimizer needs ZeRO 1, 2 or 3; {under}"
    for name in ("offload_optimizer", "offload_param"):
        if offloads(given, name) == "nvme":
            yield f"zero_optimization.{name}.device: {NVME}; use cpu"
