"""The objectives of a configuration as queries: which events are bad, and how many there are, by service and model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Final

from prometheus_client.utils import floatToGoString

from exporter.labels import safe
from exporter.slo.declared import (
    SLO_ABORTS,
    SLO_CACHE,
    SLO_ERRORS,
    SLO_METRIC,
    SLO_REASONS,
    SLO_SPEED,
    known_metrics,
    labels_of,
    services_of,
)
from exporter.slo.model import WINDOW, Events, Measure, Objective, one_of, quoted, selector
from exporter.slo.words import sentence

if TYPE_CHECKING:
    from exporter.config import Config
    from exporter.slo.declared import Slo

ALERT: Final = "ErrorBudgetBurn"
SPEC: Final = "footlight/v1"
FEWEST: Final = 20
"""Requests in an hour from which on it is odd that an objective had no event."""
METRICS: Final = {
    "ttft": "llm_time_to_first_token_seconds",
    "itl": "llm_inter_token_latency_seconds",
    "tpot": "llm_request_time_per_output_token_seconds",
    "longest_gap": "llm_request_longest_gap_seconds",
    "duration": "llm_request_duration_seconds",
    SLO_SPEED: "llm_request_time_per_output_token_seconds",
}
"""The histograms of the latencies."""
_PHASES: Final = {
    "ttft": ("ttft",),
    "itl": ("decode",),
    "tpot": ("decode",),
    "longest_gap": ("decode",),
    "duration": ("ttft", "decode"),
    SLO_SPEED: ("decode",),
}
"""Where the time of the latencies is spent, as llm_latency_cause_seconds_total names it."""


@dataclass(frozen=True, slots=True)
class Counter:
    """One counter that a query reads: its name, its labels, and what a good and a bad event add to it."""

    name: str
    labels: dict[str, str]
    good: int
    bad: int


@dataclass(frozen=True, slots=True)
class Gauge:
    """One gauge that a query reads, with a good and a bad value."""

    name: str
    labels: dict[str, str]
    good: float
    bad: float


@dataclass(frozen=True, slots=True)
class Native:
    """An objective of the configuration for one service: what rules are made of, and what its queries read.

    `groups` are the labels that its recorded series have of their own; `matched` are those that the configuration
    names.
    """

    objective: Objective
    slo: Slo
    groups: tuple[str, ...]
    matched: dict[str, str]

    def reads(self, labels: dict[str, str]) -> Sequence[Counter] | Gauge:
        """The series that one good or bad event shows up in, with these labels."""
        slo = self.slo
        if slo.sli in (SLO_ERRORS, SLO_ABORTS):
            return _reads_outcomes(slo, labels)
        if slo.sli == SLO_CACHE:
            return (
                Counter("llm_prefix_cache_queries_total", labels, 1, 1),
                Counter("llm_prefix_cache_hits_total", labels, 1, 0),
            )
        if SLO_METRIC.fullmatch(slo.sli) and known_metrics()[slo.sli].kind == "gauge":
            if slo.below is not None:
                return Gauge(slo.sli, labels, slo.below, slo.below * 2 + 1)
            at_least = slo.at_least or 0.0
            return Gauge(slo.sli, labels, at_least, at_least / 2 - 1)
        name, bound = _histogram(slo)
        return (
            Counter(f"{name}_count", labels, 1, 1),
            Counter(f"{name}_bucket", {**labels, "le": floatToGoString(bound)}, 1, 0),  # type: ignore[no-untyped-call]
        )


def natives(config: Config) -> list[Native]:
    """One objective for each service that an objective of the configuration is about, in the order of the file."""
    services = [service.name for service in config.services]
    return [_native(slo, service) for slo in config.slos for service in services_of(slo, services)]


def _native(slo: Slo, service: str) -> Native:
    labels = labels_of(slo)
    matched = {"service_name": service} if "service_name" in labels else {}
    if slo.model_name is not None:
        matched["model_name"] = safe(slo.model_name)
    groups = tuple(label for label in ("service_name", "model_name") if label in labels)
    objective = Objective(
        service=service,
        name=slo.name,
        target=Decimal(repr(slo.target)),
        window_s=slo.window_s,
        sli=_events(slo, groups, matched),
        absent=_absent(slo, matched),
        sentence=sentence(slo),
        spec=SPEC,
        alert_name=ALERT,
        phases=_PHASES.get(slo.sli, ()),
        each="model_name" if "model_name" in labels and slo.model_name is None else "",
    )
    return Native(objective, slo, groups, matched)


def _events(slo: Slo, groups: Sequence[str], matched: dict[str, str]) -> Events:
    by, match = ", ".join(groups), selector(matched)

    def increase(metric: str, more: str = "") -> str:
        chosen = ", ".join(filter(None, (match, more)))
        return f"sum by ({by}) (increase({metric}{{{chosen}}}[{WINDOW}]))"

    def without(total: str, good: str) -> str:
        # A counter that is a little older than the other may be extrapolated a little further.
        return f"clamp_min(\n    {total}\n  -\n    {good},\n  0\n)"

    if slo.sli == SLO_ERRORS:
        total = increase("llm_requests_total")
        others = [reason for reason in SLO_REASONS if reason not in slo.reasons]
        if others:
            total = without(total, increase("llm_request_failures_total", one_of("reason", others)))
        return Events(increase("llm_request_failures_total", one_of("reason", slo.reasons)), total, Measure.EVENTS)
    if slo.sli == SLO_ABORTS:
        return Events(increase("llm_requests_aborted_total"), increase("llm_requests_total"), Measure.EVENTS)
    if slo.sli == SLO_CACHE:
        total = increase("llm_prefix_cache_queries_total")
        return Events(without(total, increase("llm_prefix_cache_hits_total")), total, Measure.EVENTS)
    if SLO_METRIC.fullmatch(slo.sli) and known_metrics()[slo.sli].kind == "gauge":
        return _minutes(slo, by, match)
    name, bound = _histogram(slo)
    total = increase(f"{name}_count")
    return Events(without(total, increase(f"{name}_bucket", _le(bound))), total, Measure.EVENTS)


def _minutes(slo: Slo, by: str, match: str) -> Events:
    """Each minute of each series is an event: the same minutes in both, however often Prometheus scrapes."""
    sign, bound = ("<", slo.at_least) if slo.below is None else (">", slo.below)
    bad = f"{sign} bool {floatToGoString(bound)}"  # type: ignore[no-untyped-call]
    chosen = f"{slo.sli}{{{match}}}"
    return Events(
        f"sum by ({by}) (sum_over_time(({chosen} {bad})[{WINDOW}:1m]))",
        f"sum by ({by}) (count_over_time({chosen}[{WINDOW}:1m]))",
        Measure.EVENTS,
    )


def _histogram(slo: Slo) -> tuple[str, float]:
    """The histogram's name and the bound up to which its observations are good."""
    bound = slo.below if slo.below_s is None else slo.below_s
    assert bound is not None, "the configuration asks for a threshold"
    return METRICS.get(slo.sli, slo.sli), bound


def _le(bound: float) -> str:
    text: str = floatToGoString(bound)  # type: ignore[no-untyped-call]
    # Prometheus before 3.0 keeps `1` or `1.0` as it was served, which depends on the format.
    return f"le=~{quoted(text[:-2] + '([.]0)?')}" if text.endswith(".0") else f"le={quoted(text)}"


def _absent(slo: Slo, matched: dict[str, str]) -> str:
    if SLO_METRIC.fullmatch(slo.sli):
        suffix = "_count" if known_metrics()[slo.sli].kind == "histogram" else ""
        return f"absent({slo.sli}{suffix}{{{selector(matched)}}})"
    service = selector({"service_name": matched["service_name"]})
    requests = f"sum by (service_name) (increase(llm_requests_total{{{selector(matched)}}}[1h]))"
    counted = f"slo:sli_total:increase1h{{sloth_slo={quoted(slo.name)}, {service}}}"
    return (
        f"absent(footlight_target_processes{{{service}}} > 0)\n"
        "or\n"
        "(\n"
        f"    {requests} >= {FEWEST}\n"
        "  unless\n"
        f"    sum by (service_name) ({counted}) > 0\n"
        ")"
    )


def _reads_outcomes(slo: Slo, labels: dict[str, str]) -> Sequence[Counter]:
    requests = Counter("llm_requests_total", labels, 1, 1)
    if slo.sli == SLO_ABORTS:
        return requests, Counter("llm_requests_aborted_total", {**labels, "phase": "waiting"}, 0, 1)
    failures = [
        Counter("llm_request_failures_total", {**labels, "reason": reason}, 0, int(reason == slo.reasons[0]))
        for reason in SLO_REASONS
    ]
    return requests, *failures
