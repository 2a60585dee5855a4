"""Files in Sloth's format: what is taken from them, and that everything else is refused with its place."""

from __future__ import annotations

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
        ("name: raw", "name: availability", 24, "slos[1]: the name 'availability' is given twice"),
        ("    sli:\n      events:", "    sli:\n      event:", 12, "unknown key 'event'"),
        ("error_query: sum", "error_querry: sum", 13, "slos[0].sli.events: unknown key 'error_querry'"),
        ("raw: {error_ratio_query", "plugin: {id", 26, "plugins are programs of Sloth's"),
        ('"{{.window}}"', '"5m"', 26, "slos[1].sli.raw.error_ratio_query: has no window"),
        ('"{{.window}}"', '"{{.window}}{{.service}}"', 26, "'{{.service}}' is not filled in"),
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
    assert "there is another objective with the id 'checkout-raw'" in clash.stderr
