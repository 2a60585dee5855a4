"""The last minute: what is kept of it, what a recording gets, and what paths are told is missing."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from exporter import recorder
from exporter.recorder import Recorder
from exporter.status import AgentStatus, Loss, ProbeStatus
from exporter.timeline import MessageKind, Stream
from exporter.why import Explained
from probes.cuda import CudaProbe
from probes.memory import MemoryProbe
from probes.scheduler import SchedulerProbe
from tests.unit.test_slis import REQUEST
from tests.unit.test_trace_event import BLOCK, INTERVAL, MESSAGE, SPAN, TCP

MIB = 1 << 20
S = 1_000_000_000
NOW_NS = 100 * S
NAME = np.dtype([("at_ns", "u8"), ("tid", "u4"), ("tgid", "u4"), ("comm", "u1", (16,))])
DTYPES = {
    "intervals": INTERVAL, "messages": MESSAGE, "spans": SPAN, "names": NAME, "tcp_events": TCP, "block_ios": BLOCK,
}  # fmt: skip
TIMES = {
    "intervals": "on_ns", "messages": "at_ns", "spans": "end_ns", "tcp_events": "at_ns", "block_ios": "done_ns",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _now(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "monotonic_ns", lambda: NOW_NS)


def rows(stream: str, *at_s: float) -> npt.NDArray[Any]:
    """Records that were made then."""
    made = np.zeros(len(at_s), DTYPES[stream])
    made[TIMES[stream]] = [round(at * S) for at in at_s]
    return made


def made(*streams: str) -> Recorder:
    return Recorder({name: DTYPES[name] for name in streams or DTYPES}, 4 * MIB, ["roleplay"])


def test_a_recording_has_each_stream_from_that_instant_on() -> None:
    kept = made()
    for stream in TIMES:
        kept.add(stream, rows(stream, 10, 50, 60, 70))
    told = kept.recording(60 * S, "asked", {"scheduler lost": 3})
    for stream, instant in TIMES.items():
        found = getattr(told, stream)
        assert sorted(found[instant].tolist()) == [60 * S, 70 * S], stream
    assert (told.since_ns, told.until_ns, told.reason, told.losses) == (60 * S, NOW_NS, "asked", {"scheduler lost": 3})
    assert list(told.services) == ["roleplay"]
    assert told.whole


def test_a_recording_says_whether_anything_is_missing() -> None:
    kept = made()
    kept.timeline.note_loss(20 * S, 30 * S, Stream.intervals)
    assert kept.recording(31 * S, "asked", {}).whole
    assert not kept.recording(25 * S, "asked", {}).whole


def test_a_recording_does_not_change_when_more_comes() -> None:
    kept = made()
    for stream in TIMES:
        kept.add(stream, rows(stream, 50))
    told = kept.recording(0, "asked", {})
    for stream in TIMES:
        kept.add(stream, rows(stream, *[90] * 100_000))
    for stream, instant in TIMES.items():
        assert getattr(told, stream)[instant].tolist() == [50 * S]


def test_records_are_copied() -> None:
    kept = made()
    for stream, instant in TIMES.items():
        batch = rows(stream, 50)
        kept.add(stream, batch)
        batch[instant] = 1
        assert getattr(kept.recording(0, "asked", {}), stream)[instant].tolist() == [50 * S]


def test_streams_of_probes_that_are_not_up_are_absent() -> None:
    kept = made("intervals", "messages", "names")
    kept.add("intervals", rows("intervals", 50))
    told = kept.recording(0, "asked", {})
    assert (told.tcp_events, told.block_ios, told.spans) == (None, None, None)
    assert told.intervals is not None


def test_names_are_those_of_threads() -> None:
    kept = made()
    names = np.zeros(2, NAME)
    names["tid"] = (7, 11)
    for row, text in enumerate((b"uvloop", b"engine-0")):
        names["comm"][row, : len(text)] = np.frombuffer(text, np.uint8)
    kept.add("names", names)
    told = kept.recording(0, "asked", {})
    assert [told.thread_name(tid) for tid in (7, 11, 13)] == ["uvloop", "engine-0", None]


def test_requests_and_their_paths_are_kept() -> None:
    kept = made()
    requests = [replace(REQUEST, number=number, finished_ns=number * S) for number in (50, 70)]
    for request in requests:
        kept.finished(request)
        kept.explained(Explained(request=request, steps=(), ttft={}, decode={}, slow=False, names={}))
    told = kept.recording(60 * S, "asked", {})
    assert [request.number for request in told.requests] == [70]
    assert list(told.paths) == [70]


def test_memory_is_bounded() -> None:
    """Every stream is filled many times over; what is kept of all of them fits the memory that was given."""
    kept = made()
    for stream in TIMES:
        for _ in range(3):
            kept.add(stream, rows(stream, *[50] * 30_000))
    told = kept.recording(0, "asked", {})
    total = sum(getattr(told, stream).nbytes for stream in TIMES)
    assert 4 * MIB * 0.9 < total <= 4 * MIB


# ---- what is missing ----


def status(at_s: float, **losses: int) -> AgentStatus:
    probe = ProbeStatus("p", True, "", 0, None, None, tuple(Loss(reason, count) for reason, count in losses.items()))
    return AgentStatus(round(at_s * S), "ring", (probe,), (), 0, ())


def lost(kept: Recorder) -> dict[Stream, list[tuple[int, int]]]:
    return {stream: found for stream, found in kept.timeline._losses.items() if found}


def test_what_the_kernel_lost_between_two_reports_is_missing_then() -> None:
    kept = made()
    kept.note_losses(status(97, lost_messages_ring_full=3, threads_full=1), status(98, lost_messages_ring_full=4))
    assert lost(kept) == {Stream.messages: [(97 * S, NOW_NS)]}
    kept.note_losses(status(98, lost_messages_ring_full=4), status(99, lost_messages_ring_full=4))
    assert lost(kept) == {Stream.messages: [(97 * S, NOW_NS)]}
    kept.note_losses(
        status(98, lost_intervals_ring_full=0, lost_spans_ring_full=1, spans_full=1),
        status(99, lost_intervals_ring_full=1, lost_spans_ring_full=1, spans_full=2),
    )
    assert lost(kept) == {
        Stream.messages: [(97 * S, NOW_NS)],
        Stream.intervals: [(98 * S, NOW_NS)],
        Stream.spans: [(98 * S, NOW_NS)],
    }


def test_before_the_first_report_anything_may_be_missing() -> None:
    kept = made()
    kept.note_losses(None, status(98, lost_messages_ring_full=0, other=7))
    assert lost(kept) == {}
    kept.note_losses(None, status(98, lost_messages_ring_full=1))
    assert lost(kept) == {Stream.messages: [(0, NOW_NS)]}


def test_a_reader_that_comes_after_another_knows_nothing_of_before() -> None:
    kept = made()
    kept.note_all_lost()
    assert lost(kept) == {stream: [(0, NOW_NS)] for stream in Stream}


def test_reasons_are_those_that_probes_count() -> None:
    counted = {count.name.lower() for kind in (SchedulerProbe, MemoryProbe, CudaProbe) for count in kind.loss_counts()}
    assert recorder.LOSSES.keys() <= counted


# ---- peers ----


def test_a_mapped_peer_is_told_as_the_requests_of_it_are() -> None:
    """A socket for both families has IPv4 clients as ::ffff:192.0.2.7; requests name them 192.0.2.7."""
    kept = made()
    batch = rows("messages", 50, 51, 52, 53)
    batch["kind"] = MessageKind.SENT
    batch["family"] = (10, 10, 2, 10)
    addresses = ("00000000000000000000ffffc0000207", "20010db8000000000000ffffc0000207", "c0000207", "00" * 15 + "01")
    for row, address in enumerate(addresses):
        batch["peer"][row] = np.frombuffer(bytes.fromhex(address).ljust(16, b"\0"), np.uint8)
    before = batch.copy()
    kept.add("messages", batch)
    told = kept.recording(0, "asked", {}).messages
    assert told is not None
    plain = "c0000207" + "00" * 12
    assert [peer.tobytes().hex() for peer in told["peer"]] == [plain, addresses[1], plain, addresses[3]]
    assert told["family"].tolist() == [2, 10, 2, 10]
    assert (batch == before).all()  # it is the ring's own memory
