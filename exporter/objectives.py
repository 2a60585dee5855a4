"""Whether the objectives of the config hold now: what of the last minutes was good enough.

A latency's threshold is a bucket bound of its histogram (`bounds`), so what was good is counted and not estimated.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from exporter.config import NONE
from exporter.slo.events import concerns, events_by_labels, is_counted, latency_of
from exporter.slo.words import good_event

if TYPE_CHECKING:
    from exporter.slis import Series, Sli, Slis
    from exporter.slo.declared import Slo
    from exporter.slo.events import Events

EVERY_NS: Final = 10_000_000_000
SNAPSHOTS: Final = 31
"""Kept for each of them and each objective: five minutes."""
FEWEST: Final = 20
"""Of fewer events nothing is said."""


@dataclass(frozen=True, slots=True)
class Crossing:
    """An objective that did hold and does not any more, in one series; `labels` are the series'. Both are fractions."""

    slo: Slo
    labels: tuple[str, ...]
    good: float

    def __str__(self) -> str:
        return (
            f"{self.slo.name} does not hold for {' '.join(label for label in self.labels if label != NONE)}: "
            f"{100 * self.good:.2f}% {good_event(self.slo)}, wanted {100 * self.slo.target:g}%"
        )


def bounds(slos: Iterable[Slo]) -> Mapping[str, Sequence[float]]:
    """The bucket bounds that the thresholds need, by SLI, as `Slis` takes them."""
    wanted: dict[str, list[float]] = {}
    for slo in slos:
        latency = latency_of(slo)
        if latency is not None and slo.below_s is not None:
            wanted.setdefault(latency.value, []).append(slo.below_s)
    return wanted


Key = tuple["Slo", tuple[str, ...]]  # an objective, and the labels of a series or model


class Objectives:
    """Watches the series of `slis`."""

    def __init__(self, slos: Sequence[Slo], slis: Slis) -> None:
        self._slos = [slo for slo in slos if is_counted(slo)]
        self._slis = slis
        self._history: dict[Key, deque[Events]] = {}
        self._missed: set[Key] = set()
        self._next_ns = 0

    def reconfigure(self, slos: Sequence[Slo]) -> None:
        """Watch other objectives. What was counted before one of them was there is not held against it."""
        before, self._slos = self._slos, [slo for slo in slos if is_counted(slo)]
        self._history = {key: kept for key, kept in self._history.items() if key[0] in self._slos}
        self._missed = {key for key in self._missed if key[0] in self._slos}
        self._slis.flush(self._slis.clock())
        for slo in self._slos:
            if slo not in before:
                for labels, events in events_by_labels(slo, self._slis):
                    self._history[slo, labels] = deque([events], SNAPSHOTS)

    def threshold(self, series: Series, sli: Sli) -> float | None:
        """The strictest threshold of a latency in this series, in seconds; None without an objective."""
        found = [
            slo.below_s
            for slo in self._slos
            if slo.sli == sli.value and slo.below_s is not None and concerns(slo, *series.labels[:2])
        ]
        return min(found, default=None)

    def crossed(self, now_ns: int) -> list[Crossing]:
        """Objectives that ceased to hold since the last call. Looks every ten seconds, whenever it is called."""
        if not self._slos or now_ns < self._next_ns:
            return []
        self._next_ns = now_ns + EVERY_NS
        self._slis.flush(now_ns)
        crossings = []
        for slo in self._slos:
            for labels, events in events_by_labels(slo, self._slis):
                crossings += self._look((slo, labels), events)
        return crossings

    def _look(self, key: Key, now: Events) -> list[Crossing]:
        slo, labels = key
        history = self._history.setdefault(key, deque([(0, 0)], SNAPSHOTS))
        good, total = now[0] - history[0][0], now[1] - history[0][1]
        history.append(now)
        if total < FEWEST:
            return []
        if good / total >= slo.target:
            self._missed.discard(key)
            return []
        if key in self._missed:
            return []
        self._missed.add(key)
        return [Crossing(slo, labels, good / total)]
