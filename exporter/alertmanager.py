"""Brings alerts to the configured Alertmanagers, each in a thread of its own: what fires, that it still does, its end.

An alert goes out when it begins, every minute while it lasts, and when it is over. What an Alertmanager does not take
is kept, the newest word on each alert, and sent again after a pause that doubles up to `LONGEST_PAUSE_S`; but what it
refuses as wrong is given up: it has stored what was right in it, and the rest would hold up all that comes after.
"""

from __future__ import annotations

import encodings.idna  # noqa: F401 - a host's name is encoded with it, and it is not to be looked for later
import errno
import functools
import re
import socket
import ssl
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

import msgspec

from exporter.families import Family, Kind, Point, Scrape, Spec
from exporter.labels import safe

if TYPE_CHECKING:
    from exporter.alerting import Alert, Labels
    from exporter.config import Alertmanager

AGAIN_NS: Final = 60_000_000_000
"""How often what still fires is told again."""
LASTS_NS: Final = 180_000_000_000
"""An alert that is not told again within this time is over for Alertmanager, even where the agent is gone."""
PENDING_LIMIT: Final = 256
"""Alerts that may wait for one Alertmanager; beyond, the oldest is dropped."""
AT_ONCE: Final = 64
"""Alerts in one POST."""
SHORTEST_PAUSE_S: Final = 0.25
LONGEST_PAUSE_S: Final = 5.0
_ANSWER_BYTES: Final = 4096
_PATIENCE_S: Final = 0.5
_LATER: Final = (408, 429)  # the statuses of the client's faults that are none
_STATUS: Final = re.compile(rb"HTTP/1\.[01] ([0-9]{3})[ \r]")


class Failure(Enum):
    """Why an Alertmanager did not take a POST. The value is the label value of `reason`."""

    TIMEOUT = "timeout"
    REFUSED = "refused"
    UNREACHABLE = "unreachable"
    TLS = "tls"
    NOT_HTTP = "not_http"
    REJECTED = "rejected"  # 4xx: it would not take it the next time either
    HTTP_STATUS = "http_status"  # any other status, of which the next one may be better


@dataclass(frozen=True, slots=True)
class Notice:
    """What is told of one alert. Instants are nanoseconds since the epoch."""

    labels: Labels
    summary: str
    description: str
    starts_ns: int
    ends_ns: int
    of_agent: bool = False


@dataclass(frozen=True, slots=True)
class Delivered:
    """What became of the notices for one Alertmanager, since the start."""

    url: str
    taken: int
    dropped: int
    failures: Mapping[Failure, int]


@dataclass(frozen=True, slots=True)
class AlertReport:
    """What /metrics tells: alerts that fire by name, rows without room, and what became of the notices."""

    firing: Mapping[str, int]
    unfollowed: int
    delivered: Sequence[Delivered]


Post = Callable[[str, bytes, float], Failure | None]
"""Posts JSON to a URL within seconds; tells why it was not taken, None where it was. Raises nothing."""


class Outbox:
    """What waits for one Alertmanager, and the thread that brings it there."""

    def __init__(self, target: Alertmanager, post: Post | None = None, host: str | None = None) -> None:
        self.target: Final = target
        # Two agents without labels of their own must not say the same of two hosts.
        self._agent_labels: Final = {"instance": host or safe(socket.gethostname()), **target.agent_labels}
        self._post: Final = post or post_json
        self._pending: dict[Labels, Notice] = {}
        self._wake = threading.Condition()
        self._ending = False
        self._taken = 0
        self._dropped = 0
        self._failures: Counter[Failure] = Counter()
        # A daemon: a name server that never answers must not keep the process from its end.
        self._thread = threading.Thread(target=self._run, name="alertmanager", daemon=True)

    def start(self) -> None:
        """Begin to deliver."""
        self._thread.start()

    def stop(self, patience_s: float = _PATIENCE_S) -> None:
        """End, after one more attempt where something waits, or `patience_s` later."""
        with self._wake:
            self._ending = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join(patience_s)

    def put(self, notices: Iterable[Notice]) -> None:
        """Let these go out. A newer word on an alert takes the place of the one that waits."""
        with self._wake:
            for notice in notices:
                self._pending.pop(notice.labels, None)
                if len(self._pending) >= PENDING_LIMIT:
                    del self._pending[next(iter(self._pending))]
                    self._dropped += 1
                self._pending[notice.labels] = notice
            self._wake.notify()

    def delivered(self) -> Delivered:
        """What became of them until now."""
        with self._wake:
            failures = {failure: self._failures[failure] for failure in Failure}
            return Delivered(self.target.url, self._taken, self._dropped, failures)

    def deliver(self) -> bool:
        """Make one attempt with what waits, oldest first. Blocks for the timeout.

        Returns whether that is settled: False where it has to be tried again.
        """
        with self._wake:
            batch = list(self._pending.values())[:AT_ONCE]
        if not batch:
            return True
        body = encoded(batch, self.target.labels, self._agent_labels)
        failure = self._post(f"{self.target.url}/api/v2/alerts", body, self.target.timeout_s)
        with self._wake:
            if failure is not None:
                self._failures[failure] += 1
                if failure is not Failure.REJECTED:
                    return False
                self._dropped += len(batch)
            else:
                self._taken += len(batch)
            for notice in batch:
                if self._pending.get(notice.labels) is notice:
                    del self._pending[notice.labels]
        return True

    def _run(self) -> None:
        failed = 0
        while True:
            with self._wake:
                while not self._pending and not self._ending:
                    self._wake.wait()
                if failed and not self._ending:
                    pause_s = min(LONGEST_PAUSE_S, SHORTEST_PAUSE_S * 2.0 ** min(failed - 1, 16))
                    self._wake.wait_for(lambda: self._ending, pause_s)
                last = self._ending
            failed = 0 if self.deliver() else failed + 1
            if last:
                return


@dataclass(slots=True)
class _Told:
    """An alert that was told of: as it was last, since when (epoch), and when that was (CLOCK_MONOTONIC)."""

    alert: Alert
    starts_ns: int
    at_ns: int

    def set_back(self, wall_ns: int) -> None:
        """The clock may have been: no Alertmanager takes an alert that ends before it begins."""
        self.starts_ns = min(self.starts_ns, wall_ns)


class Notifier:
    """Turns what fires into notices, for every Alertmanager.

    `wall` is the time since the epoch in nanoseconds. `post` takes the network's place in tests.
    """

    def __init__(
        self,
        targets: Sequence[Alertmanager],
        wall: Callable[[], int] = time.time_ns,
        post: Post | None = None,
    ) -> None:
        self._wall: Final = wall
        self._post: Final = post
        self._told: dict[Labels, _Told] = {}
        self._running = False
        self.outboxes: list[Outbox] = [Outbox(target, post) for target in targets]

    def start(self) -> None:
        """Begin to deliver."""
        self._running = True
        for outbox in self.outboxes:
            outbox.start()

    def stop(self) -> None:
        """End. Alerts that fire run out by themselves: that the agent ends does not mean that they are over."""
        self._running = False
        for outbox in self.outboxes:
            outbox.stop(0)
        deadline = time.monotonic() + _PATIENCE_S
        for outbox in self.outboxes:
            outbox.stop(max(0.0, deadline - time.monotonic()))

    def reconfigure(self, targets: Sequence[Alertmanager]) -> None:
        """Post to others. Those that stay keep what waits for them; new ones are told of all that fires."""
        if [outbox.target for outbox in self.outboxes] == list(targets):
            return
        gone = list(self.outboxes)
        self.outboxes = []
        for target in targets:
            outbox = next((each for each in gone if each.target == target), None)
            if outbox is not None:
                gone.remove(outbox)
            else:
                outbox = Outbox(target, self._post)
                if self._running:
                    outbox.start()
            self.outboxes.append(outbox)
        for outbox in gone:
            outbox.stop(0)
        for told in self._told.values():
            told.at_ns -= AGAIN_NS

    def take(self, firing: Sequence[Alert], now_ns: int) -> None:
        """Tell what begins, what still lasts after a minute, and what is over. `now_ns` is CLOCK_MONOTONIC."""
        wall_ns = self._wall()
        notices = []
        lasting = set()
        for alert in firing:
            lasting.add(alert.labels)
            told = self._told.get(alert.labels)
            if told is None:
                told = self._told[alert.labels] = _Told(alert, wall_ns - (now_ns - alert.since_ns), now_ns)
            elif now_ns - told.at_ns < AGAIN_NS:
                continue
            told.alert, told.at_ns = alert, now_ns
            told.set_back(wall_ns)
            notices.append(_notice(alert, told.starts_ns, wall_ns + LASTS_NS))
        for labels in self._told.keys() - lasting:
            told = self._told.pop(labels)
            if not told.alert.fades:
                told.set_back(wall_ns)
                notices.append(_notice(told.alert, told.starts_ns, wall_ns))
        if notices:
            for outbox in self.outboxes:
                outbox.put(notices)


def _notice(alert: Alert, starts_ns: int, ends_ns: int) -> Notice:
    return Notice(alert.labels, alert.summary, alert.description, starts_ns, ends_ns, alert.of_agent)


# ---- what goes over the wire ----


def encoded(notices: Iterable[Notice], labels: Mapping[str, str], agent_labels: Mapping[str, str]) -> bytes:
    """The JSON that POST /api/v2/alerts takes. `labels` are added to each alert's, the agent's where they belong."""
    return msgspec.json.encode(
        [
            {
                "labels": {**labels, **(agent_labels if notice.of_agent else {}), **dict(notice.labels)},
                "annotations": {"summary": notice.summary, "description": notice.description},
                "startsAt": _rfc3339(notice.starts_ns),
                "endsAt": _rfc3339(notice.ends_ns),
            }
            for notice in notices
        ]
    )


def _rfc3339(at_ns: int) -> str:
    seconds, rest = divmod(at_ns, 1_000_000_000)
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}.{rest // 1_000_000:03}Z"


def post_json(url: str, body: bytes, timeout_s: float) -> Failure | None:
    """POST JSON and look at the status of the answer. Blocks for `timeout_s`, and for as long as a name server does."""
    deadline = time.monotonic() + timeout_s
    try:
        with _connect(url, deadline) as connection:
            status = _converse(connection, url, body, deadline)
    except TimeoutError:
        return Failure.TIMEOUT
    except ConnectionRefusedError:
        return Failure.REFUSED
    except ssl.SSLError:
        return Failure.TLS
    except OSError as error:
        return Failure.TIMEOUT if error.errno == errno.ETIMEDOUT else Failure.UNREACHABLE
    except ValueError:  # a name that cannot be encoded
        return Failure.UNREACHABLE
    if status is None:
        return Failure.NOT_HTTP
    if 200 <= status < 300:
        return None
    return Failure.REJECTED if 400 <= status < 500 and status not in _LATER else Failure.HTTP_STATUS


@functools.cache
def _tls() -> ssl.SSLContext:
    return ssl.create_default_context()


def _left_s(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def _connect(url: str, deadline: float) -> socket.socket:
    place = urlsplit(url)
    assert place.hostname is not None, "the configuration is checked"
    encrypted = place.scheme == "https"
    address = place.hostname, place.port or (443 if encrypted else 80)
    connection = socket.create_connection(address, timeout=_left_s(deadline))
    if not encrypted:
        return connection
    try:
        connection.settimeout(_left_s(deadline))
        return _tls().wrap_socket(connection, server_hostname=place.hostname)
    except BaseException:
        connection.close()
        raise


def _converse(connection: socket.socket, url: str, body: bytes, deadline: float) -> int | None:
    """The status of the answer; None where it is no HTTP. The rest of it says nothing that is needed."""
    place = urlsplit(url)
    head = (
        f"POST {place.path} HTTP/1.1\r\nHost: {place.netloc}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nUser-Agent: footlight\r\nConnection: close\r\n\r\n"
    )
    connection.settimeout(_left_s(deadline))
    connection.sendall(head.encode("ascii") + body)
    answer = b""
    while len(answer) < _ANSWER_BYTES and b"\n" not in answer:
        connection.settimeout(_left_s(deadline))
        piece = connection.recv(_ANSWER_BYTES)
        if not piece:
            break
        answer += piece
    found = _STATUS.match(answer)
    return None if found is None else int(found[1])


# ---- /metrics ----


def alert_families() -> Sequence[Family]:
    """All of them, in the order of the page. Where there is no Alertmanager they have no samples."""

    def firing(scrape: Scrape) -> Iterable[Point]:
        return [((name,), count) for name, count in scrape.alerts.firing.items()] if scrape.alerts else ()

    def unfollowed(scrape: Scrape) -> Iterable[Point]:
        return [((), scrape.alerts.unfollowed)] if scrape.alerts else ()

    def each(get: Callable[[Delivered], int]) -> Callable[[Scrape], Iterable[Point]]:
        return lambda scrape: [((to.url,), get(to)) for to in scrape.alerts.delivered] if scrape.alerts else ()

    def failures(scrape: Scrape) -> Iterable[Point]:
        for to in scrape.alerts.delivered if scrape.alerts else ():
            for failure, count in to.failures.items():
                yield (to.url, failure.value), count

    to = ("alertmanager",)
    return (
        Family(
            Spec("footlight_alerts_firing", Kind.GAUGE, "Alerts of the fast path that fire.", ("alertname",)), firing
        ),
        Family(
            Spec(
                "footlight_alerts_unfollowed",
                Kind.GAUGE,
                "Objectives times models that the fast path has no room for.",
                (),
            ),
            unfollowed,
        ),
        Family(
            Spec("footlight_alert_notifications", Kind.COUNTER, "Notices that an Alertmanager took.", to),
            each(lambda delivered: delivered.taken),
        ),
        Family(
            Spec(
                "footlight_alert_notification_failures",
                Kind.COUNTER,
                "Posts that an Alertmanager did not take.",
                ("alertmanager", "reason"),
            ),
            failures,
        ),
        Family(
            Spec(
                "footlight_alert_notifications_dropped",
                Kind.COUNTER,
                "Notices that were given up: too many waited for the Alertmanager, or it rejected them.",
                to,
            ),
            each(lambda delivered: delivered.dropped),
        ),
    )
