"""A recording as Trace Event JSON: what is drawn, where, and what is left out."""

from __future__ import annotations

import itertools
import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exporter.critical_path import Cause, Step
from exporter.request import Failure, FinishedRequest
from exporter.timeline import MessageKind, Reason, Waker
from exporter.trace_event import (
    BLOCK_PID,
    LEAST_BYTES,
    REQUESTS_PID,
    TCP_PID,
    Recording,
    TcpKind,
    Written,
    microseconds,
    write,
)
from tests.unit.finished import TOLD, later

US = 1_000
MS = 1_000_000
BEGIN = 98_765_432_109_876_543
TARGET = 32
TID = 7

INTERVAL = np.dtype(
    [
        *((name, "u8") for name in "off_ns wake_ns on_ns object ready_sk".split()),
        *((name, "u4") for name in "tid tgid waker_tid waker_tgid service sequence".split()),
        *((name, "u2") for name in "syscall cpu".split()),
        *((name, "u1") for name in "reason waker flags pad".split()),
    ]
)
MESSAGE = np.dtype(
    [
        *((name, "u8") for name in "at_ns sk".split()),
        *((name, "u4") for name in "tid tgid service".split()),
        ("result", "i4"),
        *((name, "u2") for name in "local_port peer_port".split()),
        *((name, "u1") for name in "kind family".split()),
        ("pad", "u1", (2,)),
        ("peer", "u1", (16,)),
    ]
)
SPAN = np.dtype(
    [
        *((name, "u8") for name in "begin_ns end_ns".split()),
        *((name, "u4") for name in "tid tgid service".split()),
        ("kind", "u1"),
        ("pad", "u1", (3,)),
    ]
)
TCP = np.dtype(
    [
        *((name, "u8") for name in "at_ns duration_ns".split()),
        *((name, "u4") for name in "tgid tid service".split()),
        *((name, "u2") for name in "local_port peer_port".split()),
        *((name, "u1") for name in "kind family".split()),
        ("pad", "u1", (6,)),
        ("peer", "u1", (16,)),
    ]
)
BLOCK = np.dtype(
    [
        *((name, "u8") for name in "queued_ns issued_ns done_ns".split()),
        *((name, "u4") for name in "tid tgid service device bytes".split()),
        ("operation", "u1"),
        ("pad", "u1", (3,)),
    ]
)

REQUEST = replace(later(TOLD, BEGIN + 10 * MS), number=7, tgid=100, tid=101)


def rows(dtype: np.dtype[Any], *each: dict[str, Any]) -> npt.NDArray[Any]:
    """Records with what is given, zero elsewhere; instants (`_ns`) count from BEGIN, 0 stays 0."""
    found = np.zeros(len(each), dtype)
    for index, one in enumerate(each):
        for name, value in one.items():
            instant = name.endswith("_ns") and name != "duration_ns" and value
            found[name][index] = BEGIN + value if instant else value
    return found


def interval(tid: int, sequence: int, off: int, wake: int, on: int, **more: Any) -> dict[str, Any]:  # noqa: ANN401
    given = {"tid": tid, "tgid": 100, "sequence": sequence, "off_ns": off, "wake_ns": wake, "on_ns": on}
    return {**given, "reason": Reason.POLL, "syscall": 0xFFFF, **more}


def recording(requests: Sequence[FinishedRequest] = (), **more: Any) -> Recording:  # noqa: ANN401
    names = {100: "uvicorn", 101: "worker", 200: "engine"}
    given = {"thread_name": names.get, "whole": True, **more}
    return Recording(BEGIN, BEGIN + 1000 * MS, 42, ("roleplay",), requests, **given)


def written(given: Recording, max_bytes: int = 1 << 28) -> dict[str, Any]:
    told = Written()
    data = b"".join(write(given, max_bytes, told))
    found = json.loads(data)
    assert told.bytes == len(data)
    assert told.events == sum(event["ph"] != "M" for event in found["traceEvents"])
    assert found["displayTimeUnit"] == "ns"
    return found


def zero(found: dict[str, Any]) -> float:
    """BEGIN as a time in the file."""
    since: int = BEGIN - found["otherData"]["zero_ns"]
    return since / 1000


def slices(found: dict[str, Any], tid: int) -> list[tuple[str, float, float]]:
    """Name, begin and duration in microseconds since BEGIN of what is on a track, in order of time."""
    events = [event for event in found["traceEvents"] if event["ph"] == "X" and event["tid"] == tid]
    events.sort(key=lambda event: (event["ts"], -event["dur"]))
    return [(event["name"], round(event["ts"] - zero(found), 3), event["dur"]) for event in events]


def check_nesting(found: dict[str, Any]) -> None:
    """Every two slices of a track lie in one another or apart: readers of the format take no others."""
    tracks: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    for event in found["traceEvents"]:
        if event["ph"] == "X":
            begin = round(event["ts"] * 1000)
            tracks[(event["pid"], event["tid"])].append((begin, begin + round(event["dur"] * 1000)))
    for each in tracks.values():
        stack: list[int] = []
        for begin, end in sorted(each, key=lambda slice_: (slice_[0], -slice_[1])):
            while stack and stack[-1] <= begin:
                stack.pop()
            assert not stack or end <= stack[-1]
            stack.append(end)


def arrows(found: dict[str, Any]) -> list[tuple[str, int, float, int, float]]:
    """Name, from which thread and when, to which thread and when; each end lies on a slice of its track."""
    ends: dict[tuple[str, int], dict[str, Any]] = defaultdict(dict)
    for event in found["traceEvents"]:
        if event["ph"] in "sf":
            assert event["ph"] not in ends[(event["name"], event["id"])]
            ends[(event["name"], event["id"])][event["ph"]] = event
    for both in ends.values():
        assert both.keys() == {"s", "f"}
        assert both["f"]["bp"] == "e"
        for end in both.values():
            assert any(
                event["ph"] == "X"
                and (event["pid"], event["tid"]) == (end["pid"], end["tid"])
                and event["ts"] - 1e-3 <= end["ts"] <= event["ts"] + event["dur"]
                for event in found["traceEvents"]
            )
    return sorted(
        (
            name,
            both["s"]["tid"],
            round(both["s"]["ts"] - zero(found), 3),
            both["f"]["tid"],
            round(both["f"]["ts"] - zero(found), 3),
        )
        for (name, _), both in ends.items()
    )


# ---- threads ----


def test_a_thread_runs_sleeps_and_waits_for_a_cpu() -> None:
    found = written(
        recording(
            intervals=rows(
                INTERVAL,
                interval(101, 5, 10 * US, 40 * US, 47 * US, reason=Reason.FUTEX, syscall=202, cpu=3),
                interval(101, 6, 60 * US, 0, 71 * US, reason=Reason.CPU),
                interval(101, 7, 80 * US, 90 * US, 103 * US, flags=1),
                interval(101, 8, 110 * US, 0, 130 * US, reason=Reason.DISK),
            )
        )
    )
    assert slices(found, 101) == [
        ("futex", 10, 30),
        ("run queue", 40, 7),
        ("running", 47, 13),
        ("run queue", 60, 11),
        ("running", 71, 9),
        ("poll", 80, 10),
        ("cpu quota", 90, 13),
        ("running", 103, 7),
        ("disk", 110, 20),
    ]
    (futex,) = [event for event in found["traceEvents"] if event["name"] == "futex"]
    assert futex["args"] == {"syscall": 202}
    names = {
        (event["name"], event["pid"], event.get("tid")): event["args"]["name"]
        for event in found["traceEvents"]
        if event["ph"] == "M" and "name" in event["args"]
    }
    assert names == {("process_name", 100, None): "uvicorn", ("thread_name", 100, 101): "worker"}
    check_nesting(found)


def test_instants_are_exact_however_long_the_host_runs() -> None:
    assert microseconds(98_765_432_109_876_543) == "98765432109876.543"
    assert microseconds(7_000) == "7"
    assert microseconds(7) == "0.007"
    given = recording(intervals=rows(INTERVAL, interval(101, 1, 1, 2, 3)))
    assert b'"ts":109876.544,"dur":0.001' in b"".join(write(given))
    told = written(given)["otherData"]
    assert told["zero_ns"] == 98_765_432_000_000_000
    assert told["zero_unix_ns"] == told["zero_ns"] + 42


def test_what_began_long_before_does_not_stretch_the_picture() -> None:
    asleep = interval(101, 1, 10 * US, 20 * US, 21 * US)
    waiting = interval(102, 1, 10 * US, 20 * US, 700 * MS)
    old = replace(REQUEST, arrived_ns=BEGIN - 3600 * 1000 * MS, read_ns=BEGIN - 3599 * 1000 * MS)
    given = replace(recording([old], intervals=rows(INTERVAL, asleep, waiting)), since_ns=BEGIN + 20 * US)
    found = written(given)
    assert slices(found, 101) == [("poll", 10, 10), ("run queue", 20, 1)]
    assert min(event["ts"] for event in found["traceEvents"] if event["ph"] == "X") * 1000 == pytest.approx(
        BEGIN + 20 * US - 600_000 * MS - found["otherData"]["zero_ns"]
    )
    found = written(replace(given, requests=[]))
    assert slices(found, 101) == [("run queue", 20, 1)]
    assert slices(found, 102) == [("run queue", 20, 699_980)]


def test_no_run_is_drawn_over_a_hole_or_into_another_thread() -> None:
    found = written(
        recording(
            intervals=rows(
                INTERVAL,
                interval(101, 1, 10 * US, 20 * US, 20 * US),
                interval(101, 3, 50 * US, 60 * US, 60 * US),  # the second is lost
                interval(101, 1, 80 * US, 90 * US, 90 * US, tgid=300),  # the number belongs to another thread now
                interval(102, 2, 95 * US, 99 * US, 99 * US),
            )
        )
    )
    assert not [event for event in found["traceEvents"] if event["name"] == "running"]


def test_clocks_that_went_backwards_draw_nothing_wrong() -> None:
    found = written(
        recording(
            intervals=rows(
                INTERVAL,
                interval(101, 1, 10 * US, 20 * US, 21 * US),
                interval(101, 2, 40 * US, 30 * US, 35 * US),  # on before off
                interval(101, 3, 60 * US, 55 * US, 70 * US),  # woken before it slept
                interval(101, 4, 80 * US, 99 * US, 90 * US),  # woken after it ran
            )
        )
    )
    assert all(event["dur"] >= 0 for event in found["traceEvents"] if event["ph"] == "X")
    assert slices(found, 101) == [
        ("poll", 10, 10),
        ("run queue", 20, 1),
        ("running", 21, 19),
        ("running", 35, 25),
        ("poll", 60, 10),
        ("running", 70, 10),
        ("poll", 80, 10),
    ]


def test_reclaim_is_drawn_inside_of_what_the_thread_did() -> None:
    found = written(
        recording(
            intervals=rows(
                INTERVAL,
                interval(101, 1, 10 * US, 20 * US, 20 * US),
                interval(101, 2, 40 * US, 50 * US, 55 * US, reason=Reason.OTHER),
                interval(101, 3, 80 * US, 90 * US, 90 * US),
            ),
            spans=rows(
                SPAN,
                {"begin_ns": 30 * US, "end_ns": 62 * US, "tid": 101, "tgid": 100, "kind": 1},
                {"begin_ns": 30 * US, "end_ns": 62 * US, "tid": 101, "tgid": 100, "kind": 99},
                {"begin_ns": 30 * US, "end_ns": 62 * US, "tid": 999, "tgid": 100, "kind": 1},
            ),
        )
    )
    assert [each for each in slices(found, 101) if each[0] == "reclaim"] == [
        ("reclaim", 30, 10),
        ("reclaim", 40, 10),
        ("reclaim", 50, 5),
        ("reclaim", 55, 7),
    ]
    check_nesting(found)


# ---- arrows ----


def woken(by: int, at: int, **more: Any) -> dict[str, Any]:  # noqa: ANN401
    return {
        "wake_ns": at,
        "waker": Waker.TASK,
        "waker_tid": by,
        "waker_tgid": 200,
        "flags": TARGET,
        **more,
    }


ENGINE = (
    interval(200, 1, 1 * US, 5 * US, 5 * US, tgid=200),
    interval(200, 2, 90 * US, 95 * US, 95 * US, tgid=200),
)


def test_who_woke_a_thread_is_an_arrow() -> None:
    found = written(
        recording(
            intervals=rows(
                INTERVAL,
                *ENGINE,
                interval(101, 1, 10 * US, 0, 47 * US, **woken(200, 40 * US)),
                interval(101, 2, 50 * US, 0, 62 * US, **woken(200, 60 * US, waker=Waker.MESSAGE)),
                interval(101, 3, 70 * US, 0, 77 * US, **woken(200, 75 * US, flags=0)),  # of no service
                interval(101, 4, 80 * US, 0, 87 * US, **woken(200, 85 * US, waker=Waker.NETWORK)),
                interval(101, 5, 90 * US, 0, 94 * US, **woken(200, 92 * US)),  # who slept then
            )
        )
    )
    assert arrows(found) == [("wake", 200, 40, 101, 40), ("wake", 200, 60, 101, 60)]


def test_a_thread_that_never_sleeps_ran_where_it_woke_others() -> None:
    given = rows(
        INTERVAL,
        interval(101, 1, 10 * US, 0, 47 * US, **woken(200, 40 * US)),
        interval(101, 2, 50 * US, 0, 62 * US, **woken(200, 60 * US)),
    )
    found = written(recording(intervals=given))
    assert slices(found, 200) == [("running", 40, 20.001)]
    assert len(arrows(found)) == 2
    # where a record may be missing, nothing is known of what it did in between
    found = written(recording(intervals=given, whole=False))
    assert (slices(found, 200), arrows(found)) == ([], [])


def test_a_run_reaches_to_what_the_thread_did_last_and_from_what_it_did_first() -> None:
    found = written(
        recording(
            intervals=rows(
                INTERVAL,
                interval(200, 8, 30 * US, 45 * US, 50 * US, tgid=200),
                interval(101, 1, 10 * US, 0, 21 * US, **woken(200, 20 * US)),
                interval(101, 2, 50 * US, 0, 72 * US, **woken(200, 70 * US)),
            )
        )
    )
    assert slices(found, 200) == [
        ("running", 20, 10),
        ("poll", 30, 15),
        ("run queue", 45, 5),
        ("running", 50, 20.001),
    ]


def ready(tid: int, at: int, sk: int = 5) -> dict[str, Any]:
    return {"at_ns": at, "sk": sk, "tid": tid, "tgid": 200, "kind": MessageKind.READY}


def received(tid: int, at: int, sk: int = 5, result: int = 23) -> dict[str, Any]:
    return {"at_ns": at, "sk": sk, "tid": tid, "tgid": 100, "kind": MessageKind.RECEIVED, "result": result}


def test_a_message_comes_from_the_first_that_sent_since_the_one_before() -> None:
    found = written(
        recording(
            messages=rows(
                MESSAGE,
                ready(200, 10 * US),
                ready(201, 11 * US),
                received(101, 20 * US),
                received(101, 21 * US, result=-11),  # nothing was there: it takes nothing
                ready(202, 30 * US),
                ready(203, 33 * US, sk=6),
                received(101, 40 * US),
                received(101, 41 * US),  # from where is not known
                received(102, 50 * US, sk=6),
            )
        )
    )
    assert arrows(found) == [
        ("message", 200, 10, 101, 20),
        ("message", 202, 30, 101, 40),
        ("message", 203, 33, 102, 50),
    ]


def test_a_sender_that_was_stamped_late_is_not_taken_for_the_next_message() -> None:
    found = written(
        recording(
            messages=rows(
                MESSAGE,
                received(101, 20 * US),
                ready(200, 22 * US),  # of the message before
                ready(201, 30 * US),
                received(101, 40 * US),
                received(101, 50 * US),
                ready(202, 900 * US),  # far too late for it
            )
        )
    )
    assert arrows(found) == [("message", 200, 19.999, 101, 20), ("message", 201, 30, 101, 40)]


def test_sends_and_receives_are_instants_with_their_peer() -> None:
    peer = np.zeros(16, np.uint8)
    peer[:4] = (10, 0, 0, 3)
    sent = {"at_ns": 9 * US, "sk": 5, "tid": 101, "tgid": 100, "kind": MessageKind.SENT, "result": 31, "family": 2}
    found = written(
        recording(
            messages=rows(
                MESSAGE,
                {**sent, "peer": peer, "peer_port": 6379, "local_port": 4001},
                {**sent, "at_ns": 12 * US, "result": -11},
            )
        )
    )
    told = [event for event in found["traceEvents"] if event["ph"] == "i"]
    told.sort(key=lambda event: event["ts"])
    assert [(event["name"], event["s"], event["tid"]) for event in told] == [("send", "t", 101)] * 2
    assert told[0]["args"] == {"bytes": 31, "local_port": 4001, "peer": "10.0.0.3:6379"}
    assert told[1]["args"] == {"errno": 11}


# ---- requests ----


def step(begin: int, end: int, cause: Cause, detail: str = "", woken_by: int = 0) -> Step:
    return Step(BEGIN + begin * MS, BEGIN + end * MS, 101, cause, detail, woken_by)


def test_a_request_has_its_phases_and_its_path() -> None:
    path = (
        step(10, 15, Cause.run_queue, woken_by=200),
        step(15, 80, Cause.lock, "200"),
        step(80, 110, Cause.on_cpu),
    )
    found = written(recording([REQUEST], paths={7: path}))
    assert slices(found, TID) == [
        ("headliner", 10_000, 340_000),
        ("ttft", 10_000, 100_000),
        ("read delay", 10_000, 2_000),
        ("run_queue", 10_000, 2_000),  # the read ends in this step
        ("run_queue", 12_000, 3_000),
        ("lock", 15_000, 65_000),
        ("on_cpu", 80_000, 30_000),
        ("decode", 110_000, 238_000),
    ]
    check_nesting(found)
    (first,) = [event for event in found["traceEvents"] if event["ph"] == "i"]
    assert (first["name"], first["tid"]) == ("first token", TID)
    (lock,) = [event for event in found["traceEvents"] if event["name"] == "lock"]
    assert lock["args"] == {"tid": 101, "thread": "worker", "detail": "200"}
    (whole,) = [event for event in found["traceEvents"] if event["name"] == "headliner"]
    assert (whole["args"]["status"], whole["args"]["prompt_tokens"]) == (200, 312)
    assert [event["args"]["name"] for event in found["traceEvents"] if event["name"] == "thread_name"] == [
        "7 roleplay/headliner"
    ]


def test_a_request_without_a_token_is_drawn_too() -> None:
    failed = replace(
        REQUEST, first_token_ns=None, last_token_ns=None, frames=0, status=500, failure=Failure.server_error, model=None
    )
    found = written(recording([failed]))
    assert slices(found, TID) == [("_unknown", 10_000, 340_000), ("read delay", 10_000, 2_000)]


def test_each_request_has_a_track_and_names_are_safe() -> None:
    hostile = 'x","ph":"\x1b[2J\u2028\udcff</script>' + "long" * 99
    requests = [replace(REQUEST, number=number, model=hostile) for number in range(1, 12)]
    found = written(recording(requests))
    tracks = {event["tid"] for event in found["traceEvents"] if event["pid"] == REQUESTS_PID and event["ph"] == "X"}
    assert len(tracks) == 11
    data = b"".join(write(recording(requests)))
    assert data.isascii()
    assert b"\\u001b" not in data
    assert b"chat/completions" not in data


# ---- TCP and block I/O ----


def test_tcp_and_block_events_have_tracks_where_none_overlaps() -> None:
    address = np.zeros(16, np.uint8)
    address[15] = 1
    tcp = {"tgid": 100, "tid": 101, "family": 10, "peer": address, "peer_port": 443}
    disk = {"device": (8 << 20) | 1, "tgid": 100, "tid": 101, "bytes": 4096}
    found = written(
        recording(
            tcp_events=rows(
                TCP,
                {**tcp, "at_ns": 10 * MS, "kind": TcpKind.RETRANSMIT},
                {**tcp, "at_ns": 90 * MS, "duration_ns": 30 * MS, "kind": TcpKind.CONNECTED},
                {**tcp, "at_ns": 80 * MS, "duration_ns": 30 * MS, "kind": TcpKind.SEND_STALL, "service": 9},
                {**tcp, "at_ns": 50 * MS, "duration_ns": 10 * MS, "kind": 77},
            ),
            block_ios=rows(
                BLOCK,
                {**disk, "queued_ns": 1 * MS, "issued_ns": 2 * MS, "done_ns": 9 * MS, "operation": 1},
                {**disk, "queued_ns": 3 * MS, "issued_ns": 4 * MS, "done_ns": 8 * MS},
                {**disk, "queued_ns": 0, "issued_ns": 10 * MS, "done_ns": 11 * MS, "operation": 200},
                {**disk, "queued_ns": 0, "issued_ns": 0, "done_ns": 11 * MS},  # nothing is known of when
            ),
        )
    )
    check_nesting(found)
    tcp_events = [event for event in found["traceEvents"] if event["pid"] == TCP_PID and event["ph"] in "Xi"]
    assert Counter(event["name"] for event in tcp_events) == {"retransmit": 1, "connect": 1, "send stall": 1, "tcp": 1}
    (connect,) = [event for event in tcp_events if event["name"] == "connect"]
    assert connect["args"] == {"service": "roleplay", "tgid": 100, "tid": 101, "peer": "[::1]:443", "local_port": 0}
    (stall,) = [event for event in tcp_events if event["name"] == "send stall"]
    assert stall["args"]["service"] is None
    assert stall["tid"] != connect["tid"]
    block = [event for event in found["traceEvents"] if event["pid"] == BLOCK_PID and event["ph"] == "X"]
    assert Counter(event["name"] for event in block) == {"write": 1, "read": 1, "I/O": 1, "on device": 2}
    tracks = [event for event in found["traceEvents"] if event["name"] == "thread_name" and event["pid"] == BLOCK_PID]
    assert {event["args"]["name"] for event in tracks} == {"8:1 1", "8:1 2"}


# ---- the whole ----


def test_an_empty_recording_is_a_whole_file() -> None:
    found = written(recording())
    assert found["traceEvents"] == []
    assert found["otherData"]["dropped"] == "none"
    assert found["otherData"]["since_unix_ns"] == BEGIN + 42
    assert found["otherData"]["clock"] == "CLOCK_MONOTONIC"


def test_what_ended_before_the_recording_is_not_in_it() -> None:
    early = interval(101, 1, 10 * US, 20 * US, 21 * US)
    given = recording([REQUEST], intervals=rows(INTERVAL, early))
    assert len(written(given)["traceEvents"]) > 8
    later = replace(given, since_ns=BEGIN + 22 * US)
    assert slices(written(later), 101) == []
    assert slices(written(later), TID)
    assert written(replace(given, since_ns=REQUEST.finished_ns + 1))["traceEvents"] == []


def busy(count: int, seed: int) -> npt.NDArray[Any]:
    """Intervals of seven threads, back to back, shuffled."""
    random = np.random.default_rng(seed)
    found = np.zeros(count, INTERVAL)
    for tid in range(7):
        own = found[tid::7]
        gaps = random.integers(1, 9 * MS, (len(own), 3)).cumsum().reshape(len(own), 3) if len(own) else []
        for index, (off, wake, on) in enumerate(gaps):
            own[index] = np.array(
                (
                    BEGIN + off,
                    BEGIN + wake,
                    BEGIN + on,
                    0,
                    0,
                    101 + tid,
                    100,
                    101,
                    100,
                    0,
                    index + 1,
                    7,
                    0,
                    2,
                    1,
                    TARGET,
                    0,
                ),
                INTERVAL,
            )
    random.shuffle(found)
    return found


@pytest.mark.parametrize("limit", [LEAST_BYTES, 100_000, 300_000])
def test_the_limit_drops_the_oldest_and_says_so(limit: int) -> None:
    given = replace(recording(intervals=busy(4_000, 3)), until_ns=BEGIN + 60_000 * MS)
    whole = written(given)
    cut = written(given, limit)
    size = len(b"".join(write(given, limit)))
    assert limit * 0.6 < size <= limit
    assert "has reached" in cut["otherData"]["dropped"]
    told = Written()
    for _ in write(given, limit, told):
        pass
    assert told.oldest_ns is not None
    kept = {json.dumps(event) for event in cut["traceEvents"] if event["ph"] == "X"}
    # everything that ended after the instant that it names is there
    oldest = (told.oldest_ns - cut["otherData"]["zero_ns"]) / 1000
    newer = [event for event in whole["traceEvents"] if event["ph"] == "X" and event["ts"] > oldest]
    assert len(newer) > 50
    assert kept.issuperset(json.dumps(event) for event in newer)
    assert kept < {json.dumps(event) for event in whole["traceEvents"]}


def test_a_busy_service_is_drawn_without_a_gap() -> None:
    given = busy(700, 9)
    found = written(replace(recording(intervals=given), until_ns=int(given["on_ns"].max())))
    check_nesting(found)
    assert len(arrows(found)) > 20
    for tid in range(102, 108):
        drawn = slices(found, tid)
        assert all(before[1] + before[2] == pytest.approx(after[1]) for before, after in itertools.pairwise(drawn))


def test_chunks_are_small() -> None:
    chunks = list(write(recording(intervals=busy(4_000, 5))))
    assert len(chunks) > 10
    assert max(map(len, chunks)) < 80_000


any_u64 = st.one_of(st.integers(0, 2**64 - 1), st.integers(BEGIN, BEGIN + 100))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_whatever_the_records_hold_the_file_is_whole(data: st.DataObject) -> None:
    def drawn(dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        size = data.draw(st.integers(0, 6)) * dtype.itemsize
        found = np.frombuffer(data.draw(st.binary(min_size=size, max_size=size)), dtype).copy()
        for name in dtype.names or ():
            if name.endswith("_ns"):
                found[name] = [data.draw(any_u64) for _ in found]
            elif name in {"tid", "tgid", "waker_tid", "sequence", "sk"}:
                found[name] = [data.draw(st.integers(0, 3)) for _ in found]
        return found

    found = written(
        recording(
            [REQUEST],
            intervals=drawn(INTERVAL),
            messages=drawn(MESSAGE),
            spans=drawn(SPAN),
            tcp_events=drawn(TCP),
            block_ios=drawn(BLOCK),
        )
    )
    for event in found["traceEvents"]:
        assert event.get("dur", 0) >= 0
        assert event.get("ts", 0) >= 0
    assert slices(found, TID)
