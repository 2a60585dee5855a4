"""The unprivileged half of the agent: drains the rings, decodes what strangers sent, aggregates, and runs the front.

It is forked by the attacher, maps the rings, gives up every privilege and only then looks at the first byte. One loop,
one thread: the rings are drained between answers to scrapes, and the kernel keeps the records meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Final

import msgspec
import uvicorn

from exporter.config import Address, Config
from exporter.fast_path import FastPath
from exporter.fronts import gpu_object
from exporter.health_watch import LEAK, Health
from exporter.history import History
from exporter.live import Live, Parts, objective_object
from exporter.machine import engine_rows, gpu_rows
from exporter.metrics import Metrics, Sources
from exporter.objectives import Objectives, bounds
from exporter.outside import Outside
from exporter.parting import CONFIG_PACKET
from exporter.paths import Paths
from exporter.recorder import Recorder
from exporter.recordings import WINDOW_S, RecordingFolder
from exporter.reloading import MAX_ENCODED_BYTES, Changed, is_gone
from exporter.requests import Conversations
from exporter.slis import Slis
from exporter.slo.status import SloStatus
from exporter.status import AgentStatus, Loss, ProbeLosses, ReaderStatus
from exporter.trace_event import write
from exporter.web import create_app, rehearse
from exporter.why import encode
from probes import privileges
from probes.errors import FootlightError
from probes.points_table import PointsTable
from probes.records import RequestRecords
from probes.service_stats import ServiceStats
from probes.streams import Streams

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

    from exporter.machine import EngineRow, GpuRow
    from exporter.parting import Inheritance
    from exporter.request import FinishedRequest
    from exporter.slis import Series, Sli
    from exporter.trace_event import Recording
    from exporter.web_config import WebConfig
    from exporter.why import Explained

log = logging.getLogger("footlight")

SHORTEST_PAUSE_S: Final = 0.05
"""Between two looks at the rings while there is little in them: nobody reads a table faster."""
LONGEST_PAUSE_S: Final = 0.25
"""The same at the most: the rings of the default limits hold what 100,000 frames a second leave in that time."""
TICK_S: Final = 0.25
RECORDER_SHARE: Final = 0.12
"""Part of the memory limit that the last minute's scheduling, TCP and block events may take."""
RELOAD_S: Final = 5.0
"""How long whoever asks for a reload waits for its outcome."""
_MAX_PACKET_BYTES: Final = 2 * MAX_ENCODED_BYTES


class _Server(uvicorn.Server):
    """uvicorn without its own signal handlers: the reader's loop has them."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Reader:
    """What the fronts see, and the loop that drives everything."""

    def __init__(
        self,
        given: Inheritance,
        records: RequestRecords,
        streams: Streams,
        counters: Sequence[ServiceStats],
        points: PointsTable | None,
    ) -> None:
        self.config = given.config
        self.status: AgentStatus | None = None
        self.address: Address | None = None
        if given.listener is not None:
            host, port = given.listener.getsockname()[:2]
            self.address = Address(host, port)
        limits = given.config.limits
        self.slis = Slis(given.config.label_names, limits.models_per_service, bounds(given.config.slos))
        self._services = _by_place(given.config, given.room)
        self._reloads = given.reloads
        self._status_came = asyncio.Event()
        self._front = given.front
        self._records = records
        self._streams = streams
        self._skipped: Counter[str] = Counter()
        if given.resumes:
            probe_of = {channel.name: channel.probe for channel in given.channels}
            self._skipped["requests"] = records.skip_all()
            for stream, count in streams.skip_all().items():
                self._skipped[probe_of[stream]] += count
        self._probes = {channel.probe for channel in given.channels}
        self._objectives = Objectives(given.config.slos, self.slis)
        self._standing = SloStatus(given.config.slos, self.slis)
        self.recorder: Recorder | None = None
        self.paths: Paths | None = None
        if "intervals" in streams.dtypes:
            self.recorder = Recorder(
                streams.dtypes, round(limits.memory * RECORDER_SHARE), self._services
            )
            self.paths = Paths(
                self.recorder.timeline,
                self._finished,
                self._explained,
                self._threshold,
                limits.cpu,
            )
            self.slis.explains = True
            if given.resumes:
                self.recorder.note_all_lost()
        self._conversations = Conversations(
            given.config.services,
            given.config.label_names,
            self.slis,
            self._finished if self.paths is None else self.paths.finished,
            limits.connections,
            None if self.paths is None else self.paths.first_token,
        )
        self._fast_path = FastPath(given.config, self.slis, self._conversations.under_way)
        self._health = Health(self.slis, self._services, given.health)
        self._kernel = lambda: {each.probe: each.totals() for each in counters}
        outside = self._outside = Outside(given.config, self._services, points, resumes=given.resumes)
        self.metrics = Metrics(
            self.slis,
            Sources(
                lambda: self.status,
                self._own_status,
                self._kernel,
                outside.gpus,
                lambda: outside.engines,
                outside.points,
                self._fast_path.report,
                lambda: self._health,
            ),
            self._services,
            self._standing,
        )
        self._history = History(self.slis)
        self.live = Live(
            Parts(
                self.slis,
                self._history,
                lambda: self.status,
                self._own_status,
                self.metrics.version,
                None if self.paths is None else self.paths.recent,
                objectives=lambda: [
                    objective_object(row) for row in self._standing.standings(time.monotonic_ns())
                ],
                gpus=lambda: [gpu_object(row) for row in self.gpus],
                engines=lambda: [asdict(row) for row in self.engines],
                health=self._health.told,
            )
        )
        self._folder: RecordingFolder | None = None
        if given.recordings is not None:
            kept = given.config.recorder
            self._folder = RecordingFolder(given.recordings, keep_files=kept.files, keep_bytes=kept.size)
        self._recordings: set[asyncio.Task[None]] = set()
        self._status_socket = given.status_socket
        self._listener = given.listener
        self._cpu_limit = limits.cpu
        self._ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @property
    def gpus(self) -> Sequence[GpuRow]:
        """The GPUs of this host, as far as anybody looks."""
        report = self._outside.gpus()
        return () if report is None else gpu_rows(report)

    @property
    def engines(self) -> Sequence[EngineRow]:
        """What the engines of the services tell."""
        return engine_rows(self._outside.engines)

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
        loop.add_reader(self._status_socket.fileno(), self._take_packets)
        async with asyncio.TaskGroup() as tasks:
            server = self._start_server(tasks)
            self._outside.start()
            self._fast_path.start()
            self._front.started(self)
            self._drain()
            self._tick()
            try:
                await self._ended
            finally:
                if server is not None:
                    server.should_exit = True
        self._outside.stop()
        self._health.save()
        self._fast_path.stop()
        self._catch_up()
        self._front.stopped(self)

    def _drain_all(self) -> None:
        """Requests first: what their paths need was made before, so it comes with the streams after."""
        self._take_packets()  # a record of a new service comes after the configuration that names it
        self._records.drain(self._conversations)
        if self.recorder is None:
            self._streams.skip_all()  # nobody needs them, and a full ring would count as loss
            return
        self._streams.drain(self.recorder.add)

    def _threshold(self, series: Series, sli: Sli) -> float | None:
        return self._objectives.threshold(series, sli)

    def _finished(self, request: FinishedRequest) -> None:
        if self.recorder is not None:
            self.recorder.finished(request)
        self._front.finished(request)

    def _explained(self, explained: Explained) -> None:
        if self.recorder is not None:
            self.recorder.explained(explained)
        self._front.explained(explained)

    def recording(self, since_ns: int, reason: str) -> Recording:
        """All that was kept from that instant on. Raises FootlightError where nothing was."""
        if self.recorder is None:
            raise FootlightError("nothing was recorded: the scheduler probe is not up", "footlight check")
        losses = {
            f"{probe.name} {loss.reason}": loss.count
            for probe in (self.status.probes if self.status else ())
            for loss in probe.losses
            if loss.count
        }
        return self.recorder.recording(since_ns, reason, losses)

    def _catch_up(self) -> None:
        """Make what is told now be all that is known: a round comes only four times a second."""
        self._drain_all()
        if self.paths is not None:
            self.paths.round(time.monotonic_ns())

    def _record(self, seconds: float) -> Iterator[bytes]:
        self._catch_up()
        return write(self.recording(time.monotonic_ns() - round(seconds * 1e9), "asked"))

    def _why(self) -> Iterator[bytes]:
        """What is known of the requests of the last minutes that have a path, as JSON lines."""
        self._catch_up()
        offset_ns = time.time_ns() - time.monotonic_ns()
        labels = self.slis.label_names
        for explained in self.paths.recent() if self.paths else ():
            told = encode(explained, explained.request.finished_ns + offset_ns, labels)
            yield msgspec.json.encode(told) + b"\n"

    async def _keep_recording(self, reason: str) -> None:
        """Write the last minute to the folder: an objective does not hold any more, or descriptors leak."""
        assert self._folder is not None
        try:
            with self._folder.create(reason) as (name, file):
                recording = self.recording(time.monotonic_ns() - WINDOW_S * 10**9, reason)
                for piece in write(recording):
                    file.write(piece)
                    await asyncio.sleep(0)
        except OSError as error:
            log.warning("no recording of %s: %s", reason, error)
            return
        log.warning("%s is recorded as %s", reason, name)

    def _watch_objectives(self, now_ns: int) -> None:
        for crossing in self._objectives.crossed(now_ns):
            log.warning("%s", crossing)
            self._start_recording(crossing.slo.name)

    def _watch_health(self, now_ns: int) -> None:
        if any(event.leak is not None for event in self._health.tick(now_ns, self.status, self._kernel)):
            self._start_recording(LEAK)

    def _start_recording(self, reason: str) -> None:
        """Record where a folder is configured, unless that was done a short while ago."""
        if self._folder is not None and self.recorder is not None and self._folder.may_record():
            task = asyncio.get_running_loop().create_task(self._keep_recording(reason))
            self._recordings.add(task)
            task.add_done_callback(self._recordings.discard)

    def _start_server(self, tasks: asyncio.TaskGroup) -> _Server | None:
        if self._listener is None:
            return None
        logging.getLogger("uvicorn").setLevel(logging.WARNING)
        app = create_app(
            self.metrics,
            self.live,
            lambda: self.status,
            why=None if self.paths is None else self._why,
            record=None if self.recorder is None else self._record,
            reload=self._reload,
        )
        server = _Server(_http(_guarded(app, self.config.web), self.config.web))
        tasks.create_task(server.serve(sockets=[self._listener]))
        return server

    def _drain(self) -> None:
        """Look at the rings, and again after a pause that keeps the looking below `limits.cpu`.

        Fewer looks find more records each, which costs less in all; no record is ever passed over to save time.
        """
        began = time.process_time()
        with self._failing():
            self._drain_all()
        pause = (time.process_time() - began) / self._cpu_limit
        self._call_later(min(max(pause, SHORTEST_PAUSE_S), LONGEST_PAUSE_S), self._drain)

    def _tick(self) -> None:
        now_ns = time.monotonic_ns()
        with self._failing():
            if self._fast_path.is_on:
                self._drain_all()  # what nobody has looked at yet must not pass for late
            self._conversations.sweep(now_ns)
            self._fast_path.tick(self.status, now_ns)
            if self.paths is not None:
                self.paths.round(now_ns)
            if self._outside.has_news():
                self._drain_all()
            self._outside.tick(self.config, self.status, self.slis, now_ns)
            self.slis.tick(now_ns)
            self._history.tick(now_ns)
            self._standing.tick(now_ns)
            self._watch_objectives(now_ns)
            self._watch_health(now_ns)
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

    def _take_packets(self) -> None:
        """Take what the attacher sent, in its order."""
        while True:
            try:
                packet = self._status_socket.recv(_MAX_PACKET_BYTES)
            except BlockingIOError:
                return
            if not packet:
                self.stop()
                return
            if packet[:1] == CONFIG_PACKET:
                self._reconfigure(msgspec.json.decode(packet[1:], type=Changed))
                continue
            told = msgspec.json.decode(packet[1:], type=AgentStatus)
            before, self.status = self.status, replace(told, probes=(*told.probes, *self._outside.probes()))
            if self.recorder is not None:
                self.recorder.note_losses(before, self.status)
            self._status_came.set()
            self._status_came.clear()

    def _reconfigure(self, new: Changed) -> None:
        """Go on with another configuration. Requests under way are followed to their end."""
        config = self.config = msgspec.structs.replace(
            self.config, services=new.services, slos=new.slos, alertmanagers=new.alertmanagers
        )
        self.slis.add_bounds(bounds(config.slos))
        self._objectives.reconfigure(config.slos)
        self._standing.reconfigure(config.slos)
        self._conversations.reconfigure(config.services)
        self._fast_path.reconfigure(config)
        self._services[:] = _by_place(config, len(self._services))
        self.metrics.rebuild()

    async def _reload(self) -> str | None:
        """Have the configuration read again; returns why the old one stays, None where it does not."""
        if self._reloads is None:
            return "the targets were named by options, not by --config: there is nothing to read again"
        before = self._reload_attempts()
        with contextlib.suppress(BlockingIOError):
            os.write(self._reloads, b"r")
        try:
            async with asyncio.timeout(RELOAD_S):
                while self._reload_attempts() == before:
                    await self._status_came.wait()
        except TimeoutError:
            return f"the attacher did not answer within {RELOAD_S:g} s"
        assert self.status is not None
        assert self.status.reload is not None
        return self.status.reload.problem or None

    def _reload_attempts(self) -> int:
        return self.status.reload.attempts if self.status and self.status.reload else 0

    def _own_status(self) -> ReaderStatus:
        losses = tuple(
            ProbeLosses(probe, (Loss("reader_restart", self._skipped[probe]),)) for probe in sorted(self._probes)
        )
        if self.paths is None:
            return ReaderStatus(len(self._conversations), losses)
        return ReaderStatus(len(self._conversations), losses, self.paths.walked, self.paths.spent_ns)


def main(given: Inheritance) -> None:
    """Be the reader until it ends. Raises HostError when a ring cannot be mapped or privileges cannot be given up."""
    with (
        RequestRecords(given.channels) as records,
        Streams(channel for channel in given.channels if channel.probe != "requests") as streams,
    ):
        counters = [ServiceStats(each) for each in given.stats]
        points = None if given.points is None else PointsTable(given.points)
        keep = [given.status_socket.fileno()]
        if given.listener is not None:
            keep.append(given.listener.fileno())
        keep.extend(given.front.fds)
        if given.reloads is not None:
            keep.append(given.reloads)
        if given.recordings is not None:
            keep.append(given.recordings)
        if given.health is not None:
            keep.append(given.health)
        given.status_socket.shutdown(socket.SHUT_WR)
        _import_the_rest(given)
        privileges.drop_to_nobody(keep, given.attacher)
        asyncio.run(_run(given, records, streams, counters, points))


def _guarded(app: ASGIApp, web: WebConfig | None) -> ASGIApp:
    if web is None:
        return app
    from exporter.web_guard import Guard  # noqa: PLC0415 - bcrypt, which an agent without users need not hold

    return Guard(app, web)


def _http(app: ASGIApp, web: WebConfig | None) -> uvicorn.Config:
    config = uvicorn.Config(
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
    config.load()
    if web is not None:
        config.ssl = web.tls  # uvicorn would read certificates by itself, which nobody may not
    return config


def _import_the_rest(given: Inheritance) -> None:
    """Load what would else be read from files later: a checkout in /root is one that nobody may not look into."""
    import numpy.ma  # noqa: F401, PLC0415 - numpy's set functions look it up when they are first called

    Outside.prepare(given.config)
    if given.listener is not None:
        _http(_guarded(_answer_nothing, given.config.web), given.config.web)
        asyncio.run(rehearse())
    given.front.prepare()


def _by_place(config: Config, room: int) -> list[str]:
    """The names of the services by the index that the kernel uses; empty for a place that nobody has."""
    names = ["" if is_gone(service) else service.name for service in config.services]
    return names + [""] * (room - len(names))


async def _answer_nothing(_scope: Scope, _receive: Receive, _send: Send) -> None:
    """Stand in for the application while uvicorn finds its parts."""


async def _run(
    given: Inheritance,
    records: RequestRecords,
    streams: Streams,
    counters: Sequence[ServiceStats],
    points: PointsTable | None,
) -> None:
    reader = Reader(given, records, streams, counters, points)
    # What exists now lives as long as the process: the collector need not look at it again.
    gc.collect()
    gc.freeze()
    await reader.run()
