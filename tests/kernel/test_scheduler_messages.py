"""The scheduler probe: the messages on sockets that lead from one thread to the next."""

from __future__ import annotations

import errno
import socket
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from probes import btf
from probes.probe import OBJECTS
from tests.kernel.conftest import PATIENCE_S
from tests.kernel.scheduling import (
    READY,
    RECEIVED,
    SENT,
    WAKER_TARGET,
    Reason,
    Waker,
    Watched,
    Workload,
    follow,
    scheduler,
    until,
    watch,
)

__all__ = ["scheduler", "watch"]  # fixtures


def client_ports(watch: Watched) -> bytes:
    """Which local ports the probe takes for those of connections that services opened."""
    found = watch.probe.map("client_ports").lookup(bytes(4))
    assert found is not None
    return found


def ends(message: np.void) -> list[int]:
    return [int(message["local_port"]), int(message["peer_port"])]


def test_the_kinds_are_those_of_c() -> None:
    kinds = {"MESSAGE_READY": READY, "MESSAGE_SENT": SENT, "MESSAGE_RECEIVED": RECEIVED}
    assert btf.enum_of(OBJECTS / "scheduler.bpf.o", "message_kind") == kinds


@pytest.mark.parametrize("scenario", ["unix", "unix_epoll"])
def test_a_message_over_a_unix_socket_leads_to_its_sender(watch: Watched, scenario: str) -> None:
    with Workload(scenario) as workload:
        follow(watch.requests, workload)
        facts = workload.done()
        watch.drain()
    wait = watch.wait(facts)
    (ready,) = watch.messages(READY)
    (received,) = watch.messages(RECEIVED)
    assert wait["ready_sk"] == ready["sk"] == received["sk"] != 0
    assert (ready["tid"], ready["tgid"], ready["result"]) == (facts["waker"], workload.pid, 0)
    assert (received["tid"], received["tgid"], received["result"]) == (facts["tid"], workload.pid, 1)
    assert ready["family"] == received["family"] == socket.AF_UNIX
    assert wait["off_ns"] < ready["at_ns"] <= wait["wake_ns"] <= wait["on_ns"] < received["at_ns"]
    assert wait["object"] == (ready["sk"] if scenario == "unix" else 0)
    assert not len(watch.messages(SENT))


@pytest.mark.parametrize(
    ("scenario", "family", "host"), [("tcp", socket.AF_INET, "127.0.0.1"), ("tcp6_epoll", socket.AF_INET6, "::1")]
)
def test_a_message_over_loopback_leads_to_its_sender(watch: Watched, scenario: str, family: int, host: str) -> None:
    with Workload(scenario) as workload:
        follow(watch.requests, workload)
        facts = workload.done()
        watch.drain()
    wait = watch.wait(facts)
    (ready,) = watch.messages(READY)
    (received,) = watch.messages(RECEIVED)
    (sent,) = watch.messages(SENT)
    assert wait["ready_sk"] == ready["sk"] == received["sk"] != sent["sk"]
    assert (ready["tid"], received["tid"], sent["tid"]) == (facts["waker"], facts["tid"], facts["waker"])
    assert (received["result"], sent["result"]) == (1, 1)
    assert ends(ready) == ends(received) == facts["ports"] == ends(sent)[::-1]
    peer = socket.inet_pton(family, host).ljust(16, b"\0")
    for message in (ready, received, sent):
        assert message["family"] == family
        assert bytes(message["peer"]) == peer
    assert wait["off_ns"] < ready["at_ns"] <= wait["wake_ns"] < sent["at_ns"]


def test_messages_are_counted_exactly(watch: Watched) -> None:
    with Workload("messages", 101) as workload:
        follow(watch.requests, workload)
        workload.done()
        watch.drain()
    for kind, result in ((READY, 0), (RECEIVED, 3)):
        found = watch.messages(kind)
        assert len(found) == 101
        assert set(found["result"]) == {result}
    assert not len(watch.messages(SENT))
    assert not watch.losses()


def test_a_full_unix_socket_says_so(watch: Watched) -> None:
    with Workload("full") as workload:
        follow(watch.requests, workload)
        facts = workload.done()
        watch.drain()
    (full,) = watch.messages(SENT)
    assert full["result"] == -errno.EAGAIN
    assert len(watch.messages(READY)) >= facts["sends"] > 0


def serve(watch: Watched, scenario: str, *followed: Workload, server: Workload) -> int:
    """Let a server listen; follow these and its port where it is one of them. Returns the port."""
    server.go()
    port = int(server.facts()["port"])
    follow(watch.requests, *followed, ports=(port,) if server in followed else ())
    return port


def test_what_a_client_from_outside_asks_makes_no_message(watch: Watched) -> None:
    """The client is on this host, but no target; that its bytes ended the wait is seen all the same."""
    with Workload("serve") as server:
        port = serve(watch, "serve", server, server=server)
        with socket.create_connection(("127.0.0.1", port), PATIENCE_S) as client:
            until(lambda: server.waits_on_descriptor(2), "the server waits for the question")
            client.send(b"x")
            assert len(client.recv(23, socket.MSG_WAITALL)) == 23
            facts = server.facts()
        watch.drain()
    wait = watch.wait(facts)
    assert (Reason(wait["reason"]), Waker(wait["waker"])) == (Reason.SOCKET, Waker.NETWORK)
    assert wait["ready_sk"] == wait["object"] != 0
    assert (wait["waker_tid"], wait["waker_tgid"], wait["flags"] & WAKER_TARGET) == (0, 0, 0)
    assert not len(watch.records("messages"))


def test_a_question_to_a_server_outside_is_seen_with_its_answer(watch: Watched) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, Workload("ask", listener.getsockname()[1]) as asker:
        listener.settimeout(PATIENCE_S)
        follow(watch.requests, asker)
        asker.go()
        server, (_, port) = listener.accept()
        with server:
            assert server.recv(100) == b"question"
            assert client_ports(watch)[port]
            until(lambda: asker.waits_on_descriptor(2), "it waits for the answer")
            server.send(b"y" * 23)
            facts = asker.facts()
        watch.drain()
        until(lambda: not client_ports(watch)[port], "the port is not a client's any more")
    wait = watch.wait(facts)
    assert (Reason(wait["reason"]), Waker(wait["waker"])) == (Reason.SOCKET, Waker.NETWORK)
    assert (wait["waker_tid"], wait["flags"]) == (0, 0)
    (sent,) = watch.messages(SENT)
    (received,) = watch.messages(RECEIVED)
    assert sent["sk"] == received["sk"] == wait["ready_sk"] != 0
    assert (sent["result"], received["result"]) == (8, 23)
    assert (sent["tid"], received["tid"]) == (asker.pid, facts["tid"])
    assert ends(sent) == ends(received) == facts["ports"]
    assert bytes(sent["peer"])[:4] == socket.inet_aton("127.0.0.1")
    assert sent["at_ns"] < received["at_ns"]


def test_one_service_asks_another(watch: Watched) -> None:
    """Both are targets, one listens on a port of a service: question and answer lead to their senders."""
    with Workload("serve") as server:
        server.go()
        port = int(server.facts()["port"])
        with Workload("ask", port) as asker:
            follow(watch.requests, server, asker, ports=(port,))
            facts = asker.done()
            answer = server.facts()
            watch.drain()
    ready = {int(each["tid"]): each for each in watch.messages(READY)}
    assert ready.keys() == {asker.pid, server.pid}
    question, reply = ready[asker.pid], ready[server.pid]
    assert ends(question) == answer["ports"] == facts["ports"][::-1] == ends(reply)[::-1]
    received = {int(each["tid"]): each for each in watch.messages(RECEIVED)}
    assert received.keys() == {facts["tid"], answer["tid"]}
    assert received[answer["tid"]]["sk"] == question["sk"]
    assert received[facts["tid"]]["sk"] == reply["sk"]
    (sent,) = watch.messages(SENT)
    assert sent["tid"] == asker.pid


def test_no_room_towards_a_client_is_seen_and_when_there_is_room_again(watch: Watched) -> None:
    with Workload("stall") as server:
        port = serve(watch, "stall", server, server=server)
        with socket.create_connection(("127.0.0.1", port), PATIENCE_S) as client:
            assert server.facts()["sends"] > 0
            server.go()
            client.setblocking(False)

            def received_last() -> bool:
                try:
                    return client.recv(1 << 20).endswith(b"z")
                except BlockingIOError:
                    return False

            until(received_last, "the last byte came")
            server.facts()
        watch.drain()
    messages: list[Mapping[str, Any]] = list(watch.records("messages"))
    # the last one that moved bytes may have filled the buffer without moving all of its own
    *_, refused, moved = messages
    assert len(messages) <= 3
    assert [(each["kind"], each["result"], each["full"]) for each in (refused, moved)] == [
        (SENT, -errno.EAGAIN, 1),
        (SENT, 1, 0),
    ]
    assert all(each["full"] for each in messages[:-1])
    assert {int(each["local_port"]) for each in messages} == {port}


def test_a_question_by_udp_is_seen_with_its_answer(watch: Watched) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("127.0.0.1", 0))
        server.settimeout(PATIENCE_S)
        with Workload("datagram", server.getsockname()[1]) as asker:
            follow(watch.requests, asker)
            asker.go()
            question, peer = server.recvfrom(100)
            until(lambda: asker.waits_on_descriptor(2), "it waits for the answer")
            server.sendto(b"answer", peer)
            facts = asker.facts()
            watch.drain()
    (sent,) = watch.messages(SENT)
    (received,) = watch.messages(RECEIVED)
    assert (sent["result"], received["result"]) == (len(question), 6)
    assert sent["sk"] == received["sk"]
    assert ends(sent) == facts["ports"]
    wait = watch.wait(facts)
    assert (Waker(wait["waker"]), wait["ready_sk"]) == (Waker.NETWORK, sent["sk"])
