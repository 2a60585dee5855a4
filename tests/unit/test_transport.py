"""The record sources on memory laid out as the kernel lays it out, without a kernel: memfds stand for the maps."""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from probes import memory_order
from probes.errors import ProbeError
from probes.perf_buffers import online_cpus
from probes.transport import PerfSource, RecordSource, RingSource

RECORD = np.dtype([("number", "<u8"), ("seen_ns", "<u8"), ("low", "<u2")], align=True)
BUSY = 1 << 31
DISCARDED = 1 << 30
PAGE = mmap.PAGESIZE


@contextmanager
def memory(size: int) -> Iterator[tuple[int, mmap.mmap]]:
    """A file without a name, and its bytes."""
    descriptor = os.memfd_create("transport")
    os.ftruncate(descriptor, size)
    with mmap.mmap(descriptor, size) as view:
        yield descriptor, view
    os.close(descriptor)


@dataclass
class FakeRing:
    """The kernel's side of a ring: what bpf_ringbuf_reserve and the rest do to the memory."""

    descriptor: int
    view: mmap.mmap
    size: int = PAGE
    stride: int = 8 + RECORD.itemsize

    def position(self, page: int) -> int:
        return int.from_bytes(self.view[page * PAGE : page * PAGE + 8], "little")

    def start_at(self, position: int) -> None:
        for page in (0, 1):
            self.view[page * PAGE : page * PAGE + 8] = position.to_bytes(8, "little")

    def put(self, number: int, flags: int = 0, size: int = RECORD.itemsize) -> bool:
        """Reserve and fill one record; False when the ring is full, by the kernel's rule."""
        producer = self.position(1)
        if producer + self.stride - self.position(0) > self.size - 1:
            return False
        record = np.array([(number, number, number & 0xFFFF)], RECORD).tobytes()
        for index, byte in enumerate(struct.pack("<II", size | flags, 0) + record):
            offset = (producer + index) % self.size
            for copy in (0, self.size):  # the data is there twice
                self.view[2 * PAGE + copy + offset] = byte
        self.view[PAGE : PAGE + 8] = (producer + self.stride).to_bytes(8, "little")
        return True

    def set_length(self, record: int, length: int) -> None:
        """Write the length field of the record at a position, as submit and discard do."""
        for copy in (0, self.size):
            offset = 2 * PAGE + copy + record % self.size
            self.view[offset : offset + 4] = struct.pack("<I", length)


@contextmanager
def fake_ring(start: int = 0) -> Iterator[tuple[FakeRing, RingSource]]:
    with memory(2 * PAGE + 2 * PAGE) as (descriptor, view):
        ring = FakeRing(descriptor, view)
        ring.start_at(start)
        source = RingSource(descriptor, ring.size, RECORD)
        try:
            yield ring, source
        finally:
            source.close()


def numbers(source: RecordSource, limit: int | None = None) -> list[int]:
    return [int(number) for number in source.pending(limit)["number"]]


def test_ring_gives_records_without_copying_and_releases_them() -> None:
    with fake_ring() as (ring, source):
        assert numbers(source) == []
        for number in range(7):
            ring.put(number)
        batch = source.pending()
        assert batch.dtype == RECORD
        assert not batch.flags.owndata
        assert not batch.flags.writeable
        assert batch["low"].tolist() == list(range(7))
        source.consume(5)
        assert ring.position(0) == 5 * ring.stride
        source.consume(2)
        assert ring.position(0) == 7 * ring.stride
        with pytest.raises(ValueError, match="1 records to release, 0 pending"):
            source.consume(1)


def test_ring_gives_again_what_was_not_consumed() -> None:
    with fake_ring() as (ring, source):
        for number in range(11):
            ring.put(number)
        assert numbers(source, 3) == [0, 1, 2]
        assert numbers(source, 3) == [0, 1, 2]
        source.consume(2)
        assert numbers(source) == list(range(2, 11))


def test_ring_stops_at_a_busy_record_and_goes_on_when_it_is_complete() -> None:
    with fake_ring() as (ring, source):
        ring.put(0)
        ring.put(1, BUSY)
        ring.put(2)
        assert numbers(source) == [0]
        assert source.stalled
        source.consume(1)
        assert numbers(source) == []
        assert source.stalled
        ring.set_length(ring.stride, RECORD.itemsize)
        assert numbers(source) == [1, 2]
        assert not source.stalled


def test_ring_releases_discarded_records_that_no_record_stands_for() -> None:
    with fake_ring() as (ring, source):
        for number in range(13):
            ring.put(number, DISCARDED)
        assert numbers(source, 5) == []
        assert ring.position(0) == 13 * ring.stride


def test_ring_records_between_discarded_ones() -> None:
    with fake_ring() as (ring, source):
        for number, flags in enumerate((DISCARDED, 0, DISCARDED, 0, DISCARDED)):
            ring.put(number, flags)
        assert numbers(source) == [1, 3]
        assert ring.position(0) == ring.stride
        source.consume(1)
        assert ring.position(0) == 3 * ring.stride
        source.consume(1)
        assert ring.position(0) == 5 * ring.stride


def test_ring_refuses_a_record_of_another_size_and_skip_all_gets_past_it() -> None:
    with fake_ring() as (ring, source):
        ring.put(0)
        ring.put(1, size=8)
        ring.put(2)
        assert numbers(source) == [0]
        source.consume(1)
        with pytest.raises(ProbeError, match="a record of 8 bytes, wanted 24"):
            source.pending()
        assert source.skip_all() == 2
        ring.put(3)
        assert numbers(source) == [3]


@pytest.mark.parametrize("stored", [1, 8, 3 * 32 + 4, 1 << 63, 7 * 32])
def test_ring_with_an_impossible_position_is_refused_until_skipped(stored: int) -> None:
    with memory(4 * PAGE) as (descriptor, view):
        ring = FakeRing(descriptor, view)
        for number in range(5):
            ring.put(number)
        view[0:8] = stored.to_bytes(8, "little")
        source = RingSource(descriptor, ring.size, RECORD)
        with pytest.raises(ProbeError, match="are not whole records"):
            source.pending()
        assert source.skip_all() == PAGE // ring.stride
        ring.put(99)
        assert numbers(source) == [99]
        source.close()


def test_ring_skip_all_counts_records_not_discarded_ones_and_leaves_busy_ones() -> None:
    with fake_ring() as (ring, source):
        for number, flags in enumerate((0, DISCARDED, 0, 0, DISCARDED, BUSY, 0)):
            ring.put(number, flags)
        assert source.skip_all() == 3
        ring.set_length(5 * ring.stride, RECORD.itemsize)
        assert numbers(source) == [5, 6]


def test_ring_views_outlive_close() -> None:
    with fake_ring() as (ring, source):
        ring.put(23)
        batch = source.pending()
        source.close()
        source.close()
        assert batch["number"].tolist() == [23]


@pytest.mark.parametrize("size", [0, PAGE - 1, 3 * PAGE])
def test_ring_sizes_that_no_ring_has(size: int) -> None:
    with pytest.raises(ValueError, match="powers of two"):
        RingSource(-1, size, RECORD)


@pytest.mark.parametrize("pages", [0, 3, -4])
def test_perf_sizes_that_no_buffer_has(pages: int) -> None:
    with pytest.raises(ValueError, match="power of two"):
        PerfSource([], pages, RECORD)


@settings(deadline=None, max_examples=60)
@given(
    start=st.integers(0, 1 << 40).map(lambda slots: slots * 32),
    rounds=st.lists(
        st.tuples(st.lists(st.sampled_from((0, 0, 0, DISCARDED)), max_size=90), st.integers(0, 100)), max_size=9
    ),
)
def test_ring_delivers_each_record_once_and_in_order(start: int, rounds: list[tuple[list[int], int]]) -> None:
    expected: list[int] = []
    delivered: list[int] = []
    number = 0
    with fake_ring(start) as (ring, source):
        for flags_of_records, percent in rounds:
            for flags in flags_of_records:
                if ring.put(number, flags) and not flags:
                    expected.append(number)
                number += 1
            batch = source.pending()
            taken = len(batch) * percent // 100
            delivered += [int(each) for each in batch["number"][:taken]]
            source.consume(taken)
        delivered += numbers(source)
    assert delivered == expected


@dataclass
class FakePerfBuffer:
    """The kernel's side of one CPU's perf buffer."""

    descriptor: int
    view: mmap.mmap
    head: int = 0

    def put_bytes(self, data: bytes) -> None:
        for index, byte in enumerate(data):
            self.view[PAGE + (self.head + index) % PAGE] = byte
        self.head += len(data)
        self.view[1024:1032] = self.head.to_bytes(8, "little")

    def start_at(self, position: int) -> None:
        self.head = position
        self.view[1024:1040] = position.to_bytes(8, "little") * 2

    def put(self, number: int, seen_ns: int, misc: int = 1) -> None:
        record = np.array([(number, seen_ns, number & 0xFFFF)], RECORD).tobytes()
        raw = -(-(4 + len(record)) // 8) * 8 - 4
        self.put_bytes(struct.pack("<IHHI", 9, misc, 12 + raw, raw) + record.ljust(raw, b"\xee"))

    def put_lost(self, count: int) -> None:
        self.put_bytes(struct.pack("<IHHQQ", 2, 0, 24, 77, count))

    def tail(self) -> int:
        return int.from_bytes(self.view[1032:1040], "little")


@dataclass
class Clock:
    now: int = 1_000_000

    def __call__(self) -> int:
        return self.now


@contextmanager
def fake_perf(clock: Clock, start: int = 0) -> Iterator[tuple[FakePerfBuffer, FakePerfBuffer, PerfSource]]:
    with memory(2 * PAGE) as (first, first_view), memory(2 * PAGE) as (second, second_view):
        one, two = FakePerfBuffer(first, first_view), FakePerfBuffer(second, second_view)
        one.start_at(start)
        two.start_at(start)
        source = PerfSource([first, second], 1, RECORD, clock=clock, margin_ns=100)
        try:
            yield one, two, source
        finally:
            source.close()


def test_perf_merges_the_cpus_by_time() -> None:
    with fake_perf(Clock()) as (one, two, source):
        for number in (1, 2, 5, 8):
            one.put(number, number)
        for number in (3, 4, 6, 7):
            two.put(number, number, misc=2)
        batch = source.pending()
        assert batch.dtype == RECORD
        assert batch["number"].tolist() == list(range(1, 9))
        source.consume(3)
        assert (one.tail(), two.tail()) == (2 * 40, 40)
        assert numbers(source) == [4, 5, 6, 7, 8]
        assert numbers(source, 2) == [4, 5]
        source.consume(2)
        source.pending()
        source.consume(1)
        source.consume(2)
        assert (one.tail(), two.tail()) == (one.head, two.head)


def test_perf_holds_back_what_another_cpu_may_still_precede() -> None:
    clock = Clock(1000)
    with fake_perf(clock) as (one, two, source):
        one.put(2, 901)
        assert numbers(source) == []
        two.put(1, 900)
        assert numbers(source) == [1]
        source.consume(1)
        clock.now = 1001
        assert numbers(source) == [2]


def test_perf_keeps_one_cpus_order_when_an_interrupt_came_between_time_and_output() -> None:
    with fake_perf(Clock()) as (one, two, source):
        one.put(1, 70)
        one.put(2, 60)
        two.put(3, 65)
        two.put(4, 71)
        assert numbers(source) == [3, 1, 2, 4]


def test_perf_counts_losses_once_they_are_passed() -> None:
    with fake_perf(Clock()) as (one, two, source):
        one.put_lost(3)
        one.put(1, 1)
        one.put_lost(5)
        one.put(2, 2)
        two.put_lost(7)
        assert numbers(source) == [1, 2]
        assert source.lost == 7
        assert numbers(source) == [1, 2]
        assert source.lost == 7
        source.consume(1)
        assert source.lost == 7 + 3 + 5
        source.consume(1)
        assert source.lost == 7 + 3 + 5
        assert two.tail() == two.head


def test_perf_leaves_out_what_is_neither_sample_nor_loss() -> None:
    with fake_perf(Clock()) as (one, _, source):
        one.put(1, 1)
        one.put_bytes(struct.pack("<IHHQQQ", 5, 0, 32, 1, 2, 3))
        one.put(2, 2)
        assert numbers(source) == [1, 2]
        source.consume(2)
        assert one.tail() == one.head


@pytest.mark.parametrize(
    "poison", [struct.pack("<IHHI", 9, 1, 24, 12) + bytes(12), bytes(24), struct.pack("<IHH", 7, 0, 4096)]
)
def test_perf_refuses_other_records_and_skip_all_gets_past_them(poison: bytes) -> None:
    with fake_perf(Clock()) as (one, two, source):
        one.put(1, 1)
        one.put_bytes(poison)
        one.put(2, 2)
        two.put(3, 3)
        assert numbers(source) == [1, 3]
        source.consume(2)
        with pytest.raises(ProbeError, match="a record of type"):
            source.pending()
        assert source.skip_all() == 0
        one.put(5, 5)
        assert numbers(source) == [5]


def test_perf_skip_all_takes_the_young_ones_too() -> None:
    with fake_perf(Clock(0)) as (one, two, source):
        for number in range(11):
            one.put(number, number + 500)
        two.put(99, 99)
        two.put_lost(2)
        assert numbers(source) == []
        assert source.skip_all() == 12
        assert source.lost == 2
        assert (one.tail(), two.tail()) == (one.head, two.head)


def test_perf_order_field_may_stand_in_a_nested_structure() -> None:
    nested = np.dtype([("header", [("number", "<u8"), ("when", "<u8")]), ("low", "<u8")])
    with memory(2 * PAGE) as (descriptor, view):
        buffer = FakePerfBuffer(descriptor, view)
        buffer.put(23, 42)
        source = PerfSource([descriptor], 1, nested, "header.when", clock=Clock(), margin_ns=0)
        assert source.pending()["header"]["when"].tolist() == [42]
        source.close()
        with pytest.raises(KeyError):
            PerfSource([descriptor], 1, nested, "low.when")


@settings(deadline=None, max_examples=60)
@given(
    start=st.integers(0, 1 << 40).map(lambda words: words * 8),
    steps=st.lists(
        st.tuples(st.integers(0, 1), st.integers(0, 30), st.integers(0, 3), st.integers(0, 100)), max_size=30
    ),
)
def test_perf_delivers_each_record_once_and_in_order(start: int, steps: list[tuple[int, int, int, int]]) -> None:
    delivered: list[int] = []
    number = lost = 0
    with fake_perf(Clock(), start) as (one, two, source):
        for cpu, count, losses, percent in steps:
            buffer = (one, two)[cpu]
            if buffer.head + 40 * count + 24 - buffer.tail() <= PAGE:
                if losses:
                    buffer.put_lost(losses)
                    lost += losses
                for _ in range(count):
                    buffer.put(number, number)
                    number += 1
            batch = source.pending()
            taken = len(batch) * percent // 100
            delivered += [int(each) for each in batch["number"][:taken]]
            source.consume(taken)
        batch = source.pending()
        delivered += [int(each) for each in batch["number"]]
        source.consume(len(batch))
        assert source.lost == lost
    assert delivered == list(range(number))


def test_fence_of_weakly_ordered_machines_lets_its_lock_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_order, "_STRONGLY_ORDERED", False)
    for _ in range(3):
        memory_order.fence()
    with fake_ring() as (ring, source):
        ring.put(1)
        assert numbers(source) == [1]


def test_online_cpus_reads_the_kernels_list(tmp_path: Path) -> None:
    listing = tmp_path / "online"
    listing.write_text("0-2,5,7-8\n")
    assert online_cpus(listing) == [0, 1, 2, 5, 7, 8]
