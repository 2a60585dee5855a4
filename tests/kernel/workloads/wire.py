"""Two network namespaces with a wire between them that delays and drops the packets that a test says.

Both ends are TUN devices, and a thread carries each IP packet from one to the other: real TCP on both sides, without
netem, which not every kernel has. IPv4 only. Needs root. Everything is gone when the wire is closed.
"""

from __future__ import annotations

import ctypes
import fcntl
import heapq
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Final, Self, TypeVar

LEFT: Final = "10.213.7.1"
RIGHT: Final = "10.213.7.2"

_CLONE_NEWNET = 0x40000000
_TUNSETIFF = 0x400454CA
_IFF_TUN, _IFF_NO_PI = 0x0001, 0x1000
_SIOCSIFADDR, _SIOCSIFNETMASK, _SIOCGIFFLAGS, _SIOCSIFFLAGS = 0x8916, 0x891C, 0x8913, 0x8914
_IFF_UP = 1
_NAME = b"wire"
_libc = ctypes.CDLL(None, use_errno=True)
_Result = TypeVar("_Result")


def payload_of(packet: bytes) -> tuple[int, int]:
    """The TCP sequence number and the bytes of payload of an IPv4 packet; (0, 0) for anything else."""
    header = (packet[0] & 0xF) * 4
    if packet[0] >> 4 != 4 or packet[9] != socket.IPPROTO_TCP:
        return 0, 0
    (sequence,) = struct.unpack_from("!I", packet, header + 4)
    return sequence, struct.unpack_from("!H", packet, 2)[0] - header - (packet[header + 12] >> 4) * 4


class Wire:
    """A context manager. `delay_s` is each packet's time on the way; `lose` says of a packet whether it gets lost."""

    def __init__(self, delay_s: float = 0.0) -> None:
        self.delay_s = delay_s
        self.lose: Callable[[bytes], bool] = lambda packet: False
        self.left_netns = self.right_netns = -1
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as opening:
            self.left_netns, left = _in_new_thread(lambda: _new_end(LEFT, opening))
            self.right_netns, right = _in_new_thread(lambda: _new_end(RIGHT, opening))
            stop, stopped = os.pipe()
            opening.callback(os.close, stop)
            carrier = threading.Thread(target=self._carry, args=(left, right, stop), name="wire")
            carrier.start()
            opening.callback(carrier.join)
            opening.callback(os.close, stopped)
            self._stack = opening.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def right(self, action: Callable[[], _Result]) -> _Result:
        """Do something in the right namespace; sockets that it makes stay there."""

        def inside() -> _Result:
            _check(_libc.setns(self.right_netns, _CLONE_NEWNET), "setns")
            return action()

        return _in_new_thread(inside)

    def _carry(self, left: int, right: int, stop: int) -> None:
        under_way: list[tuple[float, int, int, bytes]] = []
        count = 0
        while True:
            wait = max(0.0, under_way[0][0] - time.monotonic()) if under_way else None
            ready, _, _ = select.select([left, right, stop], [], [], wait)
            if stop in ready:
                return
            for end in ready:
                packet = os.read(end, 65536)
                if not self.lose(packet):
                    count += 1  # keeps the order of packets of one instant
                    due = time.monotonic() + self.delay_s
                    heapq.heappush(under_way, (due, count, right if end == left else left, packet))
            while under_way and under_way[0][0] <= time.monotonic():
                _, _, end, packet = heapq.heappop(under_way)
                os.write(end, packet)


def _in_new_thread(action: Callable[[], _Result]) -> _Result:
    """Namespaces belong to threads: what the action enters is left when it ends."""
    results: list[_Result] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(action())
        except BaseException as error:  # handed to the caller
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    (result,) = results
    return result


def _new_end(address: str, stack: ExitStack) -> tuple[int, int]:
    """A new namespace, and a TUN device in it; the descriptors of both."""
    _check(_libc.unshare(_CLONE_NEWNET), "unshare")
    netns = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    stack.callback(os.close, netns)
    device = os.open("/dev/net/tun", os.O_RDWR)
    stack.callback(os.close, device)
    fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH22x", _NAME, _IFF_TUN | _IFF_NO_PI))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        for request, value in ((_SIOCSIFADDR, address), (_SIOCSIFNETMASK, "255.255.255.252")):
            data = struct.pack("16sHH4s16x", _NAME, socket.AF_INET, 0, socket.inet_aton(value))
            fcntl.ioctl(control, request, data)
        flags = fcntl.ioctl(control, _SIOCGIFFLAGS, struct.pack("16s24x", _NAME))
        (now,) = struct.unpack_from("H", flags, 16)
        fcntl.ioctl(control, _SIOCSIFFLAGS, struct.pack("16sH22x", _NAME, now | _IFF_UP))
    return netns, device


def _check(result: int, what: str) -> None:
    if result:
        raise OSError(ctypes.get_errno(), what)
