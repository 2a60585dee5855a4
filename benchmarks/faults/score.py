"""Judges what the agent said about each request against what was done to it.

All times are seconds. A request's *parts* are what the agent charged to each cause, of the phase that the fault is in.
What a cause *usually* takes is its median over the quiet twins.

A request is told to have a cause when that cause has grown most, and by more than 5 ms and 10 % of the phase. A quiet
request that is told to have one is a false alarm; for `on_cpu` and `run_queue` only where they are the fault's own
cause, since whatever else the host does makes them grow in truth.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from benchmarks.common.report import nearest_rank

LEAST_S: Final = 0.005
LEAST_SHARE: Final = 0.1
LEAST_INJECTED_S: Final = 0.02
"""A fault that kept a request for less was not there; such a request is left out."""
UNEXPLAINED: Final = "unexplained"
_HOSTS_OWN: Final = frozenset({"on_cpu", "run_queue"})


@dataclass(frozen=True, slots=True)
class Request:
    """One request of a run. `felt_s` is its phase by a clock that is not the agent's. `parts` may be empty: no path."""

    faulty: bool
    injected_s: float
    felt_s: float
    parts: Mapping[str, float]

    @property
    def window_s(self) -> float:
        """The phase as the agent sees it; as it was felt where the agent said nothing."""
        return sum(self.parts.values()) or self.felt_s

    @property
    def unexplained_s(self) -> float:
        """What the agent could not explain; all of it where it said nothing."""
        return self.parts.get(UNEXPLAINED, 0.0) if self.parts else self.felt_s


@dataclass(frozen=True, slots=True)
class Run:
    """All requests of one kind of fault, and those of its quiet twin.

    `untraced`: requests that the agent did not tell of. `uneven`: windows whose parts do not add up to them.
    """

    fault: str
    server: str
    phase: str
    cause: str
    requests: tuple[Request, ...]
    untraced: int = 0
    uneven: int = 0

    @property
    def quiet(self) -> list[Request]:
        """The quiet twins."""
        return [each for each in self.requests if not each.faulty]

    @property
    def faulty(self) -> list[Request]:
        """Those that the fault kept."""
        return [each for each in self.requests if each.faulty and each.injected_s >= LEAST_INJECTED_S]

    @property
    def usual(self) -> dict[str, float]:
        """What each cause takes without the fault."""
        quiet = self.quiet
        causes = {cause for each in quiet for cause in each.parts}
        return {cause: statistics.median(each.parts.get(cause, 0.0) for each in quiet) for cause in causes}


@dataclass(frozen=True, slots=True)
class Score:
    """What a run gave. Ratios are medians over the faulty requests; NaN where there are none.

    `felt` and `charged` are of the injected time: how much longer the phase was felt to be, and how much more the agent
    charged to the cause. `found` counts the causes told of faulty requests, `alarms` those told of quiet ones; None is
    no cause. `unexplained` are parts of the phases of all.
    """

    fault: str
    server: str
    phase: str
    cause: str
    requests: int
    injected_s: float
    felt: float
    charged: float
    found: Mapping[str | None, int]
    dominant: str
    alarms: Mapping[str | None, int]
    false_alarms: int
    quiet_requests: int
    unexplained_faulty: float
    unexplained_quiet: float
    untraced: int
    uneven: int


def told(parts: Mapping[str, float], usual: Mapping[str, float]) -> str | None:
    """Return the cause that has grown most, where that is enough to tell; `unexplained` is none."""
    window = sum(parts.values())
    grown = {cause: seconds - usual.get(cause, 0.0) for cause, seconds in parts.items() if cause != UNEXPLAINED}
    cause = max(grown, key=lambda each: (grown[each], each), default=None)
    if cause is None or grown[cause] <= max(LEAST_S, LEAST_SHARE * window):
        return None
    return cause


def score(run: Run) -> Score:
    """Judge one run."""
    usual = run.usual
    quiet, faulty = run.quiet, run.faulty
    felt = statistics.median(each.felt_s for each in quiet) if quiet else math.nan
    alarms = Counter(told(each.parts, usual) for each in quiet)
    shares: defaultdict[str, float] = defaultdict(float)
    for each in faulty:
        for cause, seconds in each.parts.items():
            shares[cause] += seconds / each.window_s
    return Score(
        fault=run.fault,
        server=run.server,
        phase=run.phase,
        cause=run.cause,
        requests=len(faulty),
        injected_s=_median([each.injected_s for each in faulty]),
        felt=_median([(each.felt_s - felt) / each.injected_s for each in faulty]),
        charged=_median(
            [(each.parts.get(run.cause, 0.0) - usual.get(run.cause, 0.0)) / each.injected_s for each in faulty]
        ),
        found=Counter(told(each.parts, usual) for each in faulty),
        dominant=max(shares, key=lambda cause: shares[cause], default="-"),
        alarms=alarms,
        false_alarms=sum(
            count
            for cause, count in alarms.items()
            if cause is not None and (cause == run.cause or cause not in _HOSTS_OWN)
        ),
        quiet_requests=len(quiet),
        unexplained_faulty=_unexplained(faulty),
        unexplained_quiet=_unexplained(quiet),
        untraced=run.untraced,
        uneven=run.uneven,
    )


def macro_f1(scores: Sequence[Score]) -> float:
    """Mean over the causes that were injected of the F1 of telling it, over all requests, quiet ones included.

    Faults with the same cause are one class: the agent tells causes. NaN of nothing.
    """
    causes = sorted({each.cause for each in scores})
    values = []
    for cause in causes:
        right = sum(each.found.get(cause, 0) for each in scores if each.cause == cause)
        wanted = sum(each.requests for each in scores if each.cause == cause)
        told_at_all = sum(each.found.get(cause, 0) + each.alarms.get(cause, 0) for each in scores)
        values.append(2 * right / (wanted + told_at_all) if wanted + told_at_all else 0.0)
    return statistics.fmean(values) if values else math.nan


def _unexplained(requests: Sequence[Request]) -> float:
    windows = sum(each.window_s for each in requests)
    return sum(each.unexplained_s for each in requests) / windows if windows else math.nan


def _median(values: Sequence[float]) -> float:
    return nearest_rank(values, 0.5)
