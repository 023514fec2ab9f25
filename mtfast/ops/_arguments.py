"""Argument checks that the ops have in common: TypeError for a wrong kind of object, ValueError for a wrong
value, each naming the argument, what was found and what would be right."""

import contextlib
import math
import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

_END = 2**63  # of int64


def check_tensor(name: str, x: Any, dtype: str = "") -> None:
    """Raises TypeError unless x is a dense tensor; of any dtype, quantized ones too.

    Args:
        dtype: that of the tensor to make of a list or an array, where one would do.
    """
    if isinstance(x, Tensor):
        if x.layout is torch.strided and not x.is_nested:
            return
        kind = "nested" if x.is_nested else str(x.layout)
        raise TypeError(f"{name} must be a dense tensor, found a {kind} one")
    remedy = f": pass torch.as_tensor({name}, dtype={dtype}, device=...)" if dtype else ""
    raise TypeError(f"{name} must be a tensor, found {_kind(x)}{remedy}")


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast computes on x's device in, or None where it is off."""
    device = x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):  # which knows no meta device
        return None
    return torch.get_autocast_dtype(device)


def integer(name: str, x: Any, wanted: str = "an int") -> int:
    """x, or an int of NumPy's as Python's.

    Raises:
        TypeError: x is no integer; bools and tensors are none.
    """
    if type(x) in (int, torch.SymInt):
        return x
    if isinstance(x, Tensor):
        raise TypeError(
            f"{name} must be {wanted}, found a tensor: pass int({name}), which waits for its device"
        )
    if not isinstance(x, bool):
        with contextlib.suppress(TypeError):
            return operator.index(x)
    raise TypeError(f"{name} must be {wanted}, found {_kind(x)}")


def int64(name: str, x: Any) -> int:
    """As `integer`; ValueError for more than 64 bits."""
    x = integer(name, x)
    if not -_END <= x < _END:
        raise ValueError(f"{name} must have at most 64 bits, found {x}")
    return x


def real(name: str, x: Any) -> float:
    """x, or a number of another kind as a float.

    Raises:
        TypeError: x is no real number; tensors are none.
    """
    if type(x) in (float, torch.SymFloat):
        return x
    if isinstance(x, Tensor):
        raise TypeError(
            f"{name} must be a float, found a tensor: pass float({name}), which waits for its device"
        )
    if not isinstance(x, str | bytes):
        with contextlib.suppress(TypeError, OverflowError):
            return float(x)
    raise TypeError(f"{name} must be a float, found {_kind(x)}")


def check_choice(name: str, x: Any, choices: tuple[str, ...]) -> None:
    """Raises ValueError unless x is one of the choices."""
    if not isinstance(x, str) or x not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, found {x!r}")


def dropout_probability(x: Any) -> float:
    """dropout_p as a float.

    Raises:
        TypeError, ValueError: it is no number, or outside [0, 1).
    """
    x = real("dropout_p", x)
    if not 0.0 <= x < 1.0:
        raise ValueError(f"dropout_p must be in [0, 1), found {x}")
    return x


def softmax_scale(x: Any, head_dim: int) -> float:
    """softmax_scale as a float, by default 1/sqrt(head_dim)."""
    return 1 / math.sqrt(head_dim) if x is None else real("softmax_scale", x)


def int32_offsets(cu_seqlens: Tensor) -> Tensor:
    """cu_seqlens of int64 in int32, with what does not fit at its ends, where checks find it; else itself."""
    if cu_seqlens.dtype != torch.int64:
        return cu_seqlens
    return cu_seqlens.clamp(-(2**31), 2**31 - 1).int()


def not_negative(name: str, x: Any) -> int:
    """x as an int, which a compiler need not know the value of.

    Raises:
        TypeError, ValueError: it is no int, negative, or has more than 64 bits.
    """
    x = integer(name, x)
    if torch.compiler.is_compiling() or isinstance(x, torch.SymInt):
        torch._check(x >= 0)
        return x
    if not 0 <= x < _END:
        bound = "not be negative" if x < 0 else "be less than 2^63"
        raise ValueError(f"{name} must {bound}, found {x}")
    return x


def equal(a: int, b: int) -> bool:
    """Whether two sizes are equal; a compiler that does not know them yet makes it a check of its own."""
    if torch.compiler.is_compiling():
        torch._check(a == b)
        return True
    return a == b


def seed_bits(x: Any, wanted: str) -> int:
    """A seed as the int64 that has its bits: what counts is its value modulo 2^64.

    Raises:
        TypeError, ValueError: it is no int, or has more than 64 bits.
    """
    x = integer("seed", x, wanted)
    if isinstance(x, torch.SymInt) or -_END <= x < _END:
        return x
    if not 0 <= x < 2 * _END:
        raise ValueError(f"seed must have at most 64 bits, from -2^63 to 2^64 - 1, found {x}")
    return x - 2 * _END


def integers(name: str, x: Any) -> list[int]:
    """The ints of a sequence, set, generator, array or tensor.

    Raises:
        TypeError: x is none of these, or holds something else.
    """
    if isinstance(x, Tensor):
        check_tensor(name, x)
        if x.dtype == torch.bool or x.is_floating_point() or x.is_complex():
            raise TypeError(f"{name} must hold ints, found a tensor of {x.dtype}")
        return x.flatten().tolist()
    if isinstance(x, str | bytes) or not isinstance(x, Iterable):
        raise TypeError(f"{name} must be a list or a tensor of ints, found {_kind(x)}")
    found = list(x)
    if set(map(type, found)) <= {int}:
        return found
    return [integer(f"{name}[{place}]", value) for place, value in enumerate(found)]


def _kind(x: Any) -> str:
    if x is None or isinstance(x, bool):
        return repr(x)
    name = type(x).__name__
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"
