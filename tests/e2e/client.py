"""The client, with a clock and decoders of its own: what it saw is what the agent is held to."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

ANSWER_S: Final = 30.0
"""A service that takes longer for one answer is broken."""


@dataclass(frozen=True, slots=True)
class Ask:
    """One request. `script` is for the service, see servers/script.py.

    `leave_after`: the client closes its connection once it has that many frames with content; with 0, `leave_s` seconds
    after the request was sent.
    """

    model: str = "alto"
    chat: bool = True
    stream: bool = True
    usage: bool = True
    script: Mapping[str, Any] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    leave_after: int | None = None
    leave_s: float = 0.05

    def encoded(self) -> bytes:
        """The request as it goes over the wire."""
        body: dict[str, Any] = {"messages" if self.chat else "prompt": "Who goes there?", "script": dict(self.script)}
        if self.stream:
            body |= {"stream": True, "stream_options": {"include_usage": self.usage}}
        raw = json.dumps({**body, "model": self.model}).encode()
        path = "/v1/chat/completions" if self.chat else "/v1/completions"
        extra = "".join(f"{name}: {value}\r\n" for name, value in self.headers.items())
        head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n{extra}"
        return f"{head}content-length: {len(raw)}\r\n\r\n".encode() + raw


@dataclass(slots=True)
class Answer:
    """What came back. Instants are CLOCK_MONOTONIC in nanoseconds: when the client handed over or took the bytes."""

    ask: Ask
    peer: str
    sent_ns: int
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    content_ns: list[int] = field(default_factory=list)
    """One instant for each frame with content."""
    usage: dict[str, Any] | None = None
    error: bool = False
    complete: bool = False
    left: bool = False
    end_ns: int = 0

    @property
    def ttft_s(self) -> float:
        """From sending the request to the first frame with content."""
        return (self.content_ns[0] - self.sent_ns) / 1e9

    @property
    def gaps_s(self) -> list[float]:
        """Between successive frames with content."""
        return [(later - sooner) / 1e9 for sooner, later in zip(self.content_ns, self.content_ns[1:], strict=False)]

    @property
    def mean_gap_s(self) -> float:
        """Mean of the gaps."""
        return sum(self.gaps_s) / len(self.gaps_s)


class Connection(asyncio.Protocol):
    """A connection on which one request at a time is answered."""

    def __init__(self) -> None:
        self.answer: Answer | None = None
        self.closed = False
        self._done = asyncio.Event()
        self._buffer = b""
        self._event = b""
        self._left = 0  # bytes of the body that are still to come, where the head says how many

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        host, port = transport.get_extra_info("sockname")[:2]
        self.peer = f"{host}:{port}"

    async def ask(self, ask: Ask) -> Answer:
        """Send a request and wait for the end of its answer, or leave as it says."""
        self._done.clear()
        self._buffer = self._event = b""
        self._left = -1
        raw = ask.encoded()
        answer = self.answer = Answer(ask, self.peer, time.monotonic_ns())
        self._transport.write(raw)
        if ask.leave_after == 0:
            await asyncio.sleep(ask.leave_s)
            self._leave(answer)
        await asyncio.wait_for(self._done.wait(), ANSWER_S)
        return answer

    def close(self) -> None:
        """Close the connection."""
        self._transport.abort()

    def data_received(self, data: bytes) -> None:
        now_ns = time.monotonic_ns()
        answer = self.answer
        if answer is None or self._done.is_set():
            return
        self._buffer += data
        if not answer.status and not self._take_head(answer):
            return
        framing = answer.headers.get("transfer-encoding")
        if framing == "chunked":
            self._take_chunks(answer, now_ns)
        else:
            body, self._buffer = self._buffer, b""
            self._take_body(answer, body, now_ns)
            if self._left >= 0:
                self._left -= len(body)
                if self._left == 0:
                    self._end(answer, now_ns)

    def connection_lost(self, _: Exception | None) -> None:
        self.closed = True
        answer = self.answer
        if answer is not None and not self._done.is_set():
            delimited = bool(answer.status) and not {"transfer-encoding", "content-length"} & answer.headers.keys()
            answer.complete = answer.complete or (delimited and not answer.ask.stream)
            answer.end_ns = time.monotonic_ns()
        self._done.set()

    def _take_head(self, answer: Answer) -> bool:
        head, found, rest = self._buffer.partition(b"\r\n\r\n")
        if not found:
            return False
        status, *lines = head.decode("latin-1").split("\r\n")
        answer.status = int(status.split(" ")[1])
        for line in lines:
            name, _, value = line.partition(":")
            answer.headers[name.lower()] = value.strip()
        self._buffer = rest
        self._left = int(answer.headers.get("content-length", -1))
        return True

    def _take_chunks(self, answer: Answer, now_ns: int) -> None:
        while b"\r\n" in self._buffer:
            line, _, rest = self._buffer.partition(b"\r\n")
            size = int(line, 16)
            if len(rest) < size + 2:
                return
            self._buffer = rest[size + 2 :]
            if size == 0:
                self._end(answer, now_ns)
                return
            self._take_body(answer, rest[:size], now_ns)

    def _take_body(self, answer: Answer, body: bytes, now_ns: int) -> None:
        if answer.left:
            return
        self._event += body
        if not answer.headers.get("content-type", "").startswith("text/event-stream"):
            if self._left >= 0 and len(self._event) >= self._left:
                self._take_json(answer, json.loads(self._event))
            return
        *events, self._event = self._event.split(b"\n\n")
        for event in events:
            if event == b"data: [DONE]":
                answer.complete = "transfer-encoding" not in answer.headers
            elif event.startswith(b"data: "):
                self._take_json(answer, json.loads(event[6:]), now_ns)
                if answer.ask.leave_after and len(answer.content_ns) == answer.ask.leave_after:
                    self._leave(answer)
                    return

    def _take_json(self, answer: Answer, value: dict[str, Any], now_ns: int | None = None) -> None:
        answer.usage = value.get("usage") or answer.usage
        answer.error = answer.error or "error" in value
        for choice in value.get("choices", ()):
            if now_ns is not None and (choice.get("text") or choice.get("delta", {}).get("content")):
                answer.content_ns.append(now_ns)

    def _leave(self, answer: Answer) -> None:
        answer.left = True
        answer.end_ns = time.monotonic_ns()
        self._transport.abort()

    def _end(self, answer: Answer, now_ns: int) -> None:
        answer.complete = True
        answer.end_ns = now_ns
        self._done.set()


async def connect(port: int) -> Connection:
    """Open a connection to a service on this host."""
    _, connection = await asyncio.get_running_loop().create_connection(Connection, "127.0.0.1", port)
    return connection


async def converse(port: int, asks: Sequence[Ask]) -> list[Answer]:
    """Ask one after the other on one connection, and on a new one where that was closed."""
    connection = await connect(port)
    answers = []
    for ask in asks:
        if connection.closed:
            connection = await connect(port)
        answers.append(await connection.ask(ask))
        if answers[-1].headers.get("connection") == "close":
            connection.close()
            await asyncio.sleep(0)
            connection.closed = True
    connection.close()
    return answers


async def crowd(port: int, conversations: Sequence[Sequence[Ask]]) -> list[Answer]:
    """Hold all these conversations at once, each on a connection of its own."""
    results = await asyncio.gather(*(converse(port, asks) for asks in conversations))
    return [answer for answers in results for answer in answers]


def talk(port: int, *conversations: Sequence[Ask]) -> list[Answer]:
    """Hold these conversations at once and wait for the end of all."""
    return asyncio.run(crowd(port, conversations))


def ask(port: int, **what: Any) -> Answer:  # noqa: ANN401 - the fields of Ask
    """One request on a connection of its own."""
    (answer,) = talk(port, [Ask(**what)])
    return answer
