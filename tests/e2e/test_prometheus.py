"""A real Prometheus scrapes the agent; promtool reads what it serves."""

from __future__ import annotations

import json
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics_families

from tests.e2e.agent import Agent, agent
from tests.e2e.client import Ask, talk
from tests.e2e.processes import free_port, need, service, started, wait_for

OPENMETRICS = "application/openmetrics-text; version=1.0.0"

CONFIG = """\
global: {{scrape_interval: 500ms, scrape_timeout: 400ms}}
scrape_configs:
  - job_name: footlight
    static_configs: [{{targets: ["{target}"]}}]
"""

Query = Callable[[str], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def observer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Agent]:
    """An agent that has counted 47 requests to three models, with failures."""
    folder = tmp_path_factory.mktemp("observer")
    script = {"frames": 7, "first_ms": 12, "gap_ms": 3}
    asks = [Ask(model=model, script=script) for model in ("alto", 'b"a\\ss', "c\u00f6ro")]
    asks += [Ask(model="alto", script={"status": 429}), Ask(model="nobody", script={"status": 400})]
    with (
        service("uvicorn-uvloop", folder) as running,
        agent(folder, "run", "--service", "stage", "--port", str(running.port)) as observer,
    ):
        talk(running.port, *[asks] * 9, asks[:2])
        observer.wait_requests(47)
        yield observer


@pytest.fixture(scope="module")
def query(observer: Agent, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Query]:
    """Ask a Prometheus that scrapes the agent."""
    folder = tmp_path_factory.mktemp("prometheus")
    config = folder / "prometheus.yml"
    config.write_text(CONFIG.format(target=observer.address))
    port = free_port()
    command = [
        need("prometheus", "prometheus"),
        f"--config.file={config}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def ask(text: str) -> list[dict[str, Any]]:
        url = f"http://127.0.0.1:{port}/api/v1/query?{urllib.parse.urlencode({'query': text})}"
        with opener.open(url, timeout=10) as response:
            answer = json.load(response)
        assert answer["status"] == "success"
        result = answer["data"]["result"]
        assert isinstance(result, list)
        return result

    def scraped() -> bool:
        try:
            return any(float(each["value"][1]) >= 4 for each in ask('count_over_time(up{job="footlight"}[1m])'))
        except OSError:
            return False

    with started(command, folder / "prometheus.log"):
        wait_for("the fourth scrape by Prometheus", scraped)
        yield ask


def value(result: list[dict[str, Any]]) -> float:
    (one,) = result
    return float(one["value"][1])


def test_prometheus_has_every_sample_that_the_agent_serves(observer: Agent, query: Query) -> None:
    assert value(query("up")) == 1
    metrics = observer.metrics()
    stored: dict[tuple[tuple[str, str], ...], float] = {}
    for family in ("llm_.+", "kernel_.+", "footlight_.+"):
        for each in query(f'{{__name__=~"{family}"}}'):
            labels = {key: text for key, text in each["metric"].items() if key not in {"instance", "job"}}
            stored[tuple(sorted(labels.items()))] = float(each["value"][1])
    served = {tuple(sorted({**labels, "__name__": name}.items())): each for name, labels, each in metrics.samples}

    # It asks for OpenMetrics, which writes the bound 1 as 1.0.
    def plain(key: tuple[tuple[str, str], ...]) -> tuple[tuple[str, str], ...]:
        return tuple((name, text.removesuffix(".0") if name == "le" else text) for name, text in key)

    stored = {plain(key): each for key, each in stored.items()}
    served = {plain(key): each for key, each in served.items()}
    assert stored.keys() == served.keys()
    # What the service does is over; what the agent itself does is not.
    llm = {key: each for key, each in served.items() if dict(key)["__name__"].startswith("llm_")}
    assert llm
    assert {key: stored[key] for key in llm} == pytest.approx(llm)


def test_prometheus_sees_what_happened(query: Query) -> None:
    assert value(query("sum(llm_requests_total)")) == 47
    assert value(query("sum(llm_request_failures_total)")) == 18
    assert value(query('sum(llm_requests_total{model_name="_other"})')) == 9
    assert value(query('llm_requests_total{model_name="b\\"a\\\\ss"}')) == 10
    assert value(query('llm_requests_total{model_name="c\u00f6ro"}')) == 9
    assert value(query("sum(llm_frames_total)")) == (9 * 3 + 2) * 7
    assert value(query('sum by (service_name) (llm_requests_total{service_name="stage"})')) == 47
    mean = value(query("sum(llm_time_to_first_token_seconds_sum) / sum(llm_time_to_first_token_seconds_count)"))
    quantile = value(query("histogram_quantile(0.5, sum by (le) (llm_time_to_first_token_seconds_bucket))"))
    assert 0.012 < mean < 0.100
    assert 0.010 < quantile < 0.100
    assert value(query("footlight_capture_ratio")) == 1
    assert not query('{__name__=~".+_created"}')


def test_promtool_has_no_complaint(observer: Agent) -> None:
    promtool = need("promtool", "prometheus")
    for accept in ("", OPENMETRICS):
        _, _, text = observer.get("/metrics", accept)
        done = subprocess.run(
            [promtool, "check", "metrics"], input=text, capture_output=True, text=True, timeout=30, check=False
        )
        if not accept:
            assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        assert text.count("# HELP ") == text.count("# TYPE ") > 30


def test_openmetrics_says_the_same(observer: Agent) -> None:
    status, content_type, text = observer.get("/metrics", OPENMETRICS)
    assert (status, content_type.partition(";")[0]) == (200, "application/openmetrics-text")
    assert text.endswith("# EOF\n")
    families = {family.name: family for family in openmetrics_families(text)}
    plain = observer.metrics()
    total = sum(sample.value for sample in families["llm_requests"].samples)
    assert total == plain.sum("llm_requests_total") == 47
    assert families["llm_time_to_first_token_seconds"].unit == "seconds"
    names = {sample.name for family in families.values() for sample in family.samples}
    assert names == {name for name, _, _ in plain.samples}


def test_the_other_pages(observer: Agent, tmp_path: Path) -> None:
    assert observer.get("/-/healthy") == (200, "text/plain; charset=utf-8", "healthy\n")
    assert observer.get("/-/ready") == (200, "text/plain; charset=utf-8", "ready\n")
    status, content_type, page = observer.get("/")
    assert (status, content_type.partition(";")[0]) == (200, "text/html")
    assert 'href="metrics"' in page
    assert observer.get("/nothing")[0] == 404
    assert observer.get("/metrics?name[]=llm_requests_total")[2].count("# TYPE") == 1
