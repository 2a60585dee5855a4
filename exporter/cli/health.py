"""`footlight health`: what is normal for each service, and what is not, by a running agent."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any, Final

import click

from exporter.cli.asking import Url, running_agent
from probes.errors import FootlightError

_MOST_BYTES: Final = 64 << 20
_SHOWN_EVENTS: Final = 10


@click.command(short_help="What is normal for each service, and what is not.")
@running_agent
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object: services with their signals, and events.")
@click.option("--check", is_flag=True, help="Exit with 1 when something is not normal now.")
def health(agent: Url, as_json: bool, check: bool) -> int:
    """Show each signal of each service: its value, its median of five minutes, and how far it is above it.

    Sigmas are robust standard deviations; at 3, held for some seconds, a signal is anomalous. `-` is what was not
    measured, or of too few events; before two and a half minutes nothing is known. docs/health.md says what is watched.

    \b
    Examples:
      footlight health
      footlight health --url http://10.0.0.7:9466 --check && echo fine
    """
    try:
        told = json.loads(agent.read("/api/live", _MOST_BYTES))["health"]
        bad = any(signal["anomalous"] for service in told["services"] for signal in service["signals"])
    except (ValueError, KeyError, TypeError) as error:
        step = "an agent of this version: footlight run"
        raise FootlightError(f"{agent.base} tells nothing of health", step) from error
    if as_json:
        click.echo(json.dumps(told, ensure_ascii=False))
    else:
        for line in lines(told):
            sys.stdout.write(f"{line}\n")
    return int(check and bad)


def lines(told: dict[str, Any]) -> Iterator[str]:
    """The table and the last events, for people."""
    yield f"{'service':<20} {'signal':<16} {'now':>12} {'normal':>12} {'sigmas':>7}"
    for service in told["services"]:
        for signal in service["signals"]:
            now, normal = (amount(signal[key], signal["unit"]) for key in ("value", "normal"))
            sigmas = "-" if signal["sigmas"] is None else f"{signal['sigmas']:.1f}"
            mark = "  not normal" if signal["anomalous"] else ""
            yield f"{service['service']:<20} {signal['signal']:<16} {now:>12} {normal:>12} {sigmas:>7}{mark}"
    for index, event in enumerate(told["events"][:_SHOWN_EVENTS]):
        if not index:
            yield ""
        what, value = event["what"].replace("_", " "), amount(event["value"], event["unit"])
        yield f"{event['time'][:19]}Z  {event['service']}  {event['signal']}  {what}  {value}"


def amount(value: float | None, unit: str) -> str:
    """A value for people; `-` is none."""
    if value is None:
        return "-"
    if unit == "bytes":
        return f"{value / 2**20:,.0f} MiB"
    if unit == "seconds":
        return f"{value * 1000:,.3g} ms"
    if unit == "ratio":
        return f"{value:.1%}"
    return f"{value:,.3g}"
