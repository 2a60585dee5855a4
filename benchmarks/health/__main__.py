"""Counts what the agent calls an anomaly while the demo runs without a fault, and times how soon it finds six faults.

The quiet part is `footlight demo`. The faults are those of a service of the benchmark's own, under a steady load from
another network namespace: it burns a CPU, grows, leaks descriptors (71 a second), answers later; others take the CPUs
from it; its link becomes slow. Each is injected by itself, when the agent has learnt what is normal and the one before
is over. "found" is from the order to the event in /api/live, by this process's clock.

Needs root, two CPUs and tc with tbf. A neighbour's load is a fault too: run it on a host that does little else.
"""

from __future__ import annotations

import contextlib
import json
import math
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from random import Random
from typing import Any, Final
from urllib.request import ProxyHandler, build_opener

import click
from rich.console import Group

from benchmarks.common.agent import agent, free_port
from benchmarks.common.processes import START_S, ends_on_sigterm, line_of, started
from benchmarks.common.report import Bar, judge, need_root, show, show_json, table
from benchmarks.faults.host import Network, network
from benchmarks.health.service import LEAKED_KIND, LEAKED_NAME
from exporter.health import FEWEST, Signal
from probes.descriptors import LEAK_PER_SECOND, LEAK_S

MOST_ANOMALIES: Final = 1
FOUND_S: Final = 15.0
LEAK_FOUND_S: Final = 12.0
LEAST_LEAKED: Final = LEAK_PER_SECOND * LEAK_S / 2
"""Half of how many more descriptors make a leak: some of those are connections."""
LEAK: Final = "descriptor_leak"
GIVE_UP_S: Final = 40.0
REQUESTS_PER_S: Final = 7.0
HOGS: Final = 6
SLOW_BITS: Final = 200_000
SETTLE_S: Final = 25.0
_OPENER: Final = build_opener(ProxyHandler({}))


@dataclass(frozen=True, slots=True)
class Fault:
    """A kind of trouble: the event that tells of it, and within how long it is to come."""

    name: str
    signal: Signal
    what: str = "began"
    within_s: float = FOUND_S


FAULTS: Final = (
    Fault("cpu", Signal.CPU),
    Fault("memory", Signal.RESIDENT_MEMORY),
    Fault("descriptors", Signal.OPEN_FILES, LEAK, LEAK_FOUND_S),
    Fault("ttft", Signal.TTFT_P50),
    Fault("run_queue", Signal.RUN_QUEUE_WAIT),
    Fault("round_trip", Signal.ROUND_TRIP),
)


@dataclass(frozen=True, slots=True)
class Found:
    """How soon a fault was found, in seconds; None where it was not. `beside` are other signals that rose with it.

    `leaked` is of a leak alone: how many of the leaked descriptors its snapshot shows; NaN without a snapshot, 0 where
    others are more in it.
    """

    fault: str
    signal: str
    seconds: float | None
    within_s: float
    beside: tuple[str, ...]
    largest_target: str = ""
    leaked: float | None = None


@dataclass(frozen=True, slots=True)
class Quiet:
    """What was called an anomaly without a fault."""

    minutes: float
    learnt_s: float
    anomalies: tuple[str, ...]


def live(port: int) -> dict[str, Any]:
    """What the agent says of the services' health."""
    with _OPENER.open(f"http://127.0.0.1:{port}/api/live", timeout=10) as response:
        found: dict[str, Any] = json.load(response)["health"]
        return found


def events(port: int) -> list[dict[str, Any]]:
    """What happened, oldest first."""
    return list(reversed(live(port)["events"]))


def quiet(minutes: float) -> Quiet:
    """Run the demo without a fault."""
    port = free_port()
    command = [sys.executable, "-m", "exporter.cli", "demo", "--listen", f"127.0.0.1:{port}"]
    with started(command, stdout=subprocess.DEVNULL):
        began = time.monotonic()
        _wait("the demo", lambda: _samples(port, Signal.CPU) >= FEWEST, 300)
        learnt_s = time.monotonic() - began
        _say(f"quiet: learnt after {learnt_s:.0f} s, {minutes:g} minutes to go\n")
        time.sleep(minutes * 60)
        found = [f"{each['signal']} {each['time']}" for each in events(port) if each["what"] != "ended"]
    return Quiet(minutes, learnt_s, tuple(found))


def faults(wanted: Sequence[Fault], seed: int) -> Iterator[Found]:
    """Inject one after the other, and see when each is found."""
    with ExitStack() as stack:
        link = stack.enter_context(network())
        command = [sys.executable, "-m", "benchmarks.health.service", link.address]
        service = stack.enter_context(started(command))
        line = line_of(service, START_S)
        if not line.startswith(b"http://"):
            raise click.ClickException("the service did not get ready")
        port = int(line.rsplit(b":", 1)[1])
        watching = stack.enter_context(agent("run", "--port", str(port)))
        stack.enter_context(_load(link, port, Random(seed)))
        _say("faults: learning what is normal ... ")
        needed = (Signal.CPU, Signal.TTFT_P50, Signal.RUN_QUEUE_WAIT, Signal.ROUND_TRIP)
        _wait("the baselines", lambda: min(_samples(watching.port, each) for each in needed) >= FEWEST + 6, 300)
        for fault in wanted:
            _wait("an end of anomalies", lambda: not _anomalous(watching.port), 120)
            _say(f"{fault.name} ")
            before = len(events(watching.port))
            began = time.monotonic()
            with _injected(fault, service, link):
                found = _first(watching.port, fault, before, began)
                seconds = time.monotonic() - began if found is not None else None
            rose = {each["signal"] for each in events(watching.port)[before:] if each["what"] == "began"}
            beside = tuple(sorted(rose - {fault.signal.value}))
            largest, leaked = snapshot(found or {}) if fault.what == LEAK else ("", None)
            yield Found(fault.name, fault.signal.value, seconds, fault.within_s, beside, largest, leaked)
            _say("found, " if found is not None else "not found, ")
            time.sleep(SETTLE_S)
        _say("done\n")


def snapshot(event: dict[str, Any]) -> tuple[str, float]:
    """What most descriptors of an event's snapshot are, and how many of those that leaked it shows: see `Found`."""
    targets = event.get("leak", {}).get("targets")
    if not targets:
        return "", math.nan
    largest = targets[0]
    leaked = (largest["kind"], largest["name"]) == (LEAKED_KIND, LEAKED_NAME)
    return f"{largest['count']} {largest['name']}", largest["count"] if leaked else 0


def _first(port: int, fault: Fault, before: int, began: float) -> dict[str, Any] | None:
    while time.monotonic() - began < GIVE_UP_S:
        for each in events(port)[before:]:
            if each["signal"] == fault.signal.value and each["what"] == fault.what:
                return each
        time.sleep(0.1)
    return None


@contextlib.contextmanager
def _injected(fault: Fault, service: subprocess.Popen[bytes], link: Network) -> Iterator[None]:
    """The fault, within the context."""
    assert service.stdin is not None
    with ExitStack() as stack:
        if fault.name == "run_queue":
            for _ in range(HOGS):
                stack.enter_context(started([sys.executable, "-c", "while True: pass"], stdout=subprocess.DEVNULL))
        elif fault.name == "round_trip":
            link.limit(SLOW_BITS)
            stack.callback(link.limit, 0)
        else:
            service.stdin.write(f"{fault.name}\n".encode())
            stack.callback(service.stdin.write, b"\n")
        yield


@contextlib.contextmanager
def _load(link: Network, port: int, rng: Random) -> Iterator[None]:
    """Requests at uneven times, each on a connection of its own."""
    over = threading.Event()
    body = b'{"model":"patient","stream":true,"messages":[{"role":"user","content":"?"}]}'
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\n"
    request = head + b"content-length: %d\r\n\r\n" % len(body) + body

    def ask() -> None:
        with contextlib.suppress(OSError), link.connect(port) as connection:
            connection.sendall(request)
            while connection.recv(1 << 16):
                pass

    def go() -> None:
        while not over.wait(rng.expovariate(REQUESTS_PER_S)):
            threading.Thread(target=ask, daemon=True).start()

    thread = threading.Thread(target=go, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _signals(port: int) -> list[dict[str, Any]]:
    return [each for service in live(port)["services"] for each in service["signals"]]


def _samples(port: int, signal: Signal) -> int:
    with contextlib.suppress(OSError):
        return max((each["samples"] for each in _signals(port) if each["signal"] == signal.value), default=0)
    return 0


def _anomalous(port: int) -> bool:
    return any(each["anomalous"] for each in _signals(port))


def _wait(what: str, holds: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            raise click.ClickException(f"{what} did not come within {seconds:g} s")
        time.sleep(0.5)


def tables(still: Quiet | None, found: Sequence[Found]) -> Iterator[Group]:
    """What was found, for people."""
    if still is not None:
        row = (f"{still.minutes:g}", f"{still.learnt_s:.0f}", str(len(still.anomalies)), ", ".join(still.anomalies))
        yield table("health: the demo without a fault", ("minutes", "learnt after s", "anomalies", "which"), [row])
    if found:
        yield table(
            "health: faults",
            ("fault", "signal", "found after s", "bar s", "also rose", "largest target"),
            [
                (
                    each.fault,
                    each.signal,
                    "never" if each.seconds is None else f"{each.seconds:.1f}",
                    f"{each.within_s:g}",
                    ", ".join(each.beside),
                    each.largest_target,
                )
                for each in found
            ],
        )


def bars(still: Quiet | None, found: Sequence[Found]) -> Iterator[Bar]:
    """What the issue promises."""
    if still is not None:
        yield Bar("anomalies without a fault", len(still.anomalies), MOST_ANOMALIES)
    for each in found:
        yield Bar(f"{each.fault}: found after", math.nan if each.seconds is None else each.seconds, each.within_s, " s")
        if each.leaked is not None:
            yield Bar(f"{each.fault}: leaked ones in the snapshot", each.leaked, LEAST_LEAKED, at_least=True)


def _say(text: str) -> None:
    click.echo(text, err=True, nl=False)


@click.command(help=__doc__)
@click.option("--quiet-minutes", default=20.0, show_default=True, help="Of the demo, when it has learnt; 0: none.")
@click.option(
    "--faults",
    "names",
    default=",".join(each.name for each in FAULTS),
    show_default=True,
    help="In this order; empty: none.",
)
@click.option("--seed", default=7, show_default=True, help="Of the times of the requests.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per part on stdout.")
def main(quiet_minutes: float, names: str, seed: int, as_json: bool) -> None:
    need_root()
    ends_on_sigterm()
    by_name = {each.name: each for each in FAULTS}
    unknown = [name for name in names.split(",") if name and name not in by_name]
    if unknown:
        raise click.BadParameter(f"{unknown[0]} is none of {', '.join(by_name)}", param_hint="--faults")
    wanted = [by_name[name] for name in names.split(",") if name]
    still = quiet(quiet_minutes) if quiet_minutes else None
    found = list(faults(wanted, seed)) if wanted else []
    if as_json:
        show_json([asdict(each) for each in ([still] if still is not None else [])] + [asdict(each) for each in found])
    else:
        show(tables(still, found))
    judge(list(bars(still, found)))


if __name__ == "__main__":
    main()
