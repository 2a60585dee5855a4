"""The gpu_cuda_* families: what services ask the CUDA driver to do. There is nothing while the probe is off."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from exporter.families import Family, Kind, Point, Scrape, Spec
from exporter.kernel_metrics import BOUNDS, histogram_of

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

LAUNCHES: Final = ("kernel", "graph")
"""By index in `launches` of struct cuda_stats (bpf/cuda.bpf.c)."""
DIRECTIONS: Final = ("unknown", "host_to_device", "device_to_host", "device_to_device")
"""By index in `copies` and `copied_bytes`. The driver finds the direction of an unknown one from its addresses."""
WAITS: Final = ("context", "stream", "event", "copy")
"""By index in `waits`: what the host waited for. A copy is one that is not asynchronous."""
ERRORS: Final = {
    "synchronize": "wait_errors",
    "copy": "copy_errors",
    "allocate": "allocation_errors",
    "free": "free_errors",
}
"""What failed, and its member of struct cuda_stats."""

_SERVICE: Final = ("service_name",)


def _rows(scrape: Scrape) -> Iterator[tuple[str, NDArray[np.void]]]:
    counters = scrape.kernel.get("cuda")
    if counters is not None:
        yield from ((name, row) for name, row in zip(scrape.services, counters, strict=True) if name)


def _launches(scrape: Scrape) -> Iterator[Point]:
    for service, row in _rows(scrape):
        for kind, count in zip(LAUNCHES, row["launches"], strict=True):
            yield (service, kind), int(count)


def _waits(scrape: Scrape) -> Iterator[Point]:
    for service, row in _rows(scrape):
        for call, histogram in zip(WAITS, row["waits"], strict=True):
            yield (service, call), histogram_of(histogram["sum_ns"], histogram["counts"])


def _copies(scrape: Scrape) -> Iterator[Point]:
    for service, row in _rows(scrape):
        for direction, count in zip(DIRECTIONS, row["copies"], strict=True):
            yield (service, direction), int(count)


def _copied_bytes(scrape: Scrape) -> Iterator[Point]:
    for service, row in _rows(scrape):
        for direction, count in zip(DIRECTIONS, row["copied_bytes"], strict=True):
            yield (service, direction), int(count)


def _allocations(scrape: Scrape) -> Iterator[Point]:
    for service, row in _rows(scrape):
        yield (service,), int(row["allocations"])


def _frees(scrape: Scrape) -> Iterator[Point]:
    for service, row in _rows(scrape):
        yield (service,), int(row["frees"])


def _outstanding(scrape: Scrape) -> Iterator[Point]:
    for service, row in _rows(scrape):
        # The CPUs are read one after the other: memory may be seen to be freed, and not to have been allocated.
        yield (service,), max(0, int(row["allocated_bytes"]) - int(row["freed_bytes"]))


def _errors(scrape: Scrape) -> Iterator[Point]:
    for service, row in _rows(scrape):
        for call, member in ERRORS.items():
            yield (service, call), int(row[member])


_FAMILIES: Final = (
    Family(
        Spec(
            "gpu_cuda_launches",
            Kind.COUNTER,
            "Kernels and graphs that threads of the service gave to the CUDA driver, whether that failed or not.",
            ("service_name", "kind"),
        ),
        _launches,
    ),
    Family(
        Spec(
            "gpu_cuda_synchronize_seconds",
            Kind.HISTOGRAM,
            "How long threads of the service were in calls of the CUDA driver that wait for the GPU: for a context, a "
            "stream, an event, or the end of a copy that is not asynchronous.",
            ("service_name", "call"),
            "seconds",
            BOUNDS,
        ),
        _waits,
    ),
    Family(
        Spec(
            "gpu_cuda_copies",
            Kind.COUNTER,
            "Copies between host and device that the CUDA driver took. Unknown: the call does not say the direction.",
            ("service_name", "direction"),
        ),
        _copies,
    ),
    Family(
        Spec(
            "gpu_cuda_copy_bytes",
            Kind.COUNTER,
            "Bytes of those copies.",
            ("service_name", "direction"),
            "bytes",
        ),
        _copied_bytes,
    ),
    Family(
        Spec("gpu_cuda_allocations", Kind.COUNTER, "Allocations of memory that the CUDA driver made.", _SERVICE),
        _allocations,
    ),
    Family(Spec("gpu_cuda_frees", Kind.COUNTER, "Frees of memory by the CUDA driver.", _SERVICE), _frees),
    Family(
        Spec(
            "gpu_cuda_outstanding_bytes",
            Kind.GAUGE,
            "Bytes that processes of the service have allocated while they were watched, and have not freed.",
            _SERVICE,
            "bytes",
        ),
        _outstanding,
    ),
    Family(
        Spec(
            "gpu_cuda_errors",
            Kind.COUNTER,
            "Calls of the CUDA driver that failed, launches left out. A failed copy, allocation or free counts here "
            "alone.",
            ("service_name", "call"),
        ),
        _errors,
    ),
)


def cuda_families() -> tuple[Family, ...]:
    """All of them, in the order of /metrics."""
    return _FAMILIES
