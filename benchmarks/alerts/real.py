"""Prometheus and Alertmanager as they are installed, in a folder of their own, and a receiver of webhooks."""

from __future__ import annotations

import contextlib
import http.client
import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final

import click
import yaml

from benchmarks.common.agent import free_port
from benchmarks.common.processes import ROOT, failed, started

READY_S: Final = 20.0


@dataclass(frozen=True, slots=True)
class Told:
    """One alert in a notification: when the receiver had read it (CLOCK_MONOTONIC, ns), `firing` or `resolved`."""

    at_ns: int
    notification: int
    status: str
    labels: Mapping[str, str]


class Receiver:
    """Takes the webhooks of Alertmanagers. `url(name)` is for one of them; what it says is at `told(name)`."""

    def __init__(self) -> None:
        self._told: dict[str, list[Told]] = {}
        self._count = 0
        self._lock = threading.Condition()
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                receiver._take(self.path.strip("/"), json.loads(body), time.monotonic_ns())
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                """Say nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def __enter__(self) -> Receiver:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def url(self, name: str) -> str:
        """Where an Alertmanager of this name sends to."""
        return f"http://127.0.0.1:{self._server.server_address[1]}/{name}"

    def told(self, name: str, **labels: str) -> list[Told]:
        """What came from that one until now of alerts with these labels, in its order."""
        with self._lock:
            return [each for each in self._told.get(name, ()) if labels.items() <= each.labels.items()]

    def wait(self, name: str, seconds: float, status: str = "firing", **labels: str) -> Told | None:
        """The first word on an alert with these labels that has this status; None where none comes in time."""
        deadline = time.monotonic() + seconds
        with self._lock:
            while True:
                for each in self._told.get(name, ()):
                    if each.status == status and labels.items() <= each.labels.items():
                        return each
                if not self._lock.wait(max(0.0, deadline - time.monotonic())) and time.monotonic() >= deadline:
                    return None

    def _take(self, name: str, body: dict[str, Any], at_ns: int) -> None:
        with self._lock:
            self._count += 1
            told = self._told.setdefault(name, [])
            told += [Told(at_ns, self._count, alert["status"], alert["labels"]) for alert in body["alerts"]]
            self._lock.notify_all()


EACH: Final[Mapping[str, Any]] = {
    "route": {
        "receiver": "webhook",
        "group_by": ["..."],
        "group_wait": "0s",
        "group_interval": "1s",
        "repeat_interval": "4h",
    },
    "receivers": [{"name": "webhook"}],
}
"""A configuration with which each alert is told by itself and at once."""


def example() -> dict[str, Any]:
    """The configuration that is shipped as an example."""
    config: dict[str, Any] = yaml.safe_load((ROOT / "dashboards" / "alertmanager.yaml").read_text())
    return config


@contextlib.contextmanager
def alertmanager(
    folder: Path,
    name: str,
    receiver: Receiver,
    *,
    config: Mapping[str, Any] = EACH,
    port: int | None = None,
) -> Iterator[str]:
    """Run an Alertmanager with this configuration, but that all its receivers are `receiver`; gives its URL."""
    here = folder / name
    here.mkdir()
    hooks = [{"url": receiver.url(name)}]
    config = {**config, "receivers": [{"name": to["name"], "webhook_configs": hooks} for to in config["receivers"]]}
    file = here / "alertmanager.yaml"
    file.write_text(json.dumps(config))  # JSON is YAML
    port = free_port() if port is None else port
    command = [
        _tool("prometheus-alertmanager"),
        f"--config.file={file}",
        f"--storage.path={here / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
        "--cluster.listen-address=",
    ]
    with _running(command, here, lambda: _ready(port)):
        yield f"http://127.0.0.1:{port}"


@contextlib.contextmanager
def prometheus(
    folder: Path, target: str, instance: str, rules: Sequence[Path], alertmanagers: Sequence[str], interval: str = "1s"
) -> Iterator[str]:
    """Run a Prometheus that scrapes `target`, evaluates `rules` and tells the Alertmanagers; gives its URL."""
    here = folder / "prometheus-server"
    here.mkdir()
    hosts = [url.removeprefix("http://") for url in alertmanagers]
    config = {
        "global": {"scrape_interval": interval, "scrape_timeout": interval, "evaluation_interval": interval},
        "rule_files": [str(path) for path in rules],
        "alerting": {"alertmanagers": [{"static_configs": [{"targets": hosts}]}]},
        "scrape_configs": [
            {"job_name": "footlight", "static_configs": [{"targets": [target], "labels": {"instance": instance}}]}
        ],
    }
    file = here / "prometheus.yaml"
    file.write_text(json.dumps(config))
    port = free_port()
    command = [
        _tool("prometheus"),
        f"--config.file={file}",
        f"--storage.tsdb.path={here / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    with _running(command, here, lambda: _ready(port)):
        yield f"http://127.0.0.1:{port}"


def rules(config: Path) -> str:
    """What `footlight slo rules` makes of a configuration."""
    command = [sys.executable, "-m", "exporter.cli", "slo", "rules", "--config", str(config)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise click.ClickException(f"{' '.join(command)} failed:\n{done.stderr}")
    return done.stdout


@contextlib.contextmanager
def _running(command: Sequence[str], folder: Path, ready: Callable[[], bool]) -> Iterator[None]:
    with (folder / "log").open("w+b") as log, started(command, stdout=log, stderr=log) as process:
        deadline = time.monotonic() + READY_S
        while not ready():
            if process.poll() is not None or time.monotonic() > deadline:
                raise failed(process, command, log)
            time.sleep(0.05)
        yield


def _ready(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/-/ready")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def _tool(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        raise click.ClickException(f"{name} is not installed; try: sudo apt-get install --no-install-recommends {name}")
    return path
