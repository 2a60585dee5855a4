"""Which requests get a path, and that all of them together come to what they took, whatever the budget."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exporter import paths
from exporter.critical_path import Cause, Step, Window, Worker
from exporter.live_request import Request
from exporter.paths import CARRIED_NS, DECODES, KEPT_NS, PATHS_PER_SECOND, STRETCH_NS, Paths, address_of
from exporter.request import FinishedRequest
from exporter.slis import CausePhase, Series, Sli, Slis
from exporter.timeline import Timeline
from exporter.why import Explained
from tests.unit.test_slis import REQUEST

MS = 1_000_000
S = 1_000_000_000
START_NS = 1_000 * S
TIDS = {"writer": 101, "holder": 103, "waker": 107}


class FakeTimeline:
    """Says which stretches were asked for."""

    def __init__(self) -> None:
        self.views: list[tuple[int, int]] = []

    def view(self, since_ns: int, until_ns: int) -> tuple[int, int]:
        self.views.append((since_ns, until_ns))
        return since_ns, until_ns

    def thread_name(self, tid: int) -> str | None:
        return {101: "writer", 103: "holder"}.get(tid)


class FakeRequest:
    """A request that is under way; its peer's port is its number, so that a window tells whose it is."""

    def __init__(self, number: int, series: Series, arrived_ns: int, first_ns: int) -> None:
        self.number = number
        self.arrived_ns = arrived_ns
        self.read_ns = arrived_ns + 1
        self.tid = 100
        self.peer = f"192.0.2.1:{number}"
        self.first_token = (first_ns, TIDS["writer"])
        self.last_token = self.first_token
        self._series = series

    def series(self) -> Series:
        return self._series

    def says(self, at_ns: int) -> None:
        self.last_token = (at_ns, TIDS["writer"])

    def finished(self) -> FinishedRequest:
        first_ns, last_ns = self.first_token[0], self.last_token[0]
        return replace(
            REQUEST,
            number=self.number,
            arrived_ns=self.arrived_ns,
            read_ns=self.read_ns,
            first_token_ns=first_ns,
            last_token_ns=last_ns,
            finished_ns=last_ns + 1,
        )


class World:
    """Paths over walks that are made up: one third of each window was a lock, the rest the CPU."""

    def __init__(self, threshold_s: float | None = None, steps: int = 2) -> None:
        self.timeline = FakeTimeline()
        self.now_ns = START_NS
        self.slis = Slis(clock=lambda: self.now_ns)
        self.windows: dict[int, list[Window]] = defaultdict(list)
        self.walks = 0
        self.cpu_ns = self.cpu_ns_per_walk = 0
        self.told: list[tuple[str, int]] = []
        self.finished: dict[int, FinishedRequest] = {}
        self.explained: dict[int, Explained] = {}
        self.steps = steps
        self._numbers = iter(range(1, 1_000_000))
        self.paths = Paths(
            cast("Timeline", self.timeline),
            self._take_finished,
            self._take_explained,
            lambda _series, _sli: threshold_s,
            0.04,
            random.Random(23),
            lambda: self.cpu_ns,
        )

    def _take_finished(self, request: FinishedRequest) -> None:
        self.told.append(("finished", request.number))
        self.finished[request.number] = request

    def _take_explained(self, explained: Explained) -> None:
        self.told.append(("explained", explained.request.number))
        self.explained[explained.request.number] = explained

    def walk(
        self, view: tuple[int, int], window: Window, workers: Sequence[Worker]
    ) -> tuple[list[Step], list[Worker]]:
        for worker in workers:
            assert view[0] <= worker.at_ns <= window.begin_ns, "who worked for it before is not in the view"
        self.cpu_ns += self.cpu_ns_per_walk
        assert view[0] <= window.begin_ns, "the view does not reach back to the begin of the window"
        assert window.end_ns <= view[1], "the view ends before the token"
        self.walks += 1
        self.windows[window.peer_port].append(window)
        begin_ns, end_ns = window.begin_ns, window.end_ns
        if end_ns <= begin_ns:
            return [], []
        cuts = [begin_ns + (end_ns - begin_ns) * part // self.steps for part in range(self.steps)] + [end_ns]
        steps = [
            Step(first, last, 101, Cause.lock if part % 3 == 2 else Cause.on_cpu, "103", 107)
            for part, (first, last) in enumerate(pairwise(cuts))
        ]
        return steps, [Worker(101, end_ns, 0), Worker(103, begin_ns, 1)]

    def series(self, model: str = "bard") -> Series:
        return self.slis.series("roleplay", model, "chat_completions", (), admit=True)

    def start(self, ttft_ns: int, series: Series | None = None, *, counted: bool = True) -> FakeRequest:
        """A request whose first token was handed over just now."""
        series = series or self.series()
        request = FakeRequest(next(self._numbers), series, self.now_ns - ttft_ns, self.now_ns)
        if counted:
            series.first_token(ttft_ns, self.now_ns)
        self.paths.first_token(cast("Request", request))
        return request

    def end(self, request: FakeRequest) -> None:
        self.paths.finished(request.finished())

    def round(self, later_ns: int = 50 * MS) -> None:
        self.now_ns += later_ns
        self.paths.round(self.now_ns)

    def is_walked(self, request: FakeRequest) -> bool:
        """Whether its time to the first token was."""
        return bool(self.windows.get(request.number))

    def sums(self, series: Series) -> dict[CausePhase, float]:
        return {phase: sum(series.causes_ns[phase, cause] for cause in Cause) for phase in CausePhase}


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    made = World()
    monkeypatch.setattr(paths, "walk_on", made.walk)
    return made


def use_up_the_budget(world: World) -> None:
    """Start and end as many requests of another model as a second's budget has, in this instant."""
    other = world.series("other")
    requests = [world.start(1, other, counted=False) for _ in range(PATHS_PER_SECOND)]
    world.round(0)
    for request in requests:
        assert world.is_walked(request)
        world.end(request)
    world.round(0)


# ---- one request ----


def test_a_request_reaches_the_front_once_with_its_causes_and_then_its_path(world: World) -> None:
    request = world.start(30 * MS)
    world.round()
    assert world.told == []
    request.says(world.now_ns)
    world.end(request)
    assert world.told == []  # not before the round that explains it
    world.round()
    assert world.told == [("finished", 1), ("explained", 1)]
    causes = world.finished[1].causes
    assert causes is not None
    assert causes.ttft == {"on_cpu": 30 * MS}
    assert sum(causes.decode.values()) == 50 * MS
    explained = world.explained[1]
    assert explained.request == world.finished[1]
    assert [step.begin_ns for step in explained.steps] == [START_NS - 30 * MS, START_NS - 15 * MS]
    assert explained.steps[-1].end_ns == START_NS
    assert {cause.value: ns for cause, ns in explained.ttft.items() if ns} == causes.ttft
    assert {cause.value: ns for cause, ns in explained.decode.items() if ns} == causes.decode
    world.round()
    assert len(world.told) == 2


def test_names_are_of_the_threads_of_the_path_and_holders(world: World) -> None:
    world.end(world.start(30 * MS))
    world.round()
    assert world.explained[1].names == {101: "writer", 103: "holder", 107: ""}


def test_a_request_that_is_not_streamed_goes_straight_on(world: World) -> None:
    world.paths.finished(replace(REQUEST, streamed=False, first_token_ns=None, last_token_ns=None))
    world.round()
    assert world.told == [("finished", 1)]
    assert world.finished[1].causes is None
    assert world.timeline.views == []


def test_the_window_says_all_that_is_known_of_the_request(world: World) -> None:
    request = world.start(30 * MS)
    world.round()
    assert world.windows[1] == [
        Window(
            begin_ns=request.arrived_ns,
            end_ns=START_NS,
            writer_tid=101,
            arrived_ns=request.arrived_ns,
            read_ns=request.read_ns,
            reader_tid=100,
            peer=b"\xc0\x00\x02\x01" + bytes(12),
            peer_port=1,
        )
    ]


def test_without_anything_due_nothing_is_looked_at(world: World) -> None:
    request = world.start(30 * MS)
    world.round()
    views = len(world.timeline.views)
    for _ in range(7):
        world.round()
    request.says(world.now_ns)
    world.round()
    assert len(world.timeline.views) == views == 1


def test_an_answer_that_began_and_ended_between_two_rounds_is_followed_to_its_end(world: World) -> None:
    request = world.start(30 * MS)
    world.now_ns += 40 * MS
    request.says(world.now_ns)
    world.end(request)
    world.round()
    causes = world.finished[1].causes
    assert causes is not None
    assert causes.decode == {"on_cpu": 40 * MS}


def test_of_an_instant_nothing_can_be_said(world: World) -> None:
    """A first token before the arrival, by clocks that differ, takes no time and has no path; nothing else breaks."""
    request = world.start(0)
    request.arrived_ns += 3
    world.end(request)
    world.round()
    assert world.told == [("finished", 1)]
    assert world.sums(world.series()) == {CausePhase.TTFT: 0, CausePhase.DECODE: 0}


# ---- who gets a path ----


def test_the_budget_is_a_number_of_paths_a_second(world: World) -> None:
    for _ in range(7):
        first = [world.start(30 * MS, counted=False) for _ in range(3 * PATHS_PER_SECOND)]
        world.round(0)
        assert sum(map(world.is_walked, first)) == PATHS_PER_SECOND
        world.round(S // 2)
        second = [world.start(30 * MS, counted=False) for _ in range(3 * PATHS_PER_SECOND)]
        world.round(0)
        assert sum(map(world.is_walked, second)) == PATHS_PER_SECOND // 2
        world.round(100 * S)  # what was not used is not saved up


def test_slow_ones_get_a_path_whatever_the_others_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(threshold_s=0.1)
    monkeypatch.setattr(paths, "walk_on", world.walk)
    requests = [world.start(30 * MS, counted=False) for _ in range(2 * PATHS_PER_SECOND)]
    slow = [world.start(101 * MS, counted=False) for _ in range(7)]
    requests += [world.start(100 * MS, counted=False)]  # equal to the objective is within it
    world.round(0)
    assert all(map(world.is_walked, slow))
    assert sum(map(world.is_walked, requests)) == PATHS_PER_SECOND
    for request in [*requests, *slow]:
        world.end(request)
    world.round(0)
    assert {number for number, each in world.explained.items() if each.slow} == {each.number for each in slow}
    recent = [each.slow for each in world.paths.recent()]
    assert recent == sorted(recent, reverse=True)
    assert recent.count(True) == 7


def test_slow_is_above_the_95th_percentile_where_there_is_no_objective(world: World) -> None:
    series = world.series()
    for number in range(100):
        series.first_token((10 + number) * MS, world.now_ns)
    slow, other = world.start(109 * MS, counted=False), world.start(90 * MS, counted=False)
    for request in (slow, other):
        world.end(request)
    world.round()
    assert world.explained[slow.number].slow
    assert not world.explained[other.number].slow


def test_of_requests_that_take_the_same_none_is_slow(world: World) -> None:
    for ttft_ns in (1 * MS, 7 * MS, 113 * MS, 7_919 * MS):
        series = world.series(str(ttft_ns))
        for _ in range(23):
            world.end(world.start(ttft_ns, series))
        world.round(S)
    assert len(world.explained) == 4 * 23
    assert not any(each.slow for each in world.explained.values())


def test_even_slow_ones_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(threshold_s=0.001)
    monkeypatch.setattr(paths, "walk_on", world.walk)
    for _ in range(20):  # a second
        for _ in range(50):
            world.start(30 * MS, counted=False)
        world.round()
    # The first second's worth is there at the start, of each budget.
    assert world.walks <= 2 * (paths.SLOW_PATHS_PER_SECOND + PATHS_PER_SECOND)
    assert world.walks >= paths.SLOW_PATHS_PER_SECOND + PATHS_PER_SECOND


# ---- the decode phase ----


def test_stretches_of_a_decode_phase_follow_on_each_other(world: World) -> None:
    request = world.start(30 * MS)
    first_ns = world.now_ns
    world.round()
    for _ in range(100):
        world.now_ns += 47 * MS
        request.says(world.now_ns)
        world.round(3 * MS)
    world.end(request)
    world.round()
    _, *stretches = world.windows[1]
    assert stretches[0].begin_ns == first_ns
    assert stretches[-1].end_ns == request.last_token[0]
    for one, next_one in pairwise(stretches):
        assert one.end_ns == next_one.begin_ns
    assert all(STRETCH_NS <= each.end_ns - each.begin_ns < STRETCH_NS + 100 * MS for each in stretches[:-1])
    causes = world.finished[1].causes
    assert causes is not None
    assert sum(causes.decode.values()) == request.last_token[0] - first_ns
    assert all(each.arrived_ns == request.arrived_ns for each in stretches)


def test_a_bounded_number_of_decode_phases_is_followed_at_a_time(world: World) -> None:
    requests = [world.start(30 * MS, counted=False) for _ in range(PATHS_PER_SECOND)]
    world.round()
    walks = world.walks
    for request in requests:
        request.says(world.now_ns + STRETCH_NS)
    world.round(2 * S)
    assert world.walks - walks == DECODES
    for request in requests:
        world.end(request)
    world.round(S)
    followed = [each for each in world.finished.values() if each.causes and each.causes.decode]
    assert len(followed) == DECODES
    # Their places are free again.
    again = [world.start(30 * MS, counted=False) for _ in range(DECODES)]
    world.round(S)
    walks = world.walks
    for request in again:
        request.says(world.now_ns + 1)
        world.end(request)
    world.round()
    assert world.walks - walks == DECODES


# ---- what all come to ----


def test_requests_without_a_path_are_divided_as_those_with_one(world: World) -> None:
    world.steps = 3
    requests = [world.start(30 * MS) for _ in range(4 * PATHS_PER_SECOND)]
    world.round(0)
    series = world.series()
    assert world.walks == PATHS_PER_SECOND
    total = len(requests) * 30 * MS
    assert series.causes_ns[CausePhase.TTFT, Cause.lock] == pytest.approx(total / 3)
    assert series.causes_ns[CausePhase.TTFT, Cause.on_cpu] == pytest.approx(total * 2 / 3)
    assert series.causes_ns[CausePhase.TTFT, Cause.unexplained] == 0
    assert series.histograms[Sli.TTFT].sum_ns == total


def test_slow_ones_say_nothing_of_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slow requests are all looked at: scaled up to the others, their cause would be everybody's."""
    world = World(threshold_s=0.1)
    monkeypatch.setattr(paths, "walk_on", world.walk)
    use_up_the_budget(world)
    slow, other = world.start(500 * MS), world.start(30 * MS)
    world.round(0)
    assert world.is_walked(slow)
    assert not world.is_walked(other)
    assert world.sums(world.series())[CausePhase.TTFT] == 500 * MS
    world.round(CARRIED_NS)
    world.round(CARRIED_NS)
    assert world.series().causes_ns[CausePhase.TTFT, Cause.unexplained] == 30 * MS


def test_what_nobody_like_it_explains_is_unexplained_after_a_minute(world: World) -> None:
    use_up_the_budget(world)
    series = world.series()
    lonely = world.start(30 * MS)
    world.round(0)
    world.end(lonely)
    world.round(CARRIED_NS - 1)
    assert world.finished[lonely.number].causes is None
    assert world.sums(series)[CausePhase.TTFT] == 0
    world.round(1)
    assert world.sums(series)[CausePhase.TTFT] == series.causes_ns[CausePhase.TTFT, Cause.unexplained] == 30 * MS
    # The minute of the next one is its own.
    use_up_the_budget(world)
    world.start(70 * MS)
    world.round(0)
    world.round(CARRIED_NS - 1)
    assert world.sums(series)[CausePhase.TTFT] == 30 * MS
    world.round(1)
    assert world.sums(series)[CausePhase.TTFT] == 100 * MS


def test_one_that_waits_is_explained_by_the_next_that_has_a_path(world: World) -> None:
    use_up_the_budget(world)
    world.start(30 * MS)
    world.round(0)
    world.round(S)
    world.start(10 * MS)
    world.round(0)
    series = world.series()
    assert series.causes_ns[CausePhase.TTFT, Cause.on_cpu] == pytest.approx(40 * MS)
    world.round(2 * CARRIED_NS)
    assert series.causes_ns[CausePhase.TTFT, Cause.unexplained] == 0


def test_services_and_models_are_kept_apart(world: World) -> None:
    for model, ttft_ms in (("alto", 7), ("bass", 11), ("alto", 13)):
        world.start(ttft_ms * MS, world.series(model))
    world.round()
    assert world.sums(world.series("alto"))[CausePhase.TTFT] == 20 * MS
    assert world.sums(world.series("bass"))[CausePhase.TTFT] == 11 * MS


# What happens: a request of a series starts after so many ms, a request goes on for so many ms, one ends, time passes.
Happening = tuple[str, int, int]
HAPPENINGS = st.lists(
    st.one_of(
        st.tuples(st.just("start"), st.integers(0, 2), st.integers(0, 3_000)),
        st.tuples(st.just("burst"), st.integers(0, 2), st.integers(1, 30)),
        st.tuples(st.just("say"), st.integers(0, 1_000), st.just(0)),
        st.tuples(st.just("end"), st.integers(0, 1_000), st.just(0)),
        st.tuples(st.just("round"), st.integers(0, 2_000), st.just(0)),
    ),
    max_size=60,
)


@settings(max_examples=150, deadline=None)
@given(
    happenings=HAPPENINGS,
    budget=st.sampled_from([1, 2, 50]),
    decodes=st.sampled_from([0, 1, 32]),
    kept=st.sampled_from([0, 3, 40_000]),
    threshold_s=st.sampled_from([None, 0.02, 1.0]),
)
def test_parts_add_up_to_what_all_requests_took(
    happenings: list[Happening], budget: int, decodes: int, kept: int, threshold_s: float | None
) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        limits = {
            "PATHS_PER_SECOND": budget,
            "SLOW_PATHS_PER_SECOND": budget,
            "DECODES": decodes,
            "STEPS_KEPT": kept,
            "SLOW_KEPT": 2,
        }
        for name, value in limits.items():
            monkeypatch.setattr(paths, name, value)
        world = World(threshold_s)
        monkeypatch.setattr(paths, "walk_on", world.walk)
        everybody = list(play(world, happenings))
    windows: Counter[tuple[Series, CausePhase]] = Counter()
    for request in everybody:
        windows[request.series(), CausePhase.TTFT] += request.first_token[0] - request.arrived_ns
        windows[request.series(), CausePhase.DECODE] += request.last_token[0] - request.first_token[0]
    for model in range(3):
        series = world.series(str(model))
        for phase, found in world.sums(series).items():
            assert found == pytest.approx(windows[series, phase], rel=1e-9, abs=1e-3)
            assert all(series.causes_ns[phase, cause] >= 0 for cause in Cause)
        assert series.histograms[Sli.TTFT].sum_ns == windows[series, CausePhase.TTFT]
    check_told(world, everybody)


def play(world: World, happenings: list[Happening]) -> Iterator[FakeRequest]:
    """Let it all happen, then let all requests end; every request that there was."""
    running: list[FakeRequest] = []
    for what, which, much in happenings:
        world.now_ns += MS
        if what in {"start", "burst"}:
            count, ttft_ns = (1, much * MS) if what == "start" else (much, 10 * MS + much)
            started = [world.start(ttft_ns, world.series(str(which))) for _ in range(count)]
            running += started
            yield from started
        elif what == "round":
            world.round(which * MS)
        elif running:
            request = running[which % len(running)]
            if what == "say":
                request.says(world.now_ns)
            else:
                running.remove(request)
                world.end(request)
    world.round()
    for request in running:
        request.says(world.now_ns)
        world.end(request)
    world.round()
    world.round(CARRIED_NS)


def check_told(world: World, everybody: list[FakeRequest]) -> None:
    """Each request was told once, each path after its request; stretches of one request follow on each other."""
    numbers = [number for what, number in world.told if what == "finished"]
    assert sorted(numbers) == sorted(request.number for request in everybody)
    explained = [number for what, number in world.told if what == "explained"]
    assert len(explained) == len(set(explained))
    for number in explained:
        assert world.told.index(("finished", number)) + 1 == world.told.index(("explained", number))
    for request in everybody:
        windows = world.windows.get(request.number, [])
        begins = [each.begin_ns for each in windows]
        ends = [each.end_ns for each in windows]
        assert begins[1:] == ends[:-1]
        causes = world.finished[request.number].causes
        assert (causes is None) == (not windows)
        if causes is not None:
            assert sum(causes.ttft.values()) == request.first_token[0] - request.arrived_ns
            decode_ns = request.last_token[0] - request.first_token[0]
            assert sum(causes.decode.values()) in ({decode_ns} if len(windows) > 1 else {0})
        if request.number in explained:
            steps = world.explained[request.number].steps
            assert (steps[0].begin_ns, steps[-1].end_ns) == (request.arrived_ns, request.first_token[0])


# ---- what is kept ----


def finish_some(world: World, count: int) -> None:
    requests = [world.start(30 * MS, counted=False) for _ in range(count)]
    world.round(S)
    for request in requests:
        world.end(request)
    world.round(0)


def test_paths_are_kept_for_minutes_and_are_bounded(world: World) -> None:
    for _ in range(10):
        finish_some(world, 40)
    kept = [each.request.number for each in world.paths.recent()]
    assert len(kept) == paths.OTHERS_KEPT
    assert max(kept) == 400  # the newest
    world.round(KEPT_NS - 5 * S)
    assert world.paths.recent()
    world.round(20 * S)
    assert not world.paths.recent()


def test_what_is_asked_for_is_a_copy(world: World) -> None:
    """Who writes it out gives the loop its turns, and rounds add to it meanwhile."""
    finish_some(world, 3)
    seen = []
    for explained in world.paths.recent():
        seen.append(explained.request.number)
        finish_some(world, 1)
    assert len(seen) == 3


def test_paths_that_cost_too_much_are_fewer(world: World) -> None:
    world.cpu_ns_per_walk = 20 * MS
    running = [world.start(30 * MS) for _ in range(7)]
    world.round(0)
    assert world.walks == 3  # 50 ms at once, give or take one
    for request in running:
        world.end(request)
    world.round(S // 4)  # 10 ms have become free again, in which no path fits: 60 ms were used
    more = world.start(30 * MS)
    world.round(S // 4)
    assert world.walks == 4
    world.end(more)
    world.round(0)
    series = world.series()
    told = sum(ns for (phase, _), ns in series.causes_ns.items() if phase is CausePhase.TTFT)
    assert told == pytest.approx(8 * 30 * MS)


def test_where_the_view_alone_costs_too_much_one_path_at_a_time_is_walked(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    view = world.timeline.view

    def dear_view(since_ns: int, until_ns: int) -> tuple[int, int]:
        world.cpu_ns += 80 * MS
        return view(since_ns, until_ns)

    monkeypatch.setattr(world.timeline, "view", dear_view)
    requests = []
    for _ in range(200):  # 10 s
        requests += [world.start(MS, counted=False) for _ in range(2)]
        world.round()
    assert sum(map(world.is_walked, requests)) == len(world.timeline.views) == 6
    assert world.cpu_ns <= 0.04 * 10 * S + paths.CPU_BURST_NS + 80 * MS


def test_steps_are_bounded_those_of_requests_under_way_included(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paths, "STEPS_KEPT", 1000)
    world.steps = 300
    finish_some(world, 3)
    assert len(world.paths.recent()) == 3
    running = [world.start(30 * MS, counted=False) for _ in range(7)]
    world.round(S)
    # Three paths have room; the finished ones went for those under way, and the others keep their causes alone.
    assert world.paths.recent() == []
    for request in running:
        world.end(request)
    world.round(S)
    assert len(world.explained) == 3 + 3
    assert all(world.finished[each.number].causes for each in running)
    assert len(world.paths.recent()) == 3
    world.round(2 * KEPT_NS)
    finish_some(world, 3)
    assert len(world.paths.recent()) == 3  # nothing is counted that is gone


# ---- peers ----


@pytest.mark.parametrize(
    ("peer", "raw", "port"),
    [
        ("192.0.2.1:65535", bytes([192, 0, 2, 1]) + bytes(12), 65535),
        ("[2001:db8::1]:80", bytes.fromhex("20010db8000000000000000000000001"), 80),
        ("[::1]:1", bytes(15) + b"\1", 1),
        ("", b"", 0),
    ],
)
def test_addresses_are_as_records_have_them(peer: str, raw: bytes, port: int) -> None:
    assert address_of(peer) == (raw, port)
