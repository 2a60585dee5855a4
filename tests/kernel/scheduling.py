"""What the tests of the scheduler probe share: the probe with its records, and workloads to watch."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from enum import IntEnum
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pytest

from probes.channels import open_source
from probes.probe import Count, Transport
from probes.requests import RequestsProbe
from probes.scheduler import SchedulerProbe
from probes.service_stats import ServiceStats
from tests.kernel.conftest import PATIENCE_S, Probe, netns

WAITS = Path(__file__).parent / "workloads" / "waits.py"
NO_SYSCALL = 0xFFFF
PAGE = 4096
"""No address is smaller, and no descriptor of these tests is larger."""
THROTTLED, IOWAIT, TIMEOUT, BORN, FIRST, WAKER_TARGET, GPU = (1 << bit for bit in range(7))
READY, SENT, RECEIVED = 1, 2, 3

Records = npt.NDArray[Any]


class Reason(IntEnum):
    """The values of `enum wait_reason`; a test fails when the two differ."""

    CPU = 0
    FUTEX = 1
    POLL = 2
    SOCKET = 3
    PIPE = 4
    DISK = 5
    PAGE_FAULT = 6
    TIMER = 7
    DEVICE = 8
    STOPPED = 9
    OTHER = 10
    MAX = 11


class Waker(IntEnum):
    """The values of `enum waker`."""

    NONE = 0
    TASK = 1
    MESSAGE = 2
    NETWORK = 3
    SOFTIRQ = 4
    HARDIRQ = 5
    PARENT = 6
    MAX = 7


class Watched:
    """The attached scheduler probe, and all that it said since the test began."""

    def __init__(self, requests: RequestsProbe, probe: SchedulerProbe, stack: ExitStack) -> None:
        self.requests = requests
        self.probe = probe
        self._sources = {each.name: open_source(each, time.monotonic_ns, stack) for each in probe.channels}
        self._seen: dict[str, list[Records]] = {}
        self._delivered = dict.fromkeys(self._sources, 0)
        assert probe.stats_map is not None
        self.stats = ServiceStats(probe.stats_map)
        self.begin()

    def begin(self) -> None:
        """Forget what was."""
        self.drain()
        self._seen = {name: [] for name in self._sources}
        self._counts = self.probe.counts()
        self.totals_at_begin = self.stats.totals()[0].copy()

    def counted(self, what: Count) -> int:
        """How much a counter grew since the test began."""
        return self.probe.counts()[what] - self._counts[what]

    def losses(self) -> dict[Count, int]:
        """What was lost or not followed since the test began."""
        return {what: self.counted(what) for what in self.probe.loss_counts() if self.counted(what)}

    def drain(self) -> None:
        """Take in everything that was made: what was seen is what was delivered and what was lost, exactly."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            for name, source in self._sources.items():
                batch = source.pending()
                self._seen.setdefault(name, []).append(batch.copy())
                self._delivered[name] += len(batch)
                source.consume(len(batch))
            counts = self.probe.counts()
            missing = {
                each.name: counts[each.seen] - counts[each.lost] - self._delivered[each.name]
                for each in self.probe.streams
            }
            if not any(missing.values()):
                return
            assert time.monotonic() < deadline, f"records that were seen and not lost did not come: {missing}"
            time.sleep(0.002)

    def records(self, stream: str) -> Records:
        """All of a stream since the test began, in the order in which they came."""
        return np.concatenate(self._seen[stream])

    def intervals(self, facts: Mapping[str, Any] | None = None) -> Records:
        """All intervals, or those of the thread `facts["tid"]` that overlap the stretch which the facts name."""
        every = self.records("intervals")
        if facts is None:
            return every
        mine = every[every["tid"] == facts["tid"]]
        return mine[(mine["on_ns"] >= facts["begin_ns"]) & (mine["off_ns"] <= facts["end_ns"])]

    def wait(self, facts: Mapping[str, Any]) -> np.void:
        """The interval in which the thread slept longest."""
        found = self.intervals(facts)
        asleep = np.where(found["wake_ns"] > 0, found["wake_ns"] - found["off_ns"], 0)
        longest: np.void = found[int(asleep.argmax())]
        return longest

    def disturbed(self, facts: Mapping[str, Any]) -> bool:
        """Whether a switch or a waking was not seen: the probe noticed, or the kernel counted more in `facts["left"]`.

        There are kernels that do not trace every switch, see `probes.switches`: those away from hidden threads.
        """
        every = self.records("intervals")
        known = set(every["tid"][(every["sequence"] == 1) & ((every["flags"] & FIRST) == 0)])
        again = ((every["flags"] & FIRST) > 0) & ((every["sequence"] > 1) | np.isin(every["tid"], list(known)))
        unwoken = (every["reason"] != Reason.CPU) & (every["wake_ns"] == 0)
        fewer = any(
            np.count_nonzero(
                (every["tid"] == int(tid)) & (every["reason"] != Reason.CPU) & (every["on_ns"] <= until_ns)
            )
            < count
            for tid, (count, until_ns) in facts.get("left", {}).items()
        )
        return fewer or bool((again | unwoken).any())

    def run(self, *arguments: object, end: bool = False, script: Path = WAITS) -> tuple[int, dict[str, Any]]:
        """Watch a workload from before it begins what it is there for, until it is done or, to the `end`, has ended.

        Returns its process and what it says. Once more, up to five times, when the kernel left something out.
        """
        for _ in range(5):
            self.begin()
            with Workload(*arguments, script=script) as workload:
                follow(self.requests, workload)
                facts = workload.done()
                if end:
                    workload.end()
                self.drain()
            if not self.disturbed(facts):
                break
        return workload.pid, facts

    def messages(self, kind: int) -> Records:
        """All messages of a kind."""
        every = self.records("messages")
        return every[every["kind"] == kind]


@contextmanager
def watching(
    requests: RequestsProbe, transport: Transport, *, sizes: Mapping[str, int] | None = None, threads: int | None = None
) -> Iterator[Watched]:
    """A scheduler probe of its own, attached, that follows whom `requests` follows."""
    with ExitStack() as stack:
        probe = stack.enter_context(Sized(transport, threads, sizes=sizes, shares_with=requests))
        probe.attach()
        yield Watched(requests, probe, stack)


class Sized(SchedulerProbe):
    """The probe with a table of threads of another size."""

    def __init__(self, transport: Transport, threads: int | None, **arguments: Any) -> None:  # noqa: ANN401 - what the probe takes
        self._threads = threads
        super().__init__(transport, **arguments)

    def _set_up(self) -> None:
        super()._set_up()
        if self._threads is not None:
            self._object.map("threads").max_entries = self._threads


class Workload:
    """A process of tests/kernel/workloads/waits.py, or of a script that says the same."""

    def __init__(self, *arguments: object, cpus: set[int] | None = None, script: Path = WAITS) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-S", "-E", str(script), *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self.pid = self._process.pid
        if cpus is not None:
            os.sched_setaffinity(self.pid, cpus)
        self._unread = b""
        assert self.line() == "ready"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()

    def go(self) -> None:
        """Let it do what it is there for."""
        assert self._process.stdin is not None
        self._process.stdin.write(b"\n")
        self._process.stdin.flush()

    def facts(self) -> dict[str, Any]:
        """Wait for what it says next."""
        said: dict[str, Any] = json.loads(self.line())
        return said

    def done(self) -> dict[str, Any]:
        """Let it do what it is there for; return what it says of it."""
        self.go()
        return self.facts()

    def waits_on_descriptor(self, threads: int) -> bool:
        """Whether it has so many threads and one of them sits in a call on a descriptor."""
        calls = [(task / "syscall").read_text().split() for task in Path(f"/proc/{self.pid}/task").iterdir()]
        return len(calls) == threads and any(len(call) > 1 and 0 < int(call[1], 16) < PAGE for call in calls)

    def end(self) -> None:
        """Let it end by itself."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(PATIENCE_S)

    def line(self) -> str:
        """Wait for the next line that it says."""
        out = self._process.stdout
        assert out is not None
        deadline = time.monotonic() + 3 * PATIENCE_S
        while b"\n" not in self._unread:
            ready, _, _ = select.select([out], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, "the workload said nothing"
            more = os.read(out.fileno(), 65536)
            assert more, "the workload ended early"
            self._unread += more
        line, _, self._unread = self._unread.partition(b"\n")
        return line.decode()


def until(happened: Callable[[], object], what: str) -> None:
    """Wait until something has happened; fails when it does not."""
    deadline = time.monotonic() + PATIENCE_S
    while not happened():
        assert time.monotonic() < deadline, f"not within {PATIENCE_S:.0f} s: {what}"
        time.sleep(0.002)


def follow(requests: RequestsProbe, *workloads: Workload, ports: tuple[int, ...] = ()) -> None:
    """Follow these processes and ports of this network namespace, all of service 0, and nothing else."""
    requests.follow({each.pid: 0 for each in workloads}, {(netns(), port): 0 for port in ports})


@pytest.fixture(scope="module")
def scheduler(shared_probe: Probe, transport: Transport) -> Iterator[Watched]:
    """The scheduler probe beside the requests probe, over each transport."""
    with watching(shared_probe.raw, transport) as watched:
        yield watched


@pytest.fixture
def watch(scheduler: Watched) -> Iterator[Watched]:
    """What this test sees of it."""
    scheduler.begin()
    yield scheduler
    scheduler.requests.follow({}, {})
