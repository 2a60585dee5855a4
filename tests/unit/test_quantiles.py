"""Sketches and sums over the window, against exact answers."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from exporter.quantiles import BINS, SLOT_NS, SLOTS, WINDOW_NS, WindowSketch, WindowSums, quantiles_of

WANTED = (0.0, 0.01, 0.5, 0.55, 0.9, 0.99, 1.0)
START_NS = 1_000_003 * SLOT_NS
# 1 us to 10,000 s
VALUES = st.lists(st.integers(1_000, 10_000 * 10**9), min_size=1, max_size=211)


def exact(values: list[int]) -> list[float]:
    return [float(value) / 1e9 for value in np.quantile(values, WANTED, method="inverted_cdf")]


@given(VALUES)
def test_every_quantile_is_within_one_percent(values: list[int]) -> None:
    one_by_one, at_once = WindowSketch(), WindowSketch()
    for value in values:
        one_by_one.add(value, START_NS)
    at_once.add_many(np.array(values), START_NS)
    expected = pytest.approx(exact(values), rel=0.01, abs=0)
    assert one_by_one.quantiles(WANTED, START_NS) == expected
    assert at_once.quantiles(WANTED, START_NS) == expected


@given(VALUES, VALUES)
def test_two_sketches_together_answer_for_the_values_of_both(left: list[int], right: list[int]) -> None:
    sketches = (WindowSketch(), WindowSketch(), WindowSketch())
    sketches[0].add_many(np.array(left), START_NS)
    sketches[1].add_many(np.array(right), START_NS)
    assert quantiles_of(sketches, WANTED, START_NS) == pytest.approx(exact(left + right), rel=0.01, abs=0)


def test_the_whole_range_is_within_one_percent() -> None:
    worst = 0.0
    for value in np.geomspace(1_000, 10_000 * 10**9, 997).astype(np.int64).tolist():
        sketch = WindowSketch()
        sketch.add(value, START_NS)
        (answer,) = sketch.quantiles((0.5,), START_NS) or (0.0,)
        worst = max(worst, abs(answer * 1e9 - value) / value)
    assert 0.005 < worst <= 0.01


def test_nothing_counted_is_none() -> None:
    assert WindowSketch().quantiles((0.5,), START_NS) is None


def test_values_beyond_the_range_answer_its_ends() -> None:
    sketch = WindowSketch()
    sketch.add(0, START_NS)
    sketch.add(1, START_NS)
    sketch.add(10**18, START_NS)
    least, greatest = sketch.quantiles((0.5, 1.0), START_NS) or (0.0, 0.0)
    assert least == 1e-6
    assert greatest == pytest.approx(10_000, rel=0.02)


@pytest.mark.parametrize("values", [1, 7, 211, 70_001])
def test_a_value_stays_for_the_window_and_then_leaves(values: int) -> None:
    sketch = WindowSketch()
    sketch.add_many(np.full(values, 10**9), START_NS)
    last_ns = START_NS + WINDOW_NS - 1
    sketch.add(10**6, last_ns)
    assert sketch.size == values + 1
    sketch.advance(last_ns + 1)
    assert sketch.size == 1
    assert sketch.quantiles((1.0,), last_ns + 1) == pytest.approx((0.001,), rel=0.01)
    sketch.advance(last_ns + WINDOW_NS)
    assert sketch.quantiles((1.0,), last_ns + WINDOW_NS) is None
    assert not sketch.counts(last_ns + WINDOW_NS).any()


@given(st.lists(st.tuples(st.integers(0, 3 * SLOTS), st.lists(st.integers(1_000, 10**13), max_size=11)), max_size=41))
def test_the_window_holds_exactly_what_is_young_enough(steps: list[tuple[int, list[int]]]) -> None:
    sketch, sums = WindowSketch(), WindowSums(2)
    now_ns, counted = START_NS, []
    for slots, values in steps:
        now_ns += slots * SLOT_NS // 3
        if values:
            sketch.add_many(np.array(values), now_ns)
        for value in values:
            sums.add(1, value, now_ns)
            counted.append((now_ns // SLOT_NS, value))
    young = [value for slot, value in counted if slot > now_ns // SLOT_NS - SLOTS]
    sketch.advance(now_ns)
    assert sketch.size == len(young)
    assert int(sketch.counts(now_ns).sum()) == len(young)
    assert list(sums.totals(now_ns)) == [0, sum(young)]


def test_an_event_that_is_read_late_counts_as_now() -> None:
    sketch, sums = WindowSketch(), WindowSums(1)
    for now_ns in (START_NS, START_NS - 7 * SLOT_NS):
        sketch.add(10**9, now_ns)
        sums.add(0, 3, now_ns)
    assert sketch.size == 2
    assert list(sums.totals(START_NS)) == [6]


def test_closed_slots_of_every_width_give_back_what_they_took() -> None:
    rng = np.random.default_rng(7)
    sketch = WindowSketch()
    dense = (np.geomspace(1_100, 9_000 * 10**9, 4_001)).astype(np.int64)
    narrow = rng.lognormal(17, 0.1, 101).astype(np.int64)
    for slot, values in enumerate((dense, np.tile(dense, 101), np.repeat(dense[:1], 70_001), narrow)):
        sketch.add_many(values, START_NS + slot * SLOT_NS)
    sketch.advance(START_NS + (SLOTS + 2) * SLOT_NS)
    assert sketch.size == narrow.size
    assert sketch.quantiles((0.5,), START_NS + (SLOTS + 2) * SLOT_NS) == pytest.approx(
        (float(np.quantile(narrow, 0.5, method="inverted_cdf")) / 1e9,), rel=0.01
    )


def test_64_models_with_four_quantile_slis_stay_within_20_mb() -> None:
    import tracemalloc

    # The worst short of 65,536 values in one bin in 12 s: every bin is hit, and more than 255 times.
    everything = np.repeat(np.geomspace(1_001, 9_999 * 10**9, 2 * BINS).astype(np.int64), 257)
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    sketch = WindowSketch()
    for slot in range(SLOTS + 1):
        sketch.add_many(everything, START_NS + slot * SLOT_NS)
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (after - before) * 64 * 4 < 20e6
