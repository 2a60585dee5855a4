"""What engines told, over their restarts and beside what the agent saw; and the families made of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from exporter.config import Match, Service
from exporter.engine_metrics import engine_families
from exporter.engines import (
    FORGET_NS,
    MODELS_LIMIT,
    WINDOW_NS,
    CacheDelta,
    Comparison,
    EngineView,
    Ours,
    endpoints,
    ours_of,
)
from exporter.families import Scrape
from exporter.status import AgentStatus, TargetStatus
from probes.engine_metrics import Endpoint, EndpointReport, EngineReport
from probes.engine_page import EngineModel, Failure, PageReader
from tests.conversations import Scene, Wire, answer, post, stream

S = 1_000_000_000
URL = "http://127.0.0.1:8000/metrics"
PAGES = Path(__file__).parents[1] / "fixtures" / "engines"
NOTHING: Mapping[tuple[str, str], Ours] = {}


def engine(model: str | None = "bard", **figures: float) -> EngineModel:
    return EngineModel("vllm", model, **figures)


def said(
    at_s: float, *models: EngineModel, url: str = URL, known: bool = True, service: str = "roleplay"
) -> EndpointReport:
    failure = None if models else Failure.TIMEOUT
    return EndpointReport(service, url, known, failure, models, round(at_s * S), 0.25)


def report(*endpoints: EndpointReport) -> EngineReport:
    return EngineReport(max(each.at_ns for each in endpoints), endpoints, {})


def ours(
    requests: int = 0, first_tokens: int = 0, seconds: float = 0.0, model: str = "bard"
) -> dict[tuple[str, str], Ours]:
    return {("roleplay", model): Ours(requests, first_tokens, round(seconds * S))}


def totals(view: EngineView, model: str = "bard") -> dict[str, float]:
    return view.models["roleplay", model, "vllm"].totals


def comparison(view: EngineView, model: str = "bard") -> Comparison | None:
    return view.models["roleplay", model, "vllm"].comparison


def samples(view: EngineView | None) -> dict[str, dict[tuple[str, ...], float]]:
    scrape = cast(Scrape, SimpleNamespace(engines=view))
    found: dict[str, dict[tuple[str, ...], float]] = {}
    for family in engine_families():
        (name,) = family.spec.sample_names()
        points = dict(family.points(scrape))
        assert all(len(labels) == len(family.spec.labels) for labels in points)
        if points:
            found[name] = cast(dict[tuple[str, ...], float], points)
    return found


# ---- where engines are asked ----


def test_endpoints_are_what_is_configured_or_was_seen() -> None:
    services = [
        Service("told", Match(port=(1,)), engine_metrics="https://engine:9/metrics"),
        Service("off", Match(port=(2,)), engine_metrics="off"),
        Service("seen", Match(port=(3,))),
        Service("unseen", Match(port=(4,))),
        Service("portless", Match(port=(5,))),
    ]
    targets = tuple(TargetStatus(each.name, 1, 2, (7,), (8000, 8001)) for each in services[:4])
    status = AgentStatus(0, "ring", (), targets, 0, ())
    assert endpoints(services, status, {"told", "off", "seen", "portless"}) == {
        "told": (Endpoint("https://engine:9/metrics"),),
        "seen": (
            Endpoint("http://127.0.0.1:8000/metrics", found=True),
            Endpoint("http://127.0.0.1:8001/metrics", found=True),
        ),
    }
    assert endpoints(services, None, {"seen"}) == {"told": (Endpoint("https://engine:9/metrics"),)}


def test_asking_for_metrics_is_no_request_of_the_service() -> None:
    scene, wire = Scene(), Wire()
    for _ in range(3):
        wire.ask(b"GET /metrics HTTP/1.1\r\nHost: 127.0.0.1:8000\r\nAccept: text/plain;version=0.0.4\r\n\r\n")
        wire.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\ncontent-length: 5\r\n\r\nup 1\n", after_ms=1)
    wire.service_closes()
    assert scene.play(wire) == []
    assert scene.captures == {}
    assert scene.slis.all_series() == []
    assert ours_of(scene.slis.all_series()) == {}


def test_ours_are_the_requests_that_were_not_refused() -> None:
    scene = Scene(labels=("tier",))
    wire = Wire()
    for number in range(7):
        tier = "stable" if number % 2 else "canary"
        wire.ask(post(headers=f"x-tier: {tier}\r\n"), delay_ms=2)
        stream(wire, first_ms=53)
    for status in (404, 429, 500):
        wire.ask(post())
        wire.write(answer(b"{}", status=status), after_ms=1)
    assert len(scene.play(wire)) == 10
    assert len(scene.slis.all_series()) == 3  # by tier
    assert ours_of(scene.slis.all_series()) == {("roleplay", "bard"): Ours(8, 7, 7 * 57_000_000)}


# ---- counters ----


def test_counters_begin_with_the_engines_own_and_survive_its_restart() -> None:
    view = EngineView()
    for at_s, count in ((0, 101), (5, 107), (10, 107), (15, 3), (20, 8)):
        view.take(report(said(at_s, engine(prompt_tokens=count, requests=count))), NOTHING)
    assert totals(view) == {"prompt_tokens": 115, "requests": 115}


def test_restart_is_seen_by_any_counter() -> None:
    view = EngineView()
    view.take(report(said(0, engine(prompt_tokens=5, requests=100))), NOTHING)
    view.take(report(said(5, engine(prompt_tokens=7, requests=2))), NOTHING)
    assert totals(view) == {"prompt_tokens": 12, "requests": 102}


def test_sum_of_floats_in_another_order_is_no_restart() -> None:
    view = EngineView()
    view.take(report(said(0, engine(ttft_sum_seconds=0.1 + 0.2 + 0.3))), NOTHING)
    view.take(report(said(5, engine(ttft_sum_seconds=0.3 + 0.2 + 0.1))), NOTHING)
    assert totals(view)["ttft_sum_seconds"] == pytest.approx(0.6)


def test_report_is_taken_once() -> None:
    view = EngineView()
    first = report(said(0, engine(requests=3)))
    view.take(first, NOTHING)
    view.take(first, NOTHING)
    assert totals(view) == {"requests": 3}


def test_figure_that_was_absent_for_a_while_is_not_counted_again() -> None:
    view = EngineView()
    for at_s, figures in ((0, {"requests": 11.0}), (5, {}), (10, {"requests": 13.0})):
        view.take(report(said(at_s, engine(prompt_tokens=1, **figures))), NOTHING)
    assert totals(view) == {"requests": 13, "prompt_tokens": 1}


def test_engines_of_one_service_add_up_and_a_later_one_makes_no_jump() -> None:
    view = EngineView()
    first, second, third = "http://a/", "http://b/", "http://c/"
    view.take(report(said(0, engine(requests=11), url=first), said(0, engine(requests=13), url=second)), NOTHING)
    assert totals(view) == {"requests": 24}
    later = engine(requests=1_000_003)
    view.take(report(said(5, engine(requests=12), url=first), said(5, later, url=third)), NOTHING)
    assert totals(view) == {"requests": 25}
    later = engine(requests=1_000_010)
    view.take(report(said(9, engine(requests=15), url=second), said(9, later, url=third)), NOTHING)
    assert totals(view) == {"requests": 34}


def test_gauges_are_summed_and_usage_is_averaged_and_none_is_left_of_who_is_down() -> None:
    view = EngineView()
    one, two = engine(running=2, waiting=3, kv_usage_ratio=0.25), engine(running=5, waiting=7, kv_usage_ratio=0.5)
    view.take(report(said(0, one, url="http://a/"), said(0, two, url="http://b/")), NOTHING)
    (model,) = view.models.values()
    assert (model.running, model.waiting, model.kv_usage_ratio) == (7, 10, 0.375)
    view.take(report(said(5, url="http://a/"), said(5, url="http://b/")), NOTHING)
    assert (model.running, model.waiting, model.kv_usage_ratio) == (None, None, None)


def test_model_without_a_name_is_the_services_only_one() -> None:
    view = EngineView()
    view.take(report(said(0, engine(None, requests=5))), NOTHING)
    assert set(view.models) == {("roleplay", "_unknown", "vllm")}
    seen = {**ours(3), ("roleplay", "_other"): Ours(1), ("roleplay", "_unknown"): Ours(1), ("else", "x"): Ours()}
    view.take(report(said(5, engine(None, requests=7))), seen)
    assert set(view.models) == {("roleplay", "bard", "vllm")}
    assert totals(view) == {"requests": 7}
    view.take(report(said(10, engine(None, requests=8))), {**seen, ("roleplay", "scribe"): Ours()})
    assert ("roleplay", "_unknown", "vllm") in view.models


def test_models_are_bounded_and_forgotten() -> None:
    view = EngineView()
    for number in range(MODELS_LIMIT + 7):
        view.take(report(said(number, engine(f"model-{number}", requests=1))), NOTHING)
    assert len(view.models) == MODELS_LIMIT
    assert view.overflows == {"roleplay": 7}
    view.take(report(said(FORGET_NS // S + MODELS_LIMIT + 8, engine(requests=1))), NOTHING)
    view.take(report(said(FORGET_NS // S + MODELS_LIMIT + 9, engine(requests=1))), NOTHING)
    assert set(view.models) == {("roleplay", "bard", "vllm")}


def test_hostile_names_are_made_safe() -> None:
    view = EngineView()
    view.take(report(said(0, engine("a\x1b[31m" + "b" * 500, requests=1))), NOTHING)
    ((_, model, _),) = view.models
    assert model.isprintable()
    assert len(model) == 256


def test_names_that_are_the_same_label_are_not_mixed() -> None:
    view = EngineView()
    for at_s in range(5):
        names = ["n" * 300 + str(number) for number in range(3)]
        view.take(report(said(at_s, *(engine(name, requests=100 * at_s + 1) for name in names))), NOTHING)
    ((labels, model),) = view.models.items()
    assert labels[1] == "n" * 255 + "…"
    assert model.totals == {"requests": 401}
    assert view.overflows == {"roleplay": 10}


# ---- the prefix cache ----


def cached(requests: int, queries: float, hits: float) -> EngineModel:
    return engine(requests=requests, prefix_queries=queries, prefix_hits=hits)


def test_cache_deltas_are_what_happened_since_the_last_ones() -> None:
    view = EngineView()
    view.take(report(said(0, cached(3, 300, 101))), ours(3))
    assert view.cache_deltas() == [CacheDelta("roleplay", "bard", 300, 101)]
    assert view.cache_deltas() == []
    view.take(report(said(5, cached(5, 500, 203))), ours(5))
    view.take(report(said(10, cached(7, 700, 307))), ours(7))
    assert view.cache_deltas() == [CacheDelta("roleplay", "bard", 400, 206)]
    view.take(report(said(15, cached(1, 97, 11))), ours(8))  # it restarted
    assert view.cache_deltas() == [CacheDelta("roleplay", "bard", 97, 11)]


def test_counter_that_is_late_after_a_restart_is_no_other_restart() -> None:
    view = EngineView()
    view.take(report(said(0, cached(101, 1009, 503))), ours(101))
    view.cache_deltas()
    view.take(report(said(5, engine(prefix_queries=11, prefix_hits=0))), ours(102))  # none of its requests ended yet
    view.take(report(said(10, cached(1, 23, 0))), ours(102))
    view.take(report(said(15, cached(2, 31, 7))), ours(103))
    assert totals(view) == {"requests": 103, "prefix_queries": 1040, "prefix_hits": 510}
    assert view.cache_deltas() == [CacheDelta("roleplay", "bard", 31, 7)]


def test_engine_that_was_silent_for_long_does_not_tell_its_past_again() -> None:
    view = EngineView()
    view.take(report(said(0, cached(3, 300, 101))), ours(3))
    view.take(report(said(5, cached(5, 500, 203))), ours(5))
    assert view.cache_deltas() == [CacheDelta("roleplay", "bard", 500, 203)]
    silent_s = 6 + FORGET_NS // S
    view.take(report(said(silent_s)), ours(5))
    assert not view.models
    view.take(report(said(silent_s + 5, cached(5, 500, 203))), ours(5))
    assert view.cache_deltas() == []
    view.take(report(said(silent_s + 10, cached(7, 700, 307))), ours(7))
    assert view.cache_deltas() == [CacheDelta("roleplay", "bard", 200, 104)]


def test_engine_that_comes_later_does_not_tell_what_happened_elsewhere() -> None:
    view = EngineView()
    other = "http://127.0.0.1:8001/metrics"
    view.take(report(said(0, cached(0, 0, 0))), ours(0))
    view.take(report(said(5, cached(97, 900, 101))), ours(97))
    assert view.cache_deltas() == [CacheDelta("roleplay", "bard", 900, 101)]
    # What it counted cannot be among the requests that were seen: the first engine had them all.
    view.take(report(said(10, cached(97, 900, 101)), said(10, cached(53, 700, 7), url=other)), ours(97))
    assert view.cache_deltas() == []
    view.take(report(said(15, cached(97, 900, 101)), said(15, cached(54, 719, 18), url=other)), ours(98))
    assert view.cache_deltas() == [CacheDelta("roleplay", "bard", 19, 11)]


def test_cache_past_that_the_agent_did_not_see_is_left_out() -> None:
    view = EngineView()
    view.take(report(said(0, cached(1009, 90_001, 80_021))), ours(2))
    assert view.cache_deltas() == []
    view.take(report(said(5, cached(1011, 90_101, 80_041))), ours(4))
    assert view.cache_deltas() == [CacheDelta("roleplay", "bard", 100, 20)]
    assert totals(view)["prefix_queries"] == 90_101


def test_cache_of_an_engine_that_does_not_tell_it_has_no_deltas() -> None:
    view = EngineView()
    for at_s in (0, 5):
        view.take(report(said(at_s, engine(requests=at_s, prompt_tokens=at_s, prefix_queries=at_s))), ours(at_s))
    assert view.cache_deltas() == []


def test_hits_are_never_ahead_of_queries() -> None:
    view = EngineView()
    for at_s, queries, hits in ((0, 100, 100), (5, 100, 113), (10, 150, 120)):
        view.take(report(said(at_s, cached(1, queries, hits))), ours(1))
    assert view.cache_deltas() == [CacheDelta("roleplay", "bard", 150, 120)]
    view = EngineView()
    deltas = []
    for at_s, queries, hits in ((0, 100, 100), (5, 100, 113), (10, 150, 120)):
        view.take(report(said(at_s, cached(1, queries, hits))), ours(1))
        deltas += view.cache_deltas()
    assert deltas == [CacheDelta("roleplay", "bard", 100, 100), CacheDelta("roleplay", "bard", 50, 20)]


# ---- the comparison ----


def felt(requests: int, count: int, seconds: float) -> EngineModel:
    return engine(requests=requests, ttft_count=count, ttft_sum_seconds=seconds)


def test_comparison_is_of_the_same_window() -> None:
    view = EngineView()
    view.take(report(said(0, felt(1000, 1000, 500.0))), ours(3, 3, 30.0))
    assert comparison(view) is None
    view.take(report(said(5, felt(1011, 1010, 502.0))), ours(16, 11, 33.0))
    found = comparison(view)
    assert found is not None
    assert found.ttft_mean_seconds == pytest.approx(2.0 / 10)
    assert found.ttft_difference_seconds == pytest.approx(2.0 / 10 - 3.0 / 8)
    assert found.requests_difference == 11 - 13


def test_window_moves_on() -> None:
    view = EngineView()
    for at_s in range(0, 2 * WINDOW_NS // S, 5):
        count = at_s * (1 if at_s < 200 else 3)
        view.take(report(said(at_s, felt(count, count, 0.25 * count))), ours(at_s, at_s, 0.5 * at_s))
    # of the last 300 s: three to the agent's one
    assert comparison(view) == Comparison(0.25, -0.25, 600.0)


def test_nothing_to_compare_is_absent() -> None:
    view = EngineView()
    for at_s in (0, 5):
        view.take(report(said(at_s, felt(7, 7, 1.0))), ours(5, 5, 1.0))
    assert comparison(view) == Comparison(None, None, 0)
    for at_s in (10, 15):
        view.take(report(said(at_s, felt(11, 11, 3.0))), None)
    assert comparison(view) is None  # the agent does not look at requests
    view = EngineView()
    for at_s in (0, 5):
        view.take(report(said(at_s, engine(prompt_tokens=at_s))), ours(at_s))
    assert comparison(view) == Comparison(None, None, None)


def test_requests_that_the_agent_did_not_see_are_news() -> None:
    view = EngineView()
    view.take(report(said(0, felt(0, 0, 0))), NOTHING)
    view.take(report(said(5, felt(23, 23, 2.875))), NOTHING)
    assert comparison(view) == Comparison(0.125, None, 23)


def test_restart_begins_a_new_window() -> None:
    view = EngineView()
    view.take(report(said(0, felt(100, 100, 10.0))), ours(100, 100, 10.0))
    view.take(report(said(5, felt(107, 107, 10.7))), ours(107, 107, 10.7))
    view.take(report(said(10, felt(2, 2, 0.2))), ours(111, 111, 11.1))
    assert comparison(view) is None
    view.take(report(said(15, felt(5, 5, 0.5))), ours(114, 114, 11.4))
    found = comparison(view)
    assert found is not None
    assert found.requests_difference == 0


def test_service_with_an_engine_that_is_down_is_not_compared() -> None:
    view = EngineView()
    for at_s in (0, 5):
        view.take(report(said(at_s, felt(at_s, 0, 0)), said(at_s, felt(0, 0, 0), url="http://b/")), ours(at_s))
    assert comparison(view) is not None
    view.take(report(said(10, felt(7, 0, 0)), said(10, url="http://b/")), ours(10))
    assert comparison(view) is None
    view.take(report(said(15, felt(7, 0, 0)), said(15, felt(6, 0, 0), url="http://b/")), ours(13))
    found = comparison(view)
    assert found is not None
    assert found.requests_difference == 0
    view.take(report(said(20, felt(7, 0, 0)), said(20, url="http://c/", known=False)), ours(13))
    assert comparison(view) is not None  # whoever never was an engine is missed by nobody


def test_engine_that_is_found_later_begins_a_new_window() -> None:
    view = EngineView()
    for at_s in (0, 5):
        view.take(report(said(at_s, felt(at_s, 0, 0))), ours(at_s))
    view.take(report(said(10, felt(5, 0, 0)), said(10, felt(1_009, 0, 0), url="http://b/")), ours(9))
    assert comparison(view) is None


# ---- the families ----


@pytest.mark.parametrize("page", sorted(page.stem for page in PAGES.iterdir()))
def test_pages_become_the_families(page: str) -> None:
    reader = PageReader()
    assert reader.feed((PAGES / f"{page}.txt").read_bytes()) is None
    models = reader.finish()
    assert isinstance(models, tuple)
    view = EngineView()
    view.take(report(said(0, *models)), NOTHING)
    found = samples(view)
    for name, field in {
        "llm_engine_requests_running": "running",
        "llm_engine_requests_waiting": "waiting",
        "llm_engine_kv_cache_usage_ratio": "kv_usage_ratio",
        "llm_engine_prefix_cache_queries_total": "prefix_queries",
        "llm_engine_prefix_cache_hits_total": "prefix_hits",
        "llm_engine_preemptions_total": "preemptions",
        "llm_engine_requests_total": "requests",
        "llm_engine_prompt_tokens_total": "prompt_tokens",
        "llm_engine_generation_tokens_total": "generation_tokens",
    }.items():
        expected = {
            ("roleplay", model.model or "_unknown", model.engine): getattr(model, field)
            for model in models
            if getattr(model, field) is not None
        }
        assert found.get(name, {}) == expected, name
    assert found["llm_engine_info"] == {("roleplay", models[0].engine, URL): 1}
    assert found["llm_engine_up"] == {("roleplay",): 1}
    assert found["llm_engine_scrape_seconds"] == {("roleplay",): 0.25}


def test_families_of_the_comparison() -> None:
    view = EngineView()
    view.take(report(said(0, felt(0, 0, 0))), ours())
    view.take(report(said(5, felt(7, 8, 2.0))), ours(5, 4, 0.5))
    found = samples(view)
    labels = ("roleplay", "bard", "vllm")
    assert found["llm_engine_time_to_first_token_mean_seconds"] == {labels: 0.25}
    assert found["llm_engine_time_to_first_token_difference_seconds"] == {labels: 0.125}
    assert found["llm_engine_requests_difference"] == {labels: 2}


def test_up_is_of_known_endpoints_only_and_of_all_of_them() -> None:
    view = EngineView()
    view.take(report(said(0, url="http://x/", known=False)), NOTHING)
    assert "llm_engine_up" not in samples(view)
    view.take(report(said(1, engine(requests=1)), said(1, url="http://x/", known=False)), NOTHING)
    assert samples(view)["llm_engine_up"] == {("roleplay",): 1}
    view.take(report(said(2, engine(requests=1)), said(2, url="http://x/")), NOTHING)
    assert samples(view)["llm_engine_up"] == {("roleplay",): 0}


def test_endpoint_is_told_without_its_secrets() -> None:
    view = EngineView()
    view.take(report(said(0, engine(requests=1), url=URL + "?token=hunter2")), NOTHING)
    assert samples(view)["llm_engine_info"] == {("roleplay", "vllm", URL): 1}


def test_failures_are_told_from_zero() -> None:
    view = EngineView()
    failures = {("roleplay", failure): 3 if failure is Failure.TIMEOUT else 0 for failure in Failure}
    view.take(replace(report(said(0)), failures=failures), NOTHING)
    view.overflows["roleplay"] = 5
    told = samples(view)["llm_engine_scrape_failures_total"]
    assert len(told) == len(Failure)
    assert told["roleplay", "timeout"] == 3
    assert told["roleplay", "refused"] == 0
    assert told["roleplay", "too_many_series"] == 5


def test_without_engines_nothing_is_told() -> None:
    assert samples(None) == {}
    assert samples(EngineView()) == {}
