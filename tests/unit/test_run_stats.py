"""The cost of the probes: measured in one period of eight, and charged for all of them."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from typing import cast

import pytest

from exporter.run_stats import ONE_IN, Cost, RunStats
from probes.errors import HostError
from probes.libbpf import ProgramStats
from probes.probe import Probe

S = 1_000_000_000


class Kernel:
    """Counts what programs cost while the statistics are on; `rate` is how much in a second."""

    def __init__(self) -> None:
        self.now_ns = 7 * S
        self.on: int | None = None
        self.rate = {"a": (300, 30), "b": (700, 7)}
        self.counted = {"a": [10**9, 10**6], "b": [0, 0]}  # earlier measurements, or another agent's
        self.enabled = 0

    def enable(self) -> int:
        self.enabled += 1
        self.on = os.open(os.devnull, os.O_RDONLY)
        return self.on

    def is_on(self) -> bool:
        if self.on is None:
            return False
        try:
            os.fstat(self.on)
        except OSError:
            return False
        return True

    def pass_time(self, seconds: int) -> None:
        self.now_ns += seconds * S
        if self.is_on():
            for name, (ns, runs) in self.rate.items():
                self.counted[name][0] += seconds * ns
                self.counted[name][1] += seconds * runs


class FakeProbe:
    """Two programs whose numbers are halves of what the kernel counted."""

    def __init__(self, name: str, kernel: Kernel) -> None:
        self.name = name
        self._kernel = kernel

    def run_stats(self) -> dict[str, ProgramStats]:
        ns, runs = self._kernel.counted[self.name]
        return {
            "first": ProgramStats(ns // 2, runs // 2, 0),
            "second": ProgramStats(ns - ns // 2, runs - runs // 2, 0),
        }


@pytest.fixture
def kernel() -> Kernel:
    return Kernel()


@pytest.fixture
def measured(kernel: Kernel) -> Iterator[tuple[RunStats, Probe, Probe]]:
    first, second = (cast("Probe", FakeProbe(name, kernel)) for name in ("a", "b"))
    with RunStats((first, second), kernel.enable, lambda: kernel.now_ns) as stats:
        yield stats, first, second


def test_every_period_is_charged_as_the_one_that_was_measured(
    kernel: Kernel, measured: tuple[RunStats, Probe, Probe]
) -> None:
    stats, first, second = measured
    assert stats.of(first) == stats.of(second) == Cost(0, 0)
    for turn in range(3 * ONE_IN + 2):
        stats.turn()
        assert kernel.is_on() == (turn % ONE_IN == 0)
        kernel.pass_time(1)
    # The last measurement ended with the turn before this second and the one before it.
    seconds = 3 * ONE_IN + 1
    assert stats.of(first) == Cost(300 * seconds, 30 * seconds)
    assert stats.of(second) == Cost(700 * seconds, 7 * seconds)
    assert kernel.enabled == 4


def test_the_very_first_period_is_measured(kernel: Kernel, measured: tuple[RunStats, Probe, Probe]) -> None:
    stats, first, _ = measured
    stats.turn()
    kernel.pass_time(1)
    stats.turn()
    assert stats.of(first) == Cost(300, 30)


def test_the_cost_never_falls_and_follows_the_load(kernel: Kernel, measured: tuple[RunStats, Probe, Probe]) -> None:
    stats, first, _ = measured
    last = Cost()
    for turn in range(100):
        kernel.rate["a"] = (turn * 11, turn)
        stats.turn()
        kernel.pass_time(1)
        now = stats.of(first)
        assert now.run_ns >= last.run_ns
        assert now.runs >= last.runs
        last = now
    assert last.run_ns > 0


def test_turns_that_come_late_are_charged_by_the_clock(
    kernel: Kernel, measured: tuple[RunStats, Probe, Probe]
) -> None:
    stats, first, _ = measured
    for seconds in (5, 1, 1, 30, 1, 1, 1, 1, 3):
        stats.turn()
        kernel.pass_time(seconds)
    stats.turn()
    assert stats.of(first) == Cost(44 * 300, 44 * 30)


def test_leaving_switches_the_statistics_off(kernel: Kernel) -> None:
    probe = cast("Probe", FakeProbe("a", kernel))
    with RunStats((probe,), kernel.enable, lambda: kernel.now_ns) as stats:
        stats.turn()
        assert kernel.is_on()
    assert not kernel.is_on()
    with RunStats((probe,), kernel.enable, lambda: kernel.now_ns):
        pass


def test_a_kernel_that_does_not_measure_is_asked_once(kernel: Kernel, caplog: pytest.LogCaptureFixture) -> None:
    asked: list[int] = []

    def refuse() -> int:
        asked.append(kernel.now_ns)
        raise HostError("cannot switch on BPF run-time statistics: Invalid argument", "use Linux 5.8")

    probe = cast("Probe", FakeProbe("a", kernel))
    with caplog.at_level(logging.WARNING), RunStats((probe,), refuse, lambda: kernel.now_ns) as stats:
        for _ in range(3 * ONE_IN):
            stats.turn()
            kernel.pass_time(1)
            assert stats.of(probe) is None
    assert len(asked) == 1
    assert caplog.text.count("cannot switch on BPF run-time statistics") == 1
