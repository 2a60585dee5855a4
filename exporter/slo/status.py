"""How the objectives of the config stand, by what this agent has counted: events, burn rates, error budget.

The agent remembers its counters of each minute for six hours, and 64 of them over an objective's window. It forgets all
of them when it ends: longer burn rates and the budget of a window that began before it are Prometheus's to tell, by the
rules that `footlight slo rules` prints. A burn rate is absent until the agent has run for that long, because nobody
knows what was before.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from exporter.families import Family, Kind, Point, Scrape, Spec
from exporter.slo.events import NONE, events_by_labels, is_counted
from exporter.slo.words import period, sentence

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from exporter.slis import Slis
    from exporter.slo.declared import Slo
    from exporter.slo.events import Events

MINUTE_NS: Final = 60_000_000_000
BURN_WINDOWS_S: Final = (300, 1800, 3600, 7200, 21600)
"""Windows of the burn rates; those of a day and more need Prometheus."""
STEPS: Final = 64
"""Of an objective's window: so exactly the budget's window begins where it should, to one part in this many."""
MOST_ROWS: Final = 1024
"""Objectives times models that are followed at the most: 7 kB each."""


@dataclass(frozen=True, slots=True)
class Standing:
    """How an objective stands for one service and model.

    `events`, `good` and `bad` are counts since the agent has the objective. `burn_rates` are by window in seconds; one
    is None where it has not had it for so long, or there was no event. `budget_left` is a share of the error budget of
    the events in the objective's window that the agent has seen, negative where there were too many bad ones; None
    without events. `covered_s` is how much of the objective's window that is.
    """

    slo: Slo
    service_name: str
    model_name: str
    events: int
    good: int
    bad: int
    burn_rates: tuple[tuple[int, float | None], ...]
    budget_left: float | None
    covered_s: float


class _Marks:
    """Instants at which all rows are written down: one every `step_ns`, the last `size` of them."""

    def __init__(self, step_ns: int, size: int) -> None:
        self._step_ns = step_ns
        self.size = size
        self._instants: deque[int] = deque(maxlen=size)
        self._made = 0

    def take(self, now_ns: int) -> int | None:
        """The place where to write the rows down; None while it is not time."""
        if self._instants and now_ns // self._step_ns == self._instants[-1] // self._step_ns:
            return None
        self._instants.append(now_ns)
        self._made += 1
        return (self._made - 1) % self.size

    def last(self, at_ns: int) -> tuple[int, int] | None:
        """Place and instant of the last mark that is no younger; None where there is none any more, or yet."""
        found = bisect_right(self._instants, at_ns) - 1
        if found < 0:
            return None
        return (self._made - len(self._instants) + found) % self.size, self._instants[found]


class _Row:
    """One objective of one service and model: its counters, and what they were at each mark (bad, all).

    `before` was counted before the agent had the objective, and is not held against it.
    """

    __slots__ = ("bad", "before", "events", "good", "long", "short", "slo")

    def __init__(self, slo: Slo, short: int, long: int, before: Events) -> None:
        self.slo = slo
        self.before = before
        self.events = 0
        self.good = 0
        self.bad = 0
        # Zeros are right for the time before it was there: the agent looked, and there were no events.
        self.short = np.zeros((short, 2), np.int64)
        self.long = np.zeros((long, 2), np.int64)

    def take(self, events: Events) -> None:
        """Set the counters. They do not go back, even where an engine tells of hits later than of the look-ups."""
        good, total = events[0] - self.before[0], events[1] - self.before[1]
        self.events = max(self.events, total)
        self.good = max(self.good, good)
        self.bad = max(self.bad, total - good)

    def share(self, marks: NDArray[np.int64], place: int | None) -> float | None:
        """Bad events by all since a mark, or since the beginning; None without events."""
        bad, events = (0, 0) if place is None else marks[place].tolist()
        if self.events <= events:
            return None
        return float((self.bad - bad) / (self.events - events))


Key = tuple[int, str, str]  # position of the objective, service_name, model_name


class SloStatus:
    """Follows the objectives `slos` in `slis`. `clock` is the one of `slis`, CLOCK_MONOTONIC in nanoseconds."""

    def __init__(self, slos: Sequence[Slo], slis: Slis, clock: Callable[[], int] | None = None) -> None:
        self.slos: tuple[Slo, ...] = ()
        self.unfollowed = 0  # objectives times models for which there was no room
        self._slis = slis
        self._clock = clock or slis.clock
        self._began_ns: dict[Slo, int] = {}
        self._rows: dict[Key, _Row] = {}
        self._short = _Marks(MINUTE_NS, BURN_WINDOWS_S[-1] * 10**9 // MINUTE_NS + 2)
        self._long: dict[int, _Marks] = {}
        self._told: tuple[int, Sequence[Standing]] | None = None
        self.reconfigure(slos)

    def reconfigure(self, slos: Sequence[Slo]) -> None:
        """Go on with other objectives. One that is as it was keeps its counters; another begins now, at zero."""
        now_ns = self._clock()
        self._count(now_ns)
        places = {slo: number for number, slo in enumerate(slos)}
        self._rows = {
            (places[row.slo], service, model): row
            for (_, service, model), row in self._rows.items()
            if row.slo in places
        }
        self._began_ns = {slo: self._began_ns.get(slo, now_ns) for slo in slos}
        self._long = {
            slo.window_s: self._long.get(slo.window_s) or _Marks(slo.window_s * 10**9 // STEPS, STEPS + 2)
            for slo in slos
        }
        self.slos = tuple(slos)
        self._told = None
        self._count(now_ns, are_new=True)
        self.tick(now_ns)

    def tick(self, now_ns: int) -> None:
        """Write the counters down when a minute is over; call it at least that often."""
        if not self.slos:
            return
        place = self._short.take(now_ns)
        if place is None:
            return
        self._count(now_ns)
        for row in self._rows.values():
            row.short[place] = row.bad, row.events
        for window_s, marks in self._long.items():
            place = marks.take(now_ns)
            if place is not None:
                for row in self._rows.values():
                    if row.slo.window_s == window_s:
                        row.long[place] = row.bad, row.events

    def standings(self, now_ns: int) -> Sequence[Standing]:
        """Every objective that the agent counts itself, by service and model, in the order of the config."""
        if self._told is None or self._told[0] != now_ns:
            self._count(now_ns)
            self._told = now_ns, [self._standing(key, self._rows[key], now_ns) for key in sorted(self._rows)]
        return self._told[1]

    def covered_s(self, slo: Slo, now_ns: int) -> float:
        """How much of an objective's window its budget is about, in seconds."""
        since_ns = self._since(slo, now_ns)[1]
        return (now_ns - since_ns) / 1e9

    def _since(self, slo: Slo, now_ns: int) -> tuple[int | None, int]:
        began_ns = self._began_ns[slo]
        place, since_ns = self._long[slo.window_s].last(now_ns - slo.window_s * 10**9) or (None, began_ns)
        return place, max(since_ns, began_ns)

    def _count(self, now_ns: int, *, are_new: bool = False) -> None:
        """Count the events. With `are_new`, those of a row that is not there yet came before its objective."""
        self._slis.flush(now_ns)
        self.unfollowed = 0
        for key, events in self._events().items():
            row = self._rows.get(key)
            if row is None:
                if len(self._rows) >= MOST_ROWS:
                    self.unfollowed += 1
                    continue
                slo = self.slos[key[0]]
                before = events if are_new else NONE
                row = self._rows[key] = _Row(slo, self._short.size, self._long[slo.window_s].size, before)
            row.take(events)

    def _events(self) -> dict[Key, Events]:
        """What was counted until now, of all series of a service and model together."""
        found: dict[Key, Events] = {}
        for number, slo in enumerate(self.slos):
            for (service, model, *_), more in events_by_labels(slo, self._slis):
                good, total = found.get((number, service, model), NONE)
                found[number, service, model] = good + more[0], total + more[1]
        return found

    def _standing(self, key: Key, row: _Row, now_ns: int) -> Standing:
        _, service, model = key
        allowed = 1 - row.slo.target
        burn_rates = []
        for window_s in BURN_WINDOWS_S:
            from_ns = now_ns - window_s * 10**9
            mark = self._short.last(from_ns) if from_ns >= self._began_ns[row.slo] else None
            share = None if mark is None else row.share(row.short, mark[0])
            burn_rates.append((window_s, None if share is None else share / allowed))
        place, since_ns = self._since(row.slo, now_ns)
        spent = row.share(row.long, place)
        return Standing(
            row.slo,
            service,
            model,
            row.events,
            row.good,
            row.bad,
            tuple(burn_rates),
            None if spent is None else 1 - spent / allowed,
            (now_ns - since_ns) / 1e9,
        )


_LABELS: Final = ("slo", "service_name", "model_name")


def slo_families(status: SloStatus) -> Sequence[Family]:
    """All of them, in the order of the page."""

    def each(get: Callable[[Standing], float | None]) -> Callable[[Scrape], Iterator[Point]]:
        def points(scrape: Scrape) -> Iterator[Point]:
            for standing in status.standings(scrape.now_ns):
                value = get(standing)
                if value is not None:
                    yield (standing.slo.name, standing.service_name, standing.model_name), value

        return points

    def burn_rates(scrape: Scrape) -> Iterator[Point]:
        for standing in status.standings(scrape.now_ns):
            labels = (standing.slo.name, standing.service_name, standing.model_name)
            for window_s, rate in standing.burn_rates:
                if rate is not None:
                    yield (*labels, period(window_s)), rate

    def infos(_: Scrape) -> Iterable[Point]:
        return [((slo.name, slo.sli, sentence(slo), period(slo.window_s)), 1) for slo in status.slos]

    def covered(scrape: Scrape) -> Iterable[Point]:
        return [((slo.name,), status.covered_s(slo, scrape.now_ns)) for slo in status.slos if is_counted(slo)]

    return (
        Family(
            Spec("llm_slo", Kind.INFO, "The objectives of the configuration.", ("slo", "sli", "objective", "window")),
            infos,
        ),
        Family(
            Spec("llm_slo_objective_ratio", Kind.GAUGE, "The share of events that has to be good.", ("slo",), "ratio"),
            lambda _: [((slo.name,), slo.target) for slo in status.slos],
        ),
        Family(
            Spec("llm_slo_events", Kind.COUNTER, "Events that the objective is about.", _LABELS),
            each(lambda standing: standing.events),
        ),
        Family(
            Spec("llm_slo_good_events", Kind.COUNTER, "Events that were as the objective wants them.", _LABELS),
            each(lambda standing: standing.good),
        ),
        Family(
            Spec("llm_slo_violations", Kind.COUNTER, "Events that were not as the objective wants them.", _LABELS),
            each(lambda standing: standing.bad),
        ),
        Family(
            Spec(
                "llm_slo_burn_rate",
                Kind.GAUGE,
                "Bad events by all over the window, by the share that the objective allows. Absent until the agent has "
                "run for so long.",
                (*_LABELS, "window"),
            ),
            burn_rates,
        ),
        Family(
            Spec(
                "llm_slo_error_budget_remaining_ratio",
                Kind.GAUGE,
                "Error budget that is left of the events that this agent saw in the objective's window.",
                _LABELS,
                "ratio",
            ),
            each(lambda standing: standing.budget_left),
        ),
        Family(
            Spec(
                "llm_slo_covered_seconds",
                Kind.GAUGE,
                "How much of the objective's window this agent has seen.",
                ("slo",),
                "seconds",
            ),
            covered,
        ),
        Family(
            Spec(
                "llm_slo_unfollowed",
                Kind.GAUGE,
                "Objectives times models that are not followed: there are more than the agent has room for.",
                (),
            ),
            lambda _: [((), status.unfollowed)],
        ),
    )
