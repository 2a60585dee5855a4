"""A service that streams, and that has one of six kinds of trouble when a line on stdin names it; an empty one ends it.

`python -m benchmarks.health.service ADDRESS` prints its URL when it serves. A thread for each connection: the load is
small, and what is the matter must not be the loop.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import resource
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Final

from benchmarks.common import frames

MODEL: Final = "patient"
FRAMES: Final = 23
GAP_S: Final = 0.01
FIRST_S: Final = 0.05
SLOW_FIRST_S: Final = 0.5
LEAK_PER_S: Final = 71
LEAKED_KIND: Final = "device"
LEAKED_NAME: Final = "/dev/null"
MEMORY_PER_S: Final = 53 << 20
MOST_MEMORY: Final = 1 << 30
_HEAD: Final = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ncache-control: no-cache\r\n"
    b"connection: close\r\n\r\n"
)


class Service:
    """Serves on `listener` until it is killed."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self._ill = threading.Event()
        self._first_s = FIRST_S
        self._troubles: dict[str, Callable[[], None]] = {
            "cpu": self._burn,
            "memory": self._grow,
            "descriptors": self._leak,
            "ttft": self._dawdle,
        }

    def run(self) -> None:
        """Serve."""
        threading.Thread(target=self._obey, daemon=True).start()
        while True:
            connected, _ = self._listener.accept()
            threading.Thread(target=self._serve, args=(connected,), daemon=True).start()

    def _serve(self, connected: socket.socket) -> None:
        with connected, contextlib.suppress(OSError):
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            received = b""
            while not received.endswith(b"}"):
                received += connected.recv(1 << 16)
            time.sleep(self._first_s)
            connected.sendall(_HEAD)
            for _ in range(FRAMES):
                connected.sendall(frames.frame(MODEL, {"content": "a word "}))
                time.sleep(GAP_S)
            connected.sendall(frames.usage(MODEL, FRAMES) + frames.DONE)

    def _obey(self) -> None:
        for line in sys.stdin:
            self._ill.clear()
            trouble = self._troubles.get(line.strip())
            if trouble is not None:
                self._ill.set()
                threading.Thread(target=trouble, daemon=True).start()

    def _burn(self) -> None:
        data = bytes(1 << 22)
        while self._ill.is_set():
            hashlib.sha256(data)  # without the interpreter's lock: nobody waits for it

    def _grow(self) -> None:
        kept: list[bytes] = []
        while self._ill.is_set():
            if len(kept) * (MEMORY_PER_S // 10) < MOST_MEMORY:
                kept.append(b"\1" * (MEMORY_PER_S // 10))
            time.sleep(0.1)

    def _leak(self) -> None:
        kept: list[int] = []
        while self._ill.is_set():
            kept.append(os.open(LEAKED_NAME, os.O_RDONLY | os.O_CLOEXEC))
            time.sleep(1 / LEAK_PER_S)
        for fd in kept:
            os.close(fd)

    def _dawdle(self) -> None:
        self._first_s = SLOW_FIRST_S
        while self._ill.is_set():
            time.sleep(0.05)
        self._first_s = FIRST_S


def main() -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    with socket.create_server((sys.argv[1], 0), backlog=512) as listener:
        print(f"http://{sys.argv[1]}:{listener.getsockname()[1]}", flush=True)
        Service(listener).run()


if __name__ == "__main__":
    main()
