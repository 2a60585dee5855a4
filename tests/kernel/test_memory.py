"""The memory probe against memory cgroups: reclaim of a service's threads is seen as spans, a victim counts once."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from benchmarks.common import cgroups
from benchmarks.common.cgroups import Group
from probes.btf import enum_of
from probes.memory import MemoryProbe
from probes.probe import OBJECTS, Count, Transport
from tests.kernel.one_probe import OneProbe, Worker, attached, fill

LIMIT_BYTES = 24 << 20
FILE_BYTES = 48 << 20


@pytest.fixture(scope="module", params=list(Transport), ids=lambda transport: transport.value)
def shared(request: pytest.FixtureRequest) -> Iterator[OneProbe]:
    with attached(MemoryProbe(request.param, services=2)) as probe:
        yield probe


@pytest.fixture
def probe(shared: OneProbe) -> Iterator[OneProbe]:
    """The attached probe over both transports, as if it had seen nothing."""
    shared.restart()
    yield shared
    shared.restart()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file that is larger than the cgroup may hold."""
    path = tmp_path_factory.mktemp("memory") / "file"
    path.write_bytes(bytes(FILE_BYTES))
    os.sync()
    return path


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as result:
        yield result


@pytest.fixture
def limited() -> Iterator[Group]:
    """A memory cgroup with a limit; what is left in it leaves when the test is over."""
    if (advice := cgroups.missing("memory")) is not None:
        pytest.skip(advice)
    with cgroups.group("memory") as group:
        group.limit_memory(LIMIT_BYTES)
        yield group


def evict(file: Path) -> None:
    """Drop the file's pages, so that whoever reads it next is charged for them."""
    with open(file, "rb") as opened:
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def test_reclaim_of_a_targets_threads_is_spans(probe: OneProbe, limited: Group, file: Path, stack: ExitStack) -> None:
    worker, stranger = Worker(stack), Worker(stack)
    for each in (worker, stranger):
        limited.add(each.pid)
    probe.follow({worker.pid: 1})
    evict(file)
    began, over = worker.do("scan", file, 2)
    evict(file)
    stranger.do("scan", file, 1)

    spans = probe.records()
    assert len(spans) > 10
    assert set(spans["tid"].tolist()) == set(spans["tgid"].tolist()) == {worker.pid}
    assert set(spans["service"].tolist()) == {1}
    assert set(spans["kind"].tolist()) == {enum_of(OBJECTS / "memory.bpf.o", "span_kind")["SPAN_RECLAIM"]}
    assert began <= spans["begin_ns"][0]
    assert spans["end_ns"][-1] <= over
    assert (spans["begin_ns"] < spans["end_ns"]).all()
    assert (spans["end_ns"][:-1] <= spans["begin_ns"][1:]).all()

    stats = probe.stats(1)
    assert stats["direct_reclaim"]["counts"].sum() == len(spans)
    assert stats["direct_reclaim"]["sum_ns"] == (spans["end_ns"] - spans["begin_ns"]).sum()
    assert stats["reclaimed_pages"] * os.sysconf("SC_PAGE_SIZE") >= FILE_BYTES - LIMIT_BYTES
    assert stats["oom_kills"] == 0
    assert not probe.stats(0)["direct_reclaim"]["counts"].any()
    assert not probe.losses()
    assert not list(probe.raw.map("reclaims").items())


def test_each_thread_has_its_own_spans(probe: OneProbe, limited: Group, file: Path, stack: ExitStack) -> None:
    worker = Worker(stack)
    limited.add(worker.pid)
    probe.follow({worker.pid: 0})
    evict(file)
    worker.do("scan_together", file, 3)
    spans = probe.records()
    assert set(spans["tgid"].tolist()) == {worker.pid}
    assert len(set(spans["tid"].tolist()) - {worker.pid}) == 3
    for tid in set(spans["tid"].tolist()):
        mine = spans[spans["tid"] == tid]
        assert (mine["end_ns"][:-1] <= mine["begin_ns"][1:]).all()


def test_a_process_that_the_oom_killer_chose_counts_once(probe: OneProbe, limited: Group, stack: ExitStack) -> None:
    for _ in range(3):
        worker, stranger = Worker(stack), Worker(stack)
        probe.follow({worker.pid: 0})
        for each in (stranger, worker):
            limited.add(each.pid)
            assert each.die_of("eat", 7, LIMIT_BYTES) == -signal.SIGKILL
    assert probe.stats(0)["oom_kills"] == 3
    assert probe.stats(1)["oom_kills"] == 0
    assert not list(probe.raw.map("victims").items())
    assert not list(probe.raw.map("reclaims").items())


class Small(MemoryProbe):
    """A probe with room for one thread."""

    def _set_up(self) -> None:
        self.map("reclaims").max_entries = 1


def test_a_full_table_counts_what_it_did_not_time(
    probe: OneProbe, limited: Group, file: Path, stack: ExitStack
) -> None:
    worker = Worker(stack)
    limited.add(worker.pid)
    with attached(Small(Transport.RING)) as small:
        fill(small.raw, "reclaims")
        for each in (small, probe):
            each.follow({worker.pid: 0})
        evict(file)
        worker.do("scan", file, 1)
        assert small.counted(Count.SPANS_FULL) == probe.counted(Count.SEEN_SPANS) > 0
        assert not len(small.records())


def test_a_full_ring_loses_spans_but_no_count(limited: Group, file: Path, stack: ExitStack) -> None:
    worker = Worker(stack)
    limited.add(worker.pid)
    with attached(MemoryProbe(Transport.RING, sizes={"spans": 4096})) as probe:
        probe.follow({worker.pid: 0})
        for _ in range(100):
            worker.do("scan", file, 1)
            if probe.counted(Count.LOST_SPANS_RING_FULL):
                break
        seen, lost = probe.counted(Count.SEEN_SPANS), probe.counted(Count.LOST_SPANS_RING_FULL)
        assert probe.stats()["direct_reclaim"]["counts"].sum() == seen
        assert lost > 0
        assert len(probe.records()) == seen - lost
