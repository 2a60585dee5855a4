"""The manager of uprobes over a /proc of files, and the reader of ELF files over hostile ones."""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from probes import elf
from probes.elf import ElfError, find_functions, find_usdt_probes
from probes.errors import ProbeError
from probes.libbpf import Object
from probes.user_probes import RETRY_S, Scope, Symbol, UserProbes

ELF = min(Path(sysconfig.get_config_var("DESTSHARED")).glob("*.so"))
"""A library that comes with the interpreter; it exports its PyInit function."""
EXPORTED = "PyInit_" + ELF.name.partition(".")[0]
IMAGE = ELF.read_bytes()
CODE = Symbol("entered", "libsomething.so.1", EXPORTED)


@dataclass
class Link:
    closed: list[Link]
    any_thread: bool = False

    def destroy(self) -> None:
        self.closed.append(self)


@dataclass
class Program:
    """Says what was attached, and may be told to fail."""

    attached: list[tuple[list[int], int]] = field(default_factory=list)
    closed: list[Link] = field(default_factory=list)
    failing: bool = False

    def set_uprobe_multi(self) -> None:
        pass

    def attach_uprobe_multi(
        self, path: str, offsets: Sequence[int], cookies: Sequence[int], *, tgid: int, returns: bool
    ) -> Link:
        assert os.path.samefile(path, ELF)
        if self.failing:
            raise ProbeError(f"cannot attach to {path}: too much", "wait")
        self.attached.append((list(offsets), tgid))
        return Link(self.closed)


class World:
    """A /proc, a clock, and the manager in between."""

    def __init__(self, root: Path, scope: Scope) -> None:
        self.root = root
        self.now = 1000.0
        self.step = 0.0
        """How long it takes to look at the clock: work takes its time."""
        self.program = Program()
        owner = cast("Object", type("Owner", (), {"program": lambda _, __: self.program})())
        self.mapped: list[tuple[int, int, int]] = []
        self.probes = UserProbes(
            owner,
            [CODE],
            scope=scope,
            mapped=lambda *where: self.mapped.append(where),
            multi=True,
            proc=str(root),
            clock=self._clock,
        )

    def _clock(self) -> float:
        self.now += self.step
        return self.now

    def process(self, pid: int, *, start: int = 1, stack: int = 2, code: int = 3, has: bool = True) -> None:
        folder = self.root / str(pid)
        (folder / "map_files").mkdir(parents=True, exist_ok=True)
        numbers = ["0"] * 50
        numbers[18], numbers[24] = str(start), str(stack)
        (folder / "stat").write_text(f"{pid} (a) b) S " + " ".join(numbers))
        (folder / "status").write_text(f"Name:\ta\nVmExe:\t{code} kB\nVmLib:\t4 kB\n")
        lines = ["00400000-00401000 r-xp 00000000 08:01 11 /usr/bin/a", "7f00-7f01 rw-p 00000000 00:00 0 [heap]"]
        if has:
            lines.append(f"5000-6000 r-xp 00000000 08:01 {os.stat(ELF).st_ino} /lib/libsomething.so.1")
            target = folder / "map_files" / "5000-6000"
            target.unlink(missing_ok=True)
            target.symlink_to(ELF)
        (folder / "maps").write_text("\n".join(lines) + "\n")

    def follow(self, *pids: int) -> None:
        self.probes.follow(dict.fromkeys(pids, 0))


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path, Scope.PROCESS)
    with closing(made.probes):
        yield made


def test_a_process_is_attached_to_once(world: World) -> None:
    world.process(7)
    for _ in range(3):
        world.follow(7)
    (((offset,), tgid),) = world.program.attached
    assert (offset, tgid) == (find_functions_of(IMAGE)[EXPORTED], 7)
    assert world.mapped == [(7, 0x5000, 0x6000)]


def test_an_unchanged_process_is_not_looked_into_again(world: World) -> None:
    world.process(7)
    world.follow(7)
    (world.root / "7" / "maps").unlink()
    world.follow(7)
    assert world.probes.attached == {7}


def test_more_code_makes_it_look_again(world: World) -> None:
    world.process(7, has=False)
    world.follow(7)
    assert world.probes.attached == frozenset()
    world.process(7, code=5)
    world.follow(7)
    assert world.probes.attached == {7}


@pytest.mark.parametrize("other", [{"start": 9}, {"stack": 9}], ids=["reused pid", "exec"])
def test_another_program_in_its_place_is_attached_to_anew(world: World, other: dict[str, int]) -> None:
    world.process(7)
    world.follow(7)
    world.process(7, **other)
    world.follow(7)
    assert [tgid for _, tgid in world.program.attached] == [7, 7]
    assert len(world.program.closed) == 1
    assert world.mapped == [(7, 0x5000, 0x6000), (7, 0, 0), (7, 0x5000, 0x6000)]


def test_a_process_that_is_not_followed_any_more_is_let_go(world: World) -> None:
    world.process(7)
    world.process(8)
    world.follow(7, 8)
    world.follow(8)
    assert world.probes.attached == {8}
    assert len(world.program.closed) == 1
    assert world.mapped[-1] == (7, 0, 0)


def test_a_file_is_let_go_with_its_last_process(tmp_path: Path) -> None:
    world = World(tmp_path, Scope.FILE)
    world.process(7)
    world.process(8)
    world.follow(7, 8)
    assert [tgid for _, tgid in world.program.attached] == [0]
    world.follow(8)
    assert not world.program.closed
    world.follow()
    assert len(world.program.closed) == 1


def test_a_round_ends_in_time_and_the_next_one_goes_on(world: World) -> None:
    pids = range(100, 300)
    for pid in pids:
        world.process(pid)
    world.step = 0.01
    seen, rounds = 0, 0
    while seen < len(pids):
        began = world.now
        world.follow(*pids)
        assert world.now - began < 0.2
        assert len(world.probes.attached) > seen, "each round gets on"
        seen = len(world.probes.attached)
        rounds += 1
    assert rounds > 5


def test_a_failure_is_counted_and_tried_again_later(world: World) -> None:
    world.process(7)
    world.program.failing = True
    for _ in range(3):
        world.follow(7)
    assert world.probes.failed == 1
    (missing,) = world.probes.missing
    assert (missing.path, missing.reason) == (
        "/lib/libsomething.so.1",
        "cannot attach to /lib/libsomething.so.1: too much",
    )
    world.program.failing = False
    world.now += RETRY_S
    world.follow(7)
    assert world.probes.attached == {7}


def test_a_mapping_that_is_gone_is_no_failure(world: World) -> None:
    world.process(7)
    (world.root / "7" / "map_files" / "5000-6000").unlink()
    world.follow(7)
    assert (world.probes.attached, world.probes.failed) == (frozenset(), 0)


def test_what_is_not_a_regular_file_is_left_alone(world: World) -> None:
    world.process(7)
    place = world.root / "7" / "map_files" / "5000-6000"
    place.unlink()
    os.mkfifo(place)
    world.follow(7)
    assert (world.probes.attached, world.probes.failed) == (frozenset(), 0)


def test_a_process_with_endless_files_of_the_name_is_followed_to_some(world: World) -> None:
    world.process(7)
    lines = [f"{n:x}000-{n:x}800 r-xp 00000000 08:01 {n} /lib/libsomething.so.{n}\n" for n in range(1, 5000)]
    (world.root / "7" / "maps").write_text("".join(lines))
    world.follow(7)
    assert world.probes.failed == 1


def test_names_that_processes_choose_neither_reach_a_terminal_nor_fill_the_log(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    world.process(7)
    broken = world.root / "broken"
    for number in range(211):
        broken.write_bytes(b"\x7fELF" + b"x" * number)  # another file each time
        place = world.root / "7" / "map_files" / "5000-6000"
        place.unlink()
        place.symlink_to(broken)
        (world.root / "7" / "maps").write_text(f"5000-6000 r-xp 0 08:01 {number + 1} /lib/libsomething.so.1.\x1b[31m\n")
        (world.root / "7" / "status").write_text(f"VmExe:\t{number} kB\n")
        world.follow(7)
    assert world.probes.failed == 211
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 100
    assert all(line.isprintable() and "libsomething.so.1.\ufffd[31m" in line for line in said)


def test_paths_of_what_is_missing_are_printable(world: World) -> None:
    world.process(7)
    maps = world.root / "7" / "maps"
    maps.write_text(maps.read_text().replace("libsomething.so.1", "libsomething.so.1.\x1b[31m"))
    world.probes = UserProbes(
        cast("Object", type("Owner", (), {"program": lambda _, __: world.program})()),
        [Symbol("entered", "/lib/libsomething.so.1.\x1b[31m", "no_such_function")],
        scope=Scope.PROCESS,
        multi=True,
        proc=str(world.root),
    )
    world.follow(7)
    (missing,) = world.probes.missing
    assert missing.path == "/lib/libsomething.so.1.\ufffd[31m"


@pytest.mark.parametrize("raw", [b"", b"7", b"7 (", b"7 (a) S 1", b"\xff" * 4096])
def test_damaged_files_in_proc_are_a_process_that_is_gone(world: World, raw: bytes) -> None:
    world.process(7)
    (world.root / "7" / "stat").write_bytes(raw)
    world.follow(7)
    assert (world.probes.attached, world.probes.failed) == (frozenset(), 0)


# ---- ELF ----


def find_functions_of(image: bytes, names: Sequence[str] = (EXPORTED,)) -> dict[str, int]:
    fd = os.memfd_create("image")
    try:
        os.write(fd, image)
        find_usdt_probes(fd)
        return dict(find_functions(fd, names).offsets)
    finally:
        os.close(fd)


def test_a_function_is_found_where_it_is() -> None:
    found = find_functions_of(IMAGE, [EXPORTED, "PyInit_", EXPORTED + "x", "PyModule_Create2"])
    assert list(found) == [EXPORTED], "others are not there, or are another library's"
    assert 0 < found[EXPORTED] < len(IMAGE)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda image: b"", "cut short"),
        (lambda image: image[:4096], "cut short"),
        (lambda image: b"#!/bin/sh\n" * 100, "no ELF file"),
        (lambda image: image[:4] + b"\1" + image[5:], "64-bit"),
        (lambda image: image[:40] + b"\xff" * 8 + image[48:], "damaged"),
        (lambda image: image[:60] + b"\xff\xff" + image[62:], "too many"),
    ],
    ids=["empty", "cut", "script", "32-bit", "sections elsewhere", "endless sections"],
)
def test_damage_is_said(damage: Callable[[bytes], bytes], words: str) -> None:
    with pytest.raises(ElfError, match=words):
        find_functions_of(damage(IMAGE))


def test_a_table_that_is_claimed_a_thousand_times_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    sections_at = int.from_bytes(IMAGE[40:48], "little")
    count = int.from_bytes(IMAGE[60:62], "little")
    image = bytearray(IMAGE[:sections_at])
    sections = [IMAGE[sections_at + 64 * number :][:64] for number in range(count)]
    image += b"".join(sections + [each for each in sections if int.from_bytes(each[4:8], "little") in (2, 6, 11)] * 997)
    image[60:62] = ((len(image) - sections_at) // 64).to_bytes(2, "little")
    reads = []
    monkeypatch.setattr(elf, "_table", lambda fd, section, real=elf._table: reads.append(section) or real(fd, section))
    assert list(find_functions_of(bytes(image), [EXPORTED, "no_such"])) == [EXPORTED]
    assert len(reads) == len(set(reads)) <= 6


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_damage_ends_in_an_answer_or_an_elf_error(data: Any) -> None:  # noqa: ANN401 - hypothesis's own
    image = bytearray(IMAGE[: data.draw(st.integers(0, len(IMAGE)))] if data.draw(st.booleans()) else IMAGE)
    sections = int.from_bytes(IMAGE[40:48], "little")
    for _ in range(data.draw(st.integers(0, 8))):
        near = data.draw(st.sampled_from([0, sections]))
        at = near + data.draw(st.integers(0, 1500))
        if at < len(image):
            image[at] = data.draw(st.integers(0, 255))
    try:
        found = find_functions_of(bytes(image))
    except ElfError:
        return
    assert all(isinstance(offset, int) for offset in found.values())
