"""What the two processes of the agent say of themselves, as it crosses between them and into /metrics."""

from __future__ import annotations

from dataclasses import dataclass

# The attacher reports every second. Ten reports missed in a row is no jitter.
STALE_NS = 10_000_000_000


@dataclass(frozen=True, slots=True)
class Loss:
    """`count` things lost for one reason since the agent started. Known reasons are reported at zero too."""

    reason: str
    count: int


@dataclass(frozen=True, slots=True)
class ProbeStatus:
    """One wanted probe.

    `events` counts the records that were due, delivered or lost. `cpu_ns` and `runs` are the kernel's BPF run-time
    statistics over all programs of the probe; None where the kernel does not keep them.
    `reason` says why the probe is not up; empty when it is. Without one that is not `required` the agent is ready.
    """

    name: str
    up: bool
    reason: str
    events: int
    cpu_ns: int | None
    runs: int | None
    losses: tuple[Loss, ...]
    required: bool = True


@dataclass(frozen=True, slots=True)
class TargetStatus:
    """One configured service: how many processes of it are followed, and on how many ports they listen.

    `tgids` are those processes, and `own_ports` the ports in the agent's own network namespace, as far as a report has
    room for them.
    """

    service: str
    processes: int
    ports: int
    tgids: tuple[int, ...] = ()
    own_ports: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class ServiceProcesses:
    """What the processes of one service use; None is what could not be read, or not for a minute yet."""

    service: str
    open_files: int | None
    open_files_growth: float | None
    threads: int
    resident_bytes: int
    major_faults: int


@dataclass(frozen=True, slots=True)
class Vitals:
    """What the processes of one service use, looked at every second. The fields are `probes.vitals.ServiceVitals`."""

    service: str
    cpu_seconds: float
    resident_bytes: int
    open_files: int | None
    eldest: int


@dataclass(frozen=True, slots=True)
class LeakTarget:
    """What `count` descriptors of a process lead to."""

    kind: str
    name: str
    count: int


@dataclass(frozen=True, slots=True)
class DescriptorLeak:
    """A process that opened more descriptors than it closed, `per_second`, for ten seconds, and what it had open then.

    `at_ns` is CLOCK_MONOTONIC. `kinds` and `targets` are of the `examined` ones, as `probes.descriptors.Snapshot` has
    them.
    """

    service: str
    tgid: int
    at_ns: int
    per_second: float
    open_files: int
    examined: int
    kinds: tuple[tuple[str, int], ...]
    targets: tuple[LeakTarget, ...]


@dataclass(frozen=True, slots=True)
class SyscallLatency:
    """How long one system call of a service took: a `struct histogram` of the kernel."""

    service: str
    syscall: str
    sum_ns: int
    counts: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ProcessUsage:
    """One process of the agent. `role` is `attacher` or `reader`.

    `proportional_bytes` is PSS: pages that both processes share count half. None where it cannot be read.
    """

    role: str
    pid: int
    cpu_seconds: float
    resident_bytes: int
    proportional_bytes: int | None


@dataclass(frozen=True, slots=True)
class ReloadStatus:
    """How often the configuration was read again, how that went last, and when it went well last (since the epoch).

    `problem` says why the old one stayed; empty where it did not.
    """

    attempts: int
    successful: bool
    successful_at: float
    problem: str


@dataclass(frozen=True, slots=True)
class AgentStatus:
    """What the attacher reports. It crosses as JSON: msgspec encodes it, and checks every type when it decodes it.

    `at_ns` is CLOCK_MONOTONIC when it was made. `transport` is `ring` or `perf`. `gpu_devices` are the device files in
    which a wait is one for a GPU; None where nobody looked. `leaks` are the last ones, told more than once: a packet
    may be left out.
    """

    at_ns: int
    transport: str
    probes: tuple[ProbeStatus, ...]
    targets: tuple[TargetStatus, ...]
    reader_restarts: int
    processes: tuple[ProcessUsage, ...]
    services: tuple[ServiceProcesses, ...] = ()
    syscalls: tuple[SyscallLatency, ...] = ()
    gpu_devices: int | None = None
    reload: ReloadStatus | None = None
    vitals: tuple[Vitals, ...] = ()
    leaks: tuple[DescriptorLeak, ...] = ()


@dataclass(frozen=True, slots=True)
class ProbeLosses:
    """What the reader lost of one probe's records. Reasons may be others than the kernel's; the same reasons add up."""

    probe: str
    losses: tuple[Loss, ...]


@dataclass(frozen=True, slots=True)
class ReaderStatus:
    """What the reader knows of itself. `connections` are those it holds state for now.

    `paths` are windows of requests whose critical path was walked, which took `path_cpu_ns` of its CPU time; None
    where nobody walks any.
    """

    connections: int
    losses: tuple[ProbeLosses, ...] = ()
    paths: int | None = None
    path_cpu_ns: int | None = None


def why_not_ready(status: AgentStatus | None, now_ns: int) -> str | None:
    """One sentence that says why the agent does not measure everything it was asked to; None when it does.

    `now_ns` is CLOCK_MONOTONIC.
    """
    if status is None:
        return "the attacher has not reported yet"
    age_ns = now_ns - status.at_ns
    if age_ns > STALE_NS:
        return f"the attacher has not reported for {age_ns / 1e9:.0f} s"
    if not status.probes:
        return "no probe is wanted"
    down = [f"{each.name}: {each.reason or 'not attached'}" for each in status.probes if each.required and not each.up]
    if down:
        return "not attached: " + "; ".join(down)
    return None


class CpuMeter:
    """CPU of the agent between two reports of the attacher."""

    def __init__(self) -> None:
        self._before: AgentStatus | None = None
        self._cpu: float | None = None

    def measure(self, status: AgentStatus | None) -> float | None:
        """CPUs that the agent's processes use, from the last two measurements; None before there are two."""
        before = self._before
        # The attacher measures its processes less often than it reports: only a new measurement counts.
        if status is None or (before is not None and status.processes == before.processes):
            return self._cpu
        if before is not None and _pids(before) == _pids(status):
            self._cpu = max(0.0, (_cpu_seconds(status) - _cpu_seconds(before)) / ((status.at_ns - before.at_ns) / 1e9))
        self._before = status
        return self._cpu


def _pids(status: AgentStatus) -> set[int]:
    return {usage.pid for usage in status.processes}


def _cpu_seconds(status: AgentStatus) -> float:
    return sum(usage.cpu_seconds for usage in status.processes)
