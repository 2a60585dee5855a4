"""Loads the driver's libnvidia-ml.so.1 for pynvml, and unloads it, so that one of another version can be loaded."""

from __future__ import annotations

import _ctypes
import ctypes
import platform
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import pynvml  # type: ignore[import-untyped]  # it has no types

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

# What the library says when there is no driver that it talks to, so that nothing of it can be running.
_NOT_CONNECTED: Final = frozenset(
    {
        pynvml.NVML_ERROR_UNINITIALIZED,
        pynvml.NVML_ERROR_DRIVER_NOT_LOADED,
        pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH,
    }
)


class LibraryProblem(Exception):
    """The library cannot be loaded. `present` says whether there is one."""

    def __init__(self, what: str, next_step: str, present: bool) -> None:
        super().__init__(what)
        self.what = what
        self.next_step = next_step
        self.present = present


def load(configured: str | None, folders: Sequence[str] = FOLDERS, ask_loader: bool = True) -> str:
    """Make pynvml use the library at the path `configured`, or the first that loads from `folders`; return its name.

    pynvml knows one library at a time: whoever loads must unload before somebody else does. Raises `LibraryProblem`.
    """
    if configured is not None:
        return _load_first([configured], configured)
    found = [path for path in (f"{folder}/{NAME}" for folder in folders) if _is_file(path)]
    return _load_first([*found, NAME] if ask_loader else found, None)


def unload() -> None:
    """Take the library out of the process, where it has ended its work; else only out of pynvml's mind."""
    library = pynvml.nvmlLib
    ended = library is None or _shut_down()
    pynvml.nvmlLib = None
    pynvml._nvmlLib_refcount = 0
    # The functions of a library that is unmapped must not be called again.
    pynvml._nvmlGetFunctionPointer_cache.clear()
    if library is not None and ended:
        # The same name gives the same old library as long as it is open, also after an update of the driver.
        _ctypes.dlclose(library._handle)


def _shut_down() -> bool:
    """End its work; whether nothing of the library runs any more."""
    try:
        pynvml.nvmlShutdown()
    except pynvml.NVMLError as error:
        return error.value in _NOT_CONNECTED
    return True


def _load_first(paths: Sequence[str], configured: str | None) -> str:
    broken = ""
    for named in paths:
        path = named
        if "/" in path and not _is_file(path):
            broken = f"{path} is not a file"
            continue
        if "/" in path:
            # Without the link: the driver's next version has another name, also where this one cannot be unloaded.
            path = str(Path(path).resolve())
        try:
            pynvml.nvmlLib = ctypes.CDLL(path)
        except OSError as error:
            # What the loader says of a name that it does not find is of no use: there is no driver.
            broken = broken if "/" not in path else f"{path} cannot be loaded: {error}"
            continue
        return path
    if configured is not None:
        broken = broken or f"{configured} cannot be loaded"
        raise LibraryProblem(broken, f"set gpu: library to the path of {NAME}", present=_is_file(configured))
    if broken:
        raise LibraryProblem(broken, f"set gpu: library to the path of {NAME} for this machine", present=True)
    raise LibraryProblem(
        f"there is no {NAME}: no NVIDIA driver is installed, or the container does not see it",
        "install the driver; in a container, set NVIDIA_DRIVER_CAPABILITIES=utility or gpu: library; "
        "without NVIDIA GPUs, set probes: {gpu: off}",
        present=False,
    )


def _is_file(path: str) -> bool:
    """Whether it can be opened without waiting: opening a FIFO hangs."""
    try:
        return stat.S_ISREG(Path(path).stat().st_mode)
    except (OSError, ValueError):
        return False
