"""Which device files are GPUs': paths with wildcards into the numbers by which the kernel knows the devices."""

from __future__ import annotations

import glob
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

DEVICES_MAX: Final = 1024
"""The size of `gpu_devices` in bpf/scheduler.bpf.c. A host with 16 GPUs of 7 MIG instances has some 250."""
ROOTS: Final = ("/", "/proc/1/root")
"""Where paths are looked for: here, and, for an agent in a container that sees the host's processes, on the host."""


@dataclass(frozen=True, slots=True)
class DeviceFile:
    """A character device: one path of it, and its number as the kernel has it, major << 20 | minor."""

    path: str
    number: int


def find_devices(patterns: Sequence[str], roots: Sequence[str] = ROOTS) -> tuple[DeviceFile, ...]:
    """The character devices whose path matches one of the patterns, by number; at most `DEVICES_MAX`.

    A device has one number, whatever file of whatever container names it: the host's paths find them all. What cannot
    be looked at is left out.
    """
    found: dict[int, str] = {}
    for path in _matches(patterns, roots):
        number = _number(path)
        if number is not None:
            found.setdefault(number, path)
    return tuple(DeviceFile(path, number) for number, path in sorted(found.items())[:DEVICES_MAX])


def _matches(patterns: Sequence[str], roots: Sequence[str]) -> Iterator[str]:
    for root in roots:
        for pattern in patterns:
            # Path.glob takes `**` as any depth, and would go through all of a host.
            yield from glob.iglob(f"{glob.escape(root).rstrip('/')}/{pattern.lstrip('/')}")  # noqa: PTH207 - see above


def _number(path: str) -> int | None:
    try:
        status = os.stat(path)  # noqa: PTH116 - iglob gives text
    except OSError:
        return None
    if not stat.S_ISCHR(status.st_mode):
        return None
    return os.major(status.st_rdev) << 20 | os.minor(status.st_rdev)
