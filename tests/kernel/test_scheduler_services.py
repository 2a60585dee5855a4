"""The scheduler probe when a process goes to another service: from then on its time is the other one's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest

from probes.probe import Transport
from probes.scheduler import SchedulerProbe
from tests.kernel.conftest import Probe
from tests.kernel.scheduling import FIRST, Watched, Workload, until

# As in test_scheduler.py: there are kernels that leave out switches.


@pytest.fixture(scope="module")
def two_services(shared_probe: Probe, transport: Transport) -> Iterator[Watched]:
    """The attached probe with room for two services."""
    with ExitStack() as stack:
        probe = stack.enter_context(SchedulerProbe(transport, services=2, shares_with=shared_probe.raw))
        probe.attach()
        yield Watched(shared_probe.raw, probe, stack)


@pytest.fixture
def both(two_services: Watched) -> Iterator[Watched]:
    """What this test sees of it."""
    two_services.begin()
    yield two_services
    two_services.requests.follow({}, {})


def test_time_counts_for_the_service_that_a_process_belongs_to_now(both: Watched) -> None:
    """An engine is its API server's child until it opens its port; its threads were born long before."""
    with Workload("sleeps", 1009) as workload:
        facts = go_to_another_service(both, workload)
    every = both.intervals()
    mine = np.sort(every[every["tid"] == facts["tid"]], order="sequence")
    (change,) = np.flatnonzero(np.diff(mine["service"]))
    assert (mine["service"][change], mine["service"][change + 1]) == (0, 1)
    # nothing of it was missed meanwhile
    assert (np.diff(mine["sequence"]) == 1).all()
    assert not mine["flags"][1:].any() & FIRST


def test_time_counts_for_the_service_under_which_a_process_is_followed_again(both: Watched) -> None:
    with Workload("sleeps", 1009) as workload:
        go_to_another_service(both, workload, {})


def go_to_another_service(both: Watched, workload: Workload, *between: dict[int, int]) -> dict[str, Any]:
    """Follow it under the first service, then whom each of `between` says, then it under the second one."""
    begun = both.stats.totals().copy()

    def switches(service: int) -> int:
        return int(both.stats.totals()[service]["switches"] - begun[service]["switches"])

    both.requests.follow({workload.pid: 0}, {})
    workload.go()
    until(lambda: switches(0) > 50, "sleeps count for the first service")
    assert switches(1) == 0
    for processes in (*between, {workload.pid: 1}):
        both.requests.follow(processes, {})
    until(lambda: switches(1) > 0, "sleeps count for the second service")
    of_the_first = both.stats.totals()[0].copy()
    facts = workload.facts()
    both.drain()
    assert both.stats.totals()[0] == of_the_first
    assert switches(1) > 500
    return facts
