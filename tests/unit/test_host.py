"""The host report on made-up hosts: each obstacle is found and comes with what to do."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from probes.errors import HostError
from probes.host import OTHER_OBJECTS, TRACEPOINTS, HostReport, examine, find_tracefs, mount_tracefs
from probes.privileges import Privileges

ROOT = Privileges(0, 0, (), ("sys_admin", "perfmon", "bpf"), ("sys_admin", "perfmon", "bpf"), False)


@dataclass(frozen=True)
class FakeLibbpf:
    ring: bool = True
    absent: frozenset[str] = frozenset()

    def version(self) -> str:
        return "1.1"

    def has_ring_buffer(self) -> bool:
        return self.ring

    def has_btf_tracepoint(self, name: str) -> bool:
        return name not in self.absent


def no_libbpf() -> FakeLibbpf:
    raise OSError("libbpf.so.1: cannot open shared object file")


class FakeHost:
    """A host that can do everything, under a temporary folder; tests take things away."""

    def __init__(self, root: Path) -> None:
        self.proc, self.sys, self.objects = root / "proc", root / "sys", root / "objects"
        for folder in (self.proc / "self", self.proc / "sys/kernel", self.sys / "kernel/btf", self.objects):
            folder.mkdir(parents=True)
        (self.proc / "self/mounts").write_text("tracefs /sys/kernel/tracing tracefs rw 0 0\n")
        (self.proc / "sys/kernel/perf_event_paranoid").write_text("3\n")
        (self.sys / "kernel/btf/vmlinux").write_bytes(b"\0" * (3 << 20))
        for name in ("requests.bpf.o", *OTHER_OBJECTS):
            (self.objects / name).touch()
        self.held = ROOT
        self.libbpf: type[FakeLibbpf] | object = FakeLibbpf

    def mount_no_tracefs(self) -> None:
        """Where it is mounted, the tracepoints of the host that runs the tests are looked at."""
        (self.proc / "self/mounts").write_text("proc /proc proc rw 0 0\n")

    def examine(self) -> HostReport:
        return examine(self.proc, self.sys, self.objects, self.held, self.libbpf)  # type: ignore[arg-type]  # a class or a function

    def obstacle(self) -> HostError:
        error = self.examine().error()
        assert error is not None
        assert error.exit_code == 3
        assert error.next_step
        return error


@pytest.fixture
def there(tmp_path: Path) -> FakeHost:
    return FakeHost(tmp_path)


def finding(report: HostReport, name: str) -> tuple[bool, bool, str, str]:
    (check,) = (check for check in report.checks if check.name == name)
    return check.ok, check.required, check.detail, check.next_step


def test_missing_btf(there: FakeHost) -> None:
    (there.sys / "kernel/btf/vmlinux").unlink()
    error = there.obstacle()
    assert "kernel BTF" in error.what
    assert "CONFIG_DEBUG_INFO_BTF=y" in error.next_step


def test_missing_libbpf(there: FakeHost) -> None:
    there.libbpf = no_libbpf
    error = there.obstacle()
    assert "libbpf.so.1" in error.what
    assert error.next_step == "apt-get install libbpf1"


def test_missing_object(there: FakeHost) -> None:
    (there.objects / "requests.bpf.o").unlink()
    assert "requests.bpf.o" in there.obstacle().what
    assert there.obstacle().next_step == "make bpf"


@pytest.mark.parametrize(
    ("capabilities", "paranoid", "able", "next_step"),
    [
        (("sys_admin",), "4", True, ""),
        (("perfmon", "bpf"), "2", False, "give it CAP_SYS_ADMIN, or run it as root: sudo footlight ..."),
        (("bpf",), "2", False, "run it as root: sudo footlight ..."),
        ((), "-1", False, "run it as root: sudo footlight ..."),
    ],
)
def test_privileges(there: FakeHost, capabilities: tuple[str, ...], paranoid: str, able: bool, next_step: str) -> None:
    there.held = replace(ROOT, uid=1000, capabilities=capabilities)
    (there.proc / "sys/kernel/perf_event_paranoid").write_text(paranoid)
    ok, required, detail, step = finding(there.examine(), "privileges")
    assert (ok, required, step) == (able, True, next_step)
    assert f"kernel.perf_event_paranoid {paranoid}" in detail


@pytest.mark.parametrize(
    ("modes", "able"), [("[none] integrity confidentiality", True), ("none integrity [confidentiality]", False)]
)
def test_lockdown(there: FakeHost, modes: str, able: bool) -> None:
    (there.sys / "kernel/security").mkdir()
    (there.sys / "kernel/security/lockdown").write_text(modes)
    assert finding(there.examine(), "lockdown")[0] is able


def test_no_ring_buffer_is_no_obstacle(there: FakeHost) -> None:
    there.libbpf = lambda: FakeLibbpf(ring=False)
    ok, required, detail, _ = finding(there.examine(), "ring buffer")
    assert (ok, required) == (False, False)
    assert "perf buffers" in detail


def test_tracefs_that_is_missing_is_mounted_by_root_only(there: FakeHost) -> None:
    there.mount_no_tracefs()
    assert finding(there.examine(), "tracefs")[:2] == (True, True)
    there.held = replace(ROOT, capabilities=("perfmon", "bpf"))
    assert finding(there.examine(), "tracefs")[3] == "mount -t tracefs tracefs /sys/kernel/tracing"


@pytest.mark.parametrize(
    ("mounts", "found"),
    [
        ("tracefs /sys/kernel/tracing tracefs rw 0 0\n", Path("/sys/kernel/tracing")),
        ("x /sys/kernel/debug/tracing tracefs rw 0 0\n", Path("/sys/kernel/debug/tracing")),
        ("tracefs /mnt/elsewhere tracefs rw 0 0\n", None),  # where libbpf does not look
        ("tracefs /sys/kernel/tracing tmpfs rw 0 0\n", None),
        ("\n/a\udcff b\n", None),
    ],
)
def test_where_tracefs_is_mounted(there: FakeHost, mounts: str, found: Path | None) -> None:
    (there.proc / "self/mounts").write_bytes(mounts.encode("utf-8", "surrogateescape"))
    assert find_tracefs(there.proc) == found


def test_a_mounted_tracefs_is_not_mounted_again(there: FakeHost) -> None:
    assert mount_tracefs(Path("/nonexistent"), there.proc) == Path("/sys/kernel/tracing")


def test_a_mount_that_fails_says_why(there: FakeHost) -> None:
    (there.proc / "self/mounts").write_text("")
    with pytest.raises(HostError, match="tracefs is not mounted and cannot be: No such file"):
        mount_tracefs(there.proc / "nowhere", there.proc)


def test_tracepoints_are_looked_up_where_tracefs_is(tmp_path: Path) -> None:
    from probes.host import _tracepoints

    for name in (*TRACEPOINTS, "tcp/tcp_probe"):
        (tmp_path / "events" / name).mkdir(parents=True)
        (tmp_path / "events" / name / "id").write_text("7\n")
    assert [check.ok for check in _tracepoints(tmp_path)] == [True, True]
    (tmp_path / "events/tcp/tcp_probe/id").unlink()
    (tmp_path / "events/syscalls/sys_enter_read/id").unlink()
    tracepoints, arrival = _tracepoints(tmp_path)
    assert (tracepoints.ok, tracepoints.required, tracepoints.detail) == (
        False,
        True,
        "missing: syscalls/sys_enter_read",
    )
    assert (arrival.ok, arrival.required) == (False, False)


def test_every_finding_that_is_not_right_says_what_to_do(there: FakeHost) -> None:
    there.held = replace(ROOT, capabilities=())
    there.libbpf = no_libbpf
    (there.sys / "kernel/btf/vmlinux").unlink()
    (there.objects / "requests.bpf.o").unlink()
    (there.proc / "self/mounts").unlink()
    wrong = [check for check in there.examine().checks if not check.ok]
    assert {"privileges", "kernel BTF", "libbpf", "BPF objects", "tracefs"} <= {check.name for check in wrong}
    assert all(check.next_step for check in wrong)


@pytest.mark.parametrize(
    ("absent", "detail", "step"),
    [
        (set(), "paths go from thread to thread", ""),
        ({"sched_waking"}, "the kernel's BTF has no sched_waking", "what, not why"),
        ({"sk_data_ready", "sock_recv_length"}, "the kernel has no sk_data_ready, sock_recv_length: TCP", "Linux 6.3"),
    ],
)
def test_what_causes_need(there: FakeHost, absent: set[str], detail: str, step: str) -> None:
    there.libbpf = lambda: FakeLibbpf(absent=frozenset(absent))
    ok, required, said, next_step = finding(there.examine(), "causes")
    assert (ok, required) == (not absent, False)
    assert detail in said
    assert step in next_step
    there.mount_no_tracefs()
    assert there.examine().able


def test_a_probe_that_is_not_built_is_no_obstacle(there: FakeHost) -> None:
    (there.objects / "scheduler.bpf.o").unlink()
    assert finding(there.examine(), "causes")[3] == "make bpf"
    there.mount_no_tracefs()
    assert there.examine().able
