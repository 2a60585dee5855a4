"""What descriptors a process has open, by kind and by what is at their other end; and when they leak.

A snapshot is taken when something is wrong, not every second: it reads the name of each descriptor. Names are what
strangers chose; they are cut here and made printable by whoever shows them.
"""

from __future__ import annotations

import os
import socket
import sys
from collections import Counter, deque
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Final

from probes.procfs import parse_link_inode
from probes.sockdiag import unix_peers

LEAK_PER_SECOND: Final = 50.0
LEAK_S: Final = 10.0
"""Descriptors that grow by more than `LEAK_PER_SECOND` over so long leak."""
JUMPS: Final = 2
MOST_EXAMINED: Final = 65536
"""Descriptors of a process that a snapshot looks at."""
MOST_TARGETS: Final = 20
MOST_CHARACTERS: Final = 120
"""Of a target's name."""
_MOST_TABLE_BYTES: Final = 1 << 24
"""Of a table of sockets: some 100,000 connections."""
_LISTEN: Final = b"0A"
_MAPPED: Final = bytes(10) + b"\xff\xff"
"""What an address of version 4 begins with in a table of version 6."""


class Growth:
    """The descriptors of one process over the last `LEAK_S` seconds, counted once a second or so."""

    __slots__ = ("_counts",)

    def __init__(self) -> None:
        self._counts: deque[tuple[float, int]] = deque()

    def add(self, now: float, count: int) -> None:
        """Take a count. `now` is in seconds and does not go back."""
        self._counts.append((now, count))
        while len(self._counts) > 1 and now - self._counts[1][0] >= LEAK_S:
            self._counts.popleft()

    def per_second(self) -> float | None:
        """How fast they grew over the last `LEAK_S` seconds; None before so long was seen."""
        if not self._counts:
            return None
        (first, before), (last, after) = self._counts[0], self._counts[-1]
        return (after - before) / (last - first) if last - first >= LEAK_S else None

    def leaks(self) -> bool:
        """Whether they grew faster than `LEAK_PER_SECOND`, also without the `JUMPS` steps in which they grew most.

        A jump or two are no leak: a service that is given many connections at once has them.
        """
        whole = self.per_second()
        if whole is None or whole <= LEAK_PER_SECOND:
            return False
        counts = list(self._counts)
        steps = sorted(
            (after - before, now - then) for (then, before), (now, after) in pairwise(counts)
        )[:-JUMPS]
        return sum(grown for grown, _ in steps) > LEAK_PER_SECOND * sum(seconds for _, seconds in steps)


def count(root: str, pid: int, *, by_size: bool) -> int | None:
    """How many descriptors a process has open; None where that may not be looked at, or it is gone.

    `by_size` is what `counts_by_size` said.
    """
    folder = f"{root}/{pid}/fd"
    try:
        if by_size:
            return os.stat(folder).st_size
        with os.scandir(folder) as entries:  # it holds no names, as a list would: there may be a million
            return sum(1 for _ in entries)
    except OSError:
        return None


def counts_by_size(root: str) -> bool:
    """Whether the size of /proc/PID/fd is the number of descriptors, as it is since Linux 6.2; else it is zero."""
    try:
        return os.stat(f"{root}/self/fd").st_size > 0
    except OSError:
        return False


@dataclass(frozen=True, slots=True)
class Target:
    """What `count` descriptors of a process lead to. `kind` is as in `Snapshot.kinds`."""

    kind: str
    name: str
    count: int


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The descriptors of one process.

    `kinds` are `file`, `device`, `pipe`, `tcp`, `udp`, `unix`, `socket` (of another family) and, of anonymous inodes,
    the kernel's names such as `eventfd`, largest first. `targets` are the `MOST_TARGETS` largest. Of more than
    `MOST_EXAMINED` descriptors the rest is only in `open_files`.
    """

    open_files: int
    examined: int
    kinds: tuple[tuple[str, int], ...]
    targets: tuple[Target, ...]


def snapshot(pid: int, root: Path = Path("/proc")) -> Snapshot | None:
    """Look at every descriptor of a process now; None where it is gone or may not be looked at.

    Takes 2 us for each descriptor, and the tables of all sockets of its network namespace, where it has sockets.
    """
    folder = f"{root}/{pid}/fd"
    open_files = count(str(root), pid, by_size=counts_by_size(str(root)))
    if open_files is None:
        return None
    kinds: Counter[str] = Counter()
    targets: Counter[tuple[str, str]] = Counter()
    wanted: Counter[int] = Counter()
    examined = 0
    try:
        with os.scandir(folder) as entries:
            for entry in islice(entries, MOST_EXAMINED):
                try:
                    link = os.readlink(entry.path)
                except OSError:
                    continue  # closed meanwhile
                examined += 1
                inode = parse_link_inode(link, "socket")
                if inode is not None:
                    wanted[inode] += 1
                    continue
                kind, target = _plain(link)
                kinds[kind] += 1
                targets[kind, target] += 1
    except OSError:
        return None
    for inode, (kind, target) in _sockets(str(root), pid, wanted):
        number = wanted.pop(inode)
        kinds[kind] += number
        targets[kind, target] += number
    if wanted:
        kinds["socket"] += wanted.total()
        targets["socket", "of another family"] += wanted.total()
    return Snapshot(
        max(open_files, examined),  # they grow
        examined,
        tuple(kinds.most_common()),
        tuple(Target(*key, number) for key, number in targets.most_common(MOST_TARGETS)),
    )


def _plain(link: str) -> tuple[str, str]:
    """Kind and target of what is no socket."""
    if link.startswith("/"):
        kind = "device" if link.startswith("/dev/") and not link.startswith("/dev/shm/") else "file"
        return kind, _cut(link)
    if parse_link_inode(link, "pipe") is not None:
        return "pipe", link
    kind, _, rest = link.partition(":")
    if kind == "anon_inode":
        return _cut(rest.strip("[]") or kind), "anonymous inode"
    return "other", _cut(kind)


def _cut(text: str) -> str:
    return text if len(text) <= MOST_CHARACTERS else text[: MOST_CHARACTERS - 1] + "…"


# ---- sockets ----


def _sockets(root: str, pid: int, wanted: Collection[int]) -> Iterator[tuple[int, tuple[str, str]]]:
    """Inode, kind and target of those of the sockets of a process's network namespace that are wanted at that instant.

    No table is held: one of a busy host has 100,000 rows.
    """
    net = f"{root}/{pid}/net"
    for kind in ("tcp", "udp"):
        if wanted:
            yield from _inet(kind, chain(_rows(f"{net}/{kind}"), _rows(f"{net}/{kind}6")), wanted)
    if wanted:
        yield from _unix(f"{net}/unix", f"{root}/{pid}/ns/net", wanted)


def _rows(path: str) -> Iterator[list[bytes]]:
    """The fields of each line after the first."""
    try:
        with open(path, "rb") as file:
            file.readline()
            room = _MOST_TABLE_BYTES
            for line in file:
                room -= len(line)
                if room < 0:
                    return
                yield line.split()
    except OSError:
        return


def _inet(kind: str, rows: Iterable[list[bytes]], wanted: Collection[int]) -> Iterator[tuple[int, tuple[str, str]]]:
    """The wanted sockets of a /proc/net/tcp or udp table.

    Connections that came to a port are one target for each host they came from, whatever port they have there.
    """
    listening: set[int] = set()
    for fields in rows:
        try:
            inode, state = int(fields[9]), fields[3]
            listens = state == _LISTEN and kind == "tcp"
            if not listens and inode not in wanted:
                continue
            (address, port), (peer, peer_port) = _place(fields[1]), _place(fields[2])
        except (IndexError, ValueError, OverflowError):
            continue
        if listens:
            listening.add(port)  # the kernel writes these before the connections that came to them
        if inode not in wanted:
            continue
        if listens:
            yield inode, (kind, f"listens on {_shown(address, port)}")
        elif not peer_port:
            yield inode, (kind, f"on {_shown(address, port)}")
        elif port in listening:
            yield inode, (kind, f"from {peer} to port {port}")
        else:
            yield inode, (kind, f"to {_shown(peer, peer_port)}")


def _place(text: bytes) -> tuple[str, int]:
    """`0100007F:1F90` is 127.0.0.1 and 8080: words of 32 bits as this host would print them. Raises ValueError."""
    words, _, port = text.partition(b":")
    raw = b"".join(int(words[at : at + 8], 16).to_bytes(4, sys.byteorder) for at in range(0, len(words), 8))
    raw = raw.removeprefix(_MAPPED)
    return socket.inet_ntop(socket.AF_INET if len(raw) == 4 else socket.AF_INET6, raw), int(port, 16)


def _shown(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def _unix(path: str, namespace: str, wanted: Collection[int]) -> Iterator[tuple[int, tuple[str, str]]]:
    """The wanted sockets of a /proc/net/unix table. One without a name is called by its peer, where that is known."""
    peers = unix_peers(namespace)
    called = {peer for inode, peer in peers.items() if inode in wanted}
    nameless: list[int] = []
    names: dict[int, str] = {}
    for fields in _rows(path):
        try:
            inode = int(fields[6])
        except (IndexError, ValueError):
            continue
        name = _cut(os.fsdecode(fields[7])) if len(fields) > 7 else ""
        if name and inode in called:
            names[inode] = name
        if inode not in wanted:
            continue
        if name:
            yield inode, ("unix", name)
        else:
            nameless.append(inode)
    for inode in nameless:
        if inode not in wanted:
            continue  # a row came twice, as it may while the table changes
        peer = names.get(peers.get(inode, 0), "")
        yield inode, ("unix", f"to {peer}" if peer else "without a name")
