"""Waits for a GPU, with terminals in place of its device files: how many, how long, and which ones are none."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exporter.critical_path import Cause, Window, totals, walk
from exporter.timeline import Timeline
from tests.kernel.scheduling import (
    GPU,
    IOWAIT,
    Reason,
    Records,
    Watched,
    Workload,
    follow,
    scheduler,
    watch,
)

__all__ = ["scheduler", "watch"]  # fixtures

SCRIPT = Path(__file__).parent / "workloads" / "gpu_waits.py"
WAITS = 53
MS = 1_000_000
LONG_NS = 2 * MS
"""Waits of the workload are longer, and nothing else that it does sleeps so long on a device."""
MAJORS = (136, 137)
DEVICES = frozenset(major << 20 | minor for major in MAJORS for minor in range(256))
"""Every terminal."""


@pytest.fixture
def gpus(watch: Watched) -> Iterator[Watched]:
    """Every terminal is a GPU."""
    watch.probe.follow_gpu_devices(DEVICES)
    yield watch
    watch.probe.follow_gpu_devices(frozenset())


def gpu_wait(watch: Watched) -> tuple[int, int]:
    """How many waits for GPUs the kernel counted since the test began, and their sum in nanoseconds."""
    before, after = watch.totals_at_begin["gpu_wait"], watch.stats.totals()[0]["gpu_wait"]
    return int(after["counts"].sum() - before["counts"].sum()), int(after["sum_ns"] - before["sum_ns"])


def waits_of(watch: Watched, facts: dict[str, Any]) -> list[Records]:
    """The sleeps of the thread that lie in each of the waits that the workload tells of."""
    mine = watch.intervals(facts)
    mine = mine[mine["wake_ns"] > 0]
    return [mine[(mine["off_ns"] >= begin) & (mine["on_ns"] <= end)] for begin, end in facts["waits"]]


@pytest.mark.parametrize(
    "scenario",
    ["poll", "poll_with_timeout", "ppoll", "ppoll_with_timeout", "poll_with_eventfd", "poll_two", "poll_eight"],
)
def test_a_poll_of_gpus_is_counted_once_for_as_long_as_it_was(gpus: Watched, scenario: str) -> None:
    _, facts = gpus.run(scenario, script=SCRIPT)
    every = gpus.intervals(facts)
    found = every[(every["flags"] & GPU) > 0]
    assert len(facts["waits"]) == WAITS
    assert len(found) == WAITS
    assert set(found["reason"]) == {Reason.DEVICE}
    assert set(found["object"]) == {facts["device"]}
    slept_ns = (found["wake_ns"] - found["off_ns"]).astype(np.int64)
    assert gpu_wait(gpus) == (WAITS, int(slept_ns.sum()))
    for (begin_ns, end_ns), wait in zip(facts["waits"], found, strict=True):
        assert begin_ns <= wait["off_ns"] < wait["wake_ns"] <= wait["on_ns"] <= end_ns
    said_ns = np.array([end_ns - begin_ns for begin_ns, end_ns in facts["waits"]])
    # less what the thread did before and after, for which it may have waited for its CPU
    assert np.median(said_ns - slept_ns) < MS
    assert not gpus.losses()


@pytest.mark.parametrize("scenario", ["read", "ioctl"])
def test_a_call_on_a_gpu_is_one_wait_for_each_time_that_it_sleeps(gpus: Watched, scenario: str) -> None:
    _, facts = gpus.run(scenario, script=SCRIPT)
    slept_ns, sleeps = [], 0
    for every in waits_of(gpus, facts):
        inside = every[every["reason"] == Reason.DEVICE]
        assert len(inside) >= 1
        assert set(inside["object"]) == {facts["device"]}
        assert ((inside["flags"] & GPU) > 0).all()
        slept_ns.append(int((inside["wake_ns"] - inside["off_ns"]).sum()))
        sleeps += len(inside)
    said_ns = np.array([end_ns - begin_ns for begin_ns, end_ns in facts["waits"]])
    assert len(slept_ns) == WAITS
    assert np.median(said_ns - np.array(slept_ns)) < MS
    assert gpu_wait(gpus) == (sleeps, sum(slept_ns))


@pytest.mark.parametrize(
    "scenario",
    [
        *("poll_nine", "poll_with_socket", "poll_with_pipe", "poll_with_epoll", "poll_timer", "ppoll_timer"),
        *("poll_nudged", "epoll", "selects"),
    ],
)
def test_a_wait_that_may_be_for_something_else_is_none(gpus: Watched, scenario: str) -> None:
    _, facts = gpus.run(scenario, script=SCRIPT)
    sleeps = 0
    for every in waits_of(gpus, facts):
        inside = every[every["reason"] == Reason.POLL]
        assert not inside["object"].any()
        assert not (every["flags"] & GPU).any()
        sleeps += len(inside)
    assert sleeps > WAITS // 2  # on a busy host what is waited for may be there already
    assert not gpus.losses()


def test_who_polls_one_gpu_and_one_terminal_waits_for_neither(watch: Watched) -> None:
    with Workload("poll_two", script=SCRIPT) as workload:
        # the terminals are made before it is ready, the first one is the GPU
        (device, _) = terminals_of(workload.pid)
        watch.probe.follow_gpu_devices(frozenset({device}))
        follow(watch.requests, workload)
        facts = workload.done()
        watch.drain()
    watch.probe.follow_gpu_devices(frozenset())
    assert facts["device"] == device
    assert gpu_wait(watch) == (0, 0)


def terminals_of(pid: int) -> list[int]:
    """Device numbers of the terminals that a process has open, in the order of its descriptors."""
    links = sorted(Path(f"/proc/{pid}/fd").iterdir(), key=lambda link: int(link.name))
    names = [link.readlink() for link in links if str(link.readlink()).startswith("/dev/pts/")]
    return [136 + int(name.name) // 256 << 20 | int(name.name) % 256 for name in names if name.name.isdecimal()]


@pytest.mark.parametrize(("scenario", "reason"), [("poll", Reason.POLL), ("read", Reason.DEVICE)])
def test_without_gpus_nothing_is_one(watch: Watched, scenario: str, reason: Reason) -> None:
    _, facts = watch.run(scenario, script=SCRIPT)
    for every in waits_of(watch, facts):
        inside = every[every["reason"] == reason]
        assert set(inside["object"]) == {0 if reason is Reason.POLL else facts["device"]}
    assert not (watch.intervals()["flags"] & GPU).any()
    assert gpu_wait(watch) == (0, 0)


def test_a_gpu_that_is_gone_is_none_any_more(watch: Watched) -> None:
    watch.probe.follow_gpu_devices(DEVICES)
    watch.probe.follow_gpu_devices(frozenset({195 << 20}))
    _, facts = watch.run("poll", script=SCRIPT)
    watch.probe.follow_gpu_devices(frozenset())
    assert len(facts["waits"]) == WAITS
    assert gpu_wait(watch) == (0, 0)


def test_strangers_wait_uncounted(gpus: Watched) -> None:
    with Workload("poll", script=SCRIPT) as stranger:
        follow(gpus.requests)
        assert len(stranger.done()["waits"]) == WAITS
        gpus.drain()
    assert gpu_wait(gpus) == (0, 0)
    assert not len(gpus.intervals())


def test_deep_sleeps_inside_an_ioctl_are_the_device_s(watch: Watched) -> None:
    if not Path("/dev/loop-control").exists():
        pytest.skip("needs /dev/loop-control: modprobe loop")
    watch.probe.follow_gpu_devices(frozenset({10 << 20 | 237}))
    _, facts = watch.run("loop_devices", script=SCRIPT)
    watch.probe.follow_gpu_devices(frozenset())
    mine = watch.intervals(facts)
    slept = mine[mine["wake_ns"] > 0]
    of_device = slept[slept["reason"] == Reason.DEVICE]
    assert facts["device"] == 10 << 20 | 237
    assert len(of_device) >= 5  # removing a device waits for the kernel's readers to be gone
    assert (((of_device["flags"] & GPU) > 0) == ((of_device["flags"] & IOWAIT) == 0)).all()
    assert Reason.DISK not in set(slept["reason"])


# ---- to the end: the critical path over the kernel's own records ----


def path_of(watch: Watched, facts: dict[str, Any]) -> dict[Cause, int]:
    timeline = Timeline(1 << 24)
    timeline.add_intervals(watch.records("intervals"))
    timeline.add_messages(watch.records("messages"))
    (begin_ns, _), (_, end_ns) = facts["waits"][0], facts["waits"][-1]
    window = Window(begin_ns, end_ns, writer_tid=facts["tid"], arrived_ns=begin_ns)
    return totals(walk(timeline.view(begin_ns, end_ns), window))


@pytest.mark.parametrize("scenario", ["poll", "poll_with_eventfd", "read", "ioctl"])
def test_the_path_through_waits_for_a_gpu_is_the_gpu_s(gpus: Watched, scenario: str) -> None:
    _, facts = gpus.run(scenario, script=SCRIPT)
    parts = path_of(gpus, facts)
    assert parts[Cause.gpu] == gpu_wait(gpus)[1]
    assert parts[Cause.gpu] > WAITS * LONG_NS


def test_without_gpus_the_path_says_nothing_of_them(watch: Watched) -> None:
    _, facts = watch.run("read", script=SCRIPT)
    assert path_of(watch, facts)[Cause.gpu] == 0
