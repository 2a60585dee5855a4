"""Reads what /proc says about processes.

Every function answers None (or nothing) for a process that is gone or that may not be read: processes end
between two reads all the time, and that is no error. Text from /proc is what strangers chose: a process name
may hold parentheses, newlines or bytes that are no UTF-8. It is decoded with surrogate escapes and never
trusted as a separator.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final, NamedTuple

PF_KTHREAD: Final = 0x00200000
_LISTEN: Final = b"0A"
_MAX_READ: Final = 1 << 20


class Stat(NamedTuple):
    """The fields of /proc/PID/stat that are used. `start`, in clock ticks since boot, tells users of one pid apart."""

    comm: str
    state: str
    parent: int
    kernel_thread: bool
    start: int


class ProcFs:
    """/proc, wherever it is mounted."""

    __slots__ = ("root",)

    def __init__(self, root: Path = Path("/proc")) -> None:
        self.root: Final = str(root)

    def pids(self) -> list[int]:
        """All process ids. Raises OSError when /proc itself cannot be read."""
        return [int(name) for name in os.listdir(self.root) if name.isascii() and name.isdigit()]

    def exe(self, pid: int) -> str | None:
        """Path of the executable as its mount namespace sees it; None for kernel threads, zombies and the gone."""
        try:
            path = os.readlink(f"{self.root}/{pid}/exe")
        except OSError:
            return None
        return path.removesuffix(" (deleted)")

    def stat(self, pid: int) -> Stat | None:
        """Name, state, parent and start of a process."""
        return parse_stat(self._read(f"{pid}/stat", 4096))

    def tgid(self, tid: int) -> int | None:
        """The process that a thread is of."""
        for line in self._read(f"{tid}/status", 4096).splitlines():
            name, _, value = line.partition(b":")
            if name == b"Tgid" and value.strip().isdigit():
                return int(value)
        return None

    def cmdline(self, pid: int) -> tuple[str, ...]:
        """The arguments, program name first; the first 64 KiB of them."""
        raw = self._read(f"{pid}/cmdline", 65536)
        return tuple(os.fsdecode(part) for part in raw.rstrip(b"\0").split(b"\0")) if raw else ()

    def cgroups(self, pid: int) -> tuple[str, ...]:
        """The cgroup paths, of version 2 and of each version 1 hierarchy, without duplicates."""
        paths: dict[str, None] = {}
        for line in self._read(f"{pid}/cgroup", 65536).splitlines():
            fields = line.split(b":", 2)
            if len(fields) == 3:
                paths[os.fsdecode(fields[2])] = None
        return tuple(paths)

    def network_namespace(self, pid: int) -> int | None:
        """The inode number of the network namespace."""
        try:
            return parse_link_inode(os.readlink(f"{self.root}/{pid}/ns/net"), "net")
        except OSError:
            return None

    def sockets(self, pid: int) -> set[int]:
        """Inode numbers of the sockets that the process has open."""
        inodes: set[int] = set()
        folder = f"{self.root}/{pid}/fd"
        try:
            names = os.listdir(folder)
        except OSError:
            return inodes
        for name in names:
            try:
                inode = parse_link_inode(os.readlink(f"{folder}/{name}"), "socket")
            except OSError:
                continue
            if inode is not None:
                inodes.add(inode)
        return inodes

    def listeners(self, pid: int) -> dict[int, int]:
        """Socket inode -> port of the TCP sockets that listen in the network namespace of `pid`, IPv4 and IPv6.

        The kernel walks its whole connection table for this, however few connections there are: milliseconds.
        `probes.sockdiag` asks for the listening ones alone, and says what each costs.
        """
        found: dict[int, int] = {}
        for table in ("tcp", "tcp6"):
            found.update(parse_listeners(self._read(f"{pid}/net/{table}", _MAX_READ)))
        return found

    def _read(self, name: str, limit: int) -> bytes:
        # os.open and os.read: a third of the time that a file object takes, for each process each second.
        try:
            fd = os.open(f"{self.root}/{name}", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return b""
        try:
            raw = os.read(fd, limit)
            # seq files hand over a page at a time
            while raw and len(raw) < limit and (more := os.read(fd, limit - len(raw))):
                raw += more
            return raw
        except OSError:
            return b""
        finally:
            os.close(fd)


def parse_stat(raw: bytes) -> Stat | None:
    """Parse a line of /proc/PID/stat. The name ends at the *last* parenthesis: it may hold others."""
    start, end = raw.find(b"("), raw.rfind(b")")
    fields = raw[end + 2 :].split()
    if not 0 <= start < end or len(fields) < 20:
        return None
    try:
        return Stat(
            comm=os.fsdecode(raw[start + 1 : end]),
            state=os.fsdecode(fields[0]),
            parent=int(fields[1]),
            kernel_thread=bool(int(fields[6]) & PF_KTHREAD),
            start=int(fields[19]),
        )
    except ValueError:
        return None


def parse_link_inode(target: str, kind: str) -> int | None:
    """The number in a link target such as `socket:[4711]`."""
    if not target.startswith(kind) or not target.endswith("]") or target[len(kind) : len(kind) + 2] != ":[":
        return None
    digits = target[len(kind) + 2 : -1]
    return int(digits) if digits.isascii() and digits.isdigit() else None


def parse_listeners(raw: bytes) -> dict[int, int]:
    """Socket inode -> port of the listening rows of a /proc/net/tcp or tcp6 table. Other rows are skipped."""
    found: dict[int, int] = {}
    for line in raw.splitlines()[1:]:
        fields = line.split(None, 10)
        if len(fields) < 10 or fields[3] != _LISTEN:
            continue
        try:
            found[int(fields[9])] = int(fields[1].rpartition(b":")[2], 16)
        except ValueError:
            continue
    return found
