"""The requests probe as the attacher sees it: loads and attaches it, says whom to follow, reads its counters.

No captured byte passes through here: the records go from the kernel to the reader process, which maps the rings itself
(`probes.records`). Nothing in this module needs numpy.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Final, Self

from probes import libbpf, perf_buffers
from probes.errors import HostError

OBJECT: Final = Path(__file__).parent / "objects" / "requests.bpf.o"
"""The compiled probe; built with the package."""

_CALLS_PER_CONNECTION: Final = 2
_U32: Final = struct.Struct("=I")
_U64: Final = struct.Struct("=Q")
_PORT_KEY: Final = struct.Struct("=II")


class Transport(Enum):
    """How records cross: a ring buffer shared by all CPUs (Linux 5.8), or a perf buffer for each CPU."""

    RING = "ring"
    PERF = "perf"


class Count(Enum):
    """What the probe counts. The values are those of `enum count` in bpf/records.h, which says what each one means.

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


SEEN: Final = (Count.SEEN_READS, Count.SEEN_WRITES, Count.SEEN_EVENTS)
REASONS: Final = tuple(count for count in Count if count not in SEEN)
"""Every way to lose or not to follow something, in the order of the enum."""


@dataclass(frozen=True, slots=True)
class Channel:
    """One stream of fixed-size records for the reader to map.

    `record` names the C structure. For a ring `fds` is the map alone and `size` the ring's bytes; for perf buffers
    `fds` has one descriptor per CPU and `size` is the bytes of each buffer.
    """

    record: str
    fds: tuple[int, ...]
    size: int


@dataclass(frozen=True, slots=True)
class Channels:
    """What the reader needs to receive the probe's records."""

    transport: Transport
    object_path: Path
    reads: Channel
    writes: Channel
    events: Channel

    @property
    def fds(self) -> tuple[int, ...]:
        """Every descriptor that must stay open in the reader."""
        return self.reads.fds + self.writes.fds + self.events.fds


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


def ring_sizes(memory_bytes: int) -> dict[str, int]:
    """Bytes for each ring out of a memory limit: a fifth of it in all, as powers of two, no ring under 256 KiB.

    Writes get the most: 20,000 frames a second are 10 MB a second, and the reader may be away for a scrape.
    """

    def power_of_two(size: float) -> int:
        return max(256 * 1024, 1 << (int(size).bit_length() - 1))

    return {
        "writes": power_of_two(memory_bytes / 7),
        "reads": power_of_two(memory_bytes / 28),
        "events": power_of_two(memory_bytes / 56),
    }


class RequestsProbe:
    """The loaded and attached probe. A context manager: leaving it detaches everything.

    `memory_bytes` is the agent's memory limit, from which the rings are sized; `connections` how many TCP connections
    are followed at once. Raises HostError or ProbeError, with libbpf's log, when the kernel refuses.
    """

    name: Final = "requests"

    def __init__(
        self,
        transport: Transport,
        *,
        connections: int = 65536,
        memory_bytes: int = 120 * 2**20,
        sizes: Mapping[str, int] | None = None,
        object_path: Path = OBJECT,
    ) -> None:
        self._stack = ExitStack()
        with ExitStack() as opening:
            self._object = opening.enter_context(_open(object_path))
            self._transport = transport
            self._sizes = dict(sizes) if sizes is not None else ring_sizes(memory_bytes)
            self._object.map("connections").max_entries = connections
            self._object.map("calls").max_entries = max(1024, connections // _CALLS_PER_CONNECTION)
            self._choose_transport()
            self._object.load()
            self.channels = Channels(
                transport,
                object_path,
                reads=self._channel("reads", "read_chunk", opening),
                writes=self._channel("writes", "write_chunk", opening),
                events=self._channel("events", "connection_event", opening),
            )
            self._processes: dict[int, int] = {}
            self._ports: dict[tuple[int, int], int] = {}
            self._stack = opening.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Detach the programs and free the maps."""
        self._stack.close()

    def attach(self) -> None:
        """Attach every program. From here on targets pay for being watched."""
        self._object.attach(*self._object.programs)

    def follow(self, processes: Mapping[int, int], ports: Mapping[tuple[int, int], int]) -> None:
        """Follow these processes (tgid -> service) and (network namespace, port) -> service, and their children.

        A process that the kernel added by itself, because a target forked it, stays until it exits.
        """
        targets = self._object.map("targets")
        for tgid in self._processes.keys() - processes.keys():
            targets.delete(_U32.pack(tgid))
        for tgid, service in processes.items():
            if self._processes.get(tgid) != service:
                targets.update(_U32.pack(tgid), _U32.pack(service))
        self._processes = dict(processes)
        self._follow_ports(ports)

    def counts(self) -> dict[Count, int]:
        """Every counter, summed over the CPUs."""
        values = {}
        for count in Count:
            raw = self._object.map("counts").lookup(_U32.pack(count.value)) or b""
            values[count] = sum(value for (value,) in _U64.iter_unpack(raw))
        return values

    def targets(self) -> dict[int, int]:
        """tgid -> service of every process that is followed now, those added by the kernel included."""
        return {_U32.unpack(key)[0]: _U32.unpack(value)[0] for key, value in self._object.map("targets").items()}

    def run_stats(self) -> dict[str, libbpf.ProgramStats]:
        """What the kernel says each program cost; zeros unless somebody keeps BPF run-time statistics switched on."""
        return {program.name: program.stats() for program in self._object.programs}

    def _choose_transport(self) -> None:
        perf = self._transport is Transport.PERF
        self._object.set_global("use_perf", int(perf))
        for stream, size in self._sizes.items():
            ring = self._object.map(f"{stream}_ring")
            if perf:
                ring.set_autocreate(False)
            else:
                ring.max_entries = size
                self._object.map(f"{stream}_perf").set_autocreate(False)

    def _channel(self, stream: str, record: str, stack: ExitStack) -> Channel:
        if self._transport is Transport.RING:
            return Channel(record, (self._object.map(f"{stream}_ring").fd,), self._sizes[stream])
        pages = max(16, self._sizes[stream] // mmap.PAGESIZE // libbpf.possible_cpus())
        pages = 1 << (pages.bit_length() - 1)
        fds = perf_buffers.open_perf_buffers(self._object.map(f"{stream}_perf"), pages)
        stack.callback(_close_all, fds)
        for kept in perf_buffers.keep_perf_buffers(fds, pages):
            stack.callback(kept.close)
        return Channel(record, tuple(fds), pages * mmap.PAGESIZE)

    def _follow_ports(self, ports: Mapping[tuple[int, int], int]) -> None:
        table, bits = self._object.map("ports"), self._object.map("port_bits")
        for gone in self._ports.keys() - ports.keys():
            table.delete(_PORT_KEY.pack(*gone))
        for key, service in ports.items():
            if self._ports.get(key) != service:
                table.update(_PORT_KEY.pack(*key), _U32.pack(service))
        before = {port for _, port in self._ports}
        now = {port for _, port in ports}
        for port in before ^ now:
            bits.update(_U32.pack(port), bytes([port in now]))
        self._ports = dict(ports)


def _open(path: Path) -> libbpf.Object:
    if not path.exists():
        raise HostError(f"the compiled probe {path.name} is not there", "build it with: make bpf")
    return libbpf.Object(path)


def _close_all(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)
