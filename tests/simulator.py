"""Threads on a few CPUs, simulated, with the records that the scheduler probe would make of them.

A thread is a generator: it yields `Run` and `Block`, everything else it does takes no time. Instants are exact, so a
scenario knows what the path of its request is to the nanosecond.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from random import Random
from typing import Any

import numpy as np

from exporter.critical_path import Window
from exporter.timeline import (
    BORN,
    EAGAIN,
    FIRST,
    IOWAIT,
    SENDING_CALLS,
    SPAN_RECLAIM,
    THROTTLED,
    TIMEOUT,
    WAKER_TARGET,
    MessageKind,
    Reason,
    Timeline,
    Waker,
)

INTERVAL = np.dtype(
    [
        ("off_ns", "u8"), ("wake_ns", "u8"), ("on_ns", "u8"), ("object", "u8"), ("ready_sk", "u8"), ("tid", "u4"),
        ("tgid", "u4"), ("waker_tid", "u4"), ("waker_tgid", "u4"), ("service", "u4"), ("sequence", "u4"),
        ("syscall", "u2"), ("cpu", "u2"), ("reason", "u1"), ("waker", "u1"), ("flags", "u1"), ("pad", "u1"),
    ]
)  # fmt: skip
MESSAGE = np.dtype(
    [
        ("at_ns", "u8"), ("sk", "u8"), ("tid", "u4"), ("tgid", "u4"), ("service", "u4"), ("result", "i4"),
        ("lost", "u4"), ("local_port", "u2"), ("peer_port", "u2"), ("kind", "u1"), ("family", "u1"), ("full", "u1"),
        ("pad", "u1", 5), ("peer", "u1", 16),
    ]
)  # fmt: skip
NAME = np.dtype([("at_ns", "u8"), ("tid", "u4"), ("tgid", "u4"), ("comm", "u1", 16)])
SPAN = np.dtype(
    [
        ("begin_ns", "u8"), ("end_ns", "u8"), ("tid", "u4"), ("tgid", "u4"), ("service", "u4"), ("kind", "u1"),
        ("pad", "u1", 3),
    ]
)  # fmt: skip

US, MS = 1_000, 1_000_000
SLICE_NS = 3 * MS
RETURN_NS = 700  # from the context switch to the thread's next doing
GIL_INTERVAL_NS = 5 * MS
NO_SYSCALL = 0xFFFF
FUTEX_CALL, EPOLL_CALL, RECV_CALL, SEND_CALL = 202, 232, 45, max(SENDING_CALLS, default=0)
AF_UNIX, AF_INET = 1, 2
SERVICE_PORT = 8000


@dataclass
class Run:
    """Use the CPU for so long."""

    ns: int


@dataclass
class Block:
    """Sleep until woken, or until the timeout. Yields whether it was woken."""

    reason: Reason
    object: int = 0
    syscall: int = NO_SYSCALL
    timeout_ns: int | None = None
    timer_waker: Waker = Waker.HARDIRQ
    flags: int = 0


Steps = Generator[Any, Any, Any]


@dataclass(eq=False)
class Thread:
    sim: Simulator
    tid: int
    tgid: int
    name: str
    target: bool
    cpus: frozenset[int]
    group: str
    steps: Steps
    cpu: int | None = None
    left_ns: int = 0  # of the run that it is in
    token: int = 0  # tells events that are no longer wanted
    asleep: bool = False
    stopped: bool = False
    woken: bool | None = None  # what the last Block comes back with
    sequence: int = 0
    off: dict[str, int] | None = None  # of the interval that it is in
    dead: bool = False


class Simulator:
    """The machine. `run_until` goes on; records are kept in the order in which they are made."""

    def __init__(self, cpus: int = 4) -> None:
        self.now = 1_000_000_000_000
        self.cpus: list[Thread | None] = [None] * cpus
        self.queue: list[Thread] = []
        self.throttled: set[str] = set()
        self.threads: dict[int, Thread] = {}
        self.intervals: list[dict[str, int]] = []
        self.messages: list[dict[str, Any]] = []
        self.spans: list[dict[str, int]] = []
        self._events: list[tuple[int, int, Callable[[], None]]] = []
        self._order = count()
        self._run_begun: dict[int, int] = {}  # tid -> when
        self._tids = count(1001)
        self._addresses = count(0x7F0000001000, 4096)

    # ---- the outside ----

    def at(self, at_ns: int, do: Callable[[], None]) -> None:
        heapq.heappush(self._events, (at_ns, next(self._order), do))

    def after(self, ns: int, do: Callable[[], None]) -> None:
        self.at(self.now + ns, do)

    def run_until(self, until_ns: int) -> None:
        while self._events and self._events[0][0] <= until_ns:
            self.now, _, do = heapq.heappop(self._events)
            do()
        self.now = max(self.now, until_ns)

    def address(self) -> int:
        return next(self._addresses)

    def thread(
        self,
        name: str,
        program: Callable[[Thread], Steps],
        *,
        tgid: int = 1000,
        target: bool = True,
        cpus: frozenset[int] | None = None,
        group: str = "",
        parent: Thread | None = None,
    ) -> Thread:
        tid = next(self._tids)
        everywhere = frozenset(range(len(self.cpus)))
        thread = Thread(self, tid, tgid, name, target, cpus or everywhere, group, iter(()))  # type: ignore[arg-type]
        thread.steps = program(thread)
        self.threads[tid] = thread
        thread.off = self._leaving(thread, Reason.OTHER, flags=BORN if parent else FIRST)
        if parent:
            thread.off |= {"waker": Waker.PARENT, "waker_tid": parent.tid, "wake_ns": self.now}
        else:
            thread.off["reason"] = Reason.CPU
        self.queue.append(thread)
        self.after(0, self._dispatch)
        return thread

    def stop(self, thread: Thread, ns: int) -> None:
        """SIGSTOP while it runs or could run, and SIGCONT from a process that is not watched."""
        assert not thread.asleep
        if thread.cpu is None:
            # As the kernel does: the signal is taken when it runs again.
            self.after(100, lambda: self.stop(thread, ns))
            return
        self._leave_cpu(thread, self._leaving(thread, Reason.STOPPED))
        thread.asleep = True
        self.after(ns, lambda: self.wake(thread, Waker.TASK, waker=None, waker_tid=77))
        self._dispatch()

    def throttle(self, group: str, ns: int) -> None:
        self.throttled.add(group)
        for thread in self.cpus:
            if thread is not None and thread.group == group:
                self._leave_cpu(thread, self._leaving(thread, Reason.CPU, flags=THROTTLED))
                self.queue.append(thread)
        self.after(ns, lambda: self._unthrottle(group))
        self._dispatch()

    def _unthrottle(self, group: str) -> None:
        self.throttled.discard(group)
        self._dispatch()

    # ---- the scheduler ----

    def _leaving(self, thread: Thread, reason: Reason, block: Block | None = None, flags: int = 0) -> dict[str, int]:
        block = block or Block(reason)
        if block.timeout_ns is not None and reason in {Reason.FUTEX, Reason.POLL, Reason.SOCKET}:
            flags |= TIMEOUT
        return {
            "off_ns": self.now, "wake_ns": 0, "object": block.object, "ready_sk": 0, "tid": thread.tid,
            "tgid": thread.tgid, "waker_tid": 0, "waker_tgid": 0, "syscall": block.syscall, "reason": int(reason),
            "waker": 0, "flags": flags | block.flags,
        }  # fmt: skip

    def _leave_cpu(self, thread: Thread, off: dict[str, int]) -> None:
        assert thread.cpu is not None
        thread.left_ns = max(0, thread.left_ns - (self.now - self._run_begun[thread.tid]))
        self.cpus[thread.cpu] = None
        thread.cpu = None
        thread.off = off
        thread.token += 1

    def _dispatch(self) -> None:
        for cpu, running in enumerate(self.cpus):
            if running is not None:
                continue
            for thread in self.queue:
                if cpu in thread.cpus and thread.group not in self.throttled:
                    self.queue.remove(thread)
                    self._enter_cpu(thread, cpu)
                    break

    def _enter_cpu(self, thread: Thread, cpu: int) -> None:
        thread.cpu = cpu
        self.cpus[cpu] = thread
        thread.sequence += 1
        assert thread.off is not None
        if thread.target:
            self.intervals.append(thread.off | {"on_ns": self.now, "sequence": thread.sequence, "cpu": cpu})
        thread.off = None
        thread.token += 1
        self._run_begun[thread.tid] = self.now
        if thread.left_ns:
            self._run(thread)
        else:
            self.after(RETURN_NS, self._if_current(thread, lambda: self._step(thread)))

    def _if_current(self, thread: Thread, do: Callable[[], None]) -> Callable[[], None]:
        token = thread.token
        return lambda: do() if thread.token == token and thread.cpu is not None else None

    def _run(self, thread: Thread) -> None:
        thread.token += 1
        self._run_begun[thread.tid] = self.now
        part = min(thread.left_ns, SLICE_NS)
        self.after(part, self._if_current(thread, lambda: self._ran(thread, part)))

    def _ran(self, thread: Thread, part: int) -> None:
        thread.left_ns -= part
        self._run_begun[thread.tid] = self.now
        waits = any(thread.cpu in other.cpus and other.group not in self.throttled for other in self.queue)
        if thread.left_ns and waits:
            left = thread.left_ns
            self._leave_cpu(thread, self._leaving(thread, Reason.CPU))
            thread.left_ns = left
            self.queue.append(thread)
            self._dispatch()
        elif thread.left_ns:
            self._run(thread)
        else:
            self._step(thread)

    def _step(self, thread: Thread) -> None:
        """Let the thread do what takes no time, until it runs, sleeps or ends."""
        while True:
            try:
                asked = thread.steps.send(thread.woken)
            except StopIteration:
                thread.dead = True
                assert thread.cpu is not None
                self.cpus[thread.cpu] = None
                thread.cpu = None
                self._dispatch()
                return
            if isinstance(asked, Run):
                if asked.ns:
                    thread.left_ns = asked.ns
                    self._run(thread)
                    return
                continue
            assert isinstance(asked, Block)
            thread.left_ns = 0
            self._leave_cpu(thread, self._leaving(thread, asked.reason, asked))
            thread.asleep, thread.woken = True, True
            if asked.timeout_ns is not None:
                self.after(asked.timeout_ns, partial(self._time_out, thread, thread.token, asked.timer_waker))
            self._dispatch()
            return

    def _time_out(self, thread: Thread, token: int, waker: Waker) -> None:
        if thread.asleep and thread.token == token:
            self.wake(thread, waker, waker=None)
            thread.woken = False

    def wake(self, thread: Thread, kind: Waker, waker: Thread | None, *, ready_sk: int = 0, waker_tid: int = 0) -> None:
        if not thread.asleep:
            return
        assert thread.off is not None
        thread.asleep, thread.woken = False, True
        thread.off |= {"wake_ns": self.now, "waker": int(kind), "ready_sk": ready_sk, "waker_tid": waker_tid}
        if waker is not None:
            thread.off |= {"waker_tid": waker.tid, "waker_tgid": waker.tgid}
            thread.off["flags"] |= WAKER_TARGET if waker.target else 0
        if thread.group in self.throttled:
            thread.off["flags"] |= THROTTLED
        self.queue.append(thread)
        self.after(0, self._dispatch)

    # ---- records ----

    def message(self, kind: MessageKind, sock: Sock, thread: Thread, result: int = 0) -> None:
        self.messages.append(
            {
                "at_ns": self.now, "sk": sock.sk, "tid": thread.tid, "tgid": thread.tgid, "result": result,
                "local_port": sock.local_port, "peer_port": sock.peer_port, "kind": int(kind), "family": sock.family,
                "peer": sock.peer.ljust(16, b"\0"),
            }
        )  # fmt: skip

    def interval_records(self) -> np.ndarray:
        return as_records(self.intervals, INTERVAL)

    def message_records(self) -> np.ndarray:
        return as_records(self.messages, MESSAGE)

    def span_records(self) -> np.ndarray:
        return as_records(self.spans, SPAN)

    def timeline(self, limit_bytes: int = 1 << 24) -> Timeline:
        timeline = Timeline(limit_bytes)
        timeline.add_intervals(self.interval_records())
        timeline.add_messages(self.message_records())
        timeline.add_spans(self.span_records())
        return timeline


def as_records(rows: list[dict[str, Any]], dtype: np.dtype[np.void]) -> np.ndarray:
    records = np.zeros(len(rows), dtype)
    for name in dtype.names or ():
        base = dtype[name]
        if base.shape:
            texts = [row.get(name, b"").ljust(base.shape[0], b"\0") for row in rows]
            records[name] = np.frombuffer(b"".join(texts), np.uint8).reshape(len(rows), *base.shape)
        else:
            records[name] = np.array([row.get(name, 0) for row in rows], base)
    return records


# ---- what threads use ----


@dataclass(eq=False)
class Sock:
    """The reading end of a socket. `inside`: between threads of the service; `client`: a request's connection."""

    sim: Simulator
    inside: bool = True
    client: bool = False
    sk: int = 0
    peer: bytes = b""
    peer_port: int = 0
    local_port: int = 0
    family: int = AF_UNIX
    items: deque[Any] = field(default_factory=deque)
    waiters: list[Thread] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.sk = self.sk or 0xFFFF000000000000 + self.sim.address()
        if not self.inside:
            self.family = AF_INET

    def send(self, sender: Thread, item: object) -> None:
        """By a thread of this host; wakes the reader with the bytes."""
        if sender.target and self.inside:
            self.sim.message(MessageKind.READY, self, sender)
        self._put(item, Waker.MESSAGE, sender)

    def deliver(self, item: object) -> None:
        """By the network."""
        self._put(item, Waker.NETWORK, None)

    def _put(self, item: object, kind: Waker, sender: Thread | None) -> None:
        self.items.append(item)
        for thread in self.waiters[:]:
            self.sim.wake(thread, kind, sender, ready_sk=self.sk)

    def ask(self, sender: Thread, latency_ns: int, answer: object = b"answer") -> None:
        """Send to the peer outside, which answers after a while."""
        self.sim.message(MessageKind.SENT, self, sender, 100)
        self.sim.after(latency_ns, lambda: self.deliver(answer))

    def take(self, reader: Thread) -> list[Any]:
        """Receive what is there, without waiting."""
        items = list(self.items)
        self.items.clear()
        if items and not self.client:
            self.sim.message(MessageKind.RECEIVED, self, reader, 100)
        for item in items:
            if isinstance(item, Request) and item.read_ns is None:
                item.read_ns, item.reader_tid = self.sim.now, reader.tid
        return items


def receive(reader: Thread, sock: Sock) -> Steps:
    """A blocking receive."""
    while not sock.items:
        sock.waiters.append(reader)
        yield Block(Reason.SOCKET, sock.sk, RECV_CALL)
        sock.waiters.remove(reader)
    return sock.take(reader)


def poll(reader: Thread, socks: list[Sock], timeout_ns: int | None = None) -> Steps:
    """Wait for one of the sockets; the ones that are ready."""
    if not any(sock.items for sock in socks) and timeout_ns != 0:
        for sock in socks:
            sock.waiters.append(reader)
        yield Block(Reason.POLL, 0, EPOLL_CALL, timeout_ns)
        for sock in socks:
            sock.waiters.remove(reader)
    return [sock for sock in socks if sock.items]


class Lock:
    """A futex lock, handed to the one that waits longest."""

    def __init__(self, sim: Simulator) -> None:
        self.sim = sim
        self.address = sim.address()
        self.holder: Thread | None = None
        self.waiters: deque[Thread] = deque()

    def acquire(self, thread: Thread) -> Steps:
        if self.holder is None:
            self.holder = thread
            return
        self.waiters.append(thread)
        yield Block(Reason.FUTEX, self.address, FUTEX_CALL)

    def release(self, thread: Thread) -> None:
        assert self.holder is thread
        self.holder = self.waiters.popleft() if self.waiters else None
        if self.holder is not None:
            self.sim.wake(self.holder, Waker.TASK, thread)


class Queue:
    """Items by futex: a semaphore that producers post and consumers wait for."""

    def __init__(self, sim: Simulator) -> None:
        self.sim = sim
        self.address = sim.address()
        self.items: deque[Any] = deque()
        self.waiters: deque[Thread] = deque()

    def put(self, thread: Thread, item: object) -> None:
        self.items.append(item)
        if self.waiters:
            self.sim.wake(self.waiters.popleft(), Waker.TASK, thread)

    def get(self, thread: Thread, timeout_ns: int | None = None) -> Steps:
        while not self.items:
            self.waiters.append(thread)
            woken = yield Block(Reason.FUTEX, self.address, FUTEX_CALL, timeout_ns)
            if not woken:
                if thread in self.waiters:
                    self.waiters.remove(thread)
                return None
        return self.items.popleft()


class Gil:
    """CPython's: a waiter asks for it after each 5 ms; the holder lets go at its next check and waits to be relieved"""

    CHECK_NS = 50 * US

    def __init__(self, sim: Simulator) -> None:
        self.sim = sim
        base = sim.address()
        self.cond, self.switch_cond = base + 16, base + 16 + 88
        self.holder: Thread | None = None
        self.drop_requested = False
        self.waiters: deque[Thread] = deque()
        self.dropper: Thread | None = None

    def acquire(self, thread: Thread) -> Steps:
        while self.holder is not None:
            self.waiters.append(thread)
            woken = yield Block(Reason.FUTEX, self.cond, FUTEX_CALL, GIL_INTERVAL_NS)
            if not woken:
                if thread in self.waiters:
                    self.waiters.remove(thread)
                if self.holder is not None:
                    self.drop_requested = True
        self.holder = thread
        self.drop_requested = False
        if self.dropper is not None:
            dropper, self.dropper = self.dropper, None
            self.sim.wake(dropper, Waker.TASK, thread)

    def release(self, thread: Thread) -> None:
        assert self.holder is thread
        self.holder = None
        if self.waiters:
            self.sim.wake(self.waiters.popleft(), Waker.TASK, thread)

    def compute(self, thread: Thread, ns: int) -> Steps:
        """Run Python for so long, with the GIL."""
        while ns > 0:
            part = min(ns, self.CHECK_NS)
            yield Run(part)
            ns -= part
            if self.drop_requested:
                self.release(thread)
                self.dropper = thread
                yield Block(Reason.FUTEX, self.switch_cond, FUTEX_CALL)
                yield from self.acquire(thread)


def work(ns: int) -> Steps:
    yield Run(ns)


def nothing() -> Steps:
    yield Run(0)


def disk(ns: int) -> Steps:
    yield Block(Reason.DISK, 0, 17, ns, Waker.SOFTIRQ, IOWAIT)


def sleep(ns: int) -> Steps:
    yield Block(Reason.TIMER, 0, 230, ns)


def reclaim(thread: Thread, run_ns: int, sleep_ns: int, kind: int = SPAN_RECLAIM) -> Steps:
    """Direct reclaim, or a wait for a GPU: some of it on the CPU, some of it asleep."""
    begin_ns = thread.sim.now
    yield Run(run_ns)
    if sleep_ns:
        yield Block(Reason.OTHER, 0, NO_SYSCALL, sleep_ns, Waker.HARDIRQ)
    yield Run(run_ns)
    span = {"begin_ns": begin_ns, "end_ns": thread.sim.now, "tid": thread.tid, "tgid": thread.tgid}
    thread.sim.spans.append(span | {"kind": kind})


# ---- requests ----


@dataclass(eq=False)
class Request:
    """A request of a client, from its arrival to its first token."""

    number: int
    arrived_ns: int = 0
    read_ns: int | None = None
    reader_tid: int | None = None
    submitted_ns: int = 0  # the loop sent it to the engine
    done_ns: int = 0  # the engine sent its token to the loop
    token_ns: int | None = None
    writer_tid: int | None = None
    steps: int = 3  # of an engine, until its token
    peer: bytes = bytes((192, 0, 2, 7))
    peer_port: int = 50_000

    def arrive(self, sock: Sock) -> None:
        self.arrived_ns = sock.sim.now
        sock.deliver(self)

    def write(self, writer: Thread) -> None:
        if self.token_ns is None:
            self.token_ns, self.writer_tid = writer.sim.now, writer.tid

    def window(self) -> Window:
        assert self.token_ns is not None and self.writer_tid is not None
        return Window(
            self.arrived_ns, self.token_ns, self.writer_tid, self.arrived_ns, self.read_ns, self.reader_tid,
            self.peer.ljust(16, b"\0"), self.peer_port,
        )  # fmt: skip


def stalled_send(writer: Thread, sock: Sock, ns: int) -> Steps:
    """A send that finds no room, a wait for some by epoll, and the send again."""
    writer.sim.message(MessageKind.SENT, sock, writer, -EAGAIN)
    yield Run(1 * US)
    yield Block(Reason.POLL, 0, EPOLL_CALL, ns, Waker.SOFTIRQ)
    yield Run(2 * US)


class RolePlay:
    """The example's shape: an event loop, an engine process, and one socket pair between them for all requests.

    `step_ns` is the engine's step. Hooks are generators that run inside a step of the engine or a turn of the loop.
    """

    READ_NS, SUBMIT_NS, FRAME_NS = 200 * US, 50 * US, 100 * US

    def __init__(self, sim: Simulator, step_ns: int = 10 * MS, **where: dict[str, Any]) -> None:
        self.sim = sim
        self.step_ns = step_ns
        self.to_engine, self.to_loop = Sock(sim), Sock(sim)
        self.clients: list[Sock] = []
        self.engine_hook: Callable[[Thread, int], Steps] | None = None
        self.read_hook: Callable[[Thread, Request], Steps] | None = None
        self.write_hook: Callable[[Thread, Request], Steps] | None = None
        self.loop = sim.thread("loop", self._loop, tgid=1000, **where.get("loop", {}))
        self.engine = sim.thread("engine", self._engine, tgid=2000, **where.get("engine", {}))
        self.engine_steps = 0

    def request(self, number: int, at_ns: int, steps: int = 3) -> Request:
        request = Request(number, steps=steps)
        sock = Sock(self.sim, inside=False, client=True, local_port=SERVICE_PORT)
        self.clients.append(sock)
        self.sim.at(at_ns, lambda: request.arrive(sock))
        return request

    def _loop(self, me: Thread) -> Steps:
        while True:
            ready = yield from poll(me, [self.to_loop, *self.clients], None)
            for sock in ready:
                for item in sock.take(me):
                    if isinstance(item, Request):
                        yield Run(self.READ_NS)
                        if self.read_hook:
                            yield from self.read_hook(me, item)
                        item.submitted_ns = self.sim.now
                        self.to_engine.send(me, item)
                        yield Run(self.SUBMIT_NS)
                    else:
                        for request in item:
                            yield Run(self.FRAME_NS)
                            if self.write_hook:
                                yield from self.write_hook(me, request)
                            request.write(me)

    def _engine(self, me: Thread) -> Steps:
        running: dict[int, tuple[Request, int]] = {}
        while True:
            ready = yield from poll(me, [self.to_engine], 0 if running else None)
            for sock in ready:
                for request in sock.take(me):
                    yield Run(20 * US)
                    running[request.number] = (request, request.steps)
            if not running:
                continue
            if self.engine_hook:
                yield from self.engine_hook(me, self.engine_steps)
            self.engine_steps += 1
            yield Run(self.step_ns)
            done = []
            for number, (request, left) in list(running.items()):
                running[number] = (request, left - 1)
                if left == 1:
                    done.append(request)
                    del running[number]
            for request in done:
                request.done_ns = self.sim.now
            self.to_loop.send(me, done)
            yield Run(10 * US)


def random_schedule(seed: int, requests: int = 7) -> tuple[Simulator, list[Request]]:
    """A role-play service, a worker pool, locks and background threads, all at random, on too few CPUs."""
    random = Random(seed)
    sim = Simulator(cpus=random.randint(1, 3))
    service = RolePlay(sim, step_ns=random.randint(1, 9) * MS)
    lock, gil, jobs = Lock(sim), Gil(sim), Queue(sim)
    upstream = Sock(sim, inside=False, local_port=41_000, peer_port=6379, peer=bytes((198, 51, 100, 9)))

    def worker(me: Thread) -> Steps:
        while True:
            answer = yield from jobs.get(me)
            yield from mess(me, 2)
            answer.put(me, "done")

    def background(me: Thread) -> Steps:
        while True:
            yield from sleep(random.randint(1, 20) * MS)
            yield from gil.acquire(me)
            yield from gil.compute(me, random.randint(1, 12) * MS)
            gil.release(me)
            yield from lock.acquire(me)
            yield Run(random.randint(1, 4) * MS)
            lock.release(me)

    def newborn(me: Thread) -> Steps:
        yield Run(random.randint(1, 300) * US)
        yield from sleep(random.randint(1, 3) * MS)

    def mess(me: Thread, most: int) -> Steps:
        for _ in range(random.randint(0, most)):
            kind = random.randint(0, 8)
            if kind == 0:
                yield from disk(random.randint(1, 3000) * US)
            elif kind == 1:
                yield from lock.acquire(me)
                yield Run(random.randint(1, 900) * US)
                lock.release(me)
            elif kind == 2:
                yield from gil.acquire(me)
                yield from gil.compute(me, random.randint(1, 2000) * US)
                gil.release(me)
            elif kind == 3:
                yield from reclaim(me, random.randint(1, 500) * US, random.randint(0, 2) * MS)
            elif kind == 4:
                yield from sleep(random.randint(1, 3000) * US)
            elif kind == 5 and me is service.loop:
                upstream.ask(me, random.randint(1, 8) * MS)
                yield from receive(me, upstream)
            elif kind == 6 and me in {service.loop, service.engine}:
                answer = Queue(sim)
                jobs.put(me, answer)
                yield from answer.get(me)
            elif kind == 7:
                sim.thread("newborn", newborn, parent=me)
            else:
                yield Run(random.randint(1, 2000) * US)

    service.engine_hook = lambda me, _step: mess(me, 2)
    service.read_hook = lambda me, _request: mess(me, 2)
    service.write_hook = lambda me, _request: mess(me, 1)
    for _ in range(random.randint(1, 3)):
        sim.thread("worker", worker)
    for _ in range(random.randint(0, 2)):
        sim.thread("background", background)
    if random.random() < 0.3:
        sim.thread("hog", lambda me: iter_hog(), target=False)
    start_ns = sim.now
    made = [
        service.request(
            number, start_ns + random.randint(1, 150) * MS + random.randint(0, 999_999), random.randint(1, 4)
        )
        for number in range(requests)
    ]
    for _ in range(random.randint(0, 2)):
        sim.at(start_ns + random.randint(1, 200) * MS, lambda: sim.throttle("", random.randint(1, 20) * MS))
    while any(request.token_ns is None for request in made):
        assert sim.now < start_ns + 10_000 * MS
        sim.run_until(sim.now + 20 * MS)
    return sim, made


def iter_hog() -> Steps:
    while True:
        yield Run(7 * MS)
        yield from sleep(3 * MS)
