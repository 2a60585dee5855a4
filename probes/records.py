"""The requests probe as the reader sees it: three streams of records, put into one order.

The order is that of `seen_ns`, the instant at which the kernel made each record. A record younger than the moment
before the streams were looked at is left for the next time: an older one may still be on its way in another stream.
What one thread does is in order whatever the clocks say: the record of a read is in its stream before the call returns,
and the answer is written after that.
"""

from __future__ import annotations

import ipaddress
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from enum import IntEnum
from typing import TYPE_CHECKING, Final, Protocol, Self

import numpy as np

from probes import transport
from probes.channels import MARGIN_NS, open_source

if TYPE_CHECKING:
    from types import TracebackType

    from numpy.typing import NDArray

    from probes.probe import Channel

SLICE: Final = 2048
"""Records of one stream that are decoded at a time. A full ring at once would cost four times its size in memory."""


class EventKind(IntEnum):
    """`enum event_kind` of bpf/records.h, which says what each one means. `tests/kernel` fails when the two differ."""

    OPENED = 1
    ACCEPTED = 2
    SEGMENT = 3
    STATE = 4
    RESET = 5


class Handler(Protocol):
    """Takes the records in order. Instants are CLOCK_MONOTONIC ns, positions TCP sequence numbers modulo 2**32."""

    def segment(self, conn: int, seen_ns: int, position: int, size: int) -> None:
        """`size` bytes from `position` on entered the connection's receive path."""

    def opened(
        self, conn: int, seen_ns: int, service: int, peer: str, born: bool, rx_position: int, tx_position: int
    ) -> None:
        """A connection is followed from here on; `born`: from its first byte. The positions are the next bytes'."""

    def accepted(self, conn: int, service: int) -> None:
        """A process of `service` took the connection from its accept queue."""

    def state(
        self, conn: int, seen_ns: int, old: int, new: int, tgid: int, rx_position: int, tx_position: int, error: int
    ) -> None:
        """TCP went from one state to another; from 0: to CLOSE a while ago, which nobody was told at the time.

        The positions are those after the last byte that a record was made for, delivered or not. `error` is the errno
        that the connection died of; 0 where `new` is not CLOSE, or where the service closed it.
        """

    def reset(self, conn: int, seen_ns: int) -> None:
        """The peer sent RST."""

    def read(
        self,
        conn: int,
        at_ns: int,
        position: int,
        data: bytes,
        uncaptured: int,
        lost: int,
        lost_other: int,
        service: int,
        tgid: int,
        tid: int,
    ) -> None:
        """The service's read returned `data` at `at_ns`; after it come `uncaptured` bytes that nobody copied.

        `lost` is how many records of this direction of the connection were lost so far, modulo 2**32; `lost_other`
        the same of the other direction.
        """

    def wrote(
        self,
        conn: int,
        at_ns: int,
        position: int,
        data: bytes,
        uncaptured: int,
        lost: int,
        lost_other: int,
        service: int,
        tgid: int,
        tid: int,
    ) -> None:
        """The service handed `data` to the kernel in a call made at `at_ns`. The rest as in `read`."""


class Merge:
    """Puts three sources of records, of events, reads and writes, into one order. `clock` is CLOCK_MONOTONIC in ns."""

    def __init__(self, sources: Sequence[transport.RecordSource], clock: Callable[[], int] = time.monotonic_ns) -> None:
        self._sources = sources
        self._clock = clock
        self._last_seen = [0] * len(sources)
        self.delivered: dict[str, int] = {"events": 0, "reads": 0, "writes": 0}
        """Records handed to the handler, by stream."""

    def skip_all(self) -> int:
        """Drop everything that is waiting, and return how many records that was."""
        return sum(source.skip_all() for source in self._sources)

    def drain(self, handler: Handler) -> int:
        """Hand every record that is due to `handler`, in order. Returns how many there were; does not block.

        Records that are made meanwhile are for the next call: it ends however fast they come.
        """
        horizon = self._clock() - MARGIN_NS
        total = 0
        while True:
            count, more = self._drain_slice(handler, horizon)
            total += count
            if not count or not more:
                return total

    def _drain_slice(self, handler: Handler, horizon: int) -> tuple[int, bool]:
        """Hand over at most `SLICE` records of each stream; say how many, and whether a stream may have more."""
        batches = [source.pending(SLICE) for source in self._sources]
        more = False
        for index, (source, batch) in enumerate(zip(self._sources, batches, strict=True)):
            cut = len(batch) >= SLICE
            more = more or cut
            if cut or source.stalled:
                # What this stream has beyond here is not known: nothing younger may overtake it.
                newest = int(_seen(batch).max()) if len(batch) else self._last_seen[index]
                horizon = min(horizon, newest)
        due = [_due(batch, horizon) for batch in batches]
        total = sum(due)
        if total:
            self._hand_over([batch[:count] for batch, count in zip(batches, due, strict=True)], handler)
        for index, (name, count) in enumerate(zip(self.delivered, due, strict=True)):
            if count:
                self._last_seen[index] = int(_seen(batches[index])[:count].max())
                self._sources[index].consume(count)
                self.delivered[name] += count
        return total, more

    def _hand_over(self, batches: Sequence[NDArray[np.void]], handler: Handler) -> None:
        events, reads, writes = batches
        calls = [
            _event_calls(events, handler),
            _chunk_calls(reads, handler.read),
            _chunk_calls(writes, handler.wrote),
        ]
        merged = calls[0] + calls[1] + calls[2]
        if len(merged) in map(len, calls):  # all of one stream, which is in order
            for call, arguments in merged:
                call(*arguments)
            return
        seen = np.concatenate([_seen(batch) for batch in batches])
        for index in np.argsort(seen, kind="stable").tolist():
            call, arguments = merged[index]
            call(*arguments)


class RequestRecords(Merge):
    """Maps the probe's streams and drains them into a handler. A context manager.

    `channels` are those of the requests probe, others are left alone. Must be made while the process may still map the
    rings (facts: on Linux 5.10 an unprivileged process may not). `clock` is CLOCK_MONOTONIC in ns.
    """

    def __init__(self, channels: Iterable[Channel], clock: Callable[[], int] = time.monotonic_ns) -> None:
        by_name = {channel.name: channel for channel in channels}
        with ExitStack() as opening:
            streams = [by_name[name] for name in ("events", "reads", "writes")]
            super().__init__([open_source(channel, clock, opening) for channel in streams], clock)
            self._stack = opening.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()


def _seen(batch: NDArray[np.void]) -> NDArray[np.uint64]:
    names = batch.dtype.names or ()
    seen: NDArray[np.uint64] = batch["seen_ns"] if "seen_ns" in names else batch["header"]["seen_ns"]
    return seen


def _due(batch: NDArray[np.void], horizon: int) -> int:
    """How many records at the front are not younger than the horizon."""
    if not len(batch):
        return 0
    younger = _seen(batch) > max(horizon, 0)
    first = int(np.argmax(younger))
    return first if younger[first] else len(batch)


_Call = tuple[Callable[..., None], tuple[object, ...]]


def _chunk_calls(batch: NDArray[np.void], call: Callable[..., None]) -> list[_Call]:
    if not len(batch):
        return []
    header = batch["header"]
    payload = batch["payload"]
    width = payload.shape[1]
    sizes = np.minimum(header["size"], width).tolist()
    # One copy of all payloads, then slices of bytes: a slice of a numpy row costs five times as much.
    blob = payload.tobytes()
    data = [blob[start : start + size] for start, size in zip(range(0, len(blob), width), sizes, strict=True)]
    columns = [
        header[name].tolist()
        for name in ("conn", "at_ns", "position", "uncaptured", "lost", "lost_other", "service", "tgid", "tid")
    ]
    conn, at_ns, position, *rest = columns
    return [(call, arguments) for arguments in zip(conn, at_ns, position, data, *rest, strict=True)]


# An enum's member costs four times as much to look up and compare.
_OPENED, _ACCEPTED, _SEGMENT, _STATE, _RESET = map(int, EventKind)


def _event_calls(batch: NDArray[np.void], handler: Handler) -> list[_Call]:
    if not len(batch):
        return []
    names = "kind conn seen_ns position tx_position size service tgid old_state new_state error family born peer_port"
    columns = [batch[name].tolist() for name in names.split()]
    peers = batch["peer"]
    calls: list[_Call] = []
    for index, row in enumerate(zip(*columns, strict=True)):
        kind, conn, seen, position, tx_position, size, service, tgid, old, new, error, family, born, peer_port = row
        if kind == _SEGMENT:
            calls.append((handler.segment, (conn, seen, position, size)))
        elif kind == _STATE:
            calls.append((handler.state, (conn, seen, old, new, tgid, position, tx_position, error)))
        elif kind == _OPENED:
            peer = _address(peers[index].tobytes(), family, peer_port)
            calls.append((handler.opened, (conn, seen, service, peer, bool(born), position, tx_position)))
        elif kind == _ACCEPTED:
            calls.append((handler.accepted, (conn, service)))
        elif kind == _RESET:
            calls.append((handler.reset, (conn, seen)))
        else:
            calls.append((_unknown_event, (kind,)))  # one call for each record: the merge counts on it
    return calls


def _unknown_event(kind: int) -> None:
    """Take a record of no kind that is known here: the object is newer than this file."""


_AF_INET: Final = 2


def _address(raw: bytes, family: int, port: int) -> str:
    if family == _AF_INET:
        return f"{ipaddress.IPv4Address(raw[:4])}:{port}"
    address = ipaddress.IPv6Address(raw)
    return f"{address.ipv4_mapped}:{port}" if address.ipv4_mapped else f"[{address}]:{port}"
