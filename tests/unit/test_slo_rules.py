"""Rules of objectives: names and labels, what is left out, the same text each time, and only metrics that there are."""

from __future__ import annotations

import re
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from exporter.cli import main
from exporter.config import Config, parse
from exporter.metrics import Metrics
from exporter.slis import Slis
from exporter.slo.model import quoted
from exporter.slo.native import natives
from exporter.slo.output import rule_file
from exporter.slo.promtool_tests import STORIES, file_of_tests
from exporter.slo.rules import PAGE, TICKET, groups, least_events, number, possible, well_known

CONFIG = """\
services:
  - {name: roleplay, match: {port: 80}}
  - {name: b, match: {port: 81}}
slos:
  - {name: fast, sli: ttft, below: 300ms, target: 99%}
  - {name: one-second, sli: ttft, below: 1s, target: 99%, window: 7d, service: b, model_name: 'a"b'}
  - {name: answers, sli: errors, target: 99.5%, service: b}
  - {name: stays, sli: aborts, target: 97%, service: b}
  - {name: cache, sli: kv_cache_hit_ratio, at_least: 60%, service: b}
  - {name: speed, sli: decode_tokens_per_second, at_least: 30, target: 95%, service: b}
  - {name: queue, sli: kernel_run_queue_wait_seconds, below: 8.192ms, target: 99.9%, service: b}
  - {name: files, sli: kernel_open_files, below: 1000, target: 99%, service: b}
  - {name: cool, sli: gpu_temperature_celsius, below: 85, target: 99%}
  - {name: busy, sli: gpu_utilization_ratio, at_least: 5%, target: 50%}
"""
SLOTH_NAMES = {
    *(f"slo:sli_error:ratio_rate{window}" for window in ("5m", "30m", "1h", "2h", "6h", "1d", "3d", "30d")),
    *("slo:objective:ratio", "slo:error_budget:ratio", "slo:time_period:days", "slo:current_burn_rate:ratio"),
    *("slo:period_burn_rate:ratio", "slo:period_error_budget_remaining:ratio", "sloth_slo_info"),
}
BY, B, LE = "sum by (service_name, model_name)", '{service_name="b"}', '{service_name="b", le="0.3"}'
EACH = '"sloth_id", "%s:$1", "model_name", "(.*)"'


def rules_of(config: Config, fewest: int = 20) -> dict[str, list[dict[str, Any]]]:
    text = rule_file(groups([each.objective for each in natives(config)], "1.2.3", fewest))
    return {group["name"]: group["rules"] for group in yaml.safe_load(text)["groups"]}


def find(rules: list[dict[str, Any]], name: str) -> dict[str, Any]:
    (rule,) = [each for each in rules if each.get("record") == name]
    return rule


def alert(slo: str, severity: str) -> dict[str, Any] | None:
    found = [
        each
        for name, rules in rules_of(parse(CONFIG)).items()
        if name.endswith(f"-{slo}")
        for each in rules
        if each.get("alert") == "ErrorBudgetBurn" and each["labels"]["sloth_severity"] == severity
    ]
    return found[0] if found else None


def flat(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("( ", "(").replace(" )", ")")


def test_the_names_and_labels_are_those_of_sloth() -> None:
    found = rules_of(parse(CONFIG))
    names = [f"sloth-slo-{part}-b-fast" for part in ("sli-recordings", "meta-recordings", "alerts")]
    assert [name for name in found if name.endswith("-b-fast")] == names
    records = {each["record"]: each["labels"] for name in names for each in found[name] if "record" in each}
    assert records.keys() >= SLOTH_NAMES
    both = {"sloth_service": "b", "sloth_slo": "fast"}  # each model has a sloth_id of its own, by the expression
    assert records["slo:sli_error:ratio_rate30d"] == {**both, "sloth_window": "30d"}
    assert records["slo:objective:ratio"] == both
    assert records["sloth_slo_info"] == {
        **both,
        "sloth_mode": "cli-gen-prom",
        "sloth_objective": "99",
        "sloth_spec": "footlight/v1",
        "sloth_version": "1.2.3",
    }


@pytest.mark.parametrize("slo", ["b-one-second", "b-files", "host-cool"])
def test_what_is_not_for_each_model_has_the_plain_id(slo: str) -> None:
    found = rules_of(parse(CONFIG))
    rules = [*found[f"sloth-slo-sli-recordings-{slo}"], *found[f"sloth-slo-meta-recordings-{slo}"]]
    assert {rule["labels"]["sloth_id"] for rule in rules} == {slo}
    assert "label_replace" not in str(rules)


def test_the_period_is_a_quotient_of_sums() -> None:
    rules = rules_of(parse(CONFIG))["sloth-slo-sli-recordings-roleplay-fast"]
    these = '{sloth_service="roleplay", sloth_slo="fast"}'
    for name in ("error", "total"):
        expr = find(rules, f"slo:sli_{name}:increase30d")["expr"]
        assert expr == f"sum_over_time(slo:sli_{name}:increase1h{these}[30d:5m]) / 12"
    ratio = find(rules, "slo:sli_error:ratio_rate30d")["expr"]
    assert flat(ratio) == f"slo:sli_error:increase30d{these} / (slo:sli_total:increase30d{these} > 0)"
    assert not [each for each in rules if "avg_over_time" in each["expr"]]


@pytest.mark.parametrize(
    ("slo", "error", "total"),
    [
        (
            "fast",
            f"label_replace(clamp_min({BY} (increase(llm_time_to_first_token_seconds_count{B}[5m])) - "
            f"{BY} (increase(llm_time_to_first_token_seconds_bucket{LE}[5m])), 0), {EACH % 'b-fast'})",
            f"label_replace({BY} (increase(llm_time_to_first_token_seconds_count{B}[5m])), {EACH % 'b-fast'})",
        ),
        (
            "answers",
            f'label_replace({BY} (increase(llm_request_failures_total{{service_name="b", '
            f'reason=~"rate_limited|server_error|cut_off"}}[5m])), {EACH % "b-answers"})',
            f"label_replace(clamp_min({BY} (increase(llm_requests_total{B}[5m])) - {BY} "
            '(increase(llm_request_failures_total{service_name="b", reason="client_error"}[5m])), 0), '
            f"{EACH % 'b-answers'})",
        ),
        (
            "files",
            'sum by (service_name) (sum_over_time((kernel_open_files{service_name="b"} > bool 1000.0)[5m:1m]))',
            'sum by (service_name) (count_over_time(kernel_open_files{service_name="b"}[5m:1m]))',
        ),
        (
            "busy",
            "sum by () (sum_over_time((gpu_utilization_ratio{} < bool 0.05)[5m:1m]))",
            "sum by () (count_over_time(gpu_utilization_ratio{}[5m:1m]))",
        ),
        (
            "cool",
            "sum by () (sum_over_time((gpu_temperature_celsius{} > bool 85.0)[5m:1m]))",
            "sum by () (count_over_time(gpu_temperature_celsius{}[5m:1m]))",
        ),
    ],
)
def test_what_is_bad_and_what_is_all(slo: str, error: str, total: str) -> None:
    (rules,) = [
        rules
        for name, rules in rules_of(parse(CONFIG)).items()
        if name in {f"sloth-slo-sli-recordings-{service}-{slo}" for service in ("b", "host")}
    ]
    assert flat(find(rules, "slo:sli_error:increase5m")["expr"]) == error
    assert flat(find(rules, "slo:sli_total:increase5m")["expr"]) == total


def test_thresholds_match_as_every_prometheus_writes_them() -> None:
    text = rule_file(groups([each.objective for each in natives(parse(CONFIG))], "1"))
    assert 'model_name="a\\"b", le=~"1([.]0)?"' in text
    assert 'le="0.033333333"' in text
    assert 'le="0.008192"' in text


def test_alerts_look_at_two_windows_and_want_traffic() -> None:
    page = alert("fast", "page")
    assert page is not None
    these = '{sloth_service="roleplay", sloth_slo="fast"}'
    pairs = [
        f"(max without (sloth_window) (slo:sli_error:ratio_rate{short}{these} > ({factor} * 0.01)) and "
        f"max without (sloth_window) (slo:sli_error:ratio_rate{long}{these} > ({factor} * 0.01)) and "
        f"max without (sloth_window) (slo:sli_total:increase{long}{these} >= 20))"
        for short, long, factor in (("5m", "1h", "14.4"), ("30m", "6h", "6"))
    ]
    assert flat(page["expr"]) == " or ".join(pairs)
    assert page["labels"]["severity"] == "critical"
    ticket = alert("fast", "ticket")
    assert ticket is not None
    assert "ratio_rate2h" in ticket["expr"]
    assert "increase3d" in ticket["expr"]
    assert ">= 100)" in ticket["expr"]


@pytest.mark.parametrize(
    ("slo", "severity", "range_"),
    [
        ("fast", "page", 'phase=\\"ttft\\", service_name=%q, model_name=%q}[5m]'),
        ("fast", "ticket", 'phase=\\"ttft\\", service_name=%q, model_name=%q}[2h]'),
        ("speed", "page", 'phase=\\"decode\\", service_name=%q, model_name=%q}[5m]'),
        ("answers", "page", ""),
    ],
)
def test_the_largest_cause_is_that_of_the_short_window(slo: str, severity: str, range_: str) -> None:
    found = alert(slo, severity)
    assert found is not None
    assert found["annotations"]["description"].count("Largest cause") == bool(range_)
    assert range_ in found["annotations"]["description"]


def test_an_alert_that_cannot_fire_is_not_made() -> None:
    assert alert("cache", "page") is None
    ticket = alert("cache", "ticket")
    assert ticket is not None
    assert "ratio_rate1d" not in ticket["expr"]  # three times 40 % is more than all
    assert "ratio_rate3d" in ticket["expr"]


@given(target=st.decimals(Decimal("0.000001"), Decimal("0.999999"), places=6), fewest=st.integers(1, 10_000))
def test_one_bad_event_alone_is_never_an_alert(target: Decimal, fewest: int) -> None:
    budget = 1 - target
    for burn in possible([*PAGE, *TICKET], budget):
        least = least_events(burn, budget, fewest)
        assert least >= fewest
        assert Decimal(1) / least <= burn.factor * budget
    assert TICKET[-1] in possible(TICKET, budget)


def test_the_fewest_events_can_be_chosen() -> None:
    text = str(rules_of(parse(CONFIG), fewest=1009))
    assert ">= 1009)" in text
    assert ">= 20)" not in text


def test_the_same_objectives_give_the_same_text() -> None:
    found = natives(parse(CONFIG))
    made = groups([each.objective for each in found], "1")
    again = natives(parse(CONFIG))
    assert rule_file(made) == rule_file(groups([each.objective for each in again], "1"))
    assert file_of_tests(found, made, "r.yaml") == file_of_tests(again, made, "r.yaml")
    added = parse(f"{CONFIG}  - {{name: last, sli: aborts, target: 9%, service: b}}\n")
    longer = rule_file(groups([each.objective for each in natives(added)], "1"))
    assert longer.startswith(rule_file(made))


def test_every_metric_that_rules_and_tests_name_is_one_of_the_agent() -> None:
    known = {name for spec in Metrics(Slis()).specs for name in spec.sample_names()}
    found = natives(parse(CONFIG))
    made = [*groups([each.objective for each in found], "1"), well_known()]
    named = {
        name
        for group in made
        for rule in group.rules
        for name in re.findall(r"\b((?:llm|kernel|gpu|footlight)_\w+)(?=[{\[ )])", rule.expr)
    }
    assert len(named) > 10
    notes = str([rule.annotations for group in made for rule in group.rules])
    assert set(re.findall(r"rate\((\w+){", notes)) == {"llm_latency_cause_seconds_total"}
    assert named | {"llm_latency_cause_seconds_total"} <= known
    tests = yaml.safe_load(file_of_tests(found, made, "r.yaml"))
    series = {each["series"].partition("{")[0] for test in tests["tests"] for each in test["input_series"]}
    assert len(series) > 10
    assert series <= known
    assert [test["name"] for test in tests["tests"]].count(STORIES[0].name) == 1
    assert {test["name"] for test in tests["tests"]} == {story.name for story in STORIES}


def test_objectives_that_would_read_the_same_series_are_tested_apart() -> None:
    same = "  - {name: other, sli: ttft, below: 2s, target: 9%, service: b, model_name: 'a\"b'}\n"
    found = natives(parse(CONFIG + same))
    tests = yaml.safe_load(file_of_tests(found, groups([each.objective for each in found], "1"), "r.yaml"))
    assert [test["name"] for test in tests["tests"]].count(STORIES[0].name) == 2


@given(st.text(max_size=40))
def test_strings_are_quoted_as_promql_reads_them(text: str) -> None:
    found = quoted(text)
    assert found[0] == found[-1] == '"'
    assert "\n" not in found
    assert found[1:-1].replace("\\\\", "\0").replace('\\"', '"').replace("\\n", "\n").replace(
        "\0", "\\"
    ) == text.replace("\0", "\\")


@pytest.mark.parametrize(("value", "text"), [("0.0100", "0.01"), ("30", "30"), ("1E-6", "0.000001"), ("6.000", "6")])
def test_numbers_are_written_without_noise(value: str, text: str) -> None:
    assert number(Decimal(value)) == text


# ---- the command ----


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "footlight.yaml"
    path.write_text(CONFIG)
    return path


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["slo", "rules", *map(str, arguments)])


def test_rules_go_to_stdout_or_to_a_file(config: Path, tmp_path: Path) -> None:
    shown = run("--config", config)
    assert shown.exit_code == 0
    assert shown.stdout.startswith("# Made by `footlight slo rules`. Do not edit.\ngroups:\n")
    assert "p99_inference_latency_ms" in shown.stdout
    folder = tmp_path / "tests"
    folder.mkdir()
    written = run("--config", config, "-o", tmp_path / "r.yaml", "--tests", folder / "t.yaml")
    assert (written.exit_code, written.stdout) == (0, "")
    assert (tmp_path / "r.yaml").read_text() == shown.stdout
    assert yaml.safe_load((folder / "t.yaml").read_text())["rule_files"] == ["../r.yaml"]


def test_a_prometheus_rule_has_the_same_groups(config: Path) -> None:
    plain = yaml.safe_load(run("--config", config).stdout)
    options = ["--format", "prometheusrule", "--name", "slos", "--namespace", "monitoring", "--label", "release=prom"]
    found = yaml.safe_load(run("--config", config, *options).stdout)
    assert found["metadata"] == {"name": "slos", "namespace": "monitoring", "labels": {"release": "prom"}}
    assert (found["apiVersion"], found["kind"]) == ("monitoring.coreos.com/v1", "PrometheusRule")
    assert found["spec"] == plain


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ([], "no objectives are named"),
        (["--config", "x", "--tests", "t"], "--tests are about a rule file"),
        (["--config", "x", "-o", "o", "--tests", "t", "--format", "prometheusrule"], "--tests are about a rule file"),
        (["--config", "x", "--namespace", "n"], "--namespace and --label are for an object"),
        (["--config", "x", "--format", "prometheusrule", "--label", "a b=c"], "'a b=c' is not a label"),
        (["--config", "x", "--format", "prometheusrule", "--name", "A"], "'A' is not a name in Kubernetes"),
        (["--config", "x", "--minimum-events", "0"], "0 is not in the range"),
    ],
)
def test_wrong_use(arguments: list[str], what: str) -> None:
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert what in result.stderr


def test_a_wrong_objective_writes_nothing(config: Path, tmp_path: Path) -> None:
    config.write_text(CONFIG.replace("below: 300ms", "below: 300"))
    result = run("--config", config, "-o", tmp_path / "r.yaml", "--tests", tmp_path / "t.yaml")
    assert result.exit_code == 4
    assert f"{config}:5: slos[0].below: must be a time" in result.stderr
    assert not list(tmp_path.glob("?.yaml"))
    config.write_text(CONFIG[: CONFIG.index("slos:")])
    assert "there are no objectives" in run("--config", config).stderr
    config.write_text(CONFIG)
    assert "cannot write" in run("--config", config, "-o", tmp_path / "no" / "r.yaml").stderr
