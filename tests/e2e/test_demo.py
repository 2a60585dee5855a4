"""`footlight demo`: the service, its users, the agent and the table come up by one command and go with one Ctrl-C."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import psutil

from tests.e2e.agent import Metrics, agent, loaded_programs
from tests.e2e.processes import wait_for

END_S = 8.0
"""Three groups of processes end one after the other."""
MODELS = 2


def test_the_demo_shows_both_models_and_leaves_nothing(tmp_path: Path) -> None:
    with agent(tmp_path, "demo", "--rate", "5") as observer:

        def both_models(metrics: Metrics) -> bool:
            counts = metrics.find("llm_time_to_first_token_seconds_count")
            answered = metrics.find("llm_prefix_cache_queries_total")
            return all(len([count for count in each if count > 0]) == MODELS for each in (counts, answered))

        metrics = observer.wait_metrics("first tokens and usage of both models", both_models, 30)
        assert metrics.sum("llm_frames_total") > 0
        assert metrics.sum("footlight_lost_events_total") == 0
        processes = psutil.Process(observer.pid).children(recursive=True)
        # the reader, the users, the API process and an engine for each model
        assert len(processes) >= 3 + MODELS
        programs = observer.programs()
        assert programs
        os.killpg(observer.pid, signal.SIGINT)
        assert observer.process.stdout is not None
        table = observer.process.stdout.read().decode()
        assert observer.ended(END_S) == 0, observer.said()
        wait_for("the end of every process", lambda: not any(each.is_running() for each in processes) or None, 2)
        assert not programs & loaded_programs()
    assert "TTFT" in table
    assert "Traceback" not in table + observer.said()
