"""What all probes share, as far as it needs no kernel: declarations, sizes, the filter of targets, and the attacher."""

from __future__ import annotations

import errno
import logging
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exporter import attacher
from exporter.config import Config, Limits, Match, ProbePoint, Probes, Service
from exporter.parting import STATUS_PACKET
from exporter.status import AgentStatus, SyscallLatency
from probes import libbpf, probe
from probes.block import BlockProbe
from probes.cuda import CudaProbe
from probes.discovery import Targets
from probes.errors import HostError, ProbeError
from probes.memory import MemoryProbe
from probes.probe import Count, Probe, Transport, pick_transport, ring_bytes
from probes.probe_points import ProbePointsProbe
from probes.requests import RequestsProbe
from probes.scheduler import SchedulerProbe
from probes.syscalls import SyscallsProbe
from probes.tcp import TcpProbe

ALL: tuple[type[Probe], ...] = (
    RequestsProbe,
    SchedulerProbe,
    TcpProbe,
    BlockProbe,
    MemoryProbe,
    SyscallsProbe,
    CudaProbe,
    ProbePointsProbe,
)
KIB = 1024
MIB = 1024 * KIB


# ---- what probes declare ----


def test_every_counter_is_reported_by_a_probe() -> None:
    """No count of a program is silent, and what a stream loses is its own."""
    reported = Counter(count for kind in ALL for count in (*kind.seen_counts(), *kind.loss_counts()))
    assert reported.keys() == set(Count)
    of_streams = [count for kind in ALL for stream in kind.streams for count in (stream.seen, stream.lost)]
    assert all(reported[count] == 1 for count in of_streams)


def test_losses_are_in_the_order_of_the_enum_and_none_is_a_record_that_was_due() -> None:
    for kind in ALL:
        values = [count.value for count in kind.loss_counts()]
        assert values == sorted(values)
        assert not set(kind.seen_counts()) & set(kind.loss_counts())
        assert all(count.name.startswith("SEEN_") for count in kind.seen_counts())


def test_streams_have_names_of_their_own() -> None:
    names = [stream.name for kind in ALL for stream in kind.streams]
    assert len(names) == len(set(names))
    assert len({kind.name for kind in ALL}) == len(ALL)


def test_each_probe_but_the_requests_probe_can_be_switched_off() -> None:
    by_name = {kind.name for kind in ALL} - {ProbePointsProbe.name}  # which is wanted where the config names points
    assert by_name <= set(Probes.__struct_fields__)
    assert set(attacher._OTHER_PROBES) == set(ALL) - {RequestsProbe, CudaProbe, ProbePointsProbe}


def test_all_rings_together_are_within_the_limit() -> None:
    limit = 120 * MIB
    used = sum(ring_bytes(limit, stream.share) for kind in ALL for stream in kind.streams)
    assert used < limit / 4


@pytest.mark.parametrize(
    ("memory", "share", "size"),
    [
        (120 * MIB, 1 / 56, 2 * MIB),
        (112 * MIB, 1 / 56, 2 * MIB),  # exactly a power of two
        (112 * MIB - 56, 1 / 56, MIB),
        (120 * MIB, 1 / 480, 256 * KIB),
        (64 * MIB, 1 / 480, 256 * KIB),  # never smaller
        (64 * 1024 * MIB, 1 / 7, 8 * 1024 * MIB),
    ],
)
def test_a_ring_is_a_power_of_two_within_its_share(memory: int, share: float, size: int) -> None:
    assert ring_bytes(memory, share) == size


def test_without_the_object_the_next_step_is_to_build_it(tmp_path: Path) -> None:
    missing = tmp_path / "none.bpf.o"
    makers = [partial(kind, Transport.RING) for kind in ALL if kind is not ProbePointsProbe]
    for make in (*makers, partial(ProbePointsProbe, (), (), Transport.RING)):
        with pytest.raises(HostError) as caught:
            make(object_path=missing)
        assert "make bpf" in caught.value.next_step


@pytest.mark.parametrize("has_ring", [True, False])
def test_the_transport_is_what_is_asked_for_and_there(has_ring: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libbpf, "has_ring_buffer", lambda: has_ring)
    assert pick_transport("auto") is (Transport.RING if has_ring else Transport.PERF)
    assert pick_transport("perf") is Transport.PERF
    if has_ring:
        assert pick_transport("ring") is Transport.RING
    else:
        with pytest.raises(HostError, match="no BPF ring buffers"):
            pick_transport("ring")


# ---- the filter of targets ----


class FakeMap:
    def __init__(self, before_listing: Callable[[], None] = lambda: None) -> None:
        self.content: dict[bytes, bytes] = {}
        self.before_listing = before_listing
        self.max_entries = 1 << 16

    def update(self, key: bytes, value: bytes) -> None:
        if not self.try_update(key, value):
            raise ProbeError("the map is full", "make it larger")

    def try_update(self, key: bytes, value: bytes) -> bool:
        if key not in self.content and len(self.content) == self.max_entries:
            return False
        self.content[key] = value
        return True

    def delete(self, key: bytes) -> None:
        self.content.pop(key, None)

    def items(self) -> Iterator[tuple[bytes, bytes]]:
        listed = list(self.content.items())
        self.before_listing()
        return iter(listed)


class Kernel:
    """The requests probe over maps in memory, and what the kernel's programs do with them."""

    def __init__(self) -> None:
        self.maps = {name: FakeMap() for name in ("targets", "ports", "port_bits", "revision", "counts")}
        self.filter = bytearray(65536)
        self.probe = RequestsProbe.__new__(RequestsProbe)
        self.probe._processes, self.probe._ports, self.probe._revision = {}, {}, 0
        self.probe._refused, self.probe._refused_cnt = {}, Counter()
        self.probe._object = cast("libbpf.Object", SimpleNamespace(map=self.maps.__getitem__))
        self.probe._filter = cast("Any", self.filter)

    def fork(self, child: int) -> None:
        self.maps["targets"].update(child.to_bytes(4, "little"), bytes(4))
        self.filter[child % 65536] = 1

    def exit(self, tgid: int) -> None:
        self.maps["targets"].delete(tgid.to_bytes(4, "little"))

    @property
    def revision(self) -> bytes | None:
        """What programs compare with to see that the tables changed."""
        return self.maps["revision"].content.get(bytes(4))

    def follows(self, tgid: int) -> bool:
        """As service_of_process() of bpf/targets.bpf.h."""
        return bool(self.filter[tgid % 65536]) and tgid.to_bytes(4, "little") in self.maps["targets"].content


def test_a_target_passes_the_filter_and_its_place_is_cleared_after_it() -> None:
    kernel = Kernel()
    kernel.probe.follow({101: 0, 70_001: 1}, {})
    assert kernel.follows(101)
    assert kernel.follows(70_001)
    assert kernel.filter.count(0) == 65534
    kernel.probe.follow({101: 0}, {})
    kernel.probe.follow({101: 0}, {})
    assert kernel.follows(101)
    assert kernel.filter.count(0) == 65535


def test_a_process_that_the_kernel_added_keeps_its_place_until_it_exits() -> None:
    kernel = Kernel()
    kernel.probe.follow({101: 0}, {})
    kernel.fork(103)
    for _ in range(3):
        kernel.probe.follow({101: 0}, {})
        assert kernel.follows(103)
    kernel.exit(103)
    for _ in range(2):
        kernel.probe.follow({101: 0}, {})
    assert kernel.filter[103] == 0


def test_a_fork_during_the_sweep_is_kept() -> None:
    kernel = Kernel()
    kernel.probe.follow({101: 0}, {})
    kernel.filter[103] = 2  # the place of one that ended
    # The table was listed; the child comes before its place is looked at.
    kernel.maps["targets"].before_listing = lambda: kernel.fork(103)
    kernel.probe.follow({101: 0}, {})
    assert kernel.follows(103)
    kernel.maps["targets"].before_listing = lambda: None
    for _ in range(3):
        kernel.probe.follow({101: 0}, {})
        assert kernel.follows(103)


def test_two_targets_of_one_place_share_it() -> None:
    kernel = Kernel()
    kernel.probe.follow({101: 0, 101 + 65536: 1}, {})
    for _ in range(3):
        kernel.probe.follow({101 + 65536: 1}, {})
        assert kernel.follows(101 + 65536)
        assert not kernel.follows(101)


def test_a_place_that_was_cleared_wrongly_is_set_again() -> None:
    kernel = Kernel()
    kernel.probe.follow({101: 0}, {})
    kernel.filter[101] = 0
    kernel.probe.follow({101: 0}, {})
    assert kernel.follows(101)


def test_a_pid_that_was_used_again_within_a_round_is_followed() -> None:
    """The kernel forgot the one that ended; the other one is of the same service, so nothing else has changed."""
    kernel = Kernel()
    kernel.probe.follow({101: 0}, {})
    kernel.exit(101)
    kernel.probe.follow({101: 0}, {})
    assert kernel.follows(101)


def test_the_revision_changes_when_what_is_known_of_a_target_or_port_may_be_wrong() -> None:
    kernel = Kernel()
    revisions = []
    for processes, ports in (
        ({101: 0, 103: 0}, {}),
        ({101: 0, 103: 1}, {}),
        ({101: 0}, {}),
        ({101: 0}, {(7, 80): 0}),
        ({101: 0}, {(7, 80): 1}),
        ({101: 0}, {}),
    ):
        kernel.probe.follow(processes, ports)
        revisions.append(kernel.revision)
        kernel.probe.follow(processes, ports)
        assert kernel.revision == revisions[-1]
    assert len(set(revisions)) == len(revisions)


# ---- full tables ----


def counted(kernel: Kernel) -> dict[Count, int]:
    return {count: number for count, number in kernel.probe.counts().items() if number}


def test_ports_that_find_no_room_are_counted_once_and_the_agent_goes_on() -> None:
    kernel = Kernel()
    kernel.maps["ports"].max_entries = 3
    ports = {(7, port): 0 for port in range(80, 85)}
    for _ in range(3):
        kernel.probe.follow({101: 0}, ports)
        assert counted(kernel) == {Count.PORTS_FULL: 2}
        assert [note for note in kernel.probe.notes() if "ports" in note]
    assert len(kernel.maps["ports"].content) == 3
    assert [port for port in range(80, 85) if kernel.maps["port_bits"].content.get(port.to_bytes(4, "little"))] == [
        80, 81, 82,
    ]  # fmt: skip
    kernel.probe.follow({101: 0}, {(7, port): 0 for port in range(82, 85)})
    assert len(kernel.maps["ports"].content) == 3
    assert counted(kernel) == {Count.PORTS_FULL: 2}
    assert kernel.probe.notes() == ()


def test_processes_that_find_no_room_are_counted_once_and_the_agent_goes_on() -> None:
    kernel = Kernel()
    kernel.maps["targets"].max_entries = 2
    kernel.maps["counts"].content = {Count.TARGETS_FULL.value.to_bytes(4, "little"): (11).to_bytes(8, "little")}
    for _ in range(3):
        kernel.probe.follow(dict.fromkeys((101, 103, 107), 0), {})
        assert counted(kernel) == {Count.TARGETS_FULL: 12}
    assert kernel.probe.targets() == {101: 0, 103: 0}
    assert [note for note in kernel.probe.notes() if "targets" in note]
    kernel.exit(101)
    kernel.probe.follow(dict.fromkeys((103, 107), 0), {})
    assert kernel.follows(107)
    assert kernel.probe.notes() == ()


def test_cgroups_that_find_no_room_are_counted_once_and_the_agent_goes_on() -> None:
    cgroups, counts = FakeMap(), FakeMap()
    cgroups.max_entries = 2
    block = BlockProbe.__new__(BlockProbe)
    block._refused, block._refused_cnt = {}, Counter()
    block._object = cast("libbpf.Object", SimpleNamespace(map={"cgroups": cgroups, "counts": counts}.__getitem__))
    for _ in range(3):
        block.follow_cgroups(dict.fromkeys((11, 13, 17), 0))
        assert block.counts()[Count.CGROUPS_FULL] == 1
    assert len(cgroups.content) == 2
    assert [note for note in block.notes() if "cgroups" in note]


TGIDS = st.integers(1, 8).map(lambda number: number % 4 + 65536 * (number // 4) + 1)


@settings(deadline=None, max_examples=200)
@given(st.lists(st.tuples(st.sampled_from(["fork", "exit"]), TGIDS) | st.sets(TGIDS, max_size=4), max_size=20))
def test_every_target_passes_and_nothing_is_left_behind(happenings: list[tuple[str, int] | set[int]]) -> None:
    kernel = Kernel()
    for what in happenings:
        if isinstance(what, set):
            kernel.probe.follow(dict.fromkeys(what, 0), {})
        elif what[0] == "fork":
            kernel.fork(what[1])
        else:
            kernel.exit(what[1])
        assert all(map(kernel.follows, kernel.probe.targets()))
    for tgid in kernel.probe.targets():
        kernel.exit(tgid)
    for _ in range(2):
        kernel.probe.follow({}, {})
    assert not any(kernel.filter)


# ---- all probes of an agent ----


class FakeProbe:
    """A probe that records what is done to it; a subclass fails at one point."""

    name = ""
    log: list[str]

    def __init__(self, *_: object, **__: object) -> None:
        self._do("load")

    def _do(self, what: str) -> None:
        self.log.append(f"{what} {self.name}")

    def __enter__(self) -> FakeProbe:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def attach(self) -> None:
        self._do("attach")

    def close(self) -> None:
        self._do("close")


def fake_probes(monkeypatch: pytest.MonkeyPatch, fails: Mapping[str, str]) -> list[str]:
    """Replace every probe; those of `fails` fail when that is done to them. Returns what is done, in order."""
    log: list[str] = []

    def make(name: str) -> type[FakeProbe]:
        class Made(FakeProbe):
            def _do(self, what: str) -> None:
                super()._do(what)
                if fails.get(self.name) == what:
                    raise ProbeError(f"the kernel refuses {name}\nits long log", "read it")

        Made.name, Made.log = name, log
        return Made

    monkeypatch.setattr(attacher, "RequestsProbe", make("requests"))
    monkeypatch.setattr(attacher, "_OTHER_PROBES", tuple(make(kind.name) for kind in ALL[1:-1]))
    return log


CONFIG = Config(services=(Service("a", Match(port=(80,))),), probes=Probes(block=False))


def test_only_wanted_probes_are_loaded_and_requests_is_attached_last(monkeypatch: pytest.MonkeyPatch) -> None:
    log = fake_probes(monkeypatch, {})
    with attacher._Probes(CONFIG, Transport.RING, 1) as probes:
        assert [each.name for each in probes.up] == ["requests", "scheduler", "tcp", "memory"]
        assert probes.missing == {}
        assert log[-1] == "attach requests"
        log.clear()
    assert sorted(log) == ["close memory", "close requests", "close scheduler", "close tcp"]


@pytest.mark.parametrize("when", ["load", "attach"])
def test_a_probe_that_the_kernel_refuses_is_missing_and_holds_nothing(
    when: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    log = fake_probes(monkeypatch, {"tcp": when})
    with caplog.at_level(logging.WARNING), attacher._Probes(CONFIG, Transport.RING, 1) as probes:
        assert [each.name for each in probes.up] == ["requests", "scheduler", "memory"]
        assert probes.missing == {"tcp": "the kernel refuses tcp"}
        # Half attached it would go on costing what nobody sees.
        assert log.count("close tcp") == (when == "attach")
        assert "close scheduler" not in log
        assert "tcp probe is not up" in caplog.text


def test_without_the_requests_probe_there_is_no_agent(monkeypatch: pytest.MonkeyPatch) -> None:
    log = fake_probes(monkeypatch, {"requests": "attach"})
    with pytest.raises(ProbeError):
        attacher._Probes(CONFIG, Transport.RING, 1)
    assert [each for each in log if each.startswith("close")] == [
        "close memory", "close tcp", "close scheduler", "close requests",
    ]  # fmt: skip


def test_an_agent_without_probes_of_user_code_does_not_hold_what_they_need() -> None:
    code = "import sys, exporter.attacher; print(sys.modules.keys() & {'concurrent.futures', 'probes.user_probes'})"
    root = Path(probe.__file__).parents[1]
    said = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, check=True)
    assert said.stdout == b"set()\n"


def test_probes_of_user_code_are_loaded_where_they_are_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    log = fake_probes(monkeypatch, {})
    for module, kind in (("cuda", CudaProbe), ("probe_points", ProbePointsProbe)):
        made = type("Made", (FakeProbe,), {"name": kind.name, "log": log})
        monkeypatch.setattr(f"probes.{module}.{kind.__name__}", made)
    monkeypatch.setattr(attacher, "_OTHER_PROBES", ())
    point = ProbePoint("kv", "libllm.so", "look_up", None, None, 1, 2, None)
    config = Config(services=CONFIG.services, probes=Probes(cuda=True), probe_points=(point,))
    with attacher._Probes(config, Transport.RING, 1) as probes:
        assert [each.name for each in probes.up] == ["requests", "cuda", "probe_points"]


@pytest.mark.parametrize("connections", [64, 65536])
def test_the_limit_of_connections_is_every_probes(connections: int, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, object] = {}

    class Tcp(FakeProbe):
        name, log = "tcp", []

        def __init__(self, *_: object, connections: int, **__: object) -> None:
            given["tcp"] = connections

    class Requests(FakeProbe):
        name, log = "requests", []

        def __init__(self, *_: object, connections: int, **__: object) -> None:
            given["requests"] = connections

    fake_probes(monkeypatch, {})
    monkeypatch.setattr(attacher, "RequestsProbe", Requests)
    monkeypatch.setattr(attacher, "TcpProbe", Tcp)
    monkeypatch.setattr(attacher, "_OTHER_PROBES", (Tcp,))
    config = Config(services=CONFIG.services, limits=Limits(connections=connections))
    with attacher._Probes(config, Transport.RING, 1):
        assert given == {"requests": connections, "tcp": connections}


# ---- the report ----


def reporter(status: AgentStatus) -> tuple[attacher._Attacher, socket.socket]:
    """An attacher that has this to say, and the reader's end of its socket."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    made = attacher._Attacher.__new__(attacher._Attacher)
    fake = cast("Any", made)
    fake._discovery = SimpleNamespace(scan=lambda: Targets({}, {}))
    fake._probes = SimpleNamespace(requests=SimpleNamespace(follow=lambda *_: None, targets=dict), others=[])
    fake._reloads = fake._unsent = None
    fake._run_stats = SimpleNamespace(turn=lambda: None)
    fake._status = lambda: status
    fake._warnings = set()
    fake._socket = ours
    return made, theirs


def report(theirs: socket.socket) -> AgentStatus:
    packet = theirs.recv(1 << 20)
    assert packet[:1] == STATUS_PACKET
    return msgspec.json.decode(packet[1:], type=AgentStatus)


def latencies(count: int) -> tuple[SyscallLatency, ...]:
    return tuple(SyscallLatency("a" * 63, str(number), 10**15, (10**9,) * 28) for number in range(count))


STATUS = AgentStatus(7, "ring", (), (), 0, ())


def test_a_report_that_is_too_long_goes_without_system_calls(caplog: pytest.LogCaptureFixture) -> None:
    """4,096 of them fit the probe's map and no packet; the agent has to live on and to say so."""
    status = AgentStatus(7, "ring", (), (), 0, (), (), latencies(4096))
    made, theirs = reporter(status)
    with theirs, cast("Any", made)._socket, caplog.at_level(logging.WARNING):
        for _ in range(3):
            made._report()
            assert report(theirs) == STATUS
    assert caplog.text.count("too many system calls") == 1


def test_a_report_of_two_services_is_whole() -> None:
    status = AgentStatus(7, "ring", (), (), 0, (), (), latencies(200))
    made, theirs = reporter(status)
    with theirs, cast("Any", made)._socket:
        made._report()
        assert report(theirs) == status


def test_a_reader_that_is_busy_or_gone_is_no_error() -> None:
    made, theirs = reporter(STATUS)
    ours = cast("Any", made)._socket
    with theirs, ours:
        ours.setblocking(False)
        with pytest.raises(BlockingIOError):
            while True:
                ours.send(b"x")
        made._report()
    made, theirs = reporter(STATUS)
    theirs.close()
    made._report()
    cast("Any", made)._socket.close()


def test_another_error_of_the_socket_is_not_hidden() -> None:
    made, theirs = reporter(STATUS)
    theirs.close()
    cast("Any", made)._socket.close()
    with pytest.raises(OSError) as caught:
        made._report()
    assert caught.value.errno == errno.EBADF


def test_the_names_of_the_shared_maps_are_the_requests_probes() -> None:
    text = (Path(probe.__file__).parents[1] / "bpf/targets.bpf.h").read_text()
    for name in probe.SHARED_MAPS:
        assert f"}} {name} SEC(\".maps\");" in text
    assert text.count('SEC(".maps")') == len(probe.SHARED_MAPS)
