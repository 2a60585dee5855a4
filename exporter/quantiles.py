"""Quantiles and sums over the last five minutes, in bounded memory.

The window is made of 25 slots of 12 s, the one under way included: it covers the last 288 to 300 s.

A quantile comes from logarithmic bins (Masson, Rim, Lee: DDSketch, VLDB 2019). Bin i holds values in (g^(i-1), g^i]
microseconds and answers 2 g^i / (g + 1). With g = (1 + a) / (1 - a) that is off by at most a of the value, for every
value between 1 us and 10,000 s. What is below answers 1 us, what is above answers the last bin.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

SLOT_NS = 12_000_000_000
SLOTS = 25
WINDOW_NS = SLOT_NS * SLOTS

# A hair under 1 %, so that rounding of the logarithms cannot carry an answer past it.
RELATIVE_ERROR = 0.00999
_GAMMA = (1 + RELATIVE_ERROR) / (1 - RELATIVE_ERROR)
_PER_LOG = 1 / math.log(_GAMMA)
_LEAST_NS = 1_000
_GREATEST_NS = 10_000 * 1_000_000_000
BINS = math.ceil(math.log(_GREATEST_NS / _LEAST_NS) * _PER_LOG) + 1

Counts = npt.NDArray[np.uint32]

# Seconds that each bin answers.
_ANSWERS = 2 * np.power(_GAMMA, np.arange(BINS)) / (_GAMMA + 1) * (_LEAST_NS / 1e9)
_ANSWERS[0] = _LEAST_NS / 1e9


def _bin_of(value_ns: int) -> int:
    if value_ns <= _LEAST_NS:
        return 0
    return min(math.ceil(math.log(value_ns / _LEAST_NS) * _PER_LOG), BINS - 1)


def _bins_of(values_ns: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    bins = np.ceil(np.log(np.maximum(values_ns, _LEAST_NS) / _LEAST_NS) * _PER_LOG)
    return np.minimum(bins, BINS - 1).astype(np.int64)


class _ClosedSlot:
    """The counts of a slot that is over, in whichever form is smaller: which bins and how often, or all of them."""

    __slots__ = ("_bins", "_counts", "slot")

    def __init__(self, slot: int, counts: Counts) -> None:
        self.slot = slot
        bins = np.flatnonzero(counts)
        # The narrowest type, because 256 sketches keep 24 closed slots each: 20 MB would not hold them at full width.
        narrow = np.min_scalar_type(int(counts.max()))
        if bins.size * (2 + narrow.itemsize) < counts.size * narrow.itemsize:
            self._bins: npt.NDArray[np.uint16] | None = bins.astype(np.uint16)
            self._counts = counts[bins].astype(narrow)
        else:
            self._bins = None
            self._counts = counts.astype(narrow)

    def counts(self) -> Counts:
        """How often each bin was hit."""
        counts: Counts = np.zeros(BINS, np.uint32)
        if self._bins is None:
            counts[:] = self._counts
        else:
            counts[self._bins] = self._counts
        return counts

    def take_from(self, total: Counts) -> None:
        if self._bins is None:
            total -= self._counts
        else:
            total[self._bins] -= self._counts


class WindowSketch:
    """How values were distributed over the last five minutes. `now_ns` is any clock that does not go back."""

    __slots__ = ("_closed", "_current", "_current_size", "_slot", "_total", "size")

    def __init__(self) -> None:
        self._total: Counts = np.zeros(BINS, np.uint32)
        self._current: Counts = np.zeros(BINS, np.uint32)
        self._current_size = 0
        self._closed: deque[tuple[_ClosedSlot, int]] = deque()
        self._slot = 0
        self.size = 0  # values in the window as of the last call

    def advance(self, now_ns: int) -> None:
        """Close the slot under way when its time is over, and let go of those that left the window."""
        slot = now_ns // SLOT_NS
        if slot <= self._slot:
            return  # an event that was read late counts as now
        if self._current_size:
            self._closed.append((_ClosedSlot(self._slot, self._current), self._current_size))
            self._current[:] = 0
            self._current_size = 0
        self._slot = slot
        while self._closed and self._closed[0][0].slot <= slot - SLOTS:
            closed, size = self._closed.popleft()
            closed.take_from(self._total)
            self.size -= size

    def add(self, value_ns: int, now_ns: int) -> None:
        """Count one value in nanoseconds."""
        self.advance(now_ns)
        where = _bin_of(value_ns)
        self._current[where] += 1
        self._total[where] += 1
        self._current_size += 1
        self.size += 1

    def add_many(self, values_ns: npt.NDArray[np.int64], now_ns: int) -> None:
        """Count an array of values in nanoseconds."""
        self.advance(now_ns)
        counts = np.bincount(_bins_of(values_ns), minlength=BINS).astype(np.uint32)
        self._current += counts
        self._total += counts
        self._current_size += values_ns.size
        self.size += values_ns.size

    def quantiles(self, wanted: Sequence[float], now_ns: int) -> tuple[float, ...] | None:
        """The wanted quantiles in seconds; None when nothing was counted in the window."""
        return quantiles_of((self,), wanted, now_ns)

    def counts(self, now_ns: int) -> Counts:
        """How often each bin was hit in the window. A view: it changes with the next call."""
        self.advance(now_ns)
        return self._total

    def slot_counts(self, slot: int, now_ns: int) -> Counts | None:
        """How often each bin was hit in the slot of that number, which is over; None where none was."""
        self.advance(now_ns)
        return next((closed.counts() for closed, _ in reversed(self._closed) if closed.slot == slot), None)


def answers(counts: Counts, wanted: Sequence[float]) -> tuple[float, ...]:
    """The wanted quantiles in seconds of values of which so many hit each bin; at least one did.

    Quantile q of n values is the least value that at least q of them do not exceed (nearest rank), so that 0.99 of ten
    values is the greatest.
    """
    cumulative = np.cumsum(counts, dtype=np.uint64)
    size = int(cumulative[-1])
    # Without the small step back 0.55 of 100 values would be rank 56: 0.55 * 100 is 55.00000000000001.
    ranks = [max(1, math.ceil(quantile * size - 1e-6)) for quantile in wanted]
    return tuple(_ANSWERS[np.searchsorted(cumulative, ranks)].tolist())


def coarse(counts: Counts, bounds: Sequence[float]) -> list[int]:
    """The same values by upper bounds in seconds, the last one for what is beyond them: right within 1 % of a bound."""
    where = np.searchsorted(np.asarray(bounds), _ANSWERS)
    return [round(count) for count in np.bincount(where, weights=counts, minlength=len(bounds) + 1)]


def quantiles_of(sketches: Iterable[WindowSketch], wanted: Sequence[float], now_ns: int) -> tuple[float, ...] | None:
    """The quantiles of several sketches taken together, in seconds; None when all of them are empty. See `answers`."""
    filled = [counts for sketch in sketches for counts in (sketch.counts(now_ns),) if sketch.size]
    if not filled:
        return None
    return answers(filled[0] if len(filled) == 1 else np.sum(filled, axis=0, dtype=np.uint64), wanted)


class WindowSums:
    """Several sums of integers over the last five minutes, told apart by their position."""

    __slots__ = ("_closed", "_current", "_slot", "_totals")

    def __init__(self, size: int) -> None:
        self._totals = [0] * size
        self._current = [0] * size
        self._closed: deque[tuple[int, list[int]]] = deque()
        self._slot = 0

    def _advance(self, now_ns: int) -> None:
        slot = now_ns // SLOT_NS
        if slot <= self._slot:
            return
        if any(self._current):
            self._closed.append((self._slot, self._current))
            self._current = [0] * len(self._totals)
        self._slot = slot
        while self._closed and self._closed[0][0] <= slot - SLOTS:
            _, old = self._closed.popleft()
            self._totals = [total - gone for total, gone in zip(self._totals, old, strict=True)]

    def add(self, position: int, amount: int, now_ns: int) -> None:
        """Add `amount` to one of the sums."""
        self._advance(now_ns)
        self._current[position] += amount
        self._totals[position] += amount

    def totals(self, now_ns: int) -> Sequence[int]:
        """The sums over the window, by position. A view: it changes with the next call."""
        self._advance(now_ns)
        return self._totals
