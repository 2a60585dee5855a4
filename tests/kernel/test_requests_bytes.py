"""The requests probe sees the very bytes that clients sent and received, whichever system call moves them."""

from __future__ import annotations

import errno
import socket
import time
from enum import Enum

import pytest

from probes import btf
from probes.probe import OBJECTS, Count
from probes.records import EventKind
from tests.kernel.conftest import TCP_CLOSE, Recorded, StartServer, address_of, receive, receive_all, reset
from tests.kernel.workloads.texts import cut, texts

TCP_CLOSE_WAIT = 8
TCP_LAST_ACK = 9


def pattern(size: int, salt: int = 0) -> bytes:
    """Bytes that repeat only after 251: a shift or a swap shows."""
    return bytes((index + salt) % 251 for index in range(size))


READS = ["read", "readv", "recvfrom", "recvmsg", "recvmmsg"]
WRITES = ["write", "writev", "sendto", "sendmsg", "sendmmsg"]


@pytest.mark.parametrize("how", READS)
def test_each_way_to_read_gives_the_clients_bytes(recorded: Recorded, serve: StartServer, how: str) -> None:
    sizes = [1, 7, 1009, 4032, 4033, 8111, 30011]
    server = serve(*(step for size in sizes for step in (["read", how, size], ["say", "got"])))
    recorded.follow(server)
    sent = b""
    with server.connect() as client:
        for salt, size in enumerate(sizes):
            piece = pattern(size, salt)
            client.sendall(piece)
            server.heard("got")
            sent += piece
        server.done()
    recorded.until_closed()
    seen = recorded.recorder.only
    assert seen.read_bytes == [sent]
    assert seen.writes == []
    assert {stretch.tgid for stretch in seen.reads} == {server.pid}
    assert recorded.reasons() == {}


@pytest.mark.parametrize("how", WRITES)
def test_each_way_to_write_gives_the_bytes_that_the_client_gets(
    recorded: Recorded, serve: StartServer, how: str
) -> None:
    pieces = [pattern(size, salt) for salt, size in enumerate([1, 7, 448, 449, 1009, 30011, 2])]
    server = serve(["write", how, texts(pieces)], ["write", how, texts([b"end"])])
    recorded.follow(server)
    with server.connect() as client:
        got = receive_all(client)
    server.done()
    recorded.until_closed()
    assert got == b"".join(pieces) + b"end"
    seen = recorded.recorder.only
    assert seen.written_bytes == [got]
    assert seen.reads == []
    assert {stretch.tgid for stretch in seen.writes} == {server.pid}
    assert recorded.reasons() == {}


@pytest.mark.parametrize("accept", ["accept", "accept4"])
def test_each_way_to_accept_is_seen_once(recorded: Recorded, serve: StartServer, accept: str) -> None:
    server = serve(["until_eof"], accept=accept)
    recorded.follow(server)
    peers = []
    for _ in range(7):
        with server.connect() as client:
            peers.append(address_of(client))
            client.sendall(b"hi")
        server.done()
    recorded.until_closed(7)
    connections = list(recorded.recorder.connections.values())
    assert [seen.peer for seen in connections] == peers
    assert [seen.accepted for seen in connections] == [[0]] * 7
    assert [seen.born for seen in connections] == [True] * 7
    assert [seen.read_bytes for seen in connections] == [[b"hi"]] * 7


def test_a_read_and_a_write_have_the_instants_of_their_calls(recorded: Recorded, serve: StartServer) -> None:
    server = serve(["read", "recvfrom", 5], ["say", "got"], ["wait"], ["write", "sendto", ["reply"]])
    recorded.follow(server)
    with server.connect() as client:
        before = time.monotonic_ns()
        client.sendall(b"query")
        server.heard("got")
        read_before = time.monotonic_ns()
        server.go()
        assert receive(client, 5) == b"reply"
        received = time.monotonic_ns()
        server.done()
    recorded.until_closed()
    seen = recorded.recorder.only
    (read,), (write,) = seen.reads, seen.writes
    ((position, size, arrived),) = seen.segments
    assert (position, size) == (seen.rx_position, 5)
    assert before <= arrived <= read.at_ns <= read_before <= write.at_ns <= received


@pytest.mark.parametrize("how", ["sendfile64", "splice"])
def test_what_the_service_never_held_is_missing_and_counted(recorded: Recorded, serve: StartServer, how: str) -> None:
    pieces = [pattern(1009), pattern(2003)]
    server = serve(["write", "sendto", ["head"]], ["write", how, texts(pieces)], ["write", "sendto", ["tail"]])
    recorded.follow(server)
    with server.connect() as client:
        got = receive_all(client)
    server.done()
    recorded.until_closed()
    assert got == b"head" + b"".join(pieces) + b"tail"
    written = recorded.recorder.only.written_bytes
    assert written == [b"head", 1009, 2003, b"tail"]
    assert recorded.reasons() == {Count.UNSEEN_BYTES_CALLS: 2}


def test_a_splice_from_the_socket_is_missing_and_counted(recorded: Recorded, serve: StartServer) -> None:
    server = serve(["read", "recvfrom", 4], ["read", "splice", 1009], ["read", "recvfrom", 4])
    recorded.follow(server)
    with server.connect() as client:
        client.sendall(b"head" + pattern(1009) + b"tail")
        server.done()
    recorded.until_closed()
    parts = recorded.recorder.only.read_bytes
    assert parts[0] == b"head"
    assert parts[-1] == b"tail"
    assert sum(part for part in parts if isinstance(part, int)) == 1009
    calls = len(parts) - 2
    assert recorded.reasons() == {Count.UNSEEN_BYTES_CALLS: calls}


def test_a_look_ahead_is_no_read(recorded: Recorded, serve: StartServer) -> None:
    server = serve(*[["peek", 997]] * 3, ["read", "recvfrom", 101], ["peek", 997], ["read", "recvmsg", 1009 - 101])
    recorded.follow(server)
    with server.connect() as client:
        client.sendall(pattern(1009))
        server.done()
    recorded.until_closed()
    assert recorded.recorder.only.read_bytes == [pattern(1009)]
    assert recorded.reasons() == {}


def test_bytes_that_the_kernel_threw_away_are_missing_and_counted(recorded: Recorded, serve: StartServer) -> None:
    server = serve(["read", "recv_truncated", 101], ["read", "recvfrom", 101])
    recorded.follow(server)
    with server.connect() as client:
        client.sendall(pattern(101) + pattern(101, 3))
        server.done()
    recorded.until_closed()
    assert recorded.recorder.only.read_bytes == [101, pattern(101, 3)]
    assert recorded.reasons() == {Count.UNSEEN_BYTES_CALLS: 1}


@pytest.mark.parametrize("how", ["writev", "sendmsg"])
def test_a_long_vector_loses_its_end_but_not_its_place(recorded: Recorded, serve: StartServer, how: str) -> None:
    pieces = [pattern(31 + index, index) for index in range(37)]
    server = serve(["write", how, texts(pieces)], ["write", how, texts([b"next"])])
    recorded.follow(server)
    with server.connect() as client:
        got = receive_all(client)
    server.done()
    recorded.until_closed()
    assert got == b"".join(pieces) + b"next"
    missing = sum(len(piece) for piece in pieces[32:])
    assert recorded.recorder.only.written_bytes == [b"".join(pieces[:32]), missing, b"next"]
    assert recorded.reasons() == {Count.TOO_MANY_SEGMENTS: 1}


def test_a_long_vector_to_read_into_loses_its_end_but_not_its_place(recorded: Recorded, serve: StartServer) -> None:
    server = serve(["read_some", "readv_many", 3700], ["read", "recvfrom", 4])
    recorded.follow(server)
    sent = pattern(3700)
    with server.connect() as client:
        client.sendall(sent + b"next")
        server.done()
    recorded.until_closed()
    head, missing, tail = recorded.recorder.only.read_bytes
    assert isinstance(head, bytes)
    assert head == sent[: len(head)]
    assert len(head) == 32 * 99  # 32 of 37 segments of 99 bytes, the last of 136
    assert missing == 3700 - len(head)
    assert tail == b"next"
    assert recorded.reasons() == {Count.TOO_MANY_SEGMENTS: 1}


def test_many_messages_lose_their_end_but_not_their_place(recorded: Recorded, serve: StartServer) -> None:
    pieces = [pattern(31 + index, index) for index in range(11)]
    server = serve(["write", "sendmmsg", texts(pieces)], ["write", "sendmmsg", texts([b"next"])])
    recorded.follow(server)
    with server.connect() as client:
        got = receive_all(client)
    server.done()
    recorded.until_closed()
    assert got == b"".join(pieces) + b"next"
    missing = sum(len(piece) for piece in pieces[8:])
    assert recorded.recorder.only.written_bytes == [b"".join(pieces[:8]), missing, b"next"]
    assert recorded.reasons() == {Count.TOO_MANY_SEGMENTS: 1}


def test_many_messages_to_read_into_lose_their_end_but_not_their_place(recorded: Recorded, serve: StartServer) -> None:
    server = serve(["read_some", "recvmmsg_many", 1100], ["read", "recvfrom", 4])
    recorded.follow(server)
    sent = pattern(1100)
    with server.connect() as client:
        client.sendall(sent + b"next")
        server.done()
    recorded.until_closed()
    head, missing, tail = recorded.recorder.only.read_bytes
    assert isinstance(head, bytes)
    assert head == sent[: len(head)]
    assert len(head) == 8 * 99
    assert missing == 1100 - len(head)
    assert tail == b"next"
    assert recorded.reasons() == {Count.TOO_MANY_SEGMENTS: 1}


def test_messages_of_long_vectors_are_not_put_in_the_wrong_place(recorded: Recorded, serve: StartServer) -> None:
    pieces = [pattern(370, 0), pattern(740, 1)]  # each in 37 segments
    server = serve(["write", "sendmmsg_segments", texts(pieces)], ["write", "sendmmsg", texts([b"next"])])
    recorded.follow(server)
    with server.connect() as client:
        got = receive_all(client)
    server.done()
    recorded.until_closed()
    assert got == b"".join(pieces) + b"next"
    parts = recorded.recorder.only.written_bytes
    at = 0
    for part in parts:
        if isinstance(part, bytes):
            assert part == got[at : at + len(part)]
            at += len(part)
        else:
            at += part
    assert at == len(got)
    assert parts[-1] == b"next"
    assert sum(part for part in parts if isinstance(part, int)) > 0
    assert recorded.counted(Count.TOO_MANY_SEGMENTS) >= 1


CAP = 256 * 1024


def test_a_read_past_the_cap_is_counted_and_keeps_its_place(recorded: Recorded, serve: StartServer) -> None:
    sent = pattern(300_007)
    server = serve(["read_some", "recv_all", len(sent)], ["read", "recvfrom", 4])
    recorded.follow(server)
    with server.connect() as client:
        client.sendall(sent)
        client.sendall(b"next")
        server.done()
    recorded.until_closed()
    assert recorded.recorder.only.read_bytes == [sent[:CAP], len(sent) - CAP, b"next"]
    assert recorded.reasons() == {Count.CAPPED_CALLS: 1}


def test_a_write_past_the_cap_is_counted_and_keeps_its_place(recorded: Recorded, serve: StartServer) -> None:
    pieces = [pattern(300_007), b"next"]
    server = serve(["write", "sendto", texts(pieces)])
    recorded.follow(server)
    with server.connect() as client:
        got = receive_all(client)
    server.done()
    recorded.until_closed()
    assert got == b"".join(pieces)
    assert recorded.recorder.only.written_bytes == [got[:CAP], 300_007 - CAP, b"next"]
    assert recorded.reasons() == {Count.CAPPED_CALLS: 1}


def test_a_call_of_exactly_the_cap_is_whole(recorded: Recorded, serve: StartServer) -> None:
    server = serve(["write", "sendto", texts([pattern(CAP)])], ["read_some", "recv_all", CAP])
    recorded.follow(server)
    with server.connect() as client:
        assert receive(client, CAP) == pattern(CAP)
        client.sendall(pattern(CAP, 5))
        server.done()
    recorded.until_closed()
    assert recorded.recorder.only.written_bytes == [pattern(CAP)]
    assert recorded.recorder.only.read_bytes == [pattern(CAP, 5)]
    assert recorded.reasons() == {}


def test_a_vector_that_is_gone_is_counted_and_keeps_its_place(recorded: Recorded, serve: StartServer) -> None:
    server = serve(["say", "fd {fd}"], ["lost_vector", 101], ["read", "recvfrom", 4])
    recorded.follow(server)
    with server.connect() as client:
        server.sits_in_call_on(int(server.heard("fd")))
        server.go()
        server.heard("unmapped")
        client.sendall(pattern(101))
        client.sendall(b"next")
        server.done()
    recorded.until_closed()
    assert recorded.recorder.only.read_bytes == [101, b"next"]
    assert recorded.reasons() == {Count.UNREADABLE: 1}


@pytest.mark.parametrize("size", [1, 7, 97])
def test_many_small_writes_are_all_there(recorded: Recorded, serve: StartServer, size: int) -> None:
    sent = pattern(2003)
    server = serve(["write", "sendto", texts(cut(sent, size))])
    recorded.follow(server)
    with server.connect() as client:
        assert receive_all(client) == sent
    server.done()
    recorded.until_closed()
    assert recorded.recorder.only.written_bytes == [sent]
    assert len(recorded.recorder.only.writes) == -(-2003 // size)


def test_ipv6_connections_are_followed(recorded: Recorded, serve: StartServer) -> None:
    server = serve(["read", "recvfrom", 101], ["write", "sendto", ["reply"]], listen="::1")
    recorded.follow(server)
    with server.connect() as client:
        peer = address_of(client)
        client.sendall(pattern(101))
        assert receive_all(client) == b"reply"
    server.done()
    recorded.until_closed()
    seen = recorded.recorder.only
    assert seen.peer == peer
    assert seen.peer.startswith("[::1]:")
    assert seen.read_bytes == [pattern(101)]
    assert seen.written_bytes == [b"reply"]
    assert [size for _, size, _ in seen.segments] == [101]


def test_the_end_of_the_stream_moves_no_position(recorded: Recorded, serve: StartServer) -> None:
    """The client's FIN takes a place in its stream; where it came before the read, that read goes over it, too."""
    server = serve(["wait"], ["read_some", "recvfrom", 65536], ["write", "sendto", ["reply"]])
    recorded.follow(server)
    with recorded.connect(server) as client:
        with recorded.events(2):  # the segment, and the FIN
            client.sendall(pattern(101))
            client.shutdown(socket.SHUT_WR)
        server.go()
        assert receive_all(client) == b"reply"
    server.done()
    recorded.until_closed()
    assert recorded.recorder.only.read_bytes == [pattern(101)]
    assert recorded.reasons() == {}


def test_a_reset_says_what_the_connection_died_of(recorded: Recorded, serve: StartServer) -> None:
    server = serve(["read", "recvfrom", 5], ["wait"])
    recorded.follow(server)
    for leave in (reset, socket.socket.close):
        client = recorded.connect(server)
        client.sendall(b"hello")
        with recorded.events(1):
            leave(client)
        server.go()
        server.done()
    recorded.until_closed(2)
    dead, left = recorded.recorder.connections.values()
    assert (dead.resets, [state.error for state in dead.states]) == (1, [errno.ECONNRESET])
    assert (left.resets, {state.error for state in left.states}) == (0, {0})
    assert [state.new for state in left.states] == [TCP_CLOSE_WAIT, TCP_LAST_ACK, TCP_CLOSE]


# ---- what is not followed ----


@pytest.mark.parametrize(("reading", "writing"), [("preadv2", "pwritev2"), ("io_uring", "io_uring")])
def test_bytes_that_no_followed_call_moved_are_counted(
    recorded: Recorded, serve: StartServer, reading: str, writing: str
) -> None:
    server = serve(
        ["read", "recvfrom", 4],
        ["read", reading, 101],
        ["read", "recvfrom", 4],
        ["write", "sendto", ["head"]],
        ["write", writing, ["?" * 103]],
        ["write", "sendto", ["tail"]],
    )
    recorded.follow(server)
    with server.connect() as client:
        client.sendall(b"head" + pattern(101) + b"tail")
        assert receive_all(client) == b"head" + b"?" * 103 + b"tail"
    server.done()
    recorded.until_closed()
    seen = recorded.recorder.only
    assert [(stretch.position - seen.rx_position) % 2**32 for stretch in seen.reads] == [0, 105]
    assert [stretch.data for stretch in seen.reads] == [b"head", b"tail"]
    assert [(stretch.position - seen.tx_position) % 2**32 for stretch in seen.writes] == [0, 107]
    assert [stretch.data for stretch in seen.writes] == [b"head", b"tail"]
    assert recorded.reasons() == {Count.UNFOLLOWED_IO: 2}


@pytest.mark.parametrize("how", ["preadv2", "io_uring"])
def test_a_connection_that_is_never_followed_is_counted_at_its_end(
    recorded: Recorded, serve: StartServer, how: str
) -> None:
    server = serve(["read", how, 101], ["until_eof"])
    recorded.follow(server)
    for _ in range(3):
        with server.connect() as client:
            client.sendall(pattern(101))
        server.done()
    recorded.until_closed(3)
    assert [seen.reads for seen in recorded.recorder.connections.values()] == [[]] * 3
    assert recorded.reasons() == {Count.UNFOLLOWED_IO: 3}


# ---- the two sides agree ----


@pytest.mark.parametrize(
    ("name", "prefix", "ours", "end"),
    [("count", "CNT_", Count, {"MAX": len(Count)}), ("event_kind", "EVENT_", EventKind, {})],
)
def test_the_enums_are_those_of_records_h(
    able_host: None, name: str, prefix: str, ours: type[Enum], end: dict[str, int]
) -> None:
    in_c = {key.removeprefix(prefix): value for key, value in btf.enum_of(OBJECTS / "requests.bpf.o", name).items()}
    assert in_c == {member.name: member.value for member in ours} | end
