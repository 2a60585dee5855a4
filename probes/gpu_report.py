"""What the GPUs of the host said when they were asked last. None, or no entry, is what nobody told."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class GpuMemory:
    """Memory of a GPU or of an instance, in bytes. `used` is without what the driver keeps for itself, `reserved`."""

    total: int | None
    used: int | None
    reserved: int | None


@dataclass(frozen=True, slots=True)
class GpuActivity:
    """What GPM measured between the last two looks: parts of that time, or of what was possible in it, from 0 to 1."""

    sm_active: float | None = None
    sm_occupancy: float | None = None
    tensor_active: float | None = None
    dram_active: float | None = None


@dataclass(frozen=True, slots=True)
class MigInstance:
    """A MIG device. `activity` is that of its whole GPU instance, which compute instances share."""

    uuid: str
    index: int
    name: str
    profile: str
    memory: GpuMemory | None = None
    activity: GpuActivity = GpuActivity()


@dataclass(frozen=True, slots=True)
class XidCount:
    """How often an XID error came since the agent began to listen, and when last, in seconds since the epoch.

    `code` is 0 for all codes that there was no room for.
    """

    code: int
    count: int
    last_time: float | None


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU.

    `problem` says why nothing or not everything is known of it, and `next_step` what to try; None and empty where all
    is well. `not_told` names the calls that this GPU and its driver do not answer.

    Ratios are from 0 to 1, clocks in hertz by domain, temperatures in degrees Celsius by sensor. `throttled` has each
    reason that holds the clocks back, and whether it does now; idling and clocks that somebody set are none.
    `throttled_seconds`, `energy_joules` and the bytes begin at the driver's own count and never go back: what the
    driver forgets when it is loaded again, or when the GPU is reset, stays in. `ecc_errors` are by severity and
    counter, `remapped_rows` by cause.
    """

    uuid: str
    index: int
    name: str
    problem: str | None = None
    next_step: str = ""
    not_told: tuple[str, ...] = ()
    utilization: float | None = None
    memory_utilization: float | None = None
    memory: GpuMemory | None = None
    power_watts: float | None = None
    power_limit_watts: float | None = None
    energy_joules: float | None = None
    temperatures: tuple[tuple[str, float], ...] = ()
    clocks: tuple[tuple[str, int], ...] = ()
    throttled: tuple[tuple[str, bool], ...] = ()
    throttled_seconds: tuple[tuple[str, float], ...] = ()
    ecc_errors: tuple[tuple[str, str, int], ...] = ()
    remapped_rows: tuple[tuple[str, int], ...] = ()
    row_remap_pending: bool | None = None
    row_remap_failure: bool | None = None
    pcie_replays: int | None = None
    pcie_bytes: tuple[tuple[str, int], ...] = ()
    nvlink_bytes: tuple[tuple[str, int], ...] = ()
    activity: GpuActivity = GpuActivity()
    xids: tuple[XidCount, ...] = ()
    mig: tuple[MigInstance, ...] = ()


@dataclass(frozen=True, slots=True)
class GpuProcess:
    """What one process has of one GPU or MIG device, `uuid`. `tgid` is the host's.

    `sm_utilization` is the part of the time since the last look in which the process ran on the GPU.
    """

    tgid: int
    uuid: str
    memory_bytes: int | None
    sm_utilization: float | None


@dataclass(frozen=True, slots=True)
class GpuReport:
    """What one look found, at `at_ns` of CLOCK_MONOTONIC; `seconds` is what it took.

    `present` says whether there is an NVIDIA driver's library here at all, and `library` which one was loaded.
    `problem` says why no GPU, or not every one, can be read, and `next_step` what to try; None and empty where all is
    well. `failures` counts calls that failed since the source was made, by the error; not those that a GPU does not
    support.
    """

    at_ns: int
    seconds: float
    present: bool
    library: str | None = None
    driver_version: str | None = None
    problem: str | None = None
    next_step: str = ""
    gpus: tuple[Gpu, ...] = ()
    processes: tuple[GpuProcess, ...] = ()
    failures: tuple[tuple[str, int], ...] = ()
