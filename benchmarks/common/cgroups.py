"""Makes a control group with limits, of cgroup version 1 or 2, wherever the host has the controller; gives it back.

A controller is in one hierarchy at a time, so there is nothing to choose. The group is made right below the mount: of
version 2 only the root may hold processes and have controllers for its children.
"""

from __future__ import annotations

import contextlib
import errno
import re
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import click

Controller = Literal["cpu", "memory", "io"]
"""By version 2's names."""
IoLimit = Literal["rbps", "wbps", "riops", "wiops"]
"""Reads or writes: bytes a second, or how many a second."""
MOUNTINFO: Final = Path("/proc/self/mountinfo")

_V1_NAMES: Final[dict[Controller, str]] = {"cpu": "cpu", "memory": "memory", "io": "blkio"}
_V1_LIMITS: Final[dict[IoLimit, str]] = {
    "rbps": "read_bps",
    "wbps": "write_bps",
    "riops": "read_iops",
    "wiops": "write_iops",
}
_GONE_S: Final = 10.0


class Group(ABC):
    """A control group. It has the limits of the controller that it was made for."""

    def __init__(self, path: Path) -> None:
        self.path: Final = path

    @property
    def number(self) -> int:
        """Its id, by which the kernel's own structures know it."""
        return self.path.stat().st_ino

    def add(self, *pids: int) -> None:
        """Move processes here, with all their threads."""
        for pid in pids:
            self._write("cgroup.procs", pid)

    @abstractmethod
    def limit_cpu(self, quota_us: int, period_us: int) -> None:
        """Let it have so much CPU time in each period."""

    @abstractmethod
    def throttled_ns(self) -> int:
        """How long it had used up its quota, added up over the CPUs. Version 2 says it in microseconds."""

    @abstractmethod
    def limit_memory(self, size: int) -> None:
        """Let it have so many bytes, and no swap. Blocks while the kernel takes back what is too much."""

    @abstractmethod
    def never_kill(self) -> None:
        """Let who finds no memory wait for some. Raises click.ClickException for version 2, which cannot do that."""

    @abstractmethod
    def used_bytes(self) -> int:
        """How much memory is charged to it, the page cache included."""

    @abstractmethod
    def limit_io(self, device: str, what: IoLimit, rate: int) -> None:
        """Limit what it may ask of a device ("major:minor"). 0: no limit."""

    def _write(self, name: str, value: object) -> None:
        (self.path / name).write_text(str(value), "ascii")

    def _read(self, name: str) -> str:
        return (self.path / name).read_text("ascii")

    def _stat(self, name: str, key: str) -> int:
        """One value of a file of "key value" lines."""
        for line in self._read(name).splitlines():
            have, _, value = line.partition(" ")
            if have == key:
                return int(value)
        raise click.ClickException(f"{self.path / name} has no {key}: this kernel does not keep account of it")

    def _remove(self) -> None:
        """Remove it; processes that are left go to the parent."""
        deadline = time.monotonic() + _GONE_S
        while True:
            for pid in self._read("cgroup.procs").split():
                with contextlib.suppress(ProcessLookupError):
                    (self.path.parent / "cgroup.procs").write_text(pid, "ascii")
            try:
                self.path.rmdir()
                return
            except OSError as error:  # the last process is not all gone
                if error.errno != errno.EBUSY or time.monotonic() > deadline:
                    raise
            time.sleep(0.02)


class _Group1(Group):
    def limit_cpu(self, quota_us: int, period_us: int) -> None:
        self._write("cpu.cfs_period_us", period_us)
        self._write("cpu.cfs_quota_us", quota_us)

    def throttled_ns(self) -> int:
        return self._stat("cpu.stat", "throttled_time")

    def limit_memory(self, size: int) -> None:
        self._write("memory.swappiness", 0)
        self._write("memory.limit_in_bytes", size)

    def never_kill(self) -> None:
        self._write("memory.oom_control", 1)

    def used_bytes(self) -> int:
        return int(self._read("memory.usage_in_bytes"))

    def limit_io(self, device: str, what: IoLimit, rate: int) -> None:
        self._write(f"blkio.throttle.{_V1_LIMITS[what]}_device", f"{device} {rate}")


class _Group2(Group):
    def limit_cpu(self, quota_us: int, period_us: int) -> None:
        self._write("cpu.max", f"{quota_us} {period_us}")

    def throttled_ns(self) -> int:
        return self._stat("cpu.stat", "throttled_usec") * 1000

    def limit_memory(self, size: int) -> None:
        if (self.path / "memory.swap.max").exists():  # not where the kernel knows no swap
            self._write("memory.swap.max", 0)
        self._write("memory.max", size)

    def never_kill(self) -> None:
        raise click.ClickException("needs the cgroup controller memory of version 1: version 2 always kills")

    def used_bytes(self) -> int:
        return int(self._read("memory.current"))

    def limit_io(self, device: str, what: IoLimit, rate: int) -> None:
        self._write("io.max", f"{device} {what}={rate or 'max'}")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a controller is mounted."""

    version: Literal[1, 2]
    mount: Path


def find(controller: Controller, mountinfo: Path = MOUNTINFO) -> Place | None:
    """Where a controller can be used; None where it cannot."""
    for kind, mount, options in _mounts(mountinfo):
        if kind == "cgroup" and _V1_NAMES[controller] in options:
            return Place(1, mount)
        if kind == "cgroup2" and controller in (mount / "cgroup.controllers").read_text("ascii").split():
            return Place(2, mount)
    return None


def missing(*controllers: Controller, mountinfo: Path = MOUNTINFO) -> str | None:
    """What to do so that these controllers can be used; None where they can."""
    return next((_advice(each, mountinfo) for each in controllers if find(each, mountinfo) is None), None)


def _advice(controller: Controller, mountinfo: Path) -> str:
    name = _V1_NAMES[controller]
    mount = f"mount -t cgroup -o {name} cgroup /sys/fs/cgroup/{name}"
    if all(kind != "cgroup2" for kind, _, _ in _mounts(mountinfo)):
        mount = f"mount -t cgroup2 cgroup2 /sys/fs/cgroup, or {mount}"
    return f"needs the cgroup controller {controller}, which is not mounted here, or only to be read: {mount}"


def _mounts(mountinfo: Path) -> Iterator[tuple[str, Path, Sequence[str]]]:
    """The control group file systems that can be written: type, where, options. See proc_pid_mountinfo(5)."""
    for line in mountinfo.read_text().splitlines():
        mount, _, file_system = line.partition(" - ")
        kind, _, options = file_system.split(" ", 2)
        where, rights = mount.split(" ")[4:6]
        if kind in {"cgroup", "cgroup2"} and "rw" in rights.split(","):
            yield kind, Path(re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), where)), options.split(",")


@contextlib.contextmanager
def group(controller: Controller, mountinfo: Path = MOUNTINFO) -> Iterator[Group]:
    """Make a group for a controller. At the end processes that are left in it go to its parent.

    Raises click.ClickException where the host cannot.
    """
    place = find(controller, mountinfo)
    if place is None:
        raise click.ClickException(_advice(controller, mountinfo))
    with contextlib.ExitStack() as stack:
        if place.version == 2:
            stack.enter_context(_enabled(place.mount, controller))
        folder = Path(tempfile.mkdtemp(prefix="footlight-", dir=place.mount))
        made = _Group1(folder) if place.version == 1 else _Group2(folder)
        stack.callback(made._remove)
        yield made


@contextlib.contextmanager
def _enabled(mount: Path, controller: Controller) -> Iterator[None]:
    """Let the groups below have a controller. Not for two programs at once: who ends first takes it away."""
    control = mount / "cgroup.subtree_control"
    if controller in control.read_text("ascii").split():
        yield
        return
    try:
        control.write_text(f"+{controller}", "ascii")
    except OSError as error:
        # EBUSY: a container's root is a group like any other, and holds processes
        what = f"{control} does not take {controller} ({error.strerror})"
        raise click.ClickException(f"{what}: run it on the host, not in a container") from error
    try:
        yield
    finally:
        try:
            control.write_text(f"-{controller}", "ascii")
        except OSError as error:
            if error.errno != errno.EBUSY:  # EBUSY: by now somebody gave it to groups further down
                raise


@contextlib.contextmanager
def io_limited_for_all(device: str, what: IoLimit, rate: int) -> Iterator[None]:
    """Limit a device for everybody, the kernel's own threads included: the limit of version 1's root group.

    Version 2's root has none. Raises click.ClickException where the controller is not of version 1.
    """
    place = find("io")
    if place is None or place.version != 1:
        raise click.ClickException("needs the cgroup controller blkio of version 1: version 2 has no limit for all")
    root = _Group1(place.mount)
    root.limit_io(device, what, rate)
    try:
        yield
    finally:
        root.limit_io(device, what, 0)
