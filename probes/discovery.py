"""Finds the processes that belong to each service, and the TCP ports they listen on.

What each condition of a rule means (all that are given must hold; with several values, one of them):

pid      the process, and every process that it started (directly or not).
port     the process holds a TCP socket that listens on the port, in its own network namespace, IPv4 or IPv6.
         Workers that inherited the socket hold it too. Processes that only hold or forward it for others
         (`FORWARDERS`) do not count.
exe      the executable: with a slash its path (as given, or with symbolic links resolved), else its file name.
         A script's executable is its interpreter: use cmdline for scripts.
cmdline  the arguments, joined by spaces, contain the text. The agent itself, what started it and other
         Footlight agents do not count: their arguments name the target without being it.
cgroup   the process is in the cgroup or below it, whole path components, version 1 or 2; the path may begin with
         where the hierarchy is mounted.
container  the process is in the container whose id begins so: the runtime names a cgroup by the 64 hex digits.

A process that once held a port of its rule stays with its service until it ends or executes another program: a worker
that shuts down gracefully closes the listening socket first and still has responses to finish. Ports that no rule names
stay the service's for `CLOSED_SCANS` more.

What a process of a service started belongs to the service, too, unless it matches another one: an engine behind its
API server holds no port. It stays when its parent ends. Its own ports count only where it matches by itself.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol

from probes.errors import TargetError
from probes.procfs import ProcFs
from probes.sockdiag import ListenerTable

FORWARDERS: Final = frozenset({"systemd", "docker-proxy", "rootlesskit", "rootlessport", "slirp4netns", "pasta"})
"""File names of programs that hold a service's listening socket, or one of their own in front of it, and are not it."""

CLOSED_SCANS: Final = 60
"""After this many scans in which nobody listened on it, a port that no rule names is let go: the kernel gives such
ports to anybody, the service's own connections to others among them. Kubernetes lets a process finish for 30 s.
"""
_YOUNG_SCANS: Final = 4
"""A new process is read anew in its first scans: it may be between fork and exec, or not yet in its cgroup."""
_REFRESH_SCANS: Final = 30
"""Every process is read anew once in so many scans, for what the cheap test (the executable) does not show."""
_CGROUP_MOUNT: Final = "/sys/fs/cgroup/"
_CONTAINER_ID: Final = re.compile(r"(?<![0-9a-f])[0-9a-f]{64}(?![0-9a-f])")


class Match(Protocol):
    """The conditions of a rule; an empty tuple is a condition that is not given."""

    @property
    def pid(self) -> tuple[int, ...]: ...  # noqa: D102 - the module's docstring defines each one
    @property
    def port(self) -> tuple[int, ...]: ...  # noqa: D102 - as above
    @property
    def exe(self) -> tuple[str, ...]: ...  # noqa: D102 - as above
    @property
    def cmdline(self) -> tuple[str, ...]: ...  # noqa: D102 - as above
    @property
    def cgroup(self) -> tuple[str, ...]: ...  # noqa: D102 - as above
    @property
    def container(self) -> tuple[str, ...]: ...  # noqa: D102 - as above


class Service(Protocol):
    """What discovery needs to know about a configured service."""

    @property
    def name(self) -> str: ...  # noqa: D102 - its name
    @property
    def match(self) -> Match: ...  # noqa: D102 - its rule


class Listeners(Protocol):
    """Tells what listens in a network namespace. `probes.sockdiag.ListenerTable` is the one for real hosts."""

    def listeners(self, namespace: int, pid: int) -> dict[int, int]:
        """Socket inode -> port in `namespace`, of which `pid` is a member."""

    def forget(self, alive: set[int]) -> None:
        """No process is in any other namespace than these any more."""


@dataclass(frozen=True, slots=True)
class Targets:
    """What one scan found: service indexes by process id, and by (network namespace inode, TCP port)."""

    processes: dict[int, int]
    ports: dict[tuple[int, int], int]


@dataclass(slots=True)
class _Process:
    exe: str | None
    start: int
    parent: int
    arguments: tuple[str, ...]
    namespace: int | None
    services: tuple[int, ...]  # those of which every condition but the port holds
    first_scan: int
    fresh: bool = True  # read anew in this scan
    ports: dict[int, int] = field(default_factory=dict)  # that it listens on, or did: the last scan that saw a listener
    inherited: int | None = None  # the service of the process that started it

    def is_same_program(self, other: _Process) -> bool:
        return self.start == other.start and self.exe == other.exe and self.arguments == other.arguments


class Discovery:
    """Watches /proc for processes that match the services' rules.

    Call `scan` once a second. A scan reads one link for each process, and more only for those that are new or changed:
    2.5 to 3.2 ms of CPU with 500 processes (0.3 % of a CPU), 16 to 40 ms for the first one.
    `own` are processes that never match: the agent's. `listeners` is the source of listening sockets.
    """

    def __init__(
        self,
        services: Sequence[Service],
        proc: Path = Path("/proc"),
        listeners: Listeners | None = None,
        own: Iterable[int] | None = None,
    ) -> None:
        self._fs: Final = ProcFs(proc)
        self._listeners: Final[Listeners] = ListenerTable(self._fs) if listeners is None else listeners
        self._own: Final = {os.getpid()} if own is None else set(own)
        self._services = tuple(services)
        self._rules = tuple(_Rule(service.match) for service in services)
        self._known: dict[int, _Process | None] = {}  # None: a kernel thread, which never matches
        self._tables: dict[int, dict[int, int]] = {}
        self._scans = 0
        self._reconfigured = False
        self._namers: Final = self._ancestors()

    def reconfigure(self, services: Sequence[Service]) -> None:
        """Follow other rules from the next scan on; each service stands where it stood, new ones behind them.

        The ports of a process stay known, and whose child it is where that service's rule is the same.
        """
        changed = {
            index
            for index, (old, new) in enumerate(zip(self._services, services, strict=False))
            if old.match != new.match
        }
        self._services = tuple(services)
        self._rules = tuple(_Rule(service.match) for service in services)
        for pid, process in self._known.items():
            if process is not None:
                process.services = self._matching(pid, process)
                process.inherited = None if process.inherited in changed else process.inherited
        self._reconfigured = True  # every process is a new one to the rules: its ports are looked at again

    def ignore(self, pid: int) -> None:
        """Never match this process: the agent's reader, for one."""
        self._own.add(pid)
        self._known.pop(pid, None)

    def scan(self) -> Targets:
        """Return the processes and ports of every service now. Where two services match, the first one has it.

        Raises OSError when /proc cannot be listed.
        """
        self._scans += 1
        self._read_processes(self._fs.pids())
        self._reconfigured = False
        self._read_ports()
        processes: dict[int, int] = {}
        ports: dict[tuple[int, int], int] = {}
        for pid, process in self._known.items():
            if process is None or not process.services:
                continue
            for index in process.services:
                served = self._rules[index].served(process.ports.keys())
                if served is None:
                    continue
                processes[pid] = index
                for port in served:
                    if process.namespace is not None:
                        key = (process.namespace, port)
                        ports[key] = min(index, ports.get(key, index))
                break
        self._inherit(processes)
        return Targets(processes, ports)

    def _inherit(self, processes: dict[int, int]) -> None:
        """Add what the processes of services started."""
        if not processes:
            return
        for pid, process in self._known.items():
            if process is None or pid in processes:
                continue
            if process.inherited is None:
                process.inherited = self._inherited(process, processes)
            if process.inherited is not None:
                processes[pid] = process.inherited

    def _inherited(self, process: _Process, processes: Mapping[int, int]) -> int | None:
        for _ in range(64):  # as in _descends
            above = self._known.get(process.parent)
            if above is None or above.start > process.start:
                return None  # the parent has ended since it was read, and its pid may be another's
            if process.parent in processes:
                return processes[process.parent]
            process = above
        return None

    def missing(self, targets: Targets) -> TargetError | None:
        """Say why there is nothing to watch, from the last scan; None where a process was found.

        The text names what was asked for and what is there instead.
        """
        if targets.processes:
            return None
        asked = " or ".join(f"{service.match}" for service in self._services) or "nothing"
        return TargetError(f"no process matches {asked}", " ".join(self._hints()) or "check that the service runs")

    # ---- processes ----

    def _read_processes(self, pids: list[int]) -> None:
        known = self._known
        for pid in known.keys() - set(pids):
            del known[pid]
        for pid in pids:
            before = known.get(pid)
            if before is not None:
                before.fresh = self._reconfigured
                exe = self._fs.exe(pid)
                young = self._scans - before.first_scan <= _YOUNG_SCANS
                if exe == before.exe and not young and (pid + self._scans) % _REFRESH_SCANS:
                    continue
            elif pid in self._own or (pid in known and (pid + self._scans) % _REFRESH_SCANS):
                continue
            self._read_process(pid, before)

    def _read_process(self, pid: int, before: _Process | None) -> None:
        stat = self._fs.stat(pid)
        if stat is None or stat.kernel_thread or stat.state in {"Z", "X"}:
            if stat is not None and stat.kernel_thread:
                self._known[pid] = None
            else:
                self._known.pop(pid, None)
            return
        now = _Process(
            exe=self._fs.exe(pid),
            start=stat.start,
            parent=stat.parent,
            arguments=self._fs.cmdline(pid),
            namespace=self._fs.network_namespace(pid),
            services=(),
            first_scan=self._scans,
        )
        if before is not None and now.is_same_program(before):
            now.first_scan, now.ports = before.first_scan, before.ports
        if before is not None and now.start == before.start:
            now.inherited = before.inherited
        now.services = self._matching(pid, now)
        self._known[pid] = now

    def _matching(self, pid: int, process: _Process) -> tuple[int, ...]:
        """The services of which every condition but the port holds."""
        return tuple(index for index, rule in enumerate(self._rules) if self._holds(rule, pid, process))

    def _holds(self, rule: _Rule, pid: int, process: _Process) -> bool:
        if rule.pid and not self._descends(pid, process.parent, rule.pid):
            return False
        if rule.exe and not rule.is_exe(process.exe):
            return False
        if rule.port and _file_name(process.exe) in FORWARDERS:
            return False
        if rule.cmdline and (pid in self._namers or not rule.is_cmdline(process.arguments)):
            return False
        if rule.cgroup and not rule.is_cgroup(self._fs.cgroups(pid)):
            return False
        return not rule.container or rule.is_container(self._fs.cgroups(pid))

    def _descends(self, pid: int, parent: int, wanted: frozenset[int]) -> bool:
        for _ in range(64):  # deeper trees are cut: a pid that is reused during the walk could make it a circle
            if pid in wanted:
                return True
            if parent <= 0:
                return False
            pid = parent
            above = self._known.get(pid)
            stat = None if above is not None else self._fs.stat(pid)
            parent = above.parent if above is not None else stat.parent if stat is not None else 0
        return False

    def _ancestors(self) -> frozenset[int]:
        found: set[int] = set()
        above = [stat.parent for pid in self._own if (stat := self._fs.stat(pid)) is not None]
        while above:
            pid = above.pop()
            if pid > 0 and pid not in found:
                found.add(pid)
                stat = self._fs.stat(pid)
                above += [stat.parent] if stat is not None else []
        return frozenset(found)

    # ---- ports ----

    def _read_ports(self) -> None:
        members: dict[int, list[int]] = {}
        for pid, process in self._known.items():
            if process is not None and process.services and process.namespace is not None:
                members.setdefault(process.namespace, []).append(pid)
        tables: dict[int, dict[int, int]] = {}
        for namespace, pids in members.items():
            table = self._listeners.listeners(namespace, pids[-1])
            tables[namespace] = table
            opened = table.items() - self._tables.get(namespace, {}).items()
            listening = set(table.values())
            for pid in pids:
                self._read_ports_of(pid, table, {port for _, port in opened})
                self._forget_ports_of(pid, listening)
        self._tables = tables
        self._listeners.forget(set(tables))

    def _read_ports_of(self, pid: int, table: Mapping[int, int], opened: set[int]) -> None:
        # Listing descriptors is the dear part: only when a port that matters was opened, or the process is new.
        process = self._known[pid]
        if process is None:
            return
        rules = [self._rules[index] for index in process.services]
        if not process.fresh and not any(rule.wants(opened) for rule in rules):
            return
        if not any(rule.wants(table.values()) for rule in rules):
            return
        process.ports.update((table[inode], self._scans) for inode in self._fs.sockets(pid) & table.keys())

    def _forget_ports_of(self, pid: int, listening: set[int]) -> None:
        process = self._known[pid]
        if process is None:
            return
        for port in process.ports.keys() & listening:
            process.ports[port] = self._scans
        closed = [port for port, seen in process.ports.items() if self._scans - seen > CLOSED_SCANS]
        for port in closed:
            if not any(port in self._rules[index].port for index in process.services):
                del process.ports[port]

    # ---- what to say when there is nothing ----

    def _hints(self) -> list[str]:
        hints: list[str] = []
        rules = self._rules
        if any(rule.port for rule in rules):
            ports = sorted({port for table in self._tables.values() for port in table.values()})
            shown = ", ".join(map(str, ports[:12])) + (", ..." if len(ports) > 12 else "")
            hints.append(f"TCP ports that are listened on: {shown or 'none'}.")
        if any(rule.exe for rule in rules):
            names = {_file_name(process.exe) for process in self._known.values() if process is not None and process.exe}
            shown = ", ".join(sorted(names)[:12]) + (", ..." if len(names) > 12 else "")
            hints.append(f"executables that run: {shown}; a script is found by its arguments (cmdline).")
        if any(rule.pid for rule in rules):
            hints.append("a process id belongs to one run of a program: `ps -ef` shows those of now.")
        if any(rule.cmdline for rule in rules):
            hints.append("`ps -eo pid,args` shows the arguments that are searched.")
        if any(rule.cgroup for rule in rules):
            hints.append("`systemd-cgls` or /proc/PID/cgroup shows the paths.")
        if any(rule.container for rule in rules):
            hints.append("`crictl ps` or `docker ps` shows the ids of containers that run.")
        return hints


class _Rule:
    """The conditions of a service, made ready for many comparisons."""

    __slots__ = ("cgroup", "cmdline", "container", "exe", "exe_names", "exe_paths", "pid", "port")

    def __init__(self, match: Match) -> None:
        self.pid: Final = frozenset(match.pid)
        self.port: Final = frozenset(match.port)
        self.exe: Final = bool(match.exe)
        paths = [text for text in match.exe if "/" in text]
        self.exe_paths: Final = frozenset((*paths, *(os.path.realpath(path) for path in paths)))
        self.exe_names: Final = frozenset(text for text in match.exe if "/" not in text)
        self.cmdline: Final = match.cmdline
        self.cgroup: Final = tuple(path for text in match.cgroup for path in _cgroup_paths(text))
        self.container: Final = match.container

    def is_exe(self, exe: str | None) -> bool:
        return exe is not None and (exe in self.exe_paths or _file_name(exe) in self.exe_names)

    def is_cmdline(self, arguments: tuple[str, ...]) -> bool:
        text = " ".join(arguments)
        return not _is_agent(arguments) and any(part in text for part in self.cmdline)

    def is_cgroup(self, paths: tuple[str, ...]) -> bool:
        return any(path == wanted or path.startswith(wanted + "/") for path in paths for wanted in self.cgroup)

    def is_container(self, paths: tuple[str, ...]) -> bool:
        return any(identity.startswith(self.container) for path in paths for identity in _CONTAINER_ID.findall(path))

    def wants(self, ports: Iterable[int]) -> bool:
        """Whether one of these listening ports can make a difference."""
        return not self.port.isdisjoint(ports) if self.port else any(True for _ in ports)

    def served(self, ports: AbstractSet[int]) -> AbstractSet[int] | None:
        """The ports that count for the service, of those that a process listens on; None: it does not belong."""
        if not self.port:
            return ports
        return ports & self.port or None


def _file_name(path: str | None) -> str:
    return "" if path is None else path.rpartition("/")[2]


def _is_agent(arguments: tuple[str, ...]) -> bool:
    return any(_file_name(argument) == "footlight" for argument in arguments[:2])


def _cgroup_paths(text: str) -> tuple[str, ...]:
    """The paths within a hierarchy that a path stands for, with or without where it is mounted; "" is the root."""
    inside = text.strip("/")
    if not text.startswith(_CGROUP_MOUNT):
        return (f"/{inside}" if inside else "",)
    inside = text.removeprefix(_CGROUP_MOUNT).strip("/")
    # below the mount, version 1 has the controller's name first, version 2 has nothing
    below = inside.partition("/")[2]
    return tuple(f"/{path}" for path in (inside, below) if path) or ("",)
