"""Every query of every dashboard, and every rule, in a Prometheus that scrapes an agent with something to watch."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from dashboards.board import panels
from dashboards.build import FOLDER
from examples.roleplay.lookups import LIBRARY
from tests.e2e.agent import FOOTLIGHT, agent
from tests.e2e.processes import ROOT, answers, free_port, need, started, wait_for
from tests.standins import cuda, nvml

WATCHED_S = float(os.environ.get("DASHBOARDS_WATCHED_S", "35"))
RANGE_S = 10
MODELS = ("understudy", "headliner")
DASHBOARDS = sorted(FOLDER.glob("*.json"))
RULES = FOLDER / "rules" / "footlight.yaml"

AGENT = """\
services:
  - {{name: roleplay, match: {{port: {port}}}, engine_metrics: 'http://127.0.0.1:{port}/metrics'}}
  - {{name: trainer, match: {{exe: '{caller}'}}, engine_metrics: off}}
  - {{name: neighbour, match: {{pid: {neighbour}}}, engine_metrics: off}}
probes: {{gpu: on, cuda: on, syscalls: on}}
gpu: {{library: '{driver}', devices: ['/dev/pts/*']}}
probe_points:
  - {{name: lookup, library: {library}, symbol: llm_kv_lookup, model: 1, hit_tokens: 2, looked_up_tokens: 3}}
slos:
  - {{name: first-token, sli: ttft, below: 300ms, target: 99%, service: roleplay}}
  - {{name: failures, sli: errors, target: 99%, service: roleplay}}
alertmanagers:
  - {{url: 'http://127.0.0.1:{alertmanager}'}}
"""

PROMETHEUS = """\
global: {{scrape_interval: 1s, scrape_timeout: 900ms, evaluation_interval: 1s}}
rule_files: ["{rules}", "{slos}"]
alerting: {{alertmanagers: [{{static_configs: [{{targets: ["127.0.0.1:{alertmanager}"]}}]}}]}}
scrape_configs:
  - job_name: footlight
    static_configs: [{{targets: ["{agent}"]}}]
"""


def empty_by_nature() -> dict[str, dict[str, str]]:
    """Dashboard -> panel -> why it may show nothing."""
    return dict(yaml.safe_load((FOLDER / "empty.yaml").read_text()))


@dataclass(frozen=True, slots=True)
class Prometheus:
    """One that runs."""

    port: int
    alertmanager: int

    def alerts(self) -> list[dict[str, Any]]:
        """Those that the Alertmanager has."""
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(f"http://127.0.0.1:{self.alertmanager}/api/v2/alerts", timeout=20) as response:
            return list(json.load(response))

    def ask(self, path: str, **what: object) -> Any:  # noqa: ANN401 - JSON
        """The data of an answer."""
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        url = f"http://127.0.0.1:{self.port}/api/v1/{path}?{urllib.parse.urlencode(what)}"
        try:
            with opener.open(url, timeout=20) as response:
                return json.load(response)["data"]
        except urllib.error.HTTPError as error:
            with error:
                raise AssertionError(f"{what}: {error.read().decode()}") from None

    def has_data(self, expr: str, *, instant: bool) -> bool:
        """Whether a query gives a number that is one; a range query over the last `RANGE_S` and more."""
        now = time.time()
        if instant:
            found = self.ask("query", query=expr, time=now)["result"]
            values = [series["value"] for series in found]
        else:
            found = self.ask("query_range", query=expr, start=now - WATCHED_S, end=now, step=1)["result"]
            values = [value for series in found for value in series["values"]]
        return any(not math.isnan(float(value)) for _, value in values)


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """It has scraped for `WATCHED_S` an agent that watches the role-play service, a neighbour, and calls of CUDA."""
    folder = tmp_path_factory.mktemp("dashboards")
    library, caller = cuda.build(folder)
    with ExitStack() as stack:
        # The reader asks the driver, and it is nobody: pytest's folders are not for it.
        public = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="footlight-")))
        public.chmod(0o755)
        driver = nvml.Driver(nvml.build(folder), public / "driver", nvml.fixture("h100"))
        port = free_port()
        roleplay = [sys.executable, "-m", "examples.roleplay"]
        service = stack.enter_context(
            started([*roleplay, "serve", "--port", str(port)], folder / "roleplay.log")
        )
        trainer = stack.enter_context(closing(cuda.Caller([str(caller)], preload=library)))
        wait_for("the role-play service", lambda: answers(port) or (None if service.alive() else service.said()))
        neighbour = subprocess.Popen(
            [sys.executable, "-m", "tests.e2e.neighbour", str(port), str(folder / "disk")],
            cwd=ROOT,
            stdin=subprocess.PIPE,
        )
        stack.callback(neighbour.wait)
        stack.callback(neighbour.kill)
        config = folder / "footlight.yaml"
        running = Prometheus(free_port(), free_port())
        text = AGENT.format(
            port=port,
            caller=caller,
            neighbour=neighbour.pid,
            driver=driver.path,
            library=LIBRARY.name,
            alertmanager=running.alertmanager,
        )
        config.write_text(text)
        slos = folder / "slos.yaml"
        subprocess.run([*FOOTLIGHT, "slo", "rules", "--config", str(config), "-o", str(slos)], cwd=ROOT, check=True)
        command = [
            need("prometheus-alertmanager", "prometheus-alertmanager"),
            f"--config.file={FOLDER / 'alertmanager.yaml'}",
            f"--storage.path={folder / 'notified'}",
            f"--web.listen-address=127.0.0.1:{running.alertmanager}",
            "--cluster.listen-address=",
        ]
        stack.enter_context(started(command, folder / "alertmanager.log"))
        observer = stack.enter_context(agent(folder, "run", "--config", str(config)))
        url = f"http://127.0.0.1:{port}"
        users = [*roleplay, "users", "--url", url, "--rate", "4", "--duration", "0", "--max-tokens", "24"]
        stack.enter_context(started([*users, "--leave", "0.2"], folder / "users.log"))
        written = folder / "prometheus.yml"
        written.write_text(
            PROMETHEUS.format(rules=RULES, slos=slos, agent=observer.address, alertmanager=running.alertmanager)
        )
        command = [
            need("prometheus", "prometheus"),
            f"--config.file={written}",
            f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address=127.0.0.1:{running.port}",
        ]
        stack.enter_context(started(command, folder / "prometheus.log"))
        _use_the_gpu(driver, trainer, WATCHED_S)
        yield running


def _use_the_gpu(driver: nvml.Driver, trainer: cuda.Caller, seconds: float) -> None:
    """Let there be an XID error, and for so long calls of CUDA and samples of the process that makes them."""
    driver.say(0, "nvmlDeviceGetComputeRunningProcesses_v3", f"{trainer.pid}:{17 << 30}")
    driver.xid(0, 79)
    pause = threading.Event()
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        driver.say(0, "nvmlDeviceGetProcessUtilization", f"{trainer.pid}:{int(time.time() * 1e6)}:53")
        trainer.do("launch", 101)
        trainer.do("copy_in_async", 11, 4099)
        trainer.do("allocate", 1, 1009)
        trainer.do("stream", 3)
        pause.wait(0.5)


def queries(document: dict[str, Any]) -> Iterator[tuple[str, str, bool]]:
    """Title of the panel, the query as Grafana sends it, and whether it is about one instant."""
    for panel in panels(document):
        for target in panel["targets"]:
            expr = target["expr"]
            for name, value in {
                "$service_name": ".*",
                "$model_name": ".*",
                "$instance": ".*",
                "$__rate_interval": f"{RANGE_S}s",
                "$__range": f"{WATCHED_S:.0f}s",
            }.items():
                expr = expr.replace(name, value)
            assert "$" not in expr
            yield panel["title"], expr, bool(target.get("instant"))


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_every_query_returns_data_but_those_listed(prometheus: Prometheus, path: Path) -> None:
    document = json.loads(path.read_text())
    listed = empty_by_nature().get(document["uid"], {})
    empty: dict[str, list[str]] = {}
    for title, expr, instant in queries(document):
        if not prometheus.has_data(expr, instant=instant):
            empty.setdefault(title, []).append(expr)
    print(f"{sum(1 for _ in queries(document))} queries; empty: {', '.join(empty) or 'none'}")
    unexpected = {title: exprs for title, exprs in empty.items() if title not in listed}
    assert not unexpected, f"no data, and not in dashboards/empty.yaml: {json.dumps(unexpected, indent=1)}"


@pytest.mark.parametrize("model", MODELS)
def test_the_row_of_each_model_has_data_of_its_own(prometheus: Prometheus, model: str) -> None:
    buckets = f'llm_time_to_first_token_seconds_bucket{{model_name="{model}"}}'
    expr = f"histogram_quantile(0.99, sum by (le) (rate({buckets}[{RANGE_S}s])))"
    assert prometheus.has_data(expr, instant=False)


def test_variables_have_values(prometheus: Prometheus) -> None:
    document = json.loads(DASHBOARDS[0].read_text())
    asked = {each["name"]: each["query"] for each in document["templating"]["list"] if each["type"] == "query"}
    assert asked.keys() == {"service_name", "model_name", "instance"}
    for name, query in asked.items():
        metric, label = query.removeprefix("label_values(").removesuffix(")").rsplit(", ", 1)
        assert label == name
        values = prometheus.ask(f"label/{label}/values", **{"match[]": metric.replace("$service_name", ".*")})
        assert values


def test_every_rule_is_loaded_and_evaluates(prometheus: Prometheus) -> None:
    groups = prometheus.ask("rules")["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    written = [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]
    names = {rule["name"] for rule in rules}
    assert {rule.get("alert") or rule["record"] for rule in written} <= names
    assert {rule["health"] for rule in rules} == {"ok"}, [rule for rule in rules if rule["health"] != "ok"]


def test_a_gpu_that_fails_is_told_with_its_service_and_not_twice(prometheus: Prometheus) -> None:
    def inhibited(name: str, **labels: str) -> list[bool] | None:
        """Of the alerts of that name, whether others silence them; None without one."""
        wanted = {"alertname": name, **labels}.items()
        found = [alert for alert in prometheus.alerts() if wanted <= alert["labels"].items()]
        return [bool(alert["status"]["inhibitedBy"]) for alert in found] or None

    told = wait_for("the alert of the service", lambda: inhibited("FootlightGpuOfServiceFails", service_name="trainer"))
    assert told == [False]
    wait_for("the silence of the other one", lambda: inhibited("FootlightGpuXid", xid="79") == [True])
