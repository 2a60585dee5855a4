"""How soon somebody is told that requests became slow, by the agent itself and through Prometheus, and how often.

A real Prometheus (1 s intervals, the rules of `footlight slo rules`), real Alertmanagers and a receiver of webhooks.
Each trial is a model of its own, with 20 requests a second: first good ones, then slow ones. The clock starts when the
first of them has waited longer than the objective allows. "agent" is the Alertmanager that only the agent posts to,
"Prometheus" the one that only Prometheus does, "both" has both: how many words on the slowdown it let through.

Then incidents, at the same time: a service becomes slow for all of its models, dies, and starts again. Two
Alertmanagers run dashboards/alertmanager.yaml, one of them without its inhibition, and hear from both, Prometheus with
the ready-made rules as well. What their receivers get is counted, ends too, until the root cause is over and whatever
it silenced would have been told.
"""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import click
from rich.console import Group

from benchmarks.alerts.real import Receiver, Told, alertmanager, example, prometheus, rules
from benchmarks.alerts.traffic import Load
from benchmarks.common.agent import agent
from benchmarks.common.processes import ROOT, Server, ends_on_sigterm, server
from benchmarks.common.report import Bar, judge, nearest_rank, need_root, show, show_json, table

OBJECTIVE_S: Final = 0.3
GOOD_S: Final = 0.02
SLOW_S: Final = 1.0
RATE: Final = 20.0
BEFORE_S: Final = 2.0
PATIENCE_S: Final = 30.0
HEALTHY_S: Final = 40.0
ILL_S: Final = 3.0
DOWN_S: Final = 10.0
OVER_S: Final = 480.0
SETTLED_S: Final = 70.0
"""Longer than the example's group_interval."""
PROMISED_MS: Final = 860.0
FEWER: Final = 0.92
SERVICE: Final = "benchmarks.common.light_service"
TRIALS: Final = "trials"
MODELS: Final = tuple(f"model-{number}" for number in range(8))
OBJECTIVES: Final = (
    {"name": "first-token", "sli": "ttft", "below": f"{OBJECTIVE_S * 1000:.0f}ms", "target": "99%"},
    {"name": "whole-answer", "sli": "duration", "below": "800ms", "target": "99%"},
    {"name": "no-errors", "sli": "errors", "target": "99%"},
)
READY_MADE: Final = ROOT / "dashboards" / "rules" / "footlight.yaml"
GONE: Final = "FootlightServiceGone"


@dataclass(frozen=True, slots=True)
class Trial:
    """One slowdown. Times are in ms from the first request over the objective; NaN: nobody was told.

    `sent_ms` is the agent's, from when that request was sent. `words` is how often the Alertmanager spoke that heard
    from both.
    """

    model: str
    agent_ms: float
    sent_ms: float
    prometheus_ms: float
    words: int


@dataclass(frozen=True, slots=True)
class Incident:
    """A service that became slow, died and started again: what was told of it with and without inhibition.

    Notifications are those that came, whatever they say; alerts are those in them. `words` are the notifications with
    inhibition that say that something is wrong, `root_causes` those of them that say what.
    """

    service: str
    all_: int
    all_alerts: int
    inhibited: int
    inhibited_alerts: int
    words: int
    root_causes: int


def trial(model: str, port: int, receiver: Receiver) -> Trial:
    """Slow one model down, and wait until everybody was told."""
    burn = {"alertname": "ErrorBudgetBurn", "sloth_slo": "first-token", "model_name": model, "sloth_severity": "page"}
    with Load(port, [model], RATE, GOOD_S) as load:
        time.sleep(BEFORE_S)
        load.slow_down(SLOW_S)
        agents = receiver.wait("agent", PATIENCE_S, **burn)
        prometheus_s = receiver.wait("prometheus", PATIENCE_S, **burn)
        time.sleep(2)  # a second word would come within Alertmanager's group_interval, which is a second
    if load.first_slow_ns is None:
        raise click.ClickException("the service takes no requests")
    over_ns = load.first_slow_ns + round(OBJECTIVE_S * 1e9)

    def after_ms(at_ns: int | None, since_ns: int) -> float:
        return math.nan if at_ns is None else (at_ns - since_ns) / 1e6

    return Trial(
        model,
        after_ms(agents and agents.at_ns, over_ns),
        after_ms(agents and agents.at_ns, load.first_slow_ns),
        after_ms(prometheus_s and prometheus_s.at_ns, over_ns),
        len([each for each in receiver.told("both", **burn) if each.status == "firing"]),
    )


def command(service: str) -> tuple[str, ...]:
    """What starts a service, which the agent knows by it."""
    return (sys.executable, "-m", SERVICE, service)


def happen(stack: ExitStack, running: Mapping[str, Server], receiver: Receiver) -> list[Incident]:
    """Let services be slow for all their models, die, and start again. Takes until nothing of it is left to tell."""
    loads = {}
    for name, served in running.items():
        loads[name] = stack.enter_context(Load(served.port, MODELS, 5.0, GOOD_S))
    time.sleep(HEALTHY_S)
    for load in loads.values():
        load.slow_down(SLOW_S)
    time.sleep(ILL_S)
    for served in running.values():
        os.kill(served.pid, signal.SIGKILL)

    def wait(status: str, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        for name in running:
            for manager in ("inhibited", "all"):
                left_s = max(0.0, deadline - time.monotonic())
                if receiver.wait(manager, left_s, status, alertname=GONE, service_name=name) is None:
                    raise click.ClickException(f"{manager} did not tell within {seconds:.0f} s: {name} {status}")

    wait("firing", PATIENCE_S)
    time.sleep(DOWN_S)
    for name, load in loads.items():
        load.go_on(stack.enter_context(server(command(name))).port)
    wait("resolved", OVER_S)
    time.sleep(SETTLED_S)
    return [told(name, receiver) for name in running]


def told(service: str, receiver: Receiver) -> Incident:
    """Count what was told of a service until now."""

    def notifications(each: Iterable[Told]) -> int:
        return len({one.notification for one in each})

    def alerts(each: Iterable[Told]) -> int:
        return len({frozenset(one.labels.items()) for one in each})

    every, inhibited = (receiver.told(manager, service_name=service) for manager in ("all", "inhibited"))
    firing = [each for each in inhibited if each.status == "firing"]
    return Incident(
        service,
        notifications(every),
        alerts(every),
        notifications(inhibited),
        alerts(inhibited),
        notifications(firing),
        notifications(each for each in firing if each.labels["alertname"] == GONE),
    )


def measure(trials: int, incidents: int) -> tuple[list[Trial], list[Incident]]:
    """Make all of them, one after the other, with one agent and one Prometheus."""
    names = [TRIALS, *(f"incident-{number + 1}" for number in range(incidents))]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        receiver = stack.enter_context(Receiver())
        services = {name: stack.enter_context(server(command(name))) for name in names}
        urls = {}
        for name in ("agent", "prometheus", "both"):
            urls[name] = stack.enter_context(alertmanager(folder, name, receiver))
        for name, config in (("all", {**example(), "inhibit_rules": []}), ("inhibited", example())):
            urls[name] = stack.enter_context(alertmanager(folder, name, receiver, config=config))
        followed = [
            {"name": name, "match": {"cmdline": f"{SERVICE} {name}"}, "engine_metrics": "off"} for name in services
        ]
        file = folder / "footlight.yaml"
        file.write_text(
            json.dumps(
                {
                    "services": followed,
                    "slos": OBJECTIVES,
                    "alertmanagers": [{"url": url} for name, url in urls.items() if name != "prometheus"],
                }
            )
        )
        watching = stack.enter_context(agent("run", "--config", str(file)))
        theirs = [url for name, url in urls.items() if name != "agent"]
        made_rules = folder / "rules.yaml"
        made_rules.write_text(rules(file))
        target, instance = f"127.0.0.1:{watching.port}", socket.gethostname()
        stack.enter_context(prometheus(folder, target, instance, (made_rules, READY_MADE), theirs))
        time.sleep(2)
        made = [trial(f"trial-{number + 1}", services[TRIALS].port, receiver) for number in range(trials)]
        happened = happen(stack, {name: services[name] for name in names[1:]}, receiver) if incidents else []
        failures = watching.scrape().total("footlight_alert_notification_failures_total")
        if failures:
            raise click.ClickException(f"{failures:.0f} posts to Alertmanagers failed:\n{watching.log()}")
    return made, happened


def bars(trials: Sequence[Trial], incidents: Sequence[Incident]) -> Iterator[Bar]:
    """What was promised."""
    yield Bar("agent: p95 to the webhook", p95([each.agent_ms for each in trials]), PROMISED_MS, " ms")
    yield Bar("slowdowns told of more or less than once", sum(each.words != 1 for each in trials), 0)
    yield Bar("incidents told of more or less than once", sum(each.words != 1 for each in incidents), 0)
    yield Bar("incidents without their root cause", sum(each.root_causes != 1 for each in incidents), 0)
    if incidents:
        # How many alerts are one notification, and how often it is said again, is the example's grouping and chance:
        # the second bar tells what inhibition does by itself.
        yield Bar("fewer notifications", fewer_notifications(incidents), FEWER, at_least=True)
        yield Bar("fewer alerts told", fewer_alerts(incidents), FEWER, at_least=True)


def p95(values: Sequence[float]) -> float:
    """The 95th percentile; NaN where one of them is."""
    return math.nan if any(map(math.isnan, values)) else nearest_rank(values, 0.95)


def fewer_alerts(incidents: Sequence[Incident]) -> float:
    """The share of alerts that inhibition spares."""
    return 1 - sum(each.inhibited_alerts for each in incidents) / max(1, sum(each.all_alerts for each in incidents))


def fewer_notifications(incidents: Sequence[Incident]) -> float:
    """The same of notifications."""
    return 1 - sum(each.inhibited for each in incidents) / max(1, sum(each.all_ for each in incidents))


def tables(trials: Sequence[Trial], incidents: Sequence[Incident]) -> Iterator[Group]:
    """For people."""
    columns = (
        ("agent, from its first request over the objective", [each.agent_ms for each in trials]),
        ("agent, from when that request was sent", [each.sent_ms for each in trials]),
        ("Prometheus at 1 s intervals, from that first one", [each.prometheus_ms for each in trials]),
    )
    yield table(
        f"from the first request over the objective to the webhook, {len(trials)} trials, ms",
        ("", "least", "median", "p95", "most"),
        [
            (what, *(f"{each:.0f}" for each in (min(values), nearest_rank(values, 0.5), p95(values), max(values))))
            for what, values in columns
        ],
        notes=f"Told by both to one Alertmanager: {sum(each.words for each in trials)} notifications "
        f"of {len(trials)} slowdowns.",
    )
    if incidents:
        yield table(
            "notifications of an incident: a service becomes slow for 8 models, dies, and starts again",
            ("incident", "without inhibition", "alerts", "with it", "alerts", "fewer", "fewer alerts"),
            [
                *(_row(each.service, [each]) for each in incidents),
                _row("all", incidents),
            ],
            notes="Alerts are those in the notifications, each counted once. Ends are notifications, too.",
        )


def _row(name: str, incidents: Sequence[Incident]) -> tuple[str, ...]:
    counts = (
        sum(each.all_ for each in incidents),
        sum(each.all_alerts for each in incidents),
        sum(each.inhibited for each in incidents),
        sum(each.inhibited_alerts for each in incidents),
    )
    return (name, *map(str, counts), f"{fewer_notifications(incidents):.0%}", f"{fewer_alerts(incidents):.0%}")


@click.command(help=__doc__)
@click.option("--trials", default=20, show_default=True, help="Slowdowns, each of a model of its own; at most 60.")
@click.option(
    "--incidents",
    type=click.IntRange(0, 9),
    default=3,
    show_default=True,
    help="Services that become slow, die and start again.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object for each of them on stdout.")
def main(trials: int, incidents: int, as_json: bool) -> None:
    need_root()
    ends_on_sigterm()
    made, happened = measure(trials, incidents)
    if as_json:
        show_json(asdict(each) for each in (*made, *happened))
    else:
        show(tables(made, happened))
    judge(list(bars(made, happened)))


if __name__ == "__main__":
    main()
