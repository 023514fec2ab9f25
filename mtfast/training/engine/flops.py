"""What mtfast's kernels add to DeepSpeed's flops profiler, which knows torch's functions alone."""

from __future__ import annotations

from typing import Any

from deepspeed.profiling.flops_profiler import profiler
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


class CountedOps(TorchDispatchMode):
    """While the profiler counts, counts the products of mtfast's ops to the module that calls them."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        formula = flop_registry.get(function.overloadpacket) if function.namespace == "mtfast" else None
        if formula is not None and profiler.module_flop_count:
            flops = formula(*args, **kwargs, out_val=result)
            name = function.overloadpacket.__name__
            profiler.module_flop_count[-1].append((name, flops))
            profiler.module_mac_count[-1].append((name, flops // 2))
        return result
