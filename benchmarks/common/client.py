"""An HTTP client with a clock of its own: raw sockets, one epoll loop, no code of the agent's.

The clock is CLOCK_MONOTONIC, read before each send and after each recv returned. While it runs, the client keeps what
it received and looks at none of it but the last bytes of a response; `benchmarks.common.transcript` reads the rest.
"""

from __future__ import annotations

import gc
import itertools
import resource
import select
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Final

import click

_END: Final = b"0\r\n\r\n"
_RECV_BYTES: Final = 1 << 18
_SILENCE_S: Final = 60.0


@dataclass(slots=True)
class Heard:
    """One request and what came back: `pieces` are (ns after recv returned, bytes). `port` is the client's."""

    number: int
    lane: int
    port: int
    sent_ns: int
    pieces: list[tuple[int, bytes]] = field(default_factory=list)


class _Connection:
    __slots__ = ("heard", "lane", "served", "socket", "tail")

    def __init__(self, port: int, lane: int) -> None:
        self.lane = lane
        self.heard: Heard
        self.tail: bytes
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=10)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.served = 0


class Client:
    """Keeps `concurrency` requests to a server on 127.0.0.1 under way, as many in each of the lanes.

    A lane yields whole requests; a connection carries `per_connection` of them, one after the other, then another one
    is opened. The first ones start over `ramp_s` seconds. `on_done` gets each request when its response is complete; it
    is called in the loop. Responses must be 200 and chunked.
    """

    def __init__(
        self,
        port: int,
        lanes: Sequence[Iterator[bytes]],
        on_done: Callable[[Heard], None],
        *,
        concurrency: int,
        per_connection: int = 1,
        ramp_s: float = 0.0,
    ) -> None:
        self._port = port
        self._lanes = lanes
        self._buffer = memoryview(bytearray(_RECV_BYTES))
        self._on_done = on_done
        self._concurrency = concurrency
        self._per_connection = per_connection
        self._ramp_ns = round(ramp_s * 1e9)
        self._numbers = itertools.count()
        self._poll = select.epoll()
        self._connections: dict[int, _Connection] = {}
        self._stop_fd = -1

    def run(self, stop_fd: int = -1) -> None:
        """Go on until every request of every lane is answered, or until `stop_fd` has something to read or is closed.

        Raises click.ClickException for any other answer than a complete 200, and when none comes for a minute.
        """
        self._stop_fd = stop_fd
        if stop_fd >= 0:
            self._poll.register(stop_fd, select.EPOLLIN)
        try:
            with _quiet():
                self._run()
        finally:
            for connection in self._connections.values():
                connection.socket.close()
            self._poll.close()

    def _run(self) -> None:
        began = time.monotonic_ns()
        started = 0
        while True:
            while started < self._concurrency and (
                time.monotonic_ns() - began >= self._ramp_ns * started // self._concurrency
            ):
                self._open(started % len(self._lanes))
                started += 1
            if not self._connections:
                return
            timeout = _SILENCE_S
            if started < self._concurrency:
                timeout = max(0.0, (began + self._ramp_ns * started // self._concurrency - time.monotonic_ns()) / 1e9)
            ready = self._poll.poll(timeout)
            if not ready and timeout == _SILENCE_S:
                raise click.ClickException(f"{len(self._connections)} responses have stopped for {_SILENCE_S:.0f} s")
            for fd, _ in ready:
                if fd == self._stop_fd:
                    return
                self._receive(fd)

    def _receive(self, fd: int) -> None:
        connection = self._connections[fd]
        try:
            size = connection.socket.recv_into(self._buffer)
        except BlockingIOError:
            return
        now = time.monotonic_ns()
        # A copy: what recv(n) returns is a block of n bytes cut short, with a memory map of its own where n is large.
        data = bytes(self._buffer[:size])
        heard = connection.heard
        if not heard.pieces and not data.startswith(b"HTTP/1.1 200 "):
            raise click.ClickException(f"the service answers {data[:300]!r}")
        if not data:
            raise click.ClickException(f"the service closed in the middle of a response: {heard.pieces[-1]}")
        heard.pieces.append((now, data))
        tail = data[-len(_END) :] if len(data) >= len(_END) else (connection.tail + data)[-len(_END) :]
        connection.tail = tail
        # a chunk of an event stream ends with an empty line and CR LF, so this is no data
        if tail == _END:
            self._done(connection)

    def _done(self, connection: _Connection) -> None:
        self._on_done(connection.heard)
        if connection.served < self._per_connection:
            ask = next(self._lanes[connection.lane], None)
            if ask is not None:
                self._send(connection, ask)
                return
        del self._connections[connection.socket.fileno()]
        connection.socket.close()  # which takes it out of the epoll set
        self._open(connection.lane)

    def _open(self, lane: int) -> None:
        ask = next(self._lanes[lane], None)
        if ask is None:
            return
        connection = _Connection(self._port, lane)
        connection.socket.setblocking(False)
        self._connections[connection.socket.fileno()] = connection
        self._poll.register(connection.socket, select.EPOLLIN)
        self._send(connection, ask)

    def _send(self, connection: _Connection, ask: bytes) -> None:
        connection.served += 1
        connection.tail = b""
        connection.heard = Heard(next(self._numbers), connection.lane, connection.socket.getsockname()[1], 0)
        connection.heard.sent_ns = time.monotonic_ns()
        sent = connection.socket.send(ask)
        if sent != len(ask):
            raise click.ClickException(f"a request of {len(ask)} bytes does not fit into a socket's buffer")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without pauses for garbage collection: they would be on the clock."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def request(target: str, body: bytes) -> bytes:
    """Return a POST of JSON as it goes over the wire."""
    head = (
        f"POST {target} HTTP/1.1\r\nhost: 127.0.0.1\r\nuser-agent: footlight-benchmark\r\naccept: text/event-stream\r\n"
        f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def raise_open_files() -> None:
    """Allow this process and its children as many open files as the host lets them have."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
