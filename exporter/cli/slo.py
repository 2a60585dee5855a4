"""`footlight slo`: objectives as rules for Prometheus, and how they stand."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from exporter import VERSION
from exporter.cli import usage_error
from exporter.cli.asking import Url, running_agent
from probes.errors import ConfigError, FootlightError

if TYPE_CHECKING:
    from exporter.slo.model import Objective
    from exporter.slo.native import Native
    from exporter.slo.rules import Group

_LABEL: Final = re.compile(
    r"[A-Za-z0-9]([A-Za-z0-9._/-]{0,251}[A-Za-z0-9])?=([A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?)?"
)
_OBJECT_NAME: Final = re.compile(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?")
_MANY: Final = 1_000_000
_MOST_BYTES: Final = 256 << 20


@click.group(short_help="Objectives: rules and alerts for Prometheus, and how they stand.")
def slo() -> None:
    """Turn the objectives of a configuration into rules for Prometheus, and ask an agent how they stand.

    \b
    Examples:
      footlight slo rules --config footlight.yaml --output slos.yaml --tests slos_test.yaml
      promtool test rules slos_test.yaml
      footlight slo status --url http://127.0.0.1:9466
    """


@slo.command(short_help="Recording and alerting rules, and tests for them.")
@click.option("--config", type=click.Path(path_type=Path), metavar="FILE", help="Objectives of this configuration.")
@click.option(
    "--sloth",
    type=click.Path(path_type=Path),
    metavar="FILE",
    multiple=True,
    help="Objectives of this file in Sloth's format prometheus/v1, too. May be given several times.",
)
@click.option(
    "--format",
    "form",
    type=click.Choice(["rules", "prometheusrule"]),
    default="rules",
    show_default=True,
    help="A file for Prometheus's rule_files, or an object for the Prometheus operator.",
)
@click.option("--name", default="footlight-slos", show_default=True, help="Name of the PrometheusRule.")
@click.option("--namespace", metavar="NAME", help="Namespace of the PrometheusRule.  [default: none is written]")
@click.option("--label", "labels", metavar="NAME=VALUE", multiple=True, help="A label of the PrometheusRule.")
@click.option(
    "--minimum-events",
    type=click.IntRange(1, _MANY),
    default=20,
    show_default=True,
    metavar="N",
    help="An alert wants so many events in its long window, and in any case so many that a single bad one is no alert.",
)
@click.option("--output", "-o", type=click.Path(path_type=Path), metavar="FILE", help="Write it here, not to stdout.")
@click.option(
    "--tests",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write a file for `promtool test rules`, too: what the rules do to traffic that is made for them.",
)
def rules(
    config: Path | None,
    sloth: Sequence[Path],
    form: str,
    name: str,
    namespace: str | None,
    labels: Sequence[str],
    minimum_events: int,
    output: Path | None,
    tests: Path | None,
) -> int:
    """Print recording and alerting rules for objectives, under the names that Sloth's have.

    The same objectives give the same text. Nothing is written before everything was read. Exits with 4 when an
    objective is wrong.

    \b
    Examples:
      footlight slo rules --config footlight.yaml
      footlight slo rules --config footlight.yaml --sloth checkout.yaml -o slos.yaml --tests slos_test.yaml
      footlight slo rules --config footlight.yaml --format prometheusrule --namespace monitoring --label release=prom
    """
    from exporter.slo.output import prometheus_rule, rule_file
    from exporter.slo.promtool_tests import file_of_tests
    from exporter.slo.rules import groups, well_known

    if config is None and not sloth:
        raise usage_error("no objectives are named", "footlight slo rules --config FILE, or --sloth FILE")
    if tests is not None and (output is None or form != "rules"):
        raise usage_error("--tests are about a rule file", "add --output FILE, and leave --format out")
    if form == "rules" and (namespace is not None or labels):
        raise usage_error("--namespace and --label are for an object", "add --format prometheusrule")
    metadata = _metadata(name, namespace, labels)
    natives, others = _objectives(config, sloth)
    made: list[Group] = groups([*(each.objective for each in natives), *others], VERSION, minimum_events)
    if natives:
        made.append(well_known())
    text = rule_file(made) if form == "rules" else prometheus_rule(made, name, namespace, metadata)
    if output is None:
        click.echo(text, nl=False)
        return 0
    _write(output, text)
    if tests is not None:
        _write(tests, file_of_tests(natives, made, os.path.relpath(output, tests.parent)))
        if not natives:
            told = "has no tests: they are made for the objectives of --config, not for Sloth's"
            click.echo(f"{tests} {told}", err=True)
    return 0


def _metadata(name: str, namespace: str | None, labels: Sequence[str]) -> dict[str, str]:
    for text in filter(None, (name, namespace)):
        if not _OBJECT_NAME.fullmatch(text):
            raise usage_error(f"{text!r} is not a name in Kubernetes", "use a-z 0-9 . -")
    found = {}
    for label in labels:
        if not _LABEL.fullmatch(label):
            raise usage_error(f"{label!r} is not a label", "--label release=prometheus")
        key, _, value = label.partition("=")
        found[key] = value
    return found


def _objectives(config: Path | None, sloth: Sequence[Path]) -> tuple[list[Native], list[Objective]]:
    from exporter import config as configuration
    from exporter.slo import sloth as sloth_files
    from exporter.slo.native import natives

    ours: list[Native] = []
    if config is not None:
        wanted = configuration.load(config)
        if not wanted.slos:
            raise ConfigError("there are no objectives", "list them under slos", str(config))
        ours = natives(wanted)
    theirs: list[Objective] = []
    for path in sloth:
        theirs += sloth_files.load(path, {each.id for each in (*(native.objective for native in ours), *theirs)})
    return ours, theirs


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise FootlightError(
            f"cannot write {path}: {error.strerror}", "name a file in a folder that is there"
        ) from error


@slo.command(short_help="How the objectives stand, by a running agent.")
@running_agent
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per objective and model, one a line.")
@click.option("--check", is_flag=True, help="Exit with 1 when an error budget is used up or burns fast.")
def status(agent: Url, as_json: bool, check: bool) -> int:
    """Show each objective by service and model: events, burn rates, and what is left of the error budget.

    It is what one agent has counted since it started; for the whole period and all nodes ask Prometheus for what
    `footlight slo rules` records. A burn rate of 1 uses up the budget in exactly the objective's window; `-` is what
    the agent has not run long enough for, or had no event for. With --check fast is as for an alert: 14.4 over 5
    minutes and an hour, or 6 over 30 minutes and 6 hours.

    \b
    Examples:
      footlight slo status
      footlight slo status --url http://10.0.0.7:9466 --check && echo fine
    """
    from exporter.slo.standing import read, show

    told = read(agent.read("/metrics", _MOST_BYTES).decode("utf-8", "replace"))
    if as_json:
        for each in told:
            click.echo(json.dumps(each.as_json(), ensure_ascii=False))
    else:
        show(told, sys.stdout)
    return int(check and any(each.is_bad for each in told))
