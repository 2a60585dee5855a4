"""Requests under any split, any loss and any garbage: what must hold whatever the records are."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exporter.live_request import Request
from exporter.request import Capture, FinishedRequest
from exporter.requests import PIPELINE_LIMIT, SEGMENTS_LIMIT
from tests.conversations import (
    CLOSE_WAIT,
    DONE,
    LAST_CHUNK,
    SSE_HEAD,
    Record,
    Scene,
    Wire,
    answer,
    chunk,
    completion,
    finish,
    merged,
    post,
    replay,
    role,
    split,
    stream,
    usage,
    word,
)

FIXTURES = Path(__file__).parent.parent / "fixtures" / "wire"
TAGS = tuple(f"r{number}" for number in range(101))
CLOSE_DELIMITED = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n"


# ---- conversations in which every byte of an answer says to which request it belongs ----


def ask(wire: Wire, tag: str, padding: int = 0, *, streamed: bool = True) -> None:
    body = json.dumps({"model": tag, "stream": streamed, "prompt": "x" * padding}).encode()
    request = post(body, headers=f"x-tag: {tag}\r\n", path=f"/{tag}/v1/chat/completions")
    wire.arrive(len(request))
    wire.at += 1
    for start in range(0, len(request), 4032):
        wire.read(request[start : start + 4032])


def words(wire: Wire, tag: str, count: int, wrap: Callable[[bytes], bytes] = chunk) -> None:
    for number in range(count):
        frame = wrap(word(f"<{tag}>" * (1 + 97 * (number % 3 == 2)), model=tag))
        wire.at += 7
        for start in range(0, len(frame), 448):
            wire.write(frame[start : start + 448])


def end(wire: Wire, tag: str, count: int, wrap: Callable[[bytes], bytes] = chunk) -> None:
    wire.write(wrap(finish(tag)), after_ms=3)
    wire.write(wrap(usage(1000 + count, 2000 + count, model=tag)))
    wire.write(wrap(DONE), after_ms=1)


def chunked(wire: Wire, tag: str, count: int) -> None:
    ask(wire, tag)
    wire.write(SSE_HEAD, after_ms=2)
    wire.write(chunk(role(tag)), after_ms=2)
    words(wire, tag, count)
    end(wire, tag, count)
    wire.write(LAST_CHUNK)


def plain(wire: Wire, tag: str, count: int) -> None:
    ask(wire, tag, padding=4001 * (count % 3), streamed=False)
    text = answer(completion(tag, 1000 + count, 2000 + count).replace(b"Aye.", f"<{tag}>".encode() * (1 + 89 * count)))
    wire.at += 5
    for start in range(0, len(text), 448):
        wire.write(text[start : start + 448])


def refused(wire: Wire, tag: str, count: int) -> None:
    ask(wire, tag)
    wire.write(answer(f'{{"error": {{"message": "<{tag}>"}}}}'.encode(), status=(404, 429, 503)[count % 3]), after_ms=2)


def other(wire: Wire, tag: str, count: int) -> None:
    wire.ask(b"HEAD / HTTP/1.1\r\nhost: x\r\n\r\n" if count % 2 else b"GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n")
    text = b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n"
    wire.write(text if count % 2 else text + b"some data")


def left_by_close(wire: Wire, tag: str, count: int) -> None:
    ask(wire, tag)
    wire.write(SSE_HEAD)
    words(wire, tag, count)
    wire.at += 3
    wire.client_closes()


def left_by_reset(wire: Wire, tag: str, count: int) -> None:
    ask(wire, tag)
    wire.write(SSE_HEAD)
    words(wire, tag, count)
    wire.at += 3
    wire.reset()


def cut_off(wire: Wire, tag: str, count: int) -> None:
    ask(wire, tag)
    wire.write(SSE_HEAD)
    words(wire, tag, count)
    wire.at += 3
    wire.service_closes()


def close_delimited(wire: Wire, tag: str, count: int) -> None:
    ask(wire, tag)
    wire.write(CLOSE_DELIMITED)
    words(wire, tag, count, bytes)
    end(wire, tag, count, bytes)
    wire.service_closes()


def goodbye(wire: Wire, tag: str, count: int) -> None:
    wire.at += 50
    wire.client_closes()


Act = Callable[[Wire, str, int], None]
GOING_ON: tuple[Act, ...] = (chunked, chunked, plain, refused, other)
ENDING: tuple[Act, ...] = (left_by_close, left_by_reset, cut_off, close_delimited, goodbye)


@st.composite
def conversations(draw: st.DrawFn) -> list[Record]:
    """Records of one to three connections, each with some exchanges and an end."""
    tags = iter(TAGS)
    wires = []
    for conn in range(draw(st.integers(1, 3))):
        offset = draw(st.sampled_from([1001, 2**32 - 307]))
        wire = Wire(conn=conn + 1, at=conn * 0.01, rx=offset, tx=2 * offset)
        acts = draw(st.lists(st.sampled_from(GOING_ON), max_size=5))
        for act in [*acts, draw(st.sampled_from(ENDING))]:
            wire.at += draw(st.integers(1, 30))
            act(wire, next(tags), draw(st.integers(0, 7)))
        wires.append(wire)
    return merged(*wires)


def scene_of(records: list[Record], dropped: frozenset[int] = frozenset()) -> Scene:
    scene = Scene(labels=("tag",), values=TAGS)
    replay(scene.conversations, records, dropped)
    return scene


@contextmanager
def no_stranger() -> Iterator[None]:
    """While it lasts, a request that gets bytes of an answer to another one fails the test."""
    take = Request.take_answer

    def checked(self: Request, data: bytes, at_ns: int, client_left_ns: int | None) -> None:
        if self.api is not None:
            assert set(re.findall(rb"<(r[0-9]+)>", data)) <= {self.extra[0].encode()}
        take(self, data, at_ns, client_left_ns)

    with mock.patch.object(Request, "take_answer", checked):
        yield


def by_tag(scene: Scene) -> dict[str, FinishedRequest]:
    found = {request.extra[0]: request for request in scene.finished}
    assert len(found) == len(scene.finished), "a request was finished twice"
    return found


# ---- splits ----


@given(conversations(), st.lists(st.integers(0, 10_007), min_size=1, max_size=13), st.integers(1, 3))
@settings(deadline=None)
def test_records_may_be_cut_anywhere(records: list[Record], cuts: list[int], times: int) -> None:
    pieces = records
    for _ in range(times):
        pieces = split(pieces, cuts)
    whole, cut = scene_of(records), scene_of(pieces)
    assert cut.finished == whole.finished
    assert cut.captures == whole.captures
    assert set(whole.captures) <= {Capture.complete}


def test_records_of_one_byte() -> None:
    wire = Wire()
    for tag, act in zip(TAGS, (chunked, plain, other, refused, chunked), strict=False):
        act(wire, tag, 3)
    goodbye(wire, "", 0)
    records = merged(wire)
    pieces = [
        replace(record, position=record.position + at, data=record.data[at : at + 1])
        for record in records
        for at in (range(len(record.data)) if record.data else [0])
    ]
    assert len(pieces) > 4001
    whole, cut = scene_of(records), scene_of(pieces)
    assert [request.extra[0] for request in whole.finished] == ["r0", "r1", "r3", "r4"]
    # A status line that comes in pieces is one when it is readable: here its pieces are of one call.
    assert cut.finished == whole.finished
    assert cut.captures == {Capture.complete: 4}


@pytest.mark.parametrize("path", sorted(FIXTURES.glob("*.http")), ids=lambda path: path.stem)
def test_transcripts_of_servers_in_pieces_of_every_size(path: Path) -> None:
    text = path.read_bytes()
    results = set()
    for size in (1, 2, 3, 7, 19, 97, 448, len(text)):
        scene = Scene()
        wire = Wire()
        wire.ask(post(model="asked-for"))
        for start in range(0, len(text), size):
            wire.write(text[start : start + size])
        wire.at += 1
        wire.service_closes()
        (request,) = scene.play(wire)
        results.add(request)
    (request,) = results
    assert request.capture is Capture.complete
    assert request.model == "asked-for"
    assert request.status is not None


# ---- losses ----

bursts = st.lists(st.tuples(st.integers(0, 400), st.integers(1, 12)), min_size=1, max_size=4)


@given(conversations(), bursts, st.sampled_from(["read", "wrote", "read wrote", "segment state reset opened", "any"]))
@settings(deadline=None, max_examples=300)
def test_losses_are_known_and_mix_nothing_up(records: list[Record], bursts: list[tuple[int, int]], kinds: str) -> None:
    fitting = [index for index, record in enumerate(records) if kinds == "any" or record.kind in kinds.split()]
    fitting = fitting or [0]
    dropped = frozenset(fitting[at % len(fitting)] for start, length in bursts for at in range(start, start + length))
    truth = by_tag(scene_of(records))
    with no_stranger():
        scene = scene_of(records, dropped)
    for tag, found in by_tag(scene).items():
        real, request = truth[tag], found
        assert request.capture in (Capture.complete, Capture.arrival_unseen, Capture.lost_events)
        if request.capture is Capture.lost_events:
            assert request.frames <= real.frames
            assert request.prompt_tokens in (None, real.prompt_tokens)
            assert request.completion_tokens in (None, real.completion_tokens)
            assert request.model in (None, real.model)
            assert request.status in (None, real.status)
            assert request.failure in (None, real.failure)
            assert request.aborted is None or real.aborted is not None
            assert request.first_token_ns in (None, real.first_token_ns)
        else:
            if request.capture is Capture.arrival_unseen:
                assert request.arrived_ns == request.read_ns
                request = replace(request, capture=real.capture, arrived_ns=real.arrived_ns)
            # Who the peer is was said when the connection was opened, and nowhere else.
            peer = real.peer if request.peer else ""
            assert replace(request, number=0) == replace(real, number=0, peer=peer)
    asked = sum(1 for record in records if record.kind == "read" and re.match(rb"[A-Z]+ /", record.data))
    assert sum(scene.captures.values()) <= asked
    assert set(scene.captures) <= {Capture.complete, Capture.arrival_unseen, Capture.lost_events}
    ends = {record.conn for index, record in enumerate(records) if record.new == 7 and index not in dropped}
    assert not ends & scene.conversations._connections.keys()


@given(st.data())
@settings(deadline=None)
def test_one_lost_record_costs_one_request(data: st.DataObject) -> None:
    """Of requests one after the other on one connection, all but one are measured as if nothing had been."""
    wire = Wire()
    tags = TAGS[:11]
    for number, tag in enumerate(tags):
        wire.at += 100
        data.draw(st.sampled_from((chunked, plain)))(wire, tag, number % 5)
    goodbye(wire, "", 0)
    records = merged(wire)
    bytes_of = [index for index, record in enumerate(records) if record.kind in ("read", "wrote")]
    truth = by_tag(scene_of(records))
    lost = data.draw(st.sampled_from(bytes_of))
    with no_stranger():
        scene = scene_of(records, frozenset({lost}))
    found = by_tag(scene)
    hurt = [tag for tag in tags if tag not in found or found[tag].capture is not Capture.complete]
    assert len(hurt) == 1
    assert all(replace(found[tag], number=0) == replace(truth[tag], number=0) for tag in tags if tag not in hurt)
    assert scene.captures == {Capture.complete: 10, Capture.lost_events: 1}


@given(st.lists(st.sampled_from(GOING_ON), min_size=2, max_size=7), bursts)
@settings(deadline=None)
def test_pipelining_survives_lost_writes(acts: list[Act], bursts: list[tuple[int, int]]) -> None:
    """All requests come before the first answer; what is lost of the answers never makes one another's."""
    reads, writes = Wire(), Wire()
    for tag, act in zip(TAGS, acts, strict=False):
        act(writes, tag, 3)
    records = [record for record in writes.records if record.kind != "wrote"]
    answers = [record for record in writes.records if record.kind == "wrote"]
    dropped = frozenset(
        len(records) + at % len(answers) for start, length in bursts for at in range(start, start + length)
    )
    ordered = [replace(record, ns=number) for number, record in enumerate(records + answers)]
    assert len(reads.records) == 1
    with no_stranger():
        scene = scene_of(ordered, dropped)
    by_tag(scene)


# ---- strangers ----

snippets = st.sampled_from(
    [
        post(),
        post(stream=False),
        SSE_HEAD,
        chunk(word()),
        chunk(DONE),
        LAST_CHUNK,
        answer(completion()),
        answer(b"", status=204),
        b"HTTP/1.1 101 Switching Protocols\r\n\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"CONNECT x:1 HTTP/1.1\r\n\r\n",
        b"data: {}\n\n",
        b"FFFFFFFFFFFFFFFF\r\n",
        b"\r\n",
    ]
)
payloads = st.one_of(st.binary(max_size=97), snippets, st.builds(lambda a, b: (a + b)[:300], snippets, snippets))
u32 = st.one_of(st.integers(0, 600), st.integers(2**32 - 600, 2**32 - 1))
conn = st.integers(1, 4)
when = st.integers(0, 10**12)
calls = st.one_of(
    st.tuples(st.just("opened"), conn, when, st.just(0), st.text(max_size=5), st.booleans(), u32, u32),
    st.tuples(st.just("accepted"), conn, st.just(0)),
    st.tuples(st.just("segment"), conn, when, u32, u32),
    st.tuples(st.just("state"), conn, when, st.integers(0, 12), st.integers(0, 12), u32, u32, u32, st.integers(0, 133)),
    st.tuples(st.just("reset"), conn, when),
    st.tuples(st.just("sweep"), when),
    st.tuples(
        st.sampled_from(["read", "wrote"]), conn, when, u32, payloads,
        st.sampled_from([0, 0, 0, 7, 2**32 - 1]), st.integers(0, 2), st.integers(0, 2), st.just(0), u32, u32,
    ),
)  # fmt: skip


@given(st.lists(calls, max_size=60))
@settings(deadline=None, max_examples=300)
def test_no_sequence_of_records_raises_or_grows(calls: list[tuple[str, object]]) -> None:
    scene = Scene(limit=3)
    for name, *arguments in calls:
        getattr(scene.conversations, name)(*arguments)
        assert_bounded(scene)


@given(conversations(), st.data())
@settings(deadline=None)
def test_no_corruption_of_records_raises_or_grows(records: list[Record], data: st.DataObject) -> None:
    """Bytes that are flipped, records that change places, come twice or not at all."""
    records = list(records)
    for _ in range(data.draw(st.integers(1, 11))):
        at = data.draw(st.integers(0, len(records) - 1))
        record = records[at]
        how = data.draw(st.sampled_from(["flip", "swap", "twice", "never", "jump"]))
        if how == "flip" and record.data:
            byte = data.draw(st.integers(0, len(record.data) - 1))
            flipped = record.data[:byte] + data.draw(st.binary(min_size=1, max_size=1)) + record.data[byte + 1 :]
            records[at] = replace(record, data=flipped)
        elif how == "swap":
            records[at], records[at - 1] = records[at - 1], record
        elif how == "twice":
            records.insert(at, record)
        elif how == "never" and len(records) > 1:
            del records[at]
        elif how == "jump":
            records[at] = replace(record, position=record.position + data.draw(u32))
    scene = scene_of(records)
    assert_bounded(scene)
    for request in scene.finished:
        assert request.finished_ns >= request.arrived_ns
        assert request.read_ns >= request.arrived_ns
        assert request.longest_gap_ns is None or request.longest_gap_ns >= 0
        assert 0 <= request.wasted_tokens <= max(request.frames, request.completion_tokens or 0)


def assert_bounded(scene: Scene) -> None:
    connections = scene.conversations._connections
    assert len(connections) <= scene.limit
    assert len(scene.conversations._closed) <= 1024
    assert scene.conversations._lingering <= connections.keys()
    for connection in connections.values():
        assert len(connection.requests) <= PIPELINE_LIMIT
        assert len(connection.segments) <= SEGMENTS_LIMIT
        assert len(connection.lingering) <= PIPELINE_LIMIT
        assert connection.tx_synced or not connection.rx_synced


def test_half_closed_connections_do_not_gather_answers() -> None:
    """A client that shuts its side cannot ask for more, whatever the records say."""
    scene = Scene()
    wire = Wire()
    wire.ask(post())
    wire.go(CLOSE_WAIT)
    for _ in range(3 * PIPELINE_LIMIT):
        stream(wire, words=1)
        wire.ask(post())
    scene.play(wire)
    assert_bounded(scene)
