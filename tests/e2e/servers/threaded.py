"""A service with a thread for each connection, on the standard library: `python -m tests.e2e.servers.threaded PORT`."""

from __future__ import annotations

import os
import socket
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from tests.e2e.servers.script import Asked, error_body, parse, steps, whole


class Handler(BaseHTTPRequestHandler):
    """Answers as scripted; every answer names the process that gave it."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_POST(self) -> None:
        """Answer one request."""
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        try:
            asked = parse(self.path, body)
        except ValueError:
            self._answer(400, error_body(400))
            return
        if asked.raw is not None:
            self.wfile.write(asked.raw)
            self.close_connection = True
        elif asked.status < 400 and asked.stream:
            self._stream(asked)
        else:
            time.sleep(asked.first_s)
            self._answer(asked.status, whole(asked))

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.send_header("x-pid", str(os.getpid()))
        self.end_headers()
        self.wfile.write(body)

    def _stream(self, asked: Asked) -> None:
        chunked = asked.framing == "chunked"
        self.send_response(200)
        self.send_header("content-type", "text/event-stream; charset=utf-8")
        self.send_header("x-pid", str(os.getpid()))
        self.send_header(*(("transfer-encoding", "chunked") if chunked else ("connection", "close")))
        self.end_headers()
        for step in steps(asked):
            time.sleep(step.pause_s)
            if step.cut:
                self.connection.shutdown(socket.SHUT_RDWR)
                self.close_connection = True
                return
            self.wfile.write(b"%x\r\n%s\r\n" % (len(step.data), step.data) if chunked else step.data)
        if chunked:
            self.wfile.write(b"0\r\n\r\n")

    def log_message(self, *_: object) -> None:
        """Say nothing."""


class Server(ThreadingHTTPServer):
    """As the library has it, but quiet about clients that leave."""

    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, *_: object) -> None:
        """A client that leaves, and one that talks nonsense, is what the tests want."""


if __name__ == "__main__":
    Server(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
