"""The service level indicators, kept per service, model and API as the semantics page defines them."""

from __future__ import annotations

import time
from array import array
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, IntEnum, auto

import numpy as np

from exporter.critical_path import Cause
from exporter.kv_cache import CacheSources, ModelCache
from exporter.labels import OTHER, RESERVED, UNKNOWN, safe
from exporter.quantiles import SLOT_NS, SLOTS, WindowSketch, WindowSums, quantiles_of
from exporter.request import Capture, Failure, FinishedRequest, Phase

QUANTILES = (0.5, 0.9, 0.99)

# Gaps that are gathered before they are counted: numpy then costs less per gap than the call that brought it.
GAPS_AT_ONCE = 1024


class Sli(Enum):
    """The latencies. The value is the name in configs and the label value of `sli`."""

    TTFT = "ttft"
    ITL = "itl"
    TPOT = "tpot"
    LONGEST_GAP = "longest_gap"
    DURATION = "duration"
    READ_DELAY = "read_delay"


class CausePhase(Enum):
    """The windows that causes divide. The value is the label value of `phase`."""

    TTFT = "ttft"
    DECODE = "decode"


_CAUSES = tuple(Cause)

# Those that have quantiles, too.
QUANTILE_SLIS = (Sli.TTFT, Sli.ITL, Sli.TPOT, Sli.DURATION)

# Upper bounds in seconds.
_FIRST_TOKEN_BOUNDS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.3, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
_GAP_BOUNDS = (
    *(0.002, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05),
    *(0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0),
)
_DURATION_BOUNDS = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0),
    *(60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
_READ_DELAY_BOUNDS = (
    *(0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05),
    *(0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0),
)
BOUNDS: Mapping[Sli, tuple[float, ...]] = {
    Sli.TTFT: _FIRST_TOKEN_BOUNDS,
    Sli.ITL: _GAP_BOUNDS,
    Sli.TPOT: _GAP_BOUNDS,
    Sli.LONGEST_GAP: _GAP_BOUNDS,
    Sli.DURATION: _DURATION_BOUNDS,
    Sli.READ_DELAY: _READ_DELAY_BOUNDS,
}

# Requests that were followed from their first read to their end without a hole.
_WHOLE = frozenset({Capture.complete, Capture.arrival_unseen, Capture.model_unseen})


class _Sum(IntEnum):
    """Positions in the sums over the window of a series."""

    REQUESTS = 0
    FAILURES = auto()
    ABORTS = auto()
    CAPTURED = auto()
    COMPLETE = auto()
    GENERATED = auto()
    CACHE_QUERIES = auto()
    CACHE_HITS = auto()
    PREFILL_TOKENS = auto()
    PREFILL_NS = auto()
    DECODE_TOKENS = auto()
    DECODE_NS = auto()


class Histogram:
    """Counts by upper bound, of whole nanoseconds."""

    __slots__ = ("_bounds_ns", "counts", "sum_ns")

    def __init__(self, bounds_ns: Sequence[int]) -> None:
        self._bounds_ns = bounds_ns
        self.counts = [0] * (len(bounds_ns) + 1)  # not cumulative; the last is beyond every bound
        self.sum_ns = 0

    def observe(self, value_ns: int) -> None:
        """Count one value. A value equal to a bound is within it."""
        self.counts[bisect_left(self._bounds_ns, value_ns)] += 1
        self.sum_ns += value_ns

    def within(self, seconds: float) -> tuple[int, int]:
        """How many values were at most `seconds`, which is one of the bounds, and how many there were."""
        last = bisect_left(self._bounds_ns, round(seconds * 1e9))
        return sum(self.counts[: last + 1]), sum(self.counts)

    def divide(self, bounds_ns: Sequence[int]) -> None:
        """Go on with more bounds, the old ones among them. What a bucket held goes to the last of its parts."""
        counts = [0] * (len(bounds_ns) + 1)
        for bound_ns, count in zip(self._bounds_ns, self.counts, strict=False):
            counts[bisect_left(bounds_ns, bound_ns)] = count
        counts[-1] = self.counts[-1]
        self._bounds_ns, self.counts = bounds_ns, counts

    def observe_many(self, values_ns: np.ndarray[tuple[int], np.dtype[np.int64]]) -> None:
        """Count an array of values."""
        self.counts = [
            count + more
            for count, more in zip(
                self.counts,
                np.bincount(np.searchsorted(self._bounds_ns, values_ns), minlength=len(self.counts)).tolist(),
                strict=True,
            )
        ]
        self.sum_ns += int(values_ns.sum())


class Series:
    """Everything that is kept for one service, model, API and set of configured labels.

    What was not measured is None, so that it can be absent and not zero.
    """

    __slots__ = (
        "_cache",
        "_counted_frames",
        "_refused",
        "aborts",
        "cache_hits",
        "cache_queries",
        "causes_ns",
        "clock",
        "failures",
        "frames",
        "generated_tokens",
        "histograms",
        "itl_ns",
        "labels",
        "prompt_tokens",
        "requests",
        "sketches",
        "sums",
        "ttft_causes",
        "wasted_tokens",
    )

    def __init__(
        self,
        labels: tuple[str, ...],
        bounds_ns: Mapping[Sli, Sequence[int]],
        clock: Callable[[], int],
        refused: dict[Sli, int],
        cache: ModelCache,
    ) -> None:
        self.labels = labels  # service_name, model_name, api, then the configured ones
        self._cache = cache
        self.clock = clock
        self._refused = refused
        self.requests = 0
        self.failures = dict.fromkeys(Failure, 0)
        self.aborts = dict.fromkeys(Phase, 0)
        self.frames = 0
        self._counted_frames = 0
        self.wasted_tokens = 0
        self.prompt_tokens: int | None = None
        self.generated_tokens: int | None = None
        self.cache_queries: int | None = None
        self.cache_hits: int | None = None
        self.histograms = {sli: Histogram(bounds) for sli, bounds in bounds_ns.items()}
        self.sketches: dict[Sli, WindowSketch] = {}
        self.sums = WindowSums(len(_Sum))
        self.itl_ns = array("q")
        self.ttft_causes = WindowSums(len(_CAUSES))
        self.causes_ns = {(phase, cause): 0.0 for phase in CausePhase for cause in Cause}

    def first_token(self, ttft_ns: int, now_ns: int) -> None:
        """A streamed response handed over its first frame with content, `ttft_ns` after the request arrived."""
        self.generated_tokens = self.generated_tokens or 0
        self._observe(Sli.TTFT, ttft_ns, now_ns)

    def frame(self) -> None:
        """A frame with content was handed over. Called for each, the first included."""
        self.frames += 1

    def gap(self, itl_ns: int) -> None:
        """`itl_ns` lay between two successive frames with content of one response."""
        gaps = self.itl_ns
        gaps.append(itl_ns)
        if len(gaps) >= GAPS_AT_ONCE:
            self.flush(self.clock())

    def flush(self, now_ns: int) -> None:
        """Count what `gap` and `frame` only gathered."""
        if self.frames != self._counted_frames:
            self.sums.add(_Sum.GENERATED, self.frames - self._counted_frames, now_ns)
            self._counted_frames = self.frames
        if not self.itl_ns:
            return
        gaps = np.array(self.itl_ns, dtype=np.int64)
        del self.itl_ns[:]
        if gaps.min() < 0:
            kept = gaps[gaps >= 0]
            self._refused[Sli.ITL] += gaps.size - kept.size
            gaps = kept
            if not gaps.size:
                return
        self.histograms[Sli.ITL].observe_many(gaps)
        self._sketch(Sli.ITL).add_many(gaps, now_ns)

    def finished(self, request: FinishedRequest) -> None:
        """A request of this series is over: count it. Its service's coverage is counted by `Slis.capture`.

        The time to first token, the frames and their gaps were counted when they happened, and are not counted again.
        """
        now_ns = self.clock()
        self.sums.add(_Sum.CAPTURED, 1, now_ns)
        if request.capture is Capture.complete:
            self.sums.add(_Sum.COMPLETE, 1, now_ns)
        self._count_tokens(request, now_ns)
        self._count_lookups(request, now_ns)
        self._measure_speed(request, now_ns)
        if not request.end_seen:
            return
        self._count_outcome(request, now_ns)
        self._measure_latency(request, now_ns)

    def _count_outcome(self, request: FinishedRequest, now_ns: int) -> None:
        self.requests += 1
        self.sums.add(_Sum.REQUESTS, 1, now_ns)
        if request.failure is not None:
            self.failures[request.failure] += 1
            self.sums.add(_Sum.FAILURES, 1, now_ns)
        if request.aborted is not None:
            self.aborts[request.aborted] += 1
            self.sums.add(_Sum.ABORTS, 1, now_ns)

    def _count_tokens(self, request: FinishedRequest, now_ns: int) -> None:
        self.wasted_tokens += request.wasted_tokens
        if request.prompt_tokens is not None:
            self.prompt_tokens = (self.prompt_tokens or 0) + request.prompt_tokens
        generated = _generated(request)
        if generated is not None:
            self.generated_tokens = (self.generated_tokens or 0) + generated
            # The frames were counted one token each as they passed; this puts it right.
            self.sums.add(_Sum.GENERATED, generated - request.frames, now_ns)

    def _count_lookups(self, request: FinishedRequest, now_ns: int) -> None:
        queries = request.prompt_tokens
        if queries is None or request.cached_tokens is None:
            self._cache.take_silence(_answered(request))
            return
        hits = min(request.cached_tokens, queries)
        if not self._cache.take_usage(queries, hits, request.turn, now_ns):
            return  # another source tells of this model's cache
        self.cache_queries = (self.cache_queries or 0) + queries
        self.cache_hits = (self.cache_hits or 0) + hits
        self.sums.add(_Sum.CACHE_QUERIES, queries, now_ns)
        self.sums.add(_Sum.CACHE_HITS, hits, now_ns)

    def _measure_speed(self, request: FinishedRequest, now_ns: int) -> None:
        first_ns, last_ns = request.first_token_ns, request.last_token_ns
        if first_ns is None or last_ns is None or not request.streamed or request.capture not in _WHOLE:
            return
        if request.prompt_tokens is not None and request.cached_tokens is not None and first_ns > request.read_ns:
            self.sums.add(_Sum.PREFILL_TOKENS, max(0, request.prompt_tokens - request.cached_tokens), now_ns)
            self.sums.add(_Sum.PREFILL_NS, first_ns - request.read_ns, now_ns)
        generated = _generated(request)
        if generated is not None and last_ns > first_ns:
            self.sums.add(_Sum.DECODE_TOKENS, generated, now_ns)
            self.sums.add(_Sum.DECODE_NS, last_ns - first_ns, now_ns)

    def _measure_latency(self, request: FinishedRequest, now_ns: int) -> None:
        if request.capture is Capture.start_unseen:
            return
        # Equal means that the arrival was not seen: a read cannot return in the nanosecond in which the bytes came.
        if request.arrived_ns != request.read_ns:
            self._observe(Sli.READ_DELAY, request.read_ns - request.arrived_ns, now_ns)
        if request.capture is Capture.undecodable:
            return  # where the response ended is not known
        self._observe(Sli.DURATION, request.finished_ns - request.arrived_ns, now_ns)
        if request.capture is Capture.lost_events:
            return  # a frame that was lost would pass for a gap
        if request.longest_gap_ns is not None:
            self._observe(Sli.LONGEST_GAP, request.longest_gap_ns, now_ns)
        generated = _generated(request)
        first_ns, last_ns = request.first_token_ns, request.last_token_ns
        # A response in one frame has no time between its tokens that could be seen, however many they were.
        if first_ns is None or last_ns is None or generated is None or generated < 2 or request.frames < 2:
            return
        self._observe(Sli.TPOT, (last_ns - first_ns) // (generated - 1), now_ns)

    def _observe(self, sli: Sli, value_ns: int, now_ns: int) -> None:
        if value_ns < 0:
            self._refused[sli] += 1
            return
        self.histograms[sli].observe(value_ns)
        if sli in QUANTILE_SLIS:
            self._sketch(sli).add(value_ns, now_ns)

    def _sketch(self, sli: Sli) -> WindowSketch:
        sketch = self.sketches.get(sli)
        if sketch is None:
            sketch = self.sketches[sli] = WindowSketch()
        return sketch

    def explain(self, phase: CausePhase, parts_ns: Mapping[Cause, float]) -> None:
        """Add to what the requests of this series spent in a phase, by cause."""
        now_ns = self.clock()
        for cause, ns in parts_ns.items():
            self.causes_ns[phase, cause] += ns
            if phase is CausePhase.TTFT:
                self.ttft_causes.add(_CAUSES.index(cause), round(ns), now_ns)

    def cache_hit_ratio(self, now_ns: int) -> float | None:
        """Hits by queries of the prefix cache over the window, by usage; None without queries."""
        return _ratio(self.sums.totals(now_ns), _Sum.CACHE_HITS, _Sum.CACHE_QUERIES)

    def prefill_rate(self, now_ns: int) -> float | None:
        """Uncached prompt tokens per second between read and first token, of the requests whose usage tells them."""
        ratio = _ratio(self.sums.totals(now_ns), _Sum.PREFILL_TOKENS, _Sum.PREFILL_NS)
        return None if ratio is None else ratio * 1e9

    def decode_rate(self, now_ns: int) -> float | None:
        """Generated tokens per second between first and last token, of responses in more than one frame."""
        ratio = _ratio(self.sums.totals(now_ns), _Sum.DECODE_TOKENS, _Sum.DECODE_NS)
        return None if ratio is None else ratio * 1e9

    def quantile(self, sli: Sli, quantile: float, now_ns: int) -> float | None:
        """One quantile of a latency over the window, in seconds; None when it has none."""
        sketch = self.sketches.get(sli)
        found = None if sketch is None else sketch.quantiles((quantile,), now_ns)
        return found[0] if found else None

    def quantiles(self, sli: Sli, now_ns: int) -> tuple[float, ...] | None:
        """`QUANTILES` of a latency over the window, in seconds; None when it has none."""
        sketch = self.sketches.get(sli)
        return None if sketch is None else sketch.quantiles(QUANTILES, now_ns)


def _answered(request: FinishedRequest) -> bool:
    """Tell whether the answer was seen to its end and is a success."""
    if request.failure is not None or request.aborted is not None or request.capture not in _WHOLE:
        return False
    return request.status is not None and 200 <= request.status < 300


def _generated(request: FinishedRequest) -> int | None:
    """Generated tokens: the response's own count, else its content frames, else unknown."""
    if request.completion_tokens is not None:
        return request.completion_tokens
    return request.frames if request.streamed else None


def _ratio(sums: Sequence[int], above: int, below: int) -> float | None:
    return sums[above] / sums[below] if sums[below] else None


@dataclass(frozen=True, slots=True)
class Row:
    """One service, model and API over the window, for the live table. Latencies in seconds, None when there were none.

    `failures` and `aborts` are numbers of requests. `coverage` is the share of requests that were captured completely.
    `tokens_per_second` counts a frame as one token until the response has told its usage. `why` is the cause that most
    of the time to the first token was spent on, and its share; None where no cause is known. Where the wire does not
    tell of the cache, `cache_hit_ratio` is that of the model, whatever the API.
    """

    service: str
    model: str
    api: str
    requests_per_second: float
    in_flight: int
    ttft_p50: float | None
    ttft_p90: float | None
    ttft_p99: float | None
    itl_p50: float | None
    itl_p90: float | None
    itl_p99: float | None
    tokens_per_second: float
    cache_hit_ratio: float | None
    failures: int
    aborts: int
    coverage: float | None
    why: tuple[str, float] | None = None


class _Service:
    """What is kept per service: the models that have a label of their own, and the coverage."""

    __slots__ = ("captures", "models", "overflows", "window")

    def __init__(self) -> None:
        self.models: dict[str, str] = {}  # as in the request -> label
        self.overflows = 0
        self.captures = dict.fromkeys(Capture, 0)
        self.window = WindowSums(2)  # complete, all

    def capture(self, outcome: Capture, now_ns: int) -> None:
        self.captures[outcome] += 1
        self.window.add(1, 1, now_ns)
        if outcome is Capture.complete:
            self.window.add(0, 1, now_ns)


InFlight = tuple[str, str | None, str, tuple[str, ...]]  # service, model, api, extra


def _nobody() -> Iterable[InFlight]:
    return ()


class Slis:
    """All series of the agent.

    `label_names` are the configured labels, in the order of the `extra` values. `extra_bounds` adds bucket bounds in
    seconds to a latency, by its `Sli` value. `clock` is CLOCK_MONOTONIC in nanoseconds.
    Raises ValueError for a label name that the metrics use themselves, an unknown latency or an impossible bound.
    """

    def __init__(
        self,
        label_names: tuple[str, ...] = (),
        models_per_service: int = 64,
        extra_bounds: Mapping[str, Sequence[float]] | None = None,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        taken = RESERVED.intersection(label_names)
        if taken or len(set(label_names)) != len(label_names):
            reserved = ", ".join(sorted(RESERVED))
            raise ValueError(f"label names must be unique and none of {reserved}: {', '.join(label_names)}")
        self.label_names = label_names
        self.clock = clock
        self.explains = False  # whether anybody calls `Series.explain`
        self.in_flight: Callable[[], Iterable[InFlight]] = _nobody
        self.refused = dict.fromkeys(Sli, 0)  # observations that were negative
        self.bounds = _with_extra(extra_bounds or {})
        self._bounds_ns = {sli: tuple(round(bound * 1e9) for bound in bounds) for sli, bounds in self.bounds.items()}
        self._models_per_service = models_per_service
        self._services: dict[str, _Service] = {}
        self.caches = CacheSources(self._cache_labels)
        self._series: dict[tuple[str, ...], Series] = {}
        self._started_ns = clock()
        self._slot = 0

    def add_bounds(self, extra: Mapping[str, Sequence[float]]) -> None:
        """Add bucket bounds in seconds to latencies; those that are there stay.

        Of what was counted before it is not known on which side of a new bound it was: it counts as above it.
        """
        for sli, bounds in _with_extra(extra, self.bounds).items():
            if bounds == self.bounds[sli]:
                continue
            self.bounds[sli] = bounds
            self._bounds_ns[sli] = tuple(round(bound * 1e9) for bound in bounds)
            for series in self._series.values():
                series.histograms[sli].divide(self._bounds_ns[sli])

    def service(self, name: str) -> None:
        """A service that the config names: what is counted for it exists from zero."""
        self._service(name)

    def _service(self, name: str) -> _Service:
        known = self._services.get(name)
        if known is None:
            known = self._services[name] = _Service()
        return known

    def series(self, service: str, model: str | None, api: str, extra: tuple[str, ...], admit: bool) -> Series:
        """The series of a request. Call it once, when the answer's status is known, and keep what it gives.

        `admit` says that the service took the name for a model (its answer was no 4xx). Only then a new name gets a
        label of its own, and only while fewer than `models_per_service` have one. Any other new name is `_other`, and
        counted. None, or an empty name, is `_unknown`.
        """
        label = self._admitted(service, model, admit)
        if label == OTHER:
            self._service(service).overflows += 1
        labels = (safe(service), label, api, *map(safe, extra))
        series = self._series.get(labels)
        if series is None:
            cache = self.caches.model(*labels[:2])
            series = self._series[labels] = Series(labels, self._bounds_ns, self.clock, self.refused, cache)
        return series

    def _admitted(self, service: str, model: str | None, admit: bool) -> str:
        known = self._service(service)
        if not model or model == UNKNOWN:
            return UNKNOWN
        if model == OTHER:
            return OTHER
        found = known.models.get(model)
        if found is None and admit and len(known.models) < self._models_per_service:
            found = known.models[model] = safe(model)
        return found or OTHER

    def _cache_labels(self, service: str, model: str | None) -> tuple[str, str]:
        """The labels of a model that the engine or a probe point names: it gets one as if a request had named it."""
        return safe(service), self._admitted(service, model, admit=True)

    def capture(self, service: str, outcome: Capture) -> None:
        """How much of a request was seen. Called once for each request, also for those without a series."""
        self._service(service).capture(outcome, self.clock())

    def tick(self, now_ns: int) -> None:
        """Call it several times a second, so that what the series gather is counted in the slot it happened in."""
        slot = now_ns // SLOT_NS
        if slot != self._slot:
            self._slot = slot
            self.flush(now_ns)

    def flush(self, now_ns: int) -> None:
        """Count everything that the series have gathered."""
        for series in self._series.values():
            series.flush(now_ns)
        self.caches.settle(now_ns)

    def all_series(self) -> Sequence[Series]:
        """Every series, in the order of its labels."""
        return [self._series[labels] for labels in sorted(self._series)]

    def captures(self) -> Mapping[str, Mapping[Capture, int]]:
        """Requests by service and outcome."""
        return {safe(name): service.captures for name, service in self._services.items()}

    def capture_ratios(self) -> Mapping[str, float | None]:
        """Share of requests captured completely over the window, by service; None without requests."""
        now_ns = self.clock()
        return {safe(name): _ratio(service.window.totals(now_ns), 0, 1) for name, service in self._services.items()}

    def overflows(self) -> Mapping[str, int]:
        """Requests by service whose model got no label of its own."""
        return {safe(name): service.overflows for name, service in self._services.items()}

    def count_in_flight(self) -> Mapping[tuple[str, ...], int]:
        """Requests under way by labels; zero for each series without one.

        A model that has no label of its own yet counts as `_other`: its first request has not been answered.
        """
        counted = Counter(
            (safe(service), self.model_label(service, model), api, *map(safe, extra))
            for service, model, api, extra in self.in_flight()
        )
        return {labels: counted[labels] for labels in sorted(self._series.keys() | counted.keys())}

    def model_label(self, service: str, model: str | None) -> str:
        """The label of a model that a request names and that was not answered yet: it is given to nobody new."""
        if not model:
            return UNKNOWN
        known = self._services.get(service)
        return OTHER if known is None else known.models.get(model, OTHER)

    def rows(self) -> list[Row]:
        """One row per service, model and API, the configured labels taken together, in that order."""
        now_ns = self.clock()
        self.flush(now_ns)
        # The window begins with its oldest slot, or when the agent did.
        began_ns = max(self._started_ns, (now_ns // SLOT_NS - SLOTS + 1) * SLOT_NS)
        seconds = max(now_ns - began_ns, 1) / 1e9
        together: dict[tuple[str, ...], list[Series]] = {}
        for labels, series in sorted(self._series.items()):
            together.setdefault(labels[:3], []).append(series)
        in_flight: Counter[tuple[str, ...]] = Counter()
        for labels, count in self.count_in_flight().items():
            in_flight[labels[:3]] += count
        return [
            _row(labels, together.get(labels, []), in_flight[labels], seconds, now_ns, self._told_ratio(labels, now_ns))
            for labels in sorted(together.keys() | in_flight.keys())
        ]

    def _told_ratio(self, labels: tuple[str, ...], now_ns: int) -> float | None:
        """What another source than the wire tells of the model's cache, where that is the one that counts."""
        cache = self.caches.find(*labels[:2])
        told = None if cache is None else cache.counted()
        return None if told is None else told.ratio(now_ns)


def _row(
    labels: tuple[str, ...],
    series: Sequence[Series],
    in_flight: int,
    seconds: float,
    now_ns: int,
    told_ratio: float | None,
) -> Row:
    nothing = (None,) * len(QUANTILES)

    def quantiles(sli: Sli) -> tuple[float | None, ...]:
        sketches = [each.sketches[sli] for each in series if sli in each.sketches]
        return quantiles_of(sketches, QUANTILES, now_ns) or nothing

    sums = [sum(column) for column in zip([0] * len(_Sum), *(each.sums.totals(now_ns) for each in series), strict=True)]
    service, model, api = labels
    ttft_p50, ttft_p90, ttft_p99 = quantiles(Sli.TTFT)
    itl_p50, itl_p90, itl_p99 = quantiles(Sli.ITL)
    return Row(
        service=service,
        model=model,
        api=api,
        requests_per_second=sums[_Sum.REQUESTS] / seconds,
        in_flight=in_flight,
        ttft_p50=ttft_p50,
        ttft_p90=ttft_p90,
        ttft_p99=ttft_p99,
        itl_p50=itl_p50,
        itl_p90=itl_p90,
        itl_p99=itl_p99,
        # Frames that left the window before their response told fewer tokens can make it negative.
        tokens_per_second=max(0, sums[_Sum.GENERATED]) / seconds,
        cache_hit_ratio=_ratio(sums, _Sum.CACHE_HITS, _Sum.CACHE_QUERIES) if told_ratio is None else told_ratio,
        failures=sums[_Sum.FAILURES],
        aborts=sums[_Sum.ABORTS],
        coverage=_ratio(sums, _Sum.COMPLETE, _Sum.CAPTURED),
        why=largest_cause([each.ttft_causes.totals(now_ns) for each in series]),
    )


def largest_cause(by_series: Sequence[Sequence[int]]) -> tuple[str, float] | None:
    """The largest cause of several series together, each with its time by cause, and its share. None: no time."""
    sums = [sum(column) for column in zip([0] * len(_CAUSES), *by_series, strict=True)]
    whole = sum(sums)
    if not whole:
        return None
    largest = max(sums)
    return _CAUSES[sums.index(largest)].value, largest / whole


def _with_extra(
    extra: Mapping[str, Sequence[float]], known: Mapping[Sli, tuple[float, ...]] = BOUNDS
) -> dict[Sli, tuple[float, ...]]:
    bounds: dict[Sli, tuple[float, ...]] = dict(known)
    for name, more in extra.items():
        sli = Sli(name)
        if not all(0 < bound < float("inf") for bound in more):
            raise ValueError(f"bucket bounds of {name} must be positive and finite: {', '.join(map(str, more))}")
        bounds[sli] = tuple(sorted({*bounds[sli], *map(float, more)}))
    return bounds
