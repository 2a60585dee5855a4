"""Reads one GPU through NVML into base units."""

from __future__ import annotations

import contextlib
import ctypes
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import pynvml  # type: ignore[import-untyped]  # it has no types

from probes.gpu_report import Gpu, GpuActivity, GpuMemory, GpuProcess, MigInstance, XidCount
from probes.nvml_calls import FAULTS, Calls, Untyped, next_step, words

MAX_XIDS: Final = 64
MAX_PROCESSES: Final = 4096
MAX_MIG: Final = 16
MAX_LINKS: Final = 18

KNOWN_XIDS: Final = (13, 31, 43, 45, 48, 62, 63, 64, 74, 79, 92, 94, 95, 119, 120)
"""XID errors that are counted from zero. Of all others nothing is known before the first one."""

_U32: Final = 0xFFFF_FFFF
_U64: Final = 0xFFFF_FFFF_FFFF_FFFF
_ALL_LINKS: Final = _U32
_GPM_MIN_NS: Final = 100_000_000  # NVML wants its two samples at least this far apart

_DOMAINS: Final = (
    ("graphics", pynvml.NVML_CLOCK_GRAPHICS),
    ("sm", pynvml.NVML_CLOCK_SM),
    ("memory", pynvml.NVML_CLOCK_MEM),
    ("video", pynvml.NVML_CLOCK_VIDEO),
)
# nvmlClocksEventReasons of nvml.h, without idle (0x1) and the clocks that somebody set (0x2 and 0x100).
_REASONS: Final = (
    ("sw_power_cap", 0x4),
    ("hw_slowdown", 0x8),
    ("sync_boost", 0x10),
    ("sw_thermal_slowdown", 0x20),
    ("hw_thermal_slowdown", 0x40),
    ("hw_power_brake_slowdown", 0x80),
)
_POLICIES: Final = (
    ("power", pynvml.NVML_PERF_POLICY_POWER),
    ("thermal", pynvml.NVML_PERF_POLICY_THERMAL),
    ("sync_boost", pynvml.NVML_PERF_POLICY_SYNC_BOOST),
    ("board_limit", pynvml.NVML_PERF_POLICY_BOARD_LIMIT),
    ("reliability", pynvml.NVML_PERF_POLICY_RELIABILITY),
)
_ECC_SEVERITIES: Final = (
    ("corrected", pynvml.NVML_MEMORY_ERROR_TYPE_CORRECTED),
    ("uncorrected", pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED),
)
_ECC_COUNTERS: Final = (("volatile", pynvml.NVML_VOLATILE_ECC), ("aggregate", pynvml.NVML_AGGREGATE_ECC))

_MEMORY_TEMPERATURE: Final = (82, 0)
_PCIE: Final = (("sent", (197, 0)), ("received", (198, 0)))
_NVLINK_KIB: Final = (("sent", (138, _ALL_LINKS)), ("received", (139, _ALL_LINKS)))
_NVLINK_PER_LINK: Final = (("sent", 202), ("received", 204))
_FIELD_NAMES: Final = {
    _MEMORY_TEMPERATURE: "NVML_FI_DEV_MEMORY_TEMP",
    **{place: f"NVML_FI_DEV_PCIE_COUNT_{'TX' if way == 'sent' else 'RX'}_BYTES" for way, place in _PCIE},
    **{place: f"NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_{'TX' if way == 'sent' else 'RX'}" for way, place in _NVLINK_KIB},
}
_ALWAYS: Final = (_MEMORY_TEMPERATURE, *(place for _, place in _PCIE), *(place for _, place in _NVLINK_KIB))
_PER_LINK: Final = tuple((number, link) for _, number in _NVLINK_PER_LINK for link in range(MAX_LINKS))

# GPM metrics, in the order of the members of GpuActivity.
_GPM: Final = (
    pynvml.NVML_GPM_METRIC_SM_UTIL,
    pynvml.NVML_GPM_METRIC_SM_OCCUPANCY,
    pynvml.NVML_GPM_METRIC_ANY_TENSOR_UTIL,
    pynvml.NVML_GPM_METRIC_DRAM_BW_UTIL,
)

# Members of the union nvmlValue_t by nvmlValueType_t.
_MEMBERS: Final = ("dVal", "uiVal", "ulVal", "ullVal", "sllVal", "siVal", "usVal")
_WIDE: Final = frozenset({"ulVal", "ullVal", "sllVal"})

Place = tuple[int, int]
"""A field's number and scope."""


class Rising:
    """A count of the driver's as one that never goes back.

    Where the driver's does, because it was loaded again or the GPU was reset, what was counted stays, and what the
    driver counted in between is lost.
    """

    __slots__ = ("_last", "total")

    def __init__(self, first: int) -> None:
        self.total = self._last = first

    def take(self, count: int) -> int:
        """The total, now that the driver says `count`."""
        self.total += max(0, count - self._last)
        self._last = count
        return self.total


@dataclass(slots=True)
class History:
    """What stays known of a GPU while the library is closed and opened: its counts, the XID errors.

    `seen_us` is the time of the last sample of processes' use, in microseconds since the epoch.
    """

    index: int
    name: str
    counts: dict[tuple[object, ...], Rising] = field(default_factory=dict)
    xids: dict[int, tuple[int, float | None]] = field(default_factory=dict)
    seen_us: int | None = None

    def count(self, key: tuple[object, ...], raw: int | None) -> int | None:
        """The count that never goes back, of one that does; `key` says which."""
        if raw is None:
            return None
        known = self.counts.get(key)
        if known is None:
            known = self.counts[key] = Rising(raw)
        return known.take(raw)

    def listen(self) -> None:
        """XID errors will be heard of from now on."""
        for code in KNOWN_XIDS:
            self.xids.setdefault(code, (0, None))

    def hear(self, code: int, at: float) -> None:
        """An XID error came, `at` seconds since the epoch."""
        if code not in self.xids and len(self.xids) >= MAX_XIDS:
            code = 0
        self.xids[code] = (self.xids.get(code, (0, None))[0] + 1, at)

    def xid_counts(self) -> tuple[XidCount, ...]:
        """For a report."""
        return tuple(XidCount(code, count, at) for code, (count, at) in sorted(self.xids.items()))


class GpmSampler:
    """Keeps the two samples of which GPM makes ratios, of a GPU or of a GPU instance.

    `take` fills a sample.
    """

    def __init__(self, take: Callable[[Any], object]) -> None:
        self._take: Final = take
        self._samples: list[Any] = []
        self._taken_ns: int | None = None
        self._last = GpuActivity()

    def activity(self, calls: Calls, what: str, now_ns: int) -> GpuActivity:
        """What happened since the call before; nothing at the first one."""
        if self._taken_ns is not None and now_ns - self._taken_ns < _GPM_MIN_NS:
            return self._last
        while len(self._samples) < 2:
            sample = calls.ask(what, pynvml.nvmlGpmSampleAlloc)
            if sample is None:
                return GpuActivity()
            self._samples.append(sample)
        if calls.ask(what, self._take, self._samples[1]) is None:
            # The older sample is still good, for a longer time.
            return GpuActivity()
        had_one = self._taken_ns is not None
        self._taken_ns = now_ns
        self._samples.reverse()
        self._last = self._ratios(calls, what) if had_one else GpuActivity()
        return self._last

    def _ratios(self, calls: Calls, what: str) -> GpuActivity:
        newer, older = self._samples
        asked = pynvml.c_nvmlGpmMetricsGet_t()
        asked.version = pynvml.NVML_GPM_METRICS_GET_VERSION
        asked.numMetrics = len(_GPM)
        asked.sample1 = older
        asked.sample2 = newer
        for metric, number in zip(asked.metrics, _GPM, strict=False):
            metric.metricId = number
        if calls.ask(what, pynvml.nvmlGpmMetricsGet, asked) is None:
            return GpuActivity()
        told = list(asked.metrics[: len(_GPM)])
        return GpuActivity(*(_gpm_ratio(m.value) if m.nvmlReturn == 0 else None for m in told))

    def close(self) -> None:
        """Give the samples back."""
        for sample in self._samples:
            with contextlib.suppress(*FAULTS):
                pynvml.nvmlGpmSampleFree(sample)
        self._samples = []
        self._taken_ns = None


class OpenGpu:
    """One GPU while the library is open. `wall` is seconds since the epoch, `clock` CLOCK_MONOTONIC in nanoseconds."""

    def __init__(
        self,
        handle: Untyped,
        index: int,
        uuid: str,
        name: str,
        history: History,
        calls: Calls,
        clock: Callable[[], int],
        wall: Callable[[], float],
    ) -> None:
        self.handle: Final = handle
        self.index: Final = index
        self.uuid: Final = uuid
        self.name: Final = name
        self.history: Final = history
        self.calls: Final = calls
        self._clock: Final = clock
        self._wall: Final = wall
        self._reasons: Sequence[tuple[str, int]] | None = None
        self._gpm: dict[str, GpmSampler] = {}
        self._gpm_supported: bool | None = None

    @property
    def address(self) -> int | None:
        """By which events name it."""
        return address_of(self.handle)

    def close(self) -> None:
        """Give back what it holds of the library."""
        for sampler in self._gpm.values():
            sampler.close()
        self._gpm = {}

    def read(self, deadline_ns: int, processes: list[GpuProcess]) -> Gpu:
        """Everything it tells until `deadline_ns`; what processes use is appended. Raises `DriverGone`."""
        self.calls.begin(deadline_ns)
        try:
            self._check_that_it_is_there()
            gpu = self._read(processes)
        finally:
            self.calls.end()
        lost = self.calls.lost
        if lost is not None:
            return self.absent(words(lost), next_step(lost))
        return gpu

    def absent(self, problem: str, step: str) -> Gpu:
        """What is known of it without asking: errors it had are worth the more when it is lost."""
        return Gpu(self.uuid, self.index, self.name, problem, step, xids=self.history.xid_counts())

    # A handle of a GPU that was taken out is answered INVALID_ARGUMENT, which of a field means that it is not known.
    def _check_that_it_is_there(self) -> None:
        if not self.calls.may_ask():
            return
        try:
            pynvml.nvmlDeviceGetUUID(self.handle)
        except FAULTS as error:
            self.calls.failed("nvmlDeviceGetUUID", error, aside=True)
            self.calls.lost = error

    def _read(self, processes: list[GpuProcess]) -> Gpu:
        handle, history = self.handle, self.history
        rates = self._get("UtilizationRates", handle)
        rows = self._get("RemappedRows", handle) or (None,) * 4
        corrected, uncorrected, pending, failure = (_u32(value) for value in rows)
        fields = self._fields(_ALWAYS)
        mig = self._instances(processes)
        if not mig:
            self._processes(processes)
        return Gpu(
            self.uuid,
            self.index,
            self.name,
            utilization=None if rates is None else _percent(rates.gpu),
            memory_utilization=None if rates is None else _percent(rates.memory),
            memory=self._memory(handle),
            power_watts=_scaled(_u32(self._get("PowerUsage", handle)), 1000),
            power_limit_watts=_scaled(_u32(self._get("EnforcedPowerLimit", handle)), 1000),
            energy_joules=_scaled(history.count(("energy",), _u64(self._get("TotalEnergyConsumption", handle))), 1000),
            temperatures=_told(("gpu", self._gpu_temperature()), ("memory", _celsius(fields.get(_MEMORY_TEMPERATURE)))),
            clocks=tuple(self._clocks()),
            throttled=tuple(self._throttled()),
            throttled_seconds=tuple(self._throttled_seconds()),
            ecc_errors=tuple(self._ecc_errors()),
            remapped_rows=_told(("correctable", corrected), ("uncorrectable", uncorrected)),
            row_remap_pending=None if pending is None else bool(pending),
            row_remap_failure=None if failure is None else bool(failure),
            pcie_replays=history.count(("pcie_replays",), _u32(self._get("PcieReplayCounter", handle))),
            pcie_bytes=_told(*((way, history.count(("pcie", way), fields.get(place))) for way, place in _PCIE)),
            nvlink_bytes=self._nvlink(fields),
            activity=self._activity(handle, mig),
            xids=history.xid_counts(),
            mig=mig,
            **self._state(),
        )

    def _state(self) -> dict[str, Any]:
        told = {"not_told": self.calls.not_told}
        if not self.calls.late:
            return told
        step = "see what nvidia-smi takes; where it is quick, raise gpu: period"
        return {**told, "problem": "the driver answers too slowly: not everything was asked", "next_step": step}

    def _get(self, what: str, *arguments: object, aside: bool = False) -> Untyped:
        """What nvmlDeviceGet`what` returns; None where the driver, or this pynvml, does not tell."""
        name = f"nvmlDeviceGet{what}"
        call = getattr(pynvml, name, None)
        if call is None:
            return None
        key = ":".join([name, *(str(argument) for argument in arguments[1:])])
        return self.calls.ask(key, call, *arguments, aside=aside)

    def _memory(self, handle: Untyped, who: str = "") -> GpuMemory | None:
        key = f"nvmlDeviceGetMemoryInfo_v2{who}"
        told = self.calls.ask(key, pynvml.nvmlDeviceGetMemoryInfo, handle, pynvml.nvmlMemory_v2)
        return None if told is None else GpuMemory(_u64(told.total), _u64(told.used), _u64(told.reserved))

    def _gpu_temperature(self) -> float | None:
        sensor = pynvml.NVML_TEMPERATURE_GPU
        told = self._get("TemperatureV", self.handle, sensor, aside=True)
        return _celsius(self._get("Temperature", self.handle, sensor) if told is None else told)

    def _clocks(self) -> Iterator[tuple[str, int]]:
        for domain, number in _DOMAINS:
            megahertz = _u32(self._get("ClockInfo", self.handle, number))
            if megahertz is not None:
                yield domain, megahertz * 1_000_000

    def _throttled(self) -> Iterator[tuple[str, bool]]:
        now = _u64(self._first("CurrentClocksEventReasons", "CurrentClocksThrottleReasons"))
        if now is None:
            return
        if self._reasons is None:
            known = self._first("SupportedClocksEventReasons", "SupportedClocksThrottleReasons")
            self._reasons = [(reason, bit) for reason, bit in _REASONS if known is None or known & bit]
        for reason, bit in self._reasons:
            yield reason, bool(now & bit)

    # Drivers of today have the first name of a call, older ones the second one.
    def _first(self, name: str, old_name: str) -> Untyped:
        told = self._get(name, self.handle, aside=True)
        return self._get(old_name, self.handle) if told is None else told

    def _throttled_seconds(self) -> Iterator[tuple[str, float]]:
        for reason, policy in _POLICIES:
            told = self._get("ViolationStatus", self.handle, policy)
            if told is not None:
                ns = self.history.count(("throttled", reason), _u64(told.violationTime))
                if ns is not None:
                    yield reason, ns / 1e9

    def _ecc_errors(self) -> Iterator[tuple[str, str, int]]:
        for severity, kind in _ECC_SEVERITIES:
            for counter, number in _ECC_COUNTERS:
                told = _u64(self._get("TotalEccErrors", self.handle, kind, number))
                count = self.history.count(("ecc", severity, counter), told)
                if count is not None:
                    yield severity, counter, count

    def _fields(self, places: Sequence[Place], aside: bool = False) -> dict[Place, int]:
        """What nvmlDeviceGetFieldValues tells of fields; those that count must be 64 bits wide, lest they wrap."""
        wanted = [place for place in places if not self.calls.is_refused(_field_name(place))]
        if not wanted:
            return {}
        call = pynvml.nvmlDeviceGetFieldValues
        told = self.calls.ask("nvmlDeviceGetFieldValues", call, self.handle, wanted, counts=False)
        values = {}
        for place, value in zip(wanted, told or (), strict=False):
            if value.nvmlReturn != pynvml.NVML_SUCCESS:
                self.calls.failed(_field_name(place), pynvml.NVMLError(value.nvmlReturn), aside)
                continue
            self.calls.answered()
            number = _field_value(value, wide=place != _MEMORY_TEMPERATURE)
            if number is not None:
                values[place] = number
        return values

    def _nvlink(self, fields: dict[Place, int]) -> tuple[tuple[str, int], ...]:
        count = self.history.count
        totals = {way: count(("nvlink", way), fields.get(place)) for way, place in _NVLINK_KIB}
        if any(total is not None for total in totals.values()):
            return tuple((way, total * 1024) for way, total in totals.items() if total is not None)
        if not all(self.calls.is_refused(_field_name(place)) for _, place in _NVLINK_KIB):
            return ()
        links = self._fields(_PER_LINK, aside=True)
        sums: dict[str, int] = {}
        for way, number in _NVLINK_PER_LINK:
            for link in range(MAX_LINKS):
                count(("link", way, link), links.get((number, link)))
            # All links that were ever told of: one that is silent now must not take its bytes away.
            known = [rising.total for key, rising in self.history.counts.items() if key[:2] == ("link", way)]
            if known and any((number, link) in links for link in range(MAX_LINKS)):
                sums[way] = sum(known)
        return tuple(sums.items())

    def _activity(self, handle: Untyped, mig: Sequence[MigInstance]) -> GpuActivity:
        # With instances, each one has its own.
        if mig or not self._has_gpm():
            return GpuActivity()
        sampler = self._gpm.setdefault("", GpmSampler(lambda sample: pynvml.nvmlGpmSampleGet(handle, sample)))
        return sampler.activity(self.calls, "GPM", self._clock())

    def _has_gpm(self) -> bool:
        if self._gpm_supported is None:
            told = self.calls.ask("nvmlGpmQueryDeviceSupport", pynvml.nvmlGpmQueryDeviceSupport, self.handle)
            if told is None:
                return False
            self._gpm_supported = bool(told.isSupportedDevice)
        return self._gpm_supported

    def _instances(self, processes: list[GpuProcess]) -> tuple[MigInstance, ...]:
        mode = self._get("MigMode", self.handle, aside=True)
        if mode is None or mode[0] != pynvml.NVML_DEVICE_MIG_ENABLE:
            return ()
        most = _u32(self._get("MaxMigDeviceCount", self.handle))
        instances = [self._instance(index, processes) for index in range(min(most or 0, MAX_MIG))]
        found = tuple(instance for instance in instances if instance is not None)
        for gone in self._gpm.keys() - {instance.uuid for instance in found}:
            self._gpm.pop(gone).close()
        return found

    def _instance(self, index: int, processes: list[GpuProcess]) -> MigInstance | None:
        calls = self.calls
        # Places without an instance say NOT_FOUND, now; later there may be one.
        handle = calls.ask_maybe(pynvml.nvmlDeviceGetMigDeviceHandleByIndex, self.handle, index)
        uuid = None if handle is None else calls.ask_maybe(pynvml.nvmlDeviceGetUUID, handle)
        if uuid is None:
            return None
        name = calls.ask_maybe(pynvml.nvmlDeviceGetName, handle) or ""
        who = f" of {uuid}"
        self._running(handle, uuid, processes, {}, who)
        return MigInstance(
            uuid,
            index,
            name,
            self._profile(handle, name),
            self._memory(handle, who),
            self._instance_activity(handle, uuid),
        )

    # Drivers put the profile at the end of the name: "NVIDIA A100-SXM4-40GB MIG 1g.5gb".
    def _profile(self, handle: Untyped, name: str) -> str:
        _, found, profile = name.rpartition(" MIG ")
        if found:
            return profile
        told = self.calls.ask_maybe(pynvml.nvmlDeviceGetAttributes, handle)
        if told is None:
            return ""
        whole = f"{told.gpuInstanceSliceCount}g.{round(told.memorySizeMB / 1024)}gb"
        part = told.computeInstanceSliceCount
        return whole if part == told.gpuInstanceSliceCount else f"{part}c.{whole}"

    def _instance_activity(self, handle: Untyped, uuid: str) -> GpuActivity:
        number = _u32(self.calls.ask_maybe(pynvml.nvmlDeviceGetGpuInstanceId, handle))
        if number is None or not self._has_gpm():
            return GpuActivity()
        if uuid not in self._gpm:
            parent = self.handle
            self._gpm[uuid] = GpmSampler(lambda sample: pynvml.nvmlGpmMigSampleGet(parent, number, sample))
        return self._gpm[uuid].activity(self.calls, f"GPM of {uuid}", self._clock())

    def _processes(self, processes: list[GpuProcess]) -> None:
        self._running(self.handle, self.uuid, processes, self._sm_use())

    def _running(
        self, handle: Untyped, uuid: str, processes: list[GpuProcess], sm_use: dict[int, float], who: str = ""
    ) -> None:
        """Append all processes that `handle` knows of; one of a few kinds may be in two of its lists."""
        memory: dict[int, int | None] = {}
        for kind in ("Compute", "MPSCompute"):
            name = f"nvmlDeviceGet{kind}RunningProcesses_v3"
            told = self.calls.ask(f"{name}{who}", getattr(pynvml, name), handle, aside=kind != "Compute")
            for process in (told or ())[:MAX_PROCESSES]:
                used, known = _u64(process.usedGpuMemory), memory.get(process.pid)
                memory[process.pid] = used if known is None else max(known, used or 0)
        for tgid in {**memory, **sm_use}:
            processes.append(GpuProcess(tgid, uuid, memory.get(tgid), sm_use.get(tgid)))

    def _sm_use(self) -> dict[int, float]:
        """The mean of each process's samples since the last look. Idle ones have none, and an idle GPU NOT_FOUND."""
        now_us = int(self._wall() * 1e6)
        # A clock that was set back must not hide all samples until it is there again.
        since = min(now_us - 1_000_000 if self.history.seen_us is None else self.history.seen_us, now_us)
        told = self.calls.ask_samples("nvmlDeviceGetProcessUtilization", self.handle, since) or ()
        use: dict[int, list[float]] = {}
        for sample in told[:MAX_PROCESSES]:
            if sample.timeStamp <= since:
                continue
            self.history.seen_us = max(self.history.seen_us or 0, sample.timeStamp)
            ratio = _percent(sample.smUtil)
            if ratio is not None and sample.pid:
                use.setdefault(sample.pid, []).append(ratio)
        return {tgid: sum(ratios) / len(ratios) for tgid, ratios in use.items()}


def address_of(handle: Untyped) -> int | None:
    """The library's own name for a device."""
    return ctypes.cast(handle, ctypes.c_void_p).value


def _field_name(place: Place) -> str:
    number, scope = place
    return _FIELD_NAMES.get(place, f"field {number} of link {scope}")


def _field_value(value: Untyped, wide: bool) -> int | None:
    if value.valueType >= len(_MEMBERS):
        return None
    member = _MEMBERS[value.valueType]
    if wide and member not in _WIDE:
        return None
    number = getattr(value.value, member)
    if member == "dVal" and not math.isfinite(number):
        return None
    number = int(number)
    return None if number < 0 and wide else _u64(_u32(number) if member == "uiVal" else number)


def _u32(value: int | None) -> int | None:
    return None if value is None or value == _U32 else int(value)


def _u64(value: int | None) -> int | None:
    return None if value is None or value == _U64 else int(value)


def _percent(value: int | None) -> float | None:
    return value / 100 if value is not None and value <= 100 else None


def _gpm_ratio(percent: float) -> float | None:
    # Two counters that are not read at the same instant: a little over is noise, much over is nonsense.
    return min(percent / 100, 1.0) if math.isfinite(percent) and 0 <= percent <= 105 else None


def _celsius(value: int | None) -> float | None:
    return float(value) if value is not None and -100 < value < 300 else None


def _scaled(value: int | None, per_unit: int) -> float | None:
    return None if value is None else value / per_unit


def _told(*pairs: tuple[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple((name, value) for name, value in pairs if value is not None)
