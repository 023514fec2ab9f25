"""Loads the C++ library of ops, and says what it holds."""

import functools
import os
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from mtfast.ops import _arguments

LIBRARY = Path(__file__).parents[1] / "_C.abi3.so"

# Whether ops look at the values of index tensors on a GPU, which waits for it. On the CPU they always do.
CHECK_VALUES = os.environ.get("MTFAST_CHECK_VALUES") == "1"

_SEED_LIMIT = 2**63 - 1
_SEED = "an int or an int64 tensor of one element"


@functools.cache
def load() -> None:
    """Makes `torch.ops.mtfast` available.

    Raises:
        ImportError: the extension was not built, or does not fit this torch.
    """
    if not LIBRARY.exists():
        raise ImportError(
            f"{LIBRARY} does not exist: the C++ extension is not built. "
            "Build it with `pip install -e .` or `python setup.py build_ext --inplace`."
        )
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        with_cuda = "" if torch.version.cuda else ", with CUDA if it was built with CUDA kernels"
        raise ImportError(
            f"{LIBRARY} does not load into torch {torch.__version__}: {error}. It wants torch 2.10 or later"
            f"{with_cuda}; build it for this one: `pip install --no-build-isolation .` in a clone of mtfast."
        ) from error


def implementations(op_name: str) -> dict[str, bool]:
    """Which devices the compiled library has `mtfast::<op_name>` for: {"cpu": True, "cuda": False}.

    Raises:
        KeyError: the library has no op of that name.
    """
    load()
    name = f"mtfast::{op_name}"
    if not torch._C._dispatch_has_kernel(name):
        raise KeyError(f"the compiled library has no op {name}")
    return {key.lower(): torch._C._dispatch_has_kernel_for_dispatch_key(name, key) for key in ("CPU", "CUDA")}


def with_derivative(op_name: str, setup: Callable[..., None], derivative: Callable[..., Any]) -> Any:
    """Registers the derivative of `mtfast::<op_name>` and returns the op to call.

    Compilers meet the registered op. Eager calls go straight to its implementation, with the same derivative:
    the dispatcher's way through Python would take longer than the kernels. The transforms of
    `torch.func` need the derivative in a form of their own.

    Args:
        setup: `setup_context` as `torch.library.register_autograd` takes it.
        derivative: (ctx, saved_tensors, *gradients) -> the inputs' gradients; what it calls comes from
            `underivable`.
    """

    def unpacked(ctx: Any, *grads: Any) -> Any:
        return derivative(ctx, ctx.saved_tensors, *grads)

    torch.library.register_autograd(f"mtfast::{op_name}", unpacked, setup_context=setup)
    op = getattr(torch.ops.mtfast, op_name).default
    below_autograd = torch._C._AutoDispatchBelowAutograd

    class Direct(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            with below_autograd():
                output = op(*inputs)
            setup(ctx, inputs, output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            # Outside the guard: where activations are checkpointed this runs the forward pass again, which
            # needs autograd.
            saved = ctx.saved_tensors
            if torch.is_grad_enabled():  # create_graph
                return derivative(ctx, saved, *grads)
            with below_autograd():
                return derivative(ctx, saved, *grads)

    class Transformed(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*inputs: Any) -> Any:
            return op(*inputs)

        setup_context = staticmethod(setup)
        backward = staticmethod(unpacked)

    def call(*inputs: Any) -> Any:
        if torch.compiler.is_compiling():
            return op(*inputs)
        if torch._C._are_functorch_transforms_active():
            return Transformed.apply(*inputs)
        # Where forward-mode AD is on, autograd has to see the call even without gradients: it refuses.
        if not torch.is_grad_enabled() and forward_ad._current_level < 0:
            with below_autograd():
                return op(*inputs)
        return Direct.apply(*inputs)

    return call


def underivable(op_name: str) -> Any:
    """Registers that `mtfast::<op_name>`, itself a derivative, has none, and returns the op to call.

    Differentiating its results raises RuntimeError. Without that they would pass for constants.
    """
    first = op_name.removesuffix("_backward")

    def refuse(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(
            f"{first} has no second derivative: its gradient, made with create_graph=True or a transform of "
            "torch.func, cannot be differentiated again; the eager references, *_ref in mtfast.ops, can"
        )

    torch.library.register_autograd(f"mtfast::{op_name}", refuse)
    op = getattr(torch.ops.mtfast, op_name).default

    class Transformed(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*inputs: Any) -> Any:
            return op(*inputs)

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            pass

        backward = staticmethod(refuse)

    def call(*inputs: Any) -> Any:
        return Transformed.apply(*inputs) if torch._C._are_functorch_transforms_active() else op(*inputs)

    return call


def checked_seed(seed: int | Tensor, like_name: str, like: Tensor) -> int | Tensor:
    """A seed as the int64 that has its bits, or the tensor of one on the device of `like` that it is.

    Raises:
        TypeError, ValueError: it is no int of 64 bits, or a tensor of another dtype, size or device.
    """
    if not isinstance(seed, Tensor):
        return _arguments.seed_bits(seed, _SEED)
    _arguments.check_tensor("seed", seed)
    if seed.dtype != torch.int64 or seed.numel() != 1:
        raise TypeError(f"seed must be {_SEED}, found {seed.dtype} {list(seed.shape)}")
    device = like.device
    if seed.device != device:
        raise ValueError(f"seed is on {seed.device}, {like_name} on {device}: they must be on one device")
    return seed


def seed_tensor(seed: int | Tensor | None, dropout_p: float, like_name: str, like: Tensor) -> Tensor | None:
    """Dropout's seed where kernels read it: an int64 tensor of one element on the device of `like`.

    None draws one from torch's default generator of that device. Without dropout there is no seed.

    Raises:
        TypeError, ValueError: the seed is no int of 64 bits, or a tensor of another dtype, size or device.
        RuntimeError: it is an int while a CUDA graph is captured, whose replays would all drop the same.
    """
    device = like.device
    if seed is not None:
        seed = checked_seed(seed, like_name, like)
    if dropout_p == 0.0:
        return None
    if isinstance(seed, Tensor):
        return seed.view(1)
    if seed is None:
        return torch.randint(_SEED_LIMIT, (1,), dtype=torch.int64, device=device)
    if captured(device):
        raise RuntimeError(
            f"seed is the int {seed} while a CUDA graph is captured, all of whose replays would drop the "
            f"same: pass an int64 tensor on {device} that changes between replays, or None"
        )
    return torch.full((1,), seed, dtype=torch.int64, device=device)


def captured(device: torch.device) -> bool:
    """Whether what is launched on the device becomes part of a CUDA graph, which cannot wait for it."""
    if device.type != "cuda" or torch.compiler.is_compiling():
        return False
    return torch.cuda.is_current_stream_capturing()


def check_cu_seqlens(op: str, cu_seqlens: Tensor, total: int) -> None:
    """Raises RuntimeError unless cu_seqlens [sequences + 1] starts at 0, never falls and ends at total."""
    values = cu_seqlens.tolist()
    if values[0] != 0:
        raise RuntimeError(f"{op}: cu_seqlens must start at 0, found {values[0]}")
    for sequence, (begin, end) in enumerate(pairwise(values)):
        if end < begin:
            raise RuntimeError(
                f"{op}: cu_seqlens must not fall, but goes from {begin} to {end} after sequence {sequence}"
            )
    if values[-1] != total:
        raise RuntimeError(f"{op}: cu_seqlens must end at the number of tokens, {total}, found {values[-1]}")


def check_range(op: str, name: str, values: Tensor, end: int) -> None:
    """Raises RuntimeError unless all integer values are in [0, end)."""
    if bool(((values < 0) | (values >= end)).any()):
        raise RuntimeError(f"{op}: {name} must be in [0, {end})")
