"""Calls the functions of a library as an engine does: `lookups.py LIBRARY`, then one order a line, as JSON.

An order is [function, arguments, calls, threads, children]: every thread of the process and of each of the children
makes that many calls. An argument is a number, or ["text", TEXT], ["bytes", HEX] (a zero byte follows), ["endless"]
(none does), ["unmapped"], ["edge"] (text up to the end of its last page). The answer, once all is done, is one line.
"""

import ctypes
import json
import mmap
import os
import sys
import threading
from typing import Any

library = ctypes.CDLL(sys.argv[1])
libc = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
kept = []


def pages(count: int) -> int:
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    return libc.mmap(None, count * mmap.PAGESIZE, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)


def argument(given: Any) -> int:  # noqa: ANN401 - of an order
    if isinstance(given, int):
        return given
    kind, *rest = given
    if kind in {"unmapped", "edge"}:
        start = pages(2)
        ctypes.memset(start, ord("e"), mmap.PAGESIZE)
        libc.munmap(start + mmap.PAGESIZE, mmap.PAGESIZE)
        return start + mmap.PAGESIZE + (8 if kind == "unmapped" else -8)
    raw = b"x" * 4096 if kind == "endless" else rest[0].encode() if kind == "text" else bytes.fromhex(rest[0])
    kept.append(ctypes.create_string_buffer(raw))
    return ctypes.addressof(kept[-1])


def obey(name: str, arguments: list[Any], calls: int, threads: int, children: int) -> None:
    function = getattr(library, name)
    function.restype = None
    function.argtypes = [ctypes.c_uint64] * len(arguments)
    values = [argument(each) for each in arguments]

    def call():
        for _ in range(calls):
            function(*values)

    def work():
        running = [threading.Thread(target=call) for _ in range(threads)]
        for thread in running:
            thread.start()
        for thread in running:
            thread.join()

    pids = []
    for _ in range(children):
        pid = os.fork()
        if not pid:
            work()
            os._exit(0)
        pids.append(pid)
    work()
    for pid in pids:
        os.waitpid(pid, 0)


print(os.getpid(), flush=True)
for line in sys.stdin:
    obey(*json.loads(line))
    print("done", flush=True)
