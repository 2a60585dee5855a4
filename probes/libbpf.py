"""Loads BPF objects, through the system's libbpf.

ctypes on `libbpf.so.1`. The privileged process imports this module, so it imports no numpy. Nothing here is safe to
call from two threads: libbpf has one print function for the process, and so there is one log.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import platform
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from probes.errors import FootlightError, HostError, ProbeError

_SONAME: Final = "libbpf.so.1"
_ENOTSUPP: Final = 524  # the kernel's own, not in errno.h
_BPF_TRACE_RAW_TP: Final = 23
_BTF_KIND_DATASEC: Final = 15
_STATS_RUN_TIME: Final = 0
_LOG_LINES: Final = 200
_LOG_LINE_BYTES: Final = 1 << 20
_MESSAGE_CHARACTERS: Final = 2000
_BATCH_BYTES: Final = 1 << 20
_BPF_PROG_LOAD: Final = 5
_BPF_LINK_CREATE: Final = 28
_BPF_PROG_TYPE_KPROBE: Final = 2
_BPF_TRACE_UPROBE_MULTI: Final = 48
_BPF_F_UPROBE_MULTI_RETURN: Final = 1
_SYS_BPF: Final = {"x86_64": 321, "aarch64": 280}

MAP_TYPE_RINGBUF: Final = 27
_PER_CPU_MAP_TYPES: Final = frozenset({5, 6, 10, 21})  # per-CPU hash, array, LRU hash, cgroup storage

_pointer = ctypes.c_void_p
_string = ctypes.c_char_p
_int = ctypes.c_int
_u32 = ctypes.c_uint32
_size = ctypes.c_size_t

_PROTOTYPES: Final[dict[str, tuple[type | None, list[type]]]] = {
    "libbpf_version_string": (_string, []),
    "libbpf_strerror": (_int, [_int, _string, _size]),
    "libbpf_num_possible_cpus": (_int, []),
    "libbpf_find_vmlinux_btf_id": (_int, [_string, _int]),
    "bpf_object__open": (_pointer, [_string]),
    "bpf_object__load": (_int, [_pointer]),
    "bpf_object__close": (None, [_pointer]),
    "bpf_object__btf": (_pointer, [_pointer]),
    "bpf_object__next_map": (_pointer, [_pointer, _pointer]),
    "bpf_object__next_program": (_pointer, [_pointer, _pointer]),
    "bpf_object__find_map_by_name": (_pointer, [_pointer, _string]),
    "bpf_map__name": (_string, [_pointer]),
    "bpf_map__fd": (_int, [_pointer]),
    "bpf_map__type": (_int, [_pointer]),
    "bpf_map__key_size": (_u32, [_pointer]),
    "bpf_map__value_size": (_u32, [_pointer]),
    "bpf_map__max_entries": (_u32, [_pointer]),
    "bpf_map__set_max_entries": (_int, [_pointer, _u32]),
    "bpf_map__set_autocreate": (_int, [_pointer, ctypes.c_bool]),
    "bpf_map__reuse_fd": (_int, [_pointer, _int]),
    "bpf_map__is_internal": (ctypes.c_bool, [_pointer]),
    "bpf_map__initial_value": (_pointer, [_pointer, ctypes.POINTER(_size)]),
    "bpf_program__name": (_string, [_pointer]),
    "bpf_program__section_name": (_string, [_pointer]),
    "bpf_program__fd": (_int, [_pointer]),
    "bpf_program__autoload": (ctypes.c_bool, [_pointer]),
    "bpf_program__set_autoload": (_int, [_pointer, ctypes.c_bool]),
    "bpf_program__attach": (_pointer, [_pointer]),
    "bpf_program__set_expected_attach_type": (_int, [_pointer, _int]),
    "bpf_program__attach_uprobe_opts": (_pointer, [_pointer, _int, _string, _size, _pointer]),
    "bpf_program__attach_usdt": (_pointer, [_pointer, _int, _string, _string, _string, _pointer]),
    "bpf_link__destroy": (_int, [_pointer]),
    "btf__free": (None, [_pointer]),
    "btf__load_vmlinux_btf": (_pointer, []),
    "btf__find_by_name_kind": (ctypes.c_int32, [_pointer, _string, _u32]),
    "btf__type_cnt": (_u32, [_pointer]),
    "btf__type_by_id": (_pointer, [_pointer, _u32]),
    "btf__name_by_offset": (_string, [_pointer, _u32]),
    "btf__resolve_size": (ctypes.c_int64, [_pointer, _u32]),
    "bpf_map_create": (_int, [_int, _string, _u32, _u32, _u32, _pointer]),
    "bpf_map_lookup_elem": (_int, [_int, _pointer, _pointer]),
    "bpf_map_update_elem": (_int, [_int, _pointer, _pointer, ctypes.c_uint64]),
    "bpf_map_delete_elem": (_int, [_int, _pointer]),
    "bpf_map_get_next_key": (_int, [_int, _pointer, _pointer]),
    "bpf_map_lookup_batch": (_int, [_int, _pointer, _pointer, _pointer, _pointer, _pointer, _pointer]),
    "bpf_obj_get_info_by_fd": (_int, [_int, _pointer, _pointer]),
    "bpf_enable_stats": (_int, [_int]),
}


class _Log:
    """The last lines that libbpf printed, debug lines left out. Bounded: 200 messages, each its last 1 MiB."""

    def __init__(self) -> None:
        self._messages: deque[str] = deque(maxlen=_LOG_LINES)
        self._vsnprintf = ctypes.CDLL(None).vsnprintf
        self._vsnprintf.argtypes = [_pointer, _size, _string, _pointer]
        # A long message is formatted twice, and the first time uses the va_list up. Its size differs by ABI.
        self._va_list_bytes = 24 if platform.machine() == "x86_64" else 32
        self.callback = ctypes.CFUNCTYPE(_int, _int, _string, _pointer)(self._print)

    def _print(self, level: int, fmt: bytes, arguments: int) -> int:
        if level > 1:  # LIBBPF_DEBUG
            return 0
        saved = ctypes.string_at(arguments, self._va_list_bytes)
        text = ctypes.create_string_buffer(1024)
        needed = self._vsnprintf(text, len(text), fmt, arguments)
        if needed >= len(text):
            ctypes.memmove(arguments, saved, len(saved))
            text = ctypes.create_string_buffer(needed + 1)
            self._vsnprintf(text, len(text), fmt, arguments)
        # The end of a verifier's log says why it refused.
        self._messages.append(text.value[-_LOG_LINE_BYTES:].decode(errors="replace").rstrip("\n"))
        return 0

    def clear(self) -> None:
        self._messages.clear()

    def text(self) -> str:
        """Return what was printed since the last clear(), its last 2000 characters."""
        whole = "\n".join(self._messages)
        return whole if len(whole) <= _MESSAGE_CHARACTERS else "[...]" + whole[-_MESSAGE_CHARACTERS:]


_log = _Log()


@functools.cache
def _library() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(_SONAME, use_errno=True)
        for name, (result, arguments) in _PROTOTYPES.items():
            function = getattr(library, name)
            function.restype = result
            function.argtypes = arguments
    except OSError as error:
        raise HostError(f"{_SONAME} was not found ({error})", "apt-get install libbpf1") from error
    except AttributeError as error:
        raise HostError(f"{_SONAME} is older than 1.0 ({error})", "install libbpf 1.0 or newer") from error
    library.libbpf_set_print(_log.callback)
    return library


def version() -> str:
    """Return libbpf's own version, such as `v1.1`. Raises HostError where the library is missing."""
    return str(_library().libbpf_version_string().decode())


def possible_cpus() -> int:
    """Return how many CPUs the kernel can ever have: the number of values in a per-CPU map's entry."""
    count = int(_library().libbpf_num_possible_cpus())
    if count < 1:
        raise _failure("cannot read the number of possible CPUs", -count)
    return count


def has_ring_buffer() -> bool:
    """Try to make a ring-buffer map (Linux 5.8 has them). Raises HostError where BPF itself is refused."""
    page_bytes = os.sysconf("SC_PAGE_SIZE")
    descriptor = int(_library().bpf_map_create(MAP_TYPE_RINGBUF, b"footlight_test", 0, 0, page_bytes, None))
    if descriptor >= 0:
        os.close(descriptor)
        return True
    if descriptor == -errno.EPERM:
        raise _failure("cannot make a BPF map", errno.EPERM)
    return False


def has_btf_tracepoint(name: str) -> bool:
    """Say whether the kernel's BTF has the tracepoint, so that a `tp_btf` program for it can load."""
    return int(_library().libbpf_find_vmlinux_btf_id(name.encode(), _BPF_TRACE_RAW_TP)) > 0


def per_cpu_offsets(*variables: str) -> dict[str, int]:
    """Where in the kernel's per-CPU section each variable lies, as the kernel's BTF says; those that it has."""
    library = _library()
    btf = library.btf__load_vmlinux_btf()
    if not btf:
        return {}
    found: dict[str, int] = {}
    try:
        number = library.btf__find_by_name_kind(btf, b".data..percpu", _BTF_KIND_DATASEC)
        if number < 0:
            return {}
        section = library.btf__type_by_id(btf, number)
        count = _u32.from_address(section + 4).value & 0xFFFF
        for variable, offset, _ in (_u32 * 3 * count).from_address(section + 12):  # struct btf_var_secinfo
            name = library.btf__name_by_offset(btf, _u32.from_address(library.btf__type_by_id(btf, variable)).value)
            if name.decode() in variables:
                found[name.decode()] = offset
    finally:
        library.btf__free(btf)
    return found


def enable_run_stats() -> int:
    """Make the kernel time every BPF program on the host; return the descriptor that keeps it on while it is open.

    Costs every run of every program two clock reads. Raises HostError without CAP_SYS_ADMIN, or before Linux 5.8.
    """
    descriptor = int(_library().bpf_enable_stats(_STATS_RUN_TIME))
    if descriptor < 0:
        raise _failure("cannot switch on BPF run-time statistics", -descriptor, host_at_fault=True)
    return descriptor


class _UprobeMulti(ctypes.Structure):
    """The kernel's union bpf_attr, as BPF_LINK_CREATE reads it for a uprobe_multi link (linux/bpf.h, fixed ABI)."""

    _fields_ = (
        ("prog_fd", ctypes.c_uint32),
        ("target_fd", ctypes.c_uint32),
        ("attach_type", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("path", ctypes.c_uint64),
        ("offsets", ctypes.c_uint64),
        ("ref_ctr_offsets", ctypes.c_uint64),
        ("cookies", ctypes.c_uint64),
        ("cnt", ctypes.c_uint32),
        ("multi_flags", ctypes.c_uint32),
        ("pid", ctypes.c_uint32),
        ("pad", ctypes.c_uint32),
    )


class _ProgramLoad(ctypes.Structure):
    """The same for BPF_PROG_LOAD, up to the expected attach type."""

    _fields_ = (
        ("prog_type", ctypes.c_uint32),
        ("insn_cnt", ctypes.c_uint32),
        ("insns", ctypes.c_uint64),
        ("license", ctypes.c_uint64),
        ("log", ctypes.c_uint8 * 44),
        ("expected_attach_type", ctypes.c_uint32),
    )


class _UprobeOptions(ctypes.Structure):
    """libbpf's struct bpf_uprobe_opts, as of 1.0: later members are at the end, and `sz` says which there are."""

    _fields_ = (
        ("sz", ctypes.c_size_t),
        ("ref_ctr_offset", ctypes.c_size_t),
        ("bpf_cookie", ctypes.c_uint64),
        ("retprobe", ctypes.c_bool),
        ("func_name", ctypes.c_char_p),
    )


class _UsdtOptions(ctypes.Structure):
    """libbpf's struct bpf_usdt_opts."""

    _fields_ = (("sz", ctypes.c_size_t), ("usdt_cookie", ctypes.c_uint64))


def _bpf(command: int, attributes: ctypes.Structure) -> int:
    """The system call itself, for what libbpf 1.1 cannot ask: a descriptor, or a negative errno."""
    number = _SYS_BPF.get(platform.machine())
    if number is None:
        return -errno.ENOSYS
    call = ctypes.CDLL(None, use_errno=True).syscall
    call.restype = ctypes.c_long
    size = ctypes.sizeof(attributes)
    result = int(call(ctypes.c_long(number), ctypes.c_int(command), ctypes.byref(attributes), ctypes.c_uint(size)))
    return result if result >= 0 else -ctypes.get_errno()


@functools.cache
def has_uprobe_multi() -> bool:
    """Try whether one link can hold many uprobes of one process (Linux 6.6), which the kernel filters by process.

    The first kernels filtered by thread; those that were mended refuse the tgid -1 before they look at the path.
    """
    return_0 = (ctypes.c_uint64 * 2)(0xB7, 0x95)
    licence = ctypes.create_string_buffer(b"Dual BSD/GPL")
    program = _ProgramLoad(
        prog_type=_BPF_PROG_TYPE_KPROBE,
        insn_cnt=len(return_0),
        insns=ctypes.addressof(return_0),
        license=ctypes.addressof(licence),
        expected_attach_type=_BPF_TRACE_UPROBE_MULTI,
    )
    descriptor = _bpf(_BPF_PROG_LOAD, program)
    if descriptor < 0:
        return False
    try:
        made = _uprobe_multi(descriptor, "/", (0,), None, 0xFFFFFFFF, returns=False)
    finally:
        os.close(descriptor)
    if made >= 0:
        os.close(made)
    return made == -errno.EINVAL


def _uprobe_multi(
    program: int, path: str, offsets: Sequence[int], cookies: Sequence[int] | None, tgid: int, *, returns: bool
) -> int:
    """The descriptor of the link, or a negative errno."""
    name = ctypes.create_string_buffer(os.fsencode(path))
    places = (ctypes.c_uint64 * len(offsets))(*offsets)
    values = (ctypes.c_uint64 * len(offsets))(*(cookies or (0,) * len(offsets)))
    attributes = _UprobeMulti(
        prog_fd=program,
        attach_type=_BPF_TRACE_UPROBE_MULTI,
        path=ctypes.addressof(name),
        offsets=ctypes.addressof(places),
        cookies=ctypes.addressof(values) if cookies else 0,
        cnt=len(offsets),
        multi_flags=_BPF_F_UPROBE_MULTI_RETURN if returns else 0,
        pid=tgid,
    )
    return _bpf(_BPF_LINK_CREATE, attributes)


def _strerror(error: int) -> str:
    text = ctypes.create_string_buffer(256)
    _library().libbpf_strerror(error, text, len(text))  # knows libbpf's own numbers too
    return text.value.decode(errors="replace") if error != _ENOTSUPP else "not supported by this kernel"


def _failure(what: str, error: int, *, host_at_fault: bool = False, sysfs: Path = Path("/sys")) -> FootlightError:
    """Look at the world, and return the exception that says whose fault it was. `error` is a positive errno."""
    whole = f"{what}: {_strerror(error)}"
    if error == errno.EPERM:
        if os.geteuid() != 0:
            return HostError(whole, "run as root")
        return HostError(whole, "give CAP_BPF and CAP_PERFMON, or CAP_SYS_ADMIN; look for a seccomp filter or lockdown")
    if host_at_fault:
        return HostError(whole, "use a newer kernel, or do without")
    if not (sysfs / "kernel/btf/vmlinux").exists():
        whole += f"; this kernel has no BTF in {sysfs}/kernel/btf/vmlinux"
        return HostError(whole, "use a kernel built with CONFIG_DEBUG_INFO_BTF=y")
    log = _log.text()
    if log:
        whole += f"\nlibbpf's log:\n{log}"
    return ProbeError(whole, "see `footlight check`, and report the log if it finds nothing")


@dataclass(frozen=True, slots=True)
class ProgramStats:
    """What the kernel counted for one program since it was loaded; zeros while run-time statistics are off.

    `misses` are runs that the kernel left out because the program was already running on that CPU: events unseen.
    They are counted even while statistics are off.
    """

    run_ns: int
    runs: int
    misses: int


class _ProgramInfo(ctypes.Structure):
    """The front of the kernel's struct bpf_prog_info (linux/bpf.h, fixed ABI)."""

    _fields_ = (
        ("before", ctypes.c_uint8 * 192),
        ("run_time_ns", ctypes.c_uint64),
        ("run_cnt", ctypes.c_uint64),
        ("recursion_misses", ctypes.c_uint64),
    )


class Link:
    """An attached program. It stays attached until destroy(), close() of its object, or the end of the process.

    A forked child cannot detach what its parent attached: there destroy() does nothing. libbpf's own would disable the
    perf events of classic tracepoints, which parent and child share.
    """

    def __init__(self, handle: int, program: str) -> None:
        self._handle: int | None = handle
        self._made_by = os.getpid()
        self.program = program

    def destroy(self) -> None:
        """Detach. A second call does nothing."""
        handle, self._handle = self._handle, None
        if handle is not None and os.getpid() == self._made_by:
            _library().bpf_link__destroy(handle)


class NoSuchProbeError(ProbeError):
    """The file does not have what was to be attached to."""


class UserLink:
    """A program on uprobes of one file, until destroy() or the end of the process; whoever made it destroys it.

    Its descriptors keep the breakpoints in the kernel, so a forked child closes its copies of them at once: else what
    the parent detaches would stay for as long as the child lives. Any thread may destroy the links of `any_thread`.
    """

    def __init__(self, fds: Sequence[int], detach: Callable[[], object], *, any_thread: bool = False) -> None:
        self.any_thread = any_thread
        self._fds = tuple(fds)
        self._detach: Callable[[], object] | None = detach
        _user_links.add(self)

    def destroy(self) -> None:
        """Detach. It takes the kernel between 40 and 110 ms for each descriptor. A second call does nothing."""
        detach, self._detach = self._detach, None
        if detach is not None:
            detach()
        _user_links.discard(self)

    def forget(self) -> None:
        """In a forked child: give up the descriptors, which detaches nothing."""
        destroying, self._detach = self._detach is None, None
        for fd in self._fds:
            # Another thread of the parent was closing it: the number may be another file's, but never another link's
            # that this process needs.
            if destroying and not _names_link(fd):
                continue
            os.close(fd)


_user_links: set[UserLink] = set()


def _names_link(fd: int) -> bool:
    try:
        return "link" in os.readlink(f"/proc/self/fd/{fd}")  # noqa: PTH115 - no path, a kind
    except OSError:
        return False


def _forget_user_links() -> None:
    for link in list(_user_links):
        link.forget()
    _user_links.clear()


os.register_at_fork(after_in_child=_forget_user_links)


class Program:
    """One BPF program of an object. `section` says where it attaches, such as `tp/syscalls/sys_enter_write`."""

    def __init__(self, owner: Object, handle: int) -> None:
        self._owner = owner
        self._handle = handle
        self.name: str = _library().bpf_program__name(handle).decode()
        self.section: str = _library().bpf_program__section_name(handle).decode()

    def __repr__(self) -> str:
        return f"Program({self.section!r}, {self.name!r})"

    @property
    def autoload(self) -> bool:
        """Whether load() loads it."""
        self._owner.check_open()
        return bool(_library().bpf_program__autoload(self._handle))

    def set_autoload(self, wanted: bool) -> None:
        """Choose, before load(), whether the program is loaded at all."""
        self._owner.check_open()
        _check(f"{self}: set_autoload", _library().bpf_program__set_autoload(self._handle, wanted))

    @property
    def fd(self) -> int:
        """The descriptor, owned by the object. Raises ProbeError before load(), or when it was not to be loaded."""
        self._owner.check_open()
        descriptor = int(_library().bpf_program__fd(self._handle))
        if descriptor < 0:
            raise ProbeError(f"{self} is not loaded", "load the object first, with this program")
        return descriptor

    def attach(self) -> Link:
        """Attach as the section says; the object's close() detaches. Raises HostError or ProbeError."""
        self._owner.check_open()
        _log.clear()
        ctypes.set_errno(0)
        handle = _library().bpf_program__attach(self._handle)
        if not handle:
            raise self._attach_failure(ctypes.get_errno())
        return self._owner.adopt(Link(handle, self.name))

    def set_uprobe_multi(self) -> None:
        """Choose, before load(), that the program is for attach_uprobe_multi() and nothing else."""
        self._owner.check_open()
        result = _library().bpf_program__set_expected_attach_type(self._handle, _BPF_TRACE_UPROBE_MULTI)
        _check(f"{self}: set_uprobe_multi", result)

    def attach_uprobe_multi(
        self, path: str, offsets: Sequence[int], cookies: Sequence[int], *, tgid: int = 0, returns: bool = False
    ) -> UserLink:
        """Attach to functions of the file, at `offsets` in it, each with its cookie; to their returns if `returns`.

        Only in the process `tgid`, or where it is 0 in all that map the file. Raises HostError or ProbeError.
        """
        descriptor = _uprobe_multi(self.fd, path, offsets, cookies, tgid, returns=returns)
        if descriptor < 0:
            _log.clear()
            raise _failure(f"cannot attach {self.name} to {len(offsets)} functions of {path}", -descriptor)
        return UserLink((descriptor,), lambda: os.close(descriptor), any_thread=True)

    def attach_uprobe(
        self, path: str, offset: int, cookie: int, *, tgid: int = 0, returns: bool = False
    ) -> UserLink:
        """The same for one function, by a perf event: for kernels without has_uprobe_multi().

        A cookie needs Linux 5.15: before, only 0 is taken.
        """
        options = _UprobeOptions(
            sz=ctypes.sizeof(_UprobeOptions), bpf_cookie=cookie, retprobe=returns, func_name=None
        )
        return self._attach_to_file(
            f"function at {offset:#x} of {path}",
            lambda library: library.bpf_program__attach_uprobe_opts(
                self._handle, tgid or -1, os.fsencode(path), offset, ctypes.byref(options)
            ),
            any_thread=True,
        )

    def attach_usdt(self, path: str, provider: str, name: str, cookie: int, *, tgid: int = 0) -> UserLink:
        """Attach to every place in the file where the USDT probe is. The object needs the maps of bpf/usdt.bpf.h.

        libbpf reads the file as ELF, and opens it without a look at what it is: a FIFO would hold it for ever. Raises
        NoSuchProbeError where the file has none of that name.
        """
        options = _UsdtOptions(sz=ctypes.sizeof(_UsdtOptions), usdt_cookie=cookie)
        return self._attach_to_file(
            f"probe {provider}:{name} of {path}",
            lambda library: library.bpf_program__attach_usdt(
                self._handle, tgid or -1, os.fsencode(path), provider.encode(), name.encode(), ctypes.byref(options)
            ),
        )

    def _attach_to_file(
        self, what: str, attach: Callable[[ctypes.CDLL], int | None], *, any_thread: bool = False
    ) -> UserLink:
        self._owner.check_open()
        _log.clear()
        before = _descriptors()
        ctypes.set_errno(0)
        handle = attach(_library())
        if not handle:
            error = ctypes.get_errno()
            if error == errno.ENOENT:
                raise NoSuchProbeError(f"there is no {what}", "name another one, or another file")
            raise _failure(f"cannot attach {self.name} to the {what}", error)
        # libbpf tells the descriptor of a link, but not those of its perf events, nor those of a USDT probe.
        made = sorted(_descriptors() - before)
        return UserLink(made, lambda: _library().bpf_link__destroy(handle), any_thread=any_thread)

    def _attach_failure(self, error: int, sysfs: Path = Path("/sys")) -> FootlightError:
        kind, _, rest = self.section.partition("/")
        mounts = (sysfs / "kernel/tracing/events", sysfs / "kernel/debug/tracing/events")
        if kind in {"tp", "tracepoint"}:
            if not any(_exists(mount) for mount in mounts):
                what = f"cannot attach {self.name} to {rest}: tracefs is not mounted"
                return HostError(what, f"mount -t tracefs tracefs {sysfs}/kernel/tracing")
            if not any(_exists(mount / rest) for mount in mounts):
                what = f"cannot attach {self.name}: this kernel has no tracepoint {rest}"
                return HostError(what, "leave the probe out, or use another kernel")
        return _failure(f"cannot attach {self.name} ({self.section})", error)

    def stats(self) -> ProgramStats:
        """Return the kernel's counts for this program, see enable_run_stats()."""
        info = _ProgramInfo()
        length = _u32(ctypes.sizeof(info))
        result = _library().bpf_obj_get_info_by_fd(self.fd, ctypes.byref(info), ctypes.byref(length))
        _check(f"{self}: statistics", result)
        return ProgramStats(run_ns=info.run_time_ns, runs=info.run_cnt, misses=info.recursion_misses)


class Map:
    """One map of an object. Keys and values are bytes, in the layout of the C structs.

    A per-CPU map's value is one value per possible CPU, each padded to 8 bytes, joined: `entry_size` bytes.
    """

    def __init__(self, owner: Object, handle: int) -> None:
        library = _library()
        self._owner = owner
        self._handle = handle
        self.name: str = library.bpf_map__name(handle).decode()
        self.kind: int = library.bpf_map__type(handle)
        self.key_size: int = library.bpf_map__key_size(handle)
        self.value_size: int = library.bpf_map__value_size(handle)
        self.entry_size: int = self.value_size
        if self.kind in _PER_CPU_MAP_TYPES:
            self.entry_size = -(-self.value_size // 8) * 8 * possible_cpus()

    def __repr__(self) -> str:
        return f"Map({self.name!r})"

    @property
    def max_entries(self) -> int:
        """Entries, or the bytes of a ring buffer. Settable before load()."""
        self._owner.check_open()
        return int(_library().bpf_map__max_entries(self._handle))

    @max_entries.setter
    def max_entries(self, count: int) -> None:
        self._owner.check_open()
        _check(f"{self}: set max_entries to {count}", _library().bpf_map__set_max_entries(self._handle, count))

    def set_autocreate(self, wanted: bool) -> None:
        """Choose, before load(), whether the map is made. A program may name a map that was not made only in code
        that the verifier finds dead, so switch it off with a `const volatile` global as well."""
        self._owner.check_open()
        _check(f"{self}: set_autocreate", _library().bpf_map__set_autocreate(self._handle, wanted))

    def reuse(self, other: Map) -> None:
        """Be, from load() on, the same map as `other` of another object, which is loaded. Raises ProbeError."""
        self._owner.check_open()
        _check(f"{self}: reuse", _library().bpf_map__reuse_fd(self._handle, other.fd))

    @property
    def fd(self) -> int:
        """The descriptor, owned by the object. Raises ProbeError before load(), or when it was not to be made."""
        self._owner.check_open()
        descriptor = int(_library().bpf_map__fd(self._handle))
        if descriptor < 0:
            raise ProbeError(f"{self} was not made", "load the object first, with this map")
        return descriptor

    def lookup(self, key: bytes) -> bytes | None:
        """Return the value of `key`, None where there is none."""
        self._check_size("key", key, self.key_size)
        value = ctypes.create_string_buffer(self.entry_size)
        result = _library().bpf_map_lookup_elem(self.fd, key, value)
        if result == -errno.ENOENT:
            return None
        _check(f"{self}: look-up", result)
        return value.raw

    def update(self, key: bytes, value: bytes) -> None:
        """Set the value of `key`; add to a queue, whose key is empty. Raises ProbeError, also when the map is full."""
        _check(f"{self}: update", self._update(key, value))

    def try_update(self, key: bytes, value: bytes) -> bool:
        """Set the value of `key`; return False where the map is full."""
        result = self._update(key, value)
        if result == -errno.E2BIG:
            return False
        _check(f"{self}: update", result)
        return True

    def _update(self, key: bytes, value: bytes) -> int:
        self._check_size("key", key, self.key_size)
        self._check_size("value", value, self.entry_size)
        # A queue has no keys, and the kernel takes no pointer to none.
        return int(_library().bpf_map_update_elem(self.fd, key or None, value, 0))

    def delete(self, key: bytes) -> bool:
        """Remove `key`; return whether it was there."""
        self._check_size("key", key, self.key_size)
        result = _library().bpf_map_delete_elem(self.fd, key)
        if result == -errno.ENOENT:
            return False
        _check(f"{self}: delete", result)
        return True

    def items(self) -> Iterator[tuple[bytes, bytes]]:
        """Yield every key with its value, by batch look-up where the kernel has it (Linux 5.6, arrays 5.13).

        What is added or removed meanwhile may be left out or come twice; what stays comes at least once.
        """
        try:
            yield from self._items_by_batch()
        except _NoBatchError:
            yield from self._items_one_by_one()

    def _items_by_batch(self) -> Iterator[tuple[bytes, bytes]]:
        library, descriptor = _library(), self.fd
        capacity = max(1, min(self.max_entries, _BATCH_BYTES // (self.key_size + self.entry_size)))
        position: ctypes.Array[ctypes.c_char] | None = None
        while True:
            keys = ctypes.create_string_buffer(capacity * self.key_size)
            values = ctypes.create_string_buffer(capacity * self.entry_size)
            following = ctypes.create_string_buffer(max(self.key_size, 8))
            count = _u32(capacity)
            result = library.bpf_map_lookup_batch(
                descriptor, position, following, keys, values, ctypes.byref(count), None
            )
            if result == -errno.ENOSPC:  # one hash bucket holds more than fits
                capacity *= 2
                continue
            if position is None and result in {-errno.EINVAL, -errno.EOPNOTSUPP, -_ENOTSUPP}:
                raise _NoBatchError
            if result != -errno.ENOENT:
                _check(f"{self}: batch look-up", result)
            raw_keys, raw_values = keys.raw, values.raw
            for index in range(count.value):
                yield (
                    raw_keys[index * self.key_size : (index + 1) * self.key_size],
                    raw_values[index * self.entry_size : (index + 1) * self.entry_size],
                )
            if result == -errno.ENOENT:
                return
            position = following

    def _items_one_by_one(self) -> Iterator[tuple[bytes, bytes]]:
        library, descriptor = _library(), self.fd
        key: bytes | None = None
        following = ctypes.create_string_buffer(self.key_size)
        # The walk starts over when the key it stands on is deleted. Bounded: a busy map must not hold it for ever.
        for _ in range(2 * self.max_entries + 1):
            result = library.bpf_map_get_next_key(descriptor, key, following)
            if result == -errno.ENOENT:
                return
            _check(f"{self}: next key", result)
            key = following.raw
            value = self.lookup(key)
            if value is not None:
                yield key, value

    def _check_size(self, what: str, data: bytes, size: int) -> None:
        if len(data) != size:
            whole = f"{self}: a {what} of {len(data)} bytes, wanted {size}"
            raise ProbeError(whole, "build the objects anew: make bpf")


class _NoBatchError(Exception):
    """This kernel has no batch look-up for this type of map."""


def _check(what: str, result: int) -> int:
    """Return `result`, or raise for a negative errno."""
    if result < 0:
        raise _failure(what, -result)
    return int(result)


def _descriptors() -> set[int]:
    """The descriptors that this process has open."""
    found = set()
    for entry in list(Path("/proc/self/fd").iterdir()):
        try:
            os.fstat(int(entry.name))
        except OSError:
            continue  # the list's own
        found.add(int(entry.name))
    return found


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except PermissionError:
        return False


class Object:
    """A BPF object file: opened, then set up, then loaded, then attached.

    Use it as a context manager; close() detaches its programs and gives back their descriptors and maps. Maps whose
    descriptors another process holds live on there.
    """

    def __init__(self, path: Path) -> None:
        """Open and parse `path`. Raises HostError without libbpf, ProbeError when the file is missing or no object."""
        self.path = path
        self._links: list[Link] = []
        self._handle: int | None = None
        library = _library()
        if not path.is_file():
            raise ProbeError(f"there is no BPF object {path}", "build the objects: make bpf")
        _log.clear()
        ctypes.set_errno(0)
        self._handle = library.bpf_object__open(os.fsencode(path))
        if not self._handle:
            raise _failure(f"cannot open the BPF object {path}", ctypes.get_errno())
        self._loaded = False
        programs, maps = self._each(library.bpf_object__next_program), self._each(library.bpf_object__next_map)
        self.programs: tuple[Program, ...] = tuple(Program(self, each) for each in programs)
        self.maps: tuple[Map, ...] = tuple(Map(self, each) for each in maps)

    def _each(self, following: ctypes._NamedFuncPointer) -> Iterator[int]:
        current = following(self._handle, None)
        while current:
            yield current
            current = following(self._handle, current)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def check_open(self) -> int:
        """Return libbpf's handle; raise ProbeError once the object is closed, since its parts are freed memory then."""
        if self._handle is None:
            raise ProbeError(f"the BPF object {self.path} is closed", "open it again")
        return self._handle

    def map(self, name: str) -> Map:
        """Return the map that C calls `name`. Raises ProbeError."""
        for each in self.maps:
            if each.name == name:
                return each
        raise ProbeError(f"{self.path} has no map {name}", "build the objects anew: make bpf")

    def program(self, name: str) -> Program:
        """Return the program whose C function is `name`. Raises ProbeError."""
        for each in self.programs:
            if each.name == name:
                return each
        raise ProbeError(f"{self.path} has no program {name}", "build the objects anew: make bpf")

    def set_global(self, name: str, value: int) -> None:
        """Set a global integer, bool or enum of C before load(): `const volatile` ones are constants to the verifier.

        Raises ProbeError for an unknown name, a value that does not fit, or after load().
        """
        handle = self.check_open()
        if self._loaded:
            raise ProbeError(f"{self.path}: global {name} set after load", "set globals before load()")
        section, offset, size = self._find_global(name)
        if not -(1 << (size * 8 - 1)) <= value < 1 << (size * 8):
            what = f"{self.path}: {value} does not fit the {size} bytes of global {name}"
            raise ProbeError(what, "choose a smaller value")
        library = _library()
        data_map = library.bpf_object__find_map_by_name(handle, section.encode())
        length = _size()
        data = library.bpf_map__initial_value(data_map, ctypes.byref(length)) if data_map else None
        if not data or offset + size > length.value:
            what = f"{self.path}: section {section} of global {name} has no memory"
            raise ProbeError(what, "build the objects anew: make bpf")
        ctypes.memmove(data + offset, (value % (1 << (size * 8))).to_bytes(size, sys.byteorder), size)

    def _find_global(self, name: str) -> tuple[str, int, int]:
        """Return the section, offset and size of a global. libbpf has put the true offsets into its copy of the BTF."""
        library = _library()
        btf = library.bpf_object__btf(self.check_open())
        if not btf:
            raise ProbeError(f"{self.path} has no BTF", "compile it with -g")
        for index in range(1, library.btf__type_cnt(btf)):
            section = library.btf__type_by_id(btf, index)
            name_offset, info, _ = (_u32 * 3).from_address(section)
            if info >> 24 & 0x1F != _BTF_KIND_DATASEC:
                continue
            members = (_u32 * 3 * (info & 0xFFFF)).from_address(section + 12)  # struct btf_var_secinfo
            for variable, offset, size in members:
                variable_name = _u32.from_address(library.btf__type_by_id(btf, variable)).value
                if library.btf__name_by_offset(btf, variable_name) == name.encode() and size in {1, 2, 4, 8}:
                    return library.btf__name_by_offset(btf, name_offset).decode(), offset, size
        raise ProbeError(f"{self.path} has no global {name} of 1, 2, 4 or 8 bytes", "build the objects anew: make bpf")

    def load(self) -> None:
        """Make the maps, load the wanted programs. Raises HostError, or ProbeError with the verifier's log."""
        _log.clear()
        _check(f"cannot load the BPF object {self.path}", _library().bpf_object__load(self.check_open()))
        self._loaded = True

    def attach(self, *programs: Program) -> list[Link]:
        """Attach `programs`, or without an argument all that were loaded. The first failure detaches the others."""
        links: list[Link] = []
        try:
            for program in programs or [each for each in self.programs if each.autoload]:
                links.append(program.attach())
        except FootlightError:
            for link in links:
                link.destroy()
            raise
        return links

    def adopt(self, link: Link) -> Link:
        """Make `link` this object's to destroy; return it."""
        self._links.append(link)
        return link

    def close(self) -> None:
        """Detach and unload. A second call does nothing."""
        for link in reversed(self._links):
            link.destroy()
        self._links.clear()
        handle, self._handle = self._handle, None
        if handle is not None:
            _library().bpf_object__close(handle)
