"""A service that plays its requests' scripts and costs as little as one in Python can: epoll, a heap, one send a frame.

With it 1,000 streams leave two CPUs room for the client and the agent. It is no HTTP server: it understands what the
benchmarks' client sends. `python -m benchmarks.common.light_service` prints its URL when it serves.
"""

from __future__ import annotations

import gc
import heapq
import itertools
import select
import socket
import time
from collections import deque
from typing import Final

import msgspec

from benchmarks.common import frames
from benchmarks.common.client import raise_open_files

_HEAD: Final = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ncache-control: no-cache\r\n"
    b"transfer-encoding: chunked\r\n\r\n"
)
_LENGTH: Final = b"content-length: "


class Script(msgspec.Struct):
    """Seconds until the first frame with content, and between the others."""

    first_s: float
    gaps_s: list[float]


class Ask(msgspec.Struct):
    """A request, as far as it matters here."""

    model: str
    script: Script


class Stream:
    """One connection: what it is still to be sent, and when."""

    __slots__ = ("due", "received", "socket")

    def __init__(self, connected: socket.socket) -> None:
        self.socket = connected
        self.received = b""
        self.due: deque[tuple[int, bytes]] = deque()


class Service:
    """Serves on `listener` until it is killed."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self._poll = select.epoll()
        self._poll.register(listener, select.EPOLLIN)
        self._streams: dict[int, Stream] = {}
        self._due: list[tuple[int, int, Stream]] = []
        self._serial = itertools.count()

    def run(self) -> None:
        """Serve."""
        while True:
            wait_s = -1.0 if not self._due else max(0.0, (self._due[0][0] - time.monotonic_ns()) / 1e9)
            for fd, _ in self._poll.poll(wait_s):
                if fd == self._listener.fileno():
                    self._accept()
                else:
                    self._read(fd)
            now = time.monotonic_ns()
            while self._due and self._due[0][0] <= now:
                self._send(heapq.heappop(self._due)[2])

    def _accept(self) -> None:
        connected, _ = self._listener.accept()
        connected.setblocking(False)
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._streams[connected.fileno()] = Stream(connected)
        self._poll.register(connected, select.EPOLLIN)

    def _read(self, fd: int) -> None:
        stream = self._streams[fd]
        data = stream.socket.recv(1 << 16)
        if not data:
            del self._streams[fd]
            stream.due.clear()
            stream.socket.close()
            return
        stream.received += data
        head, separator, body = stream.received.partition(b"\r\n\r\n")
        if separator and not head.startswith(b"POST "):
            stream.received = b""
            stream.socket.send(frames.NOT_FOUND)
            return
        if not separator or len(body) < int(head.partition(_LENGTH)[2].split(b"\r\n")[0]):
            return
        stream.received = b""
        self._plan(stream, msgspec.json.decode(body, type=Ask))

    def _plan(self, stream: Stream, ask: Ask) -> None:
        at_ns = time.monotonic_ns()
        stream.due.append((at_ns, _HEAD))
        stream.due.append((at_ns, _chunk(frames.frame(ask.model, {"role": "assistant", "content": ""}))))
        word = _chunk(frames.frame(ask.model, {"content": "a word "}))
        for wait_s in (ask.script.first_s, *ask.script.gaps_s):
            at_ns += round(wait_s * 1e9)
            stream.due.append((at_ns, word))
        tokens = len(ask.script.gaps_s) + 1
        stream.due.append((at_ns, _chunk(frames.frame(ask.model, {}) + frames.usage(ask.model, tokens))))
        stream.due.append((at_ns, _chunk(frames.DONE)))
        stream.due.append((at_ns, b"0\r\n\r\n"))
        self._wait(stream)

    def _send(self, stream: Stream) -> None:
        if not stream.due:
            return  # the client has gone
        _, data = stream.due.popleft()
        if stream.socket.send(data) != len(data):
            raise SystemExit("a client does not read: its socket's buffer is full")
        self._wait(stream)

    def _wait(self, stream: Stream) -> None:
        if stream.due:
            heapq.heappush(self._due, (stream.due[0][0], next(self._serial), stream))


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def main() -> None:
    raise_open_files()
    with socket.create_server(("127.0.0.1", 0), backlog=4096) as listener:
        print(f"http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
        gc.disable()  # nothing here is cyclic, and a collection with 1,000 streams is a pause
        Service(listener).run()


if __name__ == "__main__":
    main()
