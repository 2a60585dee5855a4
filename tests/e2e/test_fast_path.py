"""From slow requests to a webhook: the agent posts to a real Alertmanager, which tells a receiver."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.alerts.real import Receiver, alertmanager
from tests.e2e.agent import agent
from tests.e2e.client import Answer, Ask, talk
from tests.e2e.processes import Service, free_port, service
from tests.e2e.test_unreadable_checkout import hidden, python

__all__ = ["hidden", "python"]

TOLD_S = 10.0
GOOD = Ask(script={"frames": 3, "first_ms": 5, "gap_ms": 1})
SLOW = Ask(script={"frames": 3, "first_ms": 1500, "gap_ms": 1})


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    """Takes the webhooks."""
    with Receiver() as taking:
        yield taking


def written(folder: Path, port: int, *urls: str) -> Path:
    """A configuration with one objective, which posts to these Alertmanagers."""
    path = folder / "footlight.yaml"
    targets = [{"url": url, "labels": {"cluster": "north"}, "agent_labels": {"instance": "stage-1"}} for url in urls]
    path.write_text(
        json.dumps(
            {
                "services": [{"name": "stage", "match": {"port": port}, "engine_metrics": "off"}],
                "slos": [{"name": "first-token", "sli": "ttft", "below": "300ms", "target": "99%"}],
                "alertmanagers": targets,
            }
        )
    )
    return path


def test_a_stalled_engine_is_told_of_once_and_before_its_next_token(
    uvicorn: Service, receiver: Receiver, tmp_path: Path
) -> None:
    with alertmanager(tmp_path, "one", receiver) as one, alertmanager(tmp_path, "two", receiver) as two:
        path = written(tmp_path, uvicorn.port, one, two)
        with agent(tmp_path, "run", "--config", str(path)) as observer:
            talk(uvicorn.port, *[[GOOD] * 5] * 2)
            observer.wait_requests(10)
            assert not receiver.told("one")
            answers: list[Answer] = talk(uvicorn.port, *[[SLOW]] * 5)
            for name in ("one", "two"):
                told = receiver.wait(name, TOLD_S, alertname="ErrorBudgetBurn")
                assert told is not None, observer.said()
                assert told.labels == {
                    "alertname": "ErrorBudgetBurn",
                    "service_name": "stage",
                    "model_name": "alto",
                    "cluster": "north",
                    "severity": "critical",
                    "sloth_id": "stage-first-token",
                    "sloth_service": "stage",
                    "sloth_slo": "first-token",
                    "sloth_severity": "page",
                }
                assert told.at_ns < min(answer.content_ns[0] for answer in answers)
            metrics = observer.wait_metrics(
                "the count of what was taken",
                lambda metrics: metrics.sum("footlight_alert_notifications_total") == 2,
            )
            assert metrics.one("footlight_alerts_firing", alertname="ErrorBudgetBurn") == 1
            assert metrics.sum("footlight_alerts_firing") == 1
            assert metrics.sum("footlight_alert_notification_failures_total") == 0
            assert len(receiver.told("one")) == len(receiver.told("two")) == 1


def test_a_service_that_dies_and_comes_back(receiver: Receiver, tmp_path: Path) -> None:
    port = free_port()
    with alertmanager(tmp_path, "one", receiver) as one:
        path = written(tmp_path, port, one)
        with service("threaded", tmp_path, port) as first, agent(tmp_path, "run", "--config", str(path)) as observer:
            # Their streams are cut off.
            long = Ask(script={"frames": 1000, "first_ms": 5, "gap_ms": 50})
            asking = threading.Thread(target=talk, args=(port, *[[long]] * 3))
            asking.start()
            observer.wait_metrics("three streams", lambda metrics: metrics.sum("llm_frames_total") >= 30)
            os.kill(first.pid, signal.SIGKILL)
            asking.join()
            about = {"service_name": "stage", "cluster": "north", "severity": "critical"}
            cut_off = receiver.wait("one", TOLD_S, alertname="FootlightStreamsCutOff")
            assert cut_off is not None, observer.said()
            of_model = {"alertname": "FootlightStreamsCutOff", "model_name": "alto", "kind": "symptom"}
            assert cut_off.labels == {**about, **of_model}
            gone = receiver.wait("one", TOLD_S, alertname="FootlightServiceGone")
            assert gone is not None, observer.said()
            of_host = {"instance": "stage-1", "kind": "cause"}
            assert gone.labels == {**about, **of_host, "alertname": "FootlightServiceGone"}
            with service("threaded", tmp_path, port):
                observer.wait_metrics("its process", lambda metrics: metrics.sum("footlight_target_processes") == 1)
                later = time.monotonic() + 1
                metrics = observer.wait_metrics("a second more", lambda _: time.monotonic() > later)
                # What its users felt of it lasts as well, and nobody is to hear of that now.
                assert metrics.one("footlight_alerts_firing", alertname="FootlightServiceGone") == 1
                assert [each.status for each in receiver.told("one", alertname="FootlightServiceGone")] == ["firing"]


def test_an_alertmanager_that_comes_late_by_a_reload_and_is_down_at_first(
    uvicorn: Service, receiver: Receiver, tmp_path: Path
) -> None:
    port = free_port()
    path = written(tmp_path, uvicorn.port)
    with agent(tmp_path, "run", "--config", str(path)) as observer:
        talk(uvicorn.port, *[[GOOD] * 5] * 2)
        assert not observer.wait_requests(10).find("footlight_alerts_firing")
        written(tmp_path, uvicorn.port, f"http://127.0.0.1:{port}")
        request = urllib.request.Request(f"http://{observer.address}/-/reload", method="POST")
        with urllib.request.urlopen(request, timeout=10) as response:
            assert response.status == 200
        talk(uvicorn.port, *[[SLOW]] * 5)
        observer.wait_metrics(
            "a post that was refused",
            lambda metrics: metrics.sum("footlight_alert_notification_failures_total", reason="refused") >= 1,
        )
        began = time.monotonic()
        with alertmanager(tmp_path, "late", receiver, port=port):
            assert receiver.wait("late", TOLD_S, alertname="ErrorBudgetBurn") is not None, observer.said()
            assert time.monotonic() - began < TOLD_S
            observer.wait_metrics(
                "the count of what was taken", lambda each: each.sum("footlight_alert_notifications_total") == 1
            )
            assert observer.alive()


def test_it_works_where_nobody_may_read(
    python: list[str],
    threaded: Service,
    receiver: Receiver,
    tmp_path: Path,
) -> None:
    with alertmanager(tmp_path, "one", receiver) as one:
        encrypted = one.replace("http://127.0.0.1", "https://localhost")
        path = written(tmp_path, threaded.port, one.replace("127.0.0.1", "localhost"), encrypted)
        command, env = [*python, "-m", "exporter.cli"], {"PYTHONDONTWRITEBYTECODE": "1"}
        with agent(tmp_path, "run", "--config", str(path), command=command, env=env) as observer:
            talk(threaded.port, *[[SLOW]] * 5)
            assert receiver.wait("one", TOLD_S, alertname="ErrorBudgetBurn") is not None, observer.said()
            observer.wait_metrics(
                "a post without TLS",
                lambda each: each.sum("footlight_alert_notification_failures_total", reason="tls") >= 1,
            )
            assert observer.alive()
