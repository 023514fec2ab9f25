"""DeepSpeed for every stage, launcher and ZeRO stage in one class; no other package of mtfast knows of it."""

from __future__ import annotations

import contextlib
import importlib
import logging
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mtfast.config import ConfigError, EngineConfig, StageConfig

from . import memory, ranks, state
from .deepspeed_config import deepspeed_config
from .optimizer import WholeOptimizer, maker, parameter_groups
from .snapshot import Snapshot


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
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed calls collectives by names that newer versions of torch have replaced.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    return deepspeed


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
    ) -> None:
        """float32: keep the weights in float32 in any precision, for a stage that computes under autocast."""
        self._settings = deepspeed_config(config, stage, stage_name, ranks.world_size(), float32=float32)
        ranks.agree(f"DeepSpeed's configuration of {stage_name}", self._settings)
        if stage.non_finite == "skip" and "zenflow" in self._settings["zero_optimization"]:
            raise ConfigError(
                f"{stage_name}.non_finite skip does not go with DeepSpeed's zenflow, which updates a part of "
                f"the weights outside the step; use {stage_name}.non_finite stop"
            )
        self._bf16 = config.precision == "bf16" and not float32
        self.precision = config.precision
        self.capturable = self._is_capturable(config, stage)
        self._module = model
        self._parameters = dict(model.named_parameters())
        exact: dict[str, Tensor] = {}
        make = maker(config, stage, self.capturable)
        self._whole: WholeOptimizer | None = None
        optimizer: torch.optim.Optimizer
        if self._zero_stage == 0:
            model.to(_device())
            optimizer = self._whole = WholeOptimizer(
                parameter_groups(model, stage),
                make,
                copies=self._bf16,
                clipping=stage.gradient_clipping,
                skip_non_finite=stage.non_finite == "skip",
            )
            model.to(torch.bfloat16 if self._bf16 else None)
        else:
            exact = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
            optimizer = make(parameter_groups(model, stage))
        self._engine, _, _, _ = _deepspeed().initialize(
            model=model, optimizer=optimizer, config=self._settings
        )
        self.model = self._engine  # what is called
        self._learning_rate = torch.zeros((), device=self.device) if self.capturable else None
        if self._bf16 and self._zero_stage > 0:
            self._set_masters(exact)
        if self._whole is not None and ranks.world_size() == 1:
            self._engine.enable_backward_allreduce = False  # which would copy the gradients there and back
        if stage.non_finite == "skip" and self._zero_stage > 0:
            self._engine.optimizer.check_grad_overflow = True  # ZeRO 3 looks in any case

    def _is_capturable(self, config: EngineConfig, stage: StageConfig) -> bool:
        """Whether a step, from the forward pass to the update, can be recorded as a CUDA graph."""
        return (
            torch.cuda.is_available()
            and ranks.world_size() == 1
            and self._zero_stage == 0
            and config.optimizer == "adamw"
            and stage.accumulation == 1
            and stage.non_finite == "stop"  # skipping is the host's decision
        )

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
        if self._whole is not None:
            self._whole.accumulate()
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

    def set_learning_rate(self, learning_rate: float) -> None:
        rate: float | Tensor = learning_rate
        if self._learning_rate is not None:  # a captured step reads it from the device
            rate = self._learning_rate.fill_(learning_rate)
        for group in self._engine.optimizer.param_groups:
            group["lr"] = rate

    def state_dict(self) -> dict[str, Tensor]:
        """Every weight in float32 on the host. All ranks must call it; each gets the whole."""
        return self._named(lambda tensor: tensor.cpu().clone())

    def weights_in(self, snapshot: Snapshot) -> dict[str, Tensor] | None:
        """Rank 0's `state_dict` as a part of a snapshot, None on the others; all ranks must call it."""
        if ranks.is_main():
            return self._named(snapshot.tensor)
        for _ in self._masters():  # whose shares rank 0 needs
            pass
        return None

    def _named(self, copied: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        names = {name: p for name, p in self._module.named_parameters(remove_duplicate=False)}
        by_id = {id(self._parameters[name]): copied(tensor) for name, tensor in self._masters()}
        state = {name: by_id[id(parameter)] for name, parameter in names.items()}
        return state | {name: copied(buffer.detach()) for name, buffer in self._module.named_buffers()}

    def _masters(self) -> Iterator[tuple[str, Tensor]]:
        """Every weight in float32 on the device, one that more than one rank has a share of put together."""
        from deepspeed.utils import safe_get_full_fp32_param

        for name, parameter in self._parameters.items():
            if self._whole is not None:
                full = self._whole.master_of[parameter].data
            elif not self._bf16 and self._zero_stage < 3:
                full = parameter.data
            else:
                full = safe_get_full_fp32_param(parameter)
            yield name, full.detach().float().view(parameter_shape(parameter))

    def _set_masters(self, exact: dict[str, Tensor]) -> None:
        from deepspeed import utils

        for name, parameter in self._parameters.items():
            value = exact[name].float().to(self.device)
            if self._zero_stage < 3:
                utils.safe_set_full_fp32_param(parameter, value)
                continue
            # Each rank has an equal share of the weights, the last one's filled up with zeros. DeepSpeed's
            # setter of the whole parameter fails where they do not divide.
            share = utils.safe_get_local_fp32_param(parameter).numel()
            whole = value.new_zeros(share * ranks.world_size())
            whole[: value.numel()] = value.flatten()
            mine = whole.narrow(0, share * ranks.rank(), share)
            utils.safe_set_local_fp32_param(parameter, mine)

    @property
    def _zero_stage(self) -> int:
        return self._settings["zero_optimization"]["stage"]

    def state_in(
        self, snapshot: Snapshot, directory: Path, tag: str, client: dict[str, Any]
    ) -> dict[Path, Any]:
        """What this rank has to write of the resumable state, `client` in it, as parts of a snapshot: what
        torch.save is to put into which files, so that `load` finds the state `tag` in `directory`.

        All ranks must call it. Raises what making the files' directory raises.
        """
        own = self._engine.checkpoint_engine
        self._engine.checkpoint_engine = taking = Taking(own, snapshot)
        try:
            self._engine.save_checkpoint(str(directory), tag=tag, client_state=client, save_latest=False)
        finally:
            self._engine.checkpoint_engine = own
        return taking.files

    def load(self, directory: Path) -> dict[str, Any] | None:
        """Continue from the newest state in `directory`; None where there is none.

        Raises:
            ConfigError: the state was written by another number of ranks or another ZeRO stage, or not all of
                it is there.
            CheckpointError: the state cannot be read.
        """
        tag = ranks.seen_by_main(lambda: state.newest(directory, self.facts))
        if tag is None:
            return None
        try:
            path, client = self._engine.load_checkpoint(str(directory), tag=tag)
            if path is None:
                raise FileNotFoundError("DeepSpeed finds no state in it")
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # what reads the files raises many kinds where they are damaged
            raise state.unreadable(directory, tag, error) from error
        return client

    @property
    def facts(self) -> dict[str, int]:
        """What a run that continues from a state must have in common with the one that wrote it."""
        return {"world_size": ranks.world_size(), "zero_stage": self._zero_stage}

    def close(self) -> None:
        """Let go of DeepSpeed's buffers and hooks, so that another stage can follow in this process."""
        self._engine.destroy()
        memory.return_freed()


class Taking:
    """DeepSpeed's own way to write a state, but that what it would write is copied into a snapshot."""

    def __init__(self, own: Any, snapshot: Snapshot) -> None:
        self._own, self._snapshot = own, snapshot
        self.files: dict[Path, Any] = {}

    def save(self, state_dict: Any, path: str) -> None:
        self.files[Path(path)] = self._snapshot.value(state_dict)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)


def parameter_shape(parameter: nn.Parameter) -> torch.Size:
    """Shape of the whole parameter, also where ZeRO 3 keeps it elsewhere and this rank has an empty one."""
    return getattr(parameter, "ds_shape", parameter.shape)


def _device() -> torch.device:
    """This rank's, after `start`."""
    return (
        torch.device("cuda", torch.cuda.current_device())
        if torch.cuda.is_available()
        else torch.device("cpu")
    )
