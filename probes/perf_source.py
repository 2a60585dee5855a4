"""Reads the records of per-CPU perf buffers as one numpy array, in the order they were made.

What the kernel gives (include/uapi/linux/perf_event.h; the layout is ABI): per CPU a page with `data_head`, where the
kernel writes next, and `data_tail`, how far we read, then the data, mapped once: what reaches its end goes on at its
start. Each record starts with `{u32 type, u16 misc, u16 size}`. A sample holds `{u32 size, bytes}` after that, padded
to 8 bytes.
"""

from __future__ import annotations

import mmap
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from probes.errors import HostError, ProbeError
from probes.memory_order import fence

_HEAD_OFFSET: Final = 1024
_TAIL_OFFSET: Final = 1032
_HEADER_BYTES: Final = 8
_PAYLOAD_OFFSET: Final = 12
_RECORD_LOST: Final = 2
_RECORD_SAMPLE: Final = 9
_FIRST_WINDOW: Final = 64
_HEADER: Final = struct.Struct("=IHH")
_LOST_COUNT: Final = struct.Struct("=Q")


@dataclass(frozen=True, slots=True)
class _Unread:
    """What lies unread in one buffer. Positions count bytes from the beginning of all time, as the kernel's do."""

    payloads: list[npt.NDArray[Any]]  # void, one per sample, in stretches; views of the buffer where it does not wrap
    order: npt.NDArray[np.uint64]  # one per sample, never falling
    releases: npt.NDArray[np.uint64]  # where the tail may go once this sample and those before are used
    losses: tuple[tuple[int, int], ...]  # position after, records lost
    end: int


class _Buffer:
    """One CPU's buffer."""

    def __init__(self, descriptor: int, pages: int, dtype: np.dtype[Any], order_field: str) -> None:
        try:
            self._map = mmap.mmap(
                descriptor, (1 + pages) * mmap.PAGESIZE, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE
            )
        except OSError as error:
            what = f"cannot map a perf buffer of {pages} pages: {error.strerror}"
            raise HostError(what, "use fewer pages, or raise kernel.perf_event_mlock_kb") from error
        self._size = pages * mmap.PAGESIZE
        self._dtype = dtype
        self._void = np.dtype((np.void, dtype.itemsize))
        self._order_dtype, self._order_offset = _field(dtype, order_field)
        self._stride = _HEADER_BYTES + -(-(4 + dtype.itemsize) // 8) * 8
        self._head = np.frombuffer(self._map, np.uint64, 1, _HEAD_OFFSET)
        self._tail = np.frombuffer(self._map, np.uint64, 1, _TAIL_OFFSET)
        self._data = np.frombuffer(self._map, np.uint8, self._size, mmap.PAGESIZE)
        self.position = int(self._tail[0])
        self._losses: tuple[tuple[int, int], ...] = ()

    def read(self, limit: int | None) -> _Unread:
        """Find the samples between tail and head, or the first `limit` or more of them. Raises ProbeError."""
        head = int(self._head[0])
        fence()
        if not 0 <= head - self.position <= self._size:
            raise self._broken(f"{head - self.position} bytes unread of {self._size}")
        if limit is not None:
            head = min(head, self.position + max(limit, 1) * self._stride)
        data = self._bytes(head)
        runs, losses, end = self._runs(data)
        starts = np.concatenate([at + self._stride * np.arange(count) for at, count in runs] or [np.empty(0, np.intp)])
        releases = np.append(starts[1:], end)[: len(starts)]
        payloads = [self._fields(data, run, self._void, _PAYLOAD_OFFSET) for run in runs]
        order = [self._fields(data, run, self._order_dtype, _PAYLOAD_OFFSET + self._order_offset) for run in runs]
        self._losses = tuple((self.position + at, count) for at, count in losses)
        return _Unread(
            payloads=payloads,
            order=np.maximum.accumulate(np.concatenate(order or [np.empty(0, np.uint64)])),
            releases=(releases + self.position).astype(np.uint64),
            losses=self._losses,
            end=self.position + end,
        )

    def _bytes(self, head: int) -> npt.NDArray[np.uint8]:
        """Return the unread bytes in one piece: a view, or a copy where they go past the end of the buffer."""
        start, count = self.position % self._size, head - self.position
        if start + count <= self._size:
            return self._data[start : start + count]
        return np.concatenate([self._data[start:], self._data[: start + count - self._size]])

    def _runs(self, data: npt.NDArray[np.uint8]) -> tuple[list[tuple[int, int]], list[tuple[int, int]], int]:
        """Return the stretches of samples as (offset, count), the losses as (offset after, count), and the end."""
        runs: list[tuple[int, int]] = []
        losses: list[tuple[int, int]] = []
        at = 0
        while at < len(data):
            count = self._samples_at(data, at)
            if count:
                runs.append((at, count))
                at += count * self._stride
                continue
            kind, _, size = _HEADER.unpack_from(data.data, at)
            if size < _HEADER_BYTES or at + size > len(data) or kind == _RECORD_SAMPLE:
                if not at:
                    raise self._broken(f"a record of type {kind}, {size} bytes long, wanted {self._stride}")
                break
            at += size
            if kind == _RECORD_LOST:  # u64 id, u64 lost
                losses.append((at, *_LOST_COUNT.unpack_from(data.data, at - size + _HEADER_BYTES + 8)))
        return runs, losses, at

    def _samples_at(self, data: npt.NDArray[np.uint8], at: int) -> int:
        """Return how many of our samples stand in a row at `at`. Looks ahead in growing windows: a buffer of many
        short rows must not be looked through from each of them to its end."""
        found, window = 0, _FIRST_WINDOW
        while True:
            available = min(window, (len(data) - at) // self._stride)
            run = (at, available)
            kinds = self._fields(data, run, np.dtype(np.uint32), 0)
            sizes = self._fields(data, run, np.dtype(np.uint16), 6)
            ours = (kinds == _RECORD_SAMPLE) & (sizes == self._stride)
            if available and not bool(ours.all()):
                return found + int(ours.argmin())
            found += available
            at += available * self._stride
            if available < window:
                return found
            window *= 2

    def _fields(
        self, data: npt.NDArray[np.uint8], run: tuple[int, int], dtype: np.dtype[Any], offset: int
    ) -> npt.NDArray[Any]:
        """Return one field of each sample of a stretch, as a view."""
        at, count = run
        if not count:
            return np.empty(0, dtype)
        return np.ndarray((count,), dtype, data, at + offset, (self._stride,))

    def release(self, position: int) -> int:
        """Move the tail to `position`; return how many lost records the kernel had reported before it."""
        fence()
        self.position = position
        self._tail[0] = position
        lost = sum(count for at, count in self._losses if at <= position)
        self._losses = tuple((at, count) for at, count in self._losses if at > position)
        return lost

    def _broken(self, why: str) -> ProbeError:
        return ProbeError(f"the perf buffer at {self.position}: {why}", "build the objects anew: make bpf")

    def jump(self) -> None:
        """Go on at the head, whatever lies before it."""
        self.release(int(self._head[0]))


def _field(dtype: np.dtype[Any], path: str) -> tuple[np.dtype[Any], int]:
    """Return dtype and offset of a field; `header.seen_ns` is a field of a field. Raises KeyError."""
    offset = 0
    for name in path.split("."):
        fields = dtype.fields
        if fields is None:
            raise KeyError(path)
        dtype, more = fields[name][:2]
        offset += more
    return dtype, offset


def _first(stretches: list[npt.NDArray[Any]], count: int) -> Iterator[npt.NDArray[Any]]:
    """Yield the first `count` samples of several stretches."""
    for stretch in stretches:
        yield stretch[:count]
        count -= min(count, len(stretch))


class PerfSource:
    """The records of all CPUs' perf buffers, see RecordSource. Not for two threads, and one reader.

    One CPU's records come in the order they were put into its buffer, CPUs are merged by `order_field`, which is
    CLOCK_MONOTONIC in nanoseconds. A record may be put into its buffer a while after its time was taken, so records
    younger than `margin_ns` before the heads were read are held back for the next pending(): order holds as long as
    no program needs longer than that. Each record is copied, twice when more than one CPU has made some. Room is given
    back by consume(), as with a ring.

    `lost` is what the kernel reported in the buffers: it comes with the next record that has room, so it lags. The BPF
    program is told of the same losses when they happen (bpf_perf_event_output's result): count one of both, not both.
    """

    def __init__(
        self,
        descriptors: Sequence[int],
        pages: int,
        dtype: np.dtype[Any],
        order_field: str = "seen_ns",
        *,
        clock: Callable[[], int] = time.monotonic_ns,
        margin_ns: int = 2_000_000,
    ) -> None:
        """Map one buffer of `pages` pages (a power of two) per descriptor of open_perf_buffers().

        Raises HostError where the kernel refuses: locked memory is limited without CAP_IPC_LOCK.
        """
        if pages < 1 or pages & (pages - 1):
            raise ValueError(f"{pages} pages; perf buffers are a power of two")
        self.lost = 0
        self.stalled = False  # the kernel moves the head only past complete records
        self._dtype = dtype
        self._empty: npt.NDArray[Any] = np.empty(0, np.dtype((np.void, dtype.itemsize)))
        self._clock = clock
        self._margin_ns = margin_ns
        self._buffers = [_Buffer(descriptor, pages, dtype, order_field) for descriptor in descriptors]
        self._unread: list[_Unread] = []
        self._batch: npt.NDArray[Any] = np.empty(0, dtype)
        self._cpus: npt.NDArray[np.intp] = np.empty(0, np.intp)
        self._taken = 0
        self._taken_of: npt.NDArray[np.intp] = np.zeros(len(self._buffers), np.intp)

    def pending(self, limit: int | None = None) -> npt.NDArray[Any]:
        """Return the complete records that are old enough, oldest first, at most `limit`; see RecordSource.

        Raises ProbeError when a buffer holds something other than records of the one size; then only skip_all() helps.
        """
        horizon = self._clock() - self._margin_ns
        self._forget()
        self._unread = [buffer.read(limit) for buffer in self._buffers]
        self._release_empty()
        counts = [int(np.searchsorted(unread.order, max(horizon, 0), side="right")) for unread in self._unread]
        payloads = [self._empty]
        for unread, count in zip(self._unread, counts, strict=True):
            payloads.extend(_first(unread.payloads, count))
        batch = np.concatenate(payloads)
        self._cpus = np.repeat(np.arange(len(counts)), counts)
        if np.count_nonzero(counts) > 1:
            order = [unread.order[:count] for unread, count in zip(self._unread, counts, strict=True)]
            sorting = np.argsort(np.concatenate(order), kind="stable")[:limit]
            batch, self._cpus = batch[sorting], self._cpus[sorting]
        self._batch = batch[:limit].view(self._dtype)
        return self._batch

    def _release_empty(self) -> None:
        """Give back what holds no sample, such as a report of losses alone: no consume() would."""
        for buffer, unread in zip(self._buffers, self._unread, strict=True):
            if not len(unread.order) and unread.losses:
                self.lost += buffer.release(unread.end)

    def consume(self, count: int) -> None:
        """Release the next `count` records of the last pending()."""
        taken = self._taken + count
        if not self._taken <= taken <= len(self._batch):
            raise ValueError(f"{count} records to release, {len(self._batch) - self._taken} pending")
        more = np.bincount(self._cpus[self._taken : taken], minlength=len(self._buffers))
        self._taken = taken
        self._taken_of += more
        for index in np.flatnonzero(more):
            release = int(self._unread[index].releases[self._taken_of[index] - 1])
            self.lost += self._buffers[index].release(release)

    def skip_all(self) -> int:
        """Release all that is there now, unread, also what is too young; return how many records that was.

        Of a buffer that holds something else than our records, reading goes on at its head; its records are not known.
        """
        self._forget()
        skipped = 0
        for buffer in self._buffers:
            try:
                for _ in range(2):  # the second pass meets what the first one stopped at, if anything
                    unread = buffer.read(None)
                    skipped += len(unread.order)
                    self.lost += buffer.release(unread.end)
            except ProbeError:
                buffer.jump()
        return skipped

    def close(self) -> None:
        """Give the mappings up; the descriptors stay the caller's."""
        self._forget()
        self._buffers.clear()

    def _forget(self) -> None:
        self._unread = []
        self._batch = np.empty(0, self._dtype)
        self._cpus = np.empty(0, np.intp)
        self._taken = 0
        self._taken_of = np.zeros(len(self._buffers), np.intp)
