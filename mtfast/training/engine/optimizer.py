"""AdamW: which implementation, over which weights, and how a process that shards nothing steps with it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mtfast.config import ConfigError, EngineConfig, StageConfig

Group = dict[str, Any]
Make = Callable[[list[Group]], Optimizer]
Moments = dict[
    str, Tensor
]  # of a weight: "exp_avg", "exp_avg_sq", of its shape, and "step"; {} before the first


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


def maker(
    config: EngineConfig, stage: StageConfig, capturable: bool, *, eps: float = 1e-8, on_host: bool = False
) -> Make:
    """Makes the optimizer that the configuration names from groups of weights.

    Args:
        capturable: its steps can be recorded as a part of a CUDA graph.
        on_host: what it updates is offloaded to the host.

    Raises:
        ConfigError: it needs a GPU or a package that is not here.
    """
    settings: dict[str, Any] = {"lr": stage.learning_rate, "betas": stage.betas, "eps": eps}
    if config.optimizer == "adamw":
        return lambda groups: torch.optim.AdamW(groups, fused=True, capturable=capturable, **settings)
    if config.optimizer == "deepspeed-adam" and on_host:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return lambda groups: DeepSpeedCPUAdam(groups, adamw_mode=True, **settings)
    if not torch.cuda.is_available():
        raise ConfigError(f"engine.optimizer {config.optimizer!r} needs a GPU; use 'adamw' here")
    if config.optimizer == "deepspeed-adam":
        from deepspeed.ops.adam import FusedAdam as DeepSpeedAdam

        return lambda groups: DeepSpeedAdam(groups, adam_w_mode=True, **settings)
    try:
        from apex.optimizers import FusedAdam
    except ImportError as error:
        raise ConfigError(
            "engine.optimizer 'apex-adam' needs NVIDIA apex, which is built from its own repository; "
            f"the PyPI package called apex is an unrelated web toolkit ({error})"
        ) from error
    return lambda groups: FusedAdam(groups, adam_w_mode=True, **settings)


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
    # torch keeps a tensor for each weight, DeepSpeed's Adam a number, apex one for each group.
    step = state.get("step", optimizer.param_groups[0].get("step"))
    return {**moments, "step": torch.as_tensor(step, dtype=torch.float32)}


def set_moments_in(optimizer: Optimizer, held: Tensor, moments: Moments) -> None:
    """Make them what an Adam knows of a tensor that it updates."""
    kept: dict[str, Any] = {name: x.to(held.device, copy=True) for name, x in moments.items()}
    if not isinstance(optimizer, torch.optim.AdamW):
        kept["step"] = int(moments["step"])
        for group in optimizer.param_groups:
            group["step"] = kept["step"]
    optimizer.state[held] = kept
