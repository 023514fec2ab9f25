"""The C library's memory on a CPU: what a step frees is kept for the next one.

A step allocates and frees as much as the one before. By default glibc returns large blocks to the system as
they are freed, and every page of theirs costs a fault when it is asked for again: 4% to 15% of a step.
"""

from __future__ import annotations

import ctypes
from typing import Any

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
    """Give back to the system what has been freed so far."""
    if library := _library():
        library.malloc_trim(0)
