"""The watched service with and without the agent, in pairs of windows under one and the same load.

A service of several models does not always divide the CPUs among them in the same way, and a frame of the one takes
many times the work of a frame of the other: frames per second alone would go up and down with that. So throughput is
work: each frame counts as the CPU time that a frame of its model took its engine, over all windows. And it is work per
second of the CPU time that there was for the service, its clients and the agent: what other processes took in a window
is nobody's loss. On a quiet machine that is work per second and CPU.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from random import Random
from typing import Final

import click
import numpy as np
import numpy.typing as npt

from benchmarks.common.agent import Agent, Program, agent
from benchmarks.common.load import Felt, Lane, load
from benchmarks.common.processes import cpu_ns, server
from benchmarks.common.report import nearest_rank
from exporter.config import Probes

WARM_S: Final = 3.0
ATTACHED_S: Final = 2.0
"""From the agent's readiness to the window: its start is no part of what it costs."""
GONE_S: Final = 1.0
"""From the agent's end to the window."""
LOOK_S: Final = 0.5
OTHERS: Final = 0.25
"""A window in which other processes took more than this part of the CPU time says nothing: it is taken again."""
TRIES: Final = 3


@dataclass(frozen=True, slots=True)
class Service:
    """A service, and the load that saturates it."""

    name: str
    what: str
    command: tuple[str, ...]
    lanes: tuple[Lane, ...]
    concurrency: int


@dataclass(frozen=True, slots=True)
class Cost:
    """What the agent took in a window: CPU seconds of both processes, PSS in bytes, the programs' run times.

    `lost` is what it lost until the window's end, by reason, `coverage` the part of the requests that began while it
    was there which it saw completely.
    """

    attacher_s: float
    reader_s: float
    pss_bytes: int
    programs: dict[str, Program]
    lost: dict[str, int]
    coverage: float

    @property
    def lost_events(self) -> int:
        """All losses."""
        return sum(self.lost.values())

    @property
    def bpf_s(self) -> float:
        """What all programs took."""
        return sum(program.run_ns for program in self.programs.values()) / 1e9


@dataclass(frozen=True, slots=True)
class Window:
    """A stretch of time. `service_s` is CPU time of the service's processes, by pid.

    `busy` is the part of all CPUs' time that was not idle, `others` the part that neither the service nor the client
    nor the agent took.
    """

    began_ns: int
    ended_ns: int
    service_s: dict[int, float]
    busy: float
    others: float
    cost: Cost | None

    @property
    def seconds(self) -> float:
        """How long it was."""
        return (self.ended_ns - self.began_ns) / 1e9


@dataclass(frozen=True, slots=True)
class Figures:
    """What the users felt in a window, and what that took. Latencies in ms.

    Work is seconds of CPU time that the frames took their engine on the average of all windows; `work_per_cpu_second`
    is by the CPU time that others left.
    """

    work_per_cpu_second: float
    work_per_second: float
    frames_per_second: float
    requests_per_second: float
    ttft_p50_ms: float
    ttft_p99_ms: float
    itl_p50_ms: float
    itl_p99_ms: float
    service_cpu_per_work: float
    cpus_busy: float
    others_cpu: float


@dataclass(frozen=True, slots=True)
class Change:
    """One figure over all pairs: the medians, and the median of with / without - 1 with its 95 % interval."""

    service: str
    what: str
    without: float
    with_agent: float
    change: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Result:
    """What a service's pairs gave. `costs` has one for each pair, `frames` and `seconds` are of the windows with it.

    `repeated` is how many windows were taken again, because other processes took too much.
    """

    service: Service
    changes: list[Change]
    costs: list[Cost]
    frames: float
    seconds: float
    repeated: int

    @property
    def throughput(self) -> Change:
        """The change in work per CPU second that others left."""
        return self.changes[0]


def measure(
    service: Service, pairs: int, seconds: float, seed: int, transport: str, *, beside_requests: bool = False
) -> Result:
    """Run `pairs` pairs of windows of `seconds` each, in random order within the pair.

    With `beside_requests` the windows without the agent have one that runs its requests probe alone.
    """
    rng = Random(seed)
    both: list[tuple[Window, Window]] = []
    repeated = 0
    with (
        tempfile.TemporaryDirectory() as folder,
        server(service.command) as served,
        load(served.port, list(service.lanes), concurrency=service.concurrency, per_connection=7, eager=True) as client,
    ):
        time.sleep(WARM_S)
        engines = {lane.model: _engine(served.pids, lane.model) for lane in service.lanes}
        for _ in range(pairs):
            found = {}
            for with_agent in rng.sample((False, True), 2):
                if client.process.poll() is not None:
                    raise click.ClickException("the client has ended before its time")
                if with_agent or beside_requests:
                    target = target_of(Path(folder), served.port, requests_alone=not with_agent)
                    with agent("run", *target, transport=transport) as watching:
                        time.sleep(ATTACHED_S)
                        found[with_agent], tries = _quiet_window(seconds, served.pids, client.process.pid, watching)
                else:
                    time.sleep(GONE_S)
                    found[False], tries = _quiet_window(seconds, served.pids, client.process.pid, None)
                repeated += tries - 1
            both.append((found[False], found[True]))
        felt = client.felt(stop=True)
    weights = _weights([window for pair in both for window in pair], felt, service.lanes, engines)
    figures = [(figures_of(without, felt, weights), figures_of(with_, felt, weights)) for without, with_ in both]
    return Result(
        service=service,
        changes=list(changes(service.name, figures)),
        costs=[with_.cost for _, with_ in both if with_.cost is not None],
        frames=sum(
            with_.frames_per_second * window.seconds for (_, with_), (_, window) in zip(figures, both, strict=True)
        ),
        seconds=sum(window.seconds for _, window in both),
        repeated=repeated,
    )


def target_of(folder: Path, port: int, *, requests_alone: bool) -> tuple[str, str]:
    """The options of an agent that watches `port` with its requests probe alone, or with all that are on by default."""
    if not requests_alone:
        return "--port", str(port)
    config = folder / "requests.yaml"
    others = ", ".join(f"{name}: off" for name in Probes.__struct_fields__ if name != "requests")
    config.write_text(f"services: [{{name: port-{port}, match: {{port: {port}}}}}]\nprobes: {{{others}}}\n")
    return "--config", str(config)


def _quiet_window(seconds: float, pids: Sequence[int], client: int, watching: Agent | None) -> tuple[Window, int]:
    """Return a window that others left alone, and the how many-eth it was; after `TRIES` the last one as it is."""
    tries = 0
    while True:
        tries += 1
        window = _window(seconds, pids, client, watching)
        if window.others <= OTHERS or tries == TRIES:
            return window, tries


def _window(seconds: float, pids: Sequence[int], client: int, watching: Agent | None) -> Window:
    cpu = [cpu_ns(pid) for pid in (*pids, client)]
    programs = watching.programs() if watching else {}
    agent_cpu = watching.cpu_ns() if watching else (0, 0)
    pss = 0
    busy, whole = _machine()
    began = time.monotonic_ns()
    while (left := began + seconds * 1e9 - time.monotonic_ns()) > 0:
        time.sleep(min(LOOK_S, left / 1e9))
        if watching:
            pss = max(pss, sum(watching.pss_bytes()))
    ended = time.monotonic_ns()
    cpu_then = [cpu_ns(pid) for pid in (*pids, client)]
    busy_then, whole_then = _machine()
    cost = None
    if watching:
        attacher, reader = (now - then for now, then in zip(watching.cpu_ns(), agent_cpu, strict=True))
        ran = {
            name: Program(now.run_ns - programs[name].run_ns, now.runs - programs[name].runs)
            for name, now in watching.programs().items()
        }
        # after the window: a scrape is work
        scrape = watching.scrape()
        outcomes = scrape.by_label("footlight_capture_total", "outcome")
        begun = outcomes["start_unseen"]  # streams that were under way when it came
        seen = outcomes["complete"] / max(1.0, sum(outcomes.values()) - begun)
        cost = Cost(attacher / 1e9, reader / 1e9, pss, ran, scrape.lost(), seen)
    *service_s, client_s = ((now - then) / 1e9 for now, then in zip(cpu_then, cpu, strict=True))
    share = (busy_then - busy) / (whole_then - whole)
    ours_s = sum(service_s) + client_s + (cost.attacher_s + cost.reader_s if cost else 0.0)
    others = share - ours_s / ((ended - began) / 1e9) / (os.cpu_count() or 1)
    return Window(began, ended, dict(zip(pids, service_s, strict=True)), share, others, cost)


def _machine() -> tuple[int, int]:
    """Ticks of all CPUs so far: busy, and all."""
    user, nice, system, idle, iowait, *rest = map(int, Path("/proc/stat").read_text().split(maxsplit=9)[1:9])
    busy = user + nice + system + sum(rest)
    return busy, busy + idle + iowait


def _engine(pids: Sequence[int], model: str) -> int | None:
    """The process that serves one model alone: the one that was started with its name."""
    named = [pid for pid in pids if f"--model\0{model}\0" in Path(f"/proc/{pid}/cmdline").read_text()]
    return named[0] if len(named) == 1 else None


def _weights(
    windows: Sequence[Window], felt: Felt, lanes: Sequence[Lane], engines: dict[str, int | None]
) -> npt.NDArray[np.float64]:
    """CPU seconds of its engine, or of the whole service, for a frame of each lane, over all windows."""
    weights = []
    for number, lane in enumerate(lanes):
        frames = sum(int(_frames(window, felt, number).sum()) for window in windows)
        engine = engines[lane.model]
        cpu_s = sum(window.service_s[engine] if engine else sum(window.service_s.values()) for window in windows)
        weights.append(cpu_s / frames)
    return np.array(weights)


def _within(window: Window, at_ns: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    inside: npt.NDArray[np.bool_] = (at_ns >= window.began_ns) & (at_ns < window.ended_ns)
    return inside


def _frames(window: Window, felt: Felt, lane: int) -> npt.NDArray[np.bool_]:
    """Which frames came in the window and are of the lane."""
    mine: npt.NDArray[np.bool_] = np.repeat(felt.lane == lane, felt.frames)
    return mine & _within(window, felt.content_ns)


def figures_of(window: Window, felt: Felt, weights: npt.NDArray[np.float64]) -> Figures:
    """What the users felt in a window, and what it took."""
    ttfts = (felt.ttft_ns[_within(window, felt.content_ns[felt.first])] / 1e6).tolist()
    at_ns, gaps_ns = felt.gaps_ns
    gaps = (gaps_ns[_within(window, at_ns)] / 1e6).tolist()
    by_lane = [int(_frames(window, felt, lane).sum()) for lane in range(len(weights))]
    frames = sum(by_lane)
    work_s = float(np.dot(weights, by_lane))
    cpus = os.cpu_count() or 1
    return Figures(
        work_per_cpu_second=work_s / (window.seconds * cpus * (1 - window.others)),
        work_per_second=work_s / window.seconds,
        frames_per_second=frames / window.seconds,
        requests_per_second=int(_within(window, felt.finished_ns).sum()) / window.seconds,
        ttft_p50_ms=nearest_rank(ttfts, 0.5),
        ttft_p99_ms=nearest_rank(ttfts, 0.99),
        itl_p50_ms=nearest_rank(gaps, 0.5),
        itl_p99_ms=nearest_rank(gaps, 0.99),
        service_cpu_per_work=sum(window.service_s.values()) / work_s if frames else float("nan"),
        cpus_busy=window.busy,
        others_cpu=window.others,
    )


def changes(service: str, pairs: Sequence[tuple[Figures, Figures]]) -> Iterator[Change]:
    """Yield each figure's change over the pairs."""
    for each in fields(Figures):
        without = [getattr(pair[0], each.name) for pair in pairs]
        with_agent = [getattr(pair[1], each.name) for pair in pairs]
        ratios = [ours / theirs - 1 for ours, theirs in zip(with_agent, without, strict=True) if theirs > 0] or [
            float("nan")
        ]
        low, high = interval(ratios)
        yield Change(
            service,
            each.name,
            statistics.median(without),
            statistics.median(with_agent),
            statistics.median(ratios),
            low,
            high,
        )


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Where the median of what `values` are a sample of lies, 95 % (by order statistics); below 6 values: all of it."""
    ordered = sorted(values)
    # the largest k for which fewer than k of n fair coins fall heads at most 2.5 % of the time
    tail, k = 0.0, 0
    weight = 0.5 ** len(ordered)
    for heads in range(len(ordered) // 2):
        tail += weight
        if tail > 0.025:
            break
        k = heads
        weight *= (len(ordered) - heads) / (heads + 1)
    return ordered[k], ordered[-1 - k]
