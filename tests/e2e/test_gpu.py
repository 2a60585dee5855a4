"""The whole agent with a driver that fails in every way: it stays up, and no scrape waits for the driver."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.agent import Agent, Metrics, agent
from tests.e2e.processes import free_port
from tests.standins.nvml import Driver, build, fixture

FIRST = "GPU-1f0f2a11-0b1c-4d5e-8f60-000000000100"
SECOND = "GPU-1f0f2a11-0b1c-4d5e-8f60-000000000101"
SCRAPE_S = 0.1

Fault = Callable[[Driver], None]


@pytest.fixture(scope="module")
def driver() -> Iterator[Driver]:
    # The reader is nobody, and the folders of pytest are root's.
    folder = Path(tempfile.mkdtemp(prefix="nvml-"))
    folder.chmod(0o755)
    yield Driver(build(folder), folder / "driver", fixture("h100"))
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def running(driver: Driver, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Agent]:
    folder = tmp_path_factory.mktemp("gpu")
    config = folder / "footlight.yaml"
    config.write_text(
        f"services:\n  - name: stage\n    match: {{port: {free_port()}}}\n"
        f"probes: {{gpu: on}}\ngpu: {{library: {driver.path}, period: 100ms}}\n"
    )
    with agent(folder, "run", "--config", str(config)) as started:
        yield started


def quick(running: Agent, seconds: float) -> Metrics:
    """Scrape for so long; no scrape may take longer than `SCRAPE_S`."""
    until = time.monotonic() + seconds
    while True:
        began = time.monotonic()
        status, _, text = running.get("/metrics")
        took = time.monotonic() - began
        assert status == 200 and took < SCRAPE_S, f"{took:.3f} s"
        if time.monotonic() > until:
            return Metrics(text)
        time.sleep(0.05)


def whole(metrics: Metrics) -> bool:
    return metrics.find("footlight_probe_up", probe="gpu") == [1] and all(
        metrics.find("gpu_power_watts", uuid=uuid) for uuid in (FIRST, SECOND)
    )


def test_what_the_driver_says_is_on_the_page(running: Agent) -> None:
    metrics = running.wait_metrics("the GPUs", whole)
    assert metrics.one("gpu_power_watts", uuid=FIRST) == 412.331
    assert metrics.one("gpu_memory_used_bytes", uuid=SECOND) == 3 << 20
    assert metrics.one("gpu_info", uuid=FIRST, driver_version="550.90.07", mig_profile="") == 1
    assert metrics.one("gpu_sm_active_ratio", uuid=FIRST) == pytest.approx(0.837)


@pytest.mark.parametrize(
    ("fault", "kept"),
    [
        pytest.param(lambda driver: driver.fail("*", "*", 9), (), id="driver unloaded"),
        pytest.param(lambda driver: driver.kernel("560.35.03"), (FIRST, SECOND), id="driver updated"),
        pytest.param(lambda driver: driver.fail(0, "*", 15), (SECOND,), id="lost"),
        pytest.param(lambda driver: driver.fail("*", "*", 4), (), id="permission"),
        pytest.param(lambda driver: driver.fail("*", "*", 999), (), id="unknown error"),
        pytest.param(lambda driver: driver.count(1), (FIRST,), id="taken out"),
        pytest.param(lambda driver: driver.count(0), (), id="empty list"),
    ],
)
def test_the_agent_outlives_the_driver(running: Agent, driver: Driver, fault: Fault, kept: tuple[str, ...]) -> None:
    running.wait_metrics("the GPUs", whole)
    fault(driver)
    quick(running, 1)

    def settled(metrics: Metrics) -> bool:
        there = [uuid for uuid in (FIRST, SECOND) if metrics.find("gpu_power_watts", uuid=uuid)]
        return there == list(kept) and metrics.one("footlight_probe_up", probe="gpu") == (len(kept) == 2)

    metrics = running.wait_metrics(f"{len(kept)} GPUs", settled)
    assert [uuid for uuid in (FIRST, SECOND) if metrics.one("gpu_up", uuid=uuid)] == list(kept)
    driver.heal()
    driver.count(2)
    running.wait_metrics("the GPUs again", whole)
    assert running.alive()


def test_a_call_of_two_seconds_delays_no_scrape(running: Agent, driver: Driver) -> None:
    running.wait_metrics("the GPUs", whole)
    driver.delay(0, "nvmlDeviceGetPowerUsage", 2000)
    metrics = quick(running, 3)
    assert metrics.one("gpu_power_watts", uuid=FIRST) == 412.331
    assert metrics.one("footlight_gpu_look_seconds") > 2
    driver.heal()
    running.wait_metrics("quick looks", lambda page: page.one("footlight_gpu_look_seconds") < 1)
