"""The tcp probe as the attacher sees it: how the connections of a service fare."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from probes.probe import Count, Probe, Stream


class TcpProbe(Probe):
    """The loaded and attached probe."""

    name: ClassVar[str] = "tcp"
    streams: ClassVar[tuple[Stream, ...]] = (
        Stream("tcp_events", "tcp_event", "at_ns", 1 / 480, Count.SEEN_TCP_EVENTS, Count.LOST_TCP_EVENTS_RING_FULL),
    )
    reasons: ClassVar[tuple[Count, ...]] = (Count.CLOCK_BACKWARDS, Count.SOCKETS_FULL)
    optional: ClassVar[Mapping[str, str]] = {"sent": "sock_send_length"}  # Linux 6.3 and later
    stats: ClassVar[str | None] = "tcp_stats"
