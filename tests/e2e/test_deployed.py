"""The agent under what deploy/ gives it: the unit's capabilities, a root file system that is read only."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from exporter.health_state import NAME
from exporter.recordings import NOBODY
from tests.e2e.agent import FOOTLIGHT, agent
from tests.e2e.client import Ask, talk
from tests.e2e.processes import ROOT, answers, commands, free_port, need, started, wait_for

SAMPLES = "footlight_health_baseline_samples"
READ_ONLY = """\
set -e
mount --make-rprivate /
mount -t tmpfs -o mode=777 none "$1"
mount --bind "$2" "$2"
mount -o remount,bind,ro /
shift 2
exec "$@"
"""
"""A pod's mounts: an emptyDir, a folder of the node, and nothing else that can be written to."""


@pytest.fixture
def stranger(tmp_path: Path) -> Iterator[int]:
    """The port of a service that another user runs, as in a container."""
    port = free_port()
    setpriv = need("setpriv", "util-linux")
    as_user = [setpriv, "--reuid=1234", "--regid=1234", "--clear-groups"]
    with started([*as_user, *commands("threaded", port)], tmp_path / "service.log") as running:
        wait_for("the service", lambda: answers(port) or None)
        assert running.alive(), running.said()
        yield port


def test_the_capabilities_of_the_unit_are_enough(stranger: int, tmp_path: Path) -> None:
    unit = (ROOT / "deploy/footlight.service").read_text()
    found = re.search(r"^CapabilityBoundingSet=(.*)$", unit, re.MULTILINE)
    assert found is not None
    allowed = ",".join(f"+{name.removeprefix('CAP_').lower()}" for name in found[1].split())
    config = tmp_path / "footlight.yaml"
    config.write_text(
        f"services: [{{name: stage, match: {{port: {stranger}}}}}]\n"
        f"recorder: {{folder: {tmp_path}/recordings}}\nhealth: {{folder: {tmp_path}/health}}\n"
    )
    setpriv = [need("setpriv", "util-linux"), "--no-new-privs"]
    command = [*setpriv, f"--bounding-set=-all,{allowed}", f"--inh-caps=-all,{allowed}", *FOOTLIGHT]
    with agent(tmp_path, "run", "--config", str(config), command=command) as observer:
        talk(stranger, [Ask(script={"frames": 3})] * 23)
        metrics = observer.wait_requests(23)
        assert metrics.one("footlight_capture_total", outcome="complete") == 23
        assert all(metrics.find("footlight_probe_up"))
        assert metrics.find("kernel_open_files", service_name="stage") != []
        assert (tmp_path / "recordings").stat().st_uid == NOBODY
        observer.process.terminate()
        assert observer.ended() == 0, observer.said()
        assert "Traceback" not in observer.said()
        assert (tmp_path / "health" / NAME).stat().st_uid == NOBODY


def test_a_root_file_system_that_is_read_only_is_enough_and_the_next_pod_goes_on(stranger: int, tmp_path: Path) -> None:
    recordings, health = tmp_path / "recordings", tmp_path / "health"
    for folder in (recordings, health):
        folder.mkdir(mode=0o755)
    config = tmp_path / "footlight.yaml"
    config.write_text(
        f"services: [{{name: stage, match: {{port: {stranger}}}}}]\n"
        f"recorder: {{folder: {recordings}}}\nhealth: {{folder: {health}}}\n"
    )
    unshare = [need("unshare", "util-linux"), "-m", "bash", "-c", READ_ONLY, "ro", str(recordings), str(health)]
    pod = partial(agent, tmp_path, "run", "--config", str(config), command=[*unshare, *FOOTLIGHT])
    with pod() as observer:
        mounts = [line.split() for line in Path(f"/proc/{observer.pid}/mountinfo").read_text().splitlines()]
        assert [fields[5].split(",")[0] for fields in mounts if fields[4] == "/"][-1] == "ro"
        talk(stranger, [Ask(script={"frames": 3})] * 23)
        observer.wait_requests(23)
        assert observer.get("/api/record?seconds=5")[0] == 200
        observer.wait_metrics("a look at the service's health", lambda metrics: bool(metrics.find(SAMPLES)))
        observer.process.terminate()
        assert observer.ended() == 0, observer.said()
        assert "Traceback" not in observer.said()
    assert not list(recordings.iterdir())  # what was written there went with the mount
    (kept,) = health.iterdir()
    assert (kept.name, kept.stat().st_uid) == (NAME, NOBODY)
    state = json.loads(kept.read_text())
    state["services"]["stage"]["samples"]["ttft_p50"] = [0.053] * 23  # as if it had run for minutes
    kept.write_text(json.dumps(state))
    with pod() as observer:
        observer.wait_metrics("what the pod before had learnt", lambda metrics: metrics.sum(SAMPLES) == 23)
