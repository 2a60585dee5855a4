"""What is lost is known: full rings, full tables. What was seen is what was delivered and what was lost, exactly."""

from __future__ import annotations

import resource
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import islice

import pytest

from exporter.request import Capture
from probes.probe import Count, Transport
from tests.kernel.conftest import (
    STREAMS,
    Probe,
    Recorded,
    Recorder,
    Requests,
    StartServer,
    Watch,
    loaded,
    netns,
    receive,
    receive_all,
)
from tests.kernel.workloads.texts import answer, request, texts

SIZES = {"reads": 2**20, "writes": 2**14, "events": 2**16}
"""Bytes of the small rings: 255 reads, 31 writes, about 700 events. Perf buffers are some times larger in all."""
CONNECTIONS = 31
TARGETS = 16384
"""Entries of the table of targets, bpf/targets.bpf.h."""
PORTS = 4096
"""The same of ports."""
CALLS = 1024
"""The smallest table of calls, probes/requests.py."""
PIDS = 2**22
"""No process id is larger."""

ANSWER = b"".join(answer(7))
SERVE_ONE = (["request", "recvfrom"], ["write", "sendto", texts(answer(7))])


@pytest.fixture(scope="module")
def small_probe(transport: Transport) -> Iterator[Probe]:
    """A probe with small buffers and a small table of connections."""
    with loaded(transport, sizes=SIZES, connections=CONNECTIONS) as probe:
        probe.raw.attach()
        yield probe


@pytest.fixture
def small(small_probe: Probe) -> Iterator[Recorded]:
    small_probe.drain(Recorder())
    watch = Recorded(small_probe)
    yield watch
    for stream, (seen, lost) in STREAMS.items():
        assert watch.counted(seen) == watch.delivered(stream) + watch.counted(lost)
    small_probe.raw.follow({}, {})


def test_more_writes_than_fit(small: Recorded, serve: StartServer) -> None:
    """1,009 writes that nobody reads meanwhile; then the same again, for the room has come back."""
    server = serve(["write", "sendto", [f"frame {number:04}" for number in range(1009)]])
    small.follow(server)
    delivered = [0]
    for rounds in (1, 2):
        with server.connect() as client:
            assert len(receive_all(client)) == 1009 * 10
        server.done()
        small.drain(small.recorder)
        assert small.counted(Count.SEEN_WRITES) == rounds * 1009
        assert small.delivered("writes") + small.counted(Count.LOST_WRITES_RING_FULL) == rounds * 1009
        delivered.append(small.delivered("writes"))
        assert delivered[-2] < delivered[-1] < delivered[-2] + 1009
    assert set(small.reasons()) == {Count.LOST_WRITES_RING_FULL}
    small.until_closed(2)
    for seen in small.recorder.connections.values():
        for stretch in seen.writes:
            offset = (stretch.position - seen.tx_position) % 2**32
            assert stretch.data == b"frame %04d" % (offset // 10)


def test_more_reads_than_fit(small: Recorded, serve: StartServer) -> None:
    server = serve(["read", "recvfrom", 7 * 1009, 7])
    small.follow(server)
    with server.connect() as client:
        client.sendall(b"".join(b"%07d" % number for number in range(1009)))
        server.done()
    small.until_closed()
    assert small.counted(Count.SEEN_READS) == 1009
    assert small.reasons() == {Count.LOST_READS_RING_FULL: 1009 - len(small.recorder.only.reads)}
    seen = small.recorder.only
    for stretch in seen.reads:
        offset = (stretch.position - seen.rx_position) % 2**32
        assert stretch.data == b"%07d" % (offset // 7)


def test_more_events_than_fit(small: Recorded, serve: StartServer) -> None:
    server = serve(["until_eof"])
    small.follow(server)
    for _ in range(503):
        with server.connect() as client:
            client.sendall(b"hi")
        server.done()
    small.drain(small.recorder)
    seen, lost = small.counted(Count.SEEN_EVENTS), small.counted(Count.LOST_EVENTS_RING_FULL)
    assert lost > 0
    assert small.delivered("events") == seen - lost
    assert seen >= 6 * 503  # opened, accepted, the segment, and at least three changes of state for each
    assert len(small.recorder.connections) < 503
    assert small.counted(Count.CONNECTIONS_FULL) == 0


def test_later_records_say_how_many_were_lost_before(small: Recorded, serve: StartServer) -> None:
    server = serve(
        ["write", "sendto", ["x"] * 1009], ["say", "full"], ["wait"], ["write", "sendto", ["after"]],
        ["read", "recvfrom", 1],
    )  # fmt: skip
    small.follow(server)
    with server.connect() as client:
        server.heard("full")
        small.drain(small.recorder)
        server.go()
        client.sendall(b"!")
        receive_all(client)
    server.done()
    small.until_closed()
    lost = small.counted(Count.LOST_WRITES_RING_FULL)
    assert lost > 0
    seen = small.recorder.only
    assert (seen.writes[-1].data, seen.writes[-1].lost, seen.writes[-1].lost_other) == (b"after", lost, 0)
    assert (seen.writes[-1].position - seen.tx_position) % 2**32 == 1009
    assert (seen.reads[-1].data, seen.reads[-1].lost, seen.reads[-1].lost_other) == (b"!", 0, lost)
    assert {(state.tx_position - seen.tx_position) % 2**32 for state in seen.states} == {1009 + 5}


def test_requests_that_lost_records_are_known_and_the_others_are_whole(small: Recorded, serve: StartServer) -> None:
    """Nobody reads while 53 requests are answered, and only writes are too many; then 13 more, read in time."""
    requests = Requests()
    server = serve(*SERVE_ONE)
    small.follow(server)
    for number in range(53):
        with server.connect() as client:
            client.sendall(request(f"lossy-{number}"))
            assert receive_all(client) == ANSWER
        server.done()
    small.until(requests, lambda: not len(requests), "all connections are closed")
    assert set(small.reasons()) == {Count.LOST_WRITES_RING_FULL}
    assert [each.model for each in requests.done] == [f"lossy-{number}" for number in range(53)]
    whole = [each for each in requests.done if each.capture is Capture.complete]
    hurt = [each for each in requests.done if each.capture is Capture.lost_events]
    assert 0 < len(whole) < 53
    assert len(whole) + len(hurt) == 53
    assert {(each.frames, each.completion_tokens) for each in whole} == {(7, 7)}
    # What is not known is not said.
    assert {(each.failure, each.aborted) for each in requests.done} == {(None, None)}
    assert Counter(requests.captured) == {Capture.complete: len(whole), Capture.lost_events: len(hurt)}
    requests.done.clear()
    for number in range(13):
        with server.connect() as client:
            client.sendall(request(f"good-{number}"))
            assert receive_all(client) == ANSWER
        server.done()
        small.drain(requests)
    assert [each.model for each in requests.done] == [f"good-{number}" for number in range(13)]
    assert {(each.frames, each.capture) for each in requests.done} == {(7, Capture.complete)}


def test_nothing_is_made_up_when_everything_overflows(small: Recorded, serve: StartServer) -> None:
    """307 requests on connections whose very beginnings were lost: those that are called complete are."""
    requests = Requests()
    server = serve(*SERVE_ONE)
    small.follow(server)
    for number in range(307):
        with server.connect() as client:
            client.sendall(request(f"lossy-{number}"))
            assert receive_all(client) == ANSWER
        server.done()
    small.drain(requests)
    assert set(small.reasons()) == {
        Count.LOST_WRITES_RING_FULL, Count.LOST_READS_RING_FULL, Count.LOST_EVENTS_RING_FULL,
    }  # fmt: skip
    assert len(requests.captured) <= 307
    assert {Capture.complete, Capture.lost_events} <= set(requests.captured)
    assert set(requests.captured) <= {Capture.complete, Capture.lost_events, Capture.arrival_unseen}
    for each in requests.done:
        assert (each.failure, each.aborted) == (None, None)
        assert each.frames == 7 if each.capture is not Capture.lost_events else each.frames <= 7
    requests.done.clear()
    for number in range(13):
        with server.connect() as client:
            client.sendall(request(f"good-{number}"))
            assert receive_all(client) == ANSWER
        server.done()
        small.drain(requests)
    good = [each for each in requests.done if str(each.model).startswith("good")]
    assert [each.model for each in good] == [f"good-{number}" for number in range(13)]
    assert {each.capture for each in good} == {Capture.complete}


def test_a_connection_that_lost_records_recovers(small: Recorded, serve: StartServer) -> None:
    """Keep-alive: the answer in the middle is more than fits, the requests after it are measured again."""
    requests = Requests()
    big = b"".join(answer(1009))
    server = serve(
        ["repeat", 3, SERVE_ONE],
        ["request", "recvfrom"],
        ["write", "sendto", texts(answer(1009))],
        ["repeat", 5, SERVE_ONE],
    )
    small.follow(server)
    with server.connect() as client:
        for number, whole in enumerate([ANSWER] * 3 + [big] + [ANSWER] * 5):
            client.sendall(request(f"owl-{number}"))
            assert receive(client, len(whole)) == whole
            time.sleep(0.002)  # the last call has returned
            small.drain(requests)
    server.done()
    small.until(requests, lambda: not len(requests), "the connection is closed")
    captures = {each.model: (each.frames, each.capture) for each in requests.done}
    frames, capture = captures.pop("owl-3")
    assert frames < 1009
    assert capture is Capture.lost_events
    assert captures == {f"owl-{number}": (7, Capture.complete) for number in (0, 1, 2, 4, 5, 6, 7, 8)}
    assert Counter(requests.captured) == {Capture.complete: 8, Capture.lost_events: 1}


def test_a_new_reader_skips_what_waits(small: Recorded, serve: StartServer) -> None:
    server = serve(["write", "sendto", ["x"] * 11])
    small.follow(server)
    with server.connect() as client:
        receive_all(client)
    server.done()
    time.sleep(0.005)
    waiting = small.probe.undelivered()
    assert waiting["writes"] == 11
    skipped = small.probe.records.skip_all()
    assert skipped == sum(waiting.values())
    assert small.probe.records.drain(small.recorder) == 0
    assert small.recorder.connections == {}
    for stream, count in waiting.items():  # for the next test's accounts
        small.probe.records.delivered[stream] += count


# ---- full tables ----


def test_a_full_table_of_connections_is_counted(small: Recorded, serve: StartServer) -> None:
    server = serve(["read", "recvfrom", 5], ["say", "got"], ["until_eof"], manner="threads")
    small.follow(server)
    with ExitStack() as stack:
        clients = []
        for number in range(CONNECTIONS + 3):
            clients.append(stack.enter_context(server.connect()))
            clients[-1].sendall(b"hello")
            server.heard("got")
            small.drain(small.recorder)
            assert len(small.recorder.connections) == min(number + 1, CONNECTIONS)
            assert (small.counted(Count.CONNECTIONS_FULL) > 0) == (number >= CONNECTIONS)
        for client in clients[CONNECTIONS:]:  # while there is no room for them
            client.close()
            server.done()
    server.done(CONNECTIONS)
    small.until_closed(CONNECTIONS)
    assert {tuple(seen.read_bytes) for seen in small.recorder.connections.values()} == {(b"hello",)}
    # of each: the opening, which two programs see; the accept; the segment; two calls
    assert small.reasons() == {Count.CONNECTIONS_FULL: 3 * 6}
    with server.connect() as client:  # there is room again
        client.sendall(b"hello")
        server.heard("got")
    server.done()
    small.until_closed(CONNECTIONS + 1)


def test_a_full_table_of_targets_is_counted(recorded: Recorded, serve: StartServer) -> None:
    """Room for one more process: of four children one is followed."""
    server = serve(["say", "child {pid}"], ["wait"], ["read", "recvfrom", 5], manner="forks")
    ghosts = {PIDS + number: 0 for number in range(1, TARGETS - 1)}
    recorded.probe.raw.follow({server.pid: 0, **ghosts}, {(netns(), server.port): 0})
    with ExitStack() as stack:
        clients = []
        for _ in range(4):
            clients.append(stack.enter_context(server.connect()))
            server.heard("child")
        for client in clients:
            client.sendall(b"hello")
            server.go()
        server.done(4)
    recorded.until_closed(4)
    assert recorded.reasons() == {Count.TARGETS_FULL: 3, Count.UNFOLLOWED_IO: 3}
    parts = [seen.read_bytes for seen in recorded.recorder.connections.values()]
    assert sorted(map(len, parts)) == [0, 0, 0, 1]


def test_a_full_table_of_ports_is_counted_and_those_that_stand_in_it_are_followed(
    recorded: Recorded, serve: StartServer
) -> None:
    server = serve(["read", "recvfrom", 5])
    others = (port for port in range(1, 65536) if port != server.port)
    ports = {(netns(), port): 0 for port in (server.port, *islice(others, PORTS + 2))}
    for _ in range(2):
        recorded.probe.raw.follow({server.pid: 0}, ports)
    with server.connect() as client:
        client.sendall(b"hello")
        server.done()
    recorded.until(
        recorded.recorder, lambda: any(each.read_bytes for each in recorded.recorder.connections.values()), "it is read"
    )
    assert recorded.reasons() == {Count.PORTS_FULL: 3}


def test_a_full_table_of_calls_is_counted(transport: Transport, serve: StartServer) -> None:
    """1,031 threads sit in a read, and there is room for 1,024 of them; those that are killed there make room."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert hard >= 4 * CALLS, "this test needs descriptors for 1,031 connections: ulimit -Hn 8192"
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    recorder = Recorder()
    with loaded(transport, connections=2 * CALLS) as probe, ExitStack() as stack:
        probe.raw.attach()
        watch = Watch(probe)
        missed = 0
        for threads, answered in ((CALLS + 7, 101), (CALLS, 103)):
            server = serve(["read", "recvfrom", 5], manner="threads")
            watch.follow(server)
            before = watch.counted(Count.SEEN_READS)
            clients = [stack.enter_context(server.connect()) for _ in range(threads)]
            server.all_threads_sit_in_calls(threads + 1)
            watch.drain(recorder)
            assert watch.counted(Count.CALLS_FULL) == 7
            for client in clients[:answered]:
                client.sendall(b"hello")
            server.done(answered)
            server.kill()
            for client in clients:
                client.close()
            watch.until(recorder, lambda: recorder.all_closed, "all connections are closed")
            read = Counter(tuple(seen.read_bytes) for seen in recorder.connections.values())
            followed = watch.counted(Count.SEEN_READS) - before
            assert read == {(b"hello",): followed, (): threads - followed}
            missed += answered - followed
            assert missed <= 7
            assert watch.reasons() == {Count.CALLS_FULL: 7} | ({Count.UNFOLLOWED_IO: missed} if missed else {})
            recorder.connections.clear()
        assert followed == 103
