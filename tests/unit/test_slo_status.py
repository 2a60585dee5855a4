"""How the agent says its objectives stand: events of each kind, windows that are covered, budgets, and bounds."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exporter.families import Scrape
from exporter.kv_cache import Source
from exporter.objectives import bounds
from exporter.request import Failure, Phase
from exporter.slis import Series, Slis
from exporter.slo import status as module
from exporter.slo.declared import Slo
from exporter.slo.status import BURN_WINDOWS_S, STEPS, SloStatus, Standing, slo_families
from exporter.status import ReaderStatus
from tests.unit.finished import REQUEST as FINISHED
from tests.unit.finished import later

S = 1_000_000_000
MS = 1_000_000
MINUTE = 60 * S
START_NS = 977 * S
TTFT = Slo("fast", "ttft", 0.3, 0.9)
DAY = 86400
REQUEST = replace(
    later(FINISHED, 100 * S), first_token_ns=101 * S, last_token_ns=102 * S, finished_ns=102 * S, completion_tokens=11
)
"""Eleven tokens, ten of them in the second after the first one."""


class World:
    """SLIs, the objectives' status, and a clock that goes on a minute at a time."""

    def __init__(self, *slos: Slo) -> None:
        self.now_ns = START_NS
        self.slis = Slis((), 64, bounds(slos), lambda: self.now_ns)
        self.status = SloStatus(slos, self.slis)

    def series(self, model: str = "bard", service: str = "roleplay", api: str = "chat_completions") -> Series:
        return self.slis.series(service, model, api, (), admit=True)

    def first_tokens(self, good: int, bad: int = 0, model: str = "bard") -> None:
        self.now_ns += 1
        for number in range(good + bad):
            self.series(model).first_token((300 if number < good else 301) * MS, self.now_ns)

    def finish(self, count: int, **changes: object) -> None:
        self.now_ns += 1
        for _ in range(count):
            self.series().finished(replace(REQUEST, **changes))  # type: ignore[arg-type]

    def minutes(self, count: int) -> None:
        for _ in range(count):
            self.now_ns += MINUTE
            self.status.tick(self.now_ns)

    def standing(self, slo: str = "fast", model: str = "bard") -> Standing:
        (found,) = [
            each for each in self.status.standings(self.now_ns) if (each.slo.name, each.model_name) == (slo, model)
        ]
        return found

    def burn(self, window_s: int) -> float | None:
        return dict(self.standing().burn_rates)[window_s]


def counted(world: World, slo: str = "fast") -> tuple[int, int, int]:
    standing = world.standing(slo)
    return standing.good, standing.bad, standing.events


def test_latencies_are_good_up_to_their_threshold_in_all_apis_together() -> None:
    world = World(TTFT)
    world.first_tokens(17, 6)
    world.series(api="responses").first_token(300 * MS, world.now_ns)
    assert counted(world) == (18, 6, 24)


def test_gaps_that_are_only_gathered_are_counted() -> None:
    world = World(Slo("fast", "itl", 0.05, 0.9))
    for gap in (50, 51, 49):
        world.series().gap(gap * MS)
    assert counted(world) == (2, 1, 3)


def test_errors_are_failures_for_a_reason_that_counts() -> None:
    world = World(
        Slo("fast", "errors", None, 0.9, reasons=("rate_limited", "server_error", "cut_off")),
        Slo("no-5xx", "errors", None, 0.9, reasons=("server_error",)),
    )
    world.finish(7)
    world.finish(5, failure=Failure.client_error)
    world.finish(3, failure=Failure.server_error)
    world.finish(2, failure=Failure.rate_limited)
    world.finish(1, aborted=Phase.streaming)
    # What the client did wrong is no event.
    assert counted(world) == (8, 5, 13)
    assert counted(world, "no-5xx") == (8, 3, 11)


def test_aborts_are_bad_in_either_phase() -> None:
    world = World(Slo("fast", "aborts", None, 0.9))
    world.finish(7)
    world.finish(2, aborted=Phase.waiting)
    world.finish(3, aborted=Phase.streaming)
    assert counted(world) == (7, 5, 12)


def test_speed_is_of_each_response() -> None:
    world = World(Slo("fast", "decode_tokens_per_second", None, 0.9, at_least=10))
    world.finish(7)  # ten tokens in the second after the first one
    world.finish(3, last_token_ns=102 * S + MS)
    world.finish(2, frames=1)  # no time between its tokens
    assert counted(world) == (7, 3, 10)


def test_cache_hits_are_tokens() -> None:
    world = World(Slo("fast", "kv_cache_hit_ratio", None, 0.6))
    world.finish(1)
    assert world.status.standings(world.now_ns) == []  # nobody told of the cache: that is not zero
    world.finish(3, prompt_tokens=101, cached_tokens=60)
    assert counted(world) == (180, 123, 303)


def test_cache_hits_of_an_engine_count_where_the_wire_is_silent() -> None:
    world = World(Slo("fast", "kv_cache_hit_ratio", None, 0.6))
    world.finish(7)
    world.slis.caches.add(Source.ENGINE, "roleplay", "bard", 1009, 503, world.now_ns)
    assert counted(world) == (503, 506, 1009)
    # Hits that are told late do not take violations back: a counter does not fall.
    world.now_ns += S
    world.slis.caches.add(Source.ENGINE, "roleplay", "bard", 0, 506, world.now_ns)
    assert counted(world) == (1009, 506, 1009)


def test_a_burn_rate_is_absent_until_its_window_was_seen() -> None:
    world = World(TTFT)
    world.minutes(4)
    world.first_tokens(1, 1)
    assert world.burn(300) is None
    world.minutes(1)
    assert world.burn(300) == pytest.approx(5)  # half are bad, a tenth may be
    assert world.burn(1800) is None
    world.minutes(25)
    assert world.burn(300) is None  # no event for five minutes
    assert world.burn(1800) == pytest.approx(5)


def test_a_model_that_comes_late_had_no_events_before() -> None:
    world = World(TTFT)
    world.minutes(60)
    world.first_tokens(3, 1)
    assert [world.burn(window) for window in (300, 1800, 3600)] == pytest.approx([2.5] * 3)
    assert world.burn(7200) is None


def test_windows_of_the_burn_rate_forget() -> None:
    world = World(TTFT)
    world.minutes(400)
    world.first_tokens(0, 10)
    world.minutes(29)
    world.first_tokens(10)
    rates = dict(world.standing().burn_rates)
    assert rates[300] == 0
    assert rates[1800] == pytest.approx(5)
    world.minutes(360)
    world.first_tokens(1)
    assert dict(world.standing().burn_rates) == dict.fromkeys(BURN_WINDOWS_S, 0.0)


@given(
    traffic=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=130),
    pause=st.integers(0, 400),
)
def test_burn_rates_are_what_a_list_of_minutes_says(traffic: list[tuple[int, int]], pause: int) -> None:
    world = World(TTFT)
    world.minutes(pause)
    for good, bad in traffic:
        world.first_tokens(good, bad)
        world.minutes(1)
    minutes = [(0, 0)] * pause + traffic
    found = world.status.standings(world.now_ns)
    if not sum(map(sum, traffic)):
        assert all(each.events == 0 for each in found)
        return
    (standing,) = found
    for window_s, rate in standing.burn_rates:
        last = minutes[-(window_s // 60) :]
        total = sum(map(sum, last))
        if window_s // 60 > len(minutes) or not total:
            assert rate is None
        else:
            assert rate == pytest.approx(sum(bad for _, bad in last) / total / 0.1)


def test_the_budget_is_of_what_was_seen_of_the_window() -> None:
    world = World(replace_slo(TTFT, window_s=3 * DAY))
    world.first_tokens(95, 5)
    assert world.standing().budget_left == pytest.approx(0.5)
    assert world.standing().covered_s == pytest.approx(0, abs=1e-6)
    world.minutes(60)
    assert world.standing().covered_s == pytest.approx(3600)
    world.first_tokens(0, 15)
    assert world.standing().budget_left == pytest.approx(1 - (20 / 115) / 0.1)


def test_the_budget_forgets_what_is_older_than_the_window() -> None:
    world = World(replace_slo(TTFT, window_s=3 * DAY))
    world.first_tokens(0, 1009)
    world.minutes(2 * 1440)
    world.first_tokens(95, 5)
    world.minutes(1440 + 3 * 1440 // STEPS + 1)
    assert world.standing().budget_left == pytest.approx(0.5)
    assert 3 * DAY <= world.standing().covered_s <= 3 * DAY * (1 + 1 / STEPS) + 60


def test_without_events_nothing_is_said() -> None:
    world = World(TTFT)
    assert world.status.standings(world.now_ns) == []
    world.series()
    world.minutes(10)
    assert (world.standing().events, world.standing().budget_left, world.burn(300)) == (0, None, None)


def test_a_clock_that_stood_still_for_hours_loses_nothing() -> None:
    world = World(TTFT)
    world.first_tokens(3, 1)
    world.minutes(1)
    world.now_ns += 7 * 3600 * S
    world.status.tick(world.now_ns)
    world.first_tokens(1, 3)
    assert counted(world) == (4, 4, 8)
    assert world.burn(21600) == pytest.approx(7.5)


def test_other_objectives_leave_one_that_stays_alone_and_begin_at_zero() -> None:
    slow = Slo("slow", "ttft", 1, 0.9)
    world = World(Slo("gone", "ttft", 1, 0.9), TTFT)
    world.minutes(6)
    world.first_tokens(17, 6)
    world.minutes(1)
    before = world.standing()
    world.slis.add_bounds(bounds((slow,)))
    world.status.reconfigure((TTFT, slow))
    assert world.standing() == before
    assert counted(world, "slow") == (0, 0, 0)  # 1 s was no bound before: nobody knows which of them were good
    assert world.standing("slow").budget_left is None
    assert [each.slo.name for each in world.status.standings(world.now_ns)] == ["fast", "slow"]
    world.first_tokens(0, 5)
    assert counted(world) == (17, 11, 28)
    assert counted(world, "slow") == (5, 0, 5)
    world.minutes(4)
    assert dict(world.standing("slow").burn_rates)[300] is None
    assert world.standing("slow").covered_s == pytest.approx(240)
    world.minutes(1)
    assert dict(world.standing("slow").burn_rates)[300] == 0
    assert world.burn(300) == pytest.approx(10)
    assert world.standing().covered_s == pytest.approx(720)


def test_what_began_within_the_minute_is_not_lost_to_one_that_stays() -> None:
    world = World(TTFT)
    world.minutes(3)
    world.first_tokens(3, 50, "new")
    world.status.reconfigure((TTFT, Slo("slow", "ttft", 1, 0.9)))
    assert world.standing(model="new").bad == 50


def test_an_objective_that_comes_back_or_became_another_begins_again() -> None:
    world = World(TTFT)
    world.first_tokens(17, 6)
    world.status.reconfigure(())
    world.minutes(10)
    assert world.status.standings(world.now_ns) == []
    world.status.reconfigure((TTFT,))
    world.first_tokens(1, 2)
    assert counted(world) == (1, 2, 3)
    assert world.burn(300) is None
    world.status.reconfigure((replace_slo(TTFT, target=0.99),))
    assert counted(world) == (0, 0, 0)


def test_there_is_a_most_of_what_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_ROWS", 5)
    world = World(TTFT, Slo("slow", "ttft", 1, 0.9))
    for number in range(7):
        world.first_tokens(1, 0, f"model-{number}")
    world.minutes(1)
    assert len(world.status.standings(world.now_ns)) == 5
    assert world.status.unfollowed == 9


def test_objectives_that_only_prometheus_counts_have_no_events() -> None:
    world = World(Slo("fast", "kernel_threads", 9, 0.9))
    world.first_tokens(7)
    world.minutes(1)
    assert world.status.standings(world.now_ns) == []
    assert samples(world)["llm_slo_objective_ratio"] == [(("fast",), 0.9)]
    assert samples(world)["llm_slo_covered_seconds"] == []


def samples(world: World) -> dict[str, list[tuple[tuple[str, ...], object]]]:
    scrape = Scrape(world.now_ns, 0.0, world.slis.all_series(), None, ReaderStatus(0))
    return {
        name: list(family.points(scrape))
        for family in slo_families(world.status)
        for name in family.spec.sample_names()
    }


def test_the_families_say_what_the_standings_say() -> None:
    world = World(replace_slo(TTFT, service="roleplay", model_name="bard"))
    world.minutes(30)
    world.first_tokens(17, 6)
    world.first_tokens(5, 5, "muse")
    labels = ("fast", "roleplay", "bard")
    assert samples(world) == {
        "llm_slo_info": [(("fast", "ttft", "90% of times to first token within 0.3 s", "30d"), 1)],
        "llm_slo_objective_ratio": [(("fast",), 0.9)],
        "llm_slo_events_total": [(labels, 23)],
        "llm_slo_good_events_total": [(labels, 17)],
        "llm_slo_violations_total": [(labels, 6)],
        "llm_slo_burn_rate": [
            ((*labels, "5m"), pytest.approx(6 / 23 / 0.1)),
            ((*labels, "30m"), pytest.approx(6 / 23 / 0.1)),
        ],
        "llm_slo_error_budget_remaining_ratio": [(labels, pytest.approx(1 - 6 / 23 / 0.1))],
        "llm_slo_covered_seconds": [(("fast",), pytest.approx(1800))],
        "llm_slo_unfollowed": [((), 0)],
    }


def replace_slo(slo: Slo, **changes: object) -> Slo:
    fields = {name: getattr(slo, name) for name in Slo.__struct_fields__}
    return Slo(**{**fields, **changes})
