"""The dashboard about the agent itself: what it saw of all there was, what it lost, and what it costs."""

from __future__ import annotations

from typing import Final

from dashboards.board import GREEN, NODE, RED, SERVICE, YELLOW, Board, Column, rate
from dashboards.overview import IDLE, ratio

GONE: Final = "No agent was scraped in this time"


def agent() -> str:
    """Coverage and loss first, then probes, then cost."""
    board = Board(
        "footlight-agent",
        "Footlight / Agent",
        "How much of what happened the agents saw, what they lost, and what they cost.",
    )
    _stats(board)
    _coverage(board)
    _probes(board)
    _notices(board)
    _cost(board)
    return board.text()


def _stats(board: Board) -> None:
    board.row("Now")
    board.stat(
        "Agents",
        "Agents that were scraped.",
        f"count(footlight_build_info{{{NODE}}})",
        "none",
        empty=GONE,
    )
    board.stat(
        "Coverage",
        "Requests captured completely by all requests, last 5 minutes; of the service where it is lowest.",
        f"min(footlight_capture_ratio{{{SERVICE}}})",
        "percentunit",
        empty=IDLE,
        steps=((None, RED), (0.95, YELLOW), (0.99, GREEN)),
    )
    board.stat(
        "Lost",
        "Records a second that were lost, for whatever reason.",
        f"sum({rate('footlight_lost_events_total', NODE)})",
        "ops",
        empty=GONE,
        steps=((None, GREEN), (1e-9, YELLOW), (10, RED)),
    )
    board.stat(
        "Probes down",
        "Probes that are wanted and not attached, over all agents. A GPU probe that is `auto` does not count.",
        f"sum((1 - footlight_probe_up{{{NODE}}}) * footlight_probe_required{{{NODE}}})",
        "none",
        empty=GONE,
        steps=((None, GREEN), (1, RED)),
    )
    board.stat(
        "Restarts",
        "Times that readers died and were started again, in the time range.",
        f"sum(increase(footlight_reader_restarts_total{{{NODE}}}[$__range]))",
        "none",
        empty=GONE,
        steps=((None, GREEN), (1, YELLOW)),
    )
    board.stat(
        "Refused configurations",
        "Agents whose file was refused at the last reload: they run with the one before.",
        f"count(footlight_config_last_reload_successful{{{NODE}}} == 0) or "
        f"0 * count(footlight_config_last_reload_successful{{{NODE}}})",
        "none",
        empty="No agent runs with a configuration file",
        steps=((None, GREEN), (1, RED)),
    )
    board.stat(
        "CPU",
        "CPUs that an agent's processes and its probes' programs use, the dearest agent.",
        f"max(sum by (instance) ({rate('footlight_process_cpu_seconds_total', NODE)}) + "
        f"sum by (instance) ({rate('footlight_probe_cpu_seconds_total', NODE)}))",
        "none",
        empty="Known where the kernel counts what BPF programs cost",
    )
    board.stat(
        "Memory",
        "Proportional set size of an agent's processes, the largest agent.",
        f"max(sum by (instance) (footlight_process_proportional_memory_bytes{{{NODE}}}))",
        "bytes",
        empty=GONE,
    )


def _coverage(board: Board) -> None:
    board.row("Coverage and loss")
    outcomes = rate("footlight_capture_total", SERVICE)
    board.series(
        "Requests by what was seen of them",
        "Requests a second by outcome. All but `complete` are explained in the semantics page.",
        {"{{outcome}}": f"sum by (outcome) ({outcomes})"},
        "reqps",
        empty=IDLE,
        stacked=True,
    )
    complete = rate("footlight_capture_total", f'{SERVICE}, outcome="complete"')
    board.series(
        "Coverage by service",
        "Requests captured completely by all requests.",
        {"{{service_name}}": ratio(complete, outcomes, "service_name")},
        "percentunit",
        empty=IDLE,
        top=1,
        calcs=("mean", "min"),
    )
    board.series(
        "Lost records",
        "Records a second that were lost, by probe and reason: where a reason is not zero, numbers are too low.",
        {"{{probe}} {{reason}}": f"sum by (probe, reason) ({rate('footlight_lost_events_total', NODE)}) > 0"},
        "ops",
        empty="Nothing was lost in this time",
    )
    board.series(
        "Without a model of their own",
        "Requests a second whose model got no label: one too many, or refused by the service.",
        {"{{service_name}}": f"sum by (service_name) ({rate('footlight_model_label_overflows_total', SERVICE)})"},
        "reqps",
        empty=GONE,
    )
    board.series(
        "Discarded observations",
        "Latencies a second that were not counted because they were negative.",
        {"{{sli}}": f"sum by (sli) ({rate('footlight_discarded_observations_total', NODE)})"},
        "ops",
        empty=GONE,
    )
    board.series(
        "What the engines told",
        "Times a second that an engine's metrics were not had, by reason, and whether all engines of a service told "
        "theirs.",
        {
            "{{service_name}} up": f"min by (service_name) (llm_engine_up{{{SERVICE}}})",
            "{{service_name}} {{reason}}": "sum by (service_name, reason) "
            f"({rate('llm_engine_scrape_failures_total', SERVICE)})",
        },
        "none",
        empty="No engine with metrics of its own",
    )


def _probes(board: Board) -> None:
    board.row("Probes and targets")
    board.series(
        "Records by probe",
        "Records a second that each probe had to make.",
        {"{{probe}}": f"sum by (probe) ({rate('footlight_probe_events_total', NODE)})"},
        "ops",
        empty=GONE,
    )
    board.series(
        "CPU by probe",
        "CPUs that the probe's programs use, by the kernel's statistics.",
        {"{{probe}}": f"sum by (probe) ({rate('footlight_probe_cpu_seconds_total', NODE)})"},
        "none",
        empty="The kernel's statistics of BPF programs are off",
    )
    board.bars(
        "Probes up",
        "Agents on which each probe is attached, by all that asked for it.",
        f"sort(avg by (probe) (footlight_probe_up{{{NODE}}}))",
        "{{probe}}",
        "percentunit",
        empty=GONE,
    )
    board.series(
        "Targets",
        "Processes that are followed, and ports on which they listen.",
        {
            "{{service_name}} processes": f"sum by (service_name) (footlight_target_processes{{{SERVICE}}})",
            "{{service_name}} ports": f"sum by (service_name) (footlight_target_ports{{{SERVICE}}})",
        },
        "none",
        empty=GONE,
    )
    board.series(
        "Connections",
        "Connections for which a reader holds state.",
        {"{{instance}}": f"footlight_connections_tracked{{{NODE}}}"},
        "none",
        empty=GONE,
    )
    board.series(
        "Critical paths",
        "Windows of requests a second whose path was walked, and CPUs that this took.",
        {
            "paths/s": f"sum({rate('footlight_paths_total', NODE)})",
            "CPUs": f"sum({rate('footlight_path_cpu_seconds_total', NODE)})",
        },
        "none",
        empty="The scheduler probe is off",
    )


def _notices(board: Board) -> None:
    board.row("Alerts that the agents post themselves")
    nobody = "No Alertmanager is configured (alertmanagers:)"
    board.series(
        "Firing",
        "Alerts of the fast path that fire, by name.",
        {"{{alertname}}": f"sum by (alertname) (footlight_alerts_firing{{{NODE}}})"},
        "none",
        empty=nobody,
        width=12,
    )
    board.series(
        "Notices",
        "Notices a second that each Alertmanager took, that it did not take, by reason, and that were given up.",
        {
            "{{alertmanager}}": f"sum by (alertmanager) ({rate('footlight_alert_notifications_total', NODE)})",
            "{{alertmanager}} {{reason}}": "sum by (alertmanager, reason) "
            f"({rate('footlight_alert_notification_failures_total', NODE)})",
            "{{alertmanager}} given up": "sum by (alertmanager) "
            f"({rate('footlight_alert_notifications_dropped_total', NODE)})",
        },
        "ops",
        empty=nobody,
        width=12,
    )


def _cost(board: Board) -> None:
    board.row("Cost")
    board.series(
        "CPU of processes",
        "CPUs that the agent's processes use, user and system.",
        {"{{instance}} {{process}}": rate("footlight_process_cpu_seconds_total", NODE)},
        "none",
        empty=GONE,
        width=6,
    )
    board.series(
        "Memory of processes",
        "Proportional set size: pages that both processes share are divided among them.",
        {"{{instance}} {{process}}": f"footlight_process_proportional_memory_bytes{{{NODE}}}"},
        "bytes",
        empty=GONE,
        width=6,
    )
    board.series(
        "Time of a scrape",
        "How long a scrape took in the agent, and what it took to ask the driver about all GPUs.",
        {
            "{{instance}} scrape": f"footlight_scrape_duration_seconds{{{NODE}}}",
            "{{instance}} GPUs": f"footlight_gpu_look_seconds{{{NODE}}}",
        },
        "s",
        empty=GONE,
        width=6,
    )
    board.table(
        "Versions",
        "What runs where.",
        {"instance": "Agent", "version": "Version", "python_version": "Python"},
        [
            Column(
                "Agents",
                f"count by (instance, version, python_version) (footlight_build_info{{{NODE}}})",
                "none",
            )
        ],
        empty=GONE,
        width=6,
    )
