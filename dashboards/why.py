"""The dashboard that says why: what requests spent their time on, and what the kernel saw of the service."""

from __future__ import annotations

from typing import Final

from dashboards.board import GREEN, MODEL, RED, SERVICE, YELLOW, Board, quantile, rate
from dashboards.overview import ITL, TTFT

BY: Final = "service_name"
NOT_ON: Final = "The probe is off or not up: see footlight_probe_up"
CAUSES: Final = "llm_latency_cause_seconds_total"


def why() -> str:
    """Causes, then the layers below: scheduler, network, disk and memory."""
    board = Board(
        "footlight-why",
        "Footlight / Why",
        "Where the time of requests went: causes along their critical paths, and what the kernel saw of the service.",
    )
    _causes(board)
    _latencies(board)
    _health(board)
    _scheduler(board)
    _network(board)
    _disk_and_memory(board)
    return board.text()


def _causes(board: Board) -> None:
    board.row("Causes")
    nothing = "No streamed request in this time, or the scheduler probe is off"

    def per_request(phase: str) -> dict[str, str]:
        spent = rate(CAUSES, f'{MODEL}, phase="{phase}"')
        first_tokens = rate(f"{TTFT}_count", MODEL)
        return {"{{cause}}": f"sum by (cause) ({spent}) / scalar(sum({first_tokens}) > 0)"}

    board.series(
        "Time to first token by cause",
        "Seconds of a mean request until its first token, by what its critical path was doing; they add up to the "
        "mean TTFT. `unexplained` is what could not be shown.",
        per_request("ttft"),
        "s",
        empty=nothing,
        width=9,
        height=10,
        stacked=True,
    )
    board.series(
        "Streaming by cause",
        "Seconds of a mean request from its first to its last token, by what its critical path was doing.",
        per_request("decode"),
        "s",
        empty=nothing,
        width=9,
        height=10,
        stacked=True,
    )
    spent = f'increase({CAUSES}{{{MODEL}, phase="ttft"}}[$__range])'
    board.bars(
        "Share of each cause",
        "Causes of the time to first token over the whole time range, largest first.",
        f"sort_desc(sum by (cause) ({spent}) / scalar(sum({spent}) > 0))",
        "{{cause}}",
        "percentunit",
        empty=nothing,
        width=6,
        height=10,
    )


def _latencies(board: Board) -> None:
    board.row("Latencies")
    board.heat(
        "Time to first token, heat map",
        "How many streamed responses had their first token within which time.",
        TTFT,
        MODEL,
        empty="No streamed response in this time",
    )
    board.heat(
        "Inter-token latency, heat map",
        "How many gaps between two frames with content were how long.",
        ITL,
        MODEL,
        empty="No response of more than one frame in this time",
    )
    board.series(
        "Longest gap",
        "The longest gap between frames of each response: median and 99 %. A stall that ITL's many short gaps hide.",
        {f"p{100 * q:g}": quantile(q, "llm_request_longest_gap_seconds", MODEL) for q in (0.5, 0.99)},
        "s",
        empty="No response of more than one frame in this time",
    )
    board.series(
        "Duration",
        "From the request's first byte to the last byte of its response: median and 99 %.",
        {f"p{100 * q:g}": quantile(q, "llm_request_duration_seconds", MODEL) for q in (0.5, 0.99)},
        "s",
        empty="No request in this time",
    )
    board.series(
        "Read delay",
        "How long a request lay in the socket before the service read it: median and 99 %. It grows when the event "
        "loop is busy or the accept queue is full.",
        {f"p{100 * q:g}": quantile(q, "llm_request_read_delay_seconds", MODEL) for q in (0.5, 0.99)},
        "s",
        empty="No request whose arrival was seen in this time",
    )


def _health(board: Board) -> None:
    board.row("What is not normal")
    signals = f"max by (service_name, signal) (footlight_health_deviation_sigma{{{SERVICE}}})"
    board.series(
        "Deviations",
        "How far each signal of a service is above its median of five minutes, in robust standard deviations. Above 3, "
        "for long enough, it is anomalous.",
        {"{{service_name}} {{signal}}": signals},
        "none",
        empty="What is normal is known after two and a half minutes",
        width=12,
        steps=((None, GREEN), (3, RED)),
    )
    board.series(
        "Anomalies and leaks",
        "Times that a signal became anomalous, and that a process opened more than 50 descriptors a second for 10 s.",
        {
            "{{service_name}} {{signal}}": "sum by (service_name, signal) "
            f"(increase(footlight_health_anomalies_total{{{SERVICE}}}[$__rate_interval]))",
            "{{service_name}} descriptors": "sum by (service_name) "
            f"(increase(footlight_descriptor_leaks_total{{{SERVICE}}}[$__rate_interval]))",
        },
        "none",
        empty="What is normal is known after two and a half minutes",
        width=12,
    )


def _two(histogram: str, by: str = BY, labels: str = SERVICE) -> dict[str, str]:
    legend = " ".join(f"{{{{{label}}}}}" for label in by.split(", "))
    return {f"{legend} p{100 * q:g}": quantile(q, histogram, labels, by) for q in (0.5, 0.99)}


def _scheduler(board: Board) -> None:
    board.row("Scheduler")
    board.series(
        "Run queue",
        "From the instant a thread could run until it did: median and 99 %. Without what its CPU quota kept it.",
        _two("kernel_run_queue_wait_seconds"),
        "s",
        empty=NOT_ON,
        steps=((None, GREEN), (0.01, YELLOW), (0.1, RED)),
    )
    board.heat(
        "Run queue, heat map",
        "How many waits for a CPU were how long.",
        "kernel_run_queue_wait_seconds",
        SERVICE,
        empty=NOT_ON,
        width=8,
        height=8,
    )
    board.series(
        "CPU",
        "CPUs that threads used, and CPUs that they could have used but were kept from: waiting for one, or for "
        "their quota.",
        {
            "{{service_name}} running": f"sum by ({BY}) ({rate('kernel_on_cpu_seconds_total', SERVICE)})",
            "{{service_name}} in the run queue": f"sum by ({BY}) "
            f"({rate('kernel_run_queue_wait_seconds_sum', SERVICE)})",
            "{{service_name}} throttled": f"sum by ({BY}) ({rate('kernel_cpu_quota_seconds_total', SERVICE)})",
        },
        "none",
        empty=NOT_ON,
    )
    board.series(
        "Asleep by reason",
        "Threads asleep at a time, by what they slept on. Many a thread sleeps because there is nothing to do.",
        {"{{reason}}": f"sum by (reason) ({rate('kernel_off_cpu_seconds_total', SERVICE)})"},
        "none",
        empty=NOT_ON,
        width=12,
        stacked=True,
    )
    board.series(
        "Switches and migrations",
        "How often a second threads left their CPU, and went on on another one.",
        {
            "{{service_name}} switches": f"sum by ({BY}) ({rate('kernel_context_switches_total', SERVICE)})",
            "{{service_name}} migrations": f"sum by ({BY}) ({rate('kernel_cpu_migrations_total', SERVICE)})",
        },
        "ops",
        empty=NOT_ON,
        width=12,
    )


def _network(board: Board) -> None:
    board.row("Network")
    board.series(
        "Round trip",
        "The kernel's smoothed round-trip time of the service's connections, sampled: median and 99 %.",
        _two("kernel_tcp_round_trip_seconds"),
        "s",
        empty=NOT_ON,
    )
    board.series(
        "Receive queue",
        "From the arrival of the first unread segment until the service read it: median and 99 %.",
        _two("kernel_tcp_receive_queue_seconds"),
        "s",
        empty=NOT_ON,
    )
    board.series(
        "Retransmits and resets",
        "Packets sent again, and connections reset, by who did it, a second.",
        {
            "{{service_name}} retransmits": f"sum by ({BY}) ({rate('kernel_tcp_retransmits_total', SERVICE)})",
            "{{service_name}} resets {{direction}}": f"sum by ({BY}, direction) "
            f"({rate('kernel_tcp_resets_total', SERVICE)})",
        },
        "ops",
        empty=NOT_ON,
    )
    board.series(
        "Connect",
        "Time to open a connection that the service asked for: median and 99 %.",
        _two("kernel_tcp_connect_seconds"),
        "s",
        empty="The service opened no connection in this time, or the TCP probe is off",
        width=12,
    )
    board.series(
        "Send stalls",
        "From a send that found no room in the buffer until the next one that did: clients that read slowly.",
        _two("kernel_tcp_send_stall_seconds"),
        "s",
        empty="No send found its buffer full in this time, or the TCP probe is off",
        width=12,
    )


def _disk_and_memory(board: Board) -> None:
    board.row("Disk and memory")
    board.series(
        "Disk, time of an I/O",
        "Time that a device took, from issue to completion: 99 %, by operation.",
        {
            "{{service_name}} {{operation}} p99": quantile(
                0.99, "kernel_block_io_seconds", SERVICE, f"{BY}, operation"
            )
        },
        "s",
        empty="The service asked no disk for anything in this time, or the block probe is off",
    )
    board.series(
        "Disk, bytes",
        "Bytes of the service's I/O that devices completed, by operation.",
        {
            "{{service_name}} {{operation}}": f"sum by ({BY}, operation) "
            f"({rate('kernel_block_io_bytes_total', SERVICE)})"
        },
        "Bps",
        empty=NOT_ON,
    )
    board.series(
        "Memory pressure",
        "Seconds a second in which threads freed memory themselves, and page faults a second that waited for a disk.",
        {
            "{{service_name}} in reclaim": f"sum by ({BY}) ({rate('kernel_direct_reclaim_seconds_sum', SERVICE)})",
            "{{service_name}} major faults/s": f"sum by ({BY}) ({rate('kernel_major_page_faults_total', SERVICE)})",
        },
        "none",
        empty=NOT_ON,
    )
    board.series(
        "Resident memory",
        "Resident memory of the service's processes; pages that several share count in each.",
        {"{{service_name}}": f"sum by ({BY}) (kernel_resident_memory_bytes{{{SERVICE}}})"},
        "bytes",
        empty=NOT_ON,
        width=6,
    )
    board.series(
        "Open files and threads",
        "Descriptors and threads of the service's processes.",
        {
            "{{service_name}} files": f"sum by ({BY}) (kernel_open_files{{{SERVICE}}})",
            "{{service_name}} threads": f"sum by ({BY}) (kernel_threads{{{SERVICE}}})",
        },
        "none",
        empty=NOT_ON,
        width=6,
    )
    board.series(
        "Growth of open files",
        "Descriptors a second that processes opened and did not close, over the last minute.",
        {"{{service_name}}": f"sum by ({BY}) (kernel_open_files_growth_per_second{{{SERVICE}}})"},
        "none",
        empty="Known after the service was watched for a minute",
        width=6,
    )
    board.series(
        "Killed for want of memory",
        "Processes of the service that the kernel killed because memory ran out.",
        {"{{service_name}}": f"sum by ({BY}) (increase(kernel_oom_kills_total{{{SERVICE}}}[$__rate_interval]))"},
        "none",
        empty=NOT_ON,
        width=6,
    )
    board.series(
        "System calls",
        "Seconds a second in system calls, waiting included, by call; the ten largest.",
        {"{{syscall}}": f"topk(10, sum by (syscall) ({rate('kernel_syscall_seconds_sum', SERVICE)}))"},
        "none",
        empty="Only with the syscalls probe, which is off by default",
        width=24,
    )
