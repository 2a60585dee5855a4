"""Where the two processes part: what the attacher leaves to a reader, and the fork.

The reader's own modules (numpy, uvicorn, the decoders) are imported after the fork, so the attacher stays small.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import signal
import socket
import sys
import traceback
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from probes.errors import FootlightError

if TYPE_CHECKING:
    from exporter.config import Config
    from exporter.fronts import Front
    from probes.probe import Channel, StatsMap
    from probes.probe_points import PointsMap

CRASHED: Final = 70
"""Exit status of a reader that died of its own fault (EX_SOFTWARE); the attacher starts another one."""
STATUS_PACKET: Final = b"S"
CONFIG_PACKET: Final = b"C"
"""The first byte of what the attacher sends: a report, or another configuration."""
_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3


@dataclass(frozen=True, slots=True)
class Inheritance:
    """What the attacher leaves to a reader: the streams and counters of every probe that is up, and the rest.

    `recordings` is the open folder of recordings, where one is configured. `resumes` is set when an earlier reader died
    over the same rings. `room` is for how many services the probes count. `points` are the slots of the probe points. A
    byte written to `reloads` asks the attacher to read the configuration again; None where it has no file. `health` is
    the open folder where what is normal is kept, where one is configured.
    """

    config: Config
    front: Front
    channels: tuple[Channel, ...]
    stats: tuple[StatsMap, ...]
    status_socket: socket.socket
    listener: socket.socket | None
    attacher: int
    recordings: int | None
    resumes: bool
    room: int
    reloads: int | None
    points: PointsMap | None
    health: int | None = None


def fork_reader(given: Inheritance) -> int:
    """Start a reader; returns its process id. In the child it never returns."""
    # Else the next collection of either writes to every object of both, and each gets pages of its own: 3 MiB.
    gc.collect()
    gc.freeze()
    pid = os.fork()
    if pid:
        return pid
    code = CRASHED
    try:
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        code = _read(given)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        # Not sys.exit: the attacher's objects would detach its probes as they are torn down here.
        os._exit(code)


def _read(given: Inheritance) -> int:
    # Else numpy's linear algebra, which nobody here uses, starts a thread for each CPU. Such a thread keeps what is
    # each thread's own: its bounding set, and the right to gain privileges.
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    _give_memory_back()
    try:
        from exporter import reader  # noqa: PLC0415 - only in the child

        reader.main(given)
    except FootlightError as error:
        sys.stderr.write(f"error: {error.what}\n  try: {error.next_step}\n")
        return error.exit_code
    except Exception:
        traceback.print_exc()
        return CRASHED
    return 0


def _give_memory_back() -> None:
    """Let glibc return to the kernel what is freed: blocks of 256 KiB and more, and what exceeds 128 KiB on its heap.

    Else it has learned from the attacher's BTF, and learns from numpy's short-lived arrays, to keep as much as 64 MiB:
    with 1,000 streams 10 MB and more that nobody uses.
    """
    with contextlib.suppress(AttributeError):  # another C library, which does not learn
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, 256 << 10)
        mallopt(_M_TRIM_THRESHOLD, 128 << 10)
