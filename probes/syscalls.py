"""The syscalls probe as the attacher sees it: how long each system call of a service takes. Opt-in."""

from __future__ import annotations

import functools
import struct
from typing import ClassVar, Final

from probes.probe import OBJECTS, Count, Probe

NAMES: Final = OBJECTS / "syscalls.txt"
"""`NUMBER NAME` lines; built with the objects."""

_KEY: Final = struct.Struct("=II")


class SyscallsProbe(Probe):
    """The loaded and attached probe. Every system call of every process on the host pays for it."""

    name: ClassVar[str] = "syscalls"
    reasons: ClassVar[tuple[Count, ...]] = (Count.CLOCK_BACKWARDS, Count.SYSCALLS_FULL)

    @classmethod
    def seen_counts(cls) -> tuple[Count, ...]:
        """The counter of calls that were due to be timed."""
        return (Count.SEEN_SYSCALLS,)

    def latencies(self) -> dict[tuple[int, int], tuple[int, ...]]:
        """(service, number of the system call) -> the words of its `struct histogram`: sum in ns, then the counts."""
        return {
            _KEY.unpack(key): struct.unpack(f"={len(value) // 8}Q", value)
            for key, value in self.map("syscall_stats").items()
        }


@functools.cache
def _names() -> dict[int, str]:
    lines = NAMES.read_text("ascii").splitlines() if NAMES.exists() else []
    return {int(number): name for number, name in (line.split() for line in lines)}


def syscall_name(number: int) -> str:
    """The name of a system call, by the headers that the objects were built with; its number where they have none."""
    return _names().get(number, str(number))
