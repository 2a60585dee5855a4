"""An objective as recording and alerting rules need it, wherever it was written down."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from enum import Enum
from typing import Final

from exporter.slo.declared import slo_id

WINDOW: Final = "{{.window}}"
"""Stands in a query for its window, such as `5m`; the way Sloth writes it."""


class Measure(Enum):
    """What the queries for bad events and for all of them give. The value is the end of the recorded names."""

    EVENTS = "increase"  # how many there were in the window
    UNITLESS = "rate"  # something in proportion to that: a file of Sloth's may count as it likes


@dataclass(frozen=True, slots=True)
class Events:
    """Queries with `WINDOW`, for bad events and for all of them. Both give the same labels."""

    error: str
    total: str
    measure: Measure


@dataclass(frozen=True, slots=True)
class Ratio:
    """A query with `WINDOW` for the share of bad events, where they cannot be had apart."""

    error_ratio: str


@dataclass(frozen=True, slots=True)
class AlertStyle:
    """What one severity's alert carries on top; `wanted` says whether there is one."""

    wanted: bool = True
    labels: Mapping[str, str] = field(default_factory=dict)
    annotations: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Objective:
    """What is written into rules.

    `service` and `name` make its id. `target` is the share of good events; `window_s` its period in seconds. `absent`
    is a query that gives something while nobody can tell how the objective stands. `labels` come on all that is
    recorded. `spec` says in which form the objective was written. `phases` are those of a request (the label of
    llm_latency_cause_seconds_total) in which an alert looks for the largest cause. `each` is a label of what the
    queries give: the objective is one of each of its values, for itself. Empty, there is only one.
    """

    service: str
    name: str
    target: Decimal
    window_s: int
    sli: Events | Ratio
    absent: str
    sentence: str
    spec: str
    alert_name: str
    labels: Mapping[str, str] = field(default_factory=dict)
    page: AlertStyle = AlertStyle()
    ticket: AlertStyle = AlertStyle()
    phases: tuple[str, ...] = ()
    each: str = ""

    @property
    def id(self) -> str:
        """The value of `sloth_id`; what is recorded for `each` has its value after a colon."""
        return slo_id(self.service, self.name)

    @property
    def budget(self) -> Decimal:
        """The share of events that may be bad."""
        return 1 - self.target


def quoted(text: str) -> str:
    """A string of PromQL."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'


def selector(labels: Mapping[str, str]) -> str:
    """Label matchers for exactly these values."""
    return ", ".join(f"{name}={quoted(value)}" for name, value in labels.items())


def one_of(label: str, values: Sequence[str]) -> str:
    """A label matcher for any of these values, which have nothing in them that a regular expression would read."""
    return f"{label}={quoted(values[0])}" if len(values) == 1 else f"{label}=~{quoted('|'.join(values))}"
