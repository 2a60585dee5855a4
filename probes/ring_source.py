"""Reads the records of a BPF ring buffer as one numpy array, without a copy.

What the kernel gives (kernel/bpf/ringbuf.c; the layout is ABI): a page that holds the consumer position (offset 0, ours
to write), then a page that holds the producer position, then the data, mapped twice so that no record wraps. Positions
count bytes and never wrap. Each record is `{u32 len, u32 pgoff, bytes}`, padded to 8; bit 31 of `len` says that the
record is still being written, bit 30 that it was discarded.

The rules, with one fixed record size in the ring:

1. Load the producer position before any header, every header before its record (acquire).
2. Stop at the first busy record: those after it may be complete, but order would be lost.
3. Leave out discarded records, but release their room.
4. Store the consumer position only when the records before it are no longer needed (release): the kernel writes there.
"""

from __future__ import annotations

import errno
import mmap
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from probes.errors import HostError, ProbeError
from probes.memory_order import fence

_HEADER_BYTES: Final = 8
_BUSY: Final = 1 << 31
_DISCARDED: Final = 1 << 30


class RingSource:
    """The records of one ring buffer, see RecordSource. Not for two threads, and one reader per ring."""

    lost: Final = 0  # a ring tells its producer that it is full; the BPF program counts

    def __init__(self, map_fd: int, size_bytes: int, dtype: np.dtype[Any]) -> None:
        """Map the ring of `map_fd` with its `size_bytes` of data, in which every record is a `dtype`.

        Reading goes on where an earlier reader stopped. Raises HostError where the kernel refuses: Linux 5.10 lets no
        unprivileged process map a ring, so map it first and drop privileges after.
        """
        page = mmap.PAGESIZE
        if size_bytes < page or size_bytes & (size_bytes - 1):
            raise ValueError(f"a ring of {size_bytes} bytes; sizes are powers of two, a page at least")
        try:
            self._consumer_page = mmap.mmap(map_fd, page, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
            self._pages = mmap.mmap(map_fd, page + 2 * size_bytes, mmap.MAP_SHARED, mmap.PROT_READ, offset=page)
        except OSError as error:
            step = "map it before privileges are dropped" if error.errno == errno.EPERM else "use --transport perf"
            raise HostError(f"cannot map a ring buffer of {size_bytes} bytes: {error.strerror}", step) from error
        self.stalled = False
        self._closed = False
        self._dtype = dtype
        self._size = size_bytes
        self._stride = -(-(_HEADER_BYTES + dtype.itemsize) // 8) * 8
        self._consumer = np.frombuffer(self._consumer_page, np.uint64, 1)
        self._producer = np.frombuffer(self._pages, np.uint64, 1)
        self._position = int(self._consumer[0])
        self._batch = self._view(0, 0)
        self._kept: npt.NDArray[np.intp] | None = None  # slots of the batch's records; None: they are one stretch
        self._examined = 0  # slots from _position on that the batch stands for, discarded ones included
        self._taken = 0  # records of the batch already released

    def pending(self, limit: int | None = None) -> npt.NDArray[Any]:
        """Return the complete records, oldest first, at most `limit`; see RecordSource.

        Nothing is copied unless a discarded record lies between two others. Raises ProbeError when the ring holds
        something other than whole records of the one size; then only skip_all() helps.
        """
        self._forget()
        while not len(self._batch) and not self.stalled:
            count = self._unread()
            if limit is not None:
                count = min(count, limit)
            if not count:
                break
            sizes = self._sizes(count)
            if bool((sizes == self._dtype.itemsize).all()):
                fence()
                self._examined = count
                self._batch = self._view(self._position, count)
            else:
                self._examine(sizes.copy())
        return self._batch

    def _unread(self) -> int:
        """Return how many records lie between the positions, complete or not."""
        producer = int(self._producer[0])
        fence()
        unread = producer - self._position
        if not 0 <= unread <= self._size or unread % self._stride:
            raise self._broken(f"{unread} unread bytes are not whole records of {self._stride}")
        return unread // self._stride

    def _examine(self, sizes: npt.NDArray[np.uint32]) -> None:
        """Make the batch of slots that are not all complete. `sizes` is a copy: the kernel changes the headers."""
        fence()
        complete = sizes == self._dtype.itemsize
        whole = complete | (sizes == self._dtype.itemsize | _DISCARDED)
        end = len(sizes) if bool(whole.all()) else int(whole.argmin())
        if end < len(sizes):
            self.stalled = bool(sizes[end] & _BUSY)
            if not self.stalled and end == 0:
                raise self._broken(f"a record of {int(sizes[0])} bytes, wanted {self._dtype.itemsize}")
        kept = np.flatnonzero(complete[:end])
        first = int(kept[0]) if len(kept) else end
        if first:  # room of discarded records at the front is nobody's
            self._release(self._position + first * self._stride)
            kept = kept - first
        self._examined = end - first
        contiguous = not len(kept) or int(kept[-1]) == len(kept) - 1
        self._kept = None if contiguous else kept
        self._batch = self._view(self._position, len(kept) if contiguous else self._examined)
        if not contiguous:
            self._batch = self._batch[kept]

    def consume(self, count: int) -> None:
        """Release the next `count` records of the last pending(); its views of them are void from now on."""
        taken = self._taken + count
        if not self._taken <= taken <= len(self._batch):
            raise ValueError(f"{count} records to release, {len(self._batch) - self._taken} pending")
        start = self._slot(self._taken)
        self._taken = taken
        self._release(self._position + (self._slot(taken) - start) * self._stride)

    def _slot(self, index: int) -> int:
        """Return the slot of a record of the batch, counted from the batch's first; past the last: the batch's end."""
        if index == len(self._batch):
            return self._examined
        return index if self._kept is None else int(self._kept[index])

    def skip_all(self) -> int:
        """Release all that is complete now, unread; return how many records that was.

        Where the records cannot be found, because the stored position is impossible or a size is wrong, reading starts
        anew at the producer's position, and the answer is the most that there can have been.
        """
        self._forget()
        skipped, unread = 0, self._size // self._stride
        end = int(self._producer[0])
        try:
            unread = self._unread()
            while unread and not self.stalled:
                batch = self.pending(unread)
                skipped += len(batch)
                self.consume(len(batch))
                unread = (end - self._position) // self._stride
        except ProbeError:
            self._release(end)
            skipped += unread
        self._forget()
        return skipped

    def close(self) -> None:
        """Give the mapping up. Arrays from pending() keep it alive as long as they live. A second call does nothing."""
        if self._closed:
            return
        self._closed = True
        del self._consumer, self._producer, self._consumer_page, self._pages, self._batch

    def _forget(self) -> None:
        self.stalled = False
        self._batch = self._view(0, 0)
        self._kept = None
        self._examined = 0
        self._taken = 0

    def _release(self, position: int) -> None:
        fence()
        self._position = position
        self._consumer[0] = position

    def _offset(self, position: int) -> int:
        return mmap.PAGESIZE + position % self._size

    def _sizes(self, count: int) -> npt.NDArray[np.uint32]:
        return np.ndarray((count,), np.uint32, self._pages, self._offset(self._position), (self._stride,))

    def _view(self, position: int, count: int) -> npt.NDArray[Any]:
        offset = self._offset(position) + _HEADER_BYTES
        return np.ndarray((count,), self._dtype, self._pages, offset, (self._stride,))

    def _broken(self, why: str) -> ProbeError:
        return ProbeError(f"the ring buffer at {self._position}: {why}", "build the objects anew: make bpf")
