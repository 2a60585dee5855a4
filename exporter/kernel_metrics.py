"""The kernel_* families: what the probes count in the kernel for each service, and what processes use."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Final, SupportsInt

from exporter.families import Family, Kind, Point, Scrape, Spec
from exporter.labels import safe
from exporter.slis import Histogram

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from exporter.status import ServiceProcesses

BUCKETS: Final = 28
"""HISTOGRAM_BUCKETS of bpf/service_stats.bpf.h, the one without a bound included; a test holds the two together."""
BOUNDS: Final = tuple(2**power / 1e6 for power in range(BUCKETS - 1))
"""Upper bounds of the histograms that are kept in the kernel, in seconds."""
OFF_CPU_REASONS: Final = (
    *("run_queue", "futex", "poll", "socket", "pipe", "disk"),
    *("page_fault", "timer", "device", "stopped", "other"),
)
"""`enum wait_reason` of bpf/records.h by value. Preempted threads do not sleep: the first one is never exported."""
OPERATIONS: Final = ("read", "write", "flush", "discard")
"""`enum block_operation` of bpf/records.h by value."""

_SERVICE: Final = ("service_name",)


def _rows(scrape: Scrape, probe: str, member: str) -> Iterator[tuple[str, NDArray[np.void]]]:
    """Each service's name and counters of a probe; nothing where it is not up, or does not measure `member` here."""
    counters = scrape.kernel.get(probe)
    if counters is not None and member in (counters.dtype.names or ()):
        yield from ((name, row) for name, row in zip(scrape.services, counters, strict=True) if name)


def histogram_of(sum_ns: SupportsInt, counts: Iterable[SupportsInt]) -> Histogram:
    """A `struct histogram` of the kernel as the exporter's own."""
    made = Histogram(())
    made.sum_ns = int(sum_ns)
    made.counts = [int(count) for count in counts]
    return made


def _histogram(name: str, probe: str, member: str, text: str) -> Family:
    def points(scrape: Scrape) -> Iterator[Point]:
        for service, row in _rows(scrape, probe, member):
            yield (service,), histogram_of(row[member]["sum_ns"], row[member]["counts"])

    return Family(Spec(name, Kind.HISTOGRAM, text, _SERVICE, "seconds", BOUNDS), points)


def _seconds(name: str, probe: str, member: str, text: str) -> Family:
    def points(scrape: Scrape) -> Iterator[Point]:
        for service, row in _rows(scrape, probe, member):
            yield (service,), int(row[member]) / 1e9

    return Family(Spec(name, Kind.COUNTER, text, _SERVICE, "seconds"), points)


def _count(name: str, probe: str, member: str, text: str) -> Family:
    def points(scrape: Scrape) -> Iterator[Point]:
        for service, row in _rows(scrape, probe, member):
            yield (service,), int(row[member])

    return Family(Spec(name, Kind.COUNTER, text, _SERVICE), points)


def _off_cpu(scrape: Scrape) -> Iterator[Point]:
    for service, row in _rows(scrape, "scheduler", "off_cpu_ns"):
        for reason, ns in list(zip(OFF_CPU_REASONS, row["off_cpu_ns"], strict=True))[1:]:
            yield (service, reason), int(ns) / 1e9


def _gpu_waits(scrape: Scrape) -> Iterator[Point]:
    if scrape.status and scrape.status.gpu_devices:
        for service, row in _rows(scrape, "scheduler", "gpu_wait"):
            yield (service,), histogram_of(row["gpu_wait"]["sum_ns"], row["gpu_wait"]["counts"])


def _resets(scrape: Scrape) -> Iterator[Point]:
    for service, row in _rows(scrape, "tcp", "resets_sent"):
        yield (service, "sent"), int(row["resets_sent"])
        yield (service, "received"), int(row["resets_received"])


def _block_latency(scrape: Scrape) -> Iterator[Point]:
    for service, row in _rows(scrape, "block", "io"):
        for operation, histogram in zip(OPERATIONS, row["io"], strict=True):
            yield (service, operation), histogram_of(histogram["sum_ns"], histogram["counts"])


def _block_bytes(scrape: Scrape) -> Iterator[Point]:
    for service, row in _rows(scrape, "block", "bytes"):
        for operation, count in zip(OPERATIONS, row["bytes"], strict=True):
            yield (service, operation), int(count)


def _syscalls(scrape: Scrape) -> Iterator[Point]:
    for latency in scrape.status.syscalls if scrape.status else ():
        yield (safe(latency.service), latency.syscall), histogram_of(latency.sum_ns, latency.counts)


def _process(
    name: str, text: str, get: Callable[[ServiceProcesses], float | None], unit: str = "", kind: Kind = Kind.GAUGE
) -> Family:
    def points(scrape: Scrape) -> Iterator[Point]:
        for service in scrape.status.services if scrape.status else ():
            value = get(service)
            if value is not None:
                yield (safe(service.service),), value

    return Family(Spec(name, kind, text, _SERVICE, unit), points)


def kernel_families() -> Sequence[Family]:
    """All of them, in the order of the page."""
    return [
        _histogram(
            "kernel_run_queue_wait_seconds",
            "scheduler",
            "run_queue_wait",
            "From the instant a thread could run until it did; without its CPU quota's throttling.",
        ),
        _seconds("kernel_on_cpu_seconds", "scheduler", "on_cpu_ns", "Time that threads ran."),
        Family(
            Spec(
                "kernel_off_cpu_seconds",
                Kind.COUNTER,
                "Time that threads slept, by what they slept on.",
                (*_SERVICE, "reason"),
                "seconds",
            ),
            _off_cpu,
        ),
        _seconds(
            "kernel_cpu_quota_seconds",
            "scheduler",
            "cpu_quota_ns",
            "Time that threads could run but had used up the CPU quota of their cgroup.",
        ),
        Family(
            Spec(
                "kernel_gpu_wait_seconds",
                Kind.HISTOGRAM,
                "Sleeps in ioctl, read or poll on a GPU's device files; absent where the host has none. A thread that "
                "asks the GPU in a loop runs, and is not seen.",
                _SERVICE,
                "seconds",
                BOUNDS,
            ),
            _gpu_waits,
        ),
        _count("kernel_cpu_migrations", "scheduler", "migrations", "Times that a thread went on on another CPU."),
        _count("kernel_context_switches", "scheduler", "switches", "Times that a thread left its CPU."),
        _histogram(
            "kernel_tcp_connect_seconds", "tcp", "connect", "Time to open a connection that the service asked for."
        ),
        _histogram(
            "kernel_tcp_round_trip_seconds", "tcp", "round_trip", "Smoothed round-trip time of connections, sampled."
        ),
        _histogram(
            "kernel_tcp_receive_queue_seconds",
            "tcp",
            "receive_queue",
            "From the arrival of the first unread segment until the service read it.",
        ),
        _histogram(
            "kernel_tcp_send_stall_seconds",
            "tcp",
            "send_stall",
            "From a send that found no room in the buffer until the next one that did.",
        ),
        _count("kernel_tcp_retransmits", "tcp", "retransmits", "Packets that were sent again."),
        Family(
            Spec("kernel_tcp_resets", Kind.COUNTER, "Connections reset, by who did it.", (*_SERVICE, "direction")),
            _resets,
        ),
        Family(
            Spec(
                "kernel_block_io_seconds",
                Kind.HISTOGRAM,
                "Time that a device took for an I/O of the service, from issue to completion.",
                (*_SERVICE, "operation"),
                "seconds",
                BOUNDS,
            ),
            _block_latency,
        ),
        Family(
            Spec(
                "kernel_block_io_bytes",
                Kind.COUNTER,
                "Bytes of the service's I/O that devices completed.",
                (*_SERVICE, "operation"),
                "bytes",
            ),
            _block_bytes,
        ),
        _histogram(
            "kernel_direct_reclaim_seconds",
            "memory",
            "direct_reclaim",
            "Time in which a thread freed memory itself, because the host or its cgroup had none left.",
        ),
        _count("kernel_oom_kills", "memory", "oom_kills", "Processes killed because memory ran out."),
        Family(
            Spec(
                "kernel_syscall_seconds",
                Kind.HISTOGRAM,
                "Time in system calls, waiting included. Only with the syscalls probe, which is off by default.",
                (*_SERVICE, "syscall"),
                "seconds",
                BOUNDS,
            ),
            _syscalls,
        ),
        _process("kernel_open_files", "Open file descriptors of the service's processes.", lambda s: s.open_files),
        _process(
            "kernel_open_files_growth_per_second",
            "Descriptors per second that processes opened and did not close, over the last minute.",
            lambda s: s.open_files_growth,
        ),
        _process("kernel_threads", "Threads of the service's processes.", lambda s: s.threads),
        _process(
            "kernel_resident_memory_bytes",
            "Resident memory of the service's processes.",
            lambda s: s.resident_bytes,
            "bytes",
        ),
        _process(
            "kernel_major_page_faults",
            "Page faults of the service's processes that waited for a disk.",
            lambda s: s.major_faults,
            kind=Kind.COUNTER,
        ),
    ]
