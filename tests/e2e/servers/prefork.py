"""A pre-forking service: `python -m tests.e2e.servers.prefork PORT WORKERS shared|reuseport`.

`shared`: the parent makes the listening socket and the workers accept from it. `reuseport`: each worker has a listening
socket of its own on the same port. A worker that dies is replaced.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
from typing import NoReturn

from tests.e2e.servers.threaded import Handler, Server

_PR_SET_PDEATHSIG = 1


def listening(port: int, reuse_port: bool) -> socket.socket:
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if reuse_port:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    listener.bind(("127.0.0.1", port))
    listener.listen(128)
    return listener


def work(port: int, shared: socket.socket | None) -> NoReturn:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    server = Server(("127.0.0.1", port), Handler, bind_and_activate=False)
    server.socket.close()
    server.socket = shared if shared is not None else listening(port, reuse_port=True)
    # workers wake up together for one connection; those that are late must not wait in accept
    server.socket.setblocking(False)
    server.serve_forever(poll_interval=60)
    raise SystemExit


def main(port: int, workers: int, way: str) -> None:
    shared = listening(port, reuse_port=False) if way == "shared" else None
    while True:
        for _ in range(workers):
            if os.fork() == 0:
                work(port, shared)
        os.wait()
        workers = 1


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
