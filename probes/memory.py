"""The memory probe as the attacher sees it: when threads of a service had to free memory themselves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from probes.probe import Count, Probe, Stream


class MemoryProbe(Probe):
    """The loaded and attached probe."""

    name: ClassVar[str] = "memory"
    streams: ClassVar[tuple[Stream, ...]] = (
        Stream("spans", "thread_span", "end_ns", 1 / 480, Count.SEEN_SPANS, Count.LOST_SPANS_RING_FULL),
    )
    reasons: ClassVar[tuple[Count, ...]] = (Count.CLOCK_BACKWARDS, Count.SPANS_FULL)
    stats: ClassVar[str | None] = "memory_stats"
    # kernels without memory cgroups
    optional: ClassVar[Mapping[str, str]] = {
        "memcg_begin": "mm_vmscan_memcg_reclaim_begin",
        "memcg_end": "mm_vmscan_memcg_reclaim_end",
    }
