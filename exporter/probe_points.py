"""The llm_probe_point_* families, and what of them is news of the KV cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

from exporter.families import Family, Kind, Point, Scrape, Spec
from exporter.labels import OTHER, UNKNOWN, safe

if TYPE_CHECKING:
    from exporter.config import ProbePoint
    from probes.points_table import PointSlot

_LABELS: Final = ("service_name", "model_name", "probe_point")


@dataclass(frozen=True, slots=True)
class PointTotal:
    """Look-ups of one model of one service at one point since the agent started. Names are safe as label values."""

    service: str
    model: str
    point: str
    calls: int
    hit_tokens: int
    looked_up_tokens: int


class PointDelta(NamedTuple):
    """What was looked up, and found, since the look before: prompt tokens. A point without names has no `model`."""

    service: str
    model: str | None
    queries: int
    hits: int


class Slots(Protocol):
    """What a `PointsTable` is to this module."""

    def read(self) -> list[PointSlot]:
        """Every slot that has counted something, in the order in which they were taken."""


class PointsView:
    """What the slots say, by the names of services, models and points.

    Of each service the first `models_per_service` models have their names, the others are one. A reader that `resumes`
    has no news of what was counted before it. `services` has a name for each number, and may change: what is counted
    for a place without a name, or beyond the end, is told once it has one.
    """

    def __init__(
        self,
        table: Slots,
        points: Sequence[ProbePoint],
        services: Sequence[str],
        *,
        models_per_service: int = 64,
        resumes: bool = False,
    ) -> None:
        self._table = table
        self._points = [point.name for point in points]
        self._services = services
        self._limit = models_per_service
        self._known: dict[int, set[str]] = {}
        self._sources: dict[str, str] = {}
        self._before: dict[tuple[str, str], tuple[int, int]] = {}
        if resumes:
            self.deltas()

    def totals(self) -> list[PointTotal]:
        """Every model of every point that has counted something. Names that look the same add up."""
        found: dict[tuple[str, str, str], list[int]] = {}
        for slot in self._table.read():
            service = self._services[slot.service] if slot.service < len(self._services) else ""
            if not service:
                continue
            model = safe(slot.model.decode("utf-8", "replace"))
            known = self._known.setdefault(slot.service, set())
            if model not in known and len(known) >= self._limit:
                model = OTHER
            else:
                known.add(model)
            names = (safe(service), model, self._points[slot.point])
            counts = found.setdefault(names, [0, 0, 0])
            counts[0] += slot.calls
            counts[1] += slot.hit_tokens
            counts[2] += slot.looked_up_tokens
        return [PointTotal(*names, *counts) for names, counts in found.items()]

    def deltas(self) -> list[PointDelta]:
        """What is new since the last call, for whoever decides where a model's cache hits come from.

        Points may see the same look-ups, as a function and its USDT twin do. So of each service only one counts here:
        the first in the order of the configuration that had counted anything when the service was first heard of.
        """
        totals = self.totals()
        order = self._points.index
        for total in sorted(totals, key=lambda each: order(each.point)):
            self._sources.setdefault(total.service, total.point)
        news = []
        for total in totals:
            if total.point != self._sources[total.service]:
                continue
            key = (total.service, total.model)
            queries, hits = self._before.get(key, (0, 0))
            self._before[key] = (total.looked_up_tokens, total.hit_tokens)
            if total.looked_up_tokens > queries or total.hit_tokens > hits:
                model = None if total.model == UNKNOWN else total.model
                news.append(
                    PointDelta(total.service, model, total.looked_up_tokens - queries, total.hit_tokens - hits)
                )
        return news


def _family(name: str, text: str, get: Callable[[PointTotal], int]) -> Family:
    def points(scrape: Scrape) -> Iterator[Point]:
        for total in scrape.points:
            yield (total.service, total.model, total.point), get(total)

    return Family(Spec(f"llm_probe_point_{name}", Kind.COUNTER, text, _LABELS), points)


def probe_point_families() -> Sequence[Family]:
    """All of them, in the order of the page."""
    return [
        _family("calls", "Look-ups in the KV cache that a probe point saw.", lambda total: total.calls),
        _family(
            "looked_up_tokens", "Tokens that a probe point saw looked up.", lambda total: total.looked_up_tokens
        ),
        _family("hit_tokens", "Tokens that a probe point saw found.", lambda total: total.hit_tokens),
    ]
