"""What faults take from the host, and give back: control groups, a loop device with a file system, a network namespace.

Everything is given back on the way out of the `with`. Only cgroup v1 is known here: its files set what v2's do.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import click

CGROUPS: Final = Path("/sys/fs/cgroup")
_CLONE_NEWNET: Final = 0x40000000
_NAME: Final = f"footlight-faults-{os.getpid()}"
_GONE_S: Final = 10.0


def need(*tools: str) -> None:
    """Raise click.ClickException unless all programs are installed."""
    for tool in tools:
        if shutil.which(tool) is None:
            raise click.ClickException(f"{tool} is not installed; apt-get install mount e2fsprogs iproute2 util-linux")


@dataclass(frozen=True, slots=True)
class Cgroup:
    """A control group of one v1 controller."""

    path: Path

    def add(self, *pids: int) -> None:
        """Move processes here, with all their threads."""
        for pid in pids:
            self.write("cgroup.procs", pid)

    def write(self, name: str, value: object) -> None:
        """Write one of its files."""
        (self.path / name).write_text(str(value))

    def read(self, name: str) -> str:
        """Read one of its files."""
        return (self.path / name).read_text()

    def stat(self, name: str, key: str) -> int:
        """Return one value of a file of "key value" lines."""
        for line in self.read(name).splitlines():
            have, _, value = line.partition(" ")
            if have == key:
                return int(value)
        raise click.ClickException(f"{self.path / name} has no {key}")


@contextlib.contextmanager
def cgroup(controller: str) -> Iterator[Cgroup]:
    """Make a group; it must be empty again at the end, that is: its processes are ended first.

    Raises click.ClickException when the host does not have the controller as v1 does.
    """
    parent = CGROUPS / controller
    if not (parent / "cgroup.procs").exists():
        raise click.ClickException(f"no cgroup v1 controller at {parent}: this host cannot have that fault")
    path = parent / _NAME
    path.mkdir()
    try:
        yield Cgroup(path)
    finally:
        deadline = time.monotonic() + _GONE_S
        while True:
            try:
                path.rmdir()
                break
            except OSError:  # the last process is not all gone
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.02)


@contextlib.contextmanager
def throttled_by_all(file: str, device: str, rate: int) -> Iterator[None]:
    """Limit a device for everybody, the kernel's own threads included: the limit of the root group."""
    limit = CGROUPS / "blkio" / file
    limit.write_text(f"{device} {rate}")
    try:
        yield
    finally:
        limit.write_text(f"{device} 0")


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
