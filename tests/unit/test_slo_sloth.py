"""Files in Sloth's format: what is taken from them, and that everything else is refused with its place."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from exporter.cli import main
from exporter.slo.model import AlertStyle, Events, Measure, Ratio
from exporter.slo.output import rule_file
from exporter.slo.rules import groups
from exporter.slo.sloth import parse
from probes.errors import ConfigError

FILE = """\
version: prometheus/v1
service: checkout
labels: {owner: payments}
slos:
  - name: availability
    objective: 99.9
    description: |
      Answers
      without 5xx.
    labels: {tier: "1"}
    sli:
      events:
        error_query: sum(rate(http_requests_total{job="checkout", code=~"5.."}[{{.window}}]))
        total_query: |
          sum(
            rate(http_requests_total{job="checkout"}[{{ .window }}])
          )
    alerting:
      name: CheckoutDown
      labels: {team: a}
      annotations: {runbook: "https://example.org/checkout"}
      page_alert: {labels: {severity: pager}}
      ticket_alert: {disable: true}
  - name: raw
    objective: 95
    sli: {raw: {error_ratio_query: 'job:errors:ratio{window="{{.window}}"}'}}
    alerting: {}
"""


def test_what_a_file_says() -> None:
    first, second = parse(FILE)
    assert (first.id, first.target, first.window_s) == ("checkout-availability", Decimal("0.999"), 30 * 86400)
    assert first.sli == Events(
        'sum(rate(http_requests_total{job="checkout", code=~"5.."}[{{.window}}]))',
        'sum(\n  rate(http_requests_total{job="checkout"}[{{.window}}])\n)',
        Measure.UNITLESS,
    )
    assert first.labels == {"owner": "payments", "tier": "1"}
    assert first.alert_name == "CheckoutDown"
    assert first.sentence == "Answers without 5xx."
    notes = {"runbook": "https://example.org/checkout"}
    assert first.page == AlertStyle(True, {"team": "a", "severity": "pager"}, notes)
    assert first.ticket == AlertStyle(False, {"team": "a"}, notes)
    assert second.sli == Ratio('job:errors:ratio{window="{{.window}}"}')
    assert (second.target, second.labels) == (Decimal("0.95"), {"owner": "payments"})


def test_its_rules() -> None:
    text = rule_file(groups(parse(FILE), "1"))
    found = {group["name"]: group["rules"] for group in yaml.safe_load(text)["groups"]}
    records = {each.get("record"): each for each in found["sloth-slo-sli-recordings-checkout-availability"]}
    # A query that finds no error gives nothing: that is none of all.
    assert records["slo:sli_error:rate5m"]["expr"].endswith(
        ')\nor\n(\n  sum(\n    rate(http_requests_total{job="checkout"}[5m])\n  )\n) * 0'
    )
    assert "sum_over_time(slo:sli_total:rate1h{" in records["slo:sli_total:rate30d"]["expr"]
    assert records["slo:sli_total:rate5m"]["labels"]["owner"] == "payments"
    alerts = found["sloth-slo-alerts-checkout-availability"]
    assert [each["alert"] for each in alerts] == ["CheckoutDown", "SLOMetricAbsent"]
    assert alerts[0]["labels"]["severity"] == "pager"
    # What its queries count is not known, so neither is how many events there were.
    assert ">=" not in alerts[0]["expr"]
    raw = {each["record"]: each["expr"] for each in found["sloth-slo-sli-recordings-checkout-raw"]}
    assert raw["slo:sli_error:ratio_rate30d"] == 'job:errors:ratio{window="30d"}'
    assert "{{" not in str(raw)


@pytest.mark.parametrize(
    ("old", "new", "line", "what"),
    [
        ("prometheus/v1", "prometheus/v2", 1, "version: 'prometheus/v2' is not a version that is read"),
        ("version: prometheus/v1", "kind: PrometheusServiceLevel", 1, "this is an object of Kubernetes"),
        ("service: checkout", "service: a/b", 2, "service: 'a/b' is not a name"),
        ("service: checkout", "services: checkout", 2, "unknown key 'services'"),
        ("owner: payments", "sloth_id: x", 3, "labels.sloth_id: the label 'sloth_id' is taken"),
        ("owner: payments", '"a-b": x', 3, "labels.a-b: 'a-b' is not a label name"),
        ("objective: 99.9", "objective: 100", 6, "slos[0].objective: must be a percentage between 0 and 100"),
        ("objective: 99.9", "objective: 99,9", 6, "must be a percentage"),
        ("objective: 99.9", "objective: 0", 6, "must be a percentage"),
        ("objective: 99.9", "objective: 1e1", 6, "must be a percentage"),
        ("name: raw", "name: availability", 24, "slos[1]: there is another objective with the id 'checkout-avail"),
        ("    sli:\n      events:", "    sli:\n      event:", 12, "unknown key 'event'"),
        ("error_query: sum", "error_querry: sum", 13, "slos[0].sli.events: unknown key 'error_querry'"),
        ("raw: {error_ratio_query", "plugin: {id", 26, "plugins are programs of Sloth's"),
        ('"{{.window}}"', '"5m"', 26, "slos[1].sli.raw.error_ratio_query: has no window"),
        ('"{{.window}}"', '"{{.window}}{{.service}}"', 26, "'{{.service}}' is not filled in"),
        ('"{{.window}}"', '"5m"} # {{.window}}', 26, "slos[1].sli.raw.error_ratio_query: has no window"),
        ("error_query: sum(", "error_query: '' #", 13, "slos[0].sli.events.error_query: is not a query"),
        ("error_query: sum(", "error_query: sum", 13, "error_query: ')' closes no bracket"),
        ("error_query: sum(", "error_query: sum((", 13, "error_query: '(' is not closed"),
        ("[{{.window}}]))", "[{{.window}}))", 13, "error_query: '[' is closed by ')'"),
        ('=~"5.."}', '=~"5..}', 13, "error_query: the string that begins with '\"5..}[{{.window}}]))' has no end"),
        ("          sum(\n", "          sum((\n", 14, "slos[0].sli.events.total_query: '(' is not closed"),
        ("alerting: {}", "alerting: {page_alert: {disabled: true}}", 27, "unknown key 'disabled'"),
        ("disable: true", "disable: maybe", 23, "disable: must be on or off"),
        ("alerting: {}", "labels: {}", 24, "the key 'alerting' is missing"),
        ("version: prometheus/v1\n", "version: !x prometheus/v1\n", 1, "a YAML tag"),
    ],
)
def test_what_is_refused_is_named(old: str, new: str, line: int, what: str) -> None:
    assert old in FILE
    with pytest.raises(ConfigError) as caught:
        parse(FILE.replace(old, new), "checkout.yaml")
    assert (caught.value.path, caught.value.line) == ("checkout.yaml", line)
    assert what in caught.value.what
    assert caught.value.next_step


@pytest.mark.parametrize(
    "query",
    [
        'a{b="]\\"}"}[{{.window}}]',
        "a{b=']\\'}\"'}[{{.window}}]",
        "a{b=`]\\`}[{{.window}}]",
        "a[{{.window}}] # :)\n/ b",
        "a[{{.window}}] # it's",
        'a{b="#"}[{{ .window }}]',
    ],
)
def test_brackets_in_strings_and_comments_are_text(query: str) -> None:
    (_, raw) = parse(FILE.replace("'job:errors:ratio{window=\"{{.window}}\"}'", json.dumps(query)))
    assert raw.sli == Ratio(query.replace("{{ .window }}", "{{.window}}"))


SECOND = FILE.replace("service: checkout", "service: cart").replace("name: raw", "name: filled")


def test_every_document_of_a_file_is_read() -> None:
    text = f"# Two services.\n---\n{FILE}---\n\n--- # the other\n{SECOND}---\n# no more\n"
    assert [each.id for each in parse(text)] == [
        *("checkout-availability", "checkout-raw", "cart-availability", "cart-filled"),
    ]


@pytest.mark.parametrize(
    ("second", "line", "what"),
    [
        (SECOND.replace("alerting: {}", "labels: {}"), 52, "slos[1]: the key 'alerting' is missing"),
        (SECOND.replace("objective: 95", "\tobjective: 95"), 53, "a tab stands where YAML wants spaces"),
        (FILE, 33, "slos[0]: there is another objective with the id 'checkout-availability'"),
        ("kind: PrometheusServiceLevel\n", 29, "this is an object of Kubernetes"),
        (SECOND.replace("version: prometheus/v1\n", ""), 29, "the key 'version' is missing"),
    ],
)
def test_errors_of_a_later_document_have_the_line_of_the_file(second: str, line: int, what: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(f"{FILE}---\n{second}", "checkout.yaml")
    assert (caught.value.path, caught.value.line) == ("checkout.yaml", line)
    assert what in caught.value.what


def test_a_file_without_a_document_is_refused() -> None:
    for text in ("", "---\n# nothing\n---\n"):
        with pytest.raises(ConfigError, match="is empty") as caught:
            parse(text, "checkout.yaml")
        assert "version: prometheus/v1" in caught.value.next_step


def test_braces_in_a_description_are_no_template() -> None:
    (first, _) = parse(FILE.replace("without 5xx.", "without {{ 5xx }}."))
    alerts = next(group for group in groups([first], "1") if "alerts" in group.name)
    for alert in alerts.rules:
        assert '(Answers without {{ "{{" }} 5xx }}.)' in alert.annotations["description"]


def test_no_alert_is_made_where_both_are_disabled() -> None:
    off = FILE.replace("alerting: {}", "alerting: {page_alert: {disable: true}, ticket_alert: {disable: true}}")
    names = [group.name for group in groups(parse(off), "1")]
    assert "sloth-slo-alerts-checkout-availability" in names
    assert "sloth-slo-alerts-checkout-raw" not in names
    assert "sloth-slo-meta-recordings-checkout-raw" in names


def test_there_is_nothing_to_test_for_sloth(tmp_path: Path) -> None:
    sloth, rules, tests = tmp_path / "checkout.yaml", tmp_path / "slos.yaml", tmp_path / "slos_test.yaml"
    sloth.write_text(FILE)
    done = CliRunner().invoke(main, ["slo", "rules", "--sloth", str(sloth), "-o", str(rules), "--tests", str(tests)])
    assert done.exit_code == 0
    assert done.stderr == f"{tests} has no tests: they are made for the objectives of --config, not for Sloth's\n"
    assert yaml.safe_load(tests.read_text())["tests"] == []
    assert rules.exists()


def test_objectives_of_both_kinds_go_into_one_file(tmp_path: Path) -> None:
    config, sloth = tmp_path / "footlight.yaml", tmp_path / "checkout.yaml"
    config.write_text(
        "services: [{name: checkout, match: {port: 80}}]\nslos: [{name: fast, sli: ttft, below: 1s, target: 99%}]\n"
    )
    sloth.write_text(FILE)
    command = ["slo", "rules", "--config", str(config), "--sloth", str(sloth)]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0
    assert len(yaml.safe_load(result.stdout)["groups"]) == 3 * 3 + 1
    alone = CliRunner().invoke(main, ["slo", "rules", "--sloth", str(sloth)])
    assert len(yaml.safe_load(alone.stdout)["groups"]) == 2 * 3
    config.write_text(config.read_text().replace("name: fast", "name: raw"))
    clash = CliRunner().invoke(main, command)
    assert clash.exit_code == 4
    assert f"{sloth}:24: slos[1]: there is another objective with the id 'checkout-raw'" in clash.stderr
