"""The agent under what deploy/ gives it: the unit's capabilities, a root file system that is read only."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.agent import FOOTLIGHT, agent
from tests.e2e.client import Ask, talk
from tests.e2e.processes import ROOT, answers, commands, free_port, need, started, wait_for

READ_ONLY = """\
set -e
mount --make-rprivate /
mount -t tmpfs none "$1"
mount -o remount,bind,ro /
shift
exec "$@"
"""


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
        f"services: [{{name: stage, match: {{port: {stranger}}}}}]\nrecorder: {{folder: {tmp_path}/recordings}}\n"
    )
    setpriv = [need("setpriv", "util-linux"), "--no-new-privs"]
    command = [*setpriv, f"--bounding-set=-all,{allowed}", f"--inh-caps=-all,{allowed}", *FOOTLIGHT]
    with agent(tmp_path, "run", "--config", str(config), command=command) as observer:
        talk(stranger, [Ask(script={"frames": 3})] * 23)
        metrics = observer.wait_requests(23)
        assert metrics.one("footlight_capture_total", outcome="complete") == 23
        assert all(metrics.find("footlight_probe_up"))
        assert metrics.find("kernel_open_files", service_name="stage") != []
        assert (tmp_path / "recordings").stat().st_uid == 65534
        observer.process.terminate()
        assert observer.ended() == 0, observer.said()
        assert "Traceback" not in observer.said()


def test_a_root_file_system_that_is_read_only_is_enough(stranger: int, tmp_path: Path) -> None:
    writable = tmp_path / "recordings"
    writable.mkdir()
    config = tmp_path / "footlight.yaml"
    config.write_text(
        f"services: [{{name: stage, match: {{port: {stranger}}}}}]\nrecorder: {{folder: {writable}/kept}}\n"
    )
    command = [need("unshare", "util-linux"), "-m", "bash", "-c", READ_ONLY, "ro", str(writable), *FOOTLIGHT]
    with agent(tmp_path, "run", "--config", str(config), command=command) as observer:
        mounts = [line.split() for line in Path(f"/proc/{observer.pid}/mountinfo").read_text().splitlines()]
        assert [fields[5].split(",")[0] for fields in mounts if fields[4] == "/"][-1] == "ro"
        talk(stranger, [Ask(script={"frames": 3})] * 23)
        observer.wait_requests(23)
        assert observer.get("/api/record?seconds=5")[0] == 200
        assert "Traceback" not in observer.said()
