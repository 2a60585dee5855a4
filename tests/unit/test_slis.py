"""SLIs: each definition of the semantics page on requests whose numbers are known."""

from dataclasses import replace

import pytest

from exporter.labels import OTHER, UNKNOWN
from exporter.quantiles import SLOT_NS, WINDOW_NS
from exporter.request import Capture, Failure, FinishedRequest, Phase
from exporter.slis import BOUNDS, GAPS_AT_ONCE, Series, Sli, Slis
from tests.unit import finished
from tests.unit.finished import later

MS = 1_000_000
START_NS = 1_000_003 * SLOT_NS

# Arrived at 0, read after 2 ms, first token after 53 ms, 11 frames 10 ms apart, finished at 157 ms.
REQUEST = later(finished.REQUEST, START_NS)


class Clock:
    def __init__(self) -> None:
        self.now_ns = START_NS

    def __call__(self) -> int:
        return self.now_ns


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def slis(clock: Clock) -> Slis:
    return Slis(clock=clock)


@pytest.fixture
def series(slis: Slis) -> Series:
    return slis.series("roleplay", "bard", "chat_completions", (), admit=True)


def count(series: Series, sli: Sli) -> int:
    return sum(series.histograms[sli].counts)


def play(series: Series, request: FinishedRequest) -> None:
    """Everything the reader calls for a streamed request."""
    assert request.first_token_ns is not None
    series.first_token(request.first_token_ns - request.arrived_ns, START_NS)
    series.frame()
    for _ in range(request.frames - 1):
        series.frame()
        series.gap(10 * MS)
    series.finished(request)


# --- one request, every latency ------------------------------------------------------------------------------------


def test_each_latency_of_a_known_request(slis: Slis, series: Series, clock: Clock) -> None:
    play(series, REQUEST)
    slis.flush(clock())
    sums = {sli: series.histograms[sli].sum_ns for sli in Sli}
    assert sums == {
        Sli.TTFT: 53 * MS,
        Sli.ITL: 100 * MS,
        Sli.TPOT: 10 * MS,
        Sli.LONGEST_GAP: 10 * MS,
        Sli.DURATION: 157 * MS,
        Sli.READ_DELAY: 2 * MS,
    }
    assert {sli: count(series, sli) for sli in Sli} == {**dict.fromkeys(Sli, 1), Sli.ITL: 10}
    assert series.requests == 1
    assert series.frames == 11
    assert series.quantiles(Sli.TTFT, clock()) == pytest.approx((0.053,) * 3, rel=0.01)
    assert series.quantiles(Sli.LONGEST_GAP, clock()) is None


@pytest.mark.parametrize("sli", Sli)
def test_a_value_equal_to_a_bound_is_within_it(sli: Sli, series: Series) -> None:
    histogram = series.histograms[sli]
    for place, bound in enumerate(BOUNDS[sli]):
        before = list(histogram.counts)
        histogram.observe(round(bound * 1e9))
        histogram.observe(round(bound * 1e9) + 1)
        before[place] += 1
        before[place + 1] += 1
        assert histogram.counts == before


def test_bounds_are_those_of_the_semantics_page() -> None:
    ttft = "0.001 0.005 0.01 0.02 0.04 0.06 0.08 0.1 0.25 0.3 0.5 0.75 1 2.5 5 7.5 10 20 40 80 160 640 2560"
    gaps = "0.002 0.004 0.006 0.008 0.01 0.015 0.02 0.025 0.03 0.04 0.05 0.075 0.1 0.15 0.2 0.3 0.4 0.5 0.75 1 2.5 5 10"
    duration = "0.3 0.5 0.8 1 1.5 2 2.5 5 10 15 20 30 40 50 60 120 240 480 960 1920 7680"
    read = "0.0001 0.00025 0.0005 0.001 0.0025 0.005 0.01 0.025 0.05 0.1 0.25 0.5 1 2.5 5 10"
    written = {sli: " ".join(f"{bound:g}" for bound in bounds) for sli, bounds in BOUNDS.items()}
    assert written == {
        Sli.TTFT: ttft,
        Sli.ITL: gaps,
        Sli.TPOT: gaps,
        Sli.LONGEST_GAP: gaps,
        Sli.DURATION: duration,
        Sli.READ_DELAY: read,
    }


def test_extra_bounds_are_added_in_order_and_once(clock: Clock) -> None:
    slis = Slis(extra_bounds={"ttft": (0.35, 0.3)}, clock=clock)
    assert slis.bounds[Sli.TTFT] == tuple(sorted({*BOUNDS[Sli.TTFT], 0.35}))
    assert slis.bounds[Sli.ITL] == BOUNDS[Sli.ITL]


@pytest.mark.parametrize(
    ("sli", "bound"), [("ttfb", 1.0), ("ttft", 0.0), ("ttft", float("nan")), ("itl", float("inf"))]
)
def test_impossible_bounds_are_refused(sli: str, bound: float) -> None:
    with pytest.raises(ValueError, match=sli):
        Slis(extra_bounds={sli: (bound,)})


@pytest.mark.parametrize("names", [("model_name",), ("le",), ("release", "release")])
def test_labels_that_clash_are_refused(names: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=names[0]):
        Slis(names)


# --- time per output token -----------------------------------------------------------------------------------------


def tpot_ns(series: Series) -> int | None:
    histogram = series.histograms[Sli.TPOT]
    return histogram.sum_ns if sum(histogram.counts) else None


def test_tpot_divides_by_the_tokens_of_the_usage(series: Series) -> None:
    series.finished(replace(REQUEST, completion_tokens=41))
    assert tpot_ns(series) == 100 * MS // 40


def test_tpot_needs_more_than_one_token(series: Series) -> None:
    series.finished(replace(REQUEST, completion_tokens=1, frames=1, last_token_ns=REQUEST.first_token_ns))
    series.finished(replace(REQUEST, frames=0, first_token_ns=None, last_token_ns=None))
    assert tpot_ns(series) is None


def test_a_response_in_one_frame_has_no_time_between_tokens(series: Series) -> None:
    series.finished(replace(REQUEST, completion_tokens=37, frames=1, last_token_ns=REQUEST.first_token_ns))
    assert tpot_ns(series) is None
    assert series.generated_tokens == 37


# --- gaps ----------------------------------------------------------------------------------------------------------


def test_every_gap_is_counted_however_many_are_gathered(slis: Slis, series: Series, clock: Clock) -> None:
    gaps = 3 * GAPS_AT_ONCE + 101
    for number in range(gaps):
        series.gap((1 + number % 13) * MS)
    assert count(series, Sli.ITL) == 3 * GAPS_AT_ONCE
    slis.flush(clock())
    assert count(series, Sli.ITL) == gaps
    assert series.histograms[Sli.ITL].sum_ns == sum(1 + number % 13 for number in range(gaps)) * MS
    slis.flush(clock())
    assert count(series, Sli.ITL) == gaps


def test_gathered_gaps_are_counted_in_the_slot_they_happened_in(slis: Slis, series: Series, clock: Clock) -> None:
    slis.tick(clock())
    series.gap(10 * MS)
    clock.now_ns = START_NS + SLOT_NS
    slis.tick(clock())  # the first of the next slot
    clock.now_ns = START_NS + WINDOW_NS + SLOT_NS
    assert series.quantiles(Sli.ITL, clock()) is None


@pytest.mark.parametrize("gaps", [(-1,), (-1, 7 * MS, -3 * MS)])
def test_negative_latencies_are_discarded_and_counted(
    slis: Slis, series: Series, clock: Clock, gaps: tuple[int, ...]
) -> None:
    for gap in gaps:
        series.gap(gap)
    series.first_token(-1, clock())
    series.finished(replace(REQUEST, read_ns=START_NS - 1, finished_ns=START_NS - 1))
    slis.flush(clock())
    negative = sum(1 for gap in gaps if gap < 0)
    assert slis.refused == {**dict.fromkeys(Sli, 0), Sli.ITL: negative, Sli.TTFT: 1, Sli.READ_DELAY: 1, Sli.DURATION: 1}
    assert count(series, Sli.ITL) == len(gaps) - negative
    assert count(series, Sli.DURATION) == 0


# --- outcomes and coverage -----------------------------------------------------------------------------------------


def test_failures_and_aborts_by_their_reason(series: Series) -> None:
    for failure in Failure:
        series.finished(replace(REQUEST, failure=failure))
    series.finished(replace(REQUEST, aborted=Phase.streaming, wasted_tokens=13))
    assert series.requests == 5
    assert series.failures == dict.fromkeys(Failure, 1)
    assert series.aborts == {Phase.waiting: 0, Phase.streaming: 1}
    assert series.wasted_tokens == 13


# Which of total, duration, read delay, TPOT and longest gap each outcome counts.
COUNTED = {
    Capture.complete: (1, 1, 1, 1, 1),
    Capture.arrival_unseen: (1, 1, 0, 1, 1),
    Capture.start_unseen: (1, 0, 0, 0, 0),
    Capture.model_unseen: (1, 1, 1, 1, 1),
    Capture.end_unseen: (0, 0, 0, 0, 0),
    Capture.undecodable: (1, 0, 1, 0, 0),
    Capture.lost_events: (1, 1, 1, 0, 0),
}


@pytest.mark.parametrize("outcome", Capture)
def test_what_was_not_seen_is_not_measured(slis: Slis, series: Series, outcome: Capture) -> None:
    read_ns = START_NS if outcome is Capture.arrival_unseen else REQUEST.read_ns
    series.finished(replace(REQUEST, capture=outcome, read_ns=read_ns, end_seen=outcome is not Capture.end_unseen))
    latencies = (Sli.DURATION, Sli.READ_DELAY, Sli.TPOT, Sli.LONGEST_GAP)
    assert (series.requests, *(count(series, sli) for sli in latencies)) == COUNTED[outcome]
    (row,) = slis.rows()
    assert row.coverage == (1 if outcome is Capture.complete else 0)
    assert slis.captures() == {"roleplay": dict.fromkeys(Capture, 0)}  # counted by Slis.capture, once


def test_coverage_is_complete_by_all_over_the_window(slis: Slis, clock: Clock) -> None:
    slis.service("roleplay")
    slis.service("idle")
    assert slis.capture_ratios() == {"roleplay": None, "idle": None}
    for _ in range(6):
        slis.capture("roleplay", Capture.complete)
    slis.capture("roleplay", Capture.undecodable)
    assert slis.capture_ratios() == {"roleplay": 6 / 7, "idle": None}
    clock.now_ns += WINDOW_NS
    assert slis.capture_ratios() == {"roleplay": None, "idle": None}
    assert slis.captures()["roleplay"][Capture.complete] == 6
    assert slis.captures()["idle"] == dict.fromkeys(Capture, 0)


# --- tokens --------------------------------------------------------------------------------------------------------


def test_tokens_come_from_the_usage_else_from_frames_else_are_unknown(series: Series) -> None:
    plain = replace(REQUEST, streamed=False, frames=0, first_token_ns=None, last_token_ns=None)
    series.finished(plain)
    assert (series.prompt_tokens, series.generated_tokens) == (None, None)
    series.finished(replace(plain, prompt_tokens=17, completion_tokens=5))
    assert (series.prompt_tokens, series.generated_tokens) == (17, 5)
    play(series, REQUEST)
    assert (series.prompt_tokens, series.generated_tokens) == (17, 16)
    assert series.frames == 11


def test_a_streamed_response_makes_the_generated_tokens_exist_at_zero(series: Series, clock: Clock) -> None:
    assert series.generated_tokens is None
    series.first_token(7 * MS, clock())
    assert series.generated_tokens == 0


def test_cache_hits_need_usage_that_tells_them(series: Series, clock: Clock) -> None:
    series.finished(replace(REQUEST, prompt_tokens=101, completion_tokens=11))
    assert (series.cache_queries, series.cache_hits) == (None, None)
    assert series.cache_hit_ratio(clock()) is None
    series.finished(replace(REQUEST, prompt_tokens=101, cached_tokens=64))
    series.finished(replace(REQUEST, prompt_tokens=11, cached_tokens=13))  # more than were asked for: all of them
    assert (series.cache_queries, series.cache_hits) == (112, 75)
    assert series.cache_hit_ratio(clock()) == 75 / 112
    clock.now_ns += WINDOW_NS
    assert series.cache_hit_ratio(clock()) is None
    assert series.cache_hits == 75


def test_no_prompt_tokens_are_no_queries(series: Series, clock: Clock) -> None:
    series.finished(replace(REQUEST, prompt_tokens=0, cached_tokens=0))
    assert series.cache_queries == 0
    assert series.cache_hit_ratio(clock()) is None


def test_speeds_by_their_definition(series: Series, clock: Clock) -> None:
    assert (series.prefill_rate(clock()), series.decode_rate(clock())) == (None, None)
    series.finished(replace(REQUEST, prompt_tokens=101, cached_tokens=64, completion_tokens=23))
    series.finished(replace(REQUEST, prompt_tokens=31, cached_tokens=0, completion_tokens=17))
    assert series.prefill_rate(clock()) == pytest.approx((37 + 31) / (2 * 0.051))
    assert series.decode_rate(clock()) == pytest.approx((23 + 17) / (2 * 0.1))
    series.finished(replace(REQUEST, capture=Capture.lost_events, completion_tokens=997))
    series.finished(replace(REQUEST, streamed=False, completion_tokens=997))
    assert series.decode_rate(clock()) == pytest.approx((23 + 17) / (2 * 0.1))
    clock.now_ns += WINDOW_NS
    assert (series.prefill_rate(clock()), series.decode_rate(clock())) == (None, None)


# --- bounded labels ------------------------------------------------------------------------------------------------


def test_100_000_model_names_stay_bounded(slis: Slis) -> None:
    for number in range(100_000):
        slis.series("roleplay", f"model-{number}", "chat_completions", (), admit=True)
    labels = [series.labels[1] for series in slis.all_series()]
    assert sorted(labels) == sorted([OTHER, *(f"model-{number}" for number in range(64))])
    assert slis.overflows() == {"roleplay": 100_000 - 64}
    assert len(slis.rows()) == 65


def test_a_name_that_the_service_refused_takes_no_place(slis: Slis) -> None:
    assert slis.series("roleplay", "no-such", "chat_completions", (), admit=False).labels[1] == OTHER
    assert slis.overflows() == {"roleplay": 1}
    assert slis.series("roleplay", "no-such", "chat_completions", (), admit=True).labels[1] == "no-such"
    assert slis.series("roleplay", "no-such", "chat_completions", (), admit=False).labels[1] == "no-such"
    assert slis.overflows() == {"roleplay": 1}


def test_each_service_has_its_own_places(clock: Clock) -> None:
    slis = Slis(models_per_service=1, clock=clock)
    found = [slis.series(name, model, "completions", (), True).labels[:2] for name in "ab" for model in ("x", "y")]
    assert found == [("a", "x"), ("a", OTHER), ("b", "x"), ("b", OTHER)]


@pytest.mark.parametrize("model", [None, ""])
def test_no_name_is_unknown_and_no_overflow(slis: Slis, model: str | None) -> None:
    assert slis.series("roleplay", model, "completions", (), admit=True).labels[1] == UNKNOWN
    assert slis.overflows() == {"roleplay": 0}


def test_hostile_names_become_safe_labels(clock: Clock) -> None:
    slis = Slis(("release",), clock=clock)
    series = slis.series("role\nplay", "\ud800\x1b[2J" + "a" * 9001, "completions", ("\ud800",), admit=True)
    assert "".join(series.labels).isprintable()
    assert max(map(len, series.labels)) == 256
    assert slis.captures().keys() == {"role\ufffdplay"}


def test_the_same_request_finds_the_same_series(slis: Slis, series: Series) -> None:
    assert slis.series("roleplay", "bard", "chat_completions", (), admit=False) is series
    assert slis.series("roleplay", "bard", "completions", (), admit=True) is not series


# --- rows ----------------------------------------------------------------------------------------------------------


def test_a_row_tells_the_window(slis: Slis, series: Series, clock: Clock) -> None:
    slis.in_flight = lambda: [("roleplay", "bard", "chat_completions", ()), ("roleplay", "new", "completions", ())]
    play(series, replace(REQUEST, prompt_tokens=64, cached_tokens=48, completion_tokens=22))
    series.finished(replace(REQUEST, frames=0, failure=Failure.client_error, capture=Capture.lost_events))
    series.finished(replace(REQUEST, frames=0, aborted=Phase.waiting))
    clock.now_ns += 11_000 * MS
    new, row = slis.rows()
    assert (row.service, row.model, row.api) == ("roleplay", "bard", "chat_completions")
    assert row.requests_per_second == pytest.approx(3 / 11)
    assert row.tokens_per_second == pytest.approx(22 / 11)
    assert (row.ttft_p50, row.ttft_p90, row.ttft_p99) == pytest.approx((0.053,) * 3, rel=0.01)
    assert (row.itl_p50, row.itl_p90, row.itl_p99) == pytest.approx((0.010,) * 3, rel=0.01)
    assert (row.cache_hit_ratio, row.failures, row.aborts, row.coverage) == (0.75, 1, 1, 2 / 3)
    assert (row.in_flight, new.in_flight, new.model) == (1, 1, OTHER)
    assert (new.ttft_p50, new.itl_p99, new.coverage, new.requests_per_second) == (None, None, None, 0)


def test_tokens_show_while_a_response_streams(slis: Slis, series: Series, clock: Clock) -> None:
    for _ in range(29):
        series.frame()
    clock.now_ns += 1_000 * MS
    (row,) = slis.rows()
    assert row.tokens_per_second == 29


def test_rows_forget_what_left_the_window(slis: Slis, series: Series, clock: Clock) -> None:
    play(series, REQUEST)
    slis.flush(clock())
    clock.now_ns += WINDOW_NS
    (row,) = slis.rows()
    assert (row.requests_per_second, row.tokens_per_second, row.ttft_p50, row.coverage) == (0, 0, None, None)


def test_a_row_takes_the_configured_labels_together(clock: Clock) -> None:
    slis = Slis(("release",), clock=clock)
    for release, times in (("stable", 3), ("canary", 1)):
        for _ in range(times):
            slis.series("roleplay", "bard", "completions", (release,), True).first_token(
                (10 if release == "stable" else 70) * MS, clock()
            )
    (row,) = slis.rows()
    assert (row.ttft_p50, row.ttft_p99) == pytest.approx((0.010, 0.070), rel=0.01)


# ---- other bounds ----


def test_new_bounds_divide_what_comes_and_leave_what_was_counted_above_them() -> None:
    slis = Slis(clock=lambda: 10**12)
    series = slis.series("stage", "alto", "chat_completions", (), True)
    for ms in (10, 70, 90):
        series.first_token(ms * 10**6, 10**12)
    slis.add_bounds({"ttft": [0.077, 0.1]})
    assert 0.077 in slis.bounds[Sli.TTFT]
    histogram = series.histograms[Sli.TTFT]
    assert histogram.within(0.077) == (1, 3)  # 70 ms is below it, but that was not written down
    assert histogram.within(0.08) == (2, 3)
    assert histogram.within(0.1) == (3, 3)
    series.first_token(70 * 10**6, 10**12)
    assert histogram.within(0.077) == (2, 4)
    assert histogram.sum_ns == 240 * 10**6
    slis.add_bounds({"ttft": [0.077]})
    assert histogram.within(0.077) == (2, 4)
    other = slis.series("stage", "basso", "chat_completions", (), True)
    other.first_token(70 * 10**6, 10**12)
    assert other.histograms[Sli.TTFT].within(0.077) == (1, 1)
