"""The dashboard of objectives: what is left of the error budgets, and how fast they burn."""

from __future__ import annotations

from typing import Final

from dashboards.board import GREEN, MODEL, NODE, RED, RULE, YELLOW, Board, Column, rate

NO_SLOS: Final = "No objective is configured (slos:), or none had an event"
NO_RULES: Final = "Prometheus has no rules of `footlight slo rules`, or they have not yet been evaluated"
YOUNG: Final = "Known after the agent has run for five minutes"
OBJECTIVE: Final = "sloth_service, sloth_slo, service_name, model_name"
NAME: Final = "{{sloth_slo}} {{service_name}} {{model_name}}"
BUDGET: Final = ((None, RED), (0.0, YELLOW), (0.25, GREEN))
BURN: Final = ((None, GREEN), (1.0, YELLOW), (6.0, RED))


def slos() -> str:
    """What the agents counted, then what the rules recorded over all of them."""
    board = Board(
        "footlight-slos",
        "Footlight / SLOs",
        "Objectives: events, burn rates and error budgets, by the agents and by the rules of `footlight slo rules`.",
    )
    _agents(board)
    _rules(board)
    return board.text()


def _agents(board: Board) -> None:
    board.row("By the agents, since they started")
    by = "slo, service_name, model_name"
    good = f"sum by ({by}) (llm_slo_good_events_total{{{MODEL}}})"
    events = f"sum by ({by}) (llm_slo_events_total{{{MODEL}}})"
    # With the same labels as the others, or the table would not have it in the same lines.
    wanted = f"({events} * 0 + 1) * on (slo) group_left () max by (slo) (llm_slo_objective_ratio{{{NODE}}})"
    board.table(
        "Objectives",
        "Each objective by service and model: events and good ones since the agents started, over all of them.",
        {"slo": "Objective", "service_name": "Service", "model_name": "Model"},
        [
            Column("Events", events, "short"),
            Column("Good", f"{good} / ({events} > 0)", "percentunit"),
            Column("Objective's share", wanted, "percentunit"),
            Column("Bad", f"sum by ({by}) (llm_slo_violations_total{{{MODEL}}})", "short"),
            Column(
                "Budget left",
                f"min by ({by}) (llm_slo_error_budget_remaining_ratio{{{MODEL}}})",
                "percentunit",
                BUDGET,
            ),
        ],
        empty=NO_SLOS,
        height=9,
    )
    board.series(
        "Bad events",
        "Events a second that were not as the objective wants them.",
        {"{{slo}} {{service_name}} {{model_name}}": f"sum by ({by}) ({rate('llm_slo_violations_total', MODEL)})"},
        "ops",
        empty=NO_SLOS,
    )
    board.series(
        "Budget left, by agent",
        "Error budget that is left, of the events that the agent saw in the objective's window.",
        {
            "{{slo}} {{service_name}} {{model_name}}": f"min by ({by}) "
            f"(llm_slo_error_budget_remaining_ratio{{{MODEL}}})"
        },
        "percentunit",
        empty=NO_SLOS,
        calcs=("lastNotNull", "min"),
        steps=BUDGET,
    )
    board.series(
        "Burn rate, by agent",
        "Bad events by all over the window, by the share that the objective allows. 1 uses up the budget in exactly "
        "the objective's window.",
        {
            "{{slo}} {{service_name}} {{model_name}} {{window}}": f"max by ({by}, window) "
            f"(llm_slo_burn_rate{{{MODEL}}})"
        },
        "none",
        empty=YOUNG,
        calcs=("lastNotNull", "max"),
        steps=BURN,
    )


def _rules(board: Board) -> None:
    board.row("By the rules, over all agents")

    def over(metric: str) -> str:
        return f"max by ({OBJECTIVE}) ({metric}{{{RULE}}})"

    board.series(
        "Burn rate now",
        "Over five minutes: bad events by all, by the share that the objective allows.",
        {NAME: over("slo:current_burn_rate:ratio")},
        "none",
        empty=NO_RULES,
        calcs=("lastNotNull", "max"),
        steps=BURN,
        width=12,
    )
    board.series(
        "Bad events, share",
        "Bad events of all: over five minutes, an hour and six hours. Alerts want a short and a long window.",
        {f"{NAME} {window}": over(f"slo:sli_error:ratio_rate{window}") for window in ("5m", "1h", "6h")},
        "percentunit",
        empty=NO_RULES,
        calcs=("lastNotNull", "max"),
        width=12,
    )
    board.series(
        "Budget left of the period",
        "1 less the burn rate over the whole period: what is left of the error budget. Below zero it is used up.",
        {NAME: over("slo:period_error_budget_remaining:ratio")},
        "percentunit",
        empty=NO_RULES,
        calcs=("lastNotNull", "min"),
        steps=BUDGET,
    )
    board.series(
        "Violations",
        "Bad events of the last five minutes, by objective: slo_violation_count.",
        {"{{sloth_slo}} {{service_name}} {{model_name}}": f"slo_violation_count{{{RULE}}}"},
        "none",
        empty=NO_RULES,
        calcs=("lastNotNull", "max"),
    )
    board.table(
        "Rules",
        "Objectives that Prometheus has rules for, and their share and period.",
        {"sloth_service": "Service", "sloth_slo": "Objective"},
        [
            Column("Share", "max by (sloth_service, sloth_slo) (slo:objective:ratio)", "percentunit"),
            Column("Period, days", "max by (sloth_service, sloth_slo) (slo:time_period:days)", "none"),
        ],
        empty=NO_RULES,
        width=8,
    )
    board.row("Alerts")
    board.table(
        "Alerts that burn",
        "Alerts of objectives that are pending or fire.",
        {"alertname": "Alert", "sloth_slo": "Objective", "severity": "Severity", "alertstate": "State"},
        [Column("Series", 'count by (alertname, sloth_slo, severity, alertstate) (ALERTS{sloth_id!=""})', "none")],
        empty="No alert of an objective",
        height=6,
    )
