"""Decides from a stream of good and bad events that an objective's budget burns fast: at once, and seldom wrongly.

A share over a window of time cannot be fast: at 14.4 times a budget of 1%, it takes a window of a minute 8.6 s to fill,
even where every event is bad. So the beginning is found by a cumulative sum (Page, Biometrika 41, 1954): each event
adds the logarithm of how much likelier it is where the budget burns than where the objective just holds. The end is a
matter of time: a minute in which there was no such proof. It is not looked for in the share of the minute's events, of
which most may have been good ones before it began.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import Final

LIMIT: Final = math.log(2000)
"""The sum that counts as proof. Where the objective just holds, false alarms are at least 2,000 events apart."""
WINDOW_S: Final = 60
_SECOND_NS: Final = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Weights:
    """What a good and a bad event add."""

    good: float
    bad: float

    @classmethod
    def of(cls, budget: float, factor: float) -> Weights:
        """Those for a budget (a share of events) that burns `factor` times as fast as it may; budget * factor < 1."""
        share = budget * factor
        return cls(math.log((1 - share) / (1 - budget)), math.log(factor))

    @property
    def fewest_bad(self) -> int:
        """How many bad events in a row are proof."""
        return math.ceil(LIMIT / self.bad)


class FastBurn:
    """One objective of one service and model. `is_burning` is what the last call of `take` found."""

    __slots__ = ("_proved_ns", "_score", "_seconds", "_weights", "bad", "events", "is_burning")

    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        self._score = 0.0
        self._proved_ns = 0
        self._seconds: deque[tuple[int, int, int]] = deque()  # second, bad events, all
        self.bad = 0  # in the last minute, as is `events`
        self.events = 0
        self.is_burning = False

    def take(self, bad: int, events: int, lasting: int, now_ns: int) -> bool:
        """Take the events since the last call. `lasting` are bad ones of any age that are not over yet."""
        weights = self._weights
        self._forget(now_ns // _SECOND_NS)
        if not self.events:
            self._score = 0.0  # what is a minute apart is no row
        if events:
            self._count(bad, events, now_ns // _SECOND_NS)
            # No more than the proof: what lasts must not take as long to forget.
            self._score = min(LIMIT, max(0.0, self._score + bad * weights.bad + (events - bad) * weights.good))
        if (bad and self._score >= LIMIT) or (self.is_burning and lasting >= weights.fewest_bad):
            self.is_burning = True
            self._proved_ns = now_ns
        elif now_ns - self._proved_ns >= WINDOW_S * _SECOND_NS:
            self.is_burning = False
        return self.is_burning

    def _count(self, bad: int, events: int, second: int) -> None:
        self.bad += bad
        self.events += events
        seconds = self._seconds
        if seconds and seconds[-1][0] == second:
            _, bad_before, before = seconds.pop()
            bad, events = bad + bad_before, events + before
        seconds.append((second, bad, events))

    def _forget(self, second: int) -> None:
        seconds = self._seconds
        while seconds and seconds[0][0] <= second - WINDOW_S:
            _, bad, events = seconds.popleft()
            self.bad -= bad
            self.events -= events
