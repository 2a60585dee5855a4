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

from tests.e2e.agent import Agent, Metrics, agent
from tests.e2e.client import Ask, talk
from tests.e2e.processes import Service, service

REQUESTS = 1009
RELOADS = 20
WITHIN_S = 3.0
SUCCESSFUL = "footlight_config_last_reload_successful"
TAKEN_AT = "footlight_config_last_reload_success_timestamp_seconds"
TALKS = 16
ASK = Ask(model="alto", script={"frames": 5, "first_ms": 200, "gap_ms": 50})
"""So slow that all of them last twice as long as the reloads, of which every other waits for a look at the file."""
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


def told(observer: Agent, began: float, what: str, look: Callable[[], bool]) -> None:
    """Fails where it is not so within three seconds of `began`."""
    while True:
        so = look()
        assert time.monotonic() <= began + WITHIN_S, f"not within {WITHIN_S:g} s: {what}\n{observer.said()}"
        if so:
            return
        time.sleep(0.05)


def in_force(metrics: Metrics) -> set[tuple[str, str]]:
    """The services and the objectives of the configuration that the agent goes by."""
    names = {"footlight_target_processes": "service_name", "llm_slo_info": "objective"}
    return {(name, labels[names[name]]) for name, labels, _ in metrics.samples if name in names}


def take(observer: Agent, path: Path, base: str, number: int, by_post: bool) -> None:
    """Give the agent a configuration that is right: it is in effect in time."""
    bound = f"{0.031 + number / 1e3:g}"
    other = f"other-{number % 2}"
    began = time.monotonic()
    path.write_text(
        f"{base}  - name: {other}\n    match: {{port: {40000 + number}}}\n"
        f"slos:\n  - {{name: first-token, sli: ttft, below: {bound}s, target: 99%}}\n"
    )
    if by_post:
        assert post(observer) == (200, "reloaded\n")

    def effective() -> bool:
        metrics = observer.metrics()
        there = metrics.find("llm_time_to_first_token_seconds_bucket", le=bound)
        followed = metrics.find("footlight_target_processes", service_name=other)
        return bool(there) and bool(followed) and metrics.one(SUCCESSFUL) == 1

    told(observer, began, f"{other}, and a bucket bound of {bound} s", effective)


def refuse(observer: Agent, path: Path, wrong: str, by_post: bool) -> None:
    """Give the agent one that is wrong: it says so in time, and goes on with the one that it has."""
    before = observer.metrics()
    assert before.one(SUCCESSFUL) == 1
    began = time.monotonic()
    path.write_text(wrong)
    if by_post:
        status, said = post(observer)
        assert status == 500, said
    told(observer, began, f"a refusal of {wrong!r}", lambda: observer.metrics().one(SUCCESSFUL) == 0)
    after = observer.metrics()
    assert after.one(TAKEN_AT) == before.one(TAKEN_AT)
    assert in_force(after) == in_force(before)


def test_reloads_under_load_lose_nothing(uvicorn: Service, tmp_path: Path) -> None:
    path = tmp_path / "footlight.yaml"
    base = f"services:\n  - name: stage\n    match: {{port: {uvicorn.port}}}\n"
    path.write_text(base)
    with agent(tmp_path, "run", "--config", str(path)) as observer:
        each, rest = divmod(REQUESTS, TALKS)
        talks = [[ASK] * (each + (number < rest)) for number in range(TALKS)]
        answers: list[object] = []
        load = threading.Thread(target=lambda: answers.extend(talk(uvicorn.port, *talks)))
        load.start()
        for number in range(RELOADS):
            by_post = number % 2 == 1
            if number % 3 == 1:
                wrong = WRONG[number // 3]
                refuse(observer, path, wrong if wrong.startswith("services") or not wrong else base + wrong, by_post)
            else:
                take(observer, path, base, number, by_post)
        assert load.is_alive(), "the load ended before the reloads did"
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
        began = time.monotonic()
        observer.process.send_signal(signal.SIGHUP)
        told(observer, began, "a word on SIGHUP", lambda: "nothing to read again" in observer.said())
        status, said = post(observer)
        assert status == 500
        assert "--config" in said
        assert not observer.metrics().find("footlight_config_last_reload_successful")
        assert observer.ready()
