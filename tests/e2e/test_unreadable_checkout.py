"""The agent in a place that only root can read, as /root is: everything the reader needs is loaded while it may."""

from __future__ import annotations

import http.client
import json
import os
import shlex
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from examples.roleplay.lookups import LIBRARY
from tests.e2e.agent import Metrics, agent, objects
from tests.e2e.client import Ask, talk
from tests.e2e.processes import ROOT, Service, answers, free_port, need, started, wait_for
from tests.standins.cuda import Caller, breakpoints
from tests.standins.cuda import build as build_cuda
from tests.standins.nvml import Driver, fixture
from tests.standins.nvml import build as build_nvml

HIDE = """\
set -e
mount --make-rprivate /
mount -t tmpfs -o mode=0755 none "$4"
for hidden in library checkout; do
    mkdir -m 0700 "$4/$hidden"
done
cp -a "$1/." "$4/library"
chmod 0700 "$4/library"
mount --bind "$4/library" "$1"
mkdir "$4/checkout/$3"
mount --bind "$2" "$4/checkout/$3"
mount -t tmpfs -o mode=0700 none "$2"
cd "$4/checkout/$3"
shift 4
exec "$@"
"""


@pytest.fixture
def hidden(tmp_path: Path) -> list[str]:
    """The beginning of a command line: what follows runs in a mount namespace where only root can read the code.

    The checkout is in a folder of mode 0700 there, its own place is empty, and Python's library is of mode 0700.
    """
    library = sysconfig.get_path("stdlib")
    place = tmp_path / "private"
    place.mkdir()
    unshare = need("unshare", "util-linux")
    return [unshare, "-m", "bash", "-c", HIDE, "hide", library, str(ROOT), ROOT.name, str(place)]


@pytest.fixture
def python(hidden: list[str]) -> list[str]:
    """The interpreter as it is called in there."""
    executable = Path(sys.executable)
    if executable.is_relative_to(ROOT):
        executable = Path(hidden[-1], "checkout", ROOT.name, executable.relative_to(ROOT))
    return [*hidden, str(executable)]


def test_nobody_cannot_read_the_checkout(python: list[str]) -> None:
    code = (
        "import os, exporter; os.setresuid(65534, 65534, 65534)\n"
        "for name in ('exporter.labels', 'wave', 'rich.table'):\n"
        "    try: __import__(name)\n"
        "    except ImportError: print(name)\n"
    )
    done = subprocess.run([*python, "-c", code], capture_output=True, text=True, timeout=30, check=False)
    assert (done.stdout, done.stderr) == ("exporter.labels\nwave\nrich.table\n", "")


@pytest.mark.parametrize(
    "arguments",
    [
        ["run"],
        ["trace", "--json", "--count", "5"],
        ["trace", "--count", "5"],
        ["top", "--count", "2"],
        ["top", "--json", "--count", "2"],
    ],
    ids=" ".join,
)
def test_it_works_where_nobody_may_read(
    arguments: list[str], transport: str, python: list[str], threaded: Service, tmp_path: Path
) -> None:
    command = [*python, "-m", "exporter.cli"]
    options = (*arguments, "--transport", transport, "--port", str(threaded.port))
    with agent(tmp_path, *options, command=command, env={"PYTHONDONTWRITEBYTECODE": "1"}) as observer:
        talk(threaded.port, *[[Ask(script={"frames": 3})]] * 4, [Ask(script={"status": 500})])
        if arguments[0] == "run":
            metrics = observer.wait_requests(5)
            assert metrics.one("footlight_capture_total", outcome="complete") == 5
            for path in ("/-/ready", "/-/healthy", "/"):
                assert observer.get(path)[0] == 200
            assert observer.get("/metrics", "application/openmetrics-text; version=1.0.0")[0] == 200
            assert observer.get("/nothing")[0] == 404
        else:
            assert observer.process.stdout is not None
            text = observer.process.stdout.read().decode()
            assert observer.ended() == 0, observer.said()
            assert "alto" in text, observer.said()
            if "--json" in arguments:
                assert objects(text)
        assert "Traceback" not in observer.said()
        assert "crashed" not in observer.said()


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that the user nobody may look into: those of pytest are root's."""
    with tempfile.TemporaryDirectory(prefix="driver-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


def chat(port: int) -> None:
    """Ask the role-play service for two tokens."""
    messages = [{"role": "user", "content": "Who goes there, and what for?"}]
    body = json.dumps({"model": "understudy", "messages": messages, "max_tokens": 2})
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=30)) as connection:
        connection.request("POST", "/v1/chat/completions", body, {"content-type": "application/json"})
        assert connection.getresponse().status == 200


def test_gpus_engines_and_probe_points_are_told_where_nobody_may_read(
    python: list[str], tmp_path: Path, open_folder: Path
) -> None:
    driver = Driver(build_nvml(open_folder), open_folder / "driver", fixture("h100"))
    library, program = build_cuda(tmp_path)
    port = free_port()
    serve = [sys.executable, "-m", "examples.roleplay", "serve", "--port", str(port), "--model", "understudy"]
    config = tmp_path / "footlight.yaml"
    config.write_text(
        f"services:\n  - {{name: roleplay, match: {{port: {port}}}, engine_metrics: 'http://localhost:{port}/metrics'}}\n"
        f"  - {{name: engine, match: {{exe: {program}}}}}\n"
        f"probes: {{gpu: on, cuda: on}}\ngpu: {{library: {driver.path}, period: 100ms}}\n"
        f"probe_points: [{{name: lookup, library: {LIBRARY.name}, symbol: llm_kv_lookup, "
        "model: 1, hit_tokens: 2, looked_up_tokens: 3}]\n"
    )

    def all_told(metrics: Metrics) -> bool:
        name = "llm_kv_cache_source_hit_tokens_total"
        told = {labels["source"] for found, labels, _ in metrics.samples if found == name}
        return (
            told == {"wire", "engine", "probe_point"}
            and bool(metrics.find("gpu_power_watts"))
            and metrics.sum("gpu_cuda_launches_total") == 101
        )

    command = [*python, "-m", "exporter.cli"]
    options = ("run", "--config", str(config))
    with (
        started(serve, tmp_path / "roleplay.log", cwd=ROOT),
        closing(Caller([str(program)], preload=library)) as caller,
    ):
        wait_for("the role-play service", lambda: answers(port) or None)
        with agent(tmp_path, *options, command=command, env={"PYTHONDONTWRITEBYTECODE": "1"}) as observer:
            wait_for("the breakpoints", lambda: breakpoints(caller.pid, library) or None)
            caller.do("launch", 101)
            for _ in range(3):
                chat(port)
            observer.wait_metrics("every source", all_told, 20)
            driver.fail("*", "*", 999)  # errors have names that are looked up, and the library is opened again
            observer.wait_metrics("the loss", lambda now: now.find("footlight_probe_up", probe="gpu") == [0])
            assert "Traceback" not in observer.said()
            assert "crashed" not in observer.said()


def test_the_live_table_on_a_terminal(python: list[str], threaded: Service) -> None:
    command = shlex.join([*python, "-m", "exporter.cli", "top", "--duration", "2", "--port", str(threaded.port)])
    env = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "150", "LINES": "40"}
    process = subprocess.Popen(
        [need("script", "bsdutils"), "-qec", command, "/dev/null"],
        cwd=ROOT, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )
    with process:
        deadline = time.monotonic() + 30
        while True:
            assert time.monotonic() < deadline, "the table does not end"
            talk(threaded.port, [Ask(model="alto\u4e16\u754c", script={"frames": 3})] * 3)
            try:
                text, _ = process.communicate(timeout=0.5)
                break
            except subprocess.TimeoutExpired:
                continue
    assert process.returncode == 0, text
    assert "alto" in text
    assert "\x1b[" in text
    assert "Traceback" not in text
