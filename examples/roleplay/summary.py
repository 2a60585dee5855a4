"""What users felt, by their own clock: counts, and latencies per model."""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from random import Random
from typing import Final

_RESERVOIR: Final = 200_000


class Outcome(Enum):
    """How a request ended for its user."""

    COMPLETE = "complete"
    LEFT_WAITING = "left_waiting"
    LEFT_STREAMING = "left_streaming"
    REFUSED = "refused"
    FAILED = "failed"


class Sample:
    """Numbers of which a bounded part is kept: all up to 200,000, then a random choice of as many (Vitter's R).

    Count and mean are always of all.
    """

    def __init__(self) -> None:
        self.count = 0
        self._sum = 0.0
        self._kept = array("d")
        self._rng = Random(0)

    def add(self, value: float) -> None:
        """Take in one number."""
        self.count += 1
        self._sum += value
        if len(self._kept) < _RESERVOIR:
            self._kept.append(value)
        elif (place := self._rng.randrange(self.count)) < _RESERVOIR:
            self._kept[place] = value

    @property
    def mean(self) -> float | None:
        """The mean; None without numbers."""
        return self._sum / self.count if self.count else None

    def quantiles(self, levels: Sequence[float]) -> list[float | None]:
        """Return the number at each of `levels` (0 to 1), linear between neighbours; None without numbers."""
        ordered = sorted(self._kept)
        return [_at(ordered, level) for level in levels]


@dataclass(slots=True)
class ModelSummary:
    """One model's requests; those that a signal ends are not counted.

    Times are seconds: `ttft` from the wish to ask (a new connection is opened after it) to the first frame with text,
    `itl` between such frames, `duration` of complete replies.
    """

    outcomes: Counter[Outcome] = field(default_factory=Counter)
    ttft: Sample = field(default_factory=Sample)
    itl: Sample = field(default_factory=Sample)
    duration: Sample = field(default_factory=Sample)
    frames: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0

    def as_dict(self) -> dict[str, object]:
        """Return it for JSON. Tokens are by the replies' own usage: complete replies only."""
        return {
            "requests": self.outcomes.total(),
            "outcomes": {outcome.value: self.outcomes[outcome] for outcome in Outcome},
            "frames": self.frames,
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "completion_tokens": self.completion_tokens,
            "ttft_seconds": _spread(self.ttft),
            "itl_seconds": _spread(self.itl),
            "duration_seconds": _spread(self.duration),
        }


@dataclass(slots=True)
class Summary:
    """The whole run. `turned_away` are conversations that found too many users there already."""

    seed: int
    elapsed_s: float = 0.0
    conversations: int = 0
    turned_away: int = 0
    models: dict[str, ModelSummary] = field(default_factory=dict)

    @property
    def requests(self) -> int:
        """Requests of all models."""
        return sum(model.outcomes.total() for model in self.models.values())

    def as_dict(self) -> dict[str, object]:
        """Return it for JSON."""
        return {
            "seed": self.seed,
            "elapsed_seconds": round(self.elapsed_s, 3),
            "conversations": self.conversations,
            "turned_away": self.turned_away,
            "requests": self.requests,
            "models": {name: model.as_dict() for name, model in self.models.items()},
        }


def print_table(summary: Summary) -> None:
    """Print `summary` for people, on stdout."""
    # Imported here: --json does not need it.
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=f"{summary.conversations} conversations in {summary.elapsed_s:.1f} s, {summary.turned_away} turned away"
    )
    table.add_column(f"seed {summary.seed}")
    for name in summary.models:
        table.add_column(name, justify="right")
    rows = [_cells(model) for model in summary.models.values()]
    for title in rows[0] if rows else ():
        table.add_row(title, *(cells[title] for cells in rows))
    Console().print(table)


def _cells(model: ModelSummary) -> dict[str, str]:
    cells = {"requests": str(model.outcomes.total())}
    cells |= {f"  {outcome.value.replace('_', ' ')}": str(model.outcomes[outcome]) for outcome in Outcome}
    cells["frames with text"] = str(model.frames)
    cells["prompt tokens"] = str(model.prompt_tokens)
    cells["  from the cache"] = f"{model.cached_tokens / model.prompt_tokens:.0%}" if model.prompt_tokens else "-"
    for title, sample in (("TTFT", model.ttft), ("ITL", model.itl)):
        values = (sample.mean, *sample.quantiles((0.5, 0.99)))
        for kind, value in zip(("mean", "p50", "p99"), values, strict=True):
            cells[f"{title} {kind}, ms"] = "-" if value is None else f"{value * 1e3:.1f}"
    return cells


def _spread(sample: Sample) -> dict[str, float | int | None]:
    p50, p99 = sample.quantiles((0.5, 0.99))
    return {"count": sample.count, "mean": sample.mean, "p50": p50, "p99": p99}


def _at(ordered: Sequence[float], level: float) -> float | None:
    if not ordered:
        return None
    place = level * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)
