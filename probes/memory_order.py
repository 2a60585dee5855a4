"""Orders this process's loads and stores against a kernel that writes the same memory."""

from __future__ import annotations

import platform
import threading

# x86 keeps loads in order among themselves, and stores after earlier loads: a reader of a ring needs no more.
_STRONGLY_ORDERED = platform.machine() in {"x86_64", "i686", "s390x"}
_lock = threading.Lock()


def fence() -> None:
    """Let no load or store after this be seen before a load that came earlier.

    Python has no fence of its own. On weakly ordered machines (arm64) an uncontended lock is taken and let go, twice:
    the store-release of the first and the load-acquire of the second stay in order, and what surrounds them does too.
    """
    if _STRONGLY_ORDERED:
        return
    for _ in range(2):
        _lock.acquire()
        _lock.release()
