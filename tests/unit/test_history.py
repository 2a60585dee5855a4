"""The history of the live page: what each step of 12 s saw, and nothing of its neighbours."""

from __future__ import annotations

import numpy as np
import pytest

from exporter.history import COLUMNS, HEAT_BOUNDS, MOST_MODELS, STEPS, History
from exporter.quantiles import RELATIVE_ERROR, SLOT_NS, WindowSketch, answers, coarse
from exporter.slis import Series, Slis

MS = 1_000_000
KEY = ("stage", "alto", "chat_completions")


class Told:
    """SLIs with a clock of their own and the history beside them."""

    def __init__(self) -> None:
        self.now_ns = 1000 * SLOT_NS
        self.slis = Slis(clock=lambda: self.now_ns)
        self.history = History(self.slis)
        self.history.tick(self.now_ns)

    def series(self, model: str = "alto", release: tuple[str, ...] = ()) -> Series:
        return self.slis.series("stage", model, "chat_completions", release, True)

    def first_tokens(self, *times_ms: int) -> None:
        for ms in times_ms:
            self.series().first_token(ms * MS, self.now_ns)
            self.series().frame()

    def step(self, count: int = 1) -> None:
        for _ in range(count):
            self.now_ns += SLOT_NS
            self.slis.tick(self.now_ns)
            self.history.tick(self.now_ns)

    def column(self, name: str) -> list[float | None]:
        return self.history.past(KEY, self.now_ns).column(name)


def test_a_step_tells_what_it_saw_itself() -> None:
    told = Told()
    told.first_tokens(*[100] * 23)
    told.step()
    told.first_tokens(*[700] * 29)
    assert told.column("ttft_p50")[-1] == pytest.approx(0.1, rel=RELATIVE_ERROR)  # the one under way is not shown yet
    told.step()
    assert told.column("ttft_p50")[-2:] == pytest.approx([0.1, 0.7], rel=RELATIVE_ERROR)
    assert told.column("frames")[-2:] == [23, 29]
    assert told.column("ttft_p50")[:-2] == [None] * (STEPS - 2)
    assert told.column("itl_p50") == [None] * STEPS


def test_an_idle_step_has_no_latency_and_no_frames() -> None:
    told = Told()
    told.first_tokens(100)
    told.step(3)
    assert told.column("ttft_p99")[-2:] == [None, None]
    assert told.column("frames")[-2:] == [0, 0]
    assert told.history.past(KEY, told.now_ns).heat()[-2:] == [[], []]


def test_the_heat_has_every_first_token_in_its_row() -> None:
    told = Told()
    told.first_tokens(1, 40, 40, 40, 300, 5_000_000)
    told.step()
    heat = told.history.past(KEY, told.now_ns).heat()[-1]
    assert sum(heat) == 6
    assert heat[-1] == 1  # beyond every bound
    for ms, count in ((40, 3), (300, 1)):
        row = next(number for number, bound in enumerate(HEAT_BOUNDS) if bound >= ms / 1e3)
        assert heat[row] == count


def test_what_is_half_an_hour_old_is_gone() -> None:
    told = Told()
    told.first_tokens(100)
    told.step(STEPS)
    assert told.column("frames")[0] == 1
    told.step()
    assert set(told.column("frames")) == {0}


def test_an_agent_that_stood_still_has_a_hole_there() -> None:
    told = Told()
    told.first_tokens(100)
    told.step()
    told.now_ns += 7 * SLOT_NS
    told.history.tick(told.now_ns)
    assert told.column("frames")[-8:] == [1, 0, *[None] * 6]
    assert [len(each) for each in told.history.past(KEY, told.now_ns).heat()[-8:]] == [len(HEAT_BOUNDS) + 1, *[0] * 7]


def test_series_of_one_model_are_taken_together() -> None:
    told = Told()
    told.slis = Slis(("release",), clock=lambda: told.now_ns)
    told.history = History(told.slis)
    told.history.tick(told.now_ns)
    for release, ms in (("stable", 100), ("canary", 900)):
        told.series(release=(release,)).first_token(ms * MS, told.now_ns)
        told.series(release=(release,)).frame()
    told.step()
    assert told.history.models() == [KEY]
    assert told.column("ttft_p50")[-1] == pytest.approx(0.1, rel=RELATIVE_ERROR)
    assert told.column("ttft_p99")[-1] == pytest.approx(0.9, rel=RELATIVE_ERROR)


def test_models_are_bounded_and_those_long_idle_make_room() -> None:
    told = Told()
    for number in range(MOST_MODELS + 2):
        told.slis.series(f"stage-{number}", "alto", "chat_completions", (), True).frame()
    told.step()
    assert len(told.history.models()) == MOST_MODELS
    told.step(STEPS)
    late = (f"stage-{MOST_MODELS + 1}", "alto", "chat_completions")
    told.slis.series(late[0], late[1], late[2], (), True).frame()
    told.step()
    assert late in told.history.models()
    assert len(told.history.models()) == MOST_MODELS
    assert told.history.past(late, told.now_ns).column("frames")[-1] == 1  # not the one of long ago


def test_latencies_are_told_in_whole_microseconds() -> None:
    told = Told()
    told.first_tokens(*range(1, 3000, 7))
    told.step()
    for name in ("ttft_p50", "ttft_p99"):
        value = told.column(name)[-1]
        assert value is not None
        assert value == round(value, 6)  # float32 as it is would be a dozen digits more in the page's JSON


def test_an_unknown_model_has_no_history() -> None:
    told = Told()
    past = told.history.past(("no", "such", "model"), told.now_ns)
    for name in COLUMNS:
        assert past.column(name) == [None] * STEPS
    assert past.heat() == [[]] * STEPS


def test_the_slot_that_was_asked_for_is_the_one_given() -> None:
    sketch = WindowSketch()
    sketch.add_many(np.array([10 * MS] * 5), 7 * SLOT_NS)
    sketch.add(20 * MS, 8 * SLOT_NS)
    counts = sketch.slot_counts(7, 9 * SLOT_NS)
    assert counts is not None
    assert answers(counts, (0.5,)) == pytest.approx((0.01,), rel=RELATIVE_ERROR)
    assert sum(coarse(counts, (0.005, 0.05))) == 5
    assert sketch.slot_counts(6, 9 * SLOT_NS) is None
    assert sketch.slot_counts(9, 9 * SLOT_NS) is None
