"""Measures what critical paths cost the agent: its reader's CPU time at a steady rate of requests, with and without.

Requests of 20 frames that take a second each, so many at a time as make the rate. Windows in which the agent runs its
requests probe alone alternate with those in which it runs all that are on by default, in random order within a pair.
What is compared is the reader's CPU time in a window, as a part of one CPU; "paths" is how many windows of requests the
agent says that it walked, and what they took of it. Knowing why may cost at most 5 % of a CPU at 50 requests a second.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Final

import click

from benchmarks.common.agent import Agent, agent
from benchmarks.common.load import Lane, load
from benchmarks.common.processes import ends_on_sigterm, server
from benchmarks.common.report import Bar, judge, need_root, show, show_json, table
from benchmarks.overhead.watched import target_of

FRAMES: Final = 20
FRAME_RATE: Final = 20.0
SETTLE_S: Final = 3.0
SHARE: Final = 0.05
BAR_RATE: Final = 50


@dataclass(frozen=True, slots=True)
class Window:
    """One window: requests a second, the reader's part of a CPU, and what it says of paths, by second."""

    rate: int
    explains: bool
    reader_share: float
    paths_per_second: float
    path_share: float


def measure(rate: int, seconds: float, *, explains: bool, transport: str) -> Window:
    """Run the load at `rate` requests a second beside an agent of its own."""
    duration_s = SETTLE_S + seconds + 2.0
    lane = Lane("paced", "scripted", FRAMES, streams=round(rate * duration_s), rate=FRAME_RATE)
    with (
        tempfile.TemporaryDirectory() as folder,
        server([sys.executable, "-m", "benchmarks.common.light_service"]) as served,
        _agent(Path(folder), served.port, explains, transport) as watching,
        load(served.port, [lane], concurrency=round(rate * FRAMES / FRAME_RATE), ramp_s=1.0) as client,
    ):
        time.sleep(SETTLE_S)
        before, began = (watching.cpu_ns()[1], watching.scrape()), time.monotonic()
        time.sleep(seconds)
        after, ended = (watching.cpu_ns()[1], watching.scrape()), time.monotonic()
        if client.process.poll() is not None:
            raise click.ClickException("the client has ended before its time")

    def more(name: str) -> float:
        return (after[1].total(name) - before[1].total(name)) / (ended - began)

    return Window(
        rate=rate,
        explains=explains,
        reader_share=(after[0] - before[0]) / 1e9 / (ended - began),
        paths_per_second=more("footlight_paths_total"),
        path_share=more("footlight_path_cpu_seconds_total"),
    )


def _agent(folder: Path, port: int, explains: bool, transport: str) -> AbstractContextManager[Agent]:
    return agent("run", *target_of(folder, port, requests_alone=not explains), transport=transport)


@click.command(help=__doc__)
@click.option("--rate", "rates", multiple=True, type=click.IntRange(1, 1000), default=[5, 50], show_default=True)
@click.option("--pairs", default=5, show_default=True, help="Pairs of windows for each rate.")
@click.option("--seconds", default=8.0, show_default=True, help="Length of a window.")
@click.option("--seed", default=7, show_default=True, help="Of the order of the windows.")
@click.option("--transport", type=click.Choice(["auto", "ring", "perf"]), default="auto", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="One JSON object per window on stdout.")
def main(
    rates: tuple[int, ...], pairs: int, seconds: float, seed: int, transport: str, as_json: bool
) -> None:
    need_root()
    ends_on_sigterm()
    rng = Random(seed)
    rows, bars = [], []
    for rate in rates:
        found: dict[bool, list[Window]] = {False: [], True: []}
        for _ in range(pairs):
            for explains in rng.sample((False, True), 2):
                found[explains].append(measure(rate, seconds, explains=explains, transport=transport))
        added = statistics.median(
            with_.reader_share - without.reader_share for without, with_ in zip(found[False], found[True], strict=True)
        )
        rows.append(_row(rate, found, added))
        if rate == BAR_RATE:
            bars.append(Bar(f"paths at {rate} requests/s: reader", added * 100, SHARE * 100, " % of a CPU"))
        if as_json:
            show_json(asdict(window) for windows in found.values() for window in windows)
    if not as_json:
        title = f"paths: the reader's CPU time; medians of {pairs} pairs of {seconds:g} s"
        show([table(title, ("requests/s", "requests alone", "all probes", "added", "paths/s", "of it paths"), rows)])
    judge(bars)


def _row(rate: int, found: dict[bool, list[Window]], added: float) -> tuple[str, ...]:
    def median(name: str, *, explains: bool) -> float:
        return float(statistics.median(getattr(window, name) for window in found[explains]))

    return (
        str(rate),
        f"{median('reader_share', explains=False):.2%}",
        f"{median('reader_share', explains=True):.2%}",
        f"{added:+.2%}",
        f"{median('paths_per_second', explains=True):,.0f}",
        f"{median('path_share', explains=True):.2%}",
    )


if __name__ == "__main__":
    main()
