"""Server-sent events: the specification's corners, every split, and events without an end."""

from __future__ import annotations

import re
import tracemalloc
from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from probes.wire.sse import EVENT_LIMIT, SseDecoder

CORNERS = (
    b"\xef\xbb\xbfdata: with a byte order mark\n\n"
    b": a comment\n\n"
    b":\n"
    b"data:no space\r\n\r\n"
    b"data:  two spaces\r\r"
    b"data: one\ndata\ndata:\ndata: four\n\n"
    b"event: ping\nid: 7\nretry: 100\n\n"
    b"event: message\ndata: named\nid: 8\n\n"
    b"data\n\n"
    b"datum: no\nDATA: no\n data: no\n\n"
    b"data: mixed\r\ndata: ends\rdata: here\n\r\n"
    b"\xef\xbb\xbfdata: no mark here\n\n"
    b"\n\n\r\n"
    b'data: {"a": "b: c"}\n\n'
    b"data: [DONE]\n\n"
    b"data: without an end\n"
)
CORNER_EVENTS = [
    b"with a byte order mark",
    b"no space",
    b" two spaces",
    b"one\n\n\nfour",
    b"named",
    b"",
    b"mixed\nends\nhere",
    b'{"a": "b: c"}',
    b"[DONE]",
]


def fed(pieces: Iterable[bytes]) -> list[bytes]:
    decoder = SseDecoder()
    return [event for piece in pieces for event in decoder.feed(piece)]


def by_the_book(body: bytes) -> list[bytes]:
    """The specification's algorithm over a whole body, for comparison."""
    events: list[bytes] = []
    data: list[bytes] = []
    *lines, _ = re.split(rb"\r\n|\n|\r", body.removeprefix(b"\xef\xbb\xbf"))
    for line in lines:
        if not line:
            if data:
                events.append(b"\n".join(data))
            data = []
        elif line == b"data":
            data.append(b"")
        elif line.startswith(b"data:"):
            data.append(line[5:].removeprefix(b" "))
    return events


def test_corners() -> None:
    assert fed([CORNERS]) == CORNER_EVENTS
    assert by_the_book(CORNERS) == CORNER_EVENTS


def test_every_split_in_two_and_byte_by_byte() -> None:
    assert fed(bytes([byte]) for byte in CORNERS) == CORNER_EVENTS
    for at in range(len(CORNERS) + 1):
        assert fed([CORNERS[:at], CORNERS[at:]]) == CORNER_EVENTS


@pytest.mark.parametrize("end", [b"\n\n", b"\r\n\r\n", b"\r\r", b"\n\r\n", b"\r\n\n"])
def test_whole_events_in_a_feed_each(end: bytes) -> None:
    frames = [b'{"n":%d}' % n for n in range(23)]
    assert fed(b"data: " + frame + end for frame in frames) == frames
    assert fed([b"".join(b"data: " + frame + end for frame in frames)]) == frames


@settings(deadline=None)  # other work shares the machine
@given(
    st.lists(
        st.one_of(
            st.sampled_from(
                [b"data: ", b"data:", b"data", b"\n", b"\n\n", b"\r", b"\r\n", b":", b" ", b"\xef\xbb\xbf"]
            ),
            st.sampled_from([b"data: x\n\n", b"data: y\r\n\r\n", b"data: a\rb\n\n"]),
            st.binary(max_size=7),
        ),
        max_size=31,
    )
)
def test_any_bytes_in_any_pieces_as_the_specification_says(pieces: list[bytes]) -> None:
    body = b"".join(pieces)
    assert fed(pieces) == by_the_book(body)
    assert fed([body]) == by_the_book(body)
    assert fed(bytes([byte]) for byte in body) == by_the_book(body)


LIMIT = 1009


@pytest.mark.parametrize(
    "large",
    [
        b"data: " + b"x" * (LIMIT - 5) + b"\n",
        b": " + b"x" * LIMIT + b"\n",
        b"data: " + b"x" * (LIMIT // 2) + b"\ndata: " + b"x" * (LIMIT // 2) + b"\n",
        b"data\n" * (LIMIT + 1),
    ],
)
@pytest.mark.parametrize("piece", [1, 61, 4093, 2**22])
def test_an_event_too_large_is_dropped_and_counted(large: bytes, piece: int) -> None:
    body = b"data: before\n\ndata: lost\n" + large + b"data: lost\n\ndata: after\n\n" + large * 2 + b"\ndata: last\n\n"
    decoder = SseDecoder(LIMIT)
    events = [event for at in range(0, len(body), piece) for event in decoder.feed(body[at : at + piece])]
    assert events == [b"before", b"after", b"last"]
    assert decoder.oversize == 2


@pytest.mark.parametrize("limit", [LIMIT, EVENT_LIMIT])
def test_the_largest_event_that_fits(limit: int) -> None:
    payload = b"x" * (limit - 6)
    decoder = SseDecoder(limit)
    assert decoder.feed(b": hello\n\n") == []
    assert decoder.feed(b"data: " + payload + b"\n\n") == [payload]
    assert decoder.feed(b"data: " + payload) == []
    assert decoder.feed(b"\n\n") == [payload]
    assert decoder.oversize == 0


@pytest.mark.parametrize("noise", [b"a" * 65_537, b"data: " + b"a" * 83 + b"\n", b"data\n", b"data: a\r", b":\n" * 31])
def test_endless_streams_are_held_in_bounds(noise: bytes) -> None:
    limit = 8191
    decoder = SseDecoder(limit)
    noise *= -(-2 * limit // len(noise))
    decoder.feed(noise)
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    for _ in range(7):
        decoder.feed(noise)
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert after - before < 3 * limit
    assert decoder.feed(b"\n\ndata: here again\n\n")[-1] == b"here again"
