"""Three streams of records put into one order: what is due, what waits, and what each record says to the handler."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from probes.channels import MARGIN_NS
from probes.records import SLICE, EventKind, Merge

NOW_NS = 10**15

# As bpf/records.h has them; tests/kernel hold that file and this package together.
EVENT = np.dtype(
    {
        "names": "conn seen_ns kind position tx_position size service tgid tid local_port peer_port "
        "old_state new_state family born error peer".split(),
        "formats": ["<u8", "<u8", *["<u4"] * 7, "<u2", "<u2", *["u1"] * 4, "<u4", ("u1", (16,))],
    },
    align=True,
)
HEADER = np.dtype(
    {
        "names": "conn seen_ns at_ns position size uncaptured service tgid tid lost lost_other".split(),
        "formats": [*["<u8"] * 3, *["<u4"] * 8],
    }
)
READ = np.dtype([("header", HEADER), ("payload", "u1", (40,))])
WRITE = np.dtype([("header", HEADER), ("payload", "u1", (24,))])


class StubSource:
    """A RecordSource of an array. `busy` is the index at which a record is still being written."""

    def __init__(self, records: npt.NDArray[Any], busy: int | None = None) -> None:
        self.records = records
        self.busy = busy
        self.position = 0
        self.stalled = False
        self.lost = 0
        self.asked: list[int | None] = []

    def pending(self, limit: int | None = None) -> npt.NDArray[Any]:
        self.asked.append(limit)
        end = len(self.records) if limit is None else min(len(self.records), self.position + limit)
        self.stalled = self.busy is not None and self.busy < end
        if self.busy is not None:
            end = min(end, self.busy)
        return self.records[self.position : end]

    def consume(self, count: int) -> None:
        assert 0 < count <= len(self.records) - self.position
        self.position += count

    def skip_all(self) -> int:
        skipped, self.position = len(self.records) - self.position, len(self.records)
        return skipped

    def close(self) -> None: ...


class Recorder:
    """A handler that remembers its calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[object, ...]] = []

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - stands for each method of Handler
        return lambda *arguments: self.calls.append((name, *arguments))

    @property
    def order(self) -> list[object]:
        """The names of the calls with the connection, which the tests use as a number."""
        return [call[1] for call in self.calls]


def events(*rows: tuple[int, int], kind: int = EventKind.ACCEPTED) -> npt.NDArray[Any]:
    """Events of (seen_ns, conn)."""
    array = np.zeros(len(rows), EVENT)
    array["kind"] = kind
    for index, (seen, conn) in enumerate(rows):
        array["seen_ns"][index], array["conn"][index] = seen, conn
    return array


def chunks(dtype: np.dtype[Any], *rows: tuple[int, int]) -> npt.NDArray[Any]:
    array = np.zeros(len(rows), dtype)
    for index, (seen, conn) in enumerate(rows):
        array["header"]["seen_ns"][index], array["header"]["conn"][index] = seen, conn
    return array


def merge(
    of_events: npt.NDArray[Any] | None = None,
    of_reads: npt.NDArray[Any] | None = None,
    of_writes: npt.NDArray[Any] | None = None,
    now_ns: int = NOW_NS,
) -> tuple[Merge, list[StubSource], Recorder]:
    arrays = [
        events() if of_events is None else of_events,
        chunks(READ) if of_reads is None else of_reads,
        chunks(WRITE) if of_writes is None else of_writes,
    ]
    sources = [StubSource(array) for array in arrays]
    return Merge(sources, clock=lambda: now_ns), sources, Recorder()


# ---- order ----


def test_records_come_in_the_order_they_were_made() -> None:
    merging, sources, handler = merge(
        events((10, 1), (40, 4)), chunks(READ, (20, 2), (50, 5)), chunks(WRITE, (30, 3), (60, 6), (70, 7))
    )
    assert merging.drain(handler) == 7
    assert handler.order == [1, 2, 3, 4, 5, 6, 7]
    assert [source.position for source in sources] == [2, 2, 3]
    assert merging.delivered == {"events": 2, "reads": 2, "writes": 3}
    assert merging.drain(handler) == 0


def test_of_one_instant_events_come_first_and_streams_keep_their_order() -> None:
    # A call of many records makes them all at one instant. More than 16: below that every sort of numpy is stable.
    instants = (10, 20, 30)
    merging, _, handler = merge(
        events(*((at, 1000 * at + number) for at in instants for number in range(23))),
        chunks(READ, *((at, 1000 * at + 100 + number) for at in instants for number in range(29))),
        chunks(WRITE, *((at, 1000 * at + 200 + number) for at in instants for number in range(31))),
    )
    assert merging.drain(handler) == 3 * (23 + 29 + 31)
    numbers = [int(str(number)) for number in handler.order]
    assert numbers == sorted(numbers)


@pytest.mark.parametrize("stream", range(3))
def test_stream_alone(stream: int) -> None:
    rows = [(10, 1), (20, 2), (30, 3)]
    merging, _, handler = merge(
        events(*rows) if stream == 0 else None,
        chunks(READ, *rows) if stream == 1 else None,
        chunks(WRITE, *rows) if stream == 2 else None,
    )
    assert merging.drain(handler) == 3
    assert handler.order == [1, 2, 3]


def test_nothing_is_nothing() -> None:
    merging, _, handler = merge()
    assert merging.drain(handler) == 0
    assert handler.calls == []


# ---- what waits ----


def test_what_is_younger_than_the_margin_waits() -> None:
    due = NOW_NS - MARGIN_NS
    now = NOW_NS
    sources = [
        StubSource(events((due, 1), (due + 1, 3))),
        StubSource(chunks(READ, (due + 1, 4))),
        StubSource(chunks(WRITE, (due - 1, 0), (due + 2, 5))),
    ]
    merging, handler = Merge(sources, clock=lambda: now), Recorder()
    assert merging.drain(handler) == 2
    assert handler.order == [0, 1]
    now += 1
    assert merging.drain(handler) == 2
    now += 1
    assert merging.drain(handler) == 1
    assert handler.order == [0, 1, 3, 4, 5]


def test_record_that_is_being_written_holds_up_what_is_younger() -> None:
    merging, sources, handler = merge(
        events((10, 1), (50, 5)), chunks(READ, (20, 2), (30, 3)), chunks(WRITE, (15, 0), (40, 4))
    )
    sources[1].busy = 1
    assert merging.drain(handler) == 3
    assert handler.order == [1, 0, 2]
    sources[1].busy = None
    assert merging.drain(handler) == 3
    assert handler.order == [1, 0, 2, 3, 4, 5]


def test_first_record_that_is_being_written_holds_up_what_is_younger_than_the_last_one() -> None:
    merging, sources, handler = merge(events((10, 1), (40, 4)), chunks(READ, (20, 2), (30, 3)))
    sources[1].busy = 1
    assert merging.drain(handler) == 2
    assert merging.drain(handler) == 0  # now it is the first, and nothing is known but the one before
    sources[1].busy = None
    assert merging.drain(handler) == 2
    assert handler.order == [1, 2, 3, 4]


def test_what_is_as_old_as_the_last_record_need_not_wait_for_a_slow_one() -> None:
    merging, sources, handler = merge(events(), chunks(READ, (20, 2), (30, 3), (50, 5)))
    sources[1].busy = 2
    assert merging.drain(handler) == 2
    sources[0].records = events((30, 4), (31, 6))
    assert merging.drain(handler) == 1
    assert handler.order == [2, 3, 4]


def test_nothing_is_due_while_the_very_first_record_is_being_written() -> None:
    merging, sources, handler = merge(events((10, 1)), chunks(READ, (20, 2)))
    sources[1].busy = 0
    assert merging.drain(handler) == 0
    sources[1].busy = None
    assert merging.drain(handler) == 2


def test_clock_that_has_just_begun() -> None:
    merging, _, handler = merge(events((0, 1), (5, 2)), now_ns=MARGIN_NS // 2)
    assert merging.drain(handler) == 1


# ---- many records ----


def test_more_than_a_slice_keeps_the_order_of_all_streams() -> None:
    count = 2 * SLICE + 1009
    rows = [(3 * number, 3 * number) for number in range(count)]
    merging, sources, handler = merge(
        events(*((seen + 1, conn + 1) for seen, conn in rows[::7])),
        chunks(READ, *((seen + 2, conn + 2) for seen, conn in rows[::101])),
        chunks(WRITE, *rows),
    )
    total = sum(len(source.records) for source in sources)
    assert merging.drain(handler) == total
    assert handler.order == sorted(handler.order)  # type: ignore[type-var]  # numbers, all of them
    assert len(handler.order) == total
    assert merging.delivered["writes"] == count
    assert all(limit is not None and limit <= SLICE for source in sources for limit in source.asked)


def test_drain_ends_although_records_never_do() -> None:
    """A producer as fast as the reader: what is made after the call began is for the next one."""
    now = NOW_NS

    class Endless(StubSource):
        def pending(self, limit: int | None = None) -> npt.NDArray[Any]:
            nonlocal now
            now += MARGIN_NS
            more = chunks(WRITE, *((now - number, 1) for number in range(SLICE, 0, -1)))
            self.records = np.concatenate([self.records, more])
            return super().pending(limit)

    sources = [StubSource(events()), StubSource(chunks(READ)), Endless(chunks(WRITE))]
    merging = Merge(sources, clock=lambda: now)
    assert merging.drain(Recorder()) < 3 * SLICE


@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 5)), max_size=60),
    st.lists(st.integers(0, 40), max_size=5),
    st.integers(0, 2),
    st.integers(0, 70),
)
@settings(deadline=None)
def test_order_holds_over_any_number_of_drains(
    steps: list[tuple[int, int]], pauses: list[int], stream: int, busy: int
) -> None:
    """Records are made in any stream at any time, one of them slowly, and are looked at now and then."""
    seen = NOW_NS
    rows: list[list[tuple[int, int]]] = [[], [], []]
    for number, (where, step) in enumerate(steps):
        seen += step
        rows[where].append((seen, number))
    made = [events(*rows[0]), chunks(READ, *rows[1]), chunks(WRITE, *rows[2])]
    sources = [StubSource(array[:0]) for array in made]
    now = NOW_NS
    merging, handler = Merge(sources, clock=lambda: now + MARGIN_NS), Recorder()
    for pause in [*pauses, 10_000]:
        now += pause
        for source, array in zip(sources, made, strict=True):
            field = array["seen_ns"] if "seen_ns" in (array.dtype.names or ()) else array["header"]["seen_ns"]
            source.records = array[: int(np.count_nonzero(field <= now))]
        sources[stream].busy = busy if pause != 10_000 else None
        merging.drain(handler)
    # Those of one instant may change places between streams, but not within one.
    instants = {number: at for rows_of in rows for at, number in rows_of}
    order = [int(str(number)) for number in handler.order]
    assert sorted(order) == list(range(len(steps)))
    assert [instants[number] for number in order] == sorted(instants.values())
    for rows_of in rows:
        numbers = [number for _, number in rows_of]
        assert [number for number in order if number in numbers] == numbers


def test_skipping_counts_every_stream() -> None:
    merging, sources, handler = merge(events((1, 1)), chunks(READ, (1, 1), (2, 2)), chunks(WRITE, (1, 1)))
    assert merging.skip_all() == 4
    assert merging.drain(handler) == 0
    assert merging.delivered == {"events": 0, "reads": 0, "writes": 0}
    assert all(source.position == len(source.records) for source in sources)


# ---- what each record says ----


def test_chunks_say_everything() -> None:
    reads, writes = chunks(READ, (10, 2**63 + 7)), chunks(WRITE, (20, 11))
    for number, array in enumerate((reads, writes)):
        header = array["header"]
        for name, value in zip(
            "at_ns position uncaptured lost lost_other service tgid tid".split(), range(31, 39), strict=True
        ):
            header[name] = value + 100 * number
        array["payload"][:] = np.frombuffer(b"0123456789" * 4, np.uint8)[: array["payload"].shape[1]]
    reads["header"]["size"] = 40
    writes["header"]["size"] = 7
    merging, _, handler = merge(None, reads, writes)
    merging.drain(handler)
    assert handler.calls == [
        ("read", 2**63 + 7, 31, 32, b"0123456789" * 4, 33, 34, 35, 36, 37, 38),
        ("wrote", 11, 131, 132, b"0123456", 133, 134, 135, 136, 137, 138),
    ]
    # Plain Python: numpy's numbers are slow, and would end up in labels.
    assert {type(value) for call in handler.calls for value in call[1:]} == {int, bytes}


def test_size_beyond_the_payload_takes_only_the_payload() -> None:
    writes = chunks(WRITE, (10, 1), (20, 2))
    writes["payload"][1] = 0xFF
    writes["header"]["size"] = [2**32 - 1, 0]
    merging, _, handler = merge(None, None, writes)
    merging.drain(handler)
    assert [call[4] for call in handler.calls] == [bytes(24), b""]


def test_events_say_what_their_kind_has() -> None:
    array = np.concatenate([events((10 * kind, 7), kind=kind) for kind in EventKind])
    for name, value in (("position", 101), ("tx_position", 211), ("size", 307), ("service", 3), ("tgid", 19)):
        array[name] = value
    for name, value in (("old_state", 1), ("new_state", 7), ("error", 104), ("born", 1), ("family", 2)):
        array[name] = value
    array["peer_port"] = 4711
    array["peer"][:, :4] = [192, 0, 2, 7]
    merging, _, handler = merge(array)
    assert merging.drain(handler) == 5
    assert handler.calls == [
        ("opened", 7, 10, 3, "192.0.2.7:4711", True, 101, 211),
        ("accepted", 7, 3),
        ("segment", 7, 30, 101, 307),
        ("state", 7, 40, 1, 7, 19, 101, 211, 104),
        ("reset", 7, 50),
    ]


@pytest.mark.parametrize(
    ("address", "text"),
    [
        ("20010db8000000000000000000000007", "[2001:db8::7]:80"),
        ("00000000000000000000ffffc0000207", "192.0.2.7:80"),
        ("00000000000000000000000000000001", "[::1]:80"),
    ],
)
def test_peers_of_ipv6(address: str, text: str) -> None:
    array = events((10, 1), kind=EventKind.OPENED)
    array["family"] = 10
    array["peer_port"] = 80
    array["peer"][0] = np.frombuffer(bytes.fromhex(address), np.uint8)
    merging, _, handler = merge(array)
    merging.drain(handler)
    assert handler.calls[0][4] == text


def test_event_of_an_unknown_kind_is_passed_over() -> None:
    array = np.concatenate([events((10, 1)), events((20, 2), kind=99), events((40, 4))])
    merging, _, handler = merge(array, chunks(READ, (30, 3)))
    assert merging.drain(handler) == 4
    assert handler.order == [1, 3, 4]
