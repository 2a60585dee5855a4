"""The scheduler probe as it is loaded where the kernel has no sk_data_ready, sock_send_length and sock_recv_length.

Those came with Linux 6.3. What takes their place there runs on every kernel, and is tested on this one.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator

import pytest

from probes import libbpf
from probes.host import MESSAGE_TRACEPOINTS
from probes.probe import Transport
from probes.scheduler import SchedulerProbe
from tests.kernel.conftest import PATIENCE_S, Probe
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
    until,
    watch,
    watching,
)
from tests.kernel.test_scheduler_messages import client_ports, ends, serve

__all__ = ["watch"]  # a fixture


@pytest.fixture(scope="module")
def scheduler(shared_probe: Probe, transport: Transport) -> Iterator[Watched]:
    """The scheduler probe on a kernel without the three tracepoints."""
    has = libbpf.has_btf_tracepoint
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(libbpf, "has_btf_tracepoint", lambda name: name not in MESSAGE_TRACEPOINTS and has(name))
        with watching(shared_probe.raw, transport) as watched:
            yield watched


def test_the_programs_are_those_for_such_a_kernel(watch: Watched) -> None:
    loaded = watch.probe.run_stats().keys()
    others = {each for programs in SchedulerProbe.in_place_of.values() for each in programs}
    assert not loaded & SchedulerProbe.optional.keys()
    assert others <= loaded


@pytest.mark.parametrize(("scenario", "reason"), [("tcp", Reason.SOCKET), ("tcp6_epoll", Reason.POLL)])
def test_a_message_over_loopback_leads_to_its_sender(watch: Watched, scenario: str, reason: Reason) -> None:
    with Workload(scenario) as workload:
        follow(watch.requests, workload)
        facts = workload.done()
        watch.drain()
    wait = watch.wait(facts)
    assert (Reason(wait["reason"]), Waker(wait["waker"])) == (reason, Waker.MESSAGE)
    assert (wait["waker_tid"], wait["flags"] & WAKER_TARGET) == (facts["waker"], WAKER_TARGET)
    (ready,) = watch.messages(READY)
    (received,) = watch.messages(RECEIVED)
    (sent,) = watch.messages(SENT)
    assert wait["ready_sk"] == ready["sk"] == received["sk"] != sent["sk"]
    assert (ready["tid"], received["tid"], sent["tid"]) == (facts["waker"], facts["tid"], facts["waker"])
    assert (received["result"], sent["result"]) == (1, 1)
    assert ends(ready) == ends(received) == facts["ports"] == ends(sent)[::-1]
    assert wait["off_ns"] < ready["at_ns"] <= wait["wake_ns"] <= sent["at_ns"]
    assert not watch.losses()


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
    wait = watch.wait(facts)
    assert (Reason(wait["reason"]), Waker(wait["waker"])) == (Reason.SOCKET, Waker.NETWORK)
    assert (wait["waker_tid"], wait["flags"]) == (0, 0)
    (sent,) = watch.messages(SENT)
    (received,) = watch.messages(RECEIVED)
    assert sent["sk"] == received["sk"] == wait["ready_sk"] != 0
    assert (sent["result"], received["result"]) == (8, 1)
    assert (sent["tid"], received["tid"]) == (asker.pid, facts["tid"])
    assert ends(sent) == ends(received) == facts["ports"]
    assert bytes(sent["peer"])[:4] == socket.inet_aton("127.0.0.1")
    assert sent["at_ns"] < received["at_ns"]


def test_what_a_client_from_outside_asks_makes_no_message(watch: Watched) -> None:
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
    assert not len(watch.records("messages"))


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
    *before, refused, moved = watch.records("messages")
    assert (refused["kind"], refused["result"], refused["full"]) == (SENT, -errno.EAGAIN, 1)
    assert (moved["kind"], moved["result"], moved["full"]) == (SENT, 1, 0)
    assert all(each["full"] for each in before)
