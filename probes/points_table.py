"""What probe points counted in the kernel, read like memory: no system call, no privilege.

Programs add to the slots while they are read, so two numbers of one reading may be one look-up apart; each single
number is whole.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from probes import btf

if TYPE_CHECKING:
    from probes.probe_points import PointsMap


@dataclass(frozen=True, slots=True)
class PointSlot:
    """Look-ups of one model of one service at one point, since the probe was attached.

    `service` and `point` are numbers of the configuration, from 0. `model` is the name as the engine has it, at most
    127 bytes; empty where the point tells none.
    """

    service: int
    point: int
    model: bytes
    calls: int
    hit_tokens: int
    looked_up_tokens: int


class PointsTable:
    """The slots of the probe. Make it while the process may still map the map; `read` needs nothing."""

    def __init__(self, given: PointsMap) -> None:
        dtype = btf.dtype_of(given.object_path, "point_slot")
        size = given.slots * dtype.itemsize
        self._memory = mmap.mmap(given.fd, -(-size // mmap.PAGESIZE) * mmap.PAGESIZE, prot=mmap.PROT_READ)
        self._slots = np.frombuffer(self._memory, dtype=dtype, count=given.slots)

    def read(self) -> list[PointSlot]:
        """Every slot that has counted something, in the order in which they were taken."""
        return [
            PointSlot(service, point, model, calls, hit_tokens, looked_up_tokens)
            for model, service, point, calls, hit_tokens, looked_up_tokens in self._slots[
                np.flatnonzero(self._slots["calls"])
            ].tolist()
        ]
