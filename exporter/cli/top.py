"""`footlight top`: the live table."""

from __future__ import annotations

import logging

import click

from exporter.cli import give_terminal_back, usage_error
from exporter.cli.options import Request, agent_options


@click.command(short_help="Live table, one row per service and model.")
@click.option(
    "--interval",
    type=click.FloatRange(0.25, 3600),
    default=1.0,
    show_default=True,
    metavar="SECONDS",
    help="Time between two tables, 0.25 to 3600.",
)
@click.option("--count", type=click.IntRange(1), metavar="N", help="End after N tables.  [default: until Ctrl-C]")
@click.option("--duration", type=click.FloatRange(0, min_open=True), metavar="SECONDS", help="End after this time.")
@click.option("--once", is_flag=True, help="Print one table after one interval, and end. The same as --count 1.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per row and interval, one a line.")
@agent_options(serves=False, level=logging.WARNING)
def top(asked: Request, interval: float, count: int | None, duration: float | None, once: bool, as_json: bool) -> int:
    """Show one row per service and model, live: requests, TTFT, ITL, tokens, cache, failures, coverage.

    Below them are GPUs, and what engines tell of themselves, where there are any. Needs root. Figures of models are
    over the last 5 minutes, at most since the start. Without a terminal the table is printed once an interval. With
    --json, rows of models have "model"; GPUs follow as rows that have "gpu" instead.

    \b
    Examples:
      footlight top --port 8000
      footlight top --exe vllm --once --interval 30
      footlight top --port 8000 --json | jq -c 'select(.model) | [.model, .ttft_p99_seconds]'
      footlight top --port 8000 --json | jq -c 'select(.gpu) | .gpu | [.index, .utilization_ratio]'
    """
    from exporter import attacher
    from exporter.fronts import TopFront

    if once and count not in {None, 1}:
        raise usage_error("--once and --count cannot be given together", "keep one of the two")
    front = TopFront(
        as_json=as_json, interval_s=interval, count=1 if once else count, duration_s=duration, serves=asked.serves
    )
    code = attacher.run(
        asked.config,
        front,
        transport=asked.transport,
        wait_for_targets=asked.waits,
        source=asked.source,
    )
    return give_terminal_back(code)
