"""Objectives: when one ceases to hold, of what it speaks, and that it says so once."""

from __future__ import annotations

import pytest

from exporter.kv_cache import Source
from exporter.objectives import EVERY_NS, FEWEST, Crossing, Objectives, bounds
from exporter.slis import GAPS_AT_ONCE, Series, Sli, Slis
from exporter.slo.declared import Slo
from tests.unit.finished import REQUEST

MS = 1_000_000
START_NS = 1_000_000_000_000
SLO = Slo("ttft-fast", "ttft", 0.123, 0.9)


class World:
    """SLIs with objectives, and a clock that only goes on by `look`."""

    def __init__(self, *slos: Slo) -> None:
        self.now_ns = START_NS
        self.slis = Slis((), 64, bounds(slos), lambda: self.now_ns)
        self.objectives = Objectives(slos, self.slis)

    def series(self, model: str = "bard", service: str = "roleplay") -> Series:
        return self.slis.series(service, model, "chat_completions", (), admit=True)

    def observe(self, count: int, ttft_ms: int, model: str = "bard", service: str = "roleplay") -> None:
        for _ in range(count):
            self.series(model, service).first_token(ttft_ms * MS, self.now_ns)

    def look(self) -> list[Crossing]:
        """The next time that something is looked at."""
        self.now_ns += EVERY_NS
        return self.objectives.crossed(self.now_ns)


def test_it_says_once_that_an_objective_does_not_hold() -> None:
    world = World(SLO)
    world.observe(17, 123)  # equal to the threshold is within it
    world.observe(3, 124)
    assert world.look() == [Crossing(SLO, ("roleplay", "bard", "chat_completions"), 0.85)]
    assert world.look() == []
    world.observe(23, 999)
    assert world.look() == []


def test_what_is_good_enough_is_no_crossing() -> None:
    world = World(SLO)
    world.observe(18, 123)
    world.observe(2, 124)
    assert world.look() == []


def test_of_a_few_nothing_is_said() -> None:
    world = World(SLO)
    world.observe(FEWEST - 1, 999)
    assert world.look() == []
    world.observe(1, 999)
    (crossing,) = world.look()
    assert crossing.good == 0


def test_it_says_so_again_after_it_held_again() -> None:
    world = World(SLO)
    world.observe(20, 999)
    assert len(world.look()) == 1
    world.observe(400, 1)
    assert world.look() == []
    world.observe(100, 999)
    (crossing,) = world.look()
    assert crossing.good == 400 / 520


def test_only_the_last_five_minutes_count() -> None:
    world = World(SLO)
    world.observe(1009, 1)
    for _ in range(31):
        assert world.look() == []
    world.observe(20, 999)  # 2 % of all, everything of the last minutes
    assert len(world.look()) == 1
    for _ in range(31):
        assert world.look() == []
    # All that was bad has left the window, and too little is in it to say that it holds: still the same crossing.
    world.observe(1, 1)
    assert world.look() == []
    world.observe(20, 1)
    assert world.look() == []
    world.observe(20, 999)
    assert len(world.look()) == 1


def test_it_looks_every_ten_seconds_however_often_it_is_called() -> None:
    world = World(SLO)
    assert world.look() == []
    world.observe(20, 999)
    for _ in range(4):
        assert world.objectives.crossed(world.now_ns + EVERY_NS - 1) == []
    assert len(world.look()) == 1


def test_it_concerns_the_service_and_model_that_it_names() -> None:
    of_service = Slo("a", "ttft", 0.1, 0.9, service="roleplay")
    of_model = Slo("b", "ttft", 0.1, 0.9, model_name="bard")
    of_all = Slo("c", "ttft", 0.1, 0.9)
    world = World(of_service, of_model, of_all)
    world.observe(20, 999, "bard", "other")
    world.observe(20, 999, "muse", "roleplay")
    world.observe(20, 999, "muse", "other")
    crossings = world.look()
    assert {(each.slo.name, each.labels[:2]) for each in crossings} == {
        ("a", ("roleplay", "muse")),
        ("b", ("other", "bard")),
        ("c", ("other", "bard")),
        ("c", ("roleplay", "muse")),
        ("c", ("other", "muse")),
    }
    assert len(crossings) == 5


def test_the_strictest_threshold_that_concerns_a_series() -> None:
    world = World(
        Slo("a", "ttft", 0.5, 0.9),
        Slo("b", "ttft", 0.2, 0.99, model_name="bard"),
        Slo("c", "itl", 0.05, 0.9),
        Slo("d", "ttft", 0.1, 0.9, service="other"),
    )
    assert world.objectives.threshold(world.series(), Sli.TTFT) == 0.2
    assert world.objectives.threshold(world.series("muse"), Sli.TTFT) == 0.5
    assert world.objectives.threshold(world.series("muse", "other"), Sli.TTFT) == 0.1
    assert world.objectives.threshold(world.series(), Sli.ITL) == 0.05
    assert world.objectives.threshold(world.series(), Sli.DURATION) is None


@pytest.mark.parametrize("count", [FEWEST, GAPS_AT_ONCE + 7])
def test_gaps_that_are_only_gathered_are_counted(count: int) -> None:
    world = World(Slo("itl-fast", "itl", 0.05, 0.9))
    for _ in range(count):
        world.series().gap(51 * MS)
    assert len(world.look()) == 1


def test_thresholds_are_bounds_of_their_histograms() -> None:
    slos = (SLO, Slo("b", "ttft", 0.3, 0.9), Slo("c", "longest_gap", 1.7, 0.9), Slo("d", "ttft", 0.123, 0.99))
    world = World(*slos)
    assert 0.123 in world.slis.bounds[Sli.TTFT]
    assert 1.7 in world.slis.bounds[Sli.LONGEST_GAP]
    assert world.slis.bounds[Sli.TTFT] == tuple(sorted({*world.slis.bounds[Sli.TTFT]}))
    world.observe(1, 122)
    world.observe(1, 123)
    world.observe(1, 124)
    assert world.series().histograms[Sli.TTFT].within(0.123) == (2, 3)


def test_without_objectives_nothing_is_looked_at() -> None:
    world = World()
    world.observe(100, 999)
    assert world.look() == []
    assert world.objectives.threshold(world.series(), Sli.TTFT) is None


def test_other_objectives_leave_one_that_stays_alone_and_begin_with_what_comes() -> None:
    strict = Slo("strict", "ttft", 0.123, 0.99)
    world = World(SLO)
    world.observe(20, 999)
    assert len(world.look()) == 1
    world.objectives.reconfigure((strict, SLO))
    world.observe(FEWEST - 1, 999)
    assert world.look() == []  # of one it was told before, of the other there are too few
    world.observe(1, 999)
    (crossing,) = world.look()
    assert crossing.slo == strict
    assert world.objectives.threshold(world.series(), Sli.TTFT) == 0.123


def test_look_ups_that_an_engine_tells_of_count() -> None:
    wanted = Slo("cache", "kv_cache_hit_ratio", None, 0.6)
    world = World(wanted)
    for _ in range(7):
        world.series().finished(REQUEST)
    world.slis.caches.add(Source.ENGINE, "roleplay", "bard", 101, 53, world.now_ns)
    assert world.look() == [Crossing(wanted, ("roleplay", "bard"), 53 / 101)]
