"""A streaming chat server whose requests say what goes on before and between their tokens: an event loop and workers.

The loop reads requests, starts what is asked for and sends; the steps run in worker threads, as in servers that call
blocking code from coroutines. Each response ends with an SSE comment that says, on the server's own clock, when each of
its steps began and ended.

`python -m benchmarks.faults.service` prints its URL. A background thread of it does what stdin says, one JSON object a
line, and prints what it did: see `Order`. It ends with SIGTERM.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import mmap
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, Literal

import click
import msgspec

from benchmarks.common import frames
from benchmarks.common.processes import end_with_parent

DONE: Final = b": done "
"""Begins the comment with what was done: a JSON list of (step, began ns, ended ns)."""
READ_BLOCK: Final = 16384
HEAD: Final = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ncache-control: no-cache\r\n"
    b"connection: close\r\ntransfer-encoding: chunked\r\n\r\n"
)
_LENGTH: Final = b"content-length: "
_WORKERS: Final = 3
_EXPONENT: Final = 200_000
_PR_SET_NAME: Final = 15


class Step(msgspec.Struct, frozen=True):
    """What a request wants done. `amount` is in seconds, or bytes for `read` and `pages`.

    In a worker: `sleep`, `burn` (CPU time), `lock` (take the lock that the background thread may hold, and give it
    back), `read` (with O_DIRECT), `pages` (write a file through the page cache). `upstream` asks the other server to
    take `amount`. `block` burns CPU time on the event loop itself.
    """

    do: Literal["sleep", "burn", "lock", "read", "pages", "upstream", "block"]
    amount: float = 0.0


class Script(msgspec.Struct, frozen=True):
    """`steps` come before the first frame with content; `between` before each of the others."""

    steps: list[Step]
    frames: int = 3
    frame_bytes: int = 8
    between: list[Step] = []


class Ask(msgspec.Struct, frozen=True):
    """A request, as far as it matters here."""

    model: str
    script: Script


class Order(msgspec.Struct, frozen=True):
    """What the background thread shall do: `hold` the lock, asleep; `hog` the GIL in one call that never lets it go.

    It prints `{"began": ns}` once it does, and `{"ended": ns}` afterwards.
    """

    do: Literal["hold", "hog"]
    seconds: float


class Work:
    """The blocking steps. Called in workers."""

    def __init__(self, file: Path | None) -> None:
        self.lock: Final = threading.Lock()
        self._file: Final = file

    def burn(self, seconds: float) -> None:
        """Use up CPU time."""
        end = time.thread_time() + seconds
        while time.thread_time() < end:
            pass

    def take_lock(self, _: float) -> None:
        """Wait for the lock."""
        with self.lock:
            pass

    def read(self, size: float) -> None:
        """Read `size` bytes from the disk, one block after the other."""
        assert self._file is not None
        descriptor = os.open(self._file, os.O_RDONLY | os.O_DIRECT)
        try:
            with mmap.mmap(-1, READ_BLOCK) as block:  # aligned, as O_DIRECT wants it
                for offset in range(0, int(size), READ_BLOCK):
                    if os.preadv(descriptor, [block], offset) != READ_BLOCK:
                        raise EOFError(self._file)
        finally:
            os.close(descriptor)

    def pages(self, size: float) -> None:
        """Write `size` bytes into the page cache, over what the file has."""
        assert self._file is not None
        block = b"\xa5" * (1 << 20)
        descriptor = os.open(self._file, os.O_WRONLY)
        try:
            for offset in range(0, int(size), len(block)):
                os.pwrite(descriptor, block, offset)
        finally:
            os.close(descriptor)


class Service:
    """Serves on `listener`; the other server is on 127.0.0.1:`upstream`."""

    def __init__(self, listener: socket.socket, work: Work, upstream: int) -> None:
        self._listener = listener
        self._work = work
        self._upstream = upstream
        self._workers = ThreadPoolExecutor(_WORKERS, initializer=lambda: name_thread("worker"))
        self._blocking: dict[str, Callable[[float], None]] = {
            "sleep": time.sleep,
            "burn": work.burn,
            "lock": work.take_lock,
            "read": work.read,
            "pages": work.pages,
        }
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Serve until the process ends."""
        loop = asyncio.get_running_loop()
        self._listener.setblocking(False)
        while True:
            connected, _ = await loop.sock_accept(self._listener)
            task = loop.create_task(self._serve(connected))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _serve(self, connected: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        with connected:
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            ask = await received_request(loop, connected)
            if ask is None:
                return
            script = ask.script
            done: list[tuple[str, int, int]] = []

            async def send(data: bytes) -> None:
                await loop.sock_sendall(connected, data)

            await send(HEAD + chunk(frames.frame(ask.model, {"role": "assistant", "content": ""})))
            content = chunk(frames.frame(ask.model, {"content": "w" * script.frame_bytes}))
            for number in range(script.frames):
                for step in script.between if number else script.steps:
                    done.append(await self._do(loop, step))
                # the first one is short, so that it is there when it is sent
                frame = content if number else chunk(frames.frame(ask.model, {"content": "word"}))
                began_ns = time.monotonic_ns()
                await send(frame)
                done.append(("send", began_ns, time.monotonic_ns()))
            await send(chunk(frames.usage(ask.model, script.frames)))
            await send(chunk(DONE + json.dumps(done).encode() + b"\n\n"))
            await send(chunk(frames.DONE) + b"0\r\n\r\n")

    async def _do(self, loop: asyncio.AbstractEventLoop, step: Step) -> tuple[str, int, int]:
        if step.do == "upstream":
            return step.do, *await self._ask_upstream(loop, step.amount)
        if step.do == "block":
            began_ns = time.monotonic_ns()
            self._work.burn(step.amount)
            return step.do, began_ns, time.monotonic_ns()
        blocking = self._blocking[step.do]

        def timed() -> tuple[str, int, int]:
            began_ns = time.monotonic_ns()
            blocking(step.amount)
            return step.do, began_ns, time.monotonic_ns()

        return await loop.run_in_executor(self._workers, timed)

    async def _ask_upstream(self, loop: asyncio.AbstractEventLoop, seconds: float) -> tuple[int, int]:
        """Ask the other server; return when it got the request and when it answered, as it says."""
        with socket.socket() as connection:
            connection.setblocking(False)
            await loop.sock_connect(connection, ("127.0.0.1", self._upstream))
            await loop.sock_sendall(connection, b"GET /%f HTTP/1.0\r\n\r\n" % seconds)
            answer = b""
            while data := await loop.sock_recv(connection, 4096):
                answer += data
        began_ns, ended_ns = json.loads(answer.partition(b"\r\n\r\n")[2])
        return began_ns, ended_ns


async def received_request(loop: asyncio.AbstractEventLoop, connected: socket.socket) -> Ask | None:
    """Receive a request; None when the client closes before it is complete. All but a POST is answered here."""
    received = b""
    while True:
        data = await loop.sock_recv(connected, 1 << 16)
        if not data:
            return None
        received += data
        head, separator, body = received.partition(b"\r\n\r\n")
        if separator and not head.startswith(b"POST "):
            received = b""
            await loop.sock_sendall(connected, frames.NOT_FOUND)
        elif separator and len(body) >= int(head.partition(_LENGTH)[2].split(b"\r\n")[0]):
            return msgspec.json.decode(body, type=Ask)


def chunk(data: bytes) -> bytes:
    """Return a chunk of a chunked response."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def name_thread(name: str) -> None:
    """Name the calling thread; the kernel keeps 15 bytes."""
    ctypes.CDLL(None).prctl(_PR_SET_NAME, name.encode())


def ignore_interrupt() -> None:
    """Leave Ctrl-C, which goes to all processes of a terminal, to the benchmark: it ends what it started."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def background(work: Work) -> None:
    """Do what stdin says until it is closed."""
    name_thread("background")
    # the least of several: a neighbour on the same core makes it slower
    takes_s = min(_power(_EXPONENT) for _ in range(5))
    for line in sys.stdin.buffer:
        order = msgspec.json.decode(line, type=Order)
        if order.do == "hold":
            with work.lock:
                _say(began=time.monotonic_ns())
                time.sleep(order.seconds)
                ended_ns = time.monotonic_ns()
            _say(ended=ended_ns)
        else:
            # Karatsuba: the time grows with the exponent's power of 1.585
            exponent = round(_EXPONENT * (order.seconds / takes_s) ** (1 / 1.585))
            _say(began=time.monotonic_ns())
            _power(exponent)
            _say(ended=time.monotonic_ns())


def _power(exponent: int) -> float:
    """Make one call into C that holds the GIL for as long as it takes; return how much CPU time."""
    began = time.thread_time()
    _ = pow(3, exponent)
    return time.thread_time() - began


def _say(**said: Any) -> None:  # noqa: ANN401 - JSON
    os.write(1, json.dumps(said).encode() + b"\n")


@click.command(help=__doc__)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--file", type=click.Path(path_type=Path), help="What `read` reads and `pages` writes.")
@click.option("--upstream", default=0, show_default=True, help="Port of the other server.")
@click.option("--send-buffer", default=0, show_default=True, help="SO_SNDBUF of connections; 0: the kernel's choice.")
def main(host: str, file: Path | None, upstream: int, send_buffer: int) -> None:
    ignore_interrupt()
    end_with_parent()
    name_thread("loop")
    work = Work(file)
    with socket.create_server((host, 0), backlog=128) as listener:
        if send_buffer:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
        threading.Thread(target=background, args=(work,), daemon=True).start()
        os.write(1, f"http://{host}:{listener.getsockname()[1]}\n".encode())
        asyncio.run(Service(listener, work, upstream).run())


if __name__ == "__main__":
    main()
