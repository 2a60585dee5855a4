"""The footlight_health_* families: how each service's signals stand to what is normal for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from exporter.families import Family, Kind, Point, Scrape, Spec

if TYPE_CHECKING:
    from exporter.health import Baseline
    from exporter.health_watch import Health

_LABELS = ("service_name", "signal")


def health_families(health: Callable[[], Health | None]) -> Sequence[Family]:
    """All of them, in the order of the page. `health` is asked at each scrape; None has nothing to tell."""

    def anomalies_now(_: Scrape) -> Iterator[Point]:
        for service, signal, baseline in _baselines(health()):
            if baseline.sigmas is not None or baseline.anomalous_since is not None:
                yield (service, signal), int(baseline.anomalous_since is not None)

    def deviations(_: Scrape) -> Iterator[Point]:
        for service, signal, baseline in _baselines(health()):
            if baseline.sigmas is not None:
                yield (service, signal), baseline.sigmas

    def samples(_: Scrape) -> Iterator[Point]:
        for service, signal, baseline in _baselines(health()):
            yield (service, signal), len(baseline.known)

    def anomalies(_: Scrape) -> Iterator[Point]:
        found = health()
        for service, each in sorted(found.services.items()) if found else ():
            for signal, count in each.anomalies.items():
                yield (service, signal.value), count

    def leaks(_: Scrape) -> Iterator[Point]:
        found = health()
        for service in sorted(found.services) if found else ():
            yield (service,), found.leaks.get(service, 0) if found else 0

    return [
        Family(
            Spec(
                "footlight_health_anomaly",
                Kind.GAUGE,
                "1 while the signal is far above what is normal for the service, else 0; absent until that is known.",
                _LABELS,
            ),
            anomalies_now,
        ),
        Family(
            Spec(
                "footlight_health_deviation_sigma",
                Kind.GAUGE,
                "How far the signal is above its median of 5 minutes, in robust standard deviations; 3 is anomalous.",
                _LABELS,
                "sigma",
            ),
            deviations,
        ),
        Family(
            Spec(
                "footlight_health_baseline_samples",
                Kind.GAUGE,
                "Samples, one in 5 s, that what is normal was learnt from; below 24 nothing is called anomalous.",
                _LABELS,
            ),
            samples,
        ),
        Family(
            Spec("footlight_health_anomalies", Kind.COUNTER, "Times that a signal became anomalous.", _LABELS),
            anomalies,
        ),
        Family(
            Spec(
                "footlight_descriptor_leaks",
                Kind.COUNTER,
                "Times that a process of the service opened more than 50 descriptors a second for 10 s.",
                ("service_name",),
            ),
            leaks,
        ),
    ]


def _baselines(health: Health | None) -> Iterator[tuple[str, str, Baseline]]:
    for service, each in sorted(health.services.items()) if health else ():
        for signal, baseline in each.baselines.items():
            yield service, signal.value, baseline
