"""AdamW: which implementation, over which weights, and how a process that shards nothing steps with it."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mtfast.config import ConfigError, EngineConfig, StageConfig

Group = dict[str, Any]
Make = Callable[[list[Group]], Optimizer]
# Of a weight: "exp_avg" and "exp_avg_sq", of its shape, and "step"; {} before the first.
Moments = dict[str, Tensor]


def parameter_groups(model: nn.Module, stage: StageConfig, apart: str = "") -> list[Group]:
    """What is trained of a model, with the weight decay of each part.

    apart: how the names of weights begin that are in groups of their own, which have a true "apart".
    """
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = []
    for is_apart in (False, True) if apart else (False,):
        mine = [p for name, p in trained if not apart or name.startswith(apart) == is_apart]
        # Biases and LayerNorm weights are the vectors.
        decayed = [p for p in mine if stage.decay_all or p.dim() > 1]
        groups.append({"params": decayed, "weight_decay": stage.weight_decay, "apart": is_apart})
        if not stage.decay_all:
            spared = [p for p in mine if p.dim() <= 1]
            groups.append({"params": spared, "weight_decay": 0.0, "apart": is_apart})
    return groups


def optimizer_class(config: EngineConfig, *, on_host: bool = False) -> type[Optimizer]:
    """The class of the optimizer that the configuration names.

    Args:
        on_host: what it updates is offloaded to the host.

    Raises:
        ConfigError: it needs a GPU or a package that is not here.
    """
    if config.optimizer == "adamw":
        return torch.optim.AdamW
    if on_host:
        if config.optimizer == "deepspeed-adam":
            from deepspeed.ops.adam import DeepSpeedCPUAdam

            return DeepSpeedCPUAdam
        raise ConfigError(
            f"engine.optimizer {config.optimizer!r} updates nothing that is offloaded; use 'adamw'"
        )
    if not torch.cuda.is_available():
        raise ConfigError(f"engine.optimizer {config.optimizer!r} needs a GPU; use 'adamw' here")
    if config.optimizer == "deepspeed-adam":
        from deepspeed.ops.adam import FusedAdam as DeepSpeedAdam

        return DeepSpeedAdam
    try:
        from apex.optimizers import FusedAdam

        importlib.import_module("amp_C")  # its kernels, without which it can be installed
    except ImportError as error:
        raise ConfigError(
            "engine.optimizer 'apex-adam' needs NVIDIA apex with its CUDA kernels, which is built from its "
            "own repository (see `mtfast doctor`); the PyPI package called apex is an unrelated web toolkit "
            f"({error}). Without it use 'adamw'"
        ) from error
    return FusedAdam


def maker(config: EngineConfig, stage: StageConfig, capturable: bool, *, eps: float, on_host: bool) -> Make:
    """Makes the optimizer that the configuration names from groups of weights; raises as its class does.

    Args:
        capturable: its steps can be recorded as a part of a CUDA graph.
        on_host: what it updates is offloaded to the host.
    """
    kind: Any = optimizer_class(config, on_host=on_host)
    settings: dict[str, Any] = {"lr": stage.learning_rate, "betas": stage.betas, "eps": eps}
    if config.optimizer == "adamw":
        return lambda groups: kind(groups, fused=True, capturable=capturable, **settings)
    if on_host:
        return lambda groups: kind(groups, adamw_mode=True, **settings)
    return lambda groups: _counting_by_weight(kind(groups, adam_w_mode=True, **settings))


def _counting_by_weight(optimizer: Optimizer) -> Optimizer:
    """Gives each weight a count of its steps, in its state, as torch's AdamW does. apex counts for a group,
    which ZeRO 3 may step in parts, one after the other; DeepSpeed's Adam for the last weight of a group."""
    optimizer.register_step_pre_hook(_count_from_weights)
    optimizer.register_step_post_hook(_share_counts)
    return optimizer


def _count_from_weights(optimizer: Optimizer, *_: Any) -> None:
    for group in optimizer.param_groups:
        group["step"] = 0
    _share_counts(optimizer)


def _share_counts(optimizer: Optimizer, *_: Any) -> None:
    for group in optimizer.param_groups:
        states = [state for p in group["params"] if (state := optimizer.state.get(p))]
        group["step"] = max([group["step"], *(state.get("step", 0) for state in states)])
        for state in states:
            state["step"] = group["step"]


class WholeOptimizer(Optimizer):
    """An optimizer over all of the weights, with what ZeRO would do besides: float32 copies of weights that
    compute in bf16, the masters, which alone are updated; gradients that add up in float32; clipping; leaving
    steps out.

    Groups and state are those of the optimizer that it makes, over the masters. Weights in float32 are their
    own. A bf16 weight without a gradient counts as one whose gradient is zero.

    Attributes:
        master_of: the master of each weight.
        overflow: the last update was left out, since a gradient was not finite.
    """

    def __init__(
        self, groups: list[Group], make: Make, *, copies: bool, clipping: float, skip_non_finite: bool
    ) -> None:
        """
        Args:
            groups: float32 weights on their device.
            copies: the weights are about to be cast to bf16, so masters of their own keep what they are now.
            clipping: largest norm of all gradients together, or 0.
        """
        super().__init__(groups, {})
        self._weights: list[Tensor] = [p for group in groups for p in group["params"]]
        self.master_of = {p: nn.Parameter(p.detach().clone()) if copies else p for p in self._weights}
        self._masters: list[Tensor] = list(self.master_of.values())
        self._inner = make(
            [group | {"params": [self.master_of[p] for p in group["params"]]} for group in groups]
        )
        self._copies, self._clipping, self._skip_non_finite = copies, clipping, skip_non_finite
        # Kept over steps: on a CPU pages that the system hands out anew cost as much as the update.
        self._sums: list[Tensor] | None = None
        self.param_groups, self.state = self._inner.param_groups, self._inner.state
        self.overflow = False

    @torch.no_grad()
    def accumulate(self) -> None:
        """Add the gradients of a backward pass to those of the ones before it in this step."""
        if not self._copies:
            return
        found = [torch.zeros_like(w) if w.grad is None else w.grad for w in self._weights]
        if self._sums is None:
            self._sums = [torch.empty_like(master) for master in self._masters]
        if self._masters[0].grad is None:
            torch._foreach_copy_(self._sums, found)
            for master, gradient in zip(self._masters, self._sums, strict=True):
                master.grad = gradient
        else:
            torch._foreach_add_(self._sums, [gradient.float() for gradient in found])
        for weight in self._weights:
            weight.grad = None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update the weights from the accumulated gradients and clear these."""
        if self._skip_non_finite:
            gradients = [master.grad for master in self._masters if master.grad is not None]
            self.overflow = not math.isfinite(nn.utils.get_total_norm(gradients, math.inf))
        if not self.overflow:
            if self._clipping > 0:
                nn.utils.clip_grad_norm_(self._masters, self._clipping, foreach=True)
            self._inner.step()
            if self._copies:
                torch._foreach_copy_(self._weights, self._masters)
        for master in self._masters:
            master.grad = None

    def master(self, weight: nn.Parameter) -> Tensor:
        """A weight as it is updated, float32."""
        return self.master_of[weight].data

    @torch.no_grad()
    def set_weight(self, weight: nn.Parameter, value: Tensor) -> None:
        """value: float32."""
        self.master_of[weight].copy_(value)
        weight.copy_(value)

    def moments(self, weight: nn.Parameter) -> Moments:
        """What AdamW knows of a weight."""
        return moments_in(self._inner, self.master_of[weight])

    def set_moments(self, moments: Mapping[nn.Parameter, Moments]) -> None:
        """Go on from what AdamW knew of every weight."""
        for weight, found in moments.items():
            if found:
                set_moments_in(self._inner, self.master_of[weight], found)


def moments_in(optimizer: Optimizer, held: Tensor) -> Moments:
    """What an Adam knows of a tensor that it updates; "step" has no dimension."""
    state = optimizer.state.get(held)
    if not state:
        return {}
    moments = {name: x for name, x in state.items() if isinstance(x, Tensor) and x.shape == held.shape}
    # torch keeps a tensor for each weight, the others a number.
    return {**moments, "step": torch.as_tensor(state["step"], dtype=torch.float32)}


def set_moments_in(optimizer: Optimizer, held: Tensor, moments: Moments) -> None:
    """Make them what an Adam knows of a tensor that it updates."""
    kept: dict[str, Any] = {name: x.to(held.device, copy=True) for name, x in moments.items()}
    if not isinstance(optimizer, torch.optim.AdamW):
        kept["step"] = int(moments["step"])
    optimizer.state[held] = kept
