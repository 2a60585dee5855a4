"""The block probe as the attacher sees it: how long the I/O of a service takes."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import ClassVar, Final

from probes.probe import Count, Probe, Stream

_U32: Final = struct.Struct("=I")
_U64: Final = struct.Struct("=Q")


class BlockProbe(Probe):
    """The loaded and attached probe."""

    name: ClassVar[str] = "block"
    streams: ClassVar[tuple[Stream, ...]] = (
        Stream("block_ios", "block_io", "done_ns", 1 / 480, Count.SEEN_BLOCK_IOS, Count.LOST_BLOCK_IOS_RING_FULL),
    )
    reasons: ClassVar[tuple[Count, ...]] = (Count.CLOCK_BACKWARDS, Count.BLOCK_IOS_FULL, Count.CGROUPS_FULL)
    stats: ClassVar[str | None] = "block_stats"

    def follow_cgroups(self, cgroups: Mapping[int, int]) -> None:
        """Charge I/O of these cgroups (id -> service) to their service, whoever submits it.

        What finds no room is counted, and tried again at the next call.
        """
        table = self.map("cgroups")
        there = {_U64.unpack(key)[0]: _U32.unpack(value)[0] for key, value in table.items()}
        for gone in there.keys() - cgroups.keys():
            table.delete(_U64.pack(gone))
        refused = {
            cgroup
            for cgroup, service in cgroups.items()
            if there.get(cgroup) != service and not table.try_update(_U64.pack(cgroup), _U32.pack(service))
        }
        self._refuse(Count.CGROUPS_FULL, refused)
