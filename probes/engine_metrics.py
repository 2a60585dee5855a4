"""Asks language-model engines for their own metrics, within a time and a size that no answer exceeds."""

from __future__ import annotations

import encodings.idna  # noqa: F401 - a host's name is encoded with it, and it is not to be looked for later
import errno
import functools
import http.client
import io
import queue
import socket
import ssl
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import SplitResult, urljoin, urlsplit

from probes.engine_page import EngineModel, Failure, PageReader

PERIOD_S: Final = 5.0
"""How often `look` is best called."""
TIMEOUT_S: Final = 2.0
LIMIT_BYTES: Final = 8 << 20
ENDPOINTS_LIMIT: Final = 64
"""Endpoints that are asked in all; the others count as `not_asked`."""
WORKERS: Final = 8
"""Endpoints that are asked at a time."""

_PIECE: Final = 1 << 16
_HEADERS_LIMIT: Final = 1 << 18
_GRACE_S: Final = 0.5  # for a worker that waits for a CPU, not for its endpoint
_TYPES: Final = frozenset({"text/plain", "application/openmetrics-text"})
_ACCEPT: Final = "text/plain;version=0.0.4"
_OTHER_PLACE: Final = "/prometheus/metrics"  # of TensorRT-LLM, whose /metrics is JSON
_OTHER_PLACE_AFTER: Final = frozenset({Failure.NOT_METRICS, Failure.HTTP_STATUS, Failure.UNKNOWN_ENGINE})

# What an endpoint that never told of an engine says when it is none. It is asked again, but seldom.
_NO_ENGINE: Final = frozenset(
    {
        *(Failure.NOT_METRICS, Failure.UNKNOWN_ENGINE, Failure.HTTP_STATUS, Failure.NOT_HTTP, Failure.REDIRECT),
        *(Failure.TOO_LARGE, Failure.TOO_MANY_SERIES),
    }
)
_SHORTEST_NO_ENGINE_S: Final = 60.0
_LONGEST_NO_ENGINE_S: Final = 600.0
_SHORTEST_FAILING_S: Final = 4.0  # less than the period: the first look after a failure asks again
_LONGEST_FAILING_S: Final = 60.0


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where metrics may be. `found` says that it was guessed from a port and not configured: it may be no engine's."""

    url: str
    found: bool = False


@dataclass(frozen=True, slots=True)
class EndpointReport:
    """What one endpoint said when it was asked last.

    `known` says that it is configured or was an engine's once. `models` are empty where `failure` says why nothing was
    told. `at_ns` is the clock's when the answer was there, `seconds` what it took.
    """

    service: str
    url: str
    known: bool
    failure: Failure | None
    models: tuple[EngineModel, ...]
    at_ns: int
    seconds: float

    @property
    def up(self) -> bool:
        """Whether it told something."""
        return bool(self.models)


@dataclass(frozen=True, slots=True)
class EngineReport:
    """What all endpoints said. `failures` counts since the start, by service and reason."""

    at_ns: int
    endpoints: tuple[EndpointReport, ...] = ()
    failures: Mapping[tuple[str, Failure], int] = field(default_factory=dict)


class _Refused(Exception):
    """An answer that is none."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.value)
        self.failure = failure


@dataclass(slots=True)
class _Asked:
    """What is known of an endpoint. `busy` while a worker is at it, even long after its deadline."""

    service: str
    endpoint: Endpoint
    url: str
    known: bool
    busy: bool = False
    due_ns: int = 0
    failed: int = 0
    last: EndpointReport | None = None


@dataclass(frozen=True, slots=True)
class _Answer:
    models: tuple[EngineModel, ...]
    failures: tuple[Failure, ...]
    url: str
    at_ns: int
    seconds: float


class EngineSource:
    """Asks the endpoints that `targets` gives, each for itself: one that hangs delays no other beyond its timeout.

    `targets` maps services to endpoints; it is called in the thread that calls `look`. `clock` is CLOCK_MONOTONIC in
    nanoseconds. No proxy is used, nothing compressed is asked for, and no redirect leads to another host.
    """

    def __init__(
        self,
        targets: Callable[[], Mapping[str, Sequence[Endpoint]]],
        clock: Callable[[], int] = time.monotonic_ns,
        timeout_s: float = TIMEOUT_S,
        limit_bytes: int = LIMIT_BYTES,
    ) -> None:
        self._targets: Final = targets
        self._clock: Final = clock
        self._timeout_ns: Final = round(timeout_s * 1e9)
        self._limit_bytes: Final = limit_bytes
        self._asked: dict[tuple[str, str], _Asked] = {}
        self._failures: Counter[tuple[str, Failure]] = Counter()

    def look(self) -> EngineReport:
        """Ask whoever is due. Blocks for the timeout and half a second, times the endpoints by `WORKERS`, at most."""
        targets = self._targets()
        self._take_targets(targets)
        began_ns = self._clock()
        due = [asked for asked in self._asked.values() if not asked.busy and asked.due_ns <= began_ns]
        for asked, answer in self._ask(due):
            self._note(asked, answer)
        for service in targets:
            for failure in Failure:
                self._failures[service, failure] += 0
        reports = tuple(asked.last for asked in self._asked.values() if asked.last is not None)
        return EngineReport(self._clock(), reports, dict(self._failures))

    def _take_targets(self, targets: Mapping[str, Sequence[Endpoint]]) -> None:
        wanted = {(service, endpoint.url): endpoint for service, several in targets.items() for endpoint in several}
        for key in self._asked.keys() - wanted.keys():
            del self._asked[key]
        for (service, url), endpoint in wanted.items():
            if (service, url) in self._asked:
                continue
            if len(self._asked) >= ENDPOINTS_LIMIT:
                self._failures[service, Failure.NOT_ASKED] += 1
                continue
            self._asked[service, url] = _Asked(service, endpoint, url, known=not endpoint.found)

    def _ask(self, due: Sequence[_Asked]) -> Iterable[tuple[_Asked, _Answer]]:
        tasks: queue.SimpleQueue[_Asked] = queue.SimpleQueue()
        answers: queue.SimpleQueue[tuple[_Asked, _Answer]] = queue.SimpleQueue()
        for asked in due:
            asked.busy = True
            tasks.put(asked)
        workers = min(WORKERS, len(due))
        began_ns = self._clock()
        patience_ns = self._timeout_ns * -(-len(due) // WORKERS) + round(_GRACE_S * 1e9)
        for _ in range(workers):
            # Daemons: a name server that never answers must not keep the process from its end.
            worker = threading.Thread(target=self._work, args=(tasks, answers), name="engine-metrics", daemon=True)
            try:
                worker.start()
            except RuntimeError:  # no room for another one, by a limit of the user's or the container's
                break
        waiting = {id(asked): asked for asked in due}
        while waiting:
            left_ns = began_ns + patience_ns - self._clock()
            try:
                asked, answer = answers.get(timeout=max(0, left_ns) / 1e9)
            except queue.Empty:
                break
            del waiting[id(asked)]
            yield asked, answer
        now_ns = self._clock()
        seconds = (now_ns - began_ns) / 1e9
        while True:  # what no worker has begun is not begun any more
            try:
                asked = tasks.get_nowait()
            except queue.Empty:
                break
            asked.busy = False
            del waiting[id(asked)]
            yield asked, _Answer((), (Failure.NOT_ASKED,), asked.url, now_ns, seconds)
        for asked in waiting.values():
            yield asked, _Answer((), (Failure.TIMEOUT,), asked.url, now_ns, seconds)

    def _work(self, tasks: queue.SimpleQueue[_Asked], answers: queue.SimpleQueue[tuple[_Asked, _Answer]]) -> None:
        while True:
            try:
                asked = tasks.get_nowait()
            except queue.Empty:
                return
            try:
                answer = self._ask_one(asked)
            finally:
                asked.busy = False
            answers.put((asked, answer))

    def _ask_one(self, asked: _Asked) -> _Answer:
        began_ns = self._clock()
        deadline_ns = began_ns + self._timeout_ns
        url = asked.url
        told, failures = self._page(url, deadline_ns)
        if asked.endpoint.found and not asked.known and failures and failures[0] in _OTHER_PLACE_AFTER:
            other = urljoin(url, _OTHER_PLACE)
            told_there, failures_there = self._page(other, deadline_ns)
            if told_there:
                url, told, failures = other, told_there, failures_there
        now_ns = self._clock()
        return _Answer(told, failures, url, now_ns, (now_ns - began_ns) / 1e9)

    def _page(self, url: str, deadline_ns: int) -> tuple[tuple[EngineModel, ...], tuple[Failure, ...]]:
        """What a page told and what was wrong with it; one of the two may be empty, never both."""
        page = PageReader()
        try:
            _fetch(url, _Deadline(self._clock, deadline_ns), self._limit_bytes, page)
        except _Refused as refused:
            return (), (refused.failure,)
        told = page.finish()
        bad = (Failure.BAD_SAMPLE,) if page.bad_samples else ()
        return ((), (told, *bad)) if isinstance(told, Failure) else (told, bad)

    def _note(self, asked: _Asked, answer: _Answer) -> None:
        for failure in answer.failures:
            self._failures[asked.service, failure] += 1
        up = bool(answer.models)
        asked.known = asked.known or up
        asked.url = answer.url
        asked.failed = 0 if up else asked.failed + 1
        asked.due_ns = 0 if up else answer.at_ns + self._pause_ns(asked, answer.failures[0])
        asked.last = EndpointReport(
            asked.service,
            asked.url,
            asked.known,
            None if up else answer.failures[0],
            answer.models,
            answer.at_ns,
            answer.seconds,
        )

    def _pause_ns(self, asked: _Asked, failure: Failure) -> int:
        shortest, longest = _SHORTEST_FAILING_S, _LONGEST_FAILING_S
        if not asked.known and failure in _NO_ENGINE:
            shortest, longest = _SHORTEST_NO_ENGINE_S, _LONGEST_NO_ENGINE_S
        return round(min(longest, shortest * 2.0 ** min(asked.failed - 1, 30)) * 1e9)


class _Deadline:
    """How long may still be waited."""

    def __init__(self, clock: Callable[[], int], at_ns: int) -> None:
        self._clock = clock
        self._at_ns = at_ns

    def left_s(self) -> float:
        """Raises TimeoutError where nothing is left."""
        left_ns = self._at_ns - self._clock()
        if left_ns <= 0:
            raise TimeoutError
        return left_ns / 1e9


class _Timed(io.RawIOBase):
    """The bytes that a socket receives until the deadline, and not more than a number of them."""

    def __init__(self, connection: socket.socket, deadline: _Deadline, limit_bytes: int) -> None:
        self._connection = connection
        self._deadline = deadline
        self._left = limit_bytes

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]  # typeshed's Buffer cannot be cut
        """As RawIOBase. Raises TimeoutError, and _Refused past the limit."""
        if not self._left:
            raise _Refused(Failure.TOO_LARGE)
        self._connection.settimeout(self._deadline.left_s())
        count = self._connection.recv_into(buffer[: self._left])
        self._left -= count
        return count


class _Receiving:
    """What http.client needs of a socket to read a response from it."""

    def __init__(self, raw: io.RawIOBase) -> None:
        self._raw = raw

    def makefile(self, _mode: str) -> io.BufferedReader:
        """Give what is read as a file."""
        return io.BufferedReader(self._raw, _PIECE)


def _fetch(url: str, deadline: _Deadline, limit_bytes: int, page: PageReader) -> None:
    """Feed what is at `url` to the page. Raises _Refused, and nothing else, where there is none."""
    place = urlsplit(url)
    moved = _fetch_once(place, deadline, limit_bytes, page)
    if moved is None:
        return
    try:
        there = urlsplit(urljoin(url, moved))
    except ValueError:
        raise _Refused(Failure.REDIRECT) from None
    target = f"{there.path}?{there.query}"
    if there[:2] != place[:2] or not target.isascii() or not target.isprintable() or " " in target:
        raise _Refused(Failure.REDIRECT)
    if _fetch_once(there, deadline, limit_bytes, page) is not None:
        raise _Refused(Failure.REDIRECT)


def _fetch_once(place: SplitResult, deadline: _Deadline, limit_bytes: int, page: PageReader) -> str | None:
    """Feed the page, or return where it is instead."""
    try:
        with _connect(place, deadline) as connection:
            return _converse(connection, place, deadline, limit_bytes, page)
    except TimeoutError:
        raise _Refused(Failure.TIMEOUT) from None
    except ConnectionRefusedError:
        raise _Refused(Failure.REFUSED) from None
    except ssl.SSLError:
        raise _Refused(Failure.TLS) from None
    except http.client.IncompleteRead:
        raise _Refused(Failure.TRUNCATED) from None
    except OSError as error:  # http.client's "closed without an answer" is one, too
        raise _Refused(Failure.TIMEOUT if error.errno == errno.ETIMEDOUT else Failure.UNREACHABLE) from None
    except (http.client.HTTPException, ValueError, OverflowError):
        raise _Refused(Failure.NOT_HTTP) from None


@functools.cache
def _tls() -> ssl.SSLContext:
    return ssl.create_default_context()


def _connect(place: SplitResult, deadline: _Deadline) -> socket.socket:
    assert place.hostname is not None
    encrypted = place.scheme == "https"
    port = place.port or (443 if encrypted else 80)
    connection = socket.create_connection((place.hostname, port), timeout=deadline.left_s())
    if not encrypted:
        return connection
    try:
        connection.settimeout(deadline.left_s())
        return _tls().wrap_socket(connection, server_hostname=place.hostname)
    except BaseException:
        connection.close()
        raise


def _converse(
    connection: socket.socket, place: SplitResult, deadline: _Deadline, limit_bytes: int, page: PageReader
) -> str | None:
    target = (place.path or "/") + (f"?{place.query}" if place.query else "")
    connection.settimeout(deadline.left_s())
    connection.sendall(
        f"GET {target} HTTP/1.1\r\nHost: {place.netloc}\r\nAccept: {_ACCEPT}\r\nAccept-Encoding: identity\r\n"
        "User-Agent: footlight\r\nConnection: close\r\n\r\n".encode("ascii")
    )
    raw = _Timed(connection, deadline, limit_bytes + _HEADERS_LIMIT)
    response = http.client.HTTPResponse(_Receiving(raw), method="GET")  # type: ignore[arg-type]  # all that it uses
    try:
        response.begin()
        if response.status in {301, 302, 303, 307, 308}:
            return response.headers.get("location", "")
        _check_head(response)
        left = limit_bytes
        while piece := response.read(_PIECE):
            left -= len(piece)
            if left < 0:
                raise _Refused(Failure.TOO_LARGE)
            failure = page.feed(piece)
            if failure is not None:
                raise _Refused(failure)
            deadline.left_s()  # reading the lines takes time, too
        if response.length:
            raise _Refused(Failure.TRUNCATED)
    finally:
        response.close()
    return None


def _check_head(response: http.client.HTTPResponse) -> None:
    if response.status != 200:
        raise _Refused(Failure.HTTP_STATUS)
    kind = (response.headers.get("content-type") or "").partition(";")[0].strip().lower()
    encoding = (response.headers.get("content-encoding") or "identity").strip().lower()
    if kind not in _TYPES or encoding != "identity":
        raise _Refused(Failure.NOT_METRICS)
