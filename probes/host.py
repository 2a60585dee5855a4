"""Finds out what this host can do, before anything is loaded, and mounts tracefs where it is missing."""

from __future__ import annotations

import ctypes
import os
import resource
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from probes import privileges
from probes.errors import HostError
from probes.privileges import Privileges

LIBBPF: Final = "libbpf.so.1"
OBJECTS: Final = Path(__file__).parent / "objects"
REQUIRED_OBJECTS: Final = ("requests.bpf.o",)
TRACEPOINTS: Final = ("syscalls/sys_enter_read", "syscalls/sys_exit_write", "sock/inet_sock_set_state")
"""Without one of these nothing can be followed."""
ARRIVAL_TRACEPOINT: Final = "tcp/tcp_probe"
"""Without it the arrival instant is the first read."""
OTHER_OBJECTS: Final = ("scheduler.bpf.o", "tcp.bpf.o", "block.bpf.o", "memory.bpf.o", "syscalls.bpf.o")
SCHEDULER_TRACEPOINTS: Final = ("sched_switch", "sched_waking", "sched_wakeup_new", "sched_process_exit")
"""Without one of these nothing can be said about causes."""
MESSAGE_TRACEPOINTS: Final = ("sk_data_ready", "sock_send_length", "sock_recv_length")
"""Without one of these a path goes on with who sent what a thread read without waiting for it over TCP only."""

_MAP_TYPE_RING_BUFFER: Final = 27
_TRACE_RAW_TP: Final = 23


@dataclass(frozen=True, slots=True)
class Check:
    """One finding. `required`: the agent cannot run without it. `next_step` is empty where there is nothing to do."""

    name: str
    ok: bool
    required: bool
    detail: str
    next_step: str = ""


@dataclass(frozen=True, slots=True)
class HostReport:
    """Everything that was found, in the order in which to mend it."""

    checks: tuple[Check, ...]

    @property
    def able(self) -> bool:
        """Whether the agent can run here."""
        return self.error() is None

    def error(self) -> HostError | None:
        """The first thing that stands in the way, as an error; None where nothing does."""
        for check in self.checks:
            if check.required and not check.ok:
                return HostError(f"this host cannot run the probes: {check.name}: {check.detail}", check.next_step)
        return None


class Libbpf(Protocol):
    """What is asked of libbpf here."""

    def version(self) -> str:
        """Its version, such as `1.1`."""

    def has_ring_buffer(self) -> bool:
        """Whether the kernel takes a ring-buffer map."""

    def has_btf_tracepoint(self, name: str) -> bool:
        """Whether the kernel's BTF has the tracepoint."""


class SystemLibbpf:
    """The libbpf that this process would use. Raises OSError when there is none."""

    def __init__(self) -> None:
        self._library: Final = ctypes.CDLL(LIBBPF)

    def version(self) -> str:
        """Its version, such as `1.1`."""
        self._library.libbpf_version_string.restype = ctypes.c_char_p
        return str(self._library.libbpf_version_string().decode("ascii", "replace")).removeprefix("v")

    def has_ring_buffer(self) -> bool:
        """Whether the kernel takes a ring-buffer map: makes one. False, too, without the privilege to ask."""
        return bool(self._library.libbpf_probe_bpf_map_type(_MAP_TYPE_RING_BUFFER, None) == 1)

    def has_btf_tracepoint(self, name: str) -> bool:
        """Whether the kernel's BTF has the tracepoint."""
        return bool(self._library.libbpf_find_vmlinux_btf_id(name.encode("ascii"), _TRACE_RAW_TP) > 0)


def examine(
    proc: Path = Path("/proc"),
    sys: Path = Path("/sys"),
    objects: Path = OBJECTS,
    held: Privileges | None = None,
    libbpf: Callable[[], Libbpf] = SystemLibbpf,
) -> HostReport:
    """Return what this host can do. Changes nothing. `held` are the privileges to judge, this process's by default."""
    held = privileges.describe(proc=proc) if held is None else held
    paranoid = _number(proc / "sys/kernel/perf_event_paranoid")
    tracing = find_tracefs(proc)
    return HostReport(
        (
            Check("kernel", True, True, f"Linux {os.uname().release} on {os.uname().machine}"),
            _privileges(held, paranoid),
            _lockdown(sys),
            _btf(sys),
            *_library(libbpf),
            _objects(objects),
            *_causes(libbpf, objects),
            _tracefs(tracing, held),
            *_tracepoints(tracing),
            _memlock(),
        )
    )


def find_tracefs(proc: Path = Path("/proc")) -> Path | None:
    """Return where tracefs is mounted, as this process sees it; None when it is not.

    libbpf looks in /sys/kernel/tracing and /sys/kernel/debug/tracing only, so only these count.
    """
    usable = {"/sys/kernel/tracing", "/sys/kernel/debug/tracing"}
    try:
        lines = (proc / "self/mounts").read_text("utf-8", "surrogateescape").splitlines()
    except OSError:
        return None
    for fields in (line.split(" ") for line in lines):
        if len(fields) > 2 and fields[2] == "tracefs" and fields[1] in usable:
            return Path(fields[1])
    return None


def mount_tracefs(at: Path = Path("/sys/kernel/tracing"), proc: Path = Path("/proc")) -> Path:
    """Return where tracefs is mounted, after mounting it at `at` if it was nowhere.

    Classic tracepoints need it. It stays mounted: other tools may use it by then. Raises `HostError` when it is
    missing and may not be mounted.
    """
    there = find_tracefs(proc)
    if there is not None:
        return there
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"tracefs", os.fsencode(at), b"tracefs", ctypes.c_ulong(0), None) != 0:
        code = ctypes.get_errno()
        raise HostError(f"tracefs is not mounted and cannot be: {os.strerror(code)}", f"mount -t tracefs tracefs {at}")
    return at


def _privileges(held: Privileges, paranoid: int | None) -> Check:
    has = set(held.capabilities).__contains__
    detail = f"{held}" + ("" if paranoid is None else f"; kernel.perf_event_paranoid {paranoid}")
    if has("sys_admin"):
        return Check("privileges", True, True, detail)
    if has("bpf") and has("perfmon"):
        detail += "; asking for the run time of BPF programs needs CAP_SYS_ADMIN"
        return Check("privileges", False, True, detail, "give it CAP_SYS_ADMIN, or run it as root: sudo footlight ...")
    return Check("privileges", False, True, f"{detail}; loading BPF needs more", "run it as root: sudo footlight ...")


def _lockdown(sys: Path) -> Check:
    try:
        modes = (sys / "kernel/security/lockdown").read_text("ascii", "replace")
    except OSError:
        return Check("lockdown", True, True, "the kernel is not locked down")
    mode = modes.partition("[")[2].partition("]")[0]
    step = "boot without lockdown=confidentiality: BPF may not read kernel memory in this mode"
    return Check("lockdown", mode != "confidentiality", True, f"mode {mode}", step if mode == "confidentiality" else "")


def _btf(sys: Path) -> Check:
    path = sys / "kernel/btf/vmlinux"
    if path.is_file():
        return Check("kernel BTF", True, True, f"{path}, {path.stat().st_size / 2**20:.1f} MiB")
    step = "use a kernel built with CONFIG_DEBUG_INFO_BTF=y: every distribution's since about 2020 is"
    return Check("kernel BTF", False, True, f"{path} is missing", step)


def _library(load: Callable[[], Libbpf]) -> tuple[Check, ...]:
    try:
        library = load()
    except OSError as error:
        return (Check("libbpf", False, True, f"{LIBBPF}: {error}", "apt-get install libbpf1"),)
    version = library.version()
    ring = library.has_ring_buffer()
    return (
        Check("libbpf", True, True, f"{LIBBPF}, version {version}"),
        Check(
            "ring buffer",
            ring,
            False,
            "the kernel has it" if ring else "not usable here; per-CPU perf buffers are used instead",
            "" if ring else "nothing: before Linux 5.8 there is none, and as another user than root none can be made",
        ),
    )


def _objects(folder: Path) -> Check:
    missing = [name for name in REQUIRED_OBJECTS if not (folder / name).is_file()]
    if missing:
        return Check("BPF objects", False, True, f"{', '.join(missing)} not in {folder}", "make bpf")
    return Check("BPF objects", True, True, ", ".join(sorted(path.name for path in folder.glob("*.bpf.o"))))


def _causes(load: Callable[[], Libbpf], folder: Path) -> tuple[Check, ...]:
    """What is there to say why: the other probes, and what they need of the kernel."""
    missing = [name for name in OTHER_OBJECTS if not (folder / name).is_file()]
    if missing:
        return (Check("causes", False, False, f"{', '.join(missing)} not in {folder}", "make bpf"),)
    try:
        library = load()
    except OSError:
        return ()  # said before
    absent = [name for name in SCHEDULER_TRACEPOINTS if not library.has_btf_tracepoint(name)]
    if absent:
        step = "use a kernel with BTF and CONFIG_TRACEPOINTS=y: without it the agent says what, not why"
        return (Check("causes", False, False, f"the kernel's BTF has no {', '.join(absent)}", step),)
    absent = [name for name in MESSAGE_TRACEPOINTS if not library.has_btf_tracepoint(name)]
    if absent:
        step = "use Linux 6.3 or later: here a path ends at UDP, and at a Unix socket whose reader did not sleep"
        detail = f"the kernel has no {', '.join(absent)}: TCP's own and system calls take their place"
        return (Check("causes", False, False, detail, step),)
    return (Check("causes", True, False, "scheduler and socket tracepoints are there: paths go from thread to thread"),)


def _tracefs(tracing: Path | None, held: Privileges) -> Check:
    if tracing is not None:
        return Check("tracefs", True, True, f"mounted at {tracing}")
    if "sys_admin" in held.capabilities:
        return Check("tracefs", True, True, "not mounted; the agent mounts it when it starts")
    return Check("tracefs", False, True, "not mounted", "mount -t tracefs tracefs /sys/kernel/tracing")


def _tracepoints(tracing: Path | None) -> tuple[Check, ...]:
    if tracing is None:
        return ()
    try:
        missing = [name for name in TRACEPOINTS if not (tracing / "events" / name / "id").exists()]
        arrival = (tracing / "events" / ARRIVAL_TRACEPOINT / "id").exists()
    except PermissionError:
        return (Check("tracepoints", False, True, f"{tracing} may not be read", "run it as root: sudo footlight ..."),)
    step = "use a kernel built with CONFIG_FTRACE_SYSCALLS=y"
    return (
        Check(
            "tracepoints",
            not missing,
            True,
            f"missing: {', '.join(missing)}" if missing else "all there",
            step if missing else "",
        ),
        Check(
            "arrival instant",
            arrival,
            False,
            f"{ARRIVAL_TRACEPOINT} is there"
            if arrival
            else f"{ARRIVAL_TRACEPOINT} is missing: requests count from their first read",
            "" if arrival else "use Linux 4.16 or later with CONFIG_TRACEPOINTS=y",
        ),
    )


def _memlock() -> Check:
    # Kernels before 5.11 charge BPF memory to this limit. Later ones ignore it, and no test but the version tells.
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    shown = "unlimited" if soft == resource.RLIM_INFINITY else f"{soft >> 10} KiB"
    step = "" if soft == resource.RLIM_INFINITY else "if maps cannot be made: ulimit -l unlimited"
    return Check("memlock", True, False, f"{shown} of locked memory; counts before Linux 5.11 only", step)


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text("ascii"))
    except (OSError, ValueError):
        return None
