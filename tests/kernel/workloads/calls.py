"""Every system call that moves bytes of a TCP socket, each as one function that makes exactly one such call.

Python has no binding for some of them; those go through libc. Run by the workload processes, with the standard library
only.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import socket
import struct
import tempfile
import threading
from collections.abc import Callable, Sequence

_libc = ctypes.CDLL(None, use_errno=True)
_MSG_WAITALL = 0x100
_MSG_TRUNC = 0x20
_MSG_WAITFORONE = 0x10000
_MESSAGE_BYTES = 64
"""Bytes of one `struct mmsghdr` on a 64-bit machine."""


class _Iovec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("len", ctypes.c_size_t))


class _Message(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_void_p),
        ("name_len", ctypes.c_uint32),
        ("iov", ctypes.POINTER(_Iovec)),
        ("iov_cnt", ctypes.c_size_t),
        ("control", ctypes.c_void_p),
        ("control_len", ctypes.c_size_t),
        ("flags", ctypes.c_int),
        ("pad", ctypes.c_uint32),
        ("moved", ctypes.c_uint32),
        ("pad2", ctypes.c_uint32),
    )


def _checked(result: int, name: str) -> int:
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{name}: {os.strerror(error)}")
    return result


def accept_by_accept(listener: socket.socket) -> socket.socket:
    """accept(2): Python's own accept() is accept4(2)."""
    return socket.socket(fileno=_checked(_libc.accept(listener.fileno(), None, None), "accept"))


def accept_by_accept4(listener: socket.socket) -> socket.socket:
    return listener.accept()[0]


# ---- io_uring, without a library: one ring, one request ----

_SYS_IO_URING_SETUP = 425  # the same number on every architecture
_SYS_IO_URING_ENTER = 426
_OP_SEND = 26
_OP_RECV = 27
_GETEVENTS = 1
_OFF_CQ_RING = 0x8000000
_OFF_SQES = 0x10000000
_PARAMS = struct.Struct("=10I10I10I")


def _uring(opcode: int, descriptor: int, buffer: bytearray) -> int:
    """Set a ring up, let it do one operation on a socket, and return that operation's result."""
    params = bytearray(120)
    raw = (ctypes.c_char * len(params)).from_buffer(params)
    ring = _checked(_libc.syscall(ctypes.c_long(_SYS_IO_URING_SETUP), 1, raw), "io_uring_setup")
    try:
        words = _PARAMS.unpack(bytes(params))
        sq, cq = words[10:20], words[20:30]
        submissions = mmap.mmap(ring, 4096, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE, offset=0)
        completions = mmap.mmap(ring, 4096, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE, offset=_OFF_CQ_RING)
        entries = mmap.mmap(ring, 4096, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE, offset=_OFF_SQES)
        view = (ctypes.c_char * len(buffer)).from_buffer(buffer)
        struct.pack_into("=BBHiQQI", entries, 0, opcode, 0, 0, descriptor, 0, ctypes.addressof(view), len(buffer))
        struct.pack_into("=I", submissions, sq[6], 0)  # the array of indexes
        struct.pack_into("=I", submissions, sq[1], 1)  # the tail
        result = _libc.syscall(ctypes.c_long(_SYS_IO_URING_ENTER), ring, 1, 1, _GETEVENTS, None, 0)
        _checked(result, "io_uring_enter")
        _user_data, done, _flags = struct.unpack_from("=QiI", completions, cq[5])
        if done < 0:
            raise OSError(-done, os.strerror(-done))
        for each in (submissions, completions, entries):
            each.close()
        return int(done)
    finally:
        os.close(ring)


def _read_by_uring(sock: socket.socket, size: int) -> bytes:
    buffer = bytearray(size)
    return bytes(buffer[: _uring(_OP_RECV, sock.fileno(), buffer)])


def _write_by_uring(sock: socket.socket, data: bytes) -> int:
    return _uring(_OP_SEND, sock.fileno(), bytearray(data))


# ---- reading: (socket, bytes wanted at most) -> bytes; b"" is the end of the stream ----


def _read(sock: socket.socket, size: int) -> bytes:
    return os.read(sock.fileno(), size)


def _split(size: int, parts: int) -> list[bytearray]:
    """Buffers of uneven sizes that hold `size` bytes together."""
    each = max(1, size // parts - 1)
    sizes = [each] * (parts - 1)
    return [bytearray(part) for part in [*sizes, size - sum(sizes)] if part > 0]


def _joined(buffers: Sequence[bytearray], size: int) -> bytes:
    return b"".join(buffers)[:size]


def _readv(sock: socket.socket, size: int, parts: int = 5) -> bytes:
    buffers = _split(size, parts)
    return _joined(buffers, os.readv(sock.fileno(), buffers))


def _readv_many(sock: socket.socket, size: int) -> bytes:
    return _readv(sock, size, 37)


def _recvfrom(sock: socket.socket, size: int) -> bytes:
    return sock.recv(size)


def _recv_all(sock: socket.socket, size: int) -> bytes:
    return sock.recv(size, _MSG_WAITALL)


def _recv_truncated(sock: socket.socket, size: int) -> bytes:
    """MSG_TRUNC: TCP throws the bytes away; the buffer keeps what it held."""
    buffer = bytearray(b"stale " * size)
    return b"?" * sock.recv_into(buffer, size, _MSG_TRUNC)


def _recvmsg(sock: socket.socket, size: int) -> bytes:
    buffers = _split(size, 3)
    return _joined(buffers, sock.recvmsg_into(buffers)[0])


def _messages(pieces: Sequence[Sequence[bytearray]]) -> tuple[ctypes.Array[_Message], list[object]]:
    assert ctypes.sizeof(_Message) == _MESSAGE_BYTES
    array = (_Message * len(pieces))()
    kept: list[object] = []
    for message, buffers in zip(array, pieces, strict=True):
        vector = (_Iovec * len(buffers))()
        for segment, buffer in zip(vector, buffers, strict=True):
            view = (ctypes.c_char * len(buffer)).from_buffer(buffer) if buffer else None
            kept.append(view)
            segment.base = ctypes.addressof(view) if view is not None else None
            segment.len = len(buffer)
        message.iov = vector
        message.iov_cnt = len(buffers)
        kept.append(vector)
    return array, kept


def _recvmmsg(sock: socket.socket, size: int, messages: int = 3) -> bytes:
    buffers = _split(size, messages)
    pieces = [_split(len(buffer), 2) for buffer in buffers]
    array, _kept = _messages(pieces)
    count = _checked(_libc.recvmmsg(sock.fileno(), array, len(array), _MSG_WAITFORONE, None), "recvmmsg")
    return b"".join(_joined(pieces[index], array[index].moved) for index in range(count))


def _recvmmsg_many(sock: socket.socket, size: int) -> bytes:
    return _recvmmsg(sock, size, 11)


def _read_by_splice(sock: socket.socket, size: int) -> bytes:
    inlet, outlet = os.pipe()[::-1]
    try:
        moved = os.splice(sock.fileno(), inlet, min(size, 65536))
        return os.read(outlet, moved) if moved else b""
    finally:
        os.close(inlet)
        os.close(outlet)


def _readv2(sock: socket.socket, size: int) -> bytes:
    """preadv2(2), which the probe does not follow."""
    buffer = bytearray(size)
    view = (ctypes.c_char * size).from_buffer(buffer)
    vector = (_Iovec * 1)(_Iovec(ctypes.addressof(view), size))
    moved = _checked(_libc.preadv2(sock.fileno(), vector, 1, ctypes.c_long(-1), 0), "preadv2")
    return bytes(buffer[:moved])


READS: dict[str, Callable[[socket.socket, int], bytes]] = {
    "read": _read,
    "readv": _readv,
    "readv_many": _readv_many,
    "recvfrom": _recvfrom,
    "recv_all": _recv_all,
    "recv_truncated": _recv_truncated,
    "recvmsg": _recvmsg,
    "recvmmsg": _recvmmsg,
    "recvmmsg_many": _recvmmsg_many,
    "splice": _read_by_splice,
    "preadv2": _readv2,
    "io_uring": _read_by_uring,
}


# ---- writing: (socket, pieces) -> bytes taken, in one call where the call takes several pieces ----


def _one_by_one(call: Callable[[socket.socket, bytes], int]) -> Callable[[socket.socket, Sequence[bytes]], None]:
    def write(sock: socket.socket, pieces: Sequence[bytes]) -> None:
        for piece in pieces:
            rest = piece
            while rest:
                rest = rest[call(sock, rest) :]

    return write


def _vector(call: Callable[[socket.socket, list[bytes]], int]) -> Callable[[socket.socket, Sequence[bytes]], None]:
    def write(sock: socket.socket, pieces: Sequence[bytes]) -> None:
        rest = list(pieces)
        while rest:
            taken = call(sock, rest)
            while rest and taken >= len(rest[0]):
                taken -= len(rest.pop(0))
            if taken:
                rest[0] = rest[0][taken:]

    return write


def _file_of(data: bytes) -> int:
    with tempfile.TemporaryFile() as file:
        file.write(data)
        file.flush()
        return os.dup(file.fileno())


def _sendfile(sock: socket.socket, data: bytes) -> int:
    file = _file_of(data)
    try:
        return os.sendfile(sock.fileno(), file, 0, len(data))
    finally:
        os.close(file)


def _write_by_splice(sock: socket.socket, data: bytes) -> int:
    outlet, inlet = os.pipe()
    try:
        return os.splice(outlet, sock.fileno(), os.write(inlet, data[:4096]))
    finally:
        os.close(inlet)
        os.close(outlet)


def _sendmmsg(sock: socket.socket, pieces: Sequence[bytes], segments: int = 1) -> None:
    """One message per piece, each of `segments` segments, all in one call."""
    buffers = [_filled(piece, segments) for piece in pieces]
    array, _kept = _messages(buffers)
    count = _checked(_libc.sendmmsg(sock.fileno(), array, len(array), 0), "sendmmsg")
    assert count == len(pieces)
    assert [message.moved for message in array] == [len(piece) for piece in pieces]


def _filled(piece: bytes, segments: int) -> list[bytearray]:
    if segments == 1:
        return [bytearray(piece)]
    buffers, at = _split(len(piece), segments), 0
    for buffer in buffers:
        buffer[:] = piece[at : at + len(buffer)]
        at += len(buffer)
    return buffers


def _writev2(sock: socket.socket, data: bytes) -> int:
    """pwritev2(2), which the probe does not follow."""
    buffer = bytearray(data)
    view = (ctypes.c_char * len(buffer)).from_buffer(buffer)
    vector = (_Iovec * 1)(_Iovec(ctypes.addressof(view), len(buffer)))
    return _checked(_libc.pwritev2(sock.fileno(), vector, 1, ctypes.c_long(-1), 0), "pwritev2")


WRITES: dict[str, Callable[[socket.socket, Sequence[bytes]], None]] = {
    "write": _one_by_one(lambda sock, data: os.write(sock.fileno(), data)),
    "sendto": _one_by_one(lambda sock, data: sock.send(data)),
    "sendfile64": _one_by_one(_sendfile),
    "splice": _one_by_one(_write_by_splice),
    "writev": _vector(lambda sock, pieces: os.writev(sock.fileno(), pieces)),
    "sendmsg": _vector(lambda sock, pieces: sock.sendmsg(pieces)),
    "sendmmsg": _sendmmsg,
    "sendmmsg_segments": lambda sock, pieces: _sendmmsg(sock, pieces, 37),
    "pwritev2": _one_by_one(_writev2),
    "io_uring": _one_by_one(_write_by_uring),
}


# ---- a vector that is gone when the call returns ----


def readv_from_lost_vector(sock: socket.socket, size: int, before: Callable[[], None]) -> bytes:
    """readv(2) whose array of iovec is unmapped by `before`, run on another thread, while the call waits."""
    _libc.mmap.restype = ctypes.c_void_p
    page = _libc.mmap(None, ctypes.c_size_t(4096), 3, 0x22, -1, ctypes.c_long(0))
    buffer = bytearray(size)
    view = (ctypes.c_char * size).from_buffer(buffer)
    vector = (_Iovec * 1).from_address(page)
    vector[0].base, vector[0].len = ctypes.addressof(view), size

    def unmap() -> None:
        before()
        _checked(_libc.munmap(ctypes.c_void_p(page), ctypes.c_size_t(4096)), "munmap")
        os.write(1, b"unmapped\n")

    thread = threading.Thread(target=unmap)
    thread.start()
    moved = _checked(_libc.readv(sock.fileno(), ctypes.c_void_p(page), 1), "readv")
    thread.join()
    return bytes(buffer[:moved])
