"""Dashboards, rules and routing as files: fresh, whole, and right by the tools that will read them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.alerts.real import Receiver, alertmanager, example
from dashboards.board import Board, panels
from dashboards.build import FOLDER, dashboards, stale
from exporter.config import parse
from exporter.metrics import Metrics
from exporter.slis import Slis
from exporter.slo.native import natives
from exporter.slo.rules import FEWEST, groups, well_known

ROOT = FOLDER.parent
RULES = FOLDER / "rules" / "footlight.yaml"
TESTS = sorted((FOLDER / "rules").glob("tests*.yaml"))
ROUTES = FOLDER / "alertmanager.yaml"
CONFIG = """\
services: [{name: roleplay, match: {port: 1}}]
slos: [{name: first-token, sli: ttft, below: 300ms, target: 99%}]
"""
MADE = {name: json.loads(text) for name, text in dashboards().items()}
VARIABLES = ["datasource", "service_name", "model_name", "instance"]
METRIC = re.compile(r"\b((?:llm|kernel|gpu|footlight)_[a-z0-9_]+)\b(?!\s*[=!]~?\")")
RECORDED = re.compile(r"\bslo[:_][a-z_0-9:]+")


def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


ALERTS = [rule for rule in rules() if "alert" in rule]


def every_panel() -> Iterator[tuple[str, dict[str, Any]]]:
    for name, document in MADE.items():
        for panel in panels(document):
            yield name, panel


@pytest.fixture(scope="module")
def served() -> frozenset[str]:
    """Every sample's name that the agent can serve."""
    names: set[str] = set()
    for family in Metrics(Slis()).describe():
        ends = {
            "counter": ["_total"],
            "info": ["_info"],
            "histogram": ["_bucket", "_sum", "_count"],
            "summary": ["", "_sum", "_count"],
        }.get(family.type, [""])
        names.update(family.name + end for end in ends)
    return frozenset(names)


# ---- dashboards ----


def test_the_files_are_what_the_code_makes() -> None:
    assert stale() == [], "run: python -m dashboards.build"


def test_there_is_no_second_dashboard_with_a_uid() -> None:
    assert len({document["uid"] for document in MADE.values()}) == len(MADE) == 5
    assert {document["uid"] for document in MADE.values()} == {
        f"footlight-{name}" for name in ("overview", "why", "gpu", "slos", "agent")
    }


@pytest.mark.parametrize("name", MADE)
def test_a_dashboard_has_the_four_variables(name: str) -> None:
    assert [each["name"] for each in MADE[name]["templating"]["list"]] == VARIABLES


def test_every_panel_says_what_it_is_and_why_it_may_be_empty() -> None:
    found = list(every_panel())
    assert len(found) > 60
    for _, panel in found:
        assert len(panel["description"]) > 10, panel["title"]
        assert panel["fieldConfig"]["defaults"]["noValue"], panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert panel["datasource"]["uid"] == "${datasource}"
        assert panel["targets"]


def test_queries_follow_the_variables_and_the_interval() -> None:
    for _, panel in every_panel():
        for target in panel["targets"]:
            expr = target["expr"]
            assert re.search(r"\$(instance|service_name)", expr) or "slo" in expr, panel["title"]
            assert set(re.findall(r"\[([^\]]+)\]", expr)) <= {"$__rate_interval", "$__range"}, expr
            assert not re.search(r"irate|\[\d", expr)


@pytest.mark.parametrize("name", MADE)
def test_panels_lie_on_the_grid_without_overlap(name: str) -> None:
    taken: set[tuple[int, int]] = set()
    for panel in MADE[name]["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        taken |= cells


@pytest.mark.parametrize("name", MADE)
def test_ids_are_unique_and_titles_too(name: str) -> None:
    every = MADE[name]["panels"]
    assert len({panel["id"] for panel in every}) == len(every)
    titles = [panel["title"] for panel in panels(MADE[name])]
    assert len(set(titles)) == len(titles)


def test_a_new_panel_changes_no_other_panels_id() -> None:
    def ids(*titles: str) -> dict[str, int]:
        board = Board("u", "t", "d")
        board.row("r")
        for title in titles:
            board.stat(title, "text of it", "up", "none", empty="nothing")
        return {panel["title"]: panel["id"] for panel in panels(json.loads(board.text()))}

    before, after = ids("a", "b"), ids("new", "a", "b")
    assert before.items() <= after.items()


def test_two_panels_of_one_name_in_a_row_are_refused() -> None:
    board = Board("u", "t", "d")
    board.stat("a", "text of it", "up", "none", empty="nothing")
    with pytest.raises(ValueError, match="have one id"):
        board.stat("a", "another text", "up", "none", empty="nothing")


def test_links_lead_to_dashboards_that_are_there() -> None:
    uids = {document["uid"] for document in MADE.values()}
    linked = set(re.findall(r"/d/([a-z-]+)", "".join(dashboards().values())))
    assert linked
    assert linked <= uids


def test_every_metric_that_is_asked_for_is_served(served: frozenset[str]) -> None:
    exprs = [target["expr"] for _, panel in every_panel() for target in panel["targets"]]
    exprs += [rule["expr"] for rule in rules()]
    asked = {name for expr in exprs for name in METRIC.findall(expr)}
    labels = {"service_name", "model_name"}
    assert len(asked) > 100
    assert sorted(asked - served - labels) == []


def test_every_recorded_name_that_a_panel_asks_for_is_recorded() -> None:
    config = parse("services: [{name: a, match: {port: 1}}]\nslos: [{name: b, sli: errors, target: 99%}]\n")
    made = [*groups([native.objective for native in natives(config)], "1"), well_known()]
    recorded = {rule.record for group in made for rule in group.rules}
    asked = {
        name for _, panel in every_panel() for target in panel["targets"] for name in RECORDED.findall(target["expr"])
    }
    assert len(asked) >= 8
    assert sorted(asked - recorded) == []


def test_panels_that_may_be_empty_are_there_and_have_a_reason() -> None:
    titles = {MADE[name]["uid"]: set() for name in MADE}  # type: dict[str, set[str]]
    for name, panel in every_panel():
        titles[MADE[name]["uid"]].add(panel["title"])
    for uid, listed in yaml.safe_load((FOLDER / "empty.yaml").read_text()).items():
        assert listed.keys() <= titles[uid]
        assert all(len(reason) > 10 for reason in listed.values())


# ---- rules ----


def promtool(*arguments: str, cwd: Path = RULES.parent) -> subprocess.CompletedProcess[str]:
    tool = shutil.which("promtool")
    assert tool is not None, "promtool is missing; try: apt-get install prometheus"
    return subprocess.run([tool, *arguments], cwd=cwd, capture_output=True, text=True, timeout=60, check=False)


def test_prometheus_takes_the_rules() -> None:
    done = promtool("check", "rules", str(RULES))
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_rules_do_what_their_tests_say() -> None:
    done = promtool("test", "rules", *map(str, TESTS))
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_fires_in_a_test() -> None:
    fired: set[str] = set()
    for test in (test for path in TESTS for test in yaml.safe_load(path.read_text())["tests"]):
        for case in test.get("alert_rule_test", ()):
            fired |= {case["alertname"]} if case["exp_alerts"] else set()
        for case in test.get("promql_expr_test", ()):
            for sample in case["exp_samples"]:
                fired |= set(re.findall(r'alertname="(\w+)"', sample["labels"]))
    assert fired == {rule["alert"] for rule in ALERTS}


TRAFFIC = re.compile(r"\n\s+and\n[^\n]+ >= \d+(?=\n)")
CLAUSES = len(TRAFFIC.findall(RULES.read_text()))


def test_alerts_about_traffic_want_some() -> None:
    assert CLAUSES >= 13
    assert FEWEST == 20


@pytest.mark.parametrize("number", range(CLAUSES))
def test_no_clause_about_traffic_can_go_unnoticed(tmp_path: Path, number: int) -> None:
    text = RULES.read_text()
    found = list(TRAFFIC.finditer(text))[number]
    (tmp_path / RULES.name).write_text(text[: found.start()] + text[found.end() :])
    about = set(METRIC.findall(found[0]))
    for rule in rules():
        about |= set(METRIC.findall(rule["expr"])) if rule.get("record", "no record") in found[0] else set()
    names = []
    for path in TESTS:
        document = yaml.safe_load(path.read_text())
        document["tests"] = [test for test in document["tests"] if any(name in str(test) for name in about)]
        (tmp_path / path.name).write_text(yaml.safe_dump(document))
        names += [path.name] if document["tests"] else []
    assert promtool("check", "rules", RULES.name, cwd=tmp_path).returncode == 0
    assert promtool("test", "rules", *names, cwd=tmp_path).returncode != 0, found[0]


@pytest.mark.parametrize("rule", ALERTS, ids=lambda rule: rule["alert"])
def test_an_alert_says_what_how_bad_and_where_to_read_on(rule: dict[str, Any]) -> None:
    assert rule["labels"]["severity"] in {"critical", "warning"}
    assert rule["labels"]["kind"] in {"symptom", "cause", "agent"}
    assert rule["annotations"].keys() == {"summary", "description", "runbook"}
    page, _, anchor = rule["annotations"]["runbook"].partition("#")
    headings = re.findall(r"^#+ (.+)$", (ROOT / page).read_text(), re.MULTILINE)
    anchors = {re.sub(r"[^a-z0-9 -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    assert anchor in anchors


# ---- Alertmanager ----


def amtool(*arguments: str) -> str:
    tool = shutil.which("amtool")
    assert tool is not None, "amtool is missing; try: apt-get install prometheus-alertmanager"
    done = subprocess.run([tool, *arguments], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_alertmanager_takes_the_example() -> None:
    assert "SUCCESS" in amtool("check-config", str(ROUTES))


@pytest.mark.parametrize(
    ("labels", "receivers"),
    [
        ("kind=agent severity=critical", "operators"),
        ("kind=symptom severity=critical tenant=theatre", "pager,theatre"),
        ("kind=symptom severity=warning tenant=harbour", "harbour"),
        ("kind=cause severity=warning", "operators"),
        ("kind=cause severity=critical service_name=roleplay", "pager,theatre,harbour"),
        ("kind=cause severity=critical service_name=other", "pager"),
        ("severity=critical sloth_severity=page sloth_slo=first-token service_name=roleplay", "pager"),
        ("severity=warning sloth_severity=ticket sloth_slo=first-token service_name=roleplay", "operators"),
    ],
)
def test_alerts_go_to_their_tenant(labels: str, receivers: str) -> None:
    said = amtool("config", "routes", "test", f"--config.file={ROUTES}", *labels.split())
    assert said.strip() == receivers


@pytest.fixture
def routed(tmp_path: Path) -> Iterator[Routed]:
    with Receiver() as receiver, alertmanager(tmp_path, "one", receiver, config=example()) as url:
        yield Routed(url)


class Routed:
    """What an Alertmanager with the example does to alerts that fire."""

    def __init__(self, url: str) -> None:
        self._url = f"{url}/api/v2/alerts"

    def fire(self, *every: dict[str, str]) -> None:
        body = json.dumps([{"labels": labels} for labels in every]).encode()
        request = urllib.request.Request(self._url, body, {"content-type": "application/json"})
        urllib.request.urlopen(request, timeout=10).close()

    def silenced(self) -> dict[tuple[str, str], set[str]]:
        """By name and tenant, the names of the alerts that silence it. Fails where a tenant hears neither."""
        with urllib.request.urlopen(self._url, timeout=10) as response:
            fired = {each["fingerprint"]: each for each in json.load(response)}
        found = {}
        for each in fired.values():
            tenant = each["labels"].get("tenant", "")
            by = [fired[number] for number in each["status"]["inhibitedBy"]]
            found[each["labels"]["alertname"], tenant] = {other["labels"]["alertname"] for other in by}
            told = each
            while told["status"]["inhibitedBy"]:
                told = fired[told["status"]["inhibitedBy"][0]]
            assert not tenant or {"name": tenant} in told["receivers"], each["labels"]
        return found


def fires(name: str, **others: str) -> dict[str, str]:
    """The labels of an alert of the rules, of which the expression gives `others`."""
    (rule,) = (rule for rule in ALERTS if rule["alert"] == name)
    return {"alertname": name, **others, **rule["labels"]}


def test_whose_alert_is_silenced_hears_what_silences_it(routed: Routed) -> None:
    made = [native.objective for native in natives(parse(CONFIG))]
    every = [rule for group in groups(made, "1") for rule in group.rules if rule.alert == "ErrorBudgetBurn"]
    (page,) = (rule for rule in every if rule.labels["sloth_severity"] == "page")
    about = {"service_name": "roleplay", "model_name": "bard"}
    felt = ("FootlightFirstTokenSlow", "FootlightStreamsCutOff")
    routed.fire({"alertname": page.alert, **about, **page.labels})
    for tenant in ({}, {"tenant": "theatre"}, {"tenant": "harbour"}):
        routed.fire(fires("FootlightObjectiveBurns", **about, **tenant, slo="first-token"))
        routed.fire(*(fires(name, **about, **tenant) for name in felt))
    burns = "FootlightObjectiveBurns"
    assert {what: by for what, by in routed.silenced().items() if by} == {
        (burns, ""): {page.alert},
        ("FootlightFirstTokenSlow", ""): {page.alert},
        ("FootlightFirstTokenSlow", "theatre"): {burns},
        ("FootlightFirstTokenSlow", "harbour"): {burns},
    }
    routed.fire(fires("FootlightServiceGone", service_name="roleplay", instance="node-3"))
    silenced = routed.silenced()
    (heard,) = (what for what, by in silenced.items() if not by)
    assert heard == ("FootlightServiceGone", "")


def test_the_pager_takes_what_is_wrong_with_a_model_for_one_thing() -> None:
    (pager,) = (each for each in yaml.safe_load(ROUTES.read_text())["route"]["routes"] if each["receiver"] == "pager")
    assert pager["group_by"] == ["service_name", "model_name"]


def test_inhibitions_name_alerts_that_are_there() -> None:
    known = {rule["alert"] for rule in ALERTS} | {"SLOMetricAbsent"}
    named: set[str] = set()
    for rule in yaml.safe_load(ROUTES.read_text())["inhibit_rules"]:
        for matcher in (*rule["source_matchers"], *rule["target_matchers"]):
            named |= set(re.findall(r"\w+", matcher)) - {"alertname"} if matcher.startswith("alertname") else set()
    assert named
    assert named <= known
