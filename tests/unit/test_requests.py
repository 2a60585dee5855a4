"""The life of a request: scripted connections whose instants and outcomes are known."""

from __future__ import annotations

import json

import pytest

from exporter.request import Capture, Failure, FinishedRequest, Phase
from exporter.requests import ABANDONED_NS, LINGER_NS, PIPELINE_LIMIT, SEGMENTS_LIMIT
from exporter.slis import Sli
from tests.conversations import (
    CLOSE,
    CLOSE_WAIT,
    DONE,
    ESTABLISHED,
    ETIMEDOUT,
    FIN_WAIT1,
    LAST_ACK,
    LAST_CHUNK,
    MS,
    SSE_HEAD,
    START_NS,
    Scene,
    Wire,
    answer,
    chunk,
    completion,
    event,
    finish,
    post,
    role,
    stream,
    usage,
    word,
)


@pytest.fixture
def scene() -> Scene:
    return Scene()


@pytest.fixture
def wire() -> Wire:
    return Wire()


def only(finished: list[FinishedRequest]) -> FinishedRequest:
    (request,) = finished
    return request


def ms(ns: int | None) -> float | None:
    return None if ns is None else (ns - START_NS) / MS


# ---- instants and frames ----


def test_streamed_request_has_its_instants(scene: Scene, wire: Wire) -> None:
    wire.ask(post(), delay_ms=2)
    wire.write(SSE_HEAD, after_ms=1)
    wire.write(chunk(role()), after_ms=1)
    wire.write(chunk(b": ping\n\n"), after_ms=10)
    for _ in range(7):
        wire.write(chunk(word()), after_ms=11)
    wire.write(chunk(word()), after_ms=29)
    wire.write(chunk(finish()), after_ms=5)
    wire.write(chunk(usage(19, 8, cached=13)), after_ms=1)
    wire.write(chunk(DONE) + LAST_CHUNK, after_ms=1)
    request = only(scene.play(wire))
    assert ms(request.arrived_ns) == 0
    assert ms(request.read_ns) == 2
    assert ms(request.first_byte_ns) == 3
    assert ms(request.first_token_ns) == 25
    assert ms(request.last_token_ns) == 120
    assert ms(request.finished_ns) == 127
    assert request.longest_gap_ns == 29 * MS
    assert (request.frames, request.wasted_tokens) == (8, 0)
    assert (request.prompt_tokens, request.completion_tokens, request.cached_tokens) == (19, 8, 13)
    assert (request.service, request.model, request.api) == ("roleplay", "bard", "chat_completions")
    assert (request.method, request.target, request.status) == ("POST", "/v1/chat/completions", 200)
    assert (request.streamed, request.failure, request.aborted) == (True, None, None)
    assert (request.capture, request.number, request.peer) == (Capture.complete, 1, "127.0.0.1:1")
    assert (request.tgid, request.tid) == (7, 11)
    assert scene.captures == {Capture.complete: 1}


def test_first_token_and_gaps_reach_the_series(scene: Scene, wire: Wire) -> None:
    wire.ask(post())
    stream(wire, words=101, first_ms=53, step_ms=11)
    scene.play(wire)
    series = scene.series
    series.flush(START_NS)
    assert series.frames == 101
    assert sum(series.histograms[Sli.ITL].counts) == 100
    assert series.histograms[Sli.ITL].sum_ns == 1100 * MS
    assert sum(series.histograms[Sli.TTFT].counts) == 1
    assert series.histograms[Sli.TTFT].sum_ns == 55.25 * MS
    assert series.requests == 1


@pytest.mark.parametrize(
    "frame",
    [
        event(choices=[{"delta": {"reasoning_content": "hm"}}]),
        event(choices=[{"delta": {"tool_calls": [{"function": {"arguments": "{"}}]}}]),
        event(choices=[{"delta": {"refusal": "no"}}]),
    ],
)
def test_content_is_more_than_text(scene: Scene, wire: Wire, frame: bytes) -> None:
    wire.ask(post())
    wire.write(SSE_HEAD + chunk(role()))
    wire.write(chunk(frame), after_ms=17)
    wire.write(chunk(DONE) + LAST_CHUNK, after_ms=1)
    request = only(scene.play(wire))
    assert request.frames == 1
    assert ms(request.first_token_ns) == 17.25


@pytest.mark.parametrize(
    "frame",
    [
        role(),
        b": ping\n\n",
        b"data:\n\n",
        b"data: \n\n",
        event(choices=[{"delta": {"content": None}}]),
        event(choices=[]),
        usage(2, 0),
        finish(),
    ],
)
def test_other_frames_are_no_content(scene: Scene, wire: Wire, frame: bytes) -> None:
    wire.ask(post())
    wire.write(SSE_HEAD + chunk(frame) + chunk(DONE) + LAST_CHUNK)
    request = only(scene.play(wire))
    assert (request.frames, request.first_token_ns, request.capture) == (0, None, Capture.complete)


def test_frame_in_two_writes_counts_when_it_is_whole(scene: Scene, wire: Wire) -> None:
    whole = chunk(word())
    wire.ask(post())
    wire.write(SSE_HEAD)
    wire.write(whole[:29], after_ms=10)
    wire.write(whole[29:], after_ms=3)
    wire.write(chunk(DONE) + LAST_CHUNK, after_ms=1)
    assert ms(only(scene.play(wire)).first_token_ns) == 13.25


def test_frames_in_one_write_have_no_time_between_them(scene: Scene, wire: Wire) -> None:
    wire.ask(post())
    wire.write(SSE_HEAD)
    wire.write(chunk(word() + word()) + chunk(word()), after_ms=10)
    wire.write(chunk(DONE) + LAST_CHUNK)
    request = only(scene.play(wire))
    assert (request.frames, request.longest_gap_ns) == (3, 0)


def test_other_choice_goes_on_after_one_has_finished(scene: Scene, wire: Wire) -> None:
    wire.ask(post())
    wire.write(SSE_HEAD + chunk(word()) + chunk(word(index=1)) + chunk(finish()), after_ms=5)
    wire.write(chunk(word(index=1)), after_ms=5)
    wire.at += 1
    wire.client_closes()
    assert only(scene.play(wire)).aborted is Phase.streaming


def test_response_without_stream(scene: Scene, wire: Wire) -> None:
    wire.ask(post(stream=False))
    wire.write(answer(completion(prompt=31, tokens=7, cached=16)), after_ms=41)
    request = only(scene.play(wire))
    assert (request.streamed, request.frames, request.first_token_ns) == (False, 0, None)
    assert (request.prompt_tokens, request.completion_tokens, request.cached_tokens) == (31, 7, 16)
    assert ms(request.first_byte_ns) == ms(request.finished_ns) == 41.25
    assert request.capture is Capture.complete


def test_close_delimited_stream_is_complete_once_it_said_so(scene: Scene, wire: Wire) -> None:
    head = b"HTTP/1.0 200 OK\r\ncontent-type: text/event-stream\r\n\r\n"
    wire.ask(post())
    wire.write(head)
    for frame in (role(), word(), word(), finish(), DONE):
        wire.write(frame, after_ms=7)
    wire.at += 100
    wire.service_closes()
    request = only(scene.play(wire))
    assert (request.frames, request.failure, request.capture) == (2, None, Capture.complete)
    assert ms(request.finished_ns) == 35.25


# ---- several requests on one connection ----


def test_keep_alive_takes_each_request_for_itself(scene: Scene, wire: Wire) -> None:
    for number in range(23):
        wire.at += 100
        wire.ask(post(model=f"m{number}"))
        stream(wire, words=number, model=f"m{number}")
    wire.client_closes()
    finished = scene.play(wire)
    assert [(request.model, request.frames, request.number) for request in finished] == [
        (f"m{number}", number, number + 1) for number in range(23)
    ]
    assert all(request.aborted is None for request in finished)
    assert scene.captures == {Capture.complete: 23}
    assert len(scene.conversations) == 0


def test_pipelined_requests_are_answered_in_order(scene: Scene, wire: Wire) -> None:
    wire.ask(post(model="one") + post(model="two", stream=False) + post(model="three"))
    wire.write(SSE_HEAD + chunk(word()) + chunk(DONE) + LAST_CHUNK + answer(completion()) + SSE_HEAD, after_ms=1)
    wire.write(chunk(word()) + chunk(word()) + chunk(DONE) + LAST_CHUNK, after_ms=1)
    finished = scene.play(wire)
    assert [(request.model, request.frames) for request in finished] == [("one", 1), ("two", 0), ("three", 2)]
    assert [request.capture for request in finished] == [Capture.complete] * 3


def test_other_requests_are_passed_over(scene: Scene, wire: Wire) -> None:
    for method, response in (
        ("GET", answer(b"{}")),
        ("HEAD", b"HTTP/1.1 200 OK\r\ncontent-length: 1009\r\n\r\n"),
        ("OPTIONS", b"HTTP/1.1 204 No Content\r\n\r\n"),
        ("GET", b"HTTP/1.1 304 Not Modified\r\ncontent-length: 5\r\n\r\n"),
    ):
        wire.ask(f"{method} /v1/models HTTP/1.1\r\nhost: x\r\n\r\n".encode())
        wire.write(response, after_ms=1)
    wire.ask(post())
    wire.write(b"HTTP/1.1 100 Continue\r\n\r\n", after_ms=1)
    wire.write(answer(completion()), after_ms=4)
    request = only(scene.play(wire))
    assert request.capture is Capture.complete
    assert request.read_ns + 5 * MS == request.first_byte_ns
    assert scene.captures == {Capture.complete: 1}


def test_answer_before_the_body_was_read(scene: Scene, wire: Wire) -> None:
    long = post(b'{"model": "bard", "messages": "' + b"x" * 9001 + b'"}')
    wire.ask(long[:4001])
    wire.write(answer(b'{"error": {}}', status=413), after_ms=1)
    wire.read(long[4001:])
    wire.ask(post(model="next", stream=False))
    wire.write(answer(completion()), after_ms=1)
    refused, following = scene.play(wire)
    assert (refused.model, refused.status, refused.failure) == ("bard", 413, Failure.client_error)
    assert (following.model, following.failure, following.capture) == ("next", None, Capture.complete)


def test_head_that_is_whole_after_its_answer_shifts_no_other(scene: Scene, wire: Wire) -> None:
    wire.ask(b"HEAD / HTTP/1.1\r\nhost: ")
    wire.write(b"HTTP/1.1 408 Request Timeout\r\ncontent-length: 0\r\n\r\n")
    wire.read(b"x\r\n\r\n")
    wire.ask(post(stream=False))
    wire.write(answer(completion()))
    request = only(scene.play(wire))
    assert (request.completion_tokens, request.capture) == (7, Capture.complete)
    assert scene.captures == {Capture.complete: 1}


def test_first_frames_before_the_body_was_read_know_the_model(scene: Scene, wire: Wire) -> None:
    body = post(b'{"model": "bard", "messages": "xxxxxxxxxxxxxxx"}')
    wire.ask(body[:-9])
    wire.write(SSE_HEAD + chunk(word(model="other")))
    wire.read(body[-9:])
    wire.write(chunk(DONE) + LAST_CHUNK)
    assert only(scene.play(wire)).model == "bard"
    assert scene.series.labels[1] == "bard"


def test_model_of_the_series_stays_that_of_the_request(scene: Scene, wire: Wire) -> None:
    body = post(b'{"messages": "xxxxxxxxxxxxxxx", "model": "late"}')
    wire.ask(body[:-9])
    wire.write(SSE_HEAD + chunk(word(model="early")))
    wire.read(body[-9:])
    wire.write(chunk(DONE) + LAST_CHUNK)
    assert only(scene.play(wire)).model == "early"
    assert scene.series.labels[1] == "early"


def test_in_flight_is_what_is_not_finished(scene: Scene) -> None:
    wires = [Wire(conn=number, rx=number, tx=number) for number in range(3)]
    for wire in wires:
        wire.ask(post())
    wires[0].read(b"GET /health HTTP/1.1\r\n\r\n")
    stream(wires[2])
    scene.play(*wires)
    assert list(scene.conversations.in_flight()) == [("roleplay", "bard", "chat_completions", ())] * 2


# ---- how it ends ----


def test_client_that_leaves_before_the_first_token_was_waiting(scene: Scene, wire: Wire) -> None:
    wire.ask(post())
    wire.write(SSE_HEAD + chunk(role()), after_ms=1)
    wire.at += 30
    wire.client_closes()
    request = only(scene.play(wire))
    assert (request.aborted, request.failure, request.capture) == (Phase.waiting, None, Capture.complete)
    assert ms(request.finished_ns) == 31.25


def test_client_that_leaves_after_it_was_streaming(scene: Scene, wire: Wire) -> None:
    wire.ask(post())
    wire.write(SSE_HEAD + chunk(role()), after_ms=1)
    for _ in range(5):
        wire.write(chunk(word()), after_ms=10)
    wire.at += 7
    wire.reset()
    request = only(scene.play(wire))
    assert (request.aborted, request.frames, request.wasted_tokens) == (Phase.streaming, 5, 0)
    assert ms(request.finished_ns) == 58.25
    assert scene.series.aborts == {Phase.waiting: 0, Phase.streaming: 1}


def test_tokens_after_the_client_left_are_wasted(scene: Scene, wire: Wire) -> None:
    wire.ask(post())
    wire.write(SSE_HEAD)
    for _ in range(3):
        wire.write(chunk(word()), after_ms=10)
    wire.at += 5
    wire.go(CLOSE_WAIT)
    for _ in range(7):
        wire.write(chunk(word()), after_ms=10)
    wire.reset()
    request = only(scene.play(wire))
    assert (request.aborted, request.frames, request.wasted_tokens) == (Phase.streaming, 10, 7)
    assert ms(request.finished_ns) == 35.25


def test_first_token_for_a_client_that_had_left_does_not_make_it_streaming(scene: Scene, wire: Wire) -> None:
    wire.ask(post())
    wire.write(SSE_HEAD)
    wire.at += 5
    wire.go(CLOSE_WAIT)
    wire.write(chunk(word()), after_ms=10)
    wire.reset()
    request = only(scene.play(wire))
    assert (request.aborted, request.wasted_tokens) == (Phase.waiting, 1)


def half_closed(wire: Wire, words: int = 3) -> None:
    wire.ask(post())
    wire.write(SSE_HEAD + chunk(word()), after_ms=1)
    wire.at += 1
    wire.go(CLOSE_WAIT)
    for _ in range(words):
        wire.write(chunk(word()), after_ms=10)
    wire.write(chunk(finish()) + chunk(DONE) + LAST_CHUNK, after_ms=1)


def test_client_that_shut_its_side_and_waits_gets_its_answer(scene: Scene, wire: Wire) -> None:
    half_closed(wire)
    assert scene.play(wire) == []
    scene.sweep(wire.at + LINGER_NS / MS - 1)
    assert scene.finished == []
    scene.sweep(wire.at + LINGER_NS / MS)
    request = only(scene.finished)
    assert (request.aborted, request.frames, request.wasted_tokens) == (None, 4, 0)
    assert ms(request.finished_ns) == wire.at


def test_client_that_shut_its_side_and_waits_until_the_service_closes(scene: Scene, wire: Wire) -> None:
    half_closed(wire)
    wire.go(LAST_ACK)
    wire.go(CLOSE)
    assert only(scene.play(wire)).aborted is None


def test_client_that_had_gone_resets_what_comes_after(scene: Scene, wire: Wire) -> None:
    half_closed(wire)
    wire.at += 0.1
    wire.reset()
    request = only(scene.play(wire))
    assert (request.aborted, request.frames, request.wasted_tokens) == (Phase.streaming, 4, 3)
    assert ms(request.finished_ns) == 2.25


def test_client_that_had_gone_wastes_a_whole_answer_without_stream(scene: Scene, wire: Wire) -> None:
    wire.ask(post(stream=False))
    wire.at += 5
    wire.go(CLOSE_WAIT)
    wire.write(answer(completion(tokens=17)), after_ms=10)
    wire.reset()
    request = only(scene.play(wire))
    assert (request.aborted, request.wasted_tokens, request.completion_tokens) == (Phase.waiting, 17, 17)


def test_pipelined_answers_linger_together(scene: Scene, wire: Wire) -> None:
    wire.ask(post(stream=False, model="one") + post(stream=False, model="two"))
    wire.go(CLOSE_WAIT)
    wire.write(answer(completion()), after_ms=1)
    wire.write(answer(completion()), after_ms=1)
    wire.reset()
    assert [(request.model, request.aborted) for request in scene.play(wire)] == [
        ("one", Phase.waiting),
        ("two", Phase.waiting),
    ]


def test_client_that_leaves_after_done_has_everything(scene: Scene, wire: Wire) -> None:
    wire.ask(post())
    wire.write(SSE_HEAD + chunk(word()) + chunk(DONE), after_ms=1)
    wire.at += 1
    wire.go(CLOSE_WAIT)
    wire.write(LAST_CHUNK, after_ms=1)
    request = only(scene.play(wire))
    assert (request.aborted, request.failure, ms(request.finished_ns)) == (None, None, 3.25)


def test_client_that_leaves_between_the_last_token_and_done_has_everything(scene: Scene, wire: Wire) -> None:
    wire.ask(post())
    wire.write(SSE_HEAD + chunk(word()) + chunk(finish()), after_ms=1)
    wire.at += 1
    wire.go(CLOSE_WAIT)
    wire.write(chunk(DONE), after_ms=1)
    wire.write(LAST_CHUNK, after_ms=1)
    wire.reset()
    assert only(scene.play(wire)).aborted is None


def test_reset_after_a_whole_object_is_no_abort(scene: Scene, wire: Wire) -> None:
    wire.ask(post(stream=False))
    wire.write(b"HTTP/1.0 200 OK\r\ncontent-type: application/json\r\n\r\n" + completion(), after_ms=1)
    wire.at += 1
    wire.reset()
    request = only(scene.play(wire))
    assert (request.aborted, request.failure, ms(request.finished_ns)) == (None, None, 1.25)


def test_reset_instead_of_the_last_chunk_is_no_abort(scene: Scene, wire: Wire) -> None:
    wire.ask(post())
    wire.write(SSE_HEAD + chunk(word()) + chunk(finish()), after_ms=1)
    wire.at += 1
    wire.reset()
    assert only(scene.play(wire)).aborted is None


@pytest.mark.parametrize("error", [ETIMEDOUT, 113])
def test_client_that_cannot_be_reached_has_left(scene: Scene, wire: Wire, error: int) -> None:
    wire.ask(post())
    wire.write(SSE_HEAD + chunk(word()), after_ms=1)
    wire.at += 900_000
    wire.go(CLOSE, error=error)
    request = only(scene.play(wire))
    assert (request.aborted, request.failure) == (Phase.streaming, None)


@pytest.mark.parametrize("begun", [b"", SSE_HEAD, SSE_HEAD + chunk(word())])
def test_service_that_closes_too_early_cuts_off(scene: Scene, wire: Wire, begun: bytes) -> None:
    wire.ask(post())
    if begun:
        wire.write(begun)
    wire.at += 3
    wire.service_closes()
    request = only(scene.play(wire))
    assert (request.failure, request.aborted, request.capture) == (Failure.cut_off, None, Capture.complete)
    assert ms(request.finished_ns) == 3.25


def test_service_that_dies_with_unread_bytes_cuts_off(scene: Scene, wire: Wire) -> None:
    wire.ask(post())
    wire.go(CLOSE)
    assert only(scene.play(wire)).failure is Failure.cut_off


@pytest.mark.parametrize(
    ("frames", "left", "failure", "aborted"),
    [
        (word() + word(), False, Failure.cut_off, None),
        (word() + word(), True, None, Phase.streaming),
        (word() + DONE, False, None, None),
        (word() + DONE, True, None, None),
    ],
)
def test_close_delimited_stream(
    scene: Scene, wire: Wire, frames: bytes, left: bool, failure: Failure | None, aborted: Phase | None
) -> None:
    wire.ask(post())
    wire.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n" + frames)
    wire.at += 1
    if left:
        wire.reset()
    else:
        wire.service_closes()
    request = only(scene.play(wire))
    assert (request.failure, request.aborted) == (failure, aborted)


@pytest.mark.parametrize(("kept", "failure"), [(1.0, None), (0.5, Failure.cut_off)])
def test_close_delimited_object(scene: Scene, wire: Wire, kept: float, failure: Failure | None) -> None:
    body = completion()
    wire.ask(post(stream=False))
    wire.write(b"HTTP/1.0 200 OK\r\ncontent-type: application/json\r\n\r\n" + body[: int(len(body) * kept)])
    wire.at += 1
    wire.service_closes()
    request = only(scene.play(wire))
    assert (request.failure, request.capture) == (failure, Capture.complete)


@pytest.mark.parametrize(
    ("status", "failure"),
    [
        (200, None),
        (307, None),
        (400, Failure.client_error),
        (404, Failure.client_error),
        (429, Failure.rate_limited),
        (499, Failure.client_error),
        (500, Failure.server_error),
        (503, Failure.server_error),
    ],
)
def test_status_is_the_failure(scene: Scene, wire: Wire, status: int, failure: Failure | None) -> None:
    wire.ask(post(stream=False))
    wire.write(answer(completion() if status == 200 else b"", status=status))
    request = only(scene.play(wire))
    assert (request.failure, request.status, request.capture) == (failure, status, Capture.complete)


@pytest.mark.parametrize("error", [event(error={"message": "out of memory"}), event(object="error", message="no")])
def test_error_in_the_stream_is_the_servers(scene: Scene, wire: Wire, error: bytes) -> None:
    wire.ask(post())
    wire.write(SSE_HEAD + chunk(word()) + chunk(error) + chunk(DONE) + LAST_CHUNK)
    request = only(scene.play(wire))
    assert (request.status, request.failure) == (200, Failure.server_error)


# ---- arrival ----


def test_arrival_unseen_falls_back_to_the_read(scene: Scene, wire: Wire) -> None:
    wire.at = 4
    wire.read(post(stream=False))
    wire.write(answer(completion()))
    request = only(scene.play(wire))
    assert ms(request.arrived_ns) == ms(request.read_ns) == 4
    assert request.capture is Capture.arrival_unseen


def answered(scene: Scene, wire: Wire, request: bytes) -> FinishedRequest:
    wire.read(request)
    wire.write(answer(completion()))
    return scene.play(wire)[-1]


def test_first_of_the_segments_with_the_first_byte_counts(scene: Scene, wire: Wire) -> None:
    request = post(stream=False)
    wire.at = 1
    wire.arrive(100, position=wire.rx + 37)  # overtook the one before
    wire.at = 2
    wire.arrive(37, position=wire.rx)
    wire.at = 3
    wire.arrive(len(request), position=wire.rx)  # sent again, in one
    assert ms(answered(scene, wire, request).arrived_ns) == 2


def test_segments_that_were_read_already_are_not_kept(scene: Scene, wire: Wire) -> None:
    request = post(stream=False)
    wire.arrive(len(request))
    answered(scene, wire, request)
    wire.at = 10
    wire.arrive(len(request), position=wire.rx - len(request))  # sent again, for nothing
    for number in range(2 * SEGMENTS_LIMIT):
        wire.at = 20 + number
        wire.arrive(19)
    long = post(b" " * (2 * 19 * SEGMENTS_LIMIT), stream=False)
    assert ms(answered(scene, wire, long).arrived_ns) == 20


def test_one_segment_with_two_requests_is_the_arrival_of_both(scene: Scene, wire: Wire) -> None:
    requests = post(stream=False, model="one") + post(stream=False, model="two")
    wire.arrive(len(requests))
    half = len(requests) // 2
    wire.at = 5
    wire.read(requests[:half])
    wire.at = 9
    wire.read(requests[half:])
    wire.write(answer(completion()) * 2)
    assert [(ms(request.arrived_ns), ms(request.read_ns)) for request in scene.play(wire)] == [(0, 5), (0, 9)]


def test_segment_after_the_read_is_no_arrival(scene: Scene, wire: Wire) -> None:
    request = post(stream=False)
    wire.read(request[:1])
    wire.at = 3
    wire.arrive(len(request), position=wire.rx - 1)
    wire.read(request[1:])
    wire.write(answer(completion()))
    assert only(scene.play(wire)).capture is Capture.arrival_unseen


def test_instants_in_the_wrong_order_make_no_negative_time(scene: Scene) -> None:
    request = post()
    follow = scene.conversations
    follow.opened(1, START_NS, 0, "", True, 1, 1)
    follow.state(1, START_NS + 3, ESTABLISHED, CLOSE_WAIT, 7, 1, 1, 0)
    follow.segment(1, START_NS + 11, 1, len(request))
    follow.read(1, START_NS + 5, 1, request, 0, 0, 0, 0, 7, 7)
    follow.state(1, START_NS + 7, CLOSE_WAIT, LAST_ACK, 7, 1 + len(request), 1, 0)
    finished = only(scene.finished)
    assert finished.arrived_ns == finished.read_ns == finished.finished_ns == START_NS + 5
    assert (finished.aborted, finished.capture) == (Phase.waiting, Capture.arrival_unseen)


@pytest.mark.parametrize("before", [1, 29, 101, 211, 307])
def test_positions_wrap(scene: Scene, before: int) -> None:
    wire = Wire(rx=2**32 - before, tx=2**32 - before)
    for number in range(3):
        wire.at = 1000 * number
        wire.ask(post(headers="x-padding: " + "x" * 97 + "\r\n"), delay_ms=0.5)
        stream(wire, words=5)
    finished = scene.play(wire)
    assert [ms(request.arrived_ns) for request in finished] == [0, 1000, 2000]
    assert [request.frames for request in finished] == [5, 5, 5]
    assert scene.captures == {Capture.complete: 3}


# ---- names ----


@pytest.mark.parametrize(
    "body",
    [
        {"model": "bard", "prompt": "x" * 300_007},
        {"prompt": "x" * 300_007, "model": "bard"},
        {"messages": [{"model": "not me"}], "model": "bard"},
    ],
)
def test_model_is_found_wherever_it_stands(scene: Scene, wire: Wire, body: object) -> None:
    text = post(json.dumps(body).encode())
    for start in range(0, len(text), 4032):
        wire.read(text[start : start + 4032])
    wire.write(answer(completion(model="something-else")))
    assert only(scene.play(wire)).model == "bard"


def test_model_of_the_answer_helps_out(scene: Scene, wire: Wire) -> None:
    wire.ask(post(b'{"stream": true}'))
    stream(wire, words=2, model="default")
    wire.ask(post(b"{}"))
    wire.write(answer(completion(model="default")))
    assert [request.model for request in scene.play(wire)] == ["default", "default"]
    assert scene.captures == {Capture.complete: 2}


def test_model_that_nobody_names_is_unseen(scene: Scene, wire: Wire) -> None:
    wire.ask(post(b'{"stream": false}'))
    wire.write(answer(b"{}"))
    request = only(scene.play(wire))
    assert (request.model, request.capture) == (None, Capture.model_unseen)


def test_model_before_a_hole_in_the_body_is_kept(scene: Scene, wire: Wire) -> None:
    request = post(b'{"model": "bard", "prompt": "' + b"x" * 997 + b'"}')
    wire.arrive(len(request))
    wire.read(request[:-800], uncaptured=800)
    wire.write(answer(completion(model="other")))
    finished = only(scene.play(wire))
    assert (finished.model, finished.capture) == ("bard", Capture.complete)


def test_labels_come_from_headers() -> None:
    scene = Scene(labels=("stage", "tier"))
    wire = Wire()
    wire.ask(post(stream=False, headers="X-Stage: canary\r\nx-tier: gold\r\n"))
    wire.write(answer(completion()))
    wire.ask(post(stream=False))
    wire.write(answer(completion()))
    assert [request.extra for request in scene.play(wire)] == [("canary", "_other"), ("_none", "_none")]


def test_target_loses_its_query(scene: Scene, wire: Wire) -> None:
    wire.ask(post(stream=False, path="/v1/completions?key=secret"))
    wire.write(answer(completion()))
    request = only(scene.play(wire))
    assert (request.target, request.api) == ("/v1/completions", "completions")


# ---- what was not seen ----


def test_stream_that_was_under_way_at_attach_counts_once(scene: Scene) -> None:
    wire = Wire(born=False)
    for _ in range(5):
        wire.write(chunk(word()), after_ms=10)
    wire.write(chunk(DONE) + LAST_CHUNK)
    wire.ask(post(model="next"))
    stream(wire, words=3, model="next")
    wire.ask(post(model="last"))
    stream(wire, words=2, model="last")
    assert [(request.model, request.frames) for request in scene.play(wire)] == [("next", 3), ("last", 2)]
    assert scene.captures == {Capture.start_unseen: 1, Capture.complete: 2}


def test_idle_connection_at_attach_loses_nothing(scene: Scene) -> None:
    wire = Wire(born=False)
    wire.ask(post(stream=False))
    wire.write(answer(completion()))
    assert only(scene.play(wire)).capture is Capture.complete


@pytest.mark.parametrize("body", [b"", b"<html>", b'{"usage": ', b"[]"])
def test_answer_that_is_no_object_is_undecodable(scene: Scene, wire: Wire, body: bytes) -> None:
    wire.ask(post(stream=False))
    wire.write(answer(body))
    assert only(scene.play(wire)).capture is Capture.undecodable


def test_answer_keeps_what_it_said_before_a_hole(scene: Scene, wire: Wire) -> None:
    whole = answer(b'{"usage": {"completion_tokens": 7}, "choices": "' + b"x" * 997 + b'"}')
    wire.ask(post(stream=False))
    wire.write(whole[:-900], uncaptured=900)
    request = only(scene.play(wire))
    assert (request.completion_tokens, request.capture) == (7, Capture.undecodable)


def test_bytes_past_the_cap_make_the_answer_undecodable(scene: Scene, wire: Wire) -> None:
    whole = answer(completion())
    wire.ask(post(stream=False))
    wire.write(whole[:-50], uncaptured=50)
    wire.ask(post(stream=False, model="next"))
    wire.write(whole)
    first, following = scene.play(wire)
    assert (first.capture, first.completion_tokens, first.failure) == (Capture.undecodable, None, None)
    assert following.capture is Capture.complete


def test_stream_goes_on_after_bytes_that_were_not_captured(scene: Scene, wire: Wire) -> None:
    frame = chunk(word())
    wire.ask(post())
    wire.write(SSE_HEAD)
    wire.write(frame, after_ms=10)
    wire.write(frame[:20], uncaptured=len(frame) - 20, after_ms=10)
    wire.write(b"", uncaptured=2 * len(frame), after_ms=10)
    for _ in range(3):
        wire.write(frame, after_ms=10)
    wire.write(chunk(DONE) + LAST_CHUNK, after_ms=1)
    request = only(scene.play(wire))
    scene.series.flush(START_NS)
    assert (request.frames, request.longest_gap_ns, request.capture) == (4, 10 * MS, Capture.undecodable)
    assert ms(request.finished_ns) == 61.25
    assert sum(scene.series.histograms[Sli.ITL].counts) == 2


def test_compressed_answer_is_undecodable(scene: Scene, wire: Wire) -> None:
    wire.ask(post())
    head = SSE_HEAD.replace(b"\r\n\r\n", b"\r\ncontent-encoding: gzip\r\n\r\n")
    wire.write(head + chunk(b"\x1f\x8b" + b"x" * 97) + LAST_CHUNK)
    request = only(scene.play(wire))
    assert (request.streamed, request.frames, request.capture) == (True, 0, Capture.undecodable)


def test_frame_that_cannot_be_read_is_neither_token_nor_gap(scene: Scene, wire: Wire) -> None:
    wire.ask(post())
    wire.write(SSE_HEAD + chunk(word()))
    wire.write(chunk(b'data: {"choices": [\n\n'), after_ms=10)
    wire.write(chunk(word()), after_ms=10)
    wire.write(chunk(DONE) + LAST_CHUNK)
    request = only(scene.play(wire))
    assert (request.frames, request.longest_gap_ns, request.capture) == (2, None, Capture.undecodable)


def test_event_beyond_the_limit_is_undecodable(scene: Scene, wire: Wire) -> None:
    wire.ask(post())
    wire.write(SSE_HEAD)
    for _ in range(19):
        wire.write(chunk(b"data: " + b"x" * 65_521), after_ms=1)
    wire.write(chunk(b"\n\n") + chunk(DONE) + LAST_CHUNK)
    assert only(scene.play(wire)).capture is Capture.undecodable


# ---- records that were lost ----


def lost_stream(wire: Wire, words: int = 11) -> int:
    """A request and its stream; returns the index of the record with the first word."""
    wire.ask(post())
    first = len(wire.records) + 2
    stream(wire, words=words)
    return first


def test_lost_frame_leaves_the_rest(scene: Scene, wire: Wire) -> None:
    first = lost_stream(wire)
    request = only(scene.play(wire, dropped={first + 3, first + 4}))
    scene.series.flush(START_NS)
    assert (request.frames, request.completion_tokens, request.capture) == (9, 11, Capture.lost_events)
    assert (ms(request.finished_ns), request.end_seen) == (wire.at, True)
    assert request.longest_gap_ns == 11 * MS
    assert sum(scene.series.histograms[Sli.ITL].counts) == 7
    assert scene.captures == {Capture.lost_events: 1}


def test_lost_first_token_is_no_time_to_first_token(scene: Scene, wire: Wire) -> None:
    first = lost_stream(wire)
    request = only(scene.play(wire, dropped={first}))
    assert (request.first_token_ns, request.frames, request.aborted) == (None, 10, None)
    assert sum(scene.series.histograms[Sli.TTFT].counts) == 0


def test_abort_after_a_lost_first_token_was_streaming(scene: Scene, wire: Wire) -> None:
    wire.ask(post())
    wire.write(SSE_HEAD)
    wire.write(chunk(word()), after_ms=1)
    wire.write(chunk(word()), after_ms=1)
    wire.client_closes()
    assert only(scene.play(wire, dropped={4})).aborted is Phase.streaming


def test_lost_head_loses_the_answer_but_not_the_next(scene: Scene, wire: Wire) -> None:
    first = lost_stream(wire)
    wire.ask(post(model="next"))
    stream(wire, words=2)
    lost, following = scene.play(wire, dropped={first - 2})
    assert (lost.capture, lost.frames, lost.failure, lost.aborted) == (Capture.lost_events, 0, None, None)
    assert (lost.end_seen, following.end_seen) == (False, True)
    assert (following.model, following.frames, following.capture) == ("next", 2, Capture.complete)


@pytest.mark.parametrize("piece", range(3))
def test_lost_piece_of_a_long_frame_loses_that_frame(scene: Scene, wire: Wire, piece: int) -> None:
    long = chunk(word("x" * 1009))
    wire.ask(post())
    wire.write(SSE_HEAD)
    wire.write(chunk(word()), after_ms=1)
    lost = len(wire.records) + piece
    for start in range(0, len(long), 448):
        wire.write(long[start : start + 448])
    for _ in range(3):
        wire.write(chunk(word()), after_ms=1)
    wire.write(chunk(DONE) + LAST_CHUNK, after_ms=1)
    request = only(scene.play(wire, dropped={lost}))
    assert (request.frames, request.capture, request.failure) == (4, Capture.lost_events, None)
    assert ms(request.finished_ns) == wire.at


def test_lost_end_is_found_at_the_next_answer(scene: Scene, wire: Wire) -> None:
    lost_stream(wire)
    last = len(wire.records) - 1
    wire.at += 100
    wire.ask(post(model="next"))
    stream(wire, words=2)
    wire.client_closes()
    first, following = scene.play(wire, dropped={last - 2, last - 1, last})
    assert (first.capture, first.frames, first.aborted, first.end_seen) == (Capture.lost_events, 11, None, False)
    assert (following.model, following.frames, following.capture) == ("next", 2, Capture.complete)


@pytest.mark.parametrize("closes", [Wire.client_closes, Wire.service_closes, Wire.reset])
def test_lost_end_is_found_at_the_close(scene: Scene, wire: Wire, closes: object) -> None:
    lost_stream(wire)
    last = len(wire.records) - 1
    assert callable(closes)
    closes(wire)
    request = only(scene.play(wire, dropped={last - 3, last - 2, last - 1, last}))
    assert (request.capture, request.frames) == (Capture.lost_events, 11)
    assert (request.aborted, request.failure, request.end_seen) == (None, None, False)
    assert scene.series.requests == 0
    assert sum(scene.series.histograms[Sli.DURATION].counts) == 0


def test_answer_that_was_lost_whole_has_no_duration(scene: Scene, wire: Wire) -> None:
    """What is known of it, its read, would make it the fastest of all."""
    first = lost_stream(wire)
    last = len(wire.records)
    wire.client_closes()
    request = only(scene.play(wire, dropped=set(range(first - 2, last))))
    assert (request.capture, request.frames, request.end_seen) == (Capture.lost_events, 0, False)
    assert scene.series.requests == 0
    assert sum(scene.series.histograms[Sli.DURATION].counts) == 0
    assert scene.captures == {Capture.lost_events: 1}


def test_answer_that_ended_in_a_gap_has_no_duration(scene: Scene, wire: Wire) -> None:
    whole = answer(completion(tokens=7))
    wire.ask(post(stream=False))
    wire.write(whole[:-31])
    lost = len(wire.records)
    wire.write(whole[-31:], after_ms=997)
    wire.write(b"\r\n", after_ms=1)  # some servers do
    request = only(scene.play(wire, dropped={lost}))
    assert (request.capture, request.status, request.end_seen) == (Capture.lost_events, 200, False)
    assert sum(scene.series.histograms[Sli.DURATION].counts) == 0


def test_answer_that_goes_on_after_a_gap_has_one(scene: Scene, wire: Wire) -> None:
    whole = answer(completion(tokens=7))
    wire.ask(post(stream=False))
    wire.write(whole[:-31])
    lost = len(wire.records)
    wire.write(whole[-31:-7], after_ms=991)
    wire.write(whole[-7:], after_ms=6)
    request = only(scene.play(wire, dropped={lost}))
    assert (request.capture, request.end_seen) == (Capture.lost_events, True)
    assert ms(request.finished_ns) == wire.at


def test_end_that_is_told_too_late_is_no_failure_and_no_duration(scene: Scene, wire: Wire) -> None:
    """The kernel did not say that the connection ended; that its memory was another's by then, it did."""
    wire.ask(post())
    wire.write(SSE_HEAD + chunk(word()))
    wire.at += 59_000
    wire.tcp_state = 0
    wire.go(CLOSE)
    request = only(scene.play(wire))
    assert (request.frames, request.failure, request.aborted) == (1, None, None)
    assert (request.capture, request.end_seen) == (Capture.end_unseen, False)
    assert scene.captures == {Capture.end_unseen: 1}
    assert not len(scene.conversations)


def test_lost_answer_is_not_the_next_ones(scene: Scene, wire: Wire) -> None:
    wire.ask(post(stream=False, model="one"))
    wire.write(answer(completion(tokens=2)))
    wire.ask(post(stream=False, model="two"))
    wire.write(answer(completion(tokens=3)))
    wire.ask(post(stream=False, model="three"))
    wire.write(answer(completion(tokens=5)))
    finished = scene.play(wire, dropped={3})
    assert [(request.model, request.completion_tokens, request.capture) for request in finished] == [
        ("one", None, Capture.lost_events),
        ("two", 3, Capture.complete),
        ("three", 5, Capture.complete),
    ]


def test_lost_request_is_counted_and_its_answer_is_nobodys(scene: Scene, wire: Wire) -> None:
    wire.ask(post(stream=False, model="one"))
    wire.write(answer(completion(tokens=2)))
    lost = len(wire.records) + 1
    wire.ask(post(model="two"))
    stream(wire, words=7, model="two")
    wire.ask(post(stream=False, model="three"))
    wire.write(answer(completion(tokens=5)))
    finished = scene.play(wire, dropped={lost})
    assert [(request.model, request.frames, request.completion_tokens) for request in finished] == [
        ("one", 0, 2),
        ("three", 0, 5),
    ]
    assert scene.captures == {Capture.complete: 2, Capture.lost_events: 1}


def test_lost_request_after_a_lost_end(scene: Scene, wire: Wire) -> None:
    """The one case in which the queue has a request and the bytes are another's."""
    lost_stream(wire, words=3)
    end = len(wire.records) - 1
    wire.ask(post(model="two"))
    stream(wire, words=7, model="two")
    wire.ask(post(model="three"))
    stream(wire, words=5, model="three")
    one, three = scene.play(wire, dropped={end, end + 2})
    assert (one.model, one.frames, one.capture, one.aborted) == ("bard", 3, Capture.lost_events, None)
    assert (three.model, three.frames, three.capture) == ("three", 5, Capture.complete)


def test_last_request_that_was_lost_is_counted_at_the_close(scene: Scene, wire: Wire) -> None:
    wire.ask(post())
    wire.client_closes()
    assert scene.play(wire, dropped={2}) == []
    assert scene.captures == {Capture.lost_events: 1}


def test_lost_request_with_its_answer_costs_the_next_nothing(scene: Scene, wire: Wire) -> None:
    wire.ask(post(stream=False, model="one"))
    wire.write(answer(completion(tokens=2)))
    wire.ask(post(stream=False, model="two"))
    wire.write(answer(completion(tokens=3)))
    wire.ask(post(stream=False, model="three"))
    wire.write(answer(completion(tokens=5)))
    finished = scene.play(wire, dropped={5, 6})
    assert [(request.model, request.completion_tokens, request.capture) for request in finished] == [
        ("one", 2, Capture.complete),
        ("three", 5, Capture.complete),
    ]
    assert scene.captures == {Capture.complete: 2, Capture.lost_events: 1}


def test_head_after_a_gap_is_nobodys_when_its_request_was_not_seen(scene: Scene, wire: Wire) -> None:
    lost_stream(wire, words=3)
    last = len(wire.records) - 1
    wire.rx += len(post())  # read through io_uring, say
    stream(wire, words=7)
    first = only(scene.play(wire, dropped={last}))
    assert (first.frames, first.capture) == (3, Capture.lost_events)
    assert scene.captures == {Capture.lost_events: 2}


def test_record_that_comes_twice_counts_once(scene: Scene, wire: Wire) -> None:
    wire.ask(post())
    wire.write(SSE_HEAD)
    wire.write(chunk(word()), after_ms=1)
    wire.records.append(wire.records[-1])
    wire.service_closes()
    request = only(scene.play(wire))
    assert (request.frames, request.failure, request.capture) == (1, None, Capture.undecodable)


@pytest.mark.parametrize("hole", [3, 7], ids=["of a read", "of a write"])
def test_loss_explains_one_gap_only(scene: Scene, wire: Wire, hole: int) -> None:
    for _ in range(2):
        wire.ask(post(b'{"model": "a", "prompt": "' + b"x" * 97 + b'"}', stream=False)[:-50])
        wire.read(b"x" * 25)
        wire.read(b"x" * 23 + b'"}')
        wire.write(SSE_HEAD)
        for _ in range(3):
            wire.write(chunk(word()), after_ms=1)
        wire.write(chunk(DONE) + LAST_CHUNK)
    # The first request loses a record; the second has the same hole, and nothing was lost.
    del wire.records[hole + len(wire.records) // 2]
    first, following = scene.play(wire, dropped={hole})
    assert (first.capture, following.capture) == (Capture.lost_events, Capture.undecodable)


@pytest.mark.parametrize("tx", [5_003, 2**31 + 5_003])
def test_lost_beginning_and_lost_answer_are_no_abort(scene: Scene, tx: int) -> None:
    wire = Wire(tx=tx)
    wire.ask(post(stream=False, model="one"))
    wire.write(answer(completion(tokens=2)))
    wire.client_closes()
    request = only(scene.play(wire, dropped={0, 3}))
    assert (request.aborted, request.capture) == (None, Capture.lost_events)


def test_lost_beginning_and_lost_answer_are_not_the_next_ones(scene: Scene, wire: Wire) -> None:
    for model, tokens in (("one", 2), ("two", 3), ("three", 5)):
        wire.ask(post(stream=False, model=model))
        wire.write(answer(completion(tokens=tokens)))
    finished = scene.play(wire, dropped={0, 3})
    assert [(request.model, request.completion_tokens, request.capture) for request in finished] == [
        ("one", None, Capture.lost_events),
        ("two", None, Capture.lost_events),
        ("three", 5, Capture.complete),
    ]


def test_losses_before_the_connection_was_known_are_not_the_requests(scene: Scene, wire: Wire) -> None:
    """A reader that was started again finds connections that have lost records long ago."""
    for model in ("one", "two", "three"):
        wire.ask(post(stream=False, model=model))
        wire.write(answer(completion()))
    finished = scene.play(wire, dropped={0, 1, 2, 3})
    assert [(request.model, request.capture) for request in finished] == [
        ("two", Capture.arrival_unseen),
        ("three", Capture.complete),
    ]


def test_lost_piece_of_a_prompt_is_a_hole_in_it(scene: Scene, wire: Wire) -> None:
    request = post(b'{"model": "bard", "prompt": "' + b"x" * 9973 + b'"}')
    for start in range(0, len(request), 4032):
        wire.read(request[start : start + 4032])
    wire.write(answer(completion()))
    finished = only(scene.play(wire, dropped={2}))
    assert (finished.model, finished.capture, finished.completion_tokens) == ("bard", Capture.lost_events, 7)


def test_lost_fin_is_known_from_the_state_after_it(scene: Scene, wire: Wire) -> None:
    wire.ask(post())
    wire.write(SSE_HEAD + chunk(word()))
    fin = len(wire.records)
    wire.client_closes()
    request = only(scene.play(wire, dropped={fin}))
    assert (request.aborted, request.failure, request.capture) == (Phase.streaming, None, Capture.lost_events)


def test_lost_reset_is_known_from_the_error(scene: Scene, wire: Wire) -> None:
    wire.ask(post())
    wire.write(SSE_HEAD + chunk(word()))
    rst = len(wire.records)
    wire.reset()
    request = only(scene.play(wire, dropped={rst}))
    assert (request.aborted, request.failure) == (Phase.streaming, None)


def test_connection_whose_beginning_was_lost_is_followed(scene: Scene, wire: Wire) -> None:
    wire.ask(post())
    stream(wire)
    request = only(scene.play(wire, dropped={0}))
    assert (request.frames, request.capture) == (5, Capture.arrival_unseen)


def test_stream_whose_beginning_was_lost_is_no_stream_from_before(scene: Scene, wire: Wire) -> None:
    wire.ask(post())
    stream(wire)
    assert scene.play(wire, dropped={0, 1, 2}) == []
    assert scene.captures == {Capture.lost_events: 1}


def test_bytes_that_moved_unfollowed_are_undecodable(scene: Scene, wire: Wire) -> None:
    wire.ask(post())
    wire.write(SSE_HEAD + chunk(word()))
    wire.tx += 211  # io_uring, say
    wire.write(chunk(word()), after_ms=5)
    wire.write(chunk(DONE) + LAST_CHUNK)
    assert only(scene.play(wire)).capture is Capture.undecodable


def test_late_record_of_a_closed_connection_is_nothing(scene: Scene, wire: Wire) -> None:
    wire.ask(post())
    wire.write(SSE_HEAD + chunk(word()))
    wire.reset()
    wire.write(chunk(word()))
    wire.read(b"x")
    scene.play(wire)
    assert len(scene.conversations) == 0
    assert scene.captures == {Capture.complete: 1}


# ---- strangers ----


@pytest.mark.parametrize(
    "garbage",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(256)),
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"x: " + b"y" * 1_000_003,
        b"GET /" + b"z" * 100_003,
        b"\0" * 4032,
        b"POST /v1/chat/completions HTTP/1.1\r\ncontent-length: +7\r\n: \r\n\r\n",
    ],
)
def test_garbage_counts_once_and_the_next_connection_is_measured(scene: Scene, garbage: bytes) -> None:
    bad, good = Wire(conn=1), Wire(conn=2)
    for start in range(0, len(garbage), 4032):
        bad.ask(garbage[start : start + 4032])
    for _ in range(7):
        bad.ask(garbage[-17:])
        bad.write(b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n")
    good.at = 1
    good.ask(post())
    stream(good)
    request = only(scene.play(bad, good))
    assert (request.frames, request.capture) == (5, Capture.complete)
    assert scene.captures == {Capture.undecodable: 1, Capture.complete: 1}


@pytest.mark.parametrize(
    "headers", ["content-length: 1_0\r\n", "content-length: 5\r\ncontent-length: 6\r\n", "transfer-encoding: gzip\r\n"]
)
def test_request_with_doubtful_framing_is_undecodable(scene: Scene, wire: Wire, headers: str) -> None:
    head = f"POST /v1/chat/completions HTTP/1.1\r\n{headers}\r\n".encode()
    wire.ask(head + b'{"model": "bard"}')
    wire.write(answer(b"{}", status=400))
    wire.ask(post(stream=False))
    wire.write(answer(completion()))
    doubtful, following = scene.play(wire)
    assert (doubtful.capture, doubtful.failure) == (Capture.undecodable, Failure.client_error)
    assert following.capture is Capture.complete


def test_answer_that_is_no_http_is_undecodable(scene: Scene, wire: Wire) -> None:
    wire.ask(post())
    wire.write(SSE_HEAD + b"FFFFFFFFFFFFFFFF\r\ndata: {}\n\n\r\n")
    wire.ask(post(stream=False, model="next"))
    wire.write(answer(completion()))
    broken, following = scene.play(wire)
    assert (broken.capture, broken.failure, broken.aborted) == (Capture.undecodable, None, None)
    assert (following.model, following.capture) == ("next", Capture.complete)


def test_web_socket_is_passed_over(scene: Scene, wire: Wire) -> None:
    wire.ask(b"GET /ws HTTP/1.1\r\nhost: x\r\nupgrade: websocket\r\nconnection: upgrade\r\n\r\n")
    wire.write(b"HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\n\r\n\x81\x05hello")
    for _ in range(11):
        wire.ask(b"\x81\x85\x37\xfa\x21\x3d\x7f\x9f\x4d\x51\x58")
        wire.write(b"\x81\x07data: x")
    wire.client_closes()
    assert scene.play(wire) == []
    assert scene.captures == {Capture.undecodable: 1}


def test_frames_of_two_threads_whose_order_is_not_their_instants(scene: Scene, wire: Wire) -> None:
    """A call that began earlier may put its bytes behind those of a later one: such a gap is none."""
    wire.ask(post())
    wire.write(SSE_HEAD)
    wire.write(chunk(word()), after_ms=7)
    scene.play(wire)
    early = START_NS + 5 * MS
    scene.conversations.wrote(wire.conn, early, wire.tx, chunk(word()), 0, 0, 0, 0, 1, 1)
    wire.tx += len(chunk(word()))
    wire.write(chunk(DONE) + LAST_CHUNK, after_ms=1)
    request = only(scene.play(wire))
    scene.series.flush(START_NS)
    assert (request.frames, request.longest_gap_ns) == (2, None)
    assert sum(scene.series.histograms[Sli.ITL].counts) == 0
    assert scene.slis.refused[Sli.ITL] == 1


def test_a_first_token_before_its_request_is_discarded(scene: Scene, wire: Wire) -> None:
    wire.ask(post())
    wire.write(SSE_HEAD)
    scene.play(wire)
    scene.conversations.wrote(wire.conn, START_NS - MS, wire.tx, chunk(word()), 0, 0, 0, 0, 1, 1)
    assert sum(scene.series.histograms[Sli.TTFT].counts) == 0
    assert scene.slis.refused[Sli.TTFT] == 1


def test_answer_that_nobody_asked_for_is_no_loss(scene: Scene, wire: Wire) -> None:
    wire.ask(post(stream=False))
    wire.write(answer(completion()))
    wire.write(b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-length: 0\r\n\r\n", after_ms=60_000)
    wire.service_closes()
    assert only(scene.play(wire)).failure is None
    assert scene.captures == {Capture.complete: 1}


def test_too_many_pipelined_requests_are_given_up_once(scene: Scene, wire: Wire) -> None:
    many = PIPELINE_LIMIT + 37
    wire.ask(post(stream=False) * many)
    for _ in range(many):
        wire.write(answer(completion()))
    wire.ask(post(stream=False, model="next"))
    wire.write(answer(completion()))
    finished = scene.play(wire)
    assert [request.model for request in finished] == ["bard"] * PIPELINE_LIMIT + ["next"]
    assert scene.captures == {Capture.undecodable: 1, Capture.complete: PIPELINE_LIMIT + 1}


def test_hole_after_too_many_requests_counts_nothing_more(scene: Scene, wire: Wire) -> None:
    wire.read(post(stream=False) * (PIPELINE_LIMIT + 7), uncaptured=11)
    scene.play(wire)
    assert scene.captures == {Capture.undecodable: 1}


def test_segments_that_nobody_reads_are_bounded(scene: Scene, wire: Wire) -> None:
    for _ in range(10 * SEGMENTS_LIMIT):
        wire.arrive(1009)
    scene.play(wire)
    assert len(scene.conversations._connections[1].segments) == SEGMENTS_LIMIT


def test_oldest_connection_makes_room() -> None:
    scene = Scene(limit=7)
    wires = [Wire(conn=number, at=number) for number in range(11)]
    for wire in wires:
        wire.ask(post())
    finished = scene.play(*wires)
    assert len(scene.conversations) == 7
    assert [(request.peer, request.capture) for request in finished] == [
        (f"127.0.0.1:{number}", Capture.end_unseen) for number in range(4)
    ]
    assert scene.series.requests == 0


def test_dropped_connection_finishes_what_lingers() -> None:
    scene = Scene(limit=1)
    wire = Wire()
    half_closed(wire)
    scene.play(wire, Wire(conn=2, at=wire.at + 1))
    assert only(scene.finished).capture is Capture.complete
    scene.sweep(wire.at + 2 * LINGER_NS / MS)


def test_request_without_an_end_is_abandoned(scene: Scene, wire: Wire) -> None:
    wire.ask(post())
    stream(wire)
    wire.ask(post(model="stuck"))
    idle = Wire(conn=2)
    scene.play(wire, idle)
    scene.sweep(wire.at + ABANDONED_NS / MS - 1)
    assert list(scene.conversations.in_flight())
    scene.sweep(wire.at + 2 * ABANDONED_NS / MS)
    assert (scene.finished[-1].model, scene.finished[-1].capture) == ("stuck", Capture.end_unseen)
    assert not list(scene.conversations.in_flight())
    assert len(scene.conversations) == 1


def test_connection_that_is_opened_twice_begins_anew(scene: Scene, wire: Wire) -> None:
    wire.ask(post(model="one"))
    again = Wire(at=5)
    again.ask(post(model="two", stream=False))
    again.write(answer(completion()))
    assert [(request.model, request.capture) for request in scene.play(wire, again)] == [
        ("one", Capture.end_unseen),
        ("two", Capture.complete),
    ]


def test_states_are_those_of_the_kernel() -> None:
    """include/net/tcp_states.h: a stable ABI."""
    assert (ESTABLISHED, FIN_WAIT1, CLOSE, CLOSE_WAIT, LAST_ACK) == (1, 4, 7, 8, 9)


# ---- other APIs, and conversations ----


def named(kind: str, **members: object) -> bytes:
    """An event as the Messages and the Responses API send them."""
    return chunk(f"event: {kind}\n".encode() + event(type=kind, **members))


def asks(api_path: str, **members: object) -> bytes:
    return post(json.dumps({"model": "bard", "stream": True, **members}).encode(), path=api_path)


TALK = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]


def message_start(wire: Wire, **usage_members: int) -> None:
    wire.write(SSE_HEAD, after_ms=1)
    wire.write(named("message_start", message={"model": "bard", "content": [], "usage": usage_members}), after_ms=1)
    wire.write(named("content_block_start", index=0, content_block={"type": "text", "text": ""}))


def test_a_stream_of_the_messages_api(scene: Scene, wire: Wire) -> None:
    wire.ask(asks("/v1/messages", messages=TALK), delay_ms=2)
    message_start(wire, input_tokens=5, cache_read_input_tokens=64, cache_creation_input_tokens=32, output_tokens=1)
    wire.write(named("ping"), after_ms=3)
    for _ in range(7):
        wire.write(named("content_block_delta", index=0, delta={"type": "text_delta", "text": "a"}), after_ms=11)
    wire.write(named("content_block_stop", index=0), after_ms=1)
    wire.write(named("message_delta", delta={"stop_reason": "end_turn"}, usage={"output_tokens": 13}), after_ms=1)
    wire.write(named("message_stop") + LAST_CHUNK, after_ms=1)
    request = only(scene.play(wire))
    assert (request.api, request.model, request.turn, request.capture) == ("messages", "bard", 2, Capture.complete)
    assert (request.prompt_tokens, request.completion_tokens, request.cached_tokens) == (101, 13, 64)
    assert (ms(request.first_token_ns), ms(request.last_token_ns), request.frames) == (18, 84, 7)
    assert scene.series.labels == ("roleplay", "bard", "messages")
    assert (scene.series.cache_queries, scene.series.cache_hits) == (101, 64)


def test_a_stream_of_the_messages_api_that_is_cut_off_counts_its_frames(scene: Scene, wire: Wire) -> None:
    wire.ask(asks("/v1/messages", messages=TALK))
    message_start(wire, input_tokens=5, output_tokens=1)
    for _ in range(7):
        wire.write(named("content_block_delta", index=0, delta={"type": "text_delta", "text": "a"}), after_ms=11)
    wire.service_closes()
    request = only(scene.play(wire))
    assert (request.completion_tokens, request.frames, request.failure) == (None, 7, Failure.cut_off)
    assert scene.series.generated_tokens == 7


@pytest.mark.parametrize(
    ("last", "prompt"),
    [
        ({"input_tokens": 5, "output_tokens": 13}, 101),
        ({"input_tokens": 5, "cache_read_input_tokens": 64, "cache_creation_input_tokens": 33}, 102),
    ],
)
def test_a_usage_that_says_less_of_the_prompt_does_not_replace_one(
    scene: Scene, wire: Wire, last: dict[str, int], prompt: int
) -> None:
    wire.ask(asks("/v1/messages", messages=TALK))
    message_start(wire, input_tokens=5, cache_read_input_tokens=64, cache_creation_input_tokens=32)
    wire.write(named("message_delta", delta={"stop_reason": "end_turn"}, usage=last))
    wire.write(named("message_stop") + LAST_CHUNK)
    request = only(scene.play(wire))
    assert (request.prompt_tokens, request.cached_tokens) == (prompt, 64)


def test_a_stream_of_the_responses_api(scene: Scene, wire: Wire) -> None:
    wire.ask(asks("/v1/responses", input=TALK))
    wire.write(SSE_HEAD, after_ms=1)
    wire.write(named("response.created", response={"model": "bard", "usage": None}), after_ms=1)
    for _ in range(5):
        wire.write(named("response.output_text.delta", delta="a"), after_ms=11)
    counts = {"input_tokens": 31, "input_tokens_details": {"cached_tokens": 0}, "output_tokens": 5}
    wire.write(named("response.completed", response={"model": "bard", "usage": counts}), after_ms=1)
    wire.client_closes()  # it had all
    request = only(scene.play(wire))
    assert (request.api, request.turn, request.aborted, request.failure) == ("responses", 2, None, None)
    assert (request.prompt_tokens, request.completion_tokens, request.cached_tokens) == (31, 5, 0)
    assert request.frames == 5


def test_a_stream_of_llama_cpp(scene: Scene, wire: Wire) -> None:
    wire.ask(asks("/completion", prompt="a"))
    wire.write(SSE_HEAD, after_ms=1)
    for _ in range(3):
        wire.write(chunk(event(content="a", stop=False, tokens_predicted=1, tokens_evaluated=41)), after_ms=11)
    timings = {"cache_n": 29, "prompt_n": 12, "predicted_n": 3}
    wire.write(chunk(event(content="", stop=True, tokens_cached=44, timings=timings)) + LAST_CHUNK, after_ms=1)
    request = only(scene.play(wire))
    assert (request.api, request.turn, request.frames, request.failure) == ("completion", None, 3, None)
    assert (request.prompt_tokens, request.completion_tokens, request.cached_tokens) == (41, 3, 29)


def test_the_turn_of_a_conversation(scene: Scene, wire: Wire) -> None:
    wire.ask(asks("/v1/chat/completions", messages=TALK))
    stream(wire)
    assert only(scene.play(wire)).turn == 2


@pytest.mark.parametrize("missing", [1, 53, 4096])
def test_a_request_that_was_not_seen_whole_has_no_turn(scene: Scene, wire: Wire, missing: int) -> None:
    talk = [*TALK, {"role": "user", "content": "x" * 5003}]
    body = json.dumps({"model": "bard", "stream": True, "messages": talk}).encode()
    request = post(body)
    wire.arrive(len(request))
    wire.read(request[:-missing], uncaptured=missing)
    stream(wire)
    finished = only(scene.play(wire))
    assert (finished.model, finished.turn) == ("bard", None)
