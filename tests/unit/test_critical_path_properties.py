"""Paths through random schedules, whole and damaged: the parts add up, what is lost is unexplained."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exporter.critical_path import Cause, Step, Window, totals, walk, walk_on
from exporter.timeline import Records, Stream, Timeline, View
from tests.simulator import INTERVAL, MESSAGE, MS, SPAN, Request, Simulator, random_schedule

SCHEDULES = 40
SEEDS = st.integers(0, SCHEDULES - 1)
RANDOM = st.randoms(use_true_random=False)


@lru_cache(maxsize=SCHEDULES)
def schedule(seed: int) -> tuple[Simulator, list[Request], Records, Records, Records]:
    sim, requests = random_schedule(seed)
    return sim, requests, sim.interval_records(), sim.message_records(), sim.span_records()


def timeline_of(intervals: Records, messages: Records, spans: Records) -> Timeline:
    timeline = Timeline(1 << 24)
    timeline.add_intervals(intervals)
    timeline.add_messages(messages)
    timeline.add_spans(spans)
    return timeline


def checked_walk(view: View, window: Window) -> list[Step]:
    steps = walk(view, window)
    assert steps[0].begin_ns == window.begin_ns
    assert steps[-1].end_ns == window.end_ns
    assert all(step.begin_ns < step.end_ns for step in steps)
    assert all(before.end_ns == after.begin_ns for before, after in pairwise(steps))
    assert sum(totals(steps).values()) == window.end_ns - window.begin_ns
    assert set(totals(steps)) == set(Cause)
    return steps


@pytest.mark.parametrize("seed", range(SCHEDULES))
def test_nothing_is_unexplained_where_nothing_is_lost(seed: int) -> None:
    _, requests, *records = schedule(seed)
    timeline = timeline_of(*records)
    assert len(requests) == 7
    for request in requests:
        window = request.window()
        steps = checked_walk(timeline.view(window.begin_ns, window.end_ns), window)
        assert totals(steps)[Cause.unexplained] == 0


def test_the_path_is_on_the_thread_that_had_the_request() -> None:
    """The simulator knows when the engine had it and when the loop. CPUs are short, so both serve others."""
    whole = wrong = 0
    for seed in range(SCHEDULES):
        sim, requests, *records = schedule(seed)
        timeline = timeline_of(*records)
        tids = {thread.name: thread.tid for thread in sim.threads.values()}
        for request in requests:
            window = request.window()
            with_engine = (request.submitted_ns, request.done_ns)
            for step in walk(timeline.view(window.begin_ns, window.end_ns), window):
                shared = max(0, min(step.end_ns, with_engine[1]) - max(step.begin_ns, with_engine[0]))
                if step.tid == tids["loop"]:
                    wrong += shared
                elif step.tid == tids["engine"]:
                    wrong += step.end_ns - step.begin_ns - shared
            whole += window.end_ns - window.begin_ns
    assert whole > 8_000 * MS
    # Tokens that came together cannot be told apart from outside.
    assert wrong < 0.03 * whole


@settings(max_examples=40, deadline=None)
@given(SEEDS, RANDOM, st.sampled_from([0.001, 0.01, 0.1, 0.6]))
def test_the_time_in_a_hole_is_unexplained(seed: int, random: np.random.Generator, share: float) -> None:
    _, requests, intervals, messages, spans = schedule(seed)
    keep = np.array([random.random() >= share for _ in range(intervals.size)], np.bool_)
    timeline = timeline_of(intervals[keep], messages, spans)
    for request in requests:
        window = request.window()
        steps = checked_walk(timeline.view(window.begin_ns, window.end_ns), window)
        for tid in {step.tid for step in steps}:
            for from_ns, until_ns in holes_of(intervals, keep, tid):
                inside = [s for s in steps if s.tid == tid and s.begin_ns < until_ns and s.end_ns > from_ns]
                # Waiting for an answer is a state of the peer's, which no interval tells.
                assert {step.cause for step in inside} <= {Cause.unexplained, Cause.upstream}


def holes_of(intervals: Records, keep: np.ndarray, tid: int) -> list[tuple[int, int]]:
    """From when until when what the thread did is not known, between two records that are left."""
    rows = np.flatnonzero(intervals["tid"] == tid)
    left = [row for row in rows.tolist() if keep[row]]
    return [
        (int(intervals["on_ns"][before]), int(intervals["off_ns"][after]))
        for before, after in pairwise(left)
        if intervals["sequence"][after] != intervals["sequence"][before] + 1
    ]


@settings(max_examples=40, deadline=None)
@given(SEEDS, st.integers(0, 300), st.integers(1, 100), st.sampled_from(Stream))
def test_the_time_of_a_loss_that_was_told_is_unexplained(seed: int, at_ms: int, for_ms: int, stream: Stream) -> None:
    _, requests, intervals, messages, spans = schedule(seed)
    from_ns = int(intervals["on_ns"].min()) + at_ms * MS
    until_ns = from_ns + for_ms * MS

    def lose(records: Records, time: str, which: Stream) -> Records:
        return records[(records[time] < from_ns) | (records[time] > until_ns)] if which is stream else records

    timeline = timeline_of(
        lose(intervals, "on_ns", Stream.intervals),
        lose(messages, "at_ns", Stream.messages),
        lose(spans, "end_ns", Stream.spans),
    )
    timeline.note_loss(from_ns, until_ns, stream)
    for request in requests:
        window = request.window()
        steps = checked_walk(timeline.view(window.begin_ns, window.end_ns), window)
        if stream is not Stream.intervals:
            inside = [step for step in steps if step.begin_ns < until_ns and step.end_ns > from_ns]
            assert {step.cause for step in inside} <= {Cause.unexplained}


@settings(max_examples=40, deadline=None)
@given(SEEDS, RANDOM)
def test_the_order_of_records_and_a_second_copy_change_nothing(seed: int, random: np.random.Generator) -> None:
    _, requests, *records = schedule(seed)
    timeline = timeline_of(*records)
    mixed = []
    for stream in records:
        order = list(range(stream.size)) + (
            [random.randrange(stream.size) for _ in range(9)] if stream is records[0] else []
        )
        random.shuffle(order)
        mixed.append(stream[np.array(order, np.intp)])
    shuffled = timeline_of(*mixed)
    for request in requests:
        window = request.window()
        expected = totals(walk(timeline.view(window.begin_ns, window.end_ns), window))
        assert totals(checked_walk(shuffled.view(window.begin_ns, window.end_ns), window)) == expected


@settings(max_examples=40, deadline=None)
@given(SEEDS, RANDOM, st.sampled_from([0.01, 0.3, 1.0]))
def test_records_of_any_content_add_up(seed: int, random: np.random.Generator, share: float) -> None:
    _, requests, *records = schedule(seed)
    damaged = []
    for stream in records:
        copy = stream.copy()
        for _ in range(int(stream.size * share)):
            row = random.randrange(stream.size)
            name = random.choice([name for name in copy.dtype.names if copy.dtype[name].shape == ()])
            bits = copy.dtype[name].itemsize * 8
            other = copy[name][random.randrange(stream.size)]
            value = random.choice([0, 1, 2 ** (bits - 1) - 1, random.getrandbits(bits - 1), int(other)])
            copy[name][row] = value
        damaged.append(copy)
    timeline = timeline_of(*damaged)
    for request in requests:
        window = request.window()
        checked_walk(timeline.view(window.begin_ns, window.end_ns), window)


@settings(max_examples=40, deadline=None)
@given(st.binary(min_size=7 * INTERVAL.itemsize, max_size=40 * INTERVAL.itemsize), st.integers(0, 2**40))
def test_noise_adds_up(noise: bytes, begin_ns: int) -> None:
    def records(dtype: np.dtype[np.void]) -> Records:
        return np.frombuffer(noise[: len(noise) // dtype.itemsize * dtype.itemsize], dtype)

    timeline = timeline_of(records(INTERVAL), records(MESSAGE), records(SPAN))
    tids = [int(tid) for tid in records(INTERVAL)["tid"][:5]]
    for tid in tids:
        for end_ns in (begin_ns + 1, begin_ns + 10**9, 2**63):
            window = Window(begin_ns, end_ns, tid, begin_ns, begin_ns, tids[0])
            checked_walk(timeline.view(begin_ns, end_ns), window)


@settings(max_examples=40, deadline=None)
@given(SEEDS, RANDOM)
def test_windows_that_are_not_a_request_s_add_up(seed: int, random: np.random.Generator) -> None:
    sim, _, *records = schedule(seed)
    timeline = timeline_of(*records)
    first_ns = int(records[0]["on_ns"].min())
    for _ in range(7):
        begin_ns = first_ns + random.randrange(400 * MS)
        end_ns = begin_ns + random.randrange(1, 200 * MS)
        tids = [*sim.threads, 1, 2**32 - 1]
        read_ns = random.choice([None, begin_ns, end_ns, random.randrange(begin_ns - MS, end_ns + MS)])
        window = Window(begin_ns, end_ns, random.choice(tids), begin_ns - MS, read_ns, random.choice([None, *tids]))
        checked_walk(timeline.view(begin_ns, end_ns), window)


def test_a_window_in_two_stretches_comes_to_the_same() -> None:
    """The later stretch has a view that reaches back to those who worked for the request, not to its read.

    Where two ways lead back to the read it may take the other one, so a few differ. All add up.
    """
    same = both = 0
    for seed in range(40):
        _, requests, *records = schedule(seed)
        timeline = timeline_of(*records)
        for window in (request.window() for request in requests):
            whole = walk(timeline.view(window.arrived_ns, window.end_ns), window)
            ran = [step for step in whole if step.cause is Cause.on_cpu and step.begin_ns > (window.read_ns or 0)]
            middle = ran[len(ran) // 2] if ran else whole[-1]
            if middle.end_ns == window.end_ns:
                continue
            earlier = replace(window, end_ns=middle.end_ns, writer_tid=middle.tid)
            later = replace(window, begin_ns=middle.end_ns)
            first, workers = walk_on(timeline.view(window.arrived_ns, middle.end_ns), earlier)
            since_ns = min([middle.end_ns, *(worker.at_ns for worker in workers)])
            second, _ = walk_on(timeline.view(since_ns, window.end_ns), later, workers)
            found = totals([*first, *second])
            assert sum(found.values()) == window.end_ns - window.begin_ns
            both += 1
            same += found == totals(whole)
    assert both > 200
    assert same >= 0.9 * both
