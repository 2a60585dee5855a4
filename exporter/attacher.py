"""The privileged half of the agent: finds targets, loads and attaches the probes, keeps the reader running.

It never looks at a captured byte. Everything that crosses to the reader are descriptors, inherited at fork, and one
packet of integers and names a second; nothing comes back but an exit status.
"""

from __future__ import annotations

import errno
import logging
import os
import signal
import socket
import time
from collections import Counter, deque
from contextlib import ExitStack
from typing import TYPE_CHECKING, Final

import msgspec
import psutil

from exporter.parting import CRASHED, Inheritance, fork_reader
from exporter.status import AgentStatus, Loss, ProbeStatus, ProcessUsage, TargetStatus
from probes import host, libbpf
from probes.discovery import Discovery, Targets
from probes.errors import FootlightError
from probes.requests import REASONS, SEEN, RequestsProbe, pick_transport

if TYPE_CHECKING:
    from collections.abc import Set as AbstractSet

    from exporter.config import Address, Config
    from exporter.fronts import Front

log = logging.getLogger("footlight")

PERIOD_S: Final = 1.0
"""Between two looks for new processes, and between two reports to the reader."""
STOP_S: Final = 1.5
"""How long a reader may take to end before it is killed, as one must be whose output nobody takes any more. Its HTTP
clients get one second."""
CRASHES: Final = 5
CRASH_WINDOW_S: Final = 60.0
"""After `CRASHES` crashes of the reader within this time the agent gives up."""
_SIGNALS: Final = frozenset({signal.SIGINT, signal.SIGTERM, signal.SIGCHLD})
_USAGE_EVERY: Final = 5


def run(config: Config, front: Front, *, transport: str = "auto", wait_for_targets: bool = True) -> int:
    """Attach, start the reader with `front`, and stay until it ends or a signal comes. Returns the exit status.

    `transport` is `auto`, `ring` or `perf`. Without `wait_for_targets` a target that is not there is an error; with it
    the agent waits for one to come. Raises FootlightError before anything is attached or served.
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
        if host.find_tracefs() is None:
            host.mount_tracefs()
        probe = stack.enter_context(
            RequestsProbe(
                pick_transport(transport),
                connections=config.limits.connections,
                memory_bytes=config.limits.memory,
            )
        )
        stats = libbpf.enable_run_stats()
        stack.callback(os.close, stats)
        # Attached one by one, they would see halves of what a target does meanwhile: first all, then targets.
        probe.attach()
        probe.follow(targets.processes, targets.ports)
        return _Attacher(config, front, probe, discovery, targets, listener).run()


class _Attacher:
    def __init__(
        self,
        config: Config,
        front: Front,
        probe: RequestsProbe,
        discovery: Discovery,
        targets: Targets,
        listener: socket.socket | None,
    ) -> None:
        self._config = config
        self._front = front
        self._probe = probe
        self._discovery = discovery
        self._targets = targets
        self._listener = listener
        self._restarts = 0
        self._crashes: deque[float] = deque(maxlen=CRASHES)
        self._reader = 0
        self._socket: socket.socket | None = None
        self._usage: tuple[ProcessUsage, ...] = ()
        self._rounds = 0
        self._warned = False

    def run(self) -> int:
        """Supervise until the end; returns the exit status."""
        self._start_reader(resumes=False)
        try:
            return self._supervise()
        finally:
            self._end_reader()

    def _supervise(self) -> int:
        due = time.monotonic()
        while True:
            if time.monotonic() >= due:
                self._report()
                due = max(due + PERIOD_S, time.monotonic())
            info = signal.sigtimedwait(_SIGNALS, max(0.0, due - time.monotonic()))
            if info is not None and info.si_signo != signal.SIGCHLD:
                return 0
            code = self._reaped()
            if code is not None and (code >= 0 or not self._restart()):
                return max(code, 1) if code < 0 else code

    def _report(self) -> None:
        """Look for targets and tell the reader how things stand."""
        try:
            self._targets = self._discovery.scan()
        except OSError as error:
            log.warning("cannot look for processes: %s", error)
        self._probe.follow(self._targets.processes, self._targets.ports)
        if self._socket is None:
            return
        try:
            self._socket.send(msgspec.json.encode(self._status()), socket.MSG_DONTWAIT)
        except BlockingIOError:
            pass  # the reader is busy; the next report says more
        except (BrokenPipeError, ConnectionResetError):
            pass  # it is gone, and SIGCHLD will say so

    def _status(self) -> AgentStatus:
        counts = self._probe.counts()
        stats = self._probe.run_stats().values()
        if self._rounds % _USAGE_EVERY == 0:
            self._usage = tuple(
                usage
                for usage in (_usage("attacher", os.getpid()), _usage("reader", self._reader))
                if usage is not None
            )
            self._watch_memory()
        self._rounds += 1
        followed = Counter(self._probe.targets().values())
        ports = Counter(self._targets.ports.values())
        return AgentStatus(
            at_ns=time.monotonic_ns(),
            transport=self._probe.channels.transport.value,
            probes=(
                ProbeStatus(
                    name=self._probe.name,
                    up=True,
                    reason="",
                    events=sum(counts[count] for count in SEEN),
                    cpu_ns=sum(each.run_ns for each in stats),
                    runs=sum(each.runs for each in stats),
                    losses=tuple(Loss(count.name.lower(), counts[count]) for count in REASONS),
                ),
            ),
            targets=tuple(
                TargetStatus(service.name, followed[index], ports[index])
                for index, service in enumerate(self._config.services)
            ),
            reader_restarts=self._restarts,
            processes=self._usage,
        )

    def _watch_memory(self) -> None:
        """Say once that the agent uses more memory than it was given. Nothing is dropped for it."""
        used = sum(usage.proportional_bytes or 0 for usage in self._usage)
        limit = self._config.limits.memory
        if used > limit and not self._warned:
            self._warned = True
            log.warning("the agent uses %d MiB, more than limits.memory (%d MiB)", used >> 20, limit >> 20)

    # ---- the reader ----

    def _start_reader(self, *, resumes: bool) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            given = Inheritance(
                self._config, self._front, self._probe.channels, theirs, self._listener, os.getpid(), resumes
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

    def _end_reader(self) -> None:
        if not self._reader:
            return
        deadline = time.monotonic() + STOP_S
        os.kill(self._reader, signal.SIGTERM)
        while os.waitpid(self._reader, os.WNOHANG)[0] == 0:
            if time.monotonic() > deadline:
                log.error("the reader does not end; killing it")
                os.kill(self._reader, signal.SIGKILL)
                os.waitpid(self._reader, 0)
                return
            time.sleep(0.01)


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
        what = f"cannot listen on {address}: {error.strerror}"
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
