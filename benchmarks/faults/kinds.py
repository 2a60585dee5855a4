"""The faults: what each does, to which server, and how long it kept a request by the injector's own clock.

Each has a quiet twin: the same server and the same requests, before the fault is there.
"""

from __future__ import annotations

import os
import signal
import statistics
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import ExitStack
from typing import ClassVar, Final

import click
import msgspec

from benchmarks.common import cgroups, scripts
from benchmarks.common.processes import START_S, line_of, server, started, told
from benchmarks.faults import client, host
from benchmarks.faults.client import Asked
from benchmarks.faults.service import Order, Script, Step

AHEAD: Final = ("nice", "-n", "-15")
"""Servers, and the process that takes their CPU, go before what else the host does: it is no part of the fault."""
SIZE_S: Final = 0.12
"""How long a fault is meant to keep a request, where the injector can say that."""
ROLEPLAY_MODEL: Final = "understudy"
_BURN: Final = Step("burn", 0.003)
_STEP: Final = Step("sleep", 0.012)
_BETWEEN: Final = [Step("sleep", 0.008)]


class Fault(ABC):
    """One kind of fault, on one server. `open` starts the server; `arm` makes the fault possible, after the quiet twin.

    `cause` is what the agent should charge, in `phase` ("ttft" or "decode").
    """

    name: ClassVar[str]
    server: ClassVar[str]
    cause: ClassVar[str]
    phase: ClassVar[str] = "ttft"

    def __init__(self) -> None:
        self.port = 0

    @classmethod
    def missing(cls) -> str | None:
        """What this host lacks for it; None where it can have this fault."""
        return None

    @abstractmethod
    def open(self, stack: ExitStack) -> None:
        """Start what is needed, and set `port`. `stack` ends it."""

    def arm(self) -> None:  # noqa: B027 - most faults come with each request
        """Begin with the fault. The server's end, or the `stack`, ends it."""

    def rest(self) -> None:  # noqa: B027 - as above
        """End the fault where its size is known only then."""

    @abstractmethod
    def ask(self, *, faulty: bool) -> Asked:
        """Make a request, with the fault or without."""

    def felt_ns(self, asked: Asked) -> int:
        """How long the phase was, by a clock that is not the agent's: the client's."""
        return asked.window_ns(self.phase)

    @abstractmethod
    def injected_ns(self, asked: Asked, quiet: Sequence[Asked]) -> int:
        """How long the fault kept this request, of its phase. Called after `rest`; `quiet` are the quiet twins."""


def overlap_ns(window: tuple[int, int], stretches: Sequence[tuple[int, int]]) -> int:
    """How much of a window these stretches cover; they do not overlap each other."""
    began, ended = window
    return sum(max(0, min(ended, until) - max(began, since)) for since, until in stretches)


# ---- the other server ----


class _Scripted(Fault):
    """A fault of `benchmarks.faults.service`."""

    server = "scripted"
    steps: ClassVar[tuple[Step, ...]] = (_BURN, _STEP)
    timed: ClassVar[str] = ""

    def open(self, stack: ExitStack) -> None:
        self._start(stack)

    def ask(self, *, faulty: bool) -> Asked:
        return self._play(self._script(faulty=faulty))

    def injected_ns(self, asked: Asked, quiet: Sequence[Asked]) -> int:
        """As long as the server was at the step that the fault makes slow, beyond what that takes without."""
        usual = statistics.median(each.did_ns(self.timed) for each in quiet)
        return round(asked.did_ns(self.timed) - usual)

    def _start(self, stack: ExitStack, *options: str) -> None:
        command = [*AHEAD, sys.executable, "-m", "benchmarks.faults.service", *options]
        self._process = stack.enter_context(started(command))
        line = line_of(self._process, START_S)
        if not line.startswith(b"http://"):
            raise click.ClickException(f"{' '.join(command)} did not start")
        self.port = int(line.rsplit(b":", 1)[1])

    def _script(self, *, faulty: bool) -> Script:
        return Script(list(self.steps), between=_BETWEEN)

    def _play(self, script: Script) -> Asked:
        connection = client.connect(self.port)
        return client.hear(connection, client.send(connection, client.scripted(script)))


class _Ordered(_Scripted):
    """A fault that the server's background thread makes when it is told to, before the request comes."""

    order: ClassVar[Order]

    def open(self, stack: ExitStack) -> None:
        self._stretches: list[tuple[int, int]] = []
        self._start(stack)

    def ask(self, *, faulty: bool) -> Asked:
        if not faulty:
            return super().ask(faulty=False)
        assert self._process.stdin is not None
        self._process.stdin.write(msgspec.json.encode(self.order) + b"\n")
        began = told(self._process, START_S)["began"]
        asked = super().ask(faulty=True)
        self._stretches.append((began, told(self._process, START_S)["ended"]))
        return asked

    def injected_ns(self, asked: Asked, quiet: Sequence[Asked]) -> int:
        """As long as the background thread had it while the request waited for its first token."""
        return overlap_ns(asked.window(self.phase), self._stretches)


class HeldLock(_Ordered):
    """A background thread sleeps with a lock held; the request's worker wants it."""

    name = "lock"
    cause = "lock"
    steps = (Step("lock"), _BURN, _STEP)
    order = Order("hold", SIZE_S)


class HeldGil(_Ordered):
    """A background thread is in one call into C that does not release the GIL."""

    name = "gil"
    cause = "lock"
    order = Order("hog", SIZE_S)


class Sleeps(_Scripted):
    """The worker sleeps longer."""

    name = "sleep"
    cause = "sleep"
    timed = "sleep"

    def _script(self, *, faulty: bool) -> Script:
        return Script([*self.steps, *([Step("sleep", SIZE_S)] if faulty else [])], between=_BETWEEN)


class SlowUpstream(_Scripted):
    """A server that the service asks takes its time."""

    name = "upstream"
    cause = "upstream"
    timed = "upstream"

    def open(self, stack: ExitStack) -> None:
        """Start both servers."""
        upstream = stack.enter_context(server([*AHEAD, sys.executable, "-m", "benchmarks.faults.upstream"]))
        self._start(stack, "--upstream", str(upstream.port))

    def _script(self, *, faulty: bool) -> Script:
        return Script([_BURN, Step("upstream", SIZE_S if faulty else 0.012)], between=_BETWEEN)


class BlockedLoop(_Scripted):
    """Another request computes on the event loop."""

    name = "loop"
    cause = "on_cpu"

    def open(self, stack: ExitStack) -> None:
        """Start the server."""
        self._stretches: list[tuple[int, int]] = []
        self._start(stack)

    def ask(self, *, faulty: bool) -> Asked:
        """Ask while the loop is blocked."""
        if not faulty:
            return super().ask(faulty=False)
        blocker = client.connect(self.port)
        blocking = client.send(blocker, client.scripted(Script([Step("block", SIZE_S)], frames=2)))
        # its headers come just before it blocks the loop
        blocking.pieces.append((0, blocker.recv(4096)))
        asked = super().ask(faulty=True)
        other = client.hear(blocker, blocking)
        self._stretches += [(began, ended) for what, began, ended in other.done if what == "block"]
        return asked

    def injected_ns(self, asked: Asked, quiet: Sequence[Asked]) -> int:
        """As long as the other request had the loop while this one waited."""
        return overlap_ns(asked.window(self.phase), self._stretches)


class SlowDisk(_Scripted):
    """The block cgroup lets the worker's reads through at 4 MB/s."""

    name = "disk"
    cause = "disk"
    steps = (_BURN, Step("read", 768 << 10), _STEP)
    timed = "read"

    @classmethod
    def missing(cls) -> str | None:
        """The controller of block I/O."""
        return cgroups.missing("io")

    def open(self, stack: ExitStack) -> None:
        """Start the server with a disk of its own."""
        self._disk = stack.enter_context(host.disk(32))
        self._group = stack.enter_context(cgroups.group("io"))
        file = self._disk.folder / "weights"
        file.write_bytes(os.urandom(1 << 20))
        os.sync()
        self._start(stack, "--file", str(file))
        self._group.add(self._process.pid)

    def arm(self) -> None:
        """Limit what the server may read."""
        self._group.limit_io(self._disk.device, "rbps", 4_000_000)


class TightMemory(_Scripted):
    """The memory cgroup has no room for what the worker writes, and the pages must go to a slow disk first.

    With cgroup v1 only. v2 writes back by cgroup, and lets a writer wait for that (balance_dirty_pages) before its
    memory is full. On an emulated Linux 6.1, with this rate in `io.max` of its group, writing took 0.28-0.44 s instead
    of 0.06 s, and 0.03-0.08 s of that was memory pressure: not a fault of which reclaim is the cause.
    """

    name = "memory"
    cause = "memory"
    steps = (_BURN, Step("pages", 24 << 20), _STEP)
    timed = "pages"
    short_bytes: ClassVar[int] = 12 << 20
    rate: ClassVar[int] = 100_000_000

    @classmethod
    def missing(cls) -> str | None:
        """The controllers, as v1 has them."""
        places = cgroups.find("memory"), cgroups.find("io")
        if any(place is not None and place.version == 2 for place in places):
            return "needs memory and blkio of cgroup version 1: boot with systemd.unified_cgroup_hierarchy=0"
        return cgroups.missing("memory", "io")

    def open(self, stack: ExitStack) -> None:
        """Start the server with a slow disk of its own."""
        if (lack := self.missing()) is not None:
            raise click.ClickException(f"fault {self.name} {lack}")
        disk = stack.enter_context(host.disk(256))
        file = disk.folder / "cache"
        with file.open("wb") as out:
            out.write(bytes(32 << 20))
            out.flush()
            os.fsync(out.fileno())
            # pages belong to the group of who touches them first
            os.posix_fadvise(out.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        self._group = stack.enter_context(cgroups.group("memory"))
        # v1 has no writeback by cgroup: the kernel's threads write the pages, and only the root's limit is theirs
        stack.enter_context(cgroups.io_limited_for_all(disk.device, "wbps", self.rate))
        self._start(stack, "--file", str(file))
        self._group.add(self._process.pid)
        # on a busy host writeback is late, and the kernel's own small allocations would have the server killed
        self._group.never_kill()

    def arm(self) -> None:
        """Take the room."""
        os.sync()
        self._group.limit_memory(self._group.used_bytes() - self.short_bytes)


class SlowNetwork(_Scripted):
    """The link to the client is slow, the frames are large and the send buffer is small."""

    name = "network"
    cause = "network"
    phase = "decode"
    timed = "send"

    def open(self, stack: ExitStack) -> None:
        """Start the server for a client on the other side of a link."""
        self._network = stack.enter_context(host.network())
        self._start(stack, "--host", self._network.address, "--send-buffer", "16384")

    def arm(self) -> None:
        """Limit the link."""
        self._network.limit(16_000_000)

    def felt_ns(self, asked: Asked) -> int:
        """By the server's clock: the client gets the last token later, after what waits in the send buffer."""
        sends = [ended for what, _, ended in asked.done if what == "send"]
        return sends[-1] - sends[0]

    def _script(self, *, faulty: bool) -> Script:
        return Script(list(self.steps), frames=9, frame_bytes=32_000, between=[Step("sleep", 0.002)])

    def _play(self, script: Script) -> Asked:
        connection = self._network.connect(self.port)
        return client.hear(connection, client.send(connection, client.scripted(script)))


# ---- the role-play service ----


class _Roleplay(Fault):
    """A fault of examples/roleplay: an API process and an engine process, which computes."""

    server = "roleplay"
    prompt_bytes: ClassVar[int] = 800

    def open(self, stack: ExitStack) -> None:
        self._start(stack)

    def ask(self, *, faulty: bool) -> Asked:
        connection = client.connect(self.port)
        return client.hear(connection, client.send(connection, next(self._asks)))

    def _start(self, stack: ExitStack, *prefix: str) -> None:
        serve = ("-m", "examples.roleplay", "serve", "--port", "0", "--model", ROLEPLAY_MODEL)
        served = stack.enter_context(server([*prefix, *AHEAD, sys.executable, *serve]))
        self.port, self._pids = served.port, served.pids
        self._asks = scripts.roleplay(7, [ROLEPLAY_MODEL], prompt_bytes=self.prompt_bytes, max_tokens=3)

    def _start_on_one_cpu(self, stack: ExitStack) -> None:
        """Let the service have one CPU, and everything else that is started here the others."""
        cpus = sorted(os.sched_getaffinity(0))
        if len(cpus) < 2:
            raise click.ClickException(f"fault {self.name} needs two CPUs")
        self.cpu = cpus[0]
        stack.callback(os.sched_setaffinity, 0, cpus)
        self._start(stack, "taskset", "--cpu-list", str(self.cpu))
        os.sched_setaffinity(0, cpus[1:])


class Hog(_Roleplay):
    """Another process burns the CPU that the service has."""

    name = "cpu"
    cause = "run_queue"

    def open(self, stack: ExitStack) -> None:
        """Start the service."""
        host.need("taskset")
        self._start_on_one_cpu(stack)
        self._stack = stack
        self._stretches: list[tuple[int, int]] = []

    def arm(self) -> None:
        """Start the other process."""
        command = ["taskset", "--cpu-list", str(self.cpu), *AHEAD, sys.executable, "-m", "benchmarks.faults.hog"]
        self._hog = self._stack.enter_context(started(command))
        if line_of(self._hog, START_S) != b"running\n":
            raise click.ClickException(f"{' '.join(command)} did not start")

    def rest(self) -> None:
        """End the other process, and hear when it had the CPU."""
        assert self._hog.stdin is not None
        self._hog.stdin.write(b"enough\n")
        self._stretches = [(since, until) for since, until in told(self._hog, START_S)]

    def injected_ns(self, asked: Asked, quiet: Sequence[Asked]) -> int:
        """As long as the hog had the CPU while the request waited."""
        return overlap_ns(asked.window(self.phase), self._stretches)


class Quota(_Roleplay):
    """The cgroup of the service may use half a CPU."""

    name = "quota"
    cause = "cpu_quota"

    @classmethod
    def missing(cls) -> str | None:
        """The controller of CPU time."""
        return cgroups.missing("cpu")

    def open(self, stack: ExitStack) -> None:
        """Start the service in a cgroup of its own."""
        host.need("taskset")
        self._group = stack.enter_context(cgroups.group("cpu"))
        # on one CPU, since the kernel adds up what it throttled on each
        self._start_on_one_cpu(stack)
        self._group.add(*self._pids)

    def arm(self) -> None:
        """Limit the cgroup."""
        self._group.limit_cpu(40_000, 100_000)

    def ask(self, *, faulty: bool) -> Asked:
        """Ask, and look at the kernel's account of the cgroup with each piece of the answer."""
        connection = client.connect(self.port)
        sent = client.send(connection, next(self._asks))
        return client.hear(connection, sent, self._group.throttled_ns)

    def injected_ns(self, asked: Asked, quiet: Sequence[Asked]) -> int:
        """As long as the kernel says that it throttled the cgroup from the request to the first token."""
        looks = dict(asked.looks)
        began, ended = asked.window(self.phase)
        return looks[ended] - looks[began]


class Stopped(_Roleplay):
    """The engine's process is stopped by a signal, and continued."""

    name = "stop"
    cause = "stopped"
    prompt_bytes = 350  # computing takes 40 ms, and when that varies it is little beside the stop

    def open(self, stack: ExitStack) -> None:
        """Start the service; it has one engine."""
        self._start(stack)
        _, self._engine = self._pids
        self._stretches: list[tuple[int, int]] = []

    def ask(self, *, faulty: bool) -> Asked:
        """Ask, and stop the engine while it computes."""
        if not faulty:
            return super().ask(faulty=False)
        connection = client.connect(self.port)
        sent = client.send(connection, next(self._asks))
        time.sleep(0.004)
        os.kill(self._engine, signal.SIGSTOP)
        try:
            began_ns = time.monotonic_ns()
            time.sleep(SIZE_S)
            ended_ns = time.monotonic_ns()
        finally:
            os.kill(self._engine, signal.SIGCONT)
        self._stretches.append((began_ns, ended_ns))
        return client.hear(connection, sent)

    def injected_ns(self, asked: Asked, quiet: Sequence[Asked]) -> int:
        """From the one signal to the other."""
        return overlap_ns(asked.window(self.phase), self._stretches)


FAULTS: Final[tuple[type[Fault], ...]] = (
    Hog,
    Quota,
    Stopped,
    HeldLock,
    HeldGil,
    SlowDisk,
    TightMemory,
    SlowNetwork,
    SlowUpstream,
    Sleeps,
    BlockedLoop,
)
