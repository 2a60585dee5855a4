"""`footlight why`: where the time of slow requests went."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from exporter.cli import usage_error
from exporter.cli.asking import Url, agent_or_url
from exporter.cli.options import Request
from probes.errors import FootlightError

if TYPE_CHECKING:
    from exporter.why import JsonObject

WATCH_S: Final = 10.0


@click.command(short_help="Where the time of slow requests went.")
@click.option(
    "--duration",
    type=click.FloatRange(0, min_open=True),
    metavar="SECONDS",
    help="Watch for so long, then show.  [default: 10; with --follow and --request until Ctrl-C]",
)
@click.option("--follow", is_flag=True, help="Show each slow request when it ends, until Ctrl-C.")
@click.option("--request", type=click.IntRange(1), metavar="N", help="The path of request N, step by step.")
@click.option(
    "--steps",
    type=click.IntRange(0, 10_000),
    default=40,
    show_default=True,
    metavar="N",
    help="With --request: about so many lines, short steps share one. 0: every step.",
)
@click.option("--model", metavar="NAME", help="Only requests for this model.")
@click.option("--top", type=click.IntRange(1, 1000), metavar="N", help="The N slowest.  [default: 10; --json: all]")
@click.option("--all", "all_requests", is_flag=True, help="Also requests that are not slow.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per request, with its steps, one a line.")
@agent_or_url(level=logging.WARNING, reads=True)
def why(
    asked: Request | Url | Path,
    duration: float | None,
    follow: bool,
    request: int | None,
    steps: int,
    model: str | None,
    top: int | None,
    all_requests: bool,
    as_json: bool,
) -> int:
    """Show which part of the time to first token of slow requests was spent on what, and by which thread.

    Needs root, unless it asks a running agent with --url. A request is slow when it is over its objective or among
    the slowest of its window. Parts of a request's time add up to it.

    \b
    Causes:
      on_cpu      running                      memory       reclaiming memory
      run_queue   waiting for a CPU            network      waiting for the client's network
      cpu_quota   throttled by its cgroup      upstream     waiting for a server that it asked
      lock        waiting for another thread   gpu          waiting for the GPU
      disk        waiting for storage          sleep        asleep by its own timer
      stopped     by a signal or debugger      unexplained  none of these could be shown

    \b
    Examples:
      footlight why --port 8000
      footlight why --port 8000 --follow --model headliner
      footlight why --url http://127.0.0.1:9466 --request 1709
      footlight why --port 8000 --json > slow.jsonl; footlight why --read slow.jsonl --request 17
    """
    from exporter.why import Wanted, WhyFront, show

    if follow and (request is not None or not isinstance(asked, Request)):
        raise usage_error("--follow shows requests as they end", "--follow with a target, without --request")
    wanted = Wanted(as_json, model, top, all_requests, request, steps)
    if isinstance(asked, Request):
        from exporter import attacher

        until_interrupted = follow or request is not None
        front = WhyFront(
            wanted,
            duration_s=duration or (None if until_interrupted else WATCH_S),
            follow=follow,
            serves=asked.serves,
        )
        return attacher.run(
            asked.config,
            front,
            transport=asked.transport,
            wait_for_targets=asked.waits,
            source=asked.source,
        )
    if duration is not None:
        raise usage_error("--duration is for watching", "--duration with a target, without --url and --read")
    summary = wanted.summary()
    for told in _asked(asked) if isinstance(asked, Url) else _read(asked):
        if request is None or told["number"] == request:
            summary.add(told)
    show(summary, wanted, sys.stdout)
    return 0


def _asked(url: Url) -> Iterator[JsonObject]:
    """What a running agent knows of the slow requests and a sample of the others, of the last minutes."""
    yield from _objects(url.lines("/api/why"), url.base)


def _read(path: Path) -> Iterator[JsonObject]:
    if str(path) == "-":
        yield from _objects(sys.stdin.buffer, "stdin")
        return
    with path.open("rb") as file:
        yield from _objects(file, str(path))


def _objects(lines: Iterable[bytes], source: str) -> Iterator[JsonObject]:
    from exporter.why import check

    for number, line in enumerate(lines, 1):
        try:
            yield check(json.loads(line))
        except ValueError as error:
            raise FootlightError(
                f"line {number} of {source} is no request with a path: {error}", "what `footlight why --json` prints"
            ) from error
