"""This machine: the names of its devices."""

import platform
import re
from pathlib import Path

import torch


def cpu_name() -> str:
    """The processor's name as the system tells it."""
    try:
        found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def cpu_has_bfloat16() -> bool:
    """Whether the processor has instructions for bf16, without which float32 is faster."""
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported", "_is_arm_bf16_supported")
    return any(getattr(torch.cpu, name)() for name in names if hasattr(torch.cpu, name))


def device_name() -> str:
    """The name of the device that training runs on: this process's GPU, or the processor."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name()
