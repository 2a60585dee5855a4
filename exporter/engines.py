"""What engines told, kept so that it only grows, and compared with what the agent itself saw of the same requests."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from exporter.config import AUTO, OFF
from exporter.labels import OTHER, UNKNOWN, safe
from exporter.request import Failure
from exporter.slis import Series, Sli
from probes.engine_metrics import Endpoint, EndpointReport, EngineReport

if TYPE_CHECKING:
    from exporter.config import Service
    from exporter.status import AgentStatus
    from probes.engine_page import EngineModel

WINDOW_NS: Final = 300_000_000_000
"""Over this time the engine's figures and the agent's are compared."""
FORGET_NS: Final = 600_000_000_000
"""A model that no engine has told of for this long is forgotten."""
MODELS_LIMIT: Final = 256
"""Models that are kept in all."""
_ACCOUNTS_LIMIT: Final = 4 * MODELS_LIMIT

_SNAPSHOTS_LIMIT: Final = 128
_COUNTERS: Final = (
    *("prefix_queries", "prefix_hits", "preemptions", "requests"),
    *("ttft_sum_seconds", "ttft_count", "prompt_tokens", "generation_tokens"),
)
# Such an answer came from the server in front of the engine.
_REFUSALS: Final = (Failure.client_error, Failure.rate_limited)
# Sums of the same floats in another order differ by less than this part.
_ROUNDING: Final = 1e-9


def endpoints(
    services: Iterable[Service], status: AgentStatus | None, seen: Collection[str]
) -> Mapping[str, tuple[Endpoint, ...]]:
    """Where each service's engine may be asked for its metrics.

    `seen` are the `service_name` labels of services of which a request to a model was seen: of the others, no port is
    asked that is not configured.
    """
    ports = {target.service: target.own_ports for target in (status.targets if status else ())}
    found: dict[str, tuple[Endpoint, ...]] = {}
    for service in services:
        if service.engine_metrics == OFF:
            continue
        if service.engine_metrics != AUTO:
            found[service.name] = (Endpoint(service.engine_metrics),)
        elif safe(service.name) in seen and ports.get(service.name):
            found[service.name] = tuple(
                Endpoint(f"http://127.0.0.1:{port}/metrics", found=True) for port in ports[service.name]
            )
    return found


@dataclass(frozen=True, slots=True)
class Ours:
    """What the agent has seen of one model until now: requests that were not refused, and times to first token."""

    requests: int = 0
    first_tokens: int = 0
    first_token_ns: int = 0


def ours_of(series: Iterable[Series]) -> Mapping[tuple[str, str], Ours]:
    """What the agent has seen, by `service_name` and `model_name`, its other labels taken together."""
    seen: dict[tuple[str, str], Ours] = {}
    for each in series:
        service, model = each.labels[:2]
        before = seen.get((service, model), Ours())
        first_token = each.histograms[Sli.TTFT]
        seen[service, model] = Ours(
            before.requests + each.requests - sum(each.failures[refusal] for refusal in _REFUSALS),
            before.first_tokens + sum(first_token.counts),
            before.first_token_ns + first_token.sum_ns,
        )
    return seen


@dataclass(frozen=True, slots=True)
class CacheDelta:
    """Tokens that an engine's prefix cache was asked for and had, since the last delta. Names are safe as labels."""

    service: str
    model: str
    queries: int
    hits: int


@dataclass(frozen=True, slots=True)
class Comparison:
    """The engine's own figures over the window, and by how much they are above the agent's. None: nothing to compare.

    `requests_difference` is a number of requests.
    """

    ttft_mean_seconds: float | None = None
    ttft_difference_seconds: float | None = None
    requests_difference: float | None = None


@dataclass(frozen=True, slots=True)
class _Snapshot:
    at_ns: int
    requests: float | None
    ttft_count: float | None
    ttft_sum_seconds: float | None
    ours: Ours


@dataclass(slots=True)
class ModelView:
    """One model of a service as an engine tells of it. What it does not tell is not in the mappings.

    `totals` are counters by the fields of `EngineModel`: what all endpoints have counted, over their restarts. They
    begin with what the engine had counted when it was found. The gauges are None while nobody tells them.
    """

    totals: dict[str, float] = field(default_factory=dict)
    running: float | None = None
    waiting: float | None = None
    kv_usage_ratio: float | None = None
    comparison: Comparison | None = None
    told_ns: int = 0
    snapshots: deque[_Snapshot] = field(default_factory=lambda: deque(maxlen=_SNAPSHOTS_LIMIT))
    queries: float = 0.0
    hits: float = 0.0
    drained: tuple[int, int] = (0, 0)


@dataclass(slots=True)
class _Told:
    """What one endpoint told last of one model."""

    counters: dict[str, float]
    at_ns: int


Labels = tuple[str, str, str]  # service_name, model_name, engine
_Key = tuple[str, str, str, str | None]  # service, URL, engine, and the model as a label


class EngineView:
    """Takes every report in turn. All of it runs in one thread."""

    def __init__(self) -> None:
        self.report: EngineReport | None = None
        self.models: dict[Labels, ModelView] = {}
        self.overflows: Counter[str] = Counter()
        """Models for which there was no room, or whose name as a label another one has. Counted at each look."""
        self._told: dict[_Key, _Told] = {}
        # Requests whose look-ups were taken. Also of models that are forgotten: an engine may come back with its past.
        self._accounted: dict[Labels, float] = {}

    def take(self, report: EngineReport, ours: Mapping[tuple[str, str], Ours] | None) -> None:
        """Take a report, once: the one that was taken last is not taken again.

        `ours` is what the agent has seen by now (`ours_of`); None where it does not look at requests.
        """
        if report is self.report:
            return
        self.report = report
        told: dict[Labels, list[EngineModel]] = {}
        known = set(self.models)
        taken: set[_Key] = set()
        for endpoint in report.endpoints:
            for theirs in endpoint.models:
                labels = _labels(endpoint.service, theirs, ours)
                if theirs.model is None:
                    self._rename(labels, known)
                key = _key(endpoint, theirs)
                if key in taken or not self._admit(labels):
                    self.overflows[labels[0]] += 1
                    continue
                taken.add(key)
                self._count(endpoint, theirs, labels, labels not in known, ours)
                told.setdefault(labels, []).append(theirs)
        incomplete = {safe(each.service) for each in report.endpoints if each.known and not each.up}
        for labels, model in self.models.items():
            now = told.get(labels, ())
            _gauge(model, now)
            comparable = now and labels[0] not in incomplete and labels[1] != UNKNOWN
            model.comparison = None
            if comparable and ours is not None:
                _compare(model, report.at_ns, ours.get(labels[:2], Ours()))
        self._forget(report.at_ns)

    def cache_deltas(self) -> list[CacheDelta]:
        """What the prefix caches did since the last call, of the models whose cache was asked for anything."""
        deltas: list[CacheDelta] = []
        for (service, name, _), model in self.models.items():
            queries = int(model.queries)
            hits = min(int(model.hits), queries)  # a page is no snapshot: the hits may be some steps ahead
            before_queries, before_hits = model.drained
            if queries > before_queries or hits > before_hits:
                model.drained = queries, hits
                deltas.append(CacheDelta(service, name, queries - before_queries, hits - before_hits))
        return deltas

    def _rename(self, labels: Labels, known: set[Labels]) -> None:
        """A model without a name has one now: what was counted for it goes on under that."""
        unnamed = (labels[0], UNKNOWN, labels[2])
        if labels not in self.models and unnamed in self.models:
            self.models[labels] = self.models.pop(unnamed)
            known.add(labels)
            if unnamed in self._accounted:
                self._accounted[labels] = self._accounted.pop(unnamed)

    def _admit(self, labels: Labels) -> bool:
        if labels in self.models:
            return True
        if len(self.models) >= MODELS_LIMIT:
            return False
        self.models[labels] = ModelView()
        return True

    def _count(
        self,
        endpoint: EndpointReport,
        theirs: EngineModel,
        labels: Labels,
        new: bool,
        ours: Mapping[tuple[str, str], Ours] | None,
    ) -> None:
        """Add what one endpoint has counted since it was asked before."""
        model = self.models[labels]
        model.told_ns = endpoint.at_ns
        counters = {name: value for name in _COUNTERS if (value := getattr(theirs, name)) is not None}
        key = _key(endpoint, theirs)
        before = self._told.get(key)
        if before is None:
            self._told[key] = _Told(counters, endpoint.at_ns)
            model.snapshots.clear()  # what it counted before would pass for the window's
            # To an old sum, a second endpoint's past would be a jump that never happened.
            _add(model.totals, counters if new else dict.fromkeys(counters, 0.0))
            if ours is not None and self._was_seen_and_is_new(labels, counters, ours.get(labels[:2], Ours())):
                self._take_cache(labels, counters)
            return
        grown = _grown(before.counters, counters)
        if grown is None:
            grown = counters
            model.snapshots.clear()  # what it had not told before it restarted is missing
            before.counters = {}  # a counter that is not there yet begins at nothing, too
        before.counters |= counters
        before.at_ns = endpoint.at_ns
        _add(model.totals, grown)
        self._take_cache(labels, grown)

    def _was_seen_and_is_new(self, labels: Labels, counters: Mapping[str, float], ours: Ours) -> bool:
        """Whether all that an endpoint counted before it was first asked is what the agent saw and nobody told yet."""
        if "requests" not in counters or (labels not in self._accounted and len(self._accounted) >= _ACCOUNTS_LIMIT):
            return False
        return counters["requests"] + self._accounted.get(labels, 0.0) <= ours.requests

    def _take_cache(self, labels: Labels, more: Mapping[str, float]) -> None:
        if labels in self._accounted or len(self._accounted) < _ACCOUNTS_LIMIT:
            self._accounted[labels] = self._accounted.get(labels, 0.0) + more.get("requests", 0.0)
        _add_cache(self.models[labels], more)

    def _forget(self, now_ns: int) -> None:
        for labels in [labels for labels, model in self.models.items() if now_ns - model.told_ns > FORGET_NS]:
            del self.models[labels]
        for key in [key for key, told in self._told.items() if now_ns - told.at_ns > FORGET_NS]:
            del self._told[key]


def _labels(service: str, theirs: EngineModel, ours: Mapping[tuple[str, str], Ours] | None) -> Labels:
    """A model without a name is the only one of its service, where there is only one."""
    service = safe(service)
    if theirs.model is not None:
        return service, safe(theirs.model), theirs.engine
    names = {model for name, model in ours or () if name == service} - {UNKNOWN, OTHER}
    return service, names.pop() if len(names) == 1 else UNKNOWN, theirs.engine


def _key(endpoint: EndpointReport, theirs: EngineModel) -> _Key:
    return endpoint.service, endpoint.url, theirs.engine, None if theirs.model is None else safe(theirs.model)


def _grown(before: Mapping[str, float], now: Mapping[str, float]) -> dict[str, float] | None:
    """By how much counters grew; None where one went backwards, as they do when an engine restarts."""
    if any(value < before.get(name, 0) * (1 - _ROUNDING) for name, value in now.items()):
        return None
    return {name: max(0.0, value - before.get(name, 0)) for name, value in now.items()}


def _add(totals: dict[str, float], more: Mapping[str, float]) -> None:
    for name, value in more.items():
        totals[name] = totals.get(name, 0.0) + value


def _add_cache(model: ModelView, more: Mapping[str, float]) -> None:
    # Only both tell a ratio: an engine may come to count one of them later.
    if "prefix_queries" in more and "prefix_hits" in more:
        model.queries += more["prefix_queries"]
        model.hits += more["prefix_hits"]


def _gauge(model: ModelView, told: Sequence[EngineModel]) -> None:
    model.running = _sum([each.running for each in told])
    model.waiting = _sum([each.waiting for each in told])
    usage = _sum([each.kv_usage_ratio for each in told])
    model.kv_usage_ratio = None if usage is None else usage / len(told)


def _sum(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if known and len(known) == len(values) else None


def _compare(model: ModelView, now_ns: int, ours: Ours) -> None:
    """Put down how things stand, and compare what happened since the oldest snapshot of the window."""
    totals, snapshots = model.totals, model.snapshots
    now = _Snapshot(now_ns, totals.get("requests"), totals.get("ttft_count"), totals.get("ttft_sum_seconds"), ours)
    while snapshots and now_ns - snapshots[0].at_ns > WINDOW_NS:
        snapshots.popleft()
    snapshots.append(now)
    then = snapshots[0]
    if then is now:
        return
    requests = _between(then.requests, now.requests)
    ours_requests = now.ours.requests - then.ours.requests
    their_mean = _mean(_between(then.ttft_sum_seconds, now.ttft_sum_seconds), _between(then.ttft_count, now.ttft_count))
    our_mean = _mean(
        (now.ours.first_token_ns - then.ours.first_token_ns) / 1e9, now.ours.first_tokens - then.ours.first_tokens
    )
    model.comparison = Comparison(
        their_mean,
        None if their_mean is None or our_mean is None else their_mean - our_mean,
        None if requests is None else requests - ours_requests,
    )


def _between(then: float | None, now: float | None) -> float | None:
    return None if then is None or now is None else now - then


def _mean(total: float | None, count: float | None) -> float | None:
    return total / count if total is not None and count else None
