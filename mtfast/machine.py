"""This machine: the names of its devices, and the versions of what is installed."""

import platform
import re
from importlib import metadata
from pathlib import Path

import torch


def version_of(package: str) -> str | None:
    """Of an installed package, from its metadata; None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def cpu_name() -> str:
    """The processor's name as the system tells it."""
    try:
        found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def device_name() -> str:
    """The name of the device that training runs on: this process's GPU, or the processor."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name()
