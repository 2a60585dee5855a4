"""Measures what the CUDA probe costs the process that calls the driver, for each call, and what it costs strangers.

The driver is a stand-in without a GPU (tests/standins/cuda): its functions do next to nothing, so that what is left is
the cost of the call and of the probe. A launch has a breakpoint at its entry, the others at their return too. What a
breakpoint costs hangs on the instruction that it replaces: the kernel emulates a few (push), and traps once more for
all others (endbr64), so both are measured. "stranger" maps the same library, and is no target.

For comparison getppid, with the syscalls probe, which is a program at the entry and one at the return of system calls.

Rounds without a probe, beside a target and as a target come in random order; figures are medians of the rounds.
"""

from __future__ import annotations

import os
import random
import statistics
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import click
from rich.console import Group

from benchmarks.common.processes import ends_on_sigterm, line_of, started
from benchmarks.common.report import Bar, judge, need_root, show, show_json, table
from probes.cuda import CudaProbe
from probes.probe import Probe, Transport
from probes.requests import RequestsProbe
from probes.syscalls import SyscallsProbe
from tests.standins.cuda import build

STATES: Final = ("without", "stranger", "watched")
CALLS: Final = 5000
ENTRY_NS: Final = 3_000.0
BOTH_NS: Final = 6_000.0
STRANGER_NS: Final = 5.0
_LIMIT_S: Final = 60.0

PUSH: Final = ("-fno-omit-frame-pointer", "-fcf-protection=none")
ENDBR: Final = ("-fno-omit-frame-pointer", "-fcf-protection=branch")


@dataclass(frozen=True, slots=True)
class Act:
    """A call, by the order that the stand-in's caller takes; `flags` are the library's."""

    name: str
    order: str
    flags: tuple[str, ...]
    probe: type[Probe]


ACTS: Final = (
    Act("launch: entry", "launch", PUSH, CudaProbe),
    Act("synchronize: entry and return", "synchronize", PUSH, CudaProbe),
    Act("copy: entry and return", "copy_in_async", PUSH, CudaProbe),
    Act("launch that begins with endbr64", "launch", ENDBR, CudaProbe),
    Act("getppid, syscalls probe", "getppid", PUSH, SyscallsProbe),
)


@dataclass(frozen=True, slots=True)
class Cost:
    """Medians in ns for one call. `added` are medians of the differences to `without` of the same round."""

    name: str
    without_ns: float
    stranger_ns: float
    stranger_added_ns: float
    watched_ns: float
    watched_added_ns: float


class Caller:
    """A process that calls the library at real-time priority on one CPU."""

    def __init__(self, stack: ExitStack, library: Path, program: Path) -> None:
        command = ["env", f"LD_PRELOAD={library}", str(program)]
        self._process = stack.enter_context(started(command))
        self.pid = int(line_of(self._process, _LIMIT_S))
        os.sched_setaffinity(self.pid, {max(os.sched_getaffinity(0))})
        os.sched_setscheduler(self.pid, os.SCHED_FIFO, os.sched_param(1))

    def ns(self, order: str) -> float:
        """How long one call takes."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{order} {CALLS} 1\n".encode())
        return float(line_of(self._process, _LIMIT_S))


@contextmanager
def following(kind: type[Probe], pid: int) -> Iterator[None]:
    """Attach the probe, and follow one process."""
    with RequestsProbe(Transport.RING) as requests, kind(Transport.RING, shares_with=requests) as probe:
        requests.follow({pid: 0}, {})
        probe.attach()
        if isinstance(probe, CudaProbe):
            probe.follow_processes({pid: 0})
            if probe.attached != {pid}:
                raise click.ClickException(f"the probe is not on process {pid}: {probe.missing}")
        yield


def measure(act: Act, rounds: int, rng: random.Random) -> Cost:
    """Take `rounds` of each state."""
    found: list[dict[str, float]] = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        built = build(folder, *act.flags)
        caller, other = Caller(stack, *built), Caller(stack, *built)
        for _ in range(rounds):
            ns = {}
            for state in rng.sample(STATES, len(STATES)):
                with ExitStack() as probing:
                    if state != "without":
                        target = caller if state == "watched" else other
                        probing.enter_context(following(act.probe, target.pid))
                    caller.ns(act.order)
                    ns[state] = caller.ns(act.order)
            found.append(ns)
    return Cost(
        act.name,
        *(
            statistics.median(ns[state] - (ns["without"] if added else 0) for ns in found)
            for state, added in (
                ("without", False),
                ("stranger", False),
                ("stranger", True),
                ("watched", False),
                ("watched", True),
            )
        ),
    )


def bars(costs: Sequence[Cost]) -> Iterator[Bar]:
    """What the documentation says of the cost."""
    by_name = {cost.name: cost for cost in costs}
    for act, limit in zip(ACTS[:3], (ENTRY_NS, BOTH_NS, BOTH_NS), strict=True):
        if act.name in by_name:
            yield Bar(f"{act.name}: added", by_name[act.name].watched_added_ns, limit, " ns")
    for act in ACTS[:4]:
        if act.name in by_name:
            yield Bar(f"{act.name}: added to a stranger", by_name[act.name].stranger_added_ns, STRANGER_NS, " ns")


def costs_table(costs: Sequence[Cost], rounds: int) -> Group:
    """For people."""
    return table(
        f"A call of the CUDA driver, ns; medians of {rounds} rounds of {CALLS} calls",
        ("", "without", "stranger", "added", "watched", "added"),
        [
            (
                cost.name,
                f"{cost.without_ns:,.0f}",
                f"{cost.stranger_ns:,.0f}",
                f"{cost.stranger_added_ns:+,.0f}",
                f"{cost.watched_ns:,.0f}",
                f"{cost.watched_added_ns:+,.0f}",
            )
            for cost in costs
        ],
        notes="A breakpoint is a trap: in a virtual machine it may take several times as long as on the bare machine.",
    )


@click.command(help=__doc__)
@click.option("--rounds", default=11, show_default=True, type=click.IntRange(1), help="Rounds of each state.")
@click.option("--seed", default=7, show_default=True, help="Of the order of the states.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per call on stdout.")
def main(rounds: int, seed: int, as_json: bool) -> None:
    need_root()
    ends_on_sigterm()
    rng = random.Random(seed)
    try:
        costs = [measure(act, rounds, rng) for act in ACTS]
    except (AssertionError, subprocess.SubprocessError) as error:
        raise click.ClickException(f"the stand-in cannot be built: {error}") from error
    if as_json:
        show_json(asdict(cost) for cost in costs)
    else:
        show([costs_table(costs, rounds)])
    judge(list(bars(costs)))


if __name__ == "__main__":
    main()
