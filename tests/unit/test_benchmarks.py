"""The benchmarks' own instruments: a client that is wrong would make the agent look wrong, or right."""

import socket
import threading

import numpy as np
import pytest

from benchmarks.common import frames
from benchmarks.common.client import Client, Heard, request
from benchmarks.common.load import Felt
from benchmarks.common.report import Bar, lost_by_reason, nearest_rank
from benchmarks.common.transcript import transcribe
from benchmarks.overhead.watched import interval

HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
EVENTS = (
    frames.frame("m", {"role": "assistant", "content": ""}),
    frames.frame("m", {"content": "one"}),
    frames.PING,
    frames.frame("m", {"content": "two"}) + frames.frame("m", {"content": "three"}),
    frames.frame("m", {}),
    frames.frame("m", {"content": "four"}),
    frames.usage("m", 4),
    frames.DONE,
)


def chunked(*parts: bytes) -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


def heard(*pieces: bytes) -> Heard:
    return Heard(0, 0, 40001, 100, [(200 + index, piece) for index, piece in enumerate(pieces)])


def test_frames_with_content_are_told_from_those_without():
    read = transcribe(heard(HEAD, *(chunked(event)[:-5] for event in EVENTS), b"0\r\n\r\n"))
    assert read.content_ns == (202, 204, 204, 206)
    assert (read.model, read.completion_tokens, read.finished_ns) == ("m", 4, 209)
    assert (read.ttft_ns, read.gaps_ns, read.duration_ns) == (102, [2, 0, 2], 109)


def test_a_frame_is_there_when_its_last_byte_is_wherever_it_is_split():
    event = EVENTS[1]
    raw = HEAD + chunked(event[:7], event[7:])
    last = raw.index(b"\n\n") + 2
    for split in range(1, len(raw)):
        read = transcribe(heard(raw[:split], raw[split:]))
        assert read.content_ns == ((200,) if split >= last else (201,)), split


@pytest.mark.parametrize("raw", [HEAD + chunked(b"data: {"), HEAD + chunked(*EVENTS) + b"x", EVENTS[1]])
def test_what_is_no_complete_event_stream_is_refused(raw: bytes):
    with pytest.raises(ValueError, match=r"bytes after|not a chunked"):
        transcribe(heard(raw))


def test_the_client_counts_every_byte_and_uses_a_connection_as_often_as_told():
    answer = HEAD + chunked(*EVENTS)
    ports = []

    def serve(listener: socket.socket) -> None:
        for served in (3, 3, 1):
            connected, peer = listener.accept()
            ports.append(peer[1])
            with connected:
                for _ in range(served):
                    assert connected.recv(65536).endswith(b"{}")
                    connected.sendall(answer[:-2])  # the end of the response is split
                    connected.sendall(answer[-2:])
                assert connected.recv(1) == b""

    done: list[Heard] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = threading.Thread(target=serve, args=(listener,))
        server.start()
        lane = iter([request("/v1/chat/completions", b"{}")] * 7)
        Client(listener.getsockname()[1], [lane], done.append, concurrency=1, per_connection=3).run()
        server.join(10)
    assert [b"".join(data for _, data in each.pieces) for each in done] == [answer] * 7
    assert [each.port for each in done] == [ports[0]] * 3 + [ports[1]] * 3 + [ports[2]]
    assert all(each.sent_ns < each.pieces[0][0] <= each.pieces[-1][0] for each in done)


def test_gaps_are_within_a_response_only():
    felt = Felt(
        lane=np.array([0, 1]),
        sent_ns=np.array([5, 7]),
        finished_ns=np.array([40, 60]),
        frames=np.array([3, 2]),
        content_ns=np.array([10, 13, 30, 8, 50]),
    )
    assert felt.ttft_ns.tolist() == [5, 1]
    at_ns, gaps_ns = felt.gaps_ns
    assert (at_ns.tolist(), gaps_ns.tolist()) == ([13, 30, 50], [3, 17, 42])


def test_the_interval_of_a_median_is_by_order_statistics():
    # n: the rank from either end, as in any table of the sign test at 5 %, two-sided
    ranks = {5: 0, 6: 0, 7: 0, 8: 0, 9: 1, 11: 1, 12: 2, 17: 4, 23: 6}
    for size, rank in ranks.items():
        assert interval(list(range(size))[::-1]) == (rank, size - 1 - rank), size


def test_quantiles_are_nearest_ranks():
    assert [nearest_rank([3, 1, 2], q) for q in (0.0, 0.3, 0.34, 0.67, 1.0)] == [1, 1, 2, 3, 3]
    assert nearest_rank(range(1, 101), 0.55) == 55


def test_a_bar_of_what_was_not_measured_is_missed():
    assert Bar("x", 1.0, 1.0).met
    assert Bar("x", 1.0, 1.0, at_least=True).met
    assert not Bar("x", 1.1, 1.0).met
    assert not Bar("x", float("nan"), 1.0).met
    assert not Bar("x", float("nan"), 1.0, at_least=True).met
    assert str(Bar("lost", 2.5, 2.0, " %")) == "lost: 2.5 %, wanted at most 2 %, off by 0.5 %"


def test_losses_are_told_by_reason():
    assert lost_by_reason([{}, {}]) == "0"
    assert lost_by_reason([{"a": 2}, {"b": 5, "a": 1}]) == "8 (5 b, 3 a)"
