"""What all probes share on the attacher's side: an object that is loaded and attached, its records' way, its counters.

No record passes through here: the reader process maps the streams and the counters that stand in memory by itself
(`probes.records`, `probes.service_stats`). Nothing in this module needs numpy.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections import Counter
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from contextlib import ExitStack
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Final, Self

from probes import libbpf, perf_buffers
from probes.errors import HostError

if TYPE_CHECKING:
    from probes.probe_points import PointsMap

OBJECTS: Final = Path(__file__).parent / "objects"
"""The compiled probes; built with the package."""

SHARED_MAPS: Final = ("targets", "target_filter", "ports", "port_bits", "revision")
"""The maps of bpf/targets.bpf.h: the requests probe's are everybody's."""

_SMALLEST_RING: Final = 256 * 1024
_U32: Final = struct.Struct("=I")
_U64: Final = struct.Struct("=Q")


class Transport(Enum):
    """How records cross: a ring buffer shared by all CPUs (Linux 5.8), or a perf buffer for each CPU."""

    RING = "ring"
    PERF = "perf"


class Count(Enum):
    """What the probes count. The values are those of `enum count` in bpf/records.h, which says what each one means.

    `tests/kernel` fails when the two differ.
    """

    SEEN_READS = 0
    SEEN_WRITES = 1
    SEEN_EVENTS = 2
    LOST_READS_RING_FULL = 3
    LOST_WRITES_RING_FULL = 4
    LOST_EVENTS_RING_FULL = 5
    CONNECTIONS_FULL = 6
    CALLS_FULL = 7
    TARGETS_FULL = 8
    UNREADABLE = 9
    TOO_MANY_SEGMENTS = 10
    CAPPED_CALLS = 11
    UNSEEN_BYTES_CALLS = 12
    UNFOLLOWED_IO = 13
    STALE_CONNECTION = 14
    SEEN_INTERVALS = 15
    SEEN_MESSAGES = 16
    SEEN_NAMES = 17
    LOST_INTERVALS_RING_FULL = 18
    LOST_MESSAGES_RING_FULL = 19
    LOST_NAMES_RING_FULL = 20
    THREADS_FULL = 21
    CLOCK_BACKWARDS = 22
    SEEN_SPANS = 23
    LOST_SPANS_RING_FULL = 24
    SPANS_FULL = 25
    SEEN_TCP_EVENTS = 26
    LOST_TCP_EVENTS_RING_FULL = 27
    SOCKETS_FULL = 28
    SEEN_BLOCK_IOS = 29
    LOST_BLOCK_IOS_RING_FULL = 30
    BLOCK_IOS_FULL = 31
    SEEN_SYSCALLS = 32
    SYSCALLS_FULL = 33
    SEEN_LOOKUPS = 34
    IMPLAUSIBLE_LOOKUPS = 35
    MODEL_NAMES_CUT = 36
    SLOTS_FULL = 37
    SEEN_GPU_SYNCS = 38
    LOST_GPU_SYNCS_RING_FULL = 39
    CUDA_CALLS_FULL = 40
    CUDA_RETURNS_UNSEEN = 41
    ALLOCATIONS_FULL = 42
    UNKNOWN_FREES = 43
    NOT_ATTACHED = 44
    PORTS_FULL = 45
    CGROUPS_FULL = 46


@dataclass(frozen=True, slots=True)
class Stream:
    """Records of one kind, as a probe declares them: the maps `NAME_ring` and `NAME_perf`, and the C structure.

    `order` is the member that says when a record was made. `share` is the part of the agent's memory limit that its
    ring gets, rounded down to a power of two.
    """

    name: str
    record: str
    order: str
    share: float
    seen: Count
    lost: Count


@dataclass(frozen=True, slots=True)
class Channel:
    """One stream of fixed-size records for the reader to map.

    `record` names the C structure in the BTF of `object_path`, `order` its member that says when a record was made. For
    a ring `fds` is the map alone and `size` the ring's bytes; for perf buffers `fds` has one descriptor per CPU and
    `size` is the bytes of each buffer.
    """

    probe: str
    name: str
    record: str
    order: str
    transport: Transport
    object_path: Path
    fds: tuple[int, ...]
    size: int


@dataclass(frozen=True, slots=True)
class StatsMap:
    """A probe's counters per CPU and service, for the reader to map: `cpus` times `services` of the C structure.

    `unmeasured` are members that nothing counts on this kernel: they would read as zero.
    """

    probe: str
    record: str
    object_path: Path
    fd: int
    cpus: int
    services: int
    unmeasured: tuple[str, ...] = ()


def pick_transport(wanted: str) -> Transport:
    """Turn `auto`, `ring` or `perf` into the transport to use.

    Raises HostError when `ring` is asked for and the kernel has none.
    """
    if wanted == "perf":
        return Transport.PERF
    if libbpf.has_ring_buffer():
        return Transport.RING
    if wanted == "ring":
        raise HostError("this kernel has no BPF ring buffers", "run with --transport perf, or on Linux 5.8 or later")
    return Transport.PERF


def ring_bytes(memory_bytes: int, share: float) -> int:
    """Bytes of a ring that may have this share of a memory limit: a power of two, at least 256 KiB."""
    return max(_SMALLEST_RING, 1 << (int(memory_bytes * share).bit_length() - 1))


class Probe:
    """A loaded probe; `attach` starts it. A context manager: leaving it detaches everything.

    A subclass declares; `_set_up` is for what it changes before the object is loaded. `memory_bytes` is the agent's
    limit, from which the rings are sized; `sizes` gives the bytes of some or all instead. `services` is how many the
    config names. `shares_with` is the requests probe, whose targets all probes follow.
    Raises HostError or ProbeError, with libbpf's log, when the kernel refuses.
    """

    name: ClassVar[str]
    streams: ClassVar[tuple[Stream, ...]] = ()
    reasons: ClassVar[tuple[Count, ...]] = ()
    """Every way to lose or not to follow something, beside those of the streams."""
    stats: ClassVar[str | None] = None
    """The C structure of the map `stats`, where the object has one."""
    optional: ClassVar[Mapping[str, str]] = {}
    """Programs that are left out, with what they measure, on a kernel whose BTF has no such tracepoint."""
    measures: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """Members of `stats` that only one of those programs counts, by program."""
    points_map: PointsMap | None = None
    """The slots of its points, where it has any."""

    def __init__(
        self,
        transport: Transport,
        *,
        memory_bytes: int = 120 * 2**20,
        sizes: Mapping[str, int] | None = None,
        services: int = 1,
        shares_with: Probe | None = None,
        object_path: Path | None = None,
    ) -> None:
        self._stack = ExitStack()
        self._refused: dict[Count, AbstractSet[object]] = {}
        self._refused_cnt: Counter[Count] = Counter()
        path = object_path or OBJECTS / f"{self.name}.bpf.o"
        with ExitStack() as opening:
            self._object = opening.enter_context(_open(path))
            self._transport = transport
            given = sizes or {}
            self._sizes = {
                each.name: given.get(each.name, ring_bytes(memory_bytes, each.share)) for each in self.streams
            }
            self._choose_transport()
            self._choose_programs()
            if self.stats is not None:
                self._object.set_global("service_count", services)
                self._object.map("stats").max_entries = libbpf.possible_cpus() * services
            if shares_with is not None:
                for shared in SHARED_MAPS:
                    if any(each.name == shared for each in self._object.maps):
                        self._object.map(shared).reuse(shares_with.map(shared))
            self._set_up()
            self._object.load()
            self.channels = tuple(self._channel(stream, path, opening) for stream in self.streams)
            self.stats_map: StatsMap | None = None
            if self.stats is not None:
                fd = self._object.map("stats").fd
                unmeasured = tuple(
                    member
                    for program in self.optional
                    if not self._object.program(program).autoload
                    for member in self.measures.get(program, ())
                )
                self.stats_map = StatsMap(self.name, self.stats, path, fd, libbpf.possible_cpus(), services, unmeasured)
            self._stack = opening.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _set_up(self) -> None:
        """Change sizes and constants before the object is loaded."""

    def close(self) -> None:
        """Detach the programs and free the maps."""
        self._stack.close()

    def attach(self) -> None:
        """Attach every program. From here on targets pay for being watched."""
        self._object.attach()

    def follow_processes(self, tgids: Mapping[int, int]) -> None:
        """Put on these processes (tgid -> service) what is put on each by itself, and take it off all others.

        Called once a second. Most probes have nothing of that kind: the kernel's events are everybody's.
        """

    def notes(self) -> tuple[str, ...]:
        """What of it does not measure though it is attached, and why: a sentence for each."""
        return tuple(
            f"its table of {count.name.removesuffix('_FULL').lower()} is full: there is more that it does not follow"
            for count, refused in self._refused.items()
            if refused
        )

    def map(self, name: str) -> libbpf.Map:
        """A map of the object. Raises ProbeError."""
        return self._object.map(name)

    def counts(self) -> dict[Count, int]:
        """Every counter, summed over the CPUs."""
        values = {}
        for key, raw in self._object.map("counts").items():
            (number,) = _U32.unpack(key)
            values[Count(number)] = sum(value for (value,) in _U64.iter_unpack(raw))
        for count, refused in self._refused_cnt.items():
            values[count] = values.get(count, 0) + refused
        return values

    def _refuse(self, count: Count, refused: AbstractSet[object]) -> None:
        """Count what a table that user space keeps has no room for now: each once, for as long as that is so."""
        self._refused_cnt[count] += len(refused - self._refused.get(count, set()))
        self._refused[count] = refused

    @classmethod
    def seen_counts(cls) -> tuple[Count, ...]:
        """The counters of records that were due."""
        return tuple(stream.seen for stream in cls.streams)

    @classmethod
    def loss_counts(cls) -> tuple[Count, ...]:
        """Every way to lose or not to follow something, in the order of the enum."""
        return tuple(sorted((*(stream.lost for stream in cls.streams), *cls.reasons), key=lambda count: count.value))

    def run_stats(self) -> dict[str, libbpf.ProgramStats]:
        """What the kernel says each program cost; counted only while somebody keeps BPF run-time statistics on."""
        return {program.name: program.stats() for program in self._object.programs if program.autoload}

    def _choose_transport(self) -> None:
        if not self.streams:
            return
        perf = self._transport is Transport.PERF
        self._object.set_global("use_perf", int(perf))
        for stream, size in self._sizes.items():
            ring = self._object.map(f"{stream}_ring")
            if perf:
                ring.set_autocreate(False)
            else:
                ring.max_entries = size
                self._object.map(f"{stream}_perf").set_autocreate(False)

    def _choose_programs(self) -> None:
        for program, tracepoint in self.optional.items():
            if not libbpf.has_btf_tracepoint(tracepoint):
                self._object.program(program).set_autoload(False)

    def _channel(self, stream: Stream, path: Path, stack: ExitStack) -> Channel:
        size = self._sizes[stream.name]
        if self._transport is Transport.RING:
            fds: tuple[int, ...] = (self._object.map(f"{stream.name}_ring").fd,)
            return self._channel_of(stream, path, fds, size)
        pages = max(16, size // mmap.PAGESIZE // libbpf.possible_cpus())
        pages = 1 << (pages.bit_length() - 1)
        opened = perf_buffers.open_perf_buffers(self._object.map(f"{stream.name}_perf"), pages)
        stack.callback(_close_all, opened)
        for kept in perf_buffers.keep_perf_buffers(opened, pages):
            stack.callback(kept.close)
        return self._channel_of(stream, path, tuple(opened), pages * mmap.PAGESIZE)

    def _channel_of(self, stream: Stream, path: Path, fds: tuple[int, ...], size: int) -> Channel:
        return Channel(self.name, stream.name, stream.record, stream.order, self._transport, path, fds, size)


def _open(path: Path) -> libbpf.Object:
    if not path.exists():
        raise HostError(f"the compiled probe {path.name} is not there", "build it with: make bpf")
    return libbpf.Object(path)


def _close_all(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)
