"""Health of a real service: a leak of descriptors is found in time, with what leaks; and what is normal is kept."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.e2e.agent import Agent, agent
from tests.e2e.browser import opened
from tests.e2e.processes import ROOT, answers, free_port, started, wait_for

LEAKS_PER_S = 83
WITHIN_S = 12.0
NOBODY = 65534
SERVICE = """
import resource, socket, sys, time
most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
listener = socket.create_server(("127.0.0.1", int(sys.argv[1])), backlog=16)
rate, kept = int(sys.argv[2]), []
sys.stdin.readline()
while True:
    kept.append(open("/etc/hosts"))
    time.sleep(1 / rate)
"""


def health(observer: Agent) -> dict[str, Any]:
    status, _, text = observer.get("/api/live")
    assert status == 200, text
    found: dict[str, Any] = json.loads(text)["health"]
    return found


def leaked(observer: Agent) -> dict[str, Any] | None:
    found: list[dict[str, Any]] = [each for each in health(observer)["events"] if each["what"] == "descriptor_leak"]
    return found[0] if found else None


def samples(observer: Agent, signal: str) -> int:
    for service in health(observer)["services"]:
        for each in service["signals"]:
            if each["signal"] == signal:
                return int(each["samples"])
    return 0


def test_a_descriptor_leak_is_found_with_what_leaks_and_recorded(tmp_path: Path) -> None:
    port = free_port()
    folder = tmp_path / "state"
    config = tmp_path / "config.yaml"
    config.write_text(
        f"services:\n  - name: leaky\n    match: {{port: {port}}}\n"
        f"recorder: {{folder: {folder}}}\nhealth: {{folder: {folder}}}\n"
    )
    command = [sys.executable, "-c", SERVICE, str(port), str(LEAKS_PER_S)]
    service = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE)
    try:
        wait_for("the service", lambda: answers(port) or None)
        with agent(tmp_path, "run", "--config", str(config)) as observer:
            wait_for("a look at it", lambda: observer.metrics().find("footlight_descriptor_leaks_total") or None)
            assert observer.metrics().one("footlight_descriptor_leaks_total", service_name="leaky") == 0
            assert service.stdin is not None
            service.stdin.write(b"\n")
            service.stdin.flush()
            began = time.monotonic()
            event = wait_for("the event", lambda: leaked(observer), 2 * WITHIN_S)
            assert time.monotonic() - began <= WITHIN_S
            leak = event["leak"]
            assert (event["service"], leak["tgid"]) == ("leaky", service.pid)
            assert leak["per_second"] > 50
            assert leak["kinds"]["tcp"] == 1
            assert leak["kinds"]["file"] > 500
            largest = leak["targets"][0]
            assert (largest["kind"], largest["name"]) == ("file", "/etc/hosts")
            assert largest["count"] > 500
            assert {"kind": "tcp", "name": f"listens on 127.0.0.1:{port}", "count": 1} in leak["targets"]
            assert observer.metrics().one("footlight_descriptor_leaks_total", service_name="leaky") == 1
            wait_for("the recording", lambda: list(folder.glob("footlight-*-descriptor-leak.json.gz")) or None, 10)
            assert "leaks descriptors" in observer.said()
            page, said = opened(f"http://{observer.address}/")
            assert said == ""
            assert '<span class="bad">leaks descriptors</span>' in page
            assert re.search(rf"in process {service.pid}; most are [0-9]+ file /etc/hosts, ", page)
            time.sleep(2)
            assert len(health(observer)["events"]) == 1  # reported for a minute, told once
            before = wait_for("a sample", lambda: samples(observer, "run_queue_wait") or None, 30)
        state = folder / "health.json"
        found = state.stat()
        assert (found.st_uid, found.st_mode & 0o777) == (NOBODY, 0o600)
        assert not list(folder.glob("*.part"))
        assert os.stat(folder).st_uid == NOBODY
        with agent(tmp_path, "run", "--config", str(config)) as observer:
            # at once, not after as many samples again
            wait_for("what was learnt", lambda: samples(observer, "run_queue_wait") >= before or None, 3)
    finally:
        service.kill()
        service.wait()
        assert service.stdin is not None
        service.stdin.close()


def test_a_state_that_cannot_be_read_is_no_end(tmp_path: Path) -> None:
    port = free_port()
    folder = tmp_path / "state"
    folder.mkdir()
    (folder / "health.json").write_text('{"version": 1, "services": 7}')
    for path in (folder / "health.json", folder):
        os.chown(path, NOBODY, NOBODY)
    config = tmp_path / "config.yaml"
    config.write_text(f"services:\n  - name: plain\n    match: {{port: {port}}}\nhealth: {{folder: {folder}}}\n")
    with (
        started([sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1"], tmp_path / "service.log"),
        agent(tmp_path, "run", "--config", str(config)) as observer,
    ):
        observer.wait_metrics("the service", lambda metrics: bool(metrics.find("footlight_health_baseline_samples")))
        assert "it is learnt anew" in observer.said()
        assert "Bad file descriptor" not in observer.said()
    assert set(json.loads((folder / "health.json").read_text())["services"]) == {"plain"}
