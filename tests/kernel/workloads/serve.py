"""A TCP server that does what its plan says. The plan, in JSON, comes on standard input, after a line with its size.

The plan: `listen` (an address), `accept` (the call), `manner` (how connections are shared out), `workers`, `wait` (for
a line on standard input before the first fork or accept), `steps` (done for each connection, which is then closed).

It says on standard output, one word with its argument per line: `port N`, then whatever the steps say, then `done` for
each connection that is over. It reads a line of standard input where a step is `wait`. It dies with its parent.

Steps, each a list:

    request HOW [SIZE]    read one HTTP request with calls of kind HOW that ask for SIZE bytes each
    read HOW TOTAL [SIZE] read TOTAL bytes
    read_some HOW SIZE    exactly one call
    lost_vector SIZE      one readv whose array of iovec is unmapped meanwhile
    write HOW PIECES      write the pieces (Latin-1 text): one call for all where the call can, else one for each
    try_write HOW PIECES  the same, and no complaint when the client has gone
    trickle HOW MS PIECES one call for each piece, with a pause before each
    peek SIZE, until_eof, sleep MS, wait, say TEXT, shutdown, reset, exit, repeat COUNT STEPS
    fork STEPS            a child process does the steps, the parent waits for it
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import signal
import socket
import struct
import threading
import time
from typing import Any

import calls  # type: ignore[import-not-found] # run as a program, from its own folder

_PR_SET_PDEATHSIG = 1
_LENGTH = re.compile(rb"content-length: (\d+)", re.IGNORECASE)


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _say(text: str) -> None:
    os.write(1, f"{text}\n".encode())


def _wait() -> bytes:
    """Take exactly one line, and return it; byte by byte, for other processes read from the same pipe."""
    line = b""
    while (byte := os.read(0, 1)) not in {b"\n", b""}:
        line += byte
    return line


def _read_plan() -> dict[str, Any]:
    left = int(_wait())
    text = b""
    while len(text) < left:
        text += os.read(0, left - len(text))
    return dict(json.loads(text))


def _read_request(sock: socket.socket, how: str, size: int, kept: bytes) -> bytes | None:
    """Read until one request is there; return what came after it, or None at the end of the stream."""
    data = kept
    while True:
        head, blank, body = data.partition(b"\r\n\r\n")
        if blank:
            length = _LENGTH.search(head)
            wanted = int(length[1]) if length else 0
            if len(body) >= wanted:
                return body[wanted:]
        more = calls.READS[how](sock, size)
        if not more:
            return None
        data += more


class _Conversation:
    """One connection that is served."""

    def __init__(self, sock: socket.socket, steps: list[list[Any]]) -> None:
        self._sock = sock
        self._steps = steps
        self._kept = b""

    def run(self) -> None:
        try:
            self._do(self._steps)
        finally:
            self._sock.close()
            _say("done")

    def _do(self, steps: list[list[Any]]) -> bool:
        """Do one after the other; False, and no more of them, when the client has gone."""
        return all(getattr(self, f"_{name}")(*arguments) is not False for name, *arguments in steps)

    def _request(self, how: str, size: int = 65536) -> bool:
        kept = _read_request(self._sock, how, size, self._kept)
        self._kept = kept or b""
        return kept is not None

    def _read(self, how: str, total: int, size: int = 0) -> bool:
        while total:
            data = calls.READS[how](self._sock, min(total, size or total))
            if not data:
                return False
            total -= len(data)
        return True

    def _read_some(self, how: str, size: int) -> None:
        calls.READS[how](self._sock, size)

    def _lost_vector(self, size: int) -> None:
        calls.readv_from_lost_vector(self._sock, size, _wait)

    def _peek(self, size: int) -> None:
        self._sock.recv(size, socket.MSG_PEEK)
        self._sock.recvmsg(size, 0, socket.MSG_PEEK)

    def _write(self, how: str, pieces: list[str]) -> None:
        calls.WRITES[how](self._sock, [piece.encode("latin-1") for piece in pieces])

    def _try_write(self, how: str, pieces: list[str]) -> bool:
        try:
            self._write(how, pieces)
        except ConnectionError:
            return False
        return True

    def _trickle(self, how: str, ms: float, pieces: list[str]) -> None:
        for piece in pieces:
            time.sleep(ms / 1000)
            self._write(how, [piece])

    def _until_eof(self) -> None:
        while self._sock.recv(65536):
            pass

    def _sleep(self, ms: float) -> None:
        time.sleep(ms / 1000)

    def _wait(self) -> None:
        _wait()

    def _say(self, text: str) -> None:
        _say(text.format(pid=os.getpid(), tid=threading.get_native_id(), fd=self._sock.fileno()))

    def _shutdown(self) -> None:
        self._sock.shutdown(socket.SHUT_WR)

    def _reset(self) -> None:
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("=ii", 1, 0))
        self._sock.close()

    def _exit(self) -> None:
        os._exit(0)

    def _repeat(self, count: int, steps: list[list[Any]]) -> bool:
        return all(self._do(steps) for _ in range(count))

    def _fork(self, steps: list[list[Any]]) -> None:
        child = os.fork()
        if not child:
            _die_with_parent()
            self._do(steps)
            os._exit(0)
        os.waitpid(child, 0)


def _serve(listener: socket.socket, plan: dict[str, Any]) -> None:
    accept = {"accept": calls.accept_by_accept, "accept4": calls.accept_by_accept4}[plan["accept"]]
    while True:
        sock = accept(listener)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        conversation = _Conversation(sock, plan["steps"])
        match plan["manner"]:
            case "one_by_one" | "workers":
                conversation.run()
            case "threads":
                threading.Thread(target=conversation.run).start()
            case "forks":
                if not os.fork():
                    _die_with_parent()
                    listener.close()
                    conversation.run()
                    os._exit(0)
                sock.close()


def main() -> None:
    _die_with_parent()
    threading.stack_size(256 * 1024)
    plan = _read_plan()
    family = socket.AF_INET6 if ":" in plan["listen"] else socket.AF_INET
    listener = socket.create_server((plan["listen"], 0), family=family, backlog=1024)
    _say(f"port {listener.getsockname()[1]}")
    if plan["wait"]:
        _wait()
    for _ in range(plan["workers"]):
        if not os.fork():
            _die_with_parent()
            break
    else:
        if plan["workers"]:
            signal.pause()
    _serve(listener, plan)


if __name__ == "__main__":
    main()
