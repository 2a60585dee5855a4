"""The unprivileged half of the agent: drains the rings, decodes what strangers sent, aggregates, and runs the front.

It is forked by the attacher, maps the rings, gives up every privilege and only then looks at the first byte. One loop,
one thread: the rings are drained between answers to scrapes, and the kernel keeps the records meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import signal
import socket
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

import msgspec
import uvicorn

from exporter.config import Address
from exporter.metrics import Metrics
from exporter.requests import Conversations
from exporter.slis import Slis
from exporter.status import AgentStatus, Loss, ProbeLosses, ReaderStatus
from exporter.web import create_app
from probes import privileges
from probes.records import RequestRecords

if TYPE_CHECKING:
    from exporter.parting import Inheritance

BUSY_S: Final = 0.02
"""Pause between two looks at the rings while there is something in them."""
IDLE_S: Final = 0.05
"""The same while there is nothing."""
TICK_S: Final = 0.25
_MAX_STATUS_BYTES: Final = 1 << 20


class _Server(uvicorn.Server):
    """uvicorn without its own signal handlers: the reader's loop has them."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Reader:
    """What the fronts see, and the loop that drives everything."""

    def __init__(self, given: Inheritance, records: RequestRecords) -> None:
        self.config = given.config
        self.status: AgentStatus | None = None
        self.address: Address | None = None
        if given.listener is not None:
            host, port = given.listener.getsockname()[:2]
            self.address = Address(host, port)
        limits = given.config.limits
        self.slis = Slis(given.config.label_names, limits.models_per_service)
        self._front = given.front
        self._records = records
        self._skipped = records.skip_all() if given.resumes else 0
        self._conversations = Conversations(
            given.config.services, given.config.label_names, self.slis, given.front.finished, limits.connections
        )
        self.metrics = Metrics(self.slis, lambda: self.status, self._own_status)
        self._status_socket = given.status_socket
        self._listener = given.listener
        self._stopping = asyncio.Event()

    def stop(self) -> None:
        """End the agent in good order, with exit status 0, soon after this call."""
        self._stopping.set()

    async def run(self) -> None:
        """Drain, decode and serve until `stop`, SIGTERM, SIGINT, or the attacher's end of the socket closes."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self.stop)
        self._status_socket.setblocking(False)
        loop.add_reader(self._status_socket.fileno(), self._take_status)
        async with asyncio.TaskGroup() as tasks:
            server = self._start_server(tasks)
            tasks.create_task(self._tick())
            self._front.started(self)
            await self._drain()
            if server is not None:
                server.should_exit = True
        self._front.stopped(self)

    def _start_server(self, tasks: asyncio.TaskGroup) -> _Server | None:
        if self._listener is None:
            return None
        app = create_app(self.metrics, lambda: self.status)
        server = _Server(
            uvicorn.Config(
                app,
                http="h11",
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                date_header=False,
                timeout_keep_alive=75,
                timeout_graceful_shutdown=1,
                limit_concurrency=64,
            )
        )
        tasks.create_task(server.serve(sockets=[self._listener]))
        return server

    async def _drain(self) -> None:
        while not self._stopping.is_set():
            busy = self._records.drain(self._conversations)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), BUSY_S if busy else IDLE_S)
        self._records.drain(self._conversations)

    async def _tick(self) -> None:
        while not self._stopping.is_set():
            now_ns = time.monotonic_ns()
            self._conversations.sweep(now_ns)
            self.slis.tick(now_ns)
            self._front.tick(self)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), TICK_S)

    def _take_status(self) -> None:
        try:
            packet = self._status_socket.recv(_MAX_STATUS_BYTES)
        except BlockingIOError:
            return
        if not packet:
            self.stop()
            return
        self.status = msgspec.json.decode(packet, type=AgentStatus)

    def _own_status(self) -> ReaderStatus:
        losses = (ProbeLosses("requests", (Loss("reader_restart", self._skipped),)),)
        return ReaderStatus(len(self._conversations), losses)


def main(given: Inheritance) -> None:
    """Be the reader until it ends. Raises HostError when a ring cannot be mapped or privileges cannot be given up."""
    with RequestRecords(given.channels) as records:
        keep = [*given.channels.fds, given.status_socket.fileno()]
        if given.listener is not None:
            keep.append(given.listener.fileno())
        given.status_socket.shutdown(socket.SHUT_WR)
        privileges.drop_to_nobody(keep, given.attacher)
        asyncio.run(_run(given, records))


async def _run(given: Inheritance, records: RequestRecords) -> None:
    reader = Reader(given, records)
    # What exists now lives as long as the process: the collector need not look at it again.
    gc.collect()
    gc.freeze()
    await reader.run()
