"""How soon somebody is told that requests became slow, by the agent itself and through Prometheus, and how often.

A real Prometheus (1 s intervals, the rules of `footlight slo rules`), real Alertmanagers and a receiver of webhooks.
Each trial is a model of its own, with 20 requests a second: first good ones, then slow ones. The clock starts when the
first of them has waited longer than the objective allows. "agent" is the Alertmanager that only the agent posts to,
"Prometheus" the one that only Prometheus does, "both" has both: how many words on the slowdown it let through.

Then incidents: a service becomes slow for all of its models, and dies. Every Alertmanager hears from both; only one
has the inhibition of dashboards/alertmanager.yaml. The root cause is known seconds after its consequences, so both wait
before they speak.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import click
import yaml
from rich.console import Group

from benchmarks.alerts.real import Receiver, alertmanager, prometheus, rules
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
GROUP_WAIT: Final = "10s"
SETTLED_S: Final = 8.0
PROMISED_MS: Final = 860.0
FEWER: Final = 0.92
SERVICE: Final = (sys.executable, "-m", "benchmarks.common.light_service")
TRIALS: Final = "trials"
MODELS: Final = tuple(f"model-{number}" for number in range(8))
OBJECTIVES: Final = (
    {"name": "first-token", "sli": "ttft", "below": f"{OBJECTIVE_S * 1000:.0f}ms", "target": "99%"},
    {"name": "whole-answer", "sli": "duration", "below": "800ms", "target": "99%"},
    {"name": "no-errors", "sli": "errors", "target": "99%"},
)
INHIBIT: Final = ROOT / "dashboards" / "alertmanager.yaml"


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
    """A service that became slow and died: what the receiver was told of with and without inhibition."""

    service: str
    all_: int
    inhibited: int
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


def incident(service: str, served: Server, receiver: Receiver) -> Incident:
    """Let a service be slow for all its models, and die."""
    with Load(served.port, MODELS, 5.0, GOOD_S) as load:
        time.sleep(BEFORE_S)
        load.slow_down(SLOW_S)
        time.sleep(3)
        os.kill(served.pid, signal.SIGKILL)
        receiver.wait("inhibited", PATIENCE_S, alertname="FootlightServiceGone", service_name=service)
        receiver.wait("all", PATIENCE_S, alertname="FootlightServiceGone", service_name=service)
        time.sleep(SETTLED_S)

    def firing(name: str, **labels: str) -> int:
        told = receiver.told(name, service_name=service, **labels)
        return len([each for each in told if each.status == "firing"])

    return Incident(service, firing("all"), firing("inhibited"), firing("inhibited", alertname="FootlightServiceGone"))


def measure(trials: int, incidents: int) -> tuple[list[Trial], list[Incident]]:
    """Make all of them, one after the other, with one agent and one Prometheus."""
    names = [TRIALS, *(f"incident-{number + 1}" for number in range(incidents))]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        receiver = stack.enter_context(Receiver())
        services = {name: stack.enter_context(server(SERVICE)) for name in names}
        urls = {}
        for name in ("agent", "prometheus", "both"):
            urls[name] = stack.enter_context(alertmanager(folder, name, receiver))
        for name, inhibit in (("all", ()), ("inhibited", yaml.safe_load(INHIBIT.read_text())["inhibit_rules"])):
            urls[name] = stack.enter_context(
                alertmanager(folder, name, receiver, group_wait=GROUP_WAIT, inhibit=inhibit)
            )
        followed = [
            {"name": name, "match": {"port": each.port}, "engine_metrics": "off"} for name, each in services.items()
        ]
        config = folder / "footlight.yaml"
        config.write_text(
            json.dumps(
                {
                    "services": followed,
                    "slos": OBJECTIVES,
                    "alertmanagers": [{"url": url} for name, url in urls.items() if name != "prometheus"],
                }
            )
        )
        watching = stack.enter_context(agent("run", "--config", str(config)))
        theirs = [url for name, url in urls.items() if name != "agent"]
        stack.enter_context(prometheus(folder, f"127.0.0.1:{watching.port}", rules(config), theirs))
        time.sleep(2)
        made = [trial(f"trial-{number + 1}", services[TRIALS].port, receiver) for number in range(trials)]
        happened = [incident(name, services[name], receiver) for name in names[1:]]
        failures = watching.scrape().total("footlight_alert_notification_failures_total")
        if failures:
            raise click.ClickException(f"{failures:.0f} posts to Alertmanagers failed:\n{watching.log()}")
    return made, happened


def bars(trials: Sequence[Trial], incidents: Sequence[Incident]) -> Iterator[Bar]:
    """What was promised."""
    yield Bar("agent: p95 to the webhook", p95([each.agent_ms for each in trials]), PROMISED_MS, " ms")
    yield Bar("slowdowns told of more or less than once", sum(each.words != 1 for each in trials), 0)
    yield Bar("incidents told of more or less than once", sum(each.inhibited != 1 for each in incidents), 0)
    yield Bar("incidents without their root cause", sum(each.root_causes != 1 for each in incidents), 0)
    if incidents:
        yield Bar("fewer notifications", fewer(incidents), FEWER, at_least=True)


def p95(values: Sequence[float]) -> float:
    """The 95th percentile; NaN where one of them is."""
    return math.nan if any(map(math.isnan, values)) else nearest_rank(values, 0.95)


def fewer(incidents: Sequence[Incident]) -> float:
    """The share of notifications that inhibition spares."""
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
            "notifications of an incident: a service that becomes slow for 8 models and dies",
            ("incident", "without inhibition", "with it", "fewer"),
            [
                *((each.service, str(each.all_), str(each.inhibited), f"{fewer([each]):.0%}") for each in incidents),
                (
                    "all",
                    str(sum(each.all_ for each in incidents)),
                    str(sum(each.inhibited for each in incidents)),
                    f"{fewer(incidents):.0%}",
                ),
            ],
        )


@click.command(help=__doc__)
@click.option("--trials", default=20, show_default=True, help="Slowdowns, each of a model of its own; at most 60.")
@click.option("--incidents", default=3, show_default=True, help="Services that become slow and die.")
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
