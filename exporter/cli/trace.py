"""`footlight trace`: one line per finished request."""

from __future__ import annotations

import logging

import click

from exporter.cli.options import Request, agent_options


@click.command(short_help="One line per finished request.")
@click.option(
    "--duration",
    type=click.FloatRange(0, min_open=True),
    metavar="SECONDS",
    help="End after this time.  [default: until Ctrl-C]",
)
@click.option("--count", type=click.IntRange(1), metavar="N", help="End after N requests.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per request, one a line.")
@agent_options(serves=False, level=logging.WARNING)
def trace(asked: Request, duration: float | None, count: int | None, as_json: bool) -> int:
    """Print a line when a request ends: model, status, TTFT, ITL, stall, tokens, duration, outcome.

    Needs root. No text of a prompt or reply is printed: names, counts and times only.

    \b
    Columns:
      TIME     when it ended, local time          ITL     mean time between frames with content
      TTFT     arrival to first content           STALL   the longest of these times
      TOKENS   prompt>generated                   TOTAL   arrival to end
      WHY      what most of TTFT was spent on, see footlight why
      OUTCOME  ok, why it failed, or left_waiting and left_streaming: the client went away;
               in brackets what of it was not seen

    \b
    Examples:
      footlight trace --port 8000
      footlight trace --port 8000 --count 100 --json > requests.jsonl
    """
    from exporter import attacher
    from exporter.fronts import TraceFront

    front = TraceFront(as_json=as_json, duration_s=duration, count=count, serves=asked.serves)
    return attacher.run(
        asked.config,
        front,
        transport=asked.transport,
        wait_for_targets=asked.waits,
        source=asked.source,
    )
