"""Reads what the processes of each service hold: descriptors, threads, memory, cgroups; and their major faults.

The privileged process calls this every few seconds, off every hot path. Values are of the processes that can be read at
that instant; one that ends meanwhile is left out.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import psutil

from probes import descriptors

GROWTH_SECONDS: Final = 60.0
"""The time over which the growth of descriptors is taken."""

_PROC: Final = Path("/proc")
_CLOCK_TICKS: Final = os.sysconf("SC_CLK_TCK")
_MAJOR_FAULTS_FIELD: Final = 9  # of /proc/PID/stat, after the name and its parenthesis
_START_FIELD: Final = 19


@dataclass(frozen=True, slots=True)
class ServiceProcesses:
    """What the processes of one service hold, all together.

    `open_files` is None where the descriptors of one of them may not be looked at (CAP_SYS_PTRACE is missing).
    `major_faults` counts those since the service was first looked at; it never falls. What a process faults between the
    last look at it and its end is not in it. `descriptor_growth` is in descriptors per second over the last minute or a
    little more, of the processes that have lived and been readable for that long; None without one.
    """

    processes: int
    open_files: int | None
    threads: int
    resident_bytes: int
    major_faults: int
    descriptor_growth: float | None


@dataclass(slots=True)
class _Process:
    """One process since it was first seen. `start`, in ticks since boot, tells users of one pid apart."""

    start: int
    major_faults: int
    descriptors: deque[tuple[float, int]] = field(default_factory=deque)


@dataclass(slots=True)
class _Sum:
    processes: int = 0
    open_files: int = 0
    hidden: bool = False
    threads: int = 0
    resident_bytes: int = 0
    growths: list[float] = field(default_factory=list)


class Processes:
    """Looks at processes again and again.

    `clock` is in seconds and never runs backwards; `boot_clock` is CLOCK_BOOTTIME in seconds, the one in which the
    kernel says when a process began. `proc_root` is set for all of psutil in this process: it knows only one.
    """

    def __init__(
        self,
        proc_root: Path = _PROC,
        clock: Callable[[], float] = time.monotonic,
        boot_clock: Callable[[], float] = lambda: time.clock_gettime(time.CLOCK_BOOTTIME),
    ) -> None:
        psutil.PROCFS_PATH = str(proc_root)
        self._root = proc_root
        self._by_size = descriptors.counts_by_size(str(proc_root))
        self._clock = clock
        # One tick earlier: a process of this very tick is older than this object by less than a tick, or younger.
        self._began_ticks = int(boot_clock() * _CLOCK_TICKS) - 1
        self._known: dict[int, _Process] = {}
        self._major_faults: dict[int, int] = {}

    def look(self, processes: Mapping[int, int]) -> dict[int, ServiceProcesses]:
        """Look at the processes (tgid -> service) now; return what each service holds.

        A service that once had a process stays in the result, with zeros, so that its counter does.
        """
        now = self._clock()
        sums = {service: _Sum() for service in (*self._major_faults, *processes.values())}
        for pid in self._known.keys() - processes.keys():
            del self._known[pid]
        for pid, service in processes.items():
            self._add(pid, service, sums[service], now)
        for service in sums:
            self._major_faults.setdefault(service, 0)
        return {service: self._result(service, each) for service, each in sums.items()}

    def _add(self, pid: int, service: int, to: _Sum, now: float) -> None:
        stat = _stat(self._root / str(pid) / "stat")
        if stat is None:
            self._known.pop(pid, None)
            return
        try:
            process = psutil.Process(pid)
            with process.oneshot():
                threads = process.num_threads()
                resident_bytes = process.memory_info().rss
        except psutil.NoSuchProcess:
            self._known.pop(pid, None)
            return
        open_files = descriptors.count(str(self._root), pid, by_size=self._by_size)
        if open_files is None and _stat(self._root / str(pid) / "stat") is None:
            self._known.pop(pid, None)
            return
        to.processes += 1
        to.threads += threads
        to.resident_bytes += resident_bytes
        known = self._follow(pid, service, *stat)
        if open_files is None:
            to.hidden = True
            known.descriptors.clear()
            return
        to.open_files += open_files
        known.descriptors.append((now, open_files))
        while len(known.descriptors) > 1 and now - known.descriptors[1][0] >= GROWTH_SECONDS:
            known.descriptors.popleft()
        then, before = known.descriptors[0]
        if now - then >= GROWTH_SECONDS:
            to.growths.append((open_files - before) / (now - then))

    def _follow(self, pid: int, service: int, major_faults: int, start: int) -> _Process:
        """Return what is known of the process, after counting its new major faults."""
        known = self._known.get(pid)
        if known is None or known.start != start:
            # One that began while this was already looking faulted all of it in that time; of others it is not known.
            counted = 0 if start >= self._began_ticks else major_faults
            known = self._known[pid] = _Process(start, counted)
        new = max(0, major_faults - known.major_faults)
        self._major_faults[service] = self._major_faults.get(service, 0) + new
        known.major_faults = major_faults
        return known

    def _result(self, service: int, of: _Sum) -> ServiceProcesses:
        return ServiceProcesses(
            processes=of.processes,
            open_files=None if of.hidden else of.open_files,
            threads=of.threads,
            resident_bytes=of.resident_bytes,
            major_faults=self._major_faults[service],
            descriptor_growth=sum(of.growths) if of.growths else None,
        )


def _stat(path: Path) -> tuple[int, int] | None:
    """Return the major faults and the start, in ticks since boot, of a process; None for one that is gone or a zombie.

    psutil has no major faults. The name ends at the last parenthesis: it may hold others.
    """
    try:
        raw = path.read_bytes()
    except OSError:
        return None
    fields = raw[raw.rfind(b")") + 2 :].split()
    try:
        if fields[0] in {b"Z", b"X"}:
            return None  # it holds nothing any more
        return int(fields[_MAJOR_FAULTS_FIELD]), int(fields[_START_FIELD])
    except (IndexError, ValueError):
        return None


# ---- cgroups ----


def service_cgroups(
    processes: Mapping[int, int], proc_root: Path = _PROC, cgroup_root: Path = Path("/sys/fs/cgroup")
) -> dict[int, int]:
    """Return the cgroups whose block I/O is one service's (id -> service), for the processes (tgid -> service).

    The cgroup is the one that block I/O is charged to: that of the blkio hierarchy of version 1, else of version 2 the
    nearest that has the io controller. Only those all of whose processes are of one service, never a root. The id is
    the inode number of the directory. What cannot be read, or lies outside of `cgroup_root`, is left out.
    """
    owners: dict[int, int] = {}
    seen: set[Path] = set()
    for pid in processes:
        folder = _block_cgroup(_read(proc_root / str(pid) / "cgroup"), cgroup_root)
        if folder is None or folder in seen:
            continue
        seen.add(folder)
        try:
            services = {processes.get(each) for each in _holders(folder)}
            number = folder.stat().st_ino
        except (OSError, ValueError):
            continue
        if len(services) == 1 and (service := services.pop()) is not None:
            owners[number] = service
    return owners


def _read(path: Path) -> str:
    try:
        return os.fsdecode(path.read_bytes())
    except OSError:
        return ""


def _block_cgroup(membership: str, root: Path) -> Path | None:
    """The directory of the cgroup to which a process's block I/O is charged; None for a root and for what is not there.

    `membership` is the process's /proc/PID/cgroup.
    """
    paths: dict[str, str] = {}
    for line in membership.splitlines():
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        paths.update(dict.fromkeys(controllers.split(","), path))
    if "blkio" in paths:
        return _below(root / "blkio", paths["blkio"])
    folder = _below(root, paths.get("", "/"))
    while folder is not None and folder != root and not _has_io(folder):
        folder = folder.parent
    return None if folder in {None, root} else folder


def _below(mount: Path, path: str) -> Path | None:
    parts = path.strip("/").split("/")
    return None if path.strip("/") == "" or ".." in parts else mount.joinpath(*parts)


def _has_io(folder: Path) -> bool:
    return "io" in _read(folder / "cgroup.controllers").split()


def _holders(folder: Path) -> Iterator[int]:
    """The processes whose block I/O is charged to this cgroup. Raises OSError or ValueError where that cannot be said.

    Those of other pid namespaces are 0 there.
    """
    yield from map(int, (folder / "cgroup.procs").read_text("ascii").split())
    if not (folder / "cgroup.controllers").exists():
        return  # version 1: each cgroup has its own
    for child in folder.iterdir():
        if child.is_dir() and not _has_io(child):
            yield from _holders(child)
