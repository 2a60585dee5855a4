"""Keeps BPF programs attached to functions of the libraries and programs that followed processes map.

A process is looked at when it is new, when it executed a program, and when it has more or less executable memory than
before, so a library that is loaded later is found at the next round. The file is opened by what the process has mapped,
not by a name that may mean something else by now or in another mount namespace; only a regular file is ever opened for
reading. Processes end while they are looked at all the time, and that is no error.

Two scopes. `PROCESS` places the breakpoints in the memory of the followed processes alone, so strangers that map the
same file pay nothing; a process that comes later is not seen until the next round, and what a process forks hits the
breakpoints it inherits, unseen until then. It needs links for many uprobes (Linux 6.6). `FILE` places them in every
process that maps the file: whoever forks or comes later is seen from its first call, programs have to ask for the
target themselves, and strangers pay for the breakpoint. USDT probes, and kernels without such links, have this one
alone: a perf event takes 0.1 s to detach, and each function of each process would need one.

Measured on Linux 6.18: a link for 41 functions takes 0.5 ms to make and 40 ms to close, of which 1.6 ms are CPU time;
the rest is the kernel's waiting for other CPUs. So links are closed by threads, many at a time. A link goes on until it
is closed: a new one in its place waits for that, else each call would count twice.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import re
import stat
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Final, NamedTuple

from probes.elf import ElfError, Functions, find_functions
from probes.errors import FootlightError
from probes.libbpf import NoSuchProbeError, Object, UserLink, has_uprobe_multi
from probes.procfs import parse_stat

ROUND_S: Final = 0.1
"""A round that took longer than this goes on at the next one."""
RETRY_S: Final = 30.0
"""After this time a file is tried again that could not be attached to."""

_CLOSERS: Final = 16
_WARNINGS: Final = 100
"""Processes choose the names of files, and as many as they like: what comes after so many lines is only counted."""
_KNOWN_FILES: Final = 64
_MAPS_BYTES: Final = 8 << 20
_FILES_OF_A_NAME: Final = 8
"""A process may map many files with the library's name; it is not followed to more of them."""
_SYS_OPENAT2: Final = 437
_RESOLVE_IN_ROOT: Final = 0x10
_START_STACK: Final = 25  # in /proc/PID/stat, counted from the state
# A mapping of a file that may be executed: where it is, and the file's inode and path.
_CODE: Final = re.compile(
    rb"^([0-9a-f]+)-([0-9a-f]+) ..x. [0-9a-f]+ [0-9a-f]+:[0-9a-f]+ (\d+) +(/[^\n]*)$", re.MULTILINE
)
_DESCRIPTOR: Final = re.compile(r"/proc/self/fd/\d+")
_CODE_BYTES: Final = re.compile(rb"^Vm(?:Exe|Lib):\s+(\d+)", re.MULTILINE)

log = logging.getLogger(__name__)


class Scope(Enum):
    """Whose memory gets the breakpoints, see above."""

    PROCESS = "process"
    FILE = "file"


@dataclass(frozen=True, slots=True)
class Symbol:
    """A place in user code, and the BPF program that runs there.

    `library` is a library or executable as the process sees it: an absolute path, or a file name. A name such as
    `libcuda.so.1` is also that of a file with another version in its name, if it calls itself so (SONAME). `name` is a
    function, or `provider:name` where `usdt`. The program finds `cookie` by bpf_get_attach_cookie(), or
    bpf_usdt_cookie(). `service` None means every one.
    """

    program: str
    library: str
    name: str
    cookie: int = 0
    returns: bool = False
    usdt: bool = False
    service: int | None = None


@dataclass(frozen=True, slots=True)
class Missing:
    """A symbol that a file does not have, or a file that cannot be attached to (`name` is empty then).

    `path` is printable.
    """

    path: str
    name: str
    reason: str


class _FileId(NamedTuple):
    device: int
    inode: int
    changed_ns: int
    size: int


class _Mapping(NamedTuple):
    """Code of a file in the memory of a process."""

    start: int
    end: int
    inode: int
    path: str


class _Identity(NamedTuple):
    """Which process, which program and which code: what differs after fork, exec and dlopen."""

    start: int
    stack: int
    code: tuple[bytes, ...]


class _Group(NamedTuple):
    """Symbols that are attached together."""

    library: str
    service: int | None
    symbols: tuple[Symbol, ...]


class _Key(NamedTuple):
    """What links belong to. `tgid` is 0 where they are for every process."""

    tgid: int
    file: _FileId
    group: int


@dataclass(slots=True)
class _Process:
    service: int
    looked: float = 0.0
    identity: _Identity | None = None
    keys: set[_Key] = field(default_factory=set)


@dataclass(slots=True)
class _Attached:
    path: str
    links: list[UserLink] = field(default_factory=list)
    users: set[int] = field(default_factory=set)
    retry_at: float | None = None


class UserProbes:
    """The uprobes of one object. Make it before the object is loaded, close it before the object is closed.

    `mapped` is called with (tgid, start, end) for the code of each file that is attached to in a process, and with
    (tgid, 0, 0) when the process is let go. `multi` False does without links for many uprobes; None asks the kernel.
    """

    def __init__(
        self,
        owner: Object,
        symbols: Sequence[Symbol],
        *,
        scope: Scope = Scope.FILE,
        mapped: Callable[[int, int, int], None] | None = None,
        multi: bool | None = None,
        proc: str = "/proc",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._owner = owner
        self._groups = _grouped(symbols)
        self._names = frozenset(each.name for each in symbols if not each.usdt)
        self._multi = has_uprobe_multi() if multi is None else multi
        self._scope = scope if self._multi else Scope.FILE
        self._mapped = mapped or (lambda *_: None)
        self._proc = proc
        self._clock = clock
        self._processes: dict[int, _Process] = {}
        self._attached: dict[_Key, _Attached] = {}
        self._known: OrderedDict[_FileId, Functions | None] = OrderedDict()
        self._missing: dict[tuple[_FileId, str], Missing] = {}
        self._unused: set[_Key] = set()
        self._leaving: list[tuple[_Key, UserLink]] = []
        self._closing: dict[_Key, list[Future[None]]] = {}
        self._closers: ThreadPoolExecutor | None = None
        self._warned = 0
        self.failed = 0
        """How often a process or file could not be looked at or attached to, for another reason than its end."""
        if self._multi:
            for name in {each.program for each in symbols if not each.usdt}:
                owner.program(name).set_uprobe_multi()

    @property
    def scope(self) -> Scope:
        """The one that was asked for, or FILE where the kernel cannot do it."""
        return self._scope

    @property
    def attached(self) -> frozenset[int]:
        """The processes that have at least one file with programs on it."""
        return frozenset(tgid for each in self._attached.values() if each.links for tgid in each.users)

    @property
    def files(self) -> tuple[str, ...]:
        """Paths of the files with programs on them, as their processes see them."""
        return tuple(sorted({each.path for each in self._attached.values() if each.links}))

    @property
    def missing(self) -> tuple[Missing, ...]:
        """What was not found in the files that were looked at, and what could not be attached to."""
        return tuple(self._missing.values())

    def follow(self, tgids: Mapping[int, int]) -> None:
        """Attach to what these processes (tgid -> service) map, detach from what others do. Called once a second.

        Takes about ROUND_S at most; the processes that were not looked at for longest come first.
        """
        deadline = self._clock() + ROUND_S
        for tgid in self._processes.keys() - tgids.keys():
            self._let_go(tgid)
        for tgid, service in tgids.items():
            process = self._processes.setdefault(tgid, _Process(service))
            if process.service != service:
                self._let_go(tgid)
                self._processes[tgid] = _Process(service)
        for tgid in sorted(self._processes, key=lambda tgid: self._processes[tgid].looked):
            self._look_at(tgid, self._processes[tgid])
            if self._clock() >= deadline:
                break
        # Last: a file whose one process went is kept for another one that came.
        self._release()
        self._close_some(deadline)

    def close(self) -> None:
        """Detach from everything, and wait for it."""
        for tgid in list(self._processes):
            self._let_go(tgid)
        self._release()
        for _, link in self._leaving:
            link.destroy()
        self._leaving.clear()
        self._closing.clear()
        if self._closers is not None:
            self._closers.shutdown()
            self._closers = None

    # ---- processes ----

    def _look_at(self, tgid: int, process: _Process) -> None:
        process.looked = self._clock()
        identity = self._identity(tgid)
        if identity is None:
            return  # it ended; the next round does without it
        if identity == process.identity and not self._due_again(process):
            return
        before = process.identity
        if before is not None and (before.start, before.stack) != (identity.start, identity.stack):
            self._let_go(tgid)  # another program, or another process of that number: its links are the old one's
            self._release(tgid)
            self._processes[tgid] = process
        process.identity = identity
        mappings = self._mappings(tgid)
        if mappings is None:
            return
        used = {
            key
            for number, group in enumerate(self._groups)
            if group.service in (None, process.service)
            for mapping in self._of_library(tgid, mappings, group.library)
            if (key := self._attach(tgid, mapping, number)) is not None
        }
        for key in process.keys - used:
            self._stop_using(tgid, key)
        process.keys = used

    def _due_again(self, process: _Process) -> bool:
        """Whether something could not be attached to, long enough ago."""
        retries = (self._attached[key].retry_at for key in process.keys)
        return any(at is not None and at <= self._clock() for at in retries)

    def _let_go(self, tgid: int) -> None:
        process = self._processes.pop(tgid)
        for key in process.keys:
            self._stop_using(tgid, key)
        if process.keys:
            self._mapped(tgid, 0, 0)
        process.keys = set()

    def _stop_using(self, tgid: int, key: _Key) -> None:
        attached = self._attached[key]
        attached.users.discard(tgid)
        if not attached.users:
            self._unused.add(key)

    def _release(self, tgid: int = 0) -> None:
        """Detach from what nobody uses any more; of one process alone where `tgid` is not 0."""
        for key in [key for key in self._unused if tgid in (0, key.tgid)]:
            self._unused.remove(key)
            if self._attached[key].users:
                continue
            self._leave(key, self._attached.pop(key).links)
            if not any(other.file == key.file for other in self._attached):
                for place in [place for place in self._missing if place[0] == key.file]:
                    del self._missing[place]

    def _identity(self, tgid: int) -> _Identity | None:
        raw = self._read(f"{tgid}/stat", 4096)
        parsed = parse_stat(raw)
        status = self._read(f"{tgid}/status", 16384)
        if parsed is None or not status:
            return None
        fields = raw[raw.rfind(b")") + 2 :].split()
        stack = int(fields[_START_STACK]) if len(fields) > _START_STACK and fields[_START_STACK].isdigit() else 0
        return _Identity(parsed.start, stack, tuple(_CODE_BYTES.findall(status)))

    def _mappings(self, tgid: int) -> list[_Mapping] | None:
        raw = self._read(f"{tgid}/maps", _MAPS_BYTES)
        if len(raw) >= _MAPS_BYTES:
            self._fail(f"/proc/{tgid}/maps", "has more than 8 MiB")
            return None
        return [
            _Mapping(int(start, 16), int(end, 16), int(inode), os.fsdecode(path).removesuffix(" (deleted)"))
            for start, end, inode, path in _CODE.findall(raw)
        ]

    def _of_library(self, tgid: int, mappings: Iterable[_Mapping], library: str) -> Iterator[_Mapping]:
        """The first mapping of each file that may be the library."""
        inode = self._inode_of(tgid, library) if library.startswith("/") else None
        seen: set[int] = set()
        for mapping in mappings:
            if mapping.inode not in seen and (mapping.inode == inode or _may_be(mapping.path, library)):
                if len(seen) == _FILES_OF_A_NAME:
                    self._fail(mapping.path, f"process {tgid} maps more than {len(seen)} files of that name")
                    return
                seen.add(mapping.inode)
                yield mapping

    def _inode_of(self, tgid: int, path: str) -> int | None:
        """The inode of a path as the process sees it, symbolic links resolved in its own root."""
        try:
            with self._opened_in_root(tgid, path) as fd:
                return os.fstat(fd).st_ino
        except OSError:
            return None

    # ---- files ----

    def _attach(self, tgid: int, mapping: _Mapping, number: int) -> _Key | None:
        """Attach a group to a file, or find that this was done; None where there is nothing to hold on to."""
        library, _, symbols = self._groups[number]
        try:
            with self._opened(tgid, mapping) as fd:
                status = os.fstat(fd)
                if not stat.S_ISREG(status.st_mode):
                    return None
                file = _FileId(status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size)
                functions = self._functions(file, fd, mapping.path)
                if functions is None or not _is(mapping.path, functions, library):
                    return None
                key = _Key(tgid if self._scope is Scope.PROCESS else 0, file, number)
                attached = self._attached.get(key)
                if attached is None or (attached.retry_at is not None and attached.retry_at <= self._clock()):
                    if attached is not None:
                        self._leave(key, attached.links)
                    self._wait_until_closed(key)
                    users = attached.users if attached is not None else set()
                    attached = self._attached[key] = _Attached(_printable(mapping.path), users=users)
                    self._attach_all(key, attached, f"/proc/self/fd/{fd}", functions, symbols)
        except OSError as error:
            # Not there any more: the process ended, or unmapped it.
            if error.errno not in (errno.ENOENT, errno.ESRCH):
                self._fail(mapping.path, os.strerror(error.errno or 0))
            return None
        attached.users.add(tgid)
        self._mapped(tgid, mapping.start, mapping.end)
        return key

    def _attach_all(
        self, key: _Key, attached: _Attached, path: str, functions: Functions, symbols: Iterable[Symbol]
    ) -> None:
        # A function of two names is attached to once.
        places: dict[tuple[str, bool], dict[int, int]] = {}
        for symbol in symbols:
            program = self._owner.program(symbol.program)
            if symbol.usdt:
                provider, _, name = symbol.name.partition(":")
                self._try(key, attached, symbol.name, partial(program.attach_usdt, path, provider, name, symbol.cookie))
                continue
            offset = functions.offsets.get(symbol.name)
            if offset is None:
                self._miss(key, attached, symbol.name, "it has no such function")
                continue
            places.setdefault((symbol.program, symbol.returns), {}).setdefault(offset, symbol.cookie)
        for (name, returns), cookies in places.items():
            program = self._owner.program(name)
            if self._multi:
                offsets, values = list(cookies), list(cookies.values())
                attach = partial(program.attach_uprobe_multi, path, offsets, values, tgid=key.tgid, returns=returns)
                self._try(key, attached, "", attach)
                continue
            for offset, cookie in cookies.items():
                self._try(key, attached, "", partial(program.attach_uprobe, path, offset, cookie, returns=returns))

    def _try(self, key: _Key, attached: _Attached, name: str, attach: Callable[[], UserLink]) -> None:
        try:
            attached.links.append(attach())
        except NoSuchProbeError:
            self._miss(key, attached, name, "it has no such USDT probe")
        except FootlightError as error:
            if key.tgid and not Path(f"{self._proc}/{key.tgid}").exists():
                return  # the process ended first
            attached.retry_at = self._clock() + RETRY_S
            reason = error.what.partition("\n")[0]
            reason = _DESCRIPTOR.sub(lambda _: attached.path, reason)
            self._miss(key, attached, name, reason)
            self._warn(reason)

    def _miss(self, key: _Key, attached: _Attached, name: str, reason: str) -> None:
        missing = Missing(attached.path, name, reason)
        if self._missing.get((key.file, name)) != missing:
            log.debug("%s: %s: %s", attached.path, name or "not attached", reason)
            self._missing[key.file, name] = missing

    def _functions(self, file: _FileId, fd: int, path: str) -> Functions | None:
        """What the file says of the wanted functions; read once for each version of each file."""
        if file in self._known:
            self._known.move_to_end(file)
            return self._known[file]
        found: Functions | None = None
        try:
            readable = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            try:
                found = find_functions(readable, self._names)
            finally:
                os.close(readable)
        except ElfError as error:
            self._fail(path, str(error))
        self._known[file] = found
        if len(self._known) > _KNOWN_FILES:
            self._known.popitem(last=False)
        return found

    def _fail(self, path: str, reason: str) -> None:
        self._warn(f"{_printable(path)}: {reason}")

    def _warn(self, text: str) -> None:
        self.failed += 1
        if self._warned < _WARNINGS:
            self._warned += 1
            log.warning("%s", text)

    # ---- detaching ----

    def _leave(self, key: _Key, links: Iterable[UserLink]) -> None:
        """Give links to be closed: to threads, and those that only this one may close to the next rounds."""
        for link in links:
            if not link.any_thread:
                self._leaving.append((key, link))
                continue
            if self._closers is None:
                self._closers = ThreadPoolExecutor(_CLOSERS, "uprobe-closer")
            self._closing.setdefault(key, []).append(self._closers.submit(link.destroy))

    def _close_some(self, deadline: float) -> None:
        self._closing = {key: links for key, links in self._closing.items() if not all(link.done() for link in links)}
        while self._leaving:
            _, link = self._leaving.pop()
            link.destroy()
            if self._clock() >= deadline:
                return

    def _wait_until_closed(self, key: _Key) -> None:
        for closing in self._closing.pop(key, ()):
            closing.result()
        for _, link in [each for each in self._leaving if each[0] == key]:
            link.destroy()
        self._leaving = [each for each in self._leaving if each[0] != key]

    # ---- /proc ----

    @contextmanager
    def _opened(self, tgid: int, mapping: _Mapping) -> Iterator[int]:
        """The mapped file, as a descriptor that is good for nothing but to say what it is. Raises OSError."""
        try:
            path = f"{self._proc}/{tgid}/map_files/{mapping.start:x}-{mapping.end:x}"
            fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except PermissionError:
            with self._opened_in_root(tgid, mapping.path) as fd:
                if os.fstat(fd).st_ino != mapping.inode:
                    raise FileNotFoundError(errno.ENOENT, "another file has that name", mapping.path) from None
                yield fd
            return
        try:
            yield fd
        finally:
            os.close(fd)

    @contextmanager
    def _opened_in_root(self, tgid: int, path: str) -> Iterator[int]:
        root = os.open(f"{self._proc}/{tgid}/root", os.O_PATH | os.O_CLOEXEC)
        try:
            fd = _open_in_root(root, path)
        finally:
            os.close(root)
        try:
            yield fd
        finally:
            os.close(fd)

    def _read(self, name: str, limit: int) -> bytes:
        try:
            fd = os.open(f"{self._proc}/{name}", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return b""
        try:
            pieces = []
            while limit > 0 and (piece := os.read(fd, limit)):
                pieces.append(piece)
                limit -= len(piece)
            return b"".join(pieces)
        except OSError:
            return b""
        finally:
            os.close(fd)


def _printable(path: str) -> str:
    return "".join(char if char.isprintable() else "\ufffd" for char in path)


def _grouped(symbols: Iterable[Symbol]) -> tuple[_Group, ...]:
    groups: dict[tuple[str, int | None], list[Symbol]] = {}
    for symbol in symbols:
        groups.setdefault((symbol.library, symbol.service), []).append(symbol)
    return tuple(_Group(library, service, tuple(members)) for (library, service), members in groups.items())


class _OpenHow(ctypes.Structure):
    """The kernel's struct open_how (linux/openat2.h)."""

    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


def _open_in_root(root: int, path: str) -> int:
    """Open a path as a process with that root would, without reading it (Linux 5.6). Raises OSError."""
    how = _OpenHow(os.O_PATH | os.O_CLOEXEC, 0, _RESOLVE_IN_ROOT)
    call = ctypes.CDLL(None, use_errno=True).syscall
    call.restype = ctypes.c_long
    name = ctypes.c_char_p(os.fsencode(path))
    fd = int(call(ctypes.c_long(_SYS_OPENAT2), root, name, ctypes.byref(how), ctypes.c_size_t(ctypes.sizeof(how))))
    if fd < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error), path)
    return fd


def _may_be(path: str, library: str) -> bool:
    """Whether a mapped file may be the library by its name: the maps have the name behind all symbolic links."""
    if library.startswith("/"):
        return path == library
    name = path.rpartition("/")[2]
    stem, dot_so, _ = library.partition(".so")
    return name == library or (bool(dot_so) and (name == stem + dot_so or name.startswith(f"{stem}{dot_so}.")))


def _is(path: str, functions: Functions, library: str) -> bool:
    """Whether it is the library, now that its own name for itself is known."""
    return library.startswith("/") or library in (path.rpartition("/")[2], functions.soname)
