"""HTTP/1.x decoding: framing, every split, what was not captured, and hostile bytes."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterable
from typing import Any

import h11
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from probes.wire.http1 import (
    HEAD_LIMIT,
    PIPELINE_LIMIT,
    Body,
    Broken,
    End,
    Event,
    Gap,
    Reason,
    RequestDecoder,
    RequestHead,
    ResponseDecoder,
    ResponseHead,
    Start,
    looks_like_chunk,
    looks_like_request,
    looks_like_response,
)

WANTED = frozenset((b"Host", b"content-type", b"x-release-stage"))

POST = b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nAccept: */*\r\nContent-Length: 5\r\n\r\nhello"
GET = b"GET /metrics?name[]=up HTTP/1.0\r\nhost: b\r\n\r\n"
CHUNKED_POST = (
    b"POST /v1/completions HTTP/1.1\r\nTransfer-Encoding: gzip, Chunked\r\n\r\n"
    b'003\r\nabc\r\nA ; name="v"\r\n0123456789\r\n0\r\nX-Sum: 1\r\n more\r\n\r\n'
)
STREAM = (
    b"HTTP/1.1 100 Continue\r\n\r\n"
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    b'd\r\ndata: {"a":1}\r\n2\r\n\n\n\r\n3e8\r\n' + b"x" * 1000 + b"\r\n0\r\n\r\n"
)
SIZED = b"HTTP/1.1 404 Not Found\r\ncontent-length: 9\r\n\r\nnot there"
EMPTY = b"HTTP/1.1 204 No Content\r\ncontent-length: 7\r\n\r\n"


def merged(events: Iterable[Event]) -> list[Event]:
    """Join neighbouring bodies and gaps: where they are split means nothing."""
    result: list[Event] = []
    for event in events:
        last = result[-1] if result else None
        if isinstance(event, Body) and isinstance(last, Body):
            result[-1] = Body(last.data + event.data)
        elif isinstance(event, Gap) and isinstance(last, Gap):
            result[-1] = Gap(last.size + event.size)
        else:
            result.append(event)
    return result


def responses(*methods: bytes) -> ResponseDecoder:
    decoder = ResponseDecoder(WANTED)
    for method in methods:
        decoder.push_method(method)
    return decoder


def requests() -> RequestDecoder:
    return RequestDecoder(WANTED)


def fed(decoder: RequestDecoder | ResponseDecoder, pieces: Iterable[bytes], eof: bool = True) -> list[Event]:
    events = [event for piece in pieces for event in decoder.feed(piece)]
    return merged(events + decoder.eof() if eof else events)


def only_broken(events: list[Event]) -> Reason:
    """The reason of the one `Broken`, which must be the last event."""
    (broken,) = [event for event in events if isinstance(event, Broken)]
    assert events[-1] is broken
    return broken.reason


def test_request_with_length() -> None:
    assert fed(requests(), [POST]) == [
        Start(0),
        RequestHead(b"POST", b"/v1/chat/completions", b"1.1", {b"host": b"a", b"content-length": b"5"}),
        Body(b"hello"),
        End(),
    ]


def test_pipelined_requests_give_their_offsets() -> None:
    events = fed(requests(), [POST + b"\r\n" + GET + CHUNKED_POST])
    assert [event for event in events if isinstance(event, Start)] == [
        Start(0),
        Start(len(POST) + 2),
        Start(len(POST) + 2 + len(GET)),
    ]
    assert [event.target for event in events if isinstance(event, RequestHead)] == [
        b"/v1/chat/completions",
        b"/metrics?name[]=up",
        b"/v1/completions",
    ]
    assert [event for event in events if isinstance(event, Body)] == [Body(b"hello"), Body(b"abc0123456789")]
    assert events.count(End()) == 3


def test_streamed_response_and_keep_alive() -> None:
    events = fed(responses(), [STREAM + SIZED + EMPTY])
    assert events == [
        Start(len(b"HTTP/1.1 100 Continue\r\n\r\n")),
        ResponseHead(200, {b"content-type": b"text/event-stream", b"transfer-encoding": b"chunked"}),
        Body(b'data: {"a":1}\n\n' + b"x" * 1000),
        End(),
        Start(len(STREAM)),
        ResponseHead(404, {b"content-length": b"9"}),
        Body(b"not there"),
        End(),
        Start(len(STREAM) + len(SIZED)),
        ResponseHead(204, {b"content-length": b"7"}),
        End(),
    ]


def test_one_frame_in_one_feed_is_one_body() -> None:
    decoder = responses()
    decoder.feed(STREAM[: STREAM.index(b"d\r\ndata")])
    for size in (1, 15, 16, 255, 256, 307, 1023, 1024, 4093):
        for form in (b"%x", b"%X", b"%06x"):
            payload = b"y" * size
            before = decoder.offset
            chunk = form % size + b"\r\n" + payload + b"\r\n"
            assert decoder.feed(chunk) == [Body(payload)]
            assert decoder.offset == before + len(chunk)


def test_body_until_the_connection_ends() -> None:
    decoder = responses()
    assert decoder.feed(b"HTTP/1.0 200 OK\r\n\r\nab") == [Start(0), ResponseHead(200, {}), Body(b"ab")]
    assert decoder.feed(b"cd") == [Body(b"cd")]
    assert decoder.eof() == [End()]


@pytest.mark.parametrize(
    ("method", "head"),
    [
        (b"HEAD", b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n"),
        (b"HEAD", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"),
        (b"POST", b"HTTP/1.1 204 No Content\r\n\r\n"),
        (b"GET", b"HTTP/1.1 304 Not Modified\r\nContent-Length: 500\r\n\r\n"),
        (b"GET", b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"),
    ],
)
def test_responses_without_a_body(method: bytes, head: bytes) -> None:
    events = fed(responses(method, b"GET"), [head + SIZED])
    assert [type(event) for event in events] == [Start, ResponseHead, End, Start, ResponseHead, Body, End]


@pytest.mark.parametrize(
    ("method", "head"),
    [
        (b"CONNECT", b"HTTP/1.1 200 Connection established\r\n\r\n"),
        (b"GET", b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n\r\n"),
    ],
)
def test_a_tunnel_is_body_until_the_end(method: bytes, head: bytes) -> None:
    events = fed(responses(method), [head, b"HTTP/1.1 200 OK\r\n\r\n"])
    assert [type(event) for event in events] == [Start, ResponseHead, Body, End]


def test_interim_responses_keep_the_pending_method() -> None:
    hints = b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n"
    events = fed(responses(b"HEAD"), [hints + b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n" + SIZED])
    assert [type(event) for event in events] == [Start, ResponseHead, End, Start, ResponseHead, Body, End]
    assert events[0] == Start(len(hints))


def test_headers_fold_repeat_and_keep_their_bytes() -> None:
    head = b"GET / HTTP/1.1\nHOST:\t a\r\nx-release-stage: one\r\n\ttwo\nX-Release-Stage:three \r\n"
    head += b"Empty:\r\nHost: \xff\n\n"
    (_, request, _) = fed(requests(), [head])
    assert request == RequestHead(b"GET", b"/", b"1.1", {b"host": b"a, \xff", b"x-release-stage": b"one two, three"})


@pytest.mark.parametrize("value", [b"5", b"0005", b"5, 5", b"5\r\nContent-Length: 5"])
def test_lengths_that_all_parsers_agree_on(value: bytes) -> None:
    events = fed(requests(), [b"PUT / HTTP/1.1\r\nContent-Length: " + value + b"\r\n\r\nhello"])
    assert events[2:] == [Body(b"hello"), End()]


@pytest.mark.parametrize(
    "value",
    [
        b"+7",
        b"-7",
        b"1_000",
        b"\xd9\xa7",
        "\N{ARABIC-INDIC DIGIT SEVEN}".encode(),
        b"0x5",
        b"5 5",
        b"5,6",
        b"5\r\ncontent-length: 6",
        b"",
        b"5.0",
        b"1e3",
        b"9" * 16,
        b"9" * 5000,
        b"%d" % (2**53 + 1),
    ],
)
def test_lengths_that_parsers_could_disagree_on(value: bytes) -> None:
    head = b"\r\nContent-Length: " + value + b"\r\n\r\n"
    assert only_broken(fed(requests(), [b"PUT / HTTP/1.1" + head])) is Reason.CONTENT_LENGTH
    assert only_broken(fed(responses(), [b"HTTP/1.1 200 OK" + head])) is Reason.CONTENT_LENGTH


def test_transfer_encoding_beside_length() -> None:
    both = b"\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nz\r\n0\r\n\r\n"
    assert only_broken(fed(requests(), [b"PUT / HTTP/1.1" + both])) is Reason.FRAMING_CONFLICT
    assert fed(responses(), [b"HTTP/1.1 200 OK" + both])[2:] == [Body(b"z"), End()]


def test_transfer_encodings_without_an_end() -> None:
    gzip = b"\r\nTransfer-Encoding: gzip\r\n\r\nzz"
    assert only_broken(fed(requests(), [b"PUT / HTTP/1.1" + gzip])) is Reason.TRANSFER_ENCODING
    assert fed(responses(), [b"HTTP/1.1 200 OK" + gzip])[2:] == [Body(b"zz"), End()]
    twice = b"\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n"
    assert only_broken(fed(requests(), [b"PUT / HTTP/1.1" + twice])) is Reason.TRANSFER_ENCODING
    assert only_broken(fed(responses(), [b"HTTP/1.1 200 OK" + twice])) is Reason.TRANSFER_ENCODING


@pytest.mark.parametrize(
    ("chunk", "reason"),
    [
        (b"FFFFFFFFFFFFFFFF\r\n", Reason.CHUNK_SIZE),
        (b"20000000000001\r\n", Reason.CHUNK_SIZE),
        (b"00000000000000001\r\nz\r\n", Reason.CHUNK_SIZE),
        (b"0x1\r\nz\r\n", Reason.CHUNK_SIZE),
        (b"+1\r\nz\r\n", Reason.CHUNK_SIZE),
        (b"1_1\r\nz\r\n", Reason.CHUNK_SIZE),
        (b"-1\r\nz\r\n", Reason.CHUNK_SIZE),
        (b" 1\r\nz\r\n", Reason.CHUNK_SIZE),
        (b"\r\n", Reason.CHUNK_SIZE),
        (b"1\nz\r\n", Reason.CHUNK_SIZE),
        (b"1;" + b"e" * 300 + b"\r\nz\r\n", Reason.CHUNK_SIZE),
        (b"1;" + b"e" * 252 + b"\r\nz\r\n", Reason.CUT_OFF),
        (b"1;" + b"e" * 253 + b"\r\nz\r\n", Reason.CHUNK_SIZE),
        (b"1\r\nzz\r\n", Reason.CHUNK_END),
        (b"1\r\nz\n\r", Reason.CHUNK_END),
        (b"20000000000000\r\nzzz", Reason.CUT_OFF),
        (b"0\r\n" + b"x" * HEAD_LIMIT, Reason.TRAILER_TOO_LARGE),
    ],
)
def test_bad_chunks(chunk: bytes, reason: Reason) -> None:
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    whole = fed(responses(), [head + chunk])
    assert only_broken(whole) is reason
    assert fed(responses(), [head, chunk]) == whole
    assert fed(responses(), [head, *(bytes([byte]) for byte in chunk)]) == whole


@pytest.mark.parametrize(
    ("head", "reason"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 64, Reason.START_LINE),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", Reason.START_LINE),
        (b"GET /a b HTTP/1.1\r\n\r\n", Reason.START_LINE),
        (b"GET\r\n\r\n", Reason.START_LINE),
        (b"G\xc3\x8bT / HTTP/1.1\r\n\r\n", Reason.START_LINE),
        (b"M" * 33 + b" / HTTP/1.1\r\n\r\n", Reason.START_LINE),
        (b"GET / HTTP/1.1\r\n folded: first\r\n\r\n", Reason.HEADER),
        (b"GET / HTTP/1.1\r\nno colon\r\n\r\n", Reason.HEADER),
        (b"GET / HTTP/1.1\r\nHost : a\r\n\r\n", Reason.HEADER),
        (b"GET / HTTP/1.1\r\n: a\r\n\r\n", Reason.HEADER),
        (b"GET / HTTP/1.1\r\nHost: a\0b\r\n\r\n", Reason.HEADER),
        (b"GET / HTTP/1.1\r\nHost: " + b"h" * 2**20 + b"\r\n\r\n", Reason.HEAD_TOO_LARGE),
        (b"GET /" + b"t" * 2**20, Reason.HEAD_TOO_LARGE),
        (b"GET / HTTP/1.1\r\n" + b"a:\r\n" * 2**15 + b"\r\n", Reason.HEAD_TOO_LARGE),
        (b"GET / HTTP/1.1\r\nHost: a\r\n", Reason.CUT_OFF),
        (b"GE", Reason.CUT_OFF),
    ],
)
def test_bad_requests(head: bytes, reason: Reason) -> None:
    whole = fed(requests(), [head])
    assert whole[0] == Start(0)
    assert only_broken(whole) is reason
    assert fed(requests(), [head[at : at + 1009] for at in range(0, len(head), 1009)]) == whole


@pytest.mark.parametrize(
    "head",
    [
        b"HTTP/2 200\r\n\r\n",
        b"HTTP/1.1 099 No\r\n\r\n",
        b"HTTP/1.1 2000 No\r\n\r\n",
        b"HTTP\r\n\r\n",
        b"\r\n\r\nHTTQ/1.1 200",
        b"HTTP/1.1 \xd9\xa2\xd9\xa0\xd9\xa0 OK\r\n\r\n",
        b"data: {}\n\n",
    ],
)
def test_bad_responses(head: bytes) -> None:
    assert only_broken(fed(responses(), [head])) is Reason.START_LINE
    assert only_broken(fed(responses(), (bytes([byte]) for byte in head))) is Reason.START_LINE


def test_the_largest_head_that_fits() -> None:
    head = b"GET / HTTP/1.1\r\na: "
    head += b"v" * (HEAD_LIMIT - len(head) - 4) + b"\r\n\r\n"
    assert fed(requests(), [head])[-1] == End()
    assert only_broken(fed(requests(), [head[:-4] + b"v\r\n\r\n"])) is Reason.HEAD_TOO_LARGE


def test_broken_until_resync() -> None:
    decoder = requests()
    assert [type(event) for event in decoder.feed(b"nonsense\r\n\r\n" + POST)] == [Start, Broken]
    assert decoder.broken is Reason.START_LINE
    assert decoder.feed(POST) == decoder.skip(7) == decoder.eof() == []
    decoder.resync(1009)
    assert decoder.broken is None
    assert merged(decoder.feed(POST)) == [Start(1009), *fed(requests(), [POST])[1:]]
    assert decoder.offset == 1009 + len(POST)


def test_resync_takes_the_methods_that_wait() -> None:
    decoder = responses(b"GET", b"GET")
    decoder.feed(b"nonsense\r\n\r\n")
    decoder.resync(31, [b"HEAD"])
    assert [type(event) for event in decoder.feed(SIZED)] == [Start, ResponseHead, End]
    decoder.resync(0)
    assert [type(event) for event in decoder.feed(SIZED)] == [Start, ResponseHead, Body, End]


def test_resync_inside_a_chunked_body() -> None:
    decoder = responses()
    decoder.feed(b"{}\r\nnot the start of anything")
    decoder.resync_chunk(53)
    assert decoder.feed(b"3\r\nabc\r\n0\r\n\r\n") == [Body(b"abc"), End()]
    assert merged(decoder.feed(SIZED))[0] == Start(53 + 13)


def test_too_many_pipelined_requests() -> None:
    decoder = responses(*[b"GET"] * PIPELINE_LIMIT)
    assert decoder.broken is None
    decoder.push_method(b"GET")
    decoder.push_method(b"GET")
    assert decoder.broken is Reason.PIPELINE_TOO_DEEP
    assert decoder.feed(SIZED) == [Broken(Reason.PIPELINE_TOO_DEEP)]
    assert decoder.feed(SIZED) == []


@pytest.mark.parametrize("captured", range(len(b"b\r\nhello world\r\n")))
def test_a_chunk_whose_tail_was_not_captured(captured: int) -> None:
    chunk = b"b\r\nhello world\r\n"
    decoder = responses()
    decoder.feed(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    events = decoder.feed(chunk[:captured]) + decoder.skip(len(chunk) - captured)
    if captured < 3:  # the size itself is missing
        assert only_broken(events) is Reason.GAP
        return
    body = chunk[3 : min(captured, 14)]
    expected = [Body(body)] * bool(body) + [Gap(11 - len(body))] * (len(body) < 11)
    assert merged(events) == expected
    assert merged(decoder.feed(chunk + b"0\r\n\r\n")) == [Body(b"hello world"), End()]


def test_gaps_in_a_body_with_length() -> None:
    head = b"PUT / HTTP/1.1\r\nContent-Length: 11\r\n\r\n"
    decoder = requests()
    decoder.feed(head + b"hello")
    assert decoder.skip(2) == [Gap(2)]
    assert decoder.skip(0) == decoder.skip(-3) == []
    assert merged(decoder.feed(b"orld" + GET))[:2] == [Body(b"orld"), End()]
    decoder.resync(0)
    decoder.feed(head)
    assert decoder.skip(11) == [Gap(11), End()]
    assert decoder.offset == len(head) + 11
    decoder.feed(head)
    assert decoder.skip(12) == [Gap(11), End(), Broken(Reason.GAP)]


def test_gaps_elsewhere() -> None:
    for before in (b"", b"GET / HT", CHUNKED_POST[:-3]):
        decoder = requests()
        events = decoder.feed(before) + decoder.skip(1)
        assert only_broken(events) is Reason.GAP
    endless = responses()
    endless.feed(b"HTTP/1.0 200 OK\r\n\r\n")
    assert endless.skip(2**40) == [Gap(2**40)]


class Counting(bytes):
    """Bytes that count how many of them were copied by slicing."""

    copied = 0

    def __getitem__(self, key: Any) -> Any:  # noqa: ANN401 -- bytes has an overload for each kind of key
        piece = super().__getitem__(key)
        if isinstance(piece, bytes):
            self.copied += len(piece)
        return piece


def test_many_short_requests_in_one_feed_are_not_copied_again_for_each() -> None:
    data = Counting(GET * 1009)
    assert requests().feed(data).count(End()) == 1009
    assert 0 < data.copied <= 1009 * 2048


def test_guesses_for_resync() -> None:
    assert all(map(looks_like_request, (POST, GET, CHUNKED_POST, b"OPTIONS * HTTP/1.1", b"GET http://a/ HTTP/1.1")))
    assert not any(map(looks_like_request, (b"", b"POST", b'{"a": 1}', b"get it", b"I am", b"AND so", b"\x16\x03\x01")))
    assert looks_like_response(STREAM) and not looks_like_response(b"HTTP/2 200")
    assert looks_like_chunk(b"1f\r\ndata") and not looks_like_chunk(b"data: x\r\n") and not looks_like_chunk(b"FF")


REQUESTS = POST + b"\r\n" + GET + CHUNKED_POST
RESPONSES = STREAM + SIZED + EMPTY + b"HTTP/1.1 200 OK\r\n\r\nuntil the end"


@pytest.mark.parametrize(("make", "data"), [(requests, REQUESTS), (responses, RESPONSES)])
def test_every_split_in_two_and_byte_by_byte(make: Callable[[], RequestDecoder | ResponseDecoder], data: bytes) -> None:
    whole = fed(make(), [data])
    assert not any(isinstance(event, Broken) for event in whole)
    assert fed(make(), (bytes([byte]) for byte in data)) == whole
    for at in range(len(data) + 1):
        assert fed(make(), [data[:at], data[at:]]) == whole


PIECES = st.lists(
    st.one_of(
        st.sampled_from([REQUESTS, RESPONSES, POST, GET, CHUNKED_POST, STREAM, SIZED, EMPTY]),
        st.sampled_from(
            [
                b"\r\n",
                b"\n",
                b"\r",
                b"0\r\n\r\n",
                b"FFFFFFFFFFFFFFFF\r\n",
                b"Content-Length: ",
                b": ",
                b"HTTP/1.1 ",
                b"a" * 70_000,
            ]
        ),
        st.binary(max_size=40),
    ),
    max_size=8,
)


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """Good messages with bytes taken out, put in and changed."""
    data = bytearray(b"".join(draw(PIECES)))
    for _ in range(draw(st.integers(0, 5))):
        at = draw(st.integers(0, len(data)))
        data[at : at + draw(st.integers(0, 3))] = draw(st.binary(max_size=3))
    return bytes(data)


@settings(deadline=None)  # other work shares the machine
@given(damaged(), st.lists(st.integers(1, 400), min_size=1, max_size=13), st.booleans())
def test_no_bytes_raise_and_splits_mean_nothing(data: bytes, sizes: list[int], request: bool) -> None:
    make: Callable[[], RequestDecoder | ResponseDecoder] = requests if request else responses
    pieces: list[bytes] = []
    at = 0
    while at < len(data):
        size = sizes[len(pieces) % len(sizes)]
        pieces.append(data[at : at + size])
        at += size
    whole = fed(make(), [data])
    assert fed(make(), pieces) == whole
    brokens = [event for event in whole if isinstance(event, Broken)]
    assert not brokens or whole[-1] is brokens[0]
    assert len(brokens) <= 1


@settings(deadline=None)  # other work shares the machine
@given(damaged(), st.integers(0, 2000), st.integers(0, 300), st.integers(0, 300))
def test_skips_never_raise_and_add_up(data: bytes, at: int, first: int, second: int) -> None:
    one, two = responses(), responses()
    at = min(at, len(data))
    once = one.feed(data[:at]) + one.skip(first + second) + one.feed(data[at:]) + one.eof()
    twice = two.feed(data[:at]) + two.skip(first) + two.skip(second) + two.feed(data[at:]) + two.eof()
    assert merged(once) == merged(twice)
    assert one.offset == two.offset == len(data) + first + second


BODIES = st.lists(st.binary(min_size=1, max_size=300), max_size=7)


@settings(deadline=None)  # other work shares the machine
@given(st.lists(st.tuples(BODIES, st.booleans()), min_size=1, max_size=5), st.integers(1, 500))
def test_what_h11_writes_is_read_alike(messages: list[tuple[list[bytes], bool]], piece: int) -> None:
    """The other side is h11; what several of its connections wrote makes one kept-alive connection."""
    sent, answered, expected = b"", b"", []
    for bodies, chunked in messages:
        client, server = h11.Connection(h11.CLIENT), h11.Connection(h11.SERVER)
        size = sum(map(len, bodies))
        framing = ("transfer-encoding", "chunked") if chunked else ("content-length", str(size))
        rest = [*(h11.Data(data=body) for body in bodies), h11.EndOfMessage()]
        request = h11.Request(method="POST", target="/v1/completions", headers=[("host", "a"), framing])
        wire = b"".join(client.send(event) or b"" for event in (request, *rest))
        server.receive_data(wire)
        while server.next_event() is not h11.PAUSED and server.their_state is not h11.DONE:
            pass
        response = h11.Response(status_code=200, headers=[framing], reason="OK")
        sent += wire
        answered += b"".join(server.send(event) or b"" for event in (response, *rest))
        expected.append(b"".join(bodies))
    decoders: list[tuple[RequestDecoder | ResponseDecoder, bytes]] = [(requests(), sent), (responses(), answered)]
    for decoder, data in decoders:
        events = fed(decoder, (data[at : at + piece] for at in range(0, len(data), piece)))
        found: list[bytes] = []
        for event in events:
            if isinstance(event, Start):
                found.append(b"")
            elif isinstance(event, Body):
                found[-1] += event.data
        assert found == expected
        assert events.count(End()) == len(messages)


@pytest.mark.parametrize(
    "start",
    [
        b"",
        b"GET /",
        b"GET / HTTP/1.1\r\nx:",
        b"GET / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n1;",
        b"GET / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n",
    ],
)
def test_endless_streams_are_held_in_bounds(start: bytes) -> None:
    decoder = requests()
    decoder.feed(start)
    noise = b"a" * 65_536
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    for _ in range(101):
        decoder.feed(noise)
    after, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert decoder.broken is not None
    assert after - before < 4096
    assert peak - before < 4 * HEAD_LIMIT
