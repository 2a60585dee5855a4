"""What the probes' programs cost, by the kernel's BPF run-time statistics, kept on for a part of the time.

While they are on, every run of every BPF program on the host reads the clock twice, some 70 ns that processes which are
not watched pay too. So they are on for one period in eight, and the cost in between is taken to be what it was then.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Self

from probes import libbpf
from probes.errors import HostError

if TYPE_CHECKING:
    from probes.probe import Probe

log = logging.getLogger("footlight")

ONE_IN: Final = 8
"""Of this many turns one is measured, the very first among them."""


@dataclass(frozen=True, slots=True)
class Cost:
    """CPU time and runs of a probe's programs, since the first turn; estimates."""

    run_ns: int = 0
    runs: int = 0


class RunStats:
    """Measures the cost of `probes` in turns. A context manager: leaving it switches the statistics off.

    `enable` switches them on and returns the descriptor that keeps them on, or raises HostError: then no cost is known,
    from then on, which is said once. `clock` is in ns.
    """

    def __init__(
        self,
        probes: Sequence[Probe],
        enable: Callable[[], int] = libbpf.enable_run_stats,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._probes = probes
        self._enable = enable
        self._clock = clock
        self._descriptor: int | None = None
        self._refused = False
        self._turns = 0
        self._began_ns = 0
        self._charged_until_ns = clock()
        self._before: dict[str, Cost] = {}
        self._costs = {probe.name: Cost() for probe in probes}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._switch_off()

    def of(self, probe: Probe) -> Cost | None:
        """The cost of a probe so far; None where the kernel does not measure it."""
        return None if self._refused else self._costs[probe.name]

    def turn(self) -> None:
        """Call it at equal distances: begins a measurement, or ends one and charges it for the time without."""
        if self._descriptor is not None:
            self._charge()
            self._switch_off()
        elif self._turns % ONE_IN == 0 and not self._refused:
            self._begin()
        self._turns += 1

    def _begin(self) -> None:
        self._before = self._measured()
        self._began_ns = self._clock()
        try:
            self._descriptor = self._enable()
        except HostError as error:  # before Linux 5.8
            self._refused = True
            log.warning("what the probes cost is not known: %s", error.what)

    def _charge(self) -> None:
        now_ns = self._clock()
        factor = (now_ns - self._charged_until_ns) / max(1, now_ns - self._began_ns)
        self._charged_until_ns = now_ns
        for name, now in self._measured().items():
            before, cost = self._before[name], self._costs[name]
            self._costs[name] = Cost(
                cost.run_ns + round((now.run_ns - before.run_ns) * factor),
                cost.runs + round((now.runs - before.runs) * factor),
            )

    def _measured(self) -> dict[str, Cost]:
        costs = {}
        for probe in self._probes:
            stats = probe.run_stats().values()
            costs[probe.name] = Cost(sum(each.run_ns for each in stats), sum(each.runs for each in stats))
        return costs

    def _switch_off(self) -> None:
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)
