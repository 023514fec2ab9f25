"""The most memory that a stage has taken, as the system and torch count it."""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch

from . import ranks

_PROCESS = Path("/proc/self")


def reset() -> None:
    """Measure from here on. Where the system does not allow that for the host's memory, the peak is that of
    the whole process so far: at least the stage's."""
    with contextlib.suppress(OSError):
        (_PROCESS / "clear_refs").write_text("5", encoding="ascii")  # of VmHWM
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def measured() -> dict[str, int]:
    """The peaks since `reset`, each the largest over the ranks, all of which must call this.

    Returns:
        peak_rss_bytes: resident on the host, in one process; not there where the system does not tell it.
        peak_gpu_bytes: in tensors on one GPU; not there without GPUs.
    """
    mine = {}
    if (resident := _peak_rss()) is not None:
        mine["peak_rss_bytes"] = resident
    if torch.cuda.is_available():
        mine["peak_gpu_bytes"] = torch.cuda.max_memory_allocated()
    everywhere = ranks.gather(mine)
    return {name: max(found.get(name, 0) for found in everywhere) for name in mine}


def _peak_rss() -> int | None:
    try:
        lines = (_PROCESS / "status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:")), None)
