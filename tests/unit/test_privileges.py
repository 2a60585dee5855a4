"""Privileges: what /proc says is read right, and what the reader gives up is gone for good."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from probes.errors import HostError
from probes.privileges import CAPABILITIES, Privileges, capability_names, describe

STATUS = """\
Name:\tx
Uid:\t1000\t{uid}\t1000\t1000
Gid:\t1000\t{uid}\t1000\t1000
Groups:\t{groups}
CapInh:\t0000000000000000
CapPrm:\t{permitted:016x}
CapEff:\t{effective:016x}
CapBnd:\t000001ffffffffff
CapAmb:\t0000000000000000
NoNewPrivs:\t{locked}
"""

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: sudo make test")


def status(tmp_path: Path, **values: object) -> Privileges:
    defaults: dict[str, object] = {"uid": 1000, "groups": "", "permitted": 0, "effective": 0, "locked": 0}
    (tmp_path / "23").mkdir()
    (tmp_path / "23/status").write_text(STATUS.format(**{**defaults, **values}))
    return describe(23, tmp_path)


def test_effective_ids_groups_and_capabilities_are_read(tmp_path: Path) -> None:
    held = status(tmp_path, uid=7, groups="7 11 ", permitted=1 << 38 | 1 << 39, effective=1 << 39, locked=1)
    assert held == Privileges(7, 7, (7, 11), ("bpf",), ("perfmon", "bpf"), True)
    assert str(held) == "uid (7), bpf, no new privileges"


@pytest.mark.parametrize(
    ("uid", "effective", "text"),
    [
        (0, (1 << 41) - 1, "root (0), 41 capabilities"),
        (65534, 0, "nobody (65534), no capabilities"),
        (1000, 1 << 38 | 1 << 39 | 1 << 21, "uid (1000), sys_admin perfmon bpf"),
    ],
)
def test_a_log_line_says_who_and_what(tmp_path: Path, uid: int, effective: int, text: str) -> None:
    assert str(status(tmp_path, uid=uid, permitted=effective, effective=effective)) == text


def test_capability_numbers() -> None:
    assert len(CAPABILITIES) == 41
    assert capability_names(1 << 21 | 1 << 61) == ("sys_admin", "cap_61")


@pytest.mark.parametrize("text", ["", "Uid:\t1\n", "Uid:\tx x\nGid:\t0 0\nGroups:\nCapEff: z\n"])
def test_a_status_that_is_none_is_an_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "23").mkdir()
    (tmp_path / "23/status").write_text(text)
    with pytest.raises(HostError, match="is not what the kernel writes"):
        describe(23, tmp_path)


def test_a_process_that_is_gone_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(HostError, match=r"cannot read .*/23/status: No such file"):
        describe(23, tmp_path)


def dropped(code: str) -> list[str]:
    """Run `code` in a process that dropped its privileges; return the lines it printed."""
    program = f"""
import ctypes, os, resource, socket, sys
from probes.privileges import describe, drop_to_nobody
kept, other = os.open("/proc/self/status", 0), os.open("/proc/self/status", 0)
left = drop_to_nobody([kept], parent=os.getppid())
def refused(call, *arguments):
    try:
        call(*arguments)
    except OSError:
        return True
    return False
{textwrap.dedent(code)}
"""
    return subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True, timeout=30
    ).stdout.splitlines()


@as_root
def test_the_reader_ends_up_as_nobody_with_nothing() -> None:
    assert dropped("print(left); print(left == describe(), left.groups, left.held)") == [
        "nobody (65534), no capabilities, no new privileges",
        "True () ()",
    ]


@as_root
def test_what_was_given_up_does_not_come_back() -> None:
    said = dropped(
        """
        print(refused(os.setuid, 0), refused(os.setgid, 0), refused(os.setgroups, [0]))
        print(refused(os.open, "/etc/shadow", 0), refused(os.kill, os.getppid(), 0))
        libc = ctypes.CDLL(None)
        print([libc.prctl(23, capability) for capability in range(41)] == [0] * 41)  # bounding set
        dumpable, no_new_privs = libc.prctl(3), libc.prctl(39, 0, 0, 0, 0)
        print(dumpable, no_new_privs, resource.getrlimit(resource.RLIMIT_CORE))
        """
    )
    assert said == ["True True True", "True True", "True", "0 1 (0, 0)"]


@as_root
def test_only_the_kept_descriptors_stay_open() -> None:
    said = dropped(
        """
        print(sorted(fd for fd in range(256) if not refused(os.fstat, fd)) == [0, 1, 2, kept])
        """
    )
    assert said == ["True"]


@as_root
def test_the_reader_ends_with_its_parent() -> None:
    program = """
import os, signal, sys
from probes.privileges import drop_to_nobody
parent = os.getpid()
if os.fork():
    signal.pause()
drop_to_nobody(parent=parent)
print(os.getpid(), flush=True)
signal.pause()
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        watch = os.pidfd_open(child)
        process.kill()
        ended, _, _ = select.select([watch], [], [], 10)
        os.close(watch)
        assert ended == [watch]


@as_root
def test_a_parent_that_ended_before_is_noticed() -> None:
    program = """
from probes.privileges import drop_to_nobody
drop_to_nobody(parent=1 << 22)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=30)
    assert "the parent process ended during start" in done.stderr
