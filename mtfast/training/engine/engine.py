"""DeepSpeed for every stage, launcher and ZeRO stage in one class; no other package of mtfast knows of it."""

from __future__ import annotations

import contextlib
import importlib
import logging
import math
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import pydantic
import torch
from torch import Tensor, nn

from mtfast.config import ConfigError, EngineConfig, StageConfig
from mtfast.models.checkpoint import CheckpointError

from . import alive, memory, ranks
from .deepspeed_config import deepspeed_config, is_monitored, is_watched, prints
from .deepspeed_json import adam_eps, is_on, read_json, updates_on_host
from .optimizer import Moments, WholeOptimizer, maker, parameter_groups
from .scheduler import scheduler_of
from .snapshot import Snapshot
from .state import State


def start() -> torch.device:
    """Join the process group that the launcher, or the lack of one, asks for; return this rank's device."""
    ranks.prepare_environment()
    deepspeed = _deepspeed()
    if not torch.distributed.is_initialized():
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        if ranks.world_size() == 1:  # nobody to meet: no port is taken
            store = torch.distributed.HashStore()
            torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
        deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False)
    alive.start()
    if not torch.cuda.is_available():
        memory.keep_freed()
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def stop() -> None:
    """Leave the process group."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _deepspeed() -> Any:
    # What it tries to link, when it is imported or asked what it can do, it silences through sys.stderr,
    # which in a notebook is not where a linker writes.
    with contextlib.redirect_stderr(sys.__stderr__):
        deepspeed = importlib.import_module("deepspeed")
        # An optional intra-node collective that it would compile at start on CPU; gloo serves alone.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    _logger().setLevel(logging.WARNING)
    # DeepSpeed calls collectives by names that newer versions of torch have replaced.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    return deepspeed


def _logger() -> logging.Logger:
    return logging.getLogger("DeepSpeed")


def confirm(config: EngineConfig, stage: StageConfig, stage_name: str, *, float32: bool = False) -> None:
    """See to it that a stage's engine can be made, before any data is read. All ranks have started.

    Raises:
        ConfigError: DeepSpeed's configuration or its optimizer cannot be had; the message says what is wrong.
    """
    settings = deepspeed_config(config, stage, stage_name, ranks.world_size(), float32=float32)
    given = read_json(config)
    maker(config, stage, False, eps=adam_eps(given), on_host=updates_on_host(given))
    if not given:
        return
    quantized = [name for name in settings["zero_optimization"] if name.startswith("zero_quantized")]
    if quantized and not torch.cuda.is_available():
        raise _refused(config, f"zero_optimization.{quantized[0]} needs a GPU")
    configuration = importlib.import_module("deepspeed.runtime.config")
    try:
        configuration.DeepSpeedConfig(settings)
    except pydantic.ValidationError as error:
        faults = [f"{'.'.join(map(str, found['loc']))}: {found['msg']}" for found in error.errors()]
        raise _refused(config, f"{faults[0]} ({error.title})") from error
    except (configuration.DeepSpeedConfigError, AssertionError, ValueError, TypeError) as error:
        raise _refused(config, str(error)) from error


def _refused(config: EngineConfig, why: str) -> ConfigError:
    return ConfigError(f"{config.deepspeed_config}: {why}", "engine.deepspeed_config")


class Engine:
    """A model under DeepSpeed, `model`, with its optimizer.

    The float32 weights that the optimizer works on start from the model's own float32 weights, not from
    their bf16 rounding, so a stage takes over exactly what the one before it left.
    """

    def __init__(
        self,
        model: nn.Module,
        config: EngineConfig,
        stage: StageConfig,
        stage_name: str,
        *,
        float32: bool = False,
        apart: str = "",
    ) -> None:
        """
        Args:
            float32: keep the weights in float32 in any precision; bf16 is then autocast's.
            apart: how the names of weights begin that `set_learning_rate` can give a rate of their own.
        """
        self._settings = deepspeed_config(config, stage, stage_name, ranks.world_size(), float32=float32)
        ranks.agree(f"DeepSpeed's configuration of {stage_name}", self._settings)
        given = read_json(config)
        self.scheduler = scheduler_of(given, stage)  # in the place of the stage's schedule
        self._bf16 = config.precision == "bf16" and not float32
        self.precision = config.precision
        self.capturable = self._is_capturable(config, stage)
        self._module = model
        self._parameters = dict(model.named_parameters())
        if config.precision == "bf16" and float32:
            # Inside of what DeepSpeed calls, since it turns off a GPU's autocast that is around it.
            model.forward = torch.autocast(_device().type, torch.bfloat16)(model.forward)  # type: ignore[method-assign]
        if is_on(self._settings, "flops_profiler"):
            from .flops import counted  # which imports deepspeed

            model.forward = counted(model.forward, self._profiles)  # type: ignore[method-assign]
        exact: dict[str, Tensor] = {}
        on_host = updates_on_host(given)
        make = maker(config, stage, self.capturable, eps=adam_eps(given), on_host=on_host)
        groups = parameter_groups(model, stage, apart)
        whole: WholeOptimizer | None = None
        if self._zero_stage == 0:
            model.to(_device())
            whole = WholeOptimizer(
                groups,
                make,
                copies=self._bf16,
                clipping=stage.gradient_clipping,
                skip_non_finite=stage.non_finite == "skip",
            )
            model.to(torch.bfloat16 if self._bf16 else None)
        else:
            exact = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
        deepspeed = _deepspeed()
        _logger().setLevel(logging.INFO if prints(self._settings) else logging.WARNING)
        self._engine, _, _, _ = deepspeed.initialize(
            model=model, optimizer=whole or make(groups), config=self._settings
        )
        self.model = self._engine  # what is called
        self._is_apart = [group["apart"] for group in groups]
        # Of the weights apart and of the others, where a captured step reads them from the device.
        self._rates = torch.zeros(2, device=self.device) if self.capturable else None
        if whole is not None:
            self._optimizer: Any = whole
            if ranks.world_size() == 1:
                # It would copy the gradients there and back.
                self._engine.enable_backward_allreduce = False
            return
        from .zero import ZeroOptimizer  # which imports deepspeed

        self._optimizer = ZeroOptimizer(self._engine.optimizer, self._zero_stage, float32=not self._bf16)
        for name, value in exact.items() if self._bf16 else ():
            self._optimizer.set_master(self._parameters[name], value.float().to(self.device))
        if stage.non_finite == "skip":
            self._engine.optimizer.check_grad_overflow = True  # ZeRO 3 looks in any case

    def _is_capturable(self, config: EngineConfig, stage: StageConfig) -> bool:
        """Whether a step, from the forward pass to the update, can be recorded as a CUDA graph."""
        return (
            torch.cuda.is_available()
            and ranks.world_size() == 1
            and self._zero_stage == 0
            and config.optimizer == "adamw"
            and stage.accumulation == 1
            and not is_watched(self._settings)
            and stage.non_finite == "stop"  # skipping is the host's decision
        )

    def _profiles(self) -> bool:
        return self._engine.flops_profiler.started

    @property
    def is_monitored(self) -> bool:
        """Whether a DeepSpeed JSON asks for a monitor."""
        return is_monitored(self._settings)

    def monitor(self, values: Mapping[str, float], step: int) -> None:
        """Give values of after `step` to the monitors of a DeepSpeed JSON, by their tags; DeepSpeed counts
        samples, and so do these."""
        if self.is_monitored:
            samples = step * self._engine.train_batch_size()
            self._engine.monitor.write_events([(tag, value, samples) for tag, value in values.items()])

    @property
    def skipped(self) -> int:
        """Updates left out so far because their gradients were not finite, the same on every rank. DeepSpeed
        leaves such out under ZeRO 3, and in float32 where it clips, also where it is not set."""
        return self._engine.skipped_steps

    @property
    def device(self) -> torch.device:
        return self._engine.device

    def train(self, mode: bool = True) -> None:
        self._engine.train(mode)

    def step(self, loss: Tensor) -> None:
        """Backward pass of one micro-batch; the last of a step also updates the weights."""
        self._engine.backward(loss)
        if self._zero_stage == 0:
            self._optimizer.accumulate()
        self._engine.step()

    def first_non_finite(self) -> str | None:
        """Name of the first weight that is not finite, None where all are; the same on every rank, and all
        must call it. The host waits for the device."""
        mine = dict(self._local_weights())
        largest = nn.utils.get_total_norm([part for part in mine.values() if part.numel()], math.inf)
        found = (~largest.isfinite()).float().to(self.device)
        ranks.sum_over_ranks(found)
        if not found.item():
            return None
        bad = {name for name, part in mine.items() if not part.isfinite().all()}
        everywhere = set().union(*ranks.gather(bad))
        return next(name for name in self._parameters if name in everywhere)

    def _local_weights(self) -> Iterator[tuple[str, Tensor]]:
        """The weights as the next step uses them; under ZeRO 3 this rank's share of each, flat and without
        what fills the last share up."""
        parameter: Any
        for name, parameter in self._parameters.items():
            if self._zero_stage < 3:
                yield name, parameter.detach()
                continue
            share = parameter.ds_tensor.detach().flatten()
            left = parameter.ds_numel - ranks.rank() * share.numel()
            yield name, share[: max(left, 0)]

    def set_learning_rate(self, learning_rate: float, *, apart: float | None = None) -> None:
        """apart: rate of the weights that are apart, by default that of the others."""
        rates: list[Any] = [learning_rate, learning_rate if apart is None else apart]
        if self._rates is not None:
            rates = [rate.fill_(value) for rate, value in zip(self._rates, rates, strict=True)]
        for group, is_apart in zip(self._engine.optimizer.param_groups, self._is_apart, strict=True):
            group["lr"] = rates[is_apart]

    def state_dict(self) -> dict[str, Tensor]:
        """Every weight in float32 on the host. All ranks must call it; each gets the whole."""
        return self.named({name: tensor.cpu().clone() for name, tensor in self._weights()})

    def named(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights by all of their names: those that share memory have several."""
        first = {id(parameter): name for name, parameter in self._parameters.items()}
        names = self._module.named_parameters(remove_duplicate=False)
        return {name: weights[first[id(parameter)]] for name, parameter in names} | weights

    def _weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every weight and buffer once, float32 on the device, put together where ranks share it."""
        for name, parameter in self._parameters.items():
            master = self._optimizer.master(parameter).detach()
            yield name, master.float().view(parameter_shape(parameter))
        yield from ((name, buffer.detach()) for name, buffer in self._module.named_buffers())

    def _moments(self) -> Iterator[tuple[str, Tensor]]:
        """What the optimizer knows of each weight that it trains, by its key and the weight's name."""
        for name, parameter in self._parameters.items():
            if parameter.requires_grad:
                for key, x in self._optimizer.moments(parameter).items():
                    yield f"{key}.{name}", x if key == "step" else x.view(parameter_shape(parameter))

    def state(self, snapshot: Snapshot, step: int, client: dict[str, Any]) -> State | None:
        """The state of this moment, after `step`, as parts of a snapshot; None on other ranks than 0. All
        must call it."""
        weights = self.weights_in(snapshot)
        moments = self._copied(self._moments(), snapshot)
        if weights is None:
            return None
        return State(step, self._engine.skipped_steps, ranks.world_size(), client, weights, moments)

    def weights_in(self, snapshot: Snapshot) -> dict[str, Tensor] | None:
        """The weights of a `state`."""
        weights = self._copied(self._weights(), snapshot)
        return weights if ranks.is_main() else None

    def _copied(self, tensors: Iterator[tuple[str, Tensor]], snapshot: Snapshot) -> dict[str, Tensor]:
        copied = {}
        for name, x in tensors:  # by all ranks, since rank 0 needs their shares
            if ranks.is_main():
                copied[name] = snapshot.tensor(x)
        return copied

    def load(self, state: State) -> None:
        """Go on from a state, which any number of ranks, ZeRO stage and precision may have written. All ranks
        must call it.

        Raises:
            CheckpointError: it is of another model.
        """
        own = dict(self._module.named_buffers()) | self._parameters
        misfits = own.keys() ^ state.weights.keys() or {
            name for name, x in own.items() if parameter_shape(x) != state.weights[name].shape
        }
        if misfits:
            raise CheckpointError(f"it is of another model, in which {min(misfits)} differs")
        for name, parameter in self._parameters.items():
            self._optimizer.set_weight(parameter, state.weights[name].to(self.device))
        for name, buffer in self._module.named_buffers():
            buffer.copy_(state.weights[name])
        moments: dict[nn.Parameter, Moments] = {parameter: {} for parameter in self._parameters.values()}
        for name, x in state.moments.items():
            key, _, of = name.partition(".")
            moments[self._parameters[of]][key] = x.to(self.device)
        self._optimizer.set_moments(moments)
        engine = self._engine
        engine.global_steps, engine.skipped_steps = state.step, state.skipped
        engine.global_samples = state.step * engine.train_batch_size()

    @property
    def _zero_stage(self) -> int:
        return self._settings["zero_optimization"]["stage"]

    def close(self) -> None:
        """Let go of DeepSpeed's buffers and hooks, so that another stage can follow in this process."""
        if is_on(self._settings, "comms_logger"):
            _deepspeed().comm.log_summary()
        if is_on(self._settings, "wandb") and ranks.is_main():
            importlib.import_module("wandb").finish()  # samples begin anew with the next stage
        self._engine.destroy()
        # Its finalizer would do so again, and print while garbage is collected.
        self._engine.destroy = lambda: None


def parameter_shape(parameter: Tensor) -> torch.Size:
    """Shape of the whole parameter, also where ZeRO 3 keeps it elsewhere and this rank has an empty one."""
    return getattr(parameter, "ds_shape", parameter.shape)


def _device() -> torch.device:
    """This rank's, after `start`."""
    return (
        torch.device("cuda", torch.cuda.current_device())
        if torch.cuda.is_available()
        else torch.device("cpu")
    )
