"""The window of what threads did: what it keeps, what it forgets, and how a view arranges it."""

import re
import tracemalloc
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import exporter.timeline as timeline_module
from exporter.timeline import (
    EAGAIN,
    FIRST,
    LOSSES_LIMIT,
    NAMES_LIMIT,
    READY_RACE_NS,
    RECORDER_ROWS,
    SEARCH_ROWS,
    TIMEOUT,
    MessageKind,
    Reason,
    Records,
    Stream,
    Timeline,
    View,
    Waker,
)
from tests.simulator import INTERVAL, MESSAGE, NAME, SPAN, as_records


def intervals(*times: tuple[int, int], tid: int = 7, first: int = 1, **fields: Any) -> Records:  # noqa: ANN401
    rows = [
        {"off_ns": off_ns, "on_ns": on_ns, "tid": tid, "tgid": 7, "sequence": first + place, **fields}
        for place, (off_ns, on_ns) in enumerate(times)
    ]
    return as_records(rows, INTERVAL)


def messages(*rows: tuple[int, MessageKind, int, int, int]) -> Records:
    """Rows of when, kind, sk, tid, result."""
    names = ("at_ns", "kind", "sk", "tid", "result")
    return as_records([dict(zip(names, map(int, row), strict=True)) for row in rows], MESSAGE)


def one_by_one(size: int, start: int = 0) -> Records:
    return intervals(*((10 * n, 10 * n + 5) for n in range(start, start + size)), first=start + 1)


@settings(deadline=None)
@given(st.lists(st.integers(0, 40), max_size=30))
def test_the_newest_records_are_kept_and_the_rest_forgotten(batches: list[int]) -> None:
    capacity = 23
    timeline = Timeline(int(capacity * INTERVAL.itemsize / 0.74) + 1)
    made = 0
    for size in batches:
        timeline.add_intervals(one_by_one(size, made))
        made += size
    kept = np.concatenate([*timeline.slices(Stream.intervals, 0, 1 << 62), one_by_one(0)])
    expected = one_by_one(made)[max(0, made - capacity) :]
    assert kept.tobytes() == expected.tobytes()
    oldest_ns = timeline.oldest_ns(Stream.intervals)
    if made <= capacity:
        assert oldest_ns == 0
    else:
        assert oldest_ns < int(expected["on_ns"][0])
        assert oldest_ns >= 10 * (made - capacity - max(batches)) - 5


def test_one_impossible_time_does_not_make_everything_forgotten() -> None:
    timeline = Timeline(int(23 * INTERVAL.itemsize / 0.74) + 1)
    records = one_by_one(20)
    records["on_ns"][3] = 2**62
    timeline.add_intervals(records)
    timeline.add_intervals(one_by_one(20, 20))
    assert timeline.oldest_ns(Stream.intervals) < 400


def test_the_memory_is_bounded() -> None:
    limit_bytes = 1 << 20
    tracemalloc.start()
    timeline = Timeline(limit_bytes)
    for round_ in range(23):
        timeline.add_intervals(one_by_one(997, round_ * 997))
        timeline.add_messages(messages(*((round_, MessageKind.READY, 1, 7, 0),) * 997))
        timeline.add_spans(np.zeros(997, SPAN))
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert size <= limit_bytes + 300_000


def test_slices_are_in_order_and_small() -> None:
    timeline = Timeline(1 << 22)
    records = one_by_one(9_001)
    timeline.add_intervals(records[::-1])
    slices = list(timeline.slices(Stream.intervals, 15, 10 * 9_000 + 4))
    assert [part.size for part in slices] == [RECORDER_ROWS, RECORDER_ROWS, 8_999 - 2 * RECORDER_ROWS]
    assert np.concatenate(slices).tobytes() == records[1:-1].tobytes()
    assert list(timeline.slices(Stream.spans, 0, 1 << 62)) == []


def test_names_are_the_last_ones_and_bounded() -> None:
    timeline = Timeline(1 << 20)
    rows = [{"tid": tid, "comm": f"thread{tid}".encode()} for tid in range(NAMES_LIMIT)]
    timeline.add_names(as_records(rows, NAME))
    assert timeline.thread_name(0) == "thread0"  # and so thread 1 was used least recently
    timeline.add_names(as_records([{"tid": NAMES_LIMIT, "comm": b"0123456789abcdef"}], NAME))
    assert timeline.thread_name(1) is None
    assert timeline.thread_name(0) == "thread0"
    assert timeline.thread_name(NAMES_LIMIT) == "0123456789abcdef"
    timeline.add_names(as_records([{"tid": 0, "comm": b"\xff\x1b[2J"}], NAME))
    assert timeline.thread_name(0) == "\ufffd\x1b[2J"


def test_losses_are_joined_and_bounded() -> None:
    timeline = Timeline(1 << 20)
    timeline.note_loss(100, 200, Stream.messages)
    timeline.note_loss(150, 300, Stream.messages)
    timeline.note_loss(500, 600, Stream.messages)
    view = timeline.view(0, 1_000)
    assert view.losses[Stream.messages] == [(100, 300), (500, 600)]
    assert view.losses[Stream.intervals] == []
    assert timeline.view(301, 499).losses[Stream.messages] == []
    for number in range(LOSSES_LIMIT * 3):
        timeline.note_loss(10_000 + 10 * number, 10_000 + 10 * number + 5, Stream.messages)
    losses = timeline.view(0, 1 << 40).losses[Stream.messages]
    assert len(losses) == LOSSES_LIMIT
    assert losses[0][0] == 100
    assert losses[-1] == (10_000 + 10 * (LOSSES_LIMIT * 3 - 1), 10_005 + 10 * (LOSSES_LIMIT * 3 - 1))


def test_messages_tell_how_many_were_lost_before_them() -> None:
    timeline = Timeline(1 << 20)
    rows = messages(*((100 * n, MessageKind.READY, 1, 7, 0) for n in range(1, 10)))
    rows["lost"] = [3, 3, 5, 5, 4, 5, 5, 5, 9]
    for part in (rows[:4], rows[4:8], rows[8:]):
        timeline.add_messages(part)
    assert timeline.view(0, 10_000).losses[Stream.messages] == [(200, 300), (800, 900)]


def test_a_switch_that_was_missed_is_a_hole() -> None:
    records = intervals((100, 110), (200, 210), (300, 310))
    records["flags"] = [FIRST, FIRST, 0]
    timeline = Timeline(1 << 20)
    timeline.add_intervals(records)
    thread = timeline.view(50, 400).thread(7)
    assert thread is not None
    assert thread.holes == [False, True, False]
    assert [bool(flags & FIRST) for flags in thread.flags] == [True, False, False]


def test_what_was_forgotten_counts_as_lost() -> None:
    timeline = Timeline(int(23 * MESSAGE.itemsize / 0.22) + 1)
    timeline.add_messages(messages(*((10 * n, MessageKind.READY, 1, 7, 0) for n in range(40))))
    timeline.add_messages(messages(*((10 * n, MessageKind.READY, 1, 7, 0) for n in range(40, 47))))
    assert timeline.view(100, 500).losses[Stream.messages] == [(0, timeline.oldest_ns(Stream.messages))]


def test_the_last_interval_is_found_wherever_it_lies_in_memory() -> None:
    """Threads whose last interval before the view is in each block of the search, and past the wrap."""
    capacity = SEARCH_ROWS * 5 // 2
    timeline = Timeline(int(capacity * INTERVAL.itemsize / 0.74) + 1)
    made = capacity + SEARCH_ROWS // 2
    records = one_by_one(made)
    records["tid"] = 1
    marked = range(made - 1, -1, -1_009)
    for number, row in enumerate(marked):
        records["tid"][row] = 100 + number
    for start in range(0, made, 997):
        timeline.add_intervals(records[start : start + 997])
    view = timeline.view(10 * made, 10 * made + 100)
    for number, row in enumerate(marked):
        thread = view.thread(100 + number)
        assert (thread.off if thread else None) == ([10 * row] if row >= made - capacity else None)


def test_a_view_stays_when_records_are_added() -> None:
    timeline = Timeline(int(23 * INTERVAL.itemsize / 0.74) + 1)
    timeline.add_intervals(one_by_one(20))
    view = timeline.view(0, 10_000)
    timeline.add_intervals(one_by_one(20, 20))
    thread = view.thread(7)
    assert thread is not None
    assert thread.off == [10 * n for n in range(20)]


def test_a_thread_s_last_interval_before_the_view_is_there() -> None:
    timeline = Timeline(1 << 20)
    timeline.add_intervals(intervals((100, 110), (200, 210), (9_000, 9_010)))
    thread = timeline.view(5_000, 6_000).thread(7)
    assert thread is not None
    assert thread.off == [200, 9_000]
    assert thread.holes == [False, False]
    assert thread.run_at(5_500) == 0
    assert timeline.view(5_000, 6_000).thread(8) is None
    assert timeline.view(5_000, 6_000).thread(1 << 40) is None


@pytest.mark.parametrize(
    ("field", "value"), [("off_ns", 216), ("wake_ns", 199), ("wake_ns", 216), ("on_ns", 199), ("off_ns", 2**63)]
)
def test_what_cannot_be_true_is_a_hole(field: str, value: int) -> None:
    records = intervals((100, 110), (200, 215), (300, 310))
    records[field][1] = value
    timeline = Timeline(1 << 20)
    timeline.add_intervals(records)
    thread = timeline.view(50, 400).thread(7)
    assert thread is not None
    assert (thread.off, thread.holes) == ([100, 300], [False, True])


def test_an_interval_that_overlaps_the_one_before_is_no_run_between() -> None:
    timeline = Timeline(1 << 20)
    timeline.add_intervals(intervals((100, 210), (200, 215)))
    thread = timeline.view(50, 400).thread(7)
    assert thread is not None
    assert thread.holes == [False, True]


def test_a_sequence_that_begins_again_is_another_thread() -> None:
    timeline = Timeline(1 << 20)
    timeline.add_intervals(intervals((100, 110), (200, 210)))
    timeline.add_intervals(intervals((300, 310), (400, 410)))
    thread = timeline.view(50, 400).thread(7)
    assert thread is not None
    assert [bool(flags & FIRST) for flags in thread.flags] == [True, False, True, False]
    assert thread.holes == [False, False, True, False]


def test_stretches_of_work_begin_where_a_thread_is_told_what_to_do() -> None:
    records = intervals(*((100 * n, 100 * n + 10) for n in range(1, 9)), first=2)
    records["wake_ns"] = records["off_ns"] + 5
    records["reason"] = [
        Reason.POLL, Reason.CPU, Reason.DISK, Reason.TIMER, Reason.FUTEX, Reason.POLL, Reason.PIPE, Reason.STOPPED
    ]  # fmt: skip
    records["waker"] = [
        Waker.NETWORK, Waker.NONE, Waker.SOFTIRQ, Waker.HARDIRQ, Waker.TASK, Waker.HARDIRQ, Waker.TASK, Waker.TASK
    ]  # fmt: skip
    timeline = Timeline(1 << 20)
    timeline.add_intervals(records)
    thread = timeline.view(50, 1_000).thread(7)
    assert thread is not None
    assert thread.starts == [0, 0, 0, 0, 4, 4, 6, 6]


def locks_of(view: View, *tids: int) -> dict[int, list[bool]]:
    threads = {tid: view.thread(tid) for tid in tids}
    return {tid: thread.locks for tid, thread in threads.items() if thread is not None}


def test_a_lock_is_waited_for_and_let_go_of_by_both_sides() -> None:
    timeline = Timeline(1 << 20)
    futex = {"reason": int(Reason.FUTEX), "waker": int(Waker.TASK)}
    timeline.add_intervals(intervals((100, 110), tid=1, object=0x1000, waker_tid=2, **futex))
    timeline.add_intervals(intervals((200, 210), tid=2, object=0x1008, waker_tid=1, **futex))  # its second word
    timeline.add_intervals(intervals((300, 310), tid=1, object=0x2000, waker_tid=2, **futex))
    timeline.add_intervals(intervals((400, 410), tid=1, object=0x3000, waker_tid=2, **futex))  # too far apart
    timeline.add_intervals(intervals((500, 510), tid=2, object=0x3040, waker_tid=1, **futex))
    assert locks_of(timeline.view(0, 1_000), 1, 2) == {1: [True, False, False], 2: [True, False]}
    assert locks_of(timeline.view(250, 1_000), 2) == {2: [False, False]}


def test_a_queue_of_jobs_is_no_lock_although_workers_pass_on_its_word() -> None:
    timeline = Timeline(1 << 20)
    futex = {"reason": int(Reason.FUTEX), "waker": int(Waker.TASK), "object": 0x1000}
    timeline.add_intervals(intervals((100, 110), (200, 210), tid=1, waker_tid=9, **futex))  # 9 puts jobs in
    timeline.add_intervals(intervals((120, 130), tid=2, waker_tid=1, **futex))  # 1 took one, and there was another
    timeline.add_intervals(intervals((220, 230), tid=1, waker_tid=2, **futex))
    assert locks_of(timeline.view(0, 1_000), 1, 2) == {1: [False, False, True], 2: [True]}


def test_a_lock_with_a_timeout_is_one_for_all_its_threads() -> None:
    timeline = Timeline(1 << 20)
    futex = {"reason": int(Reason.FUTEX), "waker": int(Waker.TASK)}
    timeline.add_intervals(intervals((600, 610), tid=1, object=0x4000, waker_tid=2, flags=TIMEOUT, **futex))
    timeline.add_intervals(intervals((700, 710), tid=2, object=0x4058, waker_tid=1, **futex))
    timeline.add_intervals(intervals((800, 810), tid=3, object=0x4000, waker_tid=4, **futex))
    view = timeline.view(0, 1_000)
    assert locks_of(view, 1, 2, 3) == {1: [True], 2: [True], 3: [True]}
    assert [view.is_timed_lock(7, address) for address in (0x4000, 0x4058, 0x4008)] == [True, True, False]
    assert not view.is_timed_lock(8, 0x4000)


def test_who_woke_somebody_other_than_by_a_lock() -> None:
    timeline = Timeline(1 << 20)
    futex = {"reason": int(Reason.FUTEX), "waker": int(Waker.TASK)}
    timeline.add_intervals(intervals((100, 110), tid=1, object=0x1000, waker_tid=2, wake_ns=105, **futex))
    timeline.add_intervals(intervals((200, 210), tid=2, object=0x1000, waker_tid=1, wake_ns=205, **futex))
    timeline.add_intervals(intervals((300, 310), tid=1, object=0x2000, waker_tid=2, wake_ns=305, **futex))
    view = timeline.view(0, 1_000)
    assert not view.woke_somebody(2, 0, 304)
    assert view.woke_somebody(2, 0, 305)
    assert not view.woke_somebody(2, 306, 400)
    assert not view.woke_somebody(1, 0, 1_000)


def test_who_sent_what_was_received() -> None:
    ready, received, sent = MessageKind.READY, MessageKind.RECEIVED, MessageKind.SENT
    timeline = Timeline(1 << 20)
    timeline.add_messages(
        messages(
            (100, ready, 1, 11, 0),
            (110, ready, 1, 12, 0),
            (120, received, 1, 20, 5),
            (130, received, 1, 20, 5),  # the rest of the same
            (200 + READY_RACE_NS, ready, 1, 13, 0),  # stamped late
            (200, received, 1, 20, 5),
            (900 + READY_RACE_NS, received, 1, 20, 5),
            (300, sent, 2, 20, 100),
            (310, sent, 2, 20, -EAGAIN),
            (320, sent, 2, 21, 100),
        )
    )
    view = timeline.view(50, 5_000)
    socket = view.socket(1)
    assert socket is not None
    assert list(socket.senders(120)) == [(100, 11), (110, 12)]
    assert list(socket.senders(130)) == []
    assert list(socket.senders(200)) == [(200, 13)]
    assert list(socket.senders(900 + READY_RACE_NS)) == []
    asked = view.socket(2)
    assert asked is not None
    assert [asked.last_sent(at_ns) for at_ns in (300, 301, 320, 321)] == [None, (300, 20), (300, 20), (320, 21)]
    assert view.full_buffers(bytes(16), 0) == [(310, 20, 320)]
    assert view.full_buffers(bytes(16), 1) == []
    assert view.socket(3) is None


def test_nothing_was_ever_added() -> None:
    view = Timeline(1 << 20).view(0, 1_000)
    assert view.thread(7) is None
    assert view.socket(7) is None
    assert not view.is_timed_lock(7, 7)
    assert not view.woke_somebody(7, 0, 1_000)
    assert view.full_buffers(b"", 0) == []
    assert view.lost_until(0, 1_000) == 0


# ---- the other side of the border ----

HEADER = (Path(__file__).parents[2] / "bpf" / "records.h").read_text()
SIZES = {"u64": "u8", "u32": "u4", "u16": "u2", "u8": "u1", "s32": "i4"}


@pytest.mark.parametrize(
    ("name", "prefix", "here"),
    [("wait_reason", "WAIT_", Reason), ("waker", "WAKER_", Waker), ("message_kind", "MESSAGE_", MessageKind)],
)
def test_the_enumerations_are_those_of_the_probe(name: str, prefix: str, here: type[IntEnum]) -> None:
    found = re.search(rf"^enum {name} {{\n(.*?)^}};", HEADER, re.DOTALL | re.MULTILINE)
    assert found
    values: dict[str, int] = {}
    for member, value in re.findall(rf"^\t{prefix}(\w+)(?: = (\d+))?,", found[1], re.MULTILINE):
        values[member] = int(value) if value else len(values)
    values.pop("MAX", None)
    assert values == {member.name: member.value for member in here}


def test_the_flags_are_those_of_the_probe() -> None:
    flags = {name: int(value) for name, value in re.findall(r"^#define INTERVAL_(\w+) (\d+)", HEADER, re.MULTILINE)}
    names = ("THROTTLED", "IOWAIT", "TIMEOUT", "BORN", "FIRST", "WAKER_TARGET", "GPU")
    assert flags == {name: getattr(timeline_module, name) for name in names}
    for kind in ("SPAN_RECLAIM", "SPAN_GPU_SYNC"):
        assert f"{kind} = {getattr(timeline_module, kind)}," in HEADER


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("thread_interval", INTERVAL), ("message", MESSAGE), ("thread_name", NAME), ("thread_span", SPAN)],
)
def test_the_simulator_s_records_are_laid_out_as_the_probe_s(name: str, dtype: np.dtype[np.void]) -> None:
    found = re.search(rf"^struct {name} {{\n(.*?)^}};", HEADER, re.DOTALL | re.MULTILINE)
    assert found
    fields = re.findall(r"^\t(\w+) (\w+)(?:\[(\d+)\])?;", found[1], re.MULTILINE)
    layout = np.dtype(
        [(field, SIZES[kind], int(size)) if size else (field, SIZES[kind]) for kind, field, size in fields]
    )
    assert layout == dtype
    assert dtype.itemsize % 8 == 0
