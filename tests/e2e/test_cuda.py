"""The CUDA probe in the whole agent: a program that calls a stand-in for the driver's library is the service."""

from __future__ import annotations

import os
import signal
from contextlib import closing
from pathlib import Path

from tests.e2e.agent import Metrics, agent
from tests.e2e.processes import wait_for
from tests.standins.cuda import Caller, breakpoints, build

ATTACH_S = 10.0
ENGINE = {"service_name": "engine"}


def test_calls_are_counted_while_processes_and_readers_come_and_go(tmp_path: Path) -> None:
    library, program = build(tmp_path)
    config = tmp_path / "footlight.yaml"
    config.write_text(f"services:\n  - name: engine\n    match: {{exe: {program}}}\nprobes: {{cuda: on}}\n")

    def caller() -> Caller:
        return Caller([str(program)], preload=library)

    def attached(to: Caller) -> None:
        wait_for("the breakpoints", lambda: breakpoints(to.pid, library) or None, ATTACH_S)

    def launched(count: int) -> Metrics:
        return observer.wait_metrics(
            f"{count} launches",
            lambda metrics: metrics.sum("gpu_cuda_launches_total", kind="kernel", **ENGINE) == count,
        )

    with closing(caller()) as first, agent(tmp_path, "run", "--config", str(config)) as observer:
        attached(first)
        reader = observer.reader
        first.do("launch", 10_007)
        first.do("copy_in_async", 101, 4099)
        first.do("allocate", 23, 1000)
        first.do("busy", 1, 2000)
        first.do("stream", 53)
        metrics = launched(10_007)
        assert metrics.one("gpu_cuda_copies_total", direction="host_to_device", **ENGINE) == 101
        assert metrics.one("gpu_cuda_copy_bytes_total", direction="host_to_device", **ENGINE) == 101 * 4099
        assert metrics.one("gpu_cuda_outstanding_bytes", **ENGINE) == 23 * 1000
        assert metrics.one("gpu_cuda_synchronize_seconds_count", call="stream", **ENGINE) == 53
        assert metrics.one("gpu_cuda_synchronize_seconds_sum", call="stream", **ENGINE) >= 53 * 0.002
        observer.wait_metrics("the probe's status", lambda now: now.find("footlight_probe_up", probe="cuda") == [1])
        assert observer.reader == reader, "the records of waits ended the reader"
        os.kill(reader, signal.SIGKILL)
        wait_for("another reader", lambda: (observer.ready() and observer.reader != reader) or None, ATTACH_S)
        with closing(caller()) as second:
            attached(second)
            second.do("launch", 13)
            metrics = launched(10_007 + 13)
            lost = {
                labels["reason"]: value
                for name, labels, value in metrics.samples
                if name == "footlight_lost_events_total" and labels["probe"] == "cuda" and value
            }
            assert lost.keys() <= {"reader_restart"}, "what the killed reader had not read"
        first.do("exit", 0)
        observer.wait_metrics(
            "the memory to be given back", lambda now: now.one("gpu_cuda_outstanding_bytes", **ENGINE) == 0
        )
        third = caller()
        attached(third)
    with closing(third):
        assert breakpoints(third.pid, library) == 0, "the agent that ended left something"
