"""Asks the kernel which TCP sockets listen in a network namespace, by netlink.

/proc/PID/net/tcp answers the same question by walking the whole connection hash table of the host, milliseconds for
each namespace where netlink takes microseconds. Where netlink or the change of namespace is refused, /proc is read.
"""

from __future__ import annotations

import ctypes
import os
import socket
import struct
from types import TracebackType
from typing import Final, Self

from probes.procfs import ProcFs

_NETLINK_SOCK_DIAG: Final = 4
_SOCK_DIAG_BY_FAMILY: Final = 20
_NLM_F_REQUEST_DUMP: Final = 0x301
_NLMSG_ERROR: Final = 2
_NLMSG_DONE: Final = 3
_TCPF_LISTEN: Final = 1 << 10
_CLONE_NEWNET: Final = 0x40000000
_TIMEOUT_SECONDS: Final = 1

_HEADER: Final = struct.Struct("=IHHII")  # struct nlmsghdr: len, type, flags, seq, pid
_REQUEST: Final = struct.Struct("=BBBxI48x")  # struct inet_diag_req_v2: family, protocol, ext, states, id
_PORT: Final = struct.Struct("!4xH")  # struct inet_diag_msg: id.idiag_sport is big-endian at 4
_INODE: Final = struct.Struct("=68xI")  # and idiag_inode is the last word
_UNIX_REQUEST: Final = struct.Struct("=BBxxIIIII")  # struct unix_diag_req: family, protocol, states, ino, show, cookie
_UNIX_ANSWER: Final = struct.Struct("=BBBxIII")  # struct unix_diag_msg: family, type, state, ino, cookie
_UDIAG_SHOW_PEER: Final = 4
_UNIX_DIAG_PEER: Final = 2
_ATTRIBUTE: Final = struct.Struct("=HH")  # struct rtattr: length, type
_UNIX_MOST: Final = 1 << 17


class ListenerTable:
    """The listening sockets of any network namespace.

    Keeps one netlink socket per namespace, which also keeps that namespace alive: call `forget` for those
    that no process is in any more.
    """

    def __init__(self, fs: ProcFs) -> None:
        self._fs: Final = fs
        self._own: Final = ProcFs().network_namespace(os.getpid())
        self._sockets: dict[int, socket.socket | None] = {}

    def listeners(self, namespace: int, pid: int) -> dict[int, int]:
        """Socket inode -> port of what listens in `namespace`, of which `pid` is a member."""
        if namespace not in self._sockets:
            self._sockets[namespace] = self._open(namespace, pid)
        netlink = self._sockets[namespace]
        if netlink is not None:
            try:
                return dump_listeners(netlink)
            except OSError:
                netlink.close()
                self._sockets[namespace] = None
        return self._fs.listeners(pid)

    def forget(self, alive: set[int]) -> None:
        """Close what belongs to namespaces that are not in `alive`."""
        for namespace in self._sockets.keys() - alive:
            netlink = self._sockets.pop(namespace)
            if netlink is not None:
                netlink.close()

    def close(self) -> None:
        """Close every netlink socket."""
        self.forget(set())

    def _open(self, namespace: int, pid: int) -> socket.socket | None:
        try:
            if namespace == self._own:
                return _netlink()
            with _NetworkNamespace(f"{self._fs.root}/{pid}/ns/net"):
                return _netlink()
        except OSError:
            return None


def dump_listeners(netlink: socket.socket) -> dict[int, int]:
    """Socket inode -> port of what listens in the namespace of a NETLINK_SOCK_DIAG socket.

    Raises OSError when the kernel refuses, cannot (no tcp_diag) or does not answer within a second.
    """
    found: dict[int, int] = {}
    for family in (socket.AF_INET, socket.AF_INET6):
        request = _REQUEST.pack(family, socket.IPPROTO_TCP, 0, _TCPF_LISTEN)
        netlink.send(
            _HEADER.pack(_HEADER.size + len(request), _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST_DUMP, family, 0) + request
        )
        while _take(netlink.recv(65536), family, found):
            pass
    return found


def _take(answer: bytes, sequence: int, found: dict[int, int]) -> bool:
    """Add the sockets of one answer to `found`; returns whether more answers follow."""
    offset = 0
    while offset + _HEADER.size <= len(answer):
        length, kind, _, number, _ = _HEADER.unpack_from(answer, offset)
        body = offset + _HEADER.size
        if length < _HEADER.size or offset + length > len(answer):
            raise OSError("a netlink message is cut short")
        if number == sequence:
            if kind == _NLMSG_DONE:
                return False
            if kind == _NLMSG_ERROR:
                code = -struct.unpack_from("=i", answer, body)[0]
                raise OSError(code, os.strerror(code))
            if kind == _SOCK_DIAG_BY_FAMILY and length >= _HEADER.size + _INODE.size:
                (port,), (inode,) = _PORT.unpack_from(answer, body), _INODE.unpack_from(answer, body)
                found[inode] = port
        offset += (length + 3) & ~3
    return True


def unix_peers(namespace: str) -> dict[int, int]:
    """Inode -> inode of its peer, of the connected unix sockets of a network namespace, such as /proc/PID/ns/net.

    At most some 100,000 of them; none where the kernel does not say.
    """
    found: dict[int, int] = {}
    try:
        with _NetworkNamespace(namespace):
            netlink = _netlink()
        with netlink:
            request = _UNIX_REQUEST.pack(socket.AF_UNIX, 0, 0xFFFFFFFF, 0, _UDIAG_SHOW_PEER, 0, 0)
            length = _HEADER.size + len(request)
            netlink.send(_HEADER.pack(length, _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST_DUMP, 1, 0) + request)
            while len(found) < _UNIX_MOST and _take_peers(netlink.recv(65536), found):
                pass
    except (OSError, struct.error):
        pass
    return found


def _take_peers(answer: bytes, found: dict[int, int]) -> bool:
    """Add the sockets of one answer to `found`; returns whether more answers follow. Raises struct.error."""
    offset = 0
    while offset + _HEADER.size <= len(answer):
        length, kind, *_ = _HEADER.unpack_from(answer, offset)
        if kind != _SOCK_DIAG_BY_FAMILY or length < _HEADER.size + _UNIX_ANSWER.size:
            return False
        end = min(offset + length, len(answer))
        inode = _UNIX_ANSWER.unpack_from(answer, offset + _HEADER.size)[3]
        at = offset + _HEADER.size + _UNIX_ANSWER.size
        while at + _ATTRIBUTE.size <= end:
            size, attribute = _ATTRIBUTE.unpack_from(answer, at)
            if size < _ATTRIBUTE.size:
                break
            if attribute == _UNIX_DIAG_PEER and size >= _ATTRIBUTE.size + 4:
                (found[inode],) = struct.unpack_from("=I", answer, at + _ATTRIBUTE.size)
            at += (size + 3) & ~3
        offset += (length + 3) & ~3
    return offset > 0


def _netlink() -> socket.socket:
    netlink = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_SOCK_DIAG)
    # a receive time-out in the kernel: settimeout() would make every receive two system calls
    netlink.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("=qq", _TIMEOUT_SECONDS, 0))
    return netlink


class _NetworkNamespace:
    """A stay of the calling thread in another network namespace; needs CAP_SYS_ADMIN."""

    def __init__(self, path: str) -> None:
        self._path: Final = path

    def __enter__(self) -> Self:
        self._home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            there = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                _setns(there)
            finally:
                os.close(there)
        except OSError:
            os.close(self._home)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            _setns(self._home)
        finally:
            os.close(self._home)


def _setns(fd: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(fd, _CLONE_NEWNET) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"setns: {os.strerror(code)}")
