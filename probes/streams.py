"""The reader's side of every stream whose records are kept as they are: arrays in, arrays out.

No order between streams is kept here: who needs one has the instants in the records.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Final, Self

import numpy.typing as npt

from probes import btf
from probes.channels import open_source

if TYPE_CHECKING:
    import numpy as np

    from probes.probe import Channel

SLICE: Final = 16384
"""Records that are handed over at a time."""
_SLICES: Final = 64


class Streams:
    """Maps the streams and drains them. A context manager. `clock` is CLOCK_MONOTONIC in ns.

    Must be made while the process may still map the rings.
    """

    def __init__(self, channels: Iterable[Channel], clock: Callable[[], int] = time.monotonic_ns) -> None:
        given = tuple(channels)
        self.dtypes: dict[str, np.dtype[Any]] = {
            channel.name: btf.dtype_of(channel.object_path, channel.record) for channel in given
        }
        """The structured type of each stream's records."""
        with ExitStack() as opening:
            self._sources = {channel.name: open_source(channel, clock, opening) for channel in given}
            self._stack = opening.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def skip_all(self) -> dict[str, int]:
        """Drop everything that is waiting, and return how many records that was, by stream."""
        return {name: source.skip_all() for name, source in self._sources.items()}

    def drain(self, take: Callable[[str, npt.NDArray[Any]], None]) -> None:
        """Hand over what is complete, stream by stream, oldest first; `take` must copy what it keeps.

        What is made meanwhile may be left for the next call, which ends however fast records come.
        """
        for name, source in self._sources.items():
            for _ in range(_SLICES):
                batch = source.pending(SLICE)
                count = len(batch)
                if count:
                    take(name, batch)
                    source.consume(count)
                if count < SLICE:
                    break
