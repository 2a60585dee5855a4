"""kernel_gpu_wait_seconds: the kernel's histogram by service, and nothing where no GPU's device file is known."""

import numpy as np
import pytest

from exporter.families import Point, Scrape
from exporter.kernel_metrics import kernel_families
from exporter.slis import Histogram
from exporter.status import AgentStatus, ReaderStatus
from probes import btf
from probes.probe import OBJECTS


def points(gpu_devices: int | None, probe: str = "scheduler") -> list[Point]:
    dtype = btf.dtype_of(OBJECTS / "scheduler.bpf.o", "scheduler_stats")
    counted = np.zeros(2, dtype)
    counted["gpu_wait"]["sum_ns"][0] = 53_000_000
    counted["gpu_wait"]["counts"][0][12] = 53
    status = AgentStatus(0, "ring", (), (), 0, (), gpu_devices=gpu_devices)
    scrape = Scrape(0, 0.0, (), status, ReaderStatus(0), services=("roleplay", "idle"), kernel={probe: counted})
    (family,) = (family for family in kernel_families() if family.spec.name == "kernel_gpu_wait_seconds")
    return list(family.points(scrape))


def test_waits_are_those_of_their_service() -> None:
    (busy_labels, busy), (idle_labels, idle) = points(gpu_devices=5)
    assert (busy_labels, idle_labels) == (("roleplay",), ("idle",))
    assert isinstance(busy, Histogram)
    assert isinstance(idle, Histogram)
    assert (busy.sum_ns, sum(busy.counts), busy.counts[12]) == (53_000_000, 53, 53)
    assert sum(idle.counts) == 0


@pytest.mark.parametrize("gpu_devices", [None, 0])
def test_without_a_known_device_it_is_absent(gpu_devices: int | None) -> None:
    assert points(gpu_devices) == []


def test_without_the_scheduler_probe_it_is_absent() -> None:
    assert points(5, probe="tcp") == []
