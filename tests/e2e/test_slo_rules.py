"""Rules of objectives in real tools: promtool checks them and plays their tests, Prometheus records what happened."""

from __future__ import annotations

import json
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from tests.e2e.agent import Agent, agent, footlight, objects
from tests.e2e.client import Ask, talk
from tests.e2e.processes import free_port, need, service, started, wait_for

EVERY_KIND = """\
services:
  - {name: roleplay, match: {port: 8000}}
  - {name: team/companion, match: {port: 8001}}
slos:
  - {name: first-token, sli: ttft, below: 300ms, target: 99%}
  - {name: gaps, sli: itl, below: 50ms, target: 99.99%, service: roleplay, window: 7d}
  - {name: per-token, sli: tpot, below: 40ms, target: 95%, service: roleplay, model_name: 'a"b\\c/7b'}
  - {name: no-stall, sli: longest_gap, below: 2s, target: 99%, service: roleplay, window: 100h}
  - {name: whole, sli: duration, below: 30s, target: 99%, service: roleplay}
  - {name: answers, sli: errors, target: 99.5%, service: roleplay}
  - {name: no-5xx, sli: errors, target: 99.9%, service: roleplay, reasons: server_error}
  - {name: stays, sli: aborts, target: 97%, service: roleplay}
  - {name: cache, sli: kv_cache_hit_ratio, at_least: 60%, service: roleplay}
  - {name: speed, sli: decode_tokens_per_second, at_least: 30, target: 95%, service: roleplay}
  - {name: run-queue, sli: kernel_run_queue_wait_seconds, below: 8.192ms, target: 99.9%, service: roleplay}
  - {name: memory, sli: kernel_resident_memory_bytes, below: 8GiB, target: 99%, service: roleplay}
  - {name: cool, sli: gpu_temperature_celsius, below: 85, target: 99.9%}
  - {name: busy, sli: gpu_utilization_ratio, at_least: 5%, target: 50%}
"""
ONE = """\
services: [{name: roleplay, match: {port: 8000}}]
slos: [{name: first-token, sli: ttft, below: 300ms, target: 99%}]
"""
SLOTH = """\
version: prometheus/v1
service: checkout
slos:
  - name: availability
    objective: 99
    sli:
      events:
        error_query: sum(rate(http_requests_total{code=~"5.."}[{{.window}}]))
        total_query: sum(rate(http_requests_total[{{.window}}]))
    alerting: {name: CheckoutDown}
  - name: raw
    objective: 99
    sli: {raw: {error_ratio_query: 'sum(rate(a[{{.window}}])) / sum(rate(b[{{.window}}]))'}}
    alerting: {}
---
version: prometheus/v1
service: cart
slos:
  - name: silent
    objective: 99
    description: What {{ stands }} here is no template.
    sli: {raw: {error_ratio_query: 'sum(rate(a[{{.window}}])) / sum(rate(b[{{.window}}]))  # of all'}}
    alerting: {page_alert: {disable: true}}
"""
MONTH = "30 days of uneven traffic give the true ratio"


def promtool(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [need("promtool", "prometheus"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def generate(folder: Path, config: str, *more: str | Path) -> tuple[Path, Path]:
    """The rules of a configuration and their tests."""
    (folder / "footlight.yaml").write_text(config)
    rules, tests = folder / "slos.yaml", folder / "slos_test.yaml"
    options = ("--config", folder / "footlight.yaml", "-o", rules, "--tests", tests, *more)
    done = footlight("slo", "rules", *map(str, options))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    return rules, tests


def keep(tests: Path, wanted: Callable[[str], bool]) -> list[str]:
    """Leave only some of the stories in a file, and tell which."""
    document = yaml.safe_load(tests.read_text())
    document["tests"] = [test for test in document["tests"] if wanted(test["name"])]
    tests.write_text(yaml.safe_dump(document, sort_keys=False))
    return [test["name"] for test in document["tests"]]


def test_promtool_takes_the_rules_of_every_kind_and_their_tests_pass(tmp_path: Path) -> None:
    (tmp_path / "sloth.yaml").write_text(SLOTH)
    rules, tests = generate(tmp_path, EVERY_KIND, "--sloth", tmp_path / "sloth.yaml")
    checked = promtool("check", "rules", rules)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert "SUCCESS" in checked.stdout
    assert len(set(keep(tests, lambda name: name != MONTH))) == 6  # a month is played below, with less to evaluate
    played = promtool("test", "rules", tests)
    assert played.returncode == 0, played.stdout + played.stderr
    assert "SUCCESS" in played.stdout


def test_a_month_of_uneven_traffic_gives_the_true_ratio(tmp_path: Path) -> None:
    _, tests = generate(tmp_path, ONE)
    assert keep(tests, lambda name: name == MONTH) == [MONTH]
    document = yaml.safe_load(tests.read_text())
    # What docs/slos.md says: 300 bad events of 180,300 a day; averages of ratios, as Sloth takes them, say a quarter.
    told = {
        "round(sum(slo:sli_error:ratio_rate30d), 0.000001)": 0.001664,
        "round(sum(avg_over_time(slo:sli_error:ratio_rate1h[30d:1h])), 0.01)": 0.25,
    }
    document["tests"][0]["promql_expr_test"] += [
        {"expr": expr, "eval_time": "30d", "exp_samples": [{"labels": "{}", "value": value}]}
        for expr, value in told.items()
    ]
    tests.write_text(yaml.safe_dump(document, sort_keys=False))
    played = promtool("test", "rules", tests)
    assert played.returncode == 0, played.stdout + played.stderr


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("(14.4 * 0.01)", "(144 * 0.01)"),  # a fast burn fires
        ("(6 * 0.01)", "(16 * 0.01)"),  # so does one that is less fast, for longer
        ("(1 * 0.01)", "(10 * 0.01)"),  # a slow one does
        (">= 20)", ">= 0)"),  # next to no traffic is quiet
        ("increase(llm", "delta(llm"),  # restarts are harmless
        ('le="0.3"', 'le="0.5"'),
        ("{service_name=", "{service="),
        ("absent(footlight_target_processes", "absent(nothing"),
        ("absent(footlight_target_processes", "vector(1) unless (1 + footlight_target_processes"),
    ],
)
def test_rules_that_are_wrong_fail_their_tests(tmp_path: Path, right: str, wrong: str) -> None:
    rules, tests = generate(tmp_path, ONE)
    keep(tests, lambda name: name != MONTH)
    text = rules.read_text()
    assert right in text
    rules.write_text(text.replace(right, wrong))
    assert promtool("check", "rules", rules).returncode == 0
    assert promtool("test", "rules", tests).returncode == 1


def test_names_that_teams_know_are_what_they_say(tmp_path: Path) -> None:
    rules, tests = generate(tmp_path, ONE)
    one, other = (f'{{service_name="roleplay", model_name="bard", instance="{node}"}}' for node in "ab")
    series = {
        # 1000 tokens a second over 10 s in five minutes, and 100 over 30 s: 13,000 tokens in 40 s.
        f"llm_prefill_tokens_per_second{one}": "1000+0x20",
        f"llm_time_to_first_token_seconds_sum{one}": "0+2x20",
        f"llm_prefill_tokens_per_second{other}": "100+0x20",
        f"llm_time_to_first_token_seconds_sum{other}": "0+6x20",
        f"llm_prefix_cache_hits_total{one}": "0+30x20",
        f"llm_prefix_cache_queries_total{one}": "0+40x20",
        f"llm_prefix_cache_hits_total{other}": "0+0x20",
        f"llm_prefix_cache_queries_total{other}": "0+20x20",
        # Of 100 durations in a minute 98 are up to 1 s, all up to 2 s: the 99th percentile is between.
        f'llm_request_duration_seconds_bucket{one[:-1]}, le="1.0"}}': "0+98x10 980+0x10",
        f'llm_request_duration_seconds_bucket{one[:-1]}, le="2.0"}}': "0+100x10 1000+0x10",
        f'llm_request_duration_seconds_bucket{one[:-1]}, le="+Inf"}}': "0+100x10 1000+0x10",
    }
    expected = {
        "prefill_tokens_per_sec": ("10m", 325.0),
        "kv_cache_hit_ratio": ("10m", 0.5),
        "p99_inference_latency_ms": ("10m", 1500.0),
        "p99_inference_latency_ms or vector(-1)": ("18m", -1.0),  # nobody asked for five minutes
    }
    test = {
        "interval": "1m",
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "promql_expr_test": [
            {
                "expr": f"round(sum({expr}), 0.001)",
                "eval_time": at,
                "exp_samples": [{"labels": "{}", "value": value}],
            }
            for expr, (at, value) in expected.items()
        ],
    }
    tests.write_text(yaml.safe_dump({"rule_files": [rules.name], "evaluation_interval": "1m", "tests": [test]}))
    played = promtool("test", "rules", tests)
    assert played.returncode == 0, played.stdout + played.stderr


def test_an_alert_about_a_latency_names_the_largest_cause(tmp_path: Path) -> None:
    objectives = {  # with what is said of the time of the first model
        "first-token": ("ttft", "99% of times to first token within 1 s", "gpu, 75%"),
        "gaps": ("itl", "99% of gaps between frames within 1 s", "lock, 90%"),
        "whole": ("duration", "99% of durations within 1 s", "lock, 79.17%"),
        "stays": ("aborts", "99% of requests not left by their client", ""),
    }
    config = "services: [{name: roleplay, match: {port: 8000}}]\nslos:\n"
    for name, (sli, _, _) in objectives.items():
        below = "" if sli == "aborts" else ", below: 1s"
        config += f"  - {{name: {name}, sli: {sli}, target: 99%{below}}}\n"
    rules, tests = generate(tmp_path, config)
    told, untold, idle = 'a"b\\c', "bass", "busk"
    series = {"footlight_target_processes{service_name='roleplay'}": "1+0x120"}
    for model in (told, untold, idle):
        of_model = f'service_name="roleplay", model_name={json.dumps(model)}'
        for metric in ("time_to_first_token", "inter_token_latency", "request_duration"):
            series[f"llm_{metric}_seconds_count{{{of_model}}}"] = "0+10x120"
            series[f'llm_{metric}_seconds_bucket{{{of_model}, le="1"}}'] = "0+0x120"
        series[f"llm_requests_total{{{of_model}}}"] = series[f"llm_requests_aborted_total{{{of_model}}}"] = "0+10x120"
        for phase, cause, seconds in (
            ("ttft", "gpu", 30),
            ("ttft", "lock", 10),
            ("decode", "lock", 180),
            ("decode", "gpu", 20),
        ):
            if model != untold:
                name = f'llm_latency_cause_seconds_total{{{of_model}, phase="{phase}", cause="{cause}", instance="a"}}'
                series[name] = f"0+{seconds if model == told else 0}x120"
    expected = [
        {
            "exp_labels": {
                "service_name": "roleplay",
                "model_name": model,
                "sloth_id": f"roleplay-{name}",
                "sloth_service": "roleplay",
                "sloth_slo": name,
                "sloth_severity": severity,
                "severity": common,
            },
            "exp_annotations": {
                "summary": f"{name} of roleplay burns its error budget {speed}.",
                "description": f"{model}: 100% of the events are bad; 1% may be ({sentence})."
                + (f" Largest cause: {cause} of the time." if cause and model == told else ""),
            },
        }
        for name, (_, sentence, cause) in objectives.items()
        for model in (told, untold, idle)
        for severity, common, speed in (("page", "critical", "fast"), ("ticket", "warning", "slowly but surely"))
    ]
    test = {
        "interval": "1m",
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "alert_rule_test": [{"eval_time": "2h", "alertname": "ErrorBudgetBurn", "exp_alerts": expected}],
    }
    tests.write_text(yaml.safe_dump({"rule_files": [rules.name], "evaluation_interval": "1m", "tests": [test]}))
    played = promtool("test", "rules", tests)
    assert played.returncode == 0, played.stdout + played.stderr


def test_queries_for_the_series_of_sloth_take_several_models(tmp_path: Path) -> None:
    rules, tests = generate(tmp_path, ONE)
    metric = "llm_time_to_first_token_seconds"
    series = {"footlight_target_processes{service_name='roleplay'}": "1+0x180"}
    for model, good in (("bard", 9), ('a"b\\c', 8)):
        of_model = f'service_name="roleplay", model_name={json.dumps(model)}'
        series[f"{metric}_count{{{of_model}}}"] = "_x59 0+10x120"
        series[f'{metric}_bucket{{{of_model}, le="0.3"}}'] = f"_x59 0+{good}x120"
    chosen = '{sloth_service="roleplay", sloth_slo="first-token"}'
    budget = f"slo:error_budget:ratio{chosen}"
    expected = {
        f"slo:sli_error:ratio_rate5m{chosen} / on (sloth_id) {budget}": 30.0,
        f"slo:sli_error:ratio_rate1h / on (sloth_id, sloth_slo, sloth_service) group_left () {budget}": 30.0,
        f"(slo:sli_error:ratio_rate30d{chosen} * on () group_left () (month() == bool 1))"
        f" / on (sloth_id) ({budget} * on () group_left () days_in_month())": 30 / 31,
        f"slo:period_burn_rate:ratio{chosen} + on (sloth_id) slo:period_error_budget_remaining:ratio": 2.0,
        "slo:current_burn_rate:ratio * on (sloth_id) group_left (sloth_objective) sloth_slo_info": 30.0,
        f"1 - slo:objective:ratio{chosen}": 0.02,
        f"slo:time_period:days{chosen}": 60.0,
        'slo:objective:ratio{sloth_id="roleplay-first-token:bard", model_name="bard"}': 0.99,
    }
    checks = [("2h", f"round(sum({expr}), 0.000001)", round(value, 6)) for expr, value in expected.items()]
    # Until a model is known there is the objective.
    checks += [("30m", 'sum(slo:objective:ratio{sloth_id="roleplay-first-token", model_name=""})', 0.99)]
    checks += [("30m", "count(sloth_slo_info)", 1.0), ("2h", "count(sloth_slo_info)", 2.0)]
    test = {
        "interval": "1m",
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "promql_expr_test": [
            {"expr": expr, "eval_time": at, "exp_samples": [{"labels": "{}", "value": value}]}
            for at, expr, value in checks
        ],
    }
    tests.write_text(yaml.safe_dump({"rule_files": [rules.name], "evaluation_interval": "1m", "tests": [test]}))
    played = promtool("test", "rules", tests)
    assert played.returncode == 0, played.stdout + played.stderr


def test_bad_objectives_leave_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "footlight.yaml"
    path.write_text(ONE.replace("below: 300ms", "above: 300ms"))
    done = footlight("slo", "rules", "--config", str(path), "-o", str(tmp_path / "slos.yaml"))
    assert (done.returncode, done.stdout) == (4, "")
    assert f"{path}:2: slos[0]: unknown key 'above'" in done.stderr
    assert not (tmp_path / "slos.yaml").exists()


# ---- Prometheus, an agent and requests ----

PROMETHEUS = """\
global: {{scrape_interval: 500ms, scrape_timeout: 400ms, evaluation_interval: 500ms}}
rule_files: [{rules}]
scrape_configs:
  - job_name: footlight
    static_configs: [{{targets: ["{target}"]}}]
"""
Query = Callable[[str], dict[tuple[str, ...], float]]

LATE, FAILING = ("stage", "alto", "first-token"), ("stage", "alto", "answers")


def all_recorded(query: Query) -> bool:
    """Whether the ratios are those of all requests: 5 late ones of 20 or 21, and 3 failures of 23 or 24.

    The first request came before Prometheus looked: an increase is extrapolated to the zero before it, or not.
    """
    ratios = query("slo:sli_error:ratio_rate5m")
    late, failing = ratios.get(LATE, 0.0), ratios.get(FAILING, 0.0)
    return 5 / 21 - 0.005 < late < 5 / 20 + 0.005 and 3 / 24 - 0.005 < failing < 3 / 23 + 0.005


@pytest.fixture(scope="module")
def query(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Query]:
    """Ask Prometheus with the rules, after 23 requests, of which 5 were late and 3 failed, and 7 of bass, all late."""
    folder = tmp_path_factory.mktemp("slos")
    fast = {"frames": 7, "first_ms": 12, "gap_ms": 3}
    good, late = Ask(script=fast), Ask(script={**fast, "first_ms": 450})
    with service("uvicorn-uvloop", folder) as running:
        config = (
            f"services: [{{name: stage, match: {{port: {running.port}}}}}]\n"
            "slos:\n  - {name: first-token, sli: ttft, below: 300ms, target: 99%}\n"
            "  - {name: answers, sli: errors, target: 99%}\n"
        )
        rules, _ = generate(folder, config)
        with agent(folder, "run", "--config", str(folder / "footlight.yaml")) as observer:
            (folder / "prometheus.yml").write_text(PROMETHEUS.format(rules=rules, target=observer.address))
            port = free_port()
            command = [
                need("prometheus", "prometheus"),
                f"--config.file={folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ]
            opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

            def ask(text: str) -> dict[tuple[str, ...], float]:
                url = f"http://127.0.0.1:{port}/api/v1/query?{urllib.parse.urlencode({'query': text})}"
                try:
                    with opener.open(url, timeout=10) as response:
                        result = json.load(response)["data"]["result"]
                except OSError:
                    return {}
                names = ("service_name", "model_name", "sloth_slo")
                return {
                    tuple(each["metric"].get(name, "") for name in names): float(each["value"][1]) for each in result
                }

            few = Ask(model="bass", script={**fast, "first_ms": 450})
            talk(running.port, [good, few])  # what a counter has when it is first seen is no increase
            with started(command, folder / "prometheus.log"):
                wait_for(
                    "the first request in Prometheus", lambda: len(ask("llm_time_to_first_token_seconds_count")) == 2
                )
                talk(running.port, [late] * 5, [good] * 15, [Ask(script={"status": 503})] * 3, [few] * 7)
                observer.wait_requests(32)
                wait_for("what was recorded", lambda: all_recorded(ask) or None)
                yield ask


@pytest.fixture(scope="module")
def observer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Agent]:
    """An agent with objectives of several kinds, after 27 requests."""
    folder = tmp_path_factory.mktemp("standing")
    script = {"frames": 7, "first_ms": 12, "gap_ms": 3}
    with service("uvicorn-uvloop", folder) as running:
        (folder / "footlight.yaml").write_text(
            f"services: [{{name: stage, match: {{port: {running.port}}}}}]\n"
            "slos:\n  - {name: first-token, sli: ttft, below: 300ms, target: 75%}\n"
            "  - {name: answers, sli: errors, target: 99%}\n"
            "  - {name: bass-speed, sli: decode_tokens_per_second, at_least: 20, target: 50%, model_name: bass}\n"
            "  - {name: threads, sli: kernel_threads, below: 1000, target: 99%}\n"
        )
        with agent(folder, "run", "--config", str(folder / "footlight.yaml")) as observer:
            late, slow = {**script, "first_ms": 450}, {"frames": 3, "first_ms": 12, "gap_ms": 90}
            asks = [Ask(script=script)] * 15 + [Ask(script=late)] * 5 + [Ask(script={"status": 503})] * 3
            talk(running.port, asks, [Ask(model="bass", script=slow)] * 2, [Ask(model="bass", script=script)] * 2)
            observer.wait_requests(27)
            yield observer


def test_an_agent_says_how_its_objectives_stand(observer: Agent) -> None:
    metrics = observer.metrics()

    def counts(slo: str, model: str) -> list[float]:
        names = ("events", "good_events", "violations")
        return [metrics.one(f"llm_slo_{name}_total", slo=slo, service_name="stage", model_name=model) for name in names]

    assert counts("first-token", "alto") == [20, 15, 5]
    assert counts("answers", "alto") == [23, 20, 3]
    assert counts("first-token", "bass") == [4, 4, 0]
    assert counts("bass-speed", "bass") == [4, 2, 2]
    assert not metrics.find("llm_slo_events_total", slo="bass-speed", model_name="alto")
    left = metrics.one("llm_slo_error_budget_remaining_ratio", slo="first-token", model_name="alto")
    assert left == pytest.approx(0, abs=1e-9)
    assert metrics.one("llm_slo_objective_ratio", slo="threads") == 0.99
    assert not metrics.find("llm_slo_burn_rate")  # it has not run for five minutes


def test_the_command_shows_how_objectives_stand(observer: Agent) -> None:
    done = footlight("slo", "status", "--url", observer.address)
    assert (done.returncode, done.stderr) == (0, "")
    assert "first-token: 75% of times to first token within 0.3 s, over 30d, of which " in done.stdout
    (row,) = (line.split() for line in done.stdout.splitlines() if line.startswith("  stage / bass") and " 50%" in line)
    assert row == ["stage", "/", "bass", "2", "4", "50%", "-", "-", "-", "-", "-", "0.0%", "!"]
    assert "only Prometheus counts it" in done.stdout
    told = objects(footlight("slo", "status", "--url", observer.address, "--json").stdout)
    assert [each["slo"] for each in told] == ["first-token"] * 2 + ["answers"] * 2 + ["bass-speed", "threads"]
    assert footlight("slo", "status", "--url", observer.address, "--check").returncode == 1


def test_prometheus_records_what_happened(query: Query) -> None:
    found = {key[1:] for key in query("slo:sli_error:ratio_rate5m")}
    assert found == {(model, slo) for model in ("alto", "bass") for slo in ("first-token", "answers")}
    # Seconds after the counters began, an increase reaches half a scrape interval before and after its samples.
    assert 20 <= query("slo:sli_total:increase5m")[LATE] < 30
    assert 5 <= query("slo:sli_error:increase5m")[LATE] < 8
    of_each = {("stage", model, slo): 0.99 for model in ("alto", "bass") for slo in ("first-token", "answers")}
    wait_for("the objectives", lambda: query("slo:objective:ratio") == of_each or None)
    # Other groups of rules come a moment later.
    rate = wait_for(
        "the burn rate",
        lambda: next(iter(query('slo:current_burn_rate:ratio{sloth_slo="first-token"} > 23').values()), None),
    )
    assert rate < 25.5
    wait_for("the violations", lambda: 3 <= query("slo_violation_count").get(FAILING, 0) < 5 or None)


def test_prometheus_knows_the_names_that_teams_know(query: Query) -> None:
    key = ("stage", "alto", "")
    assert 400 < query("p99_inference_latency_ms")[key] <= 800
    assert 0 <= query("kv_cache_hit_ratio").get(key, 0) <= 1
    assert query('count({__name__=~"slo:sli_(error|total):increase1h"})') == {("", "", ""): 8}


def test_alerts_fire_where_there_is_enough_traffic(query: Query) -> None:
    firing = 'ALERTS{alertname="ErrorBudgetBurn", alertstate="firing", sloth_severity="page"}'
    wait_for("both alerts", lambda: query(firing).keys() >= {LATE, FAILING} or None)
    # All first tokens of the other model were late, but they are fewer than 20.
    bass = ("stage", "bass", "first-token")
    assert query("slo:sli_error:ratio_rate1h")[bass] > 0.8
    assert bass not in query(firing)
    assert query('count(ALERTS{alertname="SLOMetricAbsent", alertstate="firing"})') == {}
