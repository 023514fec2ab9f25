"""What DeepSpeed's flops profiler counts: every matrix product, mtfast's kernels included."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from deepspeed.profiling.flops_profiler import profiler
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


def counted(forward: Callable[..., Any], profiles: Callable[[], bool]) -> Callable[..., Any]:
    """A model's forward pass in which every product counts once while the profiler `profiles`, as torch's
    FlopCounterMode would count it.

    By itself the profiler counts torch's functions: not mtfast's, and twice under ZeRO 3, whose linear
    function calls another.
    """

    @functools.wraps(forward)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not profiles():
            return forward(*args, **kwargs)
        profiler._reload_functionals()
        profiler._reload_tensor_methods()
        profiler._reload_miscellaneous_operations()
        with _Counting():
            return forward(*args, **kwargs)

    return call


class _Counting(TorchDispatchMode):
    """Counts products to the module that is being called."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        formula = flop_registry.get(function.overloadpacket)
        if formula is not None and profiler.module_flop_count:
            flops = formula(*args, **kwargs, out_val=result)
            name = function.overloadpacket.__name__
            profiler.module_flop_count[-1].append((name, flops))
            profiler.module_mac_count[-1].append((name, flops // 2))
        return result
