"""Another configuration under load: nothing that is under way is lost, and what is wrong changes nothing."""

from __future__ import annotations

import os
import signal
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from tests.e2e.agent import Agent, agent
from tests.e2e.client import Ask, talk
from tests.e2e.processes import Service, service

REQUESTS = 1009
RELOADS = 20
WITHIN_S = 3.0
ASK = Ask(model="alto", script={"frames": 5, "first_ms": 20, "gap_ms": 5})
WRONG = (
    "services: []\n",
    "services: [\n",
    "nonsense: 1\n",
    "services:\n  - {name: stage, match: {port: 0}}\n",
    "",
    "limits: {memory: 99MiB}\n",  # right, and only for an agent that starts
    "slos:\n  - {name: a, sli: ttft, below: 300ms, target: 100%}\n",
)


def post(observer: Agent) -> tuple[int, str]:
    request = urllib.request.Request(f"http://{observer.address}/-/reload", method="POST")
    try:
        with urllib.request.urlopen(request, timeout=10) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def told(observer: Agent, what: str, look: Callable[[], bool]) -> None:
    """Fails where it is not so within three seconds."""
    deadline = time.monotonic() + WITHIN_S
    while not look():
        assert time.monotonic() < deadline, f"not within {WITHIN_S:g} s: {what}\n{observer.said()}"
        time.sleep(0.05)


def test_reloads_under_load_lose_nothing(uvicorn: Service, tmp_path: Path) -> None:
    path = tmp_path / "footlight.yaml"
    base = f"services:\n  - name: stage\n    match: {{port: {uvicorn.port}}}\n"
    path.write_text(base)
    with agent(tmp_path, "run", "--config", str(path)) as observer:
        each, rest = divmod(REQUESTS, 16)
        talks = [[ASK] * (each + (number < rest)) for number in range(16)]
        answers: list[object] = []
        load = threading.Thread(target=lambda: answers.extend(talk(uvicorn.port, *talks)))
        load.start()
        for number in range(RELOADS):
            if number % 3 == 1 and number // 3 < len(WRONG):
                before = observer.metrics().one("footlight_config_last_reload_success_timestamp_seconds")
                wrong = WRONG[number // 3]
                path.write_text(wrong if wrong.startswith("services") or not wrong else base + wrong)
                status, said = post(observer)
                assert status == 500, said
                metrics = observer.metrics()
                assert metrics.one("footlight_config_last_reload_successful") == 0
                assert metrics.one("footlight_config_last_reload_success_timestamp_seconds") == before
                continue
            bound = f"{0.031 + number / 1e3:g}"
            path.write_text(
                f"{base}  - name: other-{number % 2}\n    match: {{port: {40000 + number}}}\n"
                f"slos:\n  - {{name: first-token, sli: ttft, below: {bound}s, target: 99%}}\n"
            )
            if number % 2:
                assert post(observer) == (200, "reloaded\n")

            def effective(bound: str = bound) -> bool:
                metrics = observer.metrics()
                there = metrics.find("llm_time_to_first_token_seconds_bucket", le=bound)
                return bool(there) and metrics.one("footlight_config_last_reload_successful") == 1

            told(observer, f"a bucket bound of {bound} s", effective)
        load.join()
        assert len(answers) == REQUESTS
        metrics = observer.wait_requests(REQUESTS)
        assert metrics.sum("llm_requests_total", service_name="stage") == REQUESTS
        assert metrics.sum("llm_frames_total") == REQUESTS * 5
        assert metrics.sum("llm_time_to_first_token_seconds_count") == REQUESTS
        assert metrics.sum("footlight_capture_total", outcome="complete") == REQUESTS
        assert metrics.sum("footlight_capture_total") == REQUESTS
        assert metrics.sum("footlight_lost_events_total", probe="requests") == 0
        assert metrics.sum("footlight_reader_restarts_total") == 0
        held = [os.readlink(each) for each in Path(f"/proc/{observer.reader}/fd").iterdir()]
        assert not [name for name in held if "bpf" in name or "perf" in name], "the rings are mapped, that suffices"


def test_a_service_can_come_and_go(tmp_path: Path) -> None:
    path = tmp_path / "footlight.yaml"
    with service("threaded", tmp_path) as first, service("uvicorn-asyncio", tmp_path) as second:
        base = f"services:\n  - name: first\n    match: {{port: {first.port}}}\n"
        more = f"  - name: second\n    match: {{port: {second.port}}}\n"
        path.write_text(base)
        with agent(tmp_path, "run", "--config", str(path)) as observer:
            talk(second.port, [ASK])
            path.write_text(base + more)
            followed = "footlight_target_processes"
            observer.wait_metrics("the second service", lambda it: 1 in it.find(followed, service_name="second"))
            talk(second.port, [ASK] * 7)
            talk(first.port, [ASK] * 3)
            metrics = observer.wait_requests(10)
            assert metrics.sum("llm_requests_total", service_name="second") == 7
            assert metrics.sum("llm_requests_total", service_name="first") == 3
            assert metrics.sum("kernel_on_cpu_seconds_total", service_name="second") > 0
            path.write_text("services:\n" + more)
            observer.wait_metrics("one service less", lambda it: not it.find(followed, service_name="first"))
            talk(first.port, [ASK] * 5)
            talk(second.port, [ASK] * 2)
            metrics = observer.wait_requests(12)
            assert metrics.sum("llm_requests_total", service_name="first") == 3
            assert not metrics.find("kernel_on_cpu_seconds_total", service_name="first")
            assert metrics.sum("llm_requests_total", service_name="second") == 9


def test_a_signal_asks_for_it_too_and_without_a_file_there_is_nothing_to_read(
    threaded: Service, tmp_path: Path
) -> None:
    with agent(tmp_path, "run", "--service", "stage", "--port", str(threaded.port)) as observer:
        observer.process.send_signal(signal.SIGHUP)
        told(observer, "a word on SIGHUP", lambda: "nothing to read again" in observer.said())
        status, said = post(observer)
        assert status == 500
        assert "--config" in said
        assert not observer.metrics().find("footlight_config_last_reload_successful")
        assert observer.ready()
