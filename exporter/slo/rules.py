"""Recording and alerting rules of objectives, under the names and labels that Sloth gives them.

What differs from Sloth: bad events and all events are recorded too, and whatever is longer than six hours is a quotient
of their sums. Sloth averages the ratios of five-minute windows, which gives a quiet night the weight of a busy evening,
and is NaN for a whole month after five minutes without a request.

The sums come from windows of an hour, of which one begins every five minutes: each event is in twelve of them.
Increases over ranges that only touch would lose what happens between the last scrape of one and the first of the next,
always the same minute of a nightly job. Counters that restart are no trouble, and an hour's window reaches over minutes
in which Prometheus did not scrape. A month is 8,640 points of one recorded series for each model, whatever the number
of nodes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import ROUND_CEILING, Decimal
from typing import Final

from exporter.slo.model import WINDOW, AlertStyle, Events, Measure, Objective, one_of, quoted, selector
from exporter.slo.words import period

FEWEST: Final = 20
"""An alert wants at least so many events in its long window."""
SHORT: Final = ("5m", "30m", "1h", "2h", "6h")
"""Windows that are asked of the counters themselves."""
LONG_S: Final = (86400, 3 * 86400)
"""Longer windows of alerts, in seconds."""
STEP_S: Final = 300
BASE: Final = "1h"
_PER_BASE: Final = 3600 // STEP_S
ABSENT_FOR: Final = "10m"
_DAY: Final = Decimal(86400)


@dataclass(frozen=True, slots=True)
class Burn:
    """A burn rate that alerts when it is exceeded over both windows."""

    factor: Decimal
    short: str
    long: str


PAGE: Final = (Burn(Decimal("14.4"), "5m", "1h"), Burn(Decimal(6), "30m", "6h"))
TICKET: Final = (Burn(Decimal(3), "2h", "1d"), Burn(Decimal(1), "6h", "3d"))
"""As in the SRE workbook for 30 days. Other periods keep them: what would be a fast burn there is one here."""


@dataclass(frozen=True, slots=True)
class Rule:
    """A recording rule, or an alert where `alert` is not empty."""

    expr: str
    record: str = ""
    alert: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    annotations: Mapping[str, str] = field(default_factory=dict)
    waits: str = ""


@dataclass(frozen=True, slots=True)
class Group:
    """Rules that are evaluated one after the other."""

    name: str
    rules: Sequence[Rule]


def groups(objectives: Iterable[Objective], version: str, fewest: int = FEWEST) -> list[Group]:
    """Two groups of records for each objective, and one of alerts where they are wanted.

    `fewest` is how many events an alert wants in its long window at the least.
    """
    found = []
    for objective in objectives:
        tail = objective.id
        found += [
            Group(f"sloth-slo-sli-recordings-{tail}", _recordings(objective)),
            Group(f"sloth-slo-meta-recordings-{tail}", _meta(objective, version)),
        ]
        alerts = _alerts(objective, fewest)
        if alerts:
            found.append(Group(f"sloth-slo-alerts-{tail}", alerts))
    return found


def well_known() -> Group:
    """Names under which teams know a few of the agent's numbers, by service and model, over the last five minutes."""
    by = "sum by (service_name, model_name)"
    hits, queries = (f"increase(llm_prefix_cache_{each}_total[5m])" for each in ("hits", "queries"))
    waited = "increase(llm_time_to_first_token_seconds_sum[5m])"
    durations = "sum by (service_name, model_name, le) (rate(llm_request_duration_seconds_bucket[5m]))"
    return Group(
        "footlight-well-known",
        [
            # Without a request the quantile is NaN, and no comparison holds.
            Rule(f"1000 * (histogram_quantile(0.99, {durations}) >= 0)", "p99_inference_latency_ms"),
            Rule(f"{by} ({hits})\n/\n({by} ({queries}) > 0)", "kv_cache_hit_ratio"),
            # A rate of each node counts by the time it was measured over, so that it is tokens by seconds of all.
            Rule(
                f"{by} (llm_prefill_tokens_per_second * {waited})\n/\n"
                f"({by} ({waited} and llm_prefill_tokens_per_second) > 0)",
                "prefill_tokens_per_sec",
            ),
            Rule(
                'sum by (service_name, model_name, sloth_slo) (slo:sli_error:increase5m{model_name!=""})',
                "slo_violation_count",
            ),
        ],
    )


def windows(objective: Objective) -> list[tuple[str, int]]:
    """Long windows of an objective, its period last: as text and in seconds."""
    return [(period(seconds), seconds) for seconds in dict.fromkeys((*LONG_S, objective.window_s))]


def identity(objective: Objective) -> dict[str, str]:
    """The labels that tell objectives apart, as alerts have them."""
    return {"sloth_id": objective.id, **names(objective)}


def names(objective: Objective) -> dict[str, str]:
    """Labels of all that is recorded for an objective, and of nothing else."""
    return {"sloth_service": objective.service, "sloth_slo": objective.name}


def possible(burns: Sequence[Burn], budget: Decimal) -> list[Burn]:
    """Those burn rates that there can be: when every event is bad, the budget burns 1 / budget times as fast."""
    return [burn for burn in burns if burn.factor * budget < 1]


def least_events(burn: Burn, budget: Decimal, fewest: int) -> int:
    """Events in the long window from which on a single bad one among them is no alert."""
    return max(fewest, int((1 / (burn.factor * budget)).to_integral_value(ROUND_CEILING)))


def number(value: Decimal) -> str:
    """A decimal without an exponent and without noise."""
    text = f"{value:f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def _recordings(objective: Objective) -> list[Rule]:
    sli, these = objective.sli, selector(names(objective))
    rules: list[Rule] = []

    def record(name: str, window: str, expr: str) -> None:
        labels = {**_labels(objective), "sloth_window": window}
        rules.append(Rule(expr, f"slo:{name}{window}", labels=labels))

    if not isinstance(sli, Events):
        for window in (*SHORT, *(text for text, _ in windows(objective))):
            record("sli_error:ratio_rate", window, sli.error_ratio.replace(WINDOW, window))
        return rules
    ending = sli.measure.value
    for window in SHORT:
        total = _with_id(objective, sli.total.replace(WINDOW, window))
        error = _with_id(objective, sli.error.replace(WINDOW, window))
        if sli.measure is Measure.UNITLESS:
            # A query for errors that never happened gives nothing, and nothing by something is no ratio.
            error = f"(\n{_indented(error)}\n)\nor\n(\n{_indented(total)}\n) * 0"
        record(f"sli_total:{ending}", window, total)
        record(f"sli_error:{ending}", window, error)
    for window, seconds in windows(objective):
        parts = _PER_BASE if sli.measure is Measure.EVENTS else seconds // STEP_S
        for name in ("sli_total", "sli_error"):
            base = f"slo:{name}:{ending}{BASE}{{{these}}}"
            record(f"{name}:{ending}", window, f"sum_over_time({base}[{window}:{STEP_S // 60}m]) / {parts}")
    for window in (*SHORT, *(text for text, _ in windows(objective))):
        error, total = (f"slo:{name}:{ending}{window}{{{these}}}" for name in ("sli_error", "sli_total"))
        record("sli_error:ratio_rate", window, f"{error}\n/\n({total} > 0)")
    return rules


def _meta(objective: Objective, version: str) -> list[Rule]:
    these, labels = selector(names(objective)), _labels(objective)
    length = period(objective.window_s)
    by_budget = f"/ on (sloth_id, sloth_slo, sloth_service) group_left ()\nslo:error_budget:ratio{{{these}}}"
    info = {
        "sloth_mode": "cli-gen-prom",
        "sloth_objective": number(objective.target * 100),
        "sloth_spec": objective.spec,
        "sloth_version": version,
    }

    def constant(value: Decimal) -> str:
        if not objective.each:
            return f"vector({number(value)})"
        known = " or ".join(f"slo:sli_total:increase{window}{{{these}}}" for window in (SHORT[0], length))
        nobody = f'label_replace(vector(1), "sloth_id", {quoted(objective.id)}, "", "")'
        return f"{number(value)} * (\n  group without (sloth_window) ({known})\n  or on ()\n  {nobody}\n)"

    return [
        Rule(constant(objective.target), "slo:objective:ratio", labels=labels),
        Rule(constant(objective.budget), "slo:error_budget:ratio", labels=labels),
        Rule(constant(_days(objective.window_s)), "slo:time_period:days", labels=labels),
        Rule(f"slo:sli_error:ratio_rate5m{{{these}}}\n{by_budget}", "slo:current_burn_rate:ratio", labels=labels),
        Rule(f"slo:sli_error:ratio_rate{length}{{{these}}}\n{by_budget}", "slo:period_burn_rate:ratio", labels=labels),
        Rule(f"1 - slo:period_burn_rate:ratio{{{these}}}", "slo:period_error_budget_remaining:ratio", labels=labels),
        Rule(constant(Decimal(1)), "sloth_slo_info", labels={**labels, **info}),
    ]


def _labels(objective: Objective) -> dict[str, str]:
    """The labels that a rule gives what it records. One that is for each of something has the id in its expression."""
    return {**objective.labels, **(names(objective) if objective.each else identity(objective))}


def _with_id(objective: Objective, query: str) -> str:
    """A query whose result has an id for each."""
    if not objective.each:
        return query
    each = f'"sloth_id", {quoted(objective.id + ":$1")}, {quoted(objective.each)}, "(.*)"'
    return f"label_replace(\n{_indented(query)},\n  {each}\n)"


def _days(seconds: int) -> Decimal:
    return (Decimal(seconds) / _DAY).quantize(Decimal("0.000001"))


def _alerts(objective: Objective, fewest: int) -> list[Rule]:
    if not objective.page.wanted and not objective.ticket.wanted:
        return []
    rules = []
    for severity, common, style, burns in (
        ("page", "critical", objective.page, PAGE),
        ("ticket", "warning", objective.ticket, TICKET),
    ):
        able = possible(burns, objective.budget)
        if able and style.wanted:
            expr = "\nor\n".join(_burning(objective, burn, fewest) for burn in able)
            rules.append(_alert(objective, expr, severity, common, style, able[0].short))
    summary = f"Nobody can tell how {objective.name} of {objective.service} stands"
    rules.append(
        Rule(
            objective.absent,
            alert="SLOMetricAbsent",
            labels={**objective.labels, **identity(objective), "sloth_severity": "ticket", "severity": "warning"},
            annotations={
                "summary": f"{summary}.",
                "description": "The metric is absent: the agent or its target is gone, or the service does not do what "
                f"the objective is about ({_no_template(objective.sentence)}).",
            },
            waits=ABSENT_FOR,
        )
    )
    return rules


def _alert(objective: Objective, expr: str, severity: str, common: str, style: AlertStyle, window: str) -> Rule:
    speed = "fast" if severity == "page" else "slowly but surely"
    return Rule(
        expr,
        alert=objective.alert_name,
        labels={
            **objective.labels,
            **identity(objective),
            "sloth_severity": severity,
            "severity": common,
            **style.labels,
        },
        annotations={
            "summary": f"{objective.name} of {objective.service} burns its error budget {speed}.",
            "description": "{{ with $labels.model_name }}{{ . }}: {{ end }}{{ $value | humanizePercentage }} of the "
            f"events are bad; {number(objective.budget * 100)}% may be ({_no_template(objective.sentence)})."
            f"{_largest_cause(objective, window)}",
            **style.annotations,
        },
    )


def _no_template(text: str) -> str:
    """A text in an annotation, as it is."""
    return text.replace("{{", '{{ "{{" }}')


def _largest_cause(objective: Objective, window: str) -> str:
    """A template that says on what most of the time was spent, and nothing where nobody knows."""
    if not objective.phases:
        return ""
    match = f"{one_of('phase', objective.phases)}, service_name=%q, model_name=%q"
    spent = f"(rate(llm_latency_cause_seconds_total{{{match}}}[{window}]))"
    query = quoted(f"topk(1, sum by (cause) {spent} > 0) / scalar(sum {spent})")
    labels = "$labels.service_name $labels.model_name"
    return (
        f"{{{{ with printf {query} {labels} {labels} | query }}}}{{{{ with . | first }}}} Largest cause: "
        "{{ .Labels.cause }}, {{ .Value | humanizePercentage }} of the time.{{ end }}{{ end }}"
    )


def _burning(objective: Objective, burn: Burn, fewest: int) -> str:
    these = selector(names(objective))

    def over(metric: str, condition: str) -> str:
        return f"max without (sloth_window) ({metric}{{{these}}} {condition})"

    threshold = f"> ({number(burn.factor)} * {number(objective.budget)})"
    clauses = [over(f"slo:sli_error:ratio_rate{window}", threshold) for window in (burn.short, burn.long)]
    if isinstance(objective.sli, Events) and objective.sli.measure is Measure.EVENTS:
        least = least_events(burn, objective.budget, fewest)
        clauses.append(over(f"slo:sli_total:increase{burn.long}", f">= {least}"))
    return "(\n" + "\n  and\n".join(f"    {clause}" for clause in clauses) + "\n)"


def _indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.strip().splitlines())
