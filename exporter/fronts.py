"""What the agent does with what it measures: serve it, show it as a live table, or print each request.

A front is made in the attacher and used in the reader, after the reader gave up its privileges. What only a
terminal needs is imported when it is used, so that neither process holds it without need.
"""

from __future__ import annotations

import codecs
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final, Protocol, TextIO

from exporter.labels import safe
from exporter.request import Capture, FinishedRequest
from exporter.status import AgentStatus, why_not_ready
from probes import privileges
from probes.errors import HostError

if TYPE_CHECKING:
    from exporter.cli.table import LiveTable
    from exporter.config import Address, Config
    from exporter.machine import EngineRow, GpuRow
    from exporter.slis import Row
    from exporter.why import Explained

log = logging.getLogger("footlight")

STOP_S: Final = 1.5
"""How long a front may take to end where nothing is to be written: HTTP clients get one second."""
TRACE_COLUMNS: Final = (
    f"{'TIME':<12}  {'SERVICE':<12}  {'MODEL':<22}  {'CODE':>4}  {'TTFT':>6}  {'ITL':>6}  {'STALL':>6}  "
    f"{'TOKENS':>11}  {'TOTAL':>6}  {'WHY':<26}  OUTCOME"
)


class Rows(Protocol):
    """What a live table asks of the SLIs."""

    @property
    def label_names(self) -> tuple[str, ...]:
        """The configured labels, in the order of a request's `extra` values."""

    def rows(self) -> Sequence[Row]:
        """One row per service, model and API, over the window."""


class Reader(Protocol):
    """What a front may ask of the reader that it runs in."""

    @property
    def slis(self) -> Rows:
        """The SLIs."""

    @property
    def status(self) -> AgentStatus | None:
        """What the attacher reported last."""

    @property
    def config(self) -> Config:
        """What the user asked for."""

    @property
    def address(self) -> Address | None:
        """Where /metrics is served; None where it is not."""

    @property
    def gpus(self) -> Sequence[GpuRow]:
        """The GPUs of this host, as far as anybody looks."""

    @property
    def engines(self) -> Sequence[EngineRow]:
        """What the engines of the services tell."""

    def stop(self) -> None:
        """End the agent in good order, with exit status 0, soon after this call."""


class Front(Protocol):
    """One way to hand out what is measured. Every call comes from the reader's loop and must return quickly."""

    serves: bool
    """Whether /metrics is to be served."""

    @property
    def fds(self) -> tuple[int, ...]:
        """Descriptors of the attacher that it needs in the reader."""

    @property
    def stop_s(self) -> float:
        """How long its end may take after a signal; then it is killed."""

    def prepare(self) -> None:
        """Import what will be needed: this is the reader, which gives up the right to read files after this call."""

    def started(self, reader: Reader) -> None:
        """The reader runs, without privileges; what `reader.status` says may not be there yet."""

    def finished(self, request: FinishedRequest) -> None:
        """A request is over."""

    def explained(self, explained: Explained) -> None:
        """The path of a request that was handed over before."""

    def tick(self, reader: Reader) -> None:
        """A quarter of a second went by."""

    def stopped(self, reader: Reader) -> None:
        """The agent ends; the last call."""


class Clock:
    """The clocks that fronts use: `monotonic_ns` is the kernel's instants' clock, `wall_ns` is since the epoch."""

    def monotonic_ns(self) -> int:
        """CLOCK_MONOTONIC in nanoseconds."""
        return time.monotonic_ns()

    def wall_ns(self) -> int:
        """CLOCK_REALTIME in nanoseconds."""
        return time.time_ns()


class ServeFront:
    """Serves /metrics and logs what a person who watches the log must know."""

    serves = True
    fds: tuple[int, ...] = ()
    stop_s: float = STOP_S

    def __init__(self, clock: Clock | None = None) -> None:
        self._clock: Final = clock or Clock()
        self._said: str | None = ""
        self._targets: dict[str, int] = {}
        self._lost: dict[tuple[str, str], int] = {}

    def prepare(self) -> None:
        """Nothing is missing."""

    def started(self, reader: Reader) -> None:
        """Log which privileges each process holds, and the address."""
        log.info("reader %d runs as %s", os.getpid(), privileges.describe())
        try:
            log.info("attacher %d runs as %s", os.getppid(), privileges.describe(os.getppid()))
        except HostError as error:  # /proc mounted with hidepid
            log.info("attacher %d: %s", os.getppid(), error.what)
        if reader.address is not None:
            log.info("serving %s://%s/metrics", reader.config.scheme, reader.address)

    def finished(self, request: FinishedRequest) -> None:
        """Log nothing: requests are counted."""

    def explained(self, explained: Explained) -> None:
        """Nothing: paths are for `why`."""

    def tick(self, reader: Reader) -> None:
        """Log what changed: readiness, processes followed, events lost."""
        status = reader.status
        if status is None:
            return
        why = why_not_ready(status, self._clock.monotonic_ns())
        if why != self._said:
            self._said = why
            names = ", ".join(probe.name for probe in status.probes if probe.up)
            if why is None:
                log.info("attached: %s; transport %s", names, status.transport)
            else:
                log.warning("not ready: %s", why)
        for target in status.targets:
            if self._targets.get(target.service, -1) != target.processes:
                self._targets[target.service] = target.processes
                level = logging.INFO if target.processes else logging.WARNING
                log.log(
                    level,
                    "%s: following %d process%s, %d port%s",
                    *(target.service, target.processes, "" if target.processes == 1 else "es"),
                    *(target.ports, "" if target.ports == 1 else "s"),
                )
        for probe in status.probes:
            for loss in probe.losses:
                more = loss.count - self._lost.get((probe.name, loss.reason), 0)
                if more > 0:
                    self._lost[(probe.name, loss.reason)] = loss.count
                    log.warning("%s: lost %d events: %s", probe.name, more, loss.reason)

    def stopped(self, reader: Reader) -> None:
        """Log the end."""
        log.info("stopped")


class TopFront:
    """Shows a live table of services and models; on a pipe prints it, or JSON lines, once an interval.

    It ends the agent after `count` tables or `duration_s` seconds, where given. `interval_s` is in seconds.
    """

    fds: tuple[int, ...] = ()
    stop_s: float = STOP_S

    def __init__(
        self,
        *,
        as_json: bool = False,
        interval_s: float = 1.0,
        count: int | None = None,
        duration_s: float | None = None,
        serves: bool = False,
        out: TextIO | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.serves = serves
        self._as_json: Final = as_json
        self._duration_ns: Final = None if duration_s is None else round(duration_s * 1e9)
        self._interval_ns: Final = round(interval_s * 1e9)
        self._count: Final = count
        self._out: Final = Output(out)
        self._clock: Final = clock or Clock()
        self._shown = 0
        self._next_ns = 0
        self._end_ns: int | None = None
        self._table: LiveTable | None = None

    def prepare(self) -> None:
        """Load what draws the table, the widths of all characters included."""
        prepare_output()
        if not self._as_json:
            from rich.cells import cell_len  # noqa: PLC0415 - rich is 2.7 MB that only a terminal needs

            import exporter.cli.table  # noqa: F401, PLC0415 - as above

            cell_len("\u4e16\u754c")

    def started(self, reader: Reader) -> None:
        """Take the terminal, where there is one."""
        now_ns = self._clock.monotonic_ns()
        self._next_ns = now_ns + (self._interval_ns if self._count else 0)
        self._end_ns = None if self._duration_ns is None else now_ns + self._duration_ns
        if not self._as_json:
            from exporter.cli.table import LiveTable  # noqa: PLC0415 - rich is 2.7 MB that only a terminal needs

            self._table = LiveTable(self._out.file, live=self._count is None and self._out.file.isatty())

    def finished(self, request: FinishedRequest) -> None:
        """Nothing: the rows come from the SLIs."""

    def explained(self, explained: Explained) -> None:
        """Nothing: paths are for `why`."""

    def tick(self, reader: Reader) -> None:
        """Show the rows when the interval is over."""
        now_ns = self._clock.monotonic_ns()
        if self._end_ns is not None and now_ns >= self._end_ns:
            reader.stop()
        if now_ns < self._next_ns:
            return
        self._next_ns = max(self._next_ns + self._interval_ns, now_ns)
        self._show(reader, now_ns)
        self._shown += 1
        if self._out.closed or self._shown == self._count:
            reader.stop()

    def stopped(self, reader: Reader) -> None:
        """Give the terminal back, with the last table on it."""
        if self._table is not None:
            self._table.close()

    def _show(self, reader: Reader, now_ns: int) -> None:
        rows = reader.slis.rows()
        if self._table is not None:
            table = self._table
            wall_s = self._clock.wall_ns() / 1e9
            beside = reader.gpus, reader.engines
            self._out.attempt(
                lambda: table.show(rows, reader.status, reader.config, reader.address, now_ns, wall_s, *beside)
            )
            return
        at = rfc3339(self._clock.wall_ns())
        engine_of = {(engine.service, engine.model): engine for engine in reader.engines}
        for row in rows:
            told = engine_object(engine_of.get((row.service, row.model)))
            self._out.line(json.dumps({"time": at, **row_object(row), **told}))
        for gpu in reader.gpus:
            self._out.line(json.dumps({"time": at, "gpu": gpu_object(gpu)}))


class TraceFront:
    """Prints one line per finished request, or one JSON object.

    Ends the agent after `count` requests or `duration_s` seconds, where given.
    """

    fds: tuple[int, ...] = ()
    stop_s: float = STOP_S

    def __init__(
        self,
        *,
        as_json: bool = False,
        duration_s: float | None = None,
        count: int | None = None,
        serves: bool = False,
        out: TextIO | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.serves = serves
        self._as_json: Final = as_json
        self._duration_ns: Final = None if duration_s is None else round(duration_s * 1e9)
        self._count: Final = count
        self._out: Final = Output(out)
        self._clock: Final = clock or Clock()
        self._end_ns: int | None = None
        self._shown = 0
        self._labels: tuple[str, ...] = ()
        self._colour: Final = self._out.file.isatty() and not os.environ.get("NO_COLOR")
        # one offset for the whole run: instants keep their order and distances when the wall clock is set
        self._wall_offset_ns: Final = self._clock.wall_ns() - self._clock.monotonic_ns()

    def prepare(self) -> None:
        """Load what a closed pipe needs."""
        prepare_output()

    def started(self, reader: Reader) -> None:
        """Print the header; the time starts to count."""
        self._labels = reader.slis.label_names
        if self._duration_ns is not None:
            self._end_ns = self._clock.monotonic_ns() + self._duration_ns
        if not self._as_json:
            self._out.line(self._paint(TRACE_COLUMNS, "1"))

    def finished(self, request: FinishedRequest) -> None:
        """Print the request."""
        if self._count is not None and self._shown >= self._count:
            return
        self._shown += 1
        wall_ns = request.finished_ns + self._wall_offset_ns
        if self._as_json:
            self._out.line(json.dumps(trace_object(request, wall_ns, self._labels)))
        else:
            colour = (
                "31" if request.failure else "33" if request.aborted or request.capture is not Capture.complete else ""
            )
            self._out.line(self._paint(trace_line(request, wall_ns), colour))

    def explained(self, explained: Explained) -> None:
        """Nothing: the request has its causes."""

    def tick(self, reader: Reader) -> None:
        """End the agent when the count or the time is reached."""
        over = self._end_ns is not None and self._clock.monotonic_ns() >= self._end_ns
        if over or self._out.closed or (self._count is not None and self._shown >= self._count):
            reader.stop()

    def stopped(self, reader: Reader) -> None:
        """Nothing is held."""

    def _paint(self, text: str, code: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self._colour and code else text


def prepare_output() -> None:
    """Load what a closed pipe needs."""
    codecs.lookup("ascii")  # that `Output.attempt` opens a file with


class Output:
    """A stream that may be closed by who reads it: `closed` says so, and nothing is written any more."""

    def __init__(self, file: TextIO | None) -> None:
        self.file: Final = sys.stdout if file is None else file
        self.closed = False

    def line(self, text: str) -> None:
        """Write a line and flush it."""

        def write() -> None:
            self.file.write(text + "\n")
            self.file.flush()

        self.attempt(write)

    def attempt(self, write: Callable[[], None]) -> None:
        """Write, and take a closed pipe as the end."""
        if self.closed:
            return
        try:
            write()
        except BrokenPipeError:
            self.closed = True
            # what is still in the buffer must not raise again when the interpreter flushes it at exit
            with open(os.devnull, "w", encoding="ascii") as null:  # noqa: PTH123 - a descriptor is what is wanted
                os.dup2(null.fileno(), self.file.fileno())


# ---- how one request is told ----


def outcome(request: FinishedRequest) -> str:
    """One word for how a request ended, and how much of it was seen where that is not all."""
    aborted = f"left_{request.aborted.value}" if request.aborted else None
    word = _ended(request, aborted)
    return word if request.capture is Capture.complete else f"{word} ({request.capture.value})"


def _ended(request: FinishedRequest, aborted: str | None) -> str:
    return request.failure.value if request.failure else aborted or ("ok" if request.end_seen else "unknown")


def mean_gap_ns(request: FinishedRequest) -> float | None:
    """Mean gap between frames with content, in nanoseconds; None below two frames."""
    if request.first_token_ns is None or request.last_token_ns is None or request.frames < 2:
        return None
    return (request.last_token_ns - request.first_token_ns) / (request.frames - 1)


def duration_ns(request: FinishedRequest) -> int | None:
    """From the arrival to the end; None where the end was not seen."""
    return request.finished_ns - request.arrived_ns if request.end_seen else None


def trace_line(request: FinishedRequest, wall_ns: int) -> str:
    """One line for a person, in the columns of `TRACE_COLUMNS`. `wall_ns` is when it finished, since the epoch."""
    first_ns = None
    if request.streamed and request.first_token_ns is not None:
        first_ns = request.first_token_ns - request.arrived_ns
    at = datetime.fromtimestamp(wall_ns // 1_000_000 / 1000).strftime("%H:%M:%S.%f")[:12]
    generated = request.completion_tokens if request.completion_tokens is not None else request.frames or None
    tokens = f"{_or_dash(request.prompt_tokens)}>{_or_dash(generated)}"
    return (
        f"{at:<12}  {shortened(safe(request.service), 12):<12}  {shortened(safe(request.model or '-'), 22):<22}  "
        f"{_or_dash(request.status):>4}  {span(first_ns):>6}  {span(mean_gap_ns(request)):>6}  "
        f"{span(request.longest_gap_ns):>6}  {tokens:>11}  {span(duration_ns(request)):>6}  "
        f"{largest_causes(request):<26}  {outcome(request)}"
    )


def largest_causes(request: FinishedRequest) -> str:
    """What most of the time to the first token was spent on: the two largest causes with their shares."""
    if request.causes is None:
        return "-"
    parts = sorted(request.causes.ttft.items(), key=lambda part: -part[1])
    whole = sum(ns for _, ns in parts)
    shares = [(cause, round(100 * ns / whole)) for cause, ns in parts[:2]]
    return " ".join(f"{cause} {share}%" for cause, share in shares if share)


def _in_seconds(parts: Mapping[str, int]) -> dict[str, float]:
    return {cause: ns / 1e9 for cause, ns in parts.items()}


def trace_object(request: FinishedRequest, wall_ns: int, label_names: Sequence[str]) -> dict[str, Any]:
    """Everything about a request as JSON types: seconds, counts, names; null is what was not measured."""

    def seconds(until_ns: int | None, since_ns: int | None) -> float | None:
        return None if until_ns is None or since_ns is None else (until_ns - since_ns) / 1e9

    gap_ns = mean_gap_ns(request)
    arrived_ns = None if request.capture is Capture.arrival_unseen else request.arrived_ns
    return {
        "time": rfc3339(wall_ns),
        "number": request.number,
        "service": safe(request.service),
        "model": None if request.model is None else safe(request.model),
        "api": request.api,
        "labels": dict(zip(label_names, map(safe, request.extra), strict=True)),
        "method": safe(request.method),
        "target": safe(request.target),
        "peer": safe(request.peer),
        "tgid": request.tgid,
        "tid": request.tid,
        "turn": request.turn,
        "streamed": request.streamed,
        "status": request.status,
        "outcome": _ended(request, "aborted" if request.aborted else None),
        "aborted_while": request.aborted.value if request.aborted else None,
        "capture": request.capture.value,
        "read_delay_seconds": seconds(request.read_ns, arrived_ns),
        "first_byte_seconds": seconds(request.first_byte_ns, request.arrived_ns),
        "time_to_first_token_seconds": seconds(request.first_token_ns, request.arrived_ns)
        if request.streamed
        else None,
        "mean_inter_token_latency_seconds": None if gap_ns is None else gap_ns / 1e9,
        "longest_gap_seconds": seconds(request.longest_gap_ns, 0),
        "duration_seconds": seconds(duration_ns(request), 0),
        "frames": request.frames,
        "prompt_tokens": request.prompt_tokens,
        "completion_tokens": request.completion_tokens,
        "cached_tokens": request.cached_tokens,
        "wasted_tokens": request.wasted_tokens,
        "causes_sampled": request.causes is not None,
        "causes": None
        if request.causes is None
        else {"ttft": _in_seconds(request.causes.ttft), "decode": _in_seconds(request.causes.decode)},
    }


def span(nanoseconds: float | None) -> str:
    """A time in at most six characters and three digits: `83us`, `3.1ms`, `412ms`, `1.24s`, `96.1s`, `812s`."""
    if nanoseconds is None:
        return "-"
    for unit, size in (("us", 1e3), ("ms", 1e6), ("s", 1e9)):
        value = nanoseconds / size
        if unit == "s":
            return f"{value:.2f}s" if value < 9.995 else f"{value:.1f}s" if value < 99.95 else f"{value:.0f}s"
        if value < 9.95 and unit == "ms":
            return f"{value:.1f}ms"
        if value < 999.5:
            return f"{value:.0f}{unit}"
    raise AssertionError("unreachable")


def shortened(text: str, width: int) -> str:
    """`text` in at most `width` characters; the middle gives way, since models differ at both ends."""
    if len(text) <= width:
        return text
    head = (width - 1) // 2
    return f"{text[:head]}\u2026{text[len(text) - (width - 1 - head) :]}"


def rfc3339(wall_ns: int) -> str:
    """An instant in UTC with nanoseconds."""
    seconds, rest = divmod(wall_ns, 1_000_000_000)
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}.{rest:09d}Z"


def _or_dash(value: int | None) -> str:
    return "-" if value is None else str(value)


def engine_object(engine: EngineRow | None) -> dict[str, Any]:
    """What the row of a model says of its engine, as JSON types; null is what nobody tells."""
    return {
        "engine": None if engine is None else engine.engine,
        "engine_running": None if engine is None else engine.running,
        "engine_waiting": None if engine is None else engine.waiting,
        "engine_kv_cache_usage_ratio": None if engine is None else engine.kv_cache_usage_ratio,
    }


def gpu_object(gpu: GpuRow) -> dict[str, Any]:
    """A GPU as JSON types; null is what it does not tell."""
    xids = [{"xid": code, "count": count} for code, count in gpu.xids]
    return {**asdict(gpu), "xids": xids, "problem": gpu.problem or None}


def row_object(row: Row) -> dict[str, Any]:
    """One row of the live table as JSON types."""
    values = asdict(row)
    values["why"] = None if row.why is None else dict(zip(("cause", "share"), row.why, strict=True))
    return {f"{name}_seconds" if name.startswith(("ttft", "itl")) else name: value for name, value in values.items()}
