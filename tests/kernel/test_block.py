"""The block probe against loop devices: what a service asked for is counted exactly, and nobody else's I/O is.

The cross-check: `biolatency` (libbpf-tools) sees the same requests, but prints only powers of two, so its mean is
known only within a factor. Two things are compared instead. The probe's own records, put into biolatency's buckets,
must have the mean of the buckets that biolatency printed, both taken from the middle of the buckets: that shows that
both mean the same time of the same requests. And bpftrace adds up issue to completion by the classic tracepoints: that
is an exact sum of a third observer, whose mean is compared with the histogram's. It may miss some: the kernel skips a
program on a classic tracepoint that interrupts another such program. Means are over what each one saw.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from shutil import which
from typing import ClassVar

import numpy as np
import pytest

from benchmarks.common import cgroups
from benchmarks.common.cgroups import Group
from probes.block import BlockProbe
from probes.btf import dtype_of, enum_of
from probes.probe import OBJECTS, Count, Transport
from tests.kernel.one_probe import OneProbe, Worker, again, attached, fill

READ, WRITE, FLUSH, DISCARD = range(4)
KIB = 1024


@dataclass(frozen=True)
class Disk:
    """A loop device, which bypasses the page cache of the file behind it."""

    path: str
    major: int
    minor: int

    @property
    def number(self) -> int:
        return self.major << 20 | self.minor


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Disk]:
    image = tmp_path_factory.mktemp("disk") / "image"
    image.write_bytes(bytes(16 << 20))
    os.sync()
    command = ["losetup", "--find", "--show", "--direct-io=on", str(image)]
    path = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    try:
        number = os.stat(path).st_rdev
        yield Disk(path, os.major(number), os.minor(number))
    finally:
        subprocess.run(["losetup", "--detach", path], check=True)


@pytest.fixture(scope="module", params=list(Transport), ids=lambda transport: transport.value)
def shared(request: pytest.FixtureRequest) -> Iterator[OneProbe]:
    with attached(BlockProbe(request.param, services=2)) as probe:
        yield probe


@pytest.fixture
def probe(shared: OneProbe) -> Iterator[OneProbe]:
    """The attached probe over both transports, as if it had seen nothing."""
    shared.restart()
    yield shared
    shared.restart()


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as result:
        yield result


@pytest.fixture
def worker(stack: ExitStack) -> Worker:
    return Worker(stack)


@pytest.fixture
def stranger(stack: ExitStack) -> Worker:
    return Worker(stack)


@pytest.fixture
def cgroup() -> Iterator[Group]:
    """A block cgroup; its processes must have ended, or leave, when the test is over."""
    if (advice := cgroups.missing("io")) is not None:
        pytest.skip(advice)
    with cgroups.group("io") as group:
        yield group


def total(probe: OneProbe, operation: int, service: int = 0) -> int:
    """How many I/Os of one kind the histogram has."""
    return int(probe.stats(service)["io"][operation]["counts"].sum())


def totals(probe: OneProbe, service: int = 0) -> list[int]:
    return [total(probe, operation, service) for operation in range(4)]


def check_records(probe: OneProbe, disk: Disk, worker: Worker, span: tuple[int, int]) -> None:
    """The records are those of the histograms, each by `worker`, in the order of its instants."""
    records = probe.records()
    assert set(records["device"].tolist()) == {disk.number}
    assert set(records["tgid"].tolist()) == set(records["tid"].tolist()) == {worker.pid}
    assert (span[0] <= records["queued_ns"]).all()
    assert (records["queued_ns"] <= records["issued_ns"]).all()
    assert (records["issued_ns"] <= records["done_ns"]).all()
    assert (records["done_ns"] <= span[1]).all()
    for operation in range(4):
        mine = records[records["operation"] == operation]
        assert len(mine) == total(probe, operation)
        stats = probe.stats()
        assert (mine["done_ns"] - mine["issued_ns"]).sum() == stats["io"][operation]["sum_ns"]
        assert mine["bytes"].sum() == stats["bytes"][operation]


def test_the_object_says_what_python_expects() -> None:
    path = OBJECTS / "block.bpf.o"
    dtype = dtype_of(path, "block_stats")
    assert dtype["io"].shape == dtype["bytes"].shape == (4,)
    assert list(enum_of(path, "block_operation").values()) == [READ, WRITE, FLUSH, DISCARD, 4]


@again
def test_reads_and_writes_of_a_target_are_counted_and_nobody_elses(
    probe: OneProbe, disk: Disk, worker: Worker, stranger: Worker
) -> None:
    probe.restart()
    probe.follow({worker.pid: 0})
    began, over = worker.do("read", disk.path, 101, 8 * KIB)
    for _ in range(13):  # by turns, so that both have the same memory for their requests
        stranger.do("read", disk.path, 3, 4 * KIB)
        stranger.do("write", disk.path, 2, 4 * KIB)
        _, over = worker.do("write", disk.path, 5, 4 * KIB)
    assert totals(probe) == [101, 65, 0, 0]
    assert totals(probe, 1) == [0, 0, 0, 0]
    assert probe.stats()["bytes"].tolist() == [101 * 8 * KIB, 65 * 4 * KIB, 0, 0]
    check_records(probe, disk, worker, (began, over))
    assert not probe.losses()


@again
def test_each_service_has_its_own(probe: OneProbe, disk: Disk, worker: Worker, stranger: Worker) -> None:
    probe.restart()
    probe.follow({worker.pid: 0, stranger.pid: 1})
    worker.do("read", disk.path, 7, 4 * KIB)
    stranger.do("read", disk.path, 23, 4 * KIB)
    assert (total(probe, READ), total(probe, READ, 1)) == (7, 23)
    records = probe.records()
    assert records["tgid"][records["service"] == 1].tolist() == [stranger.pid] * 23
    assert not probe.losses()


@again
def test_what_was_split_is_charged_as_a_whole(probe: OneProbe, disk: Disk, worker: Worker) -> None:
    probe.restart()
    probe.follow({worker.pid: 0})
    span = worker.do("read", disk.path, 2, 7 << 20)
    assert total(probe, READ) > 2
    assert probe.stats()["bytes"][READ] == 14 << 20
    check_records(probe, disk, worker, span)
    assert not probe.losses()
    assert list(probe.raw.map("bios").items()) == list(probe.raw.map("requests").items()) == []


@again
def test_what_was_merged_is_one_request(probe: OneProbe, disk: Disk, worker: Worker, stranger: Worker) -> None:
    probe.restart()
    probe.follow({worker.pid: 0})
    stranger.do("read_at_once", disk.path, 31, 4 * KIB)
    span = worker.do("read_at_once", disk.path, 31, 4 * KIB)
    assert 1 <= total(probe, READ) < 31
    assert probe.stats()["bytes"][READ] == 31 * 4 * KIB
    check_records(probe, disk, worker, span)
    assert list(probe.raw.map("bios").items()) == list(probe.raw.map("requests").items()) == []


@again
def test_a_flush_takes_from_asking_to_answer(probe: OneProbe, disk: Disk, worker: Worker, stranger: Worker) -> None:
    probe.restart()
    probe.follow({worker.pid: 0})
    stranger.do("flush", disk.path, 3)
    span = worker.do("flush", disk.path, 13)
    assert totals(probe) == [0, 0, 13, 0]
    check_records(probe, disk, worker, span)
    records = probe.records()
    assert (records["queued_ns"] <= records["issued_ns"]).all()
    assert set(records["bytes"].tolist()) == {0}


@again
def test_discards(probe: OneProbe, disk: Disk, worker: Worker) -> None:
    probe.restart()
    probe.follow({worker.pid: 0})
    span = worker.do("discard", disk.path, 3, 1 << 20)
    assert totals(probe) == [0, 0, 0, 3]
    assert probe.stats()["bytes"][DISCARD] == 3 << 20
    check_records(probe, disk, worker, span)


@again
def test_a_loop_devices_own_io_is_not_charged_again(
    probe: OneProbe, disk: Disk, worker: Worker, cgroup: Group
) -> None:
    """The device's worker takes over the cgroup of what it was asked for: its writes look like the service's."""
    probe.restart()
    cgroup.add(worker.pid)
    probe.follow({worker.pid: 0})
    with followed_cgroup(probe, cgroup, 0):
        worker.do("write", disk.path, 43, 4 * KIB)
    assert totals(probe) == [0, 43, 0, 0]
    assert set(probe.records()["device"].tolist()) == {disk.number}


@contextmanager
def followed_cgroup(probe: OneProbe, group: Group, service: int) -> Iterator[None]:
    assert isinstance(probe.raw, BlockProbe)
    probe.raw.follow_cgroups({group.number: service})
    yield
    probe.raw.follow_cgroups({})


@again
def test_throttled_reads_are_charged_by_their_cgroup(
    probe: OneProbe, disk: Disk, worker: Worker, cgroup: Group
) -> None:
    """Who waits for its turn is submitted by a kernel thread; only the cgroup says for whom."""
    probe.restart()
    cgroup.add(worker.pid)
    cgroup.limit_io(f"{disk.major}:{disk.minor}", "riops", 40)
    probe.follow({worker.pid: 0})
    with followed_cgroup(probe, cgroup, 0):
        worker.do("read", disk.path, 23, 4 * KIB)
    assert totals(probe) == [23, 0, 0, 0]
    records = probe.records()
    for_it, by_it = records[records["tid"] == 0], records[records["tid"] == worker.pid]
    assert len(for_it) + len(by_it) == 23
    assert len(for_it) > 0
    assert not for_it["queued_ns"].any()
    assert not for_it["tgid"].any()
    assert by_it["queued_ns"].all()
    assert set(records["device"].tolist()) == {disk.number}


@again
def test_a_cgroup_is_charged_without_a_target(
    probe: OneProbe, disk: Disk, worker: Worker, stranger: Worker, cgroup: Group
) -> None:
    probe.restart()
    cgroup.add(worker.pid)
    with followed_cgroup(probe, cgroup, 1):
        worker.do("read", disk.path, 17, 4 * KIB)
        stranger.do("read", disk.path, 5, 4 * KIB)
    worker.do("read", disk.path, 3, 4 * KIB)
    assert (totals(probe), totals(probe, 1)) == ([0, 0, 0, 0], [17, 0, 0, 0])
    assert set(probe.records()["tgid"].tolist()) == {0}


class Small(BlockProbe):
    """A probe with room for one in the tables that are named."""

    small: ClassVar[Sequence[str]] = ()

    def _set_up(self) -> None:
        for name in self.small:
            self.map(name).max_entries = 1


class WithoutBios(Small):
    small = ("bios",)


class WithoutRequests(Small):
    small = ("requests",)


@again
@pytest.mark.parametrize("kind", [WithoutBios, WithoutRequests])
def test_a_full_table_counts_what_it_did_not_time(kind: type[Small], disk: Disk, worker: Worker) -> None:
    with attached(kind(Transport.RING)) as probe:
        fill(probe.raw, *kind.small)
        probe.follow({worker.pid: 0})
        worker.do("read", disk.path, 47, 4 * KIB)
        assert probe.counted(Count.BLOCK_IOS_FULL) == 47
        assert totals(probe) == [0, 0, 0, 0]
        assert not len(probe.records())


@again
def test_a_full_ring_loses_records_but_no_count(disk: Disk, worker: Worker) -> None:
    with attached(BlockProbe(Transport.RING, sizes={"block_ios": 4096})) as probe:
        probe.follow({worker.pid: 0})
        worker.do("read", disk.path, 101, 4 * KIB)
        assert total(probe, READ) == 101
        assert probe.counted(Count.SEEN_BLOCK_IOS) == 101
        lost = probe.counted(Count.LOST_BLOCK_IOS_RING_FULL)
        assert lost > 0
        assert len(probe.records()) == 101 - lost


# ---- cross-check, see above ----

READS = 251 + 4 * 61
SUM_SCRIPT = """
tracepoint:block:block_rq_issue /args->dev == {dev}/ {{ @issued[args->sector] = nsecs; }}
tracepoint:block:block_rq_complete /args->dev == {dev} && @issued[args->sector]/ {{
    @sum = sum(nsecs - @issued[args->sector]); @count = count(); delete(@issued[args->sector]);
}}
interval:ms:100 /!@ready/ {{ @ready = 1; printf("ready\\n"); }}
END {{ clear(@issued); }}
"""


@contextmanager
def observer(command: list[str], ready: str, said: list[str]) -> Iterator[None]:
    """Run a tool from when it says `ready` to the end of the block; `said` gets what it says after that."""
    process = subprocess.Popen(
        ["stdbuf", "-oL", *command], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if ready in line:
                break
        else:
            pytest.fail(f"{command[0]} ended before it was ready")
        yield
        process.send_signal(signal.SIGINT)
        said += process.stdout
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@again
def test_means_agree_with_biolatency_and_bpftrace(disk: Disk, worker: Worker) -> None:
    for tool, package in (("biolatency", "libbpf-tools"), ("bpftrace", "bpftrace")):
        if which(tool) is None:
            pytest.skip(f"needs {tool}: apt-get install {package}")
    buckets: list[str] = []
    sums: list[str] = []
    script = SUM_SCRIPT.format(dev=disk.number)
    with ExitStack() as stack:
        stack.enter_context(observer(["bpftrace", "-q", "-f", "json", "-e", script], "ready", sums))
        name = Path(disk.path).name
        stack.enter_context(observer(["biolatency", "-d", name], "Tracing", buckets))
        probe = stack.enter_context(attached(BlockProbe(Transport.RING)))
        probe.follow({worker.pid: 0})
        worker.do("read", disk.path, 251, 64 * KIB)
        for _ in range(4):
            worker.do("read", disk.path, 61, 256 * KIB)
        seen = total(probe, READ)
        assert READS * 0.98 <= seen <= READS
        records = probe.records()
        stats = probe.stats()["io"][READ]

    rows = [re.match(r"\s*(\d+) -> (\d+)\s*: (\d+)\s", line) for line in buckets]
    printed = [(int(row[1]), int(row[2]), int(row[3])) for row in rows if row is not None]
    printed_count = sum(count for _, _, count in printed)
    assert READS * 0.98 <= printed_count <= READS
    theirs = sum((low + high) / 2 * count for low, high, count in printed) / printed_count
    slots = np.floor(np.log2((records["done_ns"] - records["issued_ns"]) // 1000)).astype(int)
    middles = [(low + high) / 2 for low, high, _ in printed]
    ours = float(np.mean([middles[slot] for slot in slots]))
    assert ours == pytest.approx(theirs, rel=0.05)

    said = [json.loads(line) for line in sums if line.startswith("{")]
    added = {key: value for each in said if each["type"] == "map" for key, value in each["data"].items()}
    assert READS * 0.8 <= added["@count"] <= READS
    mean_ns = int(stats["sum_ns"]) / seen
    assert mean_ns == pytest.approx(added["@sum"] / added["@count"], rel=0.05)
    print(f"mean us: ours {mean_ns / 1e3:.1f}, bpftrace {added['@sum'] / added['@count'] / 1e3:.1f}; ", end="")
    print(f"by biolatency's buckets: ours {ours:.1f}, biolatency {theirs:.1f}")
