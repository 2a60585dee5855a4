"""A process that makes the socket calls that it is told to: a command in JSON on each line of standard input.

It answers each one with a line of JSON: `{"result": ...}`, or `{"errno": N}` for a call that failed. With an argument
it first enters the network namespace of that descriptor. It dies with its parent. The commands are the methods of
`Sockets`. Run with the standard library only.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import socket
import struct
import sys
import threading
import time
from typing import Any

_PR_SET_PDEATHSIG = 1
_CLONE_NEWNET = 0x40000000
_TOTAL_RETRANSMITS_AT = 100  # in struct tcp_info
_libc = ctypes.CDLL(None, use_errno=True)


class Sockets:
    """The commands. Sockets have names that the commander chooses."""

    def __init__(self) -> None:
        self._sockets: dict[str, socket.socket] = {}

    def pids(self) -> list[int]:
        """The numbers of the process and of the thread that does all this."""
        return [os.getpid(), threading.get_native_id()]

    def listen(self, name: str, host: str) -> int:
        """Listen; return the port."""
        listener = socket.create_server((host, 0), family=_family(host), backlog=128)
        self._sockets[name] = listener
        return int(listener.getsockname()[1])

    def accept(self, listener: str, name: str) -> None:
        self._sockets[name], _ = self._sockets[listener].accept()

    def connect(self, name: str, host: str, port: int) -> list[int]:
        """Connect; return the local port, and the instants before and after."""
        made = self._sockets[name] = socket.socket(_family(host), socket.SOCK_STREAM)
        before = time.monotonic_ns()
        made.connect((host, port))
        return [int(made.getsockname()[1]), before, time.monotonic_ns()]

    def connect_all(self, count: int, host: str, port: int) -> list[list[int]]:
        """`connect` as often as that, each connection closed before the next one; see there."""
        answers = []
        for _ in range(count):
            answers.append(self.connect("", host, port))
            self.close("")
        return answers

    def send(self, name: str, size: int) -> int:
        return self._sockets[name].send(bytes(size))

    def send_all(self, name: str, size: int) -> None:
        self._sockets[name].sendall(bytes(size))

    def set_blocking(self, name: str, blocking: bool) -> None:
        self._sockets[name].setblocking(blocking)

    def fill(self, name: str, size: int) -> int:
        """Send pieces of `size` bytes, without waiting, until one finds no room at all; return the bytes that went."""
        went = 0
        while True:
            try:
                went += self._sockets[name].send(bytes(size), socket.MSG_DONTWAIT)
            except BlockingIOError:
                return went

    def until_writable(self, name: str) -> None:
        select.select([], [self._sockets[name]], [])

    def receive(self, name: str, size: int, flags: int = 0) -> int:
        """One call; return how many bytes came."""
        return len(self._sockets[name].recv(size, flags))

    def receive_all(self, name: str, total: int) -> None:
        """Exactly `total` bytes."""
        while total:
            total -= len(self._sockets[name].recv(min(total, 65536))) or total

    def total_retransmits(self, name: str) -> int:
        """What the kernel has counted for this connection."""
        info = self._sockets[name].getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
        return int(struct.unpack_from("=I", info, _TOTAL_RETRANSMITS_AT)[0])

    def close(self, name: str) -> None:
        self._sockets.pop(name).close()

    def reset(self, name: str) -> None:
        """End the connection by RST."""
        self._sockets[name].setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("=ii", 1, 0))
        self.close(name)


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def main() -> None:
    """Answer until standard input ends."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if len(sys.argv) > 1 and _libc.setns(int(sys.argv[1]), _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")
    commands = Sockets()
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        answer: dict[str, Any]
        try:
            answer = {"result": getattr(commands, name)(*arguments)}
        except OSError as error:
            answer = {"errno": error.errno}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
