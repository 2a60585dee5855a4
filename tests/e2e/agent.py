"""The agent as a user runs it: the command in a process of its own, and what it serves and prints."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import psutil
from prometheus_client.parser import text_string_to_metric_families

from tests.e2e.processes import ROOT, START_S, Started, free_port, started, wait_for

FOOTLIGHT: Final = (sys.executable, "-m", "exporter.cli")
SETTLE_S: Final = 10.0
"""Within this time everything that happened is in /metrics."""
_PROGRAM: Final = re.compile(r"^prog_id:\s*([0-9]+)$", re.MULTILINE)
_OPENER: Final = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class Metrics:
    """One scrape."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.samples: list[tuple[str, dict[str, str], float]] = [
            (sample.name, sample.labels, sample.value)
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        ]

    def find(self, name: str, **labels: str) -> list[float]:
        """The values of every sample of that name whose labels are among others these."""
        return [
            value for found, have, value in self.samples if found == name and labels.items() <= have.items()
        ]

    def sum(self, name: str, **labels: str) -> float:
        """Their sum; they may be none."""
        return sum(self.find(name, **labels))

    def one(self, name: str, **labels: str) -> float:
        """The value of the only such sample."""
        (value,) = self.find(name, **labels)
        return value

    def mean(self, histogram: str, **labels: str) -> float:
        """The mean of a histogram, over all its series."""
        return self.sum(f"{histogram}_sum", **labels) / self.sum(f"{histogram}_count", **labels)


@dataclass(slots=True)
class Agent(Started):
    """An agent that runs. `address` is where it serves; the pipe of its stdout is at `process.stdout`."""

    address: str

    def get(self, path: str, accept: str = "") -> tuple[int, str, str]:
        """Status, content type and text of a page."""
        request = urllib.request.Request(f"http://{self.address}{path}", headers={"accept": accept})
        try:
            with _OPENER.open(request, timeout=10) as response:
                return response.status, response.headers["content-type"], response.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.headers["content-type"], error.read().decode()

    def ready(self) -> bool:
        """Whether it measures everything that was asked for; an agent that ended fails the test."""
        assert self.alive(), f"the agent ended with {self.process.returncode}:\n{self.said()}"
        try:
            return self.get("/-/ready")[0] == 200
        except OSError:
            return False

    def metrics(self) -> Metrics:
        """Scrape it."""
        status, _, text = self.get("/metrics")
        assert status == 200, text
        return Metrics(text)

    def wait_metrics(self, what: str, look: Callable[[Metrics], bool], within_s: float = SETTLE_S) -> Metrics:
        """Scrape until `look` is content, and return that scrape; fail with `what` and the last scrape."""
        last = Metrics("")

        def scrape() -> Metrics | None:
            nonlocal last
            last = self.metrics()
            return last if look(last) else None

        try:
            return wait_for(what, scrape, within_s)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{_shortened(last.text)}\n{self.said()}") from None

    def wait_requests(self, count: int) -> Metrics:
        """Wait until it has counted this many requests."""
        return self.wait_metrics(
            f"the count of {count} requests", lambda metrics: metrics.sum("llm_requests_total") >= count
        )

    @property
    def reader(self) -> int:
        """Process id of the reader."""
        (child,) = psutil.Process(self.pid).children()
        return child.pid

    def programs(self) -> frozenset[int]:
        """Ids of the BPF programs that the attacher holds."""
        ids: set[int] = set()
        for entry in Path(f"/proc/{self.pid}/fdinfo").iterdir():
            with contextlib.suppress(FileNotFoundError):
                ids.update(map(int, _PROGRAM.findall(entry.read_text())))
        return frozenset(ids)


def loaded_programs() -> frozenset[int]:
    """Ids of every BPF program that the kernel holds."""
    libbpf = ctypes.CDLL("libbpf.so.1", use_errno=True)
    found: set[int] = set()
    current = ctypes.c_uint32(0)
    while libbpf.bpf_prog_get_next_id(current, ctypes.byref(current)) == 0:
        found.add(current.value)
    return frozenset(found)


@contextlib.contextmanager
def agent(
    folder: Path,
    *arguments: str,
    command: Sequence[str] = FOOTLIGHT,
    cwd: Path = ROOT,
    env: Mapping[str, str] | None = None,
    serves: bool = True,
) -> Iterator[Agent]:
    """Run `footlight ARGUMENTS` within the context, ready to measure when the context begins.

    `--listen` with a free port is added. Without `serves` it is not, and the context begins at once.
    """
    port = free_port()
    address = f"127.0.0.1:{port}"
    listen = ["--listen", address] if serves else []
    with started(
        [*command, *arguments, *listen], folder / f"agent-{port}.log", cwd=cwd, env=env, stdout=subprocess.PIPE
    ) as process:
        running = Agent(process.process, process.log, address)
        if serves:
            wait_for("the agent", lambda: running.ready() or None, START_S)
        yield running


def footlight(*arguments: str, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run `footlight ARGUMENTS` to its end."""
    return subprocess.run(
        [*FOOTLIGHT, *arguments],
        cwd=ROOT,
        env=None if env is None else {**os.environ, **env},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def objects(text: str) -> list[dict[str, Any]]:
    """One JSON object a line."""
    return [json.loads(line) for line in text.splitlines()]


def _shortened(text: str) -> str:
    return "\n".join(line for line in text.splitlines() if not line.startswith("#") and "_bucket" not in line)
