"""How a benchmark says what it found: a table or JSON lines on stdout, and which of its bars were not met."""

from __future__ import annotations

import json
import math
import os
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NoReturn

import click
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text


@dataclass(frozen=True, slots=True)
class Bar:
    """What was promised of one figure: `value` must not pass `limit`, or must reach it when `at_least`."""

    what: str
    value: float
    limit: float
    unit: str = ""
    at_least: bool = False

    @property
    def met(self) -> bool:
        """Whether it holds. What was not measured (NaN) does not."""
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def __str__(self) -> str:
        wanted = "at least" if self.at_least else "at most"
        missing = abs(self.value - self.limit)
        return (
            f"{self.what}: {self.value:.6g}{self.unit}, wanted {wanted} {self.limit:.6g}{self.unit}, "
            f"off by {missing:.3g}{self.unit}"
        )


def need_root() -> None:
    """Raise click.ClickException unless this is root."""
    if os.geteuid() != 0:
        raise click.ClickException("loading BPF programs needs root; run it with sudo")


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], notes: str = "") -> Group:
    """Return a table whose first column is text and whose others are numbers, between its title and its notes."""
    result = Table(show_edge=False)
    for index, column in enumerate(columns):
        result.add_column(column, justify="right" if index else "left")
    for row in rows:
        result.add_row(*row)
    return Group(Text(title, style="bold"), result, *([Text(notes, style="dim")] if notes else []), "")


def show(tables: Iterable[Group]) -> None:
    """Print tables for people."""
    console = Console() if sys.stdout.isatty() else Console(width=150)
    for each in tables:
        console.print(each)


def show_json(objects: Iterable[dict[str, object]]) -> None:
    """Print one JSON object a line. What was not measured is null."""
    for each in objects:
        click.echo(json.dumps({key: _plain(value) for key, value in each.items()}))


def judge(bars: Sequence[Bar]) -> NoReturn:
    """Say on stderr which bars were missed and by how much, and exit: 0 when none was, else 1."""
    missed = [bar for bar in bars if not bar.met]
    for bar in missed:
        click.echo(f"missed: {bar}", err=True)
    click.echo(f"{len(bars) - len(missed)} of {len(bars)} bars met", err=True)
    sys.exit(1 if missed else 0)


def lost_by_reason(losses: Iterable[dict[str, int]]) -> str:
    """Sums of losses for people: "0", or "17 (11 ring_full, 6 unreadable)"."""
    total: Counter[str] = Counter()
    for each in losses:
        total.update(each)
    reasons = ", ".join(f"{count} {reason}" for reason, count in total.most_common())
    return f"{total.total()} ({reasons})" if reasons else "0"


def nearest_rank(values: Sequence[float], quantile: float) -> float:
    """The least value that at least `quantile` of them do not exceed; NaN of nothing."""
    if not values:
        return math.nan
    return sorted(values)[max(1, math.ceil(quantile * len(values) - 1e-6)) - 1]


def mean(values: Sequence[float]) -> float:
    """The mean; NaN of nothing."""
    return sum(values) / len(values) if values else math.nan


def _plain(value: object) -> object:
    return None if isinstance(value, float) and not math.isfinite(value) else value
