"""The last minute of what the probes saw, in bounded memory: for paths, and for recordings.

Bytes that clients and services exchanged are not among it: requests are kept as names, counts and instants.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from exporter.recordings import RecentRequests, RollingRecords
from exporter.timeline import Stream, Timeline
from exporter.trace_event import Recording

if TYPE_CHECKING:
    from exporter.request import FinishedRequest
    from exporter.status import AgentStatus
    from exporter.why import Explained

EVENTS: Final = {"tcp_events": "at_ns", "block_ios": "done_ns"}
"""Streams that paths do not need, with the member that says when."""
LOSSES: Final = {
    "lost_intervals_ring_full": Stream.intervals,
    "lost_messages_ring_full": Stream.messages,
    "lost_spans_ring_full": Stream.spans,
    "spans_full": Stream.spans,
    "lost_gpu_syncs_ring_full": Stream.spans,
    "cuda_calls_full": Stream.spans,
}
"""Reasons that the probes count, with the stream from which records are missing then."""
_EVENTS_SHARE: Final = 0.05
_AF_INET: Final = 2
_AF_INET6: Final = 10
_MAPPED: Final = np.frombuffer(bytes(10) + b"\xff\xff", np.uint8)


class Recorder:
    """Keeps records of the streams with these `dtypes`, in about `memory_bytes`. `services` are the names by index."""

    def __init__(self, dtypes: Mapping[str, np.dtype[Any]], memory_bytes: int, services: Sequence[str]) -> None:
        self._services = services
        events_bytes = int(memory_bytes * _EVENTS_SHARE)
        self.timeline = Timeline(memory_bytes - len(EVENTS) * events_bytes)
        self._events = {
            name: RollingRecords(dtypes[name], events_bytes // dtypes[name].itemsize, key)
            for name, key in EVENTS.items()
            if name in dtypes
        }
        self._take: dict[str, Callable[[npt.NDArray[Any]], None]] = {
            "intervals": self.timeline.add_intervals,
            "messages": lambda records: self.timeline.add_messages(_plain(records)),
            "spans": self.timeline.add_spans,
            "gpu_spans": self.timeline.add_spans,
            "names": self.timeline.add_names,
            **{name: kept.add for name, kept in self._events.items()},
        }
        self._requests = RecentRequests()

    def add(self, stream: str, records: npt.NDArray[Any]) -> None:
        """Keep copies of the records of a stream."""
        self._take[stream](records)

    def note_losses(self, before: AgentStatus | None, now: AgentStatus) -> None:
        """Let paths know which records are missing: what the probes counted as lost between two reports."""
        known = _lost(before)
        for stream, count in _lost(now).items():
            if count > known[stream]:
                self.timeline.note_loss(0 if before is None else before.at_ns, time.monotonic_ns(), stream)

    def note_all_lost(self) -> None:
        """Let paths know that of all that was made until now nothing is here: an earlier reader had it."""
        for stream in Stream:
            self.timeline.note_loss(0, time.monotonic_ns(), stream)

    def finished(self, request: FinishedRequest) -> None:
        """Keep a request."""
        self._requests.finished(request)

    def explained(self, explained: Explained) -> None:
        """Keep a request's path."""
        self._requests.explained(explained)

    def recording(self, since_ns: int, reason: str, losses: Mapping[str, int]) -> Recording:
        """A copy of all that was kept from that instant on."""
        until_ns = time.monotonic_ns()
        requests, paths = self._requests.since(since_ns)

        def kept(stream: Stream) -> npt.NDArray[Any] | None:
            slices = list(self.timeline.slices(stream, since_ns, until_ns))
            return np.concatenate(slices) if slices else None

        events = {name: rows.since(since_ns) for name, rows in self._events.items()}
        return Recording(
            since_ns=since_ns,
            until_ns=until_ns,
            wall_offset_ns=time.time_ns() - until_ns,
            services=self._services,
            requests=requests,
            paths=paths,
            intervals=kept(Stream.intervals),
            messages=kept(Stream.messages),
            spans=kept(Stream.spans),
            tcp_events=events.get("tcp_events"),
            block_ios=events.get("block_ios"),
            losses=losses,
            whole=all(
                self.timeline.is_whole(stream, since_ns, until_ns) for stream in (Stream.intervals, Stream.messages)
            ),
            thread_name=self.timeline.thread_name,
            reason=reason,
        )


def _lost(status: AgentStatus | None) -> Counter[Stream]:
    lost: Counter[Stream] = Counter()
    for probe in status.probes if status else ():
        for loss in probe.losses:
            if loss.reason in LOSSES:
                lost[LOSSES[loss.reason]] += loss.count
    return lost


def _plain(messages: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The messages with IPv4 peers as such where a socket for both has them as IPv6, as requests name theirs."""
    if not (messages["family"] == _AF_INET6).any():
        return messages
    mapped = (messages["family"] == _AF_INET6) & (messages["peer"][:, :12] == _MAPPED).all(axis=1)
    plain = messages.copy()
    plain["peer"][mapped, :4] = messages["peer"][mapped, 12:]
    plain["peer"][mapped, 4:] = 0
    plain["family"][mapped] = _AF_INET
    return plain
