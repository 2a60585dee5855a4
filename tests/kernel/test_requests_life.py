"""From system calls to finished requests: framing, keep-alive, pipelining, every kind of end, and the instants."""

from __future__ import annotations

import socket
import time
from contextlib import nullcontext
from itertools import pairwise

import pytest

from exporter.request import Capture, Failure, Phase
from exporter.slis import Sli
from probes.probe import Count
from tests.kernel.conftest import Followed, StartServer, address_of, receive, receive_all, reset
from tests.kernel.workloads.texts import END, answer, chunk, cut, events, head, request, texts, token

ANSWER = b"".join(answer(23))


def test_one_request_with_all_its_instants(followed: Followed, serve: StartServer) -> None:
    pieces = answer(23)
    server = serve(["request", "recvfrom"], ["say", "got"], ["wait"], ["trickle", "sendto", 1, texts(pieces)])
    followed.follow(server)
    with server.connect() as client:
        peer = address_of(client)
        before_send = time.monotonic_ns()
        client.sendall(request("owl", path="/v1/chat/completions?key=secret"))
        server.heard("got")
        read = time.monotonic_ns()
        server.go()
        received = []
        for piece in pieces:
            assert receive(client, len(piece)) == piece
            received.append(time.monotonic_ns())
        assert client.recv(1) == b""
    server.done()
    (done,) = followed.until_done()
    assert (done.service, done.model, done.api) == ("tested", "owl", "chat_completions")
    assert (done.method, done.target) == ("POST", "/v1/chat/completions")
    assert (done.status, done.streamed, done.frames) == (200, True, 23)
    assert (done.prompt_tokens, done.completion_tokens, done.cached_tokens) == (41, 23, 29)
    assert (done.failure, done.aborted, done.wasted_tokens) == (None, None, 0)
    assert (done.peer, done.tgid, done.tid) == (peer, server.pid, server.pid)
    assert done.capture is Capture.complete
    assert followed.requests.captured == [Capture.complete]
    # Each instant lies between what the client's own clock said before and after.
    assert before_send <= done.arrived_ns <= done.read_ns <= read
    assert done.first_byte_ns is not None
    assert done.first_token_ns is not None
    assert done.last_token_ns is not None
    assert read <= done.first_byte_ns <= received[0]
    assert received[1] <= done.first_token_ns <= received[2]  # after the head and the role
    assert received[23] <= done.last_token_ns <= received[24]
    assert received[-2] <= done.finished_ns <= received[-1]
    assert done.longest_gap_ns is not None
    assert 1_000_000 <= done.longest_gap_ns <= done.last_token_ns - done.first_token_ns
    assert followed.reasons() == {}


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 61, 97, 449, 1009])
def test_frames_split_anywhere_are_the_same_frames(followed: Followed, serve: StartServer, size: int) -> None:
    server = serve(["request", "read"], ["write", "write", texts(cut(ANSWER, size))])
    followed.follow(server)
    with server.connect() as client:
        client.sendall(request("owl"))
        assert receive_all(client) == ANSWER
    server.done()
    (done,) = followed.until_done()
    assert (done.frames, done.completion_tokens, done.capture) == (23, 23, Capture.complete)
    assert followed.reasons() == {}


@pytest.mark.parametrize("how", ["write", "writev", "sendmsg", "sendmmsg"])
def test_frames_joined_by_the_calls_are_the_same_frames(followed: Followed, serve: StartServer, how: str) -> None:
    many = events(101)
    joined = [head(), *(chunk(b"".join(many[at : at + 11])) for at in range(0, len(many), 11)), END]
    steps = [["write", how, texts(joined[at : at + 3])] for at in range(0, len(joined), 3)]
    server = serve(["request", "read"], *steps)
    followed.follow(server)
    with server.connect() as client:
        client.sendall(request("owl"))
        assert receive_all(client) == b"".join(joined)
    server.done()
    (done,) = followed.until_done()
    assert (done.frames, done.completion_tokens, done.capture) == (101, 101, Capture.complete)
    assert followed.reasons() == {}


def test_the_whole_answer_in_one_call(followed: Followed, serve: StartServer) -> None:
    server = serve(["request", "read"], ["write", "write", texts([ANSWER])])
    followed.follow(server)
    with server.connect() as client:
        client.sendall(request("owl"))
        assert receive_all(client) == ANSWER
    server.done()
    (done,) = followed.until_done()
    assert (done.frames, done.capture) == (23, Capture.complete)
    assert done.first_byte_ns == done.first_token_ns == done.last_token_ns == done.finished_ns


@pytest.mark.parametrize("size", [1, 7, 101])
def test_a_request_in_many_segments_and_reads(followed: Followed, serve: StartServer, size: int) -> None:
    server = serve(["request", "read", size], ["write", "write", texts([ANSWER])])
    followed.follow(server)
    sent = request("owl", prompt="word " * 31)
    with followed.connect(server) as client:
        with followed.events(1) as first:
            client.sendall(sent[:1])
        for piece in cut(sent[1:], 13):
            client.sendall(piece)
        assert receive_all(client) == ANSWER
    server.done()
    (done,) = followed.until_done()
    assert (done.model, done.frames, done.capture) == ("owl", 23, Capture.complete)
    assert done.arrived_ns in first


@pytest.mark.parametrize(
    ("reading", "writing"), [("recvmmsg", "sendmmsg"), ("recvmsg", "sendmsg"), ("readv", "writev")]
)
def test_keep_alive(followed: Followed, serve: StartServer, reading: str, writing: str) -> None:
    writes = [["write", writing, texts(answer(23)[at : at + 7])] for at in range(0, len(answer(23)), 7)]
    server = serve(["repeat", 11, [["request", reading], *writes]])
    followed.follow(server)
    with server.connect() as client:
        for number in range(11):
            client.sendall(request(f"owl-{number}"))
            assert receive(client, len(ANSWER)) == ANSWER
    server.done()
    done = followed.until_done(11)
    assert [each.model for each in done] == [f"owl-{number}" for number in range(11)]
    assert [each.frames for each in done] == [23] * 11
    assert [each.capture for each in done] == [Capture.complete] * 11
    assert [each.number for each in done] == list(range(1, 12))
    for before, after in pairwise(done):
        assert before.finished_ns <= after.arrived_ns
    assert followed.reasons() == {}


def test_pipelined_requests_arrive_when_each_was_sent(followed: Followed, serve: StartServer) -> None:
    server = serve(["wait"], ["repeat", 5, [["request", "recvfrom"]]], *[["write", "sendto", texts(answer(7))]] * 5)
    followed.follow(server)
    sent = []
    whole = b"".join(answer(7)) * 5
    with followed.connect(server) as client:
        for number in range(5):
            with followed.events(1) as span:
                client.sendall(request(f"owl-{number}"))
            sent.append(span)
            time.sleep(0.003)
        go = time.monotonic_ns()
        server.go()
        assert receive(client, len(whole)) == whole
    server.done()
    done = followed.until_done(5)
    assert [each.model for each in done] == [f"owl-{number}" for number in range(5)]
    assert [each.frames for each in done] == [7] * 5
    assert [each.capture for each in done] == [Capture.complete] * 5
    for each, span in zip(done, sent, strict=True):
        assert each.arrived_ns in span
        assert each.read_ns >= go
    assert len({each.read_ns for each in done}) == 1  # all five in one read


def test_requests_that_share_segments(followed: Followed, serve: StartServer) -> None:
    """The end of one request and the beginning of the next in one segment, and in one read."""
    server = serve(["wait"], ["repeat", 3, [["request", "recvfrom", 97]]], ["write", "sendto", texts(answer(7) * 3)])
    followed.follow(server)
    whole = b"".join(request(f"owl-{number}") for number in range(3))
    spans = []
    with followed.connect(server) as client:
        for piece in cut(whole, 131):
            with followed.events(1) as span:
                client.sendall(piece)
            spans.append(span)
        server.go()
        assert receive_all(client) == b"".join(answer(7)) * 3
    server.done()
    done = followed.until_done(3)
    assert [each.model for each in done] == ["owl-0", "owl-1", "owl-2"]
    assert [each.capture for each in done] == [Capture.complete] * 3
    for number, each in enumerate(done):
        assert each.arrived_ns in spans[number * len(request("owl-0")) // 131]


def test_what_is_no_llm_request_is_no_request(followed: Followed, serve: StartServer) -> None:
    plain = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
    server = serve(["repeat", 3, [["request", "read"], ["write", "write", texts([plain])]]], ["request", "read"],
                   ["write", "write", texts([ANSWER])])  # fmt: skip
    followed.follow(server)
    with server.connect() as client:
        for text in (b"GET /metrics HTTP/1.1\r\n\r\n", request(path="/v1/embeddings"), b"GET / HTTP/1.1\r\n\r\n"):
            client.sendall(text)
            assert receive(client, len(plain)) == plain
        client.sendall(request("owl"))
        assert receive_all(client) == ANSWER
    server.done()
    (done,) = followed.until_done()
    assert (done.model, done.capture) == ("owl", Capture.complete)
    assert followed.requests.captured == [Capture.complete]


def test_ipv6(followed: Followed, serve: StartServer) -> None:
    server = serve(["request", "read"], ["write", "write", texts([ANSWER])], listen="::1")
    followed.follow(server)
    with server.connect() as client:
        peer = address_of(client)
        client.sendall(request("owl"))
        assert receive_all(client) == ANSWER
    server.done()
    (done,) = followed.until_done()
    assert (done.peer, done.frames, done.capture) == (peer, 23, Capture.complete)


# ---- when a request arrived ----


def test_a_request_that_waits_for_accept_has_arrived(followed: Followed, serve: StartServer) -> None:
    """The service does other things for 30 ms; the client's own clock says for how long the request lay there."""
    server = serve(["request", "recvfrom"], ["sleep", 30], ["write", "sendto", texts([ANSWER])])
    followed.follow(server)
    clients, sent = [], []
    for number in range(3):
        with followed.events(1 if number else 2):  # the others are not accepted yet
            client = server.connect()
        with followed.events(1) as span:
            client.sendall(request("owl"))
        sent.append(span)
        clients.append(client)
    received = []
    for client in clients:
        assert receive(client, len(ANSWER)) == ANSWER
        received.append(time.monotonic_ns())
        client.close()
    server.done(3)
    done = followed.until_done(3)
    for index, (each, span) in enumerate(zip(done, sent, strict=True)):
        assert each.arrived_ns in span
        # Those before were answered 30 ms after they were read, and only then this one was accepted.
        assert each.read_ns >= sent[0].start_ns + index * 30_000_000
        assert each.read_ns <= received[index] - 30_000_000
    assert [each.capture for each in done] == [Capture.complete] * 3


@pytest.mark.parametrize("how", ["read", "recvmsg"])
def test_a_request_that_waits_for_its_read_has_arrived(followed: Followed, serve: StartServer, how: str) -> None:
    server = serve(["wait"], ["sleep", 30], ["request", how], ["write", "sendto", texts([ANSWER])])
    followed.follow(server)
    with followed.connect(server) as client:
        with followed.events(1) as sent:
            client.sendall(request("owl"))
        go = time.monotonic_ns()
        server.go()
        assert receive(client, len(ANSWER)) == ANSWER
        received = time.monotonic_ns()
    server.done()
    (done,) = followed.until_done()
    assert done.arrived_ns in sent
    assert go + 30_000_000 <= done.read_ns <= received
    histogram = followed.requests.slis.series("tested", "owl", "chat_completions", (), True).histograms[Sli.READ_DELAY]
    assert sum(histogram.counts) == 1
    assert histogram.sum_ns == done.read_ns - done.arrived_ns >= 30_000_000


# ---- large prompts ----


@pytest.mark.parametrize("model_at", ["first", "middle", "last"])
@pytest.mark.parametrize(("how", "size"), [("recvfrom", 65536), ("readv", 16411), ("recvmmsg", 65536)])
def test_the_model_is_found_around_a_large_prompt(
    followed: Followed, serve: StartServer, model_at: str, how: str, size: int
) -> None:
    server = serve(["request", how, size], ["write", "sendto", texts([ANSWER])])
    followed.follow(server)
    sent = request("owl", prompt="the model says " * 20_000, model_at=model_at)
    assert len(sent) > 300_000
    with server.connect() as client:
        before = time.monotonic_ns()
        client.sendall(sent)
        assert receive_all(client) == ANSWER
    server.done()
    (done,) = followed.until_done()
    assert (done.model, done.frames, done.capture) == ("owl", 23, Capture.complete)
    assert before <= done.arrived_ns <= done.read_ns
    assert followed.reasons() == {}


@pytest.mark.parametrize(
    ("model_at", "model", "capture"),
    [("first", "owl", Capture.complete), ("last", None, Capture.model_unseen)],
)
def test_a_prompt_read_in_one_call_past_the_cap(
    followed: Followed, serve: StartServer, model_at: str, model: str | None, capture: Capture
) -> None:
    """What lies past the cap of one call is not copied: a model there is not seen, and the rest is."""
    sent = request("owl", prompt="the model says " * 20_000, model_at=model_at)
    server = serve(
        ["read_some", "recv_all", len(sent)],
        ["write", "sendto", texts(answer(23))],
        ["request", "recvfrom"],
        ["write", "sendto", texts(answer(23))],
    )
    followed.follow(server)
    with server.connect() as client:
        client.sendall(sent)
        assert receive(client, len(ANSWER)) == ANSWER
        client.sendall(request("next"))
        assert receive_all(client) == ANSWER
    server.done()
    first, second = followed.until_done(2)
    assert (first.model, first.frames, first.capture) == (model, 23, capture)
    assert (second.model, second.frames, second.capture) == ("next", 23, Capture.complete)
    assert followed.reasons() == {Count.CAPPED_CALLS: 1}


# ---- the client leaves ----


def test_the_client_closes_while_it_waits(followed: Followed, serve: StartServer) -> None:
    server = serve(
        ["request", "recvfrom"], ["say", "got"], ["wait"], ["write", "sendto", texts([head()])],
        ["wait"], ["try_write", "sendto", texts(answer(7)[1:])],
    )  # fmt: skip
    followed.follow(server)
    client = followed.connect(server)
    client.sendall(request("owl"))
    server.heard("got")
    with followed.events(1) as left:
        client.close()
    with followed.events(2):  # the head's answer is RST, and with that the connection is closed
        server.go()
    server.go()
    server.done()
    (done,) = followed.until_done()
    assert (done.aborted, done.failure, done.frames) == (Phase.waiting, None, 0)
    assert (done.wasted_tokens, done.capture) == (0, Capture.complete)
    assert done.finished_ns in left


def test_the_client_resets_while_it_waits(followed: Followed, serve: StartServer) -> None:
    server = serve(["request", "recvfrom"], ["say", "got"], ["wait"], ["try_write", "sendto", texts(answer(7))])
    followed.follow(server)
    client = followed.connect(server)
    client.sendall(request("owl"))
    server.heard("got")
    with followed.events(2) as left:  # RST, CLOSE
        reset(client)
    server.go()
    server.done()
    (done,) = followed.until_done()
    assert (done.aborted, done.failure, done.frames) == (Phase.waiting, None, 0)
    assert (done.wasted_tokens, done.capture) == (0, Capture.complete)
    assert done.finished_ns in left


@pytest.mark.parametrize("size", [0, 101])
def test_the_client_closes_in_mid_stream(followed: Followed, serve: StartServer, size: int) -> None:
    """With unread bytes its close is a RST, else a FIN which the next frame turns into one."""
    pieces = answer(23)
    server = serve(
        ["request", "recvfrom"], ["write", "sendto", texts(pieces[:7])], ["say", "five"], ["wait"],
        ["repeat", 3, [["try_write", "sendto", texts([pieces[7]])], ["sleep", 2]]],
    )  # fmt: skip
    followed.follow(server)
    client = followed.connect(server)
    client.sendall(request("owl"))
    server.heard("five")
    assert receive(client, sum(map(len, pieces[:7])) - size)
    with followed.events(1) as left:
        client.close()
    server.go()
    server.done()
    (done,) = followed.until_done()
    assert (done.aborted, done.failure) == (Phase.streaming, None)
    # The first frame after a FIN still goes out. Where its RST is there before the call returns, as on an idle
    # loopback, the call is not seen any more.
    assert done.frames - done.wasted_tokens == 5
    assert 0 <= done.wasted_tokens <= (0 if size else 3)
    assert done.capture is Capture.complete
    assert done.finished_ns in left


def test_the_client_resets_in_mid_stream(followed: Followed, serve: StartServer) -> None:
    pieces = answer(23)
    server = serve(
        ["request", "recvfrom"], ["write", "sendto", texts(pieces[:7])], ["say", "five"], ["wait"],
        ["try_write", "sendto", texts(pieces[7:])],
    )  # fmt: skip
    followed.follow(server)
    client = followed.connect(server)
    client.sendall(request("owl"))
    server.heard("five")
    assert receive(client, sum(map(len, pieces[:7])))
    with followed.events(2) as left:
        reset(client)
    server.go()
    server.done()
    (done,) = followed.until_done()
    assert (done.aborted, done.failure, done.frames) == (Phase.streaming, None, 5)
    assert (done.wasted_tokens, done.capture) == (0, Capture.complete)
    assert done.finished_ns in left


def test_the_client_closes_before_its_request_is_read(followed: Followed, serve: StartServer) -> None:
    server = serve(["wait"], ["request", "recvfrom"], ["try_write", "sendto", texts(answer(7))])
    followed.follow(server)
    client = followed.connect(server)
    with followed.events(1):
        client.sendall(request("owl"))
    with followed.events(1) as left:
        client.close()
    server.go()
    server.done()
    (done,) = followed.until_done()
    assert (done.model, done.aborted, done.failure) == ("owl", Phase.waiting, None)
    assert (done.frames, done.wasted_tokens, done.capture) == (0, 0, Capture.complete)
    assert done.finished_ns in left
    assert left.end_ns <= done.read_ns


def test_the_client_resets_before_its_request_is_read(followed: Followed, serve: StartServer) -> None:
    """The service can still read what came before the RST, but its socket is closed: nobody knows what it was for."""
    server = serve(["wait"], ["request", "recvfrom"], ["try_write", "sendto", texts(answer(7))])
    followed.follow(server)
    for _ in range(3):
        client = followed.connect(server)
        with followed.events(1):
            client.sendall(request("owl"))
        with followed.events(2):
            reset(client)
        server.go()
        server.done()
    with server.connect() as client:
        client.sendall(request("next"))
        server.go()
        assert receive_all(client) == b"".join(answer(7))
    server.done()
    (done,) = followed.until_done()
    assert (done.model, done.capture) == ("next", Capture.complete)
    assert followed.requests.captured == [Capture.complete]


@pytest.mark.parametrize("when", ["before the read", "after the read"])
def test_a_client_that_shuts_its_side_and_waits_is_no_abort(
    followed: Followed, serve: StartServer, when: str
) -> None:
    server = serve(
        ["wait"], ["request", "recvfrom"], ["say", "got"], ["wait"], ["trickle", "sendto", 1, texts(answer(7))]
    )
    followed.follow(server)
    with followed.connect(server) as client:
        with followed.events(1):
            client.sendall(request("owl"))
        with followed.events(1 if when == "before the read" else 0):
            if when == "before the read":
                client.shutdown(socket.SHUT_WR)
        server.go()
        server.heard("got")
        with followed.events(1 if when == "after the read" else 0):
            if when == "after the read":
                client.shutdown(socket.SHUT_WR)
        server.go()
        assert receive_all(client) == b"".join(answer(7))
    server.done()
    (done,) = followed.until_done()
    assert (done.aborted, done.failure, done.wasted_tokens) == (None, None, 0)
    assert (done.model, done.frames, done.capture) == ("owl", 7, Capture.complete)
    assert followed.reasons() == {}


def test_frames_for_a_client_that_shut_its_side_and_then_reset_are_wasted(
    followed: Followed, serve: StartServer
) -> None:
    pieces = answer(23)
    server = serve(
        ["request", "recvfrom"], ["write", "sendto", texts(pieces[:7])], ["wait"],
        ["write", "sendto", texts(pieces[7:18])], ["wait"], ["try_write", "sendto", texts(pieces[18:])],
    )  # fmt: skip
    followed.follow(server)
    client = followed.connect(server)
    client.sendall(request("owl"))
    assert receive(client, sum(map(len, pieces[:7])))
    with followed.events(1) as left:
        client.shutdown(socket.SHUT_WR)
    server.go()
    assert receive(client, sum(map(len, pieces[7:18])))
    reset(client)
    server.go()
    server.done()
    (done,) = followed.until_done()
    assert (done.aborted, done.failure) == (Phase.streaming, None)
    assert (done.frames, done.wasted_tokens, done.capture) == (5 + 11, 11, Capture.complete)
    assert done.finished_ns in left


# ---- the service ends it ----


@pytest.mark.parametrize("ending", [["close"], ["shutdown"], ["reset"]])
def test_a_service_that_ends_in_mid_stream_cuts_the_answer_off(
    followed: Followed, serve: StartServer, ending: list[str]
) -> None:
    pieces = answer(23)
    steps = [] if ending == ["close"] else [ending]
    server = serve(["request", "recvfrom"], ["write", "sendto", texts(pieces[:13])], ["wait"], *steps)
    followed.follow(server)
    with server.connect() as client:
        client.sendall(request("owl"))
        assert receive(client, sum(map(len, pieces[:13])))
        before = time.monotonic_ns()
        server.go()
        with pytest.raises(ConnectionResetError) if ending == ["reset"] else nullcontext():
            assert receive_all(client) == b""
        server.done()
        after = time.monotonic_ns()
    (done,) = followed.until_done()
    assert (done.failure, done.aborted, done.frames) == (Failure.cut_off, None, 11)
    assert done.capture is Capture.complete
    assert before <= done.finished_ns <= after


def test_a_service_that_closes_before_it_answers_cuts_the_answer_off(followed: Followed, serve: StartServer) -> None:
    server = serve(["request", "recvfrom"])
    followed.follow(server)
    with server.connect() as client:
        client.sendall(request("owl"))
        assert receive_all(client) == b""
    server.done()
    (done,) = followed.until_done()
    assert (done.failure, done.aborted, done.frames, done.status) == (Failure.cut_off, None, 0, None)
    assert done.capture is Capture.complete


def test_a_service_that_is_killed_in_mid_stream_cuts_the_answer_off(followed: Followed, serve: StartServer) -> None:
    pieces = answer(23)
    server = serve(["request", "recvfrom"], ["write", "sendto", texts(pieces[:13])], ["wait"])
    followed.follow(server)
    with server.connect() as client:
        client.sendall(request("owl"))
        assert receive(client, sum(map(len, pieces[:13])))
        before = time.monotonic_ns()
        server.kill()
        after = time.monotonic_ns()
        assert receive_all(client) == b""
    (done,) = followed.until_done()
    assert (done.failure, done.aborted, done.frames) == (Failure.cut_off, None, 11)
    assert done.capture is Capture.complete
    assert before <= done.finished_ns <= after
    assert server.pid not in followed.probe.raw.targets()


@pytest.mark.parametrize("whole", [True, False])
def test_an_answer_that_ends_with_its_connection(followed: Followed, serve: StartServer, whole: bool) -> None:
    """Without a length the close ends the answer; whether it was all of it, `[DONE]` says."""
    pieces = [head("Connection: close"), *(events(23) if whole else events(23)[:7])]
    server = serve(["request", "recvfrom"], ["write", "sendto", texts(pieces)])
    followed.follow(server)
    with server.connect() as client:
        client.sendall(request("owl"))
        assert receive_all(client) == b"".join(pieces)
    server.done()
    (done,) = followed.until_done()
    assert done.failure is (None if whole else Failure.cut_off)
    assert (done.aborted, done.frames) == (None, 23 if whole else 6)
    assert done.capture is Capture.complete


# ---- what is not seen ----


@pytest.mark.parametrize("how", ["sendfile64", "splice"])
def test_frames_that_the_service_never_held_are_known_to_be_missing(
    followed: Followed, serve: StartServer, how: str
) -> None:
    body = b"".join(token("word") for _ in range(3))
    text = head(f"Content-Length: {3 * len(body)}")
    server = serve(
        ["request", "recvfrom"], ["write", "sendto", texts([text + body])], ["write", how, texts([body])],
        ["write", "sendto", texts([body])], ["request", "recvfrom"], ["write", "sendto", texts(answer(7))],
    )  # fmt: skip
    followed.follow(server)
    with server.connect() as client:
        client.sendall(request("owl"))
        assert receive(client, len(text) + 3 * len(body)) == text + 3 * body
        client.sendall(request("next"))
        assert receive_all(client) == b"".join(answer(7))
    server.done()
    first, second = followed.until_done(2)
    assert (first.model, first.capture, first.frames) == ("owl", Capture.undecodable, 6)
    assert (second.model, second.capture, second.frames) == ("next", Capture.complete, 7)
    assert followed.reasons() == {Count.UNSEEN_BYTES_CALLS: 1}


def test_frames_written_through_io_uring_are_known_to_be_missing(followed: Followed, serve: StartServer) -> None:
    pieces = answer(23)
    server = serve(
        ["request", "recvfrom"], ["write", "sendto", texts(pieces[:7])], ["write", "io_uring", texts(pieces[7:11])],
        ["write", "sendto", texts(pieces[11:])], ["request", "recvfrom"], ["write", "sendto", texts(answer(7))],
    )  # fmt: skip
    followed.follow(server)
    with server.connect() as client:
        client.sendall(request("owl"))
        assert receive(client, len(ANSWER)) == ANSWER
        client.sendall(request("next"))
        assert receive_all(client) == b"".join(answer(7))
    server.done()
    first, second = followed.until_done(2)
    assert (first.model, first.capture, first.frames) == ("owl", Capture.undecodable, 23 - 4)
    assert (second.model, second.capture, second.frames) == ("next", Capture.complete, 7)
    assert followed.reasons() == {Count.UNFOLLOWED_IO: 1}


def test_bytes_that_are_no_http_leave_the_next_connection_alone(followed: Followed, serve: StartServer) -> None:
    server = serve(["read_some", "recvfrom", 65536], ["write", "sendto", texts([ANSWER])])
    followed.follow(server)
    for text in (b"\x16\x03\x01\x02\x00" + bytes(range(256)) * 7, request("owl")):
        with server.connect() as client:
            client.sendall(text)
            assert receive_all(client) == ANSWER
        server.done()
    (done,) = followed.until_done()
    assert (done.model, done.capture) == ("owl", Capture.complete)
