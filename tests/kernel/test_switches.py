"""The counter of switches against what threads and the kernel count themselves."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from probes import libbpf, switches
from probes.probe import OBJECTS

SLEEPS = 211


@pytest.fixture
def counting() -> Iterator[libbpf.Object]:
    with libbpf.Object(OBJECTS / switches.OBJECT) as programs:
        programs.load()
        programs.attach()
        yield programs


def test_a_threads_switches_are_counted(counting: libbpf.Object) -> None:
    tid = int(Path("/proc/thread-self").resolve().name).to_bytes(4, "little")
    usage = resource.getrusage(resource.RUSAGE_THREAD)
    for _ in range(SLEEPS):
        time.sleep(0.0005)
    found = counting.map("threads").lookup(tid)
    now = resource.getrusage(resource.RUSAGE_THREAD)
    own = now.ru_nvcsw + now.ru_nivcsw - usage.ru_nvcsw - usage.ru_nivcsw
    assert found is not None
    came, went = int.from_bytes(found[:8], "little"), int.from_bytes(found[8:], "little")
    assert went >= SLEEPS
    assert abs(went - own) <= 2  # at the edges
    assert went - 2 <= came + SLEEPS // 10  # some come after a hidden thread, and that is not told


def test_nothing_is_left_out_where_the_kernel_counts_no_more_than_it_tells() -> None:
    found = switches.observe(0.2, counted=lambda: 17)
    assert (found.counted, found.left_out, found.silent) == (0, 0, ())


def test_what_was_counted_and_not_told_is_left_out() -> None:
    own = iter([0, 10**9])
    found = switches.observe(0.2, counted=lambda: next(own))
    assert found.counted == 10**9
    assert 0 < 10**9 - found.left_out < 10**8


def test_the_kernels_count_is_about_what_is_told() -> None:
    found = switches.observe(0.5)
    assert found.counted > 0
    assert found.left_out < found.counted / 2
