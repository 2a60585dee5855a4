"""Waits on stand-ins of GPU devices, for tests/kernel/test_gpu_waits.py: `python gpu_waits.py NAME`.

A terminal (pty) stands for a GPU's device file, and a process of its own, which nobody watches, for the GPU: it is told
through a pipe that a wait begins, and ends it some milliseconds later. It runs before anybody is followed.

Says `ready`, waits for a line, does what NAME says, says one line of JSON about it, and ends when its input does. The
JSON has `tid`, `begin_ns` and `end_ns` of the thread that waited, `waits`: from when to when each wait was, and `left`,
see `waits.lives`.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import resource
import select
import socket
import struct
import sys
import termios
import threading
import time
import tty
from collections.abc import Callable

WAITS = 53
WAIT_S = 0.004
FILL_BYTES = 100_000
"""More than a terminal holds."""
READY, FULL = b"r", b"f"
_REPORT = struct.Struct("=q")
_SETTLE_S = 0.02

libc = ctypes.CDLL(None, use_errno=True)


class PollDescriptor(ctypes.Structure):
    _fields_ = [("fd", ctypes.c_int), ("events", ctypes.c_short), ("revents", ctypes.c_short)]


class TimeSpec(ctypes.Structure):
    _fields_ = [("seconds", ctypes.c_long), ("ns", ctypes.c_long)]


def terminal() -> tuple[int, int]:
    """Both ends; bytes pass as they are."""
    master, slave = os.openpty()
    tty.setraw(slave)
    return master, slave


MASTER, DEVICE = terminal()
_, OTHER_DEVICE = terminal()


def number_of(descriptor: int) -> int:
    device = os.fstat(descriptor).st_rdev
    return os.major(device) << 20 | os.minor(device)


# ---- the GPU's side ----


class Gpu:
    """The process that ends waits."""

    def __init__(self) -> None:
        orders, self._orders = os.pipe()
        self._reports, reports = os.pipe()
        if not os.fork():
            os.close(self._orders)
            self._serve(orders, reports)
            os._exit(0)
        os.close(orders)
        os.close(reports)

    def begin(self) -> None:
        """Let it end a wait for bytes soon."""
        os.write(self._orders, READY)

    def fill(self) -> None:
        """Have the terminal's lock for writers held until soon; returns when it is."""
        os.write(self._orders, FULL)
        self.ended_ns()

    def ended_ns(self) -> int:
        """When it ended the wait, CLOCK_MONOTONIC."""
        (at_ns,) = _REPORT.unpack(os.read(self._reports, _REPORT.size))
        return int(at_ns)

    @staticmethod
    def _serve(orders: int, reports: int) -> None:
        while order := os.read(orders, 1):
            if order == FULL:
                name = os.ttyname(DEVICE)
                writer = threading.Thread(target=fill_terminal, args=(name,))
                writer.start()
                time.sleep(_SETTLE_S)
                os.write(reports, _REPORT.pack(time.monotonic_ns()))
            time.sleep(WAIT_S)
            at_ns = time.monotonic_ns()
            if order == FULL:
                taken = 0
                while taken < FILL_BYTES:
                    taken += len(os.read(MASTER, 65536))
                writer.join()
            else:
                os.write(MASTER, b"x")
            os.write(reports, _REPORT.pack(at_ns))


def fill_terminal(name: str) -> None:
    """Write more than there is room for, and so hold the lock of those who write."""
    descriptor = os.open(name, os.O_RDWR | os.O_NOCTTY)
    os.write(descriptor, b"x" * FILL_BYTES)
    os.close(descriptor)


GPU = Gpu()


# ---- waits ----


def take() -> None:
    """The byte by which the GPU ended the wait."""
    GPU.ended_ns()
    os.read(DEVICE, 1)


def nothing() -> None:
    pass


def many(
    wait: Callable[[], object], begin: Callable[[], object] = GPU.begin, end: Callable[[], object] = take
) -> dict[str, object]:
    """Wait `WAITS` times on a thread of its own, each one ended by the GPU where it is told to."""
    facts: dict[str, object] = {"device": number_of(DEVICE), "other": number_of(OTHER_DEVICE)}

    def work() -> None:
        spans: list[tuple[int, int]] = []
        tid = threading.get_native_id()
        facts["tid"] = tid
        facts["begin_ns"] = time.monotonic_ns()
        for _ in range(WAITS):
            begin()
            begin_ns = time.monotonic_ns()
            wait()
            spans.append((begin_ns, time.monotonic_ns()))
            end()
        facts["end_ns"] = time.monotonic_ns()
        facts["left"] = {tid: (resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw, time.monotonic_ns())}
        facts["waits"] = spans

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return facts


def polls(*descriptors: int, events: int = select.POLLIN, milliseconds: int = -1) -> Callable[[], None]:
    """poll() on these descriptors, once."""
    polled = (PollDescriptor * len(descriptors))(*((descriptor, events, 0) for descriptor in descriptors))

    def wait() -> None:
        libc.poll(polled, ctypes.c_ulong(len(descriptors)), milliseconds)

    return wait


def ppolls(descriptor: int, seconds: int | None) -> Callable[[], None]:
    polled = (PollDescriptor * 1)((descriptor, select.POLLIN, 0))

    def wait() -> None:
        timeout = None if seconds is None else ctypes.byref(TimeSpec(seconds, 0))
        libc.ppoll(polled, ctypes.c_ulong(1), timeout, None)

    return wait


def poll() -> dict[str, object]:
    return many(polls(DEVICE))


def poll_with_timeout() -> dict[str, object]:
    """A timeout that does not pass."""
    return many(polls(DEVICE, milliseconds=10_000))


def ppoll() -> dict[str, object]:
    return many(ppolls(DEVICE, None))


def ppoll_with_timeout() -> dict[str, object]:
    return many(ppolls(DEVICE, 10))


def poll_with_eventfd() -> dict[str, object]:
    return many(polls(os.eventfd(0), -1, DEVICE))


def poll_two() -> dict[str, object]:
    """Both are GPUs where the test says so."""
    return many(polls(DEVICE, OTHER_DEVICE))


def poll_eight() -> dict[str, object]:
    return many(polls(*[DEVICE] * 8))


def poll_nine() -> dict[str, object]:
    """One more than is looked at."""
    return many(polls(*[DEVICE] * 9))


def poll_with_socket() -> dict[str, object]:
    here, _there = socket.socketpair()
    return many(polls(DEVICE, here.fileno()))


def poll_with_pipe() -> dict[str, object]:
    read_end, _ = os.pipe()
    return many(polls(read_end, DEVICE))


def poll_with_epoll() -> dict[str, object]:
    """It has an anonymous inode, as an eventfd has."""
    poller = select.epoll()
    return many(polls(poller.fileno(), DEVICE))


def poll_timer() -> dict[str, object]:
    """The timeout ends each wait."""
    return many(polls(DEVICE, milliseconds=3), nothing, nothing)


def ppoll_timer() -> dict[str, object]:
    polled = (PollDescriptor * 1)((DEVICE, select.POLLIN, 0))

    def wait() -> None:
        libc.ppoll(polled, ctypes.c_ulong(1), ctypes.byref(TimeSpec(0, 3_000_000)), None)

    return many(wait, nothing, nothing)


def poll_nudged() -> dict[str, object]:
    """Another thread of this process ends each wait, by the eventfd beside the device."""
    event = os.eventfd(0)
    wait = polls(event, DEVICE)

    def nudge() -> None:
        time.sleep(0.002)
        os.eventfd_write(event, 1)

    def nudged() -> None:
        threading.Thread(target=nudge).start()
        wait()
        os.eventfd_read(event)

    return many(nudged, nothing, nothing)


def epoll() -> dict[str, object]:
    poller = select.epoll()
    poller.register(DEVICE, select.EPOLLIN)
    return many(poller.poll)


def selects() -> dict[str, object]:
    return many(lambda: select.select([DEVICE], [], []))


def read() -> dict[str, object]:
    return many(lambda: os.read(DEVICE, 1), end=GPU.ended_ns)


def ioctl() -> dict[str, object]:
    """TCSETSW waits for the lock of those who write, and a stranger has it."""
    settings = ctypes.create_string_buffer(256)
    libc.ioctl(DEVICE, termios.TCGETS, settings)

    def wait() -> None:
        libc.ioctl(DEVICE, termios.TCSETSW, settings)

    return many(wait, GPU.fill, GPU.ended_ns)


def loop_devices() -> dict[str, object]:
    """ioctl on another device that makes and removes block devices, for which it waits deep inside the kernel."""
    control = os.open("/dev/loop-control", os.O_RDWR)
    facts: dict[str, object] = {"device": number_of(control), "tid": os.getpid(), "begin_ns": time.monotonic_ns()}
    for _ in range(5):
        made = fcntl.ioctl(control, 0x4C80, 0x3FFF)  # LOOP_CTL_ADD
        fcntl.ioctl(control, 0x4C81, made)  # LOOP_CTL_REMOVE
    facts["end_ns"] = time.monotonic_ns()
    return facts


def main() -> None:
    print("ready", flush=True)
    sys.stdin.readline()
    print(json.dumps(globals()[sys.argv[1]]()), flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
