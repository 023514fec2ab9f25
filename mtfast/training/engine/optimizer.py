"""AdamW: which implementation, over which weights, and how a process that shards nothing steps with it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mtfast.config import ConfigError, EngineConfig, StageConfig

Group = dict[str, Any]
Make = Callable[[list[Group]], Optimizer]


def parameter_groups(model: nn.Module, stage: StageConfig) -> list[Group]:
    """What is trained of a model, with the weight decay of each part."""
    trained = [p for p in model.parameters() if p.requires_grad]
    if stage.decay_all:
        return [{"params": trained, "weight_decay": stage.weight_decay}]
    # Biases and LayerNorm weights are the vectors.
    return [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": stage.weight_decay},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]


def maker(config: EngineConfig, stage: StageConfig, capturable: bool) -> Make:
    """Makes the optimizer that the configuration names from groups of weights.

    Args:
        capturable: its steps can be recorded as a part of a CUDA graph.

    Raises:
        ConfigError: it needs a GPU or a package that is not here.
    """
    settings: dict[str, Any] = {"lr": stage.learning_rate, "betas": stage.betas, "eps": 1e-8}
    if config.optimizer == "adamw":
        return lambda groups: torch.optim.AdamW(groups, fused=True, capturable=capturable, **settings)
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
        self._share_state()
        self.overflow = False

    def _share_state(self) -> None:
        self.param_groups, self.state = self._inner.param_groups, self._inner.state

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

    def state_dict(self) -> dict[str, Any]:
        state = self._inner.state_dict()
        return state | {"masters": [x.detach() for x in self._masters]} if self._copies else state

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        state = dict(state_dict)
        if self._copies:
            torch._foreach_copy_(self._masters, state.pop("masters"))
            torch._foreach_copy_(self._weights, self._masters)
        self._inner.load_state_dict(state)
        self._share_state()
