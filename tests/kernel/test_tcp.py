"""The tcp probe against real connections, each number with a known cause.

The other side is the test process, which is no target. Where the network itself must do something (take time, lose a
packet), both sides are in namespaces of their own with a wire between them, see tests/kernel/workloads/wire.py.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import json
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exporter.families import Scrape
from exporter.kernel_metrics import kernel_families
from exporter.status import ReaderStatus
from probes import libbpf
from probes.btf import enum_of
from probes.channels import open_source
from probes.probe import Count, Transport
from probes.requests import RequestsProbe
from probes.service_stats import ServiceStats
from probes.tcp import TcpProbe
from tests.kernel.conftest import PATIENCE_S, netns, reset
from tests.kernel.workloads.wire import LEFT, RIGHT, Wire, payload_of

SOCKETS = Path(__file__).parent / "workloads" / "sockets.py"
TCP_CLOSE = b"\x07"
"""The state of a connection that was reset, in the first byte of TCP_INFO."""
HOSTS = {socket.AF_INET: "127.0.0.1", socket.AF_INET6: "::1"}
RETRANSMIT, RESET_SENT, RESET_RECEIVED, CONNECTED, SEND_STALL = range(1, 6)
TOO_MUCH_BYTES = 40 << 20
"""More than the buffers of both ends of a connection hold."""


# ---- the probe ----


class Tcp:
    """The attached probe, and what it has counted and sent since `follow`."""

    def __init__(self, requests: RequestsProbe, probe: TcpProbe, stack: ExitStack) -> None:
        assert probe.stats_map is not None
        self._requests = requests
        self.raw = probe
        self._stats = ServiceStats(probe.stats_map)
        (channel,) = probe.channels
        self._source = open_source(channel, time.monotonic_ns, stack)
        self._delivered = 0
        self._totals = self._stats.totals().copy()
        self._counts = probe.counts()

    def follow(self, *processes: int, ports: dict[tuple[int, int], int] | None = None) -> None:
        """Follow these and nothing else: the first process is of service 0, and so on."""
        self._requests.follow({pid: index for index, pid in enumerate(processes)}, ports or {})
        self.events()
        self._totals = self._stats.totals().copy()
        self._counts = self.raw.counts()

    def count(self, member: str, service: int = 0) -> int:
        """How much a counter grew, or how many observations a histogram got."""
        now, before = self._stats.totals()[service][member], self._totals[service][member]
        return int((now["counts"] - before["counts"]).sum() if now.dtype.names else now - before)

    def sum_ns(self, histogram: str, service: int = 0) -> int:
        return int(self._stats.totals()[service][histogram]["sum_ns"] - self._totals[service][histogram]["sum_ns"])

    def nothing_counted(self) -> bool:
        """Whether no counter of any service has moved, and no event was made or lost."""
        return bool((self._stats.totals() == self._totals).all()) and self.raw.counts() == self._counts

    def counted(self, what: Count) -> int:
        return self.raw.counts()[what] - self._counts[what]

    def events(self, wanted: int = 0) -> list[np.void]:
        """The events that came since the last call: all that were made, exactly, and `wanted` at least.

        What the kernel does by itself it may do on another CPU, and count a moment after its packet has arrived.
        """
        events: list[np.void] = []
        deadline = time.monotonic() + PATIENCE_S
        while True:
            batch = self._source.pending()
            events.extend(batch.copy())
            self._delivered += len(batch)
            self._source.consume(len(batch))
            counts = self.raw.counts()
            missing = counts[Count.SEEN_TCP_EVENTS] - counts[Count.LOST_TCP_EVENTS_RING_FULL] - self._delivered
            assert missing >= 0, "more events came than were made"
            if not missing and len(events) >= wanted:
                return sorted(events, key=lambda event: int(event["at_ns"]))
            assert time.monotonic() < deadline, (
                f"{missing} events did not come, or were not made: {len(events)} of {wanted}"
            )
            time.sleep(0.001)

    def until(self, happened: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not happened():
            assert time.monotonic() < deadline, f"did not happen within {PATIENCE_S:.0f} s: {what}"
            time.sleep(0.001)

    def until_counted(self, member: str, wanted: int, service: int = 0) -> None:
        """Wait until a count is as wanted. It must not be more, now or when all is done: tests check again."""
        self.until(lambda: self.count(member, service) >= wanted, f"{member} counts {wanted}")
        assert self.count(member, service) == wanted

    def sockets(self) -> int:
        """How many sockets stand in its table."""
        return sum(1 for _ in self.raw.map("sockets").items())

    def opened_ports(self) -> int:
        """How many connections its table of ports counts."""
        return sum(int.from_bytes(value, sys.byteorder) for _, value in self.raw.map("opened_ports").items())


@contextlib.contextmanager
def loaded(transport: Transport, **given: Any) -> Iterator[Tcp]:  # noqa: ANN401 - what the probe takes
    with ExitStack() as stack:
        requests = stack.enter_context(RequestsProbe(transport))
        probe = stack.enter_context(TcpProbe(transport, services=2, shares_with=requests, **given))
        probe.attach()
        yield Tcp(requests, probe, stack)


@pytest.fixture(scope="module")
def attached(transport: Transport) -> Iterator[Tcp]:
    with loaded(transport) as tcp:
        yield tcp


@pytest.fixture
def tcp(attached: Tcp) -> Iterator[Tcp]:
    """Each test leaves nothing in the tables of sockets that are under way."""
    attached.follow()
    yield attached
    attached.follow()
    attached.until(lambda: not attached.sockets(), "the table of sockets is empty")
    assert not attached.opened_ports()


def test_the_numbers_of_the_events_are_those_of_the_c_enum(tcp: Tcp) -> None:
    kinds = enum_of(tcp.raw.channels[0].object_path, "tcp_event_kind")
    assert kinds == {
        "TCP_RETRANSMIT": RETRANSMIT,
        "TCP_RESET_SENT": RESET_SENT,
        "TCP_RESET_RECEIVED": RESET_RECEIVED,
        "TCP_CONNECTED": CONNECTED,
        "TCP_SEND_STALL": SEND_STALL,
    }


# ---- the two sides ----


class Caller:
    """A workload that does as it is told, see tests/kernel/workloads/sockets.py."""

    def __init__(self, enter: int | None = None) -> None:
        arguments = [] if enter is None else [str(enter)]
        self._process = subprocess.Popen(
            [sys.executable, "-S", "-E", str(SOCKETS), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            pass_fds=[] if enter is None else [enter],
        )
        self.pid, self.tid = self("pids")

    def begin(self, *command: object) -> None:
        """Give a command that may take long; `end` has its answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()

    def end(self) -> Any:  # noqa: ANN401 # as the command returns it
        """The result of the last command. Raises OSError as the workload's call did."""
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], PATIENCE_S)
        assert ready, f"the workload did not answer within {PATIENCE_S:.0f} s"
        answer = json.loads(self._process.stdout.readline())
        if "errno" in answer:
            raise OSError(answer["errno"], os.strerror(answer["errno"]))
        return answer["result"]

    def __call__(self, *command: object) -> Any:  # noqa: ANN401
        """Give a command, and wait for its result."""
        self.begin(*command)
        return self.end()

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


StartCaller = Callable[..., Caller]


@pytest.fixture
def start(tcp: Tcp) -> Iterator[StartCaller]:
    """Start a workload; it ends before its sockets are looked for in the probe's table."""
    with ExitStack() as stack:
        yield lambda enter=None: stack.enter_context(contextlib.closing(Caller(enter)))


@contextlib.contextmanager
def listening(family: socket.AddressFamily = socket.AF_INET) -> Iterator[socket.socket]:
    with socket.create_server((HOSTS[family], 0), family=family, backlog=256) as listener:
        listener.settimeout(PATIENCE_S)
        yield listener


def port_of(end: socket.socket) -> int:
    return int(end.getsockname()[1])


def served(caller: Caller, family: socket.AddressFamily = socket.AF_INET) -> tuple[dict[tuple[int, int], int], int]:
    """Let a workload listen; the port as `follow` wants it, and its number."""
    port = caller("listen", "listener", HOSTS[family])
    return {(netns(), port): 0}, port


def peer_of(event: np.void) -> str:
    raw = bytes(event["peer"])
    return str(ipaddress.ip_address(raw if event["family"] == socket.AF_INET6 else raw[:4]))


@pytest.fixture(params=list(HOSTS), ids=["ipv4", "ipv6"])
def family(request: pytest.FixtureRequest) -> socket.AddressFamily:
    value: socket.AddressFamily = request.param
    return value


@pytest.fixture
def wire(tcp: Tcp) -> Iterator[Wire]:
    """To be asked for before `start`: it stays until what the workloads left has been said goodbye to."""
    with Wire() as wire:
        yield wire
        wire.delay_s, wire.lose = 0.0, lambda packet: False
        tcp.until(lambda: not tcp.sockets(), "the table of sockets is empty")


# ---- connect ----


def test_connects_are_counted_with_ports_and_peers(tcp: Tcp, start: StartCaller, family: socket.AddressFamily) -> None:
    target, stranger = start(), start()
    tcp.follow(target.pid)
    with listening(family) as listener:
        stranger("connect_all", 11, HOSTS[family], port_of(listener))
        answers = target("connect_all", 23, HOSTS[family], port_of(listener))
        events = tcp.events()
        assert tcp.count("connect") == 23
        assert [event["kind"] for event in events] == [CONNECTED] * 23
        assert [event["local_port"] for event in events] == [local for local, _, _ in answers]
        assert {int(event["peer_port"]) for event in events} == {port_of(listener)}
        assert {peer_of(event) for event in events} == {HOSTS[family]}
        assert {int(event["family"]) for event in events} == {family}
        assert {(int(event["tgid"]), int(event["tid"])) for event in events} == {(target.pid, target.tid)}
        assert tcp.sum_ns("connect") == sum(int(event["duration_ns"]) for event in events)
        for event, (_, before, after) in zip(events, answers, strict=True):
            assert before <= event["at_ns"] - event["duration_ns"] <= event["at_ns"] <= after


def test_each_service_has_its_own_connects(tcp: Tcp, start: StartCaller) -> None:
    first, second = start(), start()
    tcp.follow(first.pid, second.pid)
    with listening() as listener:
        first("connect_all", 5, "127.0.0.1", port_of(listener))
        second("connect_all", 3, "127.0.0.1", port_of(listener))
    assert [tcp.count("connect", service) for service in (0, 1)] == [5, 3]
    assert [int(event["service"]) for event in tcp.events() if event["kind"] == CONNECTED] == [0] * 5 + [1] * 3


def test_a_refused_connect_is_a_reset_and_no_connect(tcp: Tcp, start: StartCaller) -> None:
    target = start()
    tcp.follow(target.pid)
    with listening() as listener:
        closed = port_of(listener)
    for _ in range(13):
        with pytest.raises(ConnectionRefusedError):
            target("connect", "refused", "127.0.0.1", closed)
    assert tcp.count("connect") == 0
    assert tcp.count("resets_received") == 13
    assert {(int(event["kind"]), int(event["peer_port"])) for event in tcp.events()} == {(RESET_RECEIVED, closed)}


def test_a_connect_takes_as_long_as_the_wire(tcp: Tcp, wire: Wire, start: StartCaller) -> None:
    target = start(wire.left_netns)
    tcp.follow(target.pid)
    wire.delay_s = 0.02
    with wire.right(lambda: socket.create_server((RIGHT, 0))) as listener:
        answers = target("connect_all", 7, RIGHT, port_of(listener))
    events = tcp.events()
    assert len(events) == tcp.count("connect") == 7
    for event, (_, before, after) in zip(events, answers, strict=True):
        assert 40_000_000 <= event["duration_ns"] <= after - before
        assert peer_of(event) == RIGHT


def test_a_lost_syn_is_a_retransmit(tcp: Tcp, wire: Wire, start: StartCaller) -> None:
    target = start(wire.left_netns)
    tcp.follow(target.pid)
    with wire.right(lambda: socket.create_server((RIGHT, 0))) as listener:
        lost: list[bytes] = []
        wire.lose = lambda packet: not lost and packet[12:16] == socket.inet_aton(LEFT) and not lost.append(packet)
        local, _, _ = target("connect", "late", RIGHT, port_of(listener))
        again, connected = tcp.events()
        assert (again["kind"], connected["kind"]) == (RETRANSMIT, CONNECTED)
        assert (again["peer_port"], peer_of(again)) == (port_of(listener), RIGHT)
        assert tcp.count("retransmits") == tcp.count("connect") == 1
        assert connected["local_port"] == local
        assert connected["duration_ns"] > again["at_ns"] - (connected["at_ns"] - connected["duration_ns"])


BPFTRACE = """
tracepoint:sock:inet_sock_set_state /args->newstate == 2 && pid == PID/ { @start[args->skaddr] = nsecs; }
tracepoint:sock:inet_sock_set_state /args->newstate == 1 && @start[args->skaddr]/
{ @sum = sum(nsecs - @start[args->skaddr]); @count = count(); delete(@start[args->skaddr]); }
BEGIN { printf("ready\\n"); }
END { clear(@start); }
"""


def test_the_mean_agrees_with_bpftrace(tcp: Tcp, wire: Wire, start: StartCaller) -> None:
    """The same connects measured by bpftrace on the classic tracepoint sock:inet_sock_set_state, a second
    implementation that shares no code with ours; Debian's tcpconnlat needs kprobes or fentry. Means within 5 %.
    """
    if not shutil.which("bpftrace"):
        pytest.skip("apt-get install bpftrace")
    target = start(wire.left_netns)
    wire.delay_s = 0.001
    script = BPFTRACE.replace("PID", str(target.pid))
    with wire.right(lambda: socket.create_server((RIGHT, 0), backlog=128)) as listener:
        other = subprocess.Popen(["bpftrace", "-e", script], stdout=subprocess.PIPE, text=True)
        assert other.stdout is not None
        while "ready" not in (line := other.stdout.readline()):
            assert line, "bpftrace ended"
        tcp.follow(target.pid)
        target("connect_all", 101, RIGHT, port_of(listener))
        other.send_signal(signal.SIGINT)
        said, _ = other.communicate(timeout=PATIENCE_S)
    seen = {name: int(value) for name, value in re.findall(r"@(sum|count): (\d+)", said)}
    assert seen["count"] == tcp.count("connect") == 101
    mean, other_mean = tcp.sum_ns("connect") / 101, seen["sum"] / 101
    print(f"mean {mean:.0f} ns, bpftrace {other_mean:.0f} ns")
    assert mean == pytest.approx(other_mean, rel=0.05)


def test_a_full_table_counts_what_it_does_not_time(transport: Transport) -> None:
    with loaded(transport, connections=5) as tcp, contextlib.closing(Caller()) as target, listening() as listener:
        tcp.follow(target.pid)
        for number in range(11):
            target("connect", f"{number}", "127.0.0.1", port_of(listener))
        assert (tcp.count("connect"), tcp.counted(Count.SOCKETS_FULL)) == (5, 6)
        assert len(tcp.events()) == 5


def test_what_a_kernel_before_6_3_does_not_tell_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    has = libbpf.has_btf_tracepoint
    monkeypatch.setattr(libbpf, "has_btf_tracepoint", lambda name: name != "sock_send_length" and has(name))
    with RequestsProbe(Transport.RING) as requests, TcpProbe(Transport.RING, shares_with=requests) as probe:
        assert probe.stats_map is not None
        counters = ServiceStats(probe.stats_map).totals()
        scrape = Scrape(1, 0.0, (), None, ReaderStatus(0), ("roleplay",), {"tcp": counters})
        found = {family.spec.name: list(family.points(scrape)) for family in kernel_families()}
    assert found["kernel_tcp_send_stall_seconds"] == []
    assert len(found["kernel_tcp_connect_seconds"]) == 1
    assert len(found["kernel_tcp_resets"]) == 2


def test_a_full_ring_counts_what_it_loses(transport: Transport, start: StartCaller) -> None:
    """Nobody reads the records meanwhile; the histogram has them all the same."""
    with ExitStack() as stack:
        requests = stack.enter_context(RequestsProbe(transport))
        sizes = {"tcp_events": 4096}
        probe = stack.enter_context(TcpProbe(transport, sizes=sizes, services=1, shares_with=requests))
        probe.attach()
        tcp, target = Tcp(requests, probe, stack), stack.enter_context(contextlib.closing(Caller()))
        tcp.follow(target.pid)
        with listening() as listener:
            target("connect_all", 127, "127.0.0.1", port_of(listener))
            for _ in range(30):
                if tcp.counted(Count.LOST_TCP_EVENTS_RING_FULL):
                    break
                for _client in range(127):
                    listener.accept()[0].close()
                target("connect_all", 127, "127.0.0.1", port_of(listener))
        lost, seen = tcp.counted(Count.LOST_TCP_EVENTS_RING_FULL), tcp.counted(Count.SEEN_TCP_EVENTS)
        assert lost > 0
        assert len(tcp.events()) == seen - lost
        # a listener that closes resets those that it had not accepted
        assert tcp.count("connect") + tcp.count("resets_received") == seen


# ---- round trip ----


def test_the_round_trip_is_that_of_the_wire(tcp: Tcp, wire: Wire, start: StartCaller) -> None:
    target = start(wire.left_netns)
    port = target("listen", "listener", LEFT)
    tcp.follow(target.pid, ports={(os.fstat(wire.left_netns).st_ino, port): 0})
    wire.delay_s = 0.02
    before = time.monotonic()
    for number in range(5):
        with wire.right(lambda: socket.create_connection((LEFT, port), PATIENCE_S)) as client:
            target("accept", "listener", f"{number}")
            client.sendall(bytes(100))
            target("receive", f"{number}", 100)
            target("send", f"{number}", 100)
            assert len(client.recv(100)) == 100
            target("close", f"{number}")
    elapsed_s = time.monotonic() - before
    samples = tcp.count("round_trip")
    assert 5 <= samples <= 5 + elapsed_s / 0.1
    assert 0.04 <= tcp.sum_ns("round_trip") / samples / 1e9 <= elapsed_s / 5


def test_a_busy_connection_gives_one_sample_each_100_ms(tcp: Tcp, start: StartCaller) -> None:
    target = start()
    ports, port = served(target)
    tcp.follow(target.pid, ports=ports)
    before = time.monotonic()
    with socket.create_connection(("127.0.0.1", port), PATIENCE_S) as client:
        target("accept", "listener", "one")
        while time.monotonic() < before + 0.35:
            client.sendall(b"?")
            target("receive", "one", 1)
            target("send", "one", 1)
            client.recv(1)
    assert 3 <= tcp.count("round_trip") <= (time.monotonic() - before) / 0.1 + 1


# ---- receive queue ----


def test_bytes_lie_in_the_socket_until_the_service_reads_them(
    tcp: Tcp, start: StartCaller, family: socket.AddressFamily
) -> None:
    target = start()
    ports, port = served(target, family)
    tcp.follow(target.pid, ports=ports)
    least = most = 0
    with socket.create_connection((HOSTS[family], port), PATIENCE_S) as client:
        target("accept", "listener", "one")
        for pause_s in (0.0, 0.003, 0.03):
            before = time.monotonic_ns()
            client.sendall(bytes(100))
            sent = time.monotonic_ns()
            time.sleep(pause_s)
            wanted = time.monotonic_ns()
            assert target("receive", "one", 4096) == 100
            least += wanted - sent
            most += time.monotonic_ns() - before
    assert tcp.count("receive_queue") == 3
    assert least <= tcp.sum_ns("receive_queue") <= most


def test_one_segment_is_followed_at_a_time(tcp: Tcp, start: StartCaller) -> None:
    target = start()
    ports, port = served(target)
    tcp.follow(target.pid, ports=ports)
    with socket.create_connection(("127.0.0.1", port), PATIENCE_S) as client:
        target("accept", "listener", "one")
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(7):
            client.sendall(bytes(10))
        target("receive_all", "one", 70)
        assert tcp.count("receive_queue") >= 1
        first = tcp.count("receive_queue")
        client.sendall(bytes(10))
        target("receive_all", "one", 10)
        assert tcp.count("receive_queue") == first + 1
    assert first == 1, "the bytes that came later lay there when the first were read"


def test_a_peek_leaves_the_bytes_unread(tcp: Tcp, start: StartCaller) -> None:
    target = start()
    ports, port = served(target)
    tcp.follow(target.pid, ports=ports)
    with socket.create_connection(("127.0.0.1", port), PATIENCE_S) as client:
        target("accept", "listener", "one")
        client.sendall(bytes(100))
        assert target("receive", "one", 100, socket.MSG_PEEK) == 100
        peeked = time.monotonic_ns()
        assert tcp.count("receive_queue") == 0
        time.sleep(0.01)
        least = time.monotonic_ns() - peeked
        assert target("receive", "one", 100) == 100
        assert tcp.count("receive_queue") == 1
        assert tcp.sum_ns("receive_queue") >= least


def test_a_connection_goes_with_its_process_to_another_service(tcp: Tcp, start: StartCaller) -> None:
    target, stranger = start(), start()
    tcp.follow(target.pid)
    with listening() as listener:
        target("connect", "up", "127.0.0.1", port_of(listener))
        with listener.accept()[0] as server:
            for processes, service in (((target,), 0), ((stranger, target), 1)):
                tcp.follow(*(each.pid for each in processes))
                for _ in range(5):
                    server.sendall(bytes(10))
                    target("receive_all", "up", 10)
                assert [tcp.count("receive_queue", each) for each in range(2)] == [5 * (1 - service), 5 * service]


def test_a_connection_goes_with_its_port_to_another_service(tcp: Tcp, start: StartCaller) -> None:
    target = start()
    ports, port = served(target)
    with socket.create_connection(("127.0.0.1", port), PATIENCE_S) as client:
        target("accept", "listener", "one")
        for service in range(2):
            tcp.follow(target.pid, ports=dict.fromkeys(ports, service))
            for _ in range(5):
                client.sendall(bytes(10))
                target("receive_all", "one", 10)
            assert [tcp.count("receive_queue", each) for each in range(2)] == [5 * (1 - service), 5 * service]


def test_answers_to_a_service_lie_in_its_sockets_too(tcp: Tcp, start: StartCaller) -> None:
    target, stranger = start(), start()
    tcp.follow(target.pid)
    with listening() as listener:
        for caller in (stranger, target):
            caller("connect", "up", "127.0.0.1", port_of(listener))
            with listener.accept()[0] as server:
                for _ in range(5):
                    server.sendall(bytes(10))
                    caller("receive_all", "up", 10)
    assert tcp.count("receive_queue") == 5


# ---- send stalls ----


@pytest.mark.parametrize("call", ["fill", "send"], ids=["until a call moves nothing", "one call that moves a part"])
def test_a_client_that_stops_reading_stalls_the_service(tcp: Tcp, start: StartCaller, call: str) -> None:
    """An event loop with a large answer sends once, sees that not all went, and waits for room without a second try.

    The socket blocks where the calls say themselves that they must not, so that only the last one begins a stall.
    """
    target = start()
    ports, port = served(target)
    tcp.follow(target.pid, ports=ports)
    least = most = 0
    with socket.create_connection(("127.0.0.1", port), PATIENCE_S) as client:
        target("accept", "listener", "one")
        target("set_blocking", "one", call == "fill")
        for _ in range(5):
            before = time.monotonic_ns()
            went = target(call, "one", 10_000 if call == "fill" else TOO_MUCH_BYTES)
            assert went < TOO_MUCH_BYTES
            full = time.monotonic_ns()
            time.sleep(0.005)
            going_on = time.monotonic_ns()
            while went:
                went -= len(client.recv(min(went, 1 << 20)))
            target("until_writable", "one")
            assert target("send", "one", 1) == 1
            client.recv(1)
            least += going_on - full
            most += time.monotonic_ns() - before
        local = port_of(client)
        counted = target("total_retransmits", "one")
    events = tcp.events()
    # the full receive queue of the client may have thrown a packet away
    assert tcp.count("retransmits") == sum(int(event["kind"] == RETRANSMIT) for event in events) == counted
    events = [event for event in events if event["kind"] != RETRANSMIT]
    assert [int(event["kind"]) for event in events] == [SEND_STALL] * 5
    assert {(int(event["local_port"]), int(event["peer_port"])) for event in events} == {(port, local)}
    assert {(int(event["tgid"]), int(event["tid"])) for event in events} == {(target.pid, target.tid)}
    assert tcp.count("send_stall") == 5
    assert tcp.sum_ns("send_stall") == sum(int(event["duration_ns"]) for event in events)
    assert least <= tcp.sum_ns("send_stall") <= most


def test_a_blocking_sender_waits_in_its_call_and_that_is_no_stall(tcp: Tcp, start: StartCaller) -> None:
    target = start()
    ports, port = served(target)
    tcp.follow(target.pid, ports=ports)
    total = TOO_MUCH_BYTES
    with socket.create_connection(("127.0.0.1", port), PATIENCE_S) as client:
        target("accept", "listener", "one")
        target.begin("send_all", "one", total)
        while total:
            total -= len(client.recv(min(total, 1 << 16)))
        target.end()
        target("send", "one", 1)
        client.recv(1)
    assert tcp.count("send_stall") == 0


# ---- retransmits ----


def test_retransmits_are_those_that_the_kernel_counts(tcp: Tcp, wire: Wire, start: StartCaller) -> None:
    """Of each of five answers the first packet is lost. How often TCP tries is its own matter; it counts it itself."""
    target = start(wire.left_netns)
    port = target("listen", "listener", LEFT)
    tcp.follow(target.pid, ports={(os.fstat(wire.left_netns).st_ino, port): 0})
    seen: set[int] = set()
    dropped: list[int] = []

    def lose(packet: bytes) -> bool:
        sequence, size = payload_of(packet)
        if packet[12:16] != socket.inet_aton(LEFT) or not size or sequence in seen:
            return False
        seen.add(sequence)
        dropped.append(sequence)
        return True

    wire.lose = lose
    with wire.right(lambda: socket.create_connection((LEFT, port), PATIENCE_S)) as client:
        target("accept", "listener", "one")
        for _ in range(5):
            target("send", "one", 100)
            assert len(client.recv(100)) == 100
        local = port_of(client)
        counted = target("total_retransmits", "one")
        events = tcp.events(counted)
        assert tcp.count("retransmits") == counted == len(events) >= len(dropped) == 5
    assert {int(event["kind"]) for event in events} == {RETRANSMIT}
    assert {(int(event["local_port"]), int(event["peer_port"])) for event in events} == {(port, local)}
    assert {peer_of(event) for event in events} == {RIGHT}


# ---- resets ----


def test_resets_of_the_service(tcp: Tcp, start: StartCaller, family: socket.AddressFamily) -> None:
    target = start()
    ports, port = served(target, family)
    tcp.follow(target.pid, ports=ports)
    clients = []
    for _ in range(19):
        with socket.create_connection((HOSTS[family], port), PATIENCE_S) as client:
            target("accept", "listener", "one")
            clients.append(port_of(client))
            target("reset", "one")
            with pytest.raises(ConnectionResetError):
                client.recv(1)
    events = tcp.events()
    assert (tcp.count("resets_sent"), tcp.count("resets_received")) == (19, 0)
    assert [int(event["kind"]) for event in events] == [RESET_SENT] * 19
    assert [int(event["peer_port"]) for event in events] == clients
    assert {int(event["local_port"]) for event in events} == {port}
    assert {peer_of(event) for event in events} == {HOSTS[family]}
    assert {(int(event["tgid"]), int(event["tid"])) for event in events} == {(target.pid, target.tid)}


def test_resets_of_clients(tcp: Tcp, start: StartCaller, family: socket.AddressFamily) -> None:
    target = start()
    ports, port = served(target, family)
    tcp.follow(target.pid, ports=ports)
    clients = []
    for _ in range(13):
        client = socket.create_connection((HOSTS[family], port), PATIENCE_S)
        clients.append(port_of(client))
        target("accept", "listener", "one")
        reset(client)
        tcp.until_counted("resets_received", len(clients))
        target("close", "one")
    events = tcp.events(len(clients))
    assert tcp.count("resets_sent") == 0
    assert [int(event["peer_port"]) for event in events] == clients
    assert {(int(event["kind"]), int(event["tgid"])) for event in events} == {(RESET_RECEIVED, 0)}


def test_bytes_that_were_not_read_make_a_close_a_reset(tcp: Tcp, start: StartCaller) -> None:
    target = start()
    ports, port = served(target)
    tcp.follow(target.pid, ports=ports)
    for _ in range(7):
        with socket.create_connection(("127.0.0.1", port), PATIENCE_S) as client:
            target("accept", "listener", "one")
            client.sendall(bytes(10))
            target("receive", "one", 1)
            target("close", "one")
            with pytest.raises(ConnectionResetError):
                client.recv(1)
    assert tcp.count("resets_sent") == 7


def test_bytes_that_come_after_the_close_are_reset_by_the_kernel(
    tcp: Tcp, start: StartCaller, family: socket.AddressFamily
) -> None:
    target = start()
    ports, port = served(target, family)
    tcp.follow(target.pid, ports=ports)
    clients = []
    for _ in range(11):
        with socket.create_connection((HOSTS[family], port), PATIENCE_S) as client:
            target("accept", "listener", "one")
            clients.append(port_of(client))
            target("close", "one")
            assert client.recv(1) == b""
            client.sendall(b"late")
            # a client that closes before the reset has come ends the connection itself, and is sent another one
            tcp.until(lambda end=client: end.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1) == TCP_CLOSE, "it came")
            tcp.until_counted("resets_sent", len(clients))
    events = tcp.events(len(clients))
    assert [int(event["peer_port"]) for event in events] == clients
    assert {int(event["local_port"]) for event in events} == {port}
    assert {peer_of(event) for event in events} == {HOSTS[family]}
    assert {(int(event["kind"]), int(event["tgid"])) for event in events} == {(RESET_SENT, 0)}


def test_resets_of_connections_that_the_service_opened(tcp: Tcp, start: StartCaller) -> None:
    target = start()
    tcp.follow(target.pid)
    with listening() as listener:
        for _ in range(3):
            target("connect", "one", "127.0.0.1", port_of(listener))
            with listener.accept()[0]:
                target("reset", "one")
        for _ in range(2):
            target("connect", "one", "127.0.0.1", port_of(listener))
            reset(listener.accept()[0])
            with pytest.raises(OSError, match=f"Errno {errno.ECONNRESET}"):
                target("receive", "one", 1)
            target("close", "one")
    assert (tcp.count("resets_sent"), tcp.count("resets_received")) == (3, 2)


# ---- who is followed ----


def test_nothing_of_others_is_counted(tcp: Tcp, start: StartCaller) -> None:
    """A process that is no target does all that targets do above; another service is followed meanwhile."""
    target, stranger = start(), start()
    ports, _ = served(target)
    _, port = served(stranger)
    tcp.follow(target.pid, ports=ports)
    for _ in range(3):
        with socket.create_connection(("127.0.0.1", port), PATIENCE_S) as client:
            stranger("accept", "listener", "one")
            client.sendall(bytes(10))
            stranger("receive", "one", 10)
            went = stranger("fill", "one", 100_000)
            while went:
                went -= len(client.recv(1 << 16))
            stranger("send", "one", 1)
            client.recv(1)
            stranger("reset", "one")
    with listening() as listener:
        stranger("connect_all", 3, "127.0.0.1", port_of(listener))
    assert tcp.nothing_counted()
    assert not tcp.sockets()


def test_the_same_port_in_another_namespace_is_another_service(tcp: Tcp, wire: Wire, start: StartCaller) -> None:
    target = start(wire.left_netns)
    port = target("listen", "listener", LEFT)
    tcp.follow(ports={(netns(), port): 0})
    with wire.right(lambda: socket.create_connection((LEFT, port), PATIENCE_S)) as client:
        target("accept", "listener", "one")
        client.sendall(bytes(10))
        target("receive", "one", 10)
        target("reset", "one")
    assert tcp.nothing_counted()
