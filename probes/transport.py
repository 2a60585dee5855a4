"""What a source of records is, whichever way the records leave the kernel."""

from __future__ import annotations

from typing import Any, Protocol

import numpy.typing as npt

from probes.perf_source import PerfSource
from probes.ring_source import RingSource

__all__ = ["PerfSource", "RecordSource", "RingSource"]


class RecordSource(Protocol):
    """Fixed-size records, each exactly once, in order, until close(). For one thread; nothing here blocks.

    A reader's turn: `batch = source.pending(limit)`, use the batch, `source.consume(len(batch))`, again while the batch
    was a full one. (While it was not empty would be wrong: a busy host makes a record in the meantime, for ever.) What
    was not consumed when a reader dies is still there for the next one, which reads it or calls skip_all().
    """

    @property
    def stalled(self) -> bool:
        """Whether the last pending() stopped at a record that is still being written. Try again soon."""

    @property
    def lost(self) -> int:
        """Records that the transport itself reported lost so far; the BPF program counts what it could not send."""

    def pending(self, limit: int | None = None) -> npt.NDArray[Any]:
        """Return the records that are complete now, oldest first, at most `limit` of them, all without one.

        A structured array, (n,), of the source's dtype; read-only, or a copy. It stays valid until consume() releases
        its records, or the next pending(), which returns what was not released again.
        """

    def consume(self, count: int) -> None:
        """Release the first `count` of the last pending() that are not released yet. Raises ValueError for more."""

    def skip_all(self) -> int:
        """Drop everything unread; return how many records that was. Also the way out after a ProbeError."""

    def close(self) -> None:
        """Unmap. The source is of no use afterwards."""
