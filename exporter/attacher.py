"""The privileged half of the agent: finds targets, loads and attaches the probes, keeps the reader running.

It never looks at a captured byte. Everything that crosses to the reader are descriptors, inherited at fork, and one
packet of integers and names a second; nothing comes back but an exit status.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import signal
import socket
import time
from collections import deque
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self

import msgspec
import psutil

from exporter.config import OFF
from exporter.labels import safe
from exporter.parting import CONFIG_PACKET, CRASHED, STATUS_PACKET, Inheritance, fork_reader
from exporter.recordings import open_folder
from exporter.reloading import MAX_ENCODED_BYTES, Changed, changed, is_gone, merged, places
from exporter.run_stats import RunStats
from exporter.status import (
    AgentStatus,
    DescriptorLeak,
    LeakTarget,
    Loss,
    ProbeStatus,
    ProcessUsage,
    ReloadStatus,
    ServiceProcesses,
    SyscallLatency,
    TargetStatus,
)
from exporter.status import Vitals as VitalsStatus
from probes import host
from probes.block import BlockProbe
from probes.devices import find_devices
from probes.discovery import Discovery, Targets
from probes.errors import ConfigError, FootlightError
from probes.memory import MemoryProbe
from probes.probe import Probe, pick_transport
from probes.processes import Processes, service_cgroups
from probes.procfs import ProcFs
from probes.requests import RequestsProbe
from probes.scheduler import SchedulerProbe
from probes.syscalls import SyscallsProbe, syscall_name
from probes.tcp import TcpProbe
from probes.vitals import Vitals

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from collections.abc import Set as AbstractSet

    from exporter.config import Address, Config
    from exporter.fronts import Front
    from exporter.reloading import Source
    from probes.probe import Transport

log = logging.getLogger("footlight")

PERIOD_S: Final = 1.0
"""Between two looks for new processes, and between two reports to the reader."""
CRASHES: Final = 5
CRASH_WINDOW_S: Final = 60.0
"""After `CRASHES` crashes of the reader within this time the agent gives up."""
_OTHER_PROBES: Final[tuple[type[Probe], ...]] = (SchedulerProbe, TcpProbe, BlockProbe, MemoryProbe, SyscallsProbe)
_SIGNALS: Final = frozenset({signal.SIGINT, signal.SIGTERM, signal.SIGCHLD, signal.SIGHUP})
_SO_SNDBUFFORCE: Final = 32
_PACKET_OVERHEAD: Final = 64
"""What the kernel and the packet's kind take of a socket's send buffer."""
_USAGE_EVERY: Final = 5
_TGIDS: Final = 4096
"""Processes that a report names, of all services: a packet on a socket has an end."""
_WARNINGS: Final = 256
"""Warnings that are given once: some name what processes of services chose."""
_LEAKS: Final = 4
"""Leaks of descriptors that a report tells of, for `_LEAK_TOLD_NS`."""
_LEAK_TOLD_NS: Final = 60_000_000_000
_OWN_PORTS: Final = 16
"""Ports of a service that a report names."""


def run(
    config: Config,
    front: Front,
    *,
    transport: str = "auto",
    wait_for_targets: bool = True,
    source: Source | None = None,
) -> int:
    """Attach, start the reader with `front`, and stay until it ends or a signal comes. Returns the exit status.

    `transport` is `auto`, `ring` or `perf`. Without `wait_for_targets` a target that is not there is an error; with it
    the agent waits for one to come. `source` is where `config` came from: it is read again when its file changes, on
    SIGHUP and when /-/reload asks. Raises FootlightError before anything is attached or served.
    """
    report = host.examine()
    error = report.error()
    if error is not None:
        raise error
    with ExitStack() as stack:
        # First in, last out: a signal that comes during set-up or tear-down waits for the loop, or is dropped.
        stack.callback(_unblock_signals, signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS))
        discovery = Discovery(config.services)
        targets = discovery.scan()
        missing = discovery.missing(targets)
        if missing is not None and not wait_for_targets:
            raise missing
        listener = stack.enter_context(_listen(config.listen)) if front.serves else None
        folder = config.recorder.folder
        recordings = None
        if folder is not None:
            recordings = open_folder(Path(folder))
            stack.callback(os.close, recordings)
        health = None
        if config.health.folder is not None:
            health = open_folder(Path(config.health.folder))
            stack.callback(os.close, health)
        if host.find_tracefs() is None:
            host.mount_tracefs()
        room = len(config.services) if source is None else places(config)
        probes = stack.enter_context(_Probes(config, pick_transport(transport), room))
        # Attached one by one, they would see halves of what a target does meanwhile: first all, then targets.
        probes.requests.follow(targets.processes, targets.ports)
        reloads = None if source is None else stack.enter_context(_Reloads(source))
        return _Attacher(config, front, probes, discovery, targets, listener, recordings, reloads, health).run()


class _Reloads:
    """Tells when the configuration is to be read again, and keeps how that went.

    The reader may ask for it: a byte through a pipe, of which the kernel makes a SIGHUP to this process.
    """

    def __init__(self, source: Source) -> None:
        self.read = source.read
        self.watch = source.watch
        self._asked, self.asking_fd = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        fcntl.fcntl(self._asked, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(self._asked, fcntl.F_SETSIG, signal.SIGHUP)
        fcntl.fcntl(self._asked, fcntl.F_SETFL, fcntl.fcntl(self._asked, fcntl.F_GETFL) | os.O_ASYNC)
        self.status = ReloadStatus(0, True, time.time(), "")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._asked)
        os.close(self.asking_fd)

    def heard(self) -> None:
        """Take what was asked, and what the file became: it is read now."""
        self.watch.changed()
        with contextlib.suppress(BlockingIOError):
            while os.read(self._asked, 4096):
                pass

    def went_well(self) -> None:
        """The configuration of now is the file's."""
        self.status = ReloadStatus(self.status.attempts + 1, True, time.time(), "")

    def failed(self, problem: str) -> None:
        """The configuration stays as it was."""
        self.status = replace(self.status, attempts=self.status.attempts + 1, successful=False, problem=problem)


class _Probes:
    """Every wanted probe, loaded and attached. Without the requests probe there is no agent; others may be missing.

    `room` is for how many services the probes count.
    """

    def __init__(self, config: Config, transport: Transport, room: int) -> None:
        self.transport = transport
        self.missing: dict[str, str] = {}
        """Wanted probes that are not up, with the reason."""
        self.room = room
        memory = config.limits.memory
        with ExitStack() as opening:
            self.requests = opening.enter_context(
                RequestsProbe(transport, connections=config.limits.connections, memory_bytes=memory)
            )
            self.others: list[Probe] = []
            for name, make in _wanted(config, transport, room, self.requests):
                # One of which a part cannot be attached is detached again: it would only cost.
                with ExitStack() as trying:
                    try:
                        probe = trying.enter_context(make())
                        probe.attach()
                    except FootlightError as error:
                        log.warning("the %s probe is not up: %s", name, error.what)
                        self.missing[name] = error.what.partition("\n")[0]
                        continue
                    opening.push(trying.pop_all())
                self.others.append(probe)
            self.requests.attach()
            self._stack = opening.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def up(self) -> list[Probe]:
        """The probes that are attached."""
        return [self.requests, *self.others]


def _wanted(
    config: Config, transport: Transport, room: int, requests: Probe
) -> Iterator[tuple[str, Callable[[], Probe]]]:
    """The probes beside the requests probe that the configuration wants: the name of each, and how it is loaded."""
    memory = config.limits.memory
    for kind in _OTHER_PROBES:
        if getattr(config.probes, kind.name):
            make = partial(kind, transport, memory_bytes=memory, services=room, shares_with=requests)
            yield kind.name, partial(make, connections=config.limits.connections) if kind is TcpProbe else make
    # Probes of user code bring a pool of threads along: 0.5 MiB that an agent without them need not hold.
    if config.probes.cuda:
        from probes.cuda import CudaProbe  # noqa: PLC0415 - as said

        yield CudaProbe.name, partial(CudaProbe, transport, memory_bytes=memory, services=room, shares_with=requests)
    if config.probe_points:
        from probes.probe_points import ProbePointsProbe  # noqa: PLC0415 - as said

        names = [service.name for service in config.services]
        yield (
            ProbePointsProbe.name,
            partial(ProbePointsProbe, config.probe_points, names, transport, memory_bytes=memory, shares_with=requests),
        )


class _Attacher:
    def __init__(
        self,
        config: Config,
        front: Front,
        probes: _Probes,
        discovery: Discovery,
        targets: Targets,
        listener: socket.socket | None,
        recordings: int | None,
        reloads: _Reloads | None,
        health: int | None,
    ) -> None:
        self._config = config
        self._reloads = reloads
        self._unsent: Config | None = None
        """A configuration that the reader has not got yet."""
        self._front = front
        self._probes = probes
        self._run_stats = RunStats(probes.up)
        self._discovery = discovery
        self._targets = targets
        self._listener = listener
        self._recordings = recordings
        self._health = health
        self._restarts = 0
        self._crashes: deque[float] = deque(maxlen=CRASHES)
        self._reader = 0
        self._socket: socket.socket | None = None
        self._usage: tuple[ProcessUsage, ...] = ()
        self._processes = Processes() if config.probes.process else None
        self._held: tuple[ServiceProcesses, ...] = ()
        self._vitals = Vitals() if config.probes.process else None
        self._leaks: deque[DescriptorLeak] = deque(maxlen=_LEAKS)
        self._gpu_devices: int | None = None
        self._rounds = 0
        self._warnings: set[str] = set()
        self._namespace = ProcFs().network_namespace(os.getpid())

    def run(self) -> int:
        """Supervise until the end; returns the exit status."""
        self._start_reader(resumes=False)
        code = 1
        try:
            with self._run_stats:
                code = self._supervise()
        finally:
            if not self._end_reader():
                code = max(code, 1)
        return code

    def _supervise(self) -> int:
        due = time.monotonic()
        while True:
            if time.monotonic() >= due:
                self._report()
                due = max(due + PERIOD_S, time.monotonic())
            info = signal.sigtimedwait(_SIGNALS, max(0.0, due - time.monotonic()))
            if info is not None and info.si_signo == signal.SIGHUP:
                self._reload()
                due = time.monotonic()
            elif info is not None and info.si_signo != signal.SIGCHLD:
                return 0
            code = self._reaped()
            if code is not None and (code >= 0 or not self._restart()):
                return max(code, 1) if code < 0 else code

    def _report(self) -> None:
        """Look for targets and tell the reader how things stand."""
        if self._reloads is not None and self._reloads.watch.changed():
            self._reload()
        self._send_config()  # before any record of a service that it does not know yet
        try:
            self._targets = self._discovery.scan()
        except OSError as error:
            log.warning("cannot look for processes: %s", error)
        self._probes.requests.follow(self._targets.processes, self._targets.ports)
        followed = self._probes.requests.targets()
        for probe in self._probes.others:
            probe.follow_processes(followed)
        self._run_stats.turn()
        if self._socket is None:
            return
        status = self._status()
        try:
            self._send(STATUS_PACKET, status)  # where it is not sent the reader is busy, and the next one says more
        except OSError as error:
            if error.errno != errno.EMSGSIZE:
                raise
            # A thousand system calls, counted by service, are what a packet holds where its size cannot be raised.
            self._warn_once("there are too many system calls to report: none of them is")
            self._send(STATUS_PACKET, replace(status, syscalls=()))

    def _send(self, kind: bytes, told: AgentStatus | Changed) -> bool:
        """Send a packet to the reader; False where it has no room for one now."""
        if self._socket is None:
            return False
        try:
            self._socket.send(kind + msgspec.json.encode(told), socket.MSG_DONTWAIT)
        except OSError as error:
            # EAGAIN: it is busy. EPIPE, ECONNRESET: it is gone, and SIGCHLD will say so.
            if error.errno not in {errno.EAGAIN, errno.EPIPE, errno.ECONNRESET}:
                raise
            return False
        return True

    # ---- another configuration ----

    def _reload(self) -> None:
        """Read the configuration again, and go on with it where it is right; else the old one stays, whole."""
        if self._reloads is None:
            log.warning("there is nothing to read again: the targets were named by options, not by --config")
            return
        self._reloads.heard()
        try:
            config = merged(
                self._config,
                self._reloads.read(),
                self._probes.room,
                labels=self._labels,
                most_bytes=self._packet_bytes,
            )
        except ConfigError as error:
            place = f"{error.path}:{error.line}: " if error.path and error.line else ""
            self._reloads.failed(f"{place}{error.what}; try: {error.next_step}")
            log.error("the configuration stays as it was: %s%s; try: %s", place, error.what, error.next_step)
            return
        self._reloads.went_well()
        if config == self._config:
            log.info("the configuration was read again: nothing is new")
            return
        self._config = self._unsent = config
        names = ", ".join(each.name for each in config.services if not is_gone(each))
        log.info("the configuration was read again and is in effect: %s", names)

    def _send_config(self) -> None:
        """Give the reader a new configuration, and only then follow what it names."""
        if self._unsent is not None and self._send(CONFIG_PACKET, changed(self._unsent)):
            self._unsent = None
            self._discovery.reconfigure(self._config.services)

    def _status(self) -> AgentStatus:
        targets = self._probes.requests.targets()
        if self._rounds % _USAGE_EVERY == 0:
            self._usage = tuple(
                usage
                for usage in (_usage("attacher", os.getpid()), _usage("reader", self._reader))
                if usage is not None
            )
            self._watch_memory()
            self._look_at_services(targets)
        self._rounds += 1
        vitals = self._look_at_vitals(targets)
        followed: list[list[int]] = [[] for _ in self._config.services]
        for tgid, index in targets.items():
            followed[index].append(tgid)
        ports: list[list[tuple[int, int]]] = [[] for _ in self._config.services]
        for place, index in self._targets.ports.items():
            ports[index].append(place)
        return AgentStatus(
            at_ns=time.monotonic_ns(),
            transport=self._probes.transport.value,
            probes=tuple(
                [self._probe_status(probe) for probe in self._probes.up]
                + [
                    ProbeStatus(name, up=False, reason=reason, events=0, cpu_ns=None, runs=None, losses=())
                    for name, reason in self._probes.missing.items()
                ]
            ),
            targets=tuple(
                TargetStatus(
                    service.name,
                    len(followed[index]),
                    len(ports[index]),
                    tuple(sorted(followed[index])[: _TGIDS // len(followed)]),
                    tuple(sorted(port for place, port in ports[index] if place == self._namespace)[:_OWN_PORTS]),
                )
                for index, service in enumerate(self._config.services)
                if not is_gone(service)
            ),
            gpu_devices=self._gpu_devices,
            reload=None if self._reloads is None else self._reloads.status,
            reader_restarts=self._restarts,
            processes=self._usage,
            services=self._held,
            vitals=vitals,
            leaks=tuple(self._leaks),
            syscalls=tuple(self._syscalls()),
        )

    def _look_at_services(self, targets: Mapping[int, int]) -> None:
        """What the services' processes hold, and which cgroups hold nothing else."""
        for probe in self._probes.others:
            if isinstance(probe, BlockProbe):
                probe.follow_cgroups(service_cgroups(targets))
            if isinstance(probe, SchedulerProbe) and self._config.probes.gpu != OFF:
                devices = find_devices(self._config.gpu.devices)
                probe.follow_gpu_devices({device.number for device in devices})
                self._gpu_devices = len(devices)
        for probe in self._probes.up if self._rounds else ():
            for note in probe.notes():
                self._warn_once(f"{probe.name}: {note}")
        if self._processes is not None:
            self._held = tuple(
                ServiceProcesses(
                    self._config.services[index].name,
                    held.open_files,
                    held.descriptor_growth,
                    held.threads,
                    held.resident_bytes,
                    held.major_faults,
                )
                for index, held in self._processes.look(targets).items()
            )

    def _look_at_vitals(self, targets: Mapping[int, int]) -> tuple[VitalsStatus, ...]:
        """What the services' processes use now; and a snapshot of the descriptors of one that leaks them."""
        if self._vitals is None:
            return ()
        now_ns = time.monotonic_ns()
        while self._leaks and now_ns - self._leaks[0].at_ns > _LEAK_TOLD_NS:
            self._leaks.popleft()
        seen = self._vitals.look(targets)
        for leak in self._vitals.leaks():
            found = leak.found
            self._leaks.append(
                DescriptorLeak(
                    self._config.services[leak.service].name,
                    leak.tgid,
                    now_ns,
                    leak.per_second,
                    found.open_files,
                    found.examined,
                    # names are anything that a process chose, and JSON takes text alone
                    tuple((safe(kind), count) for kind, count in found.kinds),
                    tuple(LeakTarget(safe(each.kind), safe(each.name), each.count) for each in found.targets),
                )
            )
        return tuple(
            VitalsStatus(
                self._config.services[index].name, each.cpu_seconds, each.resident_bytes, each.open_files, each.eldest
            )
            for index, each in seen.items()
        )

    def _syscalls(self) -> Iterator[SyscallLatency]:
        for probe in self._probes.others:
            if isinstance(probe, SyscallsProbe):
                for (service, number), (sum_ns, *counts) in sorted(probe.latencies().items()):
                    yield SyscallLatency(
                        self._config.services[service].name, syscall_name(number), sum_ns, tuple(counts)
                    )

    def _probe_status(self, probe: Probe) -> ProbeStatus:
        counts = probe.counts()
        cost = self._run_stats.of(probe)
        return ProbeStatus(
            name=probe.name,
            up=True,
            reason="",
            events=sum(counts[count] for count in probe.seen_counts()),
            cpu_ns=None if cost is None else cost.run_ns,
            runs=None if cost is None else cost.runs,
            losses=tuple(Loss(count.name.lower(), counts[count]) for count in probe.loss_counts()),
        )

    def _watch_memory(self) -> None:
        """Say once that the agent uses more memory than it was given. Nothing is dropped for it."""
        used = sum(usage.proportional_bytes or 0 for usage in self._usage)
        limit = self._config.limits.memory
        if used > limit:
            self._warn_once("the agent uses %d MiB, more than limits.memory (%d MiB)", used >> 20, limit >> 20)

    def _warn_once(self, text: str, *values: int) -> None:
        if text not in self._warnings and len(self._warnings) < _WARNINGS:
            self._warnings.add(text)
            log.warning(text, *values)

    # ---- the reader ----

    def _start_reader(self, *, resumes: bool) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with contextlib.suppress(OSError):  # without the right to it, a packet of 200 kB is the largest
            ours.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, 2 * MAX_ENCODED_BYTES)
        room = ours.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) - _PACKET_OVERHEAD
        self._packet_bytes = min(MAX_ENCODED_BYTES, room)
        self._labels = self._config.label_names
        self._unsent = None  # a new reader begins with the configuration of now
        self._discovery.reconfigure(self._config.services)
        with theirs:
            given = Inheritance(
                self._config,
                self._front,
                tuple(channel for probe in self._probes.up for channel in probe.channels),
                tuple(probe.stats_map for probe in self._probes.up if probe.stats_map is not None),
                theirs,
                self._listener,
                os.getpid(),
                self._recordings,
                resumes,
                self._probes.room,
                None if self._reloads is None else self._reloads.asking_fd,
                next((each.points_map for each in self._probes.others if each.points_map is not None), None),
                self._health,
            )
            self._reader = fork_reader(given)
        self._socket = ours
        self._discovery.ignore(self._reader)

    def _reaped(self) -> int | None:
        """The exit status of a reader that ended: negative when it crashed; None while it runs."""
        pid, status = os.waitpid(self._reader, os.WNOHANG)
        if pid == 0:
            return None
        self._reader = 0
        code = os.waitstatus_to_exitcode(status)
        return -1 if code < 0 or code == CRASHED else code

    def _restart(self) -> bool:
        """Start another reader over the same rings, unless they die too often."""
        now = time.monotonic()
        if len(self._crashes) == CRASHES and now - self._crashes[0] < CRASH_WINDOW_S:
            log.error("the reader crashed %d times within %.0f s; giving up", CRASHES + 1, CRASH_WINDOW_S)
            return False
        self._crashes.append(now)
        self._restarts += 1
        log.error("the reader crashed; starting it again, what it had not read is counted as lost")
        if self._socket is not None:
            self._socket.close()
        self._start_reader(resumes=True)
        return True

    def _end_reader(self) -> bool:
        """End the reader. False: it had to be killed, as one must be whose output nobody takes any more."""
        if not self._reader:
            return True
        deadline = time.monotonic() + self._front.stop_s
        os.kill(self._reader, signal.SIGTERM)
        while os.waitpid(self._reader, os.WNOHANG)[0] == 0:
            if time.monotonic() > deadline:
                log.error("the reader does not end; killing it")
                os.kill(self._reader, signal.SIGKILL)
                os.waitpid(self._reader, 0)
                return False
            time.sleep(0.01)
        return True


def _unblock_signals(old_mask: AbstractSet[int]) -> None:
    """Give signals back to whoever had them, without those that asked for the end which has come."""
    while signal.sigtimedwait(_SIGNALS, 0) is not None:
        pass
    signal.pthread_sigmask(signal.SIG_SETMASK, old_mask)


def _listen(address: Address) -> socket.socket:
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    try:
        return socket.create_server((address.host, address.port), family=family, backlog=128)
    except OSError as error:
        # the words of create_server name the address once more
        what = f"cannot listen on {address}: {os.strerror(error.errno) if error.errno else error}"
        if error.errno == errno.EADDRINUSE:
            raise FootlightError(
                what, f"choose another address with --listen, or find who has it: ss -ltnp 'sport = :{address.port}'"
            ) from error
        raise FootlightError(what, "choose another address with --listen") from error


def _usage(role: str, pid: int) -> ProcessUsage | None:
    """What a process of the agent uses; None when it is gone."""
    try:
        process = psutil.Process(pid)
        times = process.cpu_times()
        memory = process.memory_full_info()
    except psutil.Error:
        return None
    return ProcessUsage(role, pid, times.user + times.system, memory.rss, memory.pss)
