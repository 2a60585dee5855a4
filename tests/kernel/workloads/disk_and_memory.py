"""Reads, writes and fills memory as it is told, one order at a time: the workload of the block and memory probes.

A line of standard input is an order, its words separated by spaces; each is answered with a line: the instants at which
it began and ended (CLOCK_MONOTONIC, ns). Before the first order it says its process id. Standard library only.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import platform
import struct
import sys
import threading
import time

_BLKDISCARD = 0x1277
_PAGE = mmap.PAGESIZE
_SETUP, _DESTROY, _GETEVENTS, _SUBMIT = (206, 207, 208, 209) if platform.machine() == "x86_64" else (0, 1, 4, 2)
_IOCB = struct.Struct("=QIIHhIQQqQII")
"""struct iocb of linux/aio_abi.h, on a little-endian machine."""
_EVENT_BYTES = 32


def read(path: str, count: int, size: int) -> None:
    """`count` direct reads of `size` bytes, one after the other from the beginning of the file."""
    memory = mmap.mmap(-1, size)
    file = os.open(path, os.O_RDONLY | os.O_DIRECT)
    for number in range(count):
        assert os.preadv(file, [memory], number * size) == size
    os.close(file)


def read_at_once(path: str, count: int, size: int) -> None:
    """The same with one io_submit(2) of all of them, so that the kernel may merge neighbours into one request."""
    libc = ctypes.CDLL(None, use_errno=True)
    memory = mmap.mmap(-1, count * size)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    file = os.open(path, os.O_RDONLY | os.O_DIRECT)
    blocks = [
        ctypes.create_string_buffer(
            _IOCB.pack(number, 0, 0, 0, 0, file, address + number * size, size, number * size, 0, 0, 0), _IOCB.size
        )
        for number in range(count)
    ]
    pointers = (ctypes.c_void_p * count)(*map(ctypes.addressof, blocks))
    context = ctypes.c_ulong()
    assert libc.syscall(_SETUP, count, ctypes.byref(context)) == 0
    assert libc.syscall(_SUBMIT, context, ctypes.c_long(count), pointers) == count
    events = ctypes.create_string_buffer(count * _EVENT_BYTES)
    assert libc.syscall(_GETEVENTS, context, ctypes.c_long(count), ctypes.c_long(count), events, None) == count
    assert libc.syscall(_DESTROY, context) == 0
    os.close(file)


def write(path: str, count: int, size: int) -> None:
    """The same with writes."""
    memory = mmap.mmap(-1, size)
    file = os.open(path, os.O_WRONLY | os.O_DIRECT)
    for number in range(count):
        assert os.pwritev(file, [memory], number * size) == size
    os.close(file)


def flush(path: str, count: int) -> None:
    """`count` calls of fsync, with nothing to write back."""
    file = os.open(path, os.O_WRONLY)
    for _ in range(count):
        os.fsync(file)
    os.close(file)


def discard(path: str, count: int, size: int) -> None:
    """`count` discards of `size` bytes of a block device."""
    file = os.open(path, os.O_WRONLY)
    for number in range(count):
        fcntl.ioctl(file, _BLKDISCARD, struct.pack("=QQ", number * size, size))
    os.close(file)


def scan(path: str, count: int) -> None:
    """Read a whole file through the page cache, `count` times."""
    with open(path, "rb", buffering=0) as file:
        for _ in range(count):
            file.seek(0)
            while file.read(1 << 20):
                pass


def scan_together(path: str, threads: int) -> None:
    """`scan` in several threads at once."""
    scanners = [threading.Thread(target=scan, args=(path, 2)) for _ in range(threads)]
    for scanner in scanners:
        scanner.start()
    for scanner in scanners:
        scanner.join()


def eat(threads: int, size: int) -> None:
    """Touch `size` bytes of anonymous memory in each of `threads` threads at once."""
    together = threading.Barrier(threads)

    def touch() -> None:
        memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        together.wait()
        for offset in range(0, size, _PAGE):
            memory[offset] = 1

    eaters = [threading.Thread(target=touch) for _ in range(threads)]
    for eater in eaters:
        eater.start()
    for eater in eaters:
        eater.join()


_ORDERS = {each.__name__: each for each in (read, read_at_once, write, flush, discard, scan, scan_together, eat)}


def main() -> None:
    """Obey until standard input ends."""
    print(os.getpid(), flush=True)
    for line in sys.stdin:
        order, *words = line.split()
        arguments = [int(word) if word.isdigit() else word for word in words]
        began = time.monotonic_ns()
        _ORDERS[order](*arguments)  # type: ignore[operator]
        print(began, time.monotonic_ns(), flush=True)


if __name__ == "__main__":
    main()
