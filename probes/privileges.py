"""Says which privileges a process holds, and gives them up for good.

The reader decodes bytes that strangers sent. It calls `drop_to_nobody` before it reads the first one, so that
a flaw in a decoder is worth a process that can open no file and make no privileged call.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from probes.errors import HostError

NOBODY: Final = 65534

CAPABILITIES: Final = (
    "chown dac_override dac_read_search fowner fsetid kill setgid setuid setpcap linux_immutable net_bind_service "
    "net_broadcast net_admin net_raw ipc_lock ipc_owner sys_module sys_rawio sys_chroot sys_ptrace sys_pacct sys_admin "
    "sys_boot sys_nice sys_resource sys_time sys_tty_config mknod lease audit_write audit_control setfcap mac_override "
    "mac_admin syslog wake_alarm block_suspend audit_read perfmon bpf checkpoint_restore"
).split()
"""Names by number (linux/capability.h), lower-case, without CAP_."""

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_DUMPABLE: Final = 4
_PR_CAPBSET_READ: Final = 23
_PR_CAPBSET_DROP: Final = 24
_PR_SET_NO_NEW_PRIVS: Final = 38
_PR_CAP_AMBIENT: Final = 47
_PR_CAP_AMBIENT_CLEAR_ALL: Final = 4
_LINUX_CAPABILITY_VERSION_3: Final = 0x20080522


@dataclass(frozen=True, slots=True)
class Privileges:
    """What a process may do. `capabilities` are its effective ones, by name; `held` counts every set it could use."""

    uid: int
    gid: int
    groups: tuple[int, ...]
    capabilities: tuple[str, ...]
    held: tuple[str, ...]
    no_new_privs: bool

    def __str__(self) -> str:
        """Return one line for a log: who, what it may, and whether it could get more."""
        who = {0: "root", NOBODY: "nobody"}.get(self.uid, "uid")
        count = len(self.capabilities)
        may = "no capabilities" if not count else f"{count} capabilities" if count > 6 else " ".join(self.capabilities)
        return f"{who} ({self.uid}), {may}{', no new privileges' if self.no_new_privs else ''}"


class _Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _Sets(ctypes.Structure):
    _fields_ = (("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32))


def describe(pid: int | None = None, proc: Path = Path("/proc")) -> Privileges:
    """Return the privileges of a process, this one by default.

    Raises `HostError` when its status cannot be read.
    """
    path = proc / ("self" if pid is None else str(pid)) / "status"
    try:
        text = path.read_bytes()
    except OSError as error:
        raise HostError(
            f"cannot read {path}: {error.strerror}", "check that the process runs and that /proc is mounted"
        ) from error
    fields = {key: value.split() for key, _, value in (line.partition(b":") for line in text.splitlines())}
    try:
        sets = {name: int(fields[name][0], 16) for name in (b"CapEff", b"CapPrm", b"CapInh", b"CapAmb")}
        return Privileges(
            uid=int(fields[b"Uid"][1]),
            gid=int(fields[b"Gid"][1]),
            groups=tuple(int(group) for group in fields[b"Groups"]),
            capabilities=capability_names(sets[b"CapEff"]),
            held=capability_names(sets[b"CapEff"] | sets[b"CapPrm"] | sets[b"CapInh"] | sets[b"CapAmb"]),
            no_new_privs=fields[b"NoNewPrivs"] == [b"1"],
        )
    except (KeyError, IndexError, ValueError) as error:
        raise HostError(f"{path} is not what the kernel writes", "check that /proc is mounted") from error


def capability_names(bits: int) -> tuple[str, ...]:
    """Names of the capabilities in a bit set, by number; numbers that are too new to have a name here are `cap_N`."""
    return tuple(
        CAPABILITIES[number] if number < len(CAPABILITIES) else f"cap_{number}"
        for number in range(bits.bit_length())
        if bits >> number & 1
    )


def drop_to_nobody(
    keep_fds: Iterable[int] = (), parent: int | None = None, death_signal: int = signal.SIGKILL
) -> Privileges:
    """Give up every privilege of this process, for good, and return what is left.

    Afterwards it is user and group nobody without supplementary groups (or, where it was not root, the user it was),
    has no capability in any set, can gain none, cannot be traced or dump core, holds no descriptor but 0, 1, 2 and
    `keep_fds`, and ends with `death_signal` when its parent does. Give `parent`, the parent's process id, to
    notice a parent that ended before this call. Call it while there is one thread, after rings and event buffers
    were mapped.

    Raises `HostError` when the kernel refuses a step or when anything is left; end the process then.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    _close_others({0, 1, 2, *keep_fds})
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _empty_bounding_set(libc)
    with contextlib.suppress(OSError):  # kernels before 4.3 have no ambient set; the check below sees what is left
        _prctl(libc, _PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL)
    try:
        if os.geteuid() == 0 or os.getuid() == 0:
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
        _empty_capability_sets(libc)
        _prctl(libc, _PR_SET_NO_NEW_PRIVS, 1)
        # After the change of user: that change clears the death signal.
        _prctl(libc, _PR_SET_PDEATHSIG, death_signal)
        _prctl(libc, _PR_SET_DUMPABLE, 0)
    except OSError as error:
        raise HostError(f"cannot give up privileges: {error}", "run as root in the initial user namespace") from error
    if parent is not None and os.getppid() != parent:
        raise HostError("the parent process ended during start", "start the agent again")
    return _verified()


def _verified() -> Privileges:
    left = describe()
    threads = len(os.listdir("/proc/self/task"))
    if threads > 1:  # what the others hold is not seen here
        raise HostError(f"there are {threads} threads where privileges are given up", "report this")
    regained = True
    try:
        os.setresuid(0, 0, 0)
    except PermissionError:
        regained = False
    if regained or left.uid == 0 or left.held or not left.no_new_privs or (left.uid == NOBODY and left.groups):
        raise HostError(
            f"privileges are left after giving them up: {left}",
            "report this with `uname -a`; the reader does not start",
        )
    return left


def _close_others(keep: set[int]) -> None:
    for fd in [int(name) for name in os.listdir("/proc/self/fd")]:
        if fd not in keep:
            with contextlib.suppress(OSError):  # the descriptor of the listing itself is closed already
                os.close(fd)


def _empty_bounding_set(libc: ctypes.CDLL) -> None:
    # Needs CAP_SETPCAP. Without it the set stays, which no-new-privs makes worthless.
    for capability in range(64):
        if libc.prctl(_PR_CAPBSET_READ, capability, 0, 0, 0) < 0:
            return
        with contextlib.suppress(OSError):
            _prctl(libc, _PR_CAPBSET_DROP, capability)


def _empty_capability_sets(libc: ctypes.CDLL) -> None:
    header = _Header(_LINUX_CAPABILITY_VERSION_3, 0)
    if libc.capset(ctypes.byref(header), (_Sets * 2)()) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"capset: {os.strerror(code)}")


def _prctl(libc: ctypes.CDLL, option: int, value: int) -> None:
    arguments = (ctypes.c_ulong(item) for item in (value, 0, 0, 0))
    if libc.prctl(option, *arguments) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"prctl {option}: {os.strerror(code)}")
