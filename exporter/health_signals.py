"""Makes the signals of each service's health, once a second, from what the agent counts anyway."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from exporter.health import LOAD, RULES, Signal, Values
from exporter.labels import safe
from exporter.request import Failure
from exporter.slis import Sli

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from exporter.slis import Slis
    from exporter.status import AgentStatus, Vitals

STALE_NS: Final = 5_000_000_000
"""What the attacher saw so long ago is not what is now."""
FEWEST_FAILURES: Final = 5
_KEEP_S: Final = 1 + max(LOAD.window_s, *(rule.window_s for rule in RULES.values()))
_OWN_FAULTS: Final = (Failure.rate_limited, Failure.server_error, Failure.cut_off)
_LATENCIES: Final = (Sli.TTFT, Sli.ITL)


@dataclass(slots=True)
class _Counts:
    """What was counted for one service until some instant. `at` is in seconds; `vitals_at` that of the vitals."""

    at: float
    vitals_at: float | None = None
    vitals: Vitals | None = None
    waits: tuple[int, int] | None = None
    """Nanoseconds and number."""
    round_trips: tuple[int, int] | None = None
    requests: int = 0
    failures: int = 0
    frames: int = 0
    in_flight: int = 0
    sums_ns: dict[Sli, int] = field(default_factory=lambda: dict.fromkeys(_LATENCIES, 0))
    buckets: dict[Sli, list[int]] = field(default_factory=lambda: {sli: [] for sli in _LATENCIES})


class Signals:
    """Keeps the counts of the last half minute, and tells what they say. `services` are names by the kernel's index."""

    def __init__(self, slis: Slis, services: Sequence[str]) -> None:
        self._slis: Final = slis
        self._services: Final = services
        self._past: dict[str, deque[_Counts]] = {}

    def look(
        self, now_ns: int, status: AgentStatus | None, kernel: Mapping[str, NDArray[np.void]]
    ) -> dict[str, Values]:
        """Count once more; what each service's signals are now, by its name as a label."""
        self._slis.flush(now_ns)
        counted = self._count(now_ns, status, kernel)
        for gone in self._past.keys() - counted.keys():
            del self._past[gone]
        bounds = self._slis.bounds[Sli.TTFT]
        found = {}
        for name, counts in counted.items():
            past = self._past.setdefault(name, deque())
            past.append(counts)
            while past[0].at < counts.at - _KEEP_S:
                past.popleft()
            found[name] = _values(past, bounds)
        return found

    def _count(
        self, now_ns: int, status: AgentStatus | None, kernel: Mapping[str, NDArray[np.void]]
    ) -> dict[str, _Counts]:
        counted = {safe(name): _Counts(now_ns / 1e9) for name in self._services if name}
        for probe, member, name in (("scheduler", "waits", "run_queue_wait"), ("tcp", "round_trips", "round_trip")):
            if probe in kernel:
                for service, row in zip(self._services, kernel[probe], strict=True):
                    if service:
                        histogram = row[name]
                        setattr(
                            counted[safe(service)], member, (int(histogram["sum_ns"]), int(histogram["counts"].sum()))
                        )
        if status is not None and now_ns - status.at_ns < STALE_NS:
            for vitals in status.vitals:
                mine = counted.get(safe(vitals.service))
                if mine is not None:
                    mine.vitals, mine.vitals_at = vitals, status.at_ns / 1e9
        for series in self._slis.all_series():
            mine = counted.get(series.labels[0])
            if mine is None:
                continue
            mine.requests += series.requests
            mine.failures += sum(series.failures[each] for each in _OWN_FAULTS)
            mine.frames += series.frames
            for sli in _LATENCIES:
                histogram = series.histograms[sli]
                mine.sums_ns[sli] += histogram.sum_ns
                mine.buckets[sli] = _added(mine.buckets[sli], histogram.counts)
        in_flight = Counter[str]()
        for labels, number in self._slis.count_in_flight().items():
            in_flight[labels[0]] += number
        for name, mine in counted.items():
            mine.in_flight = in_flight[name]
        return counted


def _added(first: list[int], second: Sequence[int]) -> list[int]:
    return [one + other for one, other in zip(first, second, strict=True)] if first else list(second)


def _values(past: Sequence[_Counts], bounds: Sequence[float]) -> Values:
    """What the counts of one service say of each signal, each over its own window."""
    now = past[-1]

    def before(window_s: float) -> _Counts:
        """The newest counts that are as old as the window, give or take half a second; else the oldest there are."""
        found = past[0]
        for counts in past:
            if counts.at > now.at - window_s + 0.5:
                break
            found = counts
        return found

    requests = before(RULES[Signal.ERROR_RATIO].window_s)
    ended = now.requests - requests.requests
    load = before(LOAD.window_s)
    window = now.at - load.at
    vitals = now.vitals
    gaps = _deltas(now, before(RULES[Signal.ITL].window_s), Sli.ITL)
    flights = [
        each.in_flight for each in past if each.at > now.at - RULES[Signal.IN_FLIGHT].window_s
    ]
    signals: dict[Signal, float | None] = {
        Signal.CPU: _cpus(now, before(RULES[Signal.CPU].window_s)),
        Signal.RESIDENT_MEMORY: None if vitals is None else vitals.resident_bytes,
        Signal.OPEN_FILES: None if vitals is None else vitals.open_files,
        Signal.RUN_QUEUE_WAIT: _mean(
            now.waits, before(RULES[Signal.RUN_QUEUE_WAIT].window_s).waits, Signal.RUN_QUEUE_WAIT
        ),
        Signal.ROUND_TRIP: _mean(
            now.round_trips, before(RULES[Signal.ROUND_TRIP].window_s).round_trips, Signal.ROUND_TRIP
        ),
        Signal.TTFT_P50: _quantile(now, before, bounds, 0.5, Signal.TTFT_P50),
        Signal.TTFT_P99: _quantile(now, before, bounds, 0.99, Signal.TTFT_P99),
        Signal.ITL: None
        if gaps is None or sum(gaps[1]) < RULES[Signal.ITL].fewest
        else gaps[0] / sum(gaps[1]) / 1e9,
        Signal.ERROR_RATIO: None
        if ended < RULES[Signal.ERROR_RATIO].fewest
        else (now.failures - requests.failures) / ended,
        Signal.IN_FLIGHT: sum(flights) / len(flights),
    }
    arrived = now.requests + now.in_flight - load.requests - load.in_flight
    return Values(
        signals,
        arrivals=max(0, arrived) / window if window > 0 else None,
        frames=max(0, now.frames - load.frames) / window if window > 0 else None,
        error_least=max(RULES[Signal.ERROR_RATIO].least, FEWEST_FAILURES / ended) if ended > 0 else None,
        eldest=None if vitals is None else vitals.eldest,
    )


def _cpus(now: _Counts, then: _Counts) -> float | None:
    """CPUs in use between the two, by the attacher's own clock."""
    if now.vitals is None or then.vitals is None or now.vitals_at is None or then.vitals_at is None:
        return None
    seconds = now.vitals_at - then.vitals_at
    used = now.vitals.cpu_seconds - then.vitals.cpu_seconds
    return used / seconds if seconds > 0 and used >= 0 else None


def _mean(now: tuple[int, int] | None, then: tuple[int, int] | None, signal: Signal) -> float | None:
    if now is None or then is None:
        return None
    number = now[1] - then[1]
    return (now[0] - then[0]) / number / 1e9 if number >= max(1, RULES[signal].fewest) else None


def _deltas(now: _Counts, then: _Counts, sli: Sli) -> tuple[int, list[int]] | None:
    """Nanoseconds, and how many by bucket, between the two; None where the buckets became others meanwhile."""
    before = then.buckets[sli] or [0] * len(now.buckets[sli])
    if len(before) != len(now.buckets[sli]):
        return None
    buckets = [max(0, one - other) for one, other in zip(now.buckets[sli], before, strict=True)]
    return now.sums_ns[sli] - then.sums_ns[sli], buckets


def _quantile(
    now: _Counts, before: Callable[[float], _Counts], bounds: Sequence[float], quantile: float, signal: Signal
) -> float | None:
    """A quantile of the time to first token over the signal's window, in seconds."""
    rule = RULES[signal]
    found = _deltas(now, before(rule.window_s), Sli.TTFT)
    if found is None or sum(found[1]) < rule.fewest:
        return None
    return quantile_of(found[1], bounds, quantile)


def quantile_of(buckets: Sequence[int], bounds: Sequence[float], quantile: float) -> float:
    """A quantile of values that are counted by bucket, taken to lie evenly in theirs; the last bound for what is above.

    At least one was counted.
    """
    rank = quantile * sum(buckets)
    for index, count in enumerate(buckets):
        if rank <= count and count:
            if index == len(bounds):
                return bounds[-1]
            low = bounds[index - 1] if index else 0.0
            return low + (bounds[index] - low) * rank / count
        rank -= count
    return bounds[-1]
