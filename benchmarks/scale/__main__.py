"""Lets 1 to 1,000 users stream at once, and looks at what the agent costs and whether it loses any of them.

Each stream has 97 frames with content, eight a second, not in step; all of them run at the same time. The service costs
as little as one in Python can, so that 1,000 streams are 8,000 frames a second on two CPUs with room for the client and
the agent. A row has an agent of its own, `footlight run`. "idle" is the agent beside a service that nobody asks.

CPU time is that of both processes of the agent, from the first request to the last byte, in ms per 1,000 frames with
content; "by frames" is what is left without the time that an idle agent takes. BPF is what the kernel says that the
probe's programs took: the service pays that. PSS is the highest of a look each 250 ms; MB are 10^6 bytes.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Final

import click
from rich.console import Group

from benchmarks.common.agent import Agent, agent
from benchmarks.common.client import raise_open_files
from benchmarks.common.load import Felt, Lane, load
from benchmarks.common.processes import ends_on_sigterm, server
from benchmarks.common.report import Bar, judge, lost_by_reason, need_root, show, show_json, table

MODEL: Final = "scripted"
LOOK_S: Final = 0.25
IDLE_S: Final = 5.0
PSS_LIMIT: Final = 120e6
COVERAGE: Final = 0.99


@dataclass(frozen=True, slots=True)
class Row:
    """One number of streams. `seconds` is from the first request to the last byte; CPU times are in that time.

    `frames` were received by the client, `frames_counted` are the agent's; `streams_at_once` is how many were really
    under way together. PSS in bytes.
    """

    streams: int
    streams_at_once: int
    seconds: float
    frames: int
    frames_counted: int
    requests_counted: int
    lost: dict[str, int]
    coverage: float
    attacher_cpu_seconds: float
    reader_cpu_seconds: float
    bpf_seconds: float
    attacher_pss_bytes: int
    reader_pss_bytes: int
    pss_bytes: int

    @property
    def cpu_share(self) -> float:
        """CPU time of the agent as a part of one CPU."""
        return (self.attacher_cpu_seconds + self.reader_cpu_seconds) / self.seconds

    def cpu_ms_per_1000_frames(self, idle_share: float = 0.0) -> float:
        """CPU time of the agent by frames, without what it takes while it is idle."""
        return (self.cpu_share - idle_share) * self.seconds / self.frames * 1e6 if self.frames else float("nan")


class Watch:
    """Looks at an agent's memory, and at its CPU time from when this is made until `stop`."""

    def __init__(self, watched: Agent) -> None:
        self._agent = watched
        self.pss: list[tuple[int, int]] = [watched.pss_bytes()]
        self._began = self._now()
        self.seconds = self.attacher_s = self.reader_s = self.bpf_s = 0.0

    def look(self) -> None:
        """Take down how much memory the agent has now."""
        self.pss.append(self._agent.pss_bytes())

    def stop(self) -> None:
        """Take down the times."""
        spent = (now - then for now, then in zip(self._now(), self._began, strict=True))
        self.seconds, self.attacher_s, self.reader_s, self.bpf_s = (each / 1e9 for each in spent)

    def _now(self) -> tuple[int, int, int, int]:
        bpf_ns = sum(program.run_ns for program in self._agent.programs().values())
        return time.monotonic_ns(), *self._agent.cpu_ns(), bpf_ns


def measure(streams: int, frames: int, rate: float, transport: str) -> Row:
    """Let `streams` users stream at once."""
    lane = Lane("paced", MODEL, frames, streams=streams, rate=rate)
    with (
        server([sys.executable, "-m", "benchmarks.common.light_service"]) as served,
        agent("run", "--port", str(served.port), transport=transport) as watching,
    ):
        time.sleep(2.0)  # the start's own work is no part of this
        watch = Watch(watching)
        if not streams:
            time.sleep(IDLE_S)
            watch.stop()
            return _row(streams, None, watch, watching)
        with load(served.port, [lane], concurrency=streams, ramp_s=min(1.0, streams / 100)) as client:
            while client.running(LOOK_S):
                watch.look()
            watch.stop()
            felt = client.felt(stop=False)
        return _row(streams, felt, watch, watching)


def _row(streams: int, felt: Felt | None, watch: Watch, watching: Agent) -> Row:
    scrape = watching.settled(streams)
    watch.look()
    said = watching.log()
    if "WARNING" in said or "ERROR" in said:
        click.echo(said, err=True, nl=False)
    outcomes = scrape.by_label("footlight_capture_total", "outcome")
    return Row(
        streams=streams,
        streams_at_once=at_once(felt) if felt is not None else 0,
        seconds=watch.seconds,
        frames=int(felt.frames.sum()) if felt is not None else 0,
        frames_counted=round(scrape.total("llm_frames_total")),
        requests_counted=round(scrape.total("llm_requests_total")),
        lost=scrape.lost(),
        coverage=outcomes["complete"] / max(1.0, sum(outcomes.values())) if streams else float("nan"),
        attacher_cpu_seconds=watch.attacher_s,
        reader_cpu_seconds=watch.reader_s,
        bpf_seconds=watch.bpf_s,
        attacher_pss_bytes=max(attacher for attacher, _ in watch.pss),
        reader_pss_bytes=max(reader for _, reader in watch.pss),
        pss_bytes=max(sum(both) for both in watch.pss),
    )


def at_once(felt: Felt) -> int:
    """The most streams that were under way at the same time, by the client's clock."""
    changes = sorted([(at, 1) for at in felt.sent_ns.tolist()] + [(at, -1) for at in felt.finished_ns.tolist()])
    most = now = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    return most


def bars(rows: Sequence[Row], frames: int) -> Iterator[Bar]:
    """What the issue promises."""
    for row in rows:
        if not row.streams:
            continue
        what = f"{row.streams} streams"
        yield Bar(f"{what}: at once", row.streams_at_once, row.streams, at_least=True)
        yield Bar(f"{what}: frames that the client missed", row.streams * frames - row.frames, 0)
        yield Bar(f"{what}: streams that the agent lost", row.streams - row.requests_counted, 0)
        yield Bar(f"{what}: coverage", row.coverage, COVERAGE, at_least=True)
        yield Bar(f"{what}: PSS of both processes", row.pss_bytes / 1e6, PSS_LIMIT / 1e6, " MB")


def tables(rows: Sequence[Row]) -> Iterator[Group]:
    """The rows for people."""
    idle = next((row.cpu_share for row in rows if not row.streams), 0.0)
    columns = (
        "streams",
        "frames/s",
        "frames",
        "uncounted",
        "streams lost",
        "events lost",
        "coverage",
        "CPU",
        "ms/1,000 frames",
        "by frames",
        "BPF",
        "PSS, MB",
    )
    yield table(
        "scale: what the agent costs",
        columns,
        [
            (
                f"{row.streams_at_once:,}" if row.streams else "idle",
                f"{row.frames / row.seconds:,.0f}",
                f"{row.frames:,}",
                f"{row.frames - row.frames_counted:,}",
                f"{row.streams - row.requests_counted}",
                f"{sum(row.lost.values())}",
                f"{row.coverage:.4f}" if row.streams else "-",
                f"{row.cpu_share:.2%}",
                f"{row.cpu_ms_per_1000_frames():.1f}" if row.frames else "-",
                f"{by_frames:.1f}" if (by_frames := row.cpu_ms_per_1000_frames(idle)) > 0 else "-",
                f"{row.bpf_seconds / row.frames * 1e6:.1f}" if row.frames else "-",
                f"{row.attacher_pss_bytes / 1e6:.1f} + {row.reader_pss_bytes / 1e6:.1f} ",
            )
            for row in rows
        ],
        notes="CPU: both processes of the agent, of one CPU. BPF: ms per 1,000 frames. PSS: attacher + reader. "
        f"Events lost: {lost_by_reason([row.lost for row in rows])}.",
    )


@click.command(help=__doc__)
@click.option("--streams", default="0,1,10,100,1000", show_default=True, help="Numbers of streams; 0 is idle.")
@click.option("--frames", default=97, show_default=True, help="Frames with content of each stream.")
@click.option("--rate", default=8.0, show_default=True, help="Frames a second of each stream.")
@click.option(
    "--transport", type=click.Choice(["auto", "ring", "perf"]), default="auto", show_default=True, help="The agent's."
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object per row on stdout.")
def main(streams: str, frames: int, rate: float, transport: str, as_json: bool) -> None:
    need_root()
    ends_on_sigterm()
    raise_open_files()
    rows = [measure(int(count), frames, rate, transport) for count in streams.split(",")]
    if as_json:
        show_json({**asdict(row), "cpu_ms_per_1000_frames": row.cpu_ms_per_1000_frames()} for row in rows)
    else:
        show(tables(rows))
    judge(list(bars(rows, frames)))


if __name__ == "__main__":
    main()
