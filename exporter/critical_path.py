"""Finds what a request waited for: the critical path through the threads that worked for it.

The walk starts at the thread that wrote the token, at that instant, and goes back in time. While the thread ran, the
path was on the CPU; while it could have run, in the run queue; while it slept, the question is who ended the sleep. If
that was a thread whose work was started by this request, the path goes on there. Every nanosecond of the window is
charged to one cause, because the walk only ever moves its instant back by what it charges. What cannot be shown is
`unexplained`: a record that is lost may cost an explanation, and must not make a wrong one.

A thread's work is the request's own when going back over it, sleeps included that the thread caused itself, one comes
to the read of the request, to a wake-up by a thread whose work was the request's own then, or to a message from one.
That is how a hand-over is told from a lock, and the answer from other people's messages.
"""

from __future__ import annotations

import ipaddress
from bisect import bisect_left, bisect_right
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final, NamedTuple

from exporter.timeline import (
    BORN,
    FIRST,
    GPU,
    IOWAIT,
    SAME_LOCK_BYTES,
    SAME_TIMED_LOCK_BYTES,
    SENDING_CALLS,
    THROTTLED,
    TIMEOUT,
    WAKER_TARGET,
    Reason,
    Stream,
    Thread,
    View,
    Waker,
)

STEPS_LIMIT: Final = 4_000
"""A thread that is preempted every 3 ms by another one fills this in 6 s; the rest of a longer path is unexplained."""
NODES_LIMIT: Final = 20_000
"""Runs that a walk looks at, and runs that it looks at to tell whose work they were."""
SAME_WAIT_NS: Final = 1_000_000
"""A wait for the GIL that timed out is begun again at once."""
ACCEPT_SLACK_NS: Final = 1_000_000
"""The handshake wakes the thread that accepts, before the first byte of the request arrives."""
HOLDERS_LIMIT: Final = 32
"""Holders of a lock that are told apart in one wait for it, and waits of each that are looked at."""
STRETCHES_LIMIT: Final = 256
"""How many stretches of an event loop are looked at for the one that set a timer."""


class Cause(Enum):
    """What the critical path was doing. The value is the label value of `cause`."""

    on_cpu = "on_cpu"
    run_queue = "run_queue"
    cpu_quota = "cpu_quota"
    lock = "lock"
    disk = "disk"
    memory = "memory"
    network = "network"
    upstream = "upstream"
    gpu = "gpu"
    sleep = "sleep"
    stopped = "stopped"
    unexplained = "unexplained"


@dataclass(frozen=True, slots=True)
class Window:
    """What is to be explained: the time until `end_ns`, when `writer_tid` wrote the token.

    `read_ns` is when the service's first read of the request returned, by `reader_tid`; None where that is not known.
    `peer` is the client's address, IPv4 in the first four bytes.
    """

    begin_ns: int
    end_ns: int
    writer_tid: int
    arrived_ns: int
    read_ns: int | None = None
    reader_tid: int | None = None
    peer: bytes = b""
    peer_port: int = 0


class Step(NamedTuple):  # a frozen dataclass takes four times as long to make, and paths have thousands
    """A part of the path. `detail`: the thread that ran or held the lock; the peer of upstream and network; else ""."""

    begin_ns: int
    end_ns: int
    tid: int  # the thread that did it, or whose wait it was
    cause: Cause
    detail: str
    woken_by: int  # the thread that ended the wait; 0: none, or not known


@dataclass(frozen=True, slots=True)
class Worker:
    """A thread that worked for the request at an instant, `depth` threads away from the one that read it."""

    tid: int
    at_ns: int
    depth: int


def walk_on(view: View, window: Window, workers: Sequence[Worker] = ()) -> tuple[list[Step], list[Worker]]:
    """`walk`, for a window that continues an earlier one: `workers` are what that one's call returned.

    Who worked for a request need not be traced back to its read again and again, so a view that reaches back to the
    earliest of them will do.
    """
    made = _Walk(view, window, workers)
    steps = made.run()
    return steps, made.workers(steps)


def walk(view: View, window: Window) -> list[Step]:
    """The critical path of `window`: contiguous steps in order of time, from its begin to its end exactly.

    `view` must reach back to the request's arrival for the path to be complete. Returns an empty list for a window that
    ends before it begins.
    """
    return walk_on(view, window)[0]


def totals(steps: Iterable[Step]) -> dict[Cause, int]:
    """Nanoseconds of each cause; every cause is there."""
    sums = dict.fromkeys(Cause, 0)
    for step in steps:
        sums[step.cause] += step.end_ns - step.begin_ns
    return sums


def peer_text(peer: bytes, port: int, family: int = 0) -> str:
    """An address as `ip:port`. Without a family, 16 bytes of which only the first four are set are IPv4."""
    if not peer:
        return ""
    if family == _AF_INET6 or (family != _AF_INET and any(peer[4:])):
        address = ipaddress.IPv6Address(peer[:16].ljust(16, b"\0"))
        mapped = address.ipv4_mapped
        return f"{mapped}:{port}" if mapped else f"[{address}]:{port}"
    return f"{ipaddress.IPv4Address(peer[:4].ljust(4, bytes(1)))}:{port}"


_AF_INET: Final = 2
_AF_INET6: Final = 10
_SENDS: Final = frozenset(SENDING_CALLS)
_FUTEX, _POLL, _SOCKET, _PIPE = int(Reason.FUTEX), int(Reason.POLL), int(Reason.SOCKET), int(Reason.PIPE)
# Plain numbers: looking up a member of an enumeration costs as much as the rest of a comparison.
_CPU, _DEVICE, _OTHER = int(Reason.CPU), int(Reason.DEVICE), int(Reason.OTHER)
_BY_TASK, _BY_HARDIRQ, _PARENT = int(Waker.TASK), int(Waker.HARDIRQ), int(Waker.PARENT)
_OUTSIDE: Final = frozenset({int(Waker.NETWORK), int(Waker.SOFTIRQ)})
_INTERRUPT: Final = frozenset({int(Waker.HARDIRQ), int(Waker.SOFTIRQ)})
_TASK: Final = frozenset({int(Waker.TASK), int(Waker.MESSAGE)})
_OWN_WAITS: Final = {
    int(Reason.DISK): Cause.disk,
    int(Reason.TIMER): Cause.sleep,
    int(Reason.STOPPED): Cause.stopped,
}

_NOBODY_S: Final = frozenset({Cause.unexplained})  # whose work it was is not known

Query = tuple[int, int]  # a thread, an instant
Stretch = tuple[int, int]  # a thread, the interval that its stretch of work began with


class _Origin:
    """Tells whether the work of a thread at an instant was started by the request.

    For each stretch of work the instant is looked for from which on it was, first things first: what is known to have
    begun the request's work there is the most direct cause, and a stretch is gone over once however often it is asked
    about. `depth` is how many threads lie between the read and a thread: the reader has 0.
    """

    def __init__(
        self, view: View, window: Window, stalls: Mapping[tuple[int, int], int], workers: Sequence[Worker]
    ) -> None:
        self._view = view
        self._stalls = stalls
        known = window.reader_tid is not None and window.read_ns is not None
        self._reader_tid = window.reader_tid if known else None
        read_ns = window.read_ns if known and window.read_ns is not None else 0
        self.since_ns = max(window.arrived_ns, read_ns)  # before it nothing is the request's own
        self._certain: dict[int, list[int]] = {}
        """When threads were at work for the request: the reader at the read, and those known from before."""
        if self._reader_tid is not None:
            self._certain[self._reader_tid] = [read_ns]
        for worker in workers:
            self._certain.setdefault(worker.tid, []).append(worker.at_ns)
        for instants in self._certain.values():
            instants.sort()
        self._begun: dict[Stretch, int] = {}
        self._tested: dict[Stretch, int] = {}  # until when nothing was found
        self._active: set[Stretch] = set()
        self._budget = NODES_LIMIT
        self.depth: dict[int, int] = {worker.tid: worker.depth for worker in workers}
        if self._reader_tid is not None:
            self.depth[self._reader_tid] = 0

    def is_ours(self, tid: int, at_ns: int) -> bool:
        """Whether the thread worked for the request at that instant."""
        answer = self._known(tid, at_ns)
        if answer is not None:
            return answer
        # A stack of generators, because the chain of wake-ups is as long as the request, and Python's stack is not.
        stack = [self._search(tid, at_ns)]
        sent: bool | None = None
        while stack:
            try:
                query = next(stack[-1]) if sent is None else stack[-1].send(sent)
            except StopIteration as stop:
                stack.pop()
                sent = stop.value
                continue
            sent = self._known(*query)
            if sent is None:
                stack.append(self._search(*query))
        return bool(sent)

    def _stretch(self, thread: Thread, at_ns: int) -> Stretch:
        run = thread.run_at(at_ns)
        return thread.tid, thread.starts[run] if run >= 0 else -1

    def _known(self, tid: int, at_ns: int) -> bool | None:
        if at_ns < self.since_ns or self._budget <= 0:
            return False
        thread = self._view.thread(tid)
        if thread is None:
            return False
        run = thread.run_at(at_ns)
        if run + 1 < len(thread.off) and thread.off[run + 1] < at_ns:
            return False  # it did not run then
        stretch = (tid, thread.starts[run] if run >= 0 else -1)
        begun_ns = self._begun.get(stretch)
        if begun_ns is not None:
            return begun_ns <= at_ns
        # One that is being gone over was found empty up to where its search stands, and the question is about before.
        if stretch in self._active or self._tested.get(stretch, -1) >= at_ns:
            return False
        return None

    def _search(self, tid: int, at_ns: int) -> Generator[Query, bool, bool]:
        thread = self._view.thread(tid)
        assert thread is not None  # _known said so
        stretch = self._stretch(thread, at_ns)
        start = stretch[1]
        self._active.add(stretch)
        try:
            tested_ns = self._tested.get(stretch, -1)
            for instant_ns, query in self._events(thread, start, tested_ns, at_ns):
                self._budget -= 1
                if query is None or (yield query):
                    depth = 0 if query is None else self.depth.get(query[0], 0) + (query[0] != tid)
                    self.depth[tid] = min(self.depth.get(tid, depth), depth)
                    self._begun[stretch] = instant_ns
                    return True
            self._tested[stretch] = at_ns
            return False
        finally:
            self._active.discard(stretch)

    def _events(
        self, thread: Thread, start: int, tested_ns: int, at_ns: int
    ) -> Generator[tuple[int, Query | None], None, None]:
        """What may have made this stretch the request's own, in order of time, with whose work then decides it.

        None in place of that: it is the read of the request, or known from before.
        """
        begun_ns = thread.on[start] if start >= 0 else 0
        if tested_ns < begun_ns and start >= 0:
            for query in self._instructions(thread, start):
                yield thread.wake[start] or thread.off[start], query
        certain_ns = next(
            (ns for ns in self._certain.get(thread.tid, ()) if begun_ns <= ns <= at_ns),
            None,
        )
        first = bisect_left(thread.received, max(begun_ns, tested_ns + 1, self.since_ns))
        for position in range(first, bisect_right(thread.received, at_ns)):
            received_ns = thread.received[position]
            if certain_ns is not None and certain_ns <= received_ns:
                yield certain_ns, None
                return
            for source_tid, sent_ns, _ in self.sources(thread.received_sk[position], received_ns):
                yield received_ns, (source_tid, sent_ns)
        if certain_ns is not None:
            yield certain_ns, None

    def _instructions(self, thread: Thread, start: int) -> Generator[Query, None, None]:
        flags, waker, wake_ns = thread.flags[start], thread.wakers[start], thread.wake[start]
        if flags & BORN:
            yield thread.waker_tid[start], thread.off[start]
            return
        reason = thread.reasons[start]
        if thread.locks[start]:
            return  # it begins a stretch because what came before is not known
        if waker in _TASK and flags & WAKER_TARGET:
            yield thread.waker_tid[start], wake_ns
            if reason in {_FUTEX, _OTHER} and start > 0 and not thread.holes[start]:
                # It may have been a lock on the way. Not for a thread that is told by futex what to do and has given
                # something away: it had delivered, and waited for its next job.
                before = thread.starts[start - 1]
                from_ns = thread.on[before] if before >= 0 else 0
                told_by_message = thread.received or thread.tid == self._reader_tid
                if told_by_message or not self._view.woke_somebody(thread.tid, from_ns, thread.off[start]):
                    yield thread.tid, thread.off[start]
        elif (thread.tid, wake_ns) in self._stalls:
            yield thread.tid, self._stalls[thread.tid, wake_ns]  # room towards the client: it goes on with what it sent
        elif wake_ns:
            sk = thread.ready_sk[start] or (thread.objects[start] if thread.reasons[start] == _SOCKET else 0)
            socket = self._view.socket(sk) if sk else None
            sent = socket.last_sent(wake_ns) if socket else None
            if sent is not None:
                yield sent[1], sent[0]

    def sources(self, sk: int, received_ns: int) -> list[tuple[int, int, bool]]:
        """Who caused what was received then: a thread, when it sent, and whether it only asked for it outside.

        What was sent first comes first. Messages that lay in the socket together are received at once, and it cannot be
        told from outside which one mattered: it is the first one that was the request's own.
        """
        socket = self._view.socket(sk)
        if socket is None:
            return []
        senders = socket.senders(received_ns)
        if senders:
            return [(tid, sent_ns, False) for sent_ns, tid in senders if sent_ns >= self.since_ns]
        sent = None if socket.ready else socket.last_sent(received_ns)
        return [] if sent is None else [(sent[1], sent[0], True)]

    def was_told_from_outside(self, tid: int, at_ns: int, since_ns: int) -> bool:
        """Whether what the thread did then began with a wake-up by the network after `since_ns`."""
        thread = self._view.thread(tid)
        if thread is None:
            return False
        _, start = self._stretch(thread, at_ns)
        return start >= 0 and thread.wakers[start] in _OUTSIDE and thread.wake[start] >= since_ns


@dataclass(frozen=True, slots=True)
class _LockWait:
    """A wait that was charged to a lock."""

    tid: int
    address: int
    off_ns: int
    timed: bool
    holder_tid: int


def _is_near(address: int, other: int, timed: bool) -> bool:
    """Whether two futexes are words of one lock."""
    return abs(address - other) <= (SAME_TIMED_LOCK_BYTES if timed else SAME_LOCK_BYTES)


def _span_cause(thread: Thread, position: int) -> Cause:
    return Cause.gpu if thread.span_on_gpu[position] else Cause.memory


class _Walk:
    """One walk. `_at` only goes down; everything from it to the end is charged."""

    def __init__(self, view: View, window: Window, workers: Sequence[Worker] = ()) -> None:
        self._view = view
        self._window = window
        self._stalls = self._find_stalls()
        self._origin = _Origin(view, window, self._stalls, workers)
        self._begin = window.begin_ns
        self._at = window.end_ns
        self._tid = window.writer_tid
        read_ns = window.read_ns if window.reader_tid is not None else None
        # Before the read the request lay in its socket, so the path is what the reader did, whatever came before.
        self._read_ns = read_ns if read_ns is not None and self._begin < read_ns <= self._at else None
        self._run: int | None = None  # the run of the thread that `_at` is in, where that is known
        self._base = self._begin if self._read_ns is None else self._read_ns
        self._limit = self._base  # where this leg of the walk ends
        self._then: Query | None = None  # where it goes on from there
        self._idle: Cause | None = None  # what an event loop's waits are until then
        self._before_read = False
        self._last_lock: _LockWait | None = None
        self._steps: list[tuple[int, int, int, Cause, str, int]] = []  # as Step, newest first
        self._peer = peer_text(window.peer, window.peer_port)

    def run(self) -> list[Step]:
        nodes = 0
        while True:
            while self._at <= self._limit:
                if not self._next_leg():
                    return self._finished()
            nodes += 1
            if nodes > NODES_LIMIT or len(self._steps) >= STEPS_LIMIT:
                self._limit = self._begin
                self._charge(self._begin, Cause.unexplained)
                return self._finished()
            thread = self._view.thread(self._tid)
            if thread is None:
                self._charge(self._limit, Cause.unexplained)
                continue
            run = thread.run_at(self._at) if self._run is None else self._run
            self._run = None
            if self._leave_run(thread, run) and self._at > self._limit:
                self._leave_interval(thread, run)
                if self._tid == thread.tid and self._at == thread.off[run]:
                    self._run = run - 1

    def _next_leg(self) -> bool:
        self._idle = None
        self._run = None
        self._limit = self._base
        if self._then is not None:
            self._tid, _ = self._then
            self._then = None
            return True
        if self._read_ns is None or self._before_read:
            return False
        self._before_read = True
        self._limit = self._base = self._begin
        if self._window.reader_tid is not None:
            self._tid = self._window.reader_tid
        return True

    def _charge(self, begin_ns: int, cause: Cause, detail: str = "", woken_by: int = 0) -> None:
        begin_ns = max(begin_ns, self._limit)
        end_ns = self._at
        if begin_ns >= end_ns:
            return
        steps, tid = self._steps, self._tid
        if steps:
            _, last_ns, last_tid, last_cause, last_detail, last_woken_by = steps[-1]
            if last_cause is cause and last_tid == tid and last_detail == detail and last_woken_by == woken_by:
                steps.pop()
                end_ns = last_ns
        steps.append((begin_ns, end_ns, tid, cause, detail, woken_by))
        self._at = begin_ns

    # ---- runs ----

    def _leave_run(self, thread: Thread, run: int) -> bool:
        """Charge the run that `_at` is in; False where the path does not go on to what was before it."""
        following = run + 1
        if following < len(thread.off) and thread.off[following] < self._at:
            # The records say that it was not running: clocks of two CPUs, or a record that is not what it seems.
            self._charge(thread.off[following], Cause.unexplained)
        begin_ns = thread.on[run] if run >= 0 else 0
        message = self._message(thread, run, begin_ns)
        if message is not None:
            tid, sent_ns, received_ns, sk = message
            if sk:
                self._charge_run(thread, run, received_ns)
                socket = self._view.socket(sk)
                peer = peer_text(socket.peer, socket.peer_port, socket.family) if socket else ""
                self._charge(sent_ns, Cause.upstream, peer)
                self._tid = tid
                return False
            self._then = (tid, sent_ns)
            self._limit = max(sent_ns, self._base)
        self._charge_run(thread, run, begin_ns)
        return run >= 0

    def _charge_run(self, thread: Thread, run: int, begin_ns: int) -> None:
        begin_ns = max(begin_ns, self._limit)
        following = run + 1
        cause = Cause.on_cpu
        if run < 0 or (following < len(thread.holes) and thread.holes[following]):
            cause = Cause.unexplained
        elif following == len(thread.on):
            # No later interval would show by its number that one is missing.
            lost_ns = self._view.lost_until(thread.on[run], self._at)
            if lost_ns:
                self._charge_running(thread, lost_ns)
                cause = Cause.unexplained
        if cause is Cause.on_cpu:
            self._charge_running(thread, begin_ns)
        else:
            self._charge(begin_ns, cause)

    def _charge_running(self, thread: Thread, begin_ns: int) -> None:
        detail = str(thread.tid)
        if thread.span_begin:
            position = bisect_left(thread.span_begin, self._at) - 1
            while position >= 0 and self._at > begin_ns and thread.span_end[position] > begin_ns:
                self._charge(max(begin_ns, thread.span_end[position]), Cause.on_cpu, detail)
                self._charge(max(begin_ns, thread.span_begin[position]), _span_cause(thread, position))
                position -= 1
        self._charge(begin_ns, Cause.on_cpu, detail)

    def _message(self, thread: Thread, run: int, begin_ns: int) -> tuple[int, int, int, int] | None:
        """The message that the path follows out of this run: sender, when sent, when received, socket if upstream."""
        if self._then is not None or self._before_read:
            return None
        if run >= 0 and (thread.tid, thread.wake[run]) in self._stalls:
            return None
        lower_ns = max(begin_ns, self._limit)
        position = bisect_right(thread.received, self._at) - 1
        while position >= 0 and thread.received[position] >= lower_ns:
            received_ns, sk = thread.received[position], thread.received_sk[position]
            position -= 1
            for tid, sent_ns, upstream in self._origin.sources(sk, received_ns):
                if upstream and run >= 0 and thread.ready_sk[run] == sk:
                    continue  # it slept until the bytes came, which tells when they did
                if self._tells(thread, tid, sent_ns, received_ns, upstream):
                    return tid, sent_ns, received_ns, sk if upstream else 0
        return None

    def _tells(self, thread: Thread, tid: int, sent_ns: int, received_ns: int, upstream: bool) -> bool:
        """Whether it was by this message that the thread worked for the request from then on."""
        origin = self._origin
        if (tid == thread.tid and not upstream) or not origin.is_ours(tid, sent_ns):
            return False
        # A thread that works for the request already is not told so again: what comes then from a thread nearer to the
        # read is another request's; what comes from one that it asked is the answer.
        return (
            upstream or not origin.is_ours(thread.tid, received_ns - 1) or origin.depth[tid] > origin.depth[thread.tid]
        )

    # ---- intervals ----

    def _leave_interval(self, thread: Thread, index: int) -> None:
        off_ns, wake_ns = thread.off[index], thread.wake[index]
        reason, waker, flags = thread.reasons[index], thread.wakers[index], thread.flags[index]
        waiting = Cause.cpu_quota if flags & THROTTLED else Cause.run_queue
        if reason > _OTHER or waker > _PARENT:
            self._charge(off_ns, Cause.unexplained)
        elif flags & BORN:
            self._charge(off_ns, waiting, woken_by=thread.waker_tid[index])
            if self._at > self._limit:
                self._begin_life(thread.waker_tid[index])
            return
        elif reason == _CPU:
            self._charge(off_ns, waiting)
        elif wake_ns == 0:
            self._charge(off_ns, Cause.unexplained)
        else:
            self._charge(wake_ns, waiting, woken_by=thread.waker_tid[index])
            if self._at > self._limit:
                self._leave_sleep(thread, index)
        if flags & FIRST and self._tid == thread.tid and self._at <= off_ns:
            self._charge(self._limit, Cause.unexplained)

    def _begin_life(self, parent_tid: int) -> None:
        if self._is_known(parent_tid):
            self._tid = parent_tid
        else:
            self._charge(self._limit, Cause.unexplained)

    def _leave_sleep(self, thread: Thread, index: int) -> None:
        """Charge the sleep that ended at `_at`, or go on with the thread that ended it."""
        off_ns, reason, waker = thread.off[index], thread.reasons[index], thread.wakers[index]
        in_span = self._in_span(thread, off_ns)
        if in_span is not None:
            self._charge(off_ns, in_span)
        elif thread.flags[index] & IOWAIT:
            self._charge(off_ns, Cause.disk)
        elif reason in _OWN_WAITS:
            self._charge(off_ns, _OWN_WAITS[reason])
        elif reason == _FUTEX:
            self._leave_futex(thread, index)
        elif _POLL <= reason <= _PIPE:
            self._leave_message_wait(thread, index)
        elif reason == _DEVICE:
            self._charge(off_ns, Cause.gpu if thread.flags[index] & GPU else Cause.unexplained)
        elif waker == _BY_TASK and thread.flags[index] & WAKER_TARGET:
            # A lock inside the kernel, or in WAIT_OTHER the wait for a child.
            self._leave_to_waker(thread, index, hand_over=reason == _OTHER)
        else:
            self._charge(off_ns, Cause.unexplained)

    def _in_span(self, thread: Thread, at_ns: int) -> Cause | None:
        """The cause of the reclaim or the wait for a GPU that the thread is in; None: in neither."""
        last = bisect_right(thread.span_begin, at_ns) - 1
        for position in range(last, max(last - 2, -1), -1):  # a reclaim may be part of a wait
            if at_ns < thread.span_end[position]:
                return _span_cause(thread, position)
        return None

    def _is_known(self, tid: int) -> bool:
        thread = self._view.thread(tid)
        return tid != self._tid and thread is not None and thread.run_at(self._at) >= 0

    def _follow(self, tid: int, off_ns: int) -> None:
        if self._is_known(tid):
            self._tid = tid
        else:
            self._charge(off_ns, Cause.unexplained)

    def _leave_to_waker(self, thread: Thread, index: int, hand_over: bool) -> None:
        """A wait that a thread ended by letting go of something: follow it if that was for this request."""
        waker_tid, off_ns = thread.waker_tid[index], thread.off[index]
        if hand_over and self._handed_over(waker_tid):
            self._follow(waker_tid, off_ns)
            return
        # The thread that let go may have had it for the last moment only: who had it before is found by its own wait.
        holder_tid = waker_tid
        for _ in range(HOLDERS_LIMIT):
            got = self._got_lock(holder_tid, thread, index)
            if got is None or self._at <= self._limit:
                break
            self._charge(got[0], Cause.lock, str(holder_tid), holder_tid)
            holder_tid = got[1]
        timed = bool(thread.flags[index] & TIMEOUT)
        self._last_lock = _LockWait(thread.tid, thread.objects[index], off_ns, timed, holder_tid)
        self._charge(off_ns, Cause.lock, str(holder_tid), holder_tid)

    def _got_lock(self, holder_tid: int, thread: Thread, index: int) -> Query | None:
        """When, in the wait of `thread` until `_at`, the holder got the lock by waiting for it, and from whom."""
        holder = self._view.thread(holder_tid)
        if holder is None or thread.reasons[index] != _FUTEX or holder.tgid != thread.tgid:
            return None
        address, timed = thread.objects[index], thread.flags[index] & TIMEOUT
        position = holder.run_at(self._at)
        for run in range(position, max(position - HOLDERS_LIMIT, -1), -1):
            wake_ns = holder.wake[run]
            if holder.on[run] <= thread.off[index]:
                return None
            if holder.reasons[run] == _FUTEX and holder.wakers[run] == _BY_TASK:
                near = _is_near(address, holder.objects[run], bool(timed or holder.flags[run] & TIMEOUT))
                if near and thread.off[index] < wake_ns < self._at:
                    return wake_ns, holder.waker_tid[run]
        return None

    def _handed_over(self, waker_tid: int) -> bool:
        if not self._before_read:
            return self._origin.is_ours(waker_tid, self._at)
        # Nothing is the request's own before it was read. Who was woken by its connection hands it over.
        since_ns = self._window.arrived_ns - ACCEPT_SLACK_NS
        return self._origin.was_told_from_outside(waker_tid, self._at, since_ns)

    def _leave_futex(self, thread: Thread, index: int) -> None:
        off_ns, waker, address = thread.off[index], thread.wakers[index], thread.objects[index]
        if waker == _BY_TASK:
            self._leave_to_waker(thread, index, hand_over=bool(thread.flags[index] & WAKER_TARGET))
        elif waker in _INTERRUPT and thread.flags[index] & TIMEOUT:
            lock = self._last_lock
            if lock is not None and self._is_same_wait(thread, index, lock):
                self._last_lock = _LockWait(thread.tid, address, off_ns, True, lock.holder_tid)
                self._charge(off_ns, Cause.lock, str(lock.holder_tid), lock.holder_tid)
            elif self._view.is_timed_lock(thread.tgid, address):
                self._charge(off_ns, Cause.lock)
            else:
                self._charge(off_ns, Cause.sleep)
        else:
            self._charge(off_ns, Cause.unexplained)

    def _is_same_wait(self, thread: Thread, index: int, lock: _LockWait) -> bool:
        near = _is_near(thread.objects[index], lock.address, lock.timed)
        return lock.tid == thread.tid and near and 0 <= lock.off_ns - thread.on[index] < SAME_WAIT_NS

    # ---- waits for messages ----

    def _leave_message_wait(self, thread: Thread, index: int) -> None:
        off_ns, reason, waker = thread.off[index], thread.reasons[index], thread.wakers[index]
        stalled_ns = self._stalls.get((thread.tid, thread.wake[index]))
        if stalled_ns is not None:
            self._charge(stalled_ns, Cause.network, self._peer)
        elif self._idle is not None and reason == _POLL:
            self._charge(off_ns, self._idle)
        elif waker in _TASK and thread.flags[index] & WAKER_TARGET:
            self._follow(thread.waker_tid[index], off_ns)
        elif waker == _BY_HARDIRQ:
            timer = reason != _SOCKET or thread.flags[index] & TIMEOUT
            self._charge(off_ns, Cause.sleep if timer else Cause.unexplained)
            if reason == _POLL:
                self._look_for_timer(thread)
        elif reason == _SOCKET and thread.syscalls[index] in _SENDS and waker in _OUTSIDE:
            self._charge(off_ns, Cause.network, self._peer if thread.tid == self._window.writer_tid else "")
        elif waker in _OUTSIDE or waker in _TASK:
            self._leave_outside(thread, index)
        else:
            self._charge(off_ns, Cause.unexplained)

    def _look_for_timer(self, thread: Thread) -> None:
        """An event loop's timer ended its wait: until it was set, the loop's other waits are that sleep as well."""
        if self._before_read or self._then is not None or self._at <= self._limit:
            return
        at_ns = self._at
        for _ in range(STRETCHES_LIMIT):
            if self._origin.is_ours(thread.tid, at_ns):
                if at_ns < self._at:
                    self._then = (thread.tid, at_ns)
                    self._limit = max(at_ns, self._base)
                    self._idle = Cause.sleep
                return
            run = thread.run_at(at_ns)
            start = thread.starts[run] if run >= 0 else -1
            if start < 0 or thread.holes[start] or thread.off[start] < self._limit:
                return
            at_ns = thread.off[start]

    def _leave_outside(self, thread: Thread, index: int) -> None:
        """The wait ended by bytes from outside the service, or by a process that is not watched."""
        off_ns, reason = thread.off[index], thread.reasons[index]
        sk = thread.ready_sk[index] or (thread.objects[index] if reason == _SOCKET else 0)
        socket = self._view.socket(sk) if sk else None
        if socket is not None:
            peer = peer_text(socket.peer, socket.peer_port, socket.family)
            if (socket.peer, socket.peer_port) == (self._window.peer, self._window.peer_port):
                self._charge(off_ns, Cause.network, peer)
                return
            sent = socket.last_sent(self._at)
            if sent is not None and (reason == _SOCKET or self._origin.is_ours(sent[1], sent[0])):
                self._charge(sent[0], Cause.upstream, peer)
                self._tid = sent[1]
                return
            if sent is None and reason == _SOCKET and socket.received and not socket.ready:
                self._charge(off_ns, Cause.upstream, peer)  # it asked before what is known
                return
        # A socket without messages is a client's or a listening one. The rest of the request may still be on its way.
        if sk and socket is None and (self._before_read or self._reads_on(thread, index)):
            self._charge(off_ns, Cause.network, self._peer)
        else:
            self._charge(off_ns, Cause.unexplained)

    def _reads_on(self, thread: Thread, index: int) -> bool:
        """Whether the reader waits in a call on a socket, or by epoll right after what it did with the first read."""
        if thread.tid != self._window.reader_tid or self._read_ns is None:
            return False
        if thread.reasons[index] == _SOCKET:
            return True
        before = index - 1
        start = thread.starts[before] if before >= 0 and not thread.holes[index] else -1
        return start >= 0 and thread.on[start] <= self._read_ns

    def _find_stalls(self) -> dict[tuple[int, int], int]:
        """Wake-ups that ended a wait for room towards the client: (thread, when) -> since when there was none."""
        stalls: dict[tuple[int, int], int] = {}
        window = self._window
        for at_ns, tid, next_ns in self._view.full_buffers(window.peer, window.peer_port):
            if not min(window.begin_ns, window.arrived_ns) < at_ns < window.end_ns:
                continue
            thread = self._view.thread(tid)
            until_ns = min(next_ns or window.end_ns, window.end_ns)
            index = thread.run_at(until_ns) if thread else -1
            while thread and index >= 0 and thread.on[index] > at_ns:
                if thread.wakers[index] in _OUTSIDE and at_ns < thread.wake[index]:
                    stalls.setdefault((tid, thread.wake[index]), at_ns)
                    break
                index -= 1
        return stalls

    # ---- the end ----

    def workers(self, steps: Sequence[Step]) -> list[Worker]:
        """Who was on the path, and when last: the thread that wrote the token at its end, the others before."""
        last: dict[int, int] = {}
        for step in steps:
            if step.cause not in _NOBODY_S:
                last[step.tid] = step.end_ns
        last[self._window.writer_tid] = self._window.end_ns
        depth = self._origin.depth
        return [Worker(tid, at_ns, depth.get(tid, 0)) for tid, at_ns in last.items()]

    def _finished(self) -> list[Step]:
        losses = sorted(self._view.losses[Stream.messages] + self._view.losses[Stream.spans])
        steps = _without_lost(reversed(self._steps), losses) if losses else reversed(self._steps)
        return list(map(Step._make, steps))


def _without_lost(
    steps: Iterable[tuple[int, int, int, Cause, str, int]], losses: Sequence[tuple[int, int]]
) -> list[tuple[int, int, int, Cause, str, int]]:
    """The steps, with unexplained for when a message or a reclaim may have been missed."""
    result: list[tuple[int, int, int, Cause, str, int]] = []
    for begin_ns, end_ns, tid, cause, detail, woken_by in steps:
        at_ns = begin_ns
        for first_ns, last_ns in losses:
            if last_ns <= at_ns or first_ns >= end_ns or first_ns == last_ns:
                continue
            if first_ns > at_ns:
                result.append((at_ns, first_ns, tid, cause, detail, woken_by))
            at_ns = max(at_ns, first_ns)
            until_ns = min(last_ns, end_ns)
            result.append((at_ns, until_ns, tid, Cause.unexplained, "", 0))
            at_ns = until_ns
            if at_ns == end_ns:
                break
        if at_ns < end_ns:
            result.append((at_ns, end_ns, tid, cause, detail, woken_by))
    return result
