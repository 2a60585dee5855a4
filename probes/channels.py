"""Opens the streams of records that probes have, on the reader's side."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Final

from probes import btf, transport
from probes.probe import Transport

if TYPE_CHECKING:
    from probes.probe import Channel

MARGIN_NS: Final = 2_000_000
"""A record is in its buffer within this time of the instant that it carries: the kernel does both with preemption off,
but interrupts come between. A perf source holds back what is younger than this when *it* is looked at, which is later
than the moment that counts for a merge, so what is due has left no source's hands."""


def open_source(channel: Channel, clock: Callable[[], int], stack: ExitStack) -> transport.RecordSource:
    """Map the channel's buffers; `stack` unmaps them. `clock` is CLOCK_MONOTONIC in ns. Raises HostError."""
    dtype = btf.dtype_of(channel.object_path, channel.record)
    source: transport.RecordSource
    if channel.transport is Transport.RING:
        (fd,) = channel.fds
        source = transport.RingSource(fd, channel.size, dtype)
    else:
        pages = channel.size // mmap.PAGESIZE
        source = transport.PerfSource(channel.fds, pages, dtype, channel.order, clock=clock, margin_ns=MARGIN_NS)
    stack.callback(source.close)
    return source
