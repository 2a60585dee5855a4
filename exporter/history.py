"""The last half hour of each model, in steps of 12 s, for the live page: how its latencies and its load went.

A step is a slot of the SLIs' windows (`exporter.quantiles`), kept in a coarser form when it is over. Every number is
what the step itself saw, not what the five minutes before it did.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from exporter.quantiles import SLOT_NS, answers, coarse
from exporter.slis import Series, Sli, Slis

STEP_S: Final = SLOT_NS // 10**9
STEPS: Final = 150
MOST_MODELS: Final = 64
"""Models that are kept at the most: 16 kB each."""
HEAT_BOUNDS: Final = tuple(round(0.001 * 2 ** (power / 2), 6) for power in range(32))
"""Upper bounds of the heat map's rows, in seconds: two for each doubling from 1 ms on, and one row beyond them."""

_QUANTILES: Final = (0.5, 0.99)
_LATENCIES: Final = (Sli.TTFT, Sli.ITL)
_DTYPE: Final = np.dtype(
    [
        ("slot", np.int64),
        *((f"{sli.value}_p{quantile * 100:g}", np.float32) for sli in _LATENCIES for quantile in _QUANTILES),
        ("requests", np.uint32),
        ("frames", np.uint32),
        ("heat", np.uint16, (len(HEAT_BOUNDS) + 1,)),
    ]
)
COLUMNS: Final = tuple(name for name in _DTYPE.names or () if name not in {"slot", "heat"})

Key = tuple[str, ...]  # service, model, api


@dataclass(slots=True)
class _Model:
    """One ring of steps; a step stands at its slot number modulo `STEPS`."""

    steps: npt.NDArray[np.void]
    last_slot: int  # the last one in which a request ended or a frame passed


@dataclass(frozen=True, slots=True)
class Past:
    """The steps of one model in the order of `History.slots`, and which of them it has."""

    rows: npt.NDArray[np.void]
    seen: npt.NDArray[np.bool_]

    def column(self, name: str) -> list[float | None]:
        """One of `COLUMNS`: seconds, or a number; None for a step in which nothing was seen."""
        # To the microsecond: the digits of a float32 as a float are 1.2 MB of JSON for 64 models instead of 1.0.
        values = self.rows[name].astype(np.float64).round(6)
        found = values.astype(object)
        found[~self.seen | np.isnan(values)] = None
        told: list[float | None] = found.tolist()
        return told

    def heat(self) -> list[list[int]]:
        """First tokens by `HEAT_BOUNDS`; an empty list for a step without one."""
        heat = self.rows["heat"]
        some = self.seen & heat.any(axis=1)
        return [row if any_ else [] for row, any_ in zip(heat.tolist(), some.tolist(), strict=True)]


class History:
    """Keeps what each step was; `tick` is called several times a second, with the SLIs' clock."""

    def __init__(self, slis: Slis) -> None:
        self._slis: Final = slis
        self._models: dict[Key, _Model] = {}
        self._totals: dict[Key, tuple[int, int]] = {}  # requests and frames until the last step
        self._slot: int | None = None

    def tick(self, now_ns: int) -> None:
        """Take down the step that is over, where one is."""
        slot = now_ns // SLOT_NS
        if slot == self._slot:
            return
        closed, self._slot = self._slot, slot
        if closed is None:
            return
        together: dict[Key, list[Series]] = {}
        for series in self._slis.all_series():
            together.setdefault(series.labels[:3], []).append(series)
        for key, members in together.items():
            self._take_down(key, members, closed, now_ns)

    def models(self) -> Sequence[Key]:
        """The models that have a history: service, model and API of each."""
        return sorted(self._models)

    def slots(self, now_ns: int) -> range:
        """The numbers of the steps that the half hour before that instant had. A step ends `STEP_S` after it begins."""
        last = now_ns // SLOT_NS
        return range(last - STEPS, last)

    def past(self, key: Key, now_ns: int) -> Past:
        """What is known of a model over `slots(now_ns)`."""
        model = self._models.get(key)
        if model is None:
            return Past(np.zeros(STEPS, _DTYPE), np.zeros(STEPS, np.bool_))
        slots = np.array(self.slots(now_ns))
        rows = model.steps[slots % STEPS]
        return Past(rows, rows["slot"] == slots)

    def _take_down(self, key: Key, members: Sequence[Series], slot: int, now_ns: int) -> None:
        before = self._totals.get(key, (0, 0))
        now = self._totals[key] = sum(each.requests for each in members), sum(each.frames for each in members)
        model = self._models.get(key)
        if model is None:
            if now == before:
                return
            if len(self._models) >= MOST_MODELS and not self._forget_one(slot):
                return
            model = self._models[key] = _Model(np.zeros(STEPS, _DTYPE), slot)
            model.steps["slot"] = -1
        if now != before:
            model.last_slot = slot
        row = model.steps[slot % STEPS]
        row["slot"] = slot
        row["requests"], row["frames"] = now[0] - before[0], now[1] - before[1]
        row["heat"] = 0
        for sli in _LATENCIES:
            counts = _together(members, sli, slot, now_ns)
            told = (np.nan,) * len(_QUANTILES) if counts is None else answers(counts, _QUANTILES)
            for quantile, value in zip(_QUANTILES, told, strict=True):
                row[f"{sli.value}_p{quantile * 100:g}"] = value
            if sli is Sli.TTFT and counts is not None:
                row["heat"] = np.minimum(coarse(counts, HEAT_BOUNDS), np.iinfo(np.uint16).max)

    def _forget_one(self, slot: int) -> bool:
        """Let go of the model that was idle longest, where one was for the whole half hour."""
        key, model = min(self._models.items(), key=lambda item: item[1].last_slot)
        if model.last_slot > slot - STEPS:
            return False
        del self._models[key]
        return True


def _together(members: Sequence[Series], sli: Sli, slot: int, now_ns: int) -> npt.NDArray[np.uint32] | None:
    found = [
        counts
        for each in members
        if sli in each.sketches and (counts := each.sketches[sli].slot_counts(slot, now_ns)) is not None
    ]
    return sum(found[1:], start=found[0]) if found else None
