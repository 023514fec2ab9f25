"""CUDA graphs, on the CPU: a function's operations are recorded with the memory that they read and write, and
replayed on that memory. Whatever Python does or reads while it records is not done again, as in a graph.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

READ_BACK = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero"}


def tensors_in(*values: Any) -> list[Tensor]:
    return [x for x in tree_leaves(values) if isinstance(x, Tensor)]


def place(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


class Tape(TorchDispatchMode):
    """Records the operations under it, each with what it makes; those that make the host wait are refused."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, tuple, dict, bool, list[tuple[int, Tensor]]]] = []
        self.made: dict[int, Tensor] = {}
        self.before: dict[int, tuple[Tensor, Tensor]] = {}  # what was there and has been written to

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function.name().removeprefix("aten::").split(".")[0]
        if name in READ_BACK:
            raise RuntimeError(f"{name} waits for the device, so no graph can hold it")
        arguments = function._schema.arguments
        named = dict(zip((argument.name for argument in arguments), args, strict=False)) | kwargs
        for argument in arguments:
            if argument.alias_info is not None and argument.alias_info.is_write:
                for x in tensors_in(named.get(argument.name)):
                    if x.numel() and place(x) not in self.made and place(x) not in self.before:
                        whole = x.detach().new_empty(0).set_(x.untyped_storage())
                        self.before[place(x)] = whole, whole.clone()
        inputs = {place(x) for x in tensors_in(args, kwargs)}
        result = function(*args, **kwargs)
        made = [
            (index, x) for index, x in enumerate(tensors_in(result)) if x.numel() and place(x) not in inputs
        ]
        self.made |= {place(x): x for _, x in made}
        # Some keep more where a gradient is wanted.
        self.operations.append((function, args, kwargs, torch.is_grad_enabled(), made))
        return result

    def undo(self) -> None:
        """Bring back what was there before the operations were recorded."""
        for there, before in self.before.values():
            there.copy_(before)

    def replay(self) -> None:
        with torch._C._AutoDispatchBelowAutograd():
            for function, args, kwargs, with_gradient, made in self.operations:
                with torch.set_grad_enabled(with_gradient):
                    again = tensors_in(function(*args, **kwargs))
                for index, x in made:
                    x.copy_(again[index])


class TapeRecorder:
    """In the place of `CudaRecorder`. recorded, replayed: how often, over all of them."""

    recorded = replayed = 0

    def run(self, function: Callable[[], Tensor]) -> Tensor:
        return function()

    def record(self, function: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        type(self).recorded += 1
        drawn = torch.get_rng_state()
        with Tape() as tape:
            result = function()
        tape.undo()  # recording does no work
        torch.set_rng_state(drawn)

        def replay() -> None:
            type(self).replayed += 1
            tape.replay()

        return replay, result
