"""Ring and perf buffers against the running kernel: what was seen is what was delivered plus what was lost, exactly."""

from __future__ import annotations

import ctypes
import os
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from probes.btf import dtype_of, enum_of
from probes.libbpf import Object
from probes.perf_buffers import online_cpus, open_perf_buffers
from probes.transport import PerfSource, RecordSource, RingSource
from tests.kernel.compile import compile_bpf

SOURCE = Path(__file__).parent / "bpf/transport_records.bpf.c"
RING_BYTES = 16384
PERF_PAGES = 4
SLOT_BYTES = 48  # 8 of the ring's own and 40 of the record

_getpgid = ctypes.CDLL(None).getpgid


def counted(bpf: Object, number: int) -> int:
    """One of the programs' counters, of all CPUs."""
    value = bpf.map("counts").lookup(struct.pack("=I", number))
    assert value is not None
    return sum(struct.unpack(f"={len(value) // 8}Q", value))


@dataclass
class Workload:
    """The loaded programs, and the way to make records."""

    bpf: Object
    source: RecordSource
    reopen: Callable[[], RecordSource]
    manners: dict[str, int]
    _counts: dict[str, int]

    def make(self, count: int, manner: str = "MANNER_SUBMIT") -> None:
        """Make `count` records, at most 1024 with each system call, on this thread's CPU."""
        while count:
            now = min(count, 1024)
            _getpgid(ctypes.c_int(self.manners[manner] << 16 | now))
            count -= now

    def counted(self, name: str) -> int:
        return counted(self.bpf, self._counts[name])

    def release(self) -> None:
        self.bpf.map("state").update(struct.pack("=I", 1), struct.pack("=Q", 1))

    def settled(self) -> None:
        """Let records grow older than what the perf source holds back."""
        time.sleep(0.004)

    def drain(self) -> npt.NDArray[np.void]:
        """Take all records; nothing makes any meanwhile."""
        self.settled()
        batch = self.source.pending().copy()
        self.source.consume(len(batch))
        assert not len(self.source.pending())
        return batch


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_bpf(SOURCE, tmp_path_factory.mktemp("bpf"))


@contextmanager
def workload(path: Path, transport: str) -> Iterator[Workload]:
    with ExitStack() as stack:
        bpf = stack.enter_context(Object(path))
        bpf.set_global("tgid", os.getpid())
        bpf.set_global("use_perf", transport == "perf")
        bpf.map("ring").max_entries = RING_BYTES
        bpf.map("ring" if transport == "perf" else "perf").set_autocreate(False)
        bpf.load()
        dtype = dtype_of(path, "test_record")
        if transport == "perf":
            descriptors = open_perf_buffers(bpf.map("perf"), PERF_PAGES)
            for descriptor in descriptors:
                stack.callback(os.close, descriptor)

            def reopen() -> RecordSource:
                return PerfSource(descriptors, PERF_PAGES, dtype)
        else:

            def reopen() -> RecordSource:
                return RingSource(bpf.map("ring").fd, RING_BYTES, dtype)

        source = reopen()
        stack.callback(source.close)
        bpf.attach()
        affinity = os.sched_getaffinity(0)
        stack.callback(os.sched_setaffinity, 0, affinity)
        yield Workload(bpf, source, reopen, enum_of(path, "manner"), enum_of(path, "count"))


@pytest.fixture(params=["ring", "perf"])
def either(compiled: Path, request: pytest.FixtureRequest) -> Iterator[Workload]:
    with workload(compiled, request.param) as result:
        yield result


@pytest.fixture
def ring(compiled: Path) -> Iterator[Workload]:
    with workload(compiled, "ring") as result:
        yield result


@pytest.fixture
def perf(compiled: Path) -> Iterator[Workload]:
    with workload(compiled, "perf") as result:
        yield result


def test_records_arrive_as_the_c_structure_has_them(either: Workload) -> None:
    before = time.monotonic_ns()
    either.make(101)
    after = time.monotonic_ns()
    batch = either.drain()
    assert batch["number"].tolist() == list(range(101))
    assert ((batch["seen_ns"] >= before) & (batch["seen_ns"] <= after)).all()
    assert (np.diff(batch["seen_ns"].astype(np.int64)) >= 0).all()
    assert set(batch["cpu"].tolist()) <= set(online_cpus())
    assert batch["low"].tolist() == list(range(101))
    assert set(batch["negative"].tolist()) == {-1}
    assert batch["odd"].tolist() == [bool(number % 2) for number in range(101)]
    assert set(batch["name"].tolist()) == {Path("/proc/self/comm").read_bytes().strip()}


def test_overflow_seen_is_delivered_plus_lost(either: Workload) -> None:
    delivered: list[int] = []
    for _ in range(23):
        either.make(997)
        delivered += either.drain()["number"].tolist()
    lost = either.counted("CNT_LOST")
    assert either.counted("CNT_SEEN") == 23 * 997
    assert lost > 0
    assert len(delivered) + lost == 23 * 997
    assert delivered == sorted(set(delivered))


def test_records_survive_the_end_of_the_buffer(either: Workload) -> None:
    delivered: list[int] = []
    for _ in range(211):
        either.make(47)
        delivered += either.drain()["number"].tolist()
    assert 211 * 47 * SLOT_BYTES > 20 * RING_BYTES
    assert delivered == list(range(211 * 47))
    assert either.counted("CNT_LOST") == 0


def test_an_idle_source_reads_while_records_are_made(either: Workload) -> None:
    delivered: list[int] = []

    def make() -> None:
        for _ in range(1009):
            either.make(7)

    making = threading.Thread(target=make)
    making.start()
    while making.is_alive():
        batch = either.source.pending()
        delivered += batch["number"].tolist()
        either.source.consume(len(batch))
    making.join()
    delivered += either.drain()["number"].tolist()
    assert len(delivered) + either.counted("CNT_LOST") == 7 * 1009
    assert delivered == sorted(set(delivered))


def test_what_was_not_consumed_waits_for_the_next_reader(either: Workload) -> None:
    either.make(53)
    either.settled()
    batch = either.source.pending()
    assert len(batch) == 53
    either.source.consume(11)
    successor = either.reopen()
    assert successor.pending()["number"].tolist() == list(range(11, 53))
    assert successor.skip_all() == 42
    assert len(successor.pending()) == 0
    either.make(5)
    either.settled()
    assert successor.pending()["number"].tolist() == list(range(53, 58))
    successor.close()


def test_discarded_records_are_left_out_and_their_room_is_given_back(ring: Workload) -> None:
    delivered: list[int] = []
    for _ in range(23):
        ring.make(101, "MANNER_DISCARD_ODD")
        ring.make(61, "MANNER_DISCARD_ALL")
        delivered += ring.drain()["number"].tolist()
    assert ring.counted("CNT_LOST") == 0
    assert ring.counted("CNT_SEEN") == 23 * 162
    assert len(delivered) + ring.counted("CNT_DISCARDED") == 23 * 162
    first_calls = [number for number in range(23 * 162) if number % 162 < 101]
    assert delivered == [number for number in first_calls if number % 2 == 0]


def test_reader_stops_at_a_record_that_another_cpu_still_writes(ring: Workload) -> None:
    cpus = online_cpus()
    if len(cpus) < 2:
        pytest.skip("needs two CPUs: run it on a machine that has them")
    os.sched_setaffinity(0, {cpus[1]})
    ring.make(3)

    def hold() -> None:
        os.sched_setaffinity(0, {cpus[0]})
        ring.make(1, "MANNER_HOLD")

    holding = threading.Thread(target=hold)
    holding.start()
    deadline = time.monotonic() + 10
    while not ring.source.stalled and time.monotonic() < deadline:
        ring.source.pending()
    ring.make(2)
    assert ring.source.pending()["number"].tolist() == [0, 1, 2]
    assert ring.source.stalled
    ring.release()
    holding.join()
    assert ring.source.pending()["number"].tolist() == [0, 1, 2, 3, 4, 5]
    assert not ring.source.stalled


def test_perf_records_of_two_cpus_come_in_the_order_they_were_made(perf: Workload) -> None:
    cpus = online_cpus()
    if len(cpus) < 2:
        pytest.skip("needs two CPUs: run it on a machine that has them")
    for index in range(41):
        os.sched_setaffinity(0, {cpus[index % 2]})
        perf.make(3)
    batch = perf.drain()
    assert batch["number"].tolist() == list(range(123))
    assert set(batch["cpu"].tolist()) == set(cpus[:2])


def test_perf_reports_its_losses_with_the_next_record(perf: Workload) -> None:
    os.sched_setaffinity(0, {online_cpus()[0]})
    perf.make(1009)
    lost = perf.counted("CNT_LOST")
    assert lost > 0
    delivered = len(perf.drain())
    assert delivered + lost == 1009
    perf.make(1)
    assert len(perf.drain()) == 1
    assert perf.source.lost == lost


def test_a_perf_buffer_that_nobody_mapped_loses_and_counts(compiled: Path) -> None:
    with Object(compiled) as bpf:
        bpf.set_global("tgid", os.getpid())
        bpf.set_global("use_perf", 1)
        bpf.map("ring").set_autocreate(False)
        bpf.load()
        bpf.attach()
        _getpgid(ctypes.c_int(13))
        number = enum_of(compiled, "count")
        assert counted(bpf, number["CNT_SEEN"]) == counted(bpf, number["CNT_LOST"]) == 13
