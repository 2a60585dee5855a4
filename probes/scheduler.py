"""The scheduler probe as the attacher sees it: what threads of a service did while no token came."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from typing import ClassVar, Final

from probes import libbpf
from probes.probe import Count, Probe, Stream

_U32: Final = struct.Struct("=I")
_YES: Final = b"\x01"


class SchedulerProbe(Probe):
    """The loaded and attached probe."""

    name: ClassVar[str] = "scheduler"
    streams: ClassVar[tuple[Stream, ...]] = (
        Stream("intervals", "thread_interval", "on_ns", 1 / 56, Count.SEEN_INTERVALS, Count.LOST_INTERVALS_RING_FULL),
        Stream("messages", "message", "at_ns", 1 / 112, Count.SEEN_MESSAGES, Count.LOST_MESSAGES_RING_FULL),
        Stream("names", "thread_name", "at_ns", 1 / 480, Count.SEEN_NAMES, Count.LOST_NAMES_RING_FULL),
    )
    reasons: ClassVar[tuple[Count, ...]] = (Count.UNREADABLE, Count.THREADS_FULL, Count.CLOCK_BACKWARDS)
    stats: ClassVar[str | None] = "scheduler_stats"
    # Linux 6.3 and later
    optional: ClassVar[Mapping[str, str]] = {
        "data_ready": "sk_data_ready",
        "sent": "sock_send_length",
        "received": "sock_recv_length",
    }
    in_place_of: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "sk_data_ready": ("segment_arrived",),
        "sock_send_length": (
            "returned_write",
            "returned_writev",
            "returned_sendto",
            "returned_sendmsg",
            "returned_sendmmsg",
            "returned_sendfile64",
        ),
        "sock_recv_length": ("bytes_read",),
    }
    """Programs that are loaded only where the kernel's BTF has no such tracepoint."""

    def _choose_programs(self) -> None:
        super()._choose_programs()
        for tracepoint, programs in self.in_place_of.items():
            if libbpf.has_btf_tracepoint(tracepoint):
                for program in programs:
                    self._object.program(program).set_autoload(False)

    def _set_up(self) -> None:
        """Tell the program where the kernel says whether it is in an interrupt; without it no waker is named."""
        offsets = libbpf.per_cpu_offsets("runqueues", "__preempt_count", "pcpu_hot")
        counter = offsets.get("__preempt_count", offsets.get("pcpu_hot"))
        if counter is not None and "runqueues" in offsets:
            self._object.set_global("preempt_count_distance", counter - offsets["runqueues"])

    def follow_gpu_devices(self, numbers: AbstractSet[int]) -> None:
        """Take waits on these character devices (major << 20 | minor) as waits for a GPU, and on no others.

        At most `probes.devices.DEVICES_MAX`. Raises ProbeError.
        """
        table = self.map("gpu_devices")
        there = {_U32.unpack(key)[0] for key, _ in table.items()}
        if there == numbers:
            return
        for gone in there - numbers:
            table.delete(_U32.pack(gone))
        for number in numbers - there:
            table.update(_U32.pack(number), _YES)
        self.map("gpu_devices_cnt").update(_U32.pack(0), _U32.pack(len(numbers)))
