"""What the live page shows, as JSON types: how things stand now, and how the last half hour went."""

from __future__ import annotations

import heapq
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from exporter.critical_path import Cause
from exporter.fronts import rfc3339, row_object
from exporter.history import COLUMNS, HEAT_BOUNDS, STEP_S, History
from exporter.labels import safe
from exporter.status import AgentStatus, CpuMeter, ReaderStatus, why_not_ready
from exporter.why import encode

if TYPE_CHECKING:
    from exporter.slis import Slis
    from exporter.slo.status import Standing
    from exporter.why import Explained

JsonObject = dict[str, Any]

SHOWN_SLOW: Final = 10
_CAUSES: Final = tuple(cause.value for cause in Cause)


def _nothing() -> Sequence[JsonObject]:
    return ()


def _unknown() -> JsonObject | None:
    return None


def _nobody() -> Iterable[Explained]:
    return ()


@dataclass(frozen=True, slots=True)
class Parts:
    """Where the page's data come from. Every call must be quick.

    `recent` are the requests that have a path; None where nobody walks any. `objectives`, `gpus` and `engines` are JSON
    objects of one row each, `health` one of all services. `clock` is CLOCK_MONOTONIC and `wall_clock` the time since
    the epoch, in nanoseconds.
    """

    slis: Slis
    history: History
    status: Callable[[], AgentStatus | None]
    reader: Callable[[], ReaderStatus]
    version: str
    recent: Callable[[], Iterable[Explained]] | None = None
    objectives: Callable[[], Sequence[JsonObject]] = _nothing
    gpus: Callable[[], Sequence[JsonObject]] = _nothing
    engines: Callable[[], Sequence[JsonObject]] = _nothing
    health: Callable[[], JsonObject | None] = _unknown
    clock: Callable[[], int] = time.monotonic_ns
    wall_clock: Callable[[], int] = time.time_ns


class Live:
    """Makes the page's data from its parts."""

    def __init__(self, parts: Parts) -> None:
        self._parts: Final = parts
        self._cpu: Final = CpuMeter()

    def now(self) -> JsonObject:
        """How things stand: `/api/live`."""
        parts = self._parts
        now_ns, status = parts.clock(), parts.status()
        reason = why_not_ready(status, now_ns)
        causes = self._causes(now_ns)
        return {
            "time": rfc3339(parts.wall_clock()),
            "version": parts.version,
            "ready": reason is None,
            "state": "Ready: every wanted probe is attached." if reason is None else f"Not ready: {reason}",
            "window_seconds": 300,
            "models": [
                {**row_object(row), "causes": causes.get((row.service, row.model, row.api), {})}
                for row in parts.slis.rows()
            ],
            "explains": parts.recent is not None,
            "slow": self._slow(),
            "objectives": list(parts.objectives()),
            "gpus": list(parts.gpus()),
            "engines": list(parts.engines()),
            "health": parts.health(),
            "targets": [
                {"service": safe(each.service), "processes": each.processes, "ports": each.ports}
                for each in (status.targets if status else ())
            ],
            "agent": self._agent(status),
        }

    def past(self) -> JsonObject:
        """How each step of the last half hour went: `/api/history`."""
        history, now_ns = self._parts.history, self._parts.clock()
        offset_s = (self._parts.wall_clock() - now_ns) / 1e9
        return {
            "step_seconds": STEP_S,
            "times": [round(slot * STEP_S + offset_s, 3) for slot in history.slots(now_ns)],
            "heat_bounds": HEAT_BOUNDS,
            "models": [
                {
                    **dict(zip(("service", "model", "api"), key, strict=True)),
                    **{name: past.column(name) for name in COLUMNS},
                    "heat": past.heat(),
                }
                for key in history.models()
                for past in (history.past(key, now_ns),)
            ],
        }

    def why(self, number: int) -> JsonObject | None:
        """One of the requests that have a path, with its steps; None where it has none any more."""
        for explained in self._parts.recent() if self._parts.recent else ():
            if explained.request.number == number:
                return self._told(explained)
        return None

    def _told(self, explained: Explained) -> JsonObject:
        offset_ns = self._parts.wall_clock() - self._parts.clock()
        return encode(explained, explained.request.finished_ns + offset_ns, self._parts.slis.label_names)

    def _slow(self) -> list[JsonObject]:
        recent = self._parts.recent or _nobody
        slowest = heapq.nlargest(SHOWN_SLOW, (each for each in recent() if each.ttft), key=_first_token_ns)
        return [{key: value for key, value in self._told(each).items() if key != "steps"} for each in slowest]

    def _causes(self, now_ns: int) -> Mapping[tuple[str, ...], Mapping[str, float]]:
        """Seconds of the time to first token by cause over the window, by service, model and API."""
        found: dict[tuple[str, ...], dict[str, float]] = {}
        for series in self._parts.slis.all_series():
            mine = found.setdefault(series.labels[:3], {})
            for cause, ns in zip(_CAUSES, series.ttft_causes.totals(now_ns), strict=True):
                if ns > 0:
                    mine[cause] = mine.get(cause, 0.0) + ns / 1e9
        return found

    def _agent(self, status: AgentStatus | None) -> JsonObject:
        reader = self._parts.reader()
        lost: Counter[str] = Counter()
        for probe in status.probes if status else ():
            lost[probe.name] += sum(loss.count for loss in probe.losses)
        for own in reader.losses:
            lost[own.probe] += sum(loss.count for loss in own.losses)
        return {
            "cpu_ratio": self._cpu.measure(status),
            "memory_bytes": sum(each.proportional_bytes or each.resident_bytes for each in status.processes)
            if status and status.processes
            else None,
            "connections": reader.connections,
            "reader_restarts": status.reader_restarts if status else 0,
            "probes": [
                {"name": each.name, "up": each.up, "reason": each.reason, "lost": lost[each.name]}
                for each in (status.probes if status else ())
            ],
        }


def objective_object(standing: Standing) -> JsonObject:
    """How an objective stands, as JSON types; null is what is not known yet."""
    rates = dict(standing.burn_rates)
    return {
        "name": standing.slo.name,
        "service": standing.service_name,
        "model": standing.model_name,
        "target": standing.slo.target,
        "good": standing.good,
        "total": standing.events,
        "ratio": standing.good / standing.events if standing.events else None,
        "burn_rate_5m": rates.get(300),
        "burn_rate_1h": rates.get(3600),
        "budget_remaining": standing.budget_left,
    }


def _first_token_ns(explained: Explained) -> int:
    request = explained.request
    return 0 if request.first_token_ns is None else request.first_token_ns - request.arrived_ns
