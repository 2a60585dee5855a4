"""The scheduler probe: what threads slept on, who woke them, how long they waited for a CPU."""

from __future__ import annotations

import os
import re
import shutil
import signal
import struct
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from benchmarks.common import cgroups
from probes import btf
from probes.probe import OBJECTS, Count, Transport
from tests.kernel.conftest import Probe
from tests.kernel.scheduling import (
    BORN,
    FIRST,
    IOWAIT,
    NO_SYSCALL,
    THROTTLED,
    TIMEOUT,
    WAKER_TARGET,
    Reason,
    Records,
    Waker,
    Watched,
    Workload,
    follow,
    scheduler,
    until,
    watch,
    watching,
)

__all__ = ["scheduler", "watch"]  # fixtures

OBJECT = OBJECTS / "scheduler.bpf.o"
LAST_CPU = max(os.sched_getaffinity(0))


def in_order(intervals: Records) -> Records:
    """The intervals of one thread by sequence, which has no hole and whose instants never go back."""
    mine = np.sort(intervals, order="sequence")
    assert (np.diff(mine["sequence"]) == 1).all()
    assert (mine["off_ns"] <= mine["on_ns"]).all()
    assert (mine["on_ns"][:-1] <= mine["off_ns"][1:]).all()
    slept = mine[mine["wake_ns"] > 0]
    assert ((slept["off_ns"] <= slept["wake_ns"]) & (slept["wake_ns"] <= slept["on_ns"])).all()
    return mine


@pytest.fixture
def big_file() -> Iterator[Path]:
    """8 MiB on a disk, not in memory."""
    with tempfile.NamedTemporaryFile(dir="/var/tmp") as file:
        file.write(os.urandom(1 << 20) * 8)
        file.flush()
        os.fsync(file.fileno())
        yield Path(file.name)


def test_the_enums_are_those_of_c() -> None:
    for ours, theirs, prefix in ((Reason, "wait_reason", "WAIT_"), (Waker, "waker", "WAKER_")):
        assert {prefix + each.name: each.value for each in ours} == btf.enum_of(OBJECT, theirs)


# ---- reasons and wakers ----


@pytest.mark.parametrize(
    ("scenario", "reason", "waker", "flags"),
    [
        ("lock", Reason.FUTEX, Waker.TASK, WAKER_TARGET),
        ("lock_timeout", Reason.FUTEX, Waker.HARDIRQ, TIMEOUT),
        ("epoll_timeout", Reason.POLL, Waker.HARDIRQ, TIMEOUT),
        ("poll_forever", Reason.POLL, Waker.TASK, WAKER_TARGET),
        ("select_timeout", Reason.POLL, Waker.HARDIRQ, TIMEOUT),
        ("pipe", Reason.PIPE, Waker.TASK, WAKER_TARGET),
        ("eventfd", Reason.PIPE, Waker.TASK, WAKER_TARGET),
        ("unix", Reason.SOCKET, Waker.MESSAGE, WAKER_TARGET),
        ("unix_epoll", Reason.POLL, Waker.MESSAGE, WAKER_TARGET),
        ("tcp", Reason.SOCKET, Waker.MESSAGE, WAKER_TARGET),
        ("tcp6_epoll", Reason.POLL, Waker.MESSAGE, WAKER_TARGET),
        ("timer", Reason.TIMER, Waker.HARDIRQ, 0),
    ],
)
def test_a_wait_has_its_reason_and_its_waker(
    watch: Watched, scenario: str, reason: Reason, waker: Waker, flags: int
) -> None:
    pid, facts = watch.run(scenario)
    wait = watch.wait(facts)
    assert (Reason(wait["reason"]), Waker(wait["waker"]), wait["flags"]) == (reason, waker, flags)
    assert facts["begin_ns"] < wait["off_ns"] < wait["wake_ns"] <= wait["on_ns"] < facts["end_ns"]
    by_task = waker in (Waker.TASK, Waker.MESSAGE)
    assert wait["waker_tid"] == (facts["waker"] if by_task else 0)
    assert wait["waker_tgid"] == (pid if by_task else 0)
    if by_task:
        assert facts["woke_ns"] <= wait["wake_ns"]
    assert bool(wait["object"]) == (reason in (Reason.FUTEX, Reason.PIPE, Reason.SOCKET))
    assert wait["tgid"] == pid
    assert wait["syscall"] != NO_SYSCALL
    assert not watch.losses()


def test_a_read_of_a_character_device_names_the_device(watch: Watched) -> None:
    _, facts = watch.run("terminal")
    wait = watch.wait(facts)
    assert Reason(wait["reason"]) is Reason.DEVICE
    assert wait["object"] == facts["device"]


def test_a_wait_without_a_reason_of_its_own_is_other(watch: Watched) -> None:
    _, facts = watch.run("child")
    wait = watch.wait(facts)
    assert Reason(wait["reason"]) is Reason.OTHER
    assert Waker(wait["waker"]) is Waker.TASK


@pytest.mark.parametrize(("scenario", "reason"), [("disk", Reason.DISK), ("page_fault", Reason.PAGE_FAULT)])
def test_a_wait_for_the_disk_is_one(watch: Watched, big_file: Path, scenario: str, reason: Reason) -> None:
    _, facts = watch.run(scenario, big_file)
    waits = watch.intervals(facts)
    waits = waits[(waits["flags"] & IOWAIT) > 0]
    assert len(waits) > 0
    assert set(waits["reason"]) == {reason}
    assert ((waits["syscall"] == NO_SYSCALL) == (reason is Reason.PAGE_FAULT)).all()
    assert np.isin(waits["waker"], (Waker.SOFTIRQ, Waker.HARDIRQ, Waker.TASK)).all()
    assert not ((waits["flags"] & WAKER_TARGET) > 0).any()


def test_a_stopped_process_is_stopped(watch: Watched) -> None:
    with Workload("spin", LAST_CPU, 1.0) as workload:
        follow(watch.requests, workload)
        workload.go()
        time.sleep(0.05)
        stopped_ns = time.monotonic_ns()
        os.kill(workload.pid, signal.SIGSTOP)
        stat = Path(f"/proc/{workload.pid}/stat")
        until(lambda: ") T " in stat.read_text(), "the process stopped")
        continued_ns = time.monotonic_ns()
        os.kill(workload.pid, signal.SIGCONT)
        facts = workload.facts()
        watch.drain()
    intervals = watch.intervals(facts)
    (wait,) = intervals[intervals["reason"] == Reason.STOPPED]
    assert stopped_ns < wait["off_ns"] < continued_ns < wait["wake_ns"] <= wait["on_ns"]
    assert (Waker(wait["waker"]), wait["waker_tgid"]) == (Waker.TASK, os.getpid())
    assert int(wait["flags"]) in {0, FIRST}  # on an idle host it has not left its CPU before


def test_a_thread_that_has_to_share_its_cpu_waits_for_it(watch: Watched) -> None:
    with Workload("spin", LAST_CPU, 0.5) as workload, Workload("spin", LAST_CPU, 0.6) as competitor:
        follow(watch.requests, workload)
        competitor.go()
        facts = workload.done()
        competitor.facts()
        watch.drain()
    assert set(watch.intervals()["tgid"]) == {workload.pid}
    taken = watch.intervals(facts)
    taken = taken[taken["reason"] == Reason.CPU]
    assert len(taken) > 3
    assert not taken["wake_ns"].any()
    assert not taken["waker"].any()
    assert not (taken["flags"] & ~np.uint8(FIRST)).any()
    assert NO_SYSCALL in taken["syscall"]


# ---- lives ----


def test_threads_are_followed_from_birth_to_death(watch: Watched) -> None:
    pid, facts = watch.run("lives")
    every, names = watch.intervals(), watch.records("names")
    assert len(set(facts["tids"])) == 31
    for number, tid in enumerate(facts["tids"]):
        mine = in_order(every[every["tid"] == tid])
        first = mine[0]
        assert (first["sequence"], first["flags"]) == (1, BORN | WAKER_TARGET)
        assert (Reason(first["reason"]), Waker(first["waker"])) == (Reason.CPU, Waker.PARENT)
        assert (first["waker_tid"], first["waker_tgid"]) == (pid, pid)
        assert not (mine[1:]["flags"] & (BORN | FIRST)).any()
        assert np.count_nonzero(mine["reason"] == Reason.TIMER) == 3
        said = [bytes(name["comm"]).rstrip(b"\0").decode() for name in names[names["tid"] == tid]]
        assert said[0].startswith("python")
        assert said[1:] == [f"life-{number}"]
    known = {struct.unpack("=I", key)[0] for key, _ in watch.probe.map("threads").items()}
    assert not known & set(facts["tids"])
    assert not watch.losses()


def test_what_a_thread_did_before_it_was_watched_is_not_known(watch: Watched) -> None:
    with Workload("sleeps", 5) as workload:
        follow(watch.requests, workload)
        facts = workload.done()
        watch.drain()
    every = watch.intervals()
    mine = in_order(every[every["tid"] == facts["tid"]])
    assert (mine[0]["sequence"], mine[0]["flags"] & FIRST) == (1, FIRST)


def test_a_thread_that_was_not_watched_for_a_while_has_a_first_interval_again(watch: Watched) -> None:
    with Workload("sleeps", 500) as workload:
        follow(watch.requests, workload)
        workload.go()
        until(lambda: watch.counted(Count.SEEN_INTERVALS) > 20, "the first sleeps")
        follow(watch.requests)
        time.sleep(0.05)
        follow(watch.requests, workload)
        facts = workload.facts()
        watch.drain()
        totals = watch.stats.totals()[0]
    every = watch.intervals()
    mine = in_order(every[every["tid"] == facts["tid"]])
    assert np.count_nonzero(mine["flags"] & FIRST) >= 2
    assert mine["sequence"][0] == 1
    # for 50 ms nothing was seen of it, and the first interval after says so
    unseen_ns = mine["off_ns"][1:] - mine["on_ns"][:-1]
    assert unseen_ns.max() > 30_000_000
    assert mine["flags"][1:][unseen_ns.argmax()] & FIRST
    assert totals["on_cpu_ns"] < time.monotonic_ns()


def test_a_child_process_is_watched_from_birth(watch: Watched) -> None:
    with Workload("child") as workload:
        follow(watch.requests, workload)
        workload.done()
        watch.drain()
    every = watch.intervals()
    (child,) = set(every["tgid"]) - {workload.pid}
    mine = in_order(every[every["tid"] == child])
    assert (mine[0]["sequence"], mine[0]["flags"]) == (1, BORN | WAKER_TARGET)
    assert mine[0]["waker_tgid"] == workload.pid


def test_a_thread_that_executes_a_program_leaves_nothing_behind(watch: Watched) -> None:
    with Workload("become", "timer") as workload:
        follow(watch.requests, workload)
        workload.go()
        assert workload.line() == "ready"
        facts = workload.done()
        watch.drain()
        assert Reason(watch.wait(facts)["reason"]) is Reason.TIMER
        threads = {int(task.name) for task in Path(f"/proc/{workload.pid}/task").iterdir()}
        known = {struct.unpack("=I", key)[0] for key, _ in watch.probe.map("threads").items()}
        ours = set(watch.intervals()["tid"])
        assert known & ours <= threads


# ---- sums ----


def test_everything_adds_up(watch: Watched) -> None:
    pid, _ = watch.run("sleeps", 101, end=True)
    before, after = watch.totals_at_begin, watch.stats.totals()[0]
    mine = in_order(watch.intervals())
    assert set(mine["tid"]) == {pid}
    assert np.count_nonzero(mine["reason"] == Reason.TIMER) == 101
    assert after["switches"] - before["switches"] == len(mine) == watch.counted(Count.SEEN_INTERVALS)
    # from its first leave to its last entry, a thread is either on a CPU or off it, and both are added up
    off_ns = mine["on_ns"] - mine["off_ns"]
    on_ns = mine["off_ns"][1:] - mine["on_ns"][:-1]
    assert on_ns.sum() + off_ns.sum() == mine["on_ns"][-1] - mine["off_ns"][0]
    # what it did after its last entry ended with its death
    assert on_ns.sum() == after["on_cpu_ns"] - before["on_cpu_ns"]
    runnable_ns = np.where(mine["reason"] == Reason.CPU, mine["off_ns"], mine["wake_ns"])
    asleep_ns = [int((runnable_ns - mine["off_ns"])[mine["reason"] == reason].sum()) for reason in range(Reason.MAX)]
    assert (after["off_cpu_ns"] - before["off_cpu_ns"]).tolist() == asleep_ns
    waited = after["run_queue_wait"]["counts"] - before["run_queue_wait"]["counts"]
    assert waited.sum() == len(mine)
    wait_ns = (mine["on_ns"] - runnable_ns).sum()
    assert after["run_queue_wait"]["sum_ns"] - before["run_queue_wait"]["sum_ns"] == wait_ns
    assert after["cpu_quota_ns"] == before["cpu_quota_ns"]
    assert not watch.losses()


def test_time_on_the_cpu_is_what_the_kernel_says(watch: Watched) -> None:
    with Workload("spin", LAST_CPU, 0.5) as workload:
        follow(watch.requests, workload)
        facts = workload.done()
        watch.drain()
    span = np.array([facts["begin_ns"], facts["end_ns"]], np.uint64)
    mine = watch.intervals(facts)
    off_ns = int((np.minimum(mine["on_ns"], span[1]) - np.maximum(mine["off_ns"], span[0])).sum())
    on_ns = facts["end_ns"] - facts["begin_ns"] - off_ns
    # the kernel leaves out what the hypervisor gave to others
    assert facts["cpu_ns"] <= on_ns * 1.05
    assert facts["cpu_ns"] >= on_ns * 0.8


def test_who_is_no_target_makes_no_record(watch: Watched) -> None:
    with Workload("sleeps", 23) as stranger, Workload("messages", 23) as other, Workload("lives") as third:
        follow(watch.requests)
        for workload in (stranger, other, third):
            workload.done()
        watch.drain()
    assert not len(watch.intervals())
    assert not len(watch.records("names"))
    assert not len(watch.records("messages"))


def test_a_used_up_quota_is_told_from_a_busy_cpu(watch: Watched) -> None:
    """One busy thread with a fifth of a CPU, against what its group says of itself."""
    if (advice := cgroups.missing("cpu")) is not None:
        pytest.skip(advice)
    before = watch.stats.totals()[0].copy()
    with cgroups.group("cpu") as group, Workload("spin", LAST_CPU, 1.5) as workload:
        group.limit_cpu(20_000, 100_000)
        follow(watch.requests, workload)
        group.add(workload.pid)
        workload.done()
        workload.end()
        truth_ns = group.throttled_ns()
        watch.drain()
    after = watch.stats.totals()[0]
    mine = watch.intervals()
    throttled = mine[(mine["flags"] & THROTTLED) > 0]
    seen_ns = int((throttled["on_ns"] - throttled["off_ns"]).sum())
    assert set(throttled["reason"]) == {Reason.CPU}
    assert after["cpu_quota_ns"] - before["cpu_quota_ns"] == seen_ns
    waited = mine[(mine["flags"] & THROTTLED) == 0]
    runnable_ns = np.where(waited["reason"] == Reason.CPU, waited["off_ns"], waited["wake_ns"])
    wait_ns = int((waited["on_ns"] - runnable_ns).sum())
    assert after["run_queue_wait"]["sum_ns"] - before["run_queue_wait"]["sum_ns"] == wait_ns
    # on a busy CPU the thread waits for it once the quota is there again, and this wait cannot be told from it
    assert truth_ns * 0.95 <= seen_ns <= truth_ns * 1.05 + wait_ns
    assert truth_ns > 50_000_000


def test_the_run_queue_wait_is_what_runqlat_says(watch: Watched) -> None:
    """Means within 5 %, on one crowded CPU.

    runqlat prints how many waits lie between powers of two of microseconds, no mean. So both sides are put into the
    same buckets and the same mean is made of them: the middle of each bucket by how often it was met.
    """
    tool = shutil.which("runqlat", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/share/bcc/tools")
    if tool is None:
        pytest.skip("needs runqlat: apt-get install libbpf-tools")
    with Workload("crowd", LAST_CPU, 2.0) as workload:
        follow(watch.requests, workload)
        reader, writer = os.openpty()
        with subprocess.Popen([tool, "-p", str(workload.pid)], stdout=writer, stderr=subprocess.STDOUT) as process:
            said = read_until(reader, b"Tracing run queue latency")
            workload.done()
            process.send_signal(signal.SIGINT)
            os.close(writer)
            said += read_until(reader, None)
        os.close(reader)
        watch.drain()
    theirs = np.zeros(40)
    for _, high, count in re.findall(rb"(\d+) -> (\d+)\s*: (\d+)", said):
        theirs[max(int(high).bit_length() - 1, 0)] += int(count)
    assert theirs.sum() > 100, said.decode()
    mine = watch.intervals()
    mine = mine[(mine["reason"] == Reason.CPU) | (mine["wake_ns"] > 0)]
    runnable_ns = np.where(mine["reason"] == Reason.CPU, mine["off_ns"], mine["wake_ns"])
    waits_us = ((mine["on_ns"] - runnable_ns) // 1000).astype(np.int64)
    ours = np.bincount([max(int(wait).bit_length() - 1, 0) for wait in waits_us], minlength=40)
    middles = 1.5 * 2.0 ** np.arange(40)
    our_mean, their_mean = (float((each * middles).sum() / each.sum()) for each in (ours, theirs))
    assert abs(our_mean / their_mean - 1) < 0.05, (our_mean, their_mean, ours, theirs)


def read_until(descriptor: int, word: bytes | None) -> bytes:
    """Read a terminal until a word came, or to its end."""
    said = b""
    while word is None or word not in said:
        try:
            more = os.read(descriptor, 65536)
        except OSError:
            break
        if not more:
            break
        said += more
    return said


# ---- losses ----


def test_a_full_ring_is_counted_and_leaves_holes(shared_probe: Probe, transport: Transport) -> None:
    with watching(shared_probe.raw, transport, sizes={"intervals": 4096}) as watch:
        with Workload("sleeps", 2003) as workload:
            follow(shared_probe.raw, workload)
            workload.done()
            workload.end()
            watch.drain()
        lost = watch.counted(Count.LOST_INTERVALS_RING_FULL)
        seen = watch.counted(Count.SEEN_INTERVALS)
        delivered = watch.intervals()
        assert lost > 0
        assert len(delivered) == seen - lost
        last = int(delivered["sequence"].max())
        assert last - len(delivered) <= lost
        assert seen > 1000
        assert watch.losses().keys() == {Count.LOST_INTERVALS_RING_FULL}
    shared_probe.raw.follow({}, {})


def test_threads_that_find_no_room_are_counted(shared_probe: Probe, transport: Transport) -> None:
    with watching(shared_probe.raw, transport, threads=2) as watch:
        with Workload("crowd", LAST_CPU, 0.3) as workload:
            follow(shared_probe.raw, workload)
            workload.done()
            watch.drain()
        assert watch.counted(Count.THREADS_FULL) > 0
        assert watch.losses().keys() == {Count.THREADS_FULL}
        assert len(list(watch.probe.map("threads").items())) <= 2
    shared_probe.raw.follow({}, {})
