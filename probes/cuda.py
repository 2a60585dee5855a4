"""The CUDA probe as the attacher sees it: calls of the CUDA driver by the threads of a service. Opt-in."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import ClassVar, Final

from probes.errors import ProbeError
from probes.probe import Count, Probe, Stream, Transport
from probes.user_probes import Missing, Scope, Symbol, UserProbes

LIBRARY: Final = "libcuda.so.1"
"""The driver's library. What calls the runtime, or comes with one of its own, calls this one in the end."""

_CODE: Final = struct.Struct("=QQ")
_U32: Final = struct.Struct("=I")
_ALLOCATION_KEY: Final = struct.Struct("=QII")


class Call(Enum):
    """What a function of the driver is: `enum cuda_call` of bpf/cuda.bpf.c; a test holds the two together."""

    LAUNCH_KERNEL = 0
    LAUNCH_GRAPH = 1
    SYNC_CONTEXT = 2
    SYNC_STREAM = 3
    SYNC_EVENT = 4
    COPY_UNKNOWN = 5
    COPY_HOST_TO_DEVICE = 6
    COPY_DEVICE_TO_HOST = 7
    COPY_DEVICE_TO_DEVICE = 8
    COPY_ASYNC_UNKNOWN = 9
    COPY_ASYNC_HOST_TO_DEVICE = 10
    COPY_ASYNC_DEVICE_TO_HOST = 11
    COPY_ASYNC_DEVICE_TO_DEVICE = 12
    ALLOCATE = 13
    FREE = 14


FUNCTIONS: Final[Mapping[str, Call]] = {
    "cuLaunchKernel": Call.LAUNCH_KERNEL,
    "cuLaunchKernelEx": Call.LAUNCH_KERNEL,
    "cuLaunchCooperativeKernel": Call.LAUNCH_KERNEL,
    "cuGraphLaunch": Call.LAUNCH_GRAPH,
    "cuCtxSynchronize": Call.SYNC_CONTEXT,
    "cuCtxSynchronize_v2": Call.SYNC_CONTEXT,
    "cuStreamSynchronize": Call.SYNC_STREAM,
    "cuEventSynchronize": Call.SYNC_EVENT,
    "cuMemcpy": Call.COPY_UNKNOWN,
    "cuMemcpyHtoD_v2": Call.COPY_HOST_TO_DEVICE,
    "cuMemcpyDtoH_v2": Call.COPY_DEVICE_TO_HOST,
    "cuMemcpyDtoD_v2": Call.COPY_DEVICE_TO_DEVICE,
    "cuMemcpyAsync": Call.COPY_ASYNC_UNKNOWN,
    "cuMemcpyHtoDAsync_v2": Call.COPY_ASYNC_HOST_TO_DEVICE,
    "cuMemcpyDtoHAsync_v2": Call.COPY_ASYNC_DEVICE_TO_HOST,
    "cuMemcpyDtoDAsync_v2": Call.COPY_ASYNC_DEVICE_TO_DEVICE,
    "cuMemAlloc_v2": Call.ALLOCATE,
    "cuMemAllocManaged": Call.ALLOCATE,
    "cuMemAllocAsync": Call.ALLOCATE,
    "cuMemAllocFromPoolAsync": Call.ALLOCATE,
    "cuMemFree_v2": Call.FREE,
    "cuMemFreeAsync": Call.FREE,
}
"""The functions that are looked at."""

_PER_THREAD: Final = ("_ptsz", "_ptds")
"""Variants for programs whose default stream is the thread's own: a function has the one or the other, or neither."""


def symbols() -> Iterator[Symbol]:
    """Every place in the library with a program on it: a launch's entry, and entry and return of the others."""
    for name, call in FUNCTIONS.items():
        for variant in (name, *(name + suffix for suffix in _PER_THREAD)):
            if call in (Call.LAUNCH_KERNEL, Call.LAUNCH_GRAPH):
                yield Symbol("launched", LIBRARY, variant, call.value)
                continue
            # The return first: a call that comes in between then only has a return, which is passed over.
            yield Symbol("returned", LIBRARY, variant, call.value, returns=True)
            yield Symbol("entered", LIBRARY, variant, call.value)


class CudaProbe(Probe):
    """The loaded probe. `attach` starts what it needs of the kernel, `follow_processes` puts it on processes.

    Each call of a function that is looked at costs its caller microseconds, see bpf/cuda.bpf.c and benchmarks/cuda.
    """

    name: ClassVar[str] = "cuda"
    streams: ClassVar[tuple[Stream, ...]] = (
        Stream("gpu_spans", "thread_span", "end_ns", 1 / 480, Count.SEEN_GPU_SYNCS, Count.LOST_GPU_SYNCS_RING_FULL),
    )
    reasons: ClassVar[tuple[Count, ...]] = (
        Count.UNREADABLE,
        Count.CLOCK_BACKWARDS,
        Count.CUDA_CALLS_FULL,
        Count.CUDA_RETURNS_UNSEEN,
        Count.ALLOCATIONS_FULL,
        Count.UNKNOWN_FREES,
        Count.NOT_ATTACHED,
    )
    stats: ClassVar[str | None] = "cuda_stats"

    def __init__(
        self,
        transport: Transport,
        *,
        memory_bytes: int = 120 * 2**20,
        sizes: Mapping[str, int] | None = None,
        services: int = 1,
        shares_with: Probe | None = None,
        object_path: Path | None = None,
    ) -> None:
        self._gone: set[int] = set()
        self._followed: frozenset[int] = frozenset()
        super().__init__(
            transport,
            memory_bytes=memory_bytes,
            sizes=sizes,
            services=services,
            shares_with=shares_with,
            object_path=object_path,
        )
        # Closed before the object is.
        self._stack.callback(self._user_probes.close)

    def _set_up(self) -> None:
        self._user_probes = UserProbes(self._object, tuple(symbols()), scope=Scope.PROCESS, mapped=self._mapped)

    def attach(self) -> None:
        """Attach to the ends of threads and processes; nothing of a target changes yet."""
        self._object.attach(self._object.program("thread_ended"), self._object.program("program_executed"))

    def follow_processes(self, tgids: Mapping[int, int]) -> None:
        """Attach to those of these processes (tgid -> service) that map the driver, detach from all others.

        Called once a second; takes about a tenth of one at most. What a process called before is not known.
        """
        self._gone |= self._followed - tgids.keys()
        self._user_probes.follow(tgids)
        self._followed = self._user_probes.attached
        if self._gone:
            self._sweep()

    @property
    def attached(self) -> frozenset[int]:
        """The processes that are looked at."""
        return self._user_probes.attached

    @property
    def missing(self) -> tuple[Missing, ...]:
        """What could not be attached to, and functions of which a library has no variant: older drivers lack some."""
        given = self._user_probes.missing
        lacking = {(each.path, each.name) for each in given}
        return tuple(
            each
            for each in given
            if not each.name
            or (each.name in FUNCTIONS and all((each.path, each.name + suffix) in lacking for suffix in _PER_THREAD))
        )

    def counts(self) -> dict[Count, int]:
        """Every counter, those of user space among them."""
        values = super().counts()
        values[Count.NOT_ATTACHED] += self._user_probes.failed
        return values

    def _mapped(self, tgid: int, start: int, end: int) -> None:
        """Tell the programs where the library's code is: a launch that it calls itself is not the process's."""
        try:
            if end:
                self.map("libraries").update(_U32.pack(tgid), _CODE.pack(start, end))
            else:
                self.map("libraries").delete(_U32.pack(tgid))
        except ProbeError:
            pass  # the table is full: then nested launches of the process count twice, and that is all

    def _sweep(self) -> None:
        """Delete what processes that are gone had allocated: the programs have taken it off already."""
        table = self.map("allocations")
        left = [key for key, _ in table.items() if _ALLOCATION_KEY.unpack(key)[1] in self._gone]
        for key in left:
            table.delete(key)
        self._gone.clear()
