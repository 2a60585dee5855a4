"""What a family of /metrics is: its name, its type, and how its points are had at a scrape."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

from exporter.slis import Histogram

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from exporter.alertmanager import AlertReport
    from exporter.engines import EngineView
    from exporter.probe_points import PointTotal
    from exporter.slis import Series
    from exporter.status import AgentStatus, ReaderStatus
    from probes.gpu_report import GpuReport


class Kind(Enum):
    """The type of a family. The value is its name in OpenMetrics."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"
    SUMMARY = "summary"
    INFO = "info"


# What a family's sample names end with, by kind.
_SUFFIXES = {
    Kind.COUNTER: ("_total",),
    Kind.GAUGE: ("",),
    Kind.HISTOGRAM: ("_bucket", "_count", "_sum"),
    Kind.SUMMARY: ("",),  # quantiles only: the histograms have the counts and sums
    Kind.INFO: ("_info",),
}


@dataclass(frozen=True, slots=True)
class Spec:
    """What a family is.

    `name` is without the suffix that its kind adds to samples. `bounds` are those of a histogram, in seconds.
    """

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...]
    unit: str = ""
    bounds: tuple[float, ...] = ()

    def sample_names(self) -> tuple[str, ...]:
        """The names that its samples carry."""
        return tuple(self.name + suffix for suffix in _SUFFIXES[self.kind])

    def text_name(self) -> str:
        """The family's name in the text format, which knows no suffixes but a histogram's."""
        return self.name if self.kind is Kind.HISTOGRAM else self.sample_names()[0]


@dataclass(frozen=True, slots=True)
class Scrape:
    """What all families of one scrape share, so that they agree."""

    now_ns: int
    began: float  # by the timer of the metrics
    series: Sequence[Series]
    status: AgentStatus | None
    reader: ReaderStatus
    services: Sequence[str] = ()
    """Names of the configured services, safe as label values, by index; empty for a place that nobody has."""
    kernel: Mapping[str, NDArray[np.void]] = field(default_factory=dict)
    """What each probe that counts has counted, by service: its C structure."""
    gpus: GpuReport | None = None
    """None where nobody looks, or the driver has not answered for long."""
    engines: EngineView | None = None
    points: Sequence[PointTotal] = ()
    alerts: AlertReport | None = None
    """None where the agent posts to no Alertmanager."""


# Values of the labels, and the sample. A histogram is read while the scrape lasts; nothing else runs then.
Point = tuple[tuple[str, ...], float | Histogram]


@dataclass(frozen=True, slots=True)
class Family:
    """A spec, and how its points are had at a scrape."""

    spec: Spec
    points: Callable[[Scrape], Iterable[Point]]
