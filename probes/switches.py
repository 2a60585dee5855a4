"""Whether the kernel tells its tracepoints everything: the switches that it tells against those that it counts.

There are kernels, of sandboxes, that call no tracepoint while one of certain threads runs (see bpf/switches.bpf.c).
What an interrupt does on that CPU meanwhile is not seen by any probe, and nobody counts it.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from probes import libbpf
from probes.errors import ProbeError
from probes.probe import OBJECTS

OBJECT: Final = "switches.bpf.o"
SETTLE_S: Final = 0.01
"""A switch that the kernel has counted is told within this time."""
FEWEST: Final = 2
"""A thread that came in this many times more than it went is one of whom the kernel does not tell: it runs once."""
_TID: Final = struct.Struct("=I")
_THREAD: Final = struct.Struct("=QQ")
_COUNT: Final = struct.Struct("=Q")


@dataclass(frozen=True, slots=True)
class Switches:
    """Context switches of the host. `left_out` of the `counted` ones were not told, at least; `silent` are the tids of
    threads that were never told to go, though they came again and again."""

    counted: int
    left_out: int
    silent: tuple[int, ...]


def counted_by_kernel(stat: Path = Path("/proc/stat")) -> int:
    """How many context switches the kernel counted since it booted, on all CPUs. Raises OSError."""
    with stat.open() as lines:
        for line in lines:
            name, _, value = line.partition(" ")
            if name == "ctxt":
                return int(value)
    raise ProbeError(f"{stat} has no line `ctxt`", "report the kernel's version: it should have")


def observe(seconds: float, counted: Callable[[], int] = counted_by_kernel) -> Switches:
    """Look for so many `seconds`. Needs the privileges of a probe.

    What is told is counted from before to after what the kernel counts, so nothing is said to be left out that is not.
    Raises HostError or ProbeError.
    """
    with libbpf.Object(OBJECTS / OBJECT) as programs:
        programs.load()
        programs.attach()
        told_before = _told(programs)
        before = counted()
        time.sleep(seconds)
        switches = counted() - before
        time.sleep(SETTLE_S)
        left_out = max(0, switches - _told(programs) + told_before)
        threads = [(_TID.unpack(tid)[0], *_THREAD.unpack(value)) for tid, value in programs.map("threads").items()]
        return Switches(switches, left_out, silent_among(threads) if left_out else ())


def silent_among(threads: Iterable[tuple[int, int, int]]) -> tuple[int, ...]:
    """Of threads, each with how often it was told to come and to go, those of whom the going is never told."""
    return tuple(sorted(tid for tid, came, went in threads if not went and came >= FEWEST))


def _told(programs: libbpf.Object) -> int:
    raw = programs.map("told").lookup(bytes(4)) or b""
    return sum(count for (count,) in _COUNT.iter_unpack(raw))
