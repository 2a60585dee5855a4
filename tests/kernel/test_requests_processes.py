"""Whom the requests probe follows: forks, workers, threads, late attachment; and whom it leaves alone."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from exporter.request import Capture
from probes.probe import Count, Transport
from probes.records import RequestRecords
from tests.kernel.conftest import (
    Followed,
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

ANSWER = b"".join(answer(7))
ONE_REQUEST = (["request", "recvfrom"], ["write", "sendto", texts(answer(7))])


def test_children_are_followed_without_a_look_at_the_processes(followed: Followed, serve: StartServer) -> None:
    server = serve(["say", "child {pid}"], *ONE_REQUEST, manner="forks")
    followed.follow(server)
    children = []
    for number in range(5):
        with server.connect() as client:
            children.append(int(server.heard("child")))
            assert followed.probe.raw.targets() == {server.pid: 0, children[-1]: 0}
            client.sendall(request(f"owl-{number}"))
            assert receive_all(client) == ANSWER
        server.done()
        followed.until(
            followed.requests,
            lambda: followed.probe.raw.targets() == {server.pid: 0},
            "the child is no target after its end",
        )
    done = followed.until_done(5)
    assert [each.model for each in done] == [f"owl-{number}" for number in range(5)]
    assert [each.tgid for each in done] == children
    assert [each.capture for each in done] == [Capture.complete] * 5
    assert len({server.pid, *children}) == 6
    assert followed.reasons() == {}


def test_grandchildren_are_followed(followed: Followed, serve: StartServer) -> None:
    server = serve(["fork", [["fork", [["say", "grandchild {pid}"], *ONE_REQUEST]]]])
    followed.follow(server)
    with server.connect() as client:
        grandchild = int(server.heard("grandchild"))
        client.sendall(request("owl"))
        assert receive_all(client) == ANSWER
    server.done()
    (done,) = followed.until_done()
    assert (done.tgid, done.frames, done.capture) == (grandchild, 7, Capture.complete)
    assert grandchild != server.pid


def test_workers_that_share_the_listening_socket(followed: Followed, serve: StartServer) -> None:
    """The workers are forked after the probe knows the parent, and each takes what it gets."""
    server = serve(["say", "worker {pid}"], ["wait"], *ONE_REQUEST, workers=3, wait=True)
    followed.follow(server)
    server.go()
    clients = [server.connect() for _ in range(3)]
    workers = {int(server.heard("worker")) for _ in range(3)}
    assert len(workers) == 3  # all three are busy with one connection each
    assert followed.probe.raw.targets() == dict.fromkeys({server.pid, *workers}, 0)
    for client in clients:
        client.sendall(request("owl"))
        server.go()
    for client in clients:
        assert receive_all(client) == ANSWER
        client.close()
    server.done(3)
    done = followed.until_done(3)
    assert {each.tgid for each in done} == workers
    assert [each.capture for each in done] == [Capture.complete] * 3


def test_threads(followed: Followed, serve: StartServer) -> None:
    server = serve(["say", "thread {tid}"], ["wait"], *ONE_REQUEST, manner="threads")
    followed.follow(server)
    clients = [server.connect() for _ in range(11)]
    threads = {int(server.heard("thread")) for _ in range(11)}
    for number, client in enumerate(clients):
        client.sendall(request(f"owl-{number}"))
        server.go()
    for client in clients:
        assert receive_all(client) == ANSWER
        client.close()
    server.done(11)
    done = followed.until_done(11)
    assert {each.model for each in done} == {f"owl-{number}" for number in range(11)}
    assert {each.tgid for each in done} == {server.pid}
    assert {each.tid for each in done} == threads
    assert [each.frames for each in done] == [7] * 11
    assert [each.capture for each in done] == [Capture.complete] * 11
    assert followed.reasons() == {}


def test_streams_that_interleave(followed: Followed, serve: StartServer) -> None:
    server = serve(["request", "recvfrom"], ["trickle", "sendto", 1, texts(answer(23))], manner="threads")
    followed.follow(server)
    clients = [server.connect() for _ in range(13)]
    for number, client in enumerate(clients):
        client.sendall(request(f"owl-{number}"))
    for client in clients:
        assert receive_all(client) == b"".join(answer(23))
        client.close()
    server.done(13)
    done = followed.until_done(13)
    assert {each.model for each in done} == {f"owl-{number}" for number in range(13)}
    assert [(each.frames, each.capture) for each in done] == [(23, Capture.complete)] * 13
    first_end = min(each.finished_ns for each in done)
    assert sum(1 for each in done if each.arrived_ns < first_end) > 1


def test_short_connections_on_the_same_descriptor(followed: Followed, serve: StartServer) -> None:
    server = serve(["say", "fd {fd}"], *ONE_REQUEST)
    followed.follow(server)
    descriptors = set()
    for number in range(101):
        with server.connect() as client:
            descriptors.add(server.heard("fd"))
            client.sendall(request(f"owl-{number}"))
            assert receive_all(client) == ANSWER
        server.done()
    done = followed.until_done(101)
    assert len(descriptors) == 1
    assert [each.model for each in done] == [f"owl-{number}" for number in range(101)]
    assert [(each.frames, each.capture) for each in done] == [(7, Capture.complete)] * 101
    assert len({each.peer for each in done}) == 101
    assert followed.reasons() == {}


def test_two_services_are_kept_apart(recorded: Recorded, serve: StartServer) -> None:
    servers = [serve(["read", "recvfrom", 5], ["write", "sendto", [f"from {number}"]]) for number in range(2)]
    recorded.follow(*servers)
    for number, server in enumerate(servers):
        with server.connect() as client:
            client.sendall(b"to %d!" % number)
            assert receive_all(client) == b"from %d" % number
        server.done()
    recorded.until_closed(2)
    first, second = recorded.recorder.connections.values()
    assert [(seen.service, seen.accepted, seen.read_bytes, seen.written_bytes) for seen in (first, second)] == [
        (0, [0], [b"to 0!"], [b"from 0"]),
        (1, [1], [b"to 1!"], [b"from 1"]),
    ]


# ---- who is left alone ----


def test_a_process_that_is_no_target_is_not_captured(recorded: Recorded, serve: StartServer) -> None:
    target, other = serve(["until_eof"]), serve(["read", "recvfrom", 6], ["write", "sendto", ["secret"]])
    recorded.follow(target)
    with other.connect() as client:
        client.sendall(b"secret")
        assert receive_all(client) == b"secret"
    other.done()
    recorded.drain(recorded.recorder)
    assert recorded.recorder.connections == {}
    assert not recorded.recorder.strangers
    assert {stream: recorded.delivered(stream) for stream in ("events", "reads", "writes")} == dict.fromkeys(
        ("events", "reads", "writes"), 0
    )


def test_a_stranger_on_the_port_of_a_service_is_not_read(recorded: Recorded, serve: StartServer) -> None:
    """Its connections are known, for the port is the service's; what it moves is not copied, and that is counted."""
    server, target = serve(["read", "recvfrom", 6], ["write", "sendto", ["secret"]]), serve(["until_eof"])
    recorded.probe.raw.follow({target.pid: 0}, {(netns(), server.port): 0})
    with server.connect() as client:
        client.sendall(b"secret")
        assert receive_all(client) == b"secret"
    server.done()
    recorded.until_closed()
    assert (recorded.recorder.only.reads, recorded.recorder.only.writes) == ([], [])
    assert recorded.reasons() == {Count.UNFOLLOWED_IO: 1}


def test_a_process_that_is_followed_no_longer_is_not_captured(recorded: Recorded, serve: StartServer) -> None:
    server = serve(
        ["read", "recvfrom", 5], ["say", "got"], ["wait"], ["read", "recvfrom", 6], ["write", "sendto", ["secret"]]
    )
    recorded.follow(server)
    with server.connect() as client:
        client.sendall(b"first")
        server.heard("got")
        recorded.drain(recorded.recorder)
        recorded.probe.raw.follow({}, {})
        server.go()
        client.sendall(b"secret")
        assert receive_all(client) == b"secret"
    server.done()
    recorded.until_closed()
    assert recorded.recorder.only.read_bytes == [b"first"]
    assert recorded.recorder.only.writes == []


def test_a_forked_reader_does_not_inherit_the_filter(recorded: Recorded) -> None:
    """It decodes what strangers sent, as nobody; whoever can write there can blind every probe."""
    address = np.frombuffer(recorded.probe.raw._filter, np.uint8).ctypes.data
    assert is_mapped(address, os.getpid())
    inherits, ends = os.pipe()
    child = os.fork()
    if not child:
        os.close(ends)
        os.read(inherits, 1)
        os._exit(0)
    try:
        assert not is_mapped(address, child)
    finally:
        os.close(ends)
        os.close(inherits)
        os.waitpid(child, 0)


def test_records_come_when_the_descriptors_were_closed_that_they_are_mapped_from(
    transport: Transport, serve: StartServer
) -> None:
    """So the reader keeps none: with one it could do more than read."""
    server, requests = serve(*ONE_REQUEST), Requests()
    with loaded(transport) as probe:
        copies = [replace(each, fds=tuple(map(os.dup, each.fds))) for each in probe.raw.channels]
        with RequestRecords(copies) as probe.records:
            for fd in (fd for each in copies for fd in each.fds):
                os.close(fd)
            probe.raw.attach()
            watch = Watch(probe)
            watch.follow(server)
            with server.connect() as client:
                client.sendall(request("owl"))
                assert receive_all(client) == ANSWER
            server.done()
            watch.until(requests, lambda: requests.done and not len(requests), "the connection is closed")
            assert requests.only.capture is Capture.complete


def is_mapped(address: int, pid: int) -> bool:
    """Whether a process has memory there."""
    ranges = [line.split()[0].split("-") for line in Path(f"/proc/{pid}/maps").read_text().splitlines()]
    return any(int(first, 16) <= address < int(end, 16) for first, end in ranges)


# ---- the agent comes late ----


@pytest.mark.parametrize("how", ["recvfrom", "recvmsg"])
def test_attached_in_mid_stream(transport: Transport, serve: StartServer, how: str) -> None:
    """What is under way is known to be so; the next request on the same connection is measured like any other."""
    pieces = answer(23)
    server = serve(
        ["request", how], ["write", "sendto", texts(pieces[:13])], ["say", "half"], ["wait"],
        ["write", "sendto", texts(pieces[13:])], ["request", how], ["write", "sendto", texts(answer(7))],
    )  # fmt: skip
    with server.connect() as client, loaded(transport) as probe:
        client.sendall(request("early"))
        server.heard("half")
        probe.raw.attach()
        watch, requests = Watch(probe), Requests()
        watch.follow(server)
        server.go()
        assert receive(client, sum(map(len, pieces))) == b"".join(pieces)
        before = time.monotonic_ns()
        client.sendall(request("late"))
        assert receive_all(client) == ANSWER
        server.done()
        client.close()
        watch.until(requests, lambda: requests.done and not len(requests), "the connection is closed")
        assert requests.captured == [Capture.start_unseen, Capture.complete]
        (done,) = requests.done
        assert (done.model, done.frames, done.capture) == ("late", 7, Capture.complete)
        assert before <= done.arrived_ns <= done.read_ns
        assert watch.reasons() == {}


def test_attached_while_the_service_waits_in_its_read(transport: Transport, serve: StartServer) -> None:
    """The call under way is not seen; that it moved bytes is, and the connection is followed from the next one on."""
    server = serve(["say", "fd {fd}"], ["repeat", 3, ONE_REQUEST])
    with server.connect() as client, loaded(transport) as probe:
        server.sits_in_call_on(int(server.heard("fd")))
        probe.raw.attach()
        watch, requests = Watch(probe), Requests()
        watch.follow(server)
        for number in range(3):
            client.sendall(request(f"owl-{number}"))
            assert receive(client, len(ANSWER)) == ANSWER
        server.done()
        client.close()
        watch.until(requests, lambda: len(requests.done) >= 2 and not len(requests), "the connection is closed")
        assert [each.model for each in requests.done] == ["owl-1", "owl-2"]
        assert requests.captured == [Capture.start_unseen, Capture.complete, Capture.complete]
        assert watch.reasons() == {Count.UNFOLLOWED_IO: 1}


@pytest.mark.parametrize(("sends", "capture"), [("before", Capture.arrival_unseen), ("after", Capture.complete)])
def test_a_connection_that_nobody_had_accepted_yet_is_followed_from_its_first_byte(
    followed: Followed, serve: StartServer, sends: str, capture: Capture
) -> None:
    """Its first read need not look like a request: here it is one byte."""
    server = serve(["request", "recvfrom", 1], ["write", "sendto", texts(answer(7))], wait=True)
    with server.connect() as client:
        if sends == "before":
            client.sendall(request("owl"))
        followed.follow(server)
        if sends == "after":
            client.sendall(request("owl"))
        server.go()
        assert receive_all(client) == ANSWER
    server.done()
    (done,) = followed.until_done()
    assert (done.model, done.frames, done.capture) == ("owl", 7, capture)
    assert followed.requests.captured == [capture]
    assert followed.reasons() == {}


def forget_who_it_is(followed: Followed) -> None:
    """Make the kernel's entry of a connection one of an earlier life of the socket's memory: of another peer."""
    connections = followed.probe.raw.map("connections")
    ((key, value),) = connections.items()
    connections.update(key, value[:8] + bytes([value[8] ^ 1]) + value[9:])


def test_an_end_that_was_not_seen_is_told_when_the_socket_is_another_connection(
    followed: Followed, serve: StartServer
) -> None:
    """Nothing stays in flight for ever, and what comes next is followed as what it is: somebody else's."""
    server = serve(["request", "recvfrom"], ["say", "got"], ["wait"], ["repeat", 2, ONE_REQUEST])
    followed.follow(server)
    with server.connect() as client:
        client.sendall(request("never-seen-to-end"))
        server.heard("got")
        followed.drain(followed.requests)
        assert len(list(followed.requests.in_flight())) == 1
        forget_who_it_is(followed)
        server.go()
        for number in range(2):
            client.sendall(request(f"owl-{number}"))
            assert receive(client, len(ANSWER)) == ANSWER
        server.done()
    first, *others = followed.until_done(3)
    assert (first.model, first.capture, first.frames) == ("never-seen-to-end", Capture.end_unseen, 0)
    assert [(each.model, each.frames) for each in others] == [("owl-0", 7), ("owl-1", 7)]
    assert followed.reasons() == {Count.STALE_CONNECTION: 1}


def test_two_probes_at_once_see_the_same(followed: Followed, transport: Transport, serve: StartServer) -> None:
    server = serve(["repeat", 5, ONE_REQUEST])
    with loaded(transport) as second:
        second.raw.attach()
        watch, recorder = Watch(second), Recorder()
        followed.follow(server)
        watch.follow(server)
        with server.connect() as client:
            for number in range(5):
                client.sendall(request(f"owl-{number}"))
                assert receive(client, len(ANSWER)) == ANSWER
        server.done()
        done = followed.until_done(5)
        assert [each.capture for each in done] == [Capture.complete] * 5
        watch.until(recorder, lambda: recorder.all_closed, "the second probe saw the end")
        assert recorder.only.read_bytes == [b"".join(request(f"owl-{number}") for number in range(5))]
        assert recorder.only.written_bytes == [ANSWER * 5]
