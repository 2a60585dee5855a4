"""The gpu_* families: what the driver tells of each GPU, and of what the services' processes have of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Final

from exporter.families import Family, Kind, Point, Scrape, Spec
from exporter.labels import safe

if TYPE_CHECKING:
    from probes.gpu_report import Gpu, GpuActivity, GpuMemory, MigInstance

_UUID: Final = ("uuid",)
_SERVICE: Final = ("service_name", "uuid")

OTHER_XIDS: Final = "other"
"""The label of all XID codes that there was no room for."""


def _gpus(scrape: Scrape) -> Iterator[Gpu]:
    """Those that have a name: one that was lost before it was ever read has none."""
    for gpu in scrape.gpus.gpus if scrape.gpus is not None else ():
        if gpu.uuid:
            yield gpu


def _devices(gpu: Gpu) -> Sequence[Gpu | MigInstance]:
    return gpu, *gpu.mig


def _info(scrape: Scrape) -> Iterator[Point]:
    if scrape.gpus is None:
        return
    driver = safe(scrape.gpus.driver_version or "")
    for gpu in _gpus(scrape):
        yield (safe(gpu.uuid), safe(gpu.name), str(gpu.index), driver, ""), 1
        for instance in gpu.mig:
            place = f"{gpu.index}:{instance.index}"
            yield (safe(instance.uuid), safe(instance.name), place, driver, safe(instance.profile)), 1


def _one(name: str, text: str, get: Callable[[Gpu], float | None], unit: str = "", kind: Kind = Kind.GAUGE) -> Family:
    """One value for each GPU."""

    def points(scrape: Scrape) -> Iterator[Point]:
        for gpu in _gpus(scrape):
            value = get(gpu)
            if value is not None:
                yield (safe(gpu.uuid),), float(value) if isinstance(value, bool) else value

    return Family(Spec(name, kind, text, _UUID, unit), points)


def _many(
    name: str,
    text: str,
    labels: tuple[str, ...],
    get: Callable[[Gpu], Iterable[tuple[tuple[str, ...], float]]],
    unit: str = "",
    kind: Kind = Kind.GAUGE,
) -> Family:
    """Values for each GPU, by more labels."""

    def points(scrape: Scrape) -> Iterator[Point]:
        for gpu in _gpus(scrape):
            for values, value in get(gpu):
                yield (safe(gpu.uuid), *values), value

    return Family(Spec(name, kind, text, (*_UUID, *labels), unit), points)


def _pairs(pairs: Iterable[tuple[str, float]]) -> Iterator[tuple[tuple[str, ...], float]]:
    for label, value in pairs:
        yield (label,), value


def _memory(name: str, text: str, get: Callable[[GpuMemory], int | None]) -> Family:
    """One value for each GPU and MIG device."""

    def points(scrape: Scrape) -> Iterator[Point]:
        for gpu in _gpus(scrape):
            for device in _devices(gpu):
                value = None if device.memory is None else get(device.memory)
                if value is not None:
                    yield (safe(device.uuid),), value

    return Family(Spec(name, Kind.GAUGE, text, _UUID, "bytes"), points)


def _activity(name: str, text: str, get: Callable[[GpuActivity], float | None]) -> Family:
    """One ratio for each GPU or, where it is divided, each MIG device."""

    def points(scrape: Scrape) -> Iterator[Point]:
        for gpu in _gpus(scrape):
            for device in _devices(gpu):
                value = get(device.activity)
                if value is not None:
                    yield (safe(device.uuid),), value

    text += " From GPM: Hopper and later; of a MIG device, that of its GPU instance."
    return Family(Spec(name, Kind.GAUGE, text, _UUID, "ratio"), points)


def _xid(code: int) -> str:
    return str(code) if code else OTHER_XIDS


def _services(scrape: Scrape) -> dict[int, str]:
    """Which service each followed process is of: of those services all of whose processes the report names."""
    targets = scrape.status.targets if scrape.status is not None else ()
    return {
        tgid: safe(target.service)
        for target in targets
        if len(target.tgids) == target.processes  # a sum without one of its parts would be wrong
        for tgid in target.tgids
    }


def _service_memory(scrape: Scrape) -> Iterator[Point]:
    services = _services(scrape)
    used: dict[tuple[str, str], int | None] = {}
    for process in scrape.gpus.processes if scrape.gpus is not None else ():
        service = services.get(process.tgid)
        if service is None:
            continue
        key = service, safe(process.uuid)
        before = used.get(key, 0)
        # A sum without one of its parts would be wrong.
        used[key] = None if before is None or process.memory_bytes is None else before + process.memory_bytes
    for key, memory in used.items():
        if memory is not None:
            yield key, memory


def _service_use(scrape: Scrape) -> Iterator[Point]:
    services = _services(scrape)
    used: dict[tuple[str, str], float] = {}
    for process in scrape.gpus.processes if scrape.gpus is not None else ():
        service = services.get(process.tgid)
        if service is not None and process.sm_utilization is not None:
            key = service, safe(process.uuid)
            used[key] = used.get(key, 0.0) + process.sm_utilization
    yield from used.items()


def _look_seconds(scrape: Scrape) -> Iterator[Point]:
    if scrape.gpus is not None:
        yield (), scrape.gpus.seconds


def _failures(scrape: Scrape) -> Iterator[Point]:
    for error, count in scrape.gpus.failures if scrape.gpus is not None else ():
        yield (error,), count


def gpu_families() -> Sequence[Family]:
    """All of them, in the order of the page."""
    return [
        Family(
            Spec(
                "gpu",
                Kind.INFO,
                "GPUs, and MIG devices: those have a mig_profile, and their place in the GPU after its index.",
                (*_UUID, "name", "index", "driver_version", "mig_profile"),
            ),
            _info,
        ),
        _one(
            "gpu_up",
            "Whether the GPU could be read. 0 is one that was there and is lost, or answers too slowly.",
            lambda gpu: gpu.problem is None,
        ),
        _one(
            "gpu_utilization_ratio",
            "Part of the driver's last sample period in which anything ran on the GPU. A busy GPU may be badly used: "
            "see gpu_sm_active_ratio. Absent with MIG.",
            lambda gpu: gpu.utilization,
            "ratio",
        ),
        _one(
            "gpu_memory_utilization_ratio",
            "Part of the driver's last sample period in which the GPU's memory was read or written.",
            lambda gpu: gpu.memory_utilization,
            "ratio",
        ),
        _memory(
            "gpu_memory_used_bytes",
            "Memory in use, without what the driver keeps for itself.",
            lambda memory: memory.used,
        ),
        _memory("gpu_memory_total_bytes", "Memory of the GPU or the MIG device.", lambda memory: memory.total),
        _memory(
            "gpu_memory_reserved_bytes", "Memory that the driver keeps for itself.", lambda memory: memory.reserved
        ),
        _one("gpu_power_watts", "Power drawn now, or over the last second.", lambda gpu: gpu.power_watts, "watts"),
        _one(
            "gpu_power_limit_watts",
            "Power that the driver allows, all limits considered.",
            lambda gpu: gpu.power_limit_watts,
            "watts",
        ),
        _one(
            "gpu_energy_joules",
            "Energy drawn since the driver was loaded.",
            lambda gpu: gpu.energy_joules,
            "joules",
            Kind.COUNTER,
        ),
        _many(
            "gpu_temperature_celsius",
            "Temperature, by sensor: gpu, memory.",
            ("sensor",),
            lambda gpu: _pairs(gpu.temperatures),
            "celsius",
        ),
        _many(
            "gpu_clock_hertz",
            "Clock now, by domain: graphics, sm, memory, video.",
            ("domain",),
            lambda gpu: _pairs(gpu.clocks),
            "hertz",
        ),
        _many(
            "gpu_throttled",
            "1 for each reason that holds the clocks back at the last look. Idling is none, nor are clocks that "
            "somebody set.",
            ("reason",),
            lambda gpu: _pairs((reason, float(now)) for reason, now in gpu.throttled),
        ),
        _many(
            "gpu_throttled_seconds",
            "Time in which clocks were held back, by the driver's own count of violations: power, thermal, "
            "sync_boost, board_limit, reliability.",
            ("reason",),
            lambda gpu: _pairs(gpu.throttled_seconds),
            "seconds",
            Kind.COUNTER,
        ),
        _many(
            "gpu_ecc_errors",
            "Memory errors. The counter volatile begins with the driver, aggregate with the GPU's life.",
            ("severity", "counter"),
            lambda gpu: (((severity, counter), count) for severity, counter, count in gpu.ecc_errors),
            kind=Kind.COUNTER,
        ),
        _many(
            "gpu_remapped_rows",
            "Rows of memory replaced by spare ones, by what was wrong with them.",
            ("cause",),
            lambda gpu: _pairs(gpu.remapped_rows),
        ),
        _one(
            "gpu_row_remap_pending", "1 when rows wait for a reset to be replaced.", lambda gpu: gpu.row_remap_pending
        ),
        _one(
            "gpu_row_remap_failure",
            "1 when a row could not be replaced: the GPU is to be replaced.",
            lambda gpu: gpu.row_remap_failure,
        ),
        _many(
            "gpu_xid_errors",
            "XID errors since the agent listens, by code. The driver keeps no history: earlier ones are not in it.",
            ("xid",),
            lambda gpu: (((_xid(xid.code),), xid.count) for xid in gpu.xids),
            kind=Kind.COUNTER,
        ),
        _many(
            "gpu_xid_last_time_seconds",
            "When the agent heard of the last XID error of a code, since the epoch.",
            ("xid",),
            lambda gpu: (((_xid(xid.code),), xid.last_time) for xid in gpu.xids if xid.last_time is not None),
            "seconds",
        ),
        _one("gpu_pcie_replays", "Times that PCIe had to send again.", lambda gpu: gpu.pcie_replays, kind=Kind.COUNTER),
        _many(
            "gpu_pcie_bytes",
            "Bytes over PCIe, by the GPU's direction.",
            ("direction",),
            lambda gpu: _pairs(gpu.pcie_bytes),
            "bytes",
            Kind.COUNTER,
        ),
        _many(
            "gpu_nvlink_bytes",
            "Bytes of data over all NVLinks, by the GPU's direction.",
            ("direction",),
            lambda gpu: _pairs(gpu.nvlink_bytes),
            "bytes",
            Kind.COUNTER,
        ),
        _activity(
            "gpu_sm_active_ratio",
            "Part of the time that multiprocessors had work, averaged over them.",
            lambda activity: activity.sm_active,
        ),
        _activity(
            "gpu_sm_occupancy_ratio",
            "Warps that were there, of those that there is room for.",
            lambda activity: activity.sm_occupancy,
        ),
        _activity(
            "gpu_tensor_active_ratio",
            "Part of the time that tensor cores worked.",
            lambda activity: activity.tensor_active,
        ),
        _activity(
            "gpu_dram_active_ratio", "Part of the memory's bandwidth in use.", lambda activity: activity.dram_active
        ),
        Family(
            Spec(
                "gpu_service_memory_used_bytes",
                Kind.GAUGE,
                "GPU memory of the service's processes. Absent where the driver does not tell that of each.",
                _SERVICE,
                "bytes",
            ),
            _service_memory,
        ),
        Family(
            Spec(
                "gpu_service_sm_utilization_ratio",
                Kind.GAUGE,
                "Part of the time since the last look in which the service's processes ran on the GPU. Absent "
                "where the driver had no sample of them: they were idle, or MIG is on.",
                _SERVICE,
                "ratio",
            ),
            _service_use,
        ),
        Family(
            Spec(
                "footlight_gpu_look_seconds",
                Kind.GAUGE,
                "What it took to ask the driver about all GPUs the last time.",
                (),
                "seconds",
            ),
            _look_seconds,
        ),
        Family(
            Spec(
                "footlight_gpu_call_failures",
                Kind.COUNTER,
                "Calls of the driver's library that failed, by its error; without those that a GPU does not support.",
                ("error",),
            ),
            _failures,
        ),
    ]
