"""What a person is told of GPUs and engines, one row each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from exporter.labels import safe

if TYPE_CHECKING:
    from collections.abc import Sequence

    from exporter.engines import EngineView
    from probes.gpu_report import GpuReport


@dataclass(frozen=True, slots=True)
class GpuRow:
    """One GPU now. None is what it does not tell. Names are safe to print.

    `throttled` are the reasons for which its clocks are held back; being idle is none. `xids` are the XID errors since
    the agent started, with how many of each there were. `problem` says why not everything is known of it; empty where
    all is well.
    """

    uuid: str
    index: int
    name: str
    utilization_ratio: float | None = None
    memory_used_bytes: int | None = None
    memory_total_bytes: int | None = None
    power_watts: float | None = None
    power_limit_watts: float | None = None
    temperature_celsius: float | None = None
    throttled: tuple[str, ...] = ()
    xids: tuple[tuple[int, int], ...] = ()
    problem: str = ""

    @property
    def is_in_trouble(self) -> bool:
        """Whether somebody should look at it."""
        return bool(self.throttled or self.xids or self.problem)


@dataclass(frozen=True, slots=True)
class EngineRow:
    """One model of a service as its engine tells of it now: requests running and waiting, the part of the KV cache."""

    service: str
    model: str
    engine: str
    running: float | None = None
    waiting: float | None = None
    kv_cache_usage_ratio: float | None = None


def engine_rows(view: EngineView) -> Sequence[EngineRow]:
    """The models that an engine tells of at present, by service and name."""
    return [
        EngineRow(*labels, model.running, model.waiting, model.kv_usage_ratio)
        for labels, model in sorted(view.models.items())
        if not model.running is model.waiting is model.kv_usage_ratio is None
    ]


def gpu_rows(report: GpuReport) -> Sequence[GpuRow]:
    """The GPUs of a look, in the driver's order. The temperature is the chip's."""
    return [
        GpuRow(
            safe(gpu.uuid),
            gpu.index,
            safe(gpu.name),
            gpu.utilization,
            None if gpu.memory is None else gpu.memory.used,
            None if gpu.memory is None else gpu.memory.total,
            gpu.power_watts,
            gpu.power_limit_watts,
            dict(gpu.temperatures).get("gpu"),
            tuple(reason for reason, now in gpu.throttled if now),
            tuple((xid.code, xid.count) for xid in gpu.xids if xid.count),
            safe(gpu.problem) if gpu.problem else "",
        )
        for gpu in report.gpus
    ]
