"""One request at a time, by the client's clock."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import click
import msgspec

from benchmarks.common.client import Heard, request
from benchmarks.common.scripts import TARGET
from benchmarks.common.transcript import Transcript, transcribe
from benchmarks.faults.service import DONE, Script

MODEL: Final = "scripted"
_END: Final = b"0\r\n\r\n"
_SILENCE_S: Final = 30.0
_LISTENS_S: Final = 5.0


@dataclass(frozen=True, slots=True)
class Asked:
    """A request and its response. `done` is what the server says that it did; `looks` are (ns, what `look` gave)."""

    transcript: Transcript
    done: tuple[tuple[str, int, int], ...]
    looks: tuple[tuple[int, int], ...]

    def window(self, phase: str) -> tuple[int, int]:
        """When the phase began and ended by the client's clock: `ttft` or `decode`."""
        content = self.transcript.content_ns
        return (self.transcript.sent_ns, content[0]) if phase == "ttft" else (content[0], content[-1])

    def window_ns(self, phase: str) -> int:
        """How long the phase was."""
        began, ended = self.window(phase)
        return ended - began

    def did_ns(self, step: str) -> int:
        """How long the server was at this step, in all."""
        return sum(ended - began for what, began, ended in self.done if what == step)


def connect(port: int) -> socket.socket:
    """Connect to a server on 127.0.0.1; it may print its URL a moment before it listens."""
    deadline = time.monotonic() + _LISTENS_S
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port), timeout=10.0)
        except ConnectionRefusedError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def send(connection: socket.socket, ask: bytes) -> Heard:
    """Send a request; return what will have its response."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.settimeout(_SILENCE_S)
    heard = Heard(0, 0, connection.getsockname()[1], time.monotonic_ns())
    if connection.send(ask) != len(ask):
        raise click.ClickException(f"a request of {len(ask)} bytes does not fit into a socket's buffer")
    return heard


def hear(connection: socket.socket, heard: Heard, look: Callable[[], int] | None = None) -> Asked:
    """Receive the response, and close. `look` is called before and after each piece of it.

    Raises click.ClickException for anything but a complete 200, and when nothing comes for half a minute.
    """
    looks = [(heard.sent_ns, look())] if look else []
    tail = b""
    with connection:
        while not tail.endswith(_END):
            try:
                data = connection.recv(1 << 18)
            except TimeoutError:
                raise click.ClickException(f"a response has stopped for {_SILENCE_S:.0f} s") from None
            heard.pieces.append((time.monotonic_ns(), data))
            if look:
                looks.append((heard.pieces[-1][0], look()))
            if not data or not heard.pieces[0][1].startswith(b"HTTP/1.1 200 "):
                raise click.ClickException(f"the service answers {heard.pieces[0][1][:300]!r}")
            tail = (tail + data)[-len(_END) :]
    raw = b"".join(data for _, data in heard.pieces)
    _, found, rest = raw.partition(DONE)
    done = json.loads(rest.partition(b"\n")[0]) if found else []
    return Asked(transcribe(heard), tuple((what, began, ended) for what, began, ended in done), tuple(looks))


def scripted(script: Script) -> bytes:
    """Return a request for a script."""
    body = {
        "model": MODEL,
        "stream": True,
        "messages": [{"role": "user", "content": "Say it as the script has it."}],
        "script": script,
    }
    return request(TARGET, msgspec.json.encode(body))
