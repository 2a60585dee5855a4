"""What faults take from the host, and give back: a loop device with a file system, a network namespace.

Everything is given back on the way out of the `with`.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import click

_CLONE_NEWNET: Final = 0x40000000


def need(*tools: str) -> None:
    """Raise click.ClickException unless all programs are installed."""
    for tool in tools:
        if shutil.which(tool) is None:
            raise click.ClickException(f"{tool} is not installed; apt-get install mount e2fsprogs iproute2 util-linux")


@dataclass(frozen=True, slots=True)
class Disk:
    """A file system on a loop device; `device` is its "major:minor"."""

    folder: Path
    device: str


@contextlib.contextmanager
def disk(megabytes: int) -> Iterator[Disk]:
    """Make a loop device with an ext4 on it."""
    need("losetup", "mkfs.ext4", "mount", "umount")
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="footlight-faults-")))
        image = folder / "image"
        with image.open("wb") as file:
            file.truncate(megabytes << 20)
        _run("mkfs.ext4", "-q", "-F", str(image))
        loop = _run("losetup", "--show", "--find", str(image)).strip()
        stack.callback(_run, "losetup", "--detach", loop)
        mounted = folder / "mounted"
        mounted.mkdir()
        _run("mount", "-o", "noatime", loop, str(mounted))
        stack.callback(_run, "umount", str(mounted))
        number = os.stat(loop).st_rdev  # noqa: PTH116 - as short as the Path's
        yield Disk(mounted, f"{os.major(number)}:{os.minor(number)}")


@dataclass(frozen=True, slots=True)
class Network:
    """A network namespace, the client's, and a link to it. `address` is this side's."""

    name: str
    link: str
    address: str

    def connect(self, port: int) -> socket.socket:
        """Connect from over there to a port of this side."""
        with _inside(self.name):
            connection = socket.socket()
        connection.settimeout(10.0)
        connection.connect((self.address, port))
        return connection

    def limit(self, bits_per_second: int) -> None:
        """Let bytes towards the client through at this rate only. 0: at any rate."""
        _run("tc", "qdisc", "del", "dev", self.link, "root", check=False)
        if bits_per_second:
            shape = ("rate", f"{bits_per_second}bit", "burst", "4kb", "latency", "500ms")
            _run("tc", "qdisc", "add", "dev", self.link, "root", "tbf", *shape)


@contextlib.contextmanager
def network() -> Iterator[Network]:
    """Make a network namespace and a link to it. The addresses are those for benchmarks (RFC 2544)."""
    need("ip", "tc")
    name = f"fl{os.getpid()}"
    ours, theirs = f"{name}a", f"{name}b"
    inside = ("ip", "-n", name)
    _run("ip", "netns", "add", name)
    try:
        _run("ip", "link", "add", ours, "type", "veth", "peer", "name", theirs, "netns", name)
        _run("ip", "address", "add", "198.18.0.1/30", "dev", ours)
        _run(*inside, "address", "add", "198.18.0.2/30", "dev", theirs)
        for command in (("ip", "link", "set", ours, "up"), (*inside, "link", "set", theirs, "up")):
            _run(*command)
        yield Network(name, ours, "198.18.0.1")
    finally:
        _run("ip", "link", "delete", ours, check=False)
        _run("ip", "netns", "delete", name)


@contextlib.contextmanager
def _inside(namespace: str) -> Iterator[None]:
    """Make sockets of this thread in a namespace."""
    libc = ctypes.CDLL(None, use_errno=True)

    def move(descriptor: int) -> None:
        if libc.setns(descriptor, _CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), "setns failed")

    here, there = (
        os.open(path, os.O_RDONLY | os.O_CLOEXEC) for path in ("/proc/thread-self/ns/net", f"/run/netns/{namespace}")
    )
    try:
        move(there)
        try:
            yield
        finally:
            move(here)
    finally:
        os.close(here)
        os.close(there)


def _run(*command: str, check: bool = True) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if check and done.returncode:
        raise click.ClickException(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout
