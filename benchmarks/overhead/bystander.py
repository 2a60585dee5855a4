"""What a process pays that is no target, and one that is, for what it does most."""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Final

import click

from benchmarks.common.agent import agent
from benchmarks.common.processes import end, line_of, server, started, told

SOURCE: Final = Path(__file__).with_suffix(".c")
STATES: Final = ("without", "beside", "watched")
STATISTICS_S: Final = 1.5
"""For the first second the agent has the kernel's statistics on, as it has for one in eight from then on."""
_LIMIT_S: Final = 60.0


@dataclass(frozen=True, slots=True)
class Act:
    """One thing that a process does. ns: without an agent, beside one that watches others, and watched by it.

    Each is the median over the rounds; the `_added` are the medians of the differences within a round.
    """

    what: str
    without_ns: float
    beside_ns: float
    watched_ns: float
    beside_added_ns: float
    watched_added_ns: float


def measure(rounds: int, seed: int, transport: str) -> list[Act]:
    """Measure in `rounds` rounds, the three states in random order in each."""
    rng = Random(seed)
    found: list[dict[str, dict[str, float]]] = []
    with tempfile.TemporaryDirectory() as folder:
        program = _built(Path(folder))
        # the last CPU: whatever the kernel does not place elsewhere is on the first
        pinned = ["chrt", "--fifo", "--reset-on-fork", "1", "taskset", "--cpu-list", str(max(os.sched_getaffinity(0)))]
        with (
            server([sys.executable, "-m", "benchmarks.common.light_service"]) as other,
            started([*pinned, str(program)]) as process,
        ):
            port = int(line_of(process, _LIMIT_S).rsplit(b":", 1)[1])
            assert process.stdin is not None
            for _ in range(rounds):
                ns = {}
                for state in rng.sample(STATES, len(STATES)):
                    with ExitStack() as stack:
                        if state != "without":
                            target = port if state == "watched" else other.port
                            stack.enter_context(agent("run", "--port", str(target), transport=transport))
                            time.sleep(STATISTICS_S)
                        process.stdin.write(b"go\n")
                        ns[state] = told(process, _LIMIT_S)
                found.append(ns)
            end(process)
    return list(_acts(found))


def _acts(found: list[dict[str, dict[str, float]]]) -> Iterator[Act]:
    for what in found[0]["without"]:
        without, beside, watched = ([each[state][what] for each in found] for state in STATES)
        yield Act(
            what=what,
            without_ns=statistics.median(without),
            beside_ns=statistics.median(beside),
            watched_ns=statistics.median(watched),
            beside_added_ns=statistics.median(ns - base for ns, base in zip(beside, without, strict=True)),
            watched_added_ns=statistics.median(ns - base for ns, base in zip(watched, without, strict=True)),
        )


def _built(folder: Path) -> Path:
    if shutil.which("gcc") is None:
        raise click.ClickException("gcc is not installed; apt-get install gcc libc6-dev")
    program = folder / "bystander"
    subprocess.run(["gcc", "-O2", "-Wall", "-Wextra", "-Werror", str(SOURCE), "-o", str(program)], check=True)
    return program
