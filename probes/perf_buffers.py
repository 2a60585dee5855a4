"""Opens the kernel's side of per-CPU perf buffers: the attacher's part, without numpy."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import platform
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from probes.errors import HostError
from probes.libbpf import Map

_PERF_TYPE_SOFTWARE: Final = 1
_PERF_COUNT_SW_BPF_OUTPUT: Final = 10
_PERF_SAMPLE_RAW: Final = 1 << 10
_WATERMARK: Final = 1 << 14
_PERF_FLAG_FD_CLOEXEC: Final = 8
_ATTR_BYTES: Final = 112  # PERF_ATTR_SIZE_VER5, Linux 4.1
_NUMBERS: Final = {"x86_64": 298, "aarch64": 241, "riscv64": 241}


def online_cpus(path: Path = Path("/sys/devices/system/cpu/online")) -> list[int]:
    """Return the numbers of the CPUs that are online, from a list such as `0-3,8`."""
    cpus: list[int] = []
    for part in path.read_text().strip().split(","):
        first, _, last = part.partition("-")
        cpus.extend(range(int(first), int(last or first) + 1))
    return cpus


def open_perf_buffers(perf_map: Map, pages: int) -> list[int]:
    """Open one BPF output event per online CPU, put it into the PERF_EVENT_ARRAY; return the descriptors.

    Until a reader maps a buffer of `pages` pages for it (PerfSource), each record is refused, which the BPF program
    sees. A CPU that comes online later has none: refused as well. A descriptor is readable when its buffer is half
    full. The caller closes them. Raises HostError.
    """
    descriptors: list[int] = []
    try:
        for cpu in online_cpus():
            descriptors.append(_open(cpu, pages * mmap.PAGESIZE // 2))
            perf_map.update(struct.pack("=I", cpu), struct.pack("=I", descriptors[-1]))
    except BaseException:
        for descriptor in descriptors:
            os.close(descriptor)
        raise
    return descriptors


def keep_perf_buffers(descriptors: Iterable[int], pages: int) -> list[mmap.mmap]:
    """Map each buffer, without the right to look into it, until the result is closed.

    The kernel frees a buffer with its last mapping: a reader that dies would take along what it had not read, and
    nobody could count it. `pages` as in open_perf_buffers(). A forked child does not inherit the mappings. Raises
    HostError.
    """
    size = (1 + pages) * mmap.PAGESIZE
    libc = ctypes.CDLL(None, use_errno=True)
    kept = []
    for descriptor in descriptors:
        try:
            # Writable at first: the kernel takes a buffer that nobody can acknowledge for one to be overwritten.
            mapping = mmap.mmap(descriptor, size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
            address = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
            if libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(size), 0) != 0:
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        except OSError as error:
            what = f"cannot map a perf buffer of {pages} pages: {error.strerror}"
            raise HostError(what, "use fewer pages, or raise kernel.perf_event_mlock_kb") from error
        kept.append(mapping)
    return kept


def _open(cpu: int, wakeup_bytes: int) -> int:
    number = _NUMBERS.get(platform.machine())
    if number is None:
        raise HostError(f"perf_event_open's number on {platform.machine()} is not known", "use --transport ring")
    # struct perf_event_attr: type, size, config, sample_period, sample_type, read_format, flags, wakeup_watermark
    attributes = struct.pack(
        "=IIQQQQQI",
        _PERF_TYPE_SOFTWARE,
        _ATTR_BYTES,
        _PERF_COUNT_SW_BPF_OUTPUT,
        1,
        _PERF_SAMPLE_RAW,
        0,
        _WATERMARK,
        wakeup_bytes,
    ).ljust(_ATTR_BYTES, b"\0")
    syscall = ctypes.CDLL(None, use_errno=True).syscall
    syscall.restype = ctypes.c_long
    arguments = (ctypes.c_int(-1), ctypes.c_int(cpu), ctypes.c_int(-1), ctypes.c_ulong(_PERF_FLAG_FD_CLOEXEC))
    descriptor = int(syscall(ctypes.c_long(number), attributes, *arguments))
    if descriptor < 0:
        error = ctypes.get_errno()
        what = f"cannot open a perf buffer on CPU {cpu}: {os.strerror(error)}"
        refused = error in {errno.EPERM, errno.EACCES}
        raise HostError(what, "give CAP_PERFMON, or CAP_SYS_ADMIN" if refused else "use --transport ring")
    return descriptor
