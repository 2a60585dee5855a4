"""What the events of an objective are in the agent's own series: how many there were, and how many were good."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from exporter.request import Failure
from exporter.slis import Sli
from exporter.slo.declared import SLO_ABORTS, SLO_CACHE, SLO_ERRORS, SLO_METRIC, SLO_SPEED, Slo

if TYPE_CHECKING:
    from collections.abc import Iterator

    from exporter.slis import Series, Slis

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


def events_by_labels(slo: Slo, slis: Slis) -> Iterator[tuple[tuple[str, ...], Events]]:
    """What an objective is about, by labels: series, and models of whose cache another source than the wire tells.

    Call `Slis.flush` first. Labels begin with service_name and model_name.
    """
    if not is_counted(slo):
        return
    for series in slis.all_series():
        silent = slo.sli == SLO_CACHE and series.cache_queries is None
        if concerns(slo, *series.labels[:2]) and not silent:
            yield series.labels, events_of(slo, series)
    for cache in slis.caches.models() if slo.sli == SLO_CACHE else ():
        told = cache.counted()
        if told is not None and concerns(slo, *cache.labels):
            yield cache.labels, (min(told.hits, told.queries), told.queries)
