"""What the tests of the requests probe share: the loaded probe over both transports, workload servers, and clients.

The probe is loaded and attached once per transport, because detaching it takes the kernel a second. Each test follows
only the server that it started, and what is counted is counted from the test's beginning.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import select
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import pytest

from exporter.config import Match, Service
from exporter.request import Capture, FinishedRequest
from exporter.requests import Conversations
from exporter.slis import Slis
from probes import host
from probes.probe import OBJECTS, Count, Transport
from probes.records import Handler, RequestRecords
from probes.requests import RequestsProbe

SERVE = Path(__file__).parent / "workloads" / "serve.py"
PATIENCE_S = 10.0
"""After this time something that should have happened has not."""
STREAMS: Mapping[str, tuple[Count, Count]] = {
    "events": (Count.SEEN_EVENTS, Count.LOST_EVENTS_RING_FULL),
    "reads": (Count.SEEN_READS, Count.LOST_READS_RING_FULL),
    "writes": (Count.SEEN_WRITES, Count.LOST_WRITES_RING_FULL),
}
TCP_CLOSE = 7
PAGE = 4096
"""No address is smaller, and no descriptor of these tests is larger."""


# ---- what the probe saw ----


@dataclass
class Stretch:
    """One record of bytes, see `probes.records.Handler.read`."""

    at_ns: int
    position: int
    data: bytes
    uncaptured: int
    lost: int
    lost_other: int
    service: int
    tgid: int
    tid: int


@dataclass
class State:
    """One change of state, see `probes.records.Handler.state`."""

    old: int
    new: int
    tgid: int
    rx_position: int
    tx_position: int
    error: int


@dataclass
class Seen:
    """All that was seen of one connection."""

    conn: int
    service: int
    peer: str
    born: bool
    rx_position: int
    tx_position: int
    accepted: list[int] = field(default_factory=list)
    segments: list[tuple[int, int, int]] = field(default_factory=list)  # position, size, ns
    states: list[State] = field(default_factory=list)
    resets: int = 0
    reads: list[Stretch] = field(default_factory=list)
    writes: list[Stretch] = field(default_factory=list)

    @property
    def closed(self) -> bool:
        return any(state.new == TCP_CLOSE for state in self.states)

    @property
    def read_bytes(self) -> list[bytes | int]:
        """What was read, in order: bytes, or how many are missing. Fails where the positions do not fit together."""
        return _assembled(self.reads, self.rx_position)

    @property
    def written_bytes(self) -> list[bytes | int]:
        """The same of what was written."""
        return _assembled(self.writes, self.tx_position)


def _assembled(stretches: Sequence[Stretch], position: int) -> list[bytes | int]:
    parts: list[bytes | int] = []
    for stretch in stretches:
        assert stretch.position == position % 2**32, "a stretch does not begin where the last one ended"
        position += len(stretch.data) + stretch.uncaptured
        if stretch.data:
            if parts and isinstance(parts[-1], bytes):
                parts[-1] += stretch.data
            else:
                parts.append(stretch.data)
        if stretch.uncaptured:
            parts.append(stretch.uncaptured)
    return parts


class Recorder:
    """A `Handler` that keeps everything, by connection, in the order in which they were opened."""

    def __init__(self) -> None:
        self.connections: dict[int, Seen] = {}
        self.strangers: set[int] = set()
        """Connections of which something came without their `opened`."""

    @property
    def only(self) -> Seen:
        (seen,) = self.connections.values()
        return seen

    @property
    def all_closed(self) -> bool:
        return bool(self.connections) and all(seen.closed for seen in self.connections.values())

    def _of(self, conn: int) -> Seen:
        if conn not in self.connections:
            self.strangers.add(conn)
            return Seen(conn, 0, "", False, 0, 0)
        return self.connections[conn]

    def opened(
        self, conn: int, seen_ns: int, service: int, peer: str, born: bool, rx_position: int, tx_position: int
    ) -> None:
        assert conn not in self.connections, "the number of a connection was used twice"
        self.connections[conn] = Seen(conn, service, peer, born, rx_position, tx_position)

    def accepted(self, conn: int, service: int) -> None:
        self._of(conn).accepted.append(service)

    def segment(self, conn: int, seen_ns: int, position: int, size: int) -> None:
        self._of(conn).segments.append((position, size, seen_ns))

    def state(self, conn: int, seen_ns: int, *state: int) -> None:
        self._of(conn).states.append(State(*state))

    def reset(self, conn: int, seen_ns: int) -> None:
        self._of(conn).resets += 1

    def read(self, conn: int, at_ns: int, position: int, data: bytes, *rest: int) -> None:
        self._of(conn).reads.append(Stretch(at_ns, position, data, *rest))

    def wrote(self, conn: int, at_ns: int, position: int, data: bytes, *rest: int) -> None:
        self._of(conn).writes.append(Stretch(at_ns, position, data, *rest))


class Requests(Conversations):
    """The real `Conversations` over the real SLIs, with lists of what it finished and of what it said was captured."""

    def __init__(self, services: Sequence[str] = ("tested",), limit: int = 65536) -> None:
        self.slis = RecordingSlis()
        self.done: list[FinishedRequest] = []
        wanted = [Service(name, Match(port=(1,))) for name in services]
        super().__init__(wanted, (), self.slis, self.done.append, limit)

    @property
    def only(self) -> FinishedRequest:
        (request,) = self.done
        return request

    @property
    def captured(self) -> list[Capture]:
        """The outcome of every request that was noticed, also of those that nothing more is known of."""
        return self.slis.captured


class RecordingSlis(Slis):
    def __init__(self) -> None:
        super().__init__()
        self.captured: list[Capture] = []

    def capture(self, service: str, outcome: Capture) -> None:
        self.captured.append(outcome)
        super().capture(service, outcome)


# ---- the probe ----


def netns() -> int:
    """The inode number of this process's network namespace."""
    return Path("/proc/self/ns/net").stat().st_ino


class Probe:
    """The attached probe with its records, shared by the tests of one transport."""

    def __init__(self, probe: RequestsProbe, records: RequestRecords) -> None:
        self.raw = probe
        self.records = records
        self._seen_at_start: dict[str, int] = {}

    def counts(self) -> dict[Count, int]:
        return self.raw.counts()

    def undelivered(self) -> dict[str, int]:
        """Records by stream that were made and not lost, but have not come yet. Never negative."""
        counts = self.counts()
        return {
            stream: counts[seen] - counts[lost] - self.records.delivered[stream]
            for stream, (seen, lost) in STREAMS.items()
        }

    def drain(self, handler: Handler) -> None:
        """Hand over everything that was made: what was seen is what was delivered and what was lost, exactly."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            self.records.drain(handler)
            missing = self.undelivered()
            if not any(missing.values()):
                return
            assert min(missing.values()) >= 0, f"more records came than were made: {missing}"
            assert time.monotonic() < deadline, f"records that were seen and not lost did not come: {missing}"
            time.sleep(0.001)


def _require_host() -> None:
    """Fail, not skip, where these tests cannot run: they would have shown nothing."""
    if os.geteuid() != 0:
        pytest.fail("tests/kernel load BPF programs: run them as root (sudo make test)", pytrace=False)
    if platform.system() != "Linux":
        pytest.fail("tests/kernel need a Linux kernel with BTF", pytrace=False)
    folder = Path(__file__).parents[2] / "bpf"
    for source in folder.glob("*.bpf.c"):
        built = OBJECTS / source.name.replace(".bpf.c", ".bpf.o")
        if not built.exists():
            pytest.fail(f"{built} is not built: make bpf", pytrace=False)
        newest = max([source, *folder.glob("*.h")], key=lambda path: path.stat().st_mtime)
        if newest.stat().st_mtime > built.stat().st_mtime:
            pytest.fail(f"{built} is older than {newest.name}: make bpf", pytrace=False)
    if host.find_tracefs() is None:
        host.mount_tracefs()
    error = host.examine().error()
    if error is not None:
        pytest.fail(f"this host cannot run the probe: {error}", pytrace=False)


@pytest.fixture(scope="session", autouse=True)
def able_host() -> None:
    """The host can run the probe; the test fails with what to do where it cannot."""
    _require_host()


@contextlib.contextmanager
def loaded(
    transport: Transport, *, connections: int = 65536, sizes: Mapping[str, int] | None = None
) -> Iterator[Probe]:
    """A probe of its own, loaded and not yet attached, with its records."""
    with ExitStack() as stack:
        probe = stack.enter_context(RequestsProbe(transport, connections=connections, sizes=sizes))
        yield Probe(probe, stack.enter_context(RequestRecords(probe.channels)))


@pytest.fixture(scope="session", params=list(Transport), ids=lambda transport: transport.value)
def transport(request: pytest.FixtureRequest, able_host: None) -> Transport:
    """Each transport in turn."""
    value: Transport = request.param
    return value


@pytest.fixture(scope="session")
def shared_probe(transport: Transport) -> Iterator[Probe]:
    """The attached probe of ordinary size."""
    with loaded(transport) as probe:
        probe.raw.attach()
        yield probe


@dataclass
class Span:
    """From one instant to another, CLOCK_MONOTONIC ns."""

    start_ns: int
    end_ns: int = 0

    def __contains__(self, instant_ns: object) -> bool:
        return isinstance(instant_ns, int) and self.start_ns <= instant_ns <= self.end_ns


class Watch:
    """What one test sees of the probe: a handler, and the counters from the test's beginning."""

    def __init__(self, probe: Probe) -> None:
        self.probe = probe
        self._before = probe.counts()
        self._delivered = dict(probe.records.delivered)

    def follow(self, *servers: Server) -> None:
        """Follow these servers and nothing else; the first one is service 0, and so on."""
        self.probe.raw.follow(
            {server.pid: index for index, server in enumerate(servers)},
            {(netns(), server.port): index for index, server in enumerate(servers)},
        )

    def drain(self, handler: Handler) -> None:
        """See `Probe.drain`. Only when nothing is going on any more is it known that nothing more will come."""
        self.probe.drain(handler)

    def until(self, handler: Handler, happened: Callable[[], object], what: str) -> None:
        """Drain until something has happened; fails when it does not."""
        deadline = time.monotonic() + PATIENCE_S
        while not happened():
            assert time.monotonic() < deadline, f"did not happen within {PATIENCE_S:.0f} s: {what}"
            self.drain(handler)
            time.sleep(0.0005)
        self.drain(handler)

    @contextlib.contextmanager
    def events(self, count: int) -> Iterator[Span]:
        """What is done within makes `count` events in the kernel; leaving waits for them.

        A segment, FIN or RST is handled before its send() or close() returns, but not on a busy machine: there a kernel
        thread does it later. What must come first has to be waited for.
        """
        before = self.counted(Count.SEEN_EVENTS)
        span = Span(time.monotonic_ns())
        yield span
        deadline = time.monotonic() + PATIENCE_S
        while self.counted(Count.SEEN_EVENTS) - before < count:
            assert time.monotonic() < deadline, f"{count} events did not happen within {PATIENCE_S:.0f} s"
            time.sleep(0.0002)
        span.end_ns = time.monotonic_ns()

    def connect(self, server: Server) -> socket.socket:
        """A client's connection that the server has accepted and, with that, made its two first events."""
        with self.events(2):
            return server.connect()

    def counted(self, what: Count) -> int:
        """How much a counter grew since the test began."""
        return self.probe.counts()[what] - self._before[what]

    def delivered(self, stream: str) -> int:
        """Records that came since the test began."""
        return self.probe.records.delivered[stream] - self._delivered[stream]

    def reasons(self) -> dict[Count, int]:
        """Every way to lose something that was counted since the test began."""
        now = self.probe.counts()
        return {
            reason: now[reason] - self._before[reason]
            for reason in RequestsProbe.loss_counts()
            if now[reason] != self._before[reason]
        }


class Recorded(Watch):
    """A watch that records what the kernel said."""

    def __init__(self, probe: Probe) -> None:
        super().__init__(probe)
        self.recorder = Recorder()

    def until_closed(self, count: int = 1) -> None:
        """Drain until `count` connections were opened and all are closed."""
        try:
            self.until(
                self.recorder,
                lambda: len(self.recorder.connections) >= count and self.recorder.all_closed,
                f"{count} connections closed",
            )
        except AssertionError as error:
            for seen in self.recorder.connections.values():
                states = ", ".join(f"{state.old}->{state.new}" for state in seen.states)
                error.add_note(f"born {seen.born}, states {states or 'none'}, {len(seen.segments)} segments")
            strangers = len(self.recorder.strangers)
            error.add_note(f"{len(self.recorder.connections)} opened, {strangers} strangers, {self.reasons()}")
            raise
        assert len(self.recorder.connections) == count
        assert not self.recorder.strangers


class Followed(Watch):
    """A watch that turns what the kernel said into requests."""

    def __init__(self, probe: Probe) -> None:
        super().__init__(probe)
        self.requests = Requests()

    def until_done(self, count: int = 1) -> list[FinishedRequest]:
        """Drain until every connection is closed; exactly `count` requests were finished."""
        self.until(
            self.requests,
            lambda: len(self.requests.done) >= count and not len(self.requests),
            f"{count} requests finished and every connection closed",
        )
        assert len(self.requests.done) == count
        return self.requests.done


@pytest.fixture
def recorded(shared_probe: Probe) -> Iterator[Recorded]:
    """See `Recorded`; over both transports."""
    with _quiet(shared_probe):
        yield Recorded(shared_probe)


@pytest.fixture
def followed(shared_probe: Probe) -> Iterator[Followed]:
    """See `Followed`; over both transports."""
    with _quiet(shared_probe):
        yield Followed(shared_probe)


@contextlib.contextmanager
def _quiet(probe: Probe) -> Iterator[None]:
    """Nothing is followed before and after, and what another test left is gone."""
    probe.drain(Recorder())
    try:
        yield
    finally:
        probe.raw.follow({}, {})


# ---- servers ----


class Server:
    """A workload that runs; see tests/kernel/workloads/serve.py."""

    def __init__(self, plan: Mapping[str, object]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-S", "-E", str(SERVE)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        text = json.dumps(plan).encode()
        assert self._process.stdin is not None
        self._process.stdin.write(b"%d\n%s" % (len(text), text))
        self._process.stdin.flush()
        self.pid = self._process.pid
        self.host = str(plan["listen"])
        self._unread = b""
        self.port = int(self.heard("port"))

    def heard(self, word: str) -> str:
        """Wait for the next line that the server says; it must begin with `word`. Returns the rest of it."""
        out = self._process.stdout
        assert out is not None
        deadline = time.monotonic() + PATIENCE_S
        while b"\n" not in self._unread:
            ready, _, _ = select.select([out], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"the server did not say {word!r} within {PATIENCE_S:.0f} s"
            more = os.read(out.fileno(), 65536)
            assert more, f"the server ended before it said {word!r}"
            self._unread += more
        line, _, self._unread = self._unread.partition(b"\n")
        said, _, rest = line.decode().partition(" ")
        assert said == word, f"the server said {line.decode()!r}, expected {word!r}"
        return rest

    def done(self, count: int = 1) -> None:
        """Wait until the server is through with `count` connections."""
        for _ in range(count):
            self.heard("done")

    def go(self) -> None:
        """Let the server pass its next `wait`."""
        assert self._process.stdin is not None
        os.write(self._process.stdin.fileno(), b"\n")

    def sits_in_call_on(self, descriptor: int) -> None:
        """Wait until its main thread sleeps in a system call on this descriptor."""
        self._until(lambda: self._descriptor_of_call(self.pid) == descriptor, f"waits on descriptor {descriptor}")

    def all_threads_sit_in_calls(self, count: int) -> None:
        """Wait until it has `count` threads and each of them sleeps in a system call on a descriptor."""

        def sit() -> bool:
            calls = [self._descriptor_of_call(int(task.name)) for task in Path(f"/proc/{self.pid}/task").iterdir()]
            return len(calls) == count and None not in calls

        self._until(sit, f"has {count} threads that wait on descriptors")

    def _descriptor_of_call(self, tid: int) -> int | None:
        """The first argument of the call that a thread sleeps in, where it can be a descriptor and no address."""
        words = Path(f"/proc/{self.pid}/task/{tid}/syscall").read_text().split()
        first = int(words[1], 16) if len(words) > 1 else PAGE
        return first if first < PAGE else None

    def _until(self, happened: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not happened():
            assert time.monotonic() < deadline, f"not within {PATIENCE_S:.0f} s: the server {what}"
            time.sleep(0.002)

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        self.kill()
        for end in (self._process.stdin, self._process.stdout):
            assert end is not None
            end.close()

    def connect(self) -> socket.socket:
        """A client's connection to it."""
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        client = socket.socket(family, socket.SOCK_STREAM)
        client.settimeout(PATIENCE_S)
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        client.connect((self.host, self.port))
        return client


class StartServer(Protocol):
    """Starts a workload server, which ends with the test."""

    def __call__(
        self,
        *steps: list[Any],
        manner: str = "one_by_one",
        accept: str = "accept4",
        listen: str = "127.0.0.1",
        workers: int = 0,
        wait: bool = False,
    ) -> Server: ...


@pytest.fixture
def serve() -> Iterator[StartServer]:
    """Start a server that does `steps` on each connection."""
    with ExitStack() as stack:

        def start(
            *steps: list[Any],
            manner: str = "one_by_one",
            accept: str = "accept4",
            listen: str = "127.0.0.1",
            workers: int = 0,
            wait: bool = False,
        ) -> Server:
            plan = {
                "listen": listen,
                "accept": accept,
                "manner": "workers" if workers else manner,
                "workers": workers,
                "wait": wait,
                "steps": steps,
            }
            return stack.enter_context(contextlib.closing(Server(plan)))

        yield start


# ---- clients ----


def receive(client: socket.socket, size: int) -> bytes:
    """Exactly `size` bytes, or what came before the end."""
    data = bytearray()
    while len(data) < size:
        more = client.recv(size - len(data))
        if not more:
            break
        data += more
    return bytes(data)


def receive_all(client: socket.socket) -> bytes:
    """Everything until the end of the stream."""
    data = bytearray()
    while more := client.recv(65536):
        data += more
    return bytes(data)


def reset(client: socket.socket) -> None:
    """End the connection by RST."""
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("=ii", 1, 0))
    client.close()


def address_of(client: socket.socket) -> str:
    """The client's address as the agent names a peer."""
    host_name, port = client.getsockname()[:2]
    return f"[{host_name}]:{port}" if ":" in host_name else f"{host_name}:{port}"
