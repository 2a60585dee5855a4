"""Whose word counts for a model's KV cache, and that no request counts twice; the families that come of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exporter.cache_metrics import ALL, cache_families
from exporter.families import Scrape
from exporter.kv_cache import ENGINE_FIRST_NS, QUIET_NS, SILENT_REQUESTS, Source, Turn, turn_of
from exporter.labels import OTHER, UNKNOWN
from exporter.quantiles import SLOT_NS, WINDOW_NS
from exporter.request import Capture, Failure, Phase
from exporter.slis import Slis
from exporter.status import ReaderStatus
from tests.unit.finished import REQUEST

START_NS = 1_000_003 * SLOT_NS
WIRE, ENGINE, POINT = Source


class Play:
    """One service, `roleplay`, whose requests end and whose engine and probe points tell."""

    def __init__(self, label_names: tuple[str, ...] = (), models: int = 64) -> None:
        self.now_ns = START_NS
        self.extra = tuple("stable" for _ in label_names)
        self.slis = Slis(label_names, models_per_service=models, clock=lambda: self.now_ns)

    def finish(self, model: str | None, prompt: int | None = None, cached: int | None = None, **more: object) -> None:
        request = replace(REQUEST, model=model, prompt_tokens=prompt, cached_tokens=cached, extra=self.extra, **more)  # type: ignore[arg-type]  # each of them is of its field's type
        admit = request.status is not None and request.status < 400
        self.slis.series("roleplay", model, request.api, self.extra, admit).finished(request)

    def silent(self, model: str | None, times: int = SILENT_REQUESTS) -> None:
        for _ in range(times):
            self.finish(model, prompt=19)

    def tell(self, source: Source, model: str | None, queries: int, hits: int) -> None:
        self.slis.caches.add(source, "roleplay", model, queries, hits, self.now_ns)

    def wait(self, ns: int) -> None:
        self.now_ns += ns
        self.slis.flush(self.now_ns)

    def points(self, name: str) -> dict[tuple[str, ...], object]:
        scrape = Scrape(self.now_ns, 0.0, self.slis.all_series(), None, ReaderStatus(0))
        (family,) = (family for family in cache_families(self.slis) if family.spec.name == name)
        found = list(family.points(scrape))
        assert all(len(labels) == len(family.spec.labels) for labels, _ in found)
        assert len(dict(found)) == len(found)
        return dict(found)

    def sources(self) -> dict[str, str]:
        found = self.points("llm_kv_cache_source")
        assert set(found.values()) <= {1}
        assert len({labels[:2] for labels in found}) == len(found)
        return {model: source for _, model, source in found}

    def counted(self) -> dict[tuple[str, str], tuple[object, object]]:
        """(queries, hits) by model and API."""
        queries, hits = self.points("llm_prefix_cache_queries"), self.points("llm_prefix_cache_hits")
        assert queries.keys() == hits.keys()
        return {(labels[1], labels[2]): (queries[labels], hits[labels]) for labels in queries}


@pytest.fixture
def play() -> Play:
    return Play()


# --- which one -----------------------------------------------------------------------------------------------------


def test_nothing_is_told_nothing_is_there(play: Play) -> None:
    play.silent("bard", 97)
    play.wait(10 * QUIET_NS)
    assert all(not list(play.points(family.spec.name)) for family in cache_families(play.slis))


def test_the_wire_counts_from_its_first_word(play: Play) -> None:
    play.tell(ENGINE, "bard", 101, 64)
    play.tell(POINT, "bard", 101, 64)
    assert play.sources() == {}
    play.finish("bard", 101, 64)
    play.tell(ENGINE, "bard", 31, 16)
    play.wait(QUIET_NS)
    assert play.sources() == {"bard": "wire"}
    assert play.counted() == {("bard", "chat_completions"): (101, 64)}
    assert play.points("llm_kv_cache_hit_ratio") == {("roleplay", "bard", "chat_completions"): 64 / 101}
    assert play.points("llm_kv_cache_source_lookup_tokens") == {
        ("roleplay", "bard", "wire"): 101,
        ("roleplay", "bard", "engine"): 132,
        ("roleplay", "bard", "probe_point"): 101,
    }
    assert play.points("llm_kv_cache_source_hit_tokens") == {
        ("roleplay", "bard", "wire"): 64,
        ("roleplay", "bard", "engine"): 80,
        ("roleplay", "bard", "probe_point"): 64,
    }


def test_the_engine_counts_when_the_wire_is_silent_from_its_own_beginning(play: Play) -> None:
    play.tell(ENGINE, "bard", 101, 64)
    play.silent("bard", SILENT_REQUESTS - 1)
    play.tell(ENGINE, "bard", 31, 16)
    assert (play.sources(), play.counted()) == ({}, {})
    play.silent("bard", 1)
    play.wait(0)
    assert play.sources() == {"bard": "engine"}
    assert play.counted() == {("bard", ALL): (132, 80)}
    play.tell(ENGINE, "bard", 7, 0)
    assert play.counted() == {("bard", ALL): (139, 80)}
    assert play.points("llm_kv_cache_hit_ratio") == {("roleplay", "bard", ALL): 80 / 139}
    assert play.slis.rows()[0].cache_hit_ratio == 80 / 139


def test_a_decision_holds(play: Play) -> None:
    play.silent("bard")
    play.tell(ENGINE, "bard", 101, 64)
    play.finish("bard", 17, 16)
    play.tell(POINT, "bard", 101, 64)
    play.wait(QUIET_NS)
    assert play.sources() == {"bard": "engine"}
    assert play.counted() == {("bard", ALL): (101, 64)}
    assert play.points("llm_kv_cache_source_lookup_tokens")["roleplay", "bard", "wire"] == 17


def test_a_wire_that_says_nothing_for_long_is_given_up(play: Play) -> None:
    play.tell(ENGINE, "bard", 101, 64)
    play.wait(QUIET_NS - 1)
    assert play.sources() == {}
    play.wait(1)
    assert play.sources() == {"bard": "engine"}


def test_a_probe_point_waits_for_the_engine(play: Play) -> None:
    play.silent("bard")
    play.tell(POINT, "bard", 101, 64)
    play.wait(ENGINE_FIRST_NS - 1)
    assert play.sources() == {}
    play.wait(1)
    assert play.sources() == {"bard": "probe_point"}
    play.tell(ENGINE, "bard", 101, 64)
    play.tell(POINT, "bard", 31, 31)
    assert play.counted() == {("bard", ALL): (132, 95)}


def test_an_engine_without_queries_does_not_count(play: Play) -> None:
    play.silent("bard")
    play.tell(ENGINE, "bard", 0, 0)
    play.tell(POINT, "bard", 101, 0)
    play.wait(ENGINE_FIRST_NS)
    assert play.sources() == {"bard": "probe_point"}
    assert play.points("llm_kv_cache_hit_ratio") == {("roleplay", "bard", ALL): 0}


@pytest.mark.parametrize(
    "more",
    [
        {"failure": Failure.server_error, "status": 500},
        {"failure": Failure.client_error, "status": 400},
        {"failure": Failure.cut_off},
        {"aborted": Phase.streaming},
        {"status": 404},
        {"status": None},
        *({"capture": outcome} for outcome in (Capture.undecodable, Capture.lost_events, Capture.end_unseen)),
    ],
)
def test_answers_that_had_no_chance_to_tell_do_not_speak_for_the_wire(play: Play, more: dict[str, object]) -> None:
    play.finish("bard", 19)
    for _ in range(SILENT_REQUESTS):
        play.finish("bard", 19, None, **more)
    play.tell(ENGINE, "bard", 101, 64)
    assert play.sources() == {}


def test_each_model_has_its_own_source(play: Play) -> None:
    play.finish("bard", 101, 64)
    play.silent("jester")
    play.tell(ENGINE, "bard", 101, 64)
    play.tell(ENGINE, "jester", 31, 16)
    assert play.sources() == {"bard": "wire", "jester": "engine"}
    assert play.counted() == {("bard", "chat_completions"): (101, 64), ("jester", ALL): (31, 16)}


def test_services_do_not_mix(play: Play) -> None:
    play.finish("bard", 101, 64)
    play.slis.caches.add(ENGINE, "other", "bard", 31, 16, play.now_ns)
    play.wait(QUIET_NS)
    assert play.points("llm_kv_cache_source") == {("roleplay", "bard", "wire"): 1, ("other", "bard", "engine"): 1}


# --- names that may be another's -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bard-by-its-other-name", None, UNKNOWN])
def test_a_model_that_was_never_asked_for_does_not_count_beside_the_wire(play: Play, name: str | None) -> None:
    play.tell(ENGINE, name, 101, 64)
    play.finish("bard", 101, 64)
    play.wait(10 * QUIET_NS)
    assert play.sources() == {"bard": "wire"}
    assert play.counted() == {("bard", "chat_completions"): (101, 64)}


def test_the_wire_does_not_count_beside_a_model_that_was_never_asked_for(play: Play) -> None:
    play.tell(ENGINE, None, 101, 64)
    play.wait(QUIET_NS)
    assert play.sources() == {UNKNOWN: "engine"}
    play.finish("bard", 101, 64)
    play.finish(None, 101, 64)
    assert play.sources() == {UNKNOWN: "engine"}
    assert play.counted() == {(UNKNOWN, ALL): (101, 64)}
    assert play.points("llm_kv_cache_source_hit_tokens")["roleplay", "bard", "wire"] == 64


def test_requests_without_a_name_may_have_been_for_any_model(play: Play) -> None:
    play.finish(None, 101, 64)
    play.silent("bard")
    play.tell(ENGINE, "bard", 101, 64)
    play.wait(QUIET_NS)
    assert play.sources() == {UNKNOWN: "wire"}


def test_several_models_that_nobody_asked_for_are_the_engines(play: Play) -> None:
    play.tell(ENGINE, "bard", 101, 64)
    play.tell(ENGINE, "jester", 31, 16)
    play.tell(POINT, "fool", 7, 3)
    play.wait(QUIET_NS)
    assert play.sources() == {"bard": "engine", "jester": "engine"}


MODELS = st.sampled_from(["bard", "jester", None])
STEPS = st.one_of(
    st.tuples(st.just("wire"), MODELS, st.integers(0, 97), st.integers(0, 97)),
    st.tuples(st.sampled_from([ENGINE, POINT]), MODELS, st.integers(0, 97), st.integers(0, 97)),
    st.tuples(st.just("silent"), MODELS, st.just(0), st.just(0)),
    st.tuples(st.just("wait"), MODELS, st.sampled_from([1, ENGINE_FIRST_NS, QUIET_NS]), st.just(0)),
)


@settings(deadline=None)  # other work shares the machine
@given(st.lists(STEPS, max_size=31))
def test_what_counts_is_one_source_per_model_whatever_happens(steps: list[tuple[object, str | None, int, int]]) -> None:
    play = Play()
    before: dict[str, str] = {}
    for what, model, queries, hits in steps:
        if what == "wire":
            play.finish(model, queries, min(hits, queries))
        elif what == "silent":
            play.finish(model, 19)
        elif what == "wait":
            play.wait(queries)
        elif isinstance(what, Source):
            play.tell(what, model, queries, hits)
        now = play.sources()
        assert before.items() <= now.items()
        before = now
    totals = play.points("llm_kv_cache_source_lookup_tokens")
    counted = play.counted()
    for (model, api), (queries, _) in counted.items():
        assert api == (REQUEST.api if before[model] == "wire" else ALL)
        if before[model] == "wire":
            assert isinstance(queries, int)
            assert queries <= sum_of([totals["roleplay", model, "wire"]])
        else:
            assert queries == totals["roleplay", model, before[model]]
    assert len({model for model, _ in counted}) == len(counted)
    if UNKNOWN in before:
        assert len(set(before.values())) == 1


def sum_of(values: Iterable[object]) -> int:
    return sum(value for value in values if isinstance(value, int))


# --- counts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("counts", [(-1, 0), (0, -1), (-1, -1), (0, 0)])
def test_what_is_no_count_is_ignored(play: Play, counts: tuple[int, int]) -> None:
    play.tell(ENGINE, "bard", *counts)
    assert play.points("llm_kv_cache_source_lookup_tokens") == {}


def test_more_hits_than_queries_have_no_ratio(play: Play) -> None:
    play.silent("bard")
    play.tell(ENGINE, "bard", 7, 16)
    assert play.counted() == {("bard", ALL): (7, 16)}
    assert play.points("llm_kv_cache_hit_ratio") == {}
    play.tell(ENGINE, "bard", 25, 0)
    assert play.points("llm_kv_cache_hit_ratio") == {("roleplay", "bard", ALL): 0.5}


def test_a_ratio_leaves_with_its_window(play: Play) -> None:
    play.silent("bard")
    play.tell(ENGINE, "bard", 101, 64)
    play.finish("jester", 101, 64, turn=1)
    assert len(play.points("llm_kv_cache_hit_ratio")) == 2
    play.wait(WINDOW_NS)
    assert play.points("llm_kv_cache_hit_ratio") == play.points("llm_kv_cache_turn_hit_ratio") == {}
    assert len(play.counted()) == 2


def test_the_configured_labels_of_other_sources() -> None:
    play = Play(("release", "tenant"))
    play.finish("jester", 101, 64)
    play.silent("bard")
    play.tell(ENGINE, "bard", 31, 16)
    assert play.points("llm_prefix_cache_queries") == {
        ("roleplay", "jester", "chat_completions", "stable", "stable"): 101,
        ("roleplay", "bard", ALL, ALL, ALL): 31,
    }


def test_models_that_an_engine_names_stay_bounded() -> None:
    play = Play(models=7)
    for number in range(997):
        play.tell(ENGINE, f"model-{number}\n", 2, 1)
    assert len(play.points("llm_kv_cache_source_lookup_tokens")) == 8
    assert play.points("llm_kv_cache_source_lookup_tokens")["roleplay", OTHER, "engine"] == 2 * 990
    assert play.slis.overflows() == {"roleplay": 0}  # they are no requests


@pytest.mark.parametrize("name", [OTHER, UNKNOWN, None, ""])
def test_names_that_stand_for_no_model_take_no_place(name: str | None) -> None:
    play = Play(models=1)
    play.tell(ENGINE, name, 2, 1)
    play.finish("bard", 101, 64)
    assert play.slis.all_series()[0].labels[1] == "bard"


# --- turns ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("messages", "turn"), [(1, Turn.FIRST), (2, Turn.EARLY), (4, Turn.EARLY), (5, Turn.LATE), (10_007, Turn.LATE)]
)
def test_turns_are_three(messages: int, turn: Turn) -> None:
    assert turn_of(messages) is turn


def test_the_hit_ratio_by_turn(play: Play) -> None:
    for turn, cached in ((1, 0), (2, 64), (3, 80), (5, 96), (7, 101), (None, 101)):
        play.finish("bard", 101, cached, turn=turn)
    assert play.points("llm_prefix_cache_turn_queries") == {
        ("roleplay", "bard", "1"): 101,
        ("roleplay", "bard", "2-4"): 202,
        ("roleplay", "bard", "5+"): 202,
    }
    assert play.points("llm_prefix_cache_turn_hits") == {
        ("roleplay", "bard", "1"): 0,
        ("roleplay", "bard", "2-4"): 144,
        ("roleplay", "bard", "5+"): 197,
    }
    assert play.points("llm_kv_cache_turn_hit_ratio") == {
        ("roleplay", "bard", "1"): 0,
        ("roleplay", "bard", "2-4"): 144 / 202,
        ("roleplay", "bard", "5+"): 197 / 202,
    }
    assert play.counted() == {("bard", "chat_completions"): (606, 442)}


def test_a_cache_that_is_off_shows_zero_and_not_nothing(play: Play) -> None:
    for turn in (1, 2, 5):
        play.finish("bard", 101, 0, turn=turn)
    assert set(play.points("llm_kv_cache_turn_hit_ratio").values()) == {0}
    assert play.points("llm_kv_cache_hit_ratio") == {("roleplay", "bard", "chat_completions"): 0}


def test_turns_are_absent_without_usage(play: Play) -> None:
    play.finish("bard", 101, None, turn=2)
    play.silent("bard")
    play.tell(ENGINE, "bard", 101, 64)
    assert play.points("llm_prefix_cache_turn_queries") == {}


def test_the_wires_turns_stay_when_another_source_counts(play: Play) -> None:
    """They compare turns with each other, and no other source tells them."""
    play.silent("bard")
    play.tell(ENGINE, "bard", 101, 64)
    play.finish("bard", 31, 16, turn=2)
    assert play.points("llm_prefix_cache_turn_queries") == {("roleplay", "bard", "2-4"): 31}
    assert play.counted() == {("bard", ALL): (101, 64)}
