"""The memory of a process that trains one stage after another.

On a CPU what a step frees is kept for the next one, which allocates and frees as much. By default glibc
returns large blocks to the system as they are freed, and every page of theirs costs a fault when it is asked
for again: 4% to 15% of a step. The next stage has use for blocks of other sizes; what one has taken goes back
to the system at its end.
"""

from __future__ import annotations

import ctypes
import functools
import gc
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import pyarrow
import torch

P = ParamSpec("P")
T = TypeVar("T")

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4  # of mallopt
_AT_ONCE = 64 << 20  # bytes by which the heap grows


def _library() -> Any:
    """glibc; None where the C library is another one."""
    library = ctypes.CDLL(None)
    return library if hasattr(library, "mallopt") and hasattr(library, "malloc_trim") else None


def keep_freed() -> None:
    """From now on freed memory stays with the process."""
    if library := _library():
        library.mallopt(_MMAP_MAX, 0)
        library.mallopt(_TRIM_THRESHOLD, -1)
        library.mallopt(_TOP_PAD, _AT_ONCE)


def return_freed() -> None:
    """Give back to the system what is no longer in use, on the host and on a GPU."""
    gc.collect()  # DeepSpeed's engine, and with it the model, is part of cycles
    pyarrow.default_memory_pool().release_unused()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch._C._host_emptyCache()  # page-locked memory of the host, in which snapshots lie
    if library := _library():
        library.malloc_trim(0)


def leaving_none(work: Callable[P, T]) -> Callable[P, T]:
    """`work`, after which all memory goes back to the system that it alone has used."""

    @functools.wraps(work)
    def alone(*args: P.args, **kwargs: P.kwargs) -> T:
        result = work(*args, **kwargs)
        return_freed()
        return result

    return alone
