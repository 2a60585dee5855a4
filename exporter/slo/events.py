"""What the events of an objective are in the agent's own series: how many there were, and how many were good."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from exporter.request import Failure
from exporter.slis import Sli
from exporter.slo.declared import SLO_ABORTS, SLO_CACHE, SLO_ERRORS, SLO_METRIC, SLO_SPEED, Slo

if TYPE_CHECKING:
    from exporter.kv_cache import Lookups
    from exporter.slis import Series

Events = tuple[int, int]
"""Good ones, and all."""
NONE: Final[Events] = (0, 0)


def is_counted(slo: Slo) -> bool:
    """Whether the agent counts the events itself. Those of kernel_ and gpu_ families only Prometheus counts."""
    return not SLO_METRIC.fullmatch(slo.sli)


def latency_of(slo: Slo) -> Sli | None:
    """The latency whose histogram tells which events are good; None where none does."""
    if slo.sli == SLO_SPEED:
        return Sli.TPOT  # so many tokens a second is so much time for each
    return Sli(slo.sli) if slo.below_s is not None else None


def concerns(slo: Slo, service_name: str, model_name: str) -> bool:
    """Whether an objective is about a model, by its labels."""
    return slo.service in (None, service_name) and slo.model_name in (None, model_name)


def events_of(slo: Slo, series: Series) -> Events:
    """What was counted in a series since the agent began. Call `Slis.flush` first."""
    latency = latency_of(slo)
    if latency is not None and slo.below_s is not None:
        return series.histograms[latency].within(slo.below_s)
    if slo.sli == SLO_ERRORS:
        bad = sum(series.failures[Failure(reason)] for reason in slo.reasons)
        # What failed for another reason is no event: a flood of bad requests would dilute the others.
        return series.requests - sum(series.failures.values()), series.requests - sum(series.failures.values()) + bad
    if slo.sli == SLO_ABORTS:
        return series.requests - sum(series.aborts.values()), series.requests
    if slo.sli == SLO_CACHE:
        return series.cache_hits or 0, series.cache_queries or 0
    return NONE


def lookups_of(told: Lookups) -> Events:
    """Prompt tokens found and looked up, where another source than the wire tells of a model's cache."""
    return min(told.hits, told.queries), told.queries
