"""The manager of uprobes and USDT probes, with a real library in real processes that come, go and hide."""

from __future__ import annotations

import mmap
import os
import shutil
import struct
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from probes.libbpf import Object
from probes.user_probes import Scope, Symbol, UserProbes
from tests.kernel.compile import compile_bpf
from tests.kernel.one_probe import wait_for
from tests.standins.places import build

SOURCE = Path(__file__).parent / "bpf" / "user_probes.bpf.c"
LIBRARY = "libplaces.so.1"
FIRST, RETURN, SECOND, USDT, ALIAS = range(5)
"""Cookies."""
FUNCTIONS = (
    Symbol("returned", LIBRARY, "places_first", RETURN, returns=True),
    Symbol("entered", LIBRARY, "places_first", FIRST),
    Symbol("entered", LIBRARY, "places_second", SECOND),
    Symbol("entered", LIBRARY, "places_alias", ALIAS),
)
PLACE = Symbol("passed", LIBRARY, "places:here", USDT, usdt=True)


class Visitor:
    """A process that visits the places of the library."""

    def __init__(self, command: Sequence[str | Path]) -> None:
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.pid = self._said()

    def _said(self) -> int:
        assert self._process.stdout is not None
        return int(self._process.stdout.readline())

    def do(self, order: str) -> int:
        assert self._process.stdin is not None
        self._process.stdin.write(order + "\n")
        self._process.stdin.flush()
        return self._said()

    def open(self, library: Path) -> Visitor:
        self.do(f"open {library}")
        return self

    def visit(self, first: int, second: int = 0) -> int:
        """Visit; return the semaphore of the USDT probe as the last visit to it found it."""
        return self.do(f"{first} {second}")

    def tell(self, order: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(order + "\n")
        self._process.stdin.flush()

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(10)
        self._process.stdout.close()


class Attached:
    """A manager over a loaded object, and what its programs counted."""

    def __init__(self, owner: Object, probes: UserProbes) -> None:
        self._owner = owner
        self.probes = probes

    def follow(self, *visitors: Visitor) -> None:
        self.probes.follow({visitor.pid: index for index, visitor in enumerate(visitors)})

    def hits(self, *cookies: int) -> list[int]:
        table = self._owner.map("hits")
        return [struct.unpack("=Q", table.lookup(struct.pack("=I", cookie)) or b"")[0] for cookie in cookies]


Attach = Callable[..., Attached]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory, able_host: None) -> Path:
    return compile_bpf(SOURCE, tmp_path_factory.mktemp("bpf"))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return build(tmp_path_factory.mktemp("places"))


@pytest.fixture
def attach(compiled: Path) -> Iterator[Attach]:
    with ExitStack() as stack:

        def one(symbols: Sequence[Symbol] = FUNCTIONS, *, scope: Scope = Scope.PROCESS, multi: bool = True) -> Attached:
            owner = stack.enter_context(closing(Object(compiled)))
            probes = stack.enter_context(closing(UserProbes(owner, symbols, scope=scope, multi=multi)))
            owner.load()
            return Attached(owner, probes)

        yield one


@pytest.fixture
def start(built: tuple[Path, Path]) -> Iterator[Callable[[], Visitor]]:
    """Starts a process that does not have the library yet."""
    with ExitStack() as stack:
        yield lambda: stack.enter_context(closing(Visitor([built[1]])))


Start = Callable[[], Visitor]


@pytest.mark.parametrize(
    ("scope", "multi"),
    [(Scope.PROCESS, True), (Scope.FILE, True), (Scope.FILE, False)],
    ids=["process", "file", "perf"],
)
def test_visits_are_counted_exactly(
    attach: Attach, start: Start, built: tuple[Path, Path], scope: Scope, multi: bool
) -> None:
    visitor = start().open(built[0])
    attached = attach(scope=scope, multi=multi)
    attached.follow(visitor)
    assert attached.probes.attached == {visitor.pid}
    assert attached.probes.files == (str(built[0]),)
    visitor.visit(10_007, 101)
    assert attached.hits(FIRST, RETURN, SECOND, ALIAS) == [10_007, 10_007, 101, 0], "a function of two names is one"
    attached.follow()
    attached.probes.close()
    assert attached.probes.attached == frozenset()
    visitor.visit(17, 17)
    assert attached.hits(FIRST, RETURN, SECOND) == [10_007, 10_007, 101]
    assert attached.probes.failed == 0


def test_a_usdt_probe_is_attached_with_its_semaphore(attach: Attach, start: Start, built: tuple[Path, Path]) -> None:
    visitor = start().open(built[0])
    attached = attach([PLACE])
    assert visitor.visit(0, 3) == 0
    attached.follow(visitor)
    assert visitor.visit(0, 499) == 1
    assert attached.hits(USDT) == [499]
    attached.follow()
    attached.probes.close()
    assert visitor.visit(0, 5) == 0
    assert attached.hits(USDT) == [499]


def test_functions_and_usdt_probes_go_together(attach: Attach, start: Start, built: tuple[Path, Path]) -> None:
    visitor = start().open(built[0])
    attached = attach([*FUNCTIONS, PLACE], scope=Scope.FILE)
    attached.follow(visitor)
    visitor.visit(23, 29)
    assert attached.hits(FIRST, SECOND, USDT) == [23, 29, 29]


def test_a_library_that_is_loaded_later_is_found_at_the_next_round(
    attach: Attach, start: Start, built: tuple[Path, Path]
) -> None:
    attached, visitor = attach(), start()
    attached.follow(visitor)
    assert attached.probes.attached == frozenset()
    visitor.open(built[0])
    attached.follow(visitor)
    visitor.visit(13)
    assert attached.hits(FIRST) == [13]


@pytest.mark.parametrize(("scope", "seen"), [(Scope.PROCESS, 0), (Scope.FILE, 7)], ids=["process", "file"])
def test_what_a_process_forks_is_seen_by_scope(
    attach: Attach, start: Start, built: tuple[Path, Path], scope: Scope, seen: int
) -> None:
    visitor = start().open(built[0])
    attached = attach(scope=scope)
    attached.follow(visitor)
    child = visitor.do("fork")
    visitor.visit(7)
    assert attached.hits(FIRST) == [seen]
    attached.probes.follow({visitor.pid: 0, child: 0})
    visitor.visit(11)
    assert attached.hits(FIRST) == [seen + 11]
    assert visitor.do("end") == 0, "the child ends, and its parent says that it waited for it"
    visitor.visit(2)
    assert attached.hits(FIRST) == [seen + 11 + 2]


def test_a_file_is_let_go_with_its_last_process(attach: Attach, start: Start, built: tuple[Path, Path]) -> None:
    attached, first, second = attach(scope=Scope.FILE), start().open(built[0]), start().open(built[0])
    attached.follow(first, second)
    attached.follow(first)
    second.visit(3)
    assert attached.hits(FIRST) == [3], "this scope is for programs that ask for the target themselves"
    attached.follow()
    wait_for(lambda: not _hits_more(attached, second), "it is detached")


def _hits_more(attached: Attached, visitor: Visitor) -> bool:
    before = attached.hits(FIRST)
    visitor.visit(1)
    return attached.hits(FIRST) != before


@pytest.mark.parametrize(
    ("scope", "multi"),
    [(Scope.PROCESS, True), (Scope.FILE, True), (Scope.FILE, False)],
    ids=["process", "file", "perf"],
)
def test_links_that_are_being_closed_count_nothing_twice(
    attach: Attach, start: Start, built: tuple[Path, Path], scope: Scope, multi: bool
) -> None:
    attached = attach([*FUNCTIONS, PLACE], scope=scope, multi=multi)
    visitor = start().open(built[0])
    for _ in range(3):
        attached.follow(visitor)
        visitor.visit(11, 7)
        attached.follow()
    for _ in range(3):
        visitor = start().open(built[0])  # one went, and the next one came, in one round
        attached.follow(visitor)
        visitor.visit(11, 7)
    assert attached.hits(FIRST, RETURN, SECOND, USDT) == [66, 66, 42, 42]


def test_symbols_are_for_the_service_that_they_name(attach: Attach, start: Start, built: tuple[Path, Path]) -> None:
    first, second = start().open(built[0]), start().open(built[0])
    attached = attach([Symbol("entered", LIBRARY, "places_first", FIRST, service=1)])
    attached.follow(first, second)
    assert attached.probes.attached == {second.pid}
    first.visit(5)
    second.visit(3)
    assert attached.hits(FIRST) == [3]


def test_a_path_and_a_name_of_the_same_file_are_both_attached(
    attach: Attach, start: Start, built: tuple[Path, Path], tmp_path: Path
) -> None:
    link = tmp_path / "elsewhere.so"
    link.symlink_to(built[0])
    visitor = start().open(built[0])
    attached = attach(
        [Symbol("entered", str(link), "places_first", FIRST), Symbol("entered", LIBRARY, "places_first", SECOND)],
        scope=Scope.FILE,
    )
    attached.follow(visitor)
    visitor.visit(19)
    assert attached.hits(FIRST, SECOND) == [19, 19]


def test_an_executable_is_a_file_like_another(attach: Attach, start: Start, built: tuple[Path, Path]) -> None:
    visitor = start()
    for name in (str(built[1]), "visitor"):
        attached = attach([Symbol("entered", name, "main", FIRST)])
        attached.follow(visitor)
        assert attached.probes.attached == {visitor.pid}


@pytest.mark.parametrize("name", ["libplaces.so.2", "libplace.so.1", "/nowhere/libplaces.so.1", "places.so"])
def test_another_library_is_left_alone(attach: Attach, start: Start, built: tuple[Path, Path], name: str) -> None:
    visitor = start().open(built[0])
    attached = attach([Symbol("entered", name, "places_first", FIRST)])
    attached.follow(visitor)
    assert (attached.probes.attached, attached.probes.failed) == (frozenset(), 0)


def test_what_a_library_does_not_have_is_said(attach: Attach, start: Start, built: tuple[Path, Path]) -> None:
    visitor = start().open(built[0])
    attached = attach(
        [
            Symbol("entered", LIBRARY, "places_first", FIRST),
            Symbol("entered", LIBRARY, "places_third", SECOND),
            Symbol("passed", LIBRARY, "places:there", USDT, usdt=True),
        ],
        scope=Scope.FILE,
    )
    attached.follow(visitor)
    assert {(each.path, each.name, each.reason) for each in attached.probes.missing} == {
        (str(built[0]), "places_third", "it has no such function"),
        (str(built[0]), "places:there", "it has no such USDT probe"),
    }
    assert attached.probes.failed == 0
    visitor.visit(3)
    assert attached.hits(FIRST) == [3]


def test_a_deleted_library_is_attached_to(
    attach: Attach, start: Start, built: tuple[Path, Path], tmp_path: Path
) -> None:
    copied = Path(shutil.copy(built[0], tmp_path))
    visitor = start().open(copied)
    copied.unlink()
    attached = attach([*FUNCTIONS, PLACE], scope=Scope.FILE)
    attached.follow(visitor)
    visitor.visit(31, 37)
    assert attached.hits(FIRST, USDT) == [31, 37]


def test_a_library_in_another_mount_namespace_is_attached_to(
    attach: Attach, built: tuple[Path, Path], tmp_path: Path
) -> None:
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    script = 'mount -t tmpfs none "$1" && cp "$2" "$1" && exec "$3"'
    command = ["unshare", "--mount", "sh", "-c", script, "sh", hidden, built[0], built[1]]
    with closing(Visitor(command)) as visitor:
        visitor.open(hidden / built[0].name)
        assert not list(hidden.iterdir())
        for name in (LIBRARY, str(hidden / built[0].name)):
            attached = attach([Symbol("entered", name, "places_first", FIRST)])
            attached.follow(visitor)
            visitor.visit(41)
            assert attached.hits(FIRST) == [41]


def test_a_fifo_where_a_library_is_expected_holds_nobody(attach: Attach, start: Start, tmp_path: Path) -> None:
    fifo = tmp_path / "libplaces.so.1"
    os.mkfifo(fifo)
    attached = attach([Symbol("entered", str(fifo), "places_first", FIRST)])
    began = time.monotonic()
    attached.follow(start())
    assert time.monotonic() - began < 1
    assert attached.probes.attached == frozenset()


def test_a_mapped_file_that_is_no_library_is_a_counted_failure(attach: Attach, tmp_path: Path) -> None:
    lie = tmp_path / "libplaces.so.1"
    lie.write_bytes(b"\x7fELF" + b"\xff" * 8188)
    attached = attach()
    with lie.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ | mmap.PROT_EXEC):
        for _ in range(3):
            attached.probes.follow({os.getpid(): 0})
        assert attached.probes.attached == frozenset()
        assert attached.probes.failed == 1


def test_a_process_that_is_gone_is_no_failure(attach: Attach, built: tuple[Path, Path]) -> None:
    attached = attach()
    with closing(Visitor([built[1]])) as visitor:
        visitor.open(built[0])
    attached.follow(visitor)
    assert (attached.probes.attached, attached.probes.failed) == (frozenset(), 0)
