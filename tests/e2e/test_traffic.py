"""`footlight run` beside each kind of service: every request and frame is counted, and the times are the client's."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from tests.e2e.agent import Agent, Metrics, agent
from tests.e2e.client import Answer, Ask, connect, talk
from tests.e2e.processes import KINDS, Service, service
from tests.e2e.servers.script import CACHED_TOKENS, PROMPT_TOKENS

CLOSE_S = 0.005
"""How far the agent's mean may be from the client's. The client is a process that has to get a CPU, too."""

PAUSES = {"first_ms": 20, "gap_ms": 5}


def conversations(kind: str) -> list[list[Ask]]:
    """101 requests on 17 connections, of every kind but those that do not end."""
    alto = Ask(model="alto", script={**PAUSES, "frames": 11})
    bass = Ask(model="bass", script={**PAUSES, "frames": 17})
    silent = Ask(model="bass", usage=False, script={**PAUSES, "frames": 13})
    text = Ask(model="alto", chat=False, script={**PAUSES, "frames": 7})
    whole = Ask(model="bass", stream=False, script={"first_ms": 5})
    broken = Ask(model="alto", script={**PAUSES, "error_after": 3})
    refused = Ask(model="no-such-model", script={"status": 400})
    busy = Ask(model="alto", script={"status": 429})
    failed = Ask(model="alto", script={"status": 500})
    # how such a response ends is the connection's end; others chunk it as the rest
    closing = Ask(model="bass", script={**PAUSES, "frames": 5, "framing": "close"})
    long = [[alto, bass, alto, silent, alto, alto, text] for _ in range(7)]  # 49
    short = [[bass, whole], [whole, alto, whole], [text, whole, bass, text], [bass, bass, bass, bass]]  # 13
    failing = [[alto, refused, alto, busy, busy, failed, alto, broken, alto] for _ in range(3)]  # 27
    closed = [[closing, closing], [closing, alto, closing], [closing, *[whole] * 6]]  # 12
    return long + short + failing + closed


@dataclass(frozen=True, slots=True)
class Watched:
    """A service that an agent watches, and what happened to it."""

    service: Service
    agent: Agent
    answers: list[Answer]
    metrics: Metrics

    def streamed(self) -> list[Answer]:
        """The answers that came in frames."""
        return [answer for answer in self.answers if answer.content_ns]


@pytest.fixture(scope="module", params=KINDS)
def watched(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, transport: str
) -> Iterator[Watched]:
    """The whole traffic, over and counted."""
    folder = tmp_path_factory.mktemp("watched")
    arguments = ("run", "--transport", transport, "--service", "stage")
    with service(request.param, folder) as running, agent(folder, *arguments, "--port", str(running.port)) as observer:
        answers = talk(running.port, *conversations(running.kind))
        observer.wait_requests(len(answers))
        # what was counted twice or too late would come now
        observer.wait_metrics("an idle service", lambda metrics: metrics.sum("llm_requests_in_flight") == 0)
        # measured for the first time after a second
        observer.wait_metrics("what it costs", lambda metrics: metrics.sum("footlight_probe_cpu_seconds_total") > 0)
        yield Watched(running, observer, answers, observer.metrics())


def test_every_request_is_counted_under_its_model_and_api(watched: Watched) -> None:
    assert len(watched.answers) == 101
    assert all(answer.complete for answer in watched.answers)
    expected: Counter[tuple[str, str]] = Counter()
    for answer in watched.answers:
        model = "_other" if answer.ask.model == "no-such-model" else answer.ask.model
        expected[model, "chat_completions" if answer.ask.chat else "completions"] += 1
    counted = {
        (labels["model_name"], labels["api"]): value
        for name, labels, value in watched.metrics.samples
        if name == "llm_requests_total"
    }
    assert counted == expected
    assert watched.metrics.one("footlight_model_label_overflows_total", service_name="stage") == 3


def test_every_frame_and_token_is_counted(watched: Watched) -> None:
    metrics = watched.metrics
    for model in ("alto", "bass"):
        of_model = [answer for answer in watched.answers if answer.ask.model == model]
        assert metrics.sum("llm_frames_total", model_name=model) == sum(len(a.content_ns) for a in of_model)
        generated = sum(a.usage["completion_tokens"] if a.usage else len(a.content_ns) for a in of_model)
        assert metrics.sum("llm_generation_tokens_total", model_name=model) == generated
        with_usage = sum(1 for a in of_model if a.usage)
        assert metrics.sum("llm_prompt_tokens_total", model_name=model) == with_usage * PROMPT_TOKENS
        assert metrics.sum("llm_prefix_cache_queries_total", model_name=model) == with_usage * PROMPT_TOKENS
        assert metrics.sum("llm_prefix_cache_hits_total", model_name=model) == with_usage * CACHED_TOKENS
    assert metrics.sum("llm_wasted_generation_tokens_total") == 0


def test_failures_have_their_reasons(watched: Watched) -> None:
    for reason, status in (("client_error", 400), ("rate_limited", 429)):
        expected = sum(1 for answer in watched.answers if answer.status == status)
        assert expected > 0
        assert watched.metrics.sum("llm_request_failures_total", reason=reason) == expected
    broken = sum(1 for answer in watched.answers if answer.status == 500 or (answer.status == 200 and answer.error))
    assert watched.metrics.sum("llm_request_failures_total", reason="server_error") == broken == 6
    assert watched.metrics.sum("llm_request_failures_total", reason="cut_off") == 0
    assert watched.metrics.sum("llm_requests_aborted_total") == 0


def test_everything_was_seen(watched: Watched) -> None:
    metrics = watched.metrics
    assert metrics.one("footlight_capture_total", outcome="complete") == len(watched.answers)
    assert metrics.sum("footlight_capture_total") == len(watched.answers)
    assert metrics.one("footlight_capture_ratio") == 1.0
    lost = {labels["reason"]: value for name, labels, value in metrics.samples if name == "footlight_lost_events_total"}
    assert lost
    assert not any(lost.values()), lost
    assert metrics.one("footlight_probe_up", probe="requests") == 1
    assert metrics.one("footlight_probe_cpu_seconds_total", probe="requests") > 0
    assert metrics.one("footlight_reader_restarts_total") == 0


def test_times_are_the_clients_own(watched: Watched) -> None:
    metrics, streamed = watched.metrics, watched.streamed()
    assert metrics.sum("llm_time_to_first_token_seconds_count") == len(streamed)
    assert metrics.sum("llm_inter_token_latency_seconds_count") == sum(len(a.gaps_s) for a in streamed)
    for model in ("alto", "bass"):
        of_model = [answer for answer in streamed if answer.ask.model == model]
        first = sum(answer.ttft_s for answer in of_model) / len(of_model)
        seen_first = metrics.mean("llm_time_to_first_token_seconds", model_name=model)
        # The client's clock starts before the request arrives and stops after the frame was handed over.
        assert first - CLOSE_S < seen_first < first
        assert seen_first > 0.020
        gaps = [gap for answer in of_model for gap in answer.gaps_s]
        mean_gap = sum(gaps) / len(gaps)
        assert metrics.mean("llm_inter_token_latency_seconds", model_name=model) == pytest.approx(mean_gap, abs=CLOSE_S)
    durations = [(answer.end_ns - answer.sent_ns) / 1e9 for answer in watched.answers]
    mean_duration = sum(durations) / len(durations)
    assert mean_duration - CLOSE_S < metrics.mean("llm_request_duration_seconds") < mean_duration


def test_processes_and_ports_are_those_of_the_service(watched: Watched) -> None:
    # the parent of a pre-forking service holds the listening socket, too, where the workers share it
    expected = {"prefork-shared": 4, "prefork-reuseport": 3}.get(watched.service.kind, 1)
    assert watched.metrics.one("footlight_target_processes", service_name="stage") == expected
    assert watched.metrics.one("footlight_target_ports", service_name="stage") == 1


# ---- what happens after the counted traffic, each with its own difference of two scrapes ----


def difference(watched: Watched, happens: Callable[[], object], requests: int) -> Callable[..., float]:
    """Let something happen that is this many requests; returns a function that says by how much samples grew."""
    before = watched.agent.metrics()
    happens()
    after = watched.agent.wait_requests(int(before.sum("llm_requests_total")) + requests)
    assert after.sum("llm_requests_total") - before.sum("llm_requests_total") == requests

    def grown(name: str, **labels: str) -> float:
        return after.sum(name, **labels) - before.sum(name, **labels)

    return grown


def test_clients_that_leave_are_counted_by_phase(watched: Watched) -> None:
    waiting = Ask(model="alto", leave_after=0, leave_s=0.1, script={"first_ms": 300})
    streaming = Ask(model="alto", leave_after=3, script={"gap_ms": 150})
    silent = Ask(model="alto", stream=False, leave_after=0, leave_s=0.1, script={"first_ms": 300})
    answers: list[Answer] = []
    people = [[waiting]] * 3 + [[streaming]] * 5 + [[silent]] * 3
    grown = difference(watched, lambda: answers.extend(talk(watched.service.port, *people)), 11)
    assert all(answer.left for answer in answers)
    assert grown("llm_requests_aborted_total", phase="waiting") == 6
    assert grown("llm_requests_aborted_total", phase="streaming") == 5
    assert grown("llm_request_failures_total") == 0
    assert grown("footlight_capture_total", outcome="complete") == 11
    assert grown("footlight_capture_total") == 11
    # A service that has not noticed yet hands over frames that nobody takes.
    assert grown("llm_frames_total") - grown("llm_wasted_generation_tokens_total") == 5 * 3
    assert grown("llm_time_to_first_token_seconds_count") == 5


def test_responses_that_the_service_cuts_off(watched: Watched) -> None:
    cut = Ask(model="bass", script={**PAUSES, "cut_after": 3})
    answers: list[Answer] = []
    grown = difference(watched, lambda: answers.extend(talk(watched.service.port, *[[cut]] * 7)), 7)
    assert not any(answer.complete for answer in answers)
    assert grown("llm_request_failures_total", reason="cut_off") == 7
    assert grown("llm_request_failures_total") == 7
    assert grown("llm_requests_aborted_total") == 0
    assert grown("llm_frames_total", model_name="bass") == sum(len(answer.content_ns) for answer in answers) == 21
    assert grown("footlight_capture_total", outcome="complete") == 7


def test_a_quantile_is_within_its_error(watched: Watched) -> None:
    ask_again = Ask(model="quantiles", script={**PAUSES, "frames": 5})
    difference(watched, lambda: talk(watched.service.port, [ask_again] * 23), 23)
    metrics = watched.agent.metrics()
    mean = metrics.mean("llm_time_to_first_token_seconds", model_name="quantiles")
    half, most = (
        metrics.one("llm_latency_quantile_seconds", model_name="quantiles", sli="ttft", quantile=quantile)
        for quantile in ("0.5", "0.99")
    )
    assert 0.020 * 0.99 <= half <= most
    assert 0.020 <= mean <= most * 1.01


# ---- pre-forked workers ----


@pytest.mark.parametrize("kind", ["prefork-shared", "prefork-reuseport"])
def test_a_killed_worker_cuts_off_what_it_answered(
    kind: str, transport: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("killed")
    with (
        service(kind, folder) as running,
        agent(folder, "run", "--transport", transport, "--port", str(running.port)) as observer,
    ):

        async def kill_while_it_streams() -> Answer:
            connection = await connect(running.port)
            stream = Ask(script={"frames": 101, "gap_ms": 50})
            asked = asyncio.ensure_future(connection.ask(stream))
            while connection.answer is None or len(connection.answer.content_ns) < 3:
                await asyncio.sleep(0.005)
            os.kill(int(connection.answer.headers["x-pid"]), signal.SIGKILL)
            return await asked

        answer = asyncio.run(kill_while_it_streams())
        assert not answer.complete
        metrics = observer.wait_requests(1)
        assert metrics.one("llm_request_failures_total", reason="cut_off") == 1
        assert metrics.one("llm_frames_total") == len(answer.content_ns)
        if kind == "prefork-reuseport":
            # Its parent does not listen, so it is no target, and the new worker is found by looking: within 2 s.
            time.sleep(2)
        answers = talk(running.port, *[[Ask(script={"frames": 7, "gap_ms": 20})]] * 23)
        assert len({answer.headers["x-pid"] for answer in answers}) > 1
        metrics = observer.wait_requests(24)
        assert metrics.sum("llm_requests_total") == 24
        assert metrics.one("footlight_capture_total", outcome="complete") == 24
