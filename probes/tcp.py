"""The tcp probe as the attacher sees it: how the connections of a service fare."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from probes.probe import Count, Probe, Stream, Transport


class TcpProbe(Probe):
    """The loaded and attached probe. `connections` is how many TCP connections are timed at once."""

    name: ClassVar[str] = "tcp"
    streams: ClassVar[tuple[Stream, ...]] = (
        Stream("tcp_events", "tcp_event", "at_ns", 1 / 480, Count.SEEN_TCP_EVENTS, Count.LOST_TCP_EVENTS_RING_FULL),
    )
    reasons: ClassVar[tuple[Count, ...]] = (Count.CLOCK_BACKWARDS, Count.SOCKETS_FULL)
    optional: ClassVar[Mapping[str, str]] = {"sent": "sock_send_length"}  # Linux 6.3 and later
    measures: ClassVar[Mapping[str, tuple[str, ...]]] = {"sent": ("send_stall",)}
    stats: ClassVar[str | None] = "tcp_stats"

    def __init__(
        self,
        transport: Transport,
        *,
        connections: int = 65536,
        memory_bytes: int = 120 * 2**20,
        sizes: Mapping[str, int] | None = None,
        services: int = 1,
        shares_with: Probe | None = None,
        object_path: Path | None = None,
    ) -> None:
        self._connections = connections
        super().__init__(
            transport,
            memory_bytes=memory_bytes,
            sizes=sizes,
            services=services,
            shares_with=shares_with,
            object_path=object_path,
        )

    def _set_up(self) -> None:
        self._object.map("sockets").max_entries = self._connections
