"""What is read of processes: from a made /proc, and of real ones."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from probes import descriptors
from probes.processes import GROWTH_SECONDS, Processes, ServiceProcesses, service_cgroups

PAGE = os.sysconf("SC_PAGE_SIZE")
TICKS = os.sysconf("SC_CLK_TCK")
BOOT_S = 1000


class Host:
    """A /proc with processes as they are put there, and clocks that stand still until they are moved."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.now = 5000.0
        (root / "stat").write_text("cpu  0 0 0 0 0 0 0 0 0 0\nbtime 1700000000\n", "ascii")
        self.processes = Processes(root, lambda: self.now, lambda: BOOT_S)

    def put(
        self, pid: int, *, files: int = 3, threads: int = 1, pages: int = 10, faults: int = 0, start_s: float = 1.0
    ) -> None:
        """Put a process there, or change it."""
        folder = self.root / str(pid)
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "fd").mkdir(parents=True)
        for number in range(files):
            (folder / "fd" / str(number)).touch()
        fields = ["S", *["0"] * 8, str(faults), *["0"] * 9, str(int(start_s * TICKS)), *["0"] * 30]
        (folder / "stat").write_text(f"{pid} (a) R 1 1 (x) {' '.join(fields)}\n", "ascii")
        (folder / "statm").write_text(f"100 {pages} 0 0 0 0 0\n", "ascii")
        (folder / "status").write_text(f"Name:\ta\nTgid:\t{pid}\nPid:\t{pid}\nThreads:\t{threads}\n", "ascii")

    def remove(self, pid: int) -> None:
        shutil.rmtree(self.root / str(pid))

    def look(self, processes: dict[int, int], after: float = 0.0) -> dict[int, ServiceProcesses]:
        self.now += after
        return self.processes.look(processes)


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    before = psutil.PROCFS_PATH
    yield Host(tmp_path)
    psutil.PROCFS_PATH = before


def test_a_service_is_the_sum_of_its_processes(host: Host) -> None:
    host.put(101, files=7, threads=2, pages=11)
    host.put(103, files=5, threads=3, pages=13)
    host.put(107, files=17, threads=1, pages=19)
    seen = host.look({101: 0, 103: 0, 107: 1})
    assert seen[0] == ServiceProcesses(2, 12, 5, 24 * PAGE, 0, None)
    assert seen[1] == ServiceProcesses(1, 17, 1, 19 * PAGE, 0, None)


def test_who_is_gone_is_left_out_and_the_service_stays(host: Host) -> None:
    host.put(101)
    host.put(103)
    assert host.look({101: 0, 103: 0})[0].processes == 2
    host.remove(103)
    assert host.look({101: 0, 103: 0})[0].processes == 1
    host.remove(101)
    assert host.look({})[0] == ServiceProcesses(0, 0, 0, 0, 0, None)


def test_major_faults_count_from_the_first_look_and_never_fall(host: Host) -> None:
    host.put(101, faults=1000)
    assert host.look({101: 0})[0].major_faults == 0
    host.put(101, faults=1007)
    assert host.look({101: 0})[0].major_faults == 7
    host.remove(101)
    assert host.look({101: 0})[0].major_faults == 7
    assert host.look({})[0].major_faults == 7


def test_all_faults_of_a_process_that_began_meanwhile_count(host: Host) -> None:
    host.look({})
    host.put(101, faults=13, start_s=BOOT_S + 1)
    assert host.look({101: 0})[0].major_faults == 13
    host.put(103, faults=500, start_s=BOOT_S - 1)
    assert host.look({101: 0, 103: 0})[0].major_faults == 13


def test_a_pid_that_is_used_again_is_another_process(host: Host) -> None:
    host.put(101, faults=900, start_s=1)
    host.look({101: 0})
    host.put(101, faults=5, start_s=BOOT_S + 3)
    assert host.look({101: 0})[0].major_faults == 5
    host.put(101, files=3, faults=5, start_s=BOOT_S + 3)
    assert host.look({101: 0}, after=GROWTH_SECONDS - 1)[0].descriptor_growth is None


def test_growth_is_that_of_the_processes_that_live_for_a_minute(host: Host) -> None:
    host.put(101, files=10)
    host.put(103, files=100)
    host.look({101: 0, 103: 0})
    for _ in range(11):
        assert host.look({101: 0, 103: 0}, after=5)[0].descriptor_growth is None
    host.put(101, files=40)
    host.put(103, files=94)
    host.put(107, files=1000)  # it has only come
    assert host.look({101: 0, 103: 0, 107: 0}, after=5)[0].descriptor_growth == pytest.approx((30 - 6) / 60)
    host.remove(103)
    assert host.look({101: 0, 103: 0, 107: 0}, after=5)[0].descriptor_growth == pytest.approx(30 / 60)


def test_growth_forgets_what_is_older_than_a_minute(host: Host) -> None:
    host.put(101, files=5)
    host.look({101: 0})
    host.put(101, files=65)
    host.look({101: 0}, after=5)
    for _ in range(12):
        growth = host.look({101: 0}, after=5)[0].descriptor_growth
    assert growth == 0


def test_descriptors_that_may_not_be_looked_at_are_not_zero(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    host.put(101)
    host.put(103)

    monkeypatch.setattr(descriptors, "count", lambda _root, pid, *, by_size: None if pid == 103 else 3)
    assert host.look({101: 0, 103: 0})[0] == ServiceProcesses(2, None, 2, 20 * PAGE, 0, None)


def test_who_ends_while_it_is_looked_at_hides_nothing(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    host.put(101)
    host.put(103)

    def end(root: str, pid: int, *, by_size: bool) -> int | None:
        if pid == 103:
            host.remove(103)
        return count(root, pid, by_size=by_size)

    count = descriptors.count
    monkeypatch.setattr(descriptors, "count", end)
    assert host.look({101: 0, 103: 0})[0] == ServiceProcesses(1, 3, 1, 10 * PAGE, 0, None)


def test_names_of_descriptors_are_not_held(host: Host) -> None:
    host.put(101, files=2003)
    host.look({101: 0})
    tracemalloc.start()
    try:
        (seen,) = host.look({101: 0}).values()
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert seen.open_files == 2003
    assert peak_bytes < 1 << 16


def test_a_real_process(monkeypatch: pytest.MonkeyPatch) -> None:
    script = "import sys; files = [open('/dev/null') for _ in range(43)]; print(flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        seen = Processes().look({child.pid: 0})[0]
        child.communicate()
    assert seen.processes == seen.threads == 1
    assert seen.open_files == 46
    assert seen.resident_bytes > 1 << 20


def test_one_that_has_ended_and_was_not_waited_for_holds_nothing() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as child:
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert Processes().look({child.pid: 0})[0] == ServiceProcesses(0, 0, 0, 0, 0, None)


# ---- cgroups ----


class Cgroups:
    """A made /proc with memberships, and a made cgroup file system."""

    def __init__(self, root: Path) -> None:
        self.proc, self.mount = root / "proc", root / "cgroup"
        self.proc.mkdir()
        self.mount.mkdir()

    def member(self, pid: int, text: str) -> None:
        (self.proc / str(pid)).mkdir()
        (self.proc / str(pid) / "cgroup").write_text(text, "ascii")

    def group(self, path: str, *pids: int, controllers: str | None = None) -> int:
        """Make a cgroup that holds these processes; return its id. `controllers`: of version 2."""
        folder = self.mount / path
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "cgroup.procs").write_text("".join(f"{pid}\n" for pid in pids), "ascii")
        if controllers is not None:
            (folder / "cgroup.controllers").write_text(controllers + "\n", "ascii")
        return folder.stat().st_ino

    def owners(self, processes: dict[int, int]) -> dict[int, int]:
        return service_cgroups(processes, self.proc, self.mount)


@pytest.fixture
def cgroups(tmp_path: Path) -> Cgroups:
    return Cgroups(tmp_path)


def test_version_1_takes_the_blkio_hierarchy(cgroups: Cgroups) -> None:
    cgroups.member(11, "9:memory:/other\n7:blkio:/pods/a\n0::/user\n")
    cgroups.member(13, "9:memory:/other\n7:cpu,blkio:/pods/b\n0::/user\n")
    cgroups.group("blkio")
    a = cgroups.group("blkio/pods/a", 11)
    b = cgroups.group("blkio/pods/b", 13)
    cgroups.group("blkio/pods/a/inner", 99)  # has its own
    assert cgroups.owners({11: 0, 13: 1}) == {a: 0, b: 1}


def test_a_cgroup_with_a_stranger_or_of_two_services_is_nobodys(cgroups: Cgroups) -> None:
    for pid, path in ((11, "a"), (13, "b"), (17, "b"), (19, "c")):
        cgroups.member(pid, f"7:blkio:/{path}\n")
    cgroups.group("blkio/a", 11, 99)
    cgroups.group("blkio/b", 13, 17)
    cgroups.group("blkio/c", 19, 0)  # somebody in another pid namespace
    assert cgroups.owners({11: 0, 13: 0, 17: 1, 19: 0}) == {}


def test_never_a_root_nor_what_is_outside(cgroups: Cgroups) -> None:
    cgroups.member(11, "7:blkio:/\n")
    cgroups.member(13, "7:blkio:/../../elsewhere\n")
    cgroups.member(17, "0::/\n")
    cgroups.member(19, "0::/../elsewhere\n")
    cgroups.group("blkio", 11)
    cgroups.group(".", 17, controllers="io memory")
    cgroups.group("../elsewhere", 13, 19, controllers="io")
    assert cgroups.owners({11: 0, 13: 0, 17: 0, 19: 0}) == {}


def test_version_2_takes_the_nearest_with_io(cgroups: Cgroups) -> None:
    cgroups.member(11, "0::/pods/a/worker\n")
    cgroups.member(13, "0::/pods/b\n")
    cgroups.group(".", controllers="cpu io memory")
    cgroups.group("pods", controllers="cpu io")
    a = cgroups.group("pods/a", controllers="io")
    cgroups.group("pods/a/worker", 11, controllers="")
    b = cgroups.group("pods/b", 13, controllers="io")
    assert cgroups.owners({11: 0, 13: 1}) == {a: 0, b: 1}
    cgroups.group("pods/a/other", 99, controllers="memory")  # charged to a, too
    assert cgroups.owners({11: 0, 13: 1}) == {b: 1}
    cgroups.group("pods/a/other", 99, controllers="io")  # has its own
    assert cgroups.owners({11: 0, 13: 1}) == {a: 0, b: 1}


def test_without_io_nothing_below_the_root_is_charged(cgroups: Cgroups) -> None:
    cgroups.member(11, "0::/pods/a\n")
    cgroups.group(".", controllers="cpu")
    cgroups.group("pods", controllers="cpu")
    cgroups.group("pods/a", 11, controllers="")
    assert cgroups.owners({11: 0}) == {}


def test_what_cannot_be_read_is_left_out(cgroups: Cgroups) -> None:
    cgroups.member(11, "7:blkio:/gone\n")
    cgroups.member(13, "")
    cgroups.member(17, "7:blkio:/odd\n")
    cgroups.group("blkio/odd", 17)
    (cgroups.mount / "blkio/odd/cgroup.procs").write_text("17\nx\n", "ascii")
    assert cgroups.owners({11: 0, 13: 0, 17: 0, 19: 0}) == {}
