"""What the reader learns from others than the kernel: GPUs, engines' own metrics, probe points; and whom it asks."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Final

from exporter.config import OFF, ON
from exporter.engines import EngineView, endpoints, ours_of
from exporter.kv_cache import Source
from exporter.probe_points import PointsView, PointTotal
from exporter.reloading import is_gone
from exporter.status import AgentStatus, ProbeStatus
from probes.engine_metrics import PERIOD_S, EngineReport, EngineSource
from probes.poller import Poller

if TYPE_CHECKING:
    from exporter.config import Config
    from exporter.slis import Slis
    from probes.engine_metrics import Endpoint
    from probes.gpu_report import GpuReport
    from probes.nvml import NvmlSource
    from probes.points_table import PointsTable

STALE_S: Final = 10.0
"""What a driver said so long ago, or five periods ago where that is longer, is not said any more."""


class Outside:
    """Everything that is asked in threads of its own, or counted where only processes of services are looked at.

    `services` are names by the index that the kernel uses; they may change. `table` has the counts of the probe points;
    None without any. `clock` is CLOCK_MONOTONIC in nanoseconds. Nothing is asked before `start`.
    """

    def __init__(
        self,
        config: Config,
        services: Sequence[str],
        table: PointsTable | None = None,
        *,
        resumes: bool = False,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._clock: Final = clock
        self._gpu_wanted: Final = config.probes.gpu
        self._gpu_stale_ns: Final = round(max(STALE_S, 5 * config.gpu.period_s) * 1e9)
        self._nvml: Final = _nvml(config)
        self._gpus: Final[Poller[GpuReport] | None] = (
            None if self._nvml is None else Poller("gpus", self._nvml.look, config.gpu.period_s)
        )
        self._endpoints: Mapping[str, Sequence[Endpoint]] = endpoints(config.services, None, ())
        self._engines: Final[Poller[EngineReport]] = Poller(
            "engines", EngineSource(lambda: self._endpoints).look, PERIOD_S
        )
        self.engines: Final = EngineView()
        self._points: Final = (
            None
            if table is None
            else PointsView(
                table,
                config.probe_points,
                services,
                models_per_service=config.limits.models_per_service,
                resumes=resumes,
            )
        )

    @staticmethod
    def prepare(config: Config) -> None:
        """Load what asking by this configuration takes, while files may be read."""
        if config.probes.gpu != OFF:
            import probes.nvml  # noqa: F401, PLC0415 - 3 MiB that nobody needs who does not ask for GPUs

    def start(self) -> None:
        """Begin to ask."""
        if self._gpus is not None:
            self._gpus.start()
        self._engines.start()

    def stop(self) -> None:
        """Ask no more. A source that does not answer is left to itself."""
        self._engines.stop(0.1)
        if self._gpus is not None and self._nvml is not None:
            self._gpus.stop(0.1)
            self._nvml.close()

    def gpus(self) -> GpuReport | None:
        """The last look at the GPUs; None where nobody looks, or it was long ago."""
        latest = None if self._gpus is None else self._gpus.latest()
        if latest is None or self._clock() - latest[1] > self._gpu_stale_ns:
            return None
        return latest[0]

    def points(self) -> Sequence[PointTotal]:
        """What the probe points have counted."""
        return () if self._points is None else self._points.totals()

    def has_news(self) -> bool:
        """Whether the next `tick` compares with what the agent has seen: it is good to have looked just before."""
        latest = self._engines.latest()
        return latest is not None and latest[0] is not self.engines.report

    def tick(self, config: Config, status: AgentStatus | None, slis: Slis, now_ns: int) -> None:
        """Take what is new, and say whom to ask: several times a second, from the loop of the SLIs."""
        services = [service for service in config.services if not is_gone(service)]
        self._endpoints = endpoints(services, status, {series.labels[0] for series in slis.all_series()})
        latest = self._engines.latest()
        if latest is not None and self.has_news():
            slis.flush(now_ns)
            # While nobody looks at requests ours are none, which is no disagreement.
            looking = status is not None and any(each.name == "requests" and each.up for each in status.probes)
            self.engines.take(latest[0], ours_of(slis.all_series()) if looking else None)
            for told in self.engines.cache_deltas():
                slis.caches.add(Source.ENGINE, told.service, told.model, told.queries, told.hits, now_ns)
        for counted in self._points.deltas() if self._points is not None else ():
            slis.caches.add(Source.PROBE_POINT, counted.service, counted.model, counted.queries, counted.hits, now_ns)

    def probes(self) -> tuple[ProbeStatus, ...]:
        """How the probes that are no BPF stand. Where no driver is, and nobody insisted on one, there is none."""
        if self._gpus is None:
            return ()
        report = self.gpus()
        insisted = self._gpu_wanted == ON
        reason = self._gpu_problem(report)
        if report is not None and not report.present and not insisted:
            return ()
        if report is None and self._gpus.latest() is None and not insisted:
            return ()  # the first answer is under way
        return (ProbeStatus("gpu", reason == "", reason, 0, None, None, (), required=insisted),)

    def _gpu_problem(self, report: GpuReport | None) -> str:
        if report is not None:
            return report.problem or ""
        assert self._gpus is not None
        return f"the driver has not answered for {self._gpus.waiting_ns() / 1e9:.0f} s"


def _nvml(config: Config) -> NvmlSource | None:
    if config.probes.gpu == OFF:
        return None
    from probes.nvml import NvmlSource  # noqa: PLC0415 - as in `prepare`

    return NvmlSource(config.gpu.library)
