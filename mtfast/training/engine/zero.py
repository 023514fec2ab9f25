"""DeepSpeed's optimizers that ranks share, weight by weight: what each rank has a part of, put together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import deepspeed
import torch
from deepspeed import utils
from torch import Tensor, nn

from . import ranks
from .optimizer import Moments, moments_in, set_moments_in


class ZeroOptimizer:
    """What `WholeOptimizer` tells of its weights, told of one under ZeRO 1, 2 or 3. All ranks call it alike;
    each gets and gives the whole."""

    def __init__(self, optimizer: Any, stage: int, *, float32: bool) -> None:
        """
        Args:
            optimizer: DeepSpeed's.
            float32: the weights compute in float32: those that each rank has whole are the masters' equals.
        """
        self._zero, self._stage, self._float32 = optimizer, stage, float32
        self._linked = stage == 3  # whether weights know their parts of the optimizer's state

    def master(self, weight: nn.Parameter) -> Tensor:
        """A weight as it is updated, float32."""
        if self._float32 and self._stage < 3:
            return weight.data
        return utils.safe_get_full_fp32_param(weight)

    def set_master(self, weight: nn.Parameter, value: Tensor) -> None:
        """value: float32, on the device. The weight that computes stays as it is."""
        if self._stage < 3:
            utils.safe_set_full_fp32_param(weight, value)
        else:
            utils.safe_set_local_fp32_param(weight, _share(weight, value))

    def set_weight(self, weight: nn.Parameter, value: Tensor) -> None:
        """`set_master`, and the weight that computes is made from it."""
        self.set_master(weight, value)
        if self._stage < 3:
            weight.data.copy_(value)
            return
        with deepspeed.zero.GatheredParameters([weight], modifier_rank=0):
            weight.data.copy_(value)

    def moments(self, weight: nn.Parameter) -> Moments:
        """As `WholeOptimizer.moments`."""
        found = moments_in(self._zero.optimizer, self._flats[0])
        if found and not self._linked:
            self._link()  # DeepSpeed does once the first group is stepped, before the others have a state
        return {
            name: x if name == "step" else utils.safe_get_full_optimizer_state(weight, name)
            for name, x in found.items()
        }

    def set_moments(self, moments: Mapping[nn.Parameter, Moments]) -> None:
        """As `WholeOptimizer.set_moments`. Weights are stepped together here: the most steps of any count."""
        made = [found for found in moments.values() if found]
        if not made:
            return
        step = torch.stack([found["step"].float().cpu() for found in made]).max()
        names = made[0].keys() - {"step"}
        for flat in self._flats:
            zeros = {name: torch.zeros_like(flat.data) for name in names}
            set_moments_in(self._zero.optimizer, flat, {"step": step, **zeros})
        if self._stage < 3:
            self._link()
        for weight, found in moments.items():
            for name in names & found.keys():
                if self._stage < 3:
                    utils.safe_set_full_optimizer_state(weight, found[name], name)
                else:
                    share = _share(weight, found[name])
                    utils.safe_set_local_optimizer_state(weight, share, name)

    def _link(self) -> None:
        for weights, flat in zip(self._zero.bit16_groups, self._flats, strict=True):
            utils.lazy_init_hp_params_optimizer_state(weights, flat, self._zero.optimizer.state)
        self._linked = True

    @property
    def _flats(self) -> list[nn.Parameter]:
        """What the optimizer updates on this rank: its parts of many weights in a row."""
        zero = self._zero
        return zero.fp32_partitioned_groups_flat if self._stage == 3 else zero.single_partition_of_fp32_groups


def _share(weight: nn.Parameter, value: Tensor) -> Tensor:
    """This rank's part of a whole value under ZeRO 3. Each has an equal one, the last filled up with zeros;
    DeepSpeed's setters of whole values fail where they do not divide."""
    size = utils.safe_get_local_fp32_param(weight).numel()
    whole = value.new_zeros(size * ranks.world_size())
    whole[: value.numel()] = value.flatten()
    return whole.narrow(0, size * ranks.rank(), size)
