"""The requests probe as the attacher sees it: it also says whom all probes follow.

No captured byte passes through here; the reader's side is `probes.records`.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import ClassVar, Final

from probes.probe import Count, Probe, Stream, Transport

_CALLS_PER_CONNECTION: Final = 2
_FILTER_BYTES: Final = 65536
_U32: Final = struct.Struct("=I")
_PORT_KEY: Final = struct.Struct("=II")
_MAYBE: Final = 1  # what programs write
_STALE: Final = 2  # as good to programs; user space found no target for it


class RequestsProbe(Probe):
    """The loaded and attached probe. `connections` is how many TCP connections are followed at once."""

    name: ClassVar[str] = "requests"
    # Writes get the most: 20,000 frames a second are 10 MB a second, and the reader may be away for a scrape.
    streams: ClassVar[tuple[Stream, ...]] = (
        Stream("events", "connection_event", "seen_ns", 1 / 56, Count.SEEN_EVENTS, Count.LOST_EVENTS_RING_FULL),
        Stream("reads", "read_chunk", "header.seen_ns", 1 / 28, Count.SEEN_READS, Count.LOST_READS_RING_FULL),
        Stream("writes", "write_chunk", "header.seen_ns", 1 / 7, Count.SEEN_WRITES, Count.LOST_WRITES_RING_FULL),
    )
    reasons: ClassVar[tuple[Count, ...]] = (
        Count.CONNECTIONS_FULL,
        Count.CALLS_FULL,
        Count.TARGETS_FULL,
        Count.UNREADABLE,
        Count.TOO_MANY_SEGMENTS,
        Count.CAPPED_CALLS,
        Count.UNSEEN_BYTES_CALLS,
        Count.UNFOLLOWED_IO,
        Count.STALE_CONNECTION,
        Count.PORTS_FULL,
    )

    def __init__(
        self,
        transport: Transport,
        *,
        connections: int = 65536,
        memory_bytes: int = 120 * 2**20,
        sizes: Mapping[str, int] | None = None,
        object_path: Path | None = None,
    ) -> None:
        self._connections = connections
        self._processes: dict[int, int] = {}
        self._ports: dict[tuple[int, int], int] = {}
        self._revision = 0
        super().__init__(transport, memory_bytes=memory_bytes, sizes=sizes, object_path=object_path)
        self._filter = self._stack.enter_context(mmap.mmap(self.map("target_filter").fd, _FILTER_BYTES))
        self._filter.madvise(mmap.MADV_DONTFORK)  # the reader is forked, and whoever writes here blinds every probe

    def _set_up(self) -> None:
        self._object.map("connections").max_entries = self._connections
        self._object.map("calls").max_entries = max(1024, self._connections // _CALLS_PER_CONNECTION)

    def follow(self, processes: Mapping[int, int], ports: Mapping[tuple[int, int], int]) -> None:
        """Follow these processes (tgid -> service) and (network namespace, port) -> service, and their children.

        A process that the kernel added by itself, because a target forked it, stays until it exits. What finds no room
        is counted, and tried again at the next call.
        """
        targets, there = self._object.map("targets"), self.targets()
        gone = self._processes.keys() - processes.keys()
        changed, refused = bool(gone), set()
        for tgid in gone:
            targets.delete(_U32.pack(tgid))
        for tgid, service in processes.items():
            if there.get(tgid) == service:
                continue
            self._filter[tgid % _FILTER_BYTES] = _MAYBE
            if targets.try_update(_U32.pack(tgid), _U32.pack(service)):
                changed = True
            else:
                refused.add(tgid)
        self._refuse(Count.TARGETS_FULL, refused)
        self._processes = dict(processes)
        if self._follow_ports(ports) or changed:
            self._revision += 1
            self._object.map("revision").update(_U32.pack(0), _U32.pack(self._revision))
        self._sweep_filter(gone)

    def targets(self) -> dict[int, int]:
        """tgid -> service of every process that is followed now, those added by the kernel included."""
        return {_U32.unpack(key)[0]: _U32.unpack(value)[0] for key, value in self._object.map("targets").items()}

    def _sweep_filter(self, gone: Iterable[int]) -> None:
        """Clear what no target needs any more, in two rounds: a fork in between writes `_MAYBE` again, and is kept.

        What `gone` needed goes at once: programs that know their threads ask nothing but the filter.
        """
        needed = {tgid % _FILTER_BYTES for tgid in self.targets()}
        for place in {tgid % _FILTER_BYTES for tgid in gone} - needed:
            self._filter[place] = 0
        for place in needed:
            self._filter[place] = _MAYBE
        content = self._filter[:]
        for mark, following in ((_STALE, 0), (_MAYBE, _STALE)):
            place = content.find(mark)
            while place >= 0:
                if place not in needed and self._filter[place] == mark:
                    self._filter[place] = following
                place = content.find(mark, place + 1)

    def _follow_ports(self, ports: Mapping[tuple[int, int], int]) -> bool:
        """Return whether anything is new."""
        table, bits = self._object.map("ports"), self._object.map("port_bits")
        for gone in self._ports.keys() - ports.keys():
            table.delete(_PORT_KEY.pack(*gone))
        followed = {
            key: service
            for key, service in ports.items()
            if self._ports.get(key) == service or table.try_update(_PORT_KEY.pack(*key), _U32.pack(service))
        }
        self._refuse(Count.PORTS_FULL, ports.keys() - followed.keys())
        before = {port for _, port in self._ports}
        now = {port for _, port in followed}
        for port in before ^ now:
            bits.update(_U32.pack(port), bytes([port in now]))
        changed = followed != self._ports
        self._ports = followed
        return changed
