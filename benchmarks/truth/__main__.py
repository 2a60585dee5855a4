"""Compares what the agent says with what a client saw on its own clock, for the same requests.

The client keeps 32 streams under way over raw sockets, seven requests to a connection, and runs at real-time priority:
a clock must not wait for the CPU that it shares with what it measures. It takes CLOCK_MONOTONIC just before each send
and after each recv returned. The agent is `footlight trace --json`, which serves /metrics too. Counts and means are
those of /metrics; p50 and p99 of TTFT and duration are of all requests that `trace` told; p50 and p99 of the
inter-token latency are the quantiles of /metrics, which by their definition may be off by 1 % of the value.

scripted: uvicorn plays a script (TTFT 40 ms, ITL 12 ms, both log-normal) with role frames, empty deltas and comments
between the tokens, frames split over two writes, and two frames in one write. roleplay: examples/roleplay, whose two
engines keep the CPUs busy: half of the streams are for each model, and two of three requests for the faster one.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Final

import click
from rich.console import Group

from benchmarks.common import scripts
from benchmarks.common.agent import Agent, Scrape, Traced, agent
from benchmarks.common.client import Client, Heard
from benchmarks.common.processes import Server, ends_on_sigterm, realtime, server
from benchmarks.common.report import Bar, judge, lost_by_reason, mean, nearest_rank, need_root, show, show_json, table
from benchmarks.common.transcript import Transcript, transcribe

PER_CONNECTION: Final = 7
BAR_MS: Final = 1.0
SCRIPTED: Final = ("scripted-a", "scripted-b")
ROLEPLAY: Final = ("understudy", "headliner")
HISTOGRAMS: Final = {
    "TTFT": "llm_time_to_first_token_seconds",
    "ITL": "llm_inter_token_latency_seconds",
    "duration": "llm_request_duration_seconds",
}


@dataclass(frozen=True, slots=True)
class Line:
    """One figure, by both. `unit` is empty for counts; for latencies it is ms."""

    service: str
    model: str
    what: str
    unit: str
    client: float
    agent: float

    @property
    def difference(self) -> float:
        """How much the agent says less (negative) or more."""
        return self.agent - self.client


@dataclass(frozen=True, slots=True)
class PerRequest:
    """How far both are apart on the same request, in ms: |agent - client| over all requests."""

    service: str
    what: str
    requests: int
    mean_ms: float
    p50_ms: float
    p99_ms: float
    worst_ms: float


@dataclass(frozen=True, slots=True)
class Result:
    """What one service's run gave."""

    service: str
    lines: list[Line]
    per_request: list[PerRequest]
    unmatched: int
    coverage: float
    lost: dict[str, int]
    seconds: float
    concurrency: int


@contextmanager
def service(name: str, requests: int, seed: int) -> Iterator[tuple[Server, list[list[bytes]]]]:
    """Start a service; give it with what it is to be asked, by lane."""
    if name == "scripted":
        with server([sys.executable, "-m", "benchmarks.common.uvicorn_service"]) as started:
            yield started, [list(scripts.drawn(seed, requests, SCRIPTED))]
    else:
        with server([sys.executable, "-m", "examples.roleplay", "serve", "--port", "0"]) as started:
            shares = (requests - requests // 3, requests // 3)
            yield (
                started,
                [
                    list(islice(scripts.roleplay(seed, [model], prompt_bytes=101, max_tokens=31), share))
                    for model, share in zip(ROLEPLAY, shares, strict=True)
                ],
            )


def measure(name: str, requests: int, concurrency: int, seed: int, transport: str) -> Result:
    """Run the client against a service with the agent attached, and lay both side by side."""
    heard: list[Heard] = []
    with (
        service(name, requests, seed) as (served, lanes),
        agent("trace", "--port", str(served.port), transport=transport) as watching,
    ):
        client = Client(
            served.port,
            [iter(lane) for lane in lanes],
            heard.append,
            concurrency=concurrency,
            per_connection=PER_CONNECTION,
        )
        with realtime():
            client.run()
        scrape = watching.settled(requests)
        traced = watching.traced()
        _complain(watching)
    truth = [transcribe(each) for each in heard]
    began, ended = min(each.sent_ns for each in truth), max(each.finished_ns for each in truth)
    pairs, unmatched = matched(truth, traced)
    outcomes = scrape.by_label("footlight_capture_total", "outcome")
    return Result(
        service=name,
        lines=[
            line
            for model in sorted({each.model for each in truth})
            for line in compare(name, model, truth, traced, scrape)
        ],
        per_request=apart(name, pairs),
        unmatched=unmatched,
        coverage=outcomes["complete"] / max(1.0, sum(outcomes.values())),
        lost=scrape.lost(),
        seconds=(ended - began) / 1e9,
        concurrency=concurrency,
    )


def compare(
    name: str, model: str, truth: Sequence[Transcript], traced: Sequence[Traced], scrape: Scrape
) -> Iterator[Line]:
    """Yield the figures of one model."""
    ours = [each for each in truth if each.model == model]
    theirs = [each for each in traced if each.model == model]
    frames = sum(len(each.content_ns) for each in ours)
    counts = {
        "requests": (len(ours), scrape.total("llm_requests_total", model_name=model)),
        "requests traced": (len(ours), len(theirs)),
        "frames with content": (frames, scrape.total("llm_frames_total", model_name=model)),
        "first tokens": (len(ours), scrape.total(f"{HISTOGRAMS['TTFT']}_count", model_name=model)),
        "gaps": (frames - len(ours), scrape.total(f"{HISTOGRAMS['ITL']}_count", model_name=model)),
        "generated tokens": (
            sum(each.completion_tokens or 0 for each in ours),
            scrape.total("llm_generation_tokens_total", model_name=model),
        ),
    }
    for what, (client, watching) in counts.items():
        yield Line(name, model, what, "", client, watching)
    clients = {
        "TTFT": [each.ttft_ns / 1e6 for each in ours],
        "ITL": [gap / 1e6 for each in ours for gap in each.gaps_ns],
        "duration": [each.duration_ns / 1e6 for each in ours],
    }
    agents: dict[str, list[float]] = {
        "TTFT": [(each.time_to_first_token_seconds or 0.0) * 1e3 for each in theirs],
        "duration": [each.duration_seconds * 1e3 for each in theirs],
    }
    for what, values in clients.items():
        histogram = HISTOGRAMS[what]
        count = scrape.total(f"{histogram}_count", model_name=model)
        told = scrape.total(f"{histogram}_sum", model_name=model) / count * 1e3 if count else float("nan")
        yield Line(name, model, f"{what} mean", "ms", mean(values), told)
        for quantile, label in ((0.5, "p50"), (0.99, "p99")):
            if what in agents:
                told = nearest_rank(agents[what], quantile)
            else:
                gauge = scrape.one(
                    "llm_latency_quantile_seconds", model_name=model, sli=what.lower(), quantile=str(quantile)
                )
                told = float("nan") if gauge is None else gauge * 1e3
            yield Line(name, model, f"{what} {label}", "ms", nearest_rank(values, quantile), told)


def matched(truth: Sequence[Transcript], traced: Sequence[Traced]) -> tuple[list[tuple[Transcript, Traced]], int]:
    """Pair the requests of both by the client's port and their order on it; and how many have no partner."""
    ours: dict[int, list[Transcript]] = defaultdict(list)
    theirs: dict[int, list[Traced]] = defaultdict(list)
    for each in truth:
        ours[each.port].append(each)
    for told in traced:
        theirs[int(told.peer.rpartition(":")[2])].append(told)
    pairs: list[tuple[Transcript, Traced]] = []
    unmatched = 0
    for port in ours.keys() | theirs.keys():
        # both are in the order in which they ended, and requests of one connection come one after the other
        pairs += zip(ours[port], theirs[port], strict=False)
        unmatched += abs(len(ours[port]) - len(theirs[port]))
    return pairs, unmatched


def apart(name: str, pairs: Sequence[tuple[Transcript, Traced]]) -> list[PerRequest]:
    """How far both are apart, request by request."""
    differences: dict[str, list[float]] = {"TTFT": [], "mean ITL": [], "longest gap": [], "duration": []}
    wrong = 0
    for ours, theirs in pairs:
        wrong += len(ours.content_ns) != theirs.frames
        both = {
            "TTFT": (ours.ttft_ns, theirs.time_to_first_token_seconds),
            "duration": (ours.duration_ns, theirs.duration_seconds),
        }
        if gaps := ours.gaps_ns:
            both["mean ITL"] = (round(mean(gaps)), theirs.mean_inter_token_latency_seconds)
            both["longest gap"] = (max(gaps), theirs.longest_gap_seconds)
        for what, (client_ns, told_s) in both.items():
            differences[what].append(float("inf") if told_s is None else abs(told_s * 1e3 - client_ns / 1e6))
    result = [
        PerRequest(
            name, what, len(each), mean(each), nearest_rank(each, 0.5), nearest_rank(each, 0.99), max(each, default=0.0)
        )
        for what, each in differences.items()
    ]
    # in requests, not ms: how many have another count of frames
    return [*result, PerRequest(name, "frames", len(pairs), wrong, wrong, wrong, wrong)]


def bars(result: Result) -> Iterator[Bar]:
    """What the issue promises, of one run."""
    name = result.service
    for line in result.lines:
        what = f"{name} {line.model}: {line.what}, agent - client"
        if not line.unit:
            yield Bar(what, abs(line.difference), 0)
        elif not line.what.startswith("duration"):
            yield Bar(what, abs(line.difference), BAR_MS, " ms")
    frames = next(each for each in result.per_request if each.what == "frames")
    yield Bar(f"{name}: requests with another count of frames", frames.worst_ms, 0)
    yield Bar(f"{name}: requests that only one of both has", result.unmatched, 0)
    yield Bar(f"{name}: coverage", result.coverage, 1.0, at_least=True)
    yield Bar(f"{name}: lost events", sum(result.lost.values()), 0)


def tables(result: Result) -> Iterator[Group]:
    """The run for people."""
    frames = sum(line.client for line in result.lines if line.what == "frames with content")
    requests = sum(line.client for line in result.lines if line.what == "requests")
    yield table(
        f"{result.service}: {requests:.0f} requests, {frames:.0f} frames with content in {result.seconds:.1f} s, "
        f"concurrency {result.concurrency}",
        ("", "model", "client", "agent", "agent - client"),
        [
            (
                line.what,
                line.model,
                f"{line.client:.3f} ms" if line.unit else f"{line.client:.0f}",
                f"{line.agent:.3f} ms" if line.unit else f"{line.agent:.0f}",
                f"{line.difference:+.3f} ms" if line.unit else f"{line.difference:+.0f}",
            )
            for line in result.lines
        ],
        notes=f"coverage {result.coverage:.4f}, lost events {lost_by_reason([result.lost])}",
    )
    yield table(
        f"{result.service}: |agent - client| on the same request, ms",
        ("", "requests", "mean", "p50", "p99", "worst"),
        [
            (
                each.what,
                str(each.requests),
                *(f"{value:.3f}" for value in (each.mean_ms, each.p50_ms, each.p99_ms, each.worst_ms)),
            )
            for each in result.per_request
            if each.what != "frames"
        ],
    )


def _complain(watching: Agent) -> None:
    said = watching.log()
    if said:
        click.echo(said, err=True, nl=False)


@click.command(help=__doc__)
@click.option(
    "--service",
    "which",
    type=click.Choice(["scripted", "roleplay", "both"]),
    default="both",
    show_default=True,
    help="Which service is watched.",
)
@click.option("--requests", default=1009, show_default=True, help="How many, for each service.")
@click.option("--concurrency", default=32, show_default=True, help="Streams under way at once.")
@click.option("--seed", default=7, show_default=True, help="Equal seeds give equal requests.")
@click.option(
    "--transport", type=click.Choice(["auto", "ring", "perf"]), default="auto", show_default=True, help="The agent's."
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object per figure on stdout.")
def main(which: str, requests: int, concurrency: int, seed: int, transport: str, as_json: bool) -> None:
    need_root()
    ends_on_sigterm()
    names = ("scripted", "roleplay") if which == "both" else (which,)
    results = []
    for name in names:
        result = measure(name, requests, concurrency, seed, transport)
        results.append(result)
        if as_json:
            show_json({**asdict(line), "difference": line.difference} for line in result.lines)
            show_json(asdict(each) for each in result.per_request)
        else:
            show(tables(result))
    judge([bar for result in results for bar in bars(result)])


if __name__ == "__main__":
    main()
