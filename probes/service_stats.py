"""What a probe counts in the kernel for each service, read like memory: no system call, no privilege.

The map is an array of one C structure for each CPU and service (bpf/service_stats.bpf.h). Programs add to it while it
is read, so two numbers of one reading may be one event apart; each single number is whole.
"""

from __future__ import annotations

import mmap
from typing import TYPE_CHECKING

import numpy as np

from probes import btf

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from probes.probe import StatsMap


class ServiceStats:
    """The counters of one probe. Make it while the process may still map the map; `totals` needs nothing."""

    def __init__(self, given: StatsMap) -> None:
        self.probe = given.probe
        self._dtype = btf.dtype_of(given.object_path, given.record)
        self._shape = (given.cpus, given.services, self._dtype.itemsize // 8)
        size = given.cpus * given.services * self._dtype.itemsize
        self._memory = mmap.mmap(given.fd, -(-size // mmap.PAGESIZE) * mmap.PAGESIZE, prot=mmap.PROT_READ)
        self._unmeasured = frozenset(given.unmeasured)
        self._words = np.frombuffer(self._memory, dtype=np.uint64, count=size // 8).reshape(self._shape)

    def totals(self) -> NDArray[np.void]:
        """The counters by service, summed over the CPUs: a structured array (services,) of the C structure.

        Members that this kernel does not measure are left out.
        """
        summed: NDArray[np.void] = self._words.sum(axis=0, dtype=np.uint64).view(self._dtype)[:, 0]
        if not self._unmeasured:
            return summed
        return summed[[name for name in self._dtype.names or () if name not in self._unmeasured]]
