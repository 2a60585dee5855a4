"""The delivery: what goes out when, what waits where nobody takes it, and what every kind of answer counts as."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest

from exporter.alerting import Alert
from exporter.alertmanager import (
    AGAIN_NS,
    AT_ONCE,
    LASTS_NS,
    PENDING_LIMIT,
    AlertReport,
    Delivered,
    Failure,
    Notice,
    Notifier,
    Outbox,
    alert_families,
    encoded,
    post_json,
)
from exporter.config import Alertmanager, parse
from exporter.families import Scrape
from exporter.fast_path import FastPath
from exporter.objectives import bounds
from exporter.slis import Slis
from exporter.status import ReaderStatus
from probes.errors import ConfigError

SECOND = 1_000_000_000
WALL_NS = 1_767_225_600 * SECOND  # 2026-01-01
TARGET = Alertmanager("http://127.0.0.1:9093", {"cluster": "north"}, {"instance": "stage-1"}, 1.0)
ALERT = Alert(
    labels=(("alertname", "FootlightProbeDown"), ("probe", "requests")),
    summary="down",
    description="It is down.",
    since_ns=7 * SECOND,
    of_agent=True,
)
BURN = Alert(
    (("alertname", "ErrorBudgetBurn"), ("service_name", "roleplay")), "burns", "It burns.", 7 * SECOND, fades=True
)
PATIENCE_S = 10.0


class Network:
    """Takes the posts, as `answers` say; the last one goes on for ever."""

    def __init__(self, *answers: Failure | None) -> None:
        self.posts: list[tuple[str, list[dict[str, Any]]]] = []
        self.came = threading.Semaphore(0)
        self._answers = list(answers or (None,))

    def __call__(self, url: str, body: bytes, timeout_s: float) -> Failure | None:
        self.posts.append((url, json.loads(body)))
        answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        self.came.release()
        return answer


def notice(number: int = 0, summary: str = "down") -> Notice:
    return Notice((("alertname", f"alert-{number}"),), summary, "It is down.", WALL_NS, WALL_NS + LASTS_NS)


# ---- what goes out ----


class Played:
    """A notifier whose outbox is emptied by hand."""

    def __init__(self) -> None:
        self.wall_ns = WALL_NS
        self.now_ns = 7 * SECOND
        self.network = Network()
        self.notifier = Notifier([TARGET], lambda: self.wall_ns, self.network)

    def tick(self, *firing: Alert, after_s: float = 0.25) -> list[dict[str, Any]]:
        self.notifier.take(firing, self.now_ns)
        before = len(self.network.posts)
        for outbox in self.notifier.outboxes:
            assert outbox.deliver()
        self.now_ns += round(after_s * SECOND)
        self.wall_ns += round(after_s * SECOND)
        return [alert for _, alerts in self.network.posts[before:] for alert in alerts]


def test_an_alert_goes_out_at_once_again_every_minute_and_when_it_is_over() -> None:
    played = Played()
    (told,) = played.tick(ALERT)
    assert told == {
        "labels": {
            "alertname": "FootlightProbeDown",
            "probe": "requests",
            "cluster": "north",
            "instance": "stage-1",
        },
        "annotations": {"summary": "down", "description": "It is down."},
        "startsAt": "2026-01-01T00:00:00.000Z",
        "endsAt": "2026-01-01T00:03:00.000Z",
    }
    assert played.network.posts[0][0] == "http://127.0.0.1:9093/api/v2/alerts"
    words = [played.tick(ALERT) for _ in range(4 * 120)]
    assert [number for number, each in enumerate(words) if each] == [239, 479]
    assert words[239][0]["startsAt"] == told["startsAt"]
    assert words[239][0]["endsAt"] == "2026-01-01T00:04:00.000Z"
    (over,) = played.tick()
    assert (over["startsAt"], over["endsAt"]) == (told["startsAt"], "2026-01-01T00:02:00.250Z")
    assert played.tick() == []


def test_an_alert_that_a_rule_has_too_is_not_ended() -> None:
    played = Played()
    (told,) = played.tick(BURN)
    assert told["labels"] == {"alertname": "ErrorBudgetBurn", "service_name": "roleplay", "cluster": "north"}
    assert played.tick() == []
    assert len(played.tick(BURN)) == 1


def test_it_is_dated_back_to_when_it_began() -> None:
    played = Played()
    played.now_ns += 3 * SECOND
    (told,) = played.tick(ALERT)
    assert told["startsAt"] == "2025-12-31T23:59:57.000Z"


def test_a_wall_clock_that_is_set_back_leaves_no_alert_that_ends_before_it_begins() -> None:
    played = Played()
    played.tick(ALERT)
    played.wall_ns -= 600 * SECOND
    played.now_ns += AGAIN_NS
    (again,) = played.tick(ALERT)
    assert (again["startsAt"], again["endsAt"]) == ("2025-12-31T23:50:00.250Z", "2025-12-31T23:53:00.250Z")
    played.wall_ns -= 600 * SECOND
    (over,) = played.tick()
    assert over["startsAt"] == over["endsAt"] == "2025-12-31T23:40:00.500Z"


def test_new_words_do_not_make_it_another_alert() -> None:
    played = Played()
    played.tick(ALERT)
    assert played.tick(replace(ALERT, description="It is still down.")) == []


def test_the_labels_of_the_configuration_do_not_replace_those_of_the_alert() -> None:
    (told,) = json.loads(encoded([notice()], {"alertname": "other", "zone": "a"}, {"instance": "b"}))
    assert told["labels"] == {"alertname": "alert-0", "zone": "a"}


def test_two_agents_do_not_say_the_same_of_their_hosts() -> None:
    network = Network()
    for host in ("stage-1", "stage-2"):
        outbox = Outbox(Alertmanager("http://one"), network, host)
        outbox.put([replace(notice(), of_agent=True)])
        assert outbox.deliver()
    assert [alerts[0]["labels"]["instance"] for _, alerts in network.posts] == ["stage-1", "stage-2"]


def test_a_new_alertmanager_is_told_of_what_fires_and_one_that_stays_keeps_what_waits() -> None:
    played = Played()
    played.tick(ALERT)
    (stays,) = played.notifier.outboxes
    other = replace_url(TARGET, "http://127.0.0.2:9093")
    played.notifier.reconfigure([other, TARGET])
    assert played.notifier.outboxes[1] is stays
    played.tick(ALERT)
    assert [url for url, _ in played.network.posts[1:]] == [f"{each.url}/api/v2/alerts" for each in (other, TARGET)]
    played.notifier.reconfigure([other])
    assert [outbox.target for outbox in played.notifier.outboxes] == [other]


def replace_url(target: Alertmanager, url: str) -> Alertmanager:
    return Alertmanager(url, target.labels, target.agent_labels, target.timeout_s)


# ---- what waits ----


def test_what_is_not_taken_is_sent_again_with_the_newest_word() -> None:
    network = Network(Failure.REFUSED, Failure.HTTP_STATUS, None)
    outbox = Outbox(TARGET, network)
    outbox.put([notice(summary="down")])
    assert not outbox.deliver()
    outbox.put([notice(summary="still down")])
    assert not outbox.deliver()
    assert outbox.deliver()
    assert [alerts[0]["annotations"]["summary"] for _, alerts in network.posts] == ["down", "still down", "still down"]
    outbox.deliver()
    assert len(network.posts) == 3
    delivered = outbox.delivered()
    assert (delivered.taken, delivered.dropped) == (1, 0)
    assert {failure: count for failure, count in delivered.failures.items() if count} == {
        Failure.REFUSED: 1,
        Failure.HTTP_STATUS: 1,
    }
    assert set(delivered.failures) == set(Failure)


def test_a_word_that_comes_during_a_post_is_not_lost() -> None:
    outbox: Outbox

    def post(_url: str, body: bytes, _timeout_s: float) -> Failure | None:
        if b"still" not in body:
            outbox.put([notice(summary="still down")])
        said.append(body)
        return None

    said: list[bytes] = []
    outbox = Outbox(TARGET, post)
    outbox.put([notice()])
    assert outbox.deliver()
    assert outbox.deliver()
    assert [b"still" in body for body in said] == [False, True]


def test_the_oldest_is_dropped_where_too_many_wait_and_counted() -> None:
    network = Network()
    outbox = Outbox(TARGET, network)
    for number in range(PENDING_LIMIT + 23):
        outbox.put([notice(number)])
    assert outbox.delivered().dropped == 23
    while outbox.delivered().taken < PENDING_LIMIT:
        assert outbox.deliver()
    sizes = [len(alerts) for _, alerts in network.posts]
    assert sum(sizes) == PENDING_LIMIT
    assert max(sizes) == AT_ONCE
    assert network.posts[0][1][0]["labels"]["alertname"] == "alert-23"


def test_what_an_alertmanager_refuses_for_good_is_given_up_and_does_not_hold_up_the_others() -> None:
    network = Network(Failure.REJECTED, None)
    outbox = Outbox(TARGET, network)
    outbox.put(notice(number) for number in range(AT_ONCE + 23))
    assert outbox.deliver()
    assert outbox.deliver()
    assert [len(alerts) for _, alerts in network.posts] == [AT_ONCE, 23]
    delivered = outbox.delivered()
    assert (delivered.taken, delivered.dropped, delivered.failures[Failure.REJECTED]) == (23, AT_ONCE, 1)


def test_the_thread_delivers_tries_again_and_ends() -> None:
    network = Network(Failure.TIMEOUT, None)
    outbox = Outbox(TARGET, network)
    outbox.start()
    outbox.put([notice()])
    for _ in range(2):
        assert network.came.acquire(timeout=PATIENCE_S)
    outbox.stop(PATIENCE_S)
    assert outbox.delivered().taken == 1


def test_what_waits_when_it_ends_is_tried_once_more() -> None:
    network = Network(Failure.REFUSED)
    outbox = Outbox(TARGET, network)
    outbox.put([notice()])
    outbox.start()
    outbox.stop(PATIENCE_S)
    assert 1 <= len(network.posts) <= 2


# ---- the wire ----


@contextmanager
def server(answer: bytes, *, hangs: bool = False, at_once: bool = False) -> Iterator[tuple[str, list[bytes]]]:
    """Reads one request to its end, or the first bytes of it, and answers."""
    heard: list[bytes] = []
    hold = threading.Event()
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            data = b""
            while b"\r\n\r\n" not in data or len(data.partition(b"\r\n\r\n")[2]) < 4:
                piece = connection.recv(65536)
                if not piece:
                    break
                data += piece
                if at_once:
                    break
            heard.append(data)
            connection.sendall(answer)
            if hangs:
                hold.wait(PATIENCE_S)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/am/api/v2/alerts", heard
    finally:
        hold.set()
        thread.join(PATIENCE_S)
        listener.close()


@pytest.mark.parametrize(
    ("answer", "failure"),
    [
        (b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n", None),
        (b"HTTP/1.0 202 Accepted\r\n\r\n", None),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", Failure.REJECTED),
        (b"HTTP/1.1 499 Whatever\r\n\r\n", Failure.REJECTED),
        (b"HTTP/1.1 408 Request Timeout\r\n\r\n", Failure.HTTP_STATUS),
        (b"HTTP/1.1 429 Too Many Requests\r\n\r\n", Failure.HTTP_STATUS),
        (b"HTTP/1.1 500 Internal Server Error\r\n\r\n", Failure.HTTP_STATUS),
        (b"HTTP/1.1 302 Found\r\nlocation: /other\r\n\r\n", Failure.HTTP_STATUS),
        (b"HTTP/1.1 2000 OK\r\n\r\n", Failure.NOT_HTTP),
        (b"SSH-2.0-OpenSSH_9.2\r\n", Failure.NOT_HTTP),
        (b"\x00" * 70_000, Failure.NOT_HTTP),
        (b"", Failure.NOT_HTTP),
    ],
)
def test_every_answer_is_a_success_or_a_reason(answer: bytes, failure: Failure | None) -> None:
    with server(answer) as (url, heard):
        assert post_json(url, b"[{}]", PATIENCE_S) is failure
    head, _, body = heard[0].partition(b"\r\n\r\n")
    assert head.startswith(b"POST /am/api/v2/alerts HTTP/1.1\r\nHost: 127.0.0.1:")
    assert b"Content-Length: 4" in head
    assert body == b"[{}]"


def test_one_that_does_not_answer_is_not_waited_for() -> None:
    with server(b"HTTP/1.1 200", hangs=True) as (url, _):
        assert post_json(url, b"[{}]", 0.05) is Failure.TIMEOUT


def test_one_that_is_not_there_and_one_without_tls() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    assert post_json(f"http://127.0.0.1:{port}/", b"[]", 1.0) is Failure.REFUSED
    assert post_json(f"http://{'a' * 70}.invalid/", b"[]", 1.0) is Failure.UNREACHABLE
    with server(b"HTTP/1.1 200 OK\r\n\r\n", at_once=True) as (url, _):
        assert post_json(url.replace("http:", "https:"), b"[{}]", 1.0) is Failure.TLS


# ---- all of it ----


def test_a_slow_request_reaches_every_alertmanager_and_none_is_asked_for_where_none_is_configured() -> None:
    text = (
        "services: [{name: roleplay, match: {port: 8000}}]\n"
        "slos: [{name: first-token, sli: ttft, below: 300ms, target: 99%}]\n"
    )
    alone = parse(text)
    wanted = parse(f"{text}alertmanagers: [{{url: 'http://one:9093'}}, {{url: 'http://two:9093', timeout: 1s}}]\n")
    now_ns = 1_000_003 * SECOND
    slis = Slis(extra_bounds=bounds(wanted.slos), clock=lambda: now_ns)
    network = Network()
    path = FastPath(alone, slis, lambda: (), lambda: WALL_NS, network)
    assert not path.is_on
    assert path.report() is None
    path.tick(None, now_ns)
    path.reconfigure(wanted)
    assert path.is_on
    for _ in range(3):
        slis.series("roleplay", "bard", "chat_completions", (), True).first_token(SECOND, now_ns)
    path.start()
    path.tick(None, now_ns)
    for _ in range(2):
        assert network.came.acquire(timeout=PATIENCE_S)
    path.stop()
    assert {url for url, _ in network.posts} == {f"http://{name}:9093/api/v2/alerts" for name in ("one", "two")}
    report = path.report()
    assert report is not None
    assert report.firing["ErrorBudgetBurn"] == 1
    assert [each.taken for each in report.delivered] == [1, 1]
    path.reconfigure(alone)
    assert path.report() is None


def test_what_metrics_tell() -> None:
    delivered = Delivered("http://one:9093", 23, 5, dict.fromkeys(Failure, 0) | {Failure.TLS: 7})
    scrape = Scrape(0, 0.0, (), None, ReaderStatus(0), alerts=AlertReport({"FootlightServiceGone": 1}, 3, [delivered]))
    told = {family.spec.text_name(): dict(family.points(scrape)) for family in alert_families()}
    assert told["footlight_alerts_firing"] == {("FootlightServiceGone",): 1}
    assert told["footlight_alerts_unfollowed"] == {(): 3}
    assert told["footlight_alert_notifications_total"] == {("http://one:9093",): 23}
    assert told["footlight_alert_notifications_dropped_total"] == {("http://one:9093",): 5}
    failures = told["footlight_alert_notification_failures_total"]
    assert {labels: count for labels, count in failures.items() if count} == {("http://one:9093", "tls"): 7}
    assert len(failures) == len(Failure)
    nobody = Scrape(0, 0.0, (), None, ReaderStatus(0))
    assert [list(family.points(nobody)) for family in alert_families()] == [[]] * 5


# ---- the configuration ----


def test_the_section_of_the_configuration() -> None:
    found = parse(
        "services: [{name: a, match: {port: 1}}]\n"
        "alertmanagers:\n"
        "  - url: https://alerts.example/am/\n"
        "    labels: {cluster: north}\n"
        "    agent_labels: {job: footlight}\n"
        "    timeout: 500ms\n"
        "  - {url: 'http://[::1]:9093'}\n"
    )
    assert found.alertmanagers == (
        Alertmanager("https://alerts.example/am", {"cluster": "north"}, {"job": "footlight"}, 0.5),
        Alertmanager("http://[::1]:9093"),
    )


@pytest.mark.parametrize(
    ("section", "line", "what"),
    [
        ("url: http://one:9093", 2, "must be a list"),
        ("[{labels: {a: b}}]", 2, "the key 'url' is missing"),
        ("[{url: one:9093}]", 2, "is not the URL of an Alertmanager"),
        ("[{url: 'http://user:word@one:9093'}]", 2, "is not the URL of an Alertmanager"),
        ("[{url: 'http://one:9093/?a=b'}]", 2, "is not the URL of an Alertmanager"),
        ("[{url: 'http://one:99999'}]", 2, "is not the URL of an Alertmanager"),
        ("[{url: 'http://one'},\n {url: 'http://one/'}]", 3, "is given twice"),
        ("[{url: 'http://one',\n labels: {alertname: b}}]", 3, "the label name 'alertname' is taken"),
        ("[{url: 'http://one',\n agent_labels: {probe: b}}]", 3, "the label name 'probe' is taken"),
        ("[{url: 'http://one',\n labels: {a-b: b}}]", 3, "is not a label name"),
        ("[{url: 'http://one',\n timeout: 5m}]", 3, "must be a time from 100ms to 1m"),
        ("[{url: 'http://one',\n proxy: x}]", 3, "unknown key 'proxy'"),
    ],
)
def test_what_is_wrong_is_refused_with_its_line(section: str, line: int, what: str) -> None:
    block = f"\n  {section}" if section.startswith("url") else f" {section}"
    with pytest.raises(ConfigError) as raised:
        parse(f"services: [{{name: a, match: {{port: 1}}}}]\nalertmanagers:{block}\n")
    assert what in str(raised.value)
    assert raised.value.line == (line + 1 if block.startswith("\n") else line)


def test_the_words_are_repeated_before_an_alertmanager_forgets() -> None:
    assert 2 * AGAIN_NS < LASTS_NS
