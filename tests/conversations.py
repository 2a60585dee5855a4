"""Scripted connections: what the requests probe would report of them, for tests without a kernel."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from exporter.config import HeaderLabel, Match, Service
from exporter.request import Capture, FinishedRequest
from exporter.requests import Conversations
from exporter.slis import Series, Slis
from probes.records import Handler

MS = 1_000_000
START_NS = 1_000_000_000_000
POSITIONS = 2**32

ESTABLISHED, FIN_WAIT1, FIN_WAIT2, CLOSE, CLOSE_WAIT, LAST_ACK = 1, 4, 5, 7, 8, 9
ECONNRESET, ETIMEDOUT = 104, 110

SSE_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
LAST_CHUNK = b"0\r\n\r\n"

Kind = Literal["opened", "accepted", "segment", "read", "wrote", "reset", "state"]


@dataclass(frozen=True)
class Record:
    """One record of the probe. Positions count from the connection's beginning and do not wrap; `replay` wraps them."""

    kind: Kind
    conn: int
    ns: int
    position: int = 0
    data: bytes = b""
    size: int = 0
    uncaptured: int = 0
    tx_position: int = 0
    born: bool = True
    old: int = 0
    new: int = 0
    error: int = 0


@dataclass
class Wire:
    """One connection of service 0 and the records that it makes. `at` is the time now, in ms; `rx`, `tx` positions."""

    conn: int = 1
    at: float = 0.0
    rx: int = 1_001
    tx: int = 5_003
    born: bool = True
    records: list[Record] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.tcp_state = ESTABLISHED
        self.arrived = self.rx
        self.records.append(Record("opened", self.conn, self.ns, self.rx, tx_position=self.tx, born=self.born))

    @property
    def ns(self) -> int:
        return START_NS + round(self.at * MS)

    def arrive(self, size: int, *, position: int | None = None) -> None:
        """A segment enters the receive path."""
        start = self.arrived if position is None else position
        self.records.append(Record("segment", self.conn, self.ns, start, size=size))
        self.arrived = max(self.arrived, start + size)

    def read(self, data: bytes, *, uncaptured: int = 0) -> None:
        """A read of the service returns."""
        self.records.append(Record("read", self.conn, self.ns, self.rx, data, uncaptured=uncaptured))
        self.rx += len(data) + uncaptured
        self.arrived = max(self.arrived, self.rx)

    def ask(self, data: bytes, *, delay_ms: float = 0.25) -> None:
        """A request arrives now, in one segment, and is read `delay_ms` later."""
        self.arrive(len(data))
        self.at += delay_ms
        self.read(data)

    def write(self, data: bytes, *, uncaptured: int = 0, after_ms: float = 0.0) -> None:
        """A write of the service begins, `after_ms` from now."""
        self.at += after_ms
        self.records.append(Record("wrote", self.conn, self.ns, self.tx, data, uncaptured=uncaptured))
        self.tx += len(data) + uncaptured

    def go(self, new: int, *, error: int = 0) -> None:
        """TCP changes its state."""
        old, self.tcp_state = self.tcp_state, new
        self.records.append(
            Record("state", self.conn, self.ns, self.rx, tx_position=self.tx, old=old, new=new, error=error)
        )

    def reset(self) -> None:
        """The peer resets the connection."""
        self.records.append(Record("reset", self.conn, self.ns))
        self.go(CLOSE, error=ECONNRESET)

    def client_closes(self) -> None:
        """The client sends FIN; the service closes after that."""
        self.go(CLOSE_WAIT)
        self.at += 0.125
        self.go(LAST_ACK)
        self.go(CLOSE)

    def service_closes(self) -> None:
        """The service sends FIN; the client closes after that."""
        for new in (FIN_WAIT1, FIN_WAIT2, CLOSE):
            self.go(new)


@dataclass
class Scene:
    """Conversations of a service called roleplay, and what came of them.

    Label NAME is the header x-NAME, with one of `values`.
    """

    labels: tuple[str, ...] = ()
    limit: int = 65536
    values: tuple[str, ...] = ("stable", "canary")

    def __post_init__(self) -> None:
        service = Service(
            "roleplay",
            Match(port=(8000,)),
            {name: HeaderLabel(f"x-{name}", self.values) for name in self.labels},
        )
        self.now_ns = START_NS
        self.slis = Slis(self.labels, clock=lambda: self.now_ns)
        self.finished: list[FinishedRequest] = []
        self.conversations = Conversations([service], self.labels, self.slis, self.finished.append, self.limit)

    def play(self, *wires: Wire, dropped: Collection[int] = ()) -> list[FinishedRequest]:
        """Replay the records of the wires that were not played yet; `dropped` are indices into all of them."""
        records = merged(*wires)
        for wire in wires:
            wire.records = []
        replay(self.conversations, records, dropped)
        return self.finished

    def sweep(self, at_ms: float) -> None:
        self.conversations.sweep(START_NS + round(at_ms * MS))

    @property
    def captures(self) -> dict[Capture, int]:
        """How many requests had each outcome; those that none had are left out."""
        return {outcome: count for outcome, count in self.slis.captures()["roleplay"].items() if count}

    @property
    def series(self) -> Series:
        """The only series."""
        (series,) = self.slis.all_series()
        return series


def merged(*wires: Wire) -> list[Record]:
    """The records of several connections in the order they were made."""
    return sorted((record for wire in wires for record in wire.records), key=lambda record: record.ns)


def replay(handler: Handler, records: Sequence[Record], dropped: Collection[int] = ()) -> None:
    """Hand the records to `handler`, but the `dropped` ones, which count as lost where the kernel counts them."""
    lost: dict[tuple[int, str], int] = defaultdict(int)
    for index, record in enumerate(records):
        if index in dropped:
            lost[record.conn, record.kind] += 1
        else:
            _hand_over(handler, record, lost[record.conn, "read"], lost[record.conn, "wrote"])


def _hand_over(handler: Handler, record: Record, rx_lost: int, tx_lost: int) -> None:
    conn, ns, position = record.conn, record.ns, record.position % POSITIONS
    if record.kind == "opened":
        tx_position = record.tx_position % POSITIONS
        handler.opened(conn, ns, 0, f"127.0.0.1:{conn}", record.born, position, tx_position)
    elif record.kind == "accepted":
        handler.accepted(conn, 0)
    elif record.kind == "segment":
        handler.segment(conn, ns, position, record.size)
    elif record.kind == "reset":
        handler.reset(conn, ns)
    elif record.kind == "state":
        tx_position = record.tx_position % POSITIONS
        handler.state(conn, ns, record.old, record.new, 7, position, tx_position, record.error)
    elif record.kind == "read":
        handler.read(conn, ns, position, record.data, record.uncaptured, rx_lost, tx_lost, 0, 7, 11)
    else:
        handler.wrote(conn, ns, position, record.data, record.uncaptured, tx_lost, rx_lost, 0, 7, 11)


def split(records: Iterable[Record], cuts: Sequence[int]) -> list[Record]:
    """The same bytes in other records: the n-th read or write is cut at the n-th of `cuts`, modulo its size."""
    pieces: list[Record] = []
    turn = 0
    for record in records:
        if record.kind not in ("read", "wrote") or not record.data or not cuts:
            pieces.append(record)
            continue
        cut = cuts[turn % len(cuts)] % len(record.data)
        turn += 1
        if cut:
            pieces.append(replace(record, data=record.data[:cut], uncaptured=0))
        pieces.append(replace(record, position=record.position + cut, data=record.data[cut:]))
    return pieces


# ---- what clients and servers say ----


def post(
    body: bytes | None = None,
    *,
    model: str = "bard",
    stream: bool = True,
    path: str = "/v1/chat/completions",
    headers: str = "",
) -> bytes:
    """A request for a chat completion."""
    if body is None:
        body = json.dumps({"model": model, "stream": stream, "messages": []}).encode()
    return f"POST {path} HTTP/1.1\r\nhost: roleplay\r\n{headers}content-length: {len(body)}\r\n\r\n".encode() + body


def chunk(data: bytes) -> bytes:
    """One chunk of a chunked body."""
    return b"%x\r\n%s\r\n" % (len(data), data)


def event(**members: object) -> bytes:
    """One server-sent event with a JSON object."""
    return b"data: " + json.dumps(members).encode() + b"\n\n"


def role(model: str = "bard") -> bytes:
    return event(model=model, choices=[{"index": 0, "delta": {"role": "assistant", "content": ""}}])


def word(text: str = " word", model: str = "bard", index: int = 0) -> bytes:
    """A frame with content."""
    return event(model=model, choices=[{"index": index, "delta": {"content": text}, "finish_reason": None}])


def finish(model: str = "bard", index: int = 0) -> bytes:
    return event(model=model, choices=[{"index": index, "delta": {}, "finish_reason": "stop"}])


def usage(prompt: int, completion: int, cached: int | None = None, model: str = "bard") -> bytes:
    counts: dict[str, object] = {"prompt_tokens": prompt, "completion_tokens": completion}
    if cached is not None:
        counts["prompt_tokens_details"] = {"cached_tokens": cached}
    return event(model=model, choices=[], usage=counts)


DONE = b"data: [DONE]\n\n"


def answer(body: bytes, *, status: int = 200, headers: str = "") -> bytes:
    """A response with a known length."""
    head = f"HTTP/1.1 {status} Whatever\r\ncontent-type: application/json\r\n{headers}"
    return f"{head}content-length: {len(body)}\r\n\r\n".encode() + body


def completion(model: str = "bard", prompt: int = 19, tokens: int = 7, cached: int | None = None) -> bytes:
    """The body of a response that is not streamed."""
    counts: dict[str, object] = {"prompt_tokens": prompt, "completion_tokens": tokens}
    if cached is not None:
        counts["prompt_tokens_details"] = {"cached_tokens": cached}
    return json.dumps({"model": model, "choices": [{"message": {"content": "Aye."}}], "usage": counts}).encode()


def stream(wire: Wire, words: int = 5, *, first_ms: float = 53.0, step_ms: float = 11.0, model: str = "bard") -> None:
    """Answer with a stream in the way of uvicorn: head, role, each frame and the end in writes of their own."""
    wire.write(SSE_HEAD, after_ms=1)
    wire.write(chunk(role(model)), after_ms=1)
    for number in range(words):
        wire.write(chunk(word(model=model)), after_ms=step_ms if number else first_ms)
    wire.write(chunk(finish(model)), after_ms=step_ms)
    wire.write(chunk(usage(19, words, model=model)), after_ms=0.5)
    wire.write(chunk(DONE), after_ms=0.25)
    wire.write(LAST_CHUNK, after_ms=0.25)
