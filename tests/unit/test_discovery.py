"""Discovery on a made-up /proc: which processes and ports each rule finds, and what hostile names do to it."""

from __future__ import annotations

import os
import shutil
import socket
import struct
from collections.abc import Sequence
from pathlib import Path

import pytest

from exporter.config import Match, Service
from probes.discovery import CLOSED_SCANS, Discovery, Targets
from probes.procfs import ProcFs, Stat, parse_link_inode, parse_listeners, parse_stat
from probes.sockdiag import ListenerTable, _take

HOST = 4026531833
POD = 4026532177

HEADER = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"


class FakeProc:
    """A /proc tree under a temporary folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "self").mkdir()

    def add(
        self,
        pid: int,
        exe: str | None,
        arguments: Sequence[str] = (),
        *,
        parent: int = 1,
        start: int = 1009,
        comm: str = "x",
        namespace: int = HOST,
        cgroup: str = "0::/\n",
        sockets: Sequence[int] = (),
        kernel_thread: bool = False,
        state: str = "S",
    ) -> None:
        folder = self.root / str(pid)
        if folder.exists():
            shutil.rmtree(folder)
        (folder / "ns").mkdir(parents=True)
        (folder / "net").mkdir()
        (folder / "fd").mkdir()
        flags = 0x00200000 if kernel_thread else 0x00400000
        fields = [state, parent, pid, pid, 0, -1, flags, *[0] * 12, start, 0, 0]
        (folder / "stat").write_bytes(
            f"{pid} ({comm}) {' '.join(map(str, fields))}\n".encode("utf-8", "surrogateescape")
        )
        (folder / "cmdline").write_bytes(b"".join(os.fsencode(word) + b"\0" for word in arguments))
        (folder / "cgroup").write_text(cgroup)
        if exe is not None:
            (folder / "exe").symlink_to(exe)
        (folder / "ns/net").symlink_to(f"net:[{namespace}]")
        (folder / "fd/0").symlink_to("/dev/null")
        for number, inode in enumerate(sockets, 3):
            (folder / f"fd/{number}").symlink_to(f"socket:[{inode}]")

    def remove(self, pid: int) -> None:
        shutil.rmtree(self.root / str(pid))


class FakeListeners:
    """Listening sockets by namespace; counts how often they are asked for."""

    def __init__(self, tables: dict[int, dict[int, int]]) -> None:
        self.tables = tables
        self.alive: set[int] = set()

    def listeners(self, namespace: int, pid: int) -> dict[int, int]:
        return self.tables.get(namespace, {})

    def forget(self, alive: set[int]) -> None:
        self.alive = alive


@pytest.fixture
def proc(tmp_path: Path) -> FakeProc:
    return FakeProc(tmp_path)


def discovery(
    proc: FakeProc, tables: dict[int, dict[int, int]] | None = None, *matches: Match, own: int = 7
) -> Discovery:
    services = [Service(f"s{index}", match) for index, match in enumerate(matches)]
    return Discovery(services, proc.root, FakeListeners(tables or {}), {own})


# ---- by port ----


def test_port_finds_every_process_that_holds_the_socket_in_its_own_namespace(proc: FakeProc) -> None:
    proc.add(101, "/usr/bin/gunicorn", sockets=[11])
    proc.add(103, "/usr/bin/gunicorn", parent=101, sockets=[11])  # a worker: the inherited socket
    proc.add(107, "/usr/bin/vllm", namespace=POD, sockets=[23])
    proc.add(109, "/usr/bin/curl", sockets=[29])  # a client
    tables = {HOST: {11: 8000, 13: 9090}, POD: {23: 8000}}
    found = discovery(proc, tables, Match(port=(8000,))).scan()
    assert found == Targets({101: 0, 103: 0, 107: 0}, {(HOST, 8000): 0, (POD, 8000): 0})


def test_a_worker_that_comes_later_is_found_at_the_next_scan(proc: FakeProc) -> None:
    proc.add(101, "/usr/bin/gunicorn", sockets=[11])
    watch = discovery(proc, {HOST: {11: 8000}}, Match(port=(8000,)))
    for _ in range(11):
        assert watch.scan().processes == {101: 0}
    proc.add(103, "/usr/bin/gunicorn", parent=101, sockets=[11])
    assert watch.scan().processes == {101: 0, 103: 0}


def test_a_socket_that_an_old_process_opens_is_found_at_the_next_scan(proc: FakeProc) -> None:
    proc.add(101, "/usr/bin/python3")
    tables: dict[int, dict[int, int]] = {HOST: {}}
    watch = discovery(proc, tables, Match(port=(8000,)))
    for _ in range(37):
        assert watch.scan() == Targets({}, {})
    proc.add(101, "/usr/bin/python3", sockets=[11])
    tables[HOST] = {11: 8000}
    assert watch.scan() == Targets({101: 0}, {(HOST, 8000): 0})


def test_a_process_that_closed_its_listening_socket_stays_until_it_ends(proc: FakeProc) -> None:
    proc.add(101, "/usr/bin/python3", sockets=[11])
    tables = {HOST: {11: 8000}}
    watch = discovery(proc, tables, Match(port=(8000,)))
    watch.scan()
    tables[HOST] = {}
    proc.add(101, "/usr/bin/python3")
    for _ in range(61):
        assert watch.scan() == Targets({101: 0}, {(HOST, 8000): 0})
    proc.remove(101)
    assert watch.scan() == Targets({}, {})


def test_ports_that_are_listened_on_no_longer_are_let_go(proc: FakeProc) -> None:
    """Else ports that a process uses once each add up, and later connections from them pass for the service's own."""
    proc.add(101, "/usr/bin/vllm", sockets=[11, 13])
    tables = {HOST: {11: 8000, 13: 32771}}
    watch = discovery(proc, tables, Match(exe=("vllm",)))
    assert watch.scan() == Targets({101: 0}, {(HOST, 8000): 0, (HOST, 32771): 0})
    for number in range(1, 2 * CLOSED_SCANS):
        (proc.root / "101/fd/4").unlink()
        (proc.root / "101/fd/4").symlink_to(f"socket:[{100 + number}]")
        tables[HOST] = {11: 8000, 100 + number: 32771 + number}
        found = watch.scan()
        assert found.processes == {101: 0}
        assert {(HOST, 8000), (HOST, 32771 + number)} <= found.ports.keys()
        # a worker that shuts down closes its listener first: what it still answers is measured for a while
        assert ((HOST, 32771) in found.ports) == (number <= CLOSED_SCANS)
        assert len(found.ports) <= CLOSED_SCANS + 2


def test_a_port_that_is_listened_on_again_has_its_time_anew(proc: FakeProc) -> None:
    proc.add(101, "/usr/bin/vllm", sockets=[11])
    tables = {HOST: {11: 8000}}
    watch = discovery(proc, tables, Match(exe=("vllm",)))
    for _ in range(3):
        watch.scan()
        tables[HOST] = {}
        for _ in range(CLOSED_SCANS):
            assert watch.scan() == Targets({101: 0}, {(HOST, 8000): 0})
        tables[HOST] = {11: 8000}


def test_a_reused_pid_does_not_inherit_the_match(proc: FakeProc) -> None:
    proc.add(101, "/usr/bin/python3", sockets=[11])
    tables = {HOST: {11: 8000}}
    watch = discovery(proc, tables, Match(port=(8000,)))
    for _ in range(7):
        watch.scan()
    tables[HOST] = {}
    proc.add(101, "/usr/bin/other", start=2003)
    assert watch.scan() == Targets({}, {})
    # the same executable: seen when the process is read anew, within 30 scans
    tables[HOST] = {11: 8000}
    proc.add(103, "/usr/bin/python3", sockets=[11])
    for _ in range(7):
        watch.scan()
    tables[HOST] = {}
    proc.add(103, "/usr/bin/python3", start=2003)
    assert [watch.scan().processes for _ in range(30)][-1] == {}


def test_who_forwards_to_a_port_does_not_serve_it(proc: FakeProc) -> None:
    proc.add(1, "/usr/lib/systemd/systemd", sockets=[11], parent=0)
    proc.add(101, "/usr/bin/docker-proxy", sockets=[13])
    proc.add(103, "/usr/bin/vllm", sockets=[11])
    found = discovery(proc, {HOST: {11: 8000, 13: 8000}}, Match(port=(8000,))).scan()
    assert found.processes == {103: 0}


def test_where_netlink_is_refused_the_text_tables_are_read(proc: FakeProc) -> None:
    proc.add(101, "/usr/bin/vllm", sockets=[11, 13], namespace=POD)
    rows = [
        "   0: 0100007F:1F40 00000000:0000 0A 00000000:00000000 00:00000000 00000000  0  0 11 1 0 100 0 0 10 0\n",
        "   1: 0100007F:1F41 0100007F:9C40 01 00000000:00000000 00:00000000 00000000  0  0 17 1 0 20 4 30 10 -1\n",
        "   2: garbage\n",
    ]
    (proc.root / "101/net/tcp").write_text(HEADER + "".join(rows))
    (proc.root / "101/net/tcp6").write_text(
        HEADER
        + f"   0: {'0' * 32}:1F42 {'0' * 32}:0000 0A 00000000:00000000 00:00000000 00000000  0  0 13 1 0 100 0 0 10 0\n"
    )
    assert ProcFs(proc.root).listeners(101) == {11: 8000, 13: 8002}
    found = Discovery([Service("s", Match(port=(8002,)))], proc.root, own={7}).scan()
    assert found == Targets({101: 0}, {(POD, 8002): 0})


# ---- by the other conditions ----


def test_exe_is_a_file_name_or_a_path(proc: FakeProc) -> None:
    proc.add(101, "/opt/vllm/bin/server", sockets=[11, 13])
    proc.add(103, "/usr/bin/server (deleted)")  # replaced by an upgrade while it runs
    proc.add(107, "/usr/bin/server-tool")
    tables = {HOST: {11: 8000, 13: 9000}}
    by_name = discovery(proc, tables, Match(exe=("server",))).scan()
    assert by_name == Targets({101: 0, 103: 0}, {(HOST, 8000): 0, (HOST, 9000): 0})
    assert discovery(proc, {}, Match(exe=("/usr/bin/server",))).scan().processes == {103: 0}
    assert discovery(proc, {}, Match(exe=("/nowhere/server", "server-tool"))).scan().processes == {107: 0}


def test_exe_may_be_a_symbolic_link(proc: FakeProc, tmp_path: Path) -> None:
    (tmp_path / "python3").symlink_to("/opt/python3.11")
    proc.add(101, "/opt/python3.11")
    assert discovery(proc, {}, Match(exe=(str(tmp_path / "python3"),))).scan().processes == {101: 0}


def test_a_process_is_found_after_it_executes_another_program(proc: FakeProc) -> None:
    proc.add(101, "/bin/bash", ["bash", "start.sh"])
    watch = discovery(proc, {}, Match(exe=("vllm",)))
    for _ in range(11):
        assert watch.scan().processes == {}
    proc.add(101, "/usr/bin/vllm", ["vllm", "serve"])
    assert watch.scan().processes == {101: 0}


def test_cmdline_is_a_part_of_the_arguments(proc: FakeProc) -> None:
    proc.add(101, "/usr/bin/python3.11", ["python3", "-m", "uvicorn", "app:main"])
    proc.add(103, "/usr/bin/python3.11", ["python3", "-m", "uvicornette"])
    assert discovery(proc, {}, Match(cmdline=("uvicorn app",))).scan().processes == {101: 0}


def test_the_agent_its_callers_and_other_agents_do_not_match_by_name(proc: FakeProc) -> None:
    proc.add(3, "/usr/bin/bash", ["bash", "-c", "sudo footlight top --cmdline app:main"], parent=1)
    proc.add(5, "/usr/bin/sudo", ["sudo", "footlight", "top", "--cmdline", "app:main"], parent=3)
    proc.add(7, "/usr/bin/python3", ["python3", "/opt/bin/footlight", "top", "--cmdline", "app:main"], parent=5)
    proc.add(11, "/usr/bin/python3", ["python3", "/opt/bin/footlight", "run", "--cmdline", "app:main"])
    proc.add(13, "/usr/bin/python3", ["uvicorn", "app:main"])
    assert discovery(proc, {}, Match(cmdline=("app:main",))).scan().processes == {13: 0}


def test_the_agent_is_never_a_target(proc: FakeProc) -> None:
    proc.add(7, "/usr/bin/python3", sockets=[11], parent=5)
    proc.add(13, "/usr/bin/python3", sockets=[11], parent=7)
    watch = discovery(proc, {HOST: {11: 9466}}, Match(port=(9466,)))
    assert watch.scan().processes == {13: 0}
    watch.ignore(13)
    assert watch.scan() == Targets({}, {})


def test_pid_is_a_process_and_what_it_started(proc: FakeProc) -> None:
    proc.add(101, "/bin/bash")
    proc.add(103, "/usr/bin/vllm", parent=101, sockets=[11])
    proc.add(107, "/usr/bin/engine", parent=103)
    proc.add(109, "/usr/bin/other")
    found = discovery(proc, {HOST: {11: 8000}}, Match(pid=(101,))).scan()
    assert found == Targets({101: 0, 103: 0, 107: 0}, {(HOST, 8000): 0})


# ---- what the processes of a service started ----


def test_children_belong_to_the_service_whatever_they_are(proc: FakeProc) -> None:
    proc.add(101, "/usr/bin/gunicorn", sockets=[11])
    proc.add(103, "/usr/bin/vllm-engine", parent=101)
    proc.add(107, "/usr/bin/worker", parent=103)
    proc.add(109, "/usr/bin/other", sockets=[13])
    proc.add(113, "/usr/bin/child", parent=109)
    watch = discovery(proc, {HOST: {11: 8000, 13: 9000}}, Match(port=(8000,)), Match(exe=("worker",)))
    # 107 matches a rule of its own; no port of a child is the service's.
    assert watch.scan() == Targets({101: 0, 103: 0, 107: 1}, {(HOST, 8000): 0})
    assert watch.scan().processes == {101: 0, 103: 0, 107: 1}


def test_a_grandchild_is_found_whatever_the_order_of_pids(proc: FakeProc) -> None:
    """Pids begin again at the end: a parent may have a larger one than its child."""
    proc.add(907, "/usr/bin/gunicorn", sockets=[11], start=100)
    proc.add(500, "/bin/sh", parent=907, start=101)
    proc.add(103, "/usr/bin/engine", parent=500, start=102)
    watch = discovery(proc, {HOST: {11: 8000}}, Match(port=(8000,)))
    assert watch.scan().processes == {103: 0, 500: 0, 907: 0}


def test_a_child_stays_when_its_parents_have_ended(proc: FakeProc) -> None:
    proc.add(101, "/usr/bin/gunicorn", sockets=[11])
    proc.add(103, "/bin/sh", parent=101)
    proc.add(107, "/usr/bin/engine", parent=103)
    tables = {HOST: {11: 8000}}
    watch = discovery(proc, tables, Match(port=(8000,)))
    assert watch.scan().processes == {101: 0, 103: 0, 107: 0}
    proc.remove(103)
    proc.add(107, "/usr/bin/engine", parent=1)
    assert watch.scan().processes == {101: 0, 107: 0}
    proc.remove(101)
    # As the kernel has it: without a process that matches, those that it started go on being followed.
    proc.add(109, "/usr/bin/gunicorn", sockets=[11])
    for _ in range(31):
        assert watch.scan().processes == {107: 0, 109: 0}
    proc.remove(107)
    assert watch.scan().processes == {109: 0}


def test_what_a_child_that_stayed_starts_is_found_too(proc: FakeProc) -> None:
    proc.add(101, "/usr/bin/gunicorn", sockets=[11])
    proc.add(107, "/usr/bin/engine", parent=101)
    watch = discovery(proc, {HOST: {11: 8000}}, Match(port=(8000,)))
    watch.scan()
    proc.remove(101)
    proc.add(107, "/usr/bin/engine", parent=1)
    proc.add(103, "/usr/bin/tool", parent=107)  # before its parent in the order of pids
    proc.add(109, "/usr/bin/gunicorn", sockets=[11])
    assert watch.scan().processes == {103: 0, 107: 0, 109: 0}


def test_a_process_of_another_start_is_not_the_child_that_had_its_pid(proc: FakeProc) -> None:
    proc.add(101, "/usr/bin/gunicorn", sockets=[11])
    proc.add(103, "/usr/bin/engine", parent=101)
    watch = discovery(proc, {HOST: {11: 8000}}, Match(port=(8000,)))
    assert watch.scan().processes == {101: 0, 103: 0}
    proc.add(103, "/usr/bin/engine", parent=1, start=2003)
    assert watch.scan().processes == {101: 0}


def test_who_has_the_pid_of_a_parent_that_ended_is_no_parent(proc: FakeProc) -> None:
    """A process is read anew every 30 scans; until then its parent's pid may have become a service's."""
    proc.add(101, "/bin/sh", start=1000)
    proc.add(103, "/usr/bin/other", parent=101, start=1001)
    watch = discovery(proc, {HOST: {11: 8000}}, Match(port=(8000,)))
    for _ in range(7):
        assert watch.scan().processes == {}
    proc.add(101, "/usr/bin/gunicorn", sockets=[11], start=2003)
    for _ in range(31):
        assert watch.scan().processes == {101: 0}


def test_the_agent_is_no_child_of_a_service(proc: FakeProc) -> None:
    proc.add(101, "/sbin/supervisor", sockets=[11])
    proc.add(7, "/usr/bin/footlight", parent=101)
    proc.add(11, "/usr/bin/footlight", parent=7)
    watch = discovery(proc, {HOST: {11: 8000}}, Match(port=(8000,)))
    watch.ignore(11)
    assert watch.scan().processes == {101: 0}
    assert watch.scan().processes == {101: 0}


def test_parents_in_a_circle_end(proc: FakeProc) -> None:
    proc.add(101, "/bin/a", parent=103)
    proc.add(103, "/bin/b", parent=101)
    assert discovery(proc, {}, Match(pid=(997,))).scan().processes == {}
    proc.add(107, "/bin/c")
    assert discovery(proc, {}, Match(pid=(107,))).scan().processes == {107: 0}


ID = "3f" * 31 + "07"


@pytest.mark.parametrize(
    ("cgroup", "wanted", "matches"),
    [
        (f"0::/system.slice/docker-{ID}.scope\n", ID, True),
        (f"0::/system.slice/docker-{ID}.scope\n", ID[:12], True),
        (f"0::/system.slice/docker-{ID}.scope\n", ID[1:13], False),
        (f"0::/kubepods.slice/kubepods-pod1.slice/cri-containerd-{ID}.scope/worker\n", ID[:12], True),
        (f"4:memory:/docker/{ID}\n0::/\n", ID[:20], True),
        (f"0::/docker/{'a' * 64}/docker/{ID}\n", ID, True),
        (f"0::/docker/{ID}{ID}\n", ID[:12], False),
        (f"0::/docker/{ID[:32]}\n", ID[:12], False),
        ("0::/\n", ID[:12], False),
    ],
)
def test_a_container_is_known_by_how_its_id_begins(proc: FakeProc, cgroup: str, wanted: str, matches: bool) -> None:
    proc.add(101, "/usr/bin/vllm", cgroup=cgroup)
    assert discovery(proc, {}, Match(container=(wanted,))).scan().processes == ({101: 0} if matches else {})


@pytest.mark.parametrize(
    ("cgroup", "wanted", "matches"),
    [
        ("0::/kubepods/burstable/pod1/c\n", "/kubepods/burstable", True),
        ("0::/kubepods/burstable/pod1/c\n", "kubepods/burstable/pod1/", True),
        ("0::/kubepods/burstable/pod1/c\n", "/kubepods/burst", False),
        ("0::/kubepods/burstable/pod1/c\n", "/sys/fs/cgroup/kubepods/burstable", True),
        ("4:memory:/docker/ab\n0::/\n", "/docker/ab", True),
        ("4:memory:/docker/ab\n0::/\n", "/sys/fs/cgroup/memory/docker/ab", True),
        ("4:memory:/docker/ab\n0::/\n", "/docker/a", False),
        ("0::/system.slice\n", "/sys/fs/cgroup/user.slice", False),
        ("0::/a:b\n", "/a:b", True),
        ("0::/\n", "/", True),
        ("garbage\n", "/a", False),
    ],
)
def test_cgroup_is_a_prefix_of_whole_components(proc: FakeProc, cgroup: str, wanted: str, matches: bool) -> None:
    proc.add(101, "/usr/bin/vllm", cgroup=cgroup)
    assert discovery(proc, {}, Match(cgroup=(wanted,))).scan().processes == ({101: 0} if matches else {})


def test_all_conditions_must_hold_and_the_first_service_has_it(proc: FakeProc) -> None:
    proc.add(101, "/usr/bin/vllm", ["vllm", "big"], sockets=[11])
    proc.add(103, "/usr/bin/vllm", ["vllm", "small"], sockets=[13])
    tables = {HOST: {11: 8000, 13: 8001}}
    found = discovery(
        proc,
        tables,
        Match(exe=("vllm",), port=(8001,), cmdline=("big",)),
        Match(exe=("vllm",), port=(8001, 8002)),
        Match(exe=("vllm",)),
    ).scan()
    assert found == Targets({103: 1, 101: 2}, {(HOST, 8001): 1, (HOST, 8000): 2})


def test_kernel_threads_and_zombies_never_match(proc: FakeProc) -> None:
    proc.add(2, None, kernel_thread=True)
    proc.add(101, None, state="Z")
    assert discovery(proc, {}, Match(pid=(2, 101))).scan() == Targets({}, {})


def test_processes_that_end_during_the_scan_are_no_error(proc: FakeProc) -> None:
    proc.add(101, "/usr/bin/vllm", sockets=[11])
    (proc.root / "103").mkdir()  # listed, and gone when it is read
    watch = discovery(proc, {HOST: {11: 8000}}, Match(port=(8000,)))
    assert watch.scan().processes == {101: 0}
    shutil.rmtree(proc.root / "101/fd")
    shutil.rmtree(proc.root / "101/ns")
    (proc.root / "101/stat").unlink()
    assert watch.scan() == Targets({}, {})


def test_empty_namespaces_are_forgotten(proc: FakeProc) -> None:
    proc.add(101, "/usr/bin/vllm", namespace=POD)
    listeners = FakeListeners({})
    watch = Discovery([Service("s", Match(exe=("vllm",)))], proc.root, listeners, {7})
    watch.scan()
    assert listeners.alive == {POD}
    proc.remove(101)
    watch.scan()
    assert listeners.alive == set()


def test_steady_state_reads_one_link_a_process(proc: FakeProc, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(101, 198):
        proc.add(number, "/usr/bin/vllm", sockets=[11])
    watch = discovery(proc, {HOST: {11: 8000}}, Match(port=(8000,)))
    for _ in range(5):
        watch.scan()
    read: list[int] = []
    stat = ProcFs.stat
    monkeypatch.setattr(ProcFs, "stat", lambda self, pid: (read.append(pid), stat(self, pid))[1])
    for _ in range(30):
        assert len(watch.scan().processes) == 97
    assert sorted(read) == list(range(101, 198))  # each once in 30 scans


# ---- when nothing is found ----


@pytest.mark.parametrize(
    ("match", "what", "next_step"),
    [
        (Match(port=(8001,)), "no process matches port 8001", "TCP ports that are listened on: 8000."),
        (Match(exe=("uvicorn",)), "no process matches exe uvicorn", "executables that run: python3.11; a script is"),
        (Match(pid=(997,)), "no process matches pid 997", "ps -ef"),
        (Match(container=(ID[:12],)), f"matches container {ID[:12]}", "crictl ps"),
        (Match(cmdline=("x y",), cgroup=("/c",)), "matches cmdline x y and cgroup /c", "ps -eo pid,args"),
    ],
)
def test_missing_targets_are_explained(proc: FakeProc, match: Match, what: str, next_step: str) -> None:
    proc.add(101, "/usr/bin/python3.11", sockets=[11])
    watch = discovery(proc, {HOST: {11: 8000}}, match)
    error = watch.missing(watch.scan())
    assert error is not None
    assert what in error.what
    assert next_step in error.next_step


def test_nothing_is_missing_when_a_process_is_there(proc: FakeProc) -> None:
    proc.add(101, "/usr/bin/vllm")
    watch = discovery(proc, {}, Match(exe=("vllm",)))
    assert watch.missing(watch.scan()) is None


# ---- hostile text ----


@pytest.mark.parametrize("comm", [") R 1 1 (x", "a\nb", "((", "))", ") S 2 (", "\udcff\udcfe", ""])
def test_a_hostile_name_does_not_move_the_fields(proc: FakeProc, comm: str) -> None:
    proc.add(101, "/x", comm=comm, parent=31, start=41)
    assert ProcFs(proc.root).stat(101) == Stat(comm, "S", 31, False, 41)


@pytest.mark.parametrize("raw", [b"", b"1 (x", b"1 x) S", b"1 (x) S 1", b"1 (x) S " + b"a " * 30, b")("])
def test_a_broken_stat_is_none(raw: bytes) -> None:
    assert parse_stat(raw) is None


@pytest.mark.parametrize(
    ("target", "inode"),
    [
        ("socket:[4711]", 4711),
        ("socket:[]", None),
        ("socket:[-1]", None),
        ("socket:[\u0661]", None),
        ("/socket:[1]", None),
    ],
)
def test_link_targets(target: str, inode: int | None) -> None:
    assert parse_link_inode(target, "socket") == inode


def test_rows_of_listeners_that_are_none() -> None:
    assert parse_listeners(b"header\nx\n 0: a:ZZ b 0A c d e f g 7 x\n 0: a:1F40 b 0A c d e f g 7 x\n") == {7: 8000}


# ---- netlink ----


@pytest.mark.parametrize(("family", "host"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")])
def test_netlink_and_proc_agree_on_this_host(family: socket.AddressFamily, host: str) -> None:
    fs = ProcFs()
    namespace = fs.network_namespace(os.getpid())
    assert namespace is not None
    table = ListenerTable(fs)
    with socket.create_server((host, 0), family=family) as server:
        inode = os.fstat(server.fileno()).st_ino
        assert table.listeners(namespace, os.getpid())[inode] == server.getsockname()[1]
        assert fs.listeners(os.getpid())[inode] == server.getsockname()[1]
        assert inode in fs.sockets(os.getpid())
    assert inode not in table.listeners(namespace, os.getpid())
    table.close()


def message(kind: int, body: bytes, sequence: int = 2) -> bytes:
    raw = struct.pack("=IHHII", 16 + len(body), kind, 0, sequence, 0) + body
    return raw + b"\0" * (-len(raw) % 4)


def test_netlink_answers_are_read() -> None:
    found: dict[int, int] = {}
    row = struct.pack("!4xH62xxx", 8000)[:68] + struct.pack("=I", 4711)
    assert _take(message(20, row) + message(20, row, sequence=3), 2, found)
    assert not _take(message(3, b"\0" * 4), 2, found)
    assert found == {4711: 8000}


@pytest.mark.parametrize(
    "answer",
    [message(2, struct.pack("=i", -1)), struct.pack("=IHHII", 4, 20, 0, 2, 0), struct.pack("=IHHII", 99, 20, 0, 2, 0)],
)
def test_netlink_refusals_raise(answer: bytes) -> None:
    with pytest.raises(OSError, match=r"Operation not permitted|cut short"):
        _take(answer, 2, {})


# ---- other rules ----


def services(*matches: Match) -> list[Service]:
    return [Service(f"s{index}", match) for index, match in enumerate(matches)]


def test_other_rules_find_what_runs_already(proc: FakeProc) -> None:
    proc.add(101, "/usr/bin/vllm", sockets=[11])
    proc.add(103, "/usr/bin/sglang", sockets=[13])
    found = discovery(proc, {HOST: {11: 8000, 13: 9000}}, Match(port=(8000,)))
    for _ in range(7):  # nobody is new any more
        assert found.scan() == Targets({101: 0}, {(HOST, 8000): 0})
    found.reconfigure(services(Match(port=(8000,)), Match(port=(9000,))))
    assert found.scan() == Targets({101: 0, 103: 1}, {(HOST, 8000): 0, (HOST, 9000): 1})
    found.reconfigure(services(Match(pid=(-1,)), Match(port=(9000,))))
    assert found.scan() == Targets({103: 1}, {(HOST, 9000): 1})


def test_a_worker_that_stopped_to_listen_stays_over_a_reload(proc: FakeProc) -> None:
    proc.add(101, "/usr/bin/vllm", sockets=[11])
    tables = {HOST: {11: 8000}}
    found = discovery(proc, tables, Match(port=(8000,)))
    found.scan()
    tables[HOST] = {}
    (proc.root / "101/fd/3").unlink()
    found.reconfigure(services(Match(port=(8000,)), Match(port=(9000,))))
    assert found.scan().processes == {101: 0}


def test_children_go_with_their_services_rule(proc: FakeProc) -> None:
    proc.add(101, "/usr/bin/vllm", sockets=[11])
    proc.add(103, "/usr/bin/engine", parent=101, start=1013)
    found = discovery(proc, {HOST: {11: 8000}}, Match(port=(8000,)))
    assert found.scan().processes == {101: 0, 103: 0}
    found.reconfigure(services(Match(port=(8001,)), Match(port=(8000,))))
    assert found.scan().processes == {101: 1, 103: 1}
    found.reconfigure(services(Match(port=(8001,)), Match(pid=(-1,))))
    assert found.scan().processes == {}
