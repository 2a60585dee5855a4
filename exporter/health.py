"""What is normal for each service, learnt from its last five minutes; and when something is not.

Each signal has a baseline of its own: the median of one sample in `SAMPLE_S` over `BASELINE_S`, and a deviation that
outliers do not move (1.4826 times the median absolute deviation) but a tail that comes again and again does (the 95th
percentile). A value is anomalous when it is `SIGMAS` deviations above the median and by as much as its signal asks for,
without a break, for the signal's time. Only rises are: a service that idles is no fault.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final

SAMPLE_S: Final = 5.0
BASELINE_S: Final = 300.0
SAMPLES: Final = round(BASELINE_S / SAMPLE_S)
FEWEST: Final = 24
"""Samples without which nothing is called anomalous: two minutes."""
DELAY: Final = 4
"""Samples that wait before they are learnt: what turns out to be the beginning of an anomaly is not."""
SIGMAS: Final = 3.0
CALM_SIGMAS: Final = 2.0
CALM_S: Final = 5.0
"""An anomaly is over when the value was below `CALM_SIGMAS` for so long, or there was none."""
SETTLED_S: Final = BASELINE_S
"""What was anomalous for so long is the new normal."""
_MAD_TO_SIGMA: Final = 1.4826
_P95_TO_SIGMA: Final = 1 / 1.645
_TINY: Final = 1e-12
_FAR: Final = 50.0
"""Logarithms lie nearer to zero: that of `_TINY` is -28."""


class Signal(Enum):
    """What is watched. The value is the label value of `signal`."""

    CPU = "cpu"
    RESIDENT_MEMORY = "resident_memory"
    OPEN_FILES = "open_files"
    RUN_QUEUE_WAIT = "run_queue_wait"
    ROUND_TRIP = "round_trip"
    TTFT_P50 = "ttft_p50"
    TTFT_P99 = "ttft_p99"
    ITL = "itl"
    ERROR_RATIO = "error_ratio"
    IN_FLIGHT = "in_flight"


class Load(Enum):
    """What more load than normal has to do with a signal: nothing, or it rises as the load does, or somehow."""

    APART = "apart"
    SCALES = "scales"
    EXCUSES = "excuses"


@dataclass(frozen=True, slots=True)
class Rule:
    """How a signal is judged.

    A value is the signal's over the last `window_s`, of at least `fewest` events. It must be above the median by
    `least`, in `unit`, and by `least_ratio` of the median, for `hold_s`. `logarithmic`: deviations are ratios, as
    those of latencies are. `of_processes`: it belongs to the processes, and is learnt anew when the service was started
    again.
    """

    unit: str
    window_s: float
    least: float
    least_ratio: float
    hold_s: float
    fewest: int = 0
    logarithmic: bool = False
    load: Load = Load.APART
    of_processes: bool = False

    def can_have(self, sample: float) -> bool:
        """Whether a sample that was learnt can be that: the logarithm of a time, or a number of something."""
        return abs(sample) <= _FAR if self.logarithmic else 0 <= sample < math.inf


RULES: Final = {
    Signal.CPU: Rule("cpus", 5, 0.3, 0.5, 5, load=Load.SCALES, of_processes=True),
    Signal.RESIDENT_MEMORY: Rule("bytes", 1, 64 * 2**20, 0.15, 3, load=Load.EXCUSES, of_processes=True),
    Signal.OPEN_FILES: Rule("files", 1, 100, 0.5, 3, load=Load.SCALES, of_processes=True),
    Signal.RUN_QUEUE_WAIT: Rule("seconds", 5, 0.001, 1.0, 5, fewest=50, logarithmic=True),
    Signal.ROUND_TRIP: Rule("seconds", 5, 0.02, 1.0, 5, fewest=10, logarithmic=True),
    Signal.TTFT_P50: Rule("seconds", 10, 0.1, 0.75, 4, fewest=10, logarithmic=True),
    Signal.TTFT_P99: Rule("seconds", 30, 0.25, 2.0, 10, fewest=100, logarithmic=True),
    Signal.ITL: Rule("seconds", 10, 0.01, 0.75, 4, fewest=100, logarithmic=True),
    Signal.ERROR_RATIO: Rule("ratio", 10, 0.05, 0.0, 4, fewest=10),
    Signal.IN_FLIGHT: Rule("requests", 5, 8, 1.0, 5, load=Load.SCALES),
}
LOAD: Final = Rule("per second", 10, 0.0, 0.0, 0.0)
"""Of requests that arrive, and of frames."""
LOADS: Final = ("arrivals", "frames")
LOAD_S: Final = 10.0
"""What the load was lately explains what it is followed by."""
EXCUSE: Final = 2.0
"""Times the normal load, at which what `Load.EXCUSES` is not judged."""


@dataclass(frozen=True, slots=True)
class Normal:
    """What a baseline says: the median, and the deviation of the signal, both in its unit.

    Of a logarithmic signal `deviation` is that of its logarithm: 0.69 is a factor of two.
    """

    median: float
    deviation: float
    samples: int


class Change(Enum):
    """What became of an anomaly."""

    BEGAN = "began"
    ENDED = "ended"
    NEW_NORMAL = "new_normal"


class Baseline:
    """One signal of one service: what was learnt, and how the value of now stands to it."""

    __slots__ = (
        "_calm_since",
        "_center",
        "_known",
        "_next_sample",
        "_over_since",
        "_rule",
        "_spread",
        "_waiting",
        "anomalous_since",
        "sigmas",
        "value",
    )

    def __init__(self, rule: Rule, known: Sequence[float] = ()) -> None:
        self._rule: Final = rule
        self._known: deque[float] = deque(known, SAMPLES)
        self._waiting: deque[float] = deque()
        self._next_sample = -math.inf
        self._over_since: float | None = None
        self._calm_since: float | None = None
        self.anomalous_since: float | None = None
        self.value: float | None = None
        """The last one; None where there was none."""
        self.sigmas: float | None = None
        """How many deviations it is from the median; None where nothing is known to compare it to."""
        self._learn()

    @property
    def known(self) -> Sequence[float]:
        """The samples that were learnt, oldest first; logarithms where the rule says so."""
        return self._known

    def normal(self) -> Normal | None:
        """What was learnt; None before it is enough."""
        if len(self._known) < FEWEST:
            return None
        median = math.exp(self._center) if self._rule.logarithmic else self._center
        return Normal(median, self._spread, len(self._known))

    def forget(self) -> None:
        """Learn anew."""
        self._known.clear()
        self._waiting.clear()
        self._over_since = self._calm_since = self.anomalous_since = None
        self.value = self.sigmas = None

    def take(
        self, now: float, value: float | None, least: float | None = None, load: float = 1.0
    ) -> Change | None:
        """Take the value of now, in seconds of a clock that does not go back. None is no value.

        `least` overrides the rule's. `load` is how many times the normal load there is, at least 1. At the new normal
        nothing is forgotten yet: call `forget` when it was told what it was compared to.
        """
        self.value = value if value is not None and math.isfinite(value) else None
        self.sigmas = None
        if self.value is not None:
            expected = load if self._rule.load is Load.SCALES else 1.0
            self.sigmas = self._sigmas(self._point(self.value / expected), self._rule.least if least is None else least)
        change = self._judge(now, excused=self._rule.load is Load.EXCUSES and load >= EXCUSE)
        self._sample(now)
        return change

    def learn(self, now: float, value: float | None) -> None:
        """Take the value of now and call nothing an anomaly: what is more than normal is learnt as it comes."""
        self.value = value if value is not None and math.isfinite(value) else None
        self._sample(now)

    def _sample(self, now: float) -> None:
        if self.value is None or now < self._next_sample:
            return
        self._next_sample = now + SAMPLE_S
        if self.anomalous_since is not None:
            return
        self._waiting.append(self._point(self.value))
        if len(self._waiting) > DELAY:
            self._known.append(self._waiting.popleft())
            self._learn()

    def times_normal(self) -> float:
        """How many times the median the last value is; 1 where that is not known."""
        if not self.value or len(self._known) < FEWEST:
            return 1.0
        return self.value / self._center if self._center > 0 else math.inf

    def _judge(self, now: float, *, excused: bool) -> Change | None:
        if self.anomalous_since is not None:
            return self._judge_anomaly(now)
        if self.sigmas is None or self.sigmas < SIGMAS or excused:
            self._over_since = None
            return None
        if self._over_since is None:
            self._over_since = now
        if now - self._over_since < self._rule.hold_s:
            return None
        self.anomalous_since = now
        self._calm_since = None
        self._waiting.clear()
        return Change.BEGAN

    def _judge_anomaly(self, now: float) -> Change | None:
        assert self.anomalous_since is not None
        if now - self.anomalous_since >= SETTLED_S:
            return Change.NEW_NORMAL
        if self.sigmas is not None and self.sigmas >= CALM_SIGMAS:
            self._calm_since = None
            return None
        if self._calm_since is None:
            self._calm_since = now
        if now - self._calm_since < CALM_S:
            return None
        self.anomalous_since = self._over_since = None
        return Change.ENDED

    def _point(self, value: float) -> float:
        return math.log(max(value, _TINY)) if self._rule.logarithmic else value

    def _sigmas(self, point: float, least: float) -> float | None:
        if len(self._known) < FEWEST:
            return None
        rule, center = self._rule, self._center
        if rule.logarithmic:
            floor = max(math.log1p(rule.least_ratio), math.log1p(least / math.exp(center)))
        else:
            floor = max(least, rule.least_ratio * abs(center))
        return (point - center) / max(self._spread, floor / SIGMAS, _TINY)

    def _learn(self) -> None:
        if not self._known:
            self._center = self._spread = 0.0
            return
        ordered = sorted(self._known)
        self._center = _middle(ordered)
        absolute = _middle(sorted(abs(each - self._center) for each in ordered))
        high = ordered[math.ceil(0.95 * len(ordered) - 1e-6) - 1]
        self._spread = max(_MAD_TO_SIGMA * absolute, _P95_TO_SIGMA * (high - self._center))


def _middle(ordered: Sequence[float]) -> float:
    """The median of sorted values."""
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2


@dataclass(frozen=True, slots=True)
class Values:
    """What one service's signals are now; None is what was not measured, or of too few events.

    `arrivals` and `frames` are per second. `error_least` is the least rise of the error ratio that its number of
    requests can show. `eldest` names the process that was there first.
    """

    signals: dict[Signal, float | None]
    arrivals: float | None = None
    frames: float | None = None
    error_least: float | None = None
    eldest: int | None = None


class ServiceHealth:
    """All baselines of one service."""

    def __init__(self, known: dict[str, Sequence[float]] | None = None, eldest: int | None = None) -> None:
        known = known or {}
        self.baselines: Final = {signal: Baseline(rule, known.get(signal.value, ())) for signal, rule in RULES.items()}
        self._arrivals, self._frames = (Baseline(LOAD, known.get(name, ())) for name in LOADS)
        self._loads: Final[deque[tuple[float, float]]] = deque()
        self.eldest = eldest
        self.anomalies: Final = dict.fromkeys(Signal, 0)
        """How many there were."""

    def take(self, now: float, values: Values) -> Iterator[tuple[Signal, Change]]:
        """Take the values of now, and tell what changed. `now` is in seconds of a clock that does not go back.

        While a change is told its baseline still has what it was judged by; what is to be forgotten is so afterwards.
        """
        if values.eldest is not None and values.eldest != self.eldest:
            if self.eldest is not None:
                for signal, rule in RULES.items():
                    if rule.of_processes:
                        yield from self._forget(signal)
            self.eldest = values.eldest
        load = self._load(now, values)
        for signal, baseline in self.baselines.items():
            change = baseline.take(
                now,
                values.signals.get(signal),
                values.error_least if signal is Signal.ERROR_RATIO else None,
                load,
            )
            if change is Change.BEGAN:
                self.anomalies[signal] += 1
            if change is not None:
                yield signal, change
            if change is Change.NEW_NORMAL:
                baseline.forget()

    def _load(self, now: float, values: Values) -> float:
        """How many times the normal load there was within the last `LOAD_S`, at least 1."""
        for baseline, value in ((self._arrivals, values.arrivals), (self._frames, values.frames)):
            baseline.learn(now, value)
            self._loads.append((now, baseline.times_normal()))
        while self._loads[0][0] < now - LOAD_S:
            self._loads.popleft()
        return max(1.0, *(times for _, times in self._loads))

    def _forget(self, signal: Signal) -> Iterator[tuple[Signal, Change]]:
        if self.baselines[signal].anomalous_since is not None:
            yield signal, Change.ENDED
        self.baselines[signal].forget()

    def known(self) -> dict[str, Sequence[float]]:
        """What was learnt, by the names of the signals and those of the loads, as the constructor takes it."""
        found = {signal.value: baseline.known for signal, baseline in self.baselines.items()}
        found |= zip(LOADS, (self._arrivals.known, self._frames.known), strict=True)
        return {name: tuple(samples) for name, samples in found.items() if samples}
