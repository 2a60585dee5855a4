"""Where the driver's libnvidia-ml.so.1 may be, for who does not want to hold NVML's binding before there is one."""

from __future__ import annotations

import _ctypes
import os
import platform
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Final

NAME: Final = "libnvidia-ml.so.1"
_TRIPLE: Final = f"{platform.machine()}-linux-gnu"
FOLDERS: Final = (
    f"/usr/lib/{_TRIPLE}",
    "/usr/lib64",
    "/usr/local/nvidia/lib64",
    "/home/kubernetes/bin/nvidia/lib64",
    f"/run/nvidia/driver/usr/lib/{_TRIPLE}",
    "/run/nvidia/driver/usr/lib64",
    "/usr/local/cuda/lib64",
    "/usr/lib/wsl/lib",
    "/usr/lib",
)
"""Where drivers and those who mount them into containers put the library. The loader is asked after them."""
MISSING: Final = (
    f"there is no {NAME}: no NVIDIA driver is installed, or the container does not see it",
    "install the driver; in a container, set NVIDIA_DRIVER_CAPABILITIES=utility or gpu: library; "
    "without NVIDIA GPUs, set probes: {gpu: off}",
)
"""What is wrong where there is none, and what to try."""


def is_there(folders: Sequence[str] = FOLDERS) -> bool:
    """Whether one of the folders has the library, or the loader finds one."""
    if any(is_file(f"{folder}/{NAME}") for folder in folders):
        return True
    try:
        handle = _ctypes.dlopen(NAME, os.RTLD_LAZY)
    except OSError:
        return False
    _ctypes.dlclose(handle)
    return True


def is_file(path: str) -> bool:
    """Whether it can be opened without waiting: opening a FIFO hangs."""
    try:
        return stat.S_ISREG(Path(path).stat().st_mode)
    except (OSError, ValueError):
        return False
