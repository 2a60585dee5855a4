"""How an objective is told to a person: in one line, with its units."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from exporter.slo.declared import SLO_ABORTS, SLO_CACHE, SLO_ERRORS, SLO_SPEED, known_metrics

if TYPE_CHECKING:
    from exporter.slo.declared import Slo

_EVENTS: Final = {
    "ttft": "times to first token",
    "itl": "gaps between frames",
    "tpot": "times per output token",
    "longest_gap": "longest gaps",
    "duration": "durations",
    SLO_ERRORS: "requests",
    SLO_ABORTS: "requests",
    SLO_CACHE: "prompt tokens",
    SLO_SPEED: "responses",
}


def sentence(slo: Slo) -> str:
    """What has to hold, such as `99% of times to first token within 0.3 s`."""
    return f"{percent(slo.target)} of {_EVENTS.get(slo.sli) or _measured(slo)} {good_event(slo)}"


def good_event(slo: Slo) -> str:
    """What makes an event a good one, such as `within 0.3 s`."""
    if slo.sli == SLO_ERRORS:
        return f"without {' or '.join(slo.reasons)}"
    if slo.sli == SLO_ABORTS:
        return "not left by their client"
    if slo.sli == SLO_CACHE:
        return "found in the KV cache"
    if slo.sli == SLO_SPEED:
        return f"at {slo.at_least:g} tokens/s or more"
    if slo.below_s is not None:
        return f"within {slo.below_s:g} s"
    unit = _unit(slo)
    return f"at {slo.below:g}{unit} or less" if slo.below is not None else f"at {slo.at_least:g}{unit} or more"


def percent(share: float) -> str:
    """A share as a percentage without digits that nobody wrote."""
    return f"{100 * share:.10g}%"


def period(seconds: int) -> str:
    """A window as Prometheus writes it: in days where that is possible, else in hours or minutes."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "m")):
        if seconds % size == 0:
            return f"{seconds // size}{unit}"
    return f"{seconds}s"


def _measured(slo: Slo) -> str:
    metric = known_metrics().get(slo.sli)
    return f"{'minutes' if metric is not None and metric.kind == 'gauge' else 'observations'} of {slo.sli}"


def _unit(slo: Slo) -> str:
    metric = known_metrics().get(slo.sli)
    return {"seconds": " s", "bytes": " bytes"}.get("" if metric is None else metric.unit, "")
