"""Injects faults of known cause and size into two servers, and asks the agent why their requests were slow.

For each kind of fault: a server, an agent (`footlight trace --json`), requests without the fault (the quiet twin), then
the same with it, one at a time. The size of each fault is the injector's own: how long a lock was held, how long the
kernel says that a cgroup was throttled, when the other process had the CPU.

roleplay is examples/roleplay with one engine process. scripted is `benchmarks.faults.service`: an event loop and worker
threads that do what a request's script says.

"found" is the cause that grew most against the quiet twin (by more than 5 ms and 10 % of the phase), with the number of
requests of which that was said; "of phase" is the one with the largest share of the phase. "felt" and "charged" are of
the injected time: how much longer the phase was by the client's clock, and how much more the agent charged to the
right cause. A false alarm is a quiet request that is told to have such a cause; `on_cpu` and `run_queue` count only
where they are the fault's own cause, because whatever else the host does makes them grow in truth.

Needs root, two CPUs, and the cgroup controllers cpu and io (blkio), of either version. `memory` needs version 1, and
is left out elsewhere. The host should do little else: what a neighbour takes is a fault too, with a size that nobody
knows. Everything is given back at the end.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict
from random import Random
from typing import Final

import click
from rich.console import Group

from benchmarks.common.agent import agent
from benchmarks.common.processes import ends_on_sigterm, realtime
from benchmarks.common.report import Bar, judge, need_root, show, show_json, table
from benchmarks.faults.client import Asked
from benchmarks.faults.explained import Explained, told
from benchmarks.faults.kinds import FAULTS, Fault
from benchmarks.faults.score import LEAST_INJECTED_S, Request, Run, Score, macro_f1, score

WARM_UP: Final = 2
SPARE: Final = 6
KINDS_WANTED: Final = 10
REQUESTS_WANTED: Final = 30


def measure(fault: Fault, requests: int, seed: int, *, watched: bool) -> Run:
    """Run one kind of fault and its quiet twin; with no agent unless `watched`."""
    _say(f"{fault.name}: ")
    rng = Random(seed)
    began = time.monotonic()
    with ExitStack() as stack:
        fault.open(stack)
        watching = stack.enter_context(agent("trace", "--port", str(fault.port)) if watched else nullcontext())
        with realtime():
            for _ in range(WARM_UP):
                fault.ask(faulty=False)
            _say(f"{requests} quiet, ")
            quiet = list(_asked(fault, requests, rng, faulty=False))
            fault.arm()
            fault.ask(faulty=True)
            _say(f"{requests} faulty, ")
            faulty = list(_asked(fault, requests + SPARE, rng, faulty=True))
        fault.rest()
        lines = told(watching, (each.transcript.port for each in (*quiet, *faulty))) if watching is not None else {}
    run = judged(fault, quiet, faulty, lines, requests)
    _say(f"{time.monotonic() - began:.0f} s\n")
    return run


def judged(
    fault: Fault, quiet: Sequence[Asked], faulty: Sequence[Asked], lines: Mapping[int, Explained], requests: int
) -> Run:
    """Lay each request beside what the agent said of it. Of the faulty ones the first `requests` that had the fault."""
    injected = [(asked, fault.injected_ns(asked, quiet) / 1e9) for asked in faulty]
    kept = [(asked, size) for asked, size in injected if size >= LEAST_INJECTED_S][:requests]
    pairs = [
        (asked, size, is_faulty, lines.get(asked.transcript.port))
        for asked, size, is_faulty in [(asked, 0.0, False) for asked in quiet] + [(*each, True) for each in kept]
    ]
    return Run(
        fault=fault.name,
        server=fault.server,
        phase=fault.phase,
        cause=fault.cause,
        requests=tuple(
            Request(is_faulty, size, fault.felt_ns(asked) / 1e9, line.parts(fault.phase) if line is not None else {})
            for asked, size, is_faulty, line in pairs
        ),
        untraced=sum(line is None for *_, line in pairs),
        uneven=sum(line.uneven for *_, line in pairs if line is not None),
    )


def _asked(fault: Fault, requests: int, rng: Random, *, faulty: bool) -> Iterator[Asked]:
    for _ in range(requests):
        yield fault.ask(faulty=faulty)
        # not in step with anything that has a period
        time.sleep(rng.uniform(0.02, 0.06))


def bars(scores: Sequence[Score], *, all_kinds: bool, watched: bool) -> Iterator[Bar]:
    """What the issue promises; of the injectors alone unless `watched`."""
    if all_kinds:
        yield Bar("kinds of faults", len(scores), KINDS_WANTED, at_least=True)
    for each in scores:
        yield Bar(f"{each.fault}: requests with the fault", each.requests, REQUESTS_WANTED, at_least=True)
        # on_cpu grows with a neighbour on the same core: caches, and the core's other thread
        yield Bar(f"{each.fault}: |felt - injected| / injected, is the fault there", abs(each.felt - 1), 0.25)
        if watched:
            yield Bar(f"{each.fault}: |charged - injected| / injected", abs(each.charged - 1), 0.1)
            yield Bar(f"{each.fault}: unexplained, faulty", each.unexplained_faulty, 0.05)
            yield Bar(f"{each.fault}: unexplained, quiet", each.unexplained_quiet, 0.05)
            yield Bar(f"{each.fault}: requests that the agent did not tell of", each.untraced, 0)
            yield Bar(f"{each.fault}: windows whose parts do not add up", each.uneven, 0)
    if watched:
        yield Bar("macro-F1", macro_f1(scores), 0.95, at_least=True)
        yield Bar("false alarms", false_alarms(scores), 0.02)


def false_alarms(scores: Sequence[Score]) -> float:
    """The part of the quiet requests that were told to have a cause that they do not have."""
    quiet = sum(each.quiet_requests for each in scores)
    return sum(each.false_alarms for each in scores) / quiet if quiet else math.nan


def tables(scores: Sequence[Score], *, watched: bool) -> Iterator[Group]:
    """The runs for people."""
    columns = ["fault", "server", "phase", "n", "cause", "ms", "felt"]
    if watched:
        columns += ["found", "of phase", "charged", "unexplained", "quiet", "alarms"]
    rows = []
    for each in scores:
        row = [each.fault, each.server, each.phase, str(each.requests), each.cause, f"{each.injected_s * 1e3:.1f}"]
        row.append(f"{each.felt:.3f}")
        if watched:
            cause, count = max(each.found.items(), key=lambda pair: pair[1], default=(None, 0))
            row += [
                f"{cause or 'none'} {count}",
                each.dominant,
                f"{each.charged:.3f}",
                f"{each.unexplained_faulty:.2%}",
                f"{each.unexplained_quiet:.2%}",
                f"{each.false_alarms}/{each.quiet_requests}",
            ]
        rows.append(row)
    notes = "ms: injected, median. felt, charged: median of (that - its median without the fault) / injected."
    if watched:
        notes += f" macro-F1 {macro_f1(scores):.3f} over all requests; false alarms {false_alarms(scores):.2%}."
        other = [f"{each.fault}: {_others(each)}" for each in scores if _others(each)]
        if other:
            notes += f"\nquiet requests with another cause that grew: {'; '.join(other)}"
    yield table("faults: what the agent says of requests that were kept", columns, rows, notes=notes)


def _others(each: Score) -> str:
    return ", ".join(f"{cause} {count}" for cause, count in each.alarms.items() if cause is not None)


def _possible() -> Iterator[type[Fault]]:
    for fault in FAULTS:
        lack = fault.missing()
        if lack is None:
            yield fault
        else:
            _say(f"{fault.name}: left out: {lack}\n")


def _say(text: str) -> None:
    click.echo(text, err=True, nl=False)


@click.command(help=__doc__)
@click.option(
    "--only", multiple=True, type=click.Choice([fault.name for fault in FAULTS]), help="This kind only; repeatable."
)
@click.option("--requests", default=REQUESTS_WANTED, show_default=True, help="With each fault, and without.")
@click.option("--seed", default=7, show_default=True, help="Of the pauses between requests.")
@click.option("--no-agent", is_flag=True, help="Only see whether the faults are as large as they say; charges nothing.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per fault on stdout, and one over all.")
def main(only: tuple[str, ...], requests: int, seed: int, no_agent: bool, as_json: bool) -> None:
    need_root()
    ends_on_sigterm()
    watched = not no_agent
    kinds = [fault for fault in FAULTS if fault.name in only] or list(_possible())
    scores = [score(measure(kind(), requests, seed, watched=watched)) for kind in kinds]
    if as_json:
        show_json(asdict(each) for each in scores)
        show_json([{"macro_f1": macro_f1(scores), "false_alarms": false_alarms(scores)}])
    else:
        show(tables(scores, watched=watched))
    judge(list(bars(scores, all_kinds=not only, watched=watched)))


if __name__ == "__main__":
    sys.exit(main())
