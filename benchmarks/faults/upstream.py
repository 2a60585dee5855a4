"""A slow server that a service asks: `GET /SECONDS` takes that long. `python -m benchmarks.faults.upstream`.

It answers with a JSON list: when it had the request, and when it answered (CLOCK_MONOTONIC, ns).
"""

from __future__ import annotations

import json
import socket
import threading
import time

import click

from benchmarks.common.processes import end_with_parent, ends_on_sigterm
from benchmarks.faults.service import ignore_interrupt


def answer(connected: socket.socket) -> None:
    """Serve one request."""
    with connected:
        asked = b""
        while not asked.endswith(b"\r\n\r\n"):
            data = connected.recv(4096)
            if not data:
                return
            asked += data
        began_ns = time.monotonic_ns()
        time.sleep(float(asked.split()[1][1:]))
        body = json.dumps([began_ns, time.monotonic_ns()]).encode()
        connected.sendall(b"HTTP/1.0 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body))


@click.command(help=__doc__)
def main() -> None:
    ends_on_sigterm()
    ignore_interrupt()
    end_with_parent()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        print(f"http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
        while True:
            threading.Thread(target=answer, args=(listener.accept()[0],), daemon=True).start()


if __name__ == "__main__":
    main()
