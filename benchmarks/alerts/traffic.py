"""Requests to scripted services at a pace that nothing slows down: one thread, non-blocking sockets."""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
import time
from collections.abc import Sequence
from typing import Final

from benchmarks.common.scripts import scripted

_RECV_BYTES: Final = 1 << 16
_LONGEST_SLEEP_S: Final = 0.01
_PATIENCE_S: Final = 5.0


class Load:
    """Sends a request to each model `rate` times a second while the context lasts.

    The service is asked to take `wait_s` for the first token and `gaps_s` for the others.
    """

    def __init__(
        self, port: int, models: Sequence[str], rate: float, wait_s: float, gaps_s: Sequence[float] = (0.02, 0.02)
    ) -> None:
        self.first_slow_ns: int | None = None
        self.sent = 0
        self._wait_s = wait_s
        self._slow_s: float | None = None
        self._port = port
        self._models = models
        self._rate = rate
        self._gaps_s = gaps_s
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        self._thread.join()

    def slow_down(self, wait_s: float) -> None:
        """From now on each request takes so long to its first token. `first_slow_ns` is when the first one was sent."""
        self._slow_s = wait_s

    def go_on(self, port: int) -> None:
        """From now on ask the service at this port, and to take `wait_s` again."""
        self._slow_s = None
        self._port = port

    def _run(self) -> None:
        selector = selectors.DefaultSelector()
        due = time.monotonic()
        turn = 0
        while not self._ending.is_set():
            now = time.monotonic()
            if now >= due:
                due += 1 / (self._rate * len(self._models))
                with contextlib.suppress(OSError):  # it has died: that is what may be tried here
                    selector.register(self._ask(self._models[turn % len(self._models)]), selectors.EVENT_READ)
                turn += 1
                continue
            for key, _ in selector.select(min(_LONGEST_SLEEP_S, due - now)):
                _read(selector, key.fileobj)
        # What was asked for is heard to its end: the service takes a client that leaves for a fault of its own.
        deadline = time.monotonic() + _PATIENCE_S
        while selector.get_map() and time.monotonic() < deadline:
            for key, _ in selector.select(_LONGEST_SLEEP_S):
                _read(selector, key.fileobj)
        for key in list(selector.get_map().values()):
            _close(selector, key.fileobj)
        selector.close()

    def _ask(self, model: str) -> socket.socket:
        slow_s = self._slow_s
        ask = scripted(model, self._wait_s if slow_s is None else slow_s, self._gaps_s)
        connection = socket.create_connection(("127.0.0.1", self._port), timeout=1)
        at_ns = time.monotonic_ns()
        connection.sendall(ask)
        connection.setblocking(False)
        if slow_s is not None and self.first_slow_ns is None:
            self.first_slow_ns = at_ns
        self.sent += 1
        return connection


def _read(selector: selectors.BaseSelector, connection: object) -> None:
    assert isinstance(connection, socket.socket)
    try:
        data = connection.recv(_RECV_BYTES)
    except BlockingIOError:
        return
    except OSError:
        data = b""
    if not data or data.endswith(b"0\r\n\r\n"):
        _close(selector, connection)


def _close(selector: selectors.BaseSelector, connection: object) -> None:
    assert isinstance(connection, socket.socket)
    selector.unregister(connection)
    connection.close()
