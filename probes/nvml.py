"""Asks the NVIDIA driver about all GPUs, and outlives whatever the driver does."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, Final, Protocol

import pynvml  # type: ignore[import-untyped]  # it has no types

from probes import nvml_library
from probes.gpu_report import Gpu, GpuProcess, GpuReport
from probes.nvml_calls import FAULTS, UNSUPPORTED, Calls, DriverGone, Untyped, code_of, name_of, next_step, words
from probes.nvml_gpu import History, OpenGpu, address_of
from probes.nvml_library import LibraryProblem

MAX_GPUS: Final = 64
MAX_EVENTS: Final = 256
FIRST_BACK_OFF_NS: Final = 1_000_000_000
MAX_BACK_OFF_NS: Final = 60_000_000_000
PATIENCE_NS: Final = 5_000_000_000
"""Longest that one look goes on asking. A single call can take longer: nothing ends it."""

log = logging.getLogger("footlight")


class Load(Protocol):
    """As `nvml_library.load`."""

    def __call__(self, configured: str | None) -> str: ...  # noqa: D102


class NvmlSource:
    """All GPUs that the driver knows. One at a time per process: pynvml has one library.

    `library` is the path of libnvidia-ml.so.1; None looks for it. `clock` is CLOCK_MONOTONIC in nanoseconds, `wall`
    seconds since the epoch. Nothing here is safe for two threads, but `close`.

    After a failure the library is closed, unloaded and opened again: 1 s later, then after 2 s, 4 s and so on up to
    60 s. So it is, from time to time, while one of several GPUs cannot be read, and the others are read as ever.
    """

    def __init__(
        self,
        library: str | None = None,
        clock: Callable[[], int] = time.monotonic_ns,
        wall: Callable[[], float] = time.time,
        patience_ns: int = PATIENCE_NS,
        load: Load = nvml_library.load,
    ) -> None:
        self._configured: Final = library
        self._clock: Final = clock
        self._wall: Final = wall
        self._patience_ns: Final = patience_ns
        self._load: Final = load
        self._lock: Final = threading.Lock()
        self._failures: Counter[str] = Counter()
        self._histories: dict[str, History] = {}
        self._told: set[tuple[str, str]] = set()
        self._open = False
        self._library: str | None = None
        self._present = False
        self._driver_version: str | None = None
        self._gpus: list[OpenGpu] = []
        self._events: Any = None
        self._missing: list[Gpu] = []
        self._listed = 0
        self._first = 0
        self._problem: tuple[str, str] | None = None
        self._logged: str | None = None
        self._retry_ns: int | None = None
        self._back_off_ns = FIRST_BACK_OFF_NS

    def look(self) -> GpuReport:
        """Ask everything. Blocks as long as the driver does; raises nothing for what a driver does."""
        with self._lock:
            began_ns = self._clock()
            processes: list[GpuProcess] = []
            gpus: tuple[Gpu, ...] = ()
            try:
                gpus = self._look(began_ns, processes)
            except LibraryProblem as problem:
                # A driver whose library was there and is not any more did not turn into a host without one.
                self._present = self._present or problem.present
                self._give_up(problem.what, problem.next_step)
                gpus = self._remembered()
            except DriverGone as gone:
                self._give_up(words(gone.error), next_step(gone.error))
                gpus, processes = self._remembered(), []
            return self._report(began_ns, gpus, tuple(processes))

    def close(self) -> None:
        """Give the driver back, unless a look is under way: a driver that hangs must not hang the end."""
        if not self._lock.acquire(blocking=False):
            return
        try:
            self._shut()
        finally:
            self._lock.release()

    def _look(self, now_ns: int, processes: list[GpuProcess]) -> tuple[Gpu, ...]:
        self._hear()
        if self._retry_ns is not None and now_ns >= self._retry_ns:
            self._shut()
            self._retry_ns = None
        if not self._open:
            if self._retry_ns is not None:
                return self._remembered()
            self._start()
        gpus = [*self._read_all(now_ns, processes), *self._missing]
        gpus.sort(key=lambda gpu: gpu.index)
        self._judge(gpus)
        return tuple(gpus)

    def _report(self, began_ns: int, gpus: tuple[Gpu, ...], processes: tuple[GpuProcess, ...]) -> GpuReport:
        problem, step = self._problem or (None, "")
        if problem != self._logged:
            if problem is not None:
                # A host without a driver is nothing to worry about; one with a driver and no GPU is.
                log.log(logging.WARNING if self._present else logging.INFO, "GPUs: %s; %s", problem, step)
            else:
                log.info("GPUs: all %d of them can be read", len(gpus))
            self._logged = problem
        now_ns = self._clock()
        return GpuReport(
            now_ns,
            (now_ns - began_ns) / 1e9,
            self._present,
            self._library,
            self._driver_version,
            problem,
            step,
            gpus,
            processes,
            tuple(sorted(self._failures.items())),
        )

    # --- opening and closing

    def _start(self) -> None:
        """Load, and list the GPUs. Raises `LibraryProblem` and `DriverGone`."""
        self._library = self._load(self._configured)
        self._present = True
        try:
            pynvml.nvmlInit()
        except FAULTS as error:
            self._failures[name_of(error)] += 1
            raise DriverGone(error) from error
        self._open = True
        self._driver_version = self._try(pynvml.nvmlSystemGetDriverVersion)
        try:
            self._listed = pynvml.nvmlDeviceGetCount()
        except FAULTS as error:
            self._failures[name_of(error)] += 1
            raise DriverGone(error) from error
        self._missing = []
        for index in range(min(self._listed, MAX_GPUS)):
            self._open_gpu(index)
        self._forget_nobody()
        self._listen()

    def _open_gpu(self, index: int) -> None:
        try:
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            uuid = str(pynvml.nvmlDeviceGetUUID(handle))
        except FAULTS as error:
            self._failures[name_of(error)] += 1
            self._missing.append(Gpu("", index, "", words(error), next_step(error)))
            return
        name = self._try(lambda: pynvml.nvmlDeviceGetName(handle)) or ""
        history = self._histories.setdefault(uuid, History(index, name))
        history.index, history.name = index, name
        calls = Calls(f"GPU {index}, {uuid},", self._clock, self._failures, self._told)
        self._gpus.append(OpenGpu(handle, index, uuid, name, history, calls, self._clock, self._wall))

    # A GPU that is lost is known by the place where it was; one that is not even listed is one that was taken out.
    def _forget_nobody(self) -> None:
        here = {gpu.uuid for gpu in self._gpus}
        nameless = {gpu.index: gpu for gpu in self._missing}
        for uuid, history in self._histories.items():
            if uuid in here:
                continue
            gpu = nameless.pop(history.index, None)
            problem = "the driver no longer lists it" if gpu is None else gpu.problem
            step = "see whether nvidia-smi lists the GPU" if gpu is None else gpu.next_step
            known = Gpu(uuid, history.index, history.name, problem, step, xids=history.xid_counts())
            self._missing = [*(other for other in self._missing if other is not gpu), known]

    def _listen(self) -> None:
        self._events = self._try(pynvml.nvmlEventSetCreate)
        if self._events is None:
            return
        for gpu in self._gpus:
            try:
                pynvml.nvmlDeviceRegisterEvents(gpu.handle, pynvml.nvmlEventTypeXidCriticalError, self._events)
            except FAULTS as error:
                if code_of(error) not in UNSUPPORTED:
                    self._failures[name_of(error)] += 1
                continue
            gpu.history.listen()

    def _hear(self) -> None:
        """Take the XID errors that came since the last look."""
        if self._events is None:
            return
        by_address = {gpu.address: gpu for gpu in self._gpus}
        for _ in range(MAX_EVENTS):
            try:
                event = pynvml.nvmlEventSetWait_v2(self._events, 0)
            except FAULTS as error:
                if code_of(error) != pynvml.NVML_ERROR_TIMEOUT:
                    self._failures[name_of(error)] += 1
                return
            gpu = by_address.get(address_of(event.device))
            if gpu is None or not event.eventType & pynvml.nvmlEventTypeXidCriticalError:
                self._failures["bad_answer"] += 1
                continue
            gpu.history.hear(event.eventData, self._wall())

    def _give_up(self, problem: str, step: str) -> None:
        self._shut()
        self._problem = problem, step
        self._retry_later()

    def _retry_later(self) -> None:
        self._retry_ns = self._clock() + self._back_off_ns
        self._back_off_ns = min(2 * self._back_off_ns, MAX_BACK_OFF_NS)

    def _shut(self) -> None:
        for gpu in self._gpus:
            gpu.close()
        self._gpus = []
        if self._events is not None:
            with contextlib.suppress(*FAULTS):
                pynvml.nvmlEventSetFree(self._events)
        self._events = None
        self._open = False
        self._driver_version = None
        nvml_library.unload()

    def _try(self, call: Callable[[], Any]) -> Untyped:
        try:
            return call()
        except FAULTS as error:
            if code_of(error) not in UNSUPPORTED:
                self._failures[name_of(error)] += 1
            return None

    # --- reading

    def _read_all(self, now_ns: int, processes: list[GpuProcess]) -> list[Gpu]:
        deadline_ns = now_ns + self._patience_ns
        read = []
        # The first one that there was no time for last time is the first one now.
        order = [*range(self._first, len(self._gpus)), *range(min(self._first, len(self._gpus)))]
        self._first = 0
        for place in order:
            gpu = self._gpus[place]
            read.append(gpu.read(deadline_ns, processes))
            if gpu.calls.late and not self._first:
                self._first = place
        return read

    def _judge(self, gpus: list[Gpu]) -> None:
        """Say what is wrong, and open everything again later where that may help."""
        if not gpus:
            self._give_up(
                "the driver sees no GPU",
                "see whether nvidia-smi lists one; in a container, set NVIDIA_VISIBLE_DEVICES=all",
            )
            return
        unread = [gpu for gpu in gpus if gpu.problem is not None]
        listed = self._try(pynvml.nvmlDeviceGetCount)
        changed = listed is not None and listed != self._listed
        if not unread:
            self._problem = None
        else:
            worst = unread[0]
            who = worst.uuid or f"GPU {worst.index}"
            self._problem = f"{len(unread)} of {len(gpus)} GPUs: {who}: {worst.problem}", worst.next_step
        lost = bool(self._missing) or any(gpu.calls.lost is not None for gpu in self._gpus)
        if not lost and not changed:
            self._back_off_ns = FIRST_BACK_OFF_NS
            self._retry_ns = None
        elif self._retry_ns is None:
            self._retry_later()

    def _remembered(self) -> tuple[Gpu, ...]:
        """GPUs that were there once, now that nobody can be asked."""
        problem, step = self._problem or ("", "")
        known = sorted(self._histories.items(), key=lambda item: item[1].index)
        return tuple(
            Gpu(uuid, history.index, history.name, problem, step, xids=history.xid_counts()) for uuid, history in known
        )
