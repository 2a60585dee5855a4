"""The engine's own metrics beside the role-play service: found, told, compared; and an endpoint that hangs."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.agent import Agent, Metrics, agent
from tests.e2e.client import Ask, talk
from tests.e2e.processes import ROOT, Service, Started, free_port, started, wait_for

MODEL = "understudy"
LOOK_S = 15.0
"""Two looks of five seconds, and what it takes to see them."""
READ_S = 30.0


@contextlib.contextmanager
def role_play(folder: Path) -> Iterator[tuple[Started, int]]:
    port = free_port()
    command = [sys.executable, "-m", "examples.roleplay", "serve", "--port", str(port), "--model", MODEL]
    with started(command, folder / "roleplay.log", cwd=ROOT) as running:
        wait_for("the role-play service", lambda: bool(page(port)) or None, READ_S)
        yield running, port


def page(port: int) -> str:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
            text = answer.read()
    except OSError:
        return ""
    assert isinstance(text, bytes)
    return text.decode()


def users(port: int) -> dict[str, Any]:
    """Let users talk, none of whom leaves; returns what they felt."""
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "examples.roleplay", "users", "--url", url, "--rate", "3", "--duration", "4"]
    command += ["--leave", "0", "--patience", "60", "--max-tokens", "16", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    felt = json.loads(done.stdout)["models"][MODEL]
    assert felt["outcomes"]["complete"] == felt["requests"] > 3, felt
    assert isinstance(felt, dict)
    return felt


def config(folder: Path, port: int, engine_metrics: str) -> str:
    path = folder / "footlight.yaml"
    path.write_text(f"services:\n  - name: stage\n    match: {{port: {port}}}\n    engine_metrics: {engine_metrics}\n")
    return str(path)


def same_page(metrics: Metrics, text: str) -> None:
    """Every figure is the engine's own."""
    own = Metrics(text)
    for ours, theirs in {
        "llm_engine_requests_running": "vllm:num_requests_running",
        "llm_engine_requests_waiting": "vllm:num_requests_waiting",
        "llm_engine_kv_cache_usage_ratio": "vllm:kv_cache_usage_perc",
        "llm_engine_prefix_cache_queries_total": "vllm:prefix_cache_queries_total",
        "llm_engine_prefix_cache_hits_total": "vllm:prefix_cache_hits_total",
        "llm_engine_preemptions_total": "vllm:num_preemptions_total",
        "llm_engine_requests_total": "vllm:request_success_total",
        "llm_engine_prompt_tokens_total": "vllm:prompt_tokens_total",
        "llm_engine_generation_tokens_total": "vllm:generation_tokens_total",
    }.items():
        assert metrics.one(ours, service_name="stage", model_name=MODEL, engine="vllm") == own.sum(theirs), ours


def told(observer: Agent, requests: int) -> Metrics:
    """Wait until both sides have counted this many requests."""

    def both(metrics: Metrics) -> bool:
        return metrics.sum("llm_requests_total") == metrics.sum("llm_engine_requests_total") == requests

    return observer.wait_metrics(f"{requests} requests on both sides", both, LOOK_S)


def test_engine_is_found_and_agrees_with_what_was_seen(tmp_path: Path) -> None:
    with (
        role_play(tmp_path) as (_, port),
        agent(tmp_path, "run", "--service", "stage", "--port", str(port)) as observer,
    ):
        assert observer.metrics().find("llm_engine_up") == []  # nobody is asked before there was a request
        felt = users(port)
        metrics = told(observer, felt["requests"])
        same_page(metrics, page(port))
        assert metrics.one("llm_engine_info", engine="vllm", endpoint=f"http://127.0.0.1:{port}/metrics") == 1
        assert metrics.one("llm_engine_up", service_name="stage") == 1
        assert metrics.one("llm_engine_prefix_cache_queries_total") == felt["prompt_tokens"]
        assert metrics.one("llm_engine_prefix_cache_hits_total") == felt["cached_tokens"]
        assert metrics.one("llm_engine_generation_tokens_total") == felt["completion_tokens"]
        # the agent's own requests for metrics are none of the service's
        assert metrics.sum("footlight_capture_total") == felt["requests"]
        assert metrics.sum("llm_engine_scrape_failures_total") == 0
        assert 0 < metrics.one("llm_engine_scrape_seconds") < 2


def test_comparison_from_before_the_first_request_is_exact(tmp_path: Path) -> None:
    with role_play(tmp_path) as (running, port):
        path = config(tmp_path, port, f"http://127.0.0.1:{port}/metrics")
        with agent(tmp_path, "run", "--config", path) as observer:
            observer.wait_metrics("the first look", lambda metrics: metrics.sum("llm_engine_up") == 1, LOOK_S)
            felt = users(port)
            told(observer, felt["requests"])
            metrics = observer.wait_metrics(
                "the comparison of all requests",
                lambda metrics: (
                    metrics.find("llm_engine_requests_difference") == [0]
                    and bool(metrics.find("llm_engine_time_to_first_token_difference_seconds"))
                ),
                LOOK_S,
            )
            own = Metrics(page(port)).mean("vllm:time_to_first_token_seconds")
            assert metrics.one("llm_engine_time_to_first_token_mean_seconds") == pytest.approx(own)
            assert metrics.sum("llm_time_to_first_token_seconds_count") == felt["requests"]
            seen = metrics.mean("llm_time_to_first_token_seconds")
            difference = metrics.one("llm_engine_time_to_first_token_difference_seconds")
            assert difference == pytest.approx(own - seen)
            # the engine's clock starts after the bytes came; the kernel has the frame a little after the engine
            assert -0.1 < difference < 0
            running.process.terminate()
            running.ended(10)
            observer.wait_metrics("an engine that is down", lambda m: 1 not in m.find("llm_engine_up"), LOOK_S)
            after = observer.metrics()
            assert after.find("llm_engine_requests_difference") == []
            assert after.find("llm_engine_requests_running") == []
            assert after.one("llm_engine_requests_total") == felt["requests"]


def test_endpoint_that_hangs_costs_a_timeout_and_a_counter(uvicorn: Service, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as hanging:
        path = config(tmp_path, uvicorn.port, f"http://127.0.0.1:{hanging.getsockname()[1]}/metrics")
        with agent(tmp_path, "run", "--config", path) as observer:
            slowest = 0.0

            def timed_out() -> Metrics | None:
                nonlocal slowest
                began = time.monotonic()
                metrics = observer.metrics()
                slowest = max(slowest, time.monotonic() - began)
                return metrics if metrics.sum("llm_engine_scrape_failures_total", reason="timeout") else None

            answers = talk(uvicorn.port, *[[Ask(model="alto", script={"frames": 3})] * 7] * 3)
            metrics = wait_for("the timeout", timed_out, LOOK_S)
            observer.wait_requests(len(answers))
            assert metrics.one("llm_engine_up") == 0
            assert slowest < 0.5  # a busy machine; alone it takes some milliseconds
            metrics = observer.metrics()
            assert metrics.sum("llm_engine_scrape_failures_total") == metrics.sum(
                "llm_engine_scrape_failures_total", reason="timeout"
            )
            assert metrics.one("footlight_capture_ratio") == 1
            assert re.search(r"^llm_engine_scrape_seconds\{.*\} 2\.", metrics.text, re.MULTILINE)
