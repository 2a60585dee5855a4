"""Measures what a host pays for the agent: the watched service, everybody else, and the agent's own time and memory.

The watched service runs under one load that saturates it, without a pause; an agent, `footlight run`, comes and goes.
Windows with and without it alternate in pairs, in random order within a pair. A change is the median over the pairs of
with / without - 1; in brackets is where that median lies at 95 % confidence. Throughput is work per second of the CPU
time that other processes left: a frame counts as what a frame of its model takes its engine. Two services:

roleplay: examples/roleplay, both models, whose work keeps all CPUs busy. This one has to lose at most 2 %.
plain: uvicorn, one worker per CPU, that does nothing but send frames: the worst case. Nothing is idle, so the agent's
CPU time is the service's loss too, and there is no work beside the writes that are followed.

always-on: the role-play service again, all probes that are on by default against the requests probe alone: what it
costs to know why. At most 1.5 %.

Then what a process pays for each thing that it does: without an agent, beside one that watches another service, and
watched by it. And what each BPF program took, by the kernel's statistics, in the windows with the role-play service.
A context switch of a watched process, with the wake-up that comes with it, may cost 1 us more.
"""

from __future__ import annotations

import os
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import Final

import click
from rich.console import Group

from benchmarks.common.agent import Program
from benchmarks.common.load import Lane
from benchmarks.common.processes import ends_on_sigterm
from benchmarks.common.report import Bar, judge, lost_by_reason, need_root, show, show_json, table
from benchmarks.overhead import bystander, watched
from benchmarks.overhead.bystander import Act
from benchmarks.overhead.watched import Change, Result, Service

LOSS: Final = 0.02
ALWAYS_ON_LOSS: Final = 0.015
SWITCH_NS: Final = 1_000.0
ROLEPLAY: Final = Service(
    "roleplay",
    "examples/roleplay, 32 streams of 31 tokens, 16 for each model",
    (sys.executable, "-m", "examples.roleplay", "serve", "--port", "0"),
    tuple(Lane("roleplay", model, 31, prompt_bytes=211) for model in ("understudy", "headliner")),
    32,
)
ALWAYS_ON: Final = replace(ROLEPLAY, name="always-on", what=f"{ROLEPLAY.what}; all probes against requests alone")
PLAIN: Final = Service(
    "plain",
    "uvicorn that does nothing but send frames, a worker per CPU, 32 streams of 101 frames",
    (sys.executable, "-m", "benchmarks.common.uvicorn_service", "--workers", str(os.cpu_count())),
    (Lane("endless", "plain", 101),),
    32,
)
PARTS: Final = ("roleplay", "always-on", "plain", "bystander")
NAMES: Final = {
    "getppid": "getppid: no probe on it",
    "read": "read of 1 byte of /dev/zero",
    "write": "write of 1 byte to /dev/null",
    "tcp_round_trip": "a byte over loopback TCP and back, 4 calls",
    "tcp_connection": "a loopback TCP connection, begin to reset",
    "process": "fork, exit and wait",
    "two_switches": "to another process and back: 2 sleeps, 2 wake-ups, 2 switches",
}


def bars(results: Sequence[Result], acts: Sequence[Act]) -> Iterator[Bar]:
    """What the issues promise."""
    for result in results:
        lost = -result.throughput.change * 100
        if result.service.name == "roleplay":
            yield Bar("roleplay: throughput lost", lost, LOSS * 100, " %")
        elif result.service.name == "always-on":
            yield Bar("always-on probes: throughput lost", lost, ALWAYS_ON_LOSS * 100, " %")
    for act in acts:
        if act.what == "two_switches":
            yield Bar("a context switch of a watched process: added", act.watched_added_ns / 2, SWITCH_NS, " ns")


def service_tables(result: Result, pairs: int, seconds: float) -> Iterator[Group]:
    """A service's pairs for people."""
    yield table(
        f"{result.service.name}: {result.service.what}; {pairs} pairs of {seconds:g} s",
        ("", "without", "with", "change", "95 %"),
        [_change(change) for change in result.changes],
        notes=_costs(result),
    )


def _change(change: Change) -> tuple[str, ...]:
    name = change.what.replace("_per_", "/").replace("_", " ")
    if change.what in ("cpus_busy", "others_cpu"):
        return name, f"{change.without:.1%}", f"{change.with_agent:.1%}", "", ""
    return (
        name,
        f"{change.without:,.2f}",
        f"{change.with_agent:,.2f}",
        f"{change.change:+.2%}" if change.change == change.change else "-",
        f"[{change.low:+.2%}, {change.high:+.2%}]",
    )


def _costs(result: Result) -> str:
    costs = result.costs
    window_s = result.seconds / len(costs)

    def share(values: Iterator[float]) -> str:
        return f"{statistics.median(values) / window_s:.2%}"

    attacher, reader = share(cost.attacher_s for cost in costs), share(cost.reader_s for cost in costs)
    cpu_s = sum(cost.attacher_s + cost.reader_s for cost in costs)
    bpf_s = sum(cost.bpf_s for cost in costs)
    of_all = (cpu_s + bpf_s) / result.seconds / (os.cpu_count() or 1)
    return (
        f"The agent, of one CPU: attacher {attacher}, reader {reader}, BPF {share(cost.bpf_s for cost in costs)}; "
        f"together {of_all:.2%} of all CPUs.\n"
        f"Per 1,000 frames: {cpu_s / result.frames * 1e6:.1f} ms, and BPF {bpf_s / result.frames * 1e6:.1f} ms. "
        f"PSS at most {max(cost.pss_bytes for cost in costs) / 1e6:.1f} MB.\n"
        f"Lost events: {lost_by_reason([cost.lost for cost in costs])}. "
        f"Coverage: at least {min(cost.coverage for cost in costs):.4f}.\n"
        f"{result.repeated} windows were taken again, because other processes took more than {watched.OTHERS:.0%} of "
        "all CPU time."
    )


def programs_table(result: Result) -> Group:
    """What each BPF program took beside the service."""
    spent: dict[str, Program] = {}
    for name in result.costs[0].programs:
        ran = [cost.programs[name] for cost in result.costs]
        spent[name] = Program(sum(each.run_ns for each in ran), sum(each.runs for each in ran))
    dearest = sorted(spent, key=lambda name: spent[name].run_ns, reverse=True)
    whole = Program(sum(each.run_ns for each in spent.values()), sum(each.runs for each in spent.values()))
    return table(
        f"BPF programs beside {result.service.name}",
        ("program", "runs/s", "ns per run", "ns per frame", "of one CPU"),
        [
            *(_program(name, spent[name], result) for name in dearest if spent[name].runs),
            _program("all", whole, result),
        ],
        notes="For all processes of the host, targets or not. Programs that never ran are left out.",
    )


def _program(name: str, spent: Program, result: Result) -> tuple[str, ...]:
    return (
        name,
        f"{spent.runs / result.seconds:,.0f}",
        f"{spent.run_ns / spent.runs:,.0f}",
        f"{spent.run_ns / result.frames:,.0f}",
        f"{spent.run_ns / 1e9 / result.seconds:.3%}",
    )


def bystander_table(acts: Sequence[Act], rounds: int) -> Group:
    """What everybody else pays."""
    return table(
        f"A process of its own, ns for each; medians of {rounds} rounds",
        ("", "without", "beside an agent", "added", "watched by it", "added"),
        [
            (
                NAMES[act.what],
                f"{act.without_ns:,.0f}",
                f"{act.beside_ns:,.0f}",
                f"{act.beside_added_ns:+,.0f}",
                f"{act.watched_ns:,.0f}",
                f"{act.watched_added_ns:+,.0f}",
            )
            for act in acts
        ],
        notes="It runs at real-time priority on one CPU, so that nothing else is on the clock.",
    )


@click.command(help=__doc__)
@click.option(
    "--pairs", default=11, show_default=True, help="Pairs of windows for each service; at least 7 mean something."
)
@click.option("--seconds", default=8.0, show_default=True, help="Length of a window.")
@click.option(
    "--part",
    "parts",
    multiple=True,
    type=click.Choice(PARTS),
    default=PARTS,
    show_default="all",
    help="What is measured; repeatable.",
)
@click.option("--seed", default=7, show_default=True, help="Of the order of the windows.")
@click.option(
    "--transport", type=click.Choice(["auto", "ring", "perf"]), default="auto", show_default=True, help="The agent's."
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object per figure on stdout.")
def main(pairs: int, seconds: float, parts: tuple[str, ...], seed: int, transport: str, as_json: bool) -> None:
    need_root()
    ends_on_sigterm()
    results = []
    acts: list[Act] = []
    for service in (ROLEPLAY, ALWAYS_ON, PLAIN):
        if service.name not in parts:
            continue
        result = watched.measure(
            service, pairs, seconds, seed, transport, beside_requests=service is ALWAYS_ON
        )
        results.append(result)
        if as_json:
            show_json(asdict(change) for change in result.changes)
            show_json({"service": service.name, **asdict(cost)} for cost in result.costs)
        else:
            show([*service_tables(result, pairs, seconds), programs_table(result)])
    if "bystander" in parts:
        acts = bystander.measure(pairs, seed, transport)
        if as_json:
            show_json(asdict(act) for act in acts)
        else:
            show([bystander_table(acts, pairs)])
    judge(list(bars(results, acts)))


if __name__ == "__main__":
    main()
