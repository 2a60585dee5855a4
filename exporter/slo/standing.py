"""How an agent's objectives stand, read from its /metrics, and as a table for people."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, TextIO

from prometheus_client.parser import text_string_to_metric_families

from exporter.labels import safe
from exporter.slo.rules import PAGE
from exporter.slo.words import percent
from probes.errors import FootlightError

WINDOWS: Final = ("5m", "30m", "1h", "2h", "6h")
Key = tuple[str, ...]  # service_name and model_name; empty for the objective as such


@dataclass(slots=True)
class Told:
    """What an agent tells of one objective, for one service and model; None is what it does not tell.

    `service` and `model` are None where it tells of the objective only. `covered_s` is how much of the objective's
    window it has seen, in seconds.
    """

    slo: str
    sli: str
    objective: str
    window: str
    target: float | None = None
    covered_s: float | None = None
    service: str | None = None
    model: str | None = None
    events: float | None = None
    good: float | None = None
    budget_left: float | None = None
    burn_rates: dict[str, float] = field(default_factory=dict)

    @property
    def share(self) -> float | None:
        """Good events by all, since the agent began."""
        return None if not self.events or self.good is None else self.good / self.events

    @property
    def is_bad(self) -> bool:
        """Whether the error budget is used up, or burns as fast as somebody would be paged for."""
        if self.budget_left is not None and self.budget_left <= 0:
            return True
        return any(
            min(self.burn_rates.get(burn.short, 0.0), self.burn_rates.get(burn.long, 0.0)) > burn.factor
            for burn in PAGE
        )

    def as_json(self) -> dict[str, Any]:
        """Its JSON object. What is not known is null."""
        return {
            "slo": self.slo,
            "sli": self.sli,
            "objective": self.objective,
            "window": self.window,
            "target": self.target,
            "covered_seconds": self.covered_s,
            "service": self.service,
            "model": self.model,
            "events": self.events,
            "good_events": self.good,
            "good_ratio": self.share,
            "burn_rates": {window: self.burn_rates.get(window) for window in WINDOWS},
            "error_budget_remaining_ratio": self.budget_left,
            "bad": self.is_bad,
        }


def read(text: str) -> list[Told]:
    """What a page of metrics tells, in its order. Raises FootlightError where it tells of no objective."""
    try:
        samples = [
            (each.name, {name: safe(value) for name, value in each.labels.items()}, each.value)
            for family in text_string_to_metric_families(_objectives_only(text))
            for each in family.samples
            if math.isfinite(each.value)
        ]
    except ValueError as error:
        raise FootlightError(f"this is no page of metrics: {error}", "the URL of an agent: footlight run") from error
    told: dict[str, dict[Key, Told]] = {}
    for name, labels, _ in samples:
        if name == "llm_slo_info":
            slo, sli, objective, window = (labels.get(each, "") for each in ("slo", "sli", "objective", "window"))
            told[slo] = {(): Told(slo, sli, objective, window)}
    if not told:
        raise FootlightError("this agent has no objectives", "list them under slos in its configuration")
    # What is told of an objective comes before what is told of its models: a model's row begins with it.
    for name, labels, value in sorted(samples, key=lambda each: "service_name" in each[1]):
        rows = told.get(labels.get("slo", ""))
        if rows is None:
            continue
        key: Key = ()
        if "service_name" in labels:
            key = labels["service_name"], labels.get("model_name", "")
        if key not in rows:
            rows[key] = replace(rows[()], service=key[0], model=key[1], burn_rates={})
        _take(rows[key], name, labels, value)
    return [each for rows in told.values() for key, each in rows.items() if key or len(rows) == 1]


def _objectives_only(text: str) -> str:
    return "".join(
        f"{line}\n" for line in text.splitlines() if line.startswith(("llm_slo_", "# HELP llm_slo", "# TYPE llm_slo"))
    )


def _take(told: Told, name: str, labels: dict[str, str], value: float) -> None:
    if name == "llm_slo_objective_ratio":
        told.target = value
    elif name == "llm_slo_covered_seconds":
        told.covered_s = value
    elif name == "llm_slo_events_total":
        told.events = value
    elif name == "llm_slo_good_events_total":
        told.good = value
    elif name == "llm_slo_error_budget_remaining_ratio":
        told.budget_left = value
    elif name == "llm_slo_burn_rate" and labels.get("window") in WINDOWS:
        told.burn_rates[labels["window"]] = value


def show(told: Sequence[Told], out: TextIO) -> None:
    """Write the table: one block for each objective."""
    rows = [_row(each) for each in told if each.service is not None]
    head = ("service / model", "good", "all", "share", *(f"burn {window}" for window in WINDOWS), "budget left")
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    before = None
    for each in told:
        if each.slo != before:
            out.write("" if before is None else "\n")
            out.write(f"{each.slo}: {each.objective}, over {each.window}{_seen(each)}\n")
            if each.service is not None:
                out.write(_line(head, widths))
            before = each.slo
        if each.service is None:
            out.write("  only Prometheus counts it\n" if each.covered_s is None else "  no request yet\n")
        else:
            out.write(_line(_row(each), widths, "  !" if each.is_bad else ""))


def _row(told: Told) -> tuple[str, ...]:
    return (
        f"{told.service} / {told.model}",
        _count(told.good),
        _count(told.events),
        "-" if told.share is None else percent(_floored(told.share)),
        *(_rate(told.burn_rates.get(window)) for window in WINDOWS),
        "-" if told.budget_left is None else f"{100 * told.budget_left:.1f}%",
    )


def _line(cells: Iterable[str], widths: Sequence[int], mark: str = "") -> str:
    first, *rest = (
        cell.rjust(width) if column else cell.ljust(width)
        for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
    )
    return f"  {'  '.join((first, *rest))}{mark}\n"


def _seen(told: Told) -> str:
    if told.covered_s is None:
        return ""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "m")):
        if told.covered_s >= 2 * size:
            return f", of which {told.covered_s // size:.0f}{unit} were seen"
    return f", of which {told.covered_s:.0f}s were seen"


def _floored(share: float) -> float:
    """Without rounding up: 99.999 % must not read as 100 %."""
    return math.floor(share * 10_000 + 1e-6) / 10_000  # 0.57 * 10,000 is less than 5,700


def _count(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"


def _rate(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
