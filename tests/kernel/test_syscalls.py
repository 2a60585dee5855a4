"""The syscalls probe against calls that are counted by hand: getppid, which nothing else makes, and sleeps."""

from __future__ import annotations

import contextlib
import os
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from probes.probe import Count, Transport
from probes.requests import RequestsProbe
from probes.syscalls import SyscallsProbe
from tests.kernel.conftest import PATIENCE_S

CALLS = {"x86_64": {"getppid": 110, "clock_nanosleep": 230}, "aarch64": {"getppid": 173, "clock_nanosleep": 115}}
NUMBERS = CALLS[os.uname().machine]
READY = "import os, sys, threading, time\nprint('ready', flush=True)\nsys.stdin.readline()\n"
"""A workload begins when it is told to, once it is followed."""
ELF_32 = bytes.fromhex(
    # a header and one segment; getppid (64) as often as ecx says, then exit(0), by int 0x80
    "7f454c4601010100000000000000000002000300010000005480040834000000000000000000000034002000010000000000000001000000"
    "000000000080040800800408"
)


class Syscalls:
    """The attached probe, and what it has counted since `follow`."""

    def __init__(self, requests: RequestsProbe, probe: SyscallsProbe) -> None:
        self._requests = requests
        self.raw = probe
        self._before: dict[tuple[int, int], tuple[int, ...]] = {}
        self._counts = probe.counts()

    def follow(self, *processes: int) -> None:
        self._requests.follow({pid: index for index, pid in enumerate(processes)}, {})
        self._before = self.raw.latencies()
        self._counts = self.raw.counts()

    def latency(self, name: str, service: int = 0) -> tuple[int, int]:
        """How many calls of that name returned, and how many ns they took in all."""
        key = (service, NUMBERS[name])
        now = self.raw.latencies().get(key, (0,) * 29)
        before = self._before.get(key, (0,) * 29)
        return sum(now[1:]) - sum(before[1:]), now[0] - before[0]

    def counted(self, what: Count) -> int:
        return self.raw.counts()[what] - self._counts[what]

    def threads(self) -> set[tuple[int, int]]:
        """tgid and tid of every thread in its table."""
        keys = (struct.unpack("=Q", key)[0] for key, _ in self.raw.map("syscalls").items())
        return {(key >> 32, key & 0xFFFFFFFF) for key in keys}

    def all_calls(self) -> int:
        """Every call that was timed since the beginning."""
        return sum(sum(words[1:]) for words in self.raw.latencies().values())


@contextlib.contextmanager
def loaded(kind: type[SyscallsProbe] = SyscallsProbe) -> Iterator[Syscalls]:
    with ExitStack() as stack:
        requests = stack.enter_context(RequestsProbe(Transport.RING))
        probe = stack.enter_context(kind(Transport.RING, services=2, shares_with=requests))
        probe.attach()
        yield Syscalls(requests, probe)


@pytest.fixture(scope="module")
def attached(able_host: None) -> Iterator[Syscalls]:
    with loaded() as syscalls:
        yield syscalls


@pytest.fixture
def syscalls(attached: Syscalls) -> Iterator[Syscalls]:
    attached.follow()
    yield attached
    attached.follow()


class Workload:
    """A Python program that waits for `go`; its threads and what it executes are its own matter."""

    def __init__(self, program: str) -> None:
        command = [sys.executable, "-S", "-E", "-c", READY + program]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.pid = self._process.pid
        assert self.said() == b"ready\n"
        deadline = time.monotonic() + PATIENCE_S
        while Path(f"/proc/{self.pid}/syscall").read_text().split()[1:2] != ["0x0"]:  # it reads descriptor 0
            assert time.monotonic() < deadline, "the workload does not wait for its beginning"
            time.sleep(0.001)

    def go(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(b"\n")
        self._process.stdin.flush()

    def said(self) -> bytes:
        """Its next line."""
        assert self._process.stdout is not None
        return self._process.stdout.readline()

    def run(self) -> None:
        """Begin, and wait for the end."""
        self.go()
        self._process.communicate(timeout=PATIENCE_S)
        assert self._process.returncode == 0

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


Start = Callable[[str], Workload]


@pytest.fixture
def start() -> Iterator[Start]:
    with ExitStack() as stack:
        yield lambda program: stack.enter_context(contextlib.closing(Workload(program)))


def test_calls_are_counted_by_service(syscalls: Syscalls, start: Start) -> None:
    first, second = start("for _ in range(101): os.getppid()"), start("for _ in range(23): os.getppid()")
    stranger = start("for _ in range(1009): os.getppid()")
    syscalls.follow(first.pid, second.pid)
    for workload in (first, second, stranger):
        workload.run()
    assert syscalls.latency("getppid", 0)[0] == 101
    assert syscalls.latency("getppid", 1)[0] == 23
    assert syscalls.counted(Count.SYSCALLS_FULL) == 0


def test_nothing_of_others_is_counted(syscalls: Syscalls, start: Start) -> None:
    before, counts = syscalls.raw.latencies(), syscalls.raw.counts()
    start("for _ in range(101): os.getppid()").run()
    assert syscalls.raw.latencies() == before
    assert syscalls.raw.counts() == counts
    assert not syscalls.threads()


def test_every_call_that_was_seen_is_in_a_histogram(syscalls: Syscalls, start: Start) -> None:
    workload = start("for _ in range(101): os.stat('/')")
    syscalls.follow(workload.pid)
    before = syscalls.all_calls()
    workload.run()
    assert syscalls.counted(Count.SEEN_SYSCALLS) == syscalls.all_calls() - before >= 101


def test_a_sleep_takes_as_long_as_it_takes(syscalls: Syscalls, start: Start) -> None:
    workload = start("for _ in range(7): time.sleep(0.01)")
    syscalls.follow(workload.pid)
    before = time.monotonic_ns()
    workload.run()
    calls, took_ns = syscalls.latency("clock_nanosleep")
    assert calls == 7
    assert 7 * 10_000_000 <= took_ns <= time.monotonic_ns() - before


def test_threads_are_timed_and_forgotten_when_they_end(syscalls: Syscalls, start: Start) -> None:
    workload = start(
        "threads = [threading.Thread(target=lambda: [os.getppid() for _ in range(13)]) for _ in range(5)]\n"
        "[thread.start() for thread in threads]\n"
        "[thread.join() for thread in threads]\n"
        "print('done', flush=True)\n"
        "sys.stdin.readline()\n"
    )
    syscalls.follow(workload.pid)
    workload.go()
    workload.said()
    assert syscalls.latency("getppid")[0] == 5 * 13
    deadline = time.monotonic() + PATIENCE_S
    while syscalls.threads() != {(workload.pid, workload.pid)}:  # a joined thread may still be on its last steps
        assert time.monotonic() < deadline, f"threads that ended are still there: {syscalls.threads()}"
        time.sleep(0.001)
    workload.run()
    assert not syscalls.threads()


def test_a_thread_that_is_killed_inside_a_call_is_forgotten(syscalls: Syscalls, start: Start) -> None:
    workload = start("print('now', flush=True)\ntime.sleep(1000)")
    syscalls.follow(workload.pid)
    workload.go()
    workload.said()
    workload.close()
    assert syscalls.latency("clock_nanosleep")[0] <= 1, "a call that a signal ends returns before the signal kills"
    assert not syscalls.threads()


def test_a_thread_that_executes_a_program_takes_its_entry_along(syscalls: Syscalls, start: Start) -> None:
    program = "import os\n[os.getppid() for _ in range(17)]\nprint('new', flush=True)\ninput()"
    workload = start(
        "def replace():\n"
        "    os.getppid()\n"
        f"    os.execv(sys.executable, [sys.executable, '-S', '-E', '-c', {program!r}])\n"
        "thread = threading.Thread(target=replace)\n"
        "thread.start()\n"
        "thread.join()\n"
    )
    syscalls.follow(workload.pid)
    workload.go()
    assert workload.said() == b"new\n"
    assert syscalls.latency("getppid")[0] == 1 + 17
    assert syscalls.threads() == {(workload.pid, workload.pid)}


def test_a_full_table_of_threads_counts_what_it_does_not_time(start: Start) -> None:
    class SmallProbe(SyscallsProbe):
        def _set_up(self) -> None:
            self._object.map("syscalls").max_entries = 1

    with loaded(SmallProbe) as syscalls:
        first, second = start("os.getppid(); print('done', flush=True); sys.stdin.readline()"), start("os.getppid()")
        syscalls.follow(first.pid, second.pid)
        first.go()
        first.said()
        assert syscalls.counted(Count.SYSCALLS_FULL) == 0
        second.run()
        assert syscalls.latency("getppid", 0)[0] == 1
        assert syscalls.latency("getppid", 1)[0] == 0
        assert syscalls.counted(Count.SYSCALLS_FULL) > 0


def test_a_full_table_of_latencies_counts_what_it_does_not_keep(start: Start) -> None:
    class SmallProbe(SyscallsProbe):
        def _set_up(self) -> None:
            self._object.map("syscall_stats").max_entries = 2

    with loaded(SmallProbe) as syscalls:
        workload = start("os.stat('/'); os.getppid(); os.getuid(); os.getgid()")
        syscalls.follow(workload.pid)
        workload.run()
        kept = syscalls.all_calls()
        assert len(syscalls.raw.latencies()) == 2
        assert syscalls.counted(Count.SEEN_SYSCALLS) == kept + syscalls.counted(Count.SYSCALLS_FULL)
        assert syscalls.counted(Count.SYSCALLS_FULL) > 0


if os.uname().machine == "x86_64":  # other machines have no such calls, and what is skipped fails in CI

    def test_calls_of_a_32_bit_program_are_left_out(syscalls: Syscalls, start: Start, tmp_path: Path) -> None:
        """Number 64 is getppid there, and semget for everybody else."""
        program = tmp_path / "program"
        code = bytes.fromhex("bf65000000b840000000cd804f75f6b80100000031dbcd80")
        size = struct.pack("=II", len(ELF_32) + 16 + len(code), len(ELF_32) + 16 + len(code))
        program.write_bytes(ELF_32 + size + struct.pack("=II", 5, 0x1000) + code)
        program.chmod(0o755)
        assert subprocess.run([program], check=False).returncode == 0, "this kernel runs no 32-bit programs"
        workload = start(f"os.execv({str(program)!r}, ['program'])")
        syscalls.follow(workload.pid)
        workload.run()
        assert syscalls.raw.latencies().get((0, 64)) is None
