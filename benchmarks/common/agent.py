"""The agent as users run it: `footlight run` and `footlight trace` in processes of their own, asked over HTTP."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final

import click
import msgspec
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.common.processes import START_S, cpu_ns, failed, family, pss_bytes, started
from exporter.run_stats import ONE_IN

_POLL_S: Final = 0.1
_PROG_ID: Final = re.compile(r"^prog_id:\s*(\d+)$", re.MULTILINE)


class Traced(msgspec.Struct, frozen=True):
    """A line of `footlight trace --json`, as far as it is compared. Seconds; None was not measured."""

    model: str | None
    peer: str
    streamed: bool
    status: int | None
    outcome: str
    capture: str
    frames: int
    prompt_tokens: int | None
    completion_tokens: int | None
    time_to_first_token_seconds: float | None
    mean_inter_token_latency_seconds: float | None
    longest_gap_seconds: float | None
    duration_seconds: float


@dataclass(frozen=True, slots=True)
class Program:
    """What the kernel says that one BPF program cost so far."""

    run_ns: int
    runs: int


class Scrape:
    """The samples of one look at /metrics."""

    def __init__(self, text: str) -> None:
        self._samples = [
            (sample.name, sample.labels, float(sample.value))
            for family_ in text_string_to_metric_families(text)
            for sample in family_.samples
        ]

    def total(self, name: str, **labels: str) -> float:
        """Sum of the samples of this name whose labels include `labels`; 0 when there is none."""
        return sum(self._values(name, labels))

    def one(self, name: str, **labels: str) -> float | None:
        """The one sample; None when there is none. Raises ValueError when there are several."""
        values = self._values(name, labels)
        if not values:
            return None
        (value,) = values
        return value

    def lost(self) -> dict[str, int]:
        """Events that the agent lost, by reason; reasons that did not occur are left out."""
        counts = self.by_label("footlight_lost_events_total", "reason")
        return {reason: round(count) for reason, count in counts.items() if count}

    def by_label(self, name: str, label: str) -> dict[str, float]:
        """The sum of the samples for each value of `label`."""
        found: dict[str, float] = {}
        for sample, labels, value in self._samples:
            if sample == name:
                found[labels[label]] = found.get(labels[label], 0.0) + value
        return found

    def _values(self, name: str, labels: dict[str, str]) -> list[float]:
        return [
            value
            for sample, its, value in self._samples
            if sample == name and all(its.get(key) == wanted for key, wanted in labels.items())
        ]


@dataclass(frozen=True, slots=True)
class Agent:
    """An agent that is attached and ready. `attacher` and `reader` are its processes."""

    attacher: int
    reader: int
    port: int
    out: IO[bytes]
    err: IO[bytes]

    def scrape(self) -> Scrape:
        """Look at /metrics."""
        status, text = _get(self.port, "/metrics")
        if status != 200:
            raise click.ClickException(f"/metrics answers {status}: {text}")
        return Scrape(text)

    def settled(self, requests: int, seconds: float = 20.0) -> Scrape:
        """Look until `requests` are counted, or `seconds` are over; then once more when all counts are at rest."""
        deadline = time.monotonic() + seconds
        while True:
            scrape = self.scrape()
            if scrape.total("llm_requests_total") >= requests or time.monotonic() > deadline:
                break
            time.sleep(_POLL_S)
        time.sleep(1.5)  # the attacher's report of losses is a second old at most
        return self.scrape()

    def cpu_ns(self) -> tuple[int, int]:
        """CPU time of attacher and reader."""
        return cpu_ns(self.attacher), cpu_ns(self.reader)

    def pss_bytes(self) -> tuple[int, int]:
        """Proportional set size of attacher and reader."""
        return pss_bytes(self.attacher), pss_bytes(self.reader)

    def traced(self) -> list[Traced]:
        """The requests that `footlight trace --json` has told so far."""
        return [
            msgspec.json.decode(line, type=Traced)
            for line in _written(self.out).splitlines(keepends=True)
            if line.endswith(b"\n")
        ]

    def log(self) -> str:
        """What the agent wrote to stderr so far."""
        return _written(self.err).decode(errors="replace")

    def programs(self) -> dict[str, Program]:
        """What the agent's BPF programs took, by name, estimated. Needs bpftool for the names.

        The agent keeps the kernel's statistics on for one second in `ONE_IN`: what they say is multiplied by that.
        """
        mine = {
            int(match[1])
            for info in Path(f"/proc/{self.attacher}/fdinfo").iterdir()
            if (match := _PROG_ID.search(_text(info)))
        }
        shown = subprocess.run([_bpftool(), "prog", "show", "--json"], check=True, capture_output=True)
        spent: dict[str, Program] = {}
        for program in json.loads(shown.stdout):
            if program["id"] in mine:
                before = spent.get(program["name"], Program(0, 0))  # two probes may have one of the same name
                run_ns, runs = program.get("run_time_ns", 0), program.get("run_cnt", 0)
                spent[program["name"]] = Program(before.run_ns + ONE_IN * run_ns, before.runs + ONE_IN * runs)
        return spent


def _written(file: IO[bytes]) -> bytes:
    """What is in a file that a child writes. Seeking in it here would move where the child writes next."""
    return os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0)


@contextlib.contextmanager
def agent(command: str, *target: str, transport: str = "auto") -> Iterator[Agent]:
    """Run `footlight run` or `footlight trace --json` on a target, `--port N` say, and wait until it is ready.

    Both serve /metrics. Raises click.ClickException with the agent's own words when it does not get ready.
    """
    port = free_port()
    arguments = [command, *target, "--listen", f"127.0.0.1:{port}", "--transport", transport]
    if command == "trace":
        arguments.append("--json")
    line = [sys.executable, "-m", "exporter.cli", *arguments]
    with (
        tempfile.TemporaryFile() as out,
        tempfile.TemporaryFile() as err,
        started(line, stdout=out, stderr=err) as process,
    ):
        deadline = time.monotonic() + START_S
        while not _ready(port):
            if process.poll() is not None or time.monotonic() > deadline:
                raise failed(process, line, err)
            time.sleep(0.02)
        attacher, reader = family(process.pid)
        watching = Agent(attacher, reader, port, out, err)
        try:
            yield watching
        except (OSError, click.ClickException):
            # most likely the agent failed first, and its own words say why
            click.echo(watching.log(), err=True, nl=False)
            raise


def free_port() -> int:
    """Return a TCP port of 127.0.0.1 that nobody has now."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


def _ready(port: int) -> bool:
    try:
        return _get(port, "/-/ready")[0] == 200
    except OSError:
        return False


def _get(port: int, path: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except FileNotFoundError:  # closed meanwhile
        return ""


def _bpftool() -> str:
    found = shutil.which("bpftool") or shutil.which("bpftool", path="/usr/sbin")
    if found is None:
        raise click.ClickException("bpftool is not installed; apt-get install bpftool")
    return found
