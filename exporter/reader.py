"""The unprivileged half of the agent: drains the rings, decodes what strangers sent, aggregates, and runs the front.

It is forked by the attacher, maps the rings, gives up every privilege and only then looks at the first byte. One loop,
one thread: the rings are drained between answers to scrapes, and the kernel keeps the records meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import signal
import socket
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import TYPE_CHECKING, Final

import msgspec
import uvicorn

from exporter.config import Address
from exporter.metrics import Metrics, installed_version
from exporter.requests import Conversations
from exporter.slis import Slis
from exporter.status import AgentStatus, Loss, ProbeLosses, ReaderStatus
from exporter.web import create_app
from probes import privileges
from probes.records import RequestRecords

if TYPE_CHECKING:
    from exporter.parting import Inheritance

SHORTEST_PAUSE_S: Final = 0.05
"""Between two looks at the rings while there is little in them: nobody reads a table faster."""
LONGEST_PAUSE_S: Final = 0.25
"""The same at the most: the rings of the default limits hold what 100,000 frames a second leave in that time."""
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
        self._cpu_limit = limits.cpu
        self._ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def stop(self) -> None:
        """End the agent in good order, with exit status 0, soon after this call."""
        if not self._ended.done():
            self._ended.set_result(None)

    async def run(self) -> None:
        """Drain, decode and serve until `stop`, SIGTERM, SIGINT, or the attacher's end of the socket closes."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self.stop)
        self._status_socket.setblocking(False)
        loop.add_reader(self._status_socket.fileno(), self._take_status)
        async with asyncio.TaskGroup() as tasks:
            server = self._start_server(tasks)
            self._front.started(self)
            self._drain()
            self._tick()
            try:
                await self._ended
            finally:
                if server is not None:
                    server.should_exit = True
        self._records.drain(self._conversations)
        self._front.stopped(self)

    def _start_server(self, tasks: asyncio.TaskGroup) -> _Server | None:
        if self._listener is None:
            return None
        logging.getLogger("uvicorn").setLevel(logging.WARNING)
        server = _Server(_http(create_app(self.metrics, lambda: self.status)))
        tasks.create_task(server.serve(sockets=[self._listener]))
        return server

    def _drain(self) -> None:
        """Look at the rings, and again after a pause that keeps the looking below `limits.cpu`.

        Fewer looks find more records each, which costs less in all; no record is ever passed over to save time.
        """
        began = time.process_time()
        with self._failing():
            self._records.drain(self._conversations)
        pause = (time.process_time() - began) / self._cpu_limit
        self._call_later(min(max(pause, SHORTEST_PAUSE_S), LONGEST_PAUSE_S), self._drain)

    def _tick(self) -> None:
        now_ns = time.monotonic_ns()
        with self._failing():
            self._conversations.sweep(now_ns)
            self.slis.tick(now_ns)
            self._front.tick(self)
        self._call_later(TICK_S, self._tick)

    def _call_later(self, pause_s: float, call: Callable[[], None]) -> None:
        if not self._ended.done():
            asyncio.get_running_loop().call_later(pause_s, call)

    @contextlib.contextmanager
    def _failing(self) -> Iterator[None]:
        """Whatever goes wrong inside ends the reader, loudly: the loop would only log it and go on without data."""
        try:
            yield
        except Exception as error:
            if self._ended.done():
                raise
            self._ended.set_exception(error)

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
        _import_the_rest(given)
        privileges.drop_to_nobody(keep, given.attacher)
        asyncio.run(_run(given, records))


def _http(app: Callable[..., Awaitable[None]]) -> uvicorn.Config:
    return uvicorn.Config(
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


def _import_the_rest(given: Inheritance) -> None:
    """Load what would else be read from files later: a checkout in /root is one that nobody may not look into."""
    installed_version()
    if given.listener is not None:
        _http(_answer_nothing).load()
    given.front.prepare()


async def _answer_nothing(_scope: object, _receive: object, _send: object) -> None:
    """Stand in for the application while uvicorn finds its parts."""


async def _run(given: Inheritance, records: RequestRecords) -> None:
    reader = Reader(given, records)
    # What exists now lives as long as the process: the collector need not look at it again.
    gc.collect()
    gc.freeze()
    await reader.run()
