"""A process that does a little of everything that the kernel's metrics are about: `neighbour PORT FILE`.

It opens connections to PORT, sends more than a slow reader takes, writes FILE to its disk, and sleeps in a read of a
terminal, which stands for a GPU's device file. It ends when its input does.
"""

from __future__ import annotations

import os
import select
import socket
import sys
import threading
import time
import tty
from collections.abc import Callable
from pathlib import Path

PAUSE_S = 0.1
FLOOD = 8 << 20


def connect(port: int) -> None:
    """Open a connection that the service answers on."""
    with socket.create_connection(("127.0.0.1", port), 5) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        while connection.recv(65536):
            pass


def write(path: Path) -> None:
    """Have the disk take some bytes, and give some back."""
    with path.open("r+b" if path.exists() else "w+b") as file:
        file.write(os.urandom(65536))
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        file.read()


def overfill() -> None:
    """Send more than there is room for, to one who reads late, as there is room: an event loop's way."""
    sender, reader = connected()

    def read_late() -> None:
        time.sleep(0.02)
        left = FLOOD
        while left:
            left -= len(reader.recv(1 << 20))

    late = threading.Thread(target=read_late)
    late.start()
    sender.setblocking(False)
    left = FLOOD
    while left:
        try:
            left -= sender.send(bytes(left))
        except BlockingIOError:
            select.select([], [sender], [])
    late.join()
    sender.close()
    reader.close()


def connected() -> tuple[socket.socket, socket.socket]:
    """Both ends of a TCP connection."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        one = socket.create_connection(listener.getsockname())
        return one, listener.accept()[0]


def again(what: Callable[[], object]) -> None:
    """Do it for ever in a thread, with pauses."""

    def loop() -> None:
        while True:
            what()
            time.sleep(PAUSE_S)

    threading.Thread(target=loop, daemon=True).start()


def main() -> None:
    port, path = int(sys.argv[1]), Path(sys.argv[2])
    master, terminal = os.openpty()
    tty.setraw(terminal)
    again(lambda: connect(port))
    again(lambda: write(path))
    again(overfill)
    again(lambda: os.write(master, b"x"))
    again(lambda: os.read(terminal, 1))
    sys.stdin.read()


if __name__ == "__main__":
    main()
