"""The alerts that cannot wait: when they begin, when they are over, and that the rules' alert is the same one."""

from __future__ import annotations

import itertools
import json
import random
import re
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from exporter.alerting import (
    ATTACHES_NS,
    BURN,
    CUT_OFF,
    FAIL,
    GONE,
    KEEPS_NS,
    LASTS_NS,
    LOSES,
    MOST_REQUESTS,
    MOST_ROWS,
    NAMES,
    PROBE_DOWN,
    Alert,
    Alerting,
)
from exporter.alertmanager import Notice, Notifier, Outbox
from exporter.config import Alertmanager, Config, parse
from exporter.critical_path import Cause
from exporter.fast_burn import LIMIT, WINDOW_S, FastBurn, Weights
from exporter.labels import OTHER
from exporter.live_request import Request
from exporter.metrics import Metrics
from exporter.objectives import bounds
from exporter.request import Capture, Failure, FinishedRequest, Phase
from exporter.requests import LINGER_NS
from exporter.slis import CausePhase, Series, Slis
from exporter.slo.native import natives
from exporter.slo.rules import groups
from exporter.status import AgentStatus, Loss, ProbeStatus, TargetStatus
from probes.wire.apis import Api
from probes.wire.http1 import ResponseHead
from tests.conversations import (
    CLOSE_WAIT,
    DONE,
    LAST_CHUNK,
    SSE_HEAD,
    Scene,
    Wire,
    chunk,
    finish,
    post,
    stream,
    word,
)
from tests.unit.finished import REQUEST, later

ROOT = Path(__file__).resolve().parents[2]
MS = 1_000_000
SECOND = 1_000_000_000
START_NS = 1_000_003 * SECOND
WEIGHTS = Weights.of(0.01, 14.4)

FIRST_TOKEN = "{name: first-token, sli: ttft, below: 300ms, target: 99%}"
NO_ERRORS = "{name: no-errors, sli: errors, target: 99.9%}"


def config(*slos: str, services: str = "[{name: roleplay, match: {port: 8000}}]") -> Config:
    return parse(f"services: {services}\nslos: [{', '.join(slos)}]\n")


class Stage:
    """A service, its series, and what looks at them. `look` is one tick of the reader."""

    def __init__(self, *slos: str, services: str = "[{name: roleplay, match: {port: 8000}}]") -> None:
        self.now_ns = START_NS
        self.config = config(*slos, services=services)
        self.slis = Slis(extra_bounds=bounds(self.config.slos), clock=lambda: self.now_ns)
        self.under_way: list[Request] = []
        self.left: set[int] = set()  # the numbers of those whose client has gone
        self._numbers = itertools.count(1)
        self.status: AgentStatus | None = status()
        walk = lambda: [(request, request.number in self.left) for request in self.under_way]  # noqa: E731
        self.alerting = Alerting(self.config, self.slis, walk)

    def series(self, model: str = "bard", service: str = "roleplay", api: str = "chat_completions") -> Series:
        return self.slis.series(service, model, api, (), admit=True)

    def first_tokens(self, ttft_ms: int, count: int, model: str = "bard") -> None:
        for _ in range(count):
            self.series(model).first_token(ttft_ms * MS, self.now_ns)

    def finished(self, *, count: int = 1, **changes: object) -> None:
        for _ in range(count):
            request: FinishedRequest = replace(later(REQUEST, self.now_ns), **changes)  # type: ignore[arg-type]
            self.series(request.model or "").finished(request)

    def ask(self, model: str = "bard", *, stream: bool = True, arrived_ms_ago: int = 0) -> Request:
        at_ns = self.now_ns - arrived_ms_ago * MS
        request = Request(at_ns - MS, at_ns, 101, 103)
        request.follow(Api.CHAT_COMPLETIONS, b"/v1/chat/completions", "roleplay", (), next(self._numbers), self.slis)
        request.take_body(json.dumps({"model": model, "messages": [], "stream": stream}).encode())
        request.end_body()
        self.under_way.append(request)
        return request

    def says(self, request: Request) -> None:
        """Hand a token over."""
        if request.status is None:
            request.take_answer_head(ResponseHead(200, {b"content-type": b"text/event-stream"}))
        request.take_answer(word(model=request.model or ""), self.now_ns, None)

    def leave(self, *requests: Request) -> None:
        """Let their clients go. What the service does with them goes on."""
        self.left.update(request.number for request in requests)

    def end(self, *requests: Request, aborted: bool = False) -> None:
        """Let the service end them."""
        for request in requests:
            self.under_way.remove(request)
            request.series().finished(request.finish(self.now_ns, aborted=aborted))

    def look(self, after_s: float = 0.25) -> dict[str, list[Alert]]:
        self.now_ns += round(after_s * SECOND)
        if self.status is not None:
            self.status = replace(self.status, at_ns=self.now_ns)
        found: dict[str, list[Alert]] = {}
        for alert in self.alerting.look(self.status, self.now_ns):
            found.setdefault(alert.name, []).append(alert)
        return found


def status(processes: int = 1, *, up: bool = True, events: int = 0, lost: int = 0) -> AgentStatus:
    probe = ProbeStatus("requests", up, "" if up else "gone", events, None, None, (Loss("ring_full", lost),))
    return AgentStatus(START_NS, "ring", (probe,), (TargetStatus("roleplay", processes, 1),), 0, ())


# ---- the proof ----


def test_three_bad_events_in_a_row_are_proof_and_two_are_not() -> None:
    assert WEIGHTS.fewest_bad == 3
    burn = FastBurn(WEIGHTS)
    assert not burn.take(2, 2, 0, START_NS)
    assert burn.take(1, 1, 0, START_NS)
    assert (burn.bad, burn.events) == (3, 3)


def test_good_events_between_them_ask_for_more() -> None:
    burn = FastBurn(WEIGHTS)
    for _ in range(3):
        assert not burn.take(1, 11, 0, START_NS)
    assert burn.take(2, 2, 0, START_NS)


def test_bad_events_a_minute_apart_are_no_row() -> None:
    burn = FastBurn(WEIGHTS)
    for number in range(23):
        assert not burn.take(1, 1, 0, START_NS + number * (WINDOW_S + 1) * SECOND)


def test_it_lasts_while_the_proof_is_renewed_and_is_over_a_minute_later() -> None:
    burn = FastBurn(WEIGHTS)
    burn.take(0, 1009, 0, START_NS)  # they are no reason to think that it is over
    assert burn.take(3, 3, 0, START_NS)
    for second in range(1, 101):
        assert burn.take(1, 7, 0, START_NS + second * SECOND)  # a seventh of them is bad
    for second in range(101, 100 + WINDOW_S):
        assert burn.take(0, 7, 0, START_NS + second * SECOND)
    assert not burn.take(0, 7, 0, START_NS + (100 + WINDOW_S) * SECOND)
    assert not burn.take(2, 2, 0, START_NS + (101 + WINDOW_S) * SECOND)  # it begins anew
    assert burn.take(1, 1, 0, START_NS + (101 + WINDOW_S) * SECOND)


def test_few_bad_events_are_no_proof_that_it_lasts() -> None:
    burn = FastBurn(WEIGHTS)
    assert burn.take(3, 3, 0, START_NS)
    ended = [second for second in range(1, 3600) if not burn.take(second % 2, 37, 0, START_NS + second * SECOND)]
    assert ended[0] == WINDOW_S  # 1 of 74 is more than the objective allows, and no fast burn


def test_it_lasts_while_as_much_as_a_proof_is_not_over() -> None:
    burn = FastBurn(WEIGHTS)
    assert burn.take(3, 3, 3, START_NS)
    assert burn.take(0, 0, 3, START_NS + 3600 * SECOND)
    assert burn.take(0, 0, 2, START_NS + 3601 * SECOND)
    assert not burn.take(0, 0, 2, START_NS + 3660 * SECOND)


def test_where_the_objective_just_holds_false_alarms_are_further_apart_than_promised() -> None:
    draw, burn, alarms, events = random.Random(23), FastBurn(WEIGHTS), 0, 200_003
    for number in range(events):
        was = burn.is_burning
        now_ns = START_NS + number * SECOND // 20
        alarms += burn.take(int(draw.random() < 0.01), 1, 0, now_ns) and not was
    assert alarms * 2000 < events


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50), st.integers(0, 50), st.integers(0, 90)), max_size=50))
def test_the_last_minute_is_counted_as_it_was(ticks: list[tuple[int, int, int, int]]) -> None:
    burn, now_s, seen = FastBurn(WEIGHTS), 1_000_003, []
    for bad, good, lasting, pause_s in ticks:
        now_s += pause_s
        seen.append((now_s, bad, bad + good))
        burn.take(bad, bad + good, lasting, now_s * SECOND)
        recent = [each for each in seen if each[0] > now_s - WINDOW_S]
        assert (burn.bad, burn.events) == (sum(each[1] for each in recent), sum(each[2] for each in recent))


@pytest.mark.parametrize("budget", ["0.001", "0.01", "0.05", "0.15"])
def test_the_weights_are_those_of_a_likelihood_ratio(budget: str) -> None:
    weights = Weights.of(float(budget), 6)
    # Where the budget burns as assumed an event speaks for it on average, where the objective just holds against it.
    for share, sign in ((float(budget) * 6, 1), (float(budget), -1)):
        assert sign * (share * weights.bad + (1 - share) * weights.good) > 0
    assert (weights.fewest_bad - 1) * weights.bad < LIMIT <= weights.fewest_bad * weights.bad


# ---- objectives ----


def test_slow_first_tokens_fire_and_good_ones_do_not() -> None:
    stage = Stage(FIRST_TOKEN)
    stage.first_tokens(300, 101)
    assert stage.look() == {}
    stage.first_tokens(301, 2)
    assert stage.look() == {}
    stage.first_tokens(301, 1)
    (alert,) = stage.look()[BURN]
    assert dict(alert.labels)["model_name"] == "bard"
    assert alert.since_ns == stage.now_ns
    assert alert.fades
    assert "3 of 104 events of the last minute were not within 0.3 s" in alert.description
    began_ns = alert.since_ns
    assert "Largest cause" not in alert.description
    (alert,) = stage.look()[BURN]
    assert alert.since_ns == began_ns
    assert stage.alerting.counts() == {**dict.fromkeys(NAMES, 0), BURN: 1}


def test_the_largest_cause_of_slow_first_tokens_is_told() -> None:
    stage = Stage(FIRST_TOKEN)
    series = stage.series()
    series.explain(CausePhase.TTFT, {Cause.lock: 3.0 * SECOND, Cause.on_cpu: 1.0 * SECOND})
    series.explain(CausePhase.DECODE, {Cause.gpu: 97.0 * SECOND})
    stage.first_tokens(301, 7)
    (alert,) = stage.look()[BURN]
    assert alert.description.endswith(". Largest cause: lock, 75% of the time.")
    assert stage.look(WINDOW_S) == {}


def test_its_labels_are_those_of_the_alert_of_the_rules() -> None:
    stage = Stage(FIRST_TOKEN)
    stage.first_tokens(301, 3)
    (alert,) = stage.look()[BURN]
    rules = [rule for group in groups([each.objective for each in natives(stage.config)], "1") for rule in group.rules]
    (page,) = [rule for rule in rules if rule.alert == BURN and rule.labels["sloth_severity"] == "page"]
    (native,) = natives(stage.config)
    assert native.groups == ("service_name", "model_name")
    of_expression = {"service_name": "roleplay", "model_name": "bard"}
    assert dict(alert.labels) == {"alertname": page.alert, **page.labels, **of_expression}


def test_who_waits_too_long_counts_before_the_first_token_and_not_again_with_it() -> None:
    stage = Stage(FIRST_TOKEN)
    stage.first_tokens(20, 1)
    waiting = [stage.ask() for _ in range(2)]
    assert stage.look(0.299) == {}
    assert stage.look(0.002) == {}  # two are over it now
    for request in waiting:
        stage.says(request)
    assert stage.look() == {}
    stage.end(*waiting)
    assert stage.look() == {}
    stage.ask(arrived_ms_ago=400)
    assert len(stage.look()[BURN]) == 1


def test_who_waits_too_long_and_leaves_does_not_count_again_when_the_service_answers_nobody() -> None:
    stage = Stage(FIRST_TOKEN)
    stage.first_tokens(20, 1)
    waiting = [stage.ask() for _ in range(2)]
    assert stage.look(0.4) == {}
    stage.leave(*waiting)
    assert stage.look() == {}
    for request in waiting:
        stage.says(request)
    assert stage.look() == {}
    stage.end(*waiting, aborted=True)
    assert stage.look() == {}
    stage.first_tokens(301, 1)
    (alert,) = stage.look()[BURN]
    assert "3 of 4 events" in alert.description


def test_who_leaves_unanswered_stays_counted_and_excuses_nobody_else() -> None:
    stage = Stage(FIRST_TOKEN)
    stage.first_tokens(20, 1)
    gone = [stage.ask(arrived_ms_ago=301) for _ in range(2)]
    assert stage.look() == {}
    stage.end(*gone, aborted=True)
    stage.first_tokens(301, 1)  # of one that was never seen waiting
    (alert,) = stage.look()[BURN]
    assert "3 of 4 events" in alert.description


def test_others_that_come_as_those_before_leave_count_as_well() -> None:
    stage = Stage(FIRST_TOKEN)
    stage.first_tokens(20, 1)
    found = []
    for _ in range(2):
        stage.end(*stage.under_way, aborted=True)
        for _ in range(2):
            stage.ask(arrived_ms_ago=301)
        found.append(BURN in stage.look())
    assert found == [False, True]


@pytest.mark.parametrize("order", ["answered, then left", "left"])
def test_a_duration_that_was_too_long_under_way_does_not_count_again_at_its_end(order: str) -> None:
    stage = Stage("{name: whole-answer, sli: duration, below: 5s, target: 99%}")
    stage.first_tokens(20, 1)
    long = [stage.ask() for _ in range(2)]
    if order != "left":
        for request in long:
            stage.says(request)
    assert stage.look(5.1) == {}
    stage.leave(*long)
    assert stage.look(1) == {}
    stage.end(*long, aborted=True)
    assert stage.look(1) == {}
    brief = stage.ask(arrived_ms_ago=5001)
    stage.end(brief)
    (alert,) = stage.look()[BURN]
    assert "3 of 3 events" in alert.description


@pytest.mark.parametrize("goes_on", [True, False])
def test_a_gap_that_was_too_long_while_it_lasted_counts_once_however_it_ended(goes_on: bool) -> None:
    stage = Stage("{name: fluent, sli: longest_gap, below: 1s, target: 99%}")
    stage.first_tokens(20, 1)
    stalled = [stage.ask() for _ in range(2)]
    for request in stalled:
        stage.says(request)
    assert stage.look(1.1) == {}
    if goes_on:
        for request in stalled:
            stage.says(request)
        assert stage.look() == {}
    stage.end(*stalled, aborted=True)
    stage.finished(longest_gap_ns=1001 * MS)
    (alert,) = stage.look()[BURN]
    assert "3 of 3 events" in alert.description


def test_a_request_that_counted_for_other_models_excuses_none_of_them_when_its_own_tells_of_it() -> None:
    stage = Stage(FIRST_TOKEN)
    newcomer = stage.ask("newcomer", arrived_ms_ago=301)
    assert stage.look() == {}
    stage.says(newcomer)  # it has a label of its own from here on
    stage.first_tokens(301, 1, OTHER)
    assert stage.look() == {}
    stage.first_tokens(301, 1, OTHER)
    (alert,) = stage.look()[BURN]
    assert dict(alert.labels)["model_name"] == OTHER


def test_what_counted_before_a_reload_does_not_count_again_after_it() -> None:
    stage = Stage(FIRST_TOKEN)
    stage.first_tokens(20, 1)
    waiting = [stage.ask(arrived_ms_ago=301) for _ in range(2)]
    assert stage.look() == {}
    stage.alerting.reconfigure(config(NO_ERRORS, FIRST_TOKEN))
    for request in waiting:
        stage.says(request)
    assert stage.look() == {}
    stage.first_tokens(301, 1)
    assert BURN in stage.look()


def test_more_requests_than_are_looked_at_do_not_count_again_when_they_are_answered() -> None:
    stage = Stage(FIRST_TOKEN)
    stage.first_tokens(20, 1)
    counted = [stage.ask(arrived_ms_ago=301) for _ in range(2)]
    assert stage.look() == {}
    stage.under_way[:0] = [stage.ask(stream=False) for _ in range(MOST_REQUESTS)]
    del stage.under_way[-MOST_REQUESTS:]
    assert stage.look() == {}
    for request in counted:
        stage.says(request)
    assert stage.look() == {}


def test_a_client_that_leaves_counts_once_whatever_its_connection_tells_after_that() -> None:
    scene = Scene()
    slow = [Wire(conn=number, rx=number, tx=number) for number in (2, 3)]
    late, quick = Wire(conn=4, rx=4, tx=4), Wire()
    quick.ask(post())
    stream(quick)
    scene.play(quick)
    wanted = config(FIRST_TOKEN, "{name: whole-answer, sli: duration, below: 300ms, target: 99%}")
    alerting = Alerting(wanted, scene.slis, scene.conversations.under_way)

    def look() -> list[str]:
        scene.play(*slow, late)
        now_ns = max(wire.ns for wire in (*slow, late))
        scene.conversations.sweep(now_ns)
        return [alert.description for alert in alerting.look(status(), now_ns)]

    steps: tuple[Callable[[Wire], None], ...] = (
        lambda wire: wire.ask(post()),
        lambda wire: wire.write(SSE_HEAD, after_ms=400),
        lambda wire: wire.go(CLOSE_WAIT),
        lambda wire: wire.write(chunk(word()), after_ms=400),
        lambda wire: wire.write(chunk(finish()) + chunk(DONE) + LAST_CHUNK, after_ms=1),
        lambda wire: wire.write(b"", after_ms=LINGER_NS / MS),
    )
    for step in steps:
        for wire in slow:
            step(wire)
        assert look() == []
    assert len(scene.finished) == 3
    late.at = slow[0].at
    late.ask(post())
    stream(late, first_ms=400)
    assert ["3 of 3" in each for each in look()] == [True, True]


def test_an_engine_that_stopped_is_told_of_and_stays_told_of() -> None:
    stage = Stage(FIRST_TOKEN)
    stage.first_tokens(20, 97)
    stage.look()
    for _ in range(3):
        stage.ask()
    assert stage.look(0.25) == {}
    assert BURN in stage.look(0.25)
    assert BURN in stage.look(600)
    stage.leave(*stage.under_way)
    assert BURN in stage.look(WINDOW_S - 1)
    assert stage.look(1) == {}


def test_a_request_that_wants_no_stream_or_was_not_seen_whole_does_not_wait_for_a_first_token() -> None:
    stage = Stage(FIRST_TOKEN)
    for _ in range(23):
        stage.ask(stream=False)
        stage.ask().spoil(Capture.lost_events)
    assert stage.look(5) == {}


def test_whoever_waits_for_a_model_that_never_answered_is_counted_under_the_other_models() -> None:
    stage = Stage(FIRST_TOKEN)
    for _ in range(3):
        stage.ask("newcomer")
    (alert,) = stage.look(1)[BURN]
    assert dict(alert.labels)["model_name"] == OTHER


def test_a_request_that_lasts_too_long_counts_before_its_end() -> None:
    stage = Stage("{name: whole-answer, sli: duration, below: 5s, target: 99%}")
    for _ in range(3):
        stage.ask(stream=False)
    assert stage.look(4) == {}
    assert BURN in stage.look(1.1)


def test_models_and_objectives_are_told_apart_and_apis_are_not() -> None:
    stage = Stage(FIRST_TOKEN, NO_ERRORS)
    for api in ("chat_completions", "completions", "messages"):
        stage.series("bard", api=api).first_token(301 * MS, stage.now_ns)
        stage.series(f"only-{api}", api=api).first_token(301 * MS, stage.now_ns)
    (alert,) = stage.look()[BURN]
    assert dict(alert.labels)["model_name"] == "bard"
    assert dict(alert.labels)["sloth_slo"] == "first-token"


def test_errors_count_by_the_reasons_of_the_objective() -> None:
    stage = Stage(NO_ERRORS)
    stage.finished(count=101)
    stage.finished(count=29, failure=Failure.client_error)
    assert stage.look() == {}
    stage.finished(count=3, failure=Failure.cut_off)
    found = stage.look()
    assert dict(found[BURN][0].labels)["sloth_slo"] == "no-errors"
    assert CUT_OFF not in found


def test_failures_are_told_of_where_no_objective_is_about_them() -> None:
    stage = Stage(FIRST_TOKEN)
    stage.finished(count=101, failure=Failure.rate_limited)
    assert stage.look() == {}
    stage.finished(count=3, failure=Failure.server_error)
    assert list(stage.look()) == [FAIL]
    stage.finished(count=3, failure=Failure.cut_off)
    found = stage.look()
    for name in (FAIL, CUT_OFF):
        (alert,) = found[name]
        labels = {"alertname": name, "service_name": "roleplay", "model_name": "bard"}
        assert dict(alert.labels) == {**labels, "severity": "critical", "kind": "symptom"}


def test_failures_are_left_to_an_objective_about_them_even_where_it_cannot_burn_fast() -> None:
    stage = Stage("{name: few-errors, sli: errors, target: 80%}")
    stage.finished(count=101, failure=Failure.server_error)
    assert stage.look() == {}


def test_failures_of_the_models_without_an_objective_about_them_are_told_of() -> None:
    stage = Stage("{name: no-errors, sli: errors, target: 99.9%, model_name: bard}")
    stage.finished(count=3, failure=Failure.server_error)
    stage.finished(count=3, failure=Failure.server_error, model="alto")
    models = {name: [dict(alert.labels)["model_name"] for alert in alerts] for name, alerts in stage.look().items()}
    assert models == {BURN: ["bard"], FAIL: ["alto"]}


def test_aborts_count() -> None:
    stage = Stage("{name: stay, sli: aborts, target: 99%}")
    stage.finished(count=3, aborted=Phase.waiting)
    assert BURN in stage.look()


def test_a_budget_that_cannot_burn_fast_and_gaps_of_one_stream_are_left_to_the_rules() -> None:
    stage = Stage(
        "{name: half, sli: ttft, below: 300ms, target: 50%}", "{name: gaps, sli: itl, below: 50ms, target: 99%}"
    )
    stage.first_tokens(301, 101)
    for _ in range(101):
        stage.series().gap(100 * MS)
    assert stage.look() == {}


def test_what_was_counted_before_a_reload_is_not_held_against_a_new_objective() -> None:
    stage = Stage(NO_ERRORS)
    stage.first_tokens(301, 101)
    stage.look()
    wanted = config(FIRST_TOKEN)
    stage.slis.add_bounds(bounds(wanted.slos))
    stage.alerting.reconfigure(wanted)
    assert stage.look() == {}
    stage.first_tokens(301, 3)
    stage.first_tokens(301, 3, "new")
    assert len(stage.look()[BURN]) == 2


def test_what_burns_goes_on_when_something_else_is_reloaded() -> None:
    stage = Stage(FIRST_TOKEN)
    stage.first_tokens(301, 3)
    (alert,) = stage.look()[BURN]
    stage.first_tokens(301, 1)
    stage.alerting.reconfigure(config(NO_ERRORS, FIRST_TOKEN))
    (after,) = stage.look()[BURN]
    assert (after.since_ns, after.labels) == (alert.since_ns, alert.labels)
    assert "4 of 4 events" in after.description
    stage.alerting.reconfigure(config(NO_ERRORS))
    assert stage.look() == {}


def test_rows_are_bounded_and_those_without_room_are_counted() -> None:
    stage = Stage(*(f"{{name: slo-{number}, sli: ttft, below: 300ms, target: 99%}}" for number in range(7)))
    for number in range(64):
        stage.first_tokens(301, 3, f"model-{number}")
    assert len(stage.look()[BURN]) <= MOST_ROWS
    unfollowed = 64 * 9 - MOST_ROWS  # 7 objectives, and two for failures
    assert stage.alerting.unfollowed == unfollowed
    stage.ask("model-63", arrived_ms_ago=301)
    for _ in range(5):
        stage.look()
    assert stage.alerting.unfollowed == unfollowed
    stage.alerting.reconfigure(config())
    assert stage.alerting.unfollowed == 0


# ---- services and the agent ----


def test_a_service_whose_last_process_ended_is_down_and_up_again() -> None:
    stage = Stage()
    stage.look()
    stage.status = status(0)
    assert stage.look() == {}
    (alert,) = stage.look(LASTS_NS / SECOND)[GONE]
    labels = {"alertname": GONE, "service_name": "roleplay", "severity": "critical", "kind": "cause"}
    assert dict(alert.labels) == labels
    assert alert.of_agent
    began_ns = alert.since_ns
    stage.status = status(1)
    (alert,) = stage.look(KEEPS_NS / SECOND)[GONE]
    assert alert.since_ns == began_ns
    assert "It is back" in alert.description
    stage.status = status(0)  # gone again: that is the same outage
    stage.look()
    stage.status = status(1)
    stage.look()
    (alert,) = stage.look(KEEPS_NS / SECOND - 1)[GONE]
    assert alert.since_ns == began_ns
    assert stage.look(1) == {}


def test_a_service_that_starts_again_at_once_was_not_gone() -> None:
    stage = Stage()
    stage.look()
    stage.status = status(0)
    stage.look()
    stage.status = status(1)
    assert stage.look(1) == {}
    assert stage.look(LASTS_NS / SECOND) == {}


def test_that_a_service_was_gone_lasts_longer_for_an_alertmanager_than_what_its_users_felt() -> None:
    stage = Stage(FIRST_TOKEN)
    ends: dict[str, str] = {}

    def post(_url: str, body: bytes, _timeout_s: float) -> None:
        ends.update({each["labels"]["alertname"]: each["endsAt"] for each in json.loads(body)})

    notifier = Notifier([Alertmanager("http://one")], lambda: stage.now_ns, post)

    def tick() -> None:
        stage.look()
        notifier.take(stage.alerting.firing, stage.now_ns)
        assert notifier.outboxes[0].deliver()

    stage.first_tokens(301, 3)
    tick()
    stage.status = status(0)
    for _ in range(4 * 5):
        tick()
    assert ends.keys() == {BURN, GONE}
    stage.status = status(1)
    stage.first_tokens(301, 23)  # it is slow at first
    while stage.alerting.firing:
        tick()
    assert ends[GONE] > ends[BURN]


def test_a_service_that_never_ran_or_is_wanted_no_more_is_not_down() -> None:
    stage = Stage()
    stage.status = status(0)
    stage.look()
    assert stage.look(3600) == {}
    stage.status = status(1)
    stage.look()
    stage.status = status(0)
    stage.alerting.reconfigure(config(services="[{name: other, match: {port: 8001}}]"))
    stage.look()
    assert stage.look(3600) == {}


def test_a_probe_that_is_not_up_any_more() -> None:
    stage = Stage()
    stage.look()
    stage.status = status(up=False)
    assert stage.look() == {}
    (alert,) = stage.look(LASTS_NS / SECOND)[PROBE_DOWN]
    assert alert.description == "gone. What it measures is absent."
    labels = {"alertname": PROBE_DOWN, "probe": "requests", "severity": "warning", "kind": "agent"}
    assert dict(alert.labels) == labels
    stage.status = status()
    assert stage.look() == {}


def test_an_agent_that_begins_is_given_time() -> None:
    stage = Stage()
    stage.status = None
    assert stage.look() == {}
    stage.status = status(up=False)
    assert stage.look() == {}
    assert stage.look(LASTS_NS / SECOND) == {}
    assert PROBE_DOWN in stage.look(ATTACHES_NS / SECOND)


def test_a_probe_that_nobody_insists_on_may_be_down() -> None:
    stage = Stage()
    down = status(up=False)
    stage.status = replace(down, probes=(replace(down.probes[0], required=False),))
    assert stage.look() == {}
    assert stage.look(3600) == {}


def test_a_probe_that_loses_events_is_told_of_and_one_that_loses_few_is_not() -> None:
    stage = Stage()
    for second in range(1, 6):
        stage.status = status(events=100_003 * second, lost=997 * second)  # just below 1%
        assert stage.look(1) == {}
    for second in range(1, 11):
        stage.status = status(events=500_015 + 1009 * second, lost=4985 + 101 * second)
        found = stage.look(1)
    assert "were lost" in found[LOSES][0].description
    assert stage.look(30) == {}


def test_the_alerts_are_those_of_the_ready_made_rules() -> None:
    file = yaml.safe_load((ROOT / "dashboards/rules/footlight.yaml").read_text("utf-8"))
    rules = {rule["alert"]: rule for group in file["groups"] for rule in group["rules"] if "alert" in rule}
    stage = Stage()
    stage.finished(count=3, failure=Failure.server_error)
    stage.finished(count=3, failure=Failure.cut_off)
    stage.look()
    stage.status = status(0, up=False, events=1009, lost=503)
    stage.look(1)
    found = stage.look(LASTS_NS / SECOND)
    assert {*found, BURN} == set(NAMES)
    for name, (alert,) in found.items():
        labels = dict(alert.labels)
        del labels["alertname"]
        assert {key: labels.pop(key) for key in ("severity", "kind")} == rules[name]["labels"]
        expr = rules[name]["expr"]
        grouped = {frozenset(each.split(", ")) for each in re.findall(r"\bby \(([^)]+)\)", expr)}
        assert grouped == {frozenset({*labels, "instance" if alert.of_agent else "tenant"})}


POD = {"__meta_kubernetes_pod_name": "footlight-x7k2p", "__meta_kubernetes_pod_node_name": "node-3"}
OF_AGENT = {
    GONE: {"footlight_target_processes": "3x40 0x40"},
    PROBE_DOWN: {"footlight_probe_up": "0x80", "footlight_probe_required": "1x80"},
    LOSES: {"footlight_lost_events_total": "0+10x80", "footlight_probe_events_total": "0+100x80"},
}
"""What alerts about one agent are made of: their metrics, every 15 s."""


def test_the_alert_of_the_rules_has_the_labels_of_the_agents_in_a_pod(tmp_path: Path) -> None:
    stage = Stage()
    stage.look()
    stage.status = status(0, up=False, events=1009, lost=503)
    stage.look(1)
    found = stage.look(LASTS_NS / SECOND)
    network: list[bytes] = []
    outbox = Outbox(
        Alertmanager("http://one"), lambda _url, body, _s: network.append(body), POD["__meta_kubernetes_pod_name"]
    )
    outbox.put(Notice(each.labels, "", "", 0, 0, each.of_agent) for name in OF_AGENT for each in found[name])
    assert outbox.deliver()
    posted = [each["labels"] for each in json.loads(network[0])]
    assert {each["alertname"] for each in posted} == OF_AGENT.keys()
    monitor = yaml.safe_load((ROOT / "deploy/base/podmonitor.yaml").read_text("utf-8"))
    target = as_target(monitor)
    series = [
        {"series": metric + of_series({**target, **labels_of(metric)}), "values": values}
        for metrics in OF_AGENT.values()
        for metric, values in metrics.items()
    ]
    series.append({"series": "footlight_build_info" + of_series(target), "values": "1x80"})
    samples = [{"labels": "ALERTS" + of_series({**each, "alertstate": "firing"}), "value": 1} for each in posted]
    rules = ROOT / "dashboards/rules/footlight.yaml"
    case = {"expr": 'ALERTS{alertstate="firing"}', "eval_time": "15m", "exp_samples": samples}
    file = tmp_path / "tests.yaml"
    file.write_text(
        json.dumps(
            {
                "rule_files": [str(rules)],
                "tests": [{"interval": "15s", "input_series": series, "promql_expr_test": [case]}],
            }
        )
    )
    done = subprocess.run(["promtool", "test", "rules", str(file)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def as_target(monitor: dict[str, Any]) -> dict[str, str]:
    """The labels that a PodMonitor gives a pod's metrics."""
    target = {
        "job": "footlight/footlight",
        "namespace": "footlight",
        "pod": POD["__meta_kubernetes_pod_name"],
        "container": "footlight",
        "endpoint": "metrics",
        "instance": "10.0.0.5:9466",
    }
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    for rule in endpoint["relabelings"]:
        assert rule.keys() == {"sourceLabels", "targetLabel"}, "to replace is all that is understood here"
        target[rule["targetLabel"]] = ";".join(POD[name] for name in rule["sourceLabels"])
    return target


def labels_of(metric: str) -> dict[str, str]:
    """The labels of the agent's own on one of its series."""
    values = {"service_name": "roleplay", "probe": "requests", "reason": "ring_full"}
    (spec,) = (each for each in Metrics(Slis()).specs if each.text_name() == metric)
    return {name: values[name] for name in spec.labels}


def of_series(labels: Mapping[str, str]) -> str:
    """Labels as PromQL writes them."""
    return "{" + ", ".join(f"{name}={json.dumps(value)}" for name, value in labels.items()) + "}"
