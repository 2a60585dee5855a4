"""What all probes share in the kernel: the filter of targets, counters by service, and both ways of the records."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from exporter import attacher, kernel_metrics
from exporter.config import Config, Match, Probes, Service
from probes import libbpf
from probes.btf import dtype_of
from probes.probe import OBJECTS, Transport
from probes.requests import RequestsProbe
from probes.scheduler import SchedulerProbe
from probes.service_stats import ServiceStats
from probes.streams import Streams
from tests.kernel.conftest import PATIENCE_S, Recorded, StartServer, netns, receive_all, reset
from tests.kernel.scheduling import Workload, until

SERVICES = 3
SEEN = 0.9
"""There are kernels that do not trace every switch, see `Watched.disturbed`."""
OBJECT = OBJECTS / "scheduler.bpf.o"
ANSWER = ["write", "sendto", ["pong"]]


# ---- the filter ----


def place_of(tgid: int) -> int:
    return tgid % 65536


def exchange(recorded: Recorded, serve: StartServer, *, mark: int | None, forget: bool = False) -> int:
    """A server is followed, its place in the filter gets a mark, a client talks to it: how many bytes were seen."""
    server = serve(["read", "recvfrom", 4], ANSWER, wait=True)
    recorded.follow(server)
    if forget:
        recorded.probe.raw.map("targets").delete(server.pid.to_bytes(4, "little"))
    if mark is not None:
        recorded.probe.raw._filter[place_of(server.pid)] = mark
    server.go()
    with server.connect() as client:
        client.sendall(b"ping")
        assert receive_all(client) == b"pong"
    server.done()
    recorded.until_closed()
    return sum(len(each.data) for each in (*recorded.recorder.only.reads, *recorded.recorder.only.writes))


def test_a_target_whose_place_is_marked_is_followed(recorded: Recorded, serve: StartServer) -> None:
    assert exchange(recorded, serve, mark=None) == 8


def test_a_place_that_user_space_holds_for_stale_still_passes(recorded: Recorded, serve: StartServer) -> None:
    """A fork may come between the look at the targets and the clearing: such a place is kept for another round."""
    assert exchange(recorded, serve, mark=2) == 8


def test_the_filter_is_asked_first(recorded: Recorded, serve: StartServer) -> None:
    """Else the tests of clearing would show nothing."""
    assert exchange(recorded, serve, mark=0) == 0


def test_a_place_alone_makes_no_target(recorded: Recorded, serve: StartServer) -> None:
    """Another target may have a tgid that ends in the same bits."""
    assert exchange(recorded, serve, mark=1, forget=True) == 0


def test_a_place_that_a_race_has_cleared_is_set_by_the_next_round(recorded: Recorded, serve: StartServer) -> None:
    server = serve(["read", "recvfrom", 4], ANSWER, wait=True)
    recorded.follow(server)
    recorded.probe.raw._filter[place_of(server.pid)] = 0
    recorded.follow(server)  # the attacher's next look, a second later
    server.go()
    with server.connect() as client:
        client.sendall(b"ping")
        assert receive_all(client) == b"pong"
    server.done()
    recorded.until_closed()
    assert recorded.recorder.only.read_bytes == [b"ping"]


def test_children_of_the_kernels_making_outlive_the_rounds(recorded: Recorded, serve: StartServer) -> None:
    server = serve(["read", "recvfrom", 4], ANSWER, workers=2, wait=True)
    recorded.follow(server)
    server.go()
    recorded.until(
        recorded.recorder, lambda: len(recorded.probe.raw.targets()) == 3, "the parent and two workers are targets"
    )
    for _ in range(3):
        recorded.follow(server)
    filters = recorded.probe.raw._filter
    assert all(filters[place_of(tgid)] == 1 for tgid in recorded.probe.raw.targets())
    with server.connect() as client:
        client.sendall(b"ping")
        assert receive_all(client) == b"pong"
    server.done()
    recorded.until_closed()
    (read,) = recorded.recorder.only.reads
    assert read.tgid != server.pid
    server.kill()
    recorded.until(recorded.recorder, lambda: recorded.probe.raw.targets() == {}, "no target is left")
    for _ in range(2):
        recorded.probe.raw.follow({}, {})
    assert not any(recorded.probe.raw._filter[:])


# ---- counters ----


@pytest.fixture(scope="module")
def scheduler(able_host: None) -> Iterator[tuple[RequestsProbe, SchedulerProbe, ServiceStats]]:
    """The scheduler probe for three services, attached."""
    with ExitStack() as stack:
        requests = stack.enter_context(RequestsProbe(Transport.RING))
        probe = stack.enter_context(SchedulerProbe(Transport.RING, services=SERVICES, shares_with=requests))
        probe.attach()
        requests.attach()
        assert probe.stats_map is not None
        yield requests, probe, ServiceStats(probe.stats_map)
        requests.follow({}, {})


def words(totals: npt.NDArray[Any]) -> npt.NDArray[np.uint64]:
    """The counters as plain numbers: (services, words)."""
    return np.ascontiguousarray(totals).view(np.uint64).reshape(SERVICES, -1)


def looked_up(probe: SchedulerProbe) -> npt.NDArray[np.uint64]:
    """The same by system calls: an element for each CPU and service, CPU by CPU."""
    sums: npt.NDArray[np.uint64] | None = None
    for key, value in probe.map("stats").items():
        element = np.frombuffer(value, np.uint64)
        if sums is None:
            sums = np.zeros((SERVICES, len(element)), np.uint64)
        sums[int.from_bytes(key, "little") % SERVICES] += element
    assert sums is not None
    return sums


def test_histograms_have_the_buckets_of_the_exporter() -> None:
    (counts,) = (kind for name, (kind, *_) in (dtype_of(OBJECT, "histogram").fields or {}).items() if name == "counts")
    assert counts.shape == (kernel_metrics.BUCKETS,)
    assert len(kernel_metrics.BOUNDS) == kernel_metrics.BUCKETS - 1


def test_each_service_has_its_own_counters(
    scheduler: tuple[RequestsProbe, SchedulerProbe, ServiceStats],
) -> None:
    requests, _, stats = scheduler
    before = words(stats.totals()).copy()
    with ExitStack() as stack:
        workloads = [stack.enter_context(Workload("sleeps", 101)) for _ in range(2)]
        requests.follow({workloads[0].pid: 0, workloads[1].pid: 2}, {})
        for workload in workloads:
            workload.done()
        requests.follow({}, {})
        grown = words(stats.totals()) - before
    assert (grown[1] == 0).all()
    for service in (0, 2):
        found = stats.totals()[service]
        assert grown[service].sum() > 0
        assert found["switches"] >= 101 * SEEN
        assert found["run_queue_wait"]["counts"].sum() >= 101 * SEEN


def test_what_is_mapped_is_what_the_kernel_has(
    scheduler: tuple[RequestsProbe, SchedulerProbe, ServiceStats],
) -> None:
    requests, probe, stats = scheduler
    with Workload("sleeps", 101) as workload:
        requests.follow({workload.pid: 1}, {})
        workload.done()
    requests.follow({}, {})

    def at_rest() -> bool:  # programs of the last switches may still run on another CPU
        return bool((words(stats.totals()) == looked_up(probe)).all())

    until(at_rest, "the counters are at rest")
    assert words(stats.totals())[1].sum() > 0
    assert probe.stats_map is not None
    assert (probe.stats_map.cpus, probe.stats_map.services) == (libbpf.possible_cpus(), SERVICES)


def test_counters_that_are_read_while_programs_add_only_grow(
    scheduler: tuple[RequestsProbe, SchedulerProbe, ServiceStats],
) -> None:
    requests, _, stats = scheduler
    with ExitStack() as stack:
        workloads = [stack.enter_context(Workload("sleeps", 1009)) for _ in range(2)]
        requests.follow({workload.pid: 0 for workload in workloads}, {})
        before = words(stats.totals()).copy()
        first = before
        done = threading.Event()

        def let_run() -> None:
            for workload in workloads:
                workload.go()
            for workload in workloads:
                workload.facts()
            done.set()

        running = threading.Thread(target=let_run)
        running.start()
        looks = changed = 0
        while not done.is_set():
            now = words(stats.totals())
            # A number that is read in halves would jump by 2**32; these are nanoseconds of a few seconds.
            assert ((now >= before) & (now - first < 2**40)).all()
            changed += bool((now != before).any())
            looks += 1
            before = now.copy()
            time.sleep(0.001)
        running.join()
        requests.follow({}, {})
    assert changed > 10
    found = stats.totals()[0]
    assert found["switches"] >= 2 * 1009 * SEEN


# ---- an agent's probes, all together, both ways ----


def test_all_probes_attach_beside_each_other_and_their_records_come(
    transport: Transport, serve: StartServer
) -> None:
    wanted = Config(services=(Service("tested", Match(port=(1,))),), probes=Probes(syscalls=True, cuda=True))
    server = serve(["read", "recvfrom", 4], ["wait"], manner="threads")
    came: dict[str, npt.NDArray[Any]] = {}

    def take(name: str, records: npt.NDArray[Any]) -> None:
        came[name] = np.concatenate([came[name], records]) if name in came else records.copy()

    with attacher._Probes(wanted, transport, 3) as probes:
        assert probes.missing == {}
        names = [each.name for each in probes.up]
        assert names == ["requests", "scheduler", "tcp", "block", "memory", "syscalls", "cuda"]
        channels = [channel for probe in probes.others for channel in probe.channels]
        with Streams(channels) as streams:
            assert set(streams.dtypes) == {
                *("intervals", "messages", "names", "spans", "tcp_events", "block_ios", "gpu_spans"),
            }
            probes.requests.follow({server.pid: 0}, {(netns(), server.port): 0})
            client = server.connect()
            client.sendall(b"ping")
            server.all_threads_sit_in_calls(2)
            reset(client)
            server.go()
            server.done()
            deadline = time.monotonic() + PATIENCE_S
            while not {"intervals", "names", "tcp_events"} <= came.keys():
                assert time.monotonic() < deadline, f"only {sorted(came)} came"
                streams.drain(take)
                time.sleep(0.005)
            probes.requests.follow({}, {})
        lost = {
            count: probe.counts()[count] for probe in probes.up for stream in probe.streams for count in (stream.lost,)
        }
    assert not any(lost.values())
    assert set(came["intervals"]["tgid"].tolist()) == {server.pid}
    assert {os.getpid()} & set(came["names"]["tgid"].tolist()) == set()
    assert came["tcp_events"]["service"].tolist() == [0] * len(came["tcp_events"])
