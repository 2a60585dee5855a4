"""Looks at the processes of each service once a second: CPU time, resident memory, descriptors; and whether these leak.

It is the privileged process that looks, so it reads one line and the size of one folder for each of them. What else
processes hold is read less often (`probes.processes`).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from probes import descriptors
from probes.descriptors import Growth, Snapshot

AGAIN_S: Final = 300.0
"""Between two snapshots of one process that goes on leaking."""
_TICKS: Final = os.sysconf("SC_CLK_TCK")
_PAGE: Final = os.sysconf("SC_PAGE_SIZE")
# of /proc/PID/stat, after the name and its parenthesis
_USER, _SYSTEM, _START, _RESIDENT = 11, 12, 19, 21


@dataclass(frozen=True, slots=True)
class ServiceVitals:
    """What the processes of one service use, all together.

    `cpu_seconds` is the CPU time, user and system, since the service was first looked at; it never falls, and does not
    have what a process used between the last look at it and its end. `eldest` names the process that has been there
    longest: another one means that the service was started again. `open_files` is None where one of them could not be
    looked at.
    """

    cpu_seconds: float
    resident_bytes: int
    open_files: int | None
    eldest: int


@dataclass(frozen=True, slots=True)
class Leak:
    """A process whose descriptors leak: how fast they grew, per second, and what they are."""

    service: int
    tgid: int
    per_second: float
    found: Snapshot


@dataclass(slots=True)
class _Process:
    """One process since it was first seen; `start`, in ticks since boot, tells users of one pid apart."""

    start: int
    ticks: int
    growth: Growth = field(default_factory=Growth)
    told: float | None = None


class Vitals:
    """Looks again and again. `clock` is in seconds and never runs backwards."""

    def __init__(self, root: Path = Path("/proc"), clock: Callable[[], float] = time.monotonic) -> None:
        self._root: Final = str(root)
        self._clock: Final = clock
        self._by_size: Final = descriptors.counts_by_size(self._root)
        self._known: dict[int, _Process] = {}
        self._ticks: dict[int, int] = {}
        self._services: Mapping[int, int] = {}

    def look(self, processes: Mapping[int, int]) -> dict[int, ServiceVitals]:
        """Look at the processes (tgid -> service) now; what each service that has one uses."""
        now = self._clock()
        self._services = processes
        for pid in self._known.keys() - processes.keys():
            del self._known[pid]
        resident: dict[int, int] = {}
        files: dict[int, int | None] = {}
        eldest: dict[int, tuple[int, int]] = {}
        for pid, service in processes.items():
            used = _used(f"{self._root}/{pid}/stat")
            if used is None:
                self._known.pop(pid, None)
                continue
            ticks, start, pages = used
            known = self._known.get(pid)
            if known is None or known.start != start:
                known = self._known[pid] = _Process(start, ticks)
            self._ticks[service] = self._ticks.get(service, 0) + max(0, ticks - known.ticks)
            known.ticks = ticks
            open_files = descriptors.count(self._root, pid, by_size=self._by_size)
            if open_files is not None:
                known.growth.add(now, open_files)
            so_far = files.get(service, 0)
            files[service] = None if open_files is None or so_far is None else so_far + open_files
            resident[service] = resident.get(service, 0) + pages * _PAGE
            eldest[service] = min(eldest.get(service, (start, pid)), (start, pid))
        return {
            service: ServiceVitals(
                self._ticks[service] / _TICKS,
                resident[service],
                files[service],
                eldest[service][0] << 22 | eldest[service][1],  # a pid has 22 bits at the most
            )
            for service in resident
        }

    def leaks(self) -> list[Leak]:
        """Processes whose descriptors leak as of the last look, each at the most once in `AGAIN_S`."""
        now = self._clock()
        found = []
        for pid, known in self._known.items():
            if (known.told is not None and now - known.told < AGAIN_S) or not known.growth.leaks():
                continue
            seen = descriptors.snapshot(pid, Path(self._root))
            if seen is None:
                continue
            known.told = now
            found.append(Leak(self._services[pid], pid, known.growth.per_second() or 0.0, seen))
        return found


def _used(path: str) -> tuple[int, int, int] | None:
    """CPU time and start in ticks, and resident pages; None for a process that is gone or is a zombie.

    The name ends at the last parenthesis: it may hold others.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        raw = os.read(fd, 4096)
    except OSError:
        return None
    finally:
        os.close(fd)
    fields = raw[raw.rfind(b")") + 2 :].split()
    try:
        if fields[0] in {b"Z", b"X"}:
            return None
        return int(fields[_USER]) + int(fields[_SYSTEM]), int(fields[_START]), int(fields[_RESIDENT])
    except (IndexError, ValueError):
        return None
