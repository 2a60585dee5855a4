"""Writes a recording as Trace Event JSON, which ui.perfetto.dev, chrome://tracing and others open.

One process track per process with one track per thread: what it did at every instant that is known, arrows from who
woke it and from who sent to it. One track per request: its phases, and its path where it has one. TCP and block I/O
have tracks of their own. No text of a prompt or reply: names, counts and times.

The format says nothing of the order of events, so the newest are written first, in slices of time: when the file has
reached its limit, what is missing is the oldest. Nothing is written twice and never is the whole in memory.

Times count from a whole second shortly before, which `otherData` names: readers keep them as floating point, and on a
host that was up for three years Perfetto dropped a third of the slices, whose ends no longer met (measured, v52).

The format: "Trace Event Format", Google, docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU.
"""

from __future__ import annotations

import ipaddress
import itertools
import json
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from exporter.labels import safe
from exporter.timeline import (
    BORN,
    GPU,
    READY_RACE_NS,
    SPAN_RECLAIM,
    THROTTLED,
    WAKER_TARGET,
    MessageKind,
    Reason,
    Waker,
)

if TYPE_CHECKING:
    import numpy.typing as npt

    from exporter.critical_path import Step
    from exporter.request import FinishedRequest

    Records = npt.NDArray[Any]

REQUESTS_PID: Final = 1 << 23
TCP_PID: Final = REQUESTS_PID + 1
BLOCK_PID: Final = REQUESTS_PID + 2
"""Process numbers of the tracks that are no process; the kernel's end at 2**22."""
_FIRST_TID: Final = 1
"""Of tracks that stand for nothing with a number; 0 is the idle thread to some readers."""
LEAST_BYTES: Final = 1 << 16
_SECOND_NS: Final = 1_000_000_000
_SLICE_NS: Final = 250_000_000
_REACH_NS: Final = 600 * _SECOND_NS
"""So long before the recording's begin a request may have arrived that is drawn as a whole."""
_CHUNK_BYTES: Final = 1 << 16
_TAIL_BYTES: Final = 8192
"""Kept free for what ends the file."""
_TRACK_BYTES: Final = 1024
"""Kept free for the metadata of each track."""
_NAME_CHARS: Final = 64
"""Of a track's name; a character takes up to 12 bytes."""


class TcpKind(IntEnum):
    """`enum tcp_event_kind` of bpf/records.h. `tests/kernel` fails when the two differ."""

    RETRANSMIT = 1
    RESET_SENT = 2
    RESET_RECEIVED = 3
    CONNECTED = 4
    SEND_STALL = 5


_INET: Final = 2
_INET6: Final = 10

_SLEEPS: Final = {
    Reason.CPU: "preempted",
    Reason.FUTEX: "futex",
    Reason.POLL: "poll",
    Reason.SOCKET: "socket",
    Reason.PIPE: "pipe",
    Reason.DISK: "disk",
    Reason.PAGE_FAULT: "page fault",
    Reason.TIMER: "timer",
    Reason.DEVICE: "device",
    Reason.STOPPED: "stopped",
    Reason.OTHER: "asleep",
}
_TCP_NAMES: Final = {
    TcpKind.RETRANSMIT: "retransmit",
    TcpKind.RESET_SENT: "reset sent",
    TcpKind.RESET_RECEIVED: "reset received",
    TcpKind.CONNECTED: "connect",
    TcpKind.SEND_STALL: "send stall",
}
_NO_INSTANT: Final = 1 << 63
BLOCK_NAMES: Final = ("read", "write", "flush", "discard")
"""`enum block_operation` of bpf/records.h, in its order."""
_NO_INTERVALS: Final = np.dtype(
    "u8,u8,u8,u4,u4,u4,u4,u4,u2,u2,u1,u1,u1",
)
_NO_INTERVALS.names = tuple(
    "off_ns wake_ns on_ns tid tgid waker_tid waker_tgid sequence syscall cpu reason waker flags".split()
)
_NO_MESSAGES: Final = np.dtype("u8,u8,u4,u4,i4,u2,u2,u1,u1,(16,)u1")
_NO_MESSAGES.names = tuple("at_ns sk tid tgid result local_port peer_port kind family peer".split())


@dataclass(frozen=True, slots=True)
class Recording:
    """What the agent kept between two instants, CLOCK_MONOTONIC in nanoseconds.

    The arrays have the fields of the structures of bpf/records.h; one that is None was not recorded. Each may be in any
    order. `paths` are the steps of requests by number. `wall_offset_ns` is what makes an instant one since the epoch.
    `thread_name` says what a thread is called, None or "" where that is not known. `losses` counts the records that
    were lost since the agent started, by reason.
    """

    since_ns: int
    until_ns: int
    wall_offset_ns: int
    services: Sequence[str]
    requests: Sequence[FinishedRequest]
    paths: Mapping[int, Sequence[Step]] = field(default_factory=dict)
    intervals: Records | None = None
    messages: Records | None = None
    spans: Records | None = None
    tcp_events: Records | None = None
    block_ios: Records | None = None
    losses: Mapping[str, int] = field(default_factory=dict)
    thread_name: Callable[[int], str | None] = lambda _tid: None
    reason: str = "asked"
    whole: bool = False
    """No interval and no message between the two instants is missing."""


@dataclass(slots=True)
class Written:
    """What became of a recording; complete when the last chunk was taken.

    `oldest_ns` is the instant before which events are missing because the file has reached its limit; None: none are.
    """

    events: int = 0
    bytes: int = 0
    oldest_ns: int | None = None


def write(recording: Recording, max_bytes: int = 1 << 28, written: Written | None = None) -> Iterator[bytes]:
    """Yield the file in chunks of some 64 KiB, at most `max_bytes` in all (at least LEAST_BYTES).

    Some hundred thousand events a second: whoever has more to do takes a chunk at a time. `written` is filled in.
    """
    return _Writer(recording, max(max_bytes, LEAST_BYTES), written or Written()).chunks()


def microseconds(nanoseconds: int) -> str:
    """The format's unit, to the nanosecond."""
    whole, rest = divmod(nanoseconds, 1000)
    return f"{whole}.{rest:03d}" if rest else str(whole)


class _Lanes:
    """Tracks for things that overlap. Given from the newest to the oldest, each gets the first track that is free."""

    def __init__(self) -> None:
        self._begins: list[int] = []

    def __len__(self) -> int:
        return len(self._begins)

    def take(self, begin_ns: int, end_ns: int) -> int:
        """The track of what lies between the two."""
        for lane, taken_from in enumerate(self._begins):
            if end_ns <= taken_from:
                self._begins[lane] = begin_ns
                return lane
        self._begins.append(begin_ns)
        return len(self._begins) - 1


class _Writer:
    def __init__(self, recording: Recording, max_bytes: int, written: Written) -> None:
        self._recording = recording
        self._max_bytes = max_bytes
        self._written = written
        self._parts: list[str] = []
        self._parts_bytes = 0
        self._tracks: dict[tuple[int, int], str] = {}
        self._processes: dict[int, str] = {}
        self._names: dict[int, str | None] = {}
        self._reclaims = _reclaims(recording.spans)
        self._flow = 0
        self._from_ns = max(
            min([recording.since_ns, *(request.arrived_ns for request in recording.requests)]),
            recording.since_ns - _REACH_NS,
            0,
        )
        """Nothing is drawn before; what began earlier begins here."""
        self._zero_ns = self._from_ns // _SECOND_NS * _SECOND_NS
        self._block_lanes: dict[int, _Lanes] = {}
        self._tcp_lanes = _Lanes()

    def chunks(self) -> Iterator[bytes]:
        """The file."""
        self._add('{"displayTimeUnit":"ns","traceEvents":[\n')
        recording = self._recording
        finished = np.array([request.finished_ns for request in recording.requests], np.uint64)
        self._intervals = intervals = _Intervals(recording.intervals)
        self._messages = messages = _Messages(recording.messages)
        unfinished = _connect(intervals, messages, certain=recording.whole)
        streams = [
            _Stream(self._requests_in, finished, np.arange(len(finished))),
            _Stream(self._intervals_in, intervals.rows["on_ns"], np.arange(len(intervals.rows))),
            _Stream(self._runs_in, *_keyed(unfinished, "end_ns")),
            _Stream(self._messages_in, messages.at_ns, np.arange(len(messages.rows))),
            _Stream(self._tcp_in, *_keyed(recording.tcp_events, "at_ns")),
            _Stream(self._block_in, *_keyed(recording.block_ios, "done_ns")),
        ]
        begin_ns = max([recording.until_ns, *(stream.newest_ns for stream in streams)]) + 1
        while self._written.oldest_ns is None and any(stream.newest_ns >= recording.since_ns for stream in streams):
            # on to the next slice that has anything in it
            newest_ns = max(stream.newest_ns for stream in streams)
            end_ns, begin_ns = begin_ns, max(min(begin_ns, newest_ns + 1) - _SLICE_NS, recording.since_ns)
            for text in itertools.chain.from_iterable(stream.since(begin_ns) for stream in streams):
                if not self._event(text):
                    self._written.oldest_ns = end_ns
                    break
                if self._parts_bytes >= _CHUNK_BYTES:
                    yield self._flush()
        self._add(",\n".join([""] * bool(self._written.events) + list(self._metadata())))
        self._add("\n],\n" + self._other_data() + "}\n")
        yield self._flush()

    def _event(self, text: str) -> bool:
        """Add an event; False where there is no room for it."""
        size = len(text) + 2
        tracks = len(self._tracks) + len(self._processes)
        taken = self._written.bytes + self._parts_bytes + size + _TAIL_BYTES
        if taken + (tracks + 2) * _TRACK_BYTES > self._max_bytes:
            return False
        self._add(",\n" + text if self._written.events else text)
        self._written.events += 1
        return True

    def _add(self, text: str) -> None:
        self._parts.append(text)
        self._parts_bytes += len(text)  # all of it is ASCII

    def _flush(self) -> bytes:
        chunk = "".join(self._parts).encode("ascii")
        self._written.bytes += len(chunk)
        self._parts.clear()
        self._parts_bytes = 0
        return chunk

    # ---- threads ----

    def _intervals_in(self, taken: Records) -> Iterator[str]:
        rows = self._intervals.rows[taken]
        names = "tid tgid off_ns wake_ns on_ns reason flags waker_tid waker_tgid syscall cpu".split()
        columns = [self._intervals.ran_from[taken], self._intervals.arrow[taken], *(rows[name] for name in names)]
        for row in zip(*(column.tolist() for column in columns), strict=True):
            ran_from, arrow, tid, tgid, off, wake, on, reason, flags, waker_tid, waker_tgid, syscall, cpu = row
            self._thread(tgid, tid)
            if 0 < ran_from < off:
                yield from self._thread_slice("running", tgid, tid, ran_from, off, "")
            if not 0 < off <= on:
                continue  # of clocks that went backwards nothing is drawn
            runnable = off if reason == Reason.CPU else wake
            if reason != Reason.CPU:
                asleep_until = wake if off <= wake <= on else on
                args = f'"syscall":{syscall}' if syscall != 0xFFFF else ""
                name = "gpu" if flags & GPU else _SLEEPS.get(reason, "asleep")
                yield from self._thread_slice(name, tgid, tid, off, asleep_until, args)
            if off <= runnable < on:
                name = "cpu quota" if flags & THROTTLED else "run queue"
                yield from self._thread_slice(name, tgid, tid, runnable, on, f'"cpu":{cpu}')
            if arrow:
                yield from self._arrow("wake", waker_tgid, waker_tid, wake, tgid, tid, wake)

    def _runs_in(self, rows: Records) -> Iterator[str]:
        for tid, tgid, begin, end in zip(
            *(rows[name].tolist() for name in ("tid", "tgid", "begin_ns", "end_ns")), strict=True
        ):
            self._thread(tgid, tid)
            yield from self._thread_slice("running", tgid, tid, begin, end, "")

    def _thread_slice(self, name: str, tgid: int, tid: int, begin: int, end: int, args: str) -> Iterator[str]:
        begin = max(begin, self._from_ns)
        if end <= begin:
            return
        yield self._slice(name, "thread", tgid, tid, begin, end, args)
        reclaims = self._reclaims.get(tid)
        if reclaims is None:
            return
        # a reclaim spans runs and sleeps; a track takes slices that lie in one another only
        begins, ends = reclaims
        for index in range(bisect_left(ends, begin + 1), len(begins)):
            if begins[index] >= end:
                break
            yield self._slice("reclaim", "memory", tgid, tid, max(begin, begins[index]), min(end, ends[index]))

    def _arrow(
        self, name: str, from_tgid: int, from_tid: int, from_ns: int, to_tgid: int, to_tid: int, to_ns: int
    ) -> Iterator[str]:
        self._flow += 1
        self._thread(from_tgid, from_tid)
        common = f'"name":"{name}","cat":"{name}","id":{self._flow}'
        yield f'{{"ph":"s",{common},"pid":{from_tgid},"tid":{from_tid},"ts":{self._at(from_ns)}}}'
        yield f'{{"ph":"f","bp":"e",{common},"pid":{to_tgid},"tid":{to_tid},"ts":{self._at(to_ns)}}}'

    def _thread(self, tgid: int, tid: int) -> None:
        if (tgid, tid) not in self._tracks:
            self._tracks[(tgid, tid)] = self._name(tid) or f"thread {tid}"
            self._processes.setdefault(tgid, self._name(tgid) or "process")

    def _name(self, tid: int) -> str | None:
        if tid not in self._names:
            found = self._recording.thread_name(tid)
            self._names[tid] = safe(found)[:_NAME_CHARS] if found else None
        return self._names[tid]

    # ---- messages ----

    def _messages_in(self, taken: Records) -> Iterator[str]:
        messages = self._messages
        rows, senders = messages.rows[taken], messages.sender[taken]
        peers = rows["peer"]
        known = np.maximum(senders, 0)
        names = "kind tid tgid result local_port peer_port family".split()
        columns = [
            messages.at_ns[taken],
            messages.arrow[taken],
            *(rows[name] for name in names),
            messages.rows["tid"][known],
            messages.rows["tgid"][known],
            messages.at_ns[known],
        ]
        for index, row in enumerate(zip(*(column.tolist() for column in columns), strict=True)):
            at, arrow, kind, tid, tgid, result, local_port, peer_port, family, from_tid, from_tgid, from_ns = row
            if kind == MessageKind.READY or not tid:
                continue
            self._thread(tgid, tid)
            word = "send" if kind == MessageKind.SENT else "receive"
            peer = _peer(peers[index].tobytes(), family, peer_port)
            amount = f'"bytes":{result}' if result >= 0 else f'"errno":{-result}'
            ports = f',"local_port":{local_port},"peer":{json.dumps(peer)}' if local_port or peer_port else ""
            yield self._instant(word, "message", tgid, tid, at, amount + ports)
            if arrow:
                yield from self._arrow("message", from_tgid, from_tid, from_ns, tgid, tid, at)

    # ---- requests ----

    def _requests_in(self, rows: Records) -> Iterator[str]:
        for index in rows.tolist():
            yield from self._request(self._recording.requests[index])

    def _request(self, request: FinishedRequest) -> Iterator[str]:
        tid = request.number
        model = safe(request.model or "")
        service = safe(request.service)
        self._processes[REQUESTS_PID] = "requests"
        self._tracks[(REQUESTS_PID, tid)] = f"{request.number} {service}/{model}"[:_NAME_CHARS]
        arrived, first, last = request.arrived_ns, request.first_token_ns, request.last_token_ns
        args = {
            "number": request.number,
            "service": service,
            "model": model,
            "api": request.api,
            "status": request.status,
            "streamed": request.streamed,
            "frames": request.frames,
            "prompt_tokens": request.prompt_tokens,
            "completion_tokens": request.completion_tokens,
            "failure": request.failure.value if request.failure else None,
            "aborted_while": request.aborted.value if request.aborted else None,
            "capture": request.capture.value,
            "read_by_tid": request.tid,
        }
        yield self._phase(model, tid, arrived, max(request.finished_ns, last or 0), json.dumps(args)[1:-1])
        if first is None:
            yield self._phase("read delay", tid, arrived, request.read_ns)
            return
        yield self._phase("ttft", tid, arrived, first)
        yield self._phase("read delay", tid, arrived, min(request.read_ns, first))
        for step in self._recording.paths.get(request.number, ()):
            yield from self._path_step(request, step)
        yield self._instant("first token", "request", REQUESTS_PID, tid, first)
        if last is not None and last > first:
            yield self._phase("decode", tid, first, last)

    def _path_step(self, request: FinishedRequest, step: Step) -> Iterator[str]:
        """A step of the path below its phase; one that the read delay ends in is two."""
        tid = request.number
        args: dict[str, Any] = {"tid": step.tid, "thread": self._name(step.tid)}
        if step.detail:
            args["detail"] = safe(step.detail)
        if step.woken_by:
            args |= {"woken_by": step.woken_by, "woken_by_thread": self._name(step.woken_by)}
        shown = json.dumps(args)[1:-1]
        cut = min(max(request.read_ns, step.begin_ns), step.end_ns)
        for begin, end in ((step.begin_ns, cut), (cut, step.end_ns)):
            if begin < end:
                yield self._slice(step.cause.value, "path", REQUESTS_PID, tid, begin, end, shown)

    def _phase(self, name: str, tid: int, begin: int, end: int, args: str = "") -> str:
        return self._slice(name, "request", REQUESTS_PID, tid, begin, max(begin, end), args)

    # ---- TCP and block I/O ----

    def _tcp_in(self, rows: Records) -> Iterator[str]:
        names = "at_ns duration_ns tgid tid service local_port peer_port kind family".split()
        peers = rows["peer"][::-1]
        # the newest first: that is how lanes are filled
        for index, row in enumerate(zip(*(rows[name][::-1].tolist() for name in names), strict=True)):
            at, duration, tgid, tid, service, local_port, peer_port, kind, family = row
            name = _TCP_NAMES.get(kind, "tcp")
            peer = json.dumps(_peer(peers[index].tobytes(), family, peer_port))
            whose = f'"service":{self._service(service)},"tgid":{tgid},"tid":{tid}'
            args = f'{whose},"peer":{peer},"local_port":{local_port}'
            self._processes[TCP_PID] = "TCP"
            if not duration:
                self._tracks.setdefault((TCP_PID, _FIRST_TID), "events")
                yield self._instant(name, "tcp", TCP_PID, _FIRST_TID, at, args)
                continue
            lane = self._tcp_lanes.take(at - duration, at)
            self._tracks.setdefault((TCP_PID, _FIRST_TID + 1 + lane), f"waits {lane + 1}")
            yield self._slice(name, "tcp", TCP_PID, _FIRST_TID + 1 + lane, at - duration, at, args)

    def _block_in(self, rows: Records) -> Iterator[str]:
        names = "queued_ns issued_ns done_ns tid tgid service device bytes operation".split()
        for row in zip(*(rows[name][::-1].tolist() for name in names), strict=True):
            queued, issued, done, tid, tgid, service, device, size, operation = row
            begin = queued or issued
            if not 0 < begin <= done:
                continue
            lanes = self._block_lanes.setdefault(device, _Lanes())
            index = list(self._block_lanes).index(device)
            lane = lanes.take(begin, done)
            track = _FIRST_TID + (index << 12) + lane
            self._processes[BLOCK_PID] = "block I/O"
            self._tracks.setdefault((BLOCK_PID, track), f"{device >> 20}:{device & 0xFFFFF} {lane + 1}")
            name = BLOCK_NAMES[operation] if operation < len(BLOCK_NAMES) else "I/O"
            args = f'"service":{self._service(service)},"bytes":{size},"tgid":{tgid},"tid":{tid}'
            yield self._slice(name, "block", BLOCK_PID, track, begin, done, args)
            if begin < issued < done:
                yield self._slice("on device", "block", BLOCK_PID, track, issued, done)

    def _service(self, index: int) -> str:
        names = self._recording.services
        return json.dumps(safe(names[index])) if index < len(names) else "null"

    # ---- events ----

    def _slice(self, name: str, category: str, pid: int, tid: int, begin: int, end: int, args: str = "") -> str:
        begin = max(begin, self._from_ns)
        return (
            f'{{"ph":"X","name":{json.dumps(name)},"cat":"{category}","pid":{pid},"tid":{tid},'
            f'"ts":{self._at(begin)},"dur":{microseconds(max(0, end - begin))}{_args(args)}}}'
        )

    def _instant(self, name: str, category: str, pid: int, tid: int, at: int, args: str = "") -> str:
        return (
            f'{{"ph":"i","s":"t","name":"{name}","cat":"{category}","pid":{pid},"tid":{tid},'
            f'"ts":{self._at(at)}{_args(args)}}}'
        )

    def _at(self, at_ns: int) -> str:
        return microseconds(max(at_ns, self._from_ns) - self._zero_ns)

    # ---- the end of the file ----

    def _metadata(self) -> Iterator[str]:
        order = {REQUESTS_PID: -3, TCP_PID: 1, BLOCK_PID: 2}
        for pid, name in self._processes.items():
            shown = json.dumps(name)
            yield f'{{"ph":"M","name":"process_name","pid":{pid},"args":{{"name":{shown}}}}}'
            yield (f'{{"ph":"M","name":"process_sort_index","pid":{pid},"args":{{"sort_index":{order.get(pid, 0)}}}}}')
        for (pid, tid), name in self._tracks.items():
            shown = json.dumps(name)
            yield f'{{"ph":"M","name":"thread_name","pid":{pid},"tid":{tid},"args":{{"name":{shown}}}}}'
            if pid >= REQUESTS_PID:
                yield f'{{"ph":"M","name":"thread_sort_index","pid":{pid},"tid":{tid},"args":{{"sort_index":{tid}}}}}'

    def _other_data(self) -> str:
        recording = self._recording
        oldest = self._written.oldest_ns
        told = {
            "agent": "footlight",
            "clock": "CLOCK_MONOTONIC",
            "zero_ns": self._zero_ns,
            "zero_unix_ns": self._zero_ns + recording.wall_offset_ns,
            "since_ns": recording.since_ns,
            "until_ns": recording.until_ns,
            "since_unix_ns": recording.since_ns + recording.wall_offset_ns,
            "until_unix_ns": recording.until_ns + recording.wall_offset_ns,
            "reason": safe(recording.reason),
            "events": self._written.events,
            "dropped": "none"
            if oldest is None
            else f"the file has reached {self._max_bytes} bytes: events that ended before {self._at(oldest)} us",
            "lost_records": {safe(reason): count for reason, count in list(recording.losses.items())[:40] if count},
        }
        return f'"otherData":{json.dumps(told)}'


class _Stream:
    """Records that are given out from the newest to the oldest, a slice of time at a time.

    `keys` are their instants, in any order; `draw` makes events of a slice of `rows`, which is in order of the keys.
    """

    def __init__(
        self, draw: Callable[[Records], Iterator[str]], keys: npt.NDArray[np.uint64], rows: Records | None
    ) -> None:
        self._draw = draw
        self._order = np.argsort(keys, kind="stable")
        self._keys = keys[self._order]
        self._rows = rows

    @property
    def newest_ns(self) -> int:
        """The instant of the newest that is left; -1 when none is."""
        return int(self._keys[-1]) if len(self._keys) else -1

    def since(self, begin_ns: int) -> Iterator[str]:
        """Events of all that is left and not older than that."""
        first = int(np.searchsorted(self._keys, max(begin_ns, 0)))
        taken, self._order, self._keys = self._order[first:], self._order[:first], self._keys[:first]
        if self._rows is not None and len(taken):
            yield from self._draw(self._rows[taken])


def _keyed(rows: Records | None, name: str) -> tuple[npt.NDArray[np.uint64], Records | None]:
    if rows is None:
        return np.zeros(0, np.uint64), None
    rows = _sane(rows)
    return rows[name], rows


def _sane(rows: Records) -> Records:
    """The records without those whose instants no clock shows for the next two hundred years."""
    sane = np.ones(len(rows), bool)
    for name in rows.dtype.names or ():
        if name.endswith("_ns"):
            sane &= rows[name] < _NO_INSTANT
    found: Records = rows if sane.all() else rows[sane]
    return found


class _Intervals:
    """The intervals, and what is not in their records. No copy of them is made: there may be many."""

    def __init__(self, rows: Records | None) -> None:
        self.rows: Final = _sane(np.zeros(0, _NO_INTERVALS) if rows is None else rows)
        self.ran_from: Final = self._runs()
        """When the run that each ended began; 0 where it is not known."""
        self.arrow = np.zeros(len(self.rows), bool)
        """Whether both ends of an arrow from who ended the sleep lie on slices that are drawn."""

    def _runs(self) -> npt.NDArray[np.uint64]:
        rows = self.rows
        order = np.lexsort((rows["sequence"], rows["on_ns"], rows["tid"]))
        tid, tgid, sequence = (rows[name][order] for name in ("tid", "tgid", "sequence"))
        follows = (tid[:-1] == tid[1:]) & (tgid[:-1] == tgid[1:])
        follows &= sequence[:-1] + np.uint32(1) == sequence[1:]
        found = np.zeros(len(rows), np.uint64)
        found[order[1:]] = np.where(follows, rows["on_ns"][order[:-1]], 0)
        return found

    def woken(self) -> npt.NDArray[np.bool_]:
        """Which of them a thread of a service ended."""
        rows = self.rows
        found: npt.NDArray[np.bool_] = (rows["flags"] & WAKER_TARGET != 0) & (rows["waker_tid"] != rows["tid"])
        found &= np.isin(rows["waker"], (Waker.TASK, Waker.MESSAGE, Waker.PARENT))
        found &= (rows["off_ns"] <= rows["wake_ns"]) & (rows["wake_ns"] <= rows["on_ns"])
        return found


class _Messages:
    """The messages, and who sent what was received: the first that sent since somebody took something before."""

    def __init__(self, rows: Records | None) -> None:
        self.rows: Final = _sane(np.zeros(0, _NO_MESSAGES) if rows is None else rows)
        self.at_ns: Final[npt.NDArray[np.uint64]] = self.rows["at_ns"].copy()
        """When; what was sent is before what was received, whatever the clocks of two CPUs say."""
        self.sender: Final = self._senders()
        """Which message each receive brought; -1 where that is not known, and for all others."""
        self.arrow = np.zeros(len(self.rows), bool)

    def _senders(self) -> npt.NDArray[np.intp]:
        order, found = self._match()
        late = self._late(order, found)
        if late.any():
            self.at_ns[order[1:][late]] = self.at_ns[order[:-1][late]] - np.uint64(1)
            order, found = self._match()
        sender = np.full(len(order), -1)
        sender[order[found >= 0]] = order[found[found >= 0]]
        return sender

    def _late(self, order: npt.NDArray[np.intp], found: npt.NDArray[np.intp]) -> npt.NDArray[np.bool_]:
        """Which receives brought what was stamped just after them, being made at once on another CPU."""
        kinds, sockets, times = self.rows["kind"][order], self.rows["sk"][order], self.at_ns[order]
        late: npt.NDArray[np.bool_] = (found[:-1] < 0) & self._took(order)[:-1] & (kinds[1:] == MessageKind.READY)
        late &= (sockets[:-1] == sockets[1:]) & (times[1:] - times[:-1] <= READY_RACE_NS)
        return late

    def _took(self, order: npt.NDArray[np.intp]) -> npt.NDArray[np.bool_]:
        found: npt.NDArray[np.bool_] = self.rows["kind"][order] == MessageKind.RECEIVED
        return found & (self.rows["result"][order] > 0)

    def _match(self) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
        """The messages by socket and time; for each in that order, where in it the one is that it brought, or -1."""
        count = len(self.rows)
        order = np.lexsort((self.at_ns, self.rows["sk"]))
        sockets, took = self.rows["sk"][order], self._took(order)
        index = np.arange(count)
        # a stretch begins with a socket, and after each message that somebody took
        begins = np.ones(count, bool)
        begins[1:] = (sockets[1:] != sockets[:-1]) | took[:-1]
        begin = np.maximum.accumulate(np.where(begins, index, 0))
        ready = self.rows["kind"][order] == MessageKind.READY
        next_ready = np.minimum.accumulate(np.where(ready, index, count)[::-1])[::-1]
        found = next_ready[begin]
        return order, np.where(took & (found < index), found, -1)


def _connect(intervals: _Intervals, messages: _Messages, *, certain: bool) -> Records:
    """Find out where arrows can be drawn; return the runs that no interval has ended yet.

    A thread gets an interval each time that it runs again: one that woke or sent something ran since its interval
    before, which holds where it is `certain` that no record is missing.
    """
    rows = intervals.rows
    woken = intervals.woken()
    acting = messages.rows["tid"] != 0
    acts = np.concatenate(
        [
            _acts(rows["waker_tid"][woken], rows["waker_tgid"][woken], rows["wake_ns"][woken]),
            _acts(messages.rows["tid"][acting], messages.rows["tgid"][acting], messages.at_ns[acting]),
        ]
    )
    unfinished = _bounded_by_acts(intervals, acts if certain else acts[:0])
    runs = _Runs(intervals, unfinished)
    # without a wait for a CPU the arrow ends on the run
    waited = rows["wake_ns"] < rows["on_ns"]
    intervals.arrow = woken & runs.cover(rows["waker_tid"], rows["wake_ns"])
    intervals.arrow &= waited | runs.cover(rows["tid"], rows["on_ns"])
    known = np.maximum(messages.sender, 0)
    tids = messages.rows["tid"]
    if len(tids):
        messages.arrow = (messages.sender >= 0) & (tids[known] != tids) & (tids[known] != 0)
        messages.arrow &= runs.cover(tids[known], messages.at_ns[known]) & runs.cover(tids, messages.at_ns)
    return unfinished


def _acts(tid: Records, tgid: Records, at_ns: Records) -> Records:
    found = np.zeros(len(tid), [("tid", "u4"), ("tgid", "u4"), ("at_ns", "u8")])
    found["tid"], found["tgid"], found["at_ns"] = tid, tgid, at_ns
    return found


def _bounded_by_acts(intervals: _Intervals, acts: Records) -> Records:
    """The runs that no interval has ended yet, up to the last act in them; sets `ran_from` of each thread's first."""
    rows = intervals.rows
    acts = acts[np.lexsort((acts["at_ns"], acts["tid"]))]
    order = np.lexsort((rows["on_ns"], rows["tid"]))
    tids = rows["tid"][order]
    found = []
    threads, begins, counts = np.unique(acts["tid"], return_index=True, return_counts=True)
    for tid, begin, count in zip(threads.tolist(), begins.tolist(), counts.tolist(), strict=True):
        end = begin + count
        first_ns, last_ns = int(acts["at_ns"][begin]), int(acts["at_ns"][end - 1])
        low, high = np.searchsorted(tids, [tid, tid + 1]).tolist()
        ran_from = first_ns
        if low < high:
            first, last = rows[order[low]], rows[order[high - 1]]
            if first_ns < int(first["off_ns"]) and not int(first["flags"]) & BORN:
                intervals.ran_from[order[low]] = first_ns
            ran_from = int(last["on_ns"])
        if last_ns >= ran_from:
            found.append((tid, int(acts["tgid"][end - 1]), ran_from, last_ns + 1))
    return np.array(found, [("tid", "u4"), ("tgid", "u4"), ("begin_ns", "u8"), ("end_ns", "u8")])


class _Runs:
    """The stretches in which threads ran."""

    def __init__(self, intervals: _Intervals, unfinished: Records) -> None:
        rows, ran_from = intervals.rows, intervals.ran_from
        known = (ran_from > 0) & (ran_from < rows["off_ns"])
        tids = np.concatenate([rows["tid"][known], unfinished["tid"]])
        begins = np.concatenate([ran_from[known], unfinished["begin_ns"]])
        ends = np.concatenate([rows["off_ns"][known], unfinished["end_ns"]])
        order = np.lexsort((begins, tids))
        self._tids, self._begins, self._ends = tids[order], begins[order], ends[order]

    def cover(self, tids: Records, instants: Records) -> npt.NDArray[np.bool_]:
        """For each thread and instant whether it is known that it ran then."""
        covered = np.zeros(len(tids), bool)
        order = np.argsort(tids, kind="stable")
        ordered = tids[order]
        for tid in np.unique(ordered).tolist():
            low, high = np.searchsorted(self._tids, [tid, tid + 1]).tolist()
            asked = order[slice(*np.searchsorted(ordered, [tid, tid + 1]).tolist())]
            if low == high:
                continue
            at = instants[asked]
            index = np.searchsorted(self._begins[low:high], at, side="right") - 1
            covered[asked] = (index >= 0) & (at < self._ends[low:high][np.maximum(index, 0)])
        return covered


def _reclaims(spans: Records | None) -> dict[int, tuple[list[int], list[int]]]:
    """By thread the begins and the ends of its reclaims, in order; those that overlap are one."""
    found: dict[int, tuple[list[int], list[int]]] = {}
    if spans is None:
        return found
    for index in np.argsort(spans["begin_ns"], kind="stable").tolist():
        span = spans[index]
        begin, end = int(span["begin_ns"]), int(span["end_ns"])
        if int(span["kind"]) != SPAN_RECLAIM or end <= begin:
            continue
        begins, ends = found.setdefault(int(span["tid"]), ([], []))
        if ends and begin <= ends[-1]:
            ends[-1] = max(end, ends[-1])
        else:
            begins.append(begin)
            ends.append(end)
    return found


def _peer(address: bytes, family: int, port: int) -> str:
    if family == _INET:
        return f"{ipaddress.IPv4Address(address[:4])}:{port}"
    if family == _INET6:
        return f"[{ipaddress.IPv6Address(address)}]:{port}"
    return ""


def _args(args: str) -> str:
    return f',"args":{{{args}}}' if args else ""
