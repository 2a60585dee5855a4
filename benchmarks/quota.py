"""Answers a question: a pod's CPU limit was raised, and its engine, which waits for a GPU, became twice as fast. Why?

A service of two processes: an API whose frames cost CPU time, and an engine that needs none for its tokens, only time:
a timer stands for the GPU. Only the API has a CPU quota. The agent says what the time between tokens went to, at each
quota, on the request's critical path: parts of the decode phase by the number of its gaps.

"in step": the engine begins a token (6 ms) when the API has sent the last one (4 ms of CPU time). Each gap is the sum
of both, and what the quota took is what a higher one gives back. "ahead": the engine makes a token each 10 ms whether
or not the API keeps up (4 ms of CPU time each). The API falls behind while the engine goes on: both take the same time,
of which the path has one at each instant, so what the quota took need not be what a higher one gives back.

"client" is the same gap by the client's clock. "throttled" is what the kernel says that it throttled the API's cgroup
between the first token and the last, by the number of gaps.
"""

from __future__ import annotations

import math
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Final

import click
from rich.console import Group

from benchmarks.common import cgroups
from benchmarks.common.agent import agent
from benchmarks.common.processes import ends_on_sigterm, realtime, server
from benchmarks.common.report import Bar, judge, need_root, show, show_json, table
from benchmarks.faults import client
from benchmarks.faults.client import Asked
from benchmarks.faults.explained import Explained, told
from benchmarks.faults.kinds import AHEAD
from benchmarks.faults.service import Script

CAUSE: Final = "cpu_quota"
PERIOD_US: Final = 100_000
FRAMES: Final = 50
ENGINES: Final = {"in step": ["--in-step", "--step", "0.006"], "ahead": ["--step", "0.010"]}


@dataclass(frozen=True, slots=True)
class Row:
    """Means over all gaps at one quota, in ms. `parts` are what the agent says, by cause; they add up to `agent_ms`."""

    engine: str
    quota: float
    requests: int
    client_ms: float
    agent_ms: float
    throttled_ms: float
    parts: dict[str, float]
    untraced: int
    uneven: int


def measure(engine: str, quotas: Sequence[float], requests: int) -> list[Row]:
    """Ask `requests` times at each quota: parts of a CPU."""
    runs: list[list[Asked]] = []
    with ExitStack() as stack:
        group = stack.enter_context(cgroups.group("cpu"))
        command = [*AHEAD, sys.executable, "-m", "benchmarks.faults.timed_engine", *ENGINES[engine]]
        served = stack.enter_context(server(command))
        group.add(served.pid)  # the API; the engine stays where it was
        watching = stack.enter_context(agent("trace", "--port", str(served.port)))
        with realtime():
            for quota in quotas:
                group.limit_cpu(round(quota * PERIOD_US), PERIOD_US)
                time.sleep(0.5)
                runs.append([_ask(served.port, group) for _ in range(requests)])
        lines = told(watching, (asked.transcript.port for run in runs for asked in run))
    return [row(engine, quota, run, lines) for quota, run in zip(quotas, runs, strict=True)]


def _ask(port: int, group: cgroups.Group) -> Asked:
    connection = client.connect(port)
    sent = client.send(connection, client.scripted(Script([], frames=FRAMES)))
    return client.hear(connection, sent, group.throttled_ns)


def row(engine: str, quota: float, run: Sequence[Asked], lines: dict[int, Explained]) -> Row:
    """Lay the requests at one quota beside what the agent said of them."""
    gaps = sum(len(asked.transcript.content_ns) - 1 for asked in run)
    explained = [line for asked in run if (line := lines.get(asked.transcript.port)) is not None]
    parts: dict[str, float] = {}
    for line in explained:
        for cause, seconds in line.parts("decode").items():
            parts[cause] = parts.get(cause, 0.0) + seconds * 1e3 / gaps
    throttled_ns = 0
    for asked in run:
        looks = dict(asked.looks)
        began, ended = asked.window("decode")
        throttled_ns += looks[ended] - looks[began]
    return Row(
        engine=engine,
        quota=quota,
        requests=len(run),
        client_ms=sum(asked.window_ns("decode") for asked in run) / 1e6 / gaps,
        agent_ms=sum(line.window_s("decode") for line in explained) * 1e3 / gaps,
        throttled_ms=throttled_ns / 1e6 / gaps,
        parts=parts,
        untraced=len(run) - len(explained),
        uneven=sum(line.uneven for line in explained),
    )


def bars(rows: Sequence[Row]) -> Iterator[Bar]:
    """That the answer can be relied on."""
    for each in rows:
        what = f"{each.engine}, quota {each.quota:.0%}"
        yield Bar(f"{what}: requests that the agent did not tell of", each.untraced, 0)
        yield Bar(f"{what}: windows whose parts do not add up", each.uneven, 0)
        unexplained = each.parts.get("unexplained", 0.0) if each.parts else each.client_ms
        yield Bar(f"{what}: unexplained", unexplained / each.client_ms, 0.05)
        if each.engine == "in step":
            apart = abs(each.parts.get(CAUSE, 0.0) - each.throttled_ms) / each.client_ms
            yield Bar(f"{what}: |{CAUSE} - throttled|, of the gap", apart, 0.1)
    least, most = rows[0], rows[-1]
    what = f"{least.engine}: a gap at {least.quota:.0%}, of that at {most.quota:.0%}"
    yield Bar(what, ratio(rows), 1.7, at_least=True)
    yield Bar(f"{least.engine}: {CAUSE} is what changed most", float(changed_most(rows) == CAUSE), 1, at_least=True)
    if least.engine == "in step":
        yield Bar(f"{least.engine}: |what {CAUSE} lost - what the gap lost|, of that", abs(answer(rows) - 1), 0.1)


def changed_most(rows: Sequence[Row]) -> str | None:
    """The cause that lost most from the least quota to the most; None where nothing was told."""
    least, most = rows[0].parts, rows[-1].parts
    return max(least, key=lambda cause: least[cause] - most.get(cause, 0.0), default=None)


def ratio(rows: Sequence[Row]) -> float:
    """How much longer a gap was at the least quota, by the client's clock."""
    return rows[0].client_ms / rows[-1].client_ms


def answer(rows: Sequence[Row]) -> float:
    """What the quota took less, by the agent, of what a gap was shorter, by the client's clock; NaN if it was not."""
    least, most = rows[0], rows[-1]
    shorter_ms = least.client_ms - most.client_ms
    return (least.parts.get(CAUSE, 0.0) - most.parts.get(CAUSE, 0.0)) / shorter_ms if shorter_ms > 0 else math.nan


def tables(rows: Sequence[Row]) -> Iterator[Group]:
    """The rows of one engine for people, and the answer."""
    total = Counter[str]()
    for each in rows:
        total.update({cause: round(ms * 1e6) for cause, ms in each.parts.items()})
    causes = [cause for cause, _ in total.most_common()]
    least, most = rows[0], rows[-1]
    taken, left = least.parts.get(CAUSE, 0.0), most.parts.get(CAUSE, 0.0)
    yield table(
        f"quota, engine {least.engine}: what a gap between two tokens went to, ms",
        ("quota of the API", "client", "agent", *causes, "throttled"),
        [
            (
                f"{each.quota:.0%} of a CPU",
                f"{each.client_ms:.2f}",
                f"{each.agent_ms:.2f}",
                *(f"{each.parts.get(cause, 0.0):.2f}" for cause in causes),
                f"{each.throttled_ms:.2f}",
            )
            for each in rows
        ],
        notes=f"At {least.quota:.0%} the quota was {taken:.2f} ms of a gap of {least.client_ms:.2f} ms "
        f"({taken / least.client_ms:.0%}), at {most.quota:.0%} it is {left:.2f} ms of {most.client_ms:.2f} ms. The gap "
        f"became {ratio(rows):.2f} times shorter, by {least.client_ms - most.client_ms:.2f} ms; what the quota takes "
        f"less is {answer(rows):.0%} of that.",
    )


@click.command(help=__doc__)
@click.option("--quotas", default="0.2,0.6", show_default=True, help="Parts of a CPU.")
@click.option("--requests", default=12, show_default=True, help=f"At each quota; each has {FRAMES} tokens.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per quota on stdout.")
def main(quotas: str, requests: int, as_json: bool) -> None:
    need_root()
    ends_on_sigterm()
    results = []
    for engine in ENGINES:
        rows = measure(engine, sorted(float(each) for each in quotas.split(",")), requests)
        results.append(rows)
        if as_json:
            show_json(asdict(each) for each in rows)
        else:
            show(tables(rows))
    judge([bar for rows in results for bar in bars(rows)])


if __name__ == "__main__":
    main()
