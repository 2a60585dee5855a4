"""Keeps what threads did in the last minute or so: a rolling window of bounded memory.

A `Timeline` takes the records of the scheduler and memory probes as they come and forgets the oldest ones. A `View` is
a copy of a stretch of it, arranged by thread, socket and futex, for the paths of one round.

The order of records is not relied on: those of two CPUs come interleaved, and late by a poll. A record that cannot be
true (it ends before it begins, or overlaps another one of its thread) is left out, and so becomes a hole in the
sequence, which is how a lost one shows.
"""

from __future__ import annotations

import os
from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum, IntEnum
from typing import Any, Final

import numpy as np
import numpy.typing as npt

Records = npt.NDArray[np.void]
Column = npt.NDArray[Any]
Rows = npt.NDArray[np.intp]

NAMES_LIMIT: Final = 16_384
"""Thread names that are remembered; the ones that were used least recently go first."""
LOSSES_LIMIT: Final = 256
RECORDER_ROWS: Final = 4_096
"""Rows in one slice for the flight recorder: half a megabyte at most."""
SEARCH_ROWS: Final = 16_384
"""Rows in a block of a search back: 10 us each, where the whole window would be half a millisecond per thread."""
LATE_NS: Final = 1_000_000_000
"""How far past a view's end intervals are taken in: the next one of a thread shows that none was lost. And how far
before its begin messages are: what was received then may have lain in the socket."""
READY_RACE_NS: Final = 10_000
"""A receiver on another CPU can be done before the sender's record of the same bytes is stamped."""
SENDERS_LIMIT: Final = 64
"""Messages that lay in a socket together and are told apart."""
SAME_LOCK_BYTES: Final = 8
"""A condition variable of glibc waits on two words by turns."""
SAME_TIMED_LOCK_BYTES: Final = 128
"""CPython's GIL is two condition variables and two mutexes in one structure; only waits for it are timed."""


class Reason(IntEnum):
    """`enum wait_reason` of bpf/records.h."""

    CPU = 0
    FUTEX = 1
    POLL = 2
    SOCKET = 3
    PIPE = 4
    DISK = 5
    PAGE_FAULT = 6
    TIMER = 7
    DEVICE = 8
    STOPPED = 9
    OTHER = 10


class Waker(IntEnum):
    """`enum waker` of bpf/records.h."""

    NONE = 0
    TASK = 1
    MESSAGE = 2
    NETWORK = 3
    SOFTIRQ = 4
    HARDIRQ = 5
    PARENT = 6


class MessageKind(IntEnum):
    """`enum message_kind` of bpf/records.h."""

    READY = 1
    SENT = 2
    RECEIVED = 3


EAGAIN: Final = 11
SENDING_CALLS: Final = {
    # write, sendfile, writev, pwritev, sendto, sendmsg, sendmmsg
    "x86_64": (1, 40, 20, 296, 44, 46, 307),
    "aarch64": (64, 71, 66, 70, 206, 211, 269),
}.get(os.uname().machine, ())
"""Numbers of the system calls that give bytes away: asleep in one of them a thread waits for room."""

THROTTLED: Final = 1
IOWAIT: Final = 2
TIMEOUT: Final = 4
BORN: Final = 8
FIRST: Final = 16
WAKER_TARGET: Final = 32
GPU: Final = 64
SPAN_RECLAIM: Final = 1
SPAN_GPU_SYNC: Final = 2
_FOREVER_NS: Final = 2**64 - 1


class Stream(Enum):
    """The kinds of records that are kept. The value is the stream's name in the probes."""

    intervals = "intervals"
    messages = "messages"
    spans = "spans"


_TIME_FIELD: Final = {Stream.intervals: "on_ns", Stream.messages: "at_ns", Stream.spans: "end_ns"}
"""When the record was made."""
_SHARE: Final = {Stream.intervals: 0.74, Stream.messages: 0.22, Stream.spans: 0.04}
"""Of the memory. A busy service makes three or four times as many intervals as messages, and spans only in need."""


class _Ring:
    """The newest records of one stream, a column per field, so that a search by time or thread reads one column.

    The arrays are made at the first record, because its dtype comes with it (from BTF). Rows are in no order.
    """

    __slots__ = ("_dtype", "_limit_bytes", "_next", "_time", "capacity", "columns", "forgotten_ns", "size")

    def __init__(self, limit_bytes: int, time_field: str) -> None:
        self._limit_bytes = limit_bytes
        self._time = time_field
        self._dtype: np.dtype[np.void] | None = None
        self._next = 0
        self.columns: dict[str, Column] = {}
        self.capacity = 0
        self.size = 0
        self.forgotten_ns = 0

    def add(self, records: Records) -> None:
        if not records.size:
            return
        if self._dtype is None:
            self._dtype = records.dtype
            self.capacity = max(1, self._limit_bytes // records.dtype.itemsize)
            fields: Mapping[str, Any] = records.dtype.fields or {}
            # Zeroed by the kernel page by page as they fill, so an idle service's window takes no memory.
            self.columns = {
                name: np.zeros((self.capacity, *kind[0].shape), kind[0].base) for name, kind in fields.items()
            }
        records = records[-self.capacity :]
        first = min(records.size, self.capacity - self._next)
        self._put(self._next, records[:first])
        self._put(0, records[first:])
        self._next = (self._next + records.size) % self.capacity

    def _put(self, start: int, records: Records) -> None:
        end = start + records.size
        if start < self.size and records.size:
            gone_ns = int(self.columns[self._time][start:end].max())
            oldest_left = self.columns[self._time][end : end + 256]
            # The bound: one record with an impossible time must not make all that is kept count as forgotten.
            bound_ns = int(oldest_left.max()) if oldest_left.size else gone_ns
            self.forgotten_ns = max(self.forgotten_ns, min(gone_ns, bound_ns))
        for name, column in self.columns.items():
            column[start:end] = records[name]
        self.size = max(self.size, end)

    def column(self, name: str) -> Column:
        return self.columns[name][: self.size]

    def last_row(self, key: str, value: int, before_ns: int) -> int | None:
        """The newest row before an instant whose column `key` holds `value`.

        Goes back from the newest rows by blocks, and a block further than the first find: rows are roughly in order.
        """
        keys, times = self.columns[key], self.columns[self._time]
        found: int | None = None
        for start, end in self._blocks():
            rows = np.flatnonzero((keys[start:end] == value) & (times[start:end] < before_ns))
            was_found = found is not None
            if rows.size:
                row = start + int(rows[np.argmax(times[start:end][rows])])
                if found is None or times[row] > times[found]:
                    found = row
            if was_found:
                break
        return found

    def _blocks(self) -> Iterator[tuple[int, int]]:
        """Stretches of rows, the newest first."""
        for first, last in ((0, self._next), (self._next, self.size)):
            for end in range(last, first, -SEARCH_ROWS):
                yield max(first, end - SEARCH_ROWS), end

    def slices(self, since_ns: int, until_ns: int) -> Iterator[Records]:
        if self._dtype is None:
            return
        times = self.column(self._time)
        rows = np.flatnonzero((times >= since_ns) & (times <= until_ns))
        rows = rows[np.argsort(times[rows], kind="stable")]
        for start in range(0, rows.size, RECORDER_ROWS):
            part = rows[start : start + RECORDER_ROWS]
            records = np.zeros(part.size, self._dtype)
            for name, column in self.columns.items():
                records[name] = column[part]
            yield records


class Timeline:
    """The window. `limit_bytes` is for the records; names and the like take some hundred bytes per thread more."""

    def __init__(self, limit_bytes: int) -> None:
        self._rings = {stream: _Ring(int(limit_bytes * _SHARE[stream]), _TIME_FIELD[stream]) for stream in Stream}
        self._losses: dict[Stream, list[tuple[int, int]]] = {stream: [] for stream in Stream}
        self._names: OrderedDict[int, str] = OrderedDict()
        self._lost_messages: tuple[int, int] | None = None  # as the last message said, and when that was

    def add_intervals(self, records: Records) -> None:
        """Take a copy of records of `struct thread_interval`."""
        self._rings[Stream.intervals].add(records)

    def add_messages(self, records: Records) -> None:
        """Take a copy of records of `struct message`. Where they say that some were lost before them, note it."""
        self._rings[Stream.messages].add(records)
        if records.size and "lost" in (records.dtype.names or ()):
            self._note_lost_messages(records)

    def _note_lost_messages(self, records: Records) -> None:
        lost, times = records["lost"].astype(np.int64), records["at_ns"]
        if self._lost_messages is not None:
            before, at_ns = self._lost_messages
            lost, times = np.concatenate(([before], lost)), np.concatenate((np.array([at_ns], times.dtype), times))
        # Two CPUs can send in another order than they counted: a step back is no loss, nor is the step after it.
        highest = np.maximum.accumulate(lost)
        for row in np.flatnonzero(highest[1:] > highest[:-1])[-LOSSES_LIMIT:].tolist():
            from_ns, until_ns = sorted((int(times[row]), int(times[row + 1])))
            self.note_loss(from_ns, until_ns, Stream.messages)
        self._lost_messages = (int(highest[-1]), int(times[-1]))

    def add_spans(self, records: Records) -> None:
        """Take a copy of records of `struct thread_span`."""
        self._rings[Stream.spans].add(records)

    def add_names(self, records: Records) -> None:
        """Take records of `struct thread_name`: the last one of a thread counts. Names are as the kernel has them."""
        for tid, comm in zip(records["tid"].tolist(), records["comm"], strict=True):
            self._names[tid] = comm.tobytes().partition(b"\0")[0].decode("utf-8", "replace")
            self._names.move_to_end(tid)
        while len(self._names) > NAMES_LIMIT:
            self._names.popitem(last=False)

    def thread_name(self, tid: int) -> str | None:
        """The thread's name; None where it was not seen, or is forgotten."""
        name = self._names.get(tid)
        if name is not None:
            self._names.move_to_end(tid)
        return name

    def note_loss(self, from_ns: int, until_ns: int, stream: Stream) -> None:
        """Records of `stream` that were made in [from_ns, until_ns] may be missing."""
        from_ns, until_ns = min(from_ns, until_ns), max(from_ns, until_ns)
        losses = self._losses[stream]
        if losses and from_ns <= losses[-1][1] and losses[-1][0] <= until_ns:
            first, last = losses.pop()
            from_ns, until_ns = min(first, from_ns), max(last, until_ns)
        elif len(losses) >= LOSSES_LIMIT:
            # Too many to tell apart: the two oldest become one, which says more was lost, never less.
            (first, _), (_, last) = losses[0], losses[1]
            losses[:2] = [(first, last)]
        losses.append((from_ns, until_ns))

    def oldest_ns(self, stream: Stream) -> int:
        """Records that were made until then are forgotten, in part at least; 0 while all are there."""
        return self._rings[stream].forgotten_ns

    def is_whole(self, stream: Stream, since_ns: int, until_ns: int) -> bool:
        """Whether every record that was made in [since_ns, until_ns] is here."""
        return not self._lost(stream, since_ns, until_ns)

    def slices(self, stream: Stream, since_ns: int, until_ns: int) -> Iterator[Records]:
        """The records that were made in [since_ns, until_ns], in order of time, as arrays of at most RECORDER_ROWS.

        Nothing may be added while it is used.
        """
        return self._rings[stream].slices(since_ns, until_ns)

    def view(self, since_ns: int, until_ns: int) -> View:
        """What threads did in [since_ns, until_ns]. It stays as it is when records are added."""
        lost = {stream: self._lost(stream, since_ns, until_ns) for stream in Stream}
        return View(
            since_ns,
            until_ns,
            self._rings[Stream.intervals],
            self._rings[Stream.messages],
            self._rings[Stream.spans],
            lost,
        )

    def _lost(self, stream: Stream, since_ns: int, until_ns: int) -> list[tuple[int, int]]:
        losses = [loss for loss in self._losses[stream] if loss[0] <= until_ns and loss[1] >= since_ns]
        oldest_ns = self.oldest_ns(stream)
        if oldest_ns and oldest_ns >= since_ns:
            losses.append((0, oldest_ns))
        return sorted(losses)


class Thread:
    """What one thread did, as parallel lists in order of time; entry i is its i-th interval, then comes its i-th run.

    `locks[i]`: the interval is a wait for a lock that ended because it was let go of. `holes[i]`: what it did between
    the interval before i and this one is not known. `starts[i]`: the interval with which the stretch of work began that
    run i belongs to, -1: before what is known. A stretch of work goes on over sleeps that the thread caused itself, and
    ends where it waits to be told what comes next.
    """

    __slots__ = (
        "flags",
        "holes",
        "locks",
        "objects",
        "off",
        "on",
        "ready_sk",
        "reasons",
        "received",
        "received_sk",
        "span_begin",
        "span_end",
        "span_on_gpu",
        "starts",
        "syscalls",
        "tgid",
        "tid",
        "wake",
        "waker_tid",
        "wakers",
    )

    def __init__(self, tid: int) -> None:
        self.tid = tid
        self.tgid = 0
        self.off: list[int] = []
        self.wake: list[int] = []
        self.on: list[int] = []
        self.objects: list[int] = []
        self.ready_sk: list[int] = []
        self.waker_tid: list[int] = []
        self.syscalls: list[int] = []
        self.reasons: list[int] = []
        self.wakers: list[int] = []
        self.flags: list[int] = []
        self.holes: list[bool] = []
        self.locks: list[bool] = []
        self.starts: list[int] = []
        self.received: list[int] = []
        self.received_sk: list[int] = []
        self.span_begin: list[int] = []
        self.span_end: list[int] = []
        self.span_on_gpu: list[bool] = []

    def run_at(self, at_ns: int) -> int:
        """The run that `at_ns` is in or after; -1: before what is known."""
        return bisect_right(self.on, at_ns) - 1


class Socket:
    """The messages on one socket in order of time. `peer` and `peer_port` are the other end's."""

    __slots__ = ("_senders", "family", "has_ready", "peer", "peer_port", "ready", "received", "sent")

    def __init__(self) -> None:
        self.ready: list[tuple[int, int]] = []  # (at_ns, tid)
        self.received: list[int] = []  # at_ns
        self.sent: list[tuple[int, int]] = []  # (at_ns, tid), of those that gave bytes away
        self.family = 0
        self.peer = b""
        self.peer_port = 0
        self._senders: dict[int, tuple[int, int, bool]] | None = None

    def senders(self, received_ns: int) -> Sequence[tuple[int, int]]:
        """Who had sent what was received then: (at_ns, tid), first things first."""
        if self._senders is None:
            self._senders = self._match()
        first, last, late = self._senders.get(received_ns, (0, 0, False))
        if late:
            return ((received_ns, self.ready[first][1]),)
        return self.ready[first : min(last, first + SENDERS_LIMIT)]

    def _match(self) -> dict[int, tuple[int, int, bool]]:
        """When something was received: which of `ready` it was, and whether that was stamped late."""
        senders: dict[int, tuple[int, int, bool]] = {}
        ready = self.ready
        first = 0
        for received_ns in self.received:
            last = first
            while last < len(ready) and ready[last][0] <= received_ns:
                last += 1
            if last > first:
                senders[received_ns] = (first, last, False)
            elif last < len(ready) and ready[last][0] <= received_ns + READY_RACE_NS:
                last += 1
                senders[received_ns] = (first, last, True)
            first = last
        return senders

    def last_sent(self, before_ns: int) -> tuple[int, int] | None:
        """The last send before `before_ns`: (at_ns, tid)."""
        position = bisect_left(self.sent, (before_ns, 0)) - 1
        return self.sent[position] if position >= 0 else None


# What a view copies of the intervals, besides what it sorts by.
_INTERVAL_COLUMNS: Final = (
    "off_ns wake_ns on_ns object ready_sk tid tgid waker_tid sequence syscall reason waker flags".split()
)
_MESSAGE_COLUMNS: Final = "at_ns sk tid result peer_port kind family full peer".split()
_SPAN_COLUMNS: Final = "begin_ns end_ns tid kind".split()
_EMPTY: Final = {"result": np.int32, "flags": np.uint8, "tid": np.uint32, "waker_tid": np.uint32, "tgid": np.uint32}


class _Sorted:
    """Columns in the order of a key and, within it, of time."""

    __slots__ = ("_key", "columns")

    def __init__(self, columns: dict[str, Column], key: str, time: str) -> None:
        order = np.lexsort((columns[time], columns[key]))
        self.columns = {name: column[order] for name, column in columns.items()}
        self._key = self.columns[key]

    def group(self, key: int) -> dict[str, Column]:
        """The rows of one key. Views, not copies."""
        # The key as the column's type: with an int64 in its place numpy would convert the whole column.
        if not 0 <= key <= np.iinfo(self._key.dtype).max:
            return {name: column[:0] for name, column in self.columns.items()}
        wanted = self._key.dtype.type(key)
        first, last = np.searchsorted(self._key, wanted, "left"), np.searchsorted(self._key, wanted, "right")
        return {name: column[first:last] for name, column in self.columns.items()}


def _pick(ring: _Ring, names: Sequence[str], rows: Rows) -> dict[str, Column]:
    if not ring.size:
        return {name: np.zeros((0, 16) if name == "peer" else 0, _EMPTY.get(name, np.uint64)) for name in names}
    return {name: ring.columns[name][rows] for name in names}


def _made_since(ring: _Ring, time: str, since_ns: int, until_ns: int) -> Rows:
    if not ring.size:
        return np.zeros(0, np.intp)
    times = ring.column(time)
    return np.flatnonzero((times >= since_ns) & (times <= until_ns))


def _overlapping(ring: _Ring, since_ns: int, until_ns: int) -> Rows:
    if not ring.size:
        return np.zeros(0, np.intp)
    return np.flatnonzero((ring.column("on_ns") >= since_ns) & (ring.column("off_ns") <= until_ns))


def _find_locks(columns: dict[str, Column]) -> tuple[npt.NDArray[np.bool_], dict[int, npt.NDArray[np.uint64]]]:
    """Which waits for a futex ended because a lock was let go of, and the addresses of timed locks by process.

    A lock is let go of by one who waits for it, too, at other times: if the waker was seen to wait for the same futex,
    and the thread that it woke to let go of it, the wake-up is no instruction. One of the two alone proves nothing: who
    takes a job from CPython's SimpleQueue lets go of its word for the next one; who puts jobs in never waits for it.
    A futex that is waited for with a timeout and let go of by the same thread, whichever, is a lock for all: CPython's
    GIL is one, and is passed on among many.
    """
    found = np.zeros(columns["reason"].size, np.bool_)
    timed_locks: dict[int, npt.NDArray[np.uint64]] = {}
    rows = np.flatnonzero((columns["reason"] == Reason.FUTEX) & (columns["object"] != 0))
    if not rows.size:
        return found, timed_locks
    order = np.lexsort((columns["object"][rows], columns["tgid"][rows]))
    rows = rows[order]
    tgid, address, tid = columns["tgid"][rows], columns["object"][rows], columns["tid"][rows]
    by_task, waker_tid = columns["waker"][rows] == Waker.TASK, columns["waker_tid"][rows]
    # Words that are near each other are one lock: first tell the words apart, then join neighbours.
    new_word = np.ones(rows.size, np.bool_)
    new_word[1:] = (address[1:] != address[:-1]) | (tgid[1:] != tgid[:-1])
    first_rows = np.flatnonzero(new_word)
    timed = np.logical_or.reduceat((columns["flags"][rows] & TIMEOUT) != 0, first_rows)
    reach = np.where(timed[1:] | timed[:-1], SAME_TIMED_LOCK_BYTES, SAME_LOCK_BYTES)
    words, owners = address[first_rows], tgid[first_rows]
    apart = np.ones(words.size, np.bool_)
    apart[1:] = (owners[1:] != owners[:-1]) | ((words[1:] - words[:-1]) > reach)
    lock_of_word = np.cumsum(apart) - 1
    lock_of_row = lock_of_word[np.cumsum(new_word) - 1]

    def pairs(tids: Column) -> npt.NDArray[np.uint64]:
        made: npt.NDArray[np.uint64] = (lock_of_row.astype(np.uint64) << np.uint64(32)) | tids
        return made

    waits, lets_go = pairs(tid), pairs(waker_tid)
    waker_waits = np.isin(lets_go, waits) & by_task
    woken_lets_go = np.isin(waits, lets_go[by_task])
    passed_on = np.zeros(int(lock_of_word[-1]) + 1, np.bool_)
    passed_on[lock_of_row[waker_waits]] = True
    passed_on &= np.logical_or.reduceat(timed, np.flatnonzero(apart))
    found[rows] = by_task & (passed_on[lock_of_row] | (waker_waits & woken_lets_go))
    locked = passed_on[lock_of_word]
    for owner in np.unique(owners[locked]).tolist():
        timed_locks[owner] = words[locked & (owners == owner)]
    return found, timed_locks


class View:
    """A stretch of the window. Threads, sockets and locks are arranged when they are first asked for, and kept."""

    def __init__(
        self,
        since_ns: int,
        until_ns: int,
        intervals: _Ring,
        messages: _Ring,
        spans: _Ring,
        losses: dict[Stream, list[tuple[int, int]]],
    ) -> None:
        self.since_ns = since_ns
        self.until_ns = until_ns
        self.losses = losses
        self._ring = intervals
        late_ns = until_ns + LATE_NS
        self._rows = _Sorted(
            _pick(intervals, _INTERVAL_COLUMNS, _overlapping(intervals, since_ns, late_ns)), "tid", "on_ns"
        )
        self._rows.columns["lock"], self._timed_locks = _find_locks(self._rows.columns)
        self._by_socket = _Sorted(
            _pick(messages, _MESSAGE_COLUMNS, _made_since(messages, "at_ns", since_ns - LATE_NS, late_ns)),
            "sk",
            "at_ns",
        )
        self._spans = _Sorted(
            _pick(spans, _SPAN_COLUMNS, _made_since(spans, "end_ns", since_ns, _FOREVER_NS)), "tid", "begin_ns"
        )
        self._by_receiver: _Sorted | None = None
        self._threads: dict[int, Thread | None] = {}
        self._sockets: dict[int, Socket | None] = {}
        self._woke: _Sorted | None = None
        self._full_buffers: dict[tuple[bytes, int], list[tuple[int, int, int]]] | None = None

    # ---- threads ----

    def thread(self, tid: int) -> Thread | None:
        """What is known of a thread; None: nothing."""
        try:
            return self._threads[tid]
        except KeyError:
            made = self._threads[tid] = self._make_thread(tid)
            return made

    def _make_thread(self, tid: int) -> Thread | None:
        columns = self._rows.group(tid)
        columns = self._with_older(tid, columns)
        size = columns["on_ns"].size
        if size == 0:
            return None
        off, wake, on = columns["off_ns"], columns["wake_ns"], columns["on_ns"]
        sequence = columns["sequence"].astype(np.int64)
        sane = (off <= on) & ((wake == 0) | ((off <= wake) & (wake <= on)))
        if size > 1:
            again = (sequence[1:] == sequence[:-1]) & (on[1:] == on[:-1]) & (off[1:] == off[:-1])
            sane[1:] &= ~again
        if not sane.all():
            columns = {name: column[sane] for name, column in columns.items()}
            off, on, sequence = columns["off_ns"], columns["on_ns"], sequence[sane]
            if not on.size:
                return None
        # A sequence that begins again is another thread with the same number, whether its birth was seen or not. Later
        # in it the same flag says that a switch was missed, which is a hole.
        flags = columns["flags"]
        unseen = ((flags & FIRST) != 0) & (sequence != 1)
        reborn = (sequence == 1) & ((flags & BORN) == 0)
        columns["flags"] = np.where(unseen, flags & ~np.uint8(FIRST), flags) | np.where(reborn, FIRST, 0).astype(
            np.uint8
        )
        holes = unseen
        holes[1:] |= (sequence[1:] != sequence[:-1] + 1) | (off[1:] < on[:-1])
        thread = Thread(tid)
        thread.tgid = int(columns["tgid"][-1])
        thread.off, thread.wake, thread.on = off.tolist(), columns["wake_ns"].tolist(), on.tolist()
        thread.objects, thread.ready_sk = columns["object"].tolist(), columns["ready_sk"].tolist()
        thread.waker_tid, thread.syscalls = columns["waker_tid"].tolist(), columns["syscall"].tolist()
        thread.reasons, thread.wakers = columns["reason"].tolist(), columns["waker"].tolist()
        thread.flags, thread.holes = columns["flags"].tolist(), holes.tolist()
        thread.locks = columns["lock"].tolist()
        starts = np.where(self._ends_stretch(columns) | holes, np.arange(on.size), -1)
        thread.starts = np.maximum.accumulate(starts).tolist()
        received = self._received(tid)
        thread.received, thread.received_sk = received["at_ns"].tolist(), received["sk"].tolist()
        spans = self._spans.group(tid)
        known = np.isin(spans["kind"], (SPAN_RECLAIM, SPAN_GPU_SYNC))
        thread.span_begin, thread.span_end = spans["begin_ns"][known].tolist(), spans["end_ns"][known].tolist()
        thread.span_on_gpu = (spans["kind"][known] == SPAN_GPU_SYNC).tolist()
        return thread

    def _with_older(self, tid: int, columns: dict[str, Column]) -> dict[str, Column]:
        """Put the thread's last interval before the view in front: since then it ran."""
        ring = self._ring
        if not ring.size:
            return columns
        row = ring.last_row("tid", tid, self.since_ns) if 0 <= tid < 2**32 else None
        if row is None:
            return columns
        older = {name: column[row : row + 1] for name, column in ring.columns.items()} | {"lock": np.zeros(1, np.bool_)}
        return {name: np.concatenate((older[name], column)) for name, column in columns.items()}

    def _ends_stretch(self, columns: dict[str, Column]) -> npt.NDArray[np.bool_]:
        """Which intervals are waits to be told what to do, rather than sleeps on the way of what a thread does."""
        reason, waker, flags = columns["reason"], columns["waker"], columns["flags"]
        asleep_for_message = (reason >= Reason.POLL) & (reason <= Reason.PIPE)
        by_message = asleep_for_message & (waker != Waker.HARDIRQ) & ~np.isin(columns["syscall"], SENDING_CALLS)
        by_task = ((reason == Reason.FUTEX) | (reason == Reason.OTHER)) & (waker == Waker.TASK)
        by_task &= ~columns["lock"]
        # Storage and memory of the kernel's own are no instruction.
        by_task &= (flags & IOWAIT) == 0
        ends: npt.NDArray[np.bool_] = by_message | by_task | ((flags & (BORN | FIRST)) != 0)
        return ends

    def _received(self, tid: int) -> dict[str, Column]:
        if self._by_receiver is None:
            columns = self._by_socket.columns
            rows = np.flatnonzero(columns["kind"] == MessageKind.RECEIVED)
            self._by_receiver = _Sorted({name: columns[name][rows] for name in ("at_ns", "sk", "tid")}, "tid", "at_ns")
        return self._by_receiver.group(tid)

    def lost_until(self, from_ns: int, until_ns: int) -> int:
        """Until when, in [from_ns, until_ns], intervals may have been lost; 0: none were."""
        lost = [last for first, last in self.losses[Stream.intervals] if first <= until_ns and last >= from_ns]
        return min(max(lost), until_ns) if lost else 0

    # ---- futexes ----

    def is_timed_lock(self, tgid: int, address: int) -> bool:
        """Whether the futex at `address` is known to be a lock whose waits have timeouts, as CPython's GIL is."""
        locks = self._timed_locks.get(tgid)
        if locks is None:
            return False
        position = int(np.searchsorted(locks, address))
        return position < locks.size and int(locks[position]) == address

    def woke_somebody(self, tid: int, from_ns: int, until_ns: int) -> bool:
        """Whether the thread ended another one's wait then, other than by letting go of a lock."""
        if self._woke is None:
            columns = self._rows.columns
            by_task = (columns["waker"] == Waker.TASK) | (columns["waker"] == Waker.MESSAGE)
            rows = np.flatnonzero(by_task & ~columns["lock"])
            self._woke = _Sorted(
                {name: columns[name][rows] for name in ("waker_tid", "wake_ns")}, "waker_tid", "wake_ns"
            )
        times = self._woke.group(tid)["wake_ns"]
        position = int(np.searchsorted(times, from_ns))
        return position < times.size and int(times[position]) <= until_ns

    # ---- sockets ----

    def socket(self, sk: int) -> Socket | None:
        """The messages on a socket; None: there are none."""
        try:
            return self._sockets[sk]
        except KeyError:
            made = self._sockets[sk] = self._make_socket(sk)
            return made

    def _make_socket(self, sk: int) -> Socket | None:
        columns = self._by_socket.group(sk)
        if not columns["at_ns"].size:
            return None
        socket = Socket()
        kinds, times, tids = columns["kind"].tolist(), columns["at_ns"].tolist(), columns["tid"].tolist()
        for kind, at_ns, tid, result in zip(kinds, times, tids, columns["result"].tolist(), strict=True):
            if kind == MessageKind.READY:
                socket.ready.append((at_ns, tid))
            elif kind == MessageKind.RECEIVED:
                socket.received.append(at_ns)
            elif kind == MessageKind.SENT and result > 0:
                socket.sent.append((at_ns, tid))
        socket.family = int(columns["family"][-1])
        socket.peer, socket.peer_port = columns["peer"][-1].tobytes(), int(columns["peer_port"][-1])
        return socket

    def full_buffers(self, peer: bytes, peer_port: int) -> list[tuple[int, int, int]]:
        """When sends to this peer found no room: (at_ns, tid, when the next send was made or 0), in order of time."""
        if self._full_buffers is None:
            self._full_buffers = self._find_full_buffers()
        return self._full_buffers.get((peer, peer_port), [])

    def _find_full_buffers(self) -> dict[tuple[bytes, int], list[tuple[int, int, int]]]:
        found: dict[tuple[bytes, int], list[tuple[int, int, int]]] = {}
        columns = self._by_socket.columns
        sends = np.flatnonzero(columns["kind"] == MessageKind.SENT)
        sk, result = columns["sk"][sends], columns["result"][sends]
        full = (result == -EAGAIN) | (columns["full"][sends] != 0)
        for place in np.flatnonzero(full).tolist():
            row = sends[place]
            following = place + 1 < sends.size and sk[place + 1] == sk[place]
            next_ns = int(columns["at_ns"][sends[place + 1]]) if following else 0
            key = (columns["peer"][row].tobytes(), int(columns["peer_port"][row]))
            found.setdefault(key, []).append((int(columns["at_ns"][row]), int(columns["tid"][row]), next_ns))
        for stalls in found.values():
            stalls.sort()
        return found
